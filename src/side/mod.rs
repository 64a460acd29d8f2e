//! Private servers: a backup is restored beside the live server, recovers, is looked at and thrown away.
//!
//! Guarantees, for whatever the database holds and wherever this runs:
//! - It never touches the live server's files. It has a directory of its own; tablespaces lie in that; where one could be
//!   made outside of it, nothing is started ([`tablespaces`]).
//! - It takes no timeline and archives nothing: `archive_mode=off`, and the repository is only read ([`config`]).
//! - It reaches nothing and nothing reaches it: no TCP, a socket in a directory of mode 0700, no background workers, no
//!   replication, none of the database's own configuration.
//! - It replays what the plan promised and nothing later: to the end of the archive means to the end that the plan has
//!   seen, whatever has been archived since.
//! - It doesn't outlive us ([`server`]), and what we leave when we're killed is removed by the next run ([`scratch`]).

pub mod bindir;
pub mod config;
pub mod drill;
pub mod extract;
pub(crate) mod program;
mod scratch;
mod server;
mod sql;
pub mod tablespaces;

use std::{
    collections::BTreeMap,
    fs::OpenOptions,
    io::Write,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use pgsidecar_core::{
    BackupRecord, Lsn, SegmentName, TimelineHistory,
    plan::{RestorePlan, RestoreRequest},
    recovery::{RecoveryMode, RecoverySettings, RecoveryTarget, TargetAction, rewrite_auto_conf},
};

use self::{bindir::Binaries, config::ServerSetting, scratch::RunDirectory, server::SideServer, sql::SideSession};
use crate::{
    failure::{Code, Failure},
    pgdata::DataDirectory,
    repository::Repository,
    restore::{self, RestoreOptions, unpack::Progress},
    settings::WorkSettings,
    wal::tail,
};

/// What must stay free on a file system that the live server is on, beyond what is restored and a quarter of that.
const LIVE_MARGIN: u64 = 1 << 30;
/// How long threads may take to end that are told to.
const END_PATIENCE: Duration = Duration::from_secs(10);
const PROGRESS_EVERY: Duration = Duration::from_millis(300);

/// Who is told how far it is.
pub trait Observer: Sync {
    /// Something that is worth a line.
    fn say(&self, line: &str);
    /// What is being done just now.
    fn doing(&self, what: &str);
    /// How many of about how many bytes are restored, after how long.
    fn bytes(&self, done: u64, total: u64, elapsed: Duration);
}

/// How a private server is made.
#[derive(Clone, Debug)]
pub struct SideOptions {
    /// Where backups and directories are.
    pub work: WorkSettings,
    /// Whether the target itself is replayed.
    pub inclusive: bool,
    /// Settings of the server beyond those that it needs.
    pub settings: Vec<ServerSetting>,
    /// Leave everything where it is in the end.
    pub keep: bool,
    /// This program.
    pub program: PathBuf,
}

/// What is restored, and how far it's replayed.
#[derive(Clone, Debug)]
pub struct SidePlan {
    /// The plan of the restore.
    pub restore: RestorePlan,
    /// The last segment that the server gets, where no target ends its recovery.
    through: Option<SegmentName>,
    /// Whether that is what a stopped server had of it.
    tail: bool,
}

/// Plans a restore whose end is known.
///
/// # Errors
/// As [`restore::plan`].
pub async fn plan(repository: &Repository, request: RestoreRequest) -> Result<SidePlan, Failure> {
    let plan = restore::plan(repository, request).await?;
    if plan.target != RecoveryTarget::Latest {
        return Ok(SidePlan { restore: plan, through: None, tail: false });
    }
    // No target of PostgreSQL's ends exactly where the WAL does: each waits for a record behind it. So nothing is handed
    // out that lies behind what was seen.
    let size = plan.backup.wal_segment_size;
    let behind = SegmentName::from_number(plan.timeline, size.segment_number(plan.reachable), size);
    let tail = plan.gap.is_none() && tail::newest(repository, behind).await?.is_some();
    let through = Some(if tail { behind } else { plan.wal_through });
    Ok(SidePlan { restore: plan, through, tail })
}

/// A private server's directory, and with what it's going to be started. Nothing is restored yet.
#[derive(Debug)]
pub struct Side {
    run: RunDirectory,
    binaries: Binaries,
    plan: SidePlan,
    options: SideOptions,
}

/// A private server that has recovered.
pub struct Recovered {
    // In this order: the server ends before its directory goes.
    session: SideSession,
    server: SideServer,
    side: Side,
    /// Where recovery ended, if that could be read.
    pub reached: Option<Lsn>,
    superuser: String,
}

impl Side {
    /// Finds out whether a private server may be made here, and makes its directory.
    ///
    /// # Errors
    /// What is missing or in the way. Nothing has been changed then, except that what killed runs have left is gone.
    pub fn new(plan: SidePlan, options: SideOptions, purpose: &str, observer: &dyn Observer) -> Result<Side, Failure> {
        if rustix::process::geteuid().is_root() {
            return Err(Failure::new(
                Code::Misconfigured,
                "a private server can't be started by root: PostgreSQL refuses",
            )
            .hint("Run this as the user that PostgreSQL runs as (in Kubernetes: securityContext.runAsUser)."));
        }
        let backup = &plan.restore.backup;
        let pgdata = options.work.pgdata.as_deref();
        let binaries = Binaries::find(options.work.pg_bindir.as_deref(), backup.major_version())?;
        tablespaces::check(pgdata, backup.system_identifier, &backup.tablespaces)?;
        if let Some(pgdata) = pgdata {
            leave_room(&options.work, pgdata, backup.restored_size())?;
        }
        let (run, removed) = RunDirectory::new(options.work.scratch.as_deref(), pgdata, purpose)?;
        if removed > 0 {
            observer.say(&format!("Removed what {removed} killed run(s) had left in the scratch directory."));
        }
        Ok(Side { run, binaries, plan, options })
    }

    /// Where everything is.
    pub fn directory(&self) -> &Path {
        self.run.path()
    }

    /// PostgreSQL's programs.
    pub fn binaries(&self) -> &Binaries {
        &self.binaries
    }

    /// Restores the backup.
    ///
    /// # Errors
    /// As [`restore::run`].
    pub async fn restore(&self, repository: &Repository, observer: &dyn Observer) -> Result<(), Failure> {
        let plan = &self.plan.restore;
        let recovery = self.recovery_settings()?;
        let within = |oid: u32| self.run.path().join("tablespaces").join(oid.to_string()).display().to_string();
        let tablespaces: BTreeMap<String, String> = plan
            .backup
            .tablespaces
            .iter()
            .map(|tablespace| (tablespace.location.clone(), within(tablespace.oid)))
            .collect();
        let options = RestoreOptions {
            to: self.run.data(),
            mode: recovery.mode.clone(),
            inclusive: recovery.inclusive,
            action: recovery.action,
            tablespaces,
            restore_command: recovery.restore_command.clone(),
            parallelism: self.options.work.parallelism,
        };
        // Dropped after the restore, and the only one to hold it then.
        let (ending, began) = (Ending(Arc::new(Progress::default())), Instant::now());
        let total: u64 = plan.chain.iter().map(BackupRecord::plain_bytes).sum();
        let restoring = restore::run(repository, plan, &options, ending.0.clone());
        tokio::pin!(restoring);
        let mut ticks = tokio::time::interval(PROGRESS_EVERY);
        loop {
            tokio::select! {
                restored = &mut restoring => break restored?,
                _ = ticks.tick() => observer.bytes(ending.0.bytes.load(Relaxed), total, began.elapsed()),
            }
        }
        // Nothing that the live server was told by ALTER SYSTEM is for this one.
        let auto_conf = rewrite_auto_conf(b"", plan.backup.major_version(), &recovery);
        self.replace(&self.run.data().join("postgresql.auto.conf"), &auto_conf)
    }

    /// Starts the server and waits until it has recovered.
    ///
    /// # Errors
    /// Why it doesn't start or recover.
    pub async fn recover(self, observer: &dyn Observer) -> Result<Recovered, Failure> {
        let plan = &self.plan.restore;
        let work = &self.options.work;
        let major = plan.backup.major_version();
        let data = self.run.data();
        let control = DataDirectory::open(&data)?.control()?;
        self.replace(
            &self.run.path().join("postgresql.conf"),
            config::postgresql_conf(&control, major, &self.options.settings).as_bytes(),
        )?;
        self.replace(&self.run.path().join("pg_hba.conf"), config::PG_HBA_CONF.as_bytes())?;
        self.replace(&self.run.path().join("pg_ident.conf"), b"")?;
        // Once more: it may have been created while the backup was restored.
        tablespaces::check(work.pgdata.as_deref(), plan.backup.system_identifier, &plan.backup.tablespaces)?;
        tablespaces::check_within(self.run.path(), &data)?;
        let guards = config::guards(self.run.path(), major);
        let postgres = self.binaries.program("postgres")?;
        let mut server = SideServer::start(self.run.path(), &data, &postgres, &guards, &environment(work))?;
        let (databases, users) = (self.databases(), self.users());
        let databases: Vec<&str> = databases.iter().map(String::as_str).collect();
        let users: Vec<&str> = users.iter().map(String::as_str).collect();
        let through = plan.wal_through.to_string();
        let session = server.recovered(&databases, &users, &through, observer).await?;
        let superuser = "SELECT rolname::text FROM pg_catalog.pg_roles WHERE rolsuper AND rolcanlogin \
             ORDER BY rolname = current_user DESC, oid LIMIT 1";
        let superuser = session.texts(superuser, &[]).await?.into_iter().next().ok_or_else(|| {
            Failure::new(Code::PostgresUnavailable, "the restored database has no superuser that may log in")
        })?;
        let reached = reached(&data);
        Ok(Recovered { session, server, side: self, reached, superuser })
    }

    fn databases(&self) -> Vec<String> {
        let mut databases =
            vec![self.options.work.connection.database.clone(), "postgres".to_owned(), "template1".to_owned()];
        databases.dedup();
        databases
    }

    fn users(&self) -> Vec<String> {
        let mut users = vec![self.options.work.connection.user.clone(), "postgres".to_owned()];
        users.dedup();
        users
    }

    fn recovery_settings(&self) -> Result<RecoverySettings, Failure> {
        let SidePlan { restore, through, tail } = &self.plan;
        let mut arguments = format!(
            "--system-identifier {} --private-from {} --notes \"{}\"",
            restore.backup.system_identifier,
            restore.backup.start_lsn,
            self.run.path().join("wal-notes").display()
        );
        if let Some(through) = through {
            arguments += &format!(" --through {through}");
        }
        if *tail {
            arguments += " --tail";
        }
        Ok(RecoverySettings {
            mode: RecoveryMode::default(),
            target: restore.target.clone(),
            inclusive: self.options.inclusive,
            timeline: restore.timeline,
            action: TargetAction::Promote,
            restore_command: config::restore_command(&self.options.program, &arguments)?,
        })
    }

    fn replace(&self, path: &Path, content: &[u8]) -> Result<(), Failure> {
        let write =
            || OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?.write_all(content);
        write().map_err(|error| Failure::io(format!("writing {}", path.display()), &error))
    }

    /// Leaves everything where it is, if that was asked for. The server has to be stopped.
    fn leave(self) -> Option<PathBuf> {
        if self.options.keep { Some(self.run.keep()) } else { None }
    }
}

impl Recovered {
    /// Where everything is.
    pub fn directory(&self) -> &Path {
        self.side.directory()
    }

    /// A client program that talks to this server as its superuser.
    fn client(&self, program: &str) -> Result<std::process::Command, Failure> {
        let mut command = std::process::Command::new(self.side.binaries.program(program)?);
        program::without_libpq(&mut command)
            .env("PGHOST", self.directory())
            .env("PGPORT", "5432")
            .env("PGUSER", &self.superuser)
            .env("PGOPTIONS", sql::SESSION_OPTIONS)
            .env("LC_ALL", "C.UTF-8")
            .current_dir(self.directory());
        Ok(command)
    }

    /// A session in one of its databases.
    async fn connect(&self, database: &str) -> Result<SideSession, Failure> {
        match SideSession::connect(self.directory(), database, &self.superuser).await {
            Ok(session) => Ok(session),
            Err(error) if error.code() == Some(&tokio_postgres::error::SqlState::INVALID_CATALOG_NAME) => {
                let there =
                    self.session.texts("SELECT datname::text FROM pg_database WHERE datallowconn ORDER BY 1", &[]);
                let there = there.await.unwrap_or_default().join(", ");
                Err(Failure::new(Code::NotFound, format!("there was no database {database:?} at that moment"))
                    .hint(format!("There were: {there}.")))
            }
            Err(error) => Err(sql::refused(&error)),
        }
    }

    /// Ends the server at once and removes everything, unless it's to be kept. Answers with where it was left.
    pub fn discard(self) -> Option<PathBuf> {
        let Recovered { session, server, side, .. } = self;
        drop(session);
        drop(server);
        side.leave()
    }
}

/// Ends the threads of a restore that nobody waits for any more, before their directory goes: they'd make it again.
struct Ending(Arc<Progress>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.cancel();
        let until = Instant::now() + END_PATIENCE;
        while Arc::strong_count(&self.0) > 1 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Refuses to fill the file system of the live server, which would stop there.
fn leave_room(work: &WorkSettings, pgdata: &Path, size: u64) -> Result<(), Failure> {
    let device = |path: &Path| std::fs::metadata(path).map(|meta| meta.dev()).ok();
    let Some(scratch) = work.scratch.as_deref() else { return Ok(()) };
    let shared = device(scratch).is_some_and(|device_of_scratch| {
        [pgdata, &pgdata.join("pg_wal")].into_iter().any(|live| device(live) == Some(device_of_scratch))
    });
    let Some(room) = rustix::fs::statvfs(scratch).ok().filter(|_| shared) else { return Ok(()) };
    let (free, needed) = (room.f_bavail.saturating_mul(room.f_frsize), size + size / 4 + LIVE_MARGIN);
    if free >= needed {
        return Ok(());
    }
    Err(Failure::new(
        Code::TargetDirectory,
        format!(
            "the scratch directory is on the live server's file system, where {free} bytes are free: {size} are restored, and with \
             the WAL that is replayed {needed} must be, or the live server could run out of room"
        ),
    )
    .hint("Set PGSIDECAR_SCRATCH or --scratch to a directory on another volume."))
}

/// What the server's restore_command needs to reach the repository: flags outrank the environment that it inherits.
fn environment(work: &WorkSettings) -> Vec<(&'static str, String)> {
    let mut environment = vec![
        ("PGSIDECAR_REPOSITORY", work.repository.to_string()),
        ("PGSIDECAR_CLUSTER", work.cluster.to_string()),
        // Nothing is taken from there, and what the plan needs is in the repository.
        ("PGSIDECAR_ARCHIVE_DIRECTORY", String::new()),
        ("PGSIDECAR_LOG", "error".to_owned()),
    ];
    let s3 = &work.s3;
    environment.extend(s3.endpoint.clone().map(|endpoint| ("AWS_ENDPOINT_URL_S3", endpoint)));
    environment.extend(s3.region.clone().map(|region| ("AWS_REGION", region)));
    environment.extend(s3.path_style.map(|path_style| ("PGSIDECAR_S3_PATH_STYLE", path_style.to_string())));
    environment
}

/// Where the timeline begins that the server has taken for itself: the end of its recovery.
fn reached(data: &Path) -> Option<Lsn> {
    let directory = DataDirectory::open(data).ok()?;
    let newest = directory.histories().ok()?.into_iter().max()?;
    let text = std::fs::read(directory.wal().join(format!("{}.history", newest.to_hex()))).ok()?;
    let history = TimelineHistory::parse(newest, &text).ok()?;
    history.spans().last().map(|span| span.begin)
}
