//! Which backup, which timeline and which WAL lead to a recovery target, or why none do.
//!
//! Pure steps, because what has to be known about the WAL depends on the backup: [`select`] chooses the backup and the
//! timeline from the catalog, the caller lists the WAL that lies after it into a [`WalScan`], and [`RestorePlan::new`]
//! decides whether that WAL is enough, as far as a listing can tell.
//!
//! A time or a transaction is no function of a listing: whether a commit lies after it is known only from the WAL's
//! content. PostgreSQL ends with an error, when the server is started, if the WAL ends before a target. So the caller
//! reads the few segments that a [`Search`] asks for, and [`RestorePlan::expecting`] says where recovery will end.

mod end;
mod error;
mod points;
mod reach;
mod scan;
mod search;
mod snapshot;

use std::collections::BTreeSet;

use serde::Serialize;

use crate::{
    BackupId, BackupRecord, Lsn, SegmentName, TimelineHistory, TimelineId,
    chain::{ChainError, chain},
    recovery::RecoveryTarget,
    restore_point::RestorePointRecord,
};

pub use self::snapshot::{SnapshotPlan, SnapshotPlanError, SnapshotSelection, select_for_snapshot};
pub use self::{
    end::{End, ExpectedEnd, TransactionEnd},
    error::PlanError,
    scan::{WalFacts, WalScan},
    search::Search,
};
use self::{
    points::Points,
    reach::{Reach, Span},
};

/// What a restore was asked for.
#[derive(Clone, PartialEq, Debug)]
pub struct RestoreRequest {
    /// Where recovery is to end.
    pub target: RecoveryTarget,
    /// The timeline to end on; `None` for the newest that can be reached.
    pub timeline: Option<TimelineId>,
    /// The backup to begin with; `None` for the newest that the target allows.
    pub backup: Option<BackupId>,
    /// Whether the target itself is replayed. Without meaning for the end of the archive or of the backup, and for names.
    pub inclusive: bool,
}

/// What the repository holds, WAL segments left out.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Catalog {
    /// All backups, in any order.
    pub backups: Vec<BackupRecord>,
    /// All timeline histories. Timeline 1 has none.
    pub histories: Vec<TimelineHistory>,
    /// Timelines of which there is nothing but a history: no backup, no segment, and nothing that a stopped server had of
    /// one. Only who names such a timeline gets there.
    pub begun_only: BTreeSet<TimelineId>,
    /// All restore points that are recorded, in any order.
    pub restore_points: Vec<RestorePointRecord>,
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
    /// The restore point of the target's name, where it's recorded.
    pub restore_point: Option<RestorePointRecord>,
}

