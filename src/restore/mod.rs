//! Restoring a base backup to a directory, and telling PostgreSQL how to recover from there.
//!
//! The order of effects, and what a crash between two of them leaves:
//!
//! 1. Nothing is touched before the plan holds, the directory is empty and there is room.
//! 2. A marker file says that the directory is ours. A crash from here on leaves no `PG_VERSION`: nothing starts on
//!    the directory, and the next restore into it starts over.
//! 3. All parts of the full backup but the last are unpacked in parallel; each is checked against its SHA-256 when it's
//!    through. What is not in the backup that is wanted in the end is left out from the beginning.
//! 4. The last part of the backup that is wanted is taken into memory: it's what makes the directory startable. That of
//!    the backups that it builds on isn't read at all.
//! 5. If it builds on others: the parts of the next backup over what is there, and so on to its own, each backup in
//!    parallel and never two. Nothing tells from outside how far that is: killed, it begins with the full one again.
//!    Then what isn't its own is removed.
//! 6. `backup_manifest` (PostgreSQL's own, or for a chain a new one), recovery settings, `recovery.signal`, `backup_label`, `tablespace_map`, links.
//! 7. One `syncfs` for each file system: everything up to here is durable.
//! 8. `pg_control`, then `PG_VERSION` by rename, each with its own fsync. From here on PostgreSQL starts.
//! 9. The marker goes.
//!
//! If any step fails, what was written is removed again.

mod chain;
pub mod command;
pub mod directory;
mod layer;
mod manifest;
mod prune;
mod running;
pub mod snapshot;
pub mod unpack;

pub use directory::MARKER;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::Arc,
};

use pgsidecar_core::{
    backup::TablespaceRecord,
    backup_label::TablespaceMap,
    plan::{RestorePlan, RestoreRequest, WalScan, select},
    recovery::{RecoveryMode, RecoverySettings, RecoveryTarget, TargetAction, rewrite_auto_conf},
};

use self::{
    chain::Filling,
    directory::TargetDirectory,
    unpack::{HeldFile, Progress, Unpacker},
};
use crate::{
    failure::{Code, Failure},
    repository::{Repository, damaged},
};

/// What is to happen beyond the plan.
#[derive(Clone, Debug)]
pub struct RestoreOptions {
    /// The directory to restore to: absent or empty.
    pub to: PathBuf,
    /// As what the server starts.
    pub mode: RecoveryMode,
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
    let unpacker = Unpacker::new(directory, tablespaces.clone(), progress);
    let filling = Filling { repository, directory, tablespaces, unpacker, parallelism: options.parallelism };
    let remap = |held: &mut [HeldFile]| remap(held, &options.tablespaces);
    let held = match plan.chain.as_slice() {
        [full, between @ .., newest] => filling.chain(full, between, newest, remap).await?,
        _ => filling.full(backup, remap).await?,
    };
    let settings = RecoverySettings {
        mode: options.mode.clone(),
        target: plan.target.clone(),
        inclusive: options.inclusive,
        timeline: plan.timeline,
        action: options.action,
        restore_command: options.restore_command.clone(),
    };
    let (directory, tablespaces, major) = (directory.clone(), tablespaces.clone(), backup.major_version());
    tokio::task::spawn_blocking(move || make_startable(&directory, &tablespaces, major, &settings, held)).await?
}

/// PostgreSQL makes its links by tablespace_map when it starts: with the old locations it would point back to them.
fn remap(held: &mut [HeldFile], mapping: &BTreeMap<String, String>) -> Result<(), Failure> {
    for map in held.iter_mut().filter(|file| file.path == "tablespace_map") {
        let parsed: Result<TablespaceMap, _> = String::from_utf8_lossy(&map.content).parse();
        let parsed = parsed.map_err(|error| damaged("tablespace_map", &format!("{error}")))?;
        map.content = parsed.remap(mapping).to_string().into_bytes();
    }
    Ok(())
}

/// Steps 6 to 9.
fn make_startable(
    directory: &TargetDirectory,
    tablespaces: &BTreeMap<u32, PathBuf>,
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
    // Remapped already.
    write_recovery_files(directory, &files, &BTreeMap::new(), major, settings)?;
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
    match &settings.mode {
        RecoveryMode::Recovery(signal) => directory.write_durably("recovery.signal", signal.to_string().as_bytes())?,
        RecoveryMode::Standby { .. } => directory.write_durably("standby.signal", b"")?,
    }
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
