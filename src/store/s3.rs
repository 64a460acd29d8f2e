//! S3 and what speaks its protocol, as a store.
//!
//! Every request has an end: the connection and the answer are bounded in time, a body that stalls is given up, and a
//! request is tried at most [`S3Config::attempts`] times. Nothing is concluded from an answer that no S3 server would
//! give: a proxy's page with status 200 is no stored object and no empty listing, its 404 no missing key.

use std::{fmt, sync::Arc, time::Duration};

use aws_sdk_s3::{
    Client,
    config::{Builder, timeout::TimeoutConfig},
    operation::put_object::PutObjectError,
    primitives::{ByteStream, DateTime},
};
use bytes::Bytes;
use pgsidecar_core::{ObjectKey, Sha256Digest};
use tokio::sync::OnceCell;

use super::{
    ByteRange, ConditionalCreation, Creation, Download, ListCursor, ListPage, ListRequest, ListedObject, ObjectInfo,
    PROBE_KEY, PendingUpload, Store, StoreError, StoreErrorKind, Upload,
    s3_config::S3Config,
    s3_error::{answer, store_error},
    s3_upload::S3Upload,
};

const METADATA_SHA256: &str = "pgsidecar-sha256";
const PROBE_BYTES: &[u8] = b"pgsidecar tries here whether this store refuses to replace an object.\n";
/// How often a creation is repeated that met another one (409). The pauses double: 1.5 s in all.
const CONFLICT_ATTEMPTS: u32 = 5;
const CONFLICT_PAUSE: Duration = Duration::from_millis(50);

/// A store in an S3 bucket. Clones share the client and its connections.
#[derive(Clone)]
pub struct S3Store {
    inner: Arc<Inner>,
}

struct Inner {
    client: Client,
    config: S3Config,
    endpoint: Option<String>,
    /// Empty, or with its trailing slash.
    prefix: String,
    conditional: OnceCell<ConditionalCreation>,
}

impl fmt::Debug for S3Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "S3Store({})", self.description())
    }
}

/// What a failed PUT comes to.
enum Put {
    Created,
    Exists,
}

impl S3Store {
    /// The repository that `config` names. Reads the environment and the profile files; no network access.
    pub async fn new(config: S3Config) -> S3Store {
        let (client, endpoint) = config.client().await;
        let prefix = match config.prefix.trim_matches('/') {
            "" => String::new(),
            prefix => format!("{prefix}/"),
        };
        S3Store { inner: Arc::new(Inner { client, config, endpoint, prefix, conditional: OnceCell::new() }) }
    }

    pub(super) fn client(&self) -> &Client {
        &self.inner.client
    }

    pub(super) fn bucket(&self) -> &str {
        &self.inner.config.bucket
    }

    /// How long an answer, or the next bytes of one, may take.
    pub(super) fn answer_timeout(&self) -> Duration {
        self.inner.config.answer_timeout
    }

    /// The key as the bucket has it.
    pub(super) fn full(&self, relative: &str) -> String {
        format!("{}{relative}", self.inner.prefix)
    }

