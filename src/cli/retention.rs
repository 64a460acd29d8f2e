//! `pgsidecar prune`, `pgsidecar backup pin|unpin|delete`: without a daemon, under this command's own credentials.

use std::process::ExitCode;

use clap::Args;
use jiff::Timestamp;
use pgsidecar_core::{
    BackupId,
    retention::{DumpReason, NeededRange, Reason},
};

use super::{OutputArgs, SystemArgs, open_repository, output};
use crate::{
    failure::{Code, Failure},
    repository::pins,
    retention::{self, Pruned, Refused, Removed},
    settings::Settings,
};

/// `prune`
#[derive(Args, Debug)]
pub struct PruneArgs {
    /// Only say what would go, and why the rest stays
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    system: SystemArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// `backup pin`
#[derive(Args, Debug)]
pub struct PinArgs {
    /// The backup's id
    #[arg(value_name = "ID")]
    id: BackupId,
    /// Why, for whoever finds the pin
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    #[command(flatten)]
    system: SystemArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// `backup unpin`
#[derive(Args, Debug)]
pub struct UnpinArgs {
    /// The backup's id
    #[arg(value_name = "ID")]
    id: BackupId,
    #[command(flatten)]
    system: SystemArgs,
}

/// `backup delete`
#[derive(Args, Debug)]
pub struct DeleteArgs {
    /// The backup's id
    #[arg(value_name = "ID")]
    id: BackupId,
    /// Delete what builds on it, too
    #[arg(long)]
    cascade: bool,
    /// Delete it even if no other backup can be restored then
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    system: SystemArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Prunes.
///
/// # Errors
/// What went wrong. That the store refused some, or that dumps stay because a record can't be read, is a result: the exit
/// code tells it.
pub async fn run(settings: &Settings, args: PruneArgs) -> Result<ExitCode, Failure> {
    let work = settings.work()?;
    let repository = open_repository(work, &args.system).await?;
    let pruned = retention::prune(&repository, &work.retention, Timestamp::now(), args.dry_run).await?;
    if args.output.json {
        output::print_json(&pruned)?;
    } else {
        print(&pruned)?;
    }
    Ok(match pruned.refused.objects {
        0 if pruned.plan.unreadable_dumps.is_empty() => ExitCode::SUCCESS,
        0 => ExitCode::from(Code::Damaged.exit_code()),
        _ => ExitCode::from(Code::StoreDenied.exit_code()),
    })
}

/// Pins a backup.
///
/// # Errors
/// What went wrong.
pub async fn pin(settings: &Settings, args: PinArgs) -> Result<(), Failure> {
    let repository = open_repository(settings.work()?, &args.system).await?;
    let pin = pins::pin(&repository, args.id, &args.reason).await?;
    if args.output.json {
        return output::print_json(&pin);
    }
    let reason = if pin.reason.is_empty() { String::new() } else { format!(" ({})", pin.reason) };
    output::print_line(&format!("Backup {} stays until it's unpinned{reason}.", pin.backup))
}

/// Takes a pin away.
///
/// # Errors
/// What went wrong.
pub async fn unpin(settings: &Settings, args: UnpinArgs) -> Result<(), Failure> {
    let repository = open_repository(settings.work()?, &args.system).await?;
    pins::unpin(&repository, args.id).await?;
    output::print_line(&format!("Backup {} stays as long as the retention says.", args.id))
}

/// Deletes a backup.
///
/// # Errors
/// What went wrong, or why it's refused.
pub async fn delete(settings: &Settings, args: DeleteArgs) -> Result<(), Failure> {
    let repository = open_repository(settings.work()?, &args.system).await?;
    let removed = retention::delete_backup(&repository, args.id, args.cascade, args.force).await?;
    if args.output.json {
        return output::print_json(&removed);
    }
    removed.backups.iter().try_for_each(|id| output::print_line(&format!("Removed  {id}")))?;
    output::print_line(&format!(
        "{} are free. WAL that nothing needs now goes with the next prune.",
        output::size(removed.bytes)
    ))
}

fn print(pruned: &Pruned) -> Result<(), Failure> {
    let Pruned { policy, plan, .. } = pruned;
    if let (Some(window), Some(begin)) = (policy.window, plan.window_begin) {
        output::print_line(&format!(
            "Window   {window}: from {} to {}",
            begin.strftime("%Y-%m-%d %H:%M:%SZ"),
            plan.window_end.strftime("%Y-%m-%d %H:%M:%SZ")
        ))?;
    }
    for backup in plan.backups.iter().filter(|backup| !backup.kept.is_empty()) {
        print_kept(&backup.id.to_string(), backup.kept.iter().map(|why| reason(*why)))?;
    }
    for snapshot in plan.snapshots.iter().filter(|snapshot| !snapshot.kept.is_empty()) {
        print_kept(&snapshot.id.to_string(), snapshot.kept.iter().map(|why| reason(*why)))?;
    }
    for dump in plan.dumps.iter().filter(|dump| !dump.kept.is_empty()) {
        print_kept(&format!("dump {}", dump.id), dump.kept.iter().map(|why| dump_reason(*why).to_owned()))?;
    }
    for timeline in &plan.timelines {
        let ranges: Vec<String> = timeline.needed.iter().map(range).collect();
        let kept = if ranges.is_empty() { "nothing".to_owned() } else { ranges.join(", ") };
        output::print_line(&format!("Keeps    of timeline {}: {kept}", timeline.timeline))?;
    }
    print_removed(pruned)?;
    let Refused { objects, first } = &pruned.refused;
    if *objects > 0 {
        output::print_line(&format!("Refused  {objects} objects stay because the store doesn't remove them:"))?;
        first.iter().try_for_each(|why| output::print_line(&format!("  {why}")))?;
        output::print_line(
            "HINT: These credentials may not delete, or the bucket keeps what it has for a time (object lock). The next prune tries again.",
        )?;
    }
    for unreadable in &plan.unreadable_dumps {
        output::print_line(&format!("All dumps stay: {} can't be read: {}", unreadable.what, unreadable.why))?;
    }
    match pruned.foreign_objects {
        0 => Ok(()),
        some => output::print_line(&format!("Left     {some} objects that aren't pgsidecar's")),
    }
}

fn print_removed(pruned: &Pruned) -> Result<(), Failure> {
    let verb = if pruned.dry_run { "Would go" } else { "Removed " };
    let Removed { backups, remains, snapshots, dumps, records, wal_files, bytes } = &pruned.removed;
    let line = |what: String| output::print_line(&format!("{verb} {what}"));
    backups.iter().try_for_each(|id| line(id.to_string()))?;
    remains.iter().try_for_each(|id| line(format!("what is left of {id}, which was never completed")))?;
    snapshots.iter().try_for_each(|id| line(format!("the record of {id}; the snapshot itself is the storage's")))?;
    dumps.iter().try_for_each(|id| line(format!("dump {id}")))?;
    if *records > 0 {
        line(format!("{records} records of drills and scheduled runs that are older than 400 days"))?;
    }
    line(format!("{wal_files} files of WAL; {} in all", output::size(*bytes)))
}

fn print_kept(what: &str, reasons: impl Iterator<Item = String>) -> Result<(), Failure> {
    output::print_line(&format!("Keeps    {what}: {}", reasons.collect::<Vec<_>>().join(", ")))
}

fn range(needed: &NeededRange) -> String {
    match needed.last {
        None => format!("{} and all that follow", needed.first),
        Some(last) if last == needed.first => last.to_string(),
        Some(last) => format!("{} to {last}", needed.first),
    }
}

fn reason(reason: Reason) -> String {
    match reason {
        Reason::NoWindow => "there is no recovery window".to_owned(),
        Reason::Window => "within the window".to_owned(),
        Reason::WindowBegin => "leads to the beginning of the window".to_owned(),
        Reason::Redundancy => "one of the full backups that stay at least".to_owned(),
        Reason::NothingBetter => "nothing better leads to its timeline".to_owned(),
        Reason::Pinned => "pinned".to_owned(),
        Reason::Held => "the store didn't let it go".to_owned(),
        Reason::BuiltOnBy(id) => format!("{id} builds on it"),
    }
}

fn dump_reason(reason: DumpReason) -> &'static str {
    match reason {
        DumpReason::Last => "one of the last",
        DumpReason::Daily => "of its day",
        DumpReason::Weekly => "of its week",
        DumpReason::Monthly => "of its month",
        DumpReason::Yearly => "of its year",
        DumpReason::Ahead => "of a time that hasn't come",
    }
}
