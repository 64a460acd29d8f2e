//! `pgsidecar prepare`: what runs before PostgreSQL starts, as a plain init container. It ends with success when
//! PostgreSQL, or its image's entrypoint, may go on, and with a failure when it mustn't; in Kubernetes it's then started
//! again, later and later.
//!
//! The order of effects:
//!
//! 1. A switch of directories that was interrupted is ended ([`before_start`]).
//! 2. The helper is put where PostgreSQL's container finds it.
//! 3. The data directory is looked at, then, only if it matters, the repository; the decision is the core's.
//! 4. A request is claimed in the repository before anything of it is done.
//! 5. The restore ([`crate::restore`]): `PG_VERSION`, without which the entrypoint doesn't start, comes last; what is
//!    there before keeps initdb from doing anything.
//! 6. The request is noted as served. A crash between 5 and 6 leaves a database and a claim: it's noted at the next start.
//!
//! A database that is there is never kept from starting, whatever the settings say (I8): that's told, and nothing else
//! happens but that modes are set back that PostgreSQL would refuse ([`modes`]). A directory without one isn't left to initdb as long as it can't be told whether backups of it exist.

mod known;
mod look;
mod modes;
mod requests;
mod whole;

use std::{fs, io, path::Path, sync::Arc, time::Duration};

use pgsidecar_core::{
    BackupRecord, Layout, SystemIdentifier,
    plan::{RestorePlan, RestoreRequest},
    prepare::{
        Awaited, Blank, Decision, Directory, KnownSystem, Place, Refusal, Repository as Known, RequestState, Source,
        at_first_sight, choose, decide,
    },
    recovery::{RecoveryMode, RecoverySignal, RecoveryTarget, TargetAction},
    settings::RepositoryUrl,
    switch::Phase,
};
use tokio::task::JoinHandle;

use self::{
    known::{check_root, known_systems, newest_timeline},
    requests::Request,
};
use crate::{
    daemon::{open_source, open_store},
    failure::{Code, Failure},
    pgdata::{DataDirectory, foreign_owner},
    repository::Repository,
    restore::{self, RestoreOptions, command::restore_command, running::Stopped, unpack::Progress},
    settings::{PrepareSettings, RawPrepare, SettingErrors, Settings, WorkSettings},
    store::Store,
    switch,
};

pub use self::requests::{RequestClaim, RequestServed};

/// How long a database that is there waits for its request to be noted as served.
const NOTE_PATIENCE: Duration = Duration::from_secs(5);

/// The rules of a mesh (`istio-init`, `linkerd-init`) are there before init containers run, and its proxy isn't, unless
/// that is a native sidecar.
const MESH_HINT: &str = "If the pod belongs to a service mesh, init containers reach nothing before its proxy runs: let the proxy be a native sidecar, or the store's port pass it by (traffic.sidecar.istio.io/excludeOutboundPorts, config.linkerd.io/skip-outbound-ports).";

/// Shows how far a restore is, until it's aborted.
pub type ShowProgress<'a> = &'a (dyn Fn(Arc<Progress>) -> JoinHandle<()> + Sync);

/// Puts a restored database in its place, if one was prepared, or goes on with that.
async fn before_start(settings: &Settings, pgdata: &Path, show: ShowProgress<'_>) -> Result<(), Failure> {
    let progress = Arc::new(Progress::default());
    let shown = show(progress.clone());
    let carried = switch::before_start(settings, pgdata, Stopped::BeforeItsStart, progress).await;
    shown.abort();
    let _ = shown.await;
    let failure = match carried {
        Ok(None) => return Ok(()),
        Ok(Some(switch)) => {
            tracing::info!("{} was carried out", switch::describe(&switch.purpose).trim_end_matches(','));
            return Ok(());
        }
        Err(failure) => failure,
    };
    match switch::pending(pgdata) {
        // The database is as it was, and nobody could take the restore back if its pod never started.
        Ok(Some(switch)) if switch.phase == Phase::Ready => {
            tracing::error!(hint = failure.hint, "{failure}. PostgreSQL starts on the database as it was");
            if let Err(failure) = switch::note_refusal(pgdata, &failure) {
                tracing::warn!("the status won't tell: {failure}");
            }
            Ok(())
        }
        _ => Err(failure),
    }
}

