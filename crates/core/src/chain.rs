//! Chains of backups: a full one and the incremental ones that build on it.
//!
//! Two questions, both pure: which backups a backup needs to be restored, and what a new one may build on.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{BackupId, BackupKind, BackupRecord, Lsn, ParseIdError, TimelineHistory};

/// PostgreSQL summarizes its WAL, and has a format for incremental backups, from this version on.
pub const FIRST_MAJOR: u32 = 17;

/// What kind of backup was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackupType {
    /// An incremental one where that is possible, else a full one.
    #[default]
    Auto,
    /// Everything.
    Full,
    /// What has changed since the last full backup.
    Differential,
    /// What has changed since the last backup.
    Incremental,
}

impl fmt::Display for BackupType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            BackupType::Auto => "auto",
            BackupType::Full => "full",
            BackupType::Differential => "differential",
            BackupType::Incremental => "incremental",
        })
    }
}

impl FromStr for BackupType {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<BackupType, ParseIdError> {
        [BackupType::Auto, BackupType::Full, BackupType::Differential, BackupType::Incremental]
            .into_iter()
            .find(|wanted| wanted.to_string() == text)
            .ok_or_else(|| ParseIdError::new("type of backup (auto, full, differential or incremental)", text))
    }
}

/// Why a backup can't be restored by what the repository holds of its chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ChainError {
    /// A backup that it builds on isn't there.
    #[error("backup {backup} builds on {missing}, which is not in the repository")]
    Missing {
        /// The backup.
        backup: BackupId,
        /// What isn't there.
        missing: BackupId,
    },
    /// What the records say can't be.
    #[error("the record of backup {backup} names a parent that can't be its own, or none")]
    Nonsense {
        /// The backup.
        backup: BackupId,
    },
}

/// The backups that a restore of this one needs: the full one first, itself last.
///
/// # Errors
/// [`ChainError`] if one of them isn't there.
pub fn chain<'a>(backup: &'a BackupRecord, backups: &'a [BackupRecord]) -> Result<Vec<&'a BackupRecord>, ChainError> {
    let mut chain = vec![backup];
    let mut link = backup;
    loop {
        let nonsense = ChainError::Nonsense { backup: link.id };
        link = match (link.id.kind(), link.parent) {
            (BackupKind::Full, None) => break,
            (BackupKind::Differential | BackupKind::Incremental, Some(parent)) => {
                let missing = ChainError::Missing { backup: backup.id, missing: parent };
                let found = backups.iter().find(|other| other.id == parent).ok_or(missing)?;
                // A parent is older, so that no chain goes in a circle.
                if found.stop_lsn > link.start_lsn || found.id >= link.id {
                    return Err(nonsense);
                }
                found
            }
            _ => return Err(nonsense),
        };
        chain.push(link);
    }
    chain.reverse();
    Ok(chain)
}

/// The server that is to be backed up.
#[derive(Clone, Debug)]
pub struct Server {
    /// PostgreSQL's major version.
    pub major: u32,
    /// Whether it summarizes its WAL (`summarize_wal`).
    pub summarizes: bool,
    /// Whether its pages carry checksums. `pg_checksums` changes that, and every page with it, without any WAL.
    pub data_checksums: bool,
    /// The way to the timeline on which it is.
    pub history: TimelineHistory,
}

/// What a new backup will be.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Choice {
    /// What it builds on; `None` for a full one.
    pub parent: Option<BackupId>,
    /// Its kind.
    pub kind: BackupKind,
    /// Why, a sentence for people.
    pub because: String,
    /// Whether it's another kind than was asked for.
    pub falls_back: bool,
}

impl Choice {
    /// A full backup in place of what was wanted.
    pub fn full_instead(wanted: BackupType, because: String) -> Choice {
        let falls_back = !matches!(wanted, BackupType::Full | BackupType::Auto);
        Choice { parent: None, kind: BackupKind::Full, because, falls_back }
    }
}

/// The server can't be backed up in this way.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "PostgreSQL {major} can't be backed up as {wanted}: only full backups can be taken of versions before {FIRST_MAJOR}"
)]
pub struct FullOnly {
    /// The server's major version.
    pub major: u32,
    /// What was wanted.
    pub wanted: BackupType,
}

