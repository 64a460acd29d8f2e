//! Looking for a recovery target in the WAL: which segments have to be read, and what they tell.
//!
//! PostgreSQL stops at the first record that meets the target. A time is met by the first end of a transaction, committed
//! or aborted, that is later (`recoveryStopsBefore` in `xlogrecovery.c`). Where that lies is guessed by when the segments
//! were stored, and then found by what is in them: the clocks of store and server differ. What is assumed of the
//! server's own clock is that it goes forward.

use jiff::Timestamp;

use super::{End, ExpectedEnd, PlanError, TransactionEnd, WalFacts};
use crate::{
    Lsn, WalSegmentSize,
    recovery::RecoveryTarget,
    wal_records::{RecordContent, WalEnd, WalRecord, WalRecords},
};

/// How many segments are read at most.
const MOST_SEGMENTS: u64 = 64;
/// How many bytes of WAL are read at most; but always a few segments.
const MOST_BYTES: u64 = 1 << 30;
const FEW_SEGMENTS: u64 = 6;
/// So many segments are read in a row before it's tried further on.
const IN_A_ROW: u64 = 3;

/// A search for a target. It asks for segments with [`Search::next_segment`], and takes their bytes.
#[derive(Debug)]
pub struct Search {
    size: WalSegmentSize,
    /// The first segment in which the target can be.
    first: u64,
    /// Before this recovery can't end.
    stop: Lsn,
    /// Where the restore point lies that is meant by its name, if that is known.
    point: Option<Lsn>,
    wal: WalFacts,
    /// For messages.
    target: String,
    walk: WalRecords,
    /// Where the walk began.
    from: u64,
    /// The segment that comes next.
    next: u64,
    read: u64,
    /// In this segment an end of a transaction begins that isn't later than the target; or it's the first.
    low: u64,
    /// The first end of a transaction in this segment is later than the target, or none begins there or behind it.
    high: Option<u64>,
    /// Which of the two.
    quiet: bool,
    step: u64,
    found: Found,
    ended: Option<ExpectedEnd>,
}

/// What a walk has found.
#[derive(Debug)]
struct Found {
    /// What is before it isn't replayed: it's in the backup.
    start: Lsn,
    goal: Goal,
    inclusive: bool,
    /// Whether the walk began at the first segment, so that there is nothing before it.
    from_first: bool,
    last_commit: Option<TransactionEnd>,
    /// The last end of a transaction that isn't later than the target.
    earlier: Option<Lsn>,
    /// The first end of a transaction is later than the target already: the walk began too late.
    late: bool,
    met: Option<End>,
}

#[derive(Clone, Debug)]
enum Goal {
    Latest,
    Time(Timestamp),
    Lsn(Lsn),
    Xid(u64),
    Name(String),
}

impl Search {
    /// A search in the WAL that `wal` tells of, beginning with what is restored first: from `start` its WAL is needed,
    /// at `stop` it is consistent. `point` is where a restore point's name lies, if that is known. `None` for a target
    /// that needs none.
    pub(super) fn new(
        target: &RecoveryTarget,
        inclusive: bool,
        (start, stop): (Lsn, Lsn),
        size: WalSegmentSize,
        wal: WalFacts,
        point: Option<Lsn>,
    ) -> Option<Search> {
        let (first, last) = (size.segment_number(start), size.previous_segment_number(wal.reachable));
        let before = |lsn: Lsn| size.previous_segment_number(lsn).saturating_sub(1);
        let (goal, from) = match target {
            RecoveryTarget::Immediate => return None,
            RecoveryTarget::Latest => (Goal::Latest, last),
            // The server keeps microseconds.
            RecoveryTarget::Time(time) => {
                let time = Timestamp::from_microsecond(time.as_microsecond()).unwrap_or(*time);
                (Goal::Time(time), wal.stored_by.unwrap_or(first))
            }
            RecoveryTarget::Lsn(lsn) => (Goal::Lsn(*lsn), before(*lsn)),
            RecoveryTarget::Xid(xid) => (Goal::Xid(*xid), size.previous_segment_number(stop)),
            RecoveryTarget::Name(name) => (Goal::Name(name.to_string()), point.map_or(first, before)),
        };
        let mut search = Search {
            size,
            first,
            stop,
            point,
            wal,
            target: target.to_string(),
            walk: WalRecords::new(Lsn::INVALID),
            from: first,
            next: first,
            read: 0,
            low: first,
            high: None,
            quiet: false,
            step: IN_A_ROW,
            found: Found {
                start,
                goal,
                inclusive,
                from_first: true,
                last_commit: None,
                earlier: None,
                late: false,
                met: None,
            },
            ended: None,
        };
        search.begin(from);
        Some(search)
    }

