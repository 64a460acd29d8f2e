//! `pgsidecar dump create|list|show|verify|restore`

use std::{
    process::ExitCode,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use clap::{Args, Subcommand};
use pgsidecar_core::{
    DumpId, DumpRecord, Layout, TableName,
    dump::{DatabaseName, DumpFormat, NamePattern},
    settings::parse_duration,
};
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    iterator::Signals,
};

use super::{OutputArgs, SystemArgs, open_repository, output, progress::Shown};
use crate::{
    client::Client,
    daemon::open_store,
    dump::{
        self, DumpRequest, globals,
        restore::DumpRestore,
        server::{Server, Way},
        tools::Tools,
        verify::{VerifiedDump, verify},
    },
    failure::{Code, Failure},
    jobs::{Outcome, Snapshot},
    progress::Progress,
    repository::Repository,
    settings::{Settings, WorkSettings},
};

/// Logical dumps.
#[derive(Subcommand, Debug)]
pub enum DumpCommand {
    /// Dump every database, and roles and tablespaces
    Create(CreateArgs),
    /// List the complete dumps
    List(ListArgs),
    /// Show one dump
    Show(ShowArgs),
    /// Check that dumps are whole; ends with 65 if something is missing or damaged
    Verify(VerifyArgs),
    /// Restore a database of a dump, or some of its tables, or the roles; refuses to overwrite anything
    Restore(RestoreArgs),
}

/// `dump create`
#[derive(Args, Debug)]
pub struct CreateArgs {
    /// Do it here, without a daemon, whatever host PGHOST names: for a CronJob
    #[arg(long)]
    once: bool,
    /// Only databases whose names fit this pattern (* and ?); can be given several times [default: all but templates]
    #[arg(long, value_name = "PATTERN")]
    include: Vec<NamePattern>,
    /// Not those whose names fit this pattern; can be given several times
    #[arg(long, value_name = "PATTERN")]
    exclude: Vec<NamePattern>,
    /// custom (for pg_restore) or plain (SQL, compressed with zstd)
    #[arg(long, value_name = "FORMAT", default_value_t)]
    format: DumpFormat,
    /// How long pg_dump waits for a lock on a table before the dump fails
    #[arg(long, value_name = "TIME", value_parser = lock_wait, default_value = "10min")]
    lock_wait_timeout: Duration,
    /// With --once: the number that the dumps are filed under, where the server doesn't tell its own
    #[arg(long, value_name = "N", requires = "once")]
    system_identifier: Option<pgsidecar_core::SystemIdentifier>,
    #[command(flatten)]
    output: OutputArgs,
}

