//! Which backup, which timeline and which WAL lead to a recovery target, or why none do.
//!
//! Two pure steps, because what has to be known about the WAL depends on the backup: [`select`] chooses the
//! backup and the timeline from the catalog, the caller lists the WAL that lies after it into a [`WalScan`],
//! and [`RestorePlan::new`] decides whether that WAL reaches the target.
//!
//! A time is no function of the catalog: whether a commit lies after it is known only from the WAL's content.
//! What is checked here is necessary, not sufficient; PostgreSQL itself ends with an error, and not silently,
//! when the WAL ends before a target.

mod reach;
mod snapshot;

use jiff::Timestamp;
use serde::Serialize;

use crate::{
    BackupId, BackupRecord, Lsn, SegmentName, TimelineHistory, TimelineId, WalSegmentSize,
    chain::{ChainError, chain},
    recovery::RecoveryTarget,
};

use self::reach::{Reach, Span};
pub use self::snapshot::{SnapshotPlan, SnapshotPlanError, SnapshotSelection, select_for_snapshot};

/// What a restore was asked for.
#[derive(Clone, PartialEq, Debug)]
pub struct RestoreRequest {
    /// Where recovery is to end.
    pub target: RecoveryTarget,
    /// The timeline to end on; `None` for the newest that can be reached.
    pub timeline: Option<TimelineId>,
    /// The backup to begin with; `None` for the newest that the target allows.
    pub backup: Option<BackupId>,
}

/// What the repository holds, WAL segments left out.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Catalog {
    /// All backups, in any order.
    pub backups: Vec<BackupRecord>,
    /// All timeline histories. Timeline 1 has none.
    pub histories: Vec<TimelineHistory>,
}

/// The backup and the timeline that lead to a target.
#[derive(Clone, PartialEq, Debug)]
pub struct Selection {
    /// The backup to begin with.
    pub backup: BackupRecord,
    /// The backups that have to be restored for it: the full one first, itself last.
    pub chain: Vec<BackupRecord>,
    /// Newer ones that would have been chosen if all were there that they build on.
    pub passed_over: Vec<PassedOver>,
    /// The timeline to end on, with the way to it.
    pub history: TimelineHistory,
}

/// A backup that can't be restored, so that an older one is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct PassedOver {
    /// The backup.
    pub backup: BackupId,
    /// Why it can't be restored, a sentence for people.
    pub because: String,
}

/// Why a target can't be reached. Each message says what is there instead; [`PlanError::hint`] what to do.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum PlanError {
    /// Nothing to begin with.
    #[error("the repository holds no complete backup of this database")]
    NoBackups,
    /// The backup that was named.
    #[error("there is no backup {0}")]
    NoSuchBackup(BackupId),
    /// The timeline that was named.
    #[error("timeline {0} is unknown: the repository has neither its history nor a backup of it")]
    NoSuchTimeline(TimelineId),
    /// No backup lies on the way to this timeline.
    #[error("no backup lies on the way to timeline {0}")]
    NoBackupOnTimeline(TimelineId),
    /// Every backup ends after the target.
    #[error(
        "the target, {target}, lies before the end of the first backup that could lead to it: {backup} was complete \
         at {stopped_at} ({stop_lsn})"
    )]
    BeforeFirstBackup {
        /// What was asked for.
        target: String,
        /// The earliest backup.
        backup: BackupId,
        /// Its end.
        stopped_at: Timestamp,
        /// Its end.
        stop_lsn: Lsn,
    },
    /// The backup that was named ends after the target.
    #[error(
        "the target, {target}, lies before the end of backup {backup}, which was complete at {stopped_at} ({stop_lsn})"
    )]
    BeforeBackup {
        /// What was asked for.
        target: String,
        /// The backup that was named.
        backup: BackupId,
        /// Its end.
        stopped_at: Timestamp,
        /// Its end.
        stop_lsn: Lsn,
    },
    /// A name says nothing about when.
    #[error("which backup precedes the restore point {0:?} isn't known")]
    NameNeedsBackup(String),
    /// The backup that was named, or every one that leads to the target, builds on one that isn't there.
    #[error("{0}: it can't be restored")]
    Chain(ChainError),
    /// WAL from the time of the backup itself is missing.
    #[error("backup {backup} can't be restored: WAL segment {missing}, which it needs, is not in the archive")]
    BackupLacksWal {
        /// The backup.
        backup: BackupId,
        /// The first segment that is missing.
        missing: SegmentName,
    },
    /// There is a hole before the target.
    #[error(
        "the target, {target}, can't be reached: WAL segment {missing} is missing in the archive, and later ones are there"
    )]
    Gap {
        /// What was asked for.
        target: String,
        /// The first segment that is missing.
        missing: SegmentName,
        /// The end of what can be replayed.
        reachable: Lsn,
    },
    /// The first segment of the timeline isn't there. What the old timeline has in its place goes on differently.
    #[error("timeline {timeline} can't be reached: its first WAL segment, {missing}, is not in the archive")]
    TimelineNotReached {
        /// The timeline.
        timeline: TimelineId,
        /// Its first segment.
        missing: SegmentName,
    },
    /// The archive ends before the target.
    #[error(
        "the target, {target}, lies after the last archived WAL: the archive ends at {reachable}, in segment {last}, stored at {stored_at}"
    )]
    AfterLastWal {
        /// What was asked for.
        target: String,
        /// The last segment.
        last: SegmentName,
        /// When it was stored.
        stored_at: Timestamp,
        /// The end of what can be replayed.
        reachable: Lsn,
    },
}

