//! `pgsidecar run`: the listeners, what they share, and the orderly stop.
//!
//! The daemon comes up whatever the settings say. With wrong ones it's degraded: it listens, refuses what it can't do
//! with the reason, and says it in log, status and metrics. Nothing here exits because of the store or of PostgreSQL;
//! only an address that it can't listen at, or a helper that it can't publish, ends it.
//!
//! Stopping: the first SIGTERM or SIGINT ends the acceptance of connections and lets the requests that are under way
//! end, for at most the drain timeout; a base backup that is under way is given up. A second signal exits at once.

use std::{
    io,
    os::unix::fs::MetadataExt,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use hyper::{Request, body::Incoming};
use jiff::Timestamp;
use pgsidecar_core::{ArchiveFileName, BackupId, ControlFile, Layout, SystemIdentifier, settings::RepositoryUrl};
use serde::Serialize;
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    iterator::Signals,
};
use tokio::{net::TcpListener, sync::watch};

use crate::{
    backup::{self, BackupRequest},
    codec::ChannelReader,
    failure::{Code, Failure},
    histories,
    http::{self, Listener, wal::Asker},
    jobs::{Job, Jobs, Snapshot},
    pgdata::DataDirectory,
    repository::{Repository, Stored},
    settings::{ProcessSettings, Settings, WorkSettings},
    store::{ConditionalCreation, LocalStore, S3Config, S3Store, Store},
    wal::{
        archive::{ArchiveStatistics, Archiver},
        fetch::Fetcher,
    },
};

/// How old the list of backups may be that the status tells.
const STATUS_CACHE: Duration = Duration::from_secs(20);
/// How long the status waits for the store.
const STATUS_PATIENCE: Duration = Duration::from_secs(3);
const RETRY_START_WORK: Duration = Duration::from_secs(10);

/// Opens the store that the settings name. No network access.
pub async fn open_store(settings: &WorkSettings) -> Arc<dyn Store> {
    match &settings.repository {
        RepositoryUrl::Directory(path) => Arc::new(LocalStore::new(path)),
        RepositoryUrl::S3 { bucket, prefix } => {
            let config = S3Config {
                bucket: bucket.clone(),
                prefix: prefix.clone(),
                endpoint: settings.s3.endpoint.clone(),
                region: settings.s3.region.clone(),
                path_style: settings.s3.path_style,
                ..S3Config::default()
            };
            Arc::new(S3Store::new(config).await)
        }
    }
}

/// What all requests share.
pub struct App {
    work: Result<Work, Failure>,
    jobs: Jobs,
    archiver: Arc<Archiver>,
    /// What went wrong at the start and doesn't keep the rest from working.
    start_problem: Option<Failure>,
    stopping: AtomicBool,
}

/// What there is when the settings are right.
struct Work {
    settings: WorkSettings,
    store: Arc<dyn Store>,
    fetcher: Fetcher,
    /// The systems whose `cluster.json` is known to be there.
    noted: Mutex<Option<SystemIdentifier>>,
    conditional: Mutex<Option<ConditionalCreation>>,
    recoverable: tokio::sync::Mutex<Option<(Instant, Option<LastBackup>)>>,
}

/// The newest complete backup, for the status.
#[derive(Clone, Debug, Serialize)]
pub struct LastBackup {
    /// Its id.
    pub id: BackupId,
    /// When it was complete.
    pub stopped_at: Timestamp,
}

/// `GET /v1/status`.
#[derive(Debug, Serialize)]
pub struct Status {
    /// pgsidecar's version.
    pub version: &'static str,
    /// `ok` or `degraded`.
    pub state: &'static str,
    /// What keeps it from working.
    pub problems: Vec<Failure>,
    /// The name in the repository.
    pub cluster: Option<String>,
    /// The database system of the data directory.
    pub system_identifier: Option<SystemIdentifier>,
    /// Where backups are kept.
    pub repository: Option<String>,
    /// `honoured`, or why the daemon has to look before it writes; unknown until the first write.
    pub conditional_creation: Option<String>,
    /// WAL archiving.
    pub archive: ArchiveStatus,
    /// The newest complete backup; unknown while the store can't be reached.
    pub last_backup: Option<LastBackup>,
    /// The job that was started last.
    pub last_job: Option<Snapshot>,
}

/// WAL archiving, in the status.
#[derive(Debug, Serialize)]
pub struct ArchiveStatus {
    /// `.ready` files; unknown without a data directory.
    pub backlog_files: Option<u64>,
    /// Age of the oldest.
    pub oldest_ready_seconds: Option<u64>,
    /// Since the daemon's start.
    #[serde(flatten)]
    pub statistics: ArchiveStatistics,
}