/// `dump list`
#[derive(Args, Debug)]
pub struct ListArgs {
    #[command(flatten)]
    system: SystemArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// `dump show`
#[derive(Args, Debug)]
pub struct ShowArgs {
    /// The dump's id
    #[arg(value_name = "ID")]
    id: DumpId,
    #[command(flatten)]
    system: SystemArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// `dump verify`
#[derive(Args, Debug)]
pub struct VerifyArgs {
    /// Only this dump
    #[arg(value_name = "ID")]
    id: Option<DumpId>,
    /// Read all of it, compare the hashes, and have pg_restore make SQL of it
    #[arg(long)]
    deep: bool,
    #[command(flatten)]
    system: SystemArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// `dump restore`
#[derive(Args, Debug)]
#[command(group(clap::ArgGroup::new("what").required(true).args(["database", "globals"])))]
pub struct RestoreArgs {
    /// The dump's id
    #[arg(value_name = "ID")]
    id: DumpId,
    /// The database of the dump
    #[arg(long, value_name = "NAME")]
    database: Option<DatabaseName>,
    /// Create the roles of the dump that aren't there, instead of restoring a database
    #[arg(long, conflicts_with_all = ["into", "table", "create", "clean", "no_owner"])]
    globals: bool,
    /// The database to restore to [default: the same name]
    #[arg(long, value_name = "NAME")]
    into: Option<DatabaseName>,
    /// Only this table, named as in SQL, with its data, primary key and unique constraints; can be given several times
    #[arg(long, value_name = "SCHEMA.TABLE")]
    table: Vec<TableName>,
    /// Create the database; it must not exist
    #[arg(long, conflicts_with = "clean")]
    create: bool,
    /// Drop what the dump has from the database first
    #[arg(long)]
    clean: bool,
    /// Leave owners and grants out: everything belongs to the role that restores
    #[arg(long)]
    no_owner: bool,
    #[command(flatten)]
    system: SystemArgs,
    #[command(flatten)]
    output: OutputArgs,
}

fn lock_wait(text: &str) -> Result<Duration, String> {
    match parse_duration(text) {
        Ok(time) if time >= Duration::from_secs(1) => Ok(time),
        Ok(_) => Err(format!("{text:?} is less than a second")),
        Err(problem) => Err(problem.to_string()),
    }
}

/// Runs one of the commands.
///
/// # Errors
/// What went wrong. That a dump is damaged is a result, not an error: the exit code tells it.
pub async fn run(settings: &Settings, command: DumpCommand) -> Result<ExitCode, Failure> {
    let done = match command {
        DumpCommand::Verify(args) => return run_verify(settings, args).await,
        DumpCommand::Create(args) => create(settings, args).await,
        DumpCommand::List(args) => {
            let dumps = open_repository(settings.work()?, &args.system).await?.dumps().await?;
            if args.output.json { output::print_json(&dumps) } else { print_list(&dumps) }
        }
        DumpCommand::Show(args) => {
            let dump = find(&open_repository(settings.work()?, &args.system).await?, args.id).await?;
            if args.output.json { output::print_json(&dump) } else { print_dump(&dump) }
        }
        DumpCommand::Restore(args) => restore(settings, args).await,
    };
    done.map(|()| ExitCode::SUCCESS)
}

async fn find(repository: &Repository, id: DumpId) -> Result<DumpRecord, Failure> {
    repository.dump(id).await?.ok_or_else(|| {
        Failure::new(Code::NotFound, format!("there is no dump {id}")).hint("'pgsidecar dump list' shows them.")
    })
}

async fn create(settings: &Settings, args: CreateArgs) -> Result<(), Failure> {
    let CreateArgs { include, exclude, format, lock_wait_timeout, .. } = args;
    let lock_wait_timeout_seconds = lock_wait_timeout.as_secs();
    let request = DumpRequest { include, exclude, format, lock_wait_timeout_seconds };
    let record = if args.once {
        once(settings.work()?, args.system_identifier, &request, args.output.json).await?
    } else {
        let client = Client::new(&settings.process.control_socket);
        let job: Snapshot = client.post("/v1/dumps", &request).await?;
        let mut shown = Shown::new(args.output.json);
        let follow = |job: &Snapshot| {
            shown.bytes(job.bytes, 0, job.estimate, job.doing.as_deref().unwrap_or_default());
        };
        let ended = client.follow(job.job, follow).await;
        drop(shown);
        match ended?.outcome {
            Some(Outcome::Succeeded(record)) => serde_json::from_value(record).map_err(Failure::internal)?,
            Some(Outcome::Failed(failure)) => return Err(failure),
            None => return Err(Failure::internal("the job's events ended before the job")),
        }
    };
    if args.output.json { output::print_json(&record) } else { print_dump(&record) }
}

async fn once(
    work: &WorkSettings,
    named: Option<pgsidecar_core::SystemIdentifier>,
    request: &DumpRequest,
    json: bool,
) -> Result<DumpRecord, Failure> {
    let progress = cancelled_by_signals()?;
    let server = dump::connect(work, Way::Libpq).await?;
    let system = match named {
        Some(system) => system,
        None => server.system_identifier().await?,
    };
    let layout = Layout::new(work.cluster.clone(), system);
    let repository = Repository::new(open_store(work).await, layout, work.compression_level);
    let shown = show(progress.clone(), json);
    let done = dump::create(&server, &repository, &work.instance, request, progress).await;
    shown.abort();
    let _ = shown.await;
    done
}

/// The first signal makes the work end in order, the second ends us at once.
fn cancelled_by_signals() -> Result<Arc<Progress>, Failure> {
    let progress = Arc::new(Progress::default());
    let cancelled = progress.clone();
    let mut signals = Signals::new([SIGTERM, SIGINT]).map_err(|error| Failure::io("listening for signals", &error))?;
    std::thread::spawn(move || {
        for signal in signals.forever() {
            if cancelled.is_cancelled() {
                std::process::exit(128 + signal);
            }
            cancelled.cancel();
        }
    });
    Ok(progress)
}

fn show(progress: Arc<Progress>, json: bool) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        let mut shown = Shown::new(json);
        loop {
            shown.bytes(progress.bytes.load(Relaxed), 0, None, progress.doing().as_deref().unwrap_or_default());
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    })
}

async fn run_verify(settings: &Settings, args: VerifyArgs) -> Result<ExitCode, Failure> {
    let work = settings.work()?;
    let repository = open_repository(work, &args.system).await?;
    let records = match args.id {
        Some(id) => vec![find(&repository, id).await?],
        None => repository.dumps().await?,
    };
    let mut verified = Vec::new();
    if let Some(newest) = records.iter().map(|record| record.tools_major).max() {
        let named = work.pg_bindir.clone();
        let tools = tokio::task::spawn_blocking(move || Tools::find(named.as_deref(), newest)).await??;
        let progress = Arc::new(Progress::default());
        let shown = show(progress.clone(), args.output.json);
        for record in &records {
            verified.push(verify(&repository, &tools, record, args.deep, &progress.bytes).await);
        }
        shown.abort();
        let _ = shown.await;
    }
    let verified: Vec<VerifiedDump> = verified.into_iter().collect::<Result<_, _>>()?;
    if args.output.json {
        output::print_json(&verified)?;
    } else if verified.is_empty() {
        output::print_line("There is no dump.")?;
    } else {
        for dump in &verified {
            let how = match (dump.ok, dump.read) {
                (true, true) => "whole",
                (true, false) => "all there; whether it's whole was not looked at (--deep does)",
                (false, _) => "DAMAGED",
            };
            output::print_line(&format!("{}  {how}", dump.dump))?;
            dump.problems.iter().try_for_each(|problem| output::print_line(&format!("  {problem}")))?;
        }
    }
    let ok = verified.iter().all(|dump| dump.ok);
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::from(Code::Damaged.exit_code()) })
}

