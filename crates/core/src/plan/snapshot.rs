//! The plan for a directory that was rolled back or cloned from a snapshot: which timeline and which WAL lead to the
//! target. Which snapshot isn't a question: the directory is the one.

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde::Serialize;

use super::{
    Catalog, ExpectedEnd, PlanError, Search, WalFacts, as_text,
    reach::{Reach, Span},
};
use crate::{Lsn, SegmentName, SnapshotId, SnapshotRecord, TimelineHistory, TimelineId, recovery::RecoveryTarget};

/// A snapshot and the timeline that lead to a target.
#[derive(Clone, PartialEq, Debug)]
pub struct SnapshotSelection {
    /// The snapshot to begin with.
    pub snapshot: SnapshotRecord,
    /// The timeline to end on, with the way to it.
    pub history: TimelineHistory,
}

/// Why a snapshot doesn't lead to a target.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum SnapshotPlanError {
    /// The snapshot ends after the target.
    #[error(
        "the target, {target}, lies before the end of snapshot {snapshot}, which was complete at {stopped_at} ({stop_lsn})"
    )]
    BeforeSnapshot {
        /// What was asked for.
        target: String,
        /// The snapshot.
        snapshot: SnapshotId,
        /// Its end.
        stopped_at: Timestamp,
        /// Its end.
        stop_lsn: Lsn,
    },
    /// The snapshot doesn't lie on the way to the timeline.
    #[error("snapshot {snapshot} does not lie on the way to timeline {timeline}")]
    NotOnTheWay {
        /// The snapshot.
        snapshot: SnapshotId,
        /// The timeline that was asked for.
        timeline: TimelineId,
    },
    /// No known timeline holds it.
    #[error("snapshot {0} lies on no timeline that the repository knows")]
    NoTimeline(SnapshotId),
    /// WAL from the time of the snapshot itself is missing.
    #[error("snapshot {snapshot} can't be restored: WAL segment {missing}, which it needs, is not in the archive")]
    LacksWal {
        /// The snapshot.
        snapshot: SnapshotId,
        /// The first segment that is missing.
        missing: SegmentName,
    },
    /// What can happen with a backup, too.
    #[error(transparent)]
    Plan(#[from] PlanError),
}

impl SnapshotPlanError {
    /// What to do about it.
    pub fn hint(&self) -> String {
        match self {
            SnapshotPlanError::BeforeSnapshot { .. } => {
                "Choose a later target, or an earlier snapshot; --target-immediate ends at the snapshot's own end."
            }
            SnapshotPlanError::NotOnTheWay { .. } => "Name another timeline with --target-timeline.",
            SnapshotPlanError::NoTimeline(_) => {
                "A timeline's history is missing in the repository. Restore another snapshot or a backup."
            }
            SnapshotPlanError::LacksWal { .. } => "Restore another snapshot or a backup.",
            SnapshotPlanError::Plan(error) => return error.hint(),
        }
        .to_owned()
    }
}

/// Chooses the timeline for a restore from a snapshot: the one that was asked for, or the newest that can be reached
/// and of which there is more than a history ([`Catalog::begun_only`]).
///
/// # Errors
/// If the snapshot doesn't lead to the target.
pub fn select_for_snapshot(
    snapshot: SnapshotRecord,
    histories: Vec<TimelineHistory>,
    begun_only: BTreeSet<TimelineId>,
    target: &RecoveryTarget,
    timeline: Option<TimelineId>,
) -> Result<SnapshotSelection, SnapshotPlanError> {
    if !Span::from(&snapshot).allows(target) {
        return Err(SnapshotPlanError::BeforeSnapshot {
            target: target.to_string(),
            snapshot: snapshot.id,
            stopped_at: snapshot.stopped_at,
            stop_lsn: snapshot.stop_lsn,
        });
    }
    let catalog = Catalog { histories, begun_only, ..Catalog::default() };
    let ways = match timeline {
        Some(timeline) => vec![catalog.history(timeline).ok_or(PlanError::NoSuchTimeline(timeline))?],
        None => catalog.newest_first(),
    };
    let way = ways.into_iter().find(|history| history.contains(snapshot.timeline, snapshot.stop_lsn));
    match (way, timeline) {
        (Some(history), _) => Ok(SnapshotSelection { snapshot, history }),
        (None, Some(timeline)) => Err(SnapshotPlanError::NotOnTheWay { snapshot: snapshot.id, timeline }),
        (None, None) => Err(SnapshotPlanError::NoTimeline(snapshot.id)),
    }
}

/// A restore from a snapshot that can be begun: all the WAL that it needs was there when it was planned.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct SnapshotPlan {
    /// The snapshot that the directory holds.
    pub snapshot: SnapshotRecord,
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
    /// Where recovery will end.
    pub expected_end: ExpectedEnd,
}

