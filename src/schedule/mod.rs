//! Work that the daemon does by itself. When, is decided in `pgsidecar_core::schedule`; here it's looked at the clock,
//! and what is due is done.
//!
//! What has been done is told by the run records in the repository, so that it survives restarts and failovers. They are
//! read before each run, then the server is asked whether it's in recovery: on a standby nothing is run. The record is
//! written when a run has succeeded. A daemon that dies in between leaves none, and the run is due again. One task runs
//! at a time.

mod records;
mod status;

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use pgsidecar_core::schedule::{Decision, Failed, RunOutcome, Schedule, Slot, Task};
use serde_json::Value;
use tokio::sync::watch;

use crate::{
    backup::{self, BackupRequest},
    daemon::App,
    dump::DumpRequest,
    failure::{Code, Failure},
    jobs::{Job, Outcome},
    postgres::Session,
    wal::{self, verify::VerifyOptions},
};

pub use status::{LastFailure, LastSuccess, ScheduleStatus, Scheduler};

/// How long the clock isn't looked at, at most: it can be set, and a machine can sleep.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);
/// How long is waited when something stands in the way that isn't the run's own failure.
const LOOK_AGAIN: Duration = Duration::from_secs(20);
/// How long at least.
const SHORTEST_SLEEP: Duration = Duration::from_millis(100);

/// Does what is due, until the daemon stops.
pub async fn run(app: Arc<App>, mut stop: watch::Receiver<bool>) {
    if app.schedules().map_or(true, |schedules| schedules.is_empty()) {
        return;
    }
    let work = async {
        loop {
            let pause = match turn(&app).await {
                Ok(pause) => pause,
                Err(failure) => {
                    note_waiting(&app, &failure);
                    LOOK_AGAIN
                }
            };
            tokio::time::sleep(pause).await;
        }
    };
    // A backup that is under way is a job, and is ended as one.
    tokio::select! {
        () = work => {}
        _ = stop.wait_for(|stop| *stop) => {}
    }
}

/// Does one thing that is due; answers with how long nothing will be.
///
/// # Errors
/// Why it can't be told what is due, or must not be done yet. That is no run that failed.
async fn turn(app: &Arc<App>) -> Result<Duration, Failure> {
    let (schedules, scheduler) = (app.schedules()?, app.scheduler());
    for task in schedules.keys().filter(|task| !scheduler.known(**task).looked) {
        records::look(app, *task).await?;
    }
    if decide(app, Timestamp::now())?.is_empty() {
        return until_next(app);
    }
    let ready = ready(app).await;
    let now = Timestamp::now();
    let due = decide(app, now)?;
    let runs = due.iter().filter_map(|(task, decision)| match decision {
        Decision::Run { slot, catch_up } => Some((*task, *slot, *catch_up)),
        _ => None,
    });
    match ready {
        Ok(false) => {}
        Ok(true) if due.is_empty() => return until_next(app),
        Ok(true) => return Err(Failure::new(Code::Busy, "the server is in recovery: its primary does it")),
        Err(failure) if runs.clone().next().is_none() => return Err(failure),
        Err(failure) => {
            runs.for_each(|(task, slot, _)| note_failure(app, task, slot, failure.clone()));
            return until_next(app);
        }
    }
    for (task, _) in due.iter().filter(|(_, decision)| *decision == Decision::Begin) {
        records::begin(app, *task, now).await?;
    }
    let Some((task, slot, catch_up)) = runs.clone().next() else { return until_next(app) };
    tracing::info!(%task, scheduled_for = %slot.time, catch_up, "a scheduled run begins");
    scheduler.change(task, |known| (known.running_since, known.waiting) = (Some(now), None));
    let done = run_task(app, task, slot).await;
    scheduler.change(task, |known| known.running_since = None);
    match done {
        Ok(result) => {
            tracing::info!(%task, scheduled_for = %slot.time, result, "a scheduled run is done");
            records::done(app, task, slot, now, RunOutcome::Succeeded(result)).await;
            // What else was due when it began, and has been done by it.
            let due_as_well = schedules.iter().filter(|(other, _)| **other != task && task.serves(**other));
            for (other, schedule) in due_as_well {
                let decision = schedule.decide(now, &scheduler.known(*other).state);
                if let Decision::Run { slot, .. } | Decision::Retry { slot, .. } = decision {
                    records::done(app, *other, slot, now, RunOutcome::ServedBy(task)).await;
                }
            }
            Ok(Duration::ZERO)
        }
        Err(failure) if matches!(failure.code, Code::Busy | Code::Stopping) => Err(failure),
        Err(failure) => {
            note_failure(app, task, slot, failure);
            Ok(Duration::ZERO)
        }
    }
}

/// Whether the server is in recovery, once it's known what other servers have done: there may have been a failover.
async fn ready(app: &Arc<App>) -> Result<bool, Failure> {
    for task in app.schedules()?.keys() {
        records::look(app, *task).await?;
    }
    let session = Session::connect(&app.work_settings()?.connection).await?;
    Ok(session.server().in_recovery)
}

