//! Where the repository's objects are kept: one small trait over S3 and a local directory.
//!
//! What every store guarantees, and the conformance suite (`tests/store`) checks on each:
//!
//! - **Whole or not at all.** An object is visible under its key with all its bytes, or not visible. An upload that
//!   fails, is aborted or is dropped leaves nothing that a listing shows.
//! - **Durable.** `Creation::Created` means that the store has acknowledged the bytes (a local directory: that they and
//!   the directories above them were fsynced).
//! - **Nothing is replaced.** Creating a key that exists answers [`Creation::Exists`] and leaves the object as it was.
//!   On S3 servers that ignore `If-None-Match` this is a look before the write ([`ConditionalCreation::LookFirst`]),
//!   and two writers at the same instant can still pass each other.
//! - **'Not there' is an answer, 'can't tell' an error.** `get` gives `None` only where the store itself said that there
//!   is no such key.
//! - **Nothing hangs and nothing grows.** Every wait ends, bodies are streamed, a listing comes in pages.
//!
//! A failed creation is *ambiguous*: the store may have taken the object although its answer was lost. Trying again is
//! always right; it then meets its own first try as `Exists`, and the caller tells a retry from a conflict by comparing
//! their bytes. Cancelling a call (dropping its future) is as ambiguous as its failure.
//!
//! Not here: what the objects mean, their names (the core's layout builds and parses them), and retries beyond a few
//! seconds, which belong to whoever knows the deadline.

mod error;
pub mod fault;
mod local;
mod local_io;
mod local_walk;
mod memory;
mod read_only;
mod s3;
mod s3_config;
mod s3_delete;
mod s3_error;
mod s3_get;
mod s3_upload;

use std::fmt;

use bytes::Bytes;
use pgsidecar_core::{ObjectKey, Sha256Digest};

pub use error::{StoreError, StoreErrorKind};
pub use local::LocalStore;
pub use memory::MemoryStore;
pub use read_only::ReadOnlyStore;
pub use s3::S3Store;
pub use s3_config::{S3Config, StaticCredentials};
pub use s3_upload::part_size;

/// The most entries that a page of a listing has, as on S3.
pub const MAX_PAGE: usize = 1000;

/// A place for objects. All keys and prefixes are relative to the root of the repository.
#[async_trait::async_trait]
pub trait Store: fmt::Debug + Send + Sync {
    /// Where it is, for people: `s3://bucket/prefix at https://endpoint`, `file:///path`. Without secrets.
    fn description(&self) -> String;

    /// Creates an object whole or not at all; never replaces one. `sha256`, that of these bytes, is kept beside it as
    /// metadata.
    ///
    /// `Exists` means that something is there under this key, perhaps this call's own first try.
    async fn create(&self, key: &ObjectKey, bytes: Bytes, sha256: Option<Sha256Digest>)
    -> Result<Creation, StoreError>;

    /// Begins an object whose size isn't known yet. Nothing is visible before [`Upload::finish`].
    async fn begin(&self, key: &ObjectKey) -> Result<Box<dyn Upload>, StoreError>;

    /// An object's size and metadata, without its bytes.
    ///
    /// On S3, `None` is weaker here than in [`Store::get`]: the answer to a HEAD has no body, so 404 can also mean a
    /// missing bucket or a proxy's page. Don't take it for the end of an archive.
    async fn head(&self, key: &ObjectKey) -> Result<Option<ObjectInfo>, StoreError>;

    /// Reads an object. `None` only if the store says definitely that there is no such key.
    async fn get(&self, key: &ObjectKey, range: ByteRange) -> Result<Option<Download>, StoreError>;

    /// One page of a listing, in byte order of the keys. Objects whose keys aren't [`ObjectKey`]s aren't ours and are
    /// left out, so a page can be short, or empty, and still have a `next`.
    async fn list(&self, request: &ListRequest) -> Result<ListPage, StoreError>;

    /// Deletes objects; answers with those that could not be deleted. A key that isn't there is no failure.
    async fn delete(&self, keys: &[ObjectKey]) -> Result<Vec<(ObjectKey, StoreError)>, StoreError>;

    /// Unfinished uploads of keys that begin with `prefix`: of this process, of others, and what crashed ones left.
    /// Empty on S3 servers that can't list them.
    async fn pending_uploads(&self, prefix: &str) -> Result<Vec<PendingUpload>, StoreError>;

