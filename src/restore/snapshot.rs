//! Finishing a restore on a directory that was rolled back or cloned from a storage snapshot: it holds the data directory
//! as it was when it was snapshotted, of a server that ran.
//!
//! The order of effects, and what a crash between two of them leaves:
//!
//! 1. Nothing is touched before the plan holds and the directory has been found to be the snapshot, with no server on it,
//!    with nothing that was written since, and with its tablespaces.
//! 2. A marker file says that the directory is being finished; then `PG_VERSION` goes. From here on nothing starts on it,
//!    and the same command goes on from wherever it was interrupted.
//! 3. What described the running server goes: `postmaster.pid`, signal files, replication slots, and the content of
//!    `pg_wal`. All WAL that recovery needs is in the archive. What was in `pg_wal` ended somewhere before the snapshot's
//!    own end; PostgreSQL would take it where the archive has nothing, and what is marked `.ready` there it would archive
//!    again.
//! 4. Links to tablespaces, recovery settings, `recovery.signal`, `tablespace_map`, `backup_label`. Each appears whole.
//! 5. One `syncfs` for each file system.
//! 6. `pg_control` as it was at the snapshot's end, then `PG_VERSION`, each durable. From here on PostgreSQL starts.
//! 7. The marker goes.
//!
//! `recovery.signal` is there whatever the target: without it PostgreSQL would replay what is in `pg_wal` alone, and then
//! write the names of WAL again that are in the archive.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, symlink},
    path::{Path, PathBuf},
};

use pgsidecar_core::{
    ControlFile, SnapshotId, SnapshotRecord, WalHeader,
    data_directory::{empty_wal_subdirectories, tablespace_version_directory},
    plan::{RestoreRequest, SnapshotPlan, select_for_snapshot},
    recovery::RecoverySettings,
};

use super::{
    RecoveryFiles, RestoreOptions,
    directory::TargetDirectory,
    planning, remove_if_there,
    running::{is_same, server_on},
    sync_directory, tablespace_targets, write_recovery_files,
};
use crate::{
    failure::{Code, Failure},
    repository::Repository,
};

/// Says that the directory is being finished. Not that of other restores, which would empty it.
const MARKER: &str = "pgsidecar.finishing-snapshot";

/// Plans a restore from a snapshot: which timeline, which WAL, and where recovery will end.
///
/// # Errors
/// [`Code::NotFound`] if there is no such snapshot; [`Code::TargetUnreachable`] if the target can't be reached; the store's.
pub async fn plan(repository: &Repository, id: SnapshotId, request: RestoreRequest) -> Result<SnapshotPlan, Failure> {
    let snapshot = repository.snapshot(id).await?.ok_or_else(|| {
        Failure::new(Code::NotFound, format!("there is no snapshot {id}"))
            .hint("'pgsidecar snapshot list' shows them. One that was not ended in time must not be used.")
    })?;
    let RestoreRequest { target, timeline, inclusive, .. } = request;
    let histories = repository.histories().await?;
    let begun_only = repository.begun_only(&histories, BTreeSet::from([snapshot.timeline])).await?;
    let selection = select_for_snapshot(snapshot, histories, begun_only, &target, timeline)?;
    let (history, size, range) = {
        let snapshot = &selection.snapshot;
        (selection.history.clone(), snapshot.wal_segment_size, (snapshot.start_lsn, snapshot.stop_lsn))
    };
    let facts = planning::list(repository, &history, size, range, (&target, None)).await?;
    let plan = SnapshotPlan::new(selection, target, facts)?;
    match plan.search(inclusive, facts) {
        None => Ok(plan),
        Some(search) => {
            let end = planning::look(repository, &history, size, search).await?;
            Ok(plan.expecting(end))
        }
    }
}

/// Carries a plan out on the directory `options.to`. `living` is the data directory of a server that may run here and
/// that shares nothing with it.
///
/// # Errors
/// [`Code::TargetDirectory`] if the directory isn't the snapshot or is in use: nothing was changed then. Any other: the
/// command can be repeated.
///
/// # Cancellation
/// Not to be dropped half-way. Killed as a process, the same command goes on.
pub async fn run(plan: &SnapshotPlan, options: &RestoreOptions, living: Option<&Path>) -> Result<(), Failure> {
    let (plan, options, living) = (plan.clone(), options.clone(), living.map(Path::to_owned));
    tokio::task::spawn_blocking(move || finish(&plan, &options, living.as_deref())).await?
}