/// Does what has to be done before PostgreSQL starts.
///
/// # Errors
/// Why it mustn't start.
pub async fn run(
    settings: &Settings,
    raw: &RawPrepare,
    publish_helper: Option<&Path>,
    show: ShowProgress<'_>,
) -> Result<(), Failure> {
    let start = &settings.start;
    if let Some(pgdata) = &start.pgdata {
        if let Err(error) = fs::metadata(pgdata)
            && error.kind() == io::ErrorKind::PermissionDenied
        {
            check_unreadable(settings, raw, pgdata, &error)?;
        }
        before_start(settings, pgdata, show).await?;
    }
    if let Some(failure) = publish_helper.and_then(|directory| crate::helper::publish(directory).err()) {
        // PostgreSQL's own calls will tell as well.
        tracing::error!(hint = failure.hint, "{failure}");
    }
    let checked = check_settings(settings, raw);
    let Some(pgdata) = start.pgdata.as_deref() else { return without_directory(checked, settings, raw) };
    let directory = match look::look(pgdata) {
        Ok(directory) => directory,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let hint = check_unreadable(settings, raw, pgdata, &error)?;
            tracing::error!(hint, "{} can't be read: {error}; PostgreSQL is left to itself", pgdata.display());
            return Ok(());
        }
        Err(error) => return Err(Failure::io(format!("reading {}", pgdata.display()), &error)),
    };
    let shown = pgdata.display();
    match &directory {
        Directory::Database => {
            tracing::info!("{shown} holds a database");
            // As root it gives what it makes to who owns the place; another user can't.
            if let Some(foreign) = foreign_owner(pgdata).filter(|_| !rustix::process::geteuid().is_root()) {
                tracing::warn!(hint = foreign.hint, "{foreign}");
            }
            modes::close(pgdata);
        }
        Directory::Empty => tracing::info!("{shown} is empty"),
        Directory::OnlyLostAndFound => tracing::info!("{shown} holds nothing but lost+found"),
        Directory::Interrupted => tracing::info!("{shown} holds what an interrupted restore has left"),
        Directory::Other(name) => tracing::info!("{shown} holds {name:?} and no PG_VERSION"),
    }
    match checked {
        Ok((work, prepare)) => Preparation { settings, work, prepare, pgdata, show }.go_on(&directory).await,
        Err(errors) => with_wrong_settings(settings, raw, &directory, errors),
    }
}

fn check_settings<'a>(
    settings: &'a Settings,
    raw: &RawPrepare,
) -> Result<(&'a WorkSettings, PrepareSettings), SettingErrors> {
    match (&settings.work, raw.resolve(settings.work.as_ref().ok().and_then(|work| work.clone_from.as_ref()))) {
        (Ok(work), Ok(prepare)) => Ok((work, prepare)),
        (Ok(_), Err(errors)) => Err(errors),
        (Err(errors), Ok(_)) => Err(errors.clone()),
        (Err(some), Err(more)) => Err(SettingErrors([some.0.clone(), more.0].concat())),
    }
}

