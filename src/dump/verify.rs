//! Whether dumps are whole.

use std::{process::Stdio, sync::atomic::AtomicU64};

use pgsidecar_core::{
    DumpId, DumpRecord, ObjectKey,
    backup::StoredObject,
    dump::{DumpFormat, DumpedDatabase},
    layout::DumpObject,
};
use serde::Serialize;

use super::{
    archive::{self, TailWriter, is_complete},
    program::{Program, pump},
    tools::Tools,
};
use crate::{
    codec::{self, HashingReader},
    failure::{Code, Failure},
    repository::Repository,
};

/// How a dump was found.
#[derive(Clone, Debug, Serialize)]
pub struct VerifiedDump {
    /// The dump.
    pub dump: DumpId,
    /// Whether nothing is wrong with it.
    pub ok: bool,
    /// Whether all of it was read.
    pub read: bool,
    /// What is wrong, a sentence each.
    pub problems: Vec<String>,
}

/// Looks at a dump: are its objects there, with their sizes, and do the tables of contents read? With `deep` all of it is
/// read: the hashes are compared, and pg_restore makes SQL of every archive, to its end.
///
/// # Errors
/// The store's; [`Code::Misconfigured`] if there is no pg_restore that could read it.
pub async fn verify(
    repository: &Repository,
    tools: &Tools,
    record: &DumpRecord,
    deep: bool,
    bytes: &AtomicU64,
) -> Result<VerifiedDump, Failure> {
    let mut problems = Vec::new();
    let mut note = |what: &str, outcome: Result<(), Failure>| match outcome {
        Err(failure) if failure.code == Code::Damaged => {
            problems.push(format!("{what}: {failure}"));
            Ok(())
        }
        other => other,
    };
    for database in &record.databases {
        let object = DumpObject::Database(database.name.clone(), record.archives);
        let key = repository.layout().dump(record.id, object);
        let outcome = check_database(repository, tools, record.archives, &key, database, deep).await;
        note(&format!("database {:?}", database.name.as_str()), outcome)?;
        bytes.fetch_add(database.stored.size, std::sync::atomic::Ordering::Relaxed);
    }
    let key = repository.layout().dump(record.id, DumpObject::Globals);
    let outcome = match check_size(repository, &key, record.globals.stored).await {
        Ok(()) if deep => check_sql(repository, &key, record.globals.stored).await,
        outcome => outcome,
    };
    note("globals", outcome)?;
    Ok(VerifiedDump { dump: record.id, ok: problems.is_empty(), read: deep, problems })
}

async fn check_database(
    repository: &Repository,
    tools: &Tools,
    format: DumpFormat,
    key: &ObjectKey,
    database: &DumpedDatabase,
    deep: bool,
) -> Result<(), Failure> {
    check_size(repository, key, database.stored).await?;
    match (format, deep) {
        (DumpFormat::Custom, false) => archive::table_of_contents(tools, repository, key, |_| {}).await,
        (DumpFormat::Custom, true) => check_archive(repository, tools, key, database.stored).await,
        (DumpFormat::Plain, false) => Ok(()),
        (DumpFormat::Plain, true) => check_sql(repository, key, database.stored).await,
    }
}

fn damaged(what: &str) -> Failure {
    Failure::new(Code::Damaged, what)
}

async fn check_size(repository: &Repository, key: &ObjectKey, stored: StoredObject) -> Result<(), Failure> {
    match repository.store().head(key).await? {
        None => Err(damaged(&format!("{key} isn't there"))),
        Some(info) if info.size != stored.size => {
            Err(damaged(&format!("{key} has {} bytes, and {} were stored", info.size, stored.size)))
        }
        Some(_) => Ok(()),
    }
}

/// Makes SQL of all of an archive, and throws it away.
async fn check_archive(
    repository: &Repository,
    tools: &Tools,
    key: &ObjectKey,
    stored: StoredObject,
) -> Result<(), Failure> {
    let object = archive::open(repository, key).await?;
    let mut command = tools.command("pg_restore");
    command.args(["--file=-"]).env("LC_ALL", "C").stdin(Stdio::piped()).stdout(Stdio::piped());
    let program = Program::start(&mut command)?;
    let killer = program.killer();
    let checked = tokio::task::spawn_blocking(move || {
        let stdin = program.stdin();
        let why = object.failure();
        let feeding = std::thread::spawn(move || {
            let mut hashing = HashingReader::new(object);
            archive::feed(&mut hashing, stdin)?;
            Ok::<_, std::io::Error>(hashing.check(stored))
        });
        let mut tail = TailWriter { inner: std::io::sink(), tail: Vec::new() };
        let read = pump(program, &mut tail, |_| {}, |error| Failure::io("reading from pg_restore", error));
        let fed = feeding.join().map_err(|_| Failure::internal("feeding pg_restore"))?;
        archive::judge(fed, &why, damaged)?;
        read.map_err(|failure| damaged(&failure.message))?;
        match is_complete(&tail.tail) {
            true => Ok(()),
            false => Err(damaged("what pg_restore makes of it isn't complete")),
        }
    });
    let checked = checked.await?;
    drop(killer);
    checked
}

/// Reads SQL to its end, which says that it's complete.
async fn check_sql(repository: &Repository, key: &ObjectKey, stored: StoredObject) -> Result<(), Failure> {
    let object = archive::open(repository, key).await?;
    let checked = tokio::task::spawn_blocking(move || {
        let why = object.failure();
        let mut tail = TailWriter { inner: std::io::sink(), tail: Vec::new() };
        let (found, _) = codec::decompress(object, &mut tail).map_err(|error| match why.or_io("", &error) {
            sent if sent.code != Code::Io => sent,
            _ => damaged(&format!("it can't be decompressed: {error}")),
        })?;
        if (found.size, found.sha256) != (stored.size, stored.sha256) {
            return Err(damaged("its bytes aren't those that were stored"));
        }
        match is_complete(&tail.tail) {
            true => Ok(()),
            false => Err(damaged("its end is missing")),
        }
    });
    checked.await?
}
