//! Reading an object from S3.

use std::time::Duration;

use aws_sdk_s3::primitives::ByteStream;
use bytes::Bytes;
use pgsidecar_core::ObjectKey;

use super::{
    Body, ByteRange, Download, ObjectInfo, Store, StoreError, StoreErrorKind,
    s3::{S3Store, no_s3, object_info, unsigned},
    s3_error::{answer, body_error, store_error},
};

/// [`Store::get`].
pub(super) async fn get(store: &S3Store, key: &ObjectKey, range: ByteRange) -> Result<Option<Download>, StoreError> {
    let header = match range {
        ByteRange::All | ByteRange::From(0) => None,
        ByteRange::From(from) => Some(format!("bytes={from}-")),
        // S3 has no words for a range without bytes: one is asked for, and not read.
        ByteRange::Bounded { from, len } => {
            // Some servers take no offset that isn't a signed number.
            let last = from.saturating_add(len.max(1) - 1).min(i64::MAX.unsigned_abs());
            Some(format!("bytes={from}-{last}"))
        }
    };
    let request = store.client().get_object().bucket(store.bucket()).key(store.full(key.as_str()));
    let found = match request.set_range(header.clone()).send().await {
        Ok(found) => found,
        Err(error) => {
            let answered = answer(&error);
            return match (answered.code, answered.status) {
                (Some("NoSuchKey"), _) => Ok(None),
                // The range begins at the end of the object, or after it.
                (_, Some(416)) => past_the_end(store, key).await,
                _ => Err(store_error("read", key.as_str(), error)),
            };
        }
    };
    let length = unsigned(found.content_length());
    let size = match (&header, found.content_range()) {
        // `bytes 0-9/100`
        (Some(_), Some(content_range)) => content_range.rsplit('/').next().and_then(|size| size.parse().ok()),
        // The server ignored the range: these would be other bytes than the ones wanted.
        (Some(_), None) => None,
        (None, _) => length,
    };
    let info = size
        .zip(found.last_modified())
        .and_then(|(size, modified)| object_info(size, modified, found.metadata()))
        .ok_or_else(|| no_s3("read", key.as_str()))?;
    let (_, expected) = range.within(info.size);
    if expected == 0 {
        return Ok(Some(empty(key, info)));
    }
    if length != Some(expected) {
        let detail = format!("it answered with {length:?} bytes where the range has {expected}");
        return Err(StoreError::new(StoreErrorKind::Unexpected, "read", key.as_str(), detail));
    }
    let body = S3Body { key: key.clone(), stream: found.body, patience: store.answer_timeout() };
    Ok(Some(Download::new(key, info, expected, Box::new(body))))
}

/// The object is there and its end is known to come before the range; only its size is asked for.
async fn past_the_end(store: &S3Store, key: &ObjectKey) -> Result<Option<Download>, StoreError> {
    match store.head(key).await? {
        Some(info) => Ok(Some(empty(key, info))),
        None => {
            let detail = "it went away while it was read";
            Err(StoreError::new(StoreErrorKind::Unexpected, "read", key.as_str(), detail))
        }
    }
}

fn empty(key: &ObjectKey, info: ObjectInfo) -> Download {
    let body = S3Body { key: key.clone(), stream: ByteStream::default(), patience: Duration::from_secs(1) };
    Download::new(key, info, 0, Box::new(body))
}

struct S3Body {
    key: ObjectKey,
    stream: ByteStream,
    patience: Duration,
}

#[async_trait::async_trait]
impl Body for S3Body {
    async fn next(&mut self) -> Result<Option<Bytes>, StoreError> {
        // The SDK gives up a stalled body as well, unless someone configured that away.
        match tokio::time::timeout(self.patience, self.stream.try_next()).await {
            Ok(chunk) => chunk.map_err(|error| body_error(self.key.as_str(), error)),
            Err(_) => {
                let detail = format!("no bytes for {} seconds", self.patience.as_secs());
                Err(StoreError::new(StoreErrorKind::Unavailable, "read", self.key.as_str(), detail))
            }
        }
    }
}
