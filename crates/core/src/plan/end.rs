//! Where recovery will end.

use jiff::Timestamp;
use serde::Serialize;

use crate::{Lsn, recovery::RecoveryTarget};

/// What the WAL says about where recovery will end.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum ExpectedEnd {
    /// The WAL was read up to there.
    Verified(End),
    /// PostgreSQL may end with an error when it's started, because the target isn't in the WAL.
    NotVerified {
        /// Why that isn't known, a clause for people.
        because: String,
    },
}

impl ExpectedEnd {
    /// What is known without a look into the WAL; `stop` is where that is consistent which is restored first.
    pub(super) fn unread(target: &RecoveryTarget, stop: Lsn) -> ExpectedEnd {
        match target {
            RecoveryTarget::Immediate => ExpectedEnd::Verified(End { lsn: stop, last_commit: None, stops_at: None }),
            _ => ExpectedEnd::NotVerified { because: "the WAL was not read".to_owned() },
        }
    }
}

/// Where recovery will end, going by the WAL.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct End {
    /// What is before it is replayed, and nothing behind it.
    pub lsn: Lsn,
    /// The last transaction that will be there; `None` where none was found in the WAL that was read.
    pub last_commit: Option<TransactionEnd>,
    /// The transaction at whose end recovery stops, just before or just behind it; `None` where something else stops it.
    pub stops_at: Option<TransactionEnd>,
}

/// The end of a transaction.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct TransactionEnd {
    /// The transaction: the lower 32 bits.
    pub xid: u32,
    /// The server's clock, in microseconds.
    pub time: Timestamp,
    /// Where its record begins.
    pub lsn: Lsn,
    /// Whether it was committed; otherwise it was aborted.
    pub committed: bool,
}