    /// Removes an unfinished upload. One that is gone already is no failure.
    async fn abort_pending(&self, upload: &PendingUpload) -> Result<(), StoreError>;

    /// Whether this store refuses to replace an object by itself. Tried out at the first call and remembered; the
    /// first creation asks as well. May leave a small object [`PROBE_KEY`] at the root.
    async fn conditional_creation(&self) -> Result<ConditionalCreation, StoreError>;
}

/// The object with which a store's conditional creation is tried out.
pub const PROBE_KEY: &str = "conditional-creation.probe";

/// An object that is being written. Dropped without `finish`, it leaves nothing visible.
#[async_trait::async_trait]
pub trait Upload: Send {
    /// Adds bytes. After an error, or when its future was dropped, the upload can only be aborted.
    async fn write(&mut self, chunk: Bytes) -> Result<(), StoreError>;

    /// Makes the object visible, as [`Store::create`] does.
    async fn finish(self: Box<Self>) -> Result<Creation, StoreError>;

    /// Gives the upload up and removes what it left, as far as the store can be reached.
    async fn abort(self: Box<Self>);
}

/// What came of creating an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Creation {
    /// It's there, with these bytes, durably.
    Created,
    /// There already is something under this key: another's, or this call's own first try. It was left as it is.
    Exists,
}

/// An object without its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Size in bytes, as stored.
    pub size: u64,
    /// SHA-256 of its bytes, if it was created with that. `None` for objects whose size wasn't known when they were begun
    /// or that came there another way, and for local directories on file systems without extended attributes.
    pub sha256: Option<Sha256Digest>,
    /// When the store took it, by the store's clock.
    pub modified: jiff::Timestamp,
}

/// Which bytes are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ByteRange {
    /// All of them.
    All,
    /// From this offset to the end; none if the object ends before.
    From(u64),
    /// `len` bytes from this offset, or what there is of them.
    Bounded {
        /// Offset of the first byte.
        from: u64,
        /// How many.
        len: u64,
    },
}

impl ByteRange {
    /// Offset and number of the bytes that an object of this size has in this range.
    pub fn within(self, size: u64) -> (u64, u64) {
        match self {
            ByteRange::All => (0, size),
            ByteRange::From(from) => (from.min(size), size.saturating_sub(from)),
            ByteRange::Bounded { from, len } => (from.min(size), size.saturating_sub(from).min(len)),
        }
    }
}

/// The bytes of an object as they come from the store.
#[async_trait::async_trait]
pub(crate) trait Body: Send {
    /// The next bytes; `None` at the end, wherever that is.
    async fn next(&mut self) -> Result<Option<Bytes>, StoreError>;
}

/// An object that is being read.
pub struct Download {
    /// The object's size (not the range's) and metadata.
    pub info: ObjectInfo,
    key: ObjectKey,
    expected: u64,
    received: u64,
    body: Box<dyn Body>,
}

impl Download {
    /// `expected`: how many bytes the range has.
    pub(crate) fn new(key: &ObjectKey, info: ObjectInfo, expected: u64, body: Box<dyn Body>) -> Download {
        Download { info, key: key.clone(), expected, received: 0, body }
    }

    /// How many bytes all the calls of `next` give together.
    pub fn len(&self) -> u64 {
        self.expected
    }

    /// Whether the range is empty.
    pub fn is_empty(&self) -> bool {
        self.expected == 0
    }

    /// The next bytes; `None` once all of them have come. A body that ends early or is too long is an error.
    pub async fn next(&mut self) -> Result<Option<Bytes>, StoreError> {
        loop {
            let chunk = self.body.next().await?;
            let got = chunk.as_ref().map_or(0, |chunk| chunk.len() as u64);
            self.received += got;
            let wrong_length = match chunk {
                Some(_) => self.received > self.expected,
                None => self.received != self.expected,
            };
            if wrong_length {
                let detail = format!("{} bytes came where {} were announced", self.received, self.expected);
                return Err(StoreError::new(StoreErrorKind::Unavailable, "read", self.key.as_str(), detail));
            }
            if chunk.is_none() || got > 0 {
                return Ok(chunk);
            }
        }
    }

