//! `pgsidecar restore plan|run`

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use clap::{Args, Subcommand};
use pgsidecar_core::{
    BackupId, Lsn, SnapshotId, TimelineId,
    plan::RestoreRequest,
    recovery::{RecoveryMode, RecoveryTarget, RestoreOrder, RestorePointName, TargetAction, parse_target_time},
};

use super::{
    OutputArgs, SystemArgs,
    in_place::{self, CleanArgs},
    open_repository, output,
    plan::{self, print_plan, print_snapshot_plan},
    progress::Shown,
};
use crate::{
    estimate::Estimate,
    failure::{Code, Failure},
    restore::{self, RestoreOptions, command::restore_command, unpack::Progress},
    settings::Settings,
};

/// Restoring.
#[derive(Subcommand, Debug)]
pub enum RestoreCommand {
    /// Show which backup and which WAL a restore would use; changes nothing
    Plan(PlanArgs),
    /// Restore: to a new directory, or in the place of the database that is there
    Run(RunArgs),
    /// Carry out what was prepared with 'restore run --in-place' or 'restore undo'; no server may run
    Switch(OutputArgs),
    /// Prepare that what was there before the last restore in place comes back
    Undo(OutputArgs),
    /// Take back what is prepared
    Cancel(OutputArgs),
    /// Remove the databases that restores in place have kept
    Clean(CleanArgs),
    /// Show what is prepared, and what is kept
    List(OutputArgs),
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
    /// End at this restore point, the newest of this name; needs --backup or --from-snapshot if it isn't one of
    /// 'restore-point list'
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
    /// Stop just before the target instead of just after it
    #[arg(long)]
    pub(super) target_exclusive: bool,
}

/// What a restore can begin with besides a backup.
#[derive(Args, Debug)]
#[command(next_help_heading = "Recovery target")]
pub struct SnapshotArgs {
    /// Begin with this storage snapshot, from which the directory --to was rolled back or cloned
    #[arg(long, value_name = "ID", conflicts_with = "backup")]
    from_snapshot: Option<SnapshotId>,
}

/// `restore plan`
#[derive(Args, Debug)]
pub struct PlanArgs {
    /// Tell how much room there is where it would be restored to
    #[arg(long, value_name = "DIR")]
    to: Option<PathBuf>,
    #[command(flatten)]
    system: SystemArgs,
    #[command(flatten)]
    output: OutputArgs,
    // Last: whatever follows would stand under its heading in --help.
    #[command(flatten)]
    target: TargetArgs,
    #[command(flatten)]
    snapshot: SnapshotArgs,
}

/// `restore run`
#[derive(Args, Debug)]
pub struct RunArgs {
    /// Where to restore to: the absolute path of a directory that is empty or doesn't exist; with --from-snapshot, of the
    /// data directory in the snapshot's copy
    #[arg(long, value_name = "DIR", required_unless_present = "in_place", conflicts_with = "in_place")]
    to: Option<PathBuf>,
    /// Restore beside the database in PGDATA, to take its place when PostgreSQL starts the next time; what is there now is
    /// kept
    #[arg(long, conflicts_with = "from_snapshot")]
    in_place: bool,
    /// Where there's no room for two: restore over the database in PGDATA when PostgreSQL starts the next time. What is the
    /// same there as in the backup isn't read
    #[arg(long, requires = "in_place")]
    replace: bool,
    /// Don't ask whether the database may be overwritten
    #[arg(long, requires = "replace")]
    yes: bool,
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
    #[command(flatten)]
    snapshot: SnapshotArgs,
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
    /// What the daemon is asked for.
    fn order(&self, args: &RunArgs, tablespaces: BTreeMap<String, String>) -> Result<RestoreOrder, Failure> {
        let RestoreRequest { target, timeline, backup, inclusive } = self.request()?;
        Ok(RestoreOrder {
            target: target.into(),
            timeline,
            backup,
            exclusive: !inclusive,
            action: args.target_action,
            replace: args.replace,
            tablespaces,
            restore_command: args.restore_command.clone(),
        })
    }

    /// The request that these arguments make.
    ///
    /// # Errors
    /// [`Code::InvalidRequest`] if the time isn't one.
    pub(super) fn request(&self) -> Result<RestoreRequest, Failure> {
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
        let (timeline, backup, inclusive) = (self.target_timeline, self.backup, !self.target_exclusive);
        Ok(RestoreRequest { target, timeline, backup, inclusive })
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
            if let Some(id) = args.snapshot.from_snapshot {
                let plan = restore::snapshot::plan(&repository, id, request).await?;
                return if args.output.json {
                    output::print_json(&plan)
                } else {
                    print_snapshot_plan(&plan, &repository)
                };
            }
            let plan = restore::plan(&repository, request).await?;
            let space = args.to.as_deref().and_then(plan::Space::at);
            if args.output.json {
                return output::print_json(&plan::WithSpace { plan: &plan, space });
            }
            print_plan(&plan, &repository)?;
            space.map_or(Ok(()), |space| space.print(&plan))
        }
        RestoreCommand::Run(args) => {
            let tablespaces = parse_mapping(&args.tablespace_mapping)?;
            let Some(to) = &args.to else {
                let order = args.target.order(&args, tablespaces)?;
                if args.replace && !args.yes {
                    in_place::confirm_replacement(work.pgdata()?)?;
                }
                return in_place::stage(settings, &order, &args.system, args.output).await;
            };
            let request = args.target.request()?;
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
                to: to.clone(),
                mode: args.mode(),
                inclusive: !args.target.target_exclusive,
                action: args.target_action,
                tablespaces,
                restore_command,
                parallelism: work.parallelism,
            };
            if let Some(id) = args.snapshot.from_snapshot {
                let plan = restore::snapshot::plan(&repository, id, request).await?;
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
            let shown = show_progress(progress.clone(), args.output.json);
            let restored = restore::run(&repository, &plan, &options, progress).await;
            shown.abort();
            let _ = shown.await;
            restored?;
            if args.output.json {
                return output::print_json(&plan);
            }
            print_restored(&options, &plan.target, plan.timeline)
        }
        RestoreCommand::Switch(output) => in_place::switch(settings, output).await,
        RestoreCommand::Undo(args) => in_place::undo(settings, args).await,
        RestoreCommand::Cancel(output) => in_place::cancel(settings, output).await,
        RestoreCommand::Clean(args) => in_place::clean(settings, args).await,
        RestoreCommand::List(output) => in_place::list(settings, output).await,
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

/// Shows how far a restore is, until the task is aborted.
pub fn show_progress(progress: Arc<Progress>, json: bool) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        let mut shown = Shown::new(json);
        loop {
            let (bytes, total) = (progress.bytes.load(Relaxed), progress.total_bytes.load(Relaxed));
            let estimate = progress.moving_for().and_then(|elapsed| Estimate::new(bytes, total, elapsed));
            shown.bytes(bytes, total, estimate, "");
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    })
}
