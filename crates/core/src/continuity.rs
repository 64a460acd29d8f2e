//! Whether all WAL is in the archive that restores could need, and which backups suffer from what isn't.
//!
//! A restore begins with a backup and follows one way through the timelines. On each way the segments are needed from
//! the oldest backup's start on: an ancestor's up to the segment before that of the switch point, which is looked for
//! on the new timeline first ([`TimelineHistory::timeline_of_segment`]), and then the timeline's own up to its newest.
//! The old timeline's file of the switch point's segment is therefore no gap of the new one's way when it's absent, and
//! no stand-in for the new one's when that is: after the switch point it goes on differently. A timeline of which
//! nothing has been archived yet needs nothing.
//!
//! In three steps, like the restore's plan: [`Requirements::new`] tells from the catalog what to list, the caller feeds
//! the listings to it, and [`Requirements::check`] tells what is missing.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::{ArchivedWal, BackupId, Lsn, SegmentName, TimelineHistory, TimelineId, WalSegmentSize, plan::Catalog};

/// What restores could need, as far as the catalog tells.
#[derive(Clone, Debug)]
pub struct Requirements {
    size: WalSegmentSize,
    ways: Vec<Way>,
    without_history: Vec<TimelineId>,
    backups: usize,
}

/// A timeline that restores can end on, with the backups on the way to it. There is at least one.
#[derive(Clone, Debug)]
struct Way {
    history: TimelineHistory,
    backups: Vec<Needs>,
}

/// What a backup needs to be consistent.
#[derive(Clone, Copy, Debug)]
struct Needs {
    id: BackupId,
    timeline: TimelineId,
    /// The segment in which its replay begins.
    first: u64,
    /// The segment that holds the byte before its end.
    last: u64,
}

/// How far recovery of a backup gets on a way.
#[derive(Clone, Copy, Debug)]
struct Reach {
    /// The first segment that isn't there, or is damaged.
    end: u64,
    /// The timeline on which it would have to be.
    on: TimelineId,
    /// Whether it's needed: it's not just the one that comes after the newest of the way's own timeline.
    hole: bool,
}

/// A backup that can't be restored as far as the archive reaches.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct BackupLimit {
    /// The backup.
    pub backup: BackupId,
    /// The timelines for which this holds, as targets of the restore.
    pub timelines: Vec<TimelineId>,
    /// Whether the backup can be restored on these at all: it's consistent before `lacks`.
    pub restorable: bool,
    /// The first segment that is missing or damaged.
    pub lacks: SegmentName,
    /// Whether it's there, but damaged.
    pub damaged: bool,
    /// Where it begins: the end of what can be replayed.
    pub reachable: Lsn,
}

/// A timeline to list.
#[derive(Clone, Debug)]
pub struct NeededWal {
    /// The first segment that is needed.
    pub first: SegmentName,
    /// The first one that isn't needed any more, if others than this timeline's own restores need it.
    pub end: Option<SegmentName>,
    /// Where what is listed belongs.
    pub wal: ArchivedWal,
}

/// What is there of the WAL that restores could need, and what isn't.
#[derive(Clone, Debug)]
pub struct Continuity {
    /// Each timeline that is needed, in order, from the first segment that is.
    pub timelines: Vec<ArchivedWal>,
    /// Backups that what is missing cuts short, or that can't be restored, the oldest first.
    pub limits: Vec<BackupLimit>,
}

impl Continuity {
    /// How many gaps there are on all timelines.
    pub fn gaps(&self) -> u64 {
        self.timelines.iter().map(ArchivedWal::gaps).sum()
    }
}

impl Requirements {
    /// What restores from this catalog could need; with `only`, restores to this timeline alone. `timelines` are those
    /// of which the repository has anything.
    ///
    /// A timeline whose history is missing is taken to have no ancestors, as PostgreSQL does.
    pub fn new(
        catalog: &Catalog,
        timelines: &[TimelineId],
        size: WalSegmentSize,
        only: Option<TimelineId>,
    ) -> Requirements {
        let mut known: BTreeSet<TimelineId> = timelines.iter().copied().collect();
        known.extend(catalog.backups.iter().map(|backup| backup.timeline));
        known.extend(catalog.histories.iter().map(TimelineHistory::timeline));
        known.retain(|timeline| only.is_none_or(|only| only == *timeline));
        let without_history = known.iter().copied().filter(|timeline| catalog.history(*timeline).is_none()).collect();
        let way = |timeline: TimelineId| {
            let history = catalog.history(timeline).unwrap_or_else(|| TimelineHistory::first(timeline));
            let on_the_way = catalog.backups.iter().filter(|b| history.contains(b.timeline, b.stop_lsn));
            let needs = |backup: &crate::BackupRecord| Needs {
                id: backup.id,
                timeline: backup.timeline,
                first: size.segment_number(backup.start_lsn),
                last: size.previous_segment_number(backup.stop_lsn),
            };
            let backups: Vec<Needs> = on_the_way.map(needs).collect();
            (!backups.is_empty()).then_some(Way { history, backups })
        };
        let ways: Vec<Way> = known.into_iter().filter_map(way).collect();
        let ids: BTreeSet<BackupId> = ways.iter().flat_map(|way| way.backups.iter().map(|backup| backup.id)).collect();
        Requirements { size, ways, without_history, backups: ids.len() }
    }

    /// The timelines other than the first whose history isn't known. Without it a restore can't follow them.
    pub fn without_history(&self) -> &[TimelineId] {
        &self.without_history
    }

