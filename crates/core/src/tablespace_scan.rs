//! Which tablespaces a WAL segment creates, and where. Replay makes the link that the original server has, with the
//! original path: on a copy that runs beside it, that is the original's directory.
//!
//! Source: `XLogRecord` and `XLogRecordDataHeaderShort` in `xlogrecord.h`, `XLogPageHeaderData` in `xlog_internal.h`,
//! `xl_tblspc_create_rec` in `tablespace.h`, the order of `rmgrlist.h`. The same in PostgreSQL 14 to 18.

use serde::{Deserialize, Serialize};

use crate::{Lsn, le};

/// `SizeOfXLogShortPHD` and `SizeOfXLogLongPHD`: the header of a page, and of a segment's first.
const SHORT_HEADER: usize = 24;
const LONG_HEADER: usize = 40;
/// `XLP_FIRST_IS_CONTRECORD` and `XLP_LONG_HEADER`.
const CONTINUES: u16 = 0x0001;
const LONG: u16 = 0x0002;
/// `SizeOfXLogRecord`.
const RECORD_HEADER: usize = 24;
/// Everything in WAL is aligned to this.
const ALIGNMENT: usize = 8;
/// `XLOG_TBLSPC_CREATE` of `RM_TBLSPC_ID`.
const CREATE: (u8, u8) = (0x00, 5);
/// No record that creates a tablespace is longer: headers, an OID and a path (`MAXPGPATH`).
const LONGEST: usize = 2048;

/// A tablespace that is created.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TablespaceCreation {
    /// Where the record begins.
    pub lsn: Lsn,
    /// The tablespace.
    pub oid: u32,
    /// Its directory. Empty for one within the data directory (`allow_in_place_tablespaces`).
    pub location: String,
}

/// A record that goes on in the next segment.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CutRecord {
    lsn: Lsn,
    /// Its first bytes.
    bytes: Vec<u8>,
    /// How many bytes of it are to come.
    remaining: u32,
}

/// Looks at the pages of one segment, from its first on.
#[derive(Debug, Default)]
pub struct TablespaceScan {
    from: Lsn,
    first: bool,
    ended: bool,
    magic: u16,
    /// Where the next page begins.
    next_page: Option<Lsn>,
    record: Option<CutRecord>,
    /// How many bytes are to come of a record whose beginning isn't known.
    skipped: u32,
    found: Vec<TablespaceCreation>,
}

impl TablespaceScan {
    /// A scan for records that begin at `from` or later. `cut`: what the segment before ended with, if that is known.
    pub fn new(from: Lsn, cut: Option<CutRecord>) -> TablespaceScan {
        TablespaceScan { from, first: true, record: cut, ..TablespaceScan::default() }
    }

    /// Looks at the next page.
    pub fn page(&mut self, page: &[u8]) {
        if self.ended || self.read(page).is_none() {
            // Zeros, or what a recycled segment held before: the WAL has ended.
            self.ended = true;
            self.record = None;
        }
    }

    /// What was found, and what goes on in the next segment.
    pub fn finish(self) -> (Vec<TablespaceCreation>, Option<CutRecord>) {
        (self.found, self.record)
    }

    /// `None` at the end of the WAL.
    fn read(&mut self, page: &[u8]) -> Option<()> {
        let (magic, info) = (le::u16_at(page, 0)?, le::u16_at(page, 2)?);
        let address = Lsn::new(le::u64_at(page, 8)?);
        let announced = if info & CONTINUES == 0 { 0 } else { le::u32_at(page, 16)? };
        if self.first {
            self.magic = magic;
        }
        if magic == 0 || magic != self.magic || self.next_page.is_some_and(|next| next != address) {
            return None;
        }
        self.next_page = Some(Lsn::new(address.bytes().wrapping_add(page.len() as u64)));
        let expected = self.record.as_ref().map_or(self.skipped, |record| record.remaining);
        if expected != announced {
            // At the first page the beginning isn't known; later it was given up, and another record stands here.
            (self.record, self.skipped) = (None, announced);
        }
        self.first = false;
        let mut at = if info & LONG == 0 { SHORT_HEADER } else { LONG_HEADER };
        while at < page.len() {
            let here = page.get(at..)?;
            if self.skipped > 0 {
                let length = here.len().min(self.skipped as usize);
                self.skipped -= u32::try_from(length).ok()?;
                at = (at + length).next_multiple_of(ALIGNMENT);
                continue;
            }
            let mut record = match self.record.take() {
                Some(record) => record,
                None => {
                    let length = le::u32_at(here, 0)?;
                    if (length as usize) < RECORD_HEADER {
                        return None;
                    }
                    CutRecord {
                        lsn: Lsn::new(address.bytes().wrapping_add(at as u64)),
                        bytes: Vec::new(),
                        remaining: length,
                    }
                }
            };
            let length = here.len().min(record.remaining as usize);
            let kept = length.min(LONGEST.saturating_sub(record.bytes.len()));
            record.bytes.extend_from_slice(here.get(..kept)?);
            record.remaining -= u32::try_from(length).ok()?;
            at = (at + length).next_multiple_of(ALIGNMENT);
            if record.remaining > 0 {
                self.record = Some(record);
            } else if record.lsn >= self.from {
                self.found.extend(creation(&record));
            }
        }
        Some(())
    }
}

