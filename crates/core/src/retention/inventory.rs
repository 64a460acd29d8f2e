//! What there is, as far as retention has to know.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::{Name, Reason, Reasons, Start};
use crate::{
    ArchivedWal, BackupId, BackupKind, BackupRecord, DumpId, SegmentName, SnapshotId, SnapshotRecord, TimelineHistory,
    TimelineId, WalSegmentSize, chain::chain, dump::DatabaseName,
};

/// How far a server's clock is believed to be ahead of the store's.
const MOST_AHEAD: SignedDuration = SignedDuration::from_hours(24);

/// What a repository holds of a database system.
#[derive(Clone, Debug)]
pub struct Inventory {
    /// The size of its WAL segments.
    pub size: WalSegmentSize,
    /// All complete backups whose records can be read.
    pub backups: Vec<BackupRecord>,
    /// What is known of each of them besides its record.
    pub facts: BTreeMap<BackupId, BackupFacts>,
    /// All complete snapshots.
    pub snapshots: Vec<SnapshotRecord>,
    /// When the record of each of them was stored, by the store's clock.
    pub snapshots_stored: BTreeMap<SnapshotId, Timestamp>,
    /// All timeline histories.
    pub histories: Vec<TimelineHistory>,
    /// What there is of each timeline's WAL.
    pub wal: BTreeMap<TimelineId, TimelineStock>,
    /// The backups that somebody wants to keep.
    pub pins: BTreeSet<BackupId>,
    /// All complete dumps whose records can be read, with the databases that are in them.
    pub dumps: BTreeMap<DumpId, BTreeSet<DatabaseName>>,
    /// Records of dumps that can't be read.
    pub unreadable_dumps: Vec<Unreadable>,
    /// Backups that aren't complete, with the time at which the last object of each was stored.
    pub unfinished: BTreeMap<BackupId, Timestamp>,
    /// The same for dumps.
    pub unfinished_dumps: BTreeMap<DumpId, Timestamp>,
    /// What should tell what is needed, and can't be read.
    pub unreadable: Vec<Unreadable>,
}

/// An object that can't be read, and why.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Unreadable {
    /// What it is, for people.
    pub what: String,
    /// Why it can't be read.
    pub why: String,
}

/// What is known of a backup besides its record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BackupFacts {
    /// When its record was stored, by the store's clock.
    pub stored_at: Timestamp,
    /// Whether all its objects are there, in the right size.
    pub intact: bool,
    /// Whether it should have been removed, and the store refused.
    pub held: bool,
}

/// What there is of a timeline.
#[derive(Clone, Debug)]
pub struct TimelineStock {
    /// Its segments.
    pub wal: ArchivedWal,
    last_stored: Option<Timestamp>,
    highest: Option<u64>,
    size: WalSegmentSize,
}

impl TimelineStock {
    /// Nothing yet.
    pub fn new(timeline: TimelineId, size: WalSegmentSize) -> TimelineStock {
        TimelineStock { wal: ArchivedWal::new(timeline, size), last_stored: None, highest: None, size }
    }

    /// Takes note of any object of the timeline; `of` is the segment that it is, or belongs to.
    pub fn found(&mut self, of: Option<SegmentName>, stored_at: Timestamp) {
        self.last_stored = self.last_stored.max(Some(stored_at));
        self.highest = self.highest.max(of.and_then(|segment| segment.number(self.size)));
    }
}

/// When something was complete whose record was stored then: by the later of the server's clock and the store's. A server's
/// that was far ahead of the store's was wrong: by it, something would be young for as long as it was ahead.
fn complete(stopped_at: Timestamp, stored_at: Option<Timestamp>) -> Timestamp {
    let Some(stored_at) = stored_at else { return stopped_at };
    let latest = stored_at.checked_add(MOST_AHEAD).unwrap_or(Timestamp::MAX);
    stopped_at.clamp(stored_at, latest)
}

impl Inventory {
    /// Nothing, of a system with segments of this size.
    pub fn empty(size: WalSegmentSize) -> Inventory {
        Inventory {
            size,
            backups: Vec::new(),
            facts: BTreeMap::new(),
            snapshots: Vec::new(),
            snapshots_stored: BTreeMap::new(),
            histories: Vec::new(),
            wal: BTreeMap::new(),
            pins: BTreeSet::new(),
            dumps: BTreeMap::new(),
            unreadable_dumps: Vec::new(),
            unfinished: BTreeMap::new(),
            unfinished_dumps: BTreeMap::new(),
            unreadable: Vec::new(),
        }
    }

    /// What there is of a timeline, to be added to.
    pub fn stock(&mut self, timeline: TimelineId) -> &mut TimelineStock {
        let size = self.size;
        self.wal.entry(timeline).or_insert_with(|| TimelineStock::new(timeline, size))
    }

    /// All timelines of which there is anything.
    pub(super) fn timelines(&self) -> BTreeSet<TimelineId> {
        let of_histories = self.histories.iter().map(TimelineHistory::timeline);
        let of_backups = self.backups.iter().map(|backup| backup.timeline);
        let of_snapshots = self.snapshots.iter().map(|snapshot| snapshot.timeline);
        self.wal.keys().copied().chain(of_histories).chain(of_backups).chain(of_snapshots).collect()
    }

