//! What is in the way of a restore over a database, and what of it stays.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read},
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use pgsidecar_core::{
    ArchiveFileName, BackupRecord,
    data_directory::{STANDARD_DIRECTORIES, is_standard},
    switch::stays_inside,
};

use super::{COPY_BYTES, MARKER, Stretch, version_directories};
use crate::{
    backup::index::{self, IndexEntry},
    failure::{Code, Failure},
    progress::Progress,
    repository::Repository,
    restore::layer::Paths,
};

/// What is restored over.
#[derive(Clone)]
pub struct Over {
    /// The data directory.
    pub root: PathBuf,
    /// Where the backup's tablespaces are, by their OIDs.
    pub locations: BTreeMap<u32, PathBuf>,
    /// How the name of a tablespace's directory of the server's version begins.
    pub version: String,
    /// Directories of tablespaces of the database that is there, whether the backup has them or not. Left as they are,
    /// recovery would make the tablespace again and find pages there that were written later.
    pub emptied: Vec<PathBuf>,
    /// WAL that stays, by name.
    pub kept_wal: Vec<String>,
}

/// The frames of a backup, by part and offset: how many files begin in each, and whether one of them is needed.
type Frames = BTreeMap<(u32, u64), (u64, bool)>;

impl Over {
    /// Removes what isn't as the backup has it; answers with what has to be read.
    pub async fn compare(
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
    pub async fn clear(&self) -> Result<(), Failure> {
        let over = self.clone();
        tokio::task::spawn_blocking(move || over.remove(&Paths::default())).await?
    }

    fn is_same(&self, entry: &IndexEntry, buffer: &mut [u8]) -> Result<bool, Failure> {
        let Some(path) = self.place(&entry.path) else { return Ok(false) };
        self.remove_unlike_file(entry, &path)?;
        // A link in a directory's place goes, and what it leads to isn't the database's.
        let below = if entry.path.starts_with("pg_tblspc/") { 2 } else { 0 };
        let depth = entry.path.split('/').count() - 1 - below.min(entry.path.split('/').count() - 1);
        let linked = |path: &Path| fs::symlink_metadata(path).is_ok_and(|meta| meta.is_symlink());
        if path.ancestors().skip(1).take(depth).any(linked) {
            return Ok(false);
        }
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
        // What can't be read, for whatever reason, is not the same: it's removed, and written anew.
        Ok(compare().unwrap_or_else(|error| {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!("{} can't be read ({error}): it's restored anew", path.display());
            }
            false
        }))
    }

    /// Removes what is in a file's place and isn't one: a directory, or a link, but for a person's at the top.
    fn remove_unlike_file(&self, entry: &IndexEntry, path: &Path) -> Result<(), Failure> {
        let removed = match fs::symlink_metadata(path) {
            Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
            Ok(meta) if !meta.is_file() && entry.path.contains('/') => fs::remove_file(path),
            _ => Ok(()),
        };
        removed.map_err(|error| Failure::io(format!("removing {}", path.display()), &error))
    }