impl App {
    /// Sets up what the requests share.
    pub async fn new(settings: &Settings, start_problem: Option<Failure>) -> App {
        let work = match settings.work() {
            Err(failure) => Err(failure),
            Ok(work) => {
                let fetcher = Fetcher::new(&work.spool);
                fetcher.clean();
                Ok(Work {
                    settings: work.clone(),
                    store: open_store(work).await,
                    fetcher,
                    noted: Mutex::default(),
                    conditional: Mutex::default(),
                    recoverable: tokio::sync::Mutex::default(),
                })
            }
        };
        App { work, jobs: Jobs::default(), archiver: Arc::default(), start_problem, stopping: AtomicBool::new(false) }
    }

    fn work(&self) -> Result<&Work, Failure> {
        self.work.as_ref().map_err(Clone::clone)
    }

    /// The jobs.
    pub fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    /// Whether the daemon stops.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Relaxed)
    }

    /// The repository of the database in the data directory.
    ///
    /// # Errors
    /// Wrong settings, or no data directory.
    pub fn repository(&self) -> Result<Repository, Failure> {
        let work = self.work()?;
        Ok(work.repository(work.data_directory()?.1.system_identifier))
    }

    /// Archives a file of pg_wal.
    ///
    /// # Errors
    /// Why it isn't in the repository.
    pub async fn archive_file(&self, name: ArchiveFileName, asker: Option<Asker>) -> Result<Stored, Failure> {
        let (pgdata, control, repository) = self.ready_to_archive(name).await?;
        if let Some(asker) = asker {
            check_asker(&pgdata, &control, name, asker)
                .inspect_err(|failure| self.archiver.note_failure(name, failure))?;
        }
        self.archiver.archive_file(&repository, &pgdata, &control, name).await
    }

    /// What archiving needs. That it isn't there counts as a failure to archive.
    async fn ready_to_archive(
        &self,
        name: ArchiveFileName,
    ) -> Result<(DataDirectory, ControlFile, Repository), Failure> {
        let ready = async {
            let work = self.work()?;
            let (pgdata, control) = work.data_directory()?;
            let repository = work.noted_repository(&control).await?;
            Ok((pgdata, control, repository))
        };
        ready.await.inspect_err(|failure| self.archiver.note_failure(name, failure))
    }

    /// Archives a request's body.
    ///
    /// # Errors
    /// Why it isn't in the repository.
    pub async fn archive_body(
        &self,
        name: ArchiveFileName,
        body: ChannelReader,
        length: Option<u64>,
    ) -> Result<Stored, Failure> {
        let (_, control, repository) = self.ready_to_archive(name).await?;
        self.archiver.archive_body(&repository, &control, name, body, length).await
    }

    /// Fetches a file from the archive, of this database system or of the one that is named.
    ///
    /// # Errors
    /// [`Code::NotInArchive`] if the store says so; anything else means 'can't tell'.
    pub async fn fetch(
        &self,
        name: ArchiveFileName,
        system: Option<SystemIdentifier>,
    ) -> Result<tempfile::NamedTempFile, Failure> {
        let work = self.work()?;
        let system = match system {
            Some(system) => system,
            None => work.data_directory()?.1.system_identifier,
        };
        work.fetcher.fetch(&work.repository(system), name).await
    }

    /// Starts a base backup.
    ///
    /// # Errors
    /// Wrong settings, no data directory, or one that is under way.
    pub fn start_backup(self: &Arc<Self>, request: BackupRequest) -> Result<Arc<Job>, Failure> {
        let work = self.work()?;
        if self.is_stopping() {
            return Err(Failure::new(Code::Stopping, "pgsidecar is stopping"));
        }
        let (pgdata, control) = work.data_directory()?;
        let (repository, settings) = (work.repository(control.system_identifier), work.settings.clone());
        let app = self.clone();
        self.jobs.start("backup", |progress| async move {
            let record = backup::create(&repository, &pgdata, &settings, &request, progress).await?;
            if let Ok(work) = &app.work {
                *work.recoverable.lock().await = None;
            }
            Ok(record)
        })
    }

    /// Everything that is known.
    pub async fn status(&self) -> Status {
        let mut status = Status {
            version: env!("CARGO_PKG_VERSION"),
            state: "ok",
            problems: self.start_problem.iter().cloned().collect(),
            cluster: None,
            system_identifier: None,
            repository: None,
            conditional_creation: None,
            archive: ArchiveStatus {
                backlog_files: None,
                oldest_ready_seconds: None,
                statistics: self.archiver.statistics(),
            },
            last_backup: None,
            last_job: self.jobs.last().map(|job| job.snapshot()),
        };
        match &self.work {
            Err(failure) => status.problems.push(failure.clone()),
            Ok(work) => work.describe(&mut status).await,
        }
        if !status.problems.is_empty() {
            status.state = "degraded";
        }
        status
    }
}

