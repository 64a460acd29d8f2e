//! Restoring over a database, where there's no room for two. Files that are as the backup has them stay and aren't read from
//! the store.
//!
//! The order of effects, and what a crash between two of them leaves:
//!
//! 1. Nothing is touched before the plan holds, no server runs on the directory, there's room, tablespaces are where they
//!    have to be, and the store has every part.
//! 2. WAL that is nowhere else has been kept beside it, and the tablespaces of the database are noted (`src/switch`).
//! 3. A marker says what is being done, then `PG_VERSION` goes. From here on nothing starts on the directory, and nothing
//!    takes it for empty; the same again goes on, whatever was done already: it's all compared anew.
//! 4. What the backup doesn't have, or has otherwise, is removed: all of it, where the backup builds on others. Tablespaces
//!    that the backup doesn't have lose their content: recovery makes them again, and must not find pages from later.
//! 5. What is missing is written, and the rest is as with any restore: recovery files, one `syncfs`, `pg_control`, and
//!    `PG_VERSION` under another name.
//! 6. It's noted that all is done (`commit`). Only then PostgreSQL can start: `PG_VERSION` gets its name, the marker goes.
//!    A crash between the two is followed by just this, so that nothing is ever restored over what a server has written
//!    since.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering::Relaxed},
};

use pgsidecar_core::{
    BackupRecord,
    data_directory::tablespace_version_directory,
    layout::BackupObject,
    plan::RestorePlan,
    recovery::RecoverySettings,
    switch::{SHUT, stays_inside},
};

use self::over::Over;
use super::{
    Places, RestoreOptions, Staged,
    chain::Filling,
    directory::TargetDirectory,
    finish_over, mounts, remap, room,
    running::{Stopped, refuse_if_running},
    unpack::{HeldFile, Unpacker},
};
use crate::{
    backup::index,
    failure::{Code, Failure},
    progress::{Phase, Progress},
    repository::{Repository, damaged},
};

mod over;

/// Says that the directory is being restored over. Not the marker of other restores, which would empty it.
pub const MARKER: &str = "pgsidecar.replacing";
const COPY_BYTES: usize = 256 * 1024;

/// Frames of a part that follow one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// The part's number.
    pub part: u32,
    /// Where the first begins in the part's bytes.
    pub from: u64,
    /// How many bytes they have; `None`: up to the part's end.
    pub len: Option<u64>,
    /// How many files begin in them.
    pub files: u64,
}

/// What of the database that is there matters to a restore over it.
#[derive(Clone, Debug, Default)]
pub struct Replaced {
    /// Files of `pg_wal` that stay, by name.
    pub kept_wal: Vec<String>,
    /// The directories of its tablespaces, of the server's version.
    pub tablespaces: Vec<PathBuf>,
}

/// Whether a restore over a database has begun: nothing starts on the directory then, and it has to be gone through with.
pub fn has_begun(root: &Path) -> bool {
    root.join(MARKER).exists() || !root.join("PG_VERSION").exists()
}

/// Finds all that can be found wrong without a change.
///
/// # Errors
/// [`Code::TargetDirectory`], [`Code::InvalidRequest`], the store's, or what is damaged in it.
pub async fn check(repository: &Repository, plan: &RestorePlan, options: &RestoreOptions) -> Result<(), Failure> {
    let (root, backup) = (options.to.as_path(), &plan.backup);
    let refuse = |what: String, hint: &str| {
        Err(Failure::new(Code::TargetDirectory, format!("{what}; nothing was changed")).hint(hint))
    };
    let places = Places::of(plan, options, &Staged::default())?;
    if !root.join(MARKER).exists() && [SHUT, "PG_VERSION"].iter().all(|name| !root.join(name).exists()) {
        return refuse(
            format!("{} holds no database to restore over", root.display()),
            "Restore to it with 'restore run --to' when it's empty.",
        );
    }
    if let Err(error) = fs::read_dir(root.join("pg_wal")) {
        return refuse(
            format!("{} can't be read: {error}", root.join("pg_wal").display()),
            "If it's a link, mount what it leads to, or put an empty directory in its place.",
        );
    }
    for (oid, location) in &places.links {
        if !location.is_dir() {
            return refuse(
                format!("the location of tablespace {oid}, {}, isn't there", location.display()),
                "Mount its volume there, or name another place with --tablespace-mapping OLD=NEW.",
            );
        }
    }
    let version = version_directory(root, backup)?;
    for directory in places.links.values().map(|location| location.join(&version)).chain([root.to_owned()]) {
        mounts::refuse_below(&directory, Some(&root.join("pg_wal")))?;
    }
    let needed = room::needed(repository, plan, options, &places.links).await?;
    room::check_with(&needed, &replaced(root, &places.links, &version)?, room::Beside::Nobody)?;
    look_at_store(repository, &plan.chain).await
}

/// Whether the store has all of the backups: what is there is destroyed before they are read.
async fn look_at_store(repository: &Repository, chain: &[BackupRecord]) -> Result<(), Failure> {
    for backup in chain {
        index::read(repository, backup, (), |(), _| Ok(())).await?;
        let objects = backup.parts.iter().map(|part| (BackupObject::Part(part.number), part.stored));
        for (object, stored) in objects.chain([(BackupObject::Manifest, backup.manifest)]) {
            let key = repository.layout().backup(backup.id, object);
            let found = repository.store().head(&key).await?;
            if found.is_none_or(|found| found.size != stored.size) {
                return Err(damaged(key.as_str(), "it's missing, or not as long as the backup's record says"));
            }
        }
    }
    Ok(())
}