impl SnapshotPlan {
    /// Plans a restore from a selection and what a scan from the snapshot's start on has found.
    ///
    /// # Errors
    /// If the WAL doesn't make the snapshot consistent or doesn't reach the target.
    pub fn new(
        selection: SnapshotSelection,
        target: RecoveryTarget,
        wal: WalFacts,
    ) -> Result<SnapshotPlan, SnapshotPlanError> {
        let SnapshotSelection { snapshot, history } = selection;
        let lacks = |missing| SnapshotPlanError::LacksWal { snapshot: snapshot.id, missing };
        let aim = match &target {
            RecoveryTarget::Lsn(lsn) => Some(*lsn),
            _ => None,
        };
        let reach = Reach::new(&Span::from(&snapshot), &history, (&target, aim), &wal, lacks)?;
        Ok(SnapshotPlan {
            wal_from: reach.first,
            wal_through: reach.last,
            reachable: wal.reachable,
            gap: wal.gap.then_some(wal.missing),
            timeline: history.timeline(),
            expected_end: ExpectedEnd::unread(&target, snapshot.stop_lsn),
            target,
            snapshot,
        })
    }

    /// The search that tells where recovery will end; `None` where that is known without one. `wal` is what the plan was
    /// made from.
    pub fn search(&self, inclusive: bool, wal: WalFacts) -> Option<Search> {
        let snapshot = &self.snapshot;
        let range = (snapshot.start_lsn, snapshot.stop_lsn);
        Search::new(&self.target, inclusive, range, snapshot.wal_segment_size, wal, None)
    }

    /// The same plan, with what has been found out about its end.
    #[must_use]
    pub fn expecting(self, end: ExpectedEnd) -> SnapshotPlan {
        SnapshotPlan { expected_end: end, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{plan::WalScan, plan::tests::tli, snapshot::tests::record};

    fn lsn(text: &str) -> Lsn {
        text.parse().unwrap()
    }

    fn branch(timeline: u32, from: u32, at: &str) -> TimelineHistory {
        TimelineHistory::parse(tli(timeline), format!("{from}\t{at}\treason\n").as_bytes()).unwrap()
    }

    fn selected(target: &RecoveryTarget, timeline: Option<u32>) -> Result<u32, SnapshotPlanError> {
        // The snapshot is on timeline 1 and ends at 0/3000100: 2 begins behind it, 3 before; 4 was begun and no more.
        let histories = vec![branch(2, 1, "0/5000000"), branch(3, 1, "0/2800000"), branch(4, 1, "0/5000000")];
        let selection = select_for_snapshot(record(), histories, BTreeSet::from([tli(4)]), target, timeline.map(tli));
        selection.map(|way| way.history.timeline().get())
    }

    #[test]
    fn the_newest_timeline_that_holds_the_snapshot_is_chosen() {
        let (id, latest) = (record().id, RecoveryTarget::Latest);
        assert_eq!(selected(&latest, None), Ok(2));
        assert_eq!(selected(&latest, Some(1)), Ok(1));
        assert_eq!(selected(&latest, Some(4)), Ok(4));
        let not_on_the_way = SnapshotPlanError::NotOnTheWay { snapshot: id, timeline: tli(3) };
        assert_eq!(selected(&latest, Some(3)), Err(not_on_the_way));
        assert_eq!(selected(&latest, Some(7)), Err(PlanError::NoSuchTimeline(tli(7)).into()));
        let unknown = SnapshotRecord { timeline: tli(9), ..record() };
        let selection = select_for_snapshot(unknown, vec![], BTreeSet::new(), &latest, None);
        assert_eq!(selection, Err(SnapshotPlanError::NoTimeline(id)));
    }

    #[test]
    fn a_target_before_the_snapshot_s_end_is_refused() {
        let end = record().stopped_at;
        let before = Timestamp::from_second(end.as_second() - 1).unwrap();
        assert_eq!(selected(&RecoveryTarget::Time(end), None), Ok(2));
        for target in [RecoveryTarget::Time(before), RecoveryTarget::Lsn(lsn("0/3000000")), RecoveryTarget::Xid(999)] {
            let refused = selected(&target, None);
            assert!(matches!(refused, Err(SnapshotPlanError::BeforeSnapshot { .. })), "{refused:?}");
        }
    }

    #[test]
    fn the_wal_from_start_to_stop_has_to_be_there() {
        let plan = |segments: &[u64], target: RecoveryTarget| {
            let history = TimelineHistory::first(tli(1));
            let size = record().wal_segment_size;
            let mut scan = WalScan::new(history.clone(), size, record().start_lsn);
            for number in segments {
                scan.found(SegmentName::from_number(tli(1), *number, size), 10, record().stopped_at);
            }
            SnapshotPlan::new(SnapshotSelection { snapshot: record(), history }, target, scan.finish())
        };
        let whole = plan(&[2, 3], RecoveryTarget::Latest).unwrap();
        assert_eq!(
            (whole.wal_from.to_string(), whole.wal_through.to_string(), whole.gap),
            ("000000010000000000000002".to_owned(), "000000010000000000000003".to_owned(), None)
        );
        let lacks = |missing: &str| {
            Err(SnapshotPlanError::LacksWal { snapshot: record().id, missing: missing.parse().unwrap() })
        };
        assert_eq!(plan(&[2], RecoveryTarget::Immediate), lacks("000000010000000000000003"));
        assert_eq!(plan(&[3], RecoveryTarget::Latest), lacks("000000010000000000000002"));
        assert!(matches!(
            plan(&[2, 3, 5], RecoveryTarget::Lsn(lsn("0/5000100"))),
            Err(SnapshotPlanError::Plan(PlanError::Gap { .. }))
        ));
    }
}