async fn restore(settings: &Settings, args: RestoreArgs) -> Result<(), Failure> {
    let work = settings.work()?;
    let repository = open_repository(work, &args.system).await?;
    let record = find(&repository, args.id).await?;
    let (named, needed) = (work.pg_bindir.clone(), record.tools_major);
    let tools = tokio::task::spawn_blocking(move || Tools::find(named.as_deref(), needed)).await?;
    let tools = tools.map_err(|failure| failure.context(format!("dump {} was made by pg_dump {needed}", record.id)))?;
    let server = Server::new(tools, &work.connection, Way::Libpq);
    let Some(database) = args.database else {
        let restored = globals::restore(&server, &repository, &record).await?;
        if args.output.json {
            return output::print_json(&restored);
        }
        output::print_line(&format!("Created    {}", list(&restored.created)))?;
        output::print_line(&format!("As it was  {}", list(&restored.kept)))?;
        return restored.skipped.iter().try_for_each(|line| output::print_line(&format!("Left out   {line}")));
    };
    let request = DumpRestore {
        into: args.into.unwrap_or_else(|| database.clone()),
        database,
        create: args.create,
        clean: args.clean,
        no_owner: args.no_owner,
        tables: args.table,
    };
    let progress = cancelled_by_signals()?;
    let shown = show(progress.clone(), args.output.json);
    let restored = dump::restore::restore(&server, &repository, &record, &request, &progress).await;
    shown.abort();
    let _ = shown.await;
    let restored = restored?;
    if args.output.json {
        return output::print_json(&restored);
    }
    output::print_line(&format!(
        "Restored   {} of dump {} into {}: {} of SQL",
        restored.database,
        record.id,
        restored.into,
        output::size(restored.sql_bytes)
    ))?;
    restored.warnings.iter().try_for_each(|warning| output::print_line(&format!("Warning    {warning}")))
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

fn print_list(dumps: &[DumpRecord]) -> Result<(), Failure> {
    if dumps.is_empty() {
        eprintln!("no dumps yet; 'pgsidecar dump create' takes one");
        return Ok(());
    }
    let rows: Vec<[String; 6]> = dumps
        .iter()
        .map(|dump| {
            [
                dump.id.to_string(),
                dump.finished_at.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
                dump.archives.to_string(),
                dump.databases.len().to_string(),
                dump.major_version().to_string(),
                output::size(dump.stored_bytes()),
            ]
        })
        .collect();
    output::print_table(["DUMP", "COMPLETE", "FORMAT", "DATABASES", "SERVER", "STORED"], &rows)
}

fn print_dump(dump: &DumpRecord) -> Result<(), Failure> {
    let passwords =
        if dump.globals.role_passwords { "with the roles' passwords" } else { "without the roles' passwords" };
    let lines = [
        ("Dump", dump.id.to_string()),
        ("Complete", dump.finished_at.strftime("%Y-%m-%d %H:%M:%SZ").to_string()),
        ("Server", format!("PostgreSQL {} at {}", dump.major_version(), dump.server)),
        ("Format", format!("{}, by pg_dump {}", dump.archives, dump.tools_version)),
        ("Stored", output::size(dump.stored_bytes())),
        ("Globals", format!("{}, {passwords}", output::size(dump.globals.stored.size))),
    ];
    for (name, value) in lines {
        output::print_line(&format!("{name:<10} {value}"))?;
    }
    for database in &dump.databases {
        let entries = database.toc_entries.map_or_else(String::new, |entries| format!(", {entries} entries"));
        output::print_line(&format!("Database   {}: {}{entries}", database.name, output::size(database.stored.size)))?;
    }
    dump.warnings.iter().try_for_each(|warning| output::print_line(&format!("Warning    {warning}")))
}