    /// All the bytes, if they are no more than `limit`. For the small objects that describe others.
    pub async fn bytes(mut self, limit: u64) -> Result<Bytes, StoreError> {
        if self.expected > limit {
            let detail = format!("it has {} bytes; at most {limit} were expected", self.expected);
            return Err(StoreError::new(StoreErrorKind::Unexpected, "read", self.key.as_str(), detail));
        }
        let mut whole = bytes::BytesMut::with_capacity(usize::try_from(self.expected).unwrap_or(0));
        while let Some(chunk) = self.next().await? {
            whole.extend_from_slice(&chunk);
        }
        Ok(whole.freeze())
    }
}

impl fmt::Debug for Download {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Download of {} ({} of {} bytes)", self.key, self.received, self.expected)
    }
}

/// What to list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ListRequest {
    /// Only what begins with this. Empty for everything; need not end at a `/`.
    pub prefix: String,
    /// Only keys, and prefixes, that are greater than this.
    pub after: Option<String>,
    /// Don't descend: keys with a further `/` after `prefix` appear as one of [`ListPage::prefixes`].
    pub shallow: bool,
    /// The most entries of one page; 0 or more than [`MAX_PAGE`] means [`MAX_PAGE`].
    pub limit: usize,
    /// Where the last page ended. Everything else must be as it was then.
    pub cursor: Option<ListCursor>,
}

impl ListRequest {
    /// Everything that begins with `prefix`, in pages of the usual size.
    pub fn under(prefix: impl Into<String>) -> ListRequest {
        ListRequest { prefix: prefix.into(), ..ListRequest::default() }
    }

    /// The same, without descending.
    pub fn shallow(prefix: impl Into<String>) -> ListRequest {
        ListRequest { shallow: true, ..ListRequest::under(prefix) }
    }

    /// The same, only what is greater than `key`.
    pub fn after(mut self, key: impl Into<String>) -> ListRequest {
        self.after = Some(key.into());
        self
    }

    fn page_size(&self) -> usize {
        if self.limit == 0 { MAX_PAGE } else { self.limit.min(MAX_PAGE) }
    }

    fn wants(&self, name: &str) -> bool {
        name.starts_with(&self.prefix) && self.after.as_deref().is_none_or(|after| name > after)
    }
}

/// Where a page of a listing ended. Means something only to the store that gave it, and not for long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListCursor(String);

/// One page of a listing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ListPage {
    /// Objects in byte order of their keys.
    pub objects: Vec<ListedObject>,
    /// When shallow: what there is to descend into, relative to the root, each with its trailing `/`. In byte order.
    pub prefixes: Vec<String>,
    /// Give this back for the next page; `None` when this was the last one.
    pub next: Option<ListCursor>,
}

/// An object in a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedObject {
    /// Its key.
    pub key: ObjectKey,
    /// Size in bytes, as stored.
    pub size: u64,
    /// When the store took it.
    pub modified: jiff::Timestamp,
}

/// The pages of a listing, one after the other.
#[derive(Debug)]
pub struct Pages<'a> {
    store: &'a dyn Store,
    request: Option<ListRequest>,
}

impl<'a> Pages<'a> {
    /// All the pages of this request.
    pub fn new(store: &'a dyn Store, request: ListRequest) -> Pages<'a> {
        Pages { store, request: Some(request) }
    }

    /// The next page; `None` after the last one. After an error the same page can be asked for again.
    pub async fn next(&mut self) -> Result<Option<ListPage>, StoreError> {
        let Some(request) = &mut self.request else { return Ok(None) };
        let page = self.store.list(request).await?;
        match &page.next {
            Some(cursor) => request.cursor = Some(cursor.clone()),
            None => self.request = None,
        }
        Ok(Some(page))
    }
}

/// An upload that was begun and neither finished nor aborted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PendingUpload {
    /// The key it is for (S3), or the temporary file (local directory), relative to the root. For people.
    pub key: String,
    /// When it was begun (S3), or last written to (local directory).
    pub started: jiff::Timestamp,
    id: String,
}

/// How a store treats the creation of a key that exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConditionalCreation {
    /// It refuses: two writers can't replace each other's object.
    Honoured,
    /// It would replace the object. Creations look first, which leaves a gap between look and write.
    LookFirst {
        /// What it answered, as a sentence.
        reason: String,
    },
}
