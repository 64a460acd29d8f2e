//! Objects in and out: streams, small records, and what it means that a name is taken.

use std::{io::Write, time::Duration};

use bytes::Bytes;
use pgsidecar_core::{ContentId, ObjectKey, Sha256Digest, backup::StoredObject, layout::RepositoryObject};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{sync::mpsc, task::JoinHandle};

use super::{Repository, SINGLE_REQUEST_BYTES, Stored, damaged};
use crate::{
    codec::{self, ChannelReader, Compressed},
    failure::{Code, Failure},
    store::{ByteRange, Creation, StoreError, Upload},
};

/// What a buffer for one request has at first.
const SMALL_BUFFER_BYTES: usize = 512 << 10;
/// The largest small object (records, histories) that is read into memory.
const SMALL_OBJECT_BYTES: u64 = 64 << 20;
/// How often a broken download is taken up again before it fails, unless it gets on in between.
const DOWNLOAD_RETRIES: u32 = 4;
/// How many bytes more of it make up for all retries before.
const DOWNLOAD_PROGRESS: u64 = 1 << 20;

impl Repository {
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
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pgsidecar_core::{ClusterName, Layout};

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
