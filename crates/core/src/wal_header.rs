//! The header of a WAL segment's first page, and whether a file is the segment that its name says.
//!
//! `pg_wal` recycles old segments by renaming them and receives partial ones from other servers: name and size
//! prove nothing, the header does. It proves only the beginning of the file; pages further on may still be old.
//!
//! Source: `XLogLongPageHeaderData` in `src/include/access/xlog_internal.h`, little-endian, as it is laid out on
//! every 64-bit platform. The same in PostgreSQL 14 to 18.

use crate::{Lsn, SegmentName, SystemIdentifier, TimelineId, WalSegmentSize, le};

/// `XLP_LONG_HEADER`: the page is the first of its segment and tells where it belongs.
pub(crate) const LONG_HEADER: u16 = 0x0002;

/// What the first page of a segment says about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalHeader {
    /// `XLOG_PAGE_MAGIC`, the version of the WAL's format: D10D in PostgreSQL 14, D110 in 15, D113 in 16, D116 in 17,
    /// D118 in 18.
    pub magic: u16,
    /// The timeline that wrote the page. Lower than the name's in the first segment after a switch.
    pub timeline: TimelineId,
    /// Where the page, and with it the segment, begins.
    pub page_address: Lsn,
    /// The database system that wrote it.
    pub system_identifier: SystemIdentifier,
    /// How long the segment is.
    pub segment_size: WalSegmentSize,
    /// The length of its pages in bytes (`XLOG_BLCKSZ`), nearly always 8,192.
    pub block_size: u32,
}

/// Why bytes aren't the beginning of a WAL segment. Worded to follow 'it'.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WalHeaderError {
    /// Too few bytes to hold a header.
    #[error("has only {found} bytes, less than the {len} of a WAL header", len = WalHeader::LEN)]
    Truncated {
        /// How many there are.
        found: usize,
    },
    /// Nothing was ever written there: PostgreSQL creates segments full of zeros.
    #[error("begins with zeros: PostgreSQL has created it, but not written to it yet")]
    Empty,
    /// Not the magic number of any known version.
    #[error("begins with {found:#06X} where PostgreSQL 14 to 18 write 0xD1 and their version of the WAL")]
    Magic {
        /// What is there instead.
        found: u16,
    },
    /// A page from the middle of a segment.
    #[error("begins with a page from the middle of a segment, not with a segment's first page")]
    NotFirstPage,
    /// A value that no PostgreSQL writes.
    #[error("has a damaged header: {field} can't be {found}")]
    Nonsense {
        /// The field's name in PostgreSQL.
        field: &'static str,
        /// What it holds.
        found: u32,
    },
}

impl WalHeader {
    /// How many bytes of a segment [`WalHeader::parse`] looks at.
    pub const LEN: usize = 40;

    /// Reads the header at the beginning of a segment; what follows it is ignored.
    ///
    /// # Errors
    /// The bytes aren't the beginning of a segment. Later versions of PostgreSQL are accepted while their magic
    /// number begins with D1, as all have since 12: to refuse an unknown version would stop its archiving.
    pub fn parse(bytes: &[u8]) -> Result<WalHeader, WalHeaderError> {
        let bytes: &[u8; WalHeader::LEN] =
            bytes.first_chunk().ok_or(WalHeaderError::Truncated { found: bytes.len() })?;
        if bytes.iter().all(|&byte| byte == 0) {
            return Err(WalHeaderError::Empty);
        }
        let truncated = WalHeaderError::Truncated { found: bytes.len() };
        let u16_at = |at| le::u16_at(bytes, at).ok_or(truncated);
        let u32_at = |at| le::u32_at(bytes, at).ok_or(truncated);
        let u64_at = |at| le::u64_at(bytes, at).ok_or(truncated);

        let magic = u16_at(0)?;
        if magic >> 8 != 0xD1 {
            return Err(WalHeaderError::Magic { found: magic });
        }
        if u16_at(2)? & LONG_HEADER == 0 {
            return Err(WalHeaderError::NotFirstPage);
        }
        let nonsense = |field, found| WalHeaderError::Nonsense { field, found };
        let (timeline, segment_size, block_size) = (u32_at(4)?, u32_at(32)?, u32_at(36)?);
        // 1 to 64 kB: `--with-wal-blocksize` of PostgreSQL's configure.
        if !block_size.is_power_of_two() || !(1 << 10..=1 << 16).contains(&block_size) {
            return Err(nonsense("xlp_xlog_blcksz", block_size));
        }
        Ok(WalHeader {
            magic,
            timeline: TimelineId::new(timeline).ok_or(nonsense("xlp_tli", timeline))?,
            page_address: Lsn::new(u64_at(8)?),
            // 16 to 24: xlp_rem_len, what the page continues from the one before, and padding.
            system_identifier: SystemIdentifier::new(u64_at(24)?),
            segment_size: WalSegmentSize::new(segment_size.into()).ok_or(nonsense("xlp_seg_size", segment_size))?,
            block_size,
        })
    }
}