impl PlanError {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            PlanError::NoBackups => {
                "Take one with 'pgsidecar backup create'; check that cluster name and repository are the right ones."
            }
            PlanError::NoSuchBackup(_) => "'pgsidecar backup list' shows the backups.",
            PlanError::NoSuchTimeline(_) => "Leave --target-timeline out to end on the newest one.",
            PlanError::NoBackupOnTimeline(_) => "Name another timeline with --target-timeline.",
            PlanError::BeforeFirstBackup { .. } => {
                "Choose a later target; --target-immediate with --backup ends at the backup's own end."
            }
            PlanError::BeforeBackup { .. } => {
                "Choose a later target, or leave --backup out so that an earlier one is found."
            }
            PlanError::NameNeedsBackup(_) => {
                "Name the last backup before the restore point with --backup ('pgsidecar backup list' shows them)."
            }
            PlanError::Chain(_) => {
                "'pgsidecar backup list' shows what is there. Choose another backup with --backup, or leave it out so that one is found that can be restored."
            }
            PlanError::BackupLacksWal { .. } => "Choose another backup with --backup.",
            PlanError::TimelineNotReached { .. } => {
                "Name the timeline before it with --target-timeline. If its server runs, SELECT pg_switch_wal() ships the segment."
            }
            PlanError::Gap { .. } => "Choose a target before the missing segment.",
            PlanError::AfterLastWal { .. } => {
                "If the database still runs, SELECT pg_switch_wal() ships the current segment; otherwise choose an \
                 earlier target, or none at all to replay everything that is there."
            }
        }
    }
}