fn finish(plan: &SnapshotPlan, options: &RestoreOptions, living: Option<&Path>) -> Result<(), Failure> {
    let (snapshot, root) = (&plan.snapshot, options.to.as_path());
    if !root.is_absolute() {
        return Err(Failure::new(Code::InvalidRequest, format!("{} is not an absolute path", root.display())));
    }
    let named = format!("snapshot {}", snapshot.id);
    let tablespaces = tablespace_targets(&named, &snapshot.tablespaces, &options.tablespaces)?;
    let found = Found { root, snapshot, tablespaces: &tablespaces };
    found.check(living)?;
    let directory = TargetDirectory::existing(root, tablespaces.values().cloned())?;
    let _marker = claim(&directory, snapshot.id)?;
    // Again, now that nobody else is at it: another may have ended meanwhile, and a server have been started.
    if let Err(failure) = found.check(living) {
        if root.join("PG_VERSION").exists() {
            remove_if_there(&root.join(MARKER))?;
        }
        return Err(failure);
    }
    let settings = RecoverySettings {
        mode: options.mode.clone(),
        target: plan.target.clone(),
        inclusive: options.inclusive,
        timeline: plan.timeline,
        action: options.action,
        restore_command: options.restore_command.clone(),
    };
    let finishing = || {
        remove_if_there(&root.join("PG_VERSION"))?;
        sync_directory(root)?;
        tidy(&directory, snapshot.major_version())?;
        for (oid, target) in &tablespaces {
            link(root, *oid, target)?;
        }
        let files = RecoveryFiles {
            label: snapshot.backup_label.as_bytes(),
            map: Some(snapshot.tablespace_map.as_bytes()).filter(|map| !map.is_empty()),
        };
        write_recovery_files(&directory, &files, &options.tablespaces, snapshot.major_version(), &settings)?;
        directory.sync_file_systems()?;
        directory.write_durably("global/pg_control", &snapshot.pg_control.to_file())?;
        directory.write_durably("PG_VERSION", format!("{}\n", snapshot.major_version()).as_bytes())?;
        remove_if_there(&root.join(MARKER))?;
        sync_directory(root)
    };
    finishing().map_err(|failure| {
        let hint = format!(
            "{}{}PostgreSQL doesn't start on the directory as it is. Put right what is wrong and run the same command again.",
            failure.hint,
            if failure.hint.is_empty() { "" } else { " " }
        );
        failure.context(format!("finishing {} as snapshot {}", root.display(), snapshot.id)).hint(hint)
    })
}

fn refusal(path: &Path, what: impl std::fmt::Display, hint: &str) -> Failure {
    Failure::new(Code::TargetDirectory, format!("{} {what}; nothing was changed", path.display())).hint(hint)
}

/// A directory that is said to be a snapshot.
struct Found<'a> {
    root: &'a Path,
    snapshot: &'a SnapshotRecord,
    tablespaces: &'a BTreeMap<u32, PathBuf>,
}

