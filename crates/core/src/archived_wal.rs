//! What an archive holds of one timeline: the ranges of segments that are there, and the gaps between them.
//!
//! Fed with a listing as it comes, so an archive of any length is looked through in memory that depends on its gaps
//! alone, and on no more than [`MAX_GAPS`] of these.

use std::fmt;

use jiff::Timestamp;
use serde::Serialize;

use crate::{SegmentName, TimelineId, WalSegmentSize};

/// How many gaps of a timeline are remembered, the oldest first. More are only counted.
pub const MAX_GAPS: usize = 1000;

/// Consecutive segments of one timeline, at least one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct SegmentRange {
    first: SegmentName,
    last: SegmentName,
    segments: u64,
}

impl SegmentRange {
    /// The segments with the numbers from `first` to `last`; `None` if these aren't in order.
    pub(crate) fn new(timeline: TimelineId, first: u64, last: u64, size: WalSegmentSize) -> Option<SegmentRange> {
        let name = |number| SegmentName::from_number(timeline, number, size);
        let segments = last.checked_sub(first)?.checked_add(1)?;
        Some(SegmentRange { first: name(first), last: name(last), segments })
    }

    /// The first segment.
    pub fn first(&self) -> SegmentName {
        self.first
    }

    /// The last segment.
    pub fn last(&self) -> SegmentName {
        self.last
    }

    /// How many there are.
    pub fn segments(&self) -> u64 {
        self.segments
    }

    /// Each of them, if they are segments of this size.
    pub fn names(&self, size: WalSegmentSize) -> impl Iterator<Item = SegmentName> {
        let last = self.last;
        std::iter::successors(Some(self.first), move |name| name.next(size)).take_while(move |name| *name <= last)
    }
}

/// `000000010000000000000007 to 000000010000000000000009 (3 segments)`
impl fmt::Display for SegmentRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.segments {
            1 => write!(f, "{} (1 segment)", self.first),
            several => write!(f, "{} to {} ({several} segments)", self.first, self.last),
        }
    }
}

/// What the archive holds of one timeline, found out segment by segment.
#[derive(Clone, Debug)]
pub struct ArchivedWal {
    timeline: TimelineId,
    size: WalSegmentSize,
    /// The segment that comes next if nothing is missing; `None` before the first one if any may be the first.
    expected: Option<u64>,
    /// The number after the last segment that is of interest, if there is one.
    end: Option<u64>,
    /// The oldest ranges as the numbers of their first and last segments: one more than gaps are remembered.
    ranges: Vec<(u64, u64)>,
    /// The oldest gaps, in the same way.
    missing: Vec<(u64, u64)>,
    gaps: u64,
    missing_segments: u64,
    last: Option<u64>,
    segments: u64,
    stored_bytes: u64,
    stored_at: Option<(Timestamp, Timestamp)>,
    misnamed: u64,
    /// Segments from which on the first missing one is wanted, the next one last.
    wanted: Vec<u64>,
    /// Those that are answered, in order, with the answer.
    answered: Vec<(u64, u64)>,
}

impl ArchivedWal {
    /// Nothing yet of this timeline, which may begin with any segment.
    pub fn new(timeline: TimelineId, size: WalSegmentSize) -> ArchivedWal {
        ArchivedWal {
            timeline,
            size,
            expected: None,
            end: None,
            ranges: Vec::new(),
            missing: Vec::new(),
            gaps: 0,
            missing_segments: 0,
            last: None,
            segments: 0,
            stored_bytes: 0,
            stored_at: None,
            misnamed: 0,
            wanted: Vec::new(),
            answered: Vec::new(),
        }
    }

    /// Nothing yet of this timeline, of which everything should be there from the first of the segments `wanted` (in
    /// order) on; what lies before it, or at `end` and after, is left aside. Of each of the segments `wanted`
    /// [`ArchivedWal::first_missing`] can be asked.
    pub(crate) fn expecting(
        timeline: TimelineId,
        size: WalSegmentSize,
        wanted: &[u64],
        end: Option<u64>,
    ) -> ArchivedWal {
        let expected = wanted.first().copied();
        let wanted = wanted.iter().rev().copied().collect();
        ArchivedWal { expected, end, wanted, ..ArchivedWal::new(timeline, size) }
    }

    /// Takes note of a segment, of `stored_bytes` in the repository. They must come in order, as a listing has them;
    /// others than the timeline's are left aside.
    pub fn found(&mut self, segment: SegmentName, stored_bytes: u64, stored_at: Timestamp) {
        if segment.timeline() != self.timeline {
            return;
        }
        let Some(number) = segment.number(self.size) else {
            self.misnamed += 1;
            return;
        };
        if self.expected.is_some_and(|expected| number < expected) || self.end.is_some_and(|end| number >= end) {
            return;
        }
        self.expect_before(number);
        match self.ranges.last_mut() {
            Some((_, last)) if number.checked_sub(1) == Some(*last) => *last = number,
            _ => {
                if self.ranges.len() <= MAX_GAPS {
                    self.ranges.push((number, number));
                }
            }
        }
        self.expected = Some(number.saturating_add(1));
        self.last = Some(number);
        self.segments += 1;
        self.stored_bytes = self.stored_bytes.saturating_add(stored_bytes);
        let (oldest, newest) = self.stored_at.unwrap_or((stored_at, stored_at));
        self.stored_at = Some((oldest.min(stored_at), newest.max(stored_at)));
    }

