//! What a record says, read while it passes by.
//!
//! Source: `DecodeXLogRecord` in `xlogreader.c`, `ParseCommitRecord` in `xactdesc.c`, `xact.h`; `xl_restore_point` in
//! `xlog_internal.h`; `tablespace.h`. The numbers of the resource managers and their operations are the same in
//! PostgreSQL 14 to 18; what a transaction's end says of dropped statistics came with 15 and grew with 18.

use jiff::Timestamp;

use super::RecordContent;
use crate::le;

/// `RM_XLOG_ID` with `XLOG_RESTORE_POINT`.
const RESTORE_POINT: (u8, u8) = (0, 0x70);
/// `RM_XACT_ID`
const XACT: u8 = 1;
/// `XLOG_XACT_OPMASK`
const XACT_OPERATION: u8 = 0x70;
/// `XLOG_XACT_HAS_INFO`
const XACT_HAS_INFO: u8 = 0x80;
/// `RM_TBLSPC_ID` with `XLOG_TBLSPC_CREATE` and `XLOG_TBLSPC_DROP`.
const CREATE_TABLESPACE: (u8, u8) = (5, 0x00);
const DROP_TABLESPACE: (u8, u8) = (5, 0x10);
/// `XLOG_PAGE_MAGIC` of PostgreSQL 18.
const MAGIC_18: u16 = 0xD118;

/// `XACT_XINFO_HAS_DBINFO`: 8 bytes.
const DATABASE: u32 = 1 << 0;
/// `XACT_XINFO_HAS_TWOPHASE`: the prepared transaction's XID.
const TWO_PHASE: u32 = 1 << 4;
/// Parts that begin with a count (of subtransactions, files, dropped statistics, invalidations), in their order, and
/// what one of each is long. That of statistics depends on the version.
const LISTS: [(u32, u64); 4] = [(1 << 1, 4), (1 << 2, 12), (DROPPED_STATISTICS, 12), (1 << 3, 16)];
const DROPPED_STATISTICS: u32 = 1 << 8;

/// `MAXFNAMELEN`: the length of a restore point's name, with its end.
const NAME: usize = 64;
/// `MAXPGPATH`
const PATH: usize = 1024;

/// The content of a record, as far as it has come.
#[derive(Debug, Default)]
pub(super) struct Reading {
    step: Step,
    /// Bytes that are passed over before the next that are wanted.
    skip: u64,
    /// How many bytes the step takes.
    wanted: usize,
    taken: Vec<u8>,
    kind: Option<Kind>,
    /// Parts of a transaction's end that are still to come.
    parts: u32,
    magic: u16,
    content: Option<RecordContent>,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Transaction { committed: bool, prepared: bool, has_info: bool, xid: u32 },
    RestorePoint,
    CreateTablespace,
    DropTablespace,
}

#[derive(Clone, Copy, Debug, Default)]
enum Step {
    /// Nothing more is wanted.
    #[default]
    Done,
    /// What part of the record comes next.
    PartId,
    /// The length of its main data.
    Length,
    /// The fixed part of what it says.
    Fixed,
    /// Which parts follow in a transaction's end.
    Parts,
    /// The count of a list whose elements have this length.
    Count(u64),
    PreparedXid,
}

impl Reading {
    /// Of the record with this header.
    pub(super) fn of(header: &[u8; 24], magic: u16) -> Reading {
        let (manager, info) = (header[17], header[16]);
        let kind = match (manager, info & 0xF0) {
            RESTORE_POINT => Some(Kind::RestorePoint),
            CREATE_TABLESPACE => Some(Kind::CreateTablespace),
            DROP_TABLESPACE => Some(Kind::DropTablespace),
            (XACT, _) => {
                let (xid, has_info) = (le::u32_at(header, 4).unwrap_or(0), info & XACT_HAS_INFO != 0);
                // XLOG_XACT_COMMIT, _ABORT, _COMMIT_PREPARED, _ABORT_PREPARED
                let ends = match info & XACT_OPERATION {
                    0x00 => Some((true, false)),
                    0x20 => Some((false, false)),
                    0x30 => Some((true, true)),
                    0x40 => Some((false, true)),
                    _ => None,
                };
                ends.map(|(committed, prepared)| Kind::Transaction { committed, prepared, has_info, xid })
            }
            _ => None,
        };
        let mut reading = Reading { kind, magic, ..Reading::default() };
        if kind.is_some() {
            reading.want(Step::PartId, 1);
        }
        reading
    }

    fn want(&mut self, step: Step, bytes: usize) {
        (self.step, self.wanted) = (step, bytes);
    }

