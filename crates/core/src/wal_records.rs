//! What recovery targets are compared with: the commits, aborts and restore points in the write-ahead log, found by
//! walking through its records; and the tablespaces that replay would make.
//!
//! Memory doesn't depend on the length of the WAL nor on that of its records: nothing is kept of a record but what it
//! is looked at for. Each one's checksum is checked, and that it names the one before it: the walk ends where recovery
//! would end.
//!
//! Source: `XLogReadRecord` and `XLogDecodeNextRecord` in `xlogreader.c`, `XLogRecord` in `xlogrecord.h`,
//! `XLogPageHeaderData` in `xlog_internal.h`. The same in PostgreSQL 14 to 18.

mod content;

use jiff::Timestamp;

use crate::{Lsn, WalHeader, le, wal_header::LONG_HEADER};

use self::content::Reading;

/// `SizeOfXLogShortPHD`: the header of every page but a segment's first.
const SHORT_HEADER: usize = 24;
/// `XLP_FIRST_IS_CONTRECORD`: the page begins with the rest of a record.
const CONTINUES: u16 = 0x0001;
/// `XLP_FIRST_IS_OVERWRITE_CONTRECORD`: the record before it was never ended; the server crashed.
const OVERWRITES: u16 = 0x0008;
/// `SizeOfXLogRecord`.
const RECORD_HEADER: usize = 24;
/// Where in its header a record's checksum lies: a CRC-32C of what follows the header, then of the header up to here.
const CHECKSUM: usize = 20;
/// `RM_XLOG_ID`, and its `XLOG_SWITCH`: the rest of the segment is unused.
const SWITCH: (u8, u8) = (0, 0x40);
/// Everything in WAL is aligned to this.
const ALIGNMENT: u64 = 8;

/// A record that was found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WalRecord {
    /// Where it begins: what PostgreSQL compares a target's LSN with, and pg_waldump prints.
    pub lsn: Lsn,
    /// Where the next one can begin: what the functions return that write a record.
    pub end: Lsn,
    /// What it says.
    pub content: RecordContent,
}

/// What a record says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RecordContent {
    /// The end of a transaction; of a prepared one, its `COMMIT PREPARED` or `ROLLBACK PREPARED`.
    Transaction {
        /// The transaction: the lower 32 bits. Of a prepared one, its own.
        xid: u32,
        /// The server's clock, in microseconds.
        time: Timestamp,
        /// Whether it was committed; otherwise it was aborted.
        committed: bool,
    },
    /// pg_create_restore_point
    RestorePoint {
        /// Its name, as far as it's UTF-8.
        name: String,
        /// The server's clock, in microseconds.
        time: Timestamp,
    },
    /// `CREATE TABLESPACE`: replay makes a link to the location.
    CreateTablespace {
        /// Its OID.
        oid: u32,
        /// Where it lies on the server that wrote the record, as far as it's UTF-8.
        location: String,
    },
    /// `DROP TABLESPACE`
    DropTablespace {
        /// Its OID.
        oid: u32,
    },
    /// Anything else: told once, see [`WalRecords::tell_of_record_at`].
    Other,
}

/// Why the WAL ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WalEnd {
    /// Nothing was written there yet.
    #[error("it ends at {at}")]
    Unwritten {
        /// Where the next record would begin.
        at: Lsn,
    },
    /// What is there isn't a record that follows the one before it. Recovery would end here without an error.
    #[error("the record at {at} is not valid: {why}")]
    Invalid {
        /// Where it begins, or its page.
        at: Lsn,
        /// What is wrong.
        why: Invalid,
    },
}

/// What is wrong with a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Invalid {
    /// The page isn't of this place, or of another version.
    #[error("its page has no header that belongs there")]
    Page,
    /// The page doesn't go on with the record that began before it.
    #[error("the next page doesn't go on with it")]
    Continuation,
    /// Shorter than a record can be.
    #[error("its length can't be right")]
    Length,
    /// It follows another record.
    #[error("it names another record as the one before it")]
    Previous,
    /// CRC-32C.
    #[error("its checksum is wrong")]
    Checksum,
}

/// A walk through the records of consecutive segments.
#[derive(Debug)]
pub struct WalRecords {
    /// The address of the byte that comes next.
    at: u64,
    /// Of a page; 0 before the first header.
    page_size: u64,
    segment_size: u64,
    magic: u16,
    /// What has come of the page's header.
    page: Vec<u8>,
    in_page_header: bool,
    state: State,
    /// Where the last whole record begins.
    previous: Option<u64>,
    /// Where the last whole record ends.
    reached: u64,
    end: Option<WalEnd>,
    told: Option<Lsn>,
}

