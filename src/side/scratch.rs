//! The directory of one run, in the scratch directory: made new, locked while its process lives, removed at the end. What
//! a killed run has left is known by its marker, which nobody locks any more; the next run ends its server and removes
//! it.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use rustix::process::{Pid, Signal, kill_process};

use crate::failure::{Code, Failure};

/// What the names of our directories begin with.
const PREFIX: &str = "pgsidecar-side-";
/// In each of them. Its lock says that the run lives.
const MARKER: &str = "run";
/// How long a server may take to end after SIGQUIT, and after SIGKILL.
const END_PATIENCE: Duration = Duration::from_secs(10);
/// How long what still writes into a directory may hold up its removal.
const REMOVE_PATIENCE: Duration = Duration::from_secs(10);
/// The longest path of a Unix socket (`sun_path` of `sockaddr_un`, less the end of the string).
const LONGEST_SOCKET: usize = 107;
/// The name of the server's socket in it.
pub(super) const SOCKET: &str = ".s.PGSQL.5432";

/// The directory of this run. Dropped, it's removed.
#[derive(Debug)]
pub struct RunDirectory {
    path: PathBuf,
    /// Locked.
    _marker: File,
    remove: bool,
}

impl RunDirectory {
    /// Removes what killed runs have left, and makes a directory for this one. `pgdata`: the live data directory, which
    /// must not hold it.
    ///
    /// # Errors
    /// [`Code::Misconfigured`] or [`Code::TargetDirectory`] if the scratch directory can't be used.
    pub fn new(scratch: Option<&Path>, pgdata: Option<&Path>, purpose: &str) -> Result<(RunDirectory, usize), Failure> {
        let scratch = scratch.ok_or_else(|| {
            Failure::new(Code::Misconfigured, "PGSIDECAR_SCRATCH: needed here, and not set")
                .hint("Set PGSIDECAR_SCRATCH or --scratch to a directory with room for the database and its WAL.")
        })?;
        let scratch = usable(scratch, pgdata)?;
        let failed =
            |error: io::Error| Failure::io(format!("using the scratch directory {}", scratch.display()), &error);
        // Nobody looks for remains between the making of a directory and the locking of its marker.
        let guard = File::open(&scratch).map_err(failed)?;
        guard.lock().map_err(failed)?;
        let removed = remove_remains(&scratch).map_err(failed)?;
        let path = (0..u32::MAX).map(|n| scratch.join(format!("{PREFIX}{}-{n}", std::process::id())));
        let path = path.into_iter().find(|path| !path.exists()).unwrap_or_default();
        DirBuilder::new().mode(0o700).create(&path).map_err(failed)?;
        let make = || {
            let mut marker =
                OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path.join(MARKER))?;
            marker.lock()?;
            writeln!(marker, "{purpose}, process {}, since {}", std::process::id(), Timestamp::now())?;
            Ok(marker)
        };
        let marker = make().map_err(failed)?;
        Ok((RunDirectory { path, _marker: marker, remove: true }, removed))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The restored data directory.
    pub fn data(&self) -> PathBuf {
        self.path.join("data")
    }

    /// Leaves it for whoever wants to look: neither this run nor a later one removes it.
    pub fn keep(mut self) -> PathBuf {
        self.remove = false;
        let _ = fs::remove_file(self.path.join(MARKER));
        self.path.clone()
    }
}

