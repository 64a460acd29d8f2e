//! The repository of one database system: what its objects mean, on top of a [`Store`] that knows only keys.
//!
//! Guarantees: creating is idempotent. The same content again is a success, other content under the same name
//! is a [`Code::Conflict`] that shows both hashes. Reading survives a connection that breaks in the middle.

mod drills;
mod dumps;
mod listing;
mod partly;
pub mod pins;
mod restore_points;
mod runs;
mod snapshots;
mod stored;

use std::{io::Write, sync::Arc, time::Duration};

use bytes::Bytes;
use pgsidecar_core::{
    ArchiveFileName, BackupId, BackupRecord, ClusterName, ContentId, Layout, ObjectKey, Sha256Digest, SystemIdentifier,
    TimelineHistory, TimelineId, WalSegmentSize,
    backup::{BACKUP_FORMAT, StoredObject},
    layout::{BackupObject, RepositoryObject},
    plan::Catalog,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{sync::mpsc, task::JoinHandle};

pub use self::{
    dumps::DumpClaim,
    listing::{ListedWal, WalListing},
    stored::StoredReader,
};
use crate::{
    codec::{self, ChannelReader, Compressed},
    failure::{Code, Failure},
    store::{ByteRange, Creation, ListRequest, Pages, Store, StoreError, Upload},
};

/// Compressed content up to this size is sent in one request, whose bytes are held in memory: a segment of the
/// usual 16 MB, however badly it compresses.
pub const SINGLE_REQUEST_BYTES: usize = 17 << 20;
/// What a buffer for one request has at first.
const SMALL_BUFFER_BYTES: usize = 512 << 10;
/// The largest small object (records, histories) that is read into memory.
const SMALL_OBJECT_BYTES: u64 = 64 << 20;
/// How often a broken download is taken up again before it fails, unless it gets on in between.
const DOWNLOAD_RETRIES: u32 = 4;
/// How many bytes more of it make up for all retries before.
const DOWNLOAD_PROGRESS: u64 = 1 << 20;

/// `cluster.json`: what is the same for all WAL of a database system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterRecord {
    /// The layout's version.
    pub format: u32,
    /// The database system.
    pub system_identifier: SystemIdentifier,
    /// Size of its WAL segments.
    pub wal_segment_size: WalSegmentSize,
}

/// `started.json`: the claim of a backup's id, written before anything else of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupClaim {
    /// The backup.
    pub id: BackupId,
    /// The pod or host that takes it.
    pub instance: String,
    /// Distinguishes this attempt from every other.
    pub attempt: String,
}

/// The repository of one database system.
#[derive(Clone, Debug)]
pub struct Repository {
    store: Arc<dyn Store>,
    layout: Layout,
    level: i32,
}

/// What came of storing content under a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// It's new.
    New,
    /// The same content was there already.
    Already,
}

impl Repository {
    /// The repository of this database system in this store; `level` is zstd's.
    pub fn new(store: Arc<dyn Store>, layout: Layout, level: i32) -> Repository {
        Repository { store, layout, level }
    }

    /// The database systems that a cluster name has in a store.
    ///
    /// # Errors
    /// If the store can't be listed.
    pub async fn systems(store: &dyn Store, cluster: &ClusterName) -> Result<Vec<SystemIdentifier>, Failure> {
        let mut systems = Vec::new();
        let mut pages = Pages::new(store, ListRequest::shallow(Layout::cluster_prefix(cluster)));
        while let Some(page) = pages.next().await? {
            systems.extend(page.prefixes.iter().filter_map(|prefix| Layout::system_of_prefix(cluster, prefix)));
        }
        Ok(systems)
    }

    /// Where its objects lie.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The store beneath.
    pub fn store(&self) -> &dyn Store {
        &*self.store
    }

