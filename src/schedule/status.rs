//! What is known of scheduled work, and how it's told.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use jiff::Timestamp;
use pgsidecar_core::schedule::{Decision, Schedule, Task, TaskState};
use serde::{Deserialize, Serialize};

use crate::failure::Failure;

/// How many of the next runs are told.
const UPCOMING: usize = 3;

/// A run that succeeded.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LastSuccess {
    /// The time of the schedule.
    pub scheduled_for: Timestamp,
    /// When it had ended.
    pub ended_at: Timestamp,
    /// What came of it: a backup's id, or a sentence for people.
    pub result: String,
}

/// A run that failed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LastFailure {
    /// When.
    pub at: Timestamp,
    /// Why.
    #[serde(flatten)]
    pub failure: Failure,
}

/// What is told of a task: `GET /v1/schedule`, and `schedule` in the status.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ScheduleStatus {
    /// What is done.
    pub task: Task,
    /// The cron expression.
    pub cron: String,
    /// The zone whose clock it goes by.
    pub time_zone: String,
    /// When it begins next: also a run that is due and waits, or is tried again.
    pub next: Option<Timestamp>,
    /// The next times by the schedule, with their jitter.
    pub upcoming: Vec<Timestamp>,
    /// Since when it's under way.
    pub running_since: Option<Timestamp>,
    /// Why a run that is due doesn't begin yet.
    pub waiting: Option<String>,
    /// The last run that succeeded, of those the repository remembers.
    pub last_success: Option<LastSuccess>,
    /// How many runs have failed since then, while this daemon ran.
    pub failures: u32,
    /// The last of those.
    pub last_failure: Option<LastFailure>,
}

impl ScheduleStatus {
    /// What the settings alone tell.
    pub fn by_schedule(task: Task, schedule: &Schedule, now: Timestamp) -> ScheduleStatus {
        let upcoming: Vec<Timestamp> = schedule.after(now).map(|slot| slot.begins).take(UPCOMING).collect();
        ScheduleStatus {
            task,
            cron: schedule.cron().to_string(),
            time_zone: schedule.zone().iana_name().unwrap_or("UTC").to_owned(),
            next: upcoming.first().copied(),
            upcoming,
            running_since: None,
            waiting: None,
            last_success: None,
            failures: 0,
            last_failure: None,
        }
    }

    /// What is wrong with it, if the last run failed.
    pub fn problem(&self) -> Option<Failure> {
        let LastFailure { at, failure } = self.last_failure.as_ref().filter(|_| self.failures > 0)?;
        let times = if self.failures == 1 { "once".to_owned() } else { format!("{} times", self.failures) };
        Some(failure.clone().context(format!("the scheduled {} failed {times}, last at {at}", describe(self.task))))
    }
}

/// A task in words.
pub(super) fn describe(task: Task) -> String {
    match task.backup_type() {
        Some(kind) => format!("{kind} backup"),
        None => task.to_string(),
    }
}

/// What is known of a task.
#[derive(Clone, Debug, Default)]
pub(super) struct Known {
    /// By the repository, and by what failed here.
    pub state: TaskState,
    /// Whether the repository was asked.
    pub looked: bool,
    pub running_since: Option<Timestamp>,
    pub waiting: Option<String>,
    pub last_success: Option<LastSuccess>,
    pub last_failure: Option<LastFailure>,
}

/// What the daemon knows of its scheduled work.
#[derive(Debug, Default)]
pub struct Scheduler {
    tasks: Mutex<BTreeMap<Task, Known>>,
}

impl Scheduler {
    /// How the tasks stand.
    pub fn status(&self, schedules: &BTreeMap<Task, Schedule>, now: Timestamp) -> Vec<ScheduleStatus> {
        let tell = |(task, schedule): (&Task, &Schedule)| {
            let known = self.known(*task);
            let status = ScheduleStatus::by_schedule(*task, schedule, now);
            let next = match schedule.decide(now, &known.state) {
                Decision::Wait(slot) => Some(slot.begins),
                Decision::Run { slot, .. } => Some(slot.begins),
                Decision::Retry { at, .. } => Some(at),
                Decision::Begin => status.next,
                Decision::Never => None,
            };
            ScheduleStatus {
                next,
                running_since: known.running_since,
                waiting: known.waiting,
                last_success: known.last_success,
                failures: known.state.failed.map_or(0, |failed| failed.times),
                last_failure: known.last_failure,
                ..status
            }
        };
        schedules.iter().map(tell).collect()
    }

    pub(super) fn known(&self, task: Task) -> Known {
        self.lock().get(&task).cloned().unwrap_or_default()
    }

    pub(super) fn change(&self, task: Task, change: impl FnOnce(&mut Known)) {
        change(self.lock().entry(task).or_default());
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Task, Known>> {
        // Each change is a whole one: what a panic left can be gone on with.
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