/// Why a file isn't the segment that its name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "`name` is the file, `found` what it holds, `expected` what it should hold")]
pub enum SegmentMismatch {
    /// The name stands for no segment of this size: it comes from a database with smaller segments.
    #[error("{name} can't be the name of a WAL segment of this database, whose segments are {expected} long")]
    NameOutOfRange { name: SegmentName, expected: WalSegmentSize },
    /// Segments are always full size.
    #[error(
        "{name} is {found} bytes long, but the WAL segments of this database have {len}: it isn't complete, or isn't \
         one of them",
        len = expected.bytes()
    )]
    WrongSize { name: SegmentName, found: u64, expected: WalSegmentSize },
    /// It doesn't begin as WAL does.
    #[error("{name} is not a WAL segment: it {reason}")]
    NotWal { name: SegmentName, reason: WalHeaderError },
    /// It comes from another `initdb`.
    #[error(
        "{name} belongs to another database: it was written by the system {found}, this one is \
         {expected} (pg_controldata shows it as 'Database system identifier')"
    )]
    OtherSystem { name: SegmentName, found: SystemIdentifier, expected: SystemIdentifier },
    /// Its header tells another segment size than the database's.
    #[error("{name} says that WAL segments are {found} long, but those of this database are {expected}")]
    OtherSegmentSize { name: SegmentName, found: WalSegmentSize, expected: WalSegmentSize },
    /// It holds another part of the log.
    #[error(
        "{name} holds the WAL from {found} on, but going by its name should begin at {expected}: it is an \
         older segment that was renamed to be used again, or was copied under a wrong name"
    )]
    OtherPosition { name: SegmentName, found: Lsn, expected: Lsn },
    /// It was written on a timeline after the one in its name.
    #[error("{name} was written on timeline {found}, later than the timeline {} in its name", name.timeline())]
    LaterTimeline { name: SegmentName, found: TimelineId },
}

