//! Scheduled work: which tasks there are, when they're due, and what the repository remembers of them.
//!
//! What a schedule has come to is told by the newest run record of its task, `runs/<task>/<time>.json`, and by nothing
//! else. One is written when a run has succeeded, and one when a schedule is seen for the first time, from which on it
//! counts. A run that failed or was cut off has none, and so is due again.

mod cron;
mod record;
#[cfg(test)]
mod tests;

use std::{fmt, str::FromStr, time::Duration};

use jiff::{SignedDuration, Timestamp, tz::TimeZone};
use serde::{Deserialize, Serialize};

use crate::{ParseIdError, chain::BackupType, content::Sha256Digest, settings::InvalidValue};

pub use cron::{CronExpression, InvalidCron};
pub use record::{RUN_FORMAT, RunId, RunOutcome, RunRecord};

/// What can be done by schedule.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// A full base backup.
    Full,
    /// A base backup of what has changed since the last full one.
    Differential,
    /// A base backup of what has changed since the last one.
    Incremental,
    /// Logical dumps.
    Dump,
    /// Whether the backups in the repository are whole.
    Verify,
    /// Deleting what nobody wants to keep.
    Prune,
}

impl Task {
    /// All of them, in the order in which they're run where several are due.
    pub const ALL: [Task; 6] =
        [Task::Full, Task::Differential, Task::Incremental, Task::Dump, Task::Verify, Task::Prune];

    /// What kind of base backup it is, if it's one.
    pub fn backup_type(self) -> Option<BackupType> {
        match self {
            Task::Full => Some(BackupType::Full),
            Task::Differential => Some(BackupType::Differential),
            Task::Incremental => Some(BackupType::Incremental),
            Task::Dump | Task::Verify | Task::Prune => None,
        }
    }

    /// Whether a run of this task does what the other one was to do: a full backup serves for a differential and an
    /// incremental one, and a differential one for an incremental one.
    pub fn serves(self, other: Task) -> bool {
        self == other || (self.backup_type().is_some() && other.backup_type().is_some() && self < other)
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Task::Full => "full",
            Task::Differential => "differential",
            Task::Incremental => "incremental",
            Task::Dump => "dump",
            Task::Verify => "verify",
            Task::Prune => "prune",
        })
    }
}

impl FromStr for Task {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Task, ParseIdError> {
        let task = Task::ALL.into_iter().find(|task| task.to_string() == text);
        task.ok_or_else(|| ParseIdError::new("task (full, differential, incremental, dump, verify or prune)", text))
    }
}

/// The time zone of this name in the tz database, as far as the program has that.
///
/// # Errors
/// If there is none.
pub fn parse_time_zone(text: &str) -> Result<TimeZone, InvalidValue> {
    let zone = TimeZone::get(text).ok().filter(|zone| zone.iana_name().is_some());
    zone.ok_or_else(|| InvalidValue::new(text, "a time zone's name, like Europe/Berlin or UTC"))
}

/// When something is to be done.
#[derive(Clone, Debug)]
pub struct Schedule {
    cron: CronExpression,
    zone: TimeZone,
    jitter: Duration,
    /// What spreads clusters over the jitter.
    seed: String,
}

/// A run of a schedule.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Slot {
    /// The time that the cron expression names: its identity.
    pub time: Timestamp,
    /// When it begins: within the jitter after that.
    pub begins: Timestamp,
}

/// What is known of a task.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TaskState {
    /// The newest run that is recorded, or the time from which on the schedule counts.
    pub counts_from: Option<Timestamp>,
    /// What has failed since then.
    pub failed: Option<Failed>,
}

/// Runs that failed, one after the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Failed {
    /// How many.
    pub times: u32,
    /// When the last one had failed.
    pub at: Timestamp,
    /// Which run it was.
    pub slot: Timestamp,
}

/// What is to be done about a task.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision {
    /// The schedule is new, or can't be told from the records: note that it counts from now.
    Begin,
    /// Nothing before this run.
    Wait(Slot),
    /// This run is due.
    Run {
        /// The run.
        slot: Slot,
        /// Whether it's late: it makes up for itself and all that were missed before it.
        catch_up: bool,
    },
    /// This run has failed, and is tried again then.
    Retry {
        /// The run.
        slot: Slot,
        /// When.
        at: Timestamp,
    },
    /// It's never due any more.
    Never,
}

