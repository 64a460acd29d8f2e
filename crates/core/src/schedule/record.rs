//! Run records: `runs/<task>/<time>.json`.

use std::{fmt, str::FromStr};

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::Task;
use crate::{
    ParseIdError, SystemIdentifier,
    backup::{format_id_time, parse_id_time},
};

/// The identity of a run within its task: the time that it was scheduled for (UTC, to the second), `20261121T020000Z`.
/// Ids sort by time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RunId {
    time: Timestamp,
}

impl RunId {
    /// The id of the run for this time; fractions of the second are dropped.
    pub fn new(time: Timestamp) -> RunId {
        RunId { time: Timestamp::from_second(time.as_second()).unwrap_or(time) }
    }

    /// The time that it was scheduled for.
    pub fn time(&self) -> Timestamp {
        self.time
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format_id_time(self.time))
    }
}

impl fmt::Debug for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for RunId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<RunId, ParseIdError> {
        let id = parse_id_time(text).map(|time| RunId { time });
        id.ok_or_else(|| ParseIdError::new("id of a run (like 20261121T020000Z)", text))
    }
}

impl Serialize for RunId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for RunId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<RunId, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The newest layout of a run record that this code writes and reads.
pub const RUN_FORMAT: u32 = 1;

/// What a record tells of.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunOutcome {
    /// Nothing ran: the schedule was seen for the first time, and counts from then.
    Begun,
    /// It was done, with this result: a backup's id, or a sentence for people.
    Succeeded(String),
    /// Another task's run, due at the same time, did it.
    ServedBy(Task),
}

/// `runs/<task>/<time>.json`: written when a run has succeeded, and when a schedule begins.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RunRecord {
    /// [`RUN_FORMAT`] of the writer.
    pub format: u32,
    /// The run's id.
    pub id: RunId,
    /// What was done.
    pub task: Task,
    /// The database system.
    pub system_identifier: SystemIdentifier,
    /// The pod or host that did it.
    pub instance: String,
    /// The cron expression and the zone by which it was due.
    pub schedule: String,
    /// When it began.
    pub started_at: Timestamp,
    /// When it had ended.
    pub ended_at: Timestamp,
    /// What came of it.
    pub outcome: RunOutcome,
}
