//! Restoring a base backup to a directory, and telling PostgreSQL how to recover from there.
//!
//! The order of effects, and what a crash between two of them leaves:
//!
//! 1. Nothing is touched before the plan holds, the directory is empty and there is room.
//! 2. A marker file says that the directory is ours. A crash from here on leaves no `PG_VERSION`: nothing starts on
//!    the directory, and the next restore into it starts over.
//! 3. All parts but the last are unpacked in parallel; each is checked against its SHA-256 when it's through.
//! 4. The last part is taken into memory: it's what makes the directory startable.
//! 5. `backup_manifest`, recovery settings, `recovery.signal`, `backup_label`, `tablespace_map`, links.
//! 6. One `syncfs` for each file system: everything up to here is durable.
//! 7. `pg_control`, then `PG_VERSION` by rename, each with its own fsync. From here on PostgreSQL starts.
//! 8. The marker goes.
//!
//! If any step fails, what was written is removed again.

pub mod directory;
mod running;
pub mod snapshot;
pub mod unpack;

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::Arc,
};

use pgsidecar_core::{
    BackupRecord,
    backup::{PartRecord, StoredObject, TablespaceRecord},
    backup_label::TablespaceMap,
    layout::BackupObject,
    plan::{RestorePlan, RestoreRequest, WalScan, select},
    recovery::{RecoverySettings, RecoveryTarget, TargetAction, rewrite_auto_conf},
};
use tokio::task::JoinSet;

use self::{
    directory::TargetDirectory,
    unpack::{HeldFile, Progress, Unpacker},
};
use crate::{
    codec::HashingReader,
    failure::{Code, Failure},
    repository::{Repository, damaged},
};

/// The last part holds a few small files. Anything larger isn't one.
const MAX_LAST_PART_BYTES: u64 = 8 << 20;

/// What is to happen beyond the plan.
#[derive(Clone, Debug)]
pub struct RestoreOptions {
    /// The directory to restore to: absent or empty.
    pub to: PathBuf,
    /// Whether the target itself is replayed.
    pub inclusive: bool,
    /// What the server does at the target.
    pub action: TargetAction,
    /// Where tablespaces go: their old location to the new one.
    pub tablespaces: BTreeMap<String, String>,
    /// With what the server gets its WAL.
    pub restore_command: String,
    /// How many parts are read at a time.
    pub parallelism: usize,
}

/// Plans a restore: which backup, which timeline, which WAL.
///
/// # Errors
/// [`Code::TargetUnreachable`] if the target can't be reached; the store's.
pub async fn plan(repository: &Repository, request: RestoreRequest) -> Result<RestorePlan, Failure> {
    let selection = select(&repository.catalog().await?, &request)?;
    let size = selection.backup.wal_segment_size;
    // How far the listing must go. A time or a transaction can lie anywhere.
    let until = match &request.target {
        RecoveryTarget::Immediate => Some(size.start_of(size.previous_segment_number(selection.backup.stop_lsn))),
        RecoveryTarget::Lsn(lsn) => Some((*lsn).max(selection.backup.stop_lsn)),
        _ => None,
    };
    let scan = WalScan::new(selection.history.clone(), size, selection.backup.start_lsn);
    let facts = repository.scan_wal(scan, until).await?.finish();
    Ok(RestorePlan::new(selection, request.target, facts)?)
}

/// Carries a plan out.
///
/// # Errors
/// What went wrong. The directory then holds nothing that PostgreSQL would start on.
///
/// # Cancellation
/// Not to be dropped half-way: threads would go on writing. Killed as a process, the directory can be restored to
/// again.
pub async fn run(
    repository: &Repository,
    plan: &RestorePlan,
    options: &RestoreOptions,
    progress: Arc<Progress>,
) -> Result<(), Failure> {
    let backup = &plan.backup;
    let tablespaces = tablespace_targets(&format!("backup {}", backup.id), &backup.tablespaces, &options.tablespaces)?;
    let directory = TargetDirectory::prepare(&options.to, &tablespaces, backup)?;
    let done = fill(repository, plan, options, &directory, &tablespaces, progress).await;
    match done {
        Ok(()) => Ok(()),
        Err(failure) => {
            let restoring = format!("restoring backup {} to {}", backup.id, options.to.display());
            match directory.clear() {
                Ok(()) => Err(failure.context(restoring)),
                Err(left) => Err(failure
                    .context(restoring)
                    .hint(format!("What was written could not be removed ({left}); PostgreSQL doesn't start on it, and it can be deleted."))),
            }
        }
    }
}

