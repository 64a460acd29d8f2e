//! What an incremental backup knows of its parent: which files it has, and what has changed since it began.
//!
//! What changed is told by PostgreSQL's WAL summaries (17 and later), which lie in pg_wal. They must cover all WAL from
//! the parent's start to this backup's, without a hole: the server writes them a little later than the WAL, so that the
//! last one is waited for. Where that isn't to be had, the answer is a full backup, never a guess.

use std::{
    collections::HashMap,
    fs::{self, File},
    hash::{DefaultHasher, Hash, Hasher},
    io,
    time::{Duration, Instant},
};

use pgsidecar_core::{
    BackupRecord, Lsn, TimelineHistory, TimelineId,
    backup_manifest::WalRange,
    block_references::BlockReferences,
    incremental_file::IncrementalHeader,
    incremental_plan::{FileMethod, IncrementalPlan, RelationPath},
    page::PAGE_SIZE,
    wal_summary::{CoverageError, WalSummaryName, covering},
};

use super::index;
use crate::{
    failure::{Code, Failure},
    pgdata::DataDirectory,
    repository::Repository,
};

/// How often the summaries are looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// What an incremental backup builds on.
pub struct Base {
    /// The lengths in blocks of the parent's relation files, by hashes of their paths. Two that are equal by chance would
    /// do no harm: a file that is new since the parent has a mark of its own in the summaries.
    parent_files: HashMap<u64, u32>,
    references: BlockReferences,
    segment_blocks: u32,
}

/// Why a backup can't be taken on a base.
pub enum NoBase {
    /// So that a full one is to be taken, a sentence for people.
    Because(String),
    /// The backup fails.
    Failed(Failure),
}

impl From<Failure> for NoBase {
    fn from(failure: Failure) -> NoBase {
        NoBase::Failed(failure)
    }
}

impl Base {
    /// Gathers what changed between the start of `parent` and `start`, and which files the parent has. Waits for the
    /// summaries, but no longer than `patience`.
    ///
    /// # Errors
    /// [`NoBase`].
    pub async fn prepare(
        repository: &Repository,
        pgdata: &DataDirectory,
        parent: &BackupRecord,
        history: &TimelineHistory,
        start: Lsn,
        patience: Duration,
    ) -> Result<Base, NoBase> {
        is_past(parent, history)?;
        // A standby begins at its last restartpoint, which may be older than the parent's end.
        if parent.stop_lsn > start {
            return Err(NoBase::Because(format!(
                "backup {} ends at {}, and this one begins before that, at {start}; on a standby the primary has to \
                 make a checkpoint in between",
                parent.id, parent.stop_lsn
            )));
        }
        Base::gather(repository, pgdata, parent, history, start, patience).await
    }

    /// Whether a base on this parent could be prepared now, as far as the WAL is summarized: up to `summarized`, by what
    /// PostgreSQL says. What it will summarize later isn't asked for.
    ///
    /// # Errors
    /// [`NoBase`].
    pub async fn look(
        repository: &Repository,
        pgdata: &DataDirectory,
        parent: &BackupRecord,
        history: &TimelineHistory,
        summarized: Lsn,
    ) -> Result<(), NoBase> {
        is_past(parent, history)?;
        Base::gather(repository, pgdata, parent, history, summarized, Duration::ZERO).await.map(drop)
    }

    async fn gather(
        repository: &Repository,
        pgdata: &DataDirectory,
        parent: &BackupRecord,
        history: &TimelineHistory,
        until: Lsn,
        patience: Duration,
    ) -> Result<Base, NoBase> {
        let ranges = ranges(parent.timeline, parent.start_lsn, history, until);
        let references = summarized(pgdata, &ranges, patience).await?;
        let collected = index::read(repository, parent, HashMap::new(), |files, entry| {
            let (path, length) = entry.restored();
            if RelationPath::parse(&path).is_some() {
                files.insert(hash(&path), u32::try_from(length / PAGE_SIZE as u64).unwrap_or(0));
            }
            Ok(())
        });
        let parent_files = match collected.await {
            Ok(files) => files,
            Err(failure) if failure.code == Code::Damaged => return Err(NoBase::Because(failure.message)),
            Err(failure) => return Err(failure.into()),
        };
        let control = pgdata.control()?;
        Ok(Base { parent_files, references, segment_blocks: control.relation_segment_blocks })
    }

