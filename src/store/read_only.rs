//! A store that is only read: nothing that was opened as one can be changed through it, not even by mistake.

use std::sync::Arc;

use bytes::Bytes;
use pgsidecar_core::{ObjectKey, Sha256Digest};

use super::{
    ByteRange, ConditionalCreation, Creation, Download, ListPage, ListRequest, ObjectInfo, PendingUpload, Store,
    StoreError, StoreErrorKind, Upload,
};

/// Another store, whose calls that change something are refused before they reach it.
#[derive(Debug)]
pub struct ReadOnlyStore {
    beneath: Arc<dyn Store>,
}

impl ReadOnlyStore {
    /// This store, read-only.
    pub fn new(beneath: Arc<dyn Store>) -> ReadOnlyStore {
        ReadOnlyStore { beneath }
    }
}

fn refused(operation: &'static str, object: &str) -> StoreError {
    StoreError::new(StoreErrorKind::Denied, operation, object, "this repository is another cluster's: it's only read")
}

#[async_trait::async_trait]
impl Store for ReadOnlyStore {
    fn description(&self) -> String {
        self.beneath.description()
    }

    async fn create(&self, key: &ObjectKey, _: Bytes, _: Option<Sha256Digest>) -> Result<Creation, StoreError> {
        Err(refused("create", key.as_str()))
    }

    async fn begin(&self, key: &ObjectKey) -> Result<Box<dyn Upload>, StoreError> {
        Err(refused("create", key.as_str()))
    }

    async fn head(&self, key: &ObjectKey) -> Result<Option<ObjectInfo>, StoreError> {
        self.beneath.head(key).await
    }

    async fn get(&self, key: &ObjectKey, range: ByteRange) -> Result<Option<Download>, StoreError> {
        self.beneath.get(key, range).await
    }

    async fn list(&self, request: &ListRequest) -> Result<ListPage, StoreError> {
        self.beneath.list(request).await
    }

    async fn delete(&self, keys: &[ObjectKey]) -> Result<Vec<(ObjectKey, StoreError)>, StoreError> {
        match keys.first() {
            None => Ok(Vec::new()),
            Some(key) => Err(refused("delete", key.as_str())),
        }
    }

    async fn pending_uploads(&self, prefix: &str) -> Result<Vec<PendingUpload>, StoreError> {
        self.beneath.pending_uploads(prefix).await
    }

    async fn abort_pending(&self, upload: &PendingUpload) -> Result<(), StoreError> {
        Err(refused("abort an upload of", &upload.key))
    }

    /// Nothing is ever replaced through this one. The store beneath isn't asked: to find out, it would write.
    async fn conditional_creation(&self) -> Result<ConditionalCreation, StoreError> {
        Ok(ConditionalCreation::Honoured)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{MemoryStore, fault::Operation};

    const OPERATIONS: [Operation; 10] = {
        use Operation::*;
        [Create, Begin, Write, Finish, Head, Get, List, Delete, Pending, Probe]
    };

    #[tokio::test]
    async fn what_would_change_something_never_reaches_the_store() {
        let memory = MemoryStore::new();
        let key: ObjectKey = "shop/orders/object".parse().unwrap();
        memory.create(&key, Bytes::from_static(b"there"), None).await.unwrap();
        let before = OPERATIONS.map(|operation| memory.requests(operation));

        let store = ReadOnlyStore::new(Arc::new(memory.clone()));
        let other: ObjectKey = "shop/orders/other".parse().unwrap();
        let denied = |error: StoreError| assert_eq!(error.kind(), StoreErrorKind::Denied, "{error}");
        denied(store.create(&other, Bytes::new(), None).await.unwrap_err());
        denied(store.begin(&other).await.map(|_| ()).unwrap_err());
        denied(store.delete(std::slice::from_ref(&key)).await.unwrap_err());
        let upload = PendingUpload { key: key.to_string(), started: jiff::Timestamp::UNIX_EPOCH, id: String::new() };
        denied(store.abort_pending(&upload).await.unwrap_err());
        assert_eq!(store.conditional_creation().await.unwrap(), ConditionalCreation::Honoured);
        assert_eq!(OPERATIONS.map(|operation| memory.requests(operation)), before);

        let read = store.get(&key, ByteRange::All).await.unwrap().unwrap();
        assert_eq!(read.bytes(100).await.unwrap(), "there");
        assert_eq!(store.list(&ListRequest::under("")).await.unwrap().objects.len(), 1);
        assert_eq!(store.head(&key).await.unwrap().unwrap().size, 5);
    }
}
