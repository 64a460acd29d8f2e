//! `pgsidecar restore plan|run`

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use clap::{Args, Subcommand};
use pgsidecar_core::{
    BackupId, BackupRecord, Lsn, SegmentName, SnapshotId, TimelineId,
    plan::{RestorePlan, RestoreRequest, SnapshotPlan},
    recovery::{RecoveryMode, RecoveryTarget, RestorePointName, TargetAction, parse_target_time},
};

use super::{OutputArgs, SystemArgs, open_repository, output, progress::Shown};
use crate::{
    estimate::Estimate,
    failure::{Code, Failure},
    repository::Repository,
    restore::{self, RestoreOptions, command::restore_command, unpack::Progress},
    settings::Settings,
};

/// Restoring.
#[derive(Subcommand, Debug)]
pub enum RestoreCommand {
    /// Show which backup and which WAL a restore would use; changes nothing
    Plan(PlanArgs),
    /// Restore to a new directory
    Run(RunArgs),
}

/// Where recovery is to end.
#[derive(Args, Debug)]
#[command(next_help_heading = "Recovery target")]
pub struct TargetArgs {
    /// End at this time, with its zone: '2026-11-21 06:15:00+01' [default: the end of the archive]
    #[arg(long, value_name = "TIME", group = "target")]
    target_time: Option<String>,
    /// End at this LSN
    #[arg(long, value_name = "LSN", group = "target")]
    target_lsn: Option<Lsn>,
    /// End at this restore point (pg_create_restore_point); needs --backup or --from-snapshot
    #[arg(long, value_name = "NAME", group = "target")]
    target_name: Option<RestorePointName>,
    /// End at the commit of this transaction
    #[arg(long, value_name = "XID", group = "target")]
    target_xid: Option<u64>,
    /// End as soon as the backup is consistent
    #[arg(long, group = "target")]
    target_immediate: bool,
    /// End on this timeline [default: the newest]
    #[arg(long, value_name = "N")]
    target_timeline: Option<TimelineId>,
    /// Begin with this backup [default: the newest before the target]
    #[arg(long, value_name = "ID")]
    backup: Option<BackupId>,
    /// Begin with this storage snapshot, from which the directory --to was rolled back or cloned
    #[arg(long, value_name = "ID", conflicts_with = "backup")]
    from_snapshot: Option<SnapshotId>,
}

/// `restore plan`
#[derive(Args, Debug)]
pub struct PlanArgs {
    #[command(flatten)]
    system: SystemArgs,
    #[command(flatten)]
    output: OutputArgs,
    // Last: whatever follows would stand under its heading in --help.
    #[command(flatten)]
    target: TargetArgs,
}

/// `restore run`
#[derive(Args, Debug)]
pub struct RunArgs {
    /// Where to restore to: the absolute path of a directory that is empty or doesn't exist; with --from-snapshot, of the
    /// data directory in the snapshot's copy
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// Put the tablespace of OLD into NEW; can be given several times
    #[arg(long, value_name = "OLD=NEW")]
    tablespace_mapping: Vec<String>,
    /// The restored server's restore_command [default: pgsidecar-wal, asking the daemon at --wal-listen]
    #[arg(long, value_name = "COMMAND")]
    restore_command: Option<String>,
    /// Make a standby: it follows the archive, on the newest timeline, until it's promoted
    #[arg(long, conflicts_with_all = ["target", "target_timeline", "target_exclusive", "from_snapshot"])]
    standby: bool,
    /// How the standby reaches its primary, to stream from it as well
    #[arg(long, value_name = "CONNINFO", requires = "standby")]
    primary_conninfo: Option<String>,
    #[command(flatten)]
    system: SystemArgs,
    #[command(flatten)]
    output: OutputArgs,
    // Last: whatever follows would stand under its heading in --help.
    #[command(flatten)]
    target: TargetArgs,
    /// Stop just before the target instead of just after it
    #[arg(long)]
    target_exclusive: bool,
    /// What the server does at the target: promote, pause or shutdown
    #[arg(long, value_name = "ACTION", default_value_t = TargetAction::Promote)]
    target_action: TargetAction,
}

