//! Logical dumps.
//!
//! The order of effects, and what a crash between two of them leaves:
//!
//! 1. The server is asked for its version and databases; pg_dump has to be of its major version or a newer one.
//! 2. `started.json` claims the id. A crash from here on leaves objects without `dump.json`: not a dump, never listed,
//!    removed by the next dump of the same instance, or of any after two days.
//! 3. Each database: pg_dump's output streams into the store. The object becomes visible only when pg_dump has exited with
//!    0; then its table of contents is read back. A database that was dropped meanwhile is left out, and that is told.
//!    Whatever else fails fails the dump.
//! 4. The globals, last: roles that were made meanwhile, and own something in a database, are in them.
//! 5. Every object is looked up once more, and `dump.json` is written, the commit marker. Nothing is ever deleted before.
//!    Then the record is read back, and all is looked up again: another could have taken the dump for remains.

pub mod archive;
pub mod claim;
mod commit;
pub mod globals;
mod plain;
pub mod program;
pub mod restore;
pub mod server;
mod tables;
mod target;
pub mod tools;
pub mod verify;

use std::{
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use jiff::Timestamp;
use pgsidecar_core::{
    ContentId, DumpId, DumpRecord, ObjectKey,
    backup::StoredObject,
    dump::{DUMP_FORMAT, DatabaseName, DumpFormat, DumpedDatabase, DumpedGlobals, Selection},
    layout::{DumpObject, RepositoryObject},
};
use serde::{Deserialize, Serialize};

use self::{
    archive::Dumping,
    program::Program,
    server::{DumpedServer, FoundDatabase, Server, Way, is_of_postgres},
    tools::Tools,
};
use crate::{
    failure::{Code, Failure},
    progress::{Phase, Progress},
    repository::{Repository, SINGLE_REQUEST_BYTES},
    settings::WorkSettings,
    store::Creation,
};

/// How often a database is tried whose objects vanish while pg_dump looks at them.
const TRIES: u32 = 5;
/// How long pg_dump waits for a lock, unless it's said.
pub const LOCK_WAIT: Duration = Duration::from_secs(600);
/// gzip's level where pg_dump has no zstd: the higher ones take several times as long for a few percent.
const GZIP_LEVEL: u32 = 1;

/// What is wanted.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DumpRequest {
    /// Which databases.
    pub include: Vec<pgsidecar_core::dump::NamePattern>,
    /// Which of them not.
    pub exclude: Vec<pgsidecar_core::dump::NamePattern>,
    /// What pg_dump is to write.
    pub format: DumpFormat,
    /// How long pg_dump waits for a lock on a table before it gives up, in seconds.
    pub lock_wait_timeout_seconds: u64,
}

impl Default for DumpRequest {
    fn default() -> DumpRequest {
        let lock_wait_timeout_seconds = LOCK_WAIT.as_secs();
        DumpRequest {
            include: Vec::new(),
            exclude: Vec::new(),
            format: DumpFormat::default(),
            lock_wait_timeout_seconds,
        }
    }
}

/// The server that the settings name, with client tools that fit it.
///
/// # Errors
/// [`Code::Misconfigured`] if there are none; what psql says.
pub async fn connect(settings: &WorkSettings, way: Way) -> Result<Server, Failure> {
    let (named, connection) = (settings.pg_bindir.clone(), settings.connection.clone());
    let server = tokio::task::spawn_blocking(move || {
        let tools = Tools::any(named.as_deref())?;
        Ok::<_, Failure>(Server::new(tools, &connection, way))
    });
    let server = server.await??;
    let major = server.major().await?;
    let named = settings.pg_bindir.clone();
    let fitting = tokio::task::spawn_blocking(move || Tools::find(named.as_deref(), major)).await??;
    Ok(server.with(fitting))
}

/// Takes a dump.
///
/// # Errors
/// What went wrong, with the database. Nothing is listed then.
///
/// # Cancellation
/// Dropped, it ends pg_dump; the remains are removed by the next run. A cancelled `progress` removes them itself.
pub async fn create(
    server: &Server,
    repository: &Repository,
    instance: &str,
    request: &DumpRequest,
    progress: Arc<Progress>,
) -> Result<DumpRecord, Failure> {
    progress.enter(Phase::Dumping);
    claim::remove_remains(repository, instance).await;
    let started_at = Timestamp::now();
    let found = server.look().await?;
    let id = claim::claim(repository, instance).await?;
    tracing::info!(dump = %id, server = server.description(), tools = server.tools().version(), "dump begins");
    let run = Run { server, repository, id, request, progress: &progress, found: &found };
    let done = progress.unless_cancelled(run.all(started_at)).await;
    match done {
        Ok(record) => {
            tracing::info!(dump = %id, databases = record.databases.len(), stored_bytes = record.stored_bytes(), "dump is complete");
            Ok(record)
        }
        Err(failure) => {
            // The record's own request may have succeeded although its answer was lost: then it's a dump.
            if !progress.committing.load(Relaxed) {
                claim::remove(repository, id).await;
            }
            match progress.is_cancelled() {
                true => Err(Failure::new(Code::Stopping, "the dump was given up: nothing of it is listed")
                    .hint("Take it again.")),
                false => Err(failure),
            }
        }
    }
}

