//! What a listing of the archive tells.

use jiff::Timestamp;

use crate::{Lsn, SegmentName, TimelineHistory, WalSegmentSize};

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
    /// The time that is looked for.
    noting: Option<Timestamp>,
    stored_by: Option<u64>,
    stored_bytes: u64,
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
    /// The number of the last segment of these that was stored by the time that was looked for.
    pub stored_by: Option<u64>,
    /// Bytes that they take in the repository, all together.
    pub stored_bytes: u64,
}

impl WalScan {
    /// A scan from the segment that contains `from`.
    pub fn new(history: TimelineHistory, size: WalSegmentSize, from: Lsn) -> WalScan {
        WalScan {
            history,
            size,
            expected: size.segment_number(from),
            last: None,
            gap: false,
            noting: None,
            stored_by: None,
            stored_bytes: 0,
        }
    }

    /// Notes which segment was the last to be stored by this time, by the store's clock.
    #[must_use]
    pub fn noting(mut self, time: Timestamp) -> WalScan {
        self.noting = Some(time);
        self
    }

    /// The timelines to list, oldest first, with the first segment that can be of interest on each.
    pub fn listings(&self) -> Vec<SegmentName> {
        let stretches = self.history.stretches(self.expected, self.size);
        stretches.map(|stretch| SegmentName::from_number(stretch.timeline, stretch.first, self.size)).collect()
    }

    /// Takes note of a segment. Segments of one timeline must come in order, timelines from the oldest on.
    pub fn found(&mut self, segment: SegmentName, stored_bytes: u64, stored_at: Timestamp) {
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
            self.stored_bytes += stored_bytes;
            if self.noting.is_some_and(|time| stored_at <= time) {
                self.stored_by = Some(number);
            }
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
            stored_by: self.stored_by,
            stored_bytes: self.stored_bytes,
        }
    }
}