/// Restores over the database in `options.to`, which was checked ([`check`]). `commit` is called when all is durable and
/// before PostgreSQL can start: from then on only [`open`] is left to be done, however often this is interrupted.
///
/// # Errors
/// [`Code::TargetDirectory`]: nothing was changed. Any other: PostgreSQL doesn't start on the directory, and the same again
/// goes on.
///
/// # Cancellation
/// As [`super::run`].
pub async fn run(
    repository: &Repository,
    plan: &RestorePlan,
    options: &RestoreOptions,
    there: Replaced,
    stopped: Stopped,
    progress: Arc<Progress>,
    commit: impl FnOnce() -> Result<(), Failure> + Send + 'static,
) -> Result<(), Failure> {
    let (root, backup) = (options.to.as_path(), &plan.backup);
    let places = Places::of(plan, options, &Staged::default())?;
    let version = version_directory(root, backup)?;
    let directory = TargetDirectory::existing(root, places.links.values().cloned())?;
    refuse_if_running(root, stopped)?;
    directory.write_durably(MARKER, format!("{}\n", backup.id).as_bytes())?;
    super::remove_if_there(&root.join("PG_VERSION"))?;
    super::sync_directory(root)?;

    progress.total_bytes.store(plan.chain.iter().map(BackupRecord::plain_bytes).sum(), Relaxed);
    progress.enter(Phase::Writing);
    let unpacker = Unpacker::new(&directory, places.written.clone(), progress.clone());
    let filling = Filling {
        repository,
        directory: &directory,
        tablespaces: &places.written,
        unpacker,
        parallelism: options.parallelism,
    };
    let change = |held: &mut [HeldFile]| remap(held, &options.tablespaces);
    let over = Over {
        root: root.to_owned(),
        locations: places.links.clone(),
        version,
        emptied: there.tablespaces,
        kept_wal: there.kept_wal,
    };
    let held = match plan.chain.as_slice() {
        [full, between @ .., newest] => {
            over.clear().await?;
            // The chain's own look at what must not be there spares what isn't a backup's.
            filling.chain(full, between, newest, change).await?
        }
        _ => {
            let stretches = over.compare(repository, backup, &progress).await?;
            filling.rest(backup, stretches, change).await?
        }
    };
    let settings = RecoverySettings {
        mode: options.mode.clone(),
        target: plan.target.clone(),
        inclusive: options.inclusive,
        timeline: plan.timeline,
        action: options.action,
        restore_command: options.restore_command.clone(),
    };
    let (links, major) = (places.links.clone(), backup.major_version());
    let finish = move || {
        finish_over(&directory, &links, major, &settings, held)?;
        commit()?;
        open(directory.path())
    };
    tokio::task::spawn_blocking(finish).await?
}

/// The last step: PostgreSQL can start from here on.
///
/// # Errors
/// If it can't be done durably.
pub fn open(root: &Path) -> Result<(), Failure> {
    if root.join(SHUT).exists() {
        let opened = fs::rename(root.join(SHUT), root.join("PG_VERSION"));
        opened.map_err(|error| Failure::io(format!("opening {}", root.display()), &error))?;
    }
    super::remove_if_there(&root.join(MARKER))?;
    super::sync_directory(root)
}

fn version_directory(root: &Path, backup: &BackupRecord) -> Result<String, Failure> {
    let control =
        fs::read(root.join("global/pg_control")).ok().and_then(|bytes| pgsidecar_core::ControlFile::parse(&bytes).ok());
    match control {
        Some(control) => Ok(tablespace_version_directory(backup.major_version(), control.catalog_version)),
        // An interrupted one has removed it: it's found by its name.
        None => Ok(format!("PG_{}_", backup.major_version())),
    }
}

/// How many bytes are there that will be replaced, by directory.
fn replaced(root: &Path, locations: &BTreeMap<u32, PathBuf>, version: &str) -> Result<Vec<(PathBuf, u64)>, Failure> {
    let mut replaced = vec![(root.to_owned(), used(root, true)?)];
    for location in locations.values() {
        for inner in version_directories(location, version)? {
            replaced.push((location.clone(), used(&inner, false)?));
        }
    }
    Ok(replaced)
}

/// A tablespace's directories of the server's version: `version` is its name, or how it begins.
fn version_directories(location: &Path, version: &str) -> Result<Vec<PathBuf>, Failure> {
    let read = || -> io::Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(location)? {
            let entry = entry?;
            if entry.file_name().to_str().is_some_and(|name| name.starts_with(version)) {
                found.push(entry.path());
            }
        }
        Ok(found)
    };
    match read() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        found => found.map_err(|error| Failure::io(format!("reading {}", location.display()), &error)),
    }
}

fn used(directory: &Path, at_the_top: bool) -> Result<u64, Failure> {
    let read = || -> io::Result<u64> {
        let mut bytes = 0;
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            if at_the_top && entry.file_name().to_str().is_some_and(stays_inside) {
                continue;
            }
            let meta = entry.metadata()?;
            bytes += if meta.is_dir() { used(&entry.path(), false).unwrap_or(0) } else { meta.blocks() * 512 };
        }
        Ok(bytes)
    };
    read().map_err(|error| Failure::io(format!("reading {}", directory.display()), &error))
}
