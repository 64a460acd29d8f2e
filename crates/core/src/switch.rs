//! Putting a restored data directory in the place of another one: what is noted of it on the disk, and what is to be done
//! next, whatever a crash has left.
//!
//! A database is one directory or several: its data directory, WAL that lies elsewhere, tablespaces. Each is a [`Root`]: what
//! is to be in its place was staged beside it, and what is in it now is kept beside it. A root is renamed as a whole, or,
//! where it's a mount point and has nothing beside it on its own volume, its content is moved.
//!
//! Nothing here touches a disk.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{
    BackupId, ParseIdError, SegmentName, SystemIdentifier, TimelineId,
    backup::{format_id_time, parse_id_time},
    recovery::RestoreOrder,
};

/// What stands inside a directory of PostgreSQL's begins like this: PostgreSQL's own base backup and pg_checksums leave such
/// names out (PG_TEMP_FILE_PREFIX), and so do our backups. pg_rewind doesn't copy them, but removes those that only its
/// target has.
const INSIDE_PREFIX: &str = "pgsql_tmp.";

/// The identity of a switch: when it was asked for (UTC, to the second), `20261121T061500Z`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SwitchId(Timestamp);

impl SwitchId {
    /// The id of a switch that is asked for at this time; fractions of the second are dropped.
    pub fn new(asked: Timestamp) -> SwitchId {
        SwitchId(Timestamp::from_second(asked.as_second()).unwrap_or(asked))
    }
}

impl fmt::Display for SwitchId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format_id_time(self.0))
    }
}

impl FromStr for SwitchId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<SwitchId, ParseIdError> {
        parse_id_time(text).map(SwitchId).ok_or_else(|| ParseIdError::new("id (like 20261121T061500Z)", text))
    }
}

impl Serialize for SwitchId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SwitchId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<SwitchId, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Where what belongs to a directory stands beside it, on the same volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Beside {
    home: PathBuf,
    prefix: String,
}

impl Beside {
    /// In the directory's parent: `<name>.<what>`. `None` for `/`, and for a name that isn't UTF-8.
    pub fn next_to(directory: &Path) -> Option<Beside> {
        let name = directory.file_name()?.to_str()?;
        Some(Beside { home: directory.parent()?.to_owned(), prefix: format!("{name}.") })
    }

    /// In the directory itself, under names that backups leave out.
    pub fn inside(directory: &Path) -> Beside {
        Beside { home: directory.to_owned(), prefix: INSIDE_PREFIX.to_owned() }
    }

    /// The directory that holds it.
    pub fn home(&self) -> &Path {
        &self.home
    }

    fn named(&self, what: &str) -> PathBuf {
        self.home.join(format!("{}{what}", self.prefix))
    }

    /// What is to take the directory's place.
    pub fn staged(&self) -> PathBuf {
        self.named("pgsidecar-staged")
    }

    /// What was in its place before a switch.
    pub fn kept(&self, id: SwitchId, purpose: &Purpose) -> PathBuf {
        let what = if matches!(purpose, Purpose::Undo { .. }) { "before-undo" } else { "before-restore" };
        self.named(&format!("{what}-{id}"))
    }

    /// The note of a switch that is prepared or under way.
    pub fn pending_note(&self) -> PathBuf {
        self.named("pgsidecar-switch.json")
    }

    /// The note of a switch that was carried out.
    pub fn done_note(&self, id: SwitchId, purpose: &Purpose) -> PathBuf {
        let kept = self.kept(id, purpose).into_os_string();
        let mut note = kept;
        note.push(".json");
        note.into()
    }

    /// Whether a name in [`Beside::home`] is the note of a switch that was carried out.
    pub fn is_done_note(&self, name: &str) -> bool {
        let rest = name.strip_prefix(&self.prefix).and_then(|rest| rest.strip_suffix(".json"));
        let id = rest
            .and_then(|rest| ["before-restore-", "before-undo-"].into_iter().find_map(|kind| rest.strip_prefix(kind)));
        id.is_some_and(|id| id.parse::<SwitchId>().is_ok())
    }
}

/// Whether a name in a directory whose content is moved stays where it is: what [`Beside::inside`] gives, and what the root
/// of a volume has.
pub fn stays_inside(name: &str) -> bool {
    name.starts_with(INSIDE_PREFIX) || name == "lost+found"
}

/// What `PG_VERSION` is called while a directory isn't all there: PostgreSQL doesn't start on it, and nothing takes it for
/// empty.
pub const SHUT: &str = "pgsql_tmp.PG_VERSION";

