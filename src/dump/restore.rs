//! Restoring a database, or some of its tables, from a dump.
//!
//! Nothing is overwritten that nobody said: the database has to be empty, or the tables not there. Everything happens in one
//! transaction: pg_restore makes SQL of the archive (a plain dump is SQL), psql runs it, and its COMMIT is handed over when
//! every byte of the object has been read and found to be what was stored. SQL, because a newer pg_restore sets what an older
//! server doesn't know.
//!
//! A plain dump's SQL has a transaction of its own around large objects, whose COMMIT would be that of all before it. So a
//! plain dump is read once before any of it is run: it has to be what was stored, and one with large objects is restored
//! only into a database that was made for it, which can be dropped again.

use std::{
    io::{self, Read, Write},
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use pgsidecar_core::{
    DumpRecord, TableName,
    backup::StoredObject,
    dump::{DatabaseName, DumpFormat, DumpedDatabase},
    layout::DumpObject,
};
use serde::Serialize;

use super::{archive, plain, program::Program, server::Server, tables, target};
use crate::{
    codec::{self, ChannelReader, HashingReader},
    failure::{Code, Failure},
    progress::{Phase, Progress},
    repository::Repository,
};

/// The end of SQL that is held back until it's known that all before it is right: COMMIT stands there.
const HELD_BYTES: usize = 4096;
/// How far from its beginning the SQL sets parameters.
const HEADER_BYTES: usize = 4096;
/// What pg_dump and pg_restore set at the beginning, and since which version there is such a parameter.
const NEWER_PARAMETERS: [(&str, u32); 1] = [("SET transaction_timeout = 0;\n", 170_000)];
/// What is wanted.
#[derive(Clone, Debug)]
pub struct DumpRestore {
    /// The database in the dump.
    pub database: DatabaseName,
    /// Where to.
    pub into: DatabaseName,
    /// Whether to create that.
    pub create: bool,
    /// Whether to drop what is in the way first.
    pub clean: bool,
    /// Whether everything shall belong to the role that restores, without grants.
    pub no_owner: bool,
    /// These tables alone; none means all of it.
    pub tables: Vec<TableName>,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct RestoredDump {
    /// The database in the dump.
    pub database: DatabaseName,
    /// Where it is now.
    pub into: DatabaseName,
    /// How many bytes of SQL were run.
    pub sql_bytes: u64,
    /// What should be known, a sentence each.
    pub warnings: Vec<String>,
}

/// Restores.
///
/// # Errors
/// [`Code::Conflict`] if something is in the way; [`Code::Damaged`] if the dump isn't what was stored; what psql says.
/// Nothing was changed then.
pub async fn restore(
    server: &Server,
    repository: &Repository,
    record: &DumpRecord,
    request: &DumpRestore,
    progress: &Arc<Progress>,
) -> Result<RestoredDump, Failure> {
    let dumped = record.database(&request.database).ok_or_else(|| no_such_database(record, &request.database))?;
    let mut warnings = Vec::new();
    let server_version: u32 = server.json(None, "SELECT current_setting('server_version_num')::int").await?;
    if server_version / 10_000 < record.major_version() {
        warnings.push(format!(
            "the dump is of PostgreSQL {}, the server is {}: what that doesn't know fails the restore, and nothing is changed then",
            record.major_version(),
            server_version / 10_000
        ));
    }
    let key = repository.layout().dump(record.id, DumpObject::Database(dumped.name.clone(), record.archives));
    if record.archives == DumpFormat::Plain && (!request.tables.is_empty() || request.clean || request.no_owner) {
        return Err(Failure::new(Code::InvalidRequest, "a plain dump can only be restored as a whole, as it is")
            .hint("--table, --clean and --no-owner need a dump in the custom format."));
    }
    let entries = match request.tables.is_empty() {
        true => None,
        false => Some(tables::entries(server, repository, &key, &request.tables).await?),
    };
    if record.archives == DumpFormat::Plain {
        let looked = progress.unless_cancelled(plain::look_through(repository, &key, dumped.stored)).await;
        let has_own_transaction = looked.map_err(|failure| match progress.is_cancelled() {
            true => given_up(),
            false => failure.context(format!("restoring {:?}", dumped.name.as_str())),
        })?;
        if has_own_transaction && !request.create {
            return Err(Failure::new(
                Code::InvalidRequest,
                "this plain dump has large objects: its SQL can't be run in one transaction",
            )
            .hint("Nothing was changed. Restore into a new database, which is dropped again if it fails (--into NAME --create); dumps in the custom format have no such limit."));
        }
    }
    progress.enter(Phase::Writing);
    if request.create {
        target::create(server, dumped, request, &mut warnings).await?;
    } else {
        target::check(server, request).await?;
    }
    let restored = progress
        .unless_cancelled(stream(server, repository, record, request, dumped, entries, server_version, progress))
        .await;
    match restored {
        Ok(sql_bytes) => {
            Ok(RestoredDump { database: dumped.name.clone(), into: request.into.clone(), sql_bytes, warnings })
        }
        Err(failure) => {
            if request.create {
                // We made it just now, and nothing is in it.
                let dropped = server.run(None, &format!("DROP DATABASE {}", request.into.quoted())).await;
                if let Err(failure) = dropped {
                    tracing::warn!(%failure, "the database that was created could not be dropped again");
                }
            }
            if progress.is_cancelled() {
                return Err(given_up());
            }
            Err(explain(failure, request.create).context(format!("restoring {:?}", dumped.name.as_str())))
        }
    }
}

fn no_such_database(record: &DumpRecord, name: &DatabaseName) -> Failure {
    let names: Vec<&str> = record.databases.iter().map(|database| database.name.as_str()).collect();
    Failure::new(Code::NotFound, format!("there is no database {:?} in dump {}", name.as_str(), record.id))
        .hint(format!("It has: {}.", names.join(", ")))
}

fn given_up() -> Failure {
    Failure::new(Code::Stopping, "the restore was given up: nothing was changed")
}

fn explain(failure: Failure, is_new: bool) -> Failure {
    if !failure.hint.is_empty() {
        return failure;
    }
    let missing_role = failure.message.contains("role ") && failure.message.contains("does not exist");
    match missing_role {
        true => failure
            .hint("Create the roles first ('pgsidecar dump restore ID --globals' does), or restore with --no-owner."),
        false if is_new => failure.hint("The database that was made for it is dropped again."),
        false => failure.hint("All of it was one transaction, which was rolled back."),
    }
}

/// Runs the SQL in one transaction. Answers with how much there was.
#[expect(clippy::too_many_arguments, reason = "all of them are what one restore is about")]
async fn stream(
    server: &Server,
    repository: &Repository,
    record: &DumpRecord,
    request: &DumpRestore,
    dumped: &DumpedDatabase,
    entries: Option<Vec<String>>,
    server_version: u32,
    progress: &Arc<Progress>,
) -> Result<u64, Failure> {
    let key = repository.layout().dump(record.id, DumpObject::Database(dumped.name.clone(), record.archives));
    let object = archive::open(repository, &key).await?;
    let mut psql = server.psql(Some(&request.into))?;
    let psql = Program::start(psql.stdin(Stdio::piped()).stdout(Stdio::null()))?;
    let psql_killer = psql.killer();
    let mut sql = SqlWriter {
        inner: psql.stdin().ok_or_else(|| Failure::internal("psql without stdin"))?,
        header: Some(Vec::new()),
        server_version,
        written: 0,
        progress: progress.clone(),
    };
    let stored = dumped.stored;
    let (pg_restore, restore_killer, list) = match record.archives {
        DumpFormat::Plain => (None, None, None),
        DumpFormat::Custom => {
            let (program, list) = start_pg_restore(server, request, entries)?;
            let killer = program.killer();
            (Some(program), Some(killer), list)
        }
    };
    let ran = tokio::task::spawn_blocking(move || {
        let written = match pg_restore {
            None => run_plain(object, stored, &mut sql),
            Some(pg_restore) => run_archive(object, stored, pg_restore, &mut sql),
        };
        let count = sql.written;
        match written {
            Ok(()) => {
                drop(sql);
                psql.finish().map(|()| count)
            }
            Err(Stopped::ByPsql) => {
                drop(sql);
                psql.finish().and_then(|()| Err(Failure::internal("psql ended before the SQL did")))
            }
            // Without COMMIT, psql's end rolls back.
            Err(Stopped::Because(failure)) => Err(failure),
        }
    });
    let ran = ran.await?;
    drop((psql_killer, restore_killer, list));
    ran
}

fn start_pg_restore(
    server: &Server,
    request: &DumpRestore,
    entries: Option<Vec<String>>,
) -> Result<(Program, Option<tempfile::NamedTempFile>), Failure> {
    let mut command = server.tools().command("pg_restore");
    command.args(["--file=-", "--single-transaction"]).env("LC_ALL", "C");
    if request.clean {
        command.args(["--clean", "--if-exists"]);
    }
    if request.no_owner {
        command.args(["--no-owner", "--no-privileges"]);
    }
    let list = match entries {
        None => None,
        Some(entries) => {
            let failed = |error: io::Error| Failure::io("writing a list for pg_restore", &error);
            let mut file = tempfile::NamedTempFile::new().map_err(failed)?;
            file.write_all((entries.join("\n") + "\n").as_bytes()).map_err(failed)?;
            command.arg("--use-list").arg(file.path());
            Some(file)
        }
    };
    Ok((Program::start(command.stdin(Stdio::piped()).stdout(Stdio::piped()))?, list))
}

/// Why no more SQL was handed over.
enum Stopped {
    /// psql wants no more, and says itself why.
    ByPsql,
    /// This.
    Because(Failure),
}

impl From<Failure> for Stopped {
    fn from(failure: Failure) -> Stopped {
        Stopped::Because(failure)
    }
}

pub(super) fn not_as_stored(what: &str) -> Failure {
    Failure::new(Code::Damaged, format!("the dump isn't what was stored: {what}"))
        .hint("Nothing was changed. Restore another dump, or get this object back from a replica or an older version of the bucket.")
}

/// Runs SQL. The transaction is ours.
fn run_plain(object: ChannelReader, stored: StoredObject, sql: &mut SqlWriter) -> Result<(), Stopped> {
    let why = object.failure();
    sql.inner.write_all(b"BEGIN;\n").map_err(|_| Stopped::ByPsql)?;
    let decompressed = codec::decompress(object, sql);
    let (found, _) = decompressed.map_err(|error| match (error.kind(), why.or_io("", &error)) {
        (io::ErrorKind::BrokenPipe, _) => Stopped::ByPsql,
        (_, sent) if sent.code != Code::Io => sent.into(),
        _ => not_as_stored(&error.to_string()).into(),
    })?;
    if (found.size, found.sha256) != (stored.size, stored.sha256) {
        return Err(not_as_stored("its SHA-256 is another one").into());
    }
    sql.end(b"\nCOMMIT;\n").map_err(|_| Stopped::ByPsql)
}

/// Lets pg_restore make SQL of an archive. The transaction is its own, and its end is held back.
fn run_archive(
    object: ChannelReader,
    stored: StoredObject,
    pg_restore: Program,
    sql: &mut SqlWriter,
) -> Result<(), Stopped> {
    let (stdin, stdout) = (pg_restore.stdin(), pg_restore.stdout());
    let why = object.failure();
    let abandoned = Arc::new(AtomicBool::new(false));
    let feeding = std::thread::spawn({
        let abandoned = abandoned.clone();
        move || {
            let mut reader = HashingReader::new(Abandonable { inner: object, abandoned });
            archive::feed(&mut reader, stdin)?;
            // pg_restore may stop before the end, and what it has read must be right all the same.
            Ok::<_, io::Error>(reader.check(stored))
        }
    });
    let mut held = Vec::new();
    let pump = || {
        let Some(mut stdout) = stdout else { return Ok::<_, Stopped>(()) };
        let mut buffer = vec![0; codec::CHUNK];
        loop {
            let n = codec::fill(&mut stdout, &mut buffer)
                .map_err(|error| Failure::io("reading from pg_restore", &error))?;
            if n == 0 {
                return Ok(());
            }
            held.extend_from_slice(&buffer[..n]);
            let free = held.len().saturating_sub(HELD_BYTES);
            sql.write_all(&held[..free]).map_err(|_| Stopped::ByPsql)?;
            held.drain(..free);
        }
    };
    let pumped = pump();
    abandoned.store(pumped.is_err(), Relaxed);
    if let Err(failure) = pumped {
        drop(pg_restore);
        let _ = feeding.join();
        return Err(failure);
    }
    let restored = pg_restore.finish();
    let fed = feeding.join().map_err(|_| Failure::internal("feeding pg_restore"))?;
    archive::judge(fed, &why, not_as_stored)?;
    restored?;
    sql.end(&held).map_err(|_| Stopped::ByPsql)
}

/// A reader that fails when nobody wants the rest any more.
struct Abandonable {
    inner: ChannelReader,
    abandoned: Arc<AtomicBool>,
}

impl Read for Abandonable {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.abandoned.load(Relaxed) {
            return Err(io::Error::other("abandoned"));
        }
        self.inner.read(buffer)
    }
}

/// psql's stdin. What an older server doesn't know is taken out of the header.
struct SqlWriter {
    inner: std::process::ChildStdin,
    header: Option<Vec<u8>>,
    server_version: u32,
    written: u64,
    progress: Arc<Progress>,
}

impl SqlWriter {
    /// Writes the last of it.
    fn end(&mut self, last: &[u8]) -> io::Result<()> {
        self.write_all(last)?;
        self.pass_header()
    }

    fn pass_header(&mut self) -> io::Result<()> {
        match self.header.take() {
            Some(header) => self.inner.write_all(&without_newer(&header, self.server_version)),
            None => Ok(()),
        }
    }
}

impl Write for SqlWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.written += bytes.len() as u64;
        self.progress.bytes.fetch_add(bytes.len() as u64, Relaxed);
        let Some(header) = &mut self.header else { return self.inner.write_all(bytes).map(|()| bytes.len()) };
        header.extend_from_slice(bytes);
        if header.len() >= HEADER_BYTES {
            self.pass_header()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// The header without what the server doesn't know.
fn without_newer(header: &[u8], server_version: u32) -> Vec<u8> {
    let mut header = header.to_vec();
    for (statement, since) in NEWER_PARAMETERS {
        let first = header[..header.len().min(HEADER_BYTES)].windows(statement.len());
        let at = first.enumerate().find(|(_, window)| *window == statement.as_bytes()).map(|(at, _)| at);
        if let Some(at) = at.filter(|_| server_version < since) {
            header.drain(at..at + statement.len());
        }
    }
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_server_isn_t_told_what_it_does_not_know() {
        let header = b"--\n\nSET lock_timeout = 0;\nSET transaction_timeout = 0;\nSET x = 1;\n";
        assert_eq!(without_newer(header, 150_018), b"--\n\nSET lock_timeout = 0;\nSET x = 1;\n");
        assert_eq!(without_newer(header, 170_005), header);
    }
}