struct Run<'a> {
    server: &'a Server,
    repository: &'a Repository,
    id: DumpId,
    request: &'a DumpRequest,
    progress: &'a Arc<Progress>,
    found: &'a DumpedServer,
}

impl Run<'_> {
    async fn all(&self, started_at: Timestamp) -> Result<DumpRecord, Failure> {
        let mut warnings = Vec::new();
        let wanted = self.wanted(&mut warnings)?;
        let compress = compression(self.server.tools(), self.repository.level()).await?;
        let mut databases = Vec::new();
        for (n, (name, found)) in wanted.iter().enumerate() {
            self.progress.note_doing(&format!("database {} of {}: {name}", n + 1, wanted.len()));
            match self.database(name, found, &compress).await? {
                Some(done) => databases.push(done),
                None => {
                    warnings.push(format!("database {name:?} was dropped while the dump was taken: it isn't in it"))
                }
            }
            self.progress.files.fetch_add(1, Relaxed);
        }
        if databases.is_empty() {
            return Err(Failure::new(Code::NotFound, "all databases that were to be dumped were dropped meanwhile"));
        }
        self.progress.note_doing("globals");
        let globals = self.globals(&mut warnings).await?;
        let tools = self.server.tools();
        let record = DumpRecord {
            format: DUMP_FORMAT,
            id: self.id,
            system_identifier: self.repository.layout().system(),
            server_version: self.found.version,
            tools_major: tools.major(),
            tools_version: tools.version().to_owned(),
            started_at,
            finished_at: Timestamp::now(),
            archives: self.request.format,
            databases,
            globals,
            server: self.server.description(),
            warnings,
            writer: format!("pgsidecar {}", env!("CARGO_PKG_VERSION")),
        };
        commit::check_objects(self.repository, &record).await?;
        self.progress.committing.store(true, Relaxed);
        self.repository.store_json(&RepositoryObject::Dump(self.id, DumpObject::Record), &record).await?;
        // Who has taken it for remains a moment ago may still be at it.
        commit::check_record(self.repository, &record).await?;
        Ok(record)
    }

    /// The databases that are to be dumped. What can't be is told.
    fn wanted(&self, warnings: &mut Vec<String>) -> Result<Vec<(DatabaseName, &FoundDatabase)>, Failure> {
        let selection = Selection { include: self.request.include.clone(), exclude: self.request.exclude.clone() };
        let mut wanted = Vec::new();
        for database in &self.found.databases {
            let name = &database.name;
            if !selection.selects(name, database.is_template) {
                continue;
            }
            if database.is_invalid {
                warnings.push(format!(
                    "database {name:?} is what an interrupted DROP DATABASE has left: it isn't in the dump"
                ));
            } else if !database.allows_connections {
                warnings.push(format!("database {name:?} allows no connections (datallowconn): it isn't in the dump"));
            } else {
                wanted.push((name.parse().map_err(Failure::internal)?, database));
            }
        }
        let missing = |pattern: &&pgsidecar_core::dump::NamePattern| {
            pattern.is_literal() && !self.found.databases.iter().any(|database| pattern.matches(&database.name))
        };
        if let Some(pattern) = self.request.include.iter().find(missing) {
            return Err(Failure::new(Code::NotFound, format!("there is no database {:?}", pattern.to_string()))
                .hint("Names are as in pg_database; upper and lower case differ."));
        }
        if wanted.is_empty() {
            return Err(Failure::new(Code::NotFound, "no database fits what is included and excluded"));
        }
        Ok(wanted)
    }

    /// Dumps a database; `None` if it was dropped meanwhile.
    async fn database(
        &self,
        name: &DatabaseName,
        found: &FoundDatabase,
        compress: &str,
    ) -> Result<Option<DumpedDatabase>, Failure> {
        let mut tries = 1;
        loop {
            let failure = match self.try_database(name, found, compress).await {
                Ok(done) => return Ok(Some(done)),
                Err(failure) if !is_of_postgres(&failure) => return Err(failure.context(format!("database {name:?}"))),
                Err(failure) => failure,
            };
            if !self.server.has_database(found.oid).await.unwrap_or(true) {
                return Ok(None);
            }
            if tries == TRIES || !is_by_ddl(&failure.message) {
                return Err(explain(failure).context(format!("database {name:?}")));
            }
            tracing::info!(database = name.as_str(), %failure, "something was dropped while pg_dump looked at it; it's begun again");
            tries += 1;
        }
    }

    async fn try_database(
        &self,
        name: &DatabaseName,
        found: &FoundDatabase,
        compress: &str,
    ) -> Result<DumpedDatabase, Failure> {
        let mut command = self.server.command_in("pg_dump", name)?;
        let milliseconds = self.request.lock_wait_timeout_seconds.clamp(1, 1_000_000) * 1000;
        command.args(["--no-password", &format!("--lock-wait-timeout={milliseconds}")]);
        let key = self.repository.layout().dump(self.id, DumpObject::Database(name.clone(), self.request.format));
        let (stored, plain_bytes) = match self.request.format {
            DumpFormat::Custom => {
                command.args(["--format=custom", compress]);
                let dumping = archive::raw(self.start(command)?, self.counted());
                (self.upload(&key, dumping).await?, None)
            }
            DumpFormat::Plain => {
                command.arg("--format=plain");
                let dumping = archive::sql(self.start(command)?, self.repository.level(), self.counted());
                let compressed = self.upload(&key, dumping).await?;
                (compressed.stored, Some(compressed.plain.size))
            }
        };
        let toc_entries = match self.request.format {
            DumpFormat::Plain => None,
            DumpFormat::Custom => {
                let entries = Arc::new(AtomicU64::new(0));
                let counted = entries.clone();
                archive::table_of_contents(self.server.tools(), self.repository, &key, move |_| {
                    counted.fetch_add(1, Relaxed);
                })
                .await?;
                Some(entries.load(Relaxed))
            }
        };
        let stored = StoredObject { size: stored.size, sha256: stored.sha256 };
        let properties = found.properties.clone();
        Ok(DumpedDatabase { name: name.clone(), oid: found.oid, stored, plain_bytes, toc_entries, properties })
    }

    async fn globals(&self, warnings: &mut Vec<String>) -> Result<DumpedGlobals, Failure> {
        let mut command = self.server.command("pg_dumpall")?;
        command.args(["--globals-only", "--no-password", "--database", self.server.maintenance_database()]);
        let role_passwords = self.found.sees_passwords;
        if !role_passwords {
            command.arg("--no-role-passwords");
            warnings.push("the roles' passwords aren't in the dump: this role may not read them".to_owned());
        }
        let dumping = archive::sql(self.start(command)?, self.repository.level(), self.counted());
        let key = self.repository.layout().dump(self.id, DumpObject::Globals);
        let done: ContentId = self.upload(&key, dumping).await.map_err(|failure| failure.context("globals"))?.stored;
        Ok(DumpedGlobals { stored: StoredObject { size: done.size, sha256: done.sha256 }, role_passwords })
    }

    fn start(&self, mut command: std::process::Command) -> Result<Program, Failure> {
        Program::start(command.stdin(Stdio::null()).stdout(Stdio::piped()))
    }

    fn counted(&self) -> impl Fn(u64) + Send + 'static {
        let progress = self.progress.clone();
        move |bytes| {
            progress.bytes.fetch_add(bytes, Relaxed);
        }
    }

    /// Stores a program's output; visible only when the program has ended with 0.
    async fn upload<T: Send + 'static>(&self, key: &ObjectKey, dumping: Dumping<T>) -> Result<T, Failure> {
        let Dumping { chunks, done, killer } = dumping;
        let mut result = None;
        let complete = async {
            result = Some(done.await??);
            Ok(())
        };
        let creation = self.repository.upload(key, chunks, SINGLE_REQUEST_BYTES, complete).await?;
        drop(killer);
        if creation == Creation::Exists {
            return Err(Failure::new(Code::Conflict, format!("{key} is already in the repository"))
                .hint("Something else writes under the same name. Take the dump again."));
        }
        result.ok_or_else(|| Failure::internal("an upload without content"))
    }
}