impl RunArgs {
    fn mode(&self) -> RecoveryMode {
        match self.standby {
            true => RecoveryMode::Standby { primary_conninfo: self.primary_conninfo.clone() },
            false => RecoveryMode::default(),
        }
    }
}

impl TargetArgs {
    fn request(&self) -> Result<RestoreRequest, Failure> {
        let target = if let Some(text) = &self.target_time {
            let time =
                parse_target_time(text).map_err(|error| Failure::new(Code::InvalidRequest, error.to_string()))?;
            RecoveryTarget::Time(time)
        } else if let Some(lsn) = self.target_lsn {
            RecoveryTarget::Lsn(lsn)
        } else if let Some(name) = &self.target_name {
            RecoveryTarget::Name(name.clone())
        } else if let Some(xid) = self.target_xid {
            RecoveryTarget::Xid(xid)
        } else if self.target_immediate {
            RecoveryTarget::Immediate
        } else {
            RecoveryTarget::Latest
        };
        Ok(RestoreRequest { target, timeline: self.target_timeline, backup: self.backup })
    }
}

/// Runs one of the commands.
///
/// # Errors
/// What went wrong; what is safe and what to do.
pub async fn run(settings: &Settings, command: RestoreCommand) -> Result<(), Failure> {
    let work = settings.work()?;
    match command {
        RestoreCommand::Plan(args) => {
            let request = args.target.request()?;
            let repository = open_repository(work, &args.system).await?;
            if let Some(id) = args.target.from_snapshot {
                let plan = restore::snapshot::plan(&repository, id, request.target, request.timeline).await?;
                return if args.output.json {
                    output::print_json(&plan)
                } else {
                    print_snapshot_plan(&plan, &repository)
                };
            }
            let plan = restore::plan(&repository, request).await?;
            if args.output.json { output::print_json(&plan) } else { print_plan(&plan, &repository) }
        }
        RestoreCommand::Run(args) => {
            let request = args.target.request()?;
            let tablespaces = parse_mapping(&args.tablespace_mapping)?;
            let repository = open_repository(work, &args.system).await?;
            let restore_command = match &args.restore_command {
                Some(command) => command.clone(),
                None => {
                    let system = repository.layout().system();
                    let tail = request.target == RecoveryTarget::Latest && !args.standby;
                    restore_command(&work.helper, settings.process.wal_listen, system, tail)?
                }
            };
            let options = RestoreOptions {
                to: args.to.clone(),
                mode: args.mode(),
                inclusive: !args.target_exclusive,
                action: args.target_action,
                tablespaces,
                restore_command,
                parallelism: work.parallelism,
            };
            if let Some(id) = args.target.from_snapshot {
                let plan = restore::snapshot::plan(&repository, id, request.target, request.timeline).await?;
                if !args.output.json {
                    print_snapshot_plan(&plan, &repository)?;
                }
                restore::snapshot::run(&plan, &options, work.pgdata.as_deref()).await?;
                if args.output.json {
                    return output::print_json(&plan);
                }
                return print_restored(&options, &plan.target, plan.timeline);
            }
            let plan = restore::plan(&repository, request).await?;
            let progress = Arc::new(Progress::default());
            if !args.output.json {
                print_plan(&plan, &repository)?;
            }
            let shown = show_progress(
                progress.clone(),
                plan.chain.iter().map(BackupRecord::plain_bytes).sum(),
                args.output.json,
            );
            let restored = restore::run(&repository, &plan, &options, progress).await;
            shown.abort();
            let _ = shown.await;
            restored?;
            if args.output.json {
                return output::print_json(&plan);
            }
            print_restored(&options, &plan.target, plan.timeline)
        }
    }
}