/// How late a run may begin before it's said to catch up.
const PUNCTUAL: SignedDuration = SignedDuration::from_mins(5);
/// How long after a failure it's tried again; twice as long after each further one.
const FIRST_RETRY: SignedDuration = SignedDuration::from_mins(1);
/// How long at most.
const LONGEST_RETRY: SignedDuration = SignedDuration::from_hours(1);
/// How far ahead of the clock a record may lie: clocks differ, and are set.
const AHEAD: SignedDuration = SignedDuration::from_hours(24);

impl Schedule {
    /// A schedule of a cluster. The clusters of a name are spread over `jitter`; all tasks of one cluster that are due at
    /// one time stay together, so that a full backup still makes the incremental one needless.
    pub fn new(cron: CronExpression, zone: TimeZone, jitter: Duration, cluster: &str) -> Schedule {
        Schedule { cron, zone, jitter, seed: cluster.to_owned() }
    }

    /// The expression.
    pub fn cron(&self) -> &CronExpression {
        &self.cron
    }

    /// The zone whose clock it goes by.
    pub fn zone(&self) -> &TimeZone {
        &self.zone
    }

    /// The run of this time. Told from cluster and time alone, so that a restart doesn't move it.
    fn slot(&self, time: Timestamp) -> Slot {
        let digest = Sha256Digest::of(format!("{} {time}", self.seed).as_bytes()).to_string();
        let spread = u64::from_str_radix(&digest[..12], 16).unwrap_or(0);
        // Half of the way to the next run at most: each run begins before the next one's time.
        let room =
            self.cron.next_after(time, &self.zone).map_or(i64::MAX, |next| (next.as_second() - time.as_second()) / 2);
        let bound = self.jitter.as_secs().min(room.try_into().unwrap_or(0)).saturating_add(1);
        let delay = i64::try_from(spread % bound).unwrap_or(0);
        Slot { time, begins: time.checked_add(SignedDuration::from_secs(delay)).unwrap_or(time) }
    }

    /// Whether a record for this time can be right. What lies farther ahead of the clock than clocks differ was written
    /// by one that was wrong, and must not keep the schedule still until then.
    pub fn trusts(time: Timestamp, now: Timestamp) -> bool {
        time.duration_since(now) <= AHEAD
    }

    /// The runs after this time.
    pub fn after(&self, after: Timestamp) -> impl Iterator<Item = Slot> {
        let next = |after: Timestamp| self.cron.next_after(after, &self.zone);
        std::iter::successors(next(after), move |last| next(*last)).map(|time| self.slot(time))
    }

    /// What is to be done now. Of several runs that were missed, the last one makes up for all.
    pub fn decide(&self, now: Timestamp, state: &TaskState) -> Decision {
        let Some(from) = state.counts_from.filter(|from| Schedule::trusts(*from, now)) else { return Decision::Begin };
        let Some(time) = self.cron.last_within(from, now, &self.zone) else {
            return self.after(from.max(now)).next().map_or(Decision::Never, Decision::Wait);
        };
        let slot = self.slot(time);
        if slot.begins > now {
            return Decision::Wait(slot);
        }
        if let Some(failed) = state.failed.filter(|failed| failed.slot >= time) {
            // A clock that was set back doesn't make it wait longer than it would have.
            let at = failed.at.min(now).checked_add(backoff(failed.times)).unwrap_or(now);
            if at > now {
                return Decision::Retry { slot, at };
            }
        }
        let others = self.cron.next_after(from, &self.zone).is_some_and(|first| first < time);
        Decision::Run { slot, catch_up: others || now.duration_since(slot.begins) > PUNCTUAL }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.cron, self.zone.iana_name().unwrap_or("UTC"))
    }
}

/// How long to wait after so many failures, one after the other.
fn backoff(times: u32) -> SignedDuration {
    let doubled = 1_i32.checked_shl(times.saturating_sub(1).min(16)).unwrap_or(i32::MAX);
    FIRST_RETRY.checked_mul(doubled).unwrap_or(LONGEST_RETRY).min(LONGEST_RETRY)
}