    /// Sends chunks to an object as they come, and makes it visible once they have ended *and* `complete` has
    /// resolved. A channel that ends because its writer failed looks like one that is complete; `complete` is what
    /// tells them apart. Up to `buffer` bytes are sent in one request that carries their hash.
    ///
    /// # Errors
    /// The store's, or that of `complete`.
    pub async fn upload(
        &self,
        key: &ObjectKey,
        mut chunks: mpsc::Receiver<Bytes>,
        buffer: usize,
        complete: impl Future<Output = Result<(), Failure>>,
    ) -> Result<Creation, Failure> {
        let mut buffered: Vec<u8> = Vec::new();
        let mut upload: Option<Box<dyn Upload>> = None;
        let fed = async {
            while let Some(chunk) = chunks.recv().await {
                match &mut upload {
                    Some(upload) => upload.write(chunk).await?,
                    None if buffered.len() + chunk.len() <= buffer => {
                        // What outgrows a small buffer gets all that it may take at once. Untouched it costs nothing, and
                        // growing step by step would hold the old and the new buffer, of megabytes each, at each step.
                        if buffered.capacity() < buffered.len() + chunk.len() {
                            let small = SMALL_BUFFER_BYTES.min(buffer);
                            let wanted = if buffered.len() + chunk.len() <= small { small } else { buffer };
                            buffered.reserve_exact(wanted - buffered.len());
                        }
                        buffered.extend_from_slice(&chunk);
                    }
                    None => {
                        let upload = upload.insert(self.store.begin(key).await?);
                        if !buffered.is_empty() {
                            upload.write(Bytes::from(std::mem::take(&mut buffered))).await?;
                        }
                        upload.write(chunk).await?;
                    }
                }
            }
            Ok::<(), StoreError>(())
        };
        let fed = fed.await;
        // A failed upload makes the producer fail too, because its channel is closed: the upload's reason is the real one.
        drop(chunks);
        let completed = complete.await;
        match (fed, completed, upload) {
            (Ok(()), Ok(()), Some(upload)) => Ok(upload.finish().await?),
            (Ok(()), Ok(()), None) => {
                let sha256 = Sha256Digest::of(&buffered);
                Ok(self.store.create(key, Bytes::from(buffered), Some(sha256)).await?)
            }
            (fed, completed, upload) => {
                if let Some(upload) = upload {
                    upload.abort().await;
                }
                fed?;
                completed?;
                Err(Failure::internal("an upload that neither failed nor succeeded"))
            }
        }
    }

    /// Stores a stream that [`codec::compress`] makes under a key, unless other content is there. `name` is for
    /// messages.
    ///
    /// # Errors
    /// The stream's own failure, the store's, or [`Code::Conflict`].
    ///
    /// # Cancellation
    /// A dropped call leaves nothing visible, or the whole object.
    pub async fn store_stream(
        &self,
        key: &ObjectKey,
        name: &str,
        stream: (mpsc::Receiver<Bytes>, JoinHandle<Result<Compressed, Failure>>),
    ) -> Result<(Stored, Compressed), Failure> {
        let (chunks, done) = stream;
        let mut compressed = None;
        let complete = async {
            compressed = Some(done.await??);
            Ok(())
        };
        let creation = self.upload(key, chunks, SINGLE_REQUEST_BYTES, complete).await?;
        let compressed = compressed.ok_or_else(|| Failure::internal("an upload without content"))?;
        let plain = async { Ok(compressed.plain) };
        let stored = self.settle(key, name, creation, compressed.stored.sha256, plain).await?;
        Ok((stored, compressed))
    }

    /// Stores bytes that [`codec::compress_whole`] has made, whose hash is `sha256`, under a key, unless other content is
    /// there. `name` is for messages.
    ///
    /// # Errors
    /// The store's, or [`Code::Conflict`].
    ///
    /// # Cancellation
    /// A dropped call leaves nothing visible, or the whole object.
    pub async fn store_compressed(
        &self,
        key: &ObjectKey,
        name: &str,
        bytes: Vec<u8>,
        sha256: Sha256Digest,
    ) -> Result<Stored, Failure> {
        let bytes = Bytes::from(bytes);
        let creation = self.store.create(key, bytes.clone(), Some(sha256)).await?;
        let plain = async {
            let hash = move || {
                let mut hashing = codec::HashingWriter::new(std::io::sink());
                codec::decompress(&*bytes, &mut hashing).map_err(|error| Failure::io("decompressing", &error))?;
                Ok(hashing.finish().1)
            };
            tokio::task::spawn_blocking(hash).await?
        };
        self.settle(key, name, creation, sha256, plain).await
    }