    /// The last moment at which anything was stored that tells of the database.
    pub(super) fn last_known(&self) -> Option<Timestamp> {
        let wal = self.wal.values().filter_map(|stock| stock.last_stored).max();
        wal.max(self.facts.values().map(|facts| facts.stored_at).max())
    }

    /// Whether anything of a timeline's WAL was stored since then.
    pub(super) fn stored_since(&self, timeline: TimelineId, since: Timestamp) -> bool {
        self.wal.get(&timeline).and_then(|stock| stock.last_stored).is_some_and(|last| last >= since)
    }

    /// The last segment of a timeline of which there is anything.
    pub(super) fn highest(&self, timeline: TimelineId) -> Option<u64> {
        self.wal.get(&timeline)?.highest
    }

    /// Whether it's known which timelines lead to this one.
    pub(super) fn knows_way_to(&self, timeline: TimelineId) -> bool {
        timeline == TimelineId::FIRST || self.histories.iter().any(|history| history.timeline() == timeline)
    }

    /// The way to a timeline; itself alone if its history isn't known.
    pub(super) fn way_to(&self, timeline: TimelineId) -> TimelineHistory {
        let known = self.histories.iter().find(|history| history.timeline() == timeline);
        known.cloned().unwrap_or_else(|| TimelineHistory::first(timeline))
    }

    /// Whether the store refused to let this backup go.
    pub(super) fn is_held(&self, id: BackupId) -> bool {
        self.facts.get(&id).is_some_and(|facts| facts.held)
    }

    /// What keeps a backup from being restored, or from being worth it.
    pub(super) fn what_is_wrong(&self, id: BackupId) -> Option<String> {
        let record = self.backups.iter().find(|backup| backup.id == id)?;
        if !record.damaged.is_empty() {
            return Some("found damaged pages in the database".to_owned());
        }
        self.why_not_restorable(record)
    }

    fn why_not_restorable(&self, record: &BackupRecord) -> Option<String> {
        let links = match chain(record, &self.backups) {
            Ok(links) => links,
            Err(error) => return Some(format!("can't be restored: {error}")),
        };
        let is_intact = |link: &&&BackupRecord| self.facts.get(&link.id).is_some_and(|facts| facts.intact);
        if let Some(link) = links.iter().find(|link| !is_intact(link)) {
            return Some(format!("can't be restored: not all of backup {} is there", link.id));
        }
        let (start, stop) = (record.start_lsn, record.stop_lsn);
        (!self.holds(record.timeline, start, stop))
            .then(|| "can't be restored: WAL is missing that it needs".to_owned())
    }

    /// Whether neither a backup nor anything that it builds on has damaged pages.
    fn is_clean(&self, record: &BackupRecord) -> bool {
        chain(record, &self.backups).is_ok_and(|links| links.iter().all(|link| link.damaged.is_empty()))
    }

    /// Whether all WAL from a position of a timeline to another is there.
    fn holds(&self, timeline: TimelineId, start: crate::Lsn, stop: crate::Lsn) -> bool {
        let (first, last) = (self.size.segment_number(start), self.size.previous_segment_number(stop));
        self.wal.get(&timeline).is_some_and(|stock| stock.wal.holds(first, last.max(first)))
    }

    pub(super) fn backup_start(&self, record: &BackupRecord) -> Start {
        let stored_at = self.facts.get(&record.id).map(|facts| facts.stored_at);
        let restorable = self.why_not_restorable(record).is_none();
        Start {
            name: Name::Backup(record.id),
            timeline: record.timeline,
            start: record.start_lsn,
            stop: record.stop_lsn,
            complete: complete(record.stopped_at, stored_at),
            restorable,
            clean: restorable && self.is_clean(record),
            full: record.id.kind() == BackupKind::Full,
        }
    }

    pub(super) fn snapshot_start(&self, record: &SnapshotRecord) -> Start {
        let restorable = self.holds(record.timeline, record.start_lsn, record.stop_lsn);
        Start {
            name: Name::Snapshot(record.id),
            timeline: record.timeline,
            start: record.start_lsn,
            stop: record.stop_lsn,
            complete: complete(record.stopped_at, self.snapshots_stored.get(&record.id).copied()),
            restorable,
            clean: restorable,
            full: true,
        }
    }

    /// Notes that what a backup builds on stays with it, as far as it's there.
    pub(super) fn note_parents(&self, id: BackupId, reasons: &mut Reasons) {
        let mut link = id;
        // Ids of parents are smaller, so that this ends.
        while let Some(parent) = self.backups.iter().find(|backup| backup.id == link).and_then(|backup| backup.parent) {
            if parent >= link || !self.backups.iter().any(|backup| backup.id == parent) {
                return;
            }
            reasons.entry(Name::Backup(parent)).or_default().insert(Reason::BuiltOnBy(link));
            link = parent;
        }
    }
}