    /// Begins a walk at a segment.
    fn begin(&mut self, from: u64) {
        let from = from.clamp(self.first, self.end().saturating_sub(1).max(self.first));
        (self.from, self.next) = (from, from);
        self.walk = WalRecords::new(self.size.start_of(from));
        if let Goal::Lsn(lsn) = self.found.goal {
            self.walk = WalRecords::new(self.size.start_of(from)).tell_of_record_at(lsn);
        }
        let found = &mut self.found;
        (found.last_commit, found.earlier, found.late) = (None, None, false);
        found.from_first = from == self.first;
    }

    /// The number of the first segment that isn't there.
    fn end(&self) -> u64 {
        self.size.segment_number(self.wal.reachable)
    }

    /// The segment whose bytes are wanted next, from its beginning on, by its number; `None` when it's over.
    pub fn next_segment(&self) -> Option<u64> {
        self.ended.is_none().then_some(self.next)
    }

    /// Takes bytes of the segment; answers whether more of it is wanted.
    pub fn feed(&mut self, bytes: &[u8]) -> bool {
        let found = &mut self.found;
        self.walk.feed(bytes, |record| found.take(&record));
        found.met.is_none() && !found.late && self.walk.ended().is_none()
    }

    /// Says that the segment was read, as far as it was wanted.
    ///
    /// # Errors
    /// If the target isn't in the WAL.
    pub fn segment_read(&mut self) -> Result<(), PlanError> {
        self.read += 1;
        self.next += 1;
        if let Some(end) = self.found.met.take() {
            // One that nobody recorded: PostgreSQL stops at the first.
            if let (Goal::Name(name), Some(newest)) = (&self.found.goal, self.point.filter(|point| *point != end.lsn)) {
                return Err(PlanError::NameMetEarlier { name: name.clone(), newest, earlier: end.lsn });
            }
            if end.lsn < self.stop {
                return Err(PlanError::MetTooEarly { target: self.target.clone(), at: end.lsn, stop: self.stop });
            }
            self.ended = Some(ExpectedEnd::Verified(end));
        } else if self.found.late {
            (self.high, self.quiet) = (Some(self.from), false);
            self.go_back();
        } else if self.quiet && self.found.earlier.is_none() && self.high == Some(self.next) {
            self.high = Some(self.from);
            self.go_back();
        } else if self.walk.ended().is_some() || self.next >= self.end() {
            self.end_of_wal()?;
        } else if let Some(earlier) = self.found.earlier
            && self.next - self.from >= IN_A_ROW
            && self.is_far()
        {
            self.low = self.size.segment_number(earlier);
            self.go_on();
        }
        let most = (MOST_BYTES / self.size.bytes()).clamp(FEW_SEGMENTS, MOST_SEGMENTS);
        if self.ended.is_none() && self.read >= most {
            let because = format!("it is not in the {} segments of WAL that were read", self.read);
            self.ended = Some(ExpectedEnd::NotVerified { because });
        }
        Ok(())
    }

    /// What was found. Before the end of the search, that it isn't known.
    pub fn finish(self) -> ExpectedEnd {
        self.ended.unwrap_or_else(|| ExpectedEnd::NotVerified { because: "the WAL was not read".to_owned() })
    }

    /// Whether a time can be so far away that reading segment by segment takes too long.
    fn is_far(&self) -> bool {
        matches!(self.found.goal, Goal::Time(_))
            && self.high.is_none_or(|high| high.saturating_sub(self.next) > IN_A_ROW)
    }

    /// The time lies before the walk.
    fn go_back(&mut self) {
        let from = if self.from.saturating_sub(self.low) <= IN_A_ROW {
            // Everything between is read.
            self.low
        } else if self.low > self.first {
            self.low.midpoint(self.from)
        } else {
            self.from.saturating_sub(self.step).max(self.low)
        };
        self.step = self.step.saturating_mul(2);
        self.begin(from);
    }

