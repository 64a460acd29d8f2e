//! Whether all of a segment's WAL is in a file of full size, as its pages tell.
//!
//! A segment that a standby has received only in part is full size too, and `archive_status` calls it done: its end is
//! either zeros or what the file held before it was recycled. Each page tells its own address, which finds the second
//! kind. Zeros are right only behind a switch record (`pg_switch_wal`, `archive_timeout`, shutdown), which finds the
//! first. What is left, a page that was cut within itself, is found by following its records: each tells where the one
//! before it begins, and those that end on the page have a checksum. A cut within a record that goes on in the next
//! segment isn't seen: a walsender sends whole records or whole pages.
//!
//! Source: `CopyXLogRecordToWAL` in `xlog.c` (the rest of a segment after a switch is zeros, page headers too),
//! `XLogWalRcvWrite` and `XLogWalRcvClose` in `walreceiver.c`, `XLogPageHeaderData` in `xlog_internal.h`, `XLogRecord`
//! in `xlogrecord.h`. The same in PostgreSQL 14 to 18.

use crate::{Lsn, WalHeader, le, wal_header::LONG_HEADER};

/// `SizeOfXLogShortPHD`: the header of every page but a segment's first.
const SHORT_HEADER: usize = 24;
/// `XLP_FIRST_IS_CONTRECORD`: the page begins with the rest of a record.
const CONTINUES: u16 = 0x0001;
/// `SizeOfXLogRecord`, which is all of a switch record.
const RECORD_HEADER: usize = 24;
/// Where in its header a record's checksum lies: a CRC-32C of what follows the header, then of the header up to here.
const CHECKSUM: usize = 20;
/// `XLOG_SWITCH` of `RM_XLOG_ID`.
const SWITCH: (u8, u8) = (0x40, 0);
/// Everything in WAL is aligned to this.
const ALIGNMENT: usize = 8;

/// Whether a segment is all there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Completeness {
    /// WAL to the end, or to a switch record and zeros behind it.
    Complete,
    /// The WAL ends before this page, or on it.
    Incomplete {
        /// Where that page begins.
        page: Lsn,
    },
}

/// Looks at the pages of one segment as they pass by.
#[derive(Debug)]
pub struct PageScan {
    page_size: usize,
    magic: u16,
    /// Where the page begins that comes next.
    next: Lsn,
    state: State,
    /// The last page that is WAL and, if it's here, the one before.
    last: Vec<u8>,
    /// The last page on which a record begins, if one does in this segment.
    begins: Option<Lsn>,
    /// The same without the last page of all.
    begins_before: Option<Lsn>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Wal,
    /// Zeros from this page on.
    Zeros(Lsn),
    /// This page is something else: the end can't be told from what was there before.
    Stale(Lsn),
}

/// How the WAL on a page ends.
#[derive(Debug, PartialEq, Eq)]
enum PageEnd {
    /// With the page, or behind it.
    Full,
    /// With a switch record.
    Switch,
    /// Before the page does.
    Open,
}

impl PageScan {
    /// For the segment that has this header.
    pub fn new(header: &WalHeader) -> PageScan {
        PageScan {
            page_size: usize::try_from(header.block_size).unwrap_or(usize::MAX),
            magic: header.magic,
            next: header.page_address,
            state: State::Wal,
            last: Vec::new(),
            begins: None,
            begins_before: None,
        }
    }

    /// The next bytes of the segment, from its beginning on. Each chunk must be of whole pages, as every multiple of
    /// 64 kB is; what isn't a whole page counts as none.
    pub fn feed(&mut self, chunk: &[u8]) {
        let mut wal = 0;
        for page in chunk.chunks(self.page_size) {
            let address = self.next;
            self.next = Lsn::new(address.bytes() + page.len() as u64);
            self.state = match self.state {
                State::Wal if self.is_wal(page, address) => {
                    wal += page.len();
                    self.begins_before = self.begins;
                    if rest_of_record(page).is_none_or(|rest| header_length(page) + rest < page.len()) {
                        self.begins = Some(address);
                    }
                    State::Wal
                }
                State::Wal if page.iter().all(|&byte| byte == 0) => State::Zeros(address),
                State::Zeros(from) if page.iter().all(|&byte| byte == 0) => State::Zeros(from),
                State::Wal | State::Zeros(_) => State::Stale(address),
                stale @ State::Stale(_) => stale,
            };
        }
        let wal = &chunk[..wal];
        let kept = self.last.len().min((2 * self.page_size).saturating_sub(wal.len()));
        self.last.drain(..self.last.len() - kept);
        self.last.extend_from_slice(&wal[wal.len().saturating_sub(2 * self.page_size)..]);
    }

