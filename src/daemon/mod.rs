//! `pgsidecar run`: the listeners, what they share, and the orderly stop.
//!
//! The daemon comes up whatever the settings say. With wrong ones it's degraded: it listens, refuses what it can't do
//! with the reason, and says it in log, status and metrics. Nothing here exits because of the store or of PostgreSQL;
//! only an address that it can't listen at, or a helper that it can't publish, ends it.
//!
//! Stopping: in a pod, PostgreSQL and its sidecar are usually told to stop at the same time, and the last WAL comes when
//! PostgreSQL has ended. So the first SIGTERM or SIGINT ends only base backups and snapshots; archiving goes on until PostgreSQL is gone
//! and its last WAL is shipped (see [`shutdown`]), or, where only the sidecar is stopped, for a short while. Then
//! connections are accepted no more, and the requests under way end. All of it takes at most the drain timeout. A second
//! signal exits at once.

mod cloning;
mod dumps;
mod fetching;
mod restore_points;
pub mod restores;
mod retention;
mod schedules;
mod server;
mod snapshots;
mod status;

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
use pgsidecar_core::{
    ArchiveFileName, ControlFile, Layout, SystemIdentifier,
    chain::{BackupType, Choice},
    settings::{CloneSource, RepositoryUrl},
};
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    iterator::Signals,
};
use tokio::{net::TcpListener, sync::watch};

use crate::{
    backup::{self, BackupRequest},
    codec::ChannelReader,
    failure::{Code, Failure},
    histories::{self, KnownHistories},
    http::{self, Listener, wal::Asker},
    jobs::{Job, Jobs},
    pgdata::{DataDirectory, foreign_owner},
    repository::{Repository, Stored},
    retention::growth::KnownGrowth,
    schedule::{self, Scheduler},
    settings::{ProcessSettings, Settings, WorkSettings},
    snapshot::Snapshots,
    store::{ConditionalCreation, LocalStore, ReadOnlyStore, S3Config, S3Store, Store},
    wal::{
        Origin, Origins,
        archive::Archiver,
        directory::ArchiveDirectory,
        fetch::Fetcher,
        lookahead, remains, shutdown,
        source::{ArchiveStatus as ReadyMarks, WalSource},
        spool, standby,
    },
};

const RETRY_START_WORK: Duration = Duration::from_secs(10);

use cloning::Source;

pub use dumps::{FailedDump, LastDump};
pub use fetching::Wanted;
pub use status::{ArchiveStatus, LastBackup, LastDrill, RestoresStatus, Status};

/// Opens the store that the settings name. No network access.
pub async fn open_store(settings: &WorkSettings) -> Arc<dyn Store> {
    open_store_at(&settings.repository, settings).await
}

/// Opens the store of a clone's source, read-only. No network access.
pub async fn open_source(source: &CloneSource, settings: &WorkSettings) -> Arc<dyn Store> {
    Arc::new(ReadOnlyStore::new(open_store_at(&source.repository, settings).await))
}