impl Found<'_> {
    /// Whether it is the snapshot, and all of it, and nobody's but ours.
    fn check(&self, living: Option<&Path>) -> Result<(), Failure> {
        const ROLL_BACK: &str = "Name the directory that was rolled back or cloned from this snapshot. If a server ran on it since, roll it back again.";
        let root = self.root;
        let is_version = fs::read_to_string(root.join("PG_VERSION"));
        let interrupted = root.join(MARKER).exists();
        match is_version {
            Ok(version) if version.trim_end() == self.snapshot.major_version().to_string() => {}
            Ok(version) => {
                let what = format!(
                    "is of PostgreSQL {}, and the snapshot of {}",
                    version.trim_end(),
                    self.snapshot.major_version()
                );
                return Err(refusal(root, what, ROLL_BACK));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound && interrupted => {
                tracing::info!(directory = %root.display(), "going on where a restore was interrupted");
            }
            Err(error) => return Err(refusal(root, format!("is no data directory: PG_VERSION: {error}"), ROLL_BACK)),
        }
        let server = server_on(root).map_err(|error| Failure::io(format!("reading {}", root.display()), &error))?;
        if let Some(server) = server {
            return Err(refusal(
                root,
                format!("is in use: a server runs on it ({server})"),
                "Stop the server, roll the volume back, and try again.",
            ));
        }
        self.check_control().map_err(|what| refusal(root, what, ROLL_BACK))?;
        if !root.join("pg_wal").is_dir() {
            let what = "has no pg_wal, or a link that leads nowhere";
            return Err(refusal(
                root,
                what,
                "Put an empty directory there, or make the link lead to one: all WAL comes from the archive.",
            ));
        }
        if let Some(segment) = self.later_wal()? {
            let what = format!("isn't as it was in the snapshot: pg_wal holds {segment}, which was written since");
            return Err(refusal(root, what, ROLL_BACK));
        }
        self.check_wal_link(living)?;
        self.check_tablespaces(living)
    }

    fn check_control(&self) -> Result<(), String> {
        let path = self.root.join("global/pg_control");
        let bytes = fs::read(path).map_err(|error| format!("has no global/pg_control that can be read: {error}"))?;
        match ControlFile::parse(&bytes) {
            Ok(control) => self.snapshot.fits(&control).map_err(|misfit| misfit.to_string()),
            // Copied while it was written. It begins with the system identifier, and is replaced by the snapshot's.
            Err(error)
                if error.is_torn() && bytes.starts_with(&self.snapshot.system_identifier.get().to_le_bytes()) =>
            {
                tracing::warn!("pg_control was copied while it was written; the snapshot's own takes its place");
                Ok(())
            }
            Err(error) => Err(format!("can't be the snapshot: {error}")),
        }
    }

    /// A segment in pg_wal that PostgreSQL wrote after the snapshot's end.
    fn later_wal(&self) -> Result<Option<String>, Failure> {
        let wal = self.root.join("pg_wal");
        let unreadable = |error: &io::Error| Failure::io(format!("reading {}", wal.display()), error);
        for entry in fs::read_dir(&wal).map_err(|error| unreadable(&error))? {
            let entry = entry.map_err(|error| unreadable(&error))?;
            let Some(Ok(name)) = entry.file_name().to_str().map(str::parse::<pgsidecar_core::SegmentName>) else {
                continue;
            };
            let mut first = [0; WalHeader::LEN];
            let read = File::open(entry.path()).and_then(|mut file| file.read_exact(&mut first));
            let header = read.ok().and_then(|()| WalHeader::parse(&first).ok());
            // A recycled segment begins with the position that it had before.
            let in_place = |header: &WalHeader| name.start(self.snapshot.wal_segment_size) == Some(header.page_address);
            if header.is_some_and(|header| in_place(&header) && self.snapshot.is_later_wal(&header)) {
                return Ok(Some(name.to_string()));
            }
        }
        Ok(None)
    }

    /// pg_wal elsewhere isn't emptied: whose that directory is can't be told, the link came with the snapshot.
    fn check_wal_link(&self, living: Option<&Path>) -> Result<(), Failure> {
        let wal = self.root.join("pg_wal");
        let Ok(target) = fs::read_link(&wal) else { return Ok(()) };
        let foreign = living.is_some_and(|living| !is_same(living, self.root) && is_same(&living.join("pg_wal"), &wal));
        let files = || -> io::Result<bool> {
            let mut entries = fs::read_dir(&wal)?.collect::<Result<Vec<_>, _>>()?;
            entries.retain(|entry| !entry.file_type().is_ok_and(|kind| kind.is_dir()));
            Ok(!entries.is_empty())
        };
        let used = files().map_err(|error| Failure::io(format!("reading {}", wal.display()), &error))?;
        if !foreign && !used {
            return Ok(());
        }
        let what = format!(
            "has its WAL at {}, {}",
            target.display(),
            if foreign { "where the living server has its own" } else { "where files are" }
        );
        Err(refusal(
            self.root,
            what,
            "Put an empty directory in the place of the link pg_wal, or make it lead to one: all WAL comes from the archive.",
        ))
    }

    fn check_tablespaces(&self, living: Option<&Path>) -> Result<(), Failure> {
        const MAP: &str = "The volume of each tablespace has to be rolled back or cloned with the data directory; where a clone lies elsewhere, --tablespace-mapping OLD=NEW says so.";
        let version = tablespace_version_directory(self.snapshot.major_version(), self.snapshot.catalog_version);
        for (oid, target) in self.tablespaces {
            let link = self.root.join("pg_tblspc").join(oid.to_string());
            if fs::symlink_metadata(&link).is_ok_and(|meta| !meta.is_symlink()) {
                return Err(refusal(&link, "is not a link to its tablespace", MAP));
            }
            if !target.join(&version).is_dir() {
                return Err(refusal(target, format!("doesn't hold tablespace {oid}: {version} isn't there"), MAP));
            }
            let theirs = |living: &Path| living.join("pg_tblspc").join(oid.to_string());
            if living.is_some_and(|living| !is_same(living, self.root) && is_same(&theirs(living), target)) {
                return Err(refusal(target, format!("is tablespace {oid} of the living server"), MAP));
            }
        }
        Ok(())
    }
}

