//! The command line: one grammar, `pgsidecar NOUN VERB`. What is printed for people goes through [`output`]; `--json`
//! prints one JSON document instead. Results go to stdout, everything else to stderr.

pub mod backup;
pub mod check;
pub mod drill;
pub mod dump;
pub mod extract;
mod in_place;
pub mod output;
pub mod plan;
pub mod prepare;
pub mod progress;
pub mod restore;
pub mod restore_point;
pub mod retention;
pub mod schedule;
pub mod side;
pub mod snapshot;
pub mod status;
pub mod wait;
pub mod wal;

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use clap::{Args, Parser, Subcommand};
use pgsidecar_core::{Layout, SystemIdentifier};

use crate::{
    daemon::{self, open_store},
    failure::{Code, Failure},
    logging,
    pgdata::DataDirectory,
    repository::Repository,
    settings::{PodEnvironment, RawSettings, Settings, WorkSettings},
    store::Store,
};

/// Backups of a PostgreSQL, from beside it: WAL, base backups, restores to any point in time.
#[derive(Parser, Debug)]
#[command(name = "pgsidecar", version, about, disable_help_subcommand = true)]
#[command(after_help = "Settings can be given as flags or in the environment; --help lists them all.\n\n\
    Exit codes:\n   \
    0  done\n   \
    1  failed, or refused\n   \
    2  wrong usage\n  \
    65  the recovery target can't be reached, data is damaged or missing, or a drill failed\n  \
    69  the store, PostgreSQL or the daemon is unavailable\n  \
    70  a bug\n  \
    73  the directory to restore to can't be used\n  \
    74  a local file can't be read or written\n  \
    75  busy, stopping, or not done in time: try again\n  \
    77  the store refuses: rights, credentials or bucket\n  \
    78  wrong settings, or PGDATA can't be used")]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    settings: RawSettings,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run the daemon: archive and serve WAL, take backups when asked
    Run {
        /// Put pgsidecar-wal into this directory, where PostgreSQL's container finds it
        #[arg(long, env = "PGSIDECAR_PUBLISH_HELPER", value_name = "DIR", hide_env_values = true)]
        publish_helper: Option<String>,
    },
    /// Before PostgreSQL starts: decide what an empty data directory means, restore or clone into it when asked to
    Prepare(prepare::PrepareArgs),
    /// Wait until the daemon answers: for a hook after its start
    Await(wait::AwaitArgs),
    /// Try everything that backups and restores will need
    Check(check::CheckArgs),
    /// Show how the daemon stands: archiving, the last backup, what is wrong
    Status(OutputArgs),
    /// Show what is done by schedule: when next, and how it went
    Schedule(schedule::ScheduleArgs),
    /// Base backups
    #[command(subcommand)]
    Backup(backup::BackupCommand),
    /// Snapshots by the storage (CSI, Ceph, cloud volumes)
    #[command(subcommand)]
    Snapshot(snapshot::SnapshotCommand),
    /// Logical dumps, with pg_dump: every database and what belongs to all of them
    #[command(subcommand)]
    Dump(dump::DumpCommand),
    /// Restore to a new directory, to any point in time
    #[command(subcommand)]
    Restore(restore::RestoreCommand),
    /// Get one database, or some of its tables, as they were at any point in time; the live server isn't touched
    Extract(extract::ExtractArgs),
    /// Try a restore out: does it start, is it whole, does it hold what it should?
    #[command(subcommand)]
    Drill(drill::DrillCommand),
    /// Named points in time that a restore can end at
    #[command(subcommand)]
    RestorePoint(restore_point::RestorePointCommand),
    /// Remove what the retention doesn't keep: backups, WAL and dumps; needs no daemon
    Prune(retention::PruneArgs),
    /// Archived WAL: what is there, and whether it is whole
    #[command(subcommand)]
    Wal(wal::WalCommand),
}

/// How results are printed.
#[derive(Args, Debug, Clone, Copy)]
pub struct OutputArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Which database of the repository is meant.
#[derive(Args, Debug, Clone)]
pub struct SystemArgs {
    /// The database's system identifier [default: that of PGDATA, else the only one under the cluster name]
    #[arg(long, value_name = "N")]
    pub system_identifier: Option<SystemIdentifier>,
}