#[derive(Debug)]
enum State {
    /// This many bytes are left of a record that began before the walk.
    Skipping(u64),
    /// A record begins at the next multiple of the alignment.
    Between,
    Record(Box<Open>),
    /// The rest of the segment is behind a switch record.
    Switched,
}

/// A record of which not everything has come.
#[derive(Debug)]
struct Open {
    begins: u64,
    header: [u8; RECORD_HEADER],
    /// How many of its bytes have come, the header's included.
    come: u64,
    /// Its length; 0 until it is known.
    length: u64,
    checksum: u32,
    reading: Reading,
}

impl WalRecords {
    /// A walk from the beginning of a segment. Where that is the middle of a record, the one after it is the first.
    pub fn new(segment_begins: Lsn) -> WalRecords {
        WalRecords {
            at: segment_begins.bytes(),
            page_size: 0,
            segment_size: 0,
            magic: 0,
            page: Vec::with_capacity(WalHeader::LEN),
            in_page_header: true,
            state: State::Between,
            previous: None,
            reached: segment_begins.bytes(),
            end: None,
            told: None,
        }
    }

    /// Tells of the first record that begins at this position or later, whatever it says.
    #[must_use]
    pub fn tell_of_record_at(mut self, lsn: Lsn) -> WalRecords {
        self.told = Some(lsn);
        self
    }

    /// Takes the bytes that come next, as many as there are, and hands over what is found in them. After the end of the
    /// WAL it does nothing.
    pub fn feed(&mut self, mut bytes: &[u8], mut found: impl FnMut(WalRecord)) {
        while !bytes.is_empty() && self.end.is_none() {
            let taken = if matches!(self.state, State::Switched) && self.at < self.reached {
                let rest = self.reached - self.at;
                bytes.len().min(usize::try_from(rest).unwrap_or(usize::MAX))
            } else if self.in_page_header {
                self.take_header(bytes)
            } else {
                let rest = self.page_size - self.at % self.page_size;
                let within = bytes.len().min(usize::try_from(rest).unwrap_or(usize::MAX));
                self.take_content(&bytes[..within], &mut found)
            };
            bytes = &bytes[taken..];
            self.at += taken as u64;
            if !self.in_page_header && self.page_size > 0 && self.at.is_multiple_of(self.page_size) {
                self.in_page_header = true;
                self.page.clear();
            }
        }
    }

    /// How the WAL ends, once its end has been seen. The bytes may end before it.
    pub fn ended(&self) -> Option<WalEnd> {
        self.end
    }

    /// Where the last whole record ends; the beginning where there was none yet.
    pub fn reached(&self) -> Lsn {
        Lsn::new(self.reached)
    }

    /// Where the last whole record begins.
    pub fn last_record(&self) -> Option<Lsn> {
        self.previous.map(Lsn::new)
    }

    fn invalid(&mut self, at: u64, why: Invalid) {
        self.end = Some(WalEnd::Invalid { at: Lsn::new(at), why });
    }

    /// Takes what is missing of a page's header; answers with how many bytes that was.
    fn take_header(&mut self, bytes: &[u8]) -> usize {
        let long = le::u16_at(&self.page, 2).is_some_and(|info| info & LONG_HEADER != 0);
        // The first two fields tell how long it is.
        let wanted = match self.page.len() {
            ..4 => 4,
            _ if long => WalHeader::LEN,
            _ => SHORT_HEADER,
        };
        let taken = bytes.len().min(wanted - self.page.len());
        self.page.extend_from_slice(&bytes[..taken]);
        if self.page.len() == wanted && wanted > 4 {
            let begins = self.at + taken as u64 - wanted as u64;
            self.begin_page(begins);
        }
        taken
    }

    fn begin_page(&mut self, begins: u64) {
        self.in_page_header = false;
        let field = |at| le::u32_at(&self.page, at).unwrap_or(0);
        let (magic, info) = (field(0) & 0xFFFF, field(0) >> 16);
        let (magic, info) = (u16::try_from(magic).unwrap_or(0), u16::try_from(info).unwrap_or(0));
        if self.page.iter().all(|&byte| byte == 0) {
            self.end = Some(WalEnd::Unwritten { at: Lsn::new(self.open_record().unwrap_or(begins)) });
            return;
        }
        if self.page_size == 0
            && let Ok(header) = WalHeader::parse(&self.page)
        {
            (self.page_size, self.segment_size) = (u64::from(header.block_size), header.segment_size.bytes());
            self.magic = header.magic;
        }
        let here = le::u64_at(&self.page, 8) == Some(begins);
        if self.page_size == 0 || magic != self.magic || !here {
            return self.invalid(self.open_record().unwrap_or(begins), Invalid::Page);
        }
        let rest = u64::from(field(16));
        let continues = info & CONTINUES != 0;
        match &self.state {
            _ if info & OVERWRITES != 0 => self.state = State::Between,
            State::Record(open) if !continues || rest != open.length - open.come => {
                self.invalid(open.begins, Invalid::Continuation);
            }
            State::Record(_) => {}
            State::Skipping(_) | State::Between if continues && self.previous.is_none() => {
                self.state = State::Skipping(rest);
            }
            State::Skipping(_) => self.state = State::Between,
            State::Between | State::Switched if continues => self.invalid(begins, Invalid::Continuation),
            State::Between | State::Switched => self.state = State::Between,
        }
    }

