//! `pgsidecar restore run --in-place`, `restore switch|undo|cancel|clean|list`

use std::{
    io::{BufRead, IsTerminal, Write},
    path::Path,
    sync::Arc,
};

use clap::Args;
use pgsidecar_core::{
    recovery::{RecoveryTarget, RestoreOrder},
    switch::{Phase, Purpose, Switch},
};

use super::{OutputArgs, SystemArgs, open_repository, output, progress::Shown, restore::show_progress};
use crate::{
    client::Client,
    failure::{Code, Failure},
    jobs::{Outcome, Snapshot},
    pgdata::DataDirectory,
    progress::{Phase as JobPhase, Progress},
    restore::{command::restore_command, running::Stopped},
    settings::Settings,
    switch::{self, Asker, Kept, describe, describe_pending},
};

/// `restore clean`
#[derive(Args, Debug)]
pub struct CleanArgs {
    /// Don't ask
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// Restores beside the database: the daemon does it, so that it goes on when the terminal is gone; without one, this process.
pub async fn stage(
    settings: &Settings,
    order: &RestoreOrder,
    system: &SystemArgs,
    output: OutputArgs,
) -> Result<(), Failure> {
    let client = Client::new(&settings.process.control_socket);
    let started: Result<Snapshot, Failure> = match system.system_identifier {
        // The daemon knows its own database only.
        Some(_) => Err(Failure::new(Code::DaemonUnavailable, "")),
        // Nor one that is being restored over.
        None if order.replace && !settings.work()?.pgdata()?.join("PG_VERSION").exists() => {
            Err(Failure::new(Code::DaemonUnavailable, ""))
        }
        None => client.post("/v1/restores", order).await,
    };
    let switch = match started {
        Ok(job) => {
            let mut shown = Shown::new(output.json);
            let ended = client.follow(job.job, |job| show(&mut shown, job)).await;
            drop(shown);
            match ended?.outcome {
                Some(Outcome::Succeeded(switch)) => serde_json::from_value(switch).map_err(Failure::internal)?,
                Some(Outcome::Failed(failure)) => return Err(failure),
                None => return Err(Failure::internal("the job's events ended before the job")),
            }
        }
        Err(failure) if failure.code == Code::DaemonUnavailable => here(settings, order, system, output).await?,
        Err(failure) => return Err(failure),
    };
    if output.json {
        return output::print_json(&switch);
    }
    print_prepared(&switch)
}

async fn here(
    settings: &Settings,
    order: &RestoreOrder,
    system: &SystemArgs,
    output: OutputArgs,
) -> Result<Switch, Failure> {
    let work = settings.work()?;
    let pgdata = work.pgdata()?;
    let repository = open_repository(work, system).await?;
    let progress = Arc::new(Progress::default());
    let shown = show_progress(progress.clone(), output.json);
    let staged = Asker { work, process: &settings.process }.prepare(&repository, pgdata, order, progress).await;
    shown.abort();
    let _ = shown.await;
    staged
}

fn show(shown: &mut Shown, job: &Snapshot) {
    match job.phase {
        JobPhase::Writing => shown.bytes(job.bytes, job.total_bytes, job.estimate, ""),
        _ => shown.doing("planning"),
    }
}

const HOW_TO_SWITCH: &str = "PostgreSQL was not touched. It takes place when PostgreSQL starts the next time:\n  \
    in Kubernetes   kubectl delete pod THIS-POD   (its successor switches first)\n  \
    elsewhere       stop PostgreSQL, pgsidecar restore switch, start PostgreSQL";

fn print_prepared(switch: &Switch) -> Result<(), Failure> {
    let staged = switch.data().and_then(|root| root.staged.as_deref()).unwrap_or(Path::new("?"));
    output::print_line(&format!(
        "Prepared: {} in {}.",
        describe(&switch.purpose).trim_end_matches(','),
        staged.display()
    ))?;
    if let Purpose::Restore { target, to_the_end: false, .. } = &switch.purpose
        && *target == RecoveryTarget::Latest.to_string()
    {
        output::print_line(
            "The database that is there is on another timeline: what it has not archived does not come back.",
        )?;
    }
    output::print_line(HOW_TO_SWITCH)?;
    output::print_line("'pgsidecar restore cancel' takes it back.")
}

/// `restore switch`
pub async fn switch(settings: &Settings, output: OutputArgs) -> Result<(), Failure> {
    let progress = Arc::new(Progress::default());
    let shown = show_progress(progress.clone(), output.json);
    let switched = switch::before_start(settings, settings.work()?.pgdata()?, Stopped::Unknown, progress).await;
    shown.abort();
    let _ = shown.await;
    let Some(switch) = switched? else {
        return Err(Failure::new(
            Code::NotFound,
            "no restore is prepared for this data directory; nothing was changed",
        )
        .hint("'pgsidecar restore run --in-place' prepares one."));
    };
    if output.json { output::print_json(&switch) } else { print_switched(&switch) }
}

/// What a switch has done, for people.
pub fn print_switched(switch: &Switch) -> Result<(), Failure> {
    let kept = switch.kept_data().unwrap_or(Path::new("?")).display();
    if matches!(switch.purpose, Purpose::Replace { .. }) {
        output::print_line(&format!(
            "Done: {}. WAL that wasn't archived is kept in {kept}.",
            describe(&switch.purpose).trim_end_matches(',')
        ))?;
        return output::print_line(
            "Start PostgreSQL: it recovers first. 'pgsidecar restore clean' removes what is kept.",
        );
    }
    output::print_line(&format!(
        "Done: {} is in its place. What was there before is kept in {kept}.",
        describe(&switch.purpose).trim_end_matches(',')
    ))?;
    output::print_line(
        "Start PostgreSQL: it recovers first. When all is well, 'pgsidecar restore clean' removes what is kept; until then 'pgsidecar restore undo' brings it back.",
    )
}

/// `restore undo`
pub async fn undo(settings: &Settings, output: OutputArgs) -> Result<(), Failure> {
    let work = settings.work()?;
    let pgdata = DataDirectory::open(work.pgdata()?)?;
    let system = pgdata.control()?.system_identifier;
    let command = restore_command(&work.helper, settings.process.wal_listen, system, false)?;
    let switch = tokio::task::spawn_blocking(move || switch::undo(&pgdata, &command)).await??;
    if output.json { output::print_json(&switch) } else { print_prepared(&switch) }
}

/// `restore cancel`
pub async fn cancel(settings: &Settings, output: OutputArgs) -> Result<(), Failure> {
    let path = settings.work()?.pgdata()?.to_owned();
    let switch = tokio::task::spawn_blocking(move || switch::cancel(&path)).await??;
    if output.json {
        return output::print_json(&switch);
    }
    output::print_line(&format!("Taken back: {} is not carried out.", describe(&switch.purpose).trim_end_matches(',')))
}

/// `restore list`
pub async fn list(settings: &Settings, output: OutputArgs) -> Result<(), Failure> {
    let path = settings.work()?.pgdata()?.to_owned();
    let kept = tokio::task::spawn_blocking(move || switch::list(&path)).await??;
    if output.json { output::print_json(&kept) } else { print_kept(&kept) }
}

fn print_kept(kept: &Kept) -> Result<(), Failure> {
    if let Some(switch) = &kept.pending {
        let what = describe_pending(switch);
        let state = match switch.phase {
            Phase::Staging => "Being prepared",
            Phase::Ready => "Prepared",
            Phase::Switching => "Under way: PostgreSQL doesn't start until it's gone through with",
            Phase::Done => "Done",
        };
        output::print_line(&format!("{state}: {what} ({})", switch.id))?;
    }
    for switch in &kept.done {
        let before = if matches!(switch.purpose, Purpose::Undo { .. }) { "the undoing" } else { "the restore" };
        let path = switch.kept_data().unwrap_or(Path::new("?"));
        if matches!(switch.purpose, Purpose::Replace { .. }) {
            output::print_line(&format!(
                "Kept WAL that wasn't archived before the restore of {}: {}",
                switch.id,
                path.display()
            ))?;
            continue;
        }
        output::print_line(&format!("Kept from before {before} of {}: {}", switch.id, path.display()))?;
    }
    if kept.pending.is_none() && kept.done.is_empty() {
        output::print_line("Nothing is prepared, and nothing is kept.")?;
    }
    Ok(())
}

/// `restore clean`
pub async fn clean(settings: &Settings, args: CleanArgs) -> Result<(), Failure> {
    let path = settings.work()?.pgdata()?.to_owned();
    let looked = path.clone();
    let kept = tokio::task::spawn_blocking(move || switch::list(&looked)).await??;
    if !args.yes && !kept.done.is_empty() {
        let paths: Vec<String> = kept
            .done
            .iter()
            .flat_map(|switch| &switch.roots)
            .filter(|root| root.kept.exists())
            .map(|root| format!("  {}\n", root.kept.display()))
            .collect();
        confirm(&format!("This deletes what was in the place of the database before:\n{}", paths.concat()), "delete")?;
    }
    let removed = tokio::task::spawn_blocking(move || switch::clean(&path)).await??;
    if args.output.json {
        return output::print_json(&removed);
    }
    if removed.is_empty() {
        return output::print_line("Nothing is kept.");
    }
    removed.iter().try_for_each(|path| output::print_line(&format!("Removed {}", path.display())))
}

/// Asks whether a database may be overwritten.
pub fn confirm_replacement(pgdata: &Path) -> Result<(), Failure> {
    let what = format!(
        "When PostgreSQL starts the next time, the database in {} is overwritten by the restored one: it can't be undone.\n",
        pgdata.display()
    );
    confirm(&what, "replace")
}

/// Asks a person to type a word. Nobody can where there's no terminal.
fn confirm(what: &str, word: &str) -> Result<(), Failure> {
    let refused = |why: &str| {
        Err(Failure::new(Code::InvalidRequest, format!("{why}; nothing was changed"))
            .hint("--yes says that it is meant."))
    };
    if !std::io::stdin().is_terminal() {
        return refused("this has to be confirmed, and stdin is no terminal");
    }
    eprint!("{what}Type '{word}' to go on: ");
    let _ = std::io::stderr().flush();
    let mut line = String::new();
    let read = std::io::stdin().lock().read_line(&mut line);
    if read.is_err() || line.trim() != word {
        return refused("it was not confirmed");
    }
    Ok(())
}