/// What is in the directory can't be told. Most likely it's another user's database, which isn't kept from starting,
/// unless something else was asked for, or it can't be one. Answers with what would make it readable.
fn check_unreadable(
    settings: &Settings,
    raw: &RawPrepare,
    pgdata: &Path,
    error: &io::Error,
) -> Result<String, Failure> {
    let start = &settings.start;
    let why = match () {
        () if raw.says_initdb(start) => None,
        () if start.names_repository && look::is_closed_by_root(pgdata) => {
            Some("it's root's, so that no PostgreSQL runs on it, and none may be made there unseen")
        }
        () if raw.asks(start) => {
            Some("whether it holds a database can't be told, and a new one isn't all that is asked for")
        }
        () => None,
    };
    let hint = match look::check_writable(pgdata) {
        Err(failure) => failure.hint,
        Ok(()) => DataDirectory::open(pgdata).err().map(|failure| failure.hint).unwrap_or_default(),
    };
    match why {
        Some(why) => {
            let what = format!("{} can't be read: {error}; {why}", pgdata.display());
            Err(Failure::new(Code::TargetDirectory, what).hint(hint))
        }
        None => Ok(hint),
    }
}

/// Whether there is a database can't be told.
fn without_directory<T>(
    checked: Result<T, SettingErrors>,
    settings: &Settings,
    raw: &RawPrepare,
) -> Result<(), Failure> {
    let failure = match checked {
        Err(errors) => errors.into(),
        Ok(_) => Failure::new(Code::Misconfigured, "PGDATA: PostgreSQL's data directory is needed here, and not set")
            .hint("Set PGDATA or --pgdata to the directory, as mounted in this container."),
    };
    if raw.asks(&settings.start) {
        return Err(failure);
    }
    tracing::error!(hint = failure.hint, "{failure}; PostgreSQL is left to itself");
    Ok(())
}

/// A wrong setting keeps no database from starting, but a volume that is lost isn't made blank by one.
fn with_wrong_settings(
    settings: &Settings,
    raw: &RawPrepare,
    directory: &Directory,
    errors: SettingErrors,
) -> Result<(), Failure> {
    let failure = Failure::from(errors);
    let unasked = !settings.start.names_repository && !raw.asks(&settings.start);
    let may_start = match directory {
        Directory::Database => true,
        Directory::Interrupted | Directory::Other(_) => false,
        // A first start before anybody has set up backups, or with initdb.
        Directory::Empty | Directory::OnlyLostAndFound => unasked || raw.says_initdb(&settings.start),
    };
    if may_start {
        tracing::error!(hint = failure.hint, "{failure}. PostgreSQL may start all the same, but it has no backups");
        return Ok(());
    }
    Err(failure.context("whether this database has backups can't be told, so that no new one is made"))
}

struct Preparation<'a> {
    settings: &'a Settings,
    work: &'a WorkSettings,
    prepare: PrepareSettings,
    pgdata: &'a Path,
    show: ShowProgress<'a>,
}