/// Where each tablespace goes, by its OID. `named` is what they belong to, for people.
fn tablespace_targets(
    named: &str,
    tablespaces: &[TablespaceRecord],
    mapping: &BTreeMap<String, String>,
) -> Result<BTreeMap<u32, PathBuf>, Failure> {
    for (old, new) in mapping {
        let known = tablespaces.iter().any(|tablespace| tablespace.location == *old);
        if !known {
            let there: Vec<&str> = tablespaces.iter().map(|tablespace| tablespace.location.as_str()).collect();
            return Err(Failure::new(Code::InvalidRequest, format!("{named} has no tablespace at {old}")).hint(
                format!("Its tablespaces: {}.", if there.is_empty() { "none".to_owned() } else { there.join(", ") }),
            ));
        }
        if !Path::new(new).is_absolute() {
            return Err(Failure::new(
                Code::InvalidRequest,
                format!("the tablespace's new location {new:?} is not an absolute path"),
            ));
        }
    }
    Ok(tablespaces
        .iter()
        .map(|tablespace| {
            (tablespace.oid, PathBuf::from(mapping.get(&tablespace.location).unwrap_or(&tablespace.location)))
        })
        .collect())
}

async fn fill(
    repository: &Repository,
    plan: &RestorePlan,
    options: &RestoreOptions,
    directory: &TargetDirectory,
    tablespaces: &BTreeMap<u32, PathBuf>,
    progress: Arc<Progress>,
) -> Result<(), Failure> {
    let backup = &plan.backup;
    let Some((last, parts)) = backup.parts.split_last() else {
        return Err(damaged(&format!("backup {}", backup.id), "its record lists no parts"));
    };
    let unpacker = Unpacker::new(directory, tablespaces.clone(), progress.clone());
    let files = unpack_parts(repository, backup, parts, &unpacker, options.parallelism).await?;
    let held = hold_part(repository, backup, last).await?;
    let files = files + held.len() as u64;
    if files != backup.files {
        return Err(damaged(
            &format!("backup {}", backup.id),
            &format!("its parts hold {files} files, its record says {}", backup.files),
        ));
    }
    if let Some(file) = held.first() {
        directory.adopt(file.owner)?;
    }
    // Here, so that a damaged one ends the restore before anything is startable.
    let manifest = directory.create("backup_manifest")?;
    read_stored(repository, backup, BackupObject::Manifest, backup.manifest, u64::MAX - 1, manifest).await?;
    let settings = RecoverySettings {
        target: plan.target.clone(),
        inclusive: options.inclusive,
        timeline: plan.timeline,
        action: options.action,
        restore_command: options.restore_command.clone(),
    };
    let (directory, tablespaces, major) = (directory.clone(), tablespaces.clone(), backup.major_version());
    let mapping = options.tablespaces.clone();
    tokio::task::spawn_blocking(move || make_startable(&directory, &tablespaces, &mapping, major, &settings, held))
        .await?
}

/// Unpacks parts, several at a time. Returns only when no thread writes any more, whatever happens.
async fn unpack_parts(
    repository: &Repository,
    backup: &BackupRecord,
    parts: &[PartRecord],
    unpacker: &Unpacker,
    parallelism: usize,
) -> Result<u64, Failure> {
    let mut waiting = parts.iter();
    let mut running = JoinSet::new();
    let mut files = 0;
    let mut failure: Option<Failure> = None;
    loop {
        while failure.is_none() && running.len() < parallelism {
            let Some(part) = waiting.next() else { break };
            let (repository, part, id, unpacker) = (repository.clone(), *part, backup.id, unpacker.clone());
            running.spawn(async move {
                let key = repository.layout().backup(id, BackupObject::Part(part.number));
                let reader =
                    repository.open_stream(&key).await?.ok_or_else(|| damaged(key.as_str(), "it is missing"))?.1;
                let unpacked = tokio::task::spawn_blocking(move || unpacker.unpack(reader, &part)).await?;
                unpacked.map_err(|failure| if failure.code == Code::Io { failure } else { failure.context(key) })
            });
        }
        match running.join_next().await {
            None => break,
            Some(ended) => match ended.map_err(Failure::from).and_then(|result| result) {
                Ok(unpacked) => files += unpacked,
                Err(first) => {
                    unpacker.cancel();
                    failure.get_or_insert(first);
                }
            },
        }
    }
    failure.map_or(Ok(files), Err)
}

async fn hold_part(
    repository: &Repository,
    backup: &BackupRecord,
    part: &PartRecord,
) -> Result<Vec<HeldFile>, Failure> {
    let object = BackupObject::Part(part.number);
    let plain = read_stored(repository, backup, object, part.stored, MAX_LAST_PART_BYTES, Vec::new()).await?;
    let key = repository.layout().backup(backup.id, object);
    unpack::hold(&plain).map_err(|error| damaged(key.as_str(), &error.to_string()))
}

