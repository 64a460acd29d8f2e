//! The segments that the write-ahead log is cut into: their size, numbers and names.
//!
//! A name alone doesn't tell a position: that takes the segment size too, and a name that a server with smaller
//! segments gave may stand for nothing. Source: `src/include/access/xlog_internal.h`.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Lsn, ParseIdError, TimelineId, id::hex8};

/// The size of a database system's WAL segments, in bytes: a power of two from 1 MiB to 1 GiB, chosen once by
/// `initdb --wal-segsize`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct WalSegmentSize(u64);

impl WalSegmentSize {
    /// What `initdb` takes unless told otherwise: 16 MiB.
    pub const DEFAULT: WalSegmentSize = WalSegmentSize(16 << 20);

    /// The size of this many bytes; `None` if PostgreSQL doesn't allow it (`IsValidWalSegSize`).
    pub fn new(bytes: u64) -> Option<WalSegmentSize> {
        let allowed = bytes.is_power_of_two() && (1 << 20..=1 << 30).contains(&bytes);
        allowed.then_some(WalSegmentSize(bytes))
    }

    /// Bytes in a segment.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// How many segments share one `log` part of the name (`XLogSegmentsPerXLogId`): 4 to 4,096.
    pub const fn segments_per_log(self) -> u64 {
        0x1_0000_0000 / self.0
    }

    /// The segment that holds the byte at `lsn` (`XLByteToSeg`).
    pub const fn segment_number(self, lsn: Lsn) -> u64 {
        lsn.bytes() / self.0
    }

    /// The segment that holds the last byte *before* `lsn` (`XLByteToPrevSeg`): the last one that is needed when
    /// `lsn` is where something ends. At 0/0, before which there is nothing, segment 0.
    pub const fn previous_segment_number(self, lsn: Lsn) -> u64 {
        lsn.bytes().saturating_sub(1) / self.0
    }

    /// Where a segment begins. Numbers beyond the last LSN's segment give the last LSN.
    pub const fn start_of(self, segment_number: u64) -> Lsn {
        Lsn::new(segment_number.saturating_mul(self.0))
    }
}

/// As PostgreSQL speaks of it, where a MB is a MiB: `16 MB`, `1 GB`.
impl fmt::Display for WalSegmentSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 >> 20 {
            1024 => f.write_str("1 GB"),
            mib => write!(f, "{mib} MB"),
        }
    }
}

impl Serialize for WalSegmentSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for WalSegmentSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<WalSegmentSize, D::Error> {
        let bytes = u64::deserialize(deserializer)?;
        WalSegmentSize::new(bytes).ok_or_else(|| {
            serde::de::Error::custom(format_args!(
                "{bytes} is not a WAL segment size: a power of two from 1 MiB to 1 GiB, in bytes"
            ))
        })
    }
}

/// The name of a WAL segment: 24 hexadecimal digits for its timeline, the upper half of its LSNs, and its place
/// among the segments that share that half. Ordered by timeline, then by position.
///
/// What position a name stands for depends on the segment size, which the name doesn't tell.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    timeline: TimelineId,
    log: u32,
    segment: u32,
}

impl SegmentName {
    /// The name of a timeline's segment with this number (`XLogFileName`). Numbers beyond the last LSN's segment,
    /// which no LSN gives, get the last segment's name.
    pub fn from_number(timeline: TimelineId, number: u64, size: WalSegmentSize) -> SegmentName {
        let per_log = size.segments_per_log();
        let halves = u32::try_from(number / per_log).ok().zip(u32::try_from(number % per_log).ok());
        // The end of the log saturates; the remainder, below 4,096, always fits.
        let last = u32::try_from(per_log - 1).unwrap_or(u32::MAX);
        let (log, segment) = halves.unwrap_or((u32::MAX, last));
        SegmentName { timeline, log, segment }
    }

    /// The timeline that the segment belongs to.
    pub const fn timeline(self) -> TimelineId {
        self.timeline
    }

    /// The upper 32 bits of the segment's LSNs.
    pub const fn log(self) -> u32 {
        self.log
    }

    /// The name's first 16 digits, timeline and log: the directory that holds the segment in a repository.
    pub fn log_hex(self) -> String {
        format!("{}{:08X}", self.timeline.to_hex(), self.log)
    }

    /// Its number, counted from the beginning of the log; `None` if there is no such segment at this size.
    pub fn number(self, size: WalSegmentSize) -> Option<u64> {
        let segment = u64::from(self.segment);
        (segment < size.segments_per_log()).then(|| u64::from(self.log) * size.segments_per_log() + segment)
    }

    /// Where it begins; `None` if there is no such segment at this size.
    pub fn start(self, size: WalSegmentSize) -> Option<Lsn> {
        self.number(size).map(|number| size.start_of(number))
    }