    fn open_record(&self) -> Option<u64> {
        match &self.state {
            State::Record(open) => Some(open.begins),
            _ => None,
        }
    }

    /// Takes bytes of a page behind its header, as far as the state doesn't change; answers with how many.
    fn take_content(&mut self, bytes: &[u8], found: &mut impl FnMut(WalRecord)) -> usize {
        let up_to = |most: u64| bytes.len().min(usize::try_from(most).unwrap_or(usize::MAX));
        match &mut self.state {
            State::Switched => bytes.len(),
            State::Skipping(0) => {
                self.state = State::Between;
                0
            }
            State::Skipping(rest) => {
                let taken = up_to(*rest);
                *rest -= taken as u64;
                taken
            }
            State::Between => {
                let padding = self.at.next_multiple_of(ALIGNMENT) - self.at;
                if padding == 0 {
                    self.state = State::Record(Box::new(Open::new(self.at)));
                }
                up_to(padding)
            }
            State::Record(open) => {
                let taken = open.take(bytes, self.magic);
                let (begins, length, come) = (open.begins, open.length, open.come);
                let previous = le::u64_at(&open.header, 8).unwrap_or(0);
                if come >= 4 && length == 0 {
                    self.end = Some(WalEnd::Unwritten { at: Lsn::new(begins) });
                } else if come >= 4 && length < RECORD_HEADER as u64 {
                    self.invalid(begins, Invalid::Length);
                } else if come >= RECORD_HEADER as u64
                    && self.previous.map_or(previous >= begins, |before| previous != before)
                {
                    self.invalid(begins, Invalid::Previous);
                } else if come == length && length > 0 {
                    self.end_record(self.at + taken as u64, found);
                }
                taken
            }
        }
    }

    fn end_record(&mut self, end: u64, found: &mut impl FnMut(WalRecord)) {
        let State::Record(open) = std::mem::replace(&mut self.state, State::Between) else { return };
        if !open.is_intact() {
            return self.invalid(open.begins, Invalid::Checksum);
        }
        self.previous = Some(open.begins);
        self.reached = end.next_multiple_of(ALIGNMENT);
        // The lower four bits are flags of the insertion (XLR_INFO_MASK).
        if (open.header[17], open.header[16] & 0xF0) == SWITCH {
            self.state = State::Switched;
            self.reached = end.next_multiple_of(self.segment_size);
        }
        let lsn = Lsn::new(open.begins);
        let told = self.told.is_some_and(|told| lsn >= told);
        if told {
            self.told = None;
        }
        if let Some(content) = open.reading.finish().or(told.then_some(RecordContent::Other)) {
            found(WalRecord { lsn, end: Lsn::new(self.reached), content });
        }
    }
}

impl Open {
    fn new(begins: u64) -> Open {
        Open { begins, header: [0; RECORD_HEADER], come: 0, length: 0, checksum: 0, reading: Reading::default() }
    }

    /// Takes bytes of the record: of its length, then of its header, then of what follows.
    fn take(&mut self, bytes: &[u8], magic: u16) -> usize {
        let header = match self.come {
            ..4 => Some(4),
            4..24 => Some(RECORD_HEADER),
            _ => None,
        };
        if let (Some(until), Ok(come)) = (header, usize::try_from(self.come)) {
            let taken = bytes.len().min(until - come);
            self.header[come..come + taken].copy_from_slice(&bytes[..taken]);
            self.come += taken as u64;
            if self.come == 4 {
                self.length = le::u32_at(&self.header, 0).unwrap_or(0).into();
            }
            if self.come == RECORD_HEADER as u64 {
                self.reading = Reading::of(&self.header, magic);
            }
            return taken;
        }
        let taken = bytes.len().min(usize::try_from(self.length - self.come).unwrap_or(usize::MAX));
        self.checksum = crc32c::crc32c_append(self.checksum, &bytes[..taken]);
        self.reading.feed(&bytes[..taken]);
        self.come += taken as u64;
        taken
    }

    fn is_intact(&self) -> bool {
        let whole = crc32c::crc32c_append(self.checksum, &self.header[..CHECKSUM]);
        le::u32_at(&self.header, CHECKSUM) == Some(whole)
    }
}

#[cfg(test)]
pub(crate) mod tests;
