//! `pgsidecar backup create|list|show|verify`, and the way to what changes which backups stay

use std::{
    collections::BTreeSet,
    process::ExitCode,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use clap::{Args, Subcommand};
use pgsidecar_core::{
    BackupId, BackupKind, BackupRecord,
    backup::DamagedFile,
    chain::{BackupType, Choice},
};

use super::{
    OutputArgs, SystemArgs, open_repository, output,
    progress::Shown,
    retention::{self, DeleteArgs, PinArgs, UnpinArgs},
};
use crate::{
    backup::verify::{Verification, VerifyProgress, verify},
    client::Client,
    estimate::Estimate,
    failure::{Code, Failure},
    http::control::CreateBackup,
    jobs::{Outcome, Snapshot},
    progress::Phase,
    repository::pins,
    settings::{Settings, parse_rate},
};

/// Base backups.
#[derive(Subcommand, Debug)]
pub enum BackupCommand {
    /// Take a base backup; the daemon does it
    Create(CreateArgs),
    /// List the complete backups
    List(ListArgs),
    /// Show one backup
    Show(ShowArgs),
    /// Check that backups can be restored; ends with 65 if something is missing or damaged
    Verify(VerifyArgs),
    /// Keep a backup whatever the retention says
    Pin(PinArgs),
    /// Keep a backup no longer than the retention says
    Unpin(UnpinArgs),
    /// Delete a backup now
    Delete(DeleteArgs),
}

/// `backup create`
#[derive(Args, Debug)]
pub struct CreateArgs {
    /// Take the checkpoint at once instead of spreading it: the backup begins sooner, PostgreSQL writes more for a moment
    #[arg(long)]
    fast: bool,
    /// Which kind: auto (incremental where that is possible, else full), full, differential or incremental
    #[arg(long = "type", value_name = "TYPE", default_value_t)]
    wanted: BackupType,
    /// Only say which kind of backup it would be, and why
    #[arg(long, conflicts_with_all = ["fast", "label", "max_rate"])]
    dry_run: bool,
    /// Read at most this much of the data directory in a second, from 32kB on
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    max_rate: Option<u64>,
    /// A label that PostgreSQL keeps in the backup
    #[arg(long, value_name = "TEXT")]
    label: Option<String>,
    #[command(flatten)]
    output: OutputArgs,
}

/// `backup list`
#[derive(Args, Debug)]
pub struct ListArgs {
    #[command(flatten)]
    system: SystemArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// `backup show`
#[derive(Args, Debug)]
pub struct ShowArgs {
    /// The backup's id
    #[arg(value_name = "ID")]
    id: BackupId,
    #[command(flatten)]
    system: SystemArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// `backup verify`
#[derive(Args, Debug)]
pub struct VerifyArgs {
    /// Only this backup, with those that it builds on
    #[arg(value_name = "ID")]
    id: Option<BackupId>,
    /// Read all of it, too, and check every part and every file in it
    #[arg(long)]
    deep: bool,
    #[command(flatten)]
    system: SystemArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs one of the commands.
///
/// # Errors
/// What went wrong. That a backup is damaged is a result, not an error: the exit code tells it.
pub async fn run(settings: &Settings, command: BackupCommand) -> Result<ExitCode, Failure> {
    let done = match command {
        BackupCommand::Verify(args) => return run_verify(settings, args).await,
        BackupCommand::Create(args) => create(settings, args).await,
        BackupCommand::List(args) => {
            let repository = open_repository(settings.work()?, &args.system).await?;
            let backups = repository.backups().await?;
            match args.output.json {
                true => output::print_json(&backups),
                false => print_list(&backups, &pins::list(&repository).await?),
            }
        }
        BackupCommand::Pin(args) => retention::pin(settings, args).await,
        BackupCommand::Unpin(args) => retention::unpin(settings, args).await,
        BackupCommand::Delete(args) => retention::delete(settings, args).await,
        BackupCommand::Show(args) => {
            let backup = open_repository(settings.work()?, &args.system).await?.backup(args.id).await?;
            let backup = backup.ok_or_else(|| {
                Failure::new(Code::NotFound, format!("there is no backup {}", args.id))
                    .hint("'pgsidecar backup list' shows them.")
            })?;
            if args.output.json { output::print_json(&backup) } else { print_backup(&backup) }
        }
    };
    done.map(|()| ExitCode::SUCCESS)
}

async fn run_verify(settings: &Settings, args: VerifyArgs) -> Result<ExitCode, Failure> {
    let work = settings.work()?;
    let repository = open_repository(work, &args.system).await?;
    let readers = if args.deep { work.parallelism } else { 0 };
    let progress = Arc::new(VerifyProgress::default());
    let (looked, began, json) = (progress.clone(), Instant::now(), args.output.json);
    let shown = tokio::spawn(async move {
        let mut shown = Shown::new(json);
        loop {
            let (done, total) = (looked.read_bytes.load(Relaxed), looked.total_bytes.load(Relaxed));
            shown.bytes(done, total, Estimate::new(done, total, began.elapsed()), "");
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    });
    let verified = verify(&repository, args.id, readers, &progress).await;
    shown.abort();
    let _ = shown.await;
    let verified = verified?;
    if args.output.json {
        output::print_json(&verified)?
    } else {
        print_verification(&verified)?
    }
    Ok(if verified.ok { ExitCode::SUCCESS } else { ExitCode::from(Code::Damaged.exit_code()) })
}

fn print_verification(verified: &Verification) -> Result<(), Failure> {
    if verified.backups.is_empty() {
        return output::print_line("There is no backup.");
    }
    for backup in &verified.backups {
        let how = match (backup.ok, backup.read) {
            (true, true) => "whole",
            (true, false) => "all there; whether it's whole was not looked at (--deep does)",
            (false, _) if backup.problems.is_empty() => "whole, but the database was damaged",
            (false, _) => "DAMAGED",
        };
        output::print_line(&format!("{}  {how}", backup.backup))?;
        backup.problems.iter().try_for_each(|problem| output::print_line(&format!("  {problem}")))?;
        print_damaged(&backup.damaged)?;
    }
    if verified.ok {
        return Ok(());
    }
    output::print_line(
        "HINT: Take a full backup now ('pgsidecar backup create --type full'). What is missing or damaged may be had back \
         where the store keeps older versions; pages that are damaged in the database itself, from an older backup.",
    )
}

async fn create(settings: &Settings, args: CreateArgs) -> Result<(), Failure> {
    let client = Client::new(&settings.process.control_socket);
    let CreateArgs { label, fast, wanted, max_rate, .. } = args;
    let request = CreateBackup { label, fast, wanted, max_rate };
    if args.dry_run {
        let choice: Choice = client.post("/v1/backups/plan", &request).await?;
        return if args.output.json { output::print_json(&choice) } else { print_choice(&choice) };
    }
    let job: Snapshot = client.post("/v1/backups", &request).await?;
    let mut shown = Shown::new(args.output.json);
    let ended = client.follow(job.job, |job| show(&mut shown, job)).await;
    drop(shown);
    let record: BackupRecord = match ended?.outcome {
        Some(Outcome::Succeeded(record)) => serde_json::from_value(record).map_err(Failure::internal)?,
        Some(Outcome::Failed(failure)) => return Err(failure),
        None => return Err(Failure::internal("the job's events ended before the job")),
    };
    if args.output.json { output::print_json(&record) } else { print_backup(&record) }
}

fn print_choice(choice: &Choice) -> Result<(), Failure> {
    let parent = choice.parent.map_or_else(String::new, |parent| format!(", on {parent}"));
    output::print_line(&format!(
        "It would be {} {} backup{parent}: {}.",
        article(choice.kind),
        choice.kind,
        choice.because
    ))
}

fn article(kind: BackupKind) -> &'static str {
    if kind == BackupKind::Incremental { "an" } else { "a" }
}

fn show(shown: &mut Shown, job: &Snapshot) {
    match job.phase {
        Phase::Checkpoint => shown.doing("waiting for the checkpoint"),
        Phase::Summaries => shown.doing("looking for what has changed"),
        Phase::Reading => {
            shown.bytes(job.bytes, job.total_bytes, job.estimate, &format!("{} files", job.files));
        }
        Phase::Wal => shown.doing("waiting for the WAL to be archived"),
        Phase::Writing | Phase::Dumping => shown.bytes(job.bytes, job.total_bytes, job.estimate, ""),
    }
}

fn print_list(backups: &[BackupRecord], pins: &BTreeSet<BackupId>) -> Result<(), Failure> {
    if backups.is_empty() {
        eprintln!("no backups yet; 'pgsidecar backup create' takes one");
        return Ok(());
    }
    let rows: Vec<[String; 7]> = backups
        .iter()
        .map(|backup| {
            [
                backup.id.to_string(),
                backup.stopped_at.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
                backup.timeline.to_string(),
                backup.stop_lsn.to_string(),
                output::size(backup.restored_size()),
                output::size(backup.stored_bytes()),
                if pins.contains(&backup.id) { "pinned".to_owned() } else { String::new() },
            ]
        })
        .collect();
    output::print_table(["BACKUP", "COMPLETE", "TIMELINE", "LSN", "DATABASE", "STORED", ""], &rows)
}

fn print_backup(backup: &BackupRecord) -> Result<(), Failure> {
    let lines = [
        ("Backup", backup.id.to_string()),
        ("Kind", backup.id.kind().to_string()),
        ("Complete", backup.stopped_at.strftime("%Y-%m-%d %H:%M:%SZ").to_string()),
        ("WAL", format!("{} to {} on timeline {}", backup.start_lsn, backup.stop_lsn, backup.timeline)),
        (
            "Server",
            format!("PostgreSQL {}{}", backup.major_version(), if backup.from_standby { ", a standby" } else { "" }),
        ),
        ("Database", format!("{} in {} files", output::size(backup.restored_size()), backup.files)),
        ("Stored", format!("{} in {} parts", output::size(backup.stored_bytes()), backup.parts.len())),
    ];
    for (name, value) in lines {
        output::print_line(&format!("{name:<10} {value}"))?;
    }
    for tablespace in &backup.tablespaces {
        output::print_line(&format!("Tablespace {} at {}", tablespace.oid, tablespace.location))?;
    }
    if let Some(parent) = backup.parent {
        output::print_line(&format!("Builds on  {parent}"))?;
    }
    print_damaged(&backup.damaged)?;
    backup.warnings.iter().try_for_each(|warning| output::print_line(&format!("Warning    {warning}")))
}

fn print_damaged(files: &[DamagedFile]) -> Result<(), Failure> {
    for file in files {
        let relation = file.relation.as_deref().unwrap_or(&file.path);
        let blocks: Vec<String> = file.blocks.iter().map(u32::to_string).collect();
        let more = if file.count > file.blocks.len() as u64 { ", …" } else { "" };
        output::print_line(&format!(
            "Damaged    {relation} ({}): {} pages: blocks {}{more}",
            file.path,
            file.count,
            blocks.join(", ")
        ))?;
    }
    Ok(())
}