/// Reads a compressed object of a backup into a writer, and checks at its end that its bytes were those that were
/// stored. More plain bytes than `limit` are damage.
async fn read_stored<W: Write + Send + 'static>(
    repository: &Repository,
    backup: &BackupRecord,
    object: BackupObject,
    stored: StoredObject,
    limit: u64,
    mut writer: W,
) -> Result<W, Failure> {
    let key = repository.layout().backup(backup.id, object);
    let Some((_, reader)) = repository.open_stream(&key).await? else {
        return Err(damaged(key.as_str(), "it is missing"));
    };
    let name = key.to_string();
    let read = move || {
        let why = reader.failure();
        let bad = |error: std::io::Error| match why.or_io("", &error) {
            failure if failure.code == Code::Io && error.raw_os_error().is_none() => damaged(&name, &error.to_string()),
            failure => failure,
        };
        let mut decoder = zstd::stream::read::Decoder::new(HashingReader::new(reader)).map_err(bad)?;
        let copied = std::io::copy(&mut (&mut decoder).take(limit + 1), &mut writer).map_err(bad)?;
        if copied > limit {
            return Err(damaged(&name, &format!("it holds more than {limit} bytes")));
        }
        decoder.finish().into_inner().check(stored).map_err(|how| damaged(&name, &how))?;
        Ok(writer)
    };
    tokio::task::spawn_blocking(read).await?
}

/// Steps 5 to 8.
fn make_startable(
    directory: &TargetDirectory,
    tablespaces: &BTreeMap<u32, PathBuf>,
    mapping: &BTreeMap<String, String>,
    major: u32,
    settings: &RecoverySettings,
    held: Vec<HeldFile>,
) -> Result<(), Failure> {
    let root = directory.path();
    let mut files: BTreeMap<String, HeldFile> = held.into_iter().map(|file| (file.path.clone(), file)).collect();
    let mut take = |path: &str| {
        files.remove(path).ok_or_else(|| damaged("the last part of the backup", &format!("it lacks {path}")))
    };
    let (version, control, label) = (take("PG_VERSION")?, take("global/pg_control")?, take("backup_label")?);
    let map = take("tablespace_map").ok();
    let files = RecoveryFiles { label: &label.content, map: map.as_ref().map(|map| map.content.as_slice()) };
    write_recovery_files(directory, &files, mapping, major, settings)?;
    for (oid, target) in tablespaces {
        let link = root.join("pg_tblspc").join(oid.to_string());
        symlink(target, &link).map_err(|error| Failure::io(format!("linking {}", link.display()), &error))?;
    }
    directory.sync_file_systems()?;
    directory.write_durably("global/pg_control", &control.content)?;
    directory.write_durably("PG_VERSION", &version.content)?;
    directory.release()
}

/// What `pg_backup_stop` returned for a backup or a snapshot.
struct RecoveryFiles<'a> {
    label: &'a [u8],
    map: Option<&'a [u8]>,
}

/// Tells PostgreSQL how to recover: settings, `recovery.signal`, `tablespace_map`, `backup_label`. Each file appears whole,
/// so that it can be done again after a crash.
fn write_recovery_files(
    directory: &TargetDirectory,
    files: &RecoveryFiles<'_>,
    mapping: &BTreeMap<String, String>,
    major: u32,
    settings: &RecoverySettings,
) -> Result<(), Failure> {
    let root = directory.path();
    // What a standby's backup or an earlier restore brought along would outrank what is wanted now.
    for signal in ["standby.signal", "recovery.signal"] {
        remove_if_there(&root.join(signal))?;
    }
    let auto_conf = root.join("postgresql.auto.conf");
    let brought = match fs::read(&auto_conf) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(Failure::io(format!("reading {}", auto_conf.display()), &error)),
    };
    directory.write_durably("postgresql.auto.conf", &rewrite_auto_conf(&brought, major, settings))?;
    directory.write_durably("recovery.signal", b"")?;
    if let Some(map) = files.map {
        // PostgreSQL makes its links by this file when it starts: with the old locations it would point back to them.
        let parsed: TablespaceMap =
            String::from_utf8_lossy(map).parse().map_err(|error| damaged("tablespace_map", &format!("{error}")))?;
        directory.write_durably("tablespace_map", parsed.remap(mapping).to_string().as_bytes())?;
    }
    directory.write_durably("backup_label", files.label)
}

fn remove_if_there(path: &Path) -> Result<(), Failure> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Failure::io(format!("removing {}", path.display()), &error))
        }
        _ => Ok(()),
    }
}
