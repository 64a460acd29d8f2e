//! An archive directory: files that `archive_command = 'cp %p /archive/%f'` leaves, shipped and removed once durable.
//!
//! `cp` is neither atomic nor durable: PostgreSQL has been told that a file is archived while it may be in no disk's
//! memory yet, and a file can be met while it's being written. Nothing here can mend the first. For the second:
//!
//! - Only regular files with names that PostgreSQL archives are looked at. All else is left alone.
//! - A file is taken once it hasn't changed for [`SETTLE`] and is complete as far as its content tells
//!   ([`Check::whole`]). What is uploaded is what was found complete: an upload during which the file changes leaves
//!   nothing (`archive`).
//! - It's removed once the store has acknowledged the identical bytes, if it's still the same file. The removal needn't be
//!   synced: a file that reappears after a crash is found equal to what is stored, and removed again. For the same
//!   reason a daemon may be killed anywhere.
//! - What can't be taken stays, is told (`known`), and holds up nothing: PostgreSQL doesn't wait for it.

mod known;

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Instant, SystemTime},
};

use pgsidecar_core::ArchiveFileName;
use rustix::fs::Access;
use serde::Serialize;

pub use self::known::{HeldFile, SETTLE};
use self::known::{Known, Sight, Why};
use super::{
    Origin,
    archive::{Archiver, Outcome},
    check::{self, Check},
    source::{Found, WalSource, Wanted},
};
use crate::{
    failure::{Code, Failure},
    pgdata::{DataDirectory, FileStamp, archiving_order},
    repository::Stored,
};

/// The directory, and what is known of the files in it.
pub struct ArchiveDirectory {
    path: PathBuf,
    known: Mutex<Known>,
    /// Why it could not be looked into at the last look.
    trouble: Mutex<Option<String>>,
}

/// The archive directory, in the status.
#[derive(Clone, Debug, Serialize)]
pub struct DirectoryStatus {
    /// Where it is.
    pub path: PathBuf,
    /// WAL files in it; unknown if it can't be read.
    pub files: Option<u64>,
    /// How long ago the oldest of them was written.
    pub oldest_seconds: Option<u64>,
    /// How many of them stay there, because they can't be taken or removed.
    pub held_files: u64,
    /// The first of these.
    pub held: Vec<HeldFile>,
    /// Why the directory can't be used.
    #[serde(skip)]
    pub problem: Option<Failure>,
}

impl DirectoryStatus {
    /// What keeps files from being shipped.
    pub fn problems(&self) -> Vec<Failure> {
        let held = self.held.first().map(|first| {
            let reason = first.reason.clone();
            match self.held_files {
                1 => reason.context(format!("{} stays in the archive directory", first.file)),
                more => {
                    reason.context(format!("{more} files stay in the archive directory, the first is {}", first.file))
                }
            }
        });
        self.problem.iter().cloned().chain(held).collect()
    }
}

impl ArchiveDirectory {
    /// The directory at this path, which needn't exist yet.
    pub fn new(path: PathBuf) -> ArchiveDirectory {
        ArchiveDirectory { path, known: Mutex::default(), trouble: Mutex::default() }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // What is known is found out again at each look.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unreadable(&self, error: &io::Error) -> Failure {
        Failure::new(Code::Io, format!("the archive directory {} can't be read: {error}", self.path.display())).hint(
            "Mount the directory that archive_command copies to, and let pgsidecar's user read, write and search it.",
        )
    }

    /// The WAL files in it, in no order. Links, directories and everything else are left out.
    fn files(&self) -> io::Result<impl Iterator<Item = io::Result<(ArchiveFileName, fs::DirEntry)>>> {
        Ok(fs::read_dir(&self.path)?.filter_map(|entry| match entry {
            Err(error) => Some(Err(error)),
            Ok(entry) => {
                let name = entry.file_name().to_str()?.parse().ok()?;
                entry.file_type().is_ok_and(|kind| kind.is_file()).then_some(Ok((name, entry)))
            }
        }))
    }

    /// Refuses a server's pg_wal: what is in there isn't a copy, and would be removed.
    fn check_no_pg_wal(&self, pgdata: &DataDirectory) -> Result<(), Failure> {
        let identity = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
        let ours = identity(&self.path);
        let is_pg_wal = ours.is_some() && ours == identity(&pgdata.wal());
        if !is_pg_wal && fs::symlink_metadata(self.path.join("archive_status")).is_err() {
            return Ok(());
        }
        Err(Failure::new(
            Code::Misconfigured,
            format!("the archive directory {} is a server's pg_wal: nothing is taken from it", self.path.display()),
        )
        .hint("Set PGSIDECAR_ARCHIVE_DIRECTORY to the directory that archive_command copies to. WAL in pg_wal is archived without it."))
    }