/// Does a task; answers with what came of it, for people.
async fn run_task(app: &Arc<App>, task: Task, slot: Slot) -> Result<String, Failure> {
    match task {
        Task::Full | Task::Differential | Task::Incremental => {
            let wanted = task.backup_type().unwrap_or_default();
            let label = format!("pgsidecar {task}, scheduled for {}", slot.time);
            let record =
                ended(&app.start_backup(BackupRequest { label, fast: false, wanted, max_rate: None })?).await?;
            Ok(record["id"].as_str().unwrap_or_default().to_owned())
        }
        Task::Verify => {
            let found = backup::verify::verify(&app.repository()?, None, 0, &Arc::default()).await?;
            let bad: Vec<String> =
                found.backups.iter().filter(|one| !one.ok).map(|one| one.backup.to_string()).collect();
            if !found.ok || !bad.is_empty() {
                return Err(Failure::new(
                    Code::Damaged,
                    format!("these backups can't be restored: {}", bad.join(", ")),
                )
                .hint("'pgsidecar backup verify' tells what is missing or damaged. Take a full backup."));
            }
            // Without a backup no WAL is needed.
            if found.backups.is_empty() {
                return Ok("there is no backup".to_owned());
            }
            let options = VerifyOptions { timeline: None, readers: 0 };
            let archive = wal::verify::verify(&app.repository()?, options, &Arc::default()).await?;
            if !archive.ok {
                return Err(Failure::new(Code::Damaged, "WAL is missing in the repository that restores could need")
                    .hint("'pgsidecar wal verify' tells what is missing and which backups it cuts short. Take a full backup: restores to later moments then don't need it."));
            }
            Ok(format!("{} backups are whole, and so is the WAL behind them", found.backups.len()))
        }
        Task::Dump => {
            let record = ended(&app.start_dump(DumpRequest::default())?).await?;
            Ok(record["id"].as_str().unwrap_or_default().to_owned())
        }
        Task::Prune => {
            let pruned = ended(&app.start_prune(false)?).await?;
            let count = |pointer: &str| pruned.pointer(pointer).and_then(Value::as_array).map_or(0, Vec::len);
            let unreadable = count("/plan/unreadable_dumps");
            match pruned.pointer("/refused/objects").and_then(Value::as_u64).unwrap_or(0) {
                0 if unreadable > 0 => {
                    Err(Failure::new(Code::Damaged, format!("no dump was removed: {unreadable} records of dumps can't be read"))
                        .hint("'pgsidecar prune --dry-run' says which, and why."))
                }
                0 => Ok(format!(
                    "{} backups, {} dumps and {} WAL files removed",
                    count("/removed/backups"),
                    count("/removed/dumps"),
                    pruned.pointer("/removed/wal_files").and_then(Value::as_u64).unwrap_or(0)
                )),
                refused => Err(Failure::new(Code::StoreDenied, format!("the store refused to delete {refused} objects"))
                    .hint("Give the pod's credentials the right to delete, or prune elsewhere under other ones ('pgsidecar prune') and unset PGSIDECAR_SCHEDULE_PRUNE.")),
            }
        }
    }
}

/// Waits for a job; answers with its result.
async fn ended(job: &Arc<Job>) -> Result<Value, Failure> {
    job.ended(Duration::MAX).await;
    match job.snapshot().outcome {
        Some(Outcome::Succeeded(result)) => Ok(result),
        Some(Outcome::Failed(failure)) => Err(failure),
        None => Err(Failure::internal("a job has ended and not said how")),
    }
}

/// What is due: runs, and schedules that begin.
fn decide(app: &App, now: Timestamp) -> Result<Vec<(Task, Decision)>, Failure> {
    let decide = |(task, schedule): (&Task, &Schedule)| {
        let decision = schedule.decide(now, &app.scheduler().known(*task).state);
        let due = matches!(decision, Decision::Begin | Decision::Run { .. });
        // Whatever it waited for.
        app.scheduler().change(*task, |known| known.waiting = known.waiting.take().filter(|_| due));
        due.then_some((*task, decision))
    };
    Ok(app.schedules()?.iter().filter_map(decide).collect())
}

fn until_next(app: &App) -> Result<Duration, Failure> {
    let now = Timestamp::now();
    let times = app.scheduler().status(app.schedules()?, now).into_iter().filter_map(|status| status.next);
    let waits = times.map(|next| Duration::try_from(next.duration_since(now)).unwrap_or_default());
    Ok(waits.min().unwrap_or(LONGEST_SLEEP).clamp(SHORTEST_SLEEP, LONGEST_SLEEP))
}

/// Says why what is due doesn't begin.
fn note_waiting(app: &App, failure: &Failure) {
    let Ok(schedules) = app.schedules() else { return };
    let now = Timestamp::now();
    for (task, schedule) in schedules {
        app.scheduler().change(*task, |known| {
            let due = matches!(schedule.decide(now, &known.state), Decision::Begin | Decision::Run { .. });
            let told = known.waiting.as_ref() == Some(&failure.message);
            if due && !told {
                tracing::info!(%task, hint = failure.hint, "a scheduled run waits: {failure}");
            }
            known.waiting = due.then(|| failure.message.clone());
        });
    }
}

fn note_failure(app: &App, task: Task, slot: Slot, failure: Failure) {
    let at = Timestamp::now();
    tracing::error!(%task, scheduled_for = %slot.time, hint = failure.hint, "a scheduled run failed: {failure}");
    app.scheduler().change(task, |known| {
        let times = known.state.failed.map_or(0, |failed| failed.times).saturating_add(1);
        known.state.failed = Some(Failed { times, at, slot: slot.time });
        known.last_failure = Some(LastFailure { at, failure });
        known.waiting = None;
    });
}