/// Marks the directory, and keeps others out while the marker is held.
fn claim(directory: &TargetDirectory, id: SnapshotId) -> Result<File, Failure> {
    let path = directory.path().join(MARKER);
    let open = || OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
    let failed = |error: io::Error| Failure::io(format!("writing {}", path.display()), &error);
    let marker = open().map_err(failed)?;
    let is_ours = marker.try_lock().is_ok()
        && fs::symlink_metadata(&path).is_ok_and(|there| marker.metadata().is_ok_and(|ours| ours.ino() == there.ino()));
    if !is_ours {
        return Err(refusal(
            directory.path(),
            "is being finished at this moment",
            "Wait for the other restore to end.",
        ));
    }
    fs::write(&path, format!("{id}\n")).map_err(failed)?;
    let like = fs::metadata(directory.path()).map_err(failed)?;
    directory.own(&path, (like.uid(), like.gid())).map_err(failed)?;
    sync_directory(directory.path())?;
    Ok(marker)
}

/// Step 3.
fn tidy(directory: &TargetDirectory, major: u32) -> Result<(), Failure> {
    let root = directory.path();
    for file in ["postmaster.pid", "postmaster.opts", "standby.signal", "backup_manifest", "tablespace_map"] {
        remove_if_there(&root.join(file))?;
    }
    for name in ["pg_wal", "pg_replslot"] {
        let path = root.join(name);
        let empty = || -> io::Result<()> {
            for entry in fs::read_dir(&path)? {
                let entry = entry?;
                // The root of a volume has it, and it's root's.
                if entry.file_name() == "lost+found" {
                    continue;
                }
                if entry.file_type()?.is_dir() {
                    fs::remove_dir_all(entry.path())?
                } else {
                    fs::remove_file(entry.path())?
                }
            }
            Ok(())
        };
        empty().map_err(|error| Failure::io(format!("emptying {}", path.display()), &error))?;
    }
    for name in empty_wal_subdirectories(major) {
        let path = root.join("pg_wal").join(name);
        let create = || -> io::Result<()> {
            fs::DirBuilder::new().mode(0o700).create(&path)?;
            let like = fs::metadata(root)?;
            directory.own(&path, (like.uid(), like.gid()))
        };
        create().map_err(|error| Failure::io(format!("creating {}", path.display()), &error))?;
    }
    Ok(())
}

/// Makes a link lead to its tablespace, whatever it led to.
pub(super) fn link(root: &Path, oid: u32, target: &Path) -> Result<(), Failure> {
    let link = root.join("pg_tblspc").join(oid.to_string());
    if fs::read_link(&link).is_ok_and(|old| old == target) {
        return Ok(());
    }
    let temporary = root.join("pg_tblspc").join(format!("{oid}.pgsidecar-tmp"));
    let make = || {
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        symlink(target, &temporary)?;
        fs::rename(&temporary, &link)
    };
    make().map_err(|error| Failure::io(format!("linking {}", link.display()), &error))
}