    /// Tells a repeated creation from a conflict. Equal bytes are equal content; different bytes may be the same content
    /// all the same, compressed by another zstd, so that then both contents are looked into.
    async fn settle(
        &self,
        key: &ObjectKey,
        name: &str,
        creation: Creation,
        sha256: Sha256Digest,
        plain: impl Future<Output = Result<ContentId, Failure>>,
    ) -> Result<Stored, Failure> {
        if creation == Creation::Created {
            return Ok(Stored::New);
        }
        let gone = || {
            Failure::new(
                Code::StoreUnavailable,
                format!("{name} was there when it was to be stored, and gone when it was looked at"),
            )
            .hint("Nothing was stored. Find out what deletes objects in the repository.")
        };
        if self.store.head(key).await?.ok_or_else(gone)?.sha256 == Some(sha256) {
            return Ok(Stored::Already);
        }
        let theirs = self.read_plain(key, codec::HashingWriter::new(std::io::sink())).await?.ok_or_else(gone)?;
        let (theirs, ours) = (theirs.0.finish().1, plain.await?);
        if theirs == ours {
            return Ok(Stored::Already);
        }
        Err(Failure::new(
            Code::Conflict,
            format!(
                "{name} is already in the repository with other content: there SHA-256 {} ({} bytes), here {} ({} bytes)",
                theirs.sha256.short(),
                theirs.size,
                ours.sha256.short(),
                ours.size
            ),
        )
        .hint(
            "Nothing was overwritten. Two servers archive under one name: a copy of the database runs elsewhere, or this \
             one went back in time without a new timeline. Give the copy another cluster name (PGSIDECAR_CLUSTER).",
        ))
    }

    /// Checks that an object's bytes, as they are stored, are these. Reads all of it.
    ///
    /// # Errors
    /// The store's, or [`Code::Conflict`].
    pub async fn check_stored(&self, key: &ObjectKey, expected: StoredObject) -> Result<(), Failure> {
        let conflict = || {
            Failure::new(Code::Conflict, format!("{key} is already in the repository with other content"))
                .hint("Something else writes under the same name. Try again.")
        };
        let Some((_, mut reader)) = self.open_stream(key).await? else { return Err(conflict()) };
        let hash = move || {
            let why = reader.failure();
            let mut hashing = codec::HashingWriter::new(std::io::sink());
            codec::copy(&mut reader, &mut hashing).map_err(|error| why.or_io("reading", &error))?;
            Ok::<_, Failure>(hashing.finish().1)
        };
        let found = tokio::task::spawn_blocking(hash).await??;
        if found.sha256 == expected.sha256 && found.size == expected.size { Ok(()) } else { Err(conflict()) }
    }

    /// Reads a compressed object into `writer`, on a thread of the blocking pool, checking zstd's checksums and
    /// the hash in its metadata. With the writer, how many bytes it got. `None` only if the store says that it isn't there.
    ///
    /// # Errors
    /// The store's; [`Code::Damaged`] if what came isn't what was stored; the writer's.
    pub async fn read_plain<W>(&self, key: &ObjectKey, mut writer: W) -> Result<Option<(W, u64)>, Failure>
    where
        W: Write + Send + 'static,
    {
        let Some((expected, reader)) = self.open_stream(key).await? else { return Ok(None) };
        let name = key.to_string();
        let why = reader.failure();
        let decode = move || {
            let failed = |error: std::io::Error| match why.or_io("", &error) {
                sent if sent.code != Code::Io => sent,
                // What is left are zstd's complaints and the writer's.
                _ if error.raw_os_error().is_some() => Failure::io("writing", &error),
                _ => damaged(&name, &error.to_string()),
            };
            let (stored, length) = codec::decompress(reader, &mut writer).map_err(failed)?;
            match expected {
                Some(expected) if expected != stored.sha256 => Err(damaged(
                    &name,
                    &format!("its bytes have SHA-256 {}, stored was {}", stored.sha256.short(), expected.short()),
                )),
                _ => Ok((writer, length)),
            }
        };
        tokio::task::spawn_blocking(decode).await?.map(Some)
    }

