//! What the repository remembers of scheduled work.

use std::time::Duration;

use jiff::Timestamp;
use pgsidecar_core::schedule::{RUN_FORMAT, RunId, RunOutcome, RunRecord, Schedule, Slot, Task};

use super::status::{LastSuccess, describe};
use crate::{
    daemon::App,
    failure::{Code, Failure},
    repository::Repository,
    wal::Origins,
};

/// How many records are looked through for the last success.
const LOOK_THROUGH: usize = 5;
/// How often it's tried to write the record of a run that is done.
const TRIES: u32 = 5;
/// How long between the tries.
const BETWEEN_TRIES: Duration = Duration::from_secs(10);

/// Reads what the repository remembers of a task.
pub(super) async fn look(app: &App, task: Task) -> Result<(), Failure> {
    let now = Timestamp::now();
    let Some(schedule) = app.schedules()?.get(&task).map(Schedule::to_string) else { return Ok(()) };
    let repository = app.repository()?;
    let ids = repository.newest_runs(task).await?;
    let (mut newest, mut last_success) = (None, None);
    for id in ids.into_iter().rev().filter(|id| Schedule::trusts(id.time(), now)).take(LOOK_THROUGH) {
        let Some(record) = read(&repository, task, id).await? else { continue };
        newest.get_or_insert_with(|| (id.time(), record.schedule.clone()));
        if let Some(result) = result(&record.outcome) {
            last_success = Some(LastSuccess { scheduled_for: id.time(), ended_at: record.ended_at, result });
            break;
        }
    }
    // A schedule that was changed counts from when that is seen.
    let counts_from = newest.filter(|(_, recorded)| *recorded == schedule).map(|(time, _)| time);
    app.scheduler().change(task, |known| {
        // What was done here and couldn't be recorded is done all the same.
        let own = known.state.counts_from.filter(|own| Schedule::trusts(*own, now));
        if counts_from > own {
            known.state.failed = None;
        }
        known.state.counts_from = counts_from.max(own);
        known.last_success = last_success.or(known.last_success.take());
        known.looked = true;
    });
    Ok(())
}

/// A record; `None` for one that can't be understood, which must not keep the schedule still.
async fn read(repository: &Repository, task: Task, id: RunId) -> Result<Option<RunRecord>, Failure> {
    match repository.run(task, id).await {
        Err(failure) if failure.code == Code::Damaged => {
            tracing::warn!(hint = failure.hint, "a run record is left out: {failure}");
            Ok(None)
        }
        read => read,
    }
}

/// What is told of a run; `None` if nothing ran.
fn result(outcome: &RunOutcome) -> Option<String> {
    match outcome {
        RunOutcome::Begun => None,
        RunOutcome::Succeeded(result) => Some(result.clone()),
        RunOutcome::ServedBy(other) => Some(format!("done by the {}", describe(*other))),
    }
}

/// Notes that a schedule counts from now.
pub(super) async fn begin(app: &App, task: Task, now: Timestamp) -> Result<(), Failure> {
    let time = RunId::new(now).time();
    store(app, task, time, now, RunOutcome::Begun).await?;
    tracing::info!(%task, "a schedule was seen for the first time: it counts from now");
    app.scheduler().change(task, |known| {
        known.state.counts_from = Some(time);
        known.state.failed = None;
    });
    Ok(())
}

/// Notes that a run is done. Where the repository can't be told, this daemon knows it all the same.
pub(super) async fn done(app: &App, task: Task, slot: Slot, started_at: Timestamp, outcome: RunOutcome) {
    app.scheduler().change(task, |known| {
        known.state.counts_from = known.state.counts_from.max(Some(slot.time));
        known.state.failed = None;
        let result = result(&outcome).unwrap_or_default();
        known.last_success = Some(LastSuccess { scheduled_for: slot.time, ended_at: Timestamp::now(), result });
    });
    for attempt in 1..=TRIES {
        match store(app, task, slot.time, started_at, outcome.clone()).await {
            Ok(()) => return,
            Err(failure) => {
                tracing::warn!(%task, scheduled_for = %slot.time, attempt, hint = failure.hint,
                    "a scheduled run is done, and can't be recorded: {failure}");
            }
        }
        tokio::time::sleep(BETWEEN_TRIES).await;
    }
}

async fn store(
    app: &App,
    task: Task,
    time: Timestamp,
    started_at: Timestamp,
    outcome: RunOutcome,
) -> Result<(), Failure> {
    // With it comes cluster.json, before which nothing else is stored.
    let repository = app.origin().await?.repository;
    let record = RunRecord {
        format: RUN_FORMAT,
        id: RunId::new(time),
        task,
        system_identifier: repository.layout().system(),
        instance: app.work_settings()?.instance.clone(),
        schedule: app.schedules()?.get(&task).map(Schedule::to_string).unwrap_or_default(),
        started_at,
        ended_at: Timestamp::now(),
        outcome,
    };
    match repository.store_run(&record).await {
        // Another server has done it as well; or what was stored wasn't told.
        Err(failure) if failure.code == Code::Conflict => Ok(()),
        stored => stored,
    }
}