/// A backup that can't be restored, so that an older one is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct PassedOver {
    /// The backup.
    pub backup: BackupId,
    /// Why it can't be restored, a sentence for people.
    pub because: String,
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
    let candidates: Vec<&BackupRecord> = match named {
        Some(backup) => vec![backup],
        None => catalog.backups.iter().collect(),
    };
    let ways = match request.timeline {
        Some(timeline) => vec![catalog.history(timeline).ok_or(PlanError::NoSuchTimeline(timeline))?],
        None => catalog.newest_first(),
    };
    let points = |history: &TimelineHistory| match &request.target {
        RecoveryTarget::Name(name) => Some(Points::on(history, name, &catalog.restore_points)),
        _ => None,
    };
    if let (RecoveryTarget::Name(name), None) = (&request.target, named)
        && ways.iter().all(|history| points(history).is_none_or(|points| points.newest().is_none()))
    {
        return Err(PlanError::NameNeedsBackup { name: name.to_string(), known: catalog.known_names() });
    }
    let mut passed_over: Vec<(ChainError, PassedOver)> = Vec::new();
    for history in &ways {
        let points = points(history);
        let point_of = |backup: &BackupRecord| points.as_ref().and_then(|points| points.first_met(backup));
        let leads = |backup: &BackupRecord| match &points {
            None => allows(backup, &request.target),
            // Who names a backup means the first restore point behind it.
            Some(_) if named.is_some() => point_of(backup).is_none_or(|point| backup.stop_lsn <= point.lsn),
            Some(points) => points.leads_to_newest(backup),
        };
        let on_the_way = candidates.iter().filter(|b| history.contains(b.timeline, b.stop_lsn));
        let mut leading: Vec<&&BackupRecord> = on_the_way.filter(|b| leads(b)).collect();
        leading.sort_by_key(|b| std::cmp::Reverse((b.stop_lsn, b.id)));
        for backup in leading {
            match chain(backup, &catalog.backups) {
                Ok(links) => {
                    return Ok(Selection {
                        backup: (*backup).clone(),
                        chain: links.into_iter().cloned().collect(),
                        passed_over: passed_over.into_iter().map(|(_, passed)| passed).collect(),
                        history: history.clone(),
                        restore_point: point_of(backup).cloned(),
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
    if let (RecoveryTarget::Name(name), None) = (&request.target, named) {
        let mut in_the_way = ways.iter().filter_map(|history| points(history)?.in_the_way());
        let before = |newest| candidates.iter().any(|b| b.stop_lsn <= newest);
        if let Some((earlier, newest)) = in_the_way.find(|(_, newest)| before(*newest)) {
            return Err(PlanError::NameMetEarlier { name: name.to_string(), newest, earlier });
        }
    }
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

    /// A few names of recorded restore points, the newest first.
    fn known_names(&self) -> Vec<String> {
        const FEW: usize = 10;
        let mut points: Vec<&RestorePointRecord> = self.restore_points.iter().collect();
        points.sort_by_key(|point| std::cmp::Reverse((point.created_at, point.lsn)));
        let mut names: Vec<String> = Vec::new();
        for point in points {
            let name = format!("{:?}", point.name.as_str());
            if !names.contains(&name) && names.len() < FEW {
                names.push(name);
            }
        }
        names
    }

    /// The histories of all timelines of which there is anything else, the newest first: the order in which PostgreSQL's
    /// 'latest' prefers them.
    fn newest_first(&self) -> Vec<TimelineHistory> {
        let mut histories = self.histories.clone();
        histories.retain(|history| !self.begun_only.contains(&history.timeline()));
        if self.history(TimelineId::FIRST).is_some_and(|_| !histories.iter().any(|h| h.timeline() == TimelineId::FIRST))
        {
            histories.push(TimelineHistory::first(TimelineId::FIRST));
        }
        histories.sort_by_key(|history| std::cmp::Reverse(history.timeline()));
        histories
    }
}

/// WAL that recovery reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct WalToReplay {
    /// Segments; where it isn't known where recovery ends, all that are there.
    pub segments: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes in the repository of all segments that are there, from the first on.
    pub stored_bytes: u64,
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
    /// Bytes that the data directory has, with its tablespaces, before WAL is replayed.
    pub restored_bytes: u64,
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
    /// How much WAL recovery reads.
    pub wal: WalToReplay,
    /// The restore point of the target's name, where it's recorded.
    pub restore_point: Option<RestorePointRecord>,
    /// Where recovery will end.
    pub expected_end: ExpectedEnd,
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
        let Selection { backup, chain, passed_over, history, restore_point } = selection;
        let lacks = |missing| PlanError::BackupLacksWal { backup: backup.id, missing };
        let aim = match (&target, &restore_point) {
            (RecoveryTarget::Lsn(lsn), _) => Some(*lsn),
            // Where its record ends; its last byte has to be there.
            (RecoveryTarget::Name(_), Some(point)) => Some(Lsn::new(point.lsn.bytes().saturating_sub(1))),
            _ => None,
        };
        let reach = Reach::new(&Span::from(&backup), &history, (&target, aim), &wal, lacks)?;
        let expected_end = ExpectedEnd::unread(&target, backup.stop_lsn);
        let plan = RestorePlan {
            wal_from: reach.first,
            wal_through: reach.last,
            reachable: wal.reachable,
            gap: wal.gap.then_some(wal.missing),
            timeline: history.timeline(),
            target,
            download_bytes: chain.iter().map(BackupRecord::stored_bytes).sum(),
            restored_bytes: backup.restored_size(),
            wal: WalToReplay { segments: 0, bytes: 0, stored_bytes: wal.stored_bytes },
            chain,
            passed_over,
            backup,
            restore_point,
            expected_end: expected_end.clone(),
        };
        Ok(plan.expecting(expected_end))
    }

    /// The search that tells where recovery will end; `None` where that is known without one. `wal` is what the plan was
    /// made from.
    pub fn search(&self, inclusive: bool, wal: WalFacts) -> Option<Search> {
        let (backup, point) = (&self.backup, self.restore_point.as_ref().map(|point| point.lsn));
        let range = (backup.start_lsn, backup.stop_lsn);
        Search::new(&self.target, inclusive, range, backup.wal_segment_size, wal, point)
    }

    /// The same plan, with what has been found out about its end.
    #[must_use]
    pub fn expecting(mut self, end: ExpectedEnd) -> RestorePlan {
        let size = self.backup.wal_segment_size;
        let through = match &end {
            ExpectedEnd::Verified(end) => end.lsn.max(self.backup.stop_lsn),
            ExpectedEnd::NotVerified { .. } => self.reachable,
        };
        let (first, last) = (size.segment_number(self.backup.start_lsn), size.previous_segment_number(through));
        self.wal.segments = last.saturating_sub(first) + 1;
        self.wal.bytes = self.wal.segments * size.bytes();
        self.expected_end = end;
        self
    }
}

#[cfg(test)]
pub(crate) mod tests;