    /// What would be missing if this segment came next.
    pub fn gap_before(&self, segment: SegmentName) -> Option<SegmentRange> {
        let number = segment.number(self.size).filter(|_| segment.timeline() == self.timeline)?;
        let wanted = self.end.is_none_or(|end| number < end) && self.expected.is_some_and(|expected| number > expected);
        SegmentRange::new(self.timeline, self.expected?, number.checked_sub(1)?, self.size).filter(|_| wanted)
    }

    /// Everything before the segment with this number should have come by now; what hasn't is a gap.
    pub(crate) fn expect_before(&mut self, number: u64) {
        let Some(expected) = self.expected.filter(|expected| *expected < number) else { return };
        self.gaps += 1;
        self.missing_segments += number - expected;
        if self.missing.len() < MAX_GAPS {
            self.missing.push((expected, number - 1));
        }
        while let Some(wanted) = self.wanted.pop_if(|wanted| *wanted < number) {
            self.answered.push((wanted, wanted.max(expected)));
        }
        self.expected = Some(number);
    }

    /// The first segment that is missing from this one on, which has to be one that was wanted.
    pub(crate) fn first_missing(&self, from: u64) -> u64 {
        match self.answered.binary_search_by_key(&from, |(wanted, _)| *wanted) {
            Ok(at) => self.answered[at].1,
            // All that has come since is there, or nothing has come so far.
            Err(_) => self.expected.map_or(from, |expected| expected.max(from)),
        }
    }

    /// Whether all segments with the numbers from `first` to `last` are there. Behind more gaps than are remembered it
    /// isn't known, and not said.
    pub(crate) fn holds(&self, first: u64, last: u64) -> bool {
        self.ranges.iter().any(|range| range.0 <= first && last <= range.1)
    }

    /// The timeline.
    pub fn timeline(&self) -> TimelineId {
        self.timeline
    }

    /// The first segment that is there.
    pub fn first(&self) -> Option<SegmentName> {
        self.ranges.first().map(|(first, _)| SegmentName::from_number(self.timeline, *first, self.size))
    }

    /// The last segment that is there.
    pub fn last(&self) -> Option<SegmentName> {
        self.last.map(|number| SegmentName::from_number(self.timeline, number, self.size))
    }

    /// The number of the last segment that is there.
    pub(crate) fn last_number(&self) -> Option<u64> {
        self.last
    }

    /// How many segments are there.
    pub fn segments(&self) -> u64 {
        self.segments
    }

    /// The bytes that they take in the repository.
    pub fn stored_bytes(&self) -> u64 {
        self.stored_bytes
    }

    /// When the first and the last of them were stored, by the store's clock.
    pub fn stored_at(&self) -> Option<(Timestamp, Timestamp)> {
        self.stored_at
    }

    /// Files whose names stand for no segment of this size.
    pub fn misnamed(&self) -> u64 {
        self.misnamed
    }

    /// How many gaps there are, whether remembered or not.
    pub fn gaps(&self) -> u64 {
        self.gaps
    }

    /// How many segments are missing in all of them.
    pub fn missing_segments(&self) -> u64 {
        self.missing_segments
    }

    /// The gaps, the oldest [`MAX_GAPS`] of them.
    pub fn missing(&self) -> impl Iterator<Item = SegmentRange> {
        self.missing.iter().filter_map(|(first, last)| SegmentRange::new(self.timeline, *first, *last, self.size))
    }

