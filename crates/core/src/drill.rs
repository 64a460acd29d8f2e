//! Drills: a restore that was tried out. Their record, `drills/<id>.json`, says what was tried and how it went.

use std::{fmt, str::FromStr};

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{
    BackupId, Lsn, ParseIdError, SystemIdentifier, TimelineId,
    backup::{format_id_time, parse_id_time},
};

/// The identity of a drill within its cluster: when it began (UTC, to the second), `20261121T061500Z`. Ids sort by time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DrillId {
    began: Timestamp,
}

impl DrillId {
    /// The id of a drill that begins at this time; fractions of the second are dropped.
    pub fn new(began: Timestamp) -> DrillId {
        DrillId { began: Timestamp::from_second(began.as_second()).unwrap_or(began) }
    }

    /// When it began, to the second.
    pub fn began(&self) -> Timestamp {
        self.began
    }
}

impl fmt::Display for DrillId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format_id_time(self.began))
    }
}

impl fmt::Debug for DrillId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for DrillId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<DrillId, ParseIdError> {
        let id = parse_id_time(text).map(|began| DrillId { began });
        id.ok_or_else(|| ParseIdError::new("id of a drill (like 20261121T061500Z)", text))
    }
}

impl Serialize for DrillId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for DrillId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<DrillId, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// How a drill, or a step of it, went.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DrillOutcome {
    /// All that was tried is well.
    Passed,
    /// It doesn't restore, or what was restored isn't right.
    Failed,
    /// It could not be tried out: that says nothing of the backup.
    NotTried,
}

impl fmt::Display for DrillOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            DrillOutcome::Passed => "passed",
            DrillOutcome::Failed => "failed",
            DrillOutcome::NotTried => "not tried",
        })
    }
}

/// One step of a drill.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct DrillStep {
    /// What was tried: `plan`, `wal`, `restore`, `recovery`, `amcheck`, `query`, `checksums`.
    pub step: String,
    /// How it went.
    pub outcome: DrillOutcome,
    /// How long it took.
    pub seconds: f64,
    /// What was found, a sentence for people.
    pub message: String,
    /// What to do about it; may be empty.
    #[serde(default)]
    pub hint: String,
}

/// The newest layout of a drill's record that this code writes and reads.
pub const DRILL_FORMAT: u32 = 1;

/// `drills/<id>.json`: written when a drill has ended, however it went.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct DrillRecord {
    /// [`DRILL_FORMAT`] of the writer.
    pub format: u32,
    /// The drill's id.
    pub id: DrillId,
    /// The database system.
    pub system_identifier: SystemIdentifier,
    /// The pod or host on which it was tried.
    pub instance: String,
    /// When it began.
    pub started_at: Timestamp,
    /// When it had ended.
    pub ended_at: Timestamp,
    /// How it went.
    pub outcome: DrillOutcome,
    /// The recovery target, a text for people.
    pub target: String,
    /// The backup that was restored; `None` if there was none for the target.
    pub backup: Option<BackupId>,
    /// The backups that were restored for it: the full one first, itself last.
    pub chain: Vec<BackupId>,
    /// `server_version_num` of the server that the backup is of; `None` without one.
    pub server_version: Option<u32>,
    /// The timeline that it recovered to.
    pub timeline: Option<TimelineId>,
    /// Where recovery ended; `None` if it didn't end.
    pub reached: Option<Lsn>,
    /// What was tried, in its order.
    pub steps: Vec<DrillStep>,
}

impl DrillRecord {
    /// How the whole went, by its steps: failed if one of them has, passed only if each has.
    pub fn outcome_of(steps: &[DrillStep]) -> DrillOutcome {
        let any = |outcome| steps.iter().any(|step| step.outcome == outcome);
        if any(DrillOutcome::Failed) {
            DrillOutcome::Failed
        } else if any(DrillOutcome::NotTried) || steps.is_empty() {
            DrillOutcome::NotTried
        } else {
            DrillOutcome::Passed
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_a_time_and_one_text_only() {
        let id: DrillId = "20261121T061500Z".parse().unwrap();
        assert_eq!(
            (id.to_string().as_str(), id.began()),
            ("20261121T061500Z", "2026-11-21T06:15:00Z".parse().unwrap())
        );
        for text in ["", "20261121T061500Z-full", "20261321T061500Z", "2026-11-21T06:15:00Z"] {
            assert!(text.parse::<DrillId>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_drill_has_passed_only_if_each_step_has() {
        use DrillOutcome::{Failed, NotTried, Passed};
        let step = |outcome| DrillStep {
            step: "restore".into(),
            outcome,
            seconds: 1.0,
            message: String::new(),
            hint: String::new(),
        };
        for (steps, expected) in [
            (vec![], NotTried),
            (vec![Passed, Passed], Passed),
            (vec![Passed, NotTried], NotTried),
            (vec![NotTried, Failed, Passed], Failed),
        ] {
            let steps: Vec<DrillStep> = steps.into_iter().map(step).collect();
            assert_eq!(DrillRecord::outcome_of(&steps), expected);
        }
    }
}