impl Work {
    fn data_directory(&self) -> Result<(DataDirectory, ControlFile), Failure> {
        let pgdata = DataDirectory::open(self.settings.pgdata()?)?;
        // 8 kB from the page cache at each request: the directory can be replaced while we run.
        let control = pgdata.control()?;
        Ok((pgdata, control))
    }

    fn repository(&self, system: SystemIdentifier) -> Repository {
        let layout = Layout::new(self.settings.cluster.clone(), system);
        Repository::new(self.store.clone(), layout, self.settings.compression_level)
    }

    /// The repository, once `cluster.json` is in it: without it, no WAL could be told from another database's.
    async fn noted_repository(&self, control: &ControlFile) -> Result<Repository, Failure> {
        let repository = self.repository(control.system_identifier);
        let noted = self.noted.lock().is_ok_and(|noted| *noted == Some(control.system_identifier));
        if !noted {
            self.learn_conditional_creation().await?;
            repository.note_cluster(control.wal_segment_size).await?;
            if let Ok(mut noted) = self.noted.lock() {
                *noted = Some(control.system_identifier);
            }
        }
        Ok(repository)
    }

    /// Asks the store, and says it once if two writers could pass each other.
    async fn learn_conditional_creation(&self) -> Result<(), Failure> {
        let conditional = self.store.conditional_creation().await?;
        let Ok(mut known) = self.conditional.lock() else { return Ok(()) };
        if known.is_none()
            && let ConditionalCreation::LookFirst { reason } = &conditional
        {
            tracing::warn!(
                "the store doesn't refuse to overwrite objects ({reason}): pgsidecar looks before each write, but two servers that \
                 archive under one name at the same instant could pass each other"
            );
        }
        *known = Some(conditional);
        Ok(())
    }

    async fn describe(&self, status: &mut Status) {
        status.cluster = Some(self.settings.cluster.to_string());
        status.repository = Some(self.store.description());
        status.conditional_creation = self.conditional.lock().ok().and_then(|known| {
            known.as_ref().map(|known| match known {
                ConditionalCreation::Honoured => "honoured".to_owned(),
                ConditionalCreation::LookFirst { reason } => format!("look first: {reason}"),
            })
        });
        let (pgdata, control) = match self.data_directory() {
            Ok(found) => found,
            Err(failure) => return status.problems.push(failure),
        };
        status.system_identifier = Some(control.system_identifier);
        if let Ok(backlog) = pgdata.backlog() {
            status.archive.backlog_files = Some(backlog.files);
            status.archive.oldest_ready_seconds = backlog.oldest.map(|age| age.as_secs());
        }
        if let Some(last) = &status.archive.statistics.last.last_failure {
            status
                .problems
                .push(last.reason.clone().context(format!("{} could not be archived at {}", last.file, last.at)));
        }
        let repository = self.repository(control.system_identifier);
        match tokio::time::timeout(STATUS_PATIENCE, self.last_backup(&repository)).await {
            Ok(Ok(last)) => status.last_backup = last,
            Ok(Err(failure)) => status.problems.push(failure),
            Err(_) => status.problems.push(Failure::new(Code::StoreUnavailable, "the store does not answer in time")),
        }
    }

    async fn last_backup(&self, repository: &Repository) -> Result<Option<LastBackup>, Failure> {
        let mut cached = self.recoverable.lock().await;
        if let Some((at, last)) = &*cached
            && at.elapsed() < STATUS_CACHE
        {
            return Ok(last.clone());
        }
        let mut last = None;
        // The newest with a record: those without aren't complete.
        for id in repository.backup_ids().await?.into_iter().rev() {
            if let Some(record) = repository.backup(id).await? {
                last = Some(LastBackup { id, stopped_at: record.stopped_at });
                break;
            }
        }
        *cached = Some((Instant::now(), last.clone()));
        Ok(last)
    }
}

/// Refuses to acknowledge our file to another server: its own of the same name would be lost.
fn check_asker(
    pgdata: &DataDirectory,
    control: &ControlFile,
    name: ArchiveFileName,
    asker: Asker,
) -> Result<(), Failure> {
    let refuse = |what: String| {
        Err(Failure::new(Code::WrongCluster, what)
            .hint("Its WAL is kept. Each server needs a pgsidecar of its own, with its own PGDATA and --wal-listen; the helper finds it by PGSIDECAR_ADDRESS."))
    };
    if asker.system != control.system_identifier {
        return refuse(format!(
            "a server with system identifier {} asks to archive {name}, and this pgsidecar is beside one with {}",
            asker.system, control.system_identifier
        ));
    }
    let ours = std::fs::symlink_metadata(pgdata.wal().join(name.to_string())).map(|meta| meta.ino());
    match ours {
        Ok(inode) if inode != asker.inode => refuse(format!(
            "another copy of this database asks to archive {name}: its file isn't the one in {}",
            pgdata.wal().display()
        )),
        // What isn't there is told by who opens it.
        _ => Ok(()),
    }
}

