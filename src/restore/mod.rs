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
pub(crate) mod mounts;
mod planning;
mod prune;
pub mod replace;
mod room;
pub(crate) mod running;
pub mod snapshot;
pub mod unpack;

pub use directory::MARKER;

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt, symlink},
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering::Relaxed},
};

use pgsidecar_core::{
    BackupRecord,
    backup::TablespaceRecord,
    backup_label::TablespaceMap,
    data_directory::{STANDARD_DIRECTORIES, empty_wal_subdirectories, tablespace_version_directory},
    plan::RestorePlan,
    recovery::{RecoveryMode, RecoverySettings, TargetAction, rewrite_auto_conf},
    switch::SHUT,
};

pub use self::planning::plan;
use self::{
    chain::Filling,
    directory::TargetDirectory,
    unpack::{HeldFile, Progress, Unpacker},
};
use crate::{
    failure::{Code, Failure},
    progress::Phase,
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

/// Where things are written that lie elsewhere when PostgreSQL starts.
#[derive(Clone, Debug, Default)]
pub struct Staged {
    /// The tablespaces' directories, by their OIDs, where they aren't written to their places.
    pub tablespaces: BTreeMap<u32, PathBuf>,
    /// Where WAL will lie, if not in the data directory.
    pub wal: Option<StagedWal>,
    /// The data directory of the server in whose place it will be.
    pub live: Option<PathBuf>,
}

/// WAL outside of the data directory.
#[derive(Clone, Debug)]
pub struct StagedWal {
    /// What the link pg_wal leads to; `None` where another file system is mounted there.
    pub link: Option<PathBuf>,
    /// The directory that is made, and will lie there.
    pub written: PathBuf,
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
    run_staged(repository, plan, options, &Staged::default(), progress).await
}

/// The same, with some of it written to where it won't stay: what it's told by (links, `tablespace_map`) is as it will be.
///
/// # Errors
/// As [`run`].
///
/// # Cancellation
/// As [`run`].
pub async fn run_staged(
    repository: &Repository,
    plan: &RestorePlan,
    options: &RestoreOptions,
    staged: &Staged,
    progress: Arc<Progress>,
) -> Result<(), Failure> {
    let backup = &plan.backup;
    let places = Places::of(plan, options, staged)?;
    let needed = room::needed(repository, plan, options, &places.written).await?;
    let beside = match &staged.live {
        Some(live) => room::Beside::Server { wal: room::unarchived(live, backup.wal_segment_size) },
        None => room::Beside::Nobody,
    };
    let target = directory::Target { path: &options.to, tablespaces: &places.written, like: staged.live.as_deref() };
    let (directory, floor) = TargetDirectory::prepare(&target, &needed, beside, backup)?;
    progress.total_bytes.store(plan.chain.iter().map(BackupRecord::plain_bytes).sum(), Relaxed);
    progress.enter(Phase::Writing);
    let filling = fill(repository, plan, options, &directory, &places, progress.clone());
    let done = if staged.live.is_some() { floor.keep(filling, &progress).await } else { filling.await };
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

/// Where everything but the data directory goes.
#[derive(Clone)]
struct Places {
    /// What the links to tablespaces lead to, by OID.
    links: BTreeMap<u32, PathBuf>,
    /// Where their content is written.
    written: BTreeMap<u32, PathBuf>,
    wal: Option<StagedWal>,
}

impl Places {
    fn of(plan: &RestorePlan, options: &RestoreOptions, staged: &Staged) -> Result<Places, Failure> {
        let named = format!("backup {}", plan.backup.id);
        let links = tablespace_targets(&named, &plan.backup.tablespaces, &options.tablespaces)?;
        let mut written = links.clone();
        written.extend(staged.tablespaces.iter().map(|(oid, path)| (*oid, path.clone())));
        Ok(Places { links, written, wal: staged.wal.clone() })
    }
}

async fn fill(
    repository: &Repository,
    plan: &RestorePlan,
    options: &RestoreOptions,
    directory: &TargetDirectory,
    places: &Places,
    progress: Arc<Progress>,
) -> Result<(), Failure> {
    let backup = &plan.backup;
    let unpacker = Unpacker::new(directory, places.written.clone(), progress);
    let filling =
        Filling { repository, directory, tablespaces: &places.written, unpacker, parallelism: options.parallelism };
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
    let (directory, places, major) = (directory.clone(), places.clone(), backup.major_version());
    tokio::task::spawn_blocking(move || make_startable(&directory, &places, major, &settings, held)).await?
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
    places: &Places,
    major: u32,
    settings: &RecoverySettings,
    held: Vec<HeldFile>,
) -> Result<(), Failure> {
    let root = directory.path();
    let held = HeldFiles::sort(held)?;
    // Remapped already.
    write_recovery_files(directory, &held.recovery(), &BTreeMap::new(), major, settings)?;
    for (oid, target) in &places.links {
        let link = root.join("pg_tblspc").join(oid.to_string());
        symlink(target, &link).map_err(|error| Failure::io(format!("linking {}", link.display()), &error))?;
    }
    if let Some(wal) = &places.wal {
        move_wal(directory, wal, major)?;
    }
    directory.sync_file_systems()?;
    directory.write_durably("global/pg_control", &held.control.content)?;
    directory.write_durably("PG_VERSION", &held.version.content)?;
    directory.release()
}

/// Steps 6 to 8 over a database that was there: links lead to their tablespaces, whatever they led to, and `PG_VERSION` is
/// still called [`SHUT`].
fn finish_over(
    directory: &TargetDirectory,
    links: &BTreeMap<u32, PathBuf>,
    major: u32,
    settings: &RecoverySettings,
    held: Vec<HeldFile>,
) -> Result<(), Failure> {
    let root = directory.path();
    let held = HeldFiles::sort(held)?;
    let control = pgsidecar_core::ControlFile::parse(&held.control.content)
        .map_err(|error| damaged("the last part of the backup", &error.to_string()))?;
    let version = tablespace_version_directory(major, control.catalog_version);
    let in_wal = empty_wal_subdirectories(major).iter().map(|name| root.join("pg_wal").join(name));
    let standard = STANDARD_DIRECTORIES.iter().map(|name| root.join(name)).chain(in_wal);
    for path in standard.chain(links.values().map(|location| location.join(&version))) {
        let make = || -> io::Result<()> {
            match fs::DirBuilder::new().mode(0o700).create(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
                made => made?,
            }
            let like = fs::metadata(root)?;
            directory.own(&path, (like.uid(), like.gid()))
        };
        make().map_err(|error| Failure::io(format!("creating {}", path.display()), &error))?;
    }
    write_recovery_files(directory, &held.recovery(), &BTreeMap::new(), major, settings)?;
    for (oid, target) in links {
        snapshot::link(root, *oid, target)?;
    }
    directory.sync_file_systems()?;
    directory.write_durably("global/pg_control", &held.control.content)?;
    directory.write_durably(SHUT, &held.version.content)
}

fn sync_directory(path: &Path) -> Result<(), Failure> {
    let synced = fs::File::open(path).and_then(|directory| directory.sync_all());
    synced.map_err(|error| Failure::io(format!("syncing {}", path.display()), &error))
}

/// The files of a backup's last part.
struct HeldFiles {
    version: HeldFile,
    control: HeldFile,
    label: HeldFile,
    map: Option<HeldFile>,
}

impl HeldFiles {
    fn sort(held: Vec<HeldFile>) -> Result<HeldFiles, Failure> {
        let mut files: BTreeMap<String, HeldFile> = held.into_iter().map(|file| (file.path.clone(), file)).collect();
        let mut take = |path: &str| {
            files.remove(path).ok_or_else(|| damaged("the last part of the backup", &format!("it lacks {path}")))
        };
        let (version, control, label) = (take("PG_VERSION")?, take("global/pg_control")?, take("backup_label")?);
        Ok(HeldFiles { version, control, label, map: take("tablespace_map").ok() })
    }

    fn recovery(&self) -> RecoveryFiles<'_> {
        RecoveryFiles { label: &self.label.content, map: self.map.as_ref().map(|map| map.content.as_slice()) }
    }
}

/// Puts a link, or nothing, in the place of pg_wal, which is empty, and makes the directory that it will lead to.
fn move_wal(directory: &TargetDirectory, wal: &StagedWal, major: u32) -> Result<(), Failure> {
    let pg_wal = directory.path().join("pg_wal");
    let make = || -> io::Result<()> {
        let like = fs::metadata(directory.path())?;
        let owner = (like.uid(), like.gid());
        let mut builder = fs::DirBuilder::new();
        builder.mode(0o700).create(&wal.written)?;
        directory.own(&wal.written, owner)?;
        for name in empty_wal_subdirectories(major) {
            let path = wal.written.join(name);
            builder.create(&path)?;
            directory.own(&path, owner)?;
        }
        fs::remove_dir_all(&pg_wal)?;
        if let Some(link) = &wal.link {
            symlink(link, &pg_wal)?;
        }
        rustix::fs::syncfs(fs::File::open(&wal.written)?)?;
        Ok(())
    };
    make().map_err(|error| Failure::io(format!("making {}", wal.written.display()), &error))
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
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
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

/// Tells a server that was stopped to recover by these settings when it's started: to the end of its WAL, and from there to
/// a timeline of its own.
///
/// # Errors
/// If it can't be written durably.
pub fn recover_again(data: &Path, settings: &RecoverySettings) -> Result<(), Failure> {
    let directory = TargetDirectory::existing(data, [])?;
    let version = ["PG_VERSION", SHUT].map(|name| data.join(name)).into_iter().find(|path| path.exists());
    let version = version.unwrap_or_else(|| data.join("PG_VERSION"));
    let text =
        fs::read_to_string(&version).map_err(|error| Failure::io(format!("reading {}", version.display()), &error))?;
    let major = text.trim().parse().map_err(|_| damaged("PG_VERSION", "it has no version"))?;
    let auto_conf = data.join("postgresql.auto.conf");
    let brought =
        fs::read(&auto_conf).map_err(|error| Failure::io(format!("reading {}", auto_conf.display()), &error))?;
    directory.write_durably("postgresql.auto.conf", &rewrite_auto_conf(&brought, major, settings))?;
    directory.write_durably("recovery.signal", b"")
}

fn remove_if_there(path: &Path) -> Result<(), Failure> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Failure::io(format!("removing {}", path.display()), &error))
        }
        _ => Ok(()),
    }
}