/// Why directories are switched.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "purpose")]
pub enum Purpose {
    /// A restored one takes the place of the database that is there.
    Restore {
        /// The backup that was restored.
        backup: BackupId,
        /// Where recovery ends, for people.
        target: String,
        /// The timeline on which it ends.
        timeline: TimelineId,
        /// Whether all WAL is wanted: what the old directory has and the archive hasn't is taken along.
        to_the_end: bool,
        /// Up to which segment the archive had all when it was planned: what the old directory has from there on is taken
        /// along whatever it's marked as. A mark says that a command succeeded, not that the WAL is in this archive.
        #[serde(default)]
        wal_through: Option<SegmentName>,
    },
    /// A restore over the database that is there: what it has is overwritten.
    Replace {
        /// Whose repository it comes from.
        system: SystemIdentifier,
        /// The backup that is restored.
        backup: BackupId,
        /// The timeline on which recovery ends.
        timeline: TimelineId,
        /// What was asked for.
        order: Box<RestoreOrder>,
    },
    /// What was there before an earlier switch comes back.
    Undo {
        /// That switch.
        of: SwitchId,
        /// With what it fetches WAL, if it has to leave its timeline because the other database took the next one.
        restore_command: String,
    },
}

/// How far a switch is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// What is to come is being written. Nothing of the database is touched.
    Staging,
    /// All is staged and durable. Nothing of the database is touched.
    Ready,
    /// Directories are being switched: it goes on until all are, and PostgreSQL doesn't start meanwhile.
    Switching,
    /// All are.
    Done,
}

/// What a directory of the database is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The data directory.
    Data,
    /// Where the link pg_wal leads to.
    Wal,
    /// A tablespace's directory of the server's version.
    Tablespace,
}

/// How a root is switched.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// The directory is renamed.
    Whole,
    /// Its content is moved: it's a mount point.
    Content {
        /// Whether what was in it has been moved out.
        parted: bool,
    },
}

/// One directory of the database.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Root {
    /// What it's for.
    pub role: Role,
    /// Where PostgreSQL has it.
    pub live: PathBuf,
    /// What is to come there; `None` if nothing is.
    pub staged: Option<PathBuf>,
    /// Where what is there goes.
    pub kept: PathBuf,
    /// How it's switched.
    pub way: Way,
    /// The inode of what is there when the switch is ready; `None` if nothing is.
    pub old: Option<u64>,
    /// The inode of what is staged.
    pub new: Option<u64>,
}

/// A switch, as it's noted on the disk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Switch {
    /// Its identity.
    pub id: SwitchId,
    /// What for.
    #[serde(flatten)]
    pub purpose: Purpose,
    /// How far it is.
    pub phase: Phase,
    /// The database's directories, the data directory last.
    pub roots: Vec<Root>,
    /// Why it wasn't carried out when PostgreSQL was started: it was started on the database as it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

impl Switch {
    /// The data directory.
    pub fn data(&self) -> Option<&Root> {
        self.roots.iter().find(|root| root.role == Role::Data)
    }

    /// The data directory when the switch is done: what was there before.
    pub fn kept_data(&self) -> Option<&Path> {
        self.data().map(|root| root.kept.as_path())
    }

    /// Whether `PG_VERSION` has to be renamed away first. Not where one rename of one directory is all.
    pub fn must_be_shut(&self) -> bool {
        !matches!(self.roots.as_slice(), [Root { way: Way::Whole, .. }])
    }
}

/// The inodes at the places of a root.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Seen {
    /// At [`Root::live`].
    pub live: Option<u64>,
    /// At [`Root::staged`].
    pub staged: Option<u64>,
    /// At [`Root::kept`].
    pub kept: Option<u64>,
}

/// What is to be done next with a root that is renamed as a whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Exchange what is there with what is staged. Where the file system can't: [`Step::Keep`], and look again.
    Exchange,
    /// Rename what is there to where it's kept.
    Keep,
    /// What was there is where the new one was staged: rename it to where it's kept.
    KeepExchanged,
    /// Rename what is staged to its place.
    Place,
    /// Nothing.
    Nothing,
}

/// The directories aren't what was noted: somebody else has been at them.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{} isn't as it was when the switch was prepared", live.display())]
pub struct Disturbed {
    /// Which root.
    pub live: PathBuf,
}

impl Root {
    /// What is to be done next, by what is where.
    ///
    /// # Errors
    /// If it's none of the states that a switch goes through.
    pub fn next(&self, seen: Seen) -> Result<Step, Disturbed> {
        let Seen { live, staged, kept } = seen;
        let is = |there: Option<u64>, wanted: Option<u64>| wanted.is_some() && there == wanted;
        let old_is_kept = self.old.is_none() || is(kept, self.old);
        let new_is_staged = is(staged, self.new);
        if is(live, self.new) {
            // What was there lies where the new one was, until it's renamed on.
            return match is(staged, self.old) {
                true => Ok(Step::KeepExchanged),
                false if old_is_kept => Ok(Step::Nothing),
                false => Err(self.disturbed()),
            };
        }
        match live {
            Some(_) if is(live, self.old) && kept.is_none() => match self.new {
                None => Ok(Step::Keep),
                Some(_) if new_is_staged => Ok(Step::Exchange),
                Some(_) => Err(self.disturbed()),
            },
            None if old_is_kept => match self.new {
                None => Ok(Step::Nothing),
                Some(_) if new_is_staged => Ok(Step::Place),
                Some(_) => Err(self.disturbed()),
            },
            _ => Err(self.disturbed()),
        }
    }