    fn is_wal(&self, page: &[u8], address: Lsn) -> bool {
        page.len() == self.page_size
            && le::u16_at(page, 0) == Some(self.magic)
            && le::u64_at(page, 8) == Some(address.bytes())
    }

    /// What the whole segment is.
    pub fn finish(self) -> Completeness {
        let behind = match self.state {
            State::Wal => self.next,
            State::Zeros(page) => page,
            State::Stale(page) => return Completeness::Incomplete { page },
        };
        if self.last.is_empty() {
            return Completeness::Incomplete { page: behind };
        }
        let last = Lsn::new(behind.bytes().saturating_sub(self.page_size as u64));
        let (before, page) = self.last.split_at(self.last.len().saturating_sub(self.page_size));
        match (page_end(before, page, last, self.begins_before), self.state) {
            (PageEnd::Switch, _) | (PageEnd::Full, State::Wal) => Completeness::Complete,
            (PageEnd::Full, _) => Completeness::Incomplete { page: behind },
            (PageEnd::Open, _) => Completeness::Incomplete { page: last },
        }
    }
}

fn header_length(page: &[u8]) -> usize {
    if le::u16_at(page, 2).unwrap_or(0) & LONG_HEADER == 0 { SHORT_HEADER } else { WalHeader::LEN }
}

/// How many bytes are left of the record that the page begins within, if it begins within one.
fn rest_of_record(page: &[u8]) -> Option<usize> {
    let continues = le::u16_at(page, 2)? & CONTINUES != 0;
    continues.then(|| le::u32_at(page, 16).and_then(|rest| usize::try_from(rest).ok()).unwrap_or(page.len()))
}

/// Follows the records of a page. `before` is the page before it, or nothing; `begins` is the page on which the record
/// begins that goes on on this one, if it's in the segment.
fn page_end(before: &[u8], page: &[u8], address: Lsn, begins: Option<Lsn>) -> PageEnd {
    let mut at = header_length(page);
    let mut ends_with_switch = false;
    // Where the record before the next one begins: from here to there.
    let mut previous = None;
    if let Some(rest) = rest_of_record(page) {
        if rest > page.len().saturating_sub(at) {
            return PageEnd::Full;
        }
        // The only record that can be whole in its header.
        if let Some(begun) = RECORD_HEADER.checked_sub(rest)
            && before.len() >= begun
        {
            ends_with_switch = is_switch(&[&before[before.len() - begun..], &page[at..at + rest]].concat());
        }
        at += rest.next_multiple_of(ALIGNMENT);
        previous = begins.map(|begins| (begins.bytes(), begins.bytes() + page.len() as u64));
    }
    // Records are aligned, so that a length is never cut by the end of the page.
    while let Some(length) = le::u32_at(page, at) {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let follows = match (previous, le::u64_at(page, at + 8)) {
            (Some((from, to)), Some(xl_prev)) => (from..to).contains(&xl_prev),
            _ => true,
        };
        let intact = page.get(at..at.saturating_add(length)).is_none_or(has_right_checksum);
        if length < RECORD_HEADER || !follows || !intact {
            return if length == 0 && ends_with_switch { PageEnd::Switch } else { PageEnd::Open };
        }
        ends_with_switch = page.get(at..at + RECORD_HEADER).is_some_and(is_switch);
        let begins = address.bytes() + at as u64;
        previous = Some((begins, begins + 1));
        at = at.saturating_add(length.next_multiple_of(ALIGNMENT));
    }
    if ends_with_switch { PageEnd::Switch } else { PageEnd::Full }
}