impl Preparation<'_> {
    async fn go_on(&self, directory: &Directory) -> Result<(), Failure> {
        let place = self.settings.start.place;
        let wishes = &self.prepare.wishes;
        let store = open_store(self.work).await;
        let request = self.request(&store);
        if let Some(decision) = at_first_sight(directory, place, wishes) {
            if decision == Decision::KeepDatabase {
                self.keep(request.as_ref()).await;
                return Ok(());
            }
            return self.carry_out(decision, &store, request.as_ref(), &[]).await;
        }
        tracing::info!("asking {} what it has of {}", store.description(), self.work.cluster);
        let known = self.ask(&store, request.as_ref()).await.map_err(|failure| self.cant_tell(failure))?;
        let decision = decide(directory, place, wishes, &known);
        let Known::Knows { systems, request: state } = known else {
            return Err(self.cant_tell(Failure::internal("it was asked and has not answered")));
        };
        if let (Some(request), RequestState::Served { by, at, .. }) = (&request, &state) {
            tracing::warn!(
                "request {} ({}) was served at {at} by {by}, and isn't served again",
                request.id(),
                request.what()
            );
        }
        if let Some(request) = request.as_ref().filter(|_| state.is_outlived(&systems)) {
            tracing::warn!(
                "request {} ({}) was begun here, and a newer timeline is archived since: it was served, and isn't served again",
                request.id(),
                request.what()
            );
        }
        self.carry_out(decision, &store, request.as_ref(), &systems).await
    }

    fn request(&self, store: &Arc<dyn Store>) -> Option<Request> {
        let (once, source) = self.prepare.wishes.once.as_ref()?;
        let what = match (source, &self.work.clone_from) {
            (Source::Clone { .. }, Some(source)) => format!("a clone of {source}: {}", once.what()),
            _ => once.what(),
        };
        let server = self.settings.start.server.clone();
        Some(Request::new(store.clone(), self.work.cluster.clone(), once.id.clone(), what, server))
    }

    /// What the repository says of the cluster and of the request.
    async fn ask(&self, store: &Arc<dyn Store>, request: Option<&Request>) -> Result<Known, Failure> {
        check_root(&self.work.repository)?;
        let request = match request {
            None => RequestState::Unclaimed,
            Some(request) => request.state().await?,
        };
        let systems = known_systems(store, self.work).await?;
        Ok(Known::Knows { systems, request })
    }

    fn cant_tell(&self, failure: Failure) -> Failure {
        let hint = format!("{} {}", Refusal::CantTell.hint(), self.with_mesh(&failure, &self.work.repository));
        failure
            .context(format!("{} holds no database, and {}", self.pgdata.display(), Refusal::CantTell))
            .hint(hint.trim())
    }

    /// A failure's hint, with what nothing else tells: behind a mesh's redirection an init container reaches no store.
    fn with_mesh(&self, failure: &Failure, repository: &RepositoryUrl) -> String {
        let over_network = matches!(repository, RepositoryUrl::S3 { .. }) && failure.code == Code::StoreUnavailable;
        match over_network && self.settings.start.in_kubernetes {
            true => format!("{} {MESH_HINT}", failure.hint).trim_start().to_owned(),
            false => failure.hint.clone(),
        }
    }

    /// There is a database. Nothing here may keep it from starting.
    async fn keep(&self, request: Option<&Request>) {
        look::remove_stale_marker(self.pgdata);
        let database = DataDirectory::open(self.pgdata).and_then(|pgdata| pgdata.control());
        if let Err(failure) = &database {
            tracing::error!(hint = failure.hint, "{failure}");
        }
        if let Some(request) = request
            && self.settings.start.place == Place::Primary
        {
            let system = database.ok().map(|control| control.system_identifier);
            match tokio::time::timeout(NOTE_PATIENCE, self.note_left_request(request, system)).await {
                Ok(Ok(())) => {}
                Ok(Err(failure)) => {
                    tracing::warn!(hint = failure.hint, "the state of request {} isn't known: {failure}", request.id())
                }
                Err(_) => tracing::warn!(
                    "the state of request {} isn't known: the store hasn't answered in time",
                    request.id()
                ),
            }
        }
        tracing::info!("PostgreSQL may start on it");
    }

    async fn note_left_request(&self, request: &Request, system: Option<SystemIdentifier>) -> Result<(), Failure> {
        let (id, what) = (request.id(), request.what());
        match request.state().await? {
            RequestState::Served { by, at, .. } => {
                tracing::info!("request {id} ({what}) was served at {at} by {by}");
            }
            // It was killed before it could note it. Otherwise it would be served again for a volume that is lost.
            RequestState::Ours { .. } => {
                request.served(system, None).await?;
                tracing::info!("request {id} ({what}) was served: the database is there");
            }
            _ => tracing::warn!(
                hint = "A request is served only into an empty directory. In place: pgsidecar restore run --in-place.",
                "request {id} ({what}) is left alone, because there is a database"
            ),
        }
        Ok(())
    }

    async fn carry_out(
        &self,
        decision: Decision,
        store: &Arc<dyn Store>,
        request: Option<&Request>,
        systems: &[KnownSystem],
    ) -> Result<(), Failure> {
        match (decision, &self.prepare.wishes.once, request) {
            (Decision::KeepDatabase, ..) => Ok(()),
            (Decision::LeaveToImage(why), ..) => {
                self.leave_to_image(why);
                Ok(())
            }
            (Decision::Refuse(refusal), ..) => Err(self.refused(&refusal)),
            (Decision::Heal(system), ..) => {
                tracing::info!("the database comes back as it was in the end (PGSIDECAR_ON_EMPTY is restore)");
                let whole =
                    RestoreRequest { target: RecoveryTarget::Latest, timeline: None, backup: None, inclusive: true };
                let repository = self.repository(store, system);
                let signal = RecoverySignal { tail: true, source: None };
                self.restore(&repository, whole, RecoveryMode::Recovery(signal), async || Ok(())).await?;
                tracing::info!("PostgreSQL replays what is archived when it starts, and goes on on a new timeline");
                Ok(())
            }
            (Decision::Standby(system, timeline), ..) => {
                tracing::info!("this server comes up as a standby that follows the archive");
                let newest = RestoreRequest { target: RecoveryTarget::Latest, timeline, backup: None, inclusive: true };
                let mode = RecoveryMode::Standby { primary_conninfo: self.prepare.primary_conninfo.clone() };
                self.restore(&self.repository(store, system), newest, mode, async || Ok(())).await.map(|_| ())
            }
            (Decision::ServeRequest(system), Some((once, _)), Some(request)) => {
                tracing::info!("request {} is served: {}", request.id(), request.what());
                let repository = self.repository(store, system);
                let newest = newest_timeline(systems, system);
                let claim = async || request.claim(system, newest).await;
                let signal = RecoverySignal { tail: once.restore.target == RecoveryTarget::Latest, source: None };
                let mode = RecoveryMode::Recovery(signal);
                let backup = self.restore(&repository, once.restore.clone(), mode, claim).await?;
                self.note_served(request, system, &backup).await;
                Ok(())
            }
            (Decision::Clone, Some((once, _)), Some(request)) => {
                let Some(source) = &self.work.clone_from else {
                    return Err(Failure::internal("a clone without a source"));
                };
                tracing::info!("request {} is served: {}", request.id(), request.what());
                let theirs = open_source(source, self.work).await;
                let there = WorkSettings { cluster: source.cluster.clone(), ..self.work.clone() };
                let found = known_systems(&theirs, &there).await.map_err(|failure| {
                    let hint = self.with_mesh(&failure, &source.repository);
                    failure.hint(hint)
                })?;
                let no_backup = || {
                    Failure::new(Code::NotFound, format!("{source} holds no complete backup"))
                        .hint("Check PGSIDECAR_CLONE_FROM, and take a backup beside the source.")
                };
                let chosen = choose(&found, self.prepare.wishes.system).map_err(|refusal| {
                    Failure::new(Code::InvalidRequest, format!("{source}: {refusal}")).hint(refusal.hint())
                })?;
                let system = chosen.ok_or_else(no_backup)?;
                let repository =
                    Repository::new(theirs, Layout::new(source.cluster.clone(), system), self.work.compression_level);
                let newest = newest_timeline(systems, system).max(newest_timeline(&found, system));
                let claim = async || request.claim(system, newest).await;
                let tail = once.restore.target == RecoveryTarget::Latest;
                let mode = RecoveryMode::Recovery(RecoverySignal { tail, source: Some(source.clone()) });
                let backup = self.restore(&repository, once.restore.clone(), mode, claim).await?;
                self.note_served(request, system, &backup).await;
                tracing::warn!(
                    hint = "pgsidecar backup create, once PostgreSQL is up.",
                    "the clone archives to {} and has no backup of its own there yet",
                    store.description()
                );
                Ok(())
            }
            (decision, ..) => Err(Failure::internal(format!("no request for {decision:?}"))),
        }
    }

    fn leave_to_image(&self, why: Blank) {
        match why {
            Blank::NoBackups => tracing::warn!("a new database may be made: {why}"),
            Blank::Said | Blank::Unknown => tracing::info!("a new database may be made: {why}"),
        }
        if let Err(failure) = look::check_writable(self.pgdata) {
            tracing::warn!(hint = failure.hint, "{failure}; neither could PostgreSQL if it runs as the same user");
        }
    }

    fn refused(&self, refusal: &Refusal) -> Failure {
        let code = match refusal {
            Refusal::CantTell => Code::StoreUnavailable,
            Refusal::ReplicaWaits(_, Awaited::Request | Awaited::Promotion | Awaited::Backup) => Code::Busy,
            Refusal::SeveralSystems(_) | Refusal::NoSuchSystem(..) | Refusal::RequestChanged(..) => Code::Misconfigured,
            Refusal::RequestOfAnother(..) => Code::Conflict,
            Refusal::NoBackups => Code::NotFound,
            _ => Code::TargetDirectory,
        };
        Failure::new(code, format!("PostgreSQL must not start on {}: {refusal}", self.pgdata.display()))
            .hint(refusal.hint())
    }

    fn repository(&self, store: &Arc<dyn Store>, system: SystemIdentifier) -> Repository {
        let layout = Layout::new(self.work.cluster.clone(), system);
        Repository::new(store.clone(), layout, self.work.compression_level)
    }

    /// Restores into the data directory. `claim` is called when the plan holds, before anything is touched.
    async fn restore(
        &self,
        repository: &Repository,
        request: RestoreRequest,
        mode: RecoveryMode,
        claim: impl AsyncFnOnce() -> Result<(), Failure>,
    ) -> Result<BackupRecord, Failure> {
        look::check_writable(self.pgdata)?;
        let standby = matches!(mode, RecoveryMode::Standby { .. });
        let tail = request.target == RecoveryTarget::Latest && !standby;
        let system = repository.layout().system();
        let command = restore_command(&self.work.helper, self.settings.process.wal_listen, system, tail)?;
        let inclusive = request.inclusive;
        let plan = match &request {
            RestoreRequest { target: RecoveryTarget::Latest, timeline: None, backup: None, .. } => {
                whole::plan(repository).await?
            }
            _ => restore::plan(repository, request).await?,
        };
        tell(&plan, repository);
        claim().await?;
        let options = RestoreOptions {
            to: self.pgdata.to_owned(),
            mode,
            inclusive,
            action: TargetAction::Promote,
            tablespaces: Default::default(),
            restore_command: command,
            parallelism: self.work.parallelism,
        };
        let progress = Arc::new(Progress::default());
        let shown = (self.show)(progress.clone());
        let restored = restore::run(repository, &plan, &options, progress).await;
        shown.abort();
        let _ = shown.await;
        restored?;
        match standby {
            true => tracing::info!("restored; PostgreSQL starts as a standby, on the newest timeline"),
            false => {
                tracing::info!("restored; PostgreSQL recovers to {} when it starts, and is promoted then", plan.target)
            }
        }
        Ok(plan.backup)
    }

    /// The database is there: that this can't be noted keeps nothing from starting. The next start notes it.
    async fn note_served(&self, request: &Request, system: SystemIdentifier, backup: &BackupRecord) {
        if let Err(failure) = request.served(Some(system), Some(backup.id)).await {
            tracing::warn!(
                hint = failure.hint,
                "that request {} was served could not be noted: {failure}",
                request.id()
            );
        }
    }
}

fn tell(plan: &RestorePlan, repository: &Repository) {
    tracing::info!(
        "from {}: backup {} of {}, {} MB to be read; WAL without a gap through {}",
        repository.store().description(),
        plan.backup.id,
        plan.backup.stopped_at.strftime("%Y-%m-%d %H:%M:%SZ"),
        plan.download_bytes.div_ceil(1 << 20),
        plan.wal_through
    );
    for passed in &plan.passed_over {
        tracing::warn!("backup {} is newer but can't be restored: {}", passed.backup, passed.because);
    }
    if let Some(missing) = plan.gap {
        tracing::warn!(
            "{missing} is missing although later WAL is there: what was committed after {} is lost",
            plan.reachable
        );
    }
}