    /// An object's bytes as they are stored, for a blocking reader; taken up again where a connection broke.
    /// With them, their hash as the metadata tell it.
    ///
    /// # Errors
    /// The store's, if it can't even be begun; later ones come through the reader.
    pub async fn open_stream(&self, key: &ObjectKey) -> Result<Option<(Option<Sha256Digest>, ChannelReader)>, Failure> {
        self.open_range(key, 0, None).await
    }

    /// The same from this offset on, at most `len` bytes if that is given.
    ///
    /// # Errors
    /// As [`Repository::open_stream`].
    pub async fn open_range(
        &self,
        key: &ObjectKey,
        from: u64,
        len: Option<u64>,
    ) -> Result<Option<(Option<Sha256Digest>, ChannelReader)>, Failure> {
        let range = move |position: u64| match len {
            Some(len) => ByteRange::Bounded { from: from + position, len: len.saturating_sub(position) },
            None if from + position == 0 => ByteRange::All,
            None => ByteRange::From(from + position),
        };
        let Some(mut download) = self.store.get(key, range(0)).await? else { return Ok(None) };
        let sha256 = download.info.sha256;
        let (sender, reader) = ChannelReader::new();
        let (store, key) = (self.store.clone(), key.clone());
        tokio::spawn(async move {
            let (mut position, mut retries, mut forgiven_at) = (0, 0, 0);
            loop {
                match download.next().await {
                    Ok(None) => return,
                    Ok(Some(chunk)) => {
                        position += chunk.len() as u64;
                        if position - forgiven_at >= DOWNLOAD_PROGRESS {
                            (retries, forgiven_at) = (0, position);
                        }
                        if sender.send(Ok(chunk)).await.is_err() {
                            return;
                        }
                    }
                    Err(error) if error.is_transient() && retries < DOWNLOAD_RETRIES => {
                        retries += 1;
                        tracing::debug!(%key, position, %error, "download broke off; taking it up again");
                        tokio::time::sleep(Duration::from_millis(200 << retries)).await;
                        // Objects never change, so the rest belongs to what we have.
                        match store.get(&key, range(position)).await {
                            Ok(Some(rest)) => download = rest,
                            Ok(None) => {
                                let gone = Failure::new(Code::Damaged, format!("{key} was deleted while it was read"));
                                let _ = sender.send(Err(gone)).await;
                                return;
                            }
                            Err(error) if error.is_transient() => {}
                            Err(error) => {
                                let _ = sender.send(Err(error.into())).await;
                                return;
                            }
                        }
                    }
                    Err(error) => {
                        let _ = sender.send(Err(error.into())).await;
                        return;
                    }
                }
            }
        });
        Ok(Some((sha256, reader)))
    }

    /// Stores a small record as JSON.
    ///
    /// # Errors
    /// The store's, or [`Code::Conflict`].
    pub async fn store_json<T: Serialize>(&self, object: &RepositoryObject, record: &T) -> Result<Stored, Failure> {
        let key = self.layout.key(object);
        let mut json = serde_json::to_vec_pretty(record).map_err(Failure::internal)?;
        json.push(b'\n');
        let creation = self.store.create(&key, Bytes::from(json.clone()), Some(Sha256Digest::of(&json))).await?;
        if creation == Creation::Created {
            return Ok(Stored::New);
        }
        // Not compressed: its bytes are its content.
        let there = match self.store.get(&key, ByteRange::All).await? {
            Some(there) => Some(there.bytes(SMALL_OBJECT_BYTES).await?),
            None => None,
        };
        match there {
            Some(there) if there == json => Ok(Stored::Already),
            _ => {
                Err(Failure::new(Code::Conflict, format!("{key} is already in the repository and says something else"))
                    .hint("Nothing was overwritten. Does another database use this cluster name (PGSIDECAR_CLUSTER)?"))
            }
        }
    }

