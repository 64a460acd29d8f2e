//! Restoring over a database, where there's no room for two. Files that are as the backup has them stay and aren't read from
//! the store.
//!
//! The order of effects, and what a crash between two of them leaves:
//!
//! 1. Nothing is touched before the plan holds, no server runs on the directory, and there's room.
//! 2. WAL that is nowhere else has been copied beside it (`src/switch`).
//! 3. A marker says what is being done, then `PG_VERSION` goes. From here on nothing starts on the directory, and nothing
//!    takes it for empty; the same again goes on, whatever was done already: it's all compared anew.
//! 4. What the backup doesn't have, or has otherwise, is removed: all of it, where the backup builds on others.
//! 5. What is missing is written, and the rest is as with any restore: recovery files, one `syncfs`, `pg_control`, then
//!    `PG_VERSION`, and the marker goes.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering::Relaxed},
};

use pgsidecar_core::{
    BackupRecord,
    data_directory::{Treatment, tablespace_version_directory, treat_directory},
    plan::RestorePlan,
    recovery::RecoverySettings,
    switch::stays_inside,
};

use super::{
    Places, RestoreOptions, Staged,
    chain::Filling,
    directory::TargetDirectory,
    finish_over,
    layer::Paths,
    remap, room,
    running::server_on,
    unpack::{HeldFile, Unpacker},
};
use crate::{
    backup::index::{self, IndexEntry},
    failure::{Code, Failure},
    progress::{Phase, Progress},
    repository::Repository,
};

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

/// Restores over the database in `options.to`. `kept_wal` are files of `pg_wal` that stay, by name.
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
    kept_wal: &[String],
    progress: Arc<Progress>,
) -> Result<(), Failure> {
    let (root, backup) = (options.to.as_path(), &plan.backup);
    let places = Places::of(plan, options, &Staged::default())?;
    let failed = |error: io::Error| Failure::io(format!("reading {}", root.display()), &error);
    if let Some(server) = server_on(root).map_err(failed)? {
        return Err(Failure::new(
            Code::TargetDirectory,
            format!("a server runs on {} ({server}); nothing was changed", root.display()),
        )
        .hint("Stop it first."));
    }
    let begun = root.join(MARKER).exists();
    if !begun && !root.join("PG_VERSION").exists() {
        return Err(Failure::new(
            Code::TargetDirectory,
            format!("{} holds no database to restore over; nothing was changed", root.display()),
        )
        .hint("Restore to it with 'restore run --to' when it's empty."));
    }
    let version = version_directory(root, backup)?;
    let needed = room::needed(repository, plan, options, &places.links).await?;
    room::check_with(&needed, &replaced(root, &places.links, &version)?)?;
    let directory = TargetDirectory::existing(root, places.links.values().cloned())?;
    directory.write_durably(MARKER, format!("{}\n", backup.id).as_bytes())?;
    super::remove_if_there(&root.join("PG_VERSION"))?;
    sync(root)?;

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
    let over = Over { root: root.to_owned(), locations: places.links.clone(), version, kept_wal: kept_wal.to_vec() };
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
    tokio::task::spawn_blocking(move || finish_over(&directory, &links, major, &settings, held, MARKER)).await?
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

fn sync(directory: &Path) -> Result<(), Failure> {
    let synced = File::open(directory).and_then(|directory| directory.sync_all());
    synced.map_err(|error| Failure::io(format!("syncing {}", directory.display()), &error))
}

/// What is restored over.
#[derive(Clone)]
struct Over {
    root: PathBuf,
    locations: BTreeMap<u32, PathBuf>,
    version: String,
    kept_wal: Vec<String>,
}

/// The frames of a backup, by part and offset: how many files begin in each, and whether one of them is needed.
type Frames = BTreeMap<(u32, u64), (u64, bool)>;

impl Over {
    /// Removes what isn't as the backup has it; answers with what has to be read.
    async fn compare(
        &self,
        repository: &Repository,
        backup: &BackupRecord,
        progress: &Arc<Progress>,
    ) -> Result<Vec<Stretch>, Failure> {
        let (over, progress) = (self.clone(), progress.clone());
        let last = backup.parts.last().map_or(0, |part| part.number);
        let begin = (Paths::default(), Frames::new(), vec![0; COPY_BYTES]);
        let looked = index::read(repository, backup, begin, move |(wanted, frames, buffer), entry| {
            if progress.is_cancelled() {
                return Err(Failure::new(Code::Busy, "given up"));
            }
            if entry.part == last {
                return Ok(());
            }
            let same = over.is_same(&entry, buffer)?;
            if same {
                wanted.insert(entry.path.as_bytes());
            }
            let (files, needed) = frames.entry((entry.part, entry.frame)).or_default();
            *files += 1;
            *needed |= !same;
            Ok(())
        });
        let (same, frames, _) = looked.await?;
        let over = self.clone();
        tokio::task::spawn_blocking(move || over.remove(&same)).await??;
        Ok(stretches(&frames))
    }

    /// Removes everything.
    async fn clear(&self) -> Result<(), Failure> {
        let over = self.clone();
        tokio::task::spawn_blocking(move || over.remove(&Paths::default())).await?
    }

    fn is_same(&self, entry: &IndexEntry, buffer: &mut [u8]) -> Result<bool, Failure> {
        let Some(path) = self.place(&entry.path) else { return Ok(false) };
        let mut compare = || -> io::Result<bool> {
            let mut file = File::open(&path)?;
            if file.metadata()?.len() != entry.size {
                return Ok(false);
            }
            let mut crc = 0;
            loop {
                match file.read(buffer)? {
                    0 => return Ok(crc == entry.crc32c),
                    n => crc = crc32c::crc32c_append(crc, &buffer[..n]),
                }
            }
        };
        match compare() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            same => same.map_err(|error| Failure::io(format!("reading {}", path.display()), &error)),
        }
    }

    fn place(&self, path: &str) -> Option<PathBuf> {
        match path.strip_prefix("pg_tblspc/") {
            None => Some(self.root.join(path)),
            Some(rest) => {
                let (oid, inner) = rest.split_once('/')?;
                Some(self.locations.get(&oid.parse().ok()?)?.join(inner))
            }
        }
    }

    /// Removes every file that isn't among those, links to tablespaces included. Directories stay where they hold something
    /// or every data directory has them.
    fn remove(&self, kept: &Paths) -> Result<(), Failure> {
        self.empty(&self.root, "", kept)?;
        for (oid, location) in &self.locations {
            for inner in version_directories(location, &self.version)? {
                let name = inner.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
                self.empty(&inner, &format!("pg_tblspc/{oid}/{name}"), kept)?;
            }
        }
        Ok(())
    }

    /// Answers with whether something is left.
    fn empty(&self, directory: &Path, path: &str, kept: &Paths) -> Result<bool, Failure> {
        let failed = |error: io::Error| Failure::io(format!("emptying {}", directory.display()), &error);
        let mut left = false;
        for entry in fs::read_dir(directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            let spared = name.to_str().is_some_and(|name| match path {
                "" => stays_inside(name) || name == MARKER,
                "pg_wal" => name == "lost+found" || self.kept_wal.iter().any(|kept| kept == name),
                _ => false,
            });
            if spared {
                left = true;
                continue;
            }
            let inner = if path.is_empty() {
                name.to_string_lossy().into_owned()
            } else {
                format!("{path}/{}", name.to_string_lossy())
            };
            let is_wal = inner == "pg_wal";
            let kind = entry.file_type().map_err(failed)?;
            if kind.is_dir() || is_wal {
                let held = self.empty(&entry.path(), &inner, kept)?;
                // The database's own: base/<oid> and the like. What every data directory has stays.
                let goes = !held && !is_wal && is_databases(&inner);
                if goes {
                    fs::remove_dir(entry.path()).map_err(failed)?;
                } else {
                    left = true;
                }
            } else if kept.contains(inner.as_bytes()) {
                left = true;
            } else {
                fs::remove_file(entry.path()).map_err(failed)?;
            }
        }
        Ok(left)
    }
}