    fn look_at(
        &self,
        now: Instant,
        pgdata: &DataDirectory,
        limit: usize,
        wanted: Wanted<'_>,
    ) -> Result<Found, Failure> {
        self.check_no_pg_wal(pgdata)?;
        let mut first = BTreeSet::new();
        let mut known = self.known();
        known.begin_look();
        for file in self.files().map_err(|error| self.unreadable(&error))? {
            let (name, entry) = file.map_err(|error| self.unreadable(&error))?;
            if known.rests(name, now) || !wanted(&name) {
                continue;
            }
            first.insert((archiving_order(&name), name, entry.path()));
            if first.len() > limit {
                first.pop_last();
            }
        }
        known.end_look();
        let mut found = Found::default();
        for (_, name, path) in first {
            let meta = match fs::symlink_metadata(&path) {
                Ok(meta) if meta.is_file() => meta,
                _ => continue,
            };
            match known.saw(name, FileStamp::of(&meta), now) {
                Sight::Settled => found.ready.push(name),
                Sight::New => found.more_to_come = true,
                Sight::Held => {}
            }
        }
        for HeldFile { file, reason } in known.tell(now) {
            tracing::warn!(%file, hint = reason.hint, "stays in the archive directory: {reason}");
        }
        Ok(found)
    }

    /// Tells once that it can't be looked into, and once that it can be again.
    fn tell(&self, looked: &Result<Found, Failure>) {
        let Ok(mut trouble) = self.trouble.lock() else { return };
        match looked {
            Ok(_) if trouble.take().is_some() => {
                tracing::info!(directory = %self.path.display(), "the archive directory can be read again");
            }
            Ok(_) => {}
            Err(failure) => {
                if trouble.as_ref() != Some(&failure.message) {
                    tracing::error!(hint = failure.hint, "{failure}");
                }
                *trouble = Some(failure.message.clone());
            }
        }
    }

    /// Removes a file whose content is durable, if it is still that file.
    fn remove(&self, name: ArchiveFileName, stamp: FileStamp) {
        let path = self.path.join(name.to_string());
        // Between these two calls cp could begin to write here again, to a file that then has no name. It does so only
        // where PostgreSQL asks for this file a second time, and then with the content that is durable.
        let removed = match fs::symlink_metadata(&path) {
            Ok(meta) if FileStamp::of(&meta) != stamp => return self.known().forget(name),
            Ok(_) => fs::remove_file(&path),
            Err(error) => Err(error),
        };
        match removed {
            Ok(()) => {
                tracing::debug!(file = %name, "removed from the archive directory");
                self.known().removed(name);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.known().forget(name),
            Err(error) => {
                let failure = Failure::new(
                    Code::Io,
                    format!("{name} is in the repository, but can't be removed from {}: {error}", self.path.display()),
                )
                .hint("Let pgsidecar's user write to the archive directory, or it fills up.");
                self.known().hold(name, stamp, Why::NotRemoved, failure, Instant::now());
            }
        }
    }

    /// Whether a WAL file of this name lies here, complete or not: what PostgreSQL asks the archive for may then still
    /// come into it.
    ///
    /// # Errors
    /// If that can't be told.
    pub fn has(&self, name: ArchiveFileName) -> Result<bool, Failure> {
        let looked = fs::symlink_metadata(self.path.join(name.to_string()));
        match looked {
            Ok(_) => Ok(true),
            // That the directory isn't there is another matter: it may not be mounted yet.
            Err(error) if error.kind() == io::ErrorKind::NotFound => match fs::metadata(&self.path) {
                Ok(_) => Ok(false),
                Err(error) => Err(self.unreadable(&error)),
            },
            Err(error) => Err(self.unreadable(&error)),
        }
    }

    /// Tries whether files can be taken from it and removed.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self, pgdata: &DataDirectory) -> Result<(), Failure> {
        self.check_no_pg_wal(pgdata)?;
        drop(self.files().map_err(|error| self.unreadable(&error))?);
        rustix::fs::access(&self.path, Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK).map_err(|error| {
            Failure::io(
                format!("files can't be removed from the archive directory {}", self.path.display()),
                &error.into(),
            )
            .hint("Let pgsidecar's user read, write and search it.")
        })
    }

    /// How it stands, read anew.
    pub fn status(&self, pgdata: &DataDirectory) -> DirectoryStatus {
        let (held_files, held) = self.known().held(Instant::now());
        let counted = self.check_no_pg_wal(pgdata).and_then(|()| {
            let mut counted = (0, None);
            for file in self.files().map_err(|error| self.unreadable(&error))? {
                let (_, entry) = file.map_err(|error| self.unreadable(&error))?;
                let written = entry.metadata().and_then(|meta| meta.modified()).ok();
                let age = written.and_then(|time| SystemTime::now().duration_since(time).ok());
                counted = (counted.0 + 1, age.max(counted.1));
            }
            Ok(counted)
        });
        let (files, oldest, problem) = match counted {
            Ok((files, oldest)) => (Some(files), oldest, None),
            Err(failure) => (None, None, Some(failure)),
        };
        let oldest_seconds = oldest.map(|age| age.as_secs());
        DirectoryStatus { path: self.path.clone(), files, oldest_seconds, held_files, held, problem }
    }
}

#[async_trait::async_trait]
impl WalSource for ArchiveDirectory {
    fn watched(&self, _: &Origin) -> PathBuf {
        self.path.clone()
    }