/// Chooses what a new backup builds on. `broken` are backups of which something is known to be missing;
/// `longest_chain` is how many backups a restore may need at most.
///
/// # Errors
/// [`FullOnly`] if the server is too old for what was asked for by name.
pub fn choose(
    wanted: BackupType,
    backups: &[BackupRecord],
    broken: &[BackupId],
    server: &Server,
    longest_chain: usize,
) -> Result<Choice, FullOnly> {
    let full = |because: String| Ok(Choice::full_instead(wanted, because));
    if wanted == BackupType::Full {
        return full("a full backup was asked for".to_owned());
    }
    if server.major < FIRST_MAJOR {
        return match wanted {
            BackupType::Auto => full(format!("PostgreSQL {} has no incremental backups", server.major)),
            _ => Err(FullOnly { major: server.major, wanted }),
        };
    }
    if !server.summarizes {
        return full("the server doesn't summarize its WAL (summarize_wal is off)".to_owned());
    }
    let on_our_way = |backup: &&BackupRecord| {
        server.history.contains(backup.timeline, backup.stop_lsn) && backup.major_version() == server.major
    };
    let candidates = backups.iter().filter(on_our_way);
    let newest = match wanted {
        BackupType::Differential => {
            candidates.filter(|backup| backup.id.kind() == BackupKind::Full).max_by_key(|backup| position(backup))
        }
        _ => candidates.max_by_key(|backup| position(backup)),
    };
    let Some(parent) = newest else {
        return full(match backups.is_empty() {
            true => "there is no backup yet that it could build on".to_owned(),
            false => "no earlier backup lies on the way to this server's timeline".to_owned(),
        });
    };
    let chain = match chain(parent, backups) {
        Ok(chain) => chain,
        Err(error) => return full(error.to_string()),
    };
    if let Some(link) = chain.iter().find(|link| broken.contains(&link.id)) {
        return full(format!("of backup {}, on which it would build, something is missing", link.id));
    }
    if let Some(link) = chain.iter().find(|link| link.data_checksums != server.data_checksums) {
        return full(format!("page checksums were turned on or off since backup {}", link.id));
    }
    // What has been repaired since would come back from there: no WAL tells of it.
    if let Some(link) = chain.iter().find(|link| !link.damaged.is_empty()) {
        return full(format!("backup {}, on which it would build, holds damaged pages", link.id));
    }
    if chain.len() >= longest_chain {
        return full(format!("the last chain has {} backups, and may have {longest_chain}", chain.len()));
    }
    let kind = if wanted == BackupType::Differential { BackupKind::Differential } else { BackupKind::Incremental };
    let because = format!("it builds on {}, and is the {} of its chain", parent.id, ordinal(chain.len() + 1));
    Ok(Choice { parent: Some(parent.id), kind, because, falls_back: false })
}

/// Which of two backups on one way is the later one: clocks go wrong, the WAL doesn't.
fn position(backup: &BackupRecord) -> (Lsn, BackupId) {
    (backup.stop_lsn, backup.id)
}