async fn open_store_at(repository: &RepositoryUrl, settings: &WorkSettings) -> Arc<dyn Store> {
    match repository {
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
    process: ProcessSettings,
    jobs: Jobs,
    snapshots: Arc<Snapshots>,
    archiver: Arc<Archiver>,
    scheduler: Scheduler,
    /// What went wrong at the start and doesn't keep the rest from working.
    start_problem: Option<Failure>,
    /// The data directory, where a usable one was named, whatever else is wrong.
    pgdata: Option<PathBuf>,
    /// When PostgreSQL asked last to archive.
    asked: Mutex<Option<tokio::time::Instant>>,
    stopping: AtomicBool,
}

/// What there is when the settings are right.
struct Work {
    settings: WorkSettings,
    store: Arc<dyn Store>,
    fetcher: Fetcher,
    source: Option<Source>,
    histories: KnownHistories,
    archive_directory: Option<Arc<ArchiveDirectory>>,
    /// The systems whose `cluster.json` is known to be there.
    noted: Mutex<Option<SystemIdentifier>>,
    conditional: Mutex<Option<ConditionalCreation>>,
    recoverable: tokio::sync::Mutex<Option<(Instant, Option<LastBackup>)>>,
    drilled: tokio::sync::Mutex<Option<(Instant, Option<LastDrill>)>>,
    growth: KnownGrowth,
    dumped: dumps::Dumped,
    server: server::KnownServer,
}

impl App {
    /// Sets up what the requests share.
    pub async fn new(settings: &Settings, start_problem: Option<Failure>) -> App {
        let work = match settings.work() {
            Err(failure) => Err(failure),
            Ok(work) => {
                if let Ok(pgdata) = work.pgdata().and_then(DataDirectory::open) {
                    spool::clean(&pgdata);
                }
                Ok(Work {
                    settings: work.clone(),
                    store: open_store(work).await,
                    fetcher: Fetcher::new(work.spool.clone()),
                    source: Source::open(work).await,
                    histories: KnownHistories::default(),
                    archive_directory: work.archive_directory.clone().map(|path| Arc::new(ArchiveDirectory::new(path))),
                    noted: Mutex::default(),
                    conditional: Mutex::default(),
                    recoverable: tokio::sync::Mutex::default(),
                    drilled: tokio::sync::Mutex::default(),
                    growth: KnownGrowth::default(),
                    dumped: dumps::Dumped::default(),
                    server: server::KnownServer::default(),
                })
            }
        };
        App {
            work,
            process: settings.process.clone(),
            jobs: Jobs::default(),
            snapshots: Arc::default(),
            archiver: Arc::default(),
            scheduler: Scheduler::default(),
            start_problem,
            pgdata: settings.start.pgdata.clone(),
            asked: Mutex::default(),
            stopping: AtomicBool::new(false),
        }
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

    /// When PostgreSQL asked last to archive.
    fn asked_last(&self) -> Option<tokio::time::Instant> {
        self.asked.lock().ok().and_then(|asked| *asked)
    }

    fn note_asked(&self) {
        if let Ok(mut asked) = self.asked.lock() {
            *asked = Some(tokio::time::Instant::now());
        }
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
        self.note_asked();
        let origin = self.ready_to_archive(name).await?;
        if let Some(asker) = asker {
            check_asker(&origin, name, asker).inspect_err(|failure| self.archiver.note_failure(name, failure))?;
        }
        self.archiver.archive_file(&origin, name).await
    }

    /// What archiving needs. That it isn't there counts as a failure to archive.
    async fn ready_to_archive(&self, name: ArchiveFileName) -> Result<Origin, Failure> {
        self.origin().await.inspect_err(|failure| self.archiver.note_failure(name, failure))
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
        self.note_asked();
        let origin = self.ready_to_archive(name).await?;
        self.archiver.archive_body(&origin, name, body, length).await
    }

    /// What is archived without being asked for.
    fn sources(&self) -> Vec<Arc<dyn WalSource>> {
        let mut sources: Vec<Arc<dyn WalSource>> = vec![Arc::new(ReadyMarks)];
        if let Some(directory) = self.work.as_ref().ok().and_then(|work| work.archive_directory.clone()) {
            sources.push(directory);
        }
        sources
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

    /// What kind of backup it would be now.
    ///
    /// # Errors
    /// What would keep it from being taken.
    pub async fn plan_backup(&self, wanted: BackupType) -> Result<Choice, Failure> {
        let work = self.work()?;
        let (pgdata, control) = work.data_directory()?;
        let repository = work.repository(control.system_identifier);
        backup::plan(&repository, &pgdata, &work.settings, wanted).await
    }
}

#[async_trait::async_trait]
impl Origins for App {
    async fn origin(&self) -> Result<Origin, Failure> {
        let work = self.work()?;
        let (pgdata, control) = work.data_directory()?;
        let repository = work.noted_repository(&control).await?;
        Ok(Origin { repository, pgdata, control, claimant: work.settings.claimant() })
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
}

/// Refuses to acknowledge our file to another server: its own of the same name would be lost.
fn check_asker(origin: &Origin, name: ArchiveFileName, asker: Asker) -> Result<(), Failure> {
    let Origin { pgdata, control, .. } = origin;
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
        Ok(inode) if inode == asker.inode => Ok(()),
        // What can't be read is told by who opens it.
        Err(error) if error.kind() != io::ErrorKind::NotFound => Ok(()),
        // The asker has its file. Where there is none here, that the repository has one of that name proves nothing.
        _ => refuse(format!(
            "another copy of this database asks to archive {name}: its file isn't the one in {}",
            pgdata.wal().display()
        )),
    }
}

/// Runs the daemon until it's told to stop.
///
/// # Errors
/// If a listener can't be opened.
pub async fn run(settings: &Settings, publish_helper: Option<PathBuf>) -> Result<(), Failure> {
    let signalled = listen_for_signals()?;
    let (stop_sender, stop) = watch::channel(false);
    let ProcessSettings { wal_listen, health_listen, control_socket, drain_timeout, server_stop_wait } =
        &settings.process;
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
    if let Some(foreign) = app.pgdata.as_deref().and_then(foreign_owner) {
        tracing::warn!(hint = foreign.hint, "{foreign}");
    }
    let asking = tokio::spawn(server::keep(app.clone(), signalled.clone()));
    let start_work = tokio::spawn(start_work(app.clone(), stop.clone()));
    let scheduled = tokio::spawn(schedule::run(app.clone(), signalled.clone()));
    let mut servers = tokio::task::JoinSet::new();
    servers.spawn(http::serve(Listener::Tcp(wal), with(&app, http::wal::handle), stop.clone()));
    servers.spawn(http::serve(Listener::Tcp(health), with(&app, http::health::handle), stop.clone()));
    servers.spawn(http::serve(control, with(&app, http::control::handle), stop.clone()));

    let mut stopping = signalled;
    let _ = stopping.wait_for(|stop| *stop).await;
    app.stopping.store(true, Relaxed);
    tracing::info!(drain_timeout = ?drain_timeout, "stopping: finishing what is under way; a second signal ends it at once");
    let sources = app.sources();
    let drained = tokio::time::timeout(*drain_timeout, async {
        // PostgreSQL asks on while it stops: the listeners and the look-ahead stay until it has.
        let finished = shutdown::finish(&app.archiver, &*app, &sources, *server_stop_wait);
        tokio::join!(app.jobs.cancel(), app.snapshots.stop(), finished);
        stop_sender.send_replace(true);
        while servers.join_next().await.is_some() {}
    });
    match drained.await {
        Ok(()) => tracing::info!("stopped"),
        Err(_) => tracing::warn!(
            "stopped before everything under way had ended; PostgreSQL will ask again for what it wasn't told about"
        ),
    }
    start_work.abort();
    scheduled.abort();
    asking.abort();
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

/// What the daemon does by itself: as soon as store and data directory are there it learns how the store creates
/// objects and ships the timeline histories, and from then on archives ahead and removes what killed daemons have left.
async fn start_work(app: Arc<App>, stop: watch::Receiver<bool>) {
    let mut told = None;
    let repository = loop {
        let done = async {
            let origin = app.origin().await?;
            histories::ship(&origin.repository, &origin.pgdata).await?;
            Ok::<_, Failure>(origin.repository)
        };
        match done.await {
            Ok(repository) => break repository,
            Err(failure) if told.as_ref() != Some(&failure.message) => {
                tracing::warn!(hint = failure.hint, "not ready yet: {failure}");
                told = Some(failure.message);
            }
            Err(_) => {}
        }
        if app.work.is_err() {
            return;
        }
        tokio::time::sleep(RETRY_START_WORK).await;
    };
    let Ok(work) = app.work() else { return };
    let received = standby::run(app.archiver.clone(), &*app, &work.settings.connection, stop.clone());
    let ahead =
        app.sources().into_iter().map(|source| lookahead::run(app.archiver.clone(), &*app, source, stop.clone()));
    let known = work.histories.keep(&*app, stop.clone());
    let growth = work.growth.keep(&*app, &work.settings.retention, stop.clone());
    tokio::join!(futures_util::future::join_all(ahead), received, known, growth, remains::run(&repository));
}

/// The first signal stops in order, the second at once.
fn listen_for_signals() -> Result<watch::Receiver<bool>, Failure> {
    let (signalled, stop) = watch::channel(false);
    let mut signals = Signals::new([SIGTERM, SIGINT]).map_err(|error| Failure::io("listening for signals", &error))?;
    std::thread::spawn(move || {
        for signal in signals.forever() {
            if signalled.send_replace(true) {
                // The usual code of a process that a signal has ended.
                std::process::exit(128 + signal);
            }
        }
    });
    Ok(stop)
}
