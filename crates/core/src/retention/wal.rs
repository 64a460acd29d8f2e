//! Which WAL is needed.

use std::collections::BTreeMap;

use serde::Serialize;

use super::Inventory;
use crate::{ArchiveFileName, Lsn, SegmentName, TimelineHistory, TimelineId, WalSegmentSize, layout::RepositoryObject};

/// Numbers of segments, from the first to the last; without a last one, all that are yet to come as well.
type Numbers = (u64, Option<u64>);

/// The segments that are needed, gathered.
#[derive(Default)]
pub(super) struct Needs(BTreeMap<TimelineId, Vec<Numbers>>);

impl Needs {
    fn add(&mut self, timeline: TimelineId, numbers: Numbers) {
        self.0.entry(timeline).or_default().push(numbers);
    }

    /// All of a timeline.
    pub(super) fn all_of(&mut self, timeline: TimelineId) {
        self.add(timeline, (0, None));
    }

    /// Everything from a position to the end of a way.
    pub(super) fn from(&mut self, way: &TimelineHistory, from: Lsn, size: WalSegmentSize) {
        self.stretch(way, size.segment_number(from), None, size);
    }

    /// What leads from a position to another one on a way.
    pub(super) fn between(&mut self, way: &TimelineHistory, start: Lsn, stop: Lsn, size: WalSegmentSize) {
        let last = size.previous_segment_number(stop);
        self.stretch(way, size.segment_number(start), Some(last.max(size.segment_number(start))), size);
    }

    /// The segment in which a timeline is left is needed of both timelines: recovery takes the old one's where the new
    /// one's isn't there.
    fn stretch(&mut self, way: &TimelineHistory, first: u64, last: Option<u64>, size: WalSegmentSize) {
        for span in way.spans().iter().filter(|span| span.end != Some(span.begin)) {
            let first = size.segment_number(span.begin).max(first);
            let end = span.end.map(|end| size.segment_number(end));
            let last = match (end, last) {
                (Some(end), Some(last)) => Some(end.min(last)),
                (end, last) => end.or(last),
            };
            if last.is_none_or(|last| first <= last) {
                self.add(span.timeline, (first, last));
            }
        }
    }

    /// What becomes of a timeline.
    pub(super) fn plan(&self, timeline: TimelineId, inventory: &Inventory) -> TimelinePlan {
        let mut needed = self.0.get(&timeline).cloned().unwrap_or_default();
        needed.sort_unstable();
        let mut merged: Vec<Numbers> = Vec::new();
        for (first, last) in needed {
            match merged.last_mut() {
                Some((_, end)) if end.is_none_or(|end| first <= end.saturating_add(1)) => {
                    *end = end.zip(last).map(|(a, b)| a.max(b));
                }
                _ => merged.push((first, last)),
            }
        }
        let name = |number| SegmentName::from_number(timeline, number, inventory.size);
        TimelinePlan {
            timeline,
            needed: merged
                .iter()
                .map(|(first, last)| NeededRange { first: name(*first), last: last.map(name) })
                .collect(),
            numbers: merged,
            size: inventory.size,
            known_through: inventory.highest(timeline),
        }
    }
}

/// Segments that are needed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct NeededRange {
    /// The first one.
    pub first: SegmentName,
    /// The last one; `None` for all that come, too.
    pub last: Option<SegmentName>,
}

/// What becomes of a timeline's WAL.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct TimelinePlan {
    /// The timeline.
    pub timeline: TimelineId,
    /// What is needed of it, in order. What lies between these, before or after goes.
    pub needed: Vec<NeededRange>,
    #[serde(skip)]
    numbers: Vec<Numbers>,
    #[serde(skip)]
    size: WalSegmentSize,
    /// The last segment that was known when this was planned. What has come since stays.
    #[serde(skip)]
    known_through: Option<u64>,
}

impl TimelinePlan {
    /// Whether this object of the timeline's WAL goes. Its history and its owner never do: PostgreSQL chooses the number of
    /// the next timeline by asking for histories, and would give this one's anew to another.
    pub fn removes(&self, object: &RepositoryObject) -> bool {
        match object {
            RepositoryObject::Wal(
                ArchiveFileName::Segment(segment)
                | ArchiveFileName::Partial(segment)
                | ArchiveFileName::BackupHistory { segment, .. },
            ) => self.removes_segment(*segment),
            RepositoryObject::PartialWal(segment, _) | RepositoryObject::Tail(segment, _) => {
                self.removes_segment(*segment)
            }
            _ => false,
        }
    }

    /// Whether a segment of the timeline, whatever there is of it, goes.
    pub fn removes_segment(&self, segment: SegmentName) -> bool {
        let Some(number) = segment.number(self.size).filter(|_| segment.timeline() == self.timeline) else {
            return false;
        };
        let known = self.known_through.is_some_and(|through| number <= through);
        known && !self.numbers.iter().any(|(first, last)| *first <= number && last.is_none_or(|last| number <= last))
    }
}
