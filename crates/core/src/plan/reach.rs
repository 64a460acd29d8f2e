//! Whether recovery that begins with something (a backup, a snapshot) can end at a target, and whether the WAL is there.

use jiff::Timestamp;

use super::{PlanError, WalFacts, xid_not_before};
use crate::{
    BackupRecord, Lsn, SegmentName, SnapshotRecord, TimelineHistory, TimelineId, WalSegmentSize,
    recovery::RecoveryTarget,
};

/// From where to where WAL is needed at least, and what lies behind the end: all that a plan needs to know of a backup.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    timeline: TimelineId,
    start: Lsn,
    stop: Lsn,
    stopped_at: Timestamp,
    next_xid_at_stop: u64,
    size: WalSegmentSize,
}

impl From<&BackupRecord> for Span {
    fn from(backup: &BackupRecord) -> Span {
        Span {
            timeline: backup.timeline,
            start: backup.start_lsn,
            stop: backup.stop_lsn,
            stopped_at: backup.stopped_at,
            next_xid_at_stop: backup.next_xid_at_stop,
            size: backup.wal_segment_size,
        }
    }
}

impl From<&SnapshotRecord> for Span {
    fn from(snapshot: &SnapshotRecord) -> Span {
        Span {
            timeline: snapshot.timeline,
            start: snapshot.start_lsn,
            stop: snapshot.stop_lsn,
            stopped_at: snapshot.stopped_at,
            next_xid_at_stop: snapshot.next_xid_at_stop,
            size: snapshot.wal_segment_size,
        }
    }
}

impl Span {
    /// Whether recovery from here can end at the target: there is consistency only at the span's own end, so the target
    /// must not lie before it.
    pub(super) fn allows(&self, target: &RecoveryTarget) -> bool {
        match target {
            RecoveryTarget::Latest | RecoveryTarget::Immediate | RecoveryTarget::Name(_) => true,
            RecoveryTarget::Time(time) => self.stopped_at <= *time,
            RecoveryTarget::Lsn(lsn) => self.stop <= *lsn,
            RecoveryTarget::Xid(xid) => xid_not_before(*xid, self.next_xid_at_stop),
        }
    }
}

/// The WAL of a recovery that reaches its target.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reach {
    /// The first segment that recovery reads.
    pub(super) first: SegmentName,
    /// The last one that is there without a gap.
    pub(super) last: SegmentName,
}

impl Reach {
    /// Whether the WAL makes the span consistent and, as far as a listing tells, reaches the target: it has to hold the
    /// position `aim`. `lacks` words the first failure.
    pub(super) fn new<E: From<PlanError>>(
        span: &Span,
        history: &TimelineHistory,
        (target, aim): (&RecoveryTarget, Option<Lsn>),
        wal: &WalFacts,
        lacks: impl FnOnce(SegmentName) -> E,
    ) -> Result<Reach, E> {
        let size = span.size;
        // PostgreSQL needs the segments up to the one that holds the byte before the stop (XLByteToPrevSeg).
        let last_of_span = size.previous_segment_number(span.stop);
        let consistent = wal.reachable > size.start_of(last_of_span);
        let Some((last, stored_at)) = wal.last.filter(|_| consistent) else {
            return Err(lacks(wal.missing));
        };
        // PostgreSQL would read the old timeline's segment in its place, and beyond the switch.
        let begin = history.spans().last().map_or(Lsn::INVALID, |span| span.begin);
        let needs_timeline = match aim {
            _ if *target == RecoveryTarget::Immediate => false,
            Some(lsn) => lsn >= wal.reachable,
            None => true,
        };
        if needs_timeline && begin >= wal.reachable && begin > span.stop {
            return Err(PlanError::TimelineNotReached { timeline: history.timeline(), missing: wal.missing }.into());
        }
        let beyond = aim.is_some_and(|lsn| lsn >= wal.reachable);
        let target_text = || target.to_string();
        if beyond && wal.gap {
            let (target, missing) = (target_text(), wal.missing);
            return Err(PlanError::Gap { target, missing, reachable: wal.reachable }.into());
        }
        if beyond {
            let (target, reachable) = (target_text(), wal.reachable);
            return Err(PlanError::AfterLastWal { target, last, stored_at, reachable }.into());
        }
        let first = size.segment_number(span.start);
        let timeline_of_first = history.timeline_of_segment(first, size).unwrap_or(span.timeline);
        Ok(Reach { first: SegmentName::from_number(timeline_of_first, first, size), last })
    }
}