    fn place(&self, path: &str) -> Option<PathBuf> {
        if Path::new(path).components().any(|component| !matches!(component, Component::Normal(_))) {
            return None;
        }
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
        let ours: Vec<PathBuf> = self.locations.values().filter_map(|location| location.canonicalize().ok()).collect();
        for gone in &self.emptied {
            let location = gone.parent().and_then(|location| location.canonicalize().ok());
            if location.is_some_and(|location| ours.contains(&location)) {
                continue;
            }
            match fs::remove_dir_all(gone) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Failure::io(format!("removing {}", gone.display()), &error));
                }
                _ => sync(gone.parent().unwrap_or(gone))?,
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
            let kind = entry.file_type().map_err(failed)?;
            let inner = if path.is_empty() {
                name.to_string_lossy().into_owned()
            } else {
                format!("{path}/{}", name.to_string_lossy())
            };
            if inner == "pg_wal" {
                self.empty_wal(&entry.path())?;
                left = true;
                continue;
            }
            // Configuration that lies elsewhere: a person's link.
            let is_persons_link = path.is_empty() && kind.is_symlink() && !is_standard(&inner);
            let is_ours = path.is_empty() && name.to_str().is_some_and(|name| stays_inside(name) || name == MARKER);
            if is_persons_link || is_ours {
                left = true;
            } else if kind.is_dir() {
                let held = self.empty(&entry.path(), &inner, kept)?;
                // What every data directory has stays, and so does an empty one of a person's.
                if !held && is_standard(&inner) && !STANDARD_DIRECTORIES.contains(&inner.as_str()) {
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

    /// Removes the server's WAL and what tells of it. Anything else that lies there isn't the database's: what an earlier
    /// restore has kept, where pg_wal leads to the root of a volume, or a stranger's.
    fn empty_wal(&self, wal: &Path) -> Result<(), Failure> {
        let failed = |error: io::Error| Failure::io(format!("emptying {}", wal.display()), &error);
        let files = |directory: &Path| -> Result<Vec<(String, PathBuf)>, Failure> {
            let mut files = Vec::new();
            for entry in fs::read_dir(directory).map_err(failed)? {
                let entry = entry.map_err(failed)?;
                let is_directory = entry.file_type().map_err(failed)?.is_dir();
                files.extend(
                    entry.file_name().into_string().ok().filter(|_| !is_directory).map(|name| (name, entry.path())),
                );
            }
            Ok(files)
        };
        let mut gone: Vec<PathBuf> = files(wal)?
            .into_iter()
            .filter(|(name, _)| is_wal(name) && !self.kept_wal.contains(name))
            .map(|(_, path)| path)
            .collect();
        for about in ["archive_status", "summaries"].map(|name| wal.join(name)).iter().filter(|about| about.is_dir()) {
            gone.extend(files(about)?.into_iter().map(|(_, path)| path));
        }
        gone.iter().try_for_each(|path| fs::remove_file(path).map_err(failed))
    }
}

/// Whether PostgreSQL gives a file in pg_wal such a name.
/// Source: XLogFileInit, RestoreArchivedFile and `xlog_internal.h`.
fn is_wal(name: &str) -> bool {
    name.parse::<ArchiveFileName>().is_ok() || name.starts_with("RECOVERY") || name.starts_with("xlogtemp.")
}

fn sync(directory: &Path) -> Result<(), Failure> {
    let synced = File::open(directory).and_then(|directory| directory.sync_all());
    synced.map_err(|error| Failure::io(format!("syncing {}", directory.display()), &error))
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

    #[test]
    fn only_what_is_the_databases_goes() {
        let scratch = tempfile::tempdir().unwrap();
        let (root, space) = (scratch.path().join("data"), scratch.path().join("space"));
        let inside = |names: &[&str]| {
            for name in names {
                let path = root.join(name);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, "").unwrap();
            }
        };
        let stays = [
            "pg_wal/pgsql_tmp.before-restore-20261121T061500Z/000000010000000000000001",
            "pg_wal/strangers/000000010000000000000001",
            "pg_wal/archive_status/directory/file",
            "pg_wal/a stranger's",
            "pg_wal/00000001000000000000000A",
            "pgsql_tmp.before-restore-20261121T061500Z/PG_VERSION",
        ];
        let goes = [
            "pg_wal/000000010000000000000001",
            "pg_wal/000000010000000000000001.partial",
            "pg_wal/00000002.history",
            "pg_wal/000000010000000000000001.00000028.backup",
            "pg_wal/RECOVERYXLOG",
            "pg_wal/xlogtemp.71",
            "pg_wal/archive_status/000000010000000000000001.ready",
            "pg_wal/summaries/0000000100000000010000280000000001000100.summary",
            "base/5/1259",
            "global/1262/is a directory",
            "postgresql.conf",
        ];
        inside(&stays);
        inside(&goes);
        std::os::unix::fs::symlink("/elsewhere/pg_hba.conf", root.join("pg_hba.conf")).unwrap();
        fs::create_dir(root.join("conf.d")).unwrap();
        fs::create_dir_all(space.join("PG_15_202209061/5")).unwrap();
        fs::create_dir_all(space.join("PG_16_202307071/5")).unwrap();
        let over = Over {
            root: root.clone(),
            locations: BTreeMap::new(),
            version: "PG_15_".to_owned(),
            emptied: vec![space.join("PG_15_202209061"), space.join("gone already")],
            kept_wal: vec!["00000001000000000000000A".to_owned()],
        };
        over.remove(&Paths::default()).unwrap();
        stays.iter().for_each(|name| assert!(root.join(name).exists(), "{name}"));
        goes.iter().for_each(|name| assert!(!root.join(name).exists(), "{name}"));
        assert!(root.join("pg_hba.conf").is_symlink() && root.join("conf.d").exists() && root.join("base").exists());
        assert!(!root.join("global/1262").exists() && !root.join("base/5").exists());
        assert!(!space.join("PG_15_202209061").exists() && space.join("PG_16_202307071/5").exists());
    }

    #[test]
    fn what_cannot_be_read_is_not_the_same() {
        let scratch = tempfile::tempdir().unwrap();
        let over = Over {
            root: scratch.path().to_owned(),
            locations: BTreeMap::new(),
            version: String::new(),
            emptied: Vec::new(),
            kept_wal: Vec::new(),
        };
        let same = |path: &str| {
            let entry = serde_json::json!({"path": path, "part": 1, "frame": 0, "offset": 0, "size": 0, "crc32c": 0,
                "modified": "2026-11-21T06:15:00Z"});
            over.is_same(&serde_json::from_value(entry).unwrap(), &mut [0; 64]).unwrap()
        };
        fs::create_dir_all(scratch.path().join("base/5/directory")).unwrap();
        fs::write(scratch.path().join("base/4"), "").unwrap();
        std::os::unix::fs::symlink("loop", scratch.path().join("base/loop")).unwrap();
        assert!(same("base/4") && !same("base/3"));
        assert!(!same("base/4/below a file"));
        assert!(!same("base/5") && !scratch.path().join("base/5").exists());
        assert!(!same("base/loop") && !scratch.path().join("base/loop").is_symlink());
    }
}