fn print_restored(options: &RestoreOptions, target: &RecoveryTarget, timeline: TimelineId) -> Result<(), Failure> {
    if let RecoveryMode::Standby { primary_conninfo } = &options.mode {
        let streams = primary_conninfo.as_ref().map_or("", |_| " and streams from its primary");
        return output::print_line(&format!(
            "Restored to {}. PostgreSQL is a standby when it starts there: it follows the archive{streams}, on the newest timeline, until it's promoted.",
            options.to.display(),
        ));
    }
    output::print_line(&format!(
        "Restored to {}. PostgreSQL recovers to {target} when it starts there, on timeline {timeline}, and then will {}.",
        options.to.display(),
        options.action
    ))?;
    output::print_line(
        "Before a standby is made of it, take the recovery settings out of its postgresql.auto.conf: they'd apply to the standby too.",
    )?;
    output::print_line("If it starts beside the server that it's a copy of, give it another port and archive_mode=off.")
}

fn parse_mapping(texts: &[String]) -> Result<BTreeMap<String, String>, Failure> {
    let parse = |text: &String| {
        let (old, new) = text.split_once('=').ok_or_else(|| {
            Failure::new(Code::InvalidRequest, format!("--tablespace-mapping: {text:?} is not OLD=NEW"))
        })?;
        Ok((old.trim_end_matches('/').to_owned(), new.trim_end_matches('/').to_owned()))
    };
    texts.iter().map(parse).collect()
}

pub(super) fn show_progress(progress: Arc<Progress>, total: u64, json: bool) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        let (mut shown, began) = (Shown::new(json), Instant::now());
        loop {
            let bytes = progress.bytes.load(Relaxed);
            shown.bytes(bytes, total, Estimate::new(bytes, total, began.elapsed()), "");
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    })
}

fn print_plan(plan: &RestorePlan, repository: &Repository) -> Result<(), Failure> {
    let lines = [
        ("From", repository.store().description()),
        (
            "Backup",
            format!(
                "{}, complete at {} ({})",
                plan.backup.id,
                plan.backup.stopped_at.strftime("%Y-%m-%d %H:%M:%SZ"),
                plan.backup.stop_lsn
            ),
        ),
        ("Target", format!("{}, on timeline {}", plan.target, plan.timeline)),
        ("WAL", format!("from {}; without a gap through {} ({})", plan.wal_from, plan.wal_through, plan.reachable)),
        (
            "Size",
            format!(
                "{} to be written, {} to be read",
                output::size(plan.backup.restored_size()),
                output::size(plan.download_bytes)
            ),
        ),
    ];
    for (name, value) in lines {
        output::print_line(&format!("{name:<7} {value}"))?;
        if name == "Backup" && plan.chain.len() > 1 {
            let links: Vec<String> = plan.chain.iter().map(|link| link.id.to_string()).collect();
            output::print_line(&format!("{:<7} {}", "Chain", links.join(", then ")))?;
        }
    }
    for passed in &plan.passed_over {
        output::print_line(&format!(
            "WARNING backup {} is newer but can't be restored: {}",
            passed.backup, passed.because
        ))?;
    }
    print_gap(plan.gap, plan.reachable)
}

fn print_snapshot_plan(plan: &SnapshotPlan, repository: &Repository) -> Result<(), Failure> {
    let SnapshotPlan { snapshot, wal_from, wal_through, reachable, .. } = plan;
    let complete = snapshot.stopped_at.strftime("%Y-%m-%d %H:%M:%SZ");
    let lines = [
        ("From", repository.store().description()),
        ("Snapshot", format!("{}, complete at {complete} ({})", snapshot.id, snapshot.stop_lsn)),
        ("Target", format!("{}, on timeline {}", plan.target, plan.timeline)),
        ("WAL", format!("from {wal_from}; without a gap through {wal_through} ({reachable})")),
    ];
    lines.iter().try_for_each(|(name, value)| output::print_line(&format!("{name:<8} {value}")))?;
    print_gap(plan.gap, plan.reachable)
}

fn print_gap(gap: Option<SegmentName>, reachable: Lsn) -> Result<(), Failure> {
    match gap {
        None => Ok(()),
        Some(missing) => output::print_line(&format!(
            "WARNING {missing} is missing although later WAL is there: what was committed after {reachable} can't be restored"
        )),
    }
}