/// Chooses the backup and the timeline for a restore.
///
/// # Errors
/// If no backup leads to the target.
pub fn select(catalog: &Catalog, request: &RestoreRequest) -> Result<Selection, PlanError> {
    if catalog.backups.is_empty() {
        return Err(PlanError::NoBackups);
    }
    let named = match request.backup {
        None => None,
        Some(id) => Some(catalog.backups.iter().find(|b| b.id == id).ok_or(PlanError::NoSuchBackup(id))?),
    };
    if let (RecoveryTarget::Name(name), None) = (&request.target, named) {
        return Err(PlanError::NameNeedsBackup(name.to_string()));
    }
    let candidates: Vec<&BackupRecord> = match named {
        Some(backup) => vec![backup],
        None => catalog.backups.iter().collect(),
    };
    let ways = match request.timeline {
        Some(timeline) => vec![catalog.history(timeline).ok_or(PlanError::NoSuchTimeline(timeline))?],
        None => catalog.newest_first(),
    };
    let mut passed_over: Vec<(ChainError, PassedOver)> = Vec::new();
    for history in &ways {
        let on_the_way = candidates.iter().filter(|b| history.contains(b.timeline, b.stop_lsn));
        let mut leading: Vec<&&BackupRecord> = on_the_way.filter(|b| allows(b, &request.target)).collect();
        leading.sort_by_key(|b| std::cmp::Reverse((b.stop_lsn, b.id)));
        for backup in leading {
            match chain(backup, &catalog.backups) {
                Ok(links) => {
                    return Ok(Selection {
                        backup: (*backup).clone(),
                        chain: links.into_iter().cloned().collect(),
                        passed_over: passed_over.into_iter().map(|(_, passed)| passed).collect(),
                        history: history.clone(),
                    });
                }
                // A backup can lie on more than one way.
                Err(_) if passed_over.iter().any(|(_, passed)| passed.backup == backup.id) => {}
                Err(error) => {
                    passed_over.push((error, PassedOver { backup: backup.id, because: error.to_string() }));
                }
            }
        }
    }
    if let Some((error, _)) = passed_over.first() {
        return Err(PlanError::Chain(*error));
    }
    let on_some_way = candidates.iter().filter(|b| ways.iter().any(|h| h.contains(b.timeline, b.stop_lsn)));
    let target = request.target.to_string();
    match (on_some_way.min_by_key(|b| b.stop_lsn), request.timeline, named) {
        (None, Some(timeline), _) => Err(PlanError::NoBackupOnTimeline(timeline)),
        (None, None, _) => Err(PlanError::NoBackups),
        (Some(b), _, None) => {
            Err(PlanError::BeforeFirstBackup { target, backup: b.id, stopped_at: b.stopped_at, stop_lsn: b.stop_lsn })
        }
        (Some(b), _, Some(_)) => {
            Err(PlanError::BeforeBackup { target, backup: b.id, stopped_at: b.stopped_at, stop_lsn: b.stop_lsn })
        }
    }
}

/// Whether recovery that begins with this backup can end at the target: the backup is consistent only at its
/// own end, so the target must not lie before it.
fn allows(backup: &BackupRecord, target: &RecoveryTarget) -> bool {
    Span::from(backup).allows(target)
}

impl Catalog {
    /// The history of a timeline, if the repository knows that timeline.
    pub fn history(&self, timeline: TimelineId) -> Option<TimelineHistory> {
        let stored = self.histories.iter().find(|history| history.timeline() == timeline);
        let first = || (timeline == TimelineId::FIRST).then(|| TimelineHistory::first(timeline));
        stored.cloned().or_else(first)
    }

    /// All known timelines' histories, the newest first: the order in which PostgreSQL's 'latest' prefers them.
    fn newest_first(&self) -> Vec<TimelineHistory> {
        let mut histories = self.histories.clone();
        if self.history(TimelineId::FIRST).is_some_and(|_| !histories.iter().any(|h| h.timeline() == TimelineId::FIRST))
        {
            histories.push(TimelineHistory::first(TimelineId::FIRST));
        }
        histories.sort_by_key(|history| std::cmp::Reverse(history.timeline()));
        histories
    }
}

/// What the archive holds from a segment on, along one way through the timelines. Fed with a listing, so that
/// an archive of any length is looked through in constant memory.
#[derive(Clone, Debug)]
pub struct WalScan {
    history: TimelineHistory,
    size: WalSegmentSize,
    /// The segment that comes next if nothing is missing.
    expected: u64,
    last: Option<(SegmentName, Timestamp)>,
    gap: bool,
}

/// The result of a [`WalScan`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WalFacts {
    /// The last segment before anything is missing, and when it was stored.
    pub last: Option<(SegmentName, Timestamp)>,
    /// The first segment that isn't there.
    pub missing: SegmentName,
    /// Where `missing` begins: WAL is there up to this point.
    pub reachable: Lsn,
    /// Whether the archive goes on after `missing`.
    pub gap: bool,
}

impl WalScan {
    /// A scan from the segment that contains `from`.
    pub fn new(history: TimelineHistory, size: WalSegmentSize, from: Lsn) -> WalScan {
        WalScan { history, size, expected: size.segment_number(from), last: None, gap: false }
    }

    /// The timelines to list, oldest first, with the first segment that can be of interest on each.
    pub fn listings(&self) -> Vec<SegmentName> {
        let stretches = self.history.stretches(self.expected, self.size);
        stretches.map(|stretch| SegmentName::from_number(stretch.timeline, stretch.first, self.size)).collect()
    }