/// Whether the directory holds one database's relations, or lies below one that is emptied by every start.
fn is_databases(path: &str) -> bool {
    let mut components = path.split('/');
    match (components.next(), components.next()) {
        (Some("base" | "pg_replslot"), Some(_)) => true,
        (Some("pg_tblspc"), Some(_)) => true,
        (Some(top), Some(_)) => treat_directory(top) == Treatment::EmptyDirectory && top != "pg_wal",
        _ => false,
    }
}

fn stretches(frames: &Frames) -> Vec<Stretch> {
    let mut stretches: Vec<Stretch> = Vec::new();
    let mut open = false;
    let mut part = None;
    for ((number, from), (files, needed)) in frames {
        if part != Some(*number) {
            (open, part) = (false, Some(*number));
        }
        match (open, needed) {
            (true, true) => {
                if let Some(last) = stretches.last_mut() {
                    last.files += files;
                }
            }
            (false, true) => {
                stretches.push(Stretch { part: *number, from: *from, len: None, files: *files });
                open = true;
            }
            (true, false) => {
                if let Some(last) = stretches.last_mut() {
                    last.len = Some(from - last.from);
                }
                open = false;
            }
            (false, false) => {}
        }
    }
    stretches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_frames_with_something_needed_are_read() {
        let frames: Frames = [
            ((1, 0), (3, true)),
            ((1, 100), (1, true)),
            ((1, 250), (2, false)),
            ((1, 300), (5, true)),
            ((2, 0), (1, false)),
            ((3, 0), (4, true)),
            ((3, 70), (4, false)),
        ]
        .into();
        let stretch = |part, from, len, files| Stretch { part, from, len, files };
        assert_eq!(
            stretches(&frames),
            [stretch(1, 0, Some(250), 4), stretch(1, 300, None, 5), stretch(3, 0, Some(70), 4)]
        );
    }
}
