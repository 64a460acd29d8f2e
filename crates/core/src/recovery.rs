//! How far a restored server recovers, and what it does then.
//!
//! [`RecoveryTarget`] and [`RecoverySettings`] are what the user asked for, [`parse_target_time`] reads a
//! time from a person, and [`rewrite_auto_conf`] turns the settings into the `postgresql.auto.conf` that
//! the server starts with. Whether a target can be reached is not known here.

mod auto_conf;
mod order;
mod signal;
mod target_time;

use std::{fmt, str::FromStr};

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Lsn, TimelineId};

pub use auto_conf::rewrite_auto_conf;
pub use order::{InvalidTarget, RestoreOrder, Target};
pub use signal::RecoverySignal;
pub use target_time::{TargetTimeError, parse_target_time};

/// Where recovery ends ("Recovery Target" in the manual).
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RecoveryTarget {
    /// At the end of the WAL that can be found.
    Latest,
    /// As soon as the backup is consistent.
    Immediate,
    /// At the first commit after this time, or the last one at it. PostgreSQL keeps microseconds: what is
    /// finer is cut.
    Time(Timestamp),
    /// At this position.
    Lsn(Lsn),
    /// At the commit of this transaction. With or without the epoch that pg_current_xact_id() puts above the
    /// lower 32 bits: every version accepts 64 bits and compares the lower 32 alone
    /// (check_recovery_target_xid, xlogrecovery.c), so that a target may match again 2^32 transactions later.
    Xid(u64),
    /// At the restore point of this name.
    Name(RestorePointName),
}

impl fmt::Display for RecoveryTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RecoveryTarget::Latest => f.write_str("the end of the archive"),
            RecoveryTarget::Immediate => f.write_str("the end of the backup"),
            RecoveryTarget::Time(time) => write!(f, "time {time}"),
            RecoveryTarget::Lsn(lsn) => write!(f, "LSN {lsn}"),
            RecoveryTarget::Xid(xid) => write!(f, "transaction {xid}"),
            RecoveryTarget::Name(name) => write!(f, "restore point {name}"),
        }
    }
}

/// The name of a restore point (pg_create_restore_point): 1 to 63 bytes without control characters. The
/// server takes any bytes; such names couldn't be written into its settings again.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RestorePointName(String);

/// The longest name in bytes: MAXFNAMELEN less the end of the string (xlog_internal.h).
const MAX_NAME_BYTES: usize = 63;

impl RestorePointName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The text can't be the name of a restore point.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} can't be the name of a restore point: it has 1 to 63 bytes, and neither line breaks nor other control \
     characters"
)]
pub struct InvalidRestorePointName(String);

impl FromStr for RestorePointName {
    type Err = InvalidRestorePointName;

    fn from_str(text: &str) -> Result<RestorePointName, InvalidRestorePointName> {
        if (1..=MAX_NAME_BYTES).contains(&text.len()) && !text.contains(char::is_control) {
            Ok(RestorePointName(text.to_owned()))
        } else {
            Err(InvalidRestorePointName(text.chars().take(80).collect()))
        }
    }
}

impl fmt::Display for RestorePointName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for RestorePointName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for RestorePointName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<RestorePointName, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What the server does at the target (`recovery_target_action`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetAction {
    /// It accepts writes, on a new timeline. PostgreSQL's own default is to pause, which looks like a
    /// restore that hangs.
    #[default]
    Promote,
    /// It answers reads until pg_wal_replay_resume() promotes it. With `hot_standby` off it shuts down.
    Pause,
    /// It shuts down, and can be started again with a later target.
    Shutdown,
}

/// The text is no [`TargetAction`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not what a server can do at its recovery target: promote, pause or shutdown")]
pub struct ParseTargetActionError(String);

impl FromStr for TargetAction {
    type Err = ParseTargetActionError;

    fn from_str(text: &str) -> Result<TargetAction, ParseTargetActionError> {
        match text {
            "promote" => Ok(TargetAction::Promote),
            "pause" => Ok(TargetAction::Pause),
            "shutdown" => Ok(TargetAction::Shutdown),
            other => Err(ParseTargetActionError(other.chars().take(80).collect())),
        }
    }
}

impl fmt::Display for TargetAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TargetAction::Promote => "promote",
            TargetAction::Pause => "pause",
            TargetAction::Shutdown => "shutdown",
        })
    }
}

/// As what a restored server starts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RecoveryMode {
    /// It recovers to its target (`recovery.signal`). What is said here goes into that file.
    Recovery(RecoverySignal),
    /// It follows its archive, and its primary if one is named, until somebody promotes it (`standby.signal`). It has no
    /// target, and follows whatever timeline is the newest.
    Standby {
        /// How its primary is reached, to stream from it; `None` for a standby that is fed by the archive alone.
        primary_conninfo: Option<String>,
    },
}

impl Default for RecoveryMode {
    fn default() -> RecoveryMode {
        RecoveryMode::Recovery(RecoverySignal::default())
    }
}

/// What a restored server is told about its recovery.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RecoverySettings {
    /// As what it starts. A standby has no target and no timeline: those here are without meaning for it.
    pub mode: RecoveryMode,
    /// Where it ends.
    pub target: RecoveryTarget,
    /// Whether the target itself is replayed. Without meaning for `Latest`, `Immediate` and `Name`.
    pub inclusive: bool,
    /// The timeline to end on, as a number: `latest` would follow whatever timeline appears meanwhile.
    pub timeline: TimelineId,
    /// What the server does at the target. At the end of the WAL, without a target, it always promotes.
    pub action: TargetAction,
    /// The shell command that fetches a WAL file, with PostgreSQL's `%f` and `%p`. One line: the server
    /// couldn't keep a line break through a later ALTER SYSTEM.
    pub restore_command: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_of_restore_points_are_checked() {
        for text in ["", "a\nb", "tab\t", "\0", "\u{7f}", "\u{85}", &"x".repeat(64), &"ä".repeat(32)] {
            assert!(text.parse::<RestorePointName>().is_err(), "{text:?}");
        }
        insta::assert_snapshot!("a\nb".parse::<RestorePointName>().unwrap_err(), @r#""a\nb" can't be the name of a restore point: it has 1 to 63 bytes, and neither line breaks nor other control characters"#);
    }

    #[test]
    fn actions_are_written_as_the_server_does() {
        for action in [TargetAction::Promote, TargetAction::Pause, TargetAction::Shutdown] {
            assert_eq!(action.to_string().parse(), Ok(action));
        }
        assert_eq!(TargetAction::default(), TargetAction::Promote);
        insta::assert_snapshot!("Promote".parse::<TargetAction>().unwrap_err(), @r#""Promote" is not what a server can do at its recovery target: promote, pause or shutdown"#);
    }

    proptest! {
        #[test]
        fn names_of_restore_points_are_kept_as_they_are(text in "[^\\p{Cc}]{1,15}") {
            prop_assert_eq!(text.parse::<RestorePointName>().unwrap().to_string(), text);
        }
    }
}
