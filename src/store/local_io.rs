//! Writing and reading one object of a local directory, a chunk at a time.

use std::{
    fs::File,
    io::{Read, Write},
};

use bytes::{Bytes, BytesMut};
use pgsidecar_core::ObjectKey;
use tempfile::NamedTempFile;

use super::{Body, Creation, LocalStore, StoreError, StoreErrorKind, Upload};

const READ_CHUNK: usize = 256 * 1024;

pub(super) struct LocalUpload {
    store: LocalStore,
    key: ObjectKey,
    /// Absent while a write is under way, and after one that failed or was cancelled: then it's gone with it.
    file: Option<NamedTempFile>,
}

impl LocalUpload {
    pub(super) fn new(store: LocalStore, key: ObjectKey, file: NamedTempFile) -> LocalUpload {
        LocalUpload { store, key, file: Some(file) }
    }

    fn take(&mut self) -> Result<NamedTempFile, StoreError> {
        self.file.take().ok_or_else(|| {
            let detail = "an earlier write of this upload failed";
            StoreError::new(StoreErrorKind::Unexpected, "create", self.key.as_str(), detail)
        })
    }
}

#[async_trait::async_trait]
impl Upload for LocalUpload {
    async fn write(&mut self, chunk: Bytes) -> Result<(), StoreError> {
        let mut file = self.take()?;
        let written = self.store.blocking("create", self.key.as_str(), move |_| {
            file.write_all(&chunk)?;
            Ok(file)
        });
        self.file = Some(written.await?);
        Ok(())
    }

    async fn finish(mut self: Box<Self>) -> Result<Creation, StoreError> {
        let (file, key) = (self.take()?, self.key.clone());
        self.store.blocking("create", self.key.as_str(), move |root| root.publish(file, &key)).await
    }

    async fn abort(self: Box<Self>) {}
}

pub(super) struct LocalBody {
    store: LocalStore,
    key: ObjectKey,
    file: Option<File>,
    left: u64,
}

impl LocalBody {
    /// `left`: how many bytes are wanted from where the file stands.
    pub(super) fn new(store: LocalStore, key: ObjectKey, file: File, left: u64) -> LocalBody {
        LocalBody { store, key, file: Some(file), left }
    }
}

#[async_trait::async_trait]
impl Body for LocalBody {
    async fn next(&mut self) -> Result<Option<Bytes>, StoreError> {
        let Some(mut file) = self.file.take().filter(|_| self.left > 0) else { return Ok(None) };
        let wanted = usize::try_from(self.left).unwrap_or(READ_CHUNK).min(READ_CHUNK);
        let read = self.store.blocking("read", self.key.as_str(), move |_| {
            let mut chunk = BytesMut::zeroed(wanted);
            let length = file.read(&mut chunk)?;
            chunk.truncate(length);
            Ok((file, chunk.freeze()))
        });
        let (file, chunk) = read.await?;
        self.file = Some(file);
        self.left -= chunk.len() as u64;
        Ok(Some(chunk).filter(|chunk| !chunk.is_empty()))
    }
}