    /// Reads a small record. `None` if it isn't there.
    ///
    /// # Errors
    /// The store's; [`Code::Damaged`] if it can't be parsed.
    pub async fn read_json<T: DeserializeOwned>(&self, object: &RepositoryObject) -> Result<Option<T>, Failure> {
        let key = self.layout.key(object);
        let Some(download) = self.store.get(&key, ByteRange::All).await? else { return Ok(None) };
        let json = download.bytes(SMALL_OBJECT_BYTES).await?;
        serde_json::from_slice(&json).map(Some).map_err(|error| damaged(key.as_str(), &error.to_string()))
    }

    /// Notes what is the same for all WAL of this system, if it isn't noted yet.
    ///
    /// # Errors
    /// The store's; [`Code::Conflict`] if something else is noted.
    pub async fn note_cluster(&self, wal_segment_size: WalSegmentSize) -> Result<(), Failure> {
        let record = ClusterRecord { format: 1, system_identifier: self.layout.system(), wal_segment_size };
        self.store_json(&RepositoryObject::Cluster, &record).await.map(|_| ())
    }

    /// Stores a timeline history, backup history file or segment that is small enough to be in memory.
    ///
    /// # Errors
    /// The store's, or [`Code::Conflict`].
    pub async fn store_bytes(&self, key: &ObjectKey, name: &str, bytes: Bytes) -> Result<Stored, Failure> {
        let stream = codec::compress(self.level, move |out| {
            out.write_all(&bytes).map_err(|error| Failure::io("compressing", &error))
        });
        self.store_stream(key, name, stream).await.map(|(stored, _)| stored)
    }

    /// zstd's level for what is stored.
    pub fn level(&self) -> i32 {
        self.level
    }

    /// All complete backups, oldest first. A record that is damaged is told in the log and left out: it must not keep
    /// the other backups from being restored.
    ///
    /// # Errors
    /// The store's.
    pub async fn backups(&self) -> Result<Vec<BackupRecord>, Failure> {
        let mut backups = Vec::new();
        for id in self.backup_ids().await? {
            match self.backup(id).await {
                Ok(backup) => backups.extend(backup),
                Err(failure) if failure.code == Code::Damaged => {
                    tracing::warn!(hint = failure.hint, "backup {id} is left out: {failure}");
                }
                Err(failure) => return Err(failure),
            }
        }
        Ok(backups)
    }

    /// The ids of all backups, complete or not, oldest first.
    ///
    /// # Errors
    /// The store's.
    pub async fn backup_ids(&self) -> Result<Vec<BackupId>, Failure> {
        let mut ids = Vec::new();
        let mut pages = Pages::new(&*self.store, ListRequest::shallow(self.layout.backups_prefix()));
        while let Some(page) = pages.next().await? {
            ids.extend(page.prefixes.iter().filter_map(|prefix| self.layout.backup_of_prefix(prefix)));
        }
        ids.sort_unstable();
        Ok(ids)
    }

    /// A backup's record; `None` if there is no such backup, or it isn't complete.
    ///
    /// # Errors
    /// The store's; [`Code::Damaged`] if the record can't be parsed.
    pub async fn backup(&self, id: BackupId) -> Result<Option<BackupRecord>, Failure> {
        let record: Option<BackupRecord> = self.read_json(&RepositoryObject::Backup(id, BackupObject::Record)).await?;
        let Some(record) = record else { return Ok(None) };
        if record.format > BACKUP_FORMAT {
            return Err(Failure::new(
                Code::Damaged,
                format!("backup {id} has format {}, and this pgsidecar knows {BACKUP_FORMAT}", record.format),
            )
            .hint("It was made by a newer pgsidecar: use that one."));
        }
        if record.system_identifier != self.layout.system() || record.id != id {
            return Err(damaged(&format!("the record of backup {id}"), "it is another backup's"));
        }
        Ok(Some(record))
    }