fn has_right_checksum(record: &[u8]) -> bool {
    let (Some(header), Some(content)) = (record.get(..CHECKSUM), record.get(RECORD_HEADER..)) else { return false };
    le::u32_at(record, CHECKSUM) == Some(crc32c::crc32c_append(crc32c::crc32c(content), header))
}

fn is_switch(record: &[u8]) -> bool {
    let (Some(length), Some(&info), Some(&manager)) = (le::u32_at(record, 0), record.get(16), record.get(17)) else {
        return false;
    };
    // The lower four bits are flags of the insertion (XLR_INFO_MASK).
    usize::try_from(length) == Ok(RECORD_HEADER) && (info & 0xF0, manager) == SWITCH
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{SystemIdentifier, TimelineId, WalSegmentSize};

    const PAGE: usize = 8192;
    const START: u64 = 5 << 20;

    /// A segment of 1 MB, written as PostgreSQL writes it: records of these lengths, one after the other, across the
    /// pages; `None` is a switch record.
    fn segment(records: impl IntoIterator<Item = Option<usize>>) -> Vec<u8> {
        let mut bytes = vec![0; 1 << 20];
        let (mut at, mut previous) = (0, 0_u64);
        let page = |bytes: &mut [u8], at: &mut usize, rest: usize| {
            let first = *at == 0;
            let flags = if first { LONG_HEADER } else { 0 } | if rest > 0 { CONTINUES } else { 0 };
            bytes[*at..*at + 2].copy_from_slice(&0xD116_u16.to_le_bytes());
            bytes[*at + 2..*at + 4].copy_from_slice(&flags.to_le_bytes());
            bytes[*at + 4] = 1;
            bytes[*at + 8..*at + 16].copy_from_slice(&(START + *at as u64).to_le_bytes());
            bytes[*at + 16..*at + 20].copy_from_slice(&u32::try_from(rest).unwrap().to_le_bytes());
            *at += if first { 40 } else { 24 };
        };
        for record in records {
            let length = record.unwrap_or(RECORD_HEADER);
            let mut content = vec![0x5A; length];
            content[..4].copy_from_slice(&u32::try_from(length).unwrap().to_le_bytes());
            content[8..16].copy_from_slice(&previous.to_le_bytes());
            (content[16], content[17]) = if record.is_none() { SWITCH } else { (0x10, 10) };
            let checksum = crc32c::crc32c_append(crc32c::crc32c(&content[RECORD_HEADER..]), &content[..CHECKSUM]);
            content[CHECKSUM..RECORD_HEADER].copy_from_slice(&checksum.to_le_bytes());
            content.resize(length.next_multiple_of(ALIGNMENT), 0);
            let mut written = 0;
            while written < content.len() {
                if at % PAGE == 0 {
                    if at == bytes.len() {
                        return bytes;
                    }
                    page(&mut bytes, &mut at, length.saturating_sub(written));
                }
                if written == 0 {
                    previous = START + at as u64;
                }
                let part = (content.len() - written).min(PAGE - at % PAGE);
                bytes[at..at + part].copy_from_slice(&content[written..written + part]);
                (at, written) = (at + part, written + part);
            }
        }
        bytes
    }

    fn scan(bytes: &[u8], chunk: usize) -> Completeness {
        let mut scan = PageScan::new(&WalHeader {
            magic: 0xD116,
            timeline: TimelineId::FIRST,
            page_address: Lsn::new(START),
            system_identifier: SystemIdentifier::new(7),
            segment_size: WalSegmentSize::new(1 << 20).unwrap(),
            block_size: u32::try_from(PAGE).unwrap(),
        });
        bytes.chunks(chunk).for_each(|chunk| scan.feed(chunk));
        scan.finish()
    }

    fn lengths(seed: usize) -> impl Iterator<Item = Option<usize>> {
        (seed..).map(|n| Some(RECORD_HEADER + (n.wrapping_mul(2_654_435_761) >> 7) % 20_000))
    }

    #[test]
    fn wal_to_the_end_is_complete_whatever_the_records() {
        for seed in 0..50 {
            let bytes = segment(lengths(seed));
            for chunk in [PAGE, 2 * PAGE, 1 << 16, 1 << 18, 1 << 20] {
                assert_eq!(scan(&bytes, chunk), Completeness::Complete, "{seed} {chunk}");
            }
        }
    }

    #[test]
    fn zeros_are_right_behind_a_switch_record_only() {
        // Every place on a page and across its end where a switch record can lie.
        for length in (RECORD_HEADER..PAGE + 100).step_by(3 * ALIGNMENT) {
            let switched = segment([Some(30_000), Some(length), None]);
            assert_eq!(scan(&switched, 1 << 16), Completeness::Complete, "{length}");
            let open = segment([Some(30_000), Some(length)]);
            assert!(matches!(scan(&open, 1 << 16), Completeness::Incomplete { .. }), "{length}");
        }
    }

    #[test]
    fn what_was_received_in_part_is_incomplete_wherever_it_ends() {
        let whole = segment(lengths(3));
        for cut in (8..(1 << 20) - PAGE).step_by(10_168) {
            // Into a new file, and into one that holds older WAL, at addresses of its own.
            let mut zeros = whole.clone();
            zeros[cut..].fill(0);
            let mut recycled = whole.clone();
            let old: Vec<u8> = segment(lengths(8))
                .chunks(PAGE)
                .flat_map(|page| {
                    let mut page = page.to_vec();
                    let address = le::u64_at(&page, 8).unwrap() - (1 << 20);
                    page[8..16].copy_from_slice(&address.to_le_bytes());
                    page
                })
                .collect();
            recycled[cut..].copy_from_slice(&old[cut..]);
            for bytes in [&zeros, &recycled] {
                let Completeness::Incomplete { page } = scan(bytes, 1 << 16) else { panic!("cut at {cut}") };
                assert!(page.bytes().abs_diff(START + cut as u64) <= 2 * PAGE as u64, "{cut} {page}");
            }
        }
    }

    #[test]
    fn an_end_on_the_last_page_is_seen_where_a_record_ends() {
        for length in (RECORD_HEADER..PAGE - 100).step_by(9 * ALIGNMENT) {
            let bytes = segment([Some((1 << 20) - 127 * 24 - 40 - PAGE), Some(length)]);
            let last = Completeness::Incomplete { page: Lsn::new(START + (1 << 20) - PAGE as u64) };
            assert_eq!(scan(&bytes, 1 << 18), last, "{length}");
        }
    }

    #[test]
    fn an_end_on_the_last_page_is_seen_in_front_of_older_wal_too() {
        // The last page of the segment that lay here before, which doesn't tell its address within the page.
        let old = segment(lengths(8));
        let last = Completeness::Incomplete { page: Lsn::new(START + (1 << 20) - PAGE as u64) };
        let payload = (1 << 20) - 127 * 24 - 40 - PAGE;
        for cut in (RECORD_HEADER..PAGE - 100).step_by(5 * ALIGNMENT) {
            // The end of a record that began long before; and a record of the page itself.
            for records in [vec![Some(payload + cut)], vec![Some(payload), Some(cut)]] {
                let mut bytes = segment(records);
                let end = (1 << 20) - PAGE + SHORT_HEADER + cut;
                assert!(bytes[end..].iter().all(|&byte| byte == 0));
                bytes[end..].copy_from_slice(&old[end..]);
                assert_eq!(scan(&bytes, 1 << 18), last, "{cut}");
                // As if it were a record that goes on in the next segment.
                bytes[end..end + 4].copy_from_slice(&u32::MAX.to_le_bytes());
                assert_eq!(scan(&bytes, 1 << 18), last, "{cut}");
            }
        }
    }

    #[test]
    fn a_segment_cut_short_is_incomplete() {
        let whole = segment(lengths(3));
        assert!(matches!(scan(&whole[..(1 << 20) - 5], 1 << 16), Completeness::Incomplete { .. }));
        assert!(matches!(scan(&[], 1 << 16), Completeness::Incomplete { .. }));
    }
}