    fn look(&self, _: &Archiver, origin: &Origin, limit: usize, wanted: Wanted<'_>) -> Result<Found, Failure> {
        let looked = self.look_at(Instant::now(), &origin.pgdata, limit, wanted);
        self.tell(&looked);
        looked
    }

    fn is_waiting(&self, _: &Archiver, _: &Origin, name: ArchiveFileName) -> bool {
        self.known().settled(name).is_some()
    }

    async fn archive(&self, archiver: &Arc<Archiver>, origin: &Origin, name: ArchiveFileName) -> Outcome {
        let Some((stamp, is_stored)) = self.known().settled(name) else {
            return Err(Failure::new(Code::NotFound, format!("{name} isn't in {} any more", self.path.display())));
        };
        if is_stored {
            self.remove(name, stamp);
            return Ok(Stored::Already);
        }
        let path = self.path.join(name.to_string());
        let check = Check { name, control: origin.control, stamp: Some(stamp) };
        let looked_at = path.clone();
        let whole = tokio::task::spawn_blocking(move || {
            let mut file = check::open_copy(&looked_at, stamp)?;
            check.whole(&mut file, stamp.size)
        });
        let archived = match whole.await? {
            // It isn't told as a failure to archive: it may be on its way.
            Err(failure) => Err((Why::Incomplete, failure)),
            Ok(()) => archiver.archive_copy(origin, name, path, stamp).await.map_err(|failure| (Why::Refused, failure)),
        };
        match archived {
            Ok(stored) => {
                self.remove(name, stamp);
                Ok(stored)
            }
            Err((why, failure)) => {
                match failure.code {
                    // It changed: the next look sees how.
                    Code::Busy => {}
                    Code::InvalidSegment | Code::TooLarge | Code::WrongCluster | Code::Conflict | Code::NotOwner => {
                        self.known().hold(name, stamp, why, failure.clone(), Instant::now());
                    }
                    Code::Io if why == Why::Incomplete => {
                        self.known().hold(name, stamp, Why::Refused, failure.clone(), Instant::now());
                    }
                    // The store's, or ours. It's tried again as whoever asks sees fit.
                    _ => {}
                }
                Err(failure)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_come_in_postgresqls_order_and_those_that_stay_take_nobodys_place() {
        let scratch = tempfile::tempdir().unwrap();
        let (data, archive) = (scratch.path().join("data"), scratch.path().join("archive"));
        for path in [data.join("global"), data.join("pg_wal"), archive.join("00000001000000000000000F")] {
            fs::create_dir_all(path).unwrap();
        }
        fs::write(data.join("PG_VERSION"), "15\n").unwrap();
        fs::write(data.join("global/pg_control"), "").unwrap();
        let pgdata = DataDirectory::open(&data).unwrap();
        let names =
            ["00000003.history", "000000010000000000000001", "000000010000000000000002", "000000020000000000000002"];
        for name in names.iter().chain(&["00000001000000000000000A.tmp", "backup_label"]) {
            fs::write(archive.join(name), "x").unwrap();
        }
        let directory = ArchiveDirectory::new(archive.clone());
        let start = Instant::now();
        let look = |at, limit| {
            let found = directory.look_at(at, &pgdata, limit, &|_| true).unwrap();
            (found.ready.iter().map(ToString::to_string).collect::<Vec<_>>(), found.more_to_come)
        };
        assert_eq!(look(start, 10), (vec![], true));
        assert_eq!(look(start + SETTLE, 10), (names.map(str::to_owned).to_vec(), false));
        assert_eq!(look(start + SETTLE, 2).0, names[..2]);
        for name in &names[..2] {
            let (name, stamp) = (name.parse().unwrap(), FileStamp::of(&fs::metadata(archive.join(name)).unwrap()));
            let failure = Failure::new(Code::Conflict, "other content");
            directory.known().hold(name, stamp, Why::Refused, failure, start + SETTLE);
        }
        assert_eq!(look(start + SETTLE, 2).0, names[2..]);
        // One that has become a server's pg_wal is left alone.
        fs::create_dir(archive.join("archive_status")).unwrap();
        assert_eq!(directory.look_at(start + SETTLE, &pgdata, 2, &|_| true).unwrap_err().code, Code::Misconfigured);
    }

    #[test]
    fn what_has_been_written_anew_is_not_removed() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = ArchiveDirectory::new(scratch.path().to_owned());
        let name: ArchiveFileName = "00000002.history".parse().unwrap();
        let path = scratch.path().join(name.to_string());
        let written = |text: &str| {
            fs::write(&path, text).unwrap();
            FileStamp::of(&fs::symlink_metadata(&path).unwrap())
        };
        let (stored, anew) = (written("stored"), written("and written anew"));
        directory.remove(name, stored);
        assert_eq!(fs::read_to_string(&path).unwrap(), "and written anew");
        directory.remove(name, anew);
        assert_eq!(directory.has(name), Ok(false));
        // Somebody was faster.
        directory.remove(name, anew);
        assert_eq!(directory.known().held(Instant::now()).0, 0);
    }
}