    fn disturbed(&self) -> Disturbed {
        Disturbed { live: self.live.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(old: Option<u64>, new: Option<u64>) -> Root {
        Root {
            role: Role::Data,
            live: "/v/data".into(),
            staged: new.map(|_| "/v/data.pgsidecar-staged".into()),
            kept: "/v/data.before".into(),
            way: Way::Whole,
            old,
            new,
        }
    }

    /// What a step makes of what is where.
    fn after(step: Step, seen: Seen) -> Seen {
        match step {
            Step::Exchange => Seen { live: seen.staged, staged: seen.live, ..seen },
            Step::Keep => Seen { live: None, kept: seen.live, ..seen },
            Step::KeepExchanged => Seen { staged: None, kept: seen.staged, ..seen },
            Step::Place => Seen { live: seen.staged, staged: None, ..seen },
            Step::Nothing => seen,
        }
    }

    #[test]
    fn from_every_state_that_a_crash_can_leave_it_goes_on_to_the_end() {
        for (old, new) in [(Some(1), Some(2)), (Some(1), None), (None, Some(2))] {
            for can_exchange in [true, false] {
                let root = root(old, new);
                let mut seen = Seen { live: old, staged: new, kept: None };
                let mut steps = 0;
                loop {
                    let mut step = root.next(seen).unwrap();
                    if step == Step::Exchange && !can_exchange {
                        step = Step::Keep;
                    }
                    if step == Step::Nothing {
                        break;
                    }
                    seen = after(step, seen);
                    steps += 1;
                    assert!(steps <= 2, "{old:?} {new:?} {seen:?}");
                }
                assert_eq!(seen, Seen { live: new, staged: None, kept: old });
            }
        }
    }

    #[test]
    fn what_somebody_else_has_touched_is_left_alone() {
        let both = root(Some(1), Some(2));
        for seen in [
            Seen { live: Some(3), staged: Some(2), kept: None },
            Seen { live: Some(1), staged: None, kept: None },
            Seen { live: Some(1), staged: Some(3), kept: None },
            Seen { live: Some(1), staged: Some(2), kept: Some(9) },
            Seen { live: None, staged: Some(2), kept: None },
            Seen { live: Some(2), staged: None, kept: None },
            Seen { live: None, staged: None, kept: Some(1) },
        ] {
            assert!(both.next(seen).is_err(), "{seen:?}");
        }
    }

    #[test]
    fn what_stands_inside_is_left_out_of_backups() {
        let id: SwitchId = "20261121T061500Z".parse().unwrap();
        let purpose = Purpose::Undo { of: id, restore_command: String::new() };
        let inside = Beside::inside(Path::new("/data"));
        let paths = [inside.staged(), inside.pending_note(), inside.kept(id, &purpose), inside.done_note(id, &purpose)];
        for path in paths {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            assert_eq!(path.parent(), Some(Path::new("/data")));
            assert!(stays_inside(&name), "{name}");
            assert_eq!(crate::data_directory::treat_directory(&name), crate::data_directory::Treatment::Skip);
            assert_eq!(crate::data_directory::treat_file(&name), crate::data_directory::Treatment::Skip);
        }
        let next = Beside::next_to(Path::new("/volume/data")).unwrap();
        assert_eq!(next.staged(), Path::new("/volume/data.pgsidecar-staged"));
        assert_eq!(next.kept(id, &purpose), Path::new("/volume/data.before-undo-20261121T061500Z"));
        assert!(next.is_done_note("data.before-undo-20261121T061500Z.json"));
        assert!(
            !next.is_done_note("data.before-undo-x.json")
                && !next.is_done_note("other.before-undo-20261121T061500Z.json")
        );
        assert_eq!(Beside::next_to(Path::new("/")), None);
    }

    #[test]
    fn a_note_is_read_back() {
        let switch = Switch {
            id: "20261121T061500Z".parse().unwrap(),
            purpose: Purpose::Restore {
                backup: "20261121T051500Z-full".parse().unwrap(),
                target: "the end of the archive".to_owned(),
                timeline: TimelineId::FIRST,
                to_the_end: true,
                wal_through: Some("000000010000000000000003".parse().unwrap()),
            },
            refused: Some("a server runs on it".to_owned()),
            phase: Phase::Ready,
            roots: vec![root(Some(1), Some(2)), Root { way: Way::Content { parted: false }, ..root(None, Some(3)) }],
        };
        let text = serde_json::to_string_pretty(&switch).unwrap();
        assert_eq!(serde_json::from_str::<Switch>(&text).unwrap(), switch, "{text}");
        assert!(switch.must_be_shut());
    }
}