impl Drop for RunDirectory {
    fn drop(&mut self) {
        if !self.remove {
            return;
        }
        let until = Instant::now() + REMOVE_PATIENCE;
        while let Err(error) = remove(&self.path) {
            if Instant::now() > until {
                tracing::warn!(%error, "{} could not be removed; the next run tries again", self.path.display());
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The scratch directory as it's called everywhere, or why it can't be one.
fn usable(scratch: &Path, pgdata: Option<&Path>) -> Result<PathBuf, Failure> {
    let refuse = |why: String| {
        Failure::new(Code::TargetDirectory, format!("the scratch directory {}: {why}", scratch.display()))
            .hint("Set PGSIDECAR_SCRATCH or --scratch to another directory.")
    };
    let real = fs::canonicalize(scratch).map_err(|error| refuse(error.to_string()))?;
    if !real.is_dir() {
        return Err(refuse("it is not a directory".to_owned()));
    }
    if let Some(live) = pgdata.and_then(|pgdata| fs::canonicalize(pgdata).ok())
        && real.starts_with(&live)
    {
        return Err(refuse(format!("it lies in the live data directory, {}", live.display())));
    }
    // It goes into settings, commands and the names of sockets.
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=@".contains(c);
    match real.to_str() {
        Some(text) if text.chars().all(plain) => {}
        _ => return Err(refuse("its path has characters other than letters, digits and /._-+=@".to_owned())),
    }
    // The process id has up to seven digits.
    let longest = real.join(format!("{PREFIX}1234567-9")).join(SOCKET).as_os_str().len();
    if longest > LONGEST_SOCKET {
        return Err(refuse(format!("its path is {} bytes too long for a Unix socket in it", longest - LONGEST_SOCKET)));
    }
    Ok(real)
}

/// Removes what runs have left that don't live any more. Answers with how many.
fn remove_remains(scratch: &Path) -> io::Result<usize> {
    let mut removed = 0;
    for entry in fs::read_dir(scratch)? {
        let entry = entry?;
        let (path, meta) = (entry.path(), entry.metadata()?);
        let is_ours = meta.is_dir()
            && meta.uid() == rustix::process::geteuid().as_raw()
            && entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes());
        if !is_ours {
            continue;
        }
        match OpenOptions::new().read(true).write(true).open(path.join(MARKER)) {
            Ok(marker) if marker.try_lock().is_ok() => {}
            // It lives.
            Ok(_) => continue,
            // Killed before it had one: then it's empty. With something in it, it was kept.
            Err(_) => {
                let _ = fs::remove_dir(&path);
                continue;
            }
        }
        end_server(&path.join("data"));
        tracing::info!("removing {}: a run that was killed has left it", path.display());
        remove(&path)?;
        removed += 1;
    }
    Ok(removed)
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        // Something in it may have gone by itself meanwhile.
        Err(error) if error.kind() != io::ErrorKind::NotFound || path.symlink_metadata().is_ok() => Err(error),
        _ => Ok(()),
    }
}

/// Ends every process of a server on this directory of ours, at once: nothing of it is needed any more.
pub(super) fn end_server(data: &Path) {
    for signal in [Signal::QUIT, Signal::KILL] {
        let until = Instant::now() + END_PATIENCE;
        let mut told: Vec<i32> = Vec::new();
        loop {
            let processes = processes_in(data);
            if processes.is_empty() {
                return;
            }
            for pid in processes {
                if !told.contains(&pid)
                    && let Some(process) = Pid::from_raw(pid)
                {
                    let _ = kill_process(process, signal);
                    told.push(pid);
                }
            }
            if Instant::now() > until {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The processes of PostgreSQL whose working directory it is: those of a server all have theirs there. A process id alone
/// could be another's by now.
fn processes_in(data: &Path) -> Vec<i32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let is_server = |pid: &i32| {
        let there = fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == data);
        let comm = || fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        there && matches!(comm().trim_end(), "postgres" | "postmaster" | "edb-postgres")
    };
    pids.filter(is_server).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remains_are_removed_and_what_lives_or_was_kept_is_not() {
        let scratch = tempfile::tempdir().unwrap();
        let new = || RunDirectory::new(Some(scratch.path()), None, "test").unwrap();
        let (living, removed) = new();
        assert_eq!(removed, 0);
        let (kept, _) = new();
        fs::write(kept.path().join("log"), "x").unwrap();
        let kept = kept.keep();
        let (killed, _) = new();
        let left = killed.path().to_owned();
        fs::create_dir(left.join("data")).unwrap();
        // As a process that is killed: the lock goes, the directory stays.
        let RunDirectory { .. } = &killed;
        let mut killed = killed;
        killed.remove = false;
        drop(killed);
        fs::create_dir(scratch.path().join("somebody-else-s")).unwrap();
        let (third, removed) = new();
        assert_eq!((removed, left.exists()), (1, third.path() == left));
        assert!(living.path().exists() && kept.exists() && scratch.path().join("somebody-else-s").exists());
        let path = third.path().to_owned();
        drop(third);
        assert!(!path.exists());
    }

    #[test]
    fn a_scratch_directory_in_the_data_directory_is_refused() {
        let pgdata = tempfile::tempdir().unwrap();
        let scratch = pgdata.path().join("scratch");
        fs::create_dir(&scratch).unwrap();
        let failure = RunDirectory::new(Some(&scratch), Some(pgdata.path()), "test").unwrap_err();
        assert_eq!(failure.code, Code::TargetDirectory);
        let deep = pgdata.path().join("x".repeat(90));
        fs::create_dir(&deep).unwrap();
        assert!(RunDirectory::new(Some(&deep), None, "test").unwrap_err().message.contains("too long"));
        assert_eq!(RunDirectory::new(None, None, "test").unwrap_err().code, Code::Misconfigured);
    }
}