    /// Takes what comes next of the record.
    pub(super) fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && !matches!(self.step, Step::Done) {
            let skipped = bytes.len().min(usize::try_from(self.skip).unwrap_or(usize::MAX));
            self.skip -= skipped as u64;
            bytes = &bytes[skipped..];
            let taken = bytes.len().min(self.wanted - self.taken.len());
            self.taken.extend_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
            if self.taken.len() == self.wanted {
                let whole = std::mem::take(&mut self.taken);
                self.step = self.take(&whole).unwrap_or(Step::Done);
            }
        }
    }

    /// What it says, when all of it has come and was right.
    pub(super) fn finish(self) -> Option<RecordContent> {
        self.content
    }

    /// Takes all bytes of a step; answers with the next one.
    fn take(&mut self, bytes: &[u8]) -> Option<Step> {
        let kind = self.kind?;
        match self.step {
            Step::Done => return None,
            Step::PartId => match bytes.first()? {
                // XLR_BLOCK_ID_DATA_SHORT, _LONG, _ORIGIN, _TOPLEVEL_XID
                255 => self.want(Step::Length, 1),
                254 => self.want(Step::Length, 4),
                253 => self.skip = 2,
                252 => self.skip = 4,
                // A reference to a block: none of the records that are wanted has one.
                _ => return None,
            },
            Step::Length => {
                let length = le::u32_at(bytes, 0).unwrap_or(u32::from(*bytes.first()?));
                let wanted = match kind {
                    Kind::Transaction { .. } => 8,
                    Kind::RestorePoint => 8 + NAME,
                    Kind::CreateTablespace => PATH.min(usize::try_from(length).ok()?),
                    Kind::DropTablespace => 4,
                };
                self.want(Step::Fixed, wanted.max(1));
            }
            Step::Fixed => return self.fixed(kind, bytes),
            Step::Parts => {
                self.parts = le::u32_at(bytes, 0)?;
                return self.next_part();
            }
            Step::Count(each) => {
                self.skip = u64::from(le::u32_at(bytes, 0)?) * each;
                return self.next_part();
            }
            Step::PreparedXid => {
                if let Some(RecordContent::Transaction { xid, .. }) = &mut self.content {
                    *xid = le::u32_at(bytes, 0)?;
                }
                return None;
            }
        }
        Some(self.step)
    }

    fn fixed(&mut self, kind: Kind, bytes: &[u8]) -> Option<Step> {
        match kind {
            Kind::Transaction { committed, prepared, has_info, xid } => {
                self.content = Some(RecordContent::Transaction { xid, time: time(bytes)?, committed });
                if prepared && has_info {
                    self.want(Step::Parts, 4);
                    return Some(self.step);
                }
            }
            Kind::RestorePoint => {
                self.content = Some(RecordContent::RestorePoint { time: time(bytes)?, name: text(bytes.get(8..)?) });
            }
            Kind::CreateTablespace => {
                let oid = le::u32_at(bytes, 0)?;
                self.content = Some(RecordContent::CreateTablespace { oid, location: text(bytes.get(4..)?) });
            }
            Kind::DropTablespace => {
                self.content = Some(RecordContent::DropTablespace { oid: le::u32_at(bytes, 0)? });
            }
        }
        None
    }

    /// The next part of a transaction's end that has to be passed over, or is wanted.
    fn next_part(&mut self) -> Option<Step> {
        if self.has_part(DATABASE) {
            self.skip += 8;
        }
        for (flag, each) in LISTS {
            if self.has_part(flag) {
                let each = if flag == DROPPED_STATISTICS && self.magic >= MAGIC_18 { 16 } else { each };
                self.want(Step::Count(each), 4);
                return Some(self.step);
            }
        }
        if !self.has_part(TWO_PHASE) {
            return None;
        }
        self.want(Step::PreparedXid, 4);
        Some(self.step)
    }

    /// Whether this part is still to come; asked once.
    fn has_part(&mut self, flag: u32) -> bool {
        let has = self.parts & flag != 0;
        self.parts &= !flag;
        has
    }
}

/// A `TimestampTz`: microseconds since 2000-01-01. What no clock shows is the end of all times.
fn time(bytes: &[u8]) -> Option<Timestamp> {
    /// From 1970-01-01 to 2000-01-01, in microseconds.
    const EPOCH: i64 = 946_684_800_000_000;
    let since = le::u64_at(bytes, 0)?.cast_signed();
    let end = if since < 0 { Timestamp::MIN } else { Timestamp::MAX };
    Some(Timestamp::from_microsecond(since.saturating_add(EPOCH)).unwrap_or(end))
}

/// A C string.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}