    /// The inverse of `full`.
    pub(super) fn relative<'a>(&self, full: &'a str) -> Option<&'a str> {
        full.strip_prefix(&self.inner.prefix)
    }

    /// The settings of a request whose body has this size.
    pub(super) fn for_body(&self, size: usize) -> Builder {
        let timeouts = TimeoutConfig::builder().operation_attempt_timeout(self.inner.config.attempt_timeout(size));
        Builder::new().timeout_config(timeouts.build())
    }

    /// The settings of a completion, for which S3 may put thousands of parts together before it answers.
    pub(super) fn for_completion(&self) -> Builder {
        let timeouts = TimeoutConfig::builder().operation_attempt_timeout(self.answer_timeout() * 10);
        Builder::new().timeout_config(timeouts.build())
    }

    /// Creates an object by one PUT, by the means that this server has.
    pub(super) async fn put(
        &self,
        key: &ObjectKey,
        bytes: Bytes,
        sha256: Option<Sha256Digest>,
    ) -> Result<Creation, StoreError> {
        let conditional = match self.conditional_creation().await? {
            ConditionalCreation::Honoured => true,
            ConditionalCreation::LookFirst { .. } if self.exists(key).await? => return Ok(Creation::Exists),
            ConditionalCreation::LookFirst { .. } => false,
        };
        match self.put_once(key.as_str(), bytes, sha256, conditional).await {
            Ok(Put::Created) => Ok(Creation::Created),
            Ok(Put::Exists) => Ok(Creation::Exists),
            Err(PutFailure::NotImplemented(error) | PutFailure::Failed(error)) => Err(error),
        }
    }

    async fn put_once(
        &self,
        key: &str,
        bytes: Bytes,
        sha256: Option<Sha256Digest>,
        conditional: bool,
    ) -> Result<Put, PutFailure> {
        let mut pause = CONFLICT_PAUSE;
        for attempt in 1.. {
            let request = self
                .client()
                .put_object()
                .bucket(self.bucket())
                .key(self.full(key))
                .set_metadata(sha256.map(metadata))
                .set_if_none_match(conditional.then(|| "*".to_owned()))
                .body(ByteStream::from(bytes.clone()));
            let error = match request.customize().config_override(self.for_body(bytes.len())).send().await {
                Ok(stored) if stored.e_tag().is_some() => return Ok(Put::Created),
                // No S3 server leaves the ETag out: something in between said 200.
                Ok(_) => return Err(PutFailure::Failed(no_s3("create", key))),
                Err(error) => error,
            };
            let answered = answer(&error);
            if answered.is_precondition_failed() {
                return Ok(Put::Exists);
            }
            if answered.is_conflict() && attempt < CONFLICT_ATTEMPTS {
                tokio::time::sleep(pause).await;
                pause *= 2;
                continue;
            }
            let is_not_implemented = answered.is_not_implemented();
            let error = store_error::<PutObjectError>("create", key, error);
            return Err(if is_not_implemented { PutFailure::NotImplemented(error) } else { PutFailure::Failed(error) });
        }
        Ok(Put::Exists)
    }

    /// Whether there is an object: by a GET, whose 404 says which kind of 'not there' it is; a HEAD's doesn't.
    pub(super) async fn exists(&self, key: &ObjectKey) -> Result<bool, StoreError> {
        Ok(self.get(key, ByteRange::Bounded { from: 0, len: 1 }).await?.is_some())
    }

    async fn probe(&self) -> Result<ConditionalCreation, StoreError> {
        for _ in 0..2 {
            match self.put_once(PROBE_KEY, Bytes::from_static(PROBE_BYTES), None, true).await {
                Ok(Put::Created) => {}
                Ok(Put::Exists) => return Ok(ConditionalCreation::Honoured),
                Err(PutFailure::NotImplemented(error)) => {
                    return Ok(ConditionalCreation::LookFirst { reason: format!("It has no If-None-Match: {error}.") });
                }
                Err(PutFailure::Failed(error)) => return Err(error),
            }
        }
        let reason = "It replaced an object although If-None-Match forbade it.".to_owned();
        Ok(ConditionalCreation::LookFirst { reason })
    }
}

enum PutFailure {
    NotImplemented(StoreError),
    Failed(StoreError),
}

/// An answer with status 200 that lacks what every S3 server sends.
pub(super) fn no_s3(operation: &'static str, object: &str) -> StoreError {
    let detail = "it answered 200 without what an S3 server's answer has";
    StoreError::new(StoreErrorKind::Unexpected, operation, object, detail)
        .with_hint("Check that the endpoint is an S3 server's: this looks like the answer of a proxy or a web server.")
}

fn metadata(sha256: Sha256Digest) -> std::collections::HashMap<String, String> {
    [(METADATA_SHA256.to_owned(), sha256.to_string())].into()
}

pub(super) fn object_info(
    size: u64,
    modified: &DateTime,
    metadata: Option<&std::collections::HashMap<String, String>>,
) -> Option<ObjectInfo> {
    let sha256 = metadata.and_then(|metadata| Sha256Digest::parse(metadata.get(METADATA_SHA256)?));
    Some(ObjectInfo { size, sha256, modified: timestamp(modified)? })
}

pub(super) fn timestamp(time: &DateTime) -> Option<jiff::Timestamp> {
    jiff::Timestamp::new(time.secs(), i32::try_from(time.subsec_nanos()).ok()?).ok()
}

pub(super) fn unsigned(length: Option<i64>) -> Option<u64> {
    length.and_then(|length| u64::try_from(length).ok())
}

#[async_trait::async_trait]
impl Store for S3Store {
    fn description(&self) -> String {
        let repository = format!("s3://{}/{}", self.bucket(), self.inner.prefix);
        let repository = repository.trim_end_matches('/');
        match &self.inner.endpoint {
            // Whatever stands before an @ is a user and a password.
            Some(endpoint) => {
                match endpoint.split_once("://").map(|(scheme, rest)| (scheme, rest.rsplit('@').next())) {
                    Some((scheme, Some(host))) => format!("{repository} at {scheme}://{host}"),
                    _ => format!("{repository} at {endpoint}"),
                }
            }
            None => repository.to_owned(),
        }
    }