    /// The time lies behind the walk.
    fn go_on(&mut self) {
        let from = match self.high {
            Some(high) => self.low.midpoint(high),
            None => self.low.saturating_add(self.step),
        };
        self.step = self.step.saturating_mul(2);
        self.begin(from.max(self.next));
    }

    /// The WAL ends, and the target wasn't met.
    fn end_of_wal(&mut self) -> Result<(), PlanError> {
        let (found, reachable) = (&self.found, self.walk.reached());
        match &found.goal {
            // An idle server writes segments in which no transaction ends.
            Goal::Time(_) if found.earlier.is_none() && self.from > self.low => {
                (self.high, self.quiet) = (Some(self.from), true);
                self.go_back();
                return Ok(());
            }
            Goal::Latest if found.last_commit.is_none() && self.from > self.first && self.read < FEW_SEGMENTS => {
                self.go_back();
                return Ok(());
            }
            Goal::Latest if matches!(self.walk.ended(), Some(WalEnd::Invalid { .. })) => {
                let because = self.walk.ended().map_or_else(String::new, |end| end.to_string());
                self.ended = Some(ExpectedEnd::NotVerified { because: format!("recovery would end early: {because}") });
                return Ok(());
            }
            Goal::Latest => {
                let end = End { lsn: reachable, last_commit: found.last_commit, stops_at: None };
                self.ended = Some(ExpectedEnd::Verified(end));
                return Ok(());
            }
            _ => {}
        }
        let target = self.target.clone();
        if let Some(end @ WalEnd::Invalid { .. }) = self.walk.ended() {
            return Err(PlanError::DamagedWal { target, end, last_commit: found.last_commit });
        }
        if self.wal.gap {
            return Err(PlanError::Gap { target, missing: self.wal.missing, reachable });
        }
        Err(match &found.goal {
            Goal::Xid(xid) => PlanError::NoSuchTransaction { xid: *xid, reachable },
            Goal::Name(name) => PlanError::NoSuchRestorePoint { name: name.clone(), reachable },
            _ => {
                let timeline = self.wal.missing.timeline();
                PlanError::AfterLastRecord { target, timeline, reachable, last_commit: found.last_commit }
            }
        })
    }
}

impl Found {
    fn take(&mut self, record: &WalRecord) {
        if self.met.is_some() || self.late {
            return;
        }
        let ended = match &record.content {
            RecordContent::Transaction { xid, time, committed } => {
                Some(TransactionEnd { xid: *xid, time: *time, lsn: record.lsn, committed: *committed })
            }
            _ => None,
        };
        let before = self.last_commit;
        let commit = ended.filter(|ended| ended.committed);
        // Just behind the record, or just before it.
        let behind = End { lsn: record.end, last_commit: commit.or(before), stops_at: ended };
        let in_front = End { lsn: record.lsn, last_commit: before, stops_at: ended };
        let here = if self.inclusive { behind.clone() } else { in_front.clone() };
        match (&self.goal, ended) {
            _ if record.lsn < self.start => self.earlier = ended.map(|ended| ended.lsn).or(self.earlier),
            (Goal::Time(target), Some(ended)) => {
                let later = if self.inclusive { ended.time > *target } else { ended.time >= *target };
                if !later {
                    self.earlier = Some(ended.lsn);
                } else if self.earlier.is_some() || self.from_first {
                    self.met = Some(in_front);
                } else {
                    self.late = true;
                }
            }
            // PostgreSQL compares the lower half alone.
            (Goal::Xid(xid), Some(ended)) if *xid & 0xFFFF_FFFF == u64::from(ended.xid) => self.met = Some(here),
            (Goal::Lsn(lsn), _) if record.lsn >= *lsn => self.met = Some(here),
            (Goal::Name(wanted), _) if matches!(&record.content, RecordContent::RestorePoint { name, .. } if name == wanted) =>
            {
                self.met = Some(behind);
            }
            _ => {}
        }
        if self.met.is_none() && !self.late {
            self.last_commit = commit.or(before);
        }
    }
}

#[cfg(test)]
mod tests;