    /// The timelines that have WAL or a history.
    ///
    /// # Errors
    /// The store's.
    pub async fn timelines(&self) -> Result<Vec<TimelineId>, Failure> {
        let mut timelines = Vec::new();
        let mut pages = Pages::new(&*self.store, ListRequest::shallow(self.layout.wal_prefix()));
        while let Some(page) = pages.next().await? {
            timelines.extend(page.prefixes.iter().filter_map(|prefix| self.layout.timeline_of_prefix(prefix)));
        }
        Ok(timelines)
    }

    /// A timeline's history file, as PostgreSQL wrote it.
    ///
    /// # Errors
    /// The store's; [`Code::Damaged`].
    pub async fn history_file(&self, timeline: TimelineId) -> Result<Option<Vec<u8>>, Failure> {
        let key = self.layout.wal(&ArchiveFileName::History(timeline));
        Ok(self.read_plain(&key, Vec::new()).await?.map(|(bytes, _)| bytes))
    }

    /// A timeline's history, if the repository has its file.
    ///
    /// # Errors
    /// The store's; [`Code::Damaged`].
    pub async fn history(&self, timeline: TimelineId) -> Result<Option<TimelineHistory>, Failure> {
        let Some(bytes) = self.history_file(timeline).await? else { return Ok(None) };
        let parsed = TimelineHistory::parse(timeline, &bytes);
        let name = ArchiveFileName::History(timeline);
        parsed.map(Some).map_err(|error| damaged(&name.to_string(), &error.to_string()))
    }

    /// Backups, timeline histories and restore points: what a restore is planned from.
    ///
    /// # Errors
    /// The store's; [`Code::Damaged`].
    pub async fn catalog(&self) -> Result<Catalog, Failure> {
        let histories = self.histories().await?;
        let restore_points = self.restore_points().await?;
        let backups = self.backups().await?;
        let begun_only = self.begun_only(&histories, backups.iter().map(|backup| backup.timeline).collect()).await?;
        Ok(Catalog { backups, histories, begun_only, restore_points })
    }
}

/// Something in the repository isn't what was stored.
pub fn damaged(name: &str, how: &str) -> Failure {
    Failure::new(Code::Damaged, format!("{name} in the repository is damaged: {how}"))
        .hint("Nothing was changed. Restore another backup, or get this object back from a replica or an older version of the bucket.")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{MemoryStore, fault::Operation};

    fn repository(store: &MemoryStore) -> Repository {
        let cluster: ClusterName = "test/pg".parse().unwrap();
        let layout = Layout::new(cluster, "7710543486334591142".parse().unwrap());
        Repository::new(Arc::new(store.clone()), layout, 1)
    }

    async fn store(repository: &Repository, level: i32, plain: &[u8]) -> Result<Stored, Failure> {
        let key = repository.layout().wal(&"00000002.history".parse().unwrap());
        let produce = |out: &mut dyn Write| out.write_all(plain).map_err(|error| Failure::io("writing", &error));
        let (bytes, stored) = codec::compress_whole(level, plain.len(), produce)?;
        repository.store_compressed(&key, "the file", bytes, stored.sha256).await
    }

    #[tokio::test]
    async fn what_is_there_already_is_told_by_its_bytes_and_where_they_differ_by_its_content() {
        let memory = MemoryStore::new();
        let repository = repository(&memory);
        let plain: Vec<u8> = (0..200_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        assert_eq!(store(&repository, 1, &plain).await.unwrap(), Stored::New);
        assert_eq!(store(&repository, 1, &plain).await.unwrap(), Stored::Already);
        assert_eq!(memory.requests(Operation::Get), 0);
        // As another version of zstd would have made it.
        assert_eq!(store(&repository, 19, &plain).await.unwrap(), Stored::Already);
        assert_eq!(memory.requests(Operation::Get), 1);
        let other = [&plain[..], b"."].concat();
        let failure = store(&repository, 1, &other).await.unwrap_err();
        assert_eq!(failure.code, Code::Conflict);
        for content in [&plain, &other] {
            assert!(failure.message.contains(&Sha256Digest::of(content).short()), "{failure}");
        }
    }
}