    async fn create(
        &self,
        key: &ObjectKey,
        bytes: Bytes,
        sha256: Option<Sha256Digest>,
    ) -> Result<Creation, StoreError> {
        match self.put(key, bytes, sha256).await {
            // The store may have taken it and the answer was lost; or it has refused before it had read all of it, and a
            // proxy made an error of its own of that. Only a look tells.
            Err(error) if error.is_transient() => match self.head(key).await {
                Ok(Some(_)) => Ok(Creation::Exists),
                Ok(None) | Err(_) => Err(error),
            },
            result => result,
        }
    }

    async fn begin(&self, key: &ObjectKey) -> Result<Box<dyn Upload>, StoreError> {
        Ok(Box::new(S3Upload::new(self.clone(), key.clone())))
    }

    async fn head(&self, key: &ObjectKey) -> Result<Option<ObjectInfo>, StoreError> {
        let request = self.client().head_object().bucket(self.bucket()).key(self.full(key.as_str()));
        match request.send().await {
            Ok(found) => unsigned(found.content_length())
                .zip(found.last_modified())
                .and_then(|(size, modified)| object_info(size, modified, found.metadata()))
                .map(Some)
                .ok_or_else(|| no_s3("look at", key.as_str())),
            Err(error) if answer(&error).status == Some(404) => Ok(None),
            Err(error) => Err(store_error("look at", key.as_str(), error)),
        }
    }

    async fn get(&self, key: &ObjectKey, range: ByteRange) -> Result<Option<Download>, StoreError> {
        super::s3_get::get(self, key, range).await
    }

    async fn list(&self, request: &ListRequest) -> Result<ListPage, StoreError> {
        let answered = self
            .client()
            .list_objects_v2()
            .bucket(self.bucket())
            .prefix(self.full(&request.prefix))
            .set_start_after(request.after.as_deref().map(|after| self.full(after)))
            .set_delimiter(request.shallow.then(|| "/".to_owned()))
            .set_continuation_token(request.cursor.as_ref().map(|cursor| cursor.0.clone()))
            .max_keys(i32::try_from(request.page_size()).unwrap_or(i32::MAX))
            .send()
            .await
            .map_err(|error| store_error("list", &request.prefix, error))?;
        // Not an empty listing, but some page that has nothing to do with S3.
        let Some(is_truncated) = answered.is_truncated() else { return Err(no_s3("list", &request.prefix)) };
        let next = answered.next_continuation_token().filter(|_| is_truncated);
        if is_truncated && next.is_none() {
            return Err(no_s3("list", &request.prefix));
        }
        let objects = answered.contents().iter().filter_map(|object| {
            let key = self.relative(object.key()?).filter(|key| request.wants(key))?.parse().ok()?;
            Some(ListedObject { key, size: unsigned(object.size())?, modified: timestamp(object.last_modified()?)? })
        });
        let prefixes = answered.common_prefixes().iter().filter_map(|common| {
            let prefix = self.relative(common.prefix()?).filter(|prefix| request.wants(prefix))?;
            prefix.trim_end_matches('/').parse::<ObjectKey>().ok().map(|_| prefix.to_owned())
        });
        let (mut objects, mut prefixes): (Vec<_>, Vec<_>) = (objects.collect(), prefixes.collect());
        objects.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        prefixes.sort_unstable();
        Ok(ListPage { objects, prefixes, next: next.map(|token| ListCursor(token.to_owned())) })
    }

    async fn delete(&self, keys: &[ObjectKey]) -> Result<Vec<(ObjectKey, StoreError)>, StoreError> {
        super::s3_delete::delete(self, keys).await
    }

    async fn pending_uploads(&self, prefix: &str) -> Result<Vec<PendingUpload>, StoreError> {
        super::s3_upload::pending(self, prefix).await
    }

    async fn abort_pending(&self, upload: &PendingUpload) -> Result<(), StoreError> {
        super::s3_upload::abort(self, &upload.key, &upload.id).await
    }

    async fn conditional_creation(&self) -> Result<ConditionalCreation, StoreError> {
        self.inner.conditional.get_or_try_init(|| self.probe()).await.cloned()
    }
}
