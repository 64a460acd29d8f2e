//! Where WAL lies on its way to PostgreSQL: in files without a name.
//!
//! Nothing can find such a file while it's written, so nothing can take it for whole; nothing is left of it when the
//! daemon is killed; and no other tool that walks the directory (`pg_rewind`, a base backup) stumbles over it.
//!
//! By default they lie in `pg_wal` itself. That's where the WAL goes, so that a file is handed over by giving it a name,
//! and no byte is copied. Where pg_wal isn't ours, or a directory was named, files are sent through the connection.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{DirBuilderExt, MetadataExt},
    },
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use jiff::Timestamp;

use crate::{
    failure::{Code, Failure},
    pgdata::DataDirectory,
};

/// What the names of files begin with that were handed over in pg_wal and not taken yet. The helper knows it, too.
const HANDED_OVER: &str = "pgsidecar-spool.";
/// How long a file that was handed over waits to be taken. The helper does it at once, or never.
const TAKEN_WITHIN: Duration = Duration::from_secs(60);

/// Makes files without names.
#[derive(Debug)]
pub struct Spool {
    configured: Option<PathBuf>,
    /// Tells this daemon from those before it, which in a container have had the same process id.
    began: Timestamp,
    handed_over: AtomicU64,
}

/// A file without a name.
#[derive(Debug)]
pub struct Spooled {
    /// The file.
    pub file: File,
    /// The inode of pg_wal, if it lies there.
    pg_wal: Option<(PathBuf, u64)>,
}

impl Spooled {
    /// Begins to write it to disk, without waiting. PostgreSQL syncs each segment that it has been handed before it
    /// replays it (`KeepFileRestoredFromArchive`); with its bytes on disk already, it waits for next to nothing.
    pub fn write_back(&self) {
        if self.pg_wal.is_none() {
            return;
        }
        if let Ok(file) = self.file.try_clone() {
            // For time alone: what fails here fails PostgreSQL's own sync as well.
            tokio::task::spawn_blocking(move || file.sync_data());
        }
    }
}

impl Spool {
    /// Files in this directory, which is made when it's needed; or in pg_wal.
    pub fn new(configured: Option<PathBuf>) -> Spool {
        Spool { configured, began: Timestamp::now(), handed_over: AtomicU64::new(0) }
    }

    /// An empty file. `pgdata`: the data directory that is being restored, if it's the daemon's own.
    ///
    /// # Errors
    /// If none can be made.
    pub fn create(&self, pgdata: Option<&DataDirectory>) -> Result<Spooled, Failure> {
        if self.configured.is_none()
            && let Some(pg_wal) = pgdata.and_then(own_pg_wal)
            && let Ok(file) = tempfile::tempfile_in(&pg_wal.0)
        {
            return Ok(Spooled { file, pg_wal: Some(pg_wal) });
        }
        let directory = self.configured.clone().unwrap_or_else(|| std::env::temp_dir().join("pgsidecar-spool"));
        let failed = |error: io::Error| Failure::io(format!("using the spool {}", directory.display()), &error);
        DirBuilder::new().recursive(true).mode(0o700).create(&directory).map_err(failed)?;
        // In a temporary directory, somebody else may have been first.
        let owner = fs::metadata(&directory).map_err(failed)?.uid();
        if owner != rustix::process::geteuid().as_raw() {
            return Err(Failure::new(
                Code::Misconfigured,
                format!("the spool {} belongs to user {owner}", directory.display()),
            )
            .hint("Set PGSIDECAR_SPOOL to a directory of this container's own."));
        }
        Ok(Spooled { file: tempfile::tempfile_in(&directory).map_err(failed)?, pg_wal: None })
    }

    /// How many bytes an unprivileged user can still write in the file system to which the files go; `None` if it
    /// can't be told.
    pub fn room(&self, pgdata: Option<&DataDirectory>) -> Option<u64> {
        let place = match (&self.configured, pgdata) {
            (Some(configured), _) => configured.clone(),
            (None, Some(pgdata)) => pgdata.wal(),
            (None, None) => std::env::temp_dir(),
        };
        rustix::fs::statvfs(&place).ok().map(|stat| stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Gives the file a name in pg_wal, for whoever sees that directory under this inode, and tells it. The file is
    /// PostgreSQL's from then on. `None` if it doesn't lie there; then it has to be copied.
    pub fn hand_over(&self, spooled: &Spooled, inode: u64) -> Option<String> {
        let (pg_wal, ours) = spooled.pg_wal.as_ref()?;
        if *ours != inode {
            return None;
        }
        // Never a name twice: a helper that has outlived its daemon would take another file for its own.
        let name = format!("{HANDED_OVER}{}.{}", self.began.as_nanosecond(), self.handed_over.fetch_add(1, Relaxed));
        let path = pg_wal.join(&name);
        // The way that needs no privilege: open(2) under O_TMPFILE. Fails where the file never was nameless.
        let nameless = format!("/proc/self/fd/{}", spooled.file.as_raw_fd());
        let linked =
            rustix::fs::linkat(rustix::fs::CWD, &nameless, rustix::fs::CWD, &path, rustix::fs::AtFlags::SYMLINK_FOLLOW);
        linked.ok()?;
        tokio::spawn(async move {
            tokio::time::sleep(TAKEN_WITHIN).await;
            let _ = fs::remove_file(path);
        });
        Some(name)
    }
}

/// Removes what an earlier daemon handed over and nobody took.
pub fn clean(pgdata: &DataDirectory) {
    let Ok(entries) = fs::read_dir(pgdata.wal()) else { return };
    for entry in entries.flatten() {
        if entry.file_name().as_encoded_bytes().starts_with(HANDED_OVER.as_bytes()) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// pg_wal and its inode, where a file of ours belongs to PostgreSQL's user.
fn own_pg_wal(pgdata: &DataDirectory) -> Option<(PathBuf, u64)> {
    let path = pgdata.wal();
    let meta = fs::metadata(&path).ok()?;
    (meta.uid() == rustix::process::geteuid().as_raw()).then(|| (path, meta.ino()))
}
