//! PostgreSQL's data directory on the shared volume, read-only.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use pgsidecar_core::{ArchiveFileName, ControlFile, TimelineId};
use serde::Serialize;

use crate::failure::{Code, Failure};

/// How often `pg_control` is read anew while its checksum doesn't hold: PostgreSQL writes its 512 bytes in one
/// go, so a reader meets a torn one only for an instant.
const CONTROL_FILE_TRIES: u32 = 50;
const CONTROL_FILE_PAUSE: Duration = Duration::from_millis(20);
/// PostgreSQL's PG_CONTROL_FILE_SIZE.
const CONTROL_FILE_BYTES: u64 = 8192;

/// A data directory that has been looked at: it exists, can be read and has a `PG_VERSION`.
#[derive(Clone, Debug)]
pub struct DataDirectory {
    path: PathBuf,
}

/// What waits in `pg_wal/archive_status` to be archived.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    /// How many `.ready` files there are.
    pub files: u64,
    /// Age of the oldest.
    pub oldest: Option<Duration>,
}

/// A file system that part of a database lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Volume {
    /// What of the database is there: `data` or `wal`.
    pub holds: &'static str,
    /// Bytes that PostgreSQL can still write.
    pub available_bytes: u64,
    /// Its size in bytes.
    pub size_bytes: u64,
}

/// What tells a file from another that comes to lie under its name, and from itself once it is written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileStamp {
    /// In bytes.
    pub size: u64,
    device: u64,
    inode: u64,
    modified: (i64, i64),
}

impl FileStamp {
    /// The stamp of the file with this metadata.
    pub fn of(meta: &fs::Metadata) -> FileStamp {
        let modified = (meta.mtime(), meta.mtime_nsec());
        FileStamp { size: meta.len(), device: meta.dev(), inode: meta.ino(), modified }
    }
}

/// What `postmaster.pid` tells of the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerState {
    /// There is no such file: it was never started, or has stopped in order.
    Gone,
    /// It's on its way down, or was killed there.
    Stopping(Listening),
    /// It runs, or was killed.
    Running(Listening),
}

/// Where a server listens, as far as it can be reached from beside it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listening {
    /// The port at 127.0.0.1.
    pub port: Option<u16>,
    /// The Unix socket.
    pub socket: Option<PathBuf>,
}

impl ServerState {
    /// Source: `src/include/utils/pidfile.h`. Line 4 is the port, 5 the first directory of sockets, 6 the first listen
    /// address, 8 the state.
    fn parse(pid_file: &str) -> ServerState {
        let line = |number: usize| pid_file.lines().nth(number - 1).unwrap_or_default().trim();
        let port: Option<u16> = line(4).parse().ok();
        let loopback = matches!(line(6), "*" | "localhost" | "127.0.0.1" | "0.0.0.0");
        let socket =
            port.filter(|_| line(5).starts_with('/')).map(|port| format!("{}/.s.PGSQL.{port}", line(5)).into());
        let listening = Listening { port: port.filter(|_| loopback), socket };
        if line(8) == "stopping" { ServerState::Stopping(listening) } else { ServerState::Running(listening) }
    }
}

/// Says to whom a data directory belongs, and what to set, if that's another user than we are; `None` also where it
/// can't be told.
pub fn foreign_owner(path: &Path) -> Option<Failure> {
    let (owner, ours) = (fs::metadata(path).ok()?.uid(), rustix::process::geteuid().as_raw());
    // A new volume that is opened to the pod's group, as it's wanted.
    if owner == 0 && rustix::fs::access(path, rustix::fs::Access::WRITE_OK).is_ok() {
        return None;
    }
    let what =
        format!("the data directory {} belongs to user {owner}, and pgsidecar runs as user {ours}", path.display());
    (owner != ours).then(|| Failure::new(Code::DataDirectory, what).hint(owner_hint(owner)))
}

/// What to set where the volume belongs to this user.
pub fn owner_hint(owner: u32) -> String {
    match owner {
        // PostgreSQL never runs as root: it's the volume that nobody was given yet.
        0 => {
            let gid = rustix::process::getegid().as_raw();
            format!(
                "Set securityContext.fsGroup: {gid} for the pod, so that its volumes can be written to (where it's injected: the annotation pgsidecar.dev/fs-group: add)."
            )
        }
        _ => format!(
            "Run the pgsidecar container as the user of PostgreSQL, {owner} (securityContext.runAsUser: {owner}; where it's injected, the annotation pgsidecar.dev/run-as-user: \"{owner}\")."
        ),
    }
}

/// Sorts as PostgreSQL's archiver does: timeline histories first, then by name.
pub fn archiving_order(name: &ArchiveFileName) -> (bool, String) {
    (!matches!(name, ArchiveFileName::History(_)), name.to_string())
}

