//! Fills a directory from the parts of a backup and of those that it builds on.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use pgsidecar_core::{
    BackupRecord, ControlFile,
    backup::{PartRecord, StoredObject},
    backup_label::without_increment,
    layout::BackupObject,
    switch::stays_inside,
};
use tokio::task::JoinSet;

use super::{
    directory::{MARKER, TargetDirectory},
    layer::{Layer, Paths},
    manifest::NewManifest,
    prune::prune,
    replace::{self, Stretch},
    unpack::{self, HeldFile, Unpacker},
};
use crate::{
    backup::index,
    failure::{Code, Failure},
    repository::{Repository, damaged},
};

/// The last part holds a few small files. Anything larger isn't one.
const MAX_LAST_PART_BYTES: u64 = 8 << 20;

/// A directory that is being filled.
pub struct Filling<'a> {
    /// Where the backups are.
    pub repository: &'a Repository,
    /// The directory.
    pub directory: &'a TargetDirectory,
    /// The tablespaces' directories, by their OIDs.
    pub tablespaces: &'a BTreeMap<u32, PathBuf>,
    /// What writes the parts.
    pub unpacker: Unpacker,
    /// How many parts are read at a time.
    pub parallelism: usize,
}

impl Filling<'_> {
    /// Unpacks a backup that holds everything, and its manifest. Answers with its last part, which `change` gets first.
    ///
    /// # Errors
    /// The store's; that of what is damaged, or can't be written.
    pub async fn full(
        &self,
        backup: &BackupRecord,
        change: impl Fn(&mut [HeldFile]) -> Result<(), Failure>,
    ) -> Result<Vec<HeldFile>, Failure> {
        self.unpack_parts(backup, &self.unpacker).await?;
        let mut held = self.hold(backup).await?;
        change(&mut held)?;
        // Here, so that a damaged one ends the restore before anything is startable.
        let manifest = self.directory.create("backup_manifest")?;
        self.read_stored(backup, BackupObject::Manifest, backup.manifest, u64::MAX - 1, manifest).await?;
        Ok(held)
    }

    /// The same where some files are there already, and right: reads only the frames in which the others are.
    ///
    /// # Errors
    /// As [`Filling::full`].
    pub async fn rest(
        &self,
        backup: &BackupRecord,
        stretches: Vec<Stretch>,
        change: impl Fn(&mut [HeldFile]) -> Result<(), Failure>,
    ) -> Result<Vec<HeldFile>, Failure> {
        let unpacker = self.unpacker.keeping();
        let mut waiting = stretches.into_iter();
        self.each(&unpacker, || {
            let stretch = waiting.next()?;
            let (repository, unpacker) = (self.repository.clone(), unpacker.clone());
            let key = repository.layout().backup(backup.id, BackupObject::Part(stretch.part));
            Some(async move {
                let opened = repository.open_range(&key, stretch.from, stretch.len).await?;
                let Some((_, reader)) = opened else { return Err(damaged(key.as_str(), "it is missing")) };
                let why = reader.failure();
                tokio::task::spawn_blocking(move || {
                    let plain = zstd::stream::read::Decoder::new(reader)
                        .map_err(|error| Failure::io("setting zstd up", &error))?;
                    match unpacker.unpack_stretch(plain, stretch.files)? {
                        Ok(()) => Ok(()),
                        Err(error) => Err(match why.or_io("", &error) {
                            failure if failure.code == Code::Io => damaged(key.as_str(), &error.to_string()),
                            failure => failure,
                        }),
                    }
                })
                .await?
            })
        })
        .await?;
        let mut held = self.hold(backup).await?;
        change(&mut held)?;
        let manifest = self.directory.create("backup_manifest")?;
        self.read_stored(backup, BackupObject::Manifest, backup.manifest, u64::MAX - 1, manifest).await?;
        Ok(held)
    }

    /// Unpacks `newest` over those that it builds on: a full backup and others between, the older first. Writes a
    /// manifest of what comes of it. Answers with the last part as it's to be written: as the label of a full backup,
    /// and as `change` makes it.
    ///
    /// # Errors
    /// The store's; that of what is damaged, or can't be written.
    pub async fn chain(
        &self,
        full: &BackupRecord,
        between: &[BackupRecord],
        newest: &BackupRecord,
        change: impl Fn(&mut [HeldFile]) -> Result<(), Failure>,
    ) -> Result<Vec<HeldFile>, Failure> {
        let wanted = index::read(self.repository, newest, Paths::default(), |paths, entry| {
            paths.insert(entry.restored().0.as_bytes());
            Ok(())
        });
        let wanted = Arc::new(wanted.await?);
        let layer = Arc::new(Layer::full(wanted.clone()));
        let mut seen = self.layer(full, layer).await?.take_seen();
        let mut held = self.hold(newest).await?;
        let segment_blocks = relation_segment_blocks(&held)?;
        for link in between {
            let layer = Arc::new(Layer::incremental(&wanted, seen, None, segment_blocks));
            seen = self.layer(link, layer).await?.take_seen();
        }
        let manifest = NewManifest::new(self.directory.create("backup_manifest")?, newest);
        let layer = Arc::new(Layer::incremental(&wanted, seen, Some(manifest), segment_blocks));
        let layer = self.layer(newest, layer).await?;
        self.prune(layer.take_seen()).await?;
        for label in held.iter_mut().filter(|file| file.path == "backup_label") {
            label.content = without_increment(&String::from_utf8_lossy(&label.content)).into_bytes();
        }
        change(&mut held)?;
        let finished = layer.finish_manifest(&held, newest);
        finished.map_err(|error| Failure::io("writing backup_manifest", &error))?;
        Ok(held)
    }

    async fn layer(&self, backup: &BackupRecord, layer: Arc<Layer>) -> Result<Arc<Layer>, Failure> {
        self.unpack_parts(backup, &self.unpacker.for_layer(layer.clone())).await?;
        tracing::debug!(backup = %backup.id, "restore: a backup of the chain is unpacked");
        Ok(layer)
    }

    /// Unpacks all parts but the last, several at a time. Returns only when no thread writes any more, whatever happens.
    async fn unpack_parts(&self, backup: &BackupRecord, unpacker: &Unpacker) -> Result<(), Failure> {
        let (_, parts) = split_last(backup)?;
        let mut waiting = parts.iter();
        self.each(unpacker, || {
            let part = *waiting.next()?;
            let (repository, unpacker) = (self.repository.clone(), unpacker.clone());
            let key = repository.layout().backup(backup.id, BackupObject::Part(part.number));
            Some(async move {
                let reader = repository.open_stored(&key, part.stored).await?;
                tokio::task::spawn_blocking(move || unpacker.unpack(reader, &part)).await?
            })
        })
        .await
    }

    /// Does what `next` gives, several at a time, until it gives nothing more or one has failed. Returns only when all have
    /// ended.
    async fn each<F>(&self, unpacker: &Unpacker, mut next: impl FnMut() -> Option<F>) -> Result<(), Failure>
    where
        F: Future<Output = Result<(), Failure>> + Send + 'static,
    {
        let mut running = JoinSet::new();
        let mut failure: Option<Failure> = None;
        loop {
            while failure.is_none() && running.len() < self.parallelism {
                let Some(work) = next() else { break };
                running.spawn(work);
            }
            match running.join_next().await {
                None => break,
                Some(ended) => {
                    if let Err(first) = ended.map_err(Failure::from).and_then(|result| result) {
                        unpacker.cancel();
                        failure.get_or_insert(first);
                    }
                }
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// Takes the last part into memory. Whose it is, the directory is to be, too.
    async fn hold(&self, backup: &BackupRecord) -> Result<Vec<HeldFile>, Failure> {
        let (last, parts) = split_last(backup)?;
        let object = BackupObject::Part(last.number);
        let plain = self.read_stored(backup, object, last.stored, MAX_LAST_PART_BYTES, Vec::new()).await?;
        let key = self.repository.layout().backup(backup.id, object);
        let held = unpack::hold(&plain).map_err(|error| damaged(key.as_str(), &error.to_string()))?;
        let files = parts.iter().map(|part| part.files).sum::<u64>() + held.len() as u64;
        if files != backup.files {
            return Err(damaged(
                &format!("backup {}", backup.id),
                &format!("its parts hold {files} files, its record says {}", backup.files),
            ));
        }
        if let Some(file) = held.first() {
            self.directory.adopt(file.owner)?;
        }
        Ok(held)
    }

    /// Reads a compressed object of a backup into a writer, and checks at its end that its bytes were those that were
    /// stored. More plain bytes than `limit` are damage.
    async fn read_stored<W: Write + Send + 'static>(
        &self,
        backup: &BackupRecord,
        object: BackupObject,
        stored: StoredObject,
        limit: u64,
        mut writer: W,
    ) -> Result<W, Failure> {
        let key = self.repository.layout().backup(backup.id, object);
        let mut reader = self.repository.open_stored(&key, stored).await?;
        let read = move || {
            let copied = io::copy(&mut (&mut reader).take(limit + 1), &mut writer);
            if copied.map_err(|error| reader.explain(&error))? > limit {
                return Err(damaged(key.as_str(), &format!("it holds more than {limit} bytes")));
            }
            reader.finish()?;
            Ok(writer)
        };
        tokio::task::spawn_blocking(read).await?
    }

    /// Removes what the newest backup doesn't have, and whose name only seemed to be among its own: what is in an index
    /// is UTF-8, and names on the disk need not be.
    async fn prune(&self, kept: Paths) -> Result<(), Failure> {
        let (root, tablespaces) = (self.directory.path().to_owned(), self.tablespaces.clone());
        let prune = move || {
            // Only what belongs to this restore is looked at where more stands beside it.
            prune(&root, Path::new(""), &kept, &|name| {
                [MARKER, replace::MARKER, "backup_manifest"].iter().any(|alone| name == *alone)
                    || name == "pg_wal"
                    // Configuration that lies elsewhere, where it's restored over a database.
                    || root.join(name).is_symlink()
                    || name.to_str().is_some_and(stays_inside)
            })?;
            tablespaces.iter().try_for_each(|(oid, location)| {
                prune(location, &Path::new("pg_tblspc").join(oid.to_string()), &kept, &|name| {
                    name == MARKER || !name.to_str().is_some_and(|name| name.starts_with("PG_"))
                })
            })
        };
        let pruned = tokio::task::spawn_blocking(prune).await?;
        pruned.map_err(|(path, error)| Failure::io(format!("removing {}", path.display()), &error))
    }
}

/// The last part, and those before it.
fn split_last(backup: &BackupRecord) -> Result<(&PartRecord, &[PartRecord]), Failure> {
    let none = || damaged(&format!("backup {}", backup.id), "its record lists no parts");
    backup.parts.split_last().ok_or_else(none)
}

/// Blocks in each file of a relation but its last, by the pg_control of the last part.
fn relation_segment_blocks(held: &[HeldFile]) -> Result<u32, Failure> {
    let last_part = "the last part of the backup";
    let control = held.iter().find(|file| file.path == "global/pg_control");
    let control = control.ok_or_else(|| damaged(last_part, "it lacks global/pg_control"))?;
    let control = ControlFile::parse(&control.content).map_err(|error| damaged(last_part, &error.to_string()))?;
    Ok(control.relation_segment_blocks)
}