/// Checks that a file is the complete segment that its name says, as far as its size and first bytes
/// (at least [`WalHeader::LEN`] of them) can tell.
///
/// The header's timeline may be lower than the name's: a new timeline's first segment begins as a copy of the
/// segment in which the old one was left (`XLogInitNewTimeline`).
///
/// # Errors
/// What is wrong with the file, in a sentence that names it.
pub fn check_segment(
    name: &SegmentName,
    first_bytes: &[u8],
    file_size: u64,
    expected_system: SystemIdentifier,
    expected_size: WalSegmentSize,
) -> Result<WalHeader, SegmentMismatch> {
    let name = *name;
    let Some(start) = name.start(expected_size) else {
        return Err(SegmentMismatch::NameOutOfRange { name, expected: expected_size });
    };
    if file_size != expected_size.bytes() {
        return Err(SegmentMismatch::WrongSize { name, found: file_size, expected: expected_size });
    }
    let header = WalHeader::parse(first_bytes).map_err(|reason| SegmentMismatch::NotWal { name, reason })?;
    let WalHeader { timeline, page_address, system_identifier, segment_size, .. } = header;
    if system_identifier != expected_system {
        return Err(SegmentMismatch::OtherSystem { name, found: system_identifier, expected: expected_system });
    }
    if segment_size != expected_size {
        return Err(SegmentMismatch::OtherSegmentSize { name, found: segment_size, expected: expected_size });
    }
    if page_address != start {
        return Err(SegmentMismatch::OtherPosition { name, found: page_address, expected: start });
    }
    if timeline > name.timeline() {
        return Err(SegmentMismatch::LaterTimeline { name, found: timeline });
    }
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SYSTEM: SystemIdentifier = SystemIdentifier::new(7710528266549583088);

    /// The first bytes of 000000020000000000000010 of a PostgreSQL 15 with 1 MB segments, just after its promotion to
    /// timeline 2 at 0/1000060: a copy of timeline 1's.
    const SEGMENT_15: [u8; 40] = [
        0x10, 0xd1, 0x06, 0x00, 0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
        0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xf0, 0xdc, 0x4b, 0x36, 0x9b, 0x4c, 0x01, 0x6b, 0x00, 0x00, 0x10, 0x00,
        0x00, 0x20, 0x00, 0x00,
    ];

    fn check(name: &str, first_bytes: &[u8]) -> Result<WalHeader, SegmentMismatch> {
        let size = WalSegmentSize::new(1 << 20).unwrap();
        check_segment(&name.parse().unwrap(), first_bytes, size.bytes(), SYSTEM, size)
    }

    /// The segment with one field overwritten.
    fn with(at: usize, bytes: &[u8]) -> [u8; 40] {
        let mut segment = SEGMENT_15;
        segment[at..at + bytes.len()].copy_from_slice(bytes);
        segment
    }

    #[test]
    fn a_real_header_is_understood() {
        let header = WalHeader::parse(&SEGMENT_15).unwrap();
        assert_eq!(header.magic, 0xD110);
        assert_eq!(header.timeline, TimelineId::FIRST);
        assert_eq!(header.page_address, "0/1000000".parse().unwrap());
        assert_eq!(header.system_identifier, SYSTEM);
        assert_eq!(header.segment_size.to_string(), "1 MB");
        assert_eq!(header.block_size, 8192);
    }

    #[test]
    fn a_timeline_may_begin_with_a_copy_of_the_one_before() {
        assert!(check("000000010000000000000010", &SEGMENT_15).is_ok());
        assert!(check("000000020000000000000010", &SEGMENT_15).is_ok());
        assert!(check("000000010000000000000010", &with(4, &[2])).is_err());
    }

    #[test]
    fn each_mismatch_is_told_in_plain_words() {
        let name = "000000020000000000000010";
        let size = WalSegmentSize::new(1 << 20).unwrap();
        let short = check_segment(&name.parse().unwrap(), &SEGMENT_15, 8192, SYSTEM, size);
        let messages = [
            short,
            check(name, &SEGMENT_15[..39]),
            check(name, &[0; 40]),
            check(name, b"[2026-11-21] this is a log, not the log!"),
            check(name, &with(2, &[0x05])),
            check(name, &with(32, &[1])),
            check(name, &with(24, &[1])),
            check(name, &with(34, &[0, 1])),
            check("000000020000000000000014", &SEGMENT_15),
            check(name, &with(4, &[3])),
            check("000000020000000000001000", &SEGMENT_15),
        ]
        .map(|result| result.unwrap_err().to_string());
        insta::assert_snapshot!(messages.join("\n"), @r"
        000000020000000000000010 is 8192 bytes long, but the WAL segments of this database have 1048576: it isn't complete, or isn't one of them
        000000020000000000000010 is not a WAL segment: it has only 39 bytes, less than the 40 of a WAL header
        000000020000000000000010 is not a WAL segment: it begins with zeros: PostgreSQL has created it, but not written to it yet
        000000020000000000000010 is not a WAL segment: it begins with 0x325B where PostgreSQL 14 to 18 write 0xD1 and their version of the WAL
        000000020000000000000010 is not a WAL segment: it begins with a page from the middle of a segment, not with a segment's first page
        000000020000000000000010 is not a WAL segment: it has a damaged header: xlp_seg_size can't be 1048577
        000000020000000000000010 belongs to another database: it was written by the system 7710528266549582849, this one is 7710528266549583088 (pg_controldata shows it as 'Database system identifier')
        000000020000000000000010 says that WAL segments are 16 MB long, but those of this database are 1 MB
        000000020000000000000014 holds the WAL from 0/1000000 on, but going by its name should begin at 0/1400000: it is an older segment that was renamed to be used again, or was copied under a wrong name
        000000020000000000000010 was written on timeline 3, later than the timeline 2 in its name
        000000020000000000001000 can't be the name of a WAL segment of this database, whose segments are 1 MB long
        ");
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_without_panic(bytes: Vec<u8>, start in proptest::sample::select(vec![0usize, 4, 40])) {
            let mut segment = SEGMENT_15[..start].to_vec();
            segment.extend(bytes);
            let _ = WalHeader::parse(&segment);
        }
    }
}