/// Runs the command line.
pub fn main() -> ExitCode {
    let cli = Cli::try_parse().unwrap_or_else(|error| {
        let _ = error.print();
        // To PostgreSQL, the usual code of wrong usage would mean that there is no such file.
        let cannot_tell = error.use_stderr() && wal::looks_like_get(std::env::args_os());
        std::process::exit(if cannot_tell { i32::from(wal::CANNOT_TELL) } else { error.exit_code() })
    });
    let for_postgresql = matches!(&cli.command, Command::Wal(command) if command.is_restore_command());
    let is_daemon = matches!(cli.command, Command::Run { .. } | Command::Prepare(_));
    let default_level = if is_daemon { "info" } else { "warn" };
    let mut settings = Settings::resolve(&cli.settings, &PodEnvironment::from_process());
    let wrong = logging::start(cli.settings.log.as_deref(), cli.settings.log_format.as_deref(), default_level);
    wrong.into_iter().for_each(|error| settings.add_error(error));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(128)
        .enable_all()
        // Nothing recurses deeply: 2 MB for each of many threads would be most of what the daemon may have.
        .thread_stack_size(1 << 20)
        .build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(dispatch(cli.command, &settings)),
        Err(error) => Err(Failure::io("starting threads", &error)),
    };
    match result {
        Ok(code) => code,
        Err(failure) => {
            output::print_failure(&failure);
            ExitCode::from(if for_postgresql { wal::CANNOT_TELL } else { failure.code.exit_code() })
        }
    }
}

async fn dispatch(command: Command, settings: &Settings) -> Result<ExitCode, Failure> {
    let done = |()| ExitCode::SUCCESS;
    match command {
        Command::Run { publish_helper } => {
            let publish_helper = publish_helper.filter(|directory| !directory.is_empty()).map(PathBuf::from);
            daemon::run(settings, publish_helper).await.map(done)
        }
        Command::Prepare(args) => prepare::run(settings, &args).await.map(done),
        Command::Await(args) => wait::run(settings, &args).await.map(done),
        Command::Check(args) => check::run(settings, &args).await,
        Command::Status(args) => status::run(settings, args).await.map(done),
        Command::Schedule(args) => schedule::run(settings, &args).await.map(done),
        Command::Backup(command) => backup::run(settings, command).await,
        Command::Snapshot(command) => snapshot::run(settings, command).await.map(done),
        Command::Dump(command) => dump::run(settings, command).await,
        Command::Restore(command) => restore::run(settings, command).await.map(done),
        Command::Extract(args) => extract::run(settings, args).await,
        Command::Drill(command) => drill::run(settings, command).await,
        Command::RestorePoint(command) => restore_point::run(settings, command).await.map(done),
        Command::Prune(args) => retention::run(settings, args).await,
        Command::Wal(command) => wal::run(settings, command).await,
    }
}

/// The repository of the database that is meant, without a daemon.
///
/// # Errors
/// If it can't be told which one.
pub async fn open_repository(settings: &WorkSettings, system: &SystemArgs) -> Result<Repository, Failure> {
    let store = open_store(settings).await;
    let system = find_system(settings, &store, system).await?;
    Ok(Repository::new(store, Layout::new(settings.cluster.clone(), system), settings.compression_level))
}

async fn find_system(
    settings: &WorkSettings,
    store: &Arc<dyn Store>,
    args: &SystemArgs,
) -> Result<SystemIdentifier, Failure> {
    if let Some(system) = args.system_identifier {
        return Ok(system);
    }
    let pgdata = settings.pgdata.as_deref().and_then(|path| DataDirectory::open(path).ok());
    if let Some(control) = pgdata.and_then(|pgdata| pgdata.control().ok()) {
        return Ok(control.system_identifier);
    }
    let systems = Repository::systems(&**store, &settings.cluster).await?;
    match systems.as_slice() {
        [system] => Ok(*system),
        [] => Err(Failure::new(
            Code::NotFound,
            format!("{} holds nothing under the cluster name {}", store.description(), settings.cluster),
        )
        .hint("Check PGSIDECAR_REPOSITORY and PGSIDECAR_CLUSTER.")),
        several => {
            let list: Vec<String> = several.iter().map(ToString::to_string).collect();
            Err(Failure::new(
                Code::InvalidRequest,
                format!(
                    "under the cluster name {} there are {} databases: {}",
                    settings.cluster,
                    several.len(),
                    list.join(", ")
                ),
            )
            .hint("Choose one with --system-identifier."))
        }
    }
}