/// Runs the daemon until it's told to stop.
///
/// # Errors
/// If a listener can't be opened.
pub async fn run(settings: &Settings, publish_helper: Option<PathBuf>) -> Result<(), Failure> {
    let (stop_sender, stop) = watch::channel(false);
    let stop_sender = Arc::new(stop_sender);
    listen_for_signals(stop_sender.clone())?;
    let ProcessSettings { wal_listen, health_listen, control_socket, drain_timeout } = &settings.process;
    // A database must not stay down because of it: PostgreSQL's own calls will tell that the helper is missing.
    let unpublished = publish_helper.and_then(|directory| crate::helper::publish(&directory).err());
    if let Some(failure) = &unpublished {
        tracing::error!(hint = failure.hint, "{failure}");
    }
    let cant_listen = |what: &str, place: &dyn std::fmt::Display, error: io::Error| {
        Failure::io(format!("listening at {place} for {what}"), &error)
            .hint("Is another pgsidecar running here? Each needs addresses of its own: --wal-listen, --health-listen, --control-socket.")
    };
    let wal = TcpListener::bind(wal_listen).await.map_err(|error| cant_listen("PostgreSQL", wal_listen, error))?;
    let health = TcpListener::bind(health_listen).await.map_err(|error| cant_listen("probes", health_listen, error))?;
    let control = Listener::unix(control_socket)
        .await
        .map_err(|error| cant_listen("commands", &control_socket.display(), error))?;

    let app = Arc::new(App::new(settings, unpublished).await);
    match &app.work {
        Ok(work) => tracing::info!(
            version = env!("CARGO_PKG_VERSION"), repository = work.store.description(), cluster = %work.settings.cluster,
            %wal_listen, %health_listen, control_socket = %control_socket.display(), "pgsidecar is up"
        ),
        Err(failure) => tracing::error!(
            hint = failure.hint, %wal_listen, %health_listen, control_socket = %control_socket.display(),
            "pgsidecar is up, but can't work: {failure}"
        ),
    }
    let start_work = tokio::spawn(start_work(app.clone()));
    let mut servers = tokio::task::JoinSet::new();
    servers.spawn(http::serve(Listener::Tcp(wal), with(&app, http::wal::handle), stop.clone()));
    servers.spawn(http::serve(Listener::Tcp(health), with(&app, http::health::handle), stop.clone()));
    servers.spawn(http::serve(control, with(&app, http::control::handle), stop.clone()));

    let mut stopping = stop.clone();
    let _ = stopping.wait_for(|stop| *stop).await;
    app.stopping.store(true, Relaxed);
    start_work.abort();
    tracing::info!(drain_timeout = ?drain_timeout, "stopping: finishing what is under way; a second signal ends it at once");
    let drained = tokio::time::timeout(*drain_timeout, async {
        app.jobs.cancel().await;
        while servers.join_next().await.is_some() {}
    });
    match drained.await {
        Ok(()) => tracing::info!("stopped"),
        Err(_) => tracing::warn!(
            "stopped before everything under way had ended; PostgreSQL will ask again for what it wasn't told about"
        ),
    }
    let _ = std::fs::remove_file(control_socket);
    Ok(())
}

fn with<F>(
    app: &Arc<App>,
    handle: impl Fn(Arc<App>, Request<Incoming>) -> F + Clone + Send + Sync + 'static,
) -> impl Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static {
    let app = app.clone();
    move |request| handle(app.clone(), request)
}

/// What is to be done once when the daemon has started, as soon as store and data directory are there: learn how the
/// store creates objects, and ship the timeline histories.
async fn start_work(app: Arc<App>) {
    let Ok(work) = app.work() else { return };
    let mut told = None;
    loop {
        let done = async {
            let (pgdata, control) = work.data_directory()?;
            let repository = work.noted_repository(&control).await?;
            histories::ship(&repository, &pgdata).await
        };
        match done.await {
            Ok(()) => return,
            Err(failure) if told.as_ref() != Some(&failure.message) => {
                tracing::warn!(hint = failure.hint, "not ready yet: {failure}");
                told = Some(failure.message);
            }
            Err(_) => {}
        }
        tokio::time::sleep(RETRY_START_WORK).await;
    }
}

/// The first signal stops in order, the second at once.
fn listen_for_signals(stop: Arc<watch::Sender<bool>>) -> Result<(), Failure> {
    let mut signals = Signals::new([SIGTERM, SIGINT]).map_err(|error| Failure::io("listening for signals", &error))?;
    std::thread::spawn(move || {
        for signal in signals.forever() {
            if stop.send_replace(true) {
                // The usual code of a process that a signal has ended.
                std::process::exit(128 + signal);
            }
        }
    });
    Ok(())
}
