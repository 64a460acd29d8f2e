//! What is known of a backup of a chain while its parts are unpacked over those of the backups before it.
//!
//! Of paths only hashes are kept, 8 bytes each (about twice that in a set): a restore's memory depends on the number of
//! files by no more than that. The hashes are keyed anew for each restore.

use std::{
    collections::HashSet,
    hash::{BuildHasher, RandomState},
    io, mem,
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
};

use jiff::Timestamp;
use pgsidecar_core::{BackupRecord, incremental_file::path_of_incremental, incremental_plan::RelationPath};

use super::{manifest::NewManifest, unpack::HeldFile};

/// Paths in the data directory, by their hashes.
#[derive(Clone, Default)]
pub struct Paths {
    hasher: RandomState,
    hashes: HashSet<u64>,
}

impl Paths {
    /// None yet, hashed as these are.
    pub fn like(other: &Paths) -> Paths {
        Paths { hasher: other.hasher.clone(), hashes: HashSet::new() }
    }

    /// Adds a path; `false` if it was there.
    pub fn insert(&mut self, path: &[u8]) -> bool {
        self.hashes.insert(self.hasher.hash_one(path))
    }

    /// Whether the path is among them.
    pub fn contains(&self, path: &[u8]) -> bool {
        self.hashes.contains(&self.hasher.hash_one(path))
    }
}

/// A backup that is being unpacked.
pub struct Layer {
    /// What the chain's newest backup has; `None` if this is the newest.
    wanted: Option<Arc<Paths>>,
    /// What the backup has on which this one builds; `None` for a full one.
    parent: Option<Paths>,
    /// What this one has, as far as it has been seen.
    seen: Mutex<Paths>,
    /// Of what the newest one is restored to.
    manifest: Mutex<Option<NewManifest>>,
    segment_blocks: u32,
}

/// What is to be done with a file of a part.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Place {
    /// Nothing: the newest backup doesn't have it.
    Nowhere,
    /// All of it takes the place of what may be there.
    Whole,
    /// Its blocks go into the relation's file at this path.
    Into(String),
}

impl Layer {
    /// The chain's full backup, which isn't its newest.
    pub fn full(wanted: Arc<Paths>) -> Layer {
        let seen = Mutex::new(Paths::like(&wanted));
        Layer { wanted: Some(wanted), parent: None, seen, manifest: Mutex::default(), segment_blocks: 0 }
    }

    /// An incremental one on top of a backup with these paths: the newest if there is a `manifest` to be written. In
    /// a relation's file there are at most `segment_blocks`.
    pub fn incremental(
        wanted: &Arc<Paths>,
        parent: Paths,
        manifest: Option<NewManifest>,
        segment_blocks: u32,
    ) -> Layer {
        Layer {
            wanted: manifest.is_none().then(|| wanted.clone()),
            seen: Mutex::new(Paths::like(&parent)),
            parent: Some(parent),
            manifest: Mutex::new(manifest),
            segment_blocks,
        }
    }

    /// Whether newer backups follow.
    pub fn is_below_others(&self) -> bool {
        self.wanted.is_some()
    }

    /// Blocks in each file of a relation but its last.
    pub fn segment_blocks(&self) -> u32 {
        self.segment_blocks
    }

    /// What to do with the file at this path.
    ///
    /// # Errors
    /// What is wrong with the backup, for people.
    pub fn place(&self, path: &Path) -> Result<Place, String> {
        let increment_of = relation_of_increment(path);
        let plain = increment_of.as_deref().map_or(path, Path::new);
        let bytes = plain.as_os_str().as_encoded_bytes();
        if !lock(&self.seen).insert(bytes) {
            return Err(format!("{} is in the backup twice", plain.display()));
        }
        if increment_of.is_some() && !self.parent.as_ref().is_some_and(|parent| parent.contains(bytes)) {
            return Err(format!("the backup that it builds on lacks {}, of which it has changes", plain.display()));
        }
        // An index has only UTF-8.
        let wanted = self.wanted.as_ref().is_none_or(|wanted| wanted.contains(plain.to_string_lossy().as_bytes()));
        Ok(match increment_of {
            _ if !wanted => Place::Nowhere,
            Some(plain) => Place::Into(plain),
            None => Place::Whole,
        })
    }

    /// Takes note of a directory.
    pub fn note_directory(&self, path: &Path) {
        lock(&self.seen).insert(path.as_os_str().as_encoded_bytes());
    }

    /// Adds a file that has its last content to the manifest.
    ///
    /// # Errors
    /// If the manifest can't be written.
    pub fn add_to_manifest(&self, path: &Path, size: u64, modified: Timestamp, crc32c: u32) -> io::Result<()> {
        let mut manifest = lock(&self.manifest);
        let Some(manifest) = manifest.as_mut() else { return Ok(()) };
        manifest.add(path.as_os_str().as_encoded_bytes(), size, modified, crc32c)
    }

    /// What was seen. To be asked when no thread unpacks any more.
    pub fn take_seen(&self) -> Paths {
        let mut seen = lock(&self.seen);
        let none = Paths::like(&seen);
        mem::replace(&mut *seen, none)
    }

    /// Ends the manifest with the files of the last part. To be called when no thread unpacks any more.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn finish_manifest(&self, held: &[HeldFile], backup: &BackupRecord) -> io::Result<()> {
        let manifest = lock(&self.manifest).take();
        manifest.map_or(Ok(()), |manifest| manifest.finish(held, backup))
    }
}

/// The path of the relation's file whose blocks the incremental file at this path has; `None` if it is none.
pub fn relation_of_increment(path: &Path) -> Option<String> {
    path_of_incremental(path.to_str()?).filter(|plain| RelationPath::parse(plain).is_some())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A thread that panicked has ended the restore.
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(paths: &[&str]) -> Paths {
        let mut all = Paths::default();
        paths.iter().for_each(|path| assert!(all.insert(path.as_bytes())));
        all
    }

    #[test]
    fn what_the_newest_backup_lacks_goes_nowhere_and_what_can_not_be_is_told() {
        let wanted = Arc::new(paths(&["base/5/1", "base/5/2", "pg_xact/0000"]));
        let place = |layer: &Layer, path: &str| layer.place(Path::new(path));
        let full = Layer::full(wanted.clone());
        assert_eq!(place(&full, "base/5/1"), Ok(Place::Whole));
        assert_eq!(place(&full, "base/5/3"), Ok(Place::Nowhere));
        assert_eq!(place(&full, "extra/INCREMENTAL.1"), Ok(Place::Nowhere));
        for nonsense in ["base/5/1", "base/5/INCREMENTAL.2", "base/5/INCREMENTAL.1"] {
            assert!(place(&full, nonsense).is_err(), "{nonsense}");
        }
        let seen = full.take_seen();
        assert!(seen.contains(b"base/5/1") && seen.contains(b"base/5/3"));

        let between = Layer::incremental(&Arc::new(paths(&["base/5/1"])), seen, None, 1);
        assert!(between.is_below_others());
        assert_eq!(place(&between, "base/5/INCREMENTAL.1"), Ok(Place::Into("base/5/1".to_owned())));
        assert_eq!(place(&between, "base/5/INCREMENTAL.3"), Ok(Place::Nowhere));
        assert!(place(&between, "base/5/INCREMENTAL.9").is_err(), "its base isn't there");
        assert!(place(&between, "base/5/1").is_err(), "whole as well");
        assert_eq!(place(&between, "base/5/2"), Ok(Place::Nowhere));
    }
}