    /// What is there without a gap, the oldest ranges: as many as there are gaps remembered, and one.
    pub fn ranges(&self) -> impl Iterator<Item = SegmentRange> {
        self.ranges.iter().filter_map(|(first, last)| SegmentRange::new(self.timeline, *first, *last, self.size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn at(second: u64) -> Timestamp {
        Timestamp::from_second(i64::try_from(second).unwrap()).unwrap()
    }

    fn fed(mut wal: ArchivedWal, numbers: impl IntoIterator<Item = u64>) -> ArchivedWal {
        for number in numbers {
            wal.found(SegmentName::from_number(wal.timeline, number, wal.size), 10, at(number));
        }
        wal
    }

    fn numbers(ranges: impl Iterator<Item = SegmentRange>, size: WalSegmentSize) -> Vec<u64> {
        ranges
            .flat_map(|range| {
                assert_eq!(range.names(size).count() as u64, range.segments());
                let (first, last) = (range.first().number(size).unwrap(), range.last().number(size).unwrap());
                assert_eq!(range.segments(), last - first + 1);
                first..=last
            })
            .collect()
    }

    proptest! {
        #[test]
        fn ranges_and_gaps_are_those_of_a_set(
            there in proptest::collection::btree_set(0..300u64, 0..150),
            log2 in 20..=30u32, timeline in 1..u32::MAX, from in 0..300u64, end in 0..400u64,
            wanted in proptest::collection::btree_set(0..300u64, 0..20),
        ) {
            let size = WalSegmentSize::new(1 << log2).unwrap();
            let timeline = TimelineId::new(timeline).unwrap();
            let wal = fed(ArchivedWal::new(timeline, size), there.iter().copied());
            prop_assert!(numbers(wal.ranges(), size).into_iter().eq(there.iter().copied()));
            let hull = there.first().copied().unwrap_or(0)..there.last().copied().unwrap_or(0);
            let missing: Vec<u64> = hull.filter(|number| !there.contains(number)).collect();
            prop_assert_eq!(numbers(wal.missing(), size), missing.clone());
            prop_assert_eq!((wal.missing_segments(), wal.gaps()), (missing.len() as u64, wal.missing().count() as u64));
            prop_assert_eq!((wal.segments(), wal.stored_bytes()), (there.len() as u64, there.len() as u64 * 10));
            let stored = there.first().map(|first| (at(*first), at(*there.last().unwrap())));
            prop_assert_eq!(wal.stored_at(), stored);

            // The same with an expectation: what lies around it doesn't count, what should be there does.
            let wanted: Vec<u64> = [from].into_iter().chain(wanted.into_iter().filter(|number| *number > from)).collect();
            let there: BTreeSet<u64> = there.into_iter().filter(|number| *number < from + 200).collect();
            let expecting = ArchivedWal::expecting(timeline, size, &wanted, Some(from + 200));
            let mut wal = fed(expecting, there.iter().copied().chain([from + 200, from + 300]));
            let first_missing = |from: u64| (from..).find(|number| !there.contains(number)).unwrap();
            for &number in &wanted {
                prop_assert_eq!(wal.first_missing(number), first_missing(number), "before the end, from {}", number);
            }
            wal.expect_before(end);
            for &number in &wanted {
                prop_assert_eq!(wal.first_missing(number), first_missing(number), "from {}", number);
            }
            let counted: BTreeSet<u64> = there.range(from..).copied().collect();
            let end = counted.last().map_or(end, |last| end.max(last + 1));
            let missing: Vec<u64> = (from..end).filter(|number| !there.contains(number)).collect();
            prop_assert_eq!(numbers(wal.missing(), size), missing);
            prop_assert!(numbers(wal.ranges(), size).into_iter().eq(counted));
        }
    }

    #[test]
    fn gaps_beyond_the_limit_are_counted_and_the_answers_hold_all_the_same() {
        let size = WalSegmentSize::DEFAULT;
        let every_second = (0..5000u64).map(|number| number * 2);
        let wal = fed(ArchivedWal::expecting(TimelineId::FIRST, size, &[0, 2, 8000, 9998], None), every_second);
        assert_eq!((wal.missing().count(), wal.ranges().count()), (MAX_GAPS, MAX_GAPS + 1));
        assert_eq!((wal.gaps(), wal.missing_segments(), wal.segments()), (4999, 4999, 5000));
        assert_eq!([2, 8000, 9998].map(|number| wal.first_missing(number)), [3, 8001, 9999]);
        assert_eq!(wal.last().unwrap().number(size), Some(9998));
    }

    #[test]
    fn what_is_not_in_order_or_not_of_this_timeline_is_left_aside() {
        let size = WalSegmentSize::DEFAULT;
        let mut wal = fed(ArchivedWal::new(TimelineId::FIRST, size), [7, 8, 8, 3]);
        wal.found(SegmentName::from_number(TimelineId::new(2).unwrap(), 9, size), 10, at(9));
        wal.found("000000010000000000000100".parse().unwrap(), 10, at(9));
        assert_eq!((wal.segments(), wal.misnamed(), wal.gaps()), (2, 1, 0));
        let ranges: Vec<String> = wal.ranges().map(|range| range.to_string()).collect();
        assert_eq!(ranges, ["000000010000000000000007 to 000000010000000000000008 (2 segments)"]);
        let name = |timeline, number| SegmentName::from_number(TimelineId::new(timeline).unwrap(), number, size);
        let gap = wal.gap_before(name(1, 12)).unwrap();
        assert!(gap.names(size).eq([9, 10, 11].map(|number| name(1, number))));
        assert_eq!([name(1, 9), name(1, 3), name(2, 12)].map(|next| wal.gap_before(next)), [None; 3]);
    }
}