    /// The segment after it on the same timeline; `None` at the end of the log, or if there is no such segment at
    /// this size.
    pub fn next(self, size: WalSegmentSize) -> Option<SegmentName> {
        let next = SegmentName::from_number(self.timeline, self.number(size)? + 1, size);
        (next > self).then_some(next)
    }
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08X}{:08X}{:08X}", self.timeline.get(), self.log, self.segment)
    }
}

impl fmt::Debug for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for SegmentName {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<SegmentName, ParseIdError> {
        segment_name(text)
            .ok_or_else(|| ParseIdError::new("WAL segment's name (24 upper-case hexadecimal digits)", text))
    }
}

fn segment_name(text: &str) -> Option<SegmentName> {
    let (timeline, rest) = text.split_at_checked(8)?;
    let (log, segment) = rest.split_at_checked(8)?;
    Some(SegmentName { timeline: TimelineId::from_hex(timeline)?, log: hex8(log)?, segment: hex8(segment)? })
}

impl Serialize for SegmentName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SegmentName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<SegmentName, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sizes() -> impl Strategy<Value = WalSegmentSize> {
        (20..=30u32).prop_map(|log2| WalSegmentSize::new(1 << log2).unwrap())
    }

    /// Any name of a segment, whatever the segment size.
    pub(crate) fn segments() -> impl Strategy<Value = SegmentName> {
        (1..=u32::MAX, any::<u32>(), any::<u32>()).prop_map(|(timeline, log, segment)| SegmentName {
            timeline: TimelineId::new(timeline).unwrap(),
            log,
            segment,
        })
    }

    proptest! {
        #[test]
        fn display_and_parse_are_inverse(name in segments()) {
            prop_assert_eq!(name.to_string().parse(), Ok(name));
            let json = serde_json::to_string(&name).unwrap();
            prop_assert_eq!(serde_json::from_str::<SegmentName>(&json).unwrap(), name);
        }

        #[test]
        fn names_sort_by_timeline_and_position_as_their_texts_do(a in segments(), b in segments()) {
            prop_assert_eq!(a.cmp(&b), a.to_string().cmp(&b.to_string()));
        }


        #[test]
        fn a_segment_holds_the_positions_from_its_start_to_the_next_one(lsn: u64, size in sizes()) {
            let lsn = Lsn::new(lsn);
            let name = SegmentName::from_number(TimelineId::FIRST, size.segment_number(lsn), size);
            prop_assert_eq!(name.to_string().parse(), Ok(name));
            prop_assert_eq!(name.number(size), Some(size.segment_number(lsn)));
            let start = name.start(size).unwrap();
            prop_assert!(start <= lsn && lsn.bytes_since(start) < size.bytes());
            match name.next(size) {
                Some(next) => prop_assert_eq!(next.start(size).unwrap().bytes_since(start), size.bytes()),
                None => prop_assert_eq!(start.bytes(), 0u64.wrapping_sub(size.bytes())),
            }
        }
    }

    #[test]
    fn names_follow_the_segment_size() {
        let lsn: Lsn = "3/42000000".parse().unwrap();
        for (mib, text) in
            [(1, "000000010000000300000420"), (16, "000000010000000300000042"), (1024, "000000010000000300000001")]
        {
            let size = WalSegmentSize::new(mib << 20).unwrap();
            let name = SegmentName::from_number(TimelineId::FIRST, size.segment_number(lsn), size);
            assert_eq!(name.to_string(), text);
            assert_eq!(name.log_hex(), "0000000100000003");
        }
        let name: SegmentName = "000000010000000300000100".parse().unwrap();
        assert_eq!((name.number(WalSegmentSize::DEFAULT), name.next(WalSegmentSize::DEFAULT)), (None, None));
        let name: SegmentName = "0000000A00000003000000FF".parse().unwrap();
        assert_eq!(name.next(WalSegmentSize::DEFAULT).unwrap().to_string(), "0000000A0000000400000000");
    }

    #[test]
    fn what_ends_at_a_boundary_ends_in_the_segment_before() {
        let size = WalSegmentSize::DEFAULT;
        let boundary = size.start_of(7);
        assert_eq!((size.segment_number(boundary), size.previous_segment_number(boundary)), (7, 6));
        assert_eq!(size.previous_segment_number(Lsn::new(boundary.bytes() + 1)), 7);
        assert_eq!(size.previous_segment_number(Lsn::INVALID), 0);
    }

    #[test]
    fn segment_sizes_are_those_of_initdb() {
        for bytes in [0, 1, 1 << 19, (1 << 20) + 1, 3 << 20, 1 << 31, 1 << 63, u64::MAX] {
            assert_eq!(WalSegmentSize::new(bytes), None, "{bytes}");
            assert!(serde_json::from_str::<WalSegmentSize>(&bytes.to_string()).is_err(), "{bytes}");
        }
        assert_eq!(serde_json::from_str::<WalSegmentSize>("16777216").unwrap(), WalSegmentSize::DEFAULT);
        assert_eq!(WalSegmentSize::DEFAULT.to_string(), "16 MB");
        assert_eq!(WalSegmentSize::new(1 << 30).unwrap().to_string(), "1 GB");
    }
}
