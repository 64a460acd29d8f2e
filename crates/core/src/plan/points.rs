//! Which restore point of a name is meant, and which backups lead to it.
//!
//! PostgreSQL stops at the first record of that name that it replays, and it replays from a backup's start on: one from
//! before the backup was complete is met, and ends the start with an error (`recoveryStopsAfter` in `xlogrecovery.c`).

use crate::{BackupRecord, Lsn, TimelineHistory, recovery::RestorePointName, restore_point::RestorePointRecord};

/// The restore points of a name on a way, in the order of their positions.
#[derive(Debug)]
pub(super) struct Points<'a>(Vec<&'a RestorePointRecord>);

impl<'a> Points<'a> {
    pub(super) fn on(history: &TimelineHistory, name: &RestorePointName, all: &'a [RestorePointRecord]) -> Points<'a> {
        let on_the_way = all.iter().filter(|point| point.name == *name && history.contains(point.timeline, point.lsn));
        let mut points: Vec<_> = on_the_way.collect();
        points.sort_by_key(|point| point.lsn);
        Points(points)
    }

    /// The one that is meant where no backup is named: the newest.
    pub(super) fn newest(&self) -> Option<&'a RestorePointRecord> {
        self.0.last().copied()
    }

    /// The first one that recovery from this backup meets.
    pub(super) fn first_met(&self, backup: &BackupRecord) -> Option<&'a RestorePointRecord> {
        self.0.iter().find(|point| point.lsn > backup.start_lsn).copied()
    }

    /// Whether recovery from this backup ends at the newest.
    pub(super) fn leads_to_newest(&self, backup: &BackupRecord) -> bool {
        let newest = self.newest().filter(|newest| backup.stop_lsn <= newest.lsn);
        newest.is_some_and(|newest| self.first_met(backup).map(|met| met.lsn) == Some(newest.lsn))
    }

    /// The one before the newest, where that lies behind every backup that leads to the newest.
    pub(super) fn in_the_way(&self) -> Option<(Lsn, Lsn)> {
        match self.0.as_slice() {
            [.., before, newest] => Some((before.lsn, newest.lsn)),
            _ => None,
        }
    }
}