    /// Takes note of a segment. Segments of one timeline must come in order, timelines from the oldest on.
    pub fn found(&mut self, segment: SegmentName, stored_at: Timestamp) {
        let Some(number) = segment.number(self.size) else { return };
        // The segment in which a timeline ends exists on both: as the old one's, which may go on where this way doesn't,
        // and, copied up to the switch, as the new one's. Only the new one's counts.
        let of_interest = self.history.timeline_of_segment(number, self.size) == Some(segment.timeline());
        if !of_interest || number < self.expected {
            return;
        }
        if number == self.expected && !self.gap {
            self.expected += 1;
            self.last = Some((segment, stored_at));
        } else if number > self.expected {
            self.gap = true;
        }
    }

    /// The same scan for another look from where it stands, without the gap that was seen: a listing can run ahead.
    pub fn resumed(mut self) -> WalScan {
        self.gap = false;
        self
    }

    /// Whether WAL up to this point has been seen, so that nothing more need be listed.
    pub fn reaches(&self, lsn: Lsn) -> bool {
        self.size.start_of(self.expected) > lsn
    }

    /// What was found.
    pub fn finish(&self) -> WalFacts {
        let timeline = self.history.timeline_of_segment(self.expected, self.size).unwrap_or(self.history.timeline());
        WalFacts {
            last: self.last,
            missing: SegmentName::from_number(timeline, self.expected, self.size),
            reachable: self.size.start_of(self.expected),
            gap: self.gap,
        }
    }
}

/// A restore that can be begun: everything that it needs was there when it was planned.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct RestorePlan {
    /// The backup to begin with.
    pub backup: BackupRecord,
    /// The backups that are restored one over the other: the full one first, itself last.
    #[serde(serialize_with = "as_ids")]
    pub chain: Vec<BackupRecord>,
    /// Bytes of the repository that are read for it, without WAL.
    pub download_bytes: u64,
    /// Newer backups that lead to the target as well but can't be restored.
    pub passed_over: Vec<PassedOver>,
    /// The target.
    #[serde(serialize_with = "as_text")]
    pub target: RecoveryTarget,
    /// The timeline to end on; recovery is pinned to it.
    pub timeline: TimelineId,
    /// The first WAL segment that recovery reads.
    pub wal_from: SegmentName,
    /// The last one that is there without a gap.
    pub wal_through: SegmentName,
    /// WAL is there up to this point.
    pub reachable: Lsn,
    /// A segment that is missing although later ones are there. Recovery ends before it, whatever comes after.
    pub gap: Option<SegmentName>,
}

fn as_text<S: serde::Serializer>(target: &RecoveryTarget, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(target)
}

fn as_ids<S: serde::Serializer>(chain: &[BackupRecord], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(chain.iter().map(|link| link.id))
}

/// Whether transaction `xid` is `next` or later. PostgreSQL compares the lower 32 bits of a target alone, in the
/// way of its wraparound arithmetic, and so does this.
fn xid_not_before(xid: u64, next: u64) -> bool {
    (xid.wrapping_sub(next) & 0xFFFF_FFFF) < 1 << 31
}

impl RestorePlan {
    /// Plans a restore from a selection and what a scan from the backup's start on has found.
    ///
    /// # Errors
    /// If the WAL doesn't make the backup consistent or doesn't reach the target.
    pub fn new(selection: Selection, target: RecoveryTarget, wal: WalFacts) -> Result<RestorePlan, PlanError> {
        let Selection { backup, chain, passed_over, history } = selection;
        let lacks = |missing| PlanError::BackupLacksWal { backup: backup.id, missing };
        let reach = Reach::new(&Span::from(&backup), &history, &target, &wal, lacks)?;
        Ok(RestorePlan {
            wal_from: reach.first,
            wal_through: reach.last,
            reachable: wal.reachable,
            gap: wal.gap.then_some(wal.missing),
            timeline: history.timeline(),
            target,
            download_bytes: chain.iter().map(BackupRecord::stored_bytes).sum(),
            chain,
            passed_over,
            backup,
        })
    }
}

#[cfg(test)]
pub(crate) mod tests;