fn ordinal(number: usize) -> String {
    let end = match (number % 100, number % 10) {
        (11..=13, _) => "th",
        (_, 1) => "st",
        (_, 2) => "nd",
        (_, 3) => "rd",
        _ => "th",
    };
    format!("{number}{end}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        TimelineId,
        backup::DamagedFile,
        plan::tests::{backup, history, lsn},
    };

    fn server() -> Server {
        Server { major: 17, summarizes: true, data_checksums: true, history: TimelineHistory::first(TimelineId::FIRST) }
    }

    fn full(start: u64) -> BackupRecord {
        BackupRecord { server_version: 170_010, ..backup(1, start, start + 10) }
    }

    fn on(parent: &BackupRecord, kind: BackupKind, start: u64) -> BackupRecord {
        let backup = full(start);
        BackupRecord { id: BackupId::new(backup.id.began(), kind), parent: Some(parent.id), ..backup }
    }

    fn chosen(wanted: BackupType, backups: &[BackupRecord]) -> Choice {
        choose(wanted, backups, &[], &server(), 4).unwrap()
    }

    fn is_full(choice: &Choice, because: &str, falls_back: bool) {
        assert_eq!((choice.parent, choice.kind, choice.falls_back), (None, BackupKind::Full, falls_back), "{choice:?}");
        assert!(choice.because.contains(because), "{choice:?}");
    }

    #[test]
    fn the_last_backup_is_built_on_and_a_differential_on_the_last_full_one() {
        let first = full(100);
        let second = on(&first, BackupKind::Incremental, 200);
        let third = on(&first, BackupKind::Differential, 300);
        let backups = [first.clone(), second, third.clone()];
        assert_eq!(chosen(BackupType::Auto, &backups).parent, Some(third.id));
        let incremental = chosen(BackupType::Incremental, &backups);
        assert_eq!((incremental.parent, incremental.kind), (Some(third.id), BackupKind::Incremental));
        assert!(incremental.because.contains("the 3rd of its chain"), "{incremental:?}");
        let differential = chosen(BackupType::Differential, &backups);
        assert_eq!((differential.parent, differential.kind), (Some(first.id), BackupKind::Differential));
        is_full(&chosen(BackupType::Full, &backups), "asked for", false);
    }

    #[test]
    fn what_can_not_be_built_on_means_a_full_one_and_why() {
        is_full(&chosen(BackupType::Auto, &[]), "no backup yet", false);
        is_full(&chosen(BackupType::Incremental, &[]), "no backup yet", true);
        let first = full(100);
        let second = on(&first, BackupKind::Incremental, 200);
        let both = [first.clone(), second.clone()];
        is_full(&chosen(BackupType::Incremental, &both[1..]), &format!("builds on {}", first.id), true);
        let broken = choose(BackupType::Incremental, &both, &[first.id], &server(), 4).unwrap();
        is_full(&broken, &format!("of backup {}", first.id), true);
        is_full(&choose(BackupType::Auto, &both, &[], &server(), 2).unwrap(), "has 2 backups", false);
        let off = Server { summarizes: false, ..server() };
        is_full(&choose(BackupType::Incremental, &both, &[], &off, 4).unwrap(), "summarize_wal", true);
        // Timeline 2 left timeline 1 before the second backup ended.
        let history = history(2, &[(1, lsn(205))]);
        let promoted = Server { history, ..server() };
        assert_eq!(choose(BackupType::Auto, &both, &[], &promoted, 4).unwrap().parent, Some(first.id));
        let other_major = Server { major: 18, ..server() };
        is_full(&choose(BackupType::Auto, &both, &[], &other_major, 4).unwrap(), "no earlier backup", false);
    }

    #[test]
    fn nothing_is_built_on_pages_that_changed_without_wal_or_were_damaged() {
        let first = full(100);
        let second = on(&first, BackupKind::Incremental, 200);
        let off = Server { data_checksums: false, ..server() };
        let both = [first.clone(), second.clone()];
        is_full(&choose(BackupType::Auto, &both, &[], &off, 4).unwrap(), "checksums were turned on or off", false);
        // Off and on again: the parent itself fits.
        let between = [BackupRecord { data_checksums: false, ..first.clone() }, second.clone()];
        is_full(&chosen(BackupType::Incremental, &between), &format!("since backup {}", first.id), true);
        let damage = DamagedFile { path: "base/5/16384".into(), relation: None, blocks: vec![1], count: 1 };
        let damaged = [BackupRecord { damaged: vec![damage], ..first.clone() }, second];
        is_full(&chosen(BackupType::Auto, &damaged), "holds damaged pages", false);
    }

    #[test]
    fn the_later_backup_is_told_by_the_wal_not_by_a_clock() {
        let first = full(100);
        // Taken later by a clock that was behind.
        let id = BackupId::new(full(50).id.began(), BackupKind::Full);
        let second = BackupRecord { id, ..full(200) };
        assert_eq!(chosen(BackupType::Auto, &[first, second]).parent, Some(id));
    }

    #[test]
    fn old_servers_have_full_backups_only() {
        let old = Server { major: 16, summarizes: false, ..server() };
        is_full(&choose(BackupType::Auto, &[full(100)], &[], &old, 4).unwrap(), "PostgreSQL 16", false);
        for wanted in [BackupType::Incremental, BackupType::Differential] {
            assert_eq!(choose(wanted, &[], &[], &old, 4), Err(FullOnly { major: 16, wanted }));
        }
    }

    #[test]
    fn a_chain_is_whole_or_says_what_is_missing() {
        let first = full(100);
        let second = on(&first, BackupKind::Incremental, 200);
        let third = on(&second, BackupKind::Incremental, 300);
        let backups = [third.clone(), first.clone(), second.clone()];
        let ids = |chain: Vec<&BackupRecord>| chain.iter().map(|link| link.id).collect::<Vec<_>>();
        assert_eq!(ids(chain(&third, &backups).unwrap()), [first.id, second.id, third.id]);
        assert_eq!(ids(chain(&first, &backups).unwrap()), [first.id]);
        let missing = ChainError::Missing { backup: third.id, missing: second.id };
        assert_eq!(chain(&third, &[third.clone(), first.clone()]), Err(missing));
        // A circle, and kinds that lie.
        let circle = BackupRecord { parent: Some(third.id), ..second.clone() };
        assert!(matches!(chain(&third, &[circle, third.clone()]), Err(ChainError::Nonsense { .. })));
        let orphan = BackupRecord { parent: None, ..second };
        assert!(matches!(chain(&orphan, &[]), Err(ChainError::Nonsense { .. })));
    }
}
