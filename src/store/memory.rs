//! A store in memory, for tests alone: nothing in it outlives the process, so nothing may be backed up to it.
//!
//! It keeps the guarantees of every store (the conformance suite runs over it too), counts the requests that it gets,
//! and can be given objects that have a size and no bytes: a repository with a million segments fits into a test.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Bound,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::{Bytes, BytesMut};
use pgsidecar_core::{ObjectKey, Sha256Digest};

use super::{
    Body, ByteRange, ConditionalCreation, Creation, Download, ListCursor, ListPage, ListRequest, ListedObject,
    ObjectInfo, PendingUpload, Store, StoreError, StoreErrorKind, Upload, fault::Operation,
};

/// How many bytes a body gives at a time.
const READ_CHUNK: usize = 256 * 1024;

/// A store in memory. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct MemoryStore {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    /// Shared by the objects that [`MemoryStore::fill`] makes.
    objects: BTreeMap<String, Arc<Object>>,
    pending: BTreeMap<u64, PendingUpload>,
    uploads_begun: u64,
    requests: HashMap<Operation, u64>,
}

#[derive(Debug)]
struct Object {
    info: ObjectInfo,
    /// `None` for one that has a size alone.
    bytes: Option<Bytes>,
}

impl MemoryStore {
    /// An empty one.
    pub fn new() -> MemoryStore {
        MemoryStore::default()
    }

    /// Puts objects there that have this size and no bytes, all taken at this time. They can be listed and looked at; to
    /// read one is an error. Not counted as requests.
    pub fn fill(&self, keys: impl IntoIterator<Item = ObjectKey>, size: u64, modified: jiff::Timestamp) {
        let info = ObjectInfo { size, sha256: None, modified };
        let object = Arc::new(Object { info, bytes: None });
        let mut state = self.lock();
        state.objects.extend(keys.into_iter().map(|key| (key.to_string(), object.clone())));
    }

    /// How many requests of this kind there have been. Each page of a listing is one.
    pub fn requests(&self, operation: Operation) -> u64 {
        self.lock().requests.get(&operation).copied().unwrap_or(0)
    }

    /// How many requests there have been since the last call of this, of any kind.
    pub fn take_requests(&self) -> u64 {
        self.lock().requests.drain().map(|(_, count)| count).sum()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn request(&self, operation: Operation) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        *state.requests.entry(operation).or_default() += 1;
        state
    }
}

impl State {
    fn publish(&mut self, key: &ObjectKey, bytes: Bytes, sha256: Option<Sha256Digest>) -> Creation {
        if self.objects.contains_key(key.as_str()) {
            return Creation::Exists;
        }
        let info = ObjectInfo { size: bytes.len() as u64, sha256, modified: jiff::Timestamp::now() };
        self.objects.insert(key.to_string(), Arc::new(Object { info, bytes: Some(bytes) }));
        Creation::Created
    }

    fn page(&self, request: &ListRequest) -> ListPage {
        let mut page = ListPage::default();
        let mut last: Option<&str> = None;
        let passed = request.cursor.as_ref().map(|cursor| cursor.0.as_str()).max(request.after.as_deref());
        let from = match passed {
            Some(passed) if passed >= request.prefix.as_str() => Bound::Excluded(passed.to_owned()),
            _ => Bound::Included(request.prefix.clone()),
        };
        let mut rest = self.objects.range((from, Bound::Unbounded));
        while let Some((name, object)) = rest.next().filter(|(name, _)| name.starts_with(&request.prefix)) {
            let below = &name[request.prefix.len()..];
            let group = below.find('/').filter(|_| request.shallow).map(|at| &name[..request.prefix.len() + at + 1]);
            let entry = group.unwrap_or(name);
            // A group that begins before what was asked for is passed over like one that has been listed.
            if passed.is_none_or(|passed| entry > passed) {
                if page.objects.len() + page.prefixes.len() == request.page_size() {
                    page.next = last.map(|last| ListCursor(last.to_owned()));
                    break;
                }
                last = Some(entry);
                match group {
                    Some(group) => page.prefixes.push(group.to_owned()),
                    None => page.objects.extend(name.parse().ok().map(|key| ListedObject {
                        key,
                        size: object.info.size,
                        modified: object.info.modified,
                    })),
                }
            }
            if let Some(group) = group {
                // '0' follows '/': the first name that isn't in the group any more.
                let after = format!("{}0", group.trim_end_matches('/'));
                rest = self.objects.range((Bound::Included(after), Bound::Unbounded));
            }
        }
        page
    }
}