    /// The header of the incremental file that stands for this file of `size` bytes; `None` if all of it is to be taken.
    pub fn header(&self, path: &str, relation: &RelationPath, size: u64) -> Option<IncrementalHeader> {
        let in_parent = self.parent_files.get(&hash(path)).copied();
        match IncrementalPlan::new(&self.references, self.segment_blocks).method(relation, size, in_parent) {
            FileMethod::Incremental(header) => Some(header),
            FileMethod::Full(_) => None,
        }
    }
}

fn is_past(parent: &BackupRecord, history: &TimelineHistory) -> Result<(), NoBase> {
    if history.contains(parent.timeline, parent.stop_lsn) {
        return Ok(());
    }
    Err(NoBase::Because(format!("backup {} isn't a part of this server's past", parent.id)))
}

fn hash(path: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    path.hash(&mut hasher);
    hasher.finish()
}

/// The WAL between the starts of the two backups, by timelines.
fn ranges(timeline: TimelineId, from: Lsn, history: &TimelineHistory, start: Lsn) -> Vec<WalRange> {
    let spans = history.spans().iter().filter(|span| span.timeline >= timeline);
    let ranges = spans.map(|span| WalRange {
        timeline: span.timeline,
        start: span.begin.max(from),
        end: span.end.unwrap_or(start).min(start),
    });
    ranges.filter(|range| range.start < range.end).collect()
}

/// What the summaries of these ranges say. Without patience, PostgreSQL has said that all of them are there.
async fn summarized(
    pgdata: &DataDirectory,
    ranges: &[WalRange],
    patience: Duration,
) -> Result<BlockReferences, NoBase> {
    let directory = pgdata.wal().join("summaries");
    let deadline = Instant::now() + patience;
    let chosen = loop {
        let there = {
            let directory = directory.clone();
            tokio::task::spawn_blocking(move || names(&directory)).await.map_err(Failure::from)?
        };
        let there = there.map_err(|error| Failure::io(format!("reading {}", directory.display()), &error))?;
        let covered: Result<Vec<_>, _> = ranges.iter().map(|range| covering(&there, range)).collect();
        match covered {
            Ok(chosen) => break chosen.into_iter().flatten().collect::<Vec<_>>(),
            Err(missing) if patience.is_zero() || is_lost(&there, &missing) => {
                return Err(NoBase::Because(format!(
                    "{missing}: the summaries were removed (wal_summary_keep_time), or never written"
                )));
            }
            Err(missing) if deadline <= Instant::now() => {
                return Err(NoBase::Because(format!("{missing}, even {} s later", patience.as_secs())));
            }
            Err(_) => tokio::time::sleep(LOOK_AGAIN).await,
        }
    };
    let read = move || {
        chosen.into_iter().try_fold(BlockReferences::default(), |references, name| {
            let path = directory.join(name.to_string());
            let because = |how: String| NoBase::Because(format!("the WAL summary {name} can't be used: {how}"));
            let file = File::open(&path).map_err(|error| because(error.to_string()))?;
            references.merge_summary(file).map_err(|error| because(error.to_string()))
        })
    };
    tokio::task::spawn_blocking(read).await.map_err(Failure::from)?
}

/// Whether what is missing will never come: later WAL is summarized already.
fn is_lost(there: &[WalSummaryName], missing: &CoverageError) -> bool {
    match missing {
        CoverageError::Missing { timeline, missing, .. } => {
            there.iter().any(|summary| summary.timeline() >= *timeline && summary.start() > *missing)
        }
        CoverageError::Backwards { .. } => true,
    }
}

fn names(directory: &std::path::Path) -> io::Result<Vec<WalSummaryName>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name();
        names.extend(name.to_str().and_then(|name| name.parse::<WalSummaryName>().ok()));
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wal_between_two_backups_is_told_by_timelines() {
        let id = |number| TimelineId::new(number).unwrap();
        let history = TimelineHistory::parse(id(3), b"1\t0/3000000\tx\n2\t0/5000000\ty\n").unwrap();
        let between = |timeline, from: u64, to: u64| {
            ranges(id(timeline), Lsn::new(from), &history, Lsn::new(to))
                .iter()
                .map(|range| (range.timeline.get(), range.start.bytes(), range.end.bytes()))
                .collect::<Vec<_>>()
        };
        assert_eq!(between(3, 0x600_0000, 0x700_0000), [(3, 0x600_0000, 0x700_0000)]);
        assert_eq!(
            between(1, 0x200_0000, 0x700_0000),
            [(1, 0x200_0000, 0x300_0000), (2, 0x300_0000, 0x500_0000), (3, 0x500_0000, 0x700_0000)]
        );
    }
}
