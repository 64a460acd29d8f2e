//! The two lists of a backup's files, written while the files are: PostgreSQL's `backup_manifest` and our index.
//!
//! Neither list is ever in memory: both are compressed and uploaded as they grow.

use std::io::{self, Write};

use bytes::Bytes;
use pgsidecar_core::{
    BackupId, ObjectKey,
    backup::StoredObject,
    backup_manifest::{ManifestWriter, WalRange},
    layout::BackupObject,
};
use tokio::{runtime::Handle, sync::mpsc, sync::oneshot, task::JoinHandle};

use super::part::FileEntry;
use crate::{
    codec::{ChannelWriter, HashingWriter, encoder},
    failure::{Code, Failure},
    repository::Repository,
    store::Creation,
};

/// An object of a backup that is being uploaded by a task, for a thread that writes it.
pub struct Uploading {
    complete: oneshot::Sender<()>,
    task: JoinHandle<Result<Creation, Failure>>,
    runtime: Handle,
    repository: Repository,
    key: ObjectKey,
}

impl Uploading {
    /// Starts the upload; its bytes are what is written to the writer.
    pub fn start(
        runtime: &Handle,
        repository: &Repository,
        id: BackupId,
        object: BackupObject,
    ) -> (ChannelWriter, Uploading) {
        let (writer, chunks): (ChannelWriter, mpsc::Receiver<Bytes>) = ChannelWriter::new();
        let (complete, completed) = oneshot::channel();
        let key = repository.layout().backup(id, object);
        let uploading = (repository.clone(), key.clone());
        let task = runtime.spawn(async move {
            let (repository, key) = uploading;
            let complete = async {
                let given_up = |_| Failure::new(Code::Internal, format!("{key} was given up"));
                completed.await.map_err(given_up)
            };
            repository.upload(&key, chunks, 0, complete).await
        });
        (writer, Uploading { complete, task, runtime: runtime.clone(), repository: repository.clone(), key })
    }

    /// Waits until the object is durable, with these bytes. Blocks: not for async tasks.
    ///
    /// # Errors
    /// Why it isn't.
    pub fn finish(self, stored: StoredObject) -> Result<(), Failure> {
        let _ = self.complete.send(());
        match self.runtime.block_on(self.task)?? {
            Creation::Created => Ok(()),
            // Perhaps our own first try, whose answer was lost.
            Creation::Exists => self.runtime.block_on(self.repository.check_stored(&self.key, stored)),
        }
    }

    /// Why writing failed: the upload's own reason where it was the upload that closed the channel. Blocks.
    pub fn explain(self, error: &io::Error) -> Failure {
        drop(self.complete);
        if error.kind() != io::ErrorKind::BrokenPipe {
            self.task.abort();
            return Failure::io("reading or compressing", error);
        }
        match self.runtime.block_on(self.task) {
            Ok(Err(failure)) => failure,
            Ok(Ok(_)) => Failure::io("uploading", error),
            Err(panic) => panic.into(),
        }
    }
}

/// A compressed text object that grows.
struct Growing {
    encoder: zstd::stream::write::Encoder<'static, HashingWriter<ChannelWriter>>,
    uploading: Uploading,
}

impl Growing {
    fn start(
        runtime: &Handle,
        repository: &Repository,
        id: BackupId,
        object: BackupObject,
    ) -> Result<Growing, Failure> {
        let (writer, uploading) = Uploading::start(runtime, repository, id, object);
        let encoder = encoder(HashingWriter::new(writer), repository.level())
            .map_err(|error| Failure::io("compressing", &error))?;
        Ok(Growing { encoder, uploading })
    }

    fn finish(self) -> Result<StoredObject, Failure> {
        let ended = self.encoder.finish().and_then(|hashing| {
            let (mut writer, stored) = hashing.finish();
            writer.flush_rest().map(|()| stored)
        });
        match ended {
            Err(error) => Err(self.uploading.explain(&error)),
            Ok(stored) => {
                let stored = StoredObject { size: stored.size, sha256: stored.sha256 };
                self.uploading.finish(stored).map(|()| stored)
            }
        }
    }
}

/// Both lists.
pub struct Listing {
    manifest: ManifestWriter,
    manifest_object: Growing,
    index_object: Growing,
    buffer: Vec<u8>,
    files: u64,
    restored_bytes: u64,
}

/// What the lists became.
pub struct Listed {
    /// `backup_manifest.zst`
    pub manifest: StoredObject,
    /// `index.jsonl.zst`
    pub index: StoredObject,
    /// Number of files.
    pub files: u64,
    /// Bytes of the files when they are restored.
    pub restored_bytes: u64,
}

impl Listing {
    /// Begins both lists.
    ///
    /// # Errors
    /// If zstd can't be set up.
    pub fn start(
        runtime: &Handle,
        repository: &Repository,
        id: BackupId,
        manifest: ManifestWriter,
    ) -> Result<Listing, Failure> {
        Ok(Listing {
            manifest,
            manifest_object: Growing::start(runtime, repository, id, BackupObject::Manifest)?,
            index_object: Growing::start(runtime, repository, id, BackupObject::Index)?,
            buffer: Vec::new(),
            files: 0,
            restored_bytes: 0,
        })
    }

    /// Adds a file to both.
    ///
    /// # Errors
    /// If they can't be uploaded; [`Listing::finish`] tells why.
    pub fn add(&mut self, entry: &FileEntry) -> io::Result<()> {
        self.files += 1;
        self.restored_bytes += entry.restored.unwrap_or(entry.size);
        self.buffer.clear();
        self.manifest.add_file(&mut self.buffer, &entry.path, entry.size, entry.modified, entry.crc32c);
        self.manifest_object.encoder.write_all(&self.buffer)?;
        self.buffer.clear();
        serde_json::to_writer(&mut self.buffer, entry)?;
        self.buffer.push(b'\n');
        self.index_object.encoder.write_all(&self.buffer)
    }

    /// Ends both lists and waits until they are durable. Blocks.
    ///
    /// # Errors
    /// Why they aren't.
    pub fn finish(mut self, wal: &[WalRange]) -> Result<Listed, Failure> {
        self.buffer.clear();
        self.manifest.finish(&mut self.buffer, wal);
        if let Err(error) = self.manifest_object.encoder.write_all(&self.buffer) {
            return Err(self.manifest_object.uploading.explain(&error));
        }
        let index = self.index_object.finish()?;
        let (files, restored_bytes) = (self.files, self.restored_bytes);
        Ok(Listed { manifest: self.manifest_object.finish()?, index, files, restored_bytes })
    }
}