/// What a whole record creates, if it does.
fn creation(record: &CutRecord) -> Option<TablespaceCreation> {
    let bytes = &record.bytes;
    let (info, resource_manager) = (bytes.get(16)? & 0xF0, *bytes.get(17)?);
    if (info, resource_manager) != CREATE {
        return None;
    }
    let mut at = RECORD_HEADER;
    // `XLR_BLOCK_ID_*`: how what follows is told.
    let data = loop {
        match bytes.get(at)? {
            255 => break at + 2,
            254 => break at + 5,
            // An origin and the transaction above may stand before.
            253 => at += 3,
            252 => at += 5,
            _ => return None,
        }
    };
    let path = bytes.get(data + 4..)?;
    let end = path.iter().position(|byte| *byte == 0).unwrap_or(path.len());
    Some(TablespaceCreation {
        lsn: record.lsn,
        oid: le::u32_at(bytes, data)?,
        location: String::from_utf8_lossy(path.get(..end)?).into_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: usize = 8192;

    fn record(info: u8, resource_manager: u8, data: &[u8]) -> Vec<u8> {
        let mut record = vec![0; RECORD_HEADER];
        record[16] = info;
        record[17] = resource_manager;
        match u8::try_from(data.len()) {
            Ok(length) => record.extend([255, length]),
            Err(_) => {
                record.push(254);
                record.extend(u32::try_from(data.len()).unwrap().to_le_bytes());
            }
        }
        record.extend(data);
        let length = u32::try_from(record.len()).unwrap();
        record[..4].copy_from_slice(&length.to_le_bytes());
        record
    }

    fn create(oid: u32, path: &str) -> Vec<u8> {
        record(0, 5, &[&oid.to_le_bytes()[..], path.as_bytes(), &[0]].concat())
    }

    /// Records behind each other on pages, as a server lays them out.
    fn wal(records: &[Vec<u8>], segment_pages: usize) -> Vec<Vec<u8>> {
        let mut pages: Vec<Vec<u8>> = Vec::new();
        let open = |pages: &mut Vec<Vec<u8>>, remaining: usize| {
            let first = pages.len().is_multiple_of(segment_pages);
            let mut page = vec![0; if first { LONG_HEADER } else { SHORT_HEADER }];
            page[..2].copy_from_slice(&0xD110u16.to_le_bytes());
            let info = if first { LONG } else { 0 } | if remaining > 0 { CONTINUES } else { 0 };
            page[2..4].copy_from_slice(&info.to_le_bytes());
            page[8..16].copy_from_slice(&((pages.len() * PAGE) as u64).to_le_bytes());
            page[16..20].copy_from_slice(&u32::try_from(remaining).unwrap().to_le_bytes());
            pages.push(page);
        };
        open(&mut pages, 0);
        for record in records {
            let mut rest = record.as_slice();
            while !rest.is_empty() {
                if pages.last().unwrap().len() == PAGE {
                    open(&mut pages, if rest.len() == record.len() { 0 } else { rest.len() });
                }
                let page = pages.last_mut().unwrap();
                let length = rest.len().min(PAGE - page.len());
                page.extend_from_slice(&rest[..length]);
                rest = &rest[length..];
                let aligned = page.len().next_multiple_of(ALIGNMENT);
                page.resize(aligned, 0);
            }
        }
        while !pages.len().is_multiple_of(segment_pages) {
            pages.push(vec![0; PAGE]);
        }
        pages.iter_mut().for_each(|page| page.resize(PAGE, 0));
        pages
    }

    fn scan(pages: &[Vec<u8>], segment_pages: usize, from: Lsn) -> Vec<TablespaceCreation> {
        let (mut found, mut cut) = (Vec::new(), None);
        for segment in pages.chunks(segment_pages) {
            let mut scan = TablespaceScan::new(from, cut);
            segment.iter().for_each(|page| scan.page(page));
            let (here, rest) = scan.finish();
            found.extend(here);
            cut = rest;
        }
        found
    }

    #[test]
    fn a_creation_is_found_with_its_path() {
        let records = [record(0x10, 5, b"dropped"), create(16400, "/mnt/fast"), record(0, 10, b"a row")];
        let found = scan(&wal(&records, 2), 2, Lsn::INVALID);
        let [found] = found.as_slice() else { panic!("{found:?}") };
        assert_eq!((found.oid, found.location.as_str()), (16400, "/mnt/fast"));
        assert_eq!(scan(&wal(&records, 2), 2, Lsn::new(found.lsn.bytes() + 1)), []);
    }

    proptest! {
        #[test]
        fn wherever_the_pages_and_segments_cut_it(filler in 1usize..20_000, path in "/[a-z]{1,900}", more in 0usize..200) {
            let records = [record(0, 10, &vec![7; filler]), create(20000, &path), record(0, 10, &vec![9; more])];
            let found = scan(&wal(&records, 2), 2, Lsn::INVALID);
            prop_assert_eq!(found.len(), 1);
            prop_assert_eq!(&found[0].location, &path);
        }

        #[test]
        fn any_bytes_are_taken_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..9000)) {
            let mut scan = TablespaceScan::new(Lsn::INVALID, None);
            scan.page(&bytes);
            scan.page(&bytes);
        }
    }
}