#[async_trait::async_trait]
impl Store for MemoryStore {
    fn description(&self) -> String {
        "memory".to_owned()
    }

    async fn create(
        &self,
        key: &ObjectKey,
        bytes: Bytes,
        sha256: Option<Sha256Digest>,
    ) -> Result<Creation, StoreError> {
        Ok(self.request(Operation::Create).publish(key, bytes, sha256))
    }

    async fn begin(&self, key: &ObjectKey) -> Result<Box<dyn Upload>, StoreError> {
        let mut state = self.request(Operation::Begin);
        state.uploads_begun += 1;
        let id = state.uploads_begun;
        let pending = PendingUpload { key: key.to_string(), started: jiff::Timestamp::now(), id: id.to_string() };
        state.pending.insert(id, pending);
        let (store, key) = (self.clone(), key.clone());
        Ok(Box::new(MemoryUpload { store, id, key, bytes: BytesMut::new() }))
    }

    async fn head(&self, key: &ObjectKey) -> Result<Option<ObjectInfo>, StoreError> {
        let state = self.request(Operation::Head);
        Ok(state.objects.get(key.as_str()).map(|object| object.info.clone()))
    }

    async fn get(&self, key: &ObjectKey, range: ByteRange) -> Result<Option<Download>, StoreError> {
        let object = self.request(Operation::Get).objects.get(key.as_str()).cloned();
        let Some(object) = object else { return Ok(None) };
        let Some(bytes) = &object.bytes else {
            let detail = "it was put there without bytes";
            return Err(StoreError::new(StoreErrorKind::Unexpected, "read", key.as_str(), detail));
        };
        let (from, length) = range.within(object.info.size);
        let at = |position: u64| usize::try_from(position).unwrap_or(bytes.len()).min(bytes.len());
        let body = MemoryBody { left: bytes.slice(at(from)..at(from.saturating_add(length))) };
        Ok(Some(Download::new(key, object.info.clone(), length, Box::new(body))))
    }

    async fn list(&self, request: &ListRequest) -> Result<ListPage, StoreError> {
        Ok(self.request(Operation::List).page(request))
    }

    async fn delete(&self, keys: &[ObjectKey]) -> Result<Vec<(ObjectKey, StoreError)>, StoreError> {
        let mut state = self.request(Operation::Delete);
        for key in keys {
            state.objects.remove(key.as_str());
        }
        Ok(Vec::new())
    }

    async fn pending_uploads(&self, prefix: &str) -> Result<Vec<PendingUpload>, StoreError> {
        let state = self.request(Operation::Pending);
        Ok(state.pending.values().filter(|upload| upload.key.starts_with(prefix)).cloned().collect())
    }

    async fn abort_pending(&self, upload: &PendingUpload) -> Result<(), StoreError> {
        let mut state = self.request(Operation::Pending);
        state.pending.retain(|_, pending| pending.id != upload.id);
        Ok(())
    }

    async fn conditional_creation(&self) -> Result<ConditionalCreation, StoreError> {
        Ok(ConditionalCreation::Honoured)
    }
}

struct MemoryUpload {
    store: MemoryStore,
    id: u64,
    key: ObjectKey,
    bytes: BytesMut,
}

#[async_trait::async_trait]
impl Upload for MemoryUpload {
    async fn write(&mut self, chunk: Bytes) -> Result<(), StoreError> {
        let _state = self.store.request(Operation::Write);
        self.bytes.extend_from_slice(&chunk);
        Ok(())
    }

    async fn finish(mut self: Box<Self>) -> Result<Creation, StoreError> {
        let bytes = std::mem::take(&mut self.bytes).freeze();
        let mut state = self.store.request(Operation::Finish);
        if state.pending.remove(&self.id).is_none() {
            let detail = "the upload has been removed meanwhile";
            return Err(StoreError::new(StoreErrorKind::Unexpected, "create", self.key.as_str(), detail));
        }
        Ok(state.publish(&self.key, bytes, None))
    }

    async fn abort(self: Box<Self>) {}
}

impl Drop for MemoryUpload {
    fn drop(&mut self) {
        self.store.lock().pending.remove(&self.id);
    }
}

struct MemoryBody {
    left: Bytes,
}

#[async_trait::async_trait]
impl Body for MemoryBody {
    async fn next(&mut self) -> Result<Option<Bytes>, StoreError> {
        let chunk = self.left.split_to(self.left.len().min(READ_CHUNK));
        Ok(Some(chunk).filter(|chunk| !chunk.is_empty()))
    }
}