impl DataDirectory {
    /// Looks at a directory.
    ///
    /// # Errors
    /// [`Code::DataDirectory`] if it isn't a data directory or belongs to somebody else.
    pub fn open(path: &Path) -> Result<DataDirectory, Failure> {
        let shown = path.display();
        let refuse = |message: String| Failure::new(Code::DataDirectory, message);
        let unreadable = |error: &io::Error| match (error.kind(), foreign_owner(path)) {
            (io::ErrorKind::PermissionDenied, Some(foreign)) => foreign,
            _ => refuse(format!("the data directory {shown} can't be read: {error}")).hint(
                "Mount the volume of PostgreSQL's data at the same path in this container, and set PGDATA to it.",
            ),
        };
        match fs::metadata(path.join("PG_VERSION")) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound && path.is_dir() => {
                return Err(refuse(format!("{shown} is not a data directory of PostgreSQL: it has no PG_VERSION"))
                    .hint("Set PGDATA to the directory that 'SHOW data_directory' tells; before initdb has run this is normal."));
            }
            Err(error) => return Err(unreadable(&error)),
        }
        let data_directory = DataDirectory { path: path.to_owned() };
        // PG_VERSION can be readable where the rest is not.
        fs::File::open(data_directory.control_path()).map_err(|error| unreadable(&error))?;
        Ok(data_directory)
    }

    /// One on which nothing starts because its `PG_VERSION` has another name.
    pub fn shut(path: &Path) -> DataDirectory {
        DataDirectory { path: path.to_owned() }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where PostgreSQL keeps its WAL.
    pub fn wal(&self) -> PathBuf {
        self.path.join("pg_wal")
    }

    fn control_path(&self) -> PathBuf {
        self.path.join("global/pg_control")
    }

    /// The bytes of `pg_control`, whole: its checksum holds.
    ///
    /// # Errors
    /// If it can't be read, is of a version that isn't known, or stays torn for a second.
    pub fn control_bytes(&self) -> Result<(Vec<u8>, ControlFile), Failure> {
        let path = self.control_path();
        let mut tries = 0;
        loop {
            tries += 1;
            let bytes = fs::read(&path).map_err(|error| Failure::io(format!("reading {}", path.display()), &error))?;
            if bytes.len() as u64 > CONTROL_FILE_BYTES {
                return Err(Failure::new(
                    Code::DataDirectory,
                    format!("{} is longer than a pg_control can be", path.display()),
                ));
            }
            match ControlFile::parse(&bytes) {
                Ok(control) => return Ok((bytes, control)),
                Err(error) if error.is_torn() && tries < CONTROL_FILE_TRIES => std::thread::sleep(CONTROL_FILE_PAUSE),
                Err(error) => {
                    return Err(Failure::new(Code::DataDirectory, format!("{}: {error}", path.display()))
                        .hint("pgsidecar knows PostgreSQL 14 to 18 on little-endian machines."));
                }
            }
        }
    }

    /// `pg_control`, parsed.
    ///
    /// # Errors
    /// As [`DataDirectory::control_bytes`].
    pub fn control(&self) -> Result<ControlFile, Failure> {
        self.control_bytes().map(|(_, control)| control)
    }

    /// Whether the server is a standby, or becomes one when it's started: PostgreSQL removes the file at its promotion.
    pub fn is_standby(&self) -> bool {
        self.path.join("standby.signal").exists()
    }

    /// Whether the server runs. A server that was killed leaves a `postmaster.pid` that says it does.
    ///
    /// # Errors
    /// If the file can't be read.
    pub fn server(&self) -> io::Result<ServerState> {
        DataDirectory::server_in(&self.path)
    }

    /// The same of a directory that needs no `PG_VERSION`.
    ///
    /// # Errors
    /// If the file can't be read.
    pub fn server_in(directory: &Path) -> io::Result<ServerState> {
        match fs::read_to_string(directory.join("postmaster.pid")) {
            Ok(pid_file) => Ok(ServerState::parse(&pid_file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(ServerState::Gone),
            Err(error) => Err(error),
        }
    }

    /// Whether PostgreSQL waits to have this file archived.
    pub fn is_ready(&self, name: &ArchiveFileName) -> bool {
        self.wal().join(format!("archive_status/{name}.ready")).exists()
    }

    /// Whether PostgreSQL has marked this file as finished, archived or not.
    pub fn is_finished(&self, name: &ArchiveFileName) -> bool {
        // In this order: the mark is renamed from `.ready` to `.done`.
        self.is_ready(name) || self.wal().join(format!("archive_status/{name}.done")).exists()
    }

    /// The files that PostgreSQL waits to have archived, in its order ([`archiving_order`]). At most `limit` of those
    /// that are wanted.
    ///
    /// # Errors
    /// If `archive_status` can't be read.
    pub fn ready_files(
        &self,
        limit: usize,
        wanted: impl Fn(&ArchiveFileName) -> bool,
    ) -> io::Result<Vec<ArchiveFileName>> {
        let mut ready = BTreeSet::new();
        for entry in fs::read_dir(self.wal().join("archive_status"))? {
            let name = entry?.file_name();
            let Some(Ok(name)) = name.to_str().and_then(|name| name.strip_suffix(".ready")).map(str::parse) else {
                continue;
            };
            if !wanted(&name) {
                continue;
            }
            ready.insert((archiving_order(&name), name));
            if ready.len() > limit {
                ready.pop_last();
            }
        }
        Ok(ready.into_iter().map(|(_, name)| name).collect())
    }

    /// The timelines whose histories lie in pg_wal.
    ///
    /// # Errors
    /// If pg_wal can't be read.
    pub fn histories(&self) -> io::Result<Vec<TimelineId>> {
        let mut timelines = Vec::new();
        for entry in fs::read_dir(self.wal())? {
            if let Some(Ok(ArchiveFileName::History(timeline))) = entry?.file_name().to_str().map(str::parse) {
                timelines.push(timeline);
            }
        }
        Ok(timelines)
    }

    /// What PostgreSQL has marked as ready to be archived.
    ///
    /// # Errors
    /// If `archive_status` can't be read.
    pub fn backlog(&self) -> io::Result<Backlog> {
        let mut backlog = Backlog::default();
        for entry in fs::read_dir(self.wal().join("archive_status"))? {
            let entry = entry?;
            if !entry.file_name().as_encoded_bytes().ends_with(b".ready") {
                continue;
            }
            backlog.files += 1;
            // A file that PostgreSQL has renamed meanwhile counts no more, but isn't an error.
            let age = entry
                .metadata()
                .and_then(|meta| meta.modified())
                .ok()
                .and_then(|time| SystemTime::now().duration_since(time).ok());
            backlog.oldest = backlog.oldest.max(age);
        }
        Ok(backlog)
    }

    /// The file systems of the data directory and of its WAL, which may be one; those that don't tell are left out.
    pub fn volumes(&self) -> Vec<Volume> {
        let places = [("data", self.path.clone()), ("wal", self.wal())];
        let told = places.into_iter().filter_map(|(holds, place)| Some((holds, rustix::fs::statvfs(&place).ok()?)));
        told.map(|(holds, stat)| Volume {
            holds,
            available_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
            size_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_control_file_is_read_again() {
        let whole = include_bytes!("../crates/core/tests/fixtures/pg_control-15");
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("global/pg_control");
        fs::create_dir(directory.path().join("global")).unwrap();
        fs::write(directory.path().join("PG_VERSION"), "15\n").unwrap();
        let mut torn = *whole;
        torn[100] ^= 1;
        fs::write(&path, torn).unwrap();
        let pgdata = DataDirectory::open(directory.path()).unwrap();
        let failure = pgdata.control_bytes().unwrap_err();
        assert_eq!(failure.code, Code::DataDirectory, "it stays torn");
        let writer = std::thread::spawn(move || {
            std::thread::sleep(CONTROL_FILE_PAUSE * 3);
            use std::os::unix::fs::FileExt;
            fs::OpenOptions::new().write(true).open(path).unwrap().write_all_at(whole, 0).unwrap();
        });
        assert!(pgdata.control_bytes().unwrap().0 == whole);
        writer.join().unwrap();
    }

    #[test]
    fn the_state_of_a_server_is_read_from_its_pid_file() {
        let file = |address: &str, state: &str| {
            ServerState::parse(&format!("71\n/data\n1763714000\n5433\n/tmp\n{address}\n  12 34\n{state}\n"))
        };
        let socket = Some(PathBuf::from("/tmp/.s.PGSQL.5433"));
        let running = |port| ServerState::Running(Listening { port, socket: socket.clone() });
        assert_eq!(file("*", "ready   "), running(Some(5433)));
        assert_eq!(file("localhost", "standby "), running(Some(5433)));
        assert_eq!(file("", "starting"), running(None));
        assert_eq!(file("10.0.0.7", "ready   "), running(None));
        let stopping = Listening { port: Some(5433), socket: socket.clone() };
        assert_eq!(file("*", "stopping"), ServerState::Stopping(stopping));
        assert_eq!(ServerState::parse(""), ServerState::Running(Listening::default()));
    }
}