/// pg_dump's own compression, so that pg_restore reads the object as it is.
async fn compression(tools: &Tools, level: i32) -> Result<String, Failure> {
    let tools = tools.clone();
    let has_zstd = tokio::task::spawn_blocking(move || tools.has_zstd()).await?;
    Ok(if has_zstd { format!("--compress=zstd:{level}") } else { format!("--compress={GZIP_LEVEL}") })
}

/// Whether pg_dump failed because something was dropped between its looking at the catalog and its locking it.
fn is_by_ddl(message: &str) -> bool {
    ["does not exist", "cache lookup failed", "could not open relation", "concurrently"]
        .iter()
        .any(|part| message.contains(part))
}

/// What to do about what pg_dump said.
fn explain(failure: Failure) -> Failure {
    let said = |part: &str| failure.message.contains(part);
    let hint = if said("permission denied for large object") {
        "Large objects are their owners': dump as a superuser, or grant SELECT ON LARGE OBJECT."
    } else if said("permission denied") {
        "Grant pg_read_all_data to the role (PostgreSQL 14 and later), or leave the database out with --exclude."
    } else if said("row-level security") || said("row security") {
        "Dump as a role with BYPASSRLS: with row security, rows would be missing unnoticed."
    } else if said("statement timeout") || said("lock timeout") {
        "Something holds a lock: look at pg_locks. --lock-wait-timeout says how long pg_dump waits."
    } else if said("server version mismatch") {
        "Install client tools of the server's major version."
    } else {
        "Nothing of the dump is listed. Earlier dumps are as they were."
    };
    failure.hint(hint)
}