    /// How many backups there are to restore from.
    pub fn backups(&self) -> usize {
        self.backups
    }

    /// The timelines to list, in order.
    pub fn listings(&self) -> Vec<NeededWal> {
        let mut wanted: BTreeMap<TimelineId, (BTreeSet<u64>, Option<u64>)> = BTreeMap::new();
        for way in &self.ways {
            for backup in &way.backups {
                for stretch in way.history.stretches(backup.first, self.size) {
                    let (firsts, end) = wanted.entry(stretch.timeline).or_insert((BTreeSet::new(), stretch.end));
                    firsts.insert(stretch.first);
                    *end = end.zip(stretch.end).map(|(a, b)| a.max(b));
                }
            }
        }
        let listing = |(timeline, (wanted, end)): (TimelineId, (BTreeSet<u64>, Option<u64>))| {
            let wanted: Vec<u64> = wanted.into_iter().collect();
            let name = |number| SegmentName::from_number(timeline, number, self.size);
            let first = name(*wanted.first()?);
            let wal = ArchivedWal::expecting(timeline, self.size, &wanted, end);
            Some(NeededWal { first, end: end.map(name), wal })
        };
        wanted.into_iter().filter_map(listing).collect()
    }

    /// What is missing, from the timelines of [`Requirements::listings`] after all their segments have been found, and
    /// what that and those of them that are `damaged` mean for the backups.
    pub fn check(&self, timelines: Vec<ArchivedWal>, damaged: &BTreeSet<SegmentName>) -> Continuity {
        let timelines = timelines.into_iter().map(|wal| (wal.timeline(), wal)).collect();
        let mut archived = Archived { size: self.size, timelines, damaged };
        let mut reaches: Vec<(&Way, &Needs, Reach)> = Vec::new();
        for way in &self.ways {
            reaches.extend(way.backups.iter().map(|backup| (way, backup, archived.reach(way, backup))));
        }
        let consistent = reaches.iter().filter(|(_, backup, reach)| reach.end > backup.last);
        let restorable: BTreeSet<BackupId> = consistent.map(|(_, backup, _)| backup.id).collect();

        // Whatever else is there: the WAL from the time of a backup itself must be.
        let lost =
            |way: &Way, backup: &Needs| backup.timeline == way.history.timeline() && !restorable.contains(&backup.id);
        let mut limits: BTreeMap<(BackupId, bool, SegmentName), BackupLimit> = BTreeMap::new();
        for (way, backup, reach) in reaches {
            if reach.hole || lost(way, backup) {
                let restorable = reach.end > backup.last;
                let lacks = SegmentName::from_number(reach.on, reach.end, self.size);
                let limit = limits.entry((backup.id, restorable, lacks)).or_insert_with(|| BackupLimit {
                    backup: backup.id,
                    timelines: Vec::new(),
                    restorable,
                    lacks,
                    damaged: damaged.contains(&lacks),
                    reachable: self.size.start_of(reach.end),
                });
                limit.timelines.push(way.history.timeline());
            }
        }
        for way in &self.ways {
            let of_backups = way.backups.iter().filter(|backup| lost(way, backup)).map(|backup| backup.last);
            if let Some(last) = of_backups.chain(archived.newest(&way.history)).max() {
                archived.expect(way, last);
            }
        }
        Continuity { timelines: archived.timelines.into_values().collect(), limits: limits.into_values().collect() }
    }
}

struct Archived<'a> {
    size: WalSegmentSize,
    timelines: BTreeMap<TimelineId, ArchivedWal>,
    damaged: &'a BTreeSet<SegmentName>,
}

impl Archived<'_> {
    /// The newest segment of a history's own timeline; `None` if there is none that is needed.
    fn newest(&self, history: &TimelineHistory) -> Option<u64> {
        self.timelines.get(&history.timeline())?.last_number()
    }

    /// How far recovery of a backup gets on a way.
    fn reach(&self, way: &Way, backup: &Needs) -> Reach {
        let newest = self.newest(&way.history);
        let mut reach = Reach { end: backup.first, on: way.history.timeline(), hole: false };
        for stretch in way.history.stretches(backup.first, self.size) {
            let wal = self.timelines.get(&stretch.timeline);
            let missing = wal.map_or(stretch.first, |wal| wal.first_missing(stretch.first));
            let end =
                self.first_damaged(stretch.timeline, stretch.first).map_or(missing, |damaged| damaged.min(missing));
            reach = Reach { end, on: stretch.timeline, hole: newest.is_some_and(|newest| end <= newest) };
            if stretch.end.is_none_or(|stretch_end| end < stretch_end) {
                break;
            }
        }
        reach
    }

    /// The first damaged segment of a timeline from this one on.
    fn first_damaged(&self, timeline: TimelineId, from: u64) -> Option<u64> {
        let from = SegmentName::from_number(timeline, from, self.size);
        let first = self.damaged.range(from..).next().filter(|damaged| damaged.timeline() == timeline);
        first.and_then(|damaged| damaged.number(self.size))
    }

    /// Notes that everything should be there that the way needs to get to the end of the segment with this number.
    fn expect(&mut self, way: &Way, last: u64) {
        let after = last.saturating_add(1);
        let first = way.backups.iter().map(|backup| backup.first).min().unwrap_or(after);
        for stretch in way.history.stretches(first, self.size).take_while(|stretch| stretch.first < after) {
            if let Some(wal) = self.timelines.get_mut(&stretch.timeline) {
                wal.expect_before(stretch.end.map_or(after, |end| end.min(after)));
            }
        }
    }
}

#[cfg(test)]
mod tests;
