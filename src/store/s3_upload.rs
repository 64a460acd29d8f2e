//! Objects of unknown size on S3.
//!
//! What fits into one part is one conditional PUT. Anything longer is a multipart upload, whose parts are sent while
//! the next one fills: 2 × [`part_size`] bytes of memory, 16 MiB up to an object of 1.6 GB.
//! Nothing is visible before it's completed; what isn't completed is aborted, at once or by `pending_uploads` later.

use aws_sdk_s3::{
    config::RequestChecksumCalculation,
    primitives::ByteStream,
    types::{ChecksumAlgorithm, CompletedMultipartUpload, CompletedPart},
};
use bytes::{Bytes, BytesMut};
use pgsidecar_core::ObjectKey;
use tokio::task::JoinSet;

use super::{
    ConditionalCreation, Creation, PendingUpload, Store, StoreError, StoreErrorKind, Upload,
    s3::{S3Store, no_s3, timestamp},
    s3_error::{answer, store_error},
};

const MIB: usize = 1024 * 1024;

/// What the first part's buffer has at first.
const SMALL_BUFFER: usize = 512 * 1024;

/// The size in bytes of part `n` (from 1 on) of a multipart upload.
///
/// S3 allows 10,000 parts, some other stores 1,000, and the size of the whole isn't known beforehand. 8 MiB for the
/// first 200 parts, then a MiB more every 6 parts: 1,000 parts hold 64 GB, 10,000 parts more than 8 TB, of which S3
/// takes 5 TiB.
pub fn part_size(n: usize) -> usize {
    (8 + n.saturating_sub(200) / 6) * MIB
}

pub(super) struct S3Upload {
    store: S3Store,
    key: ObjectKey,
    /// The part that is filling.
    buffer: BytesMut,
    /// Begun when the first part was full.
    multipart: Option<Multipart>,
    failed: bool,
}

/// A multipart upload that the store knows of. Dropped before it's completed, it's aborted in the background.
struct Multipart {
    store: S3Store,
    key: ObjectKey,
    id: String,
    begun: i32,
    /// Whether the store took the upload as one whose parts have checksums, and wants them again at completion.
    is_checked: bool,
    sending: JoinSet<Result<CompletedPart, StoreError>>,
    done: Vec<CompletedPart>,
    is_over: bool,
}

impl S3Upload {
    pub(super) fn new(store: S3Store, key: ObjectKey) -> S3Upload {
        S3Upload { store, key, buffer: BytesMut::new(), multipart: None, failed: false }
    }

    fn part_size(&self) -> usize {
        let begun = self.multipart.as_ref().map_or(0, |multipart| multipart.begun);
        part_size(usize::try_from(begun).unwrap_or(0) + 1)
    }

    /// Hands the full buffer over as the next part. Waits while enough parts are under way.
    async fn send_part(&mut self) -> Result<(), StoreError> {
        let multipart = match &mut self.multipart {
            Some(multipart) => multipart,
            None => self.multipart.insert(Multipart::begin(&self.store, &self.key).await?),
        };
        // One under way, one that fills. A second one under way would be 8 MiB more for each of a backup's threads, which
        // upload at the same time anyway.
        while !multipart.sending.is_empty() {
            multipart.collect_one().await?;
        }
        multipart.send(std::mem::take(&mut self.buffer).freeze());
        Ok(())
    }

    async fn add(&mut self, mut chunk: Bytes) -> Result<(), StoreError> {
        while !chunk.is_empty() {
            let size = self.part_size();
            if self.buffer.len() == size {
                self.send_part().await?;
                continue;
            }
            let taken = chunk.split_to(chunk.len().min(size - self.buffer.len()));
            if self.buffer.capacity() < self.buffer.len() + taken.len() {
                // What outgrows a small buffer gets the whole part's at once: growing step by step would hold the old and the
                // new one, of megabytes each, at each step. What isn't touched of it costs nothing.
                let needed = self.buffer.len() + taken.len();
                let wanted = if self.multipart.is_none() && needed <= SMALL_BUFFER { SMALL_BUFFER } else { size };
                self.buffer.reserve(wanted - self.buffer.len());
            }
            self.buffer.extend_from_slice(&taken);
        }
        Ok(())
    }
}

#[async_trait::async_trait]
impl Upload for S3Upload {
    async fn write(&mut self, chunk: Bytes) -> Result<(), StoreError> {
        // Stays set if this future is dropped half-way: then it isn't known how much of the chunk was taken.
        if std::mem::replace(&mut self.failed, true) {
            return Err(unusable(&self.key));
        }
        self.add(chunk).await?;
        self.failed = false;
        Ok(())
    }

    async fn finish(mut self: Box<Self>) -> Result<Creation, StoreError> {
        if self.failed {
            return Err(unusable(&self.key));
        }
        if self.multipart.is_none() {
            let whole = std::mem::take(&mut self.buffer).freeze();
            return self.store.put(&self.key, whole, None).await;
        }
        if !self.buffer.is_empty() {
            self.send_part().await?;
        }
        match self.multipart.take() {
            Some(multipart) => multipart.complete().await,
            None => Err(unusable(&self.key)),
        }
    }

    async fn abort(mut self: Box<Self>) {
        if let Some(mut multipart) = self.multipart.take() {
            multipart.abort().await;
        }
    }
}

fn unusable(key: &ObjectKey) -> StoreError {
    let detail = "an earlier write of this upload failed";
    StoreError::new(StoreErrorKind::Unexpected, "create", key.as_str(), detail)
}

impl Multipart {
    async fn begin(store: &S3Store, key: &ObjectKey) -> Result<Multipart, StoreError> {
        // The SDK gives each part a checksum by itself, but doesn't announce it here, as S3 wants it.
        let calculation = store.client().config().request_checksum_calculation();
        let is_checked = calculation != Some(&RequestChecksumCalculation::WhenRequired);
        let request = store
            .client()
            .create_multipart_upload()
            .bucket(store.bucket())
            .key(store.full(key.as_str()))
            .set_checksum_algorithm(is_checked.then_some(ChecksumAlgorithm::Crc32));
        let begun = request.send().await.map_err(|error| store_error("create", key.as_str(), error))?;
        let id = begun.upload_id().ok_or_else(|| no_s3("create", key.as_str()))?.to_owned();
        let (store, key, is_checked) = (store.clone(), key.clone(), begun.checksum_algorithm().is_some());
        Ok(Multipart {
            store,
            key,
            id,
            begun: 0,
            is_checked,
            sending: JoinSet::new(),
            done: Vec::new(),
            is_over: false,
        })
    }

    fn send(&mut self, bytes: Bytes) {
        self.begun += 1;
        let (store, key, id, number) = (self.store.clone(), self.key.clone(), self.id.clone(), self.begun);
        let is_checked = self.is_checked;
        self.sending.spawn(async move {
            let request = store
                .client()
                .upload_part()
                .bucket(store.bucket())
                .key(store.full(key.as_str()))
                .upload_id(id)
                .part_number(number)
                .body(ByteStream::from(bytes.clone()));
            let sent = request.customize().config_override(store.for_body(bytes.len())).send().await;
            let sent = sent.map_err(|error| store_error("create", key.as_str(), error))?;
            let Some(tag) = sent.e_tag() else { return Err(no_s3("create", key.as_str())) };
            // Answered also by servers that would refuse it at completion (Garage, if it wasn't announced).
            let checksum = sent.checksum_crc32().filter(|_| is_checked).map(str::to_owned);
            Ok(CompletedPart::builder().part_number(number).e_tag(tag).set_checksum_crc32(checksum).build())
        });
    }

    async fn collect_one(&mut self) -> Result<(), StoreError> {
        let Some(sent) = self.sending.join_next().await else { return Ok(()) };
        let part = sent.unwrap_or_else(|panic| {
            Err(StoreError::new(StoreErrorKind::Unexpected, "create", self.key.as_str(), panic.to_string()))
        });
        self.done.push(part?);
        Ok(())
    }

    /// Makes the object of its parts.
    ///
    /// A failure may have come after the store did it: the answer was lost, and the SDK's second try finds no such
    /// upload. So after any failure it's looked whether the object is there, and if it is, the answer is `Exists`:
    /// the caller tells whose it is by comparing, as after every creation.
    async fn complete(mut self) -> Result<Creation, StoreError> {
        while !self.sending.is_empty() {
            self.collect_one().await?;
        }
        self.done.sort_unstable_by_key(CompletedPart::part_number);
        let is_conditional = self.store.conditional_creation().await? == ConditionalCreation::Honoured;
        // Also where the condition is honoured: some servers do so for PUT alone.
        if self.store.exists(&self.key).await? {
            self.abort().await;
            return Ok(Creation::Exists);
        }
        let parts = CompletedMultipartUpload::builder().set_parts(Some(std::mem::take(&mut self.done))).build();
        let request = self
            .store
            .client()
            .complete_multipart_upload()
            .bucket(self.store.bucket())
            .key(self.store.full(self.key.as_str()))
            .upload_id(&self.id)
            .set_if_none_match(is_conditional.then(|| "*".to_owned()))
            .multipart_upload(parts);
        let request = request.customize().config_override(self.store.for_completion());
        let error = match request.send().await {
            Ok(completed) if completed.e_tag().is_some() => {
                self.is_over = true;
                return Ok(Creation::Created);
            }
            Ok(_) => no_s3("create", self.key.as_str()),
            Err(error) if answer(&error).is_precondition_failed() => {
                self.abort().await;
                return Ok(Creation::Exists);
            }
            Err(error) => store_error("create", self.key.as_str(), error),
        };
        let is_there = self.store.exists(&self.key).await;
        self.abort().await;
        match is_there {
            Ok(true) => Ok(Creation::Exists),
            Ok(false) | Err(_) => Err(error),
        }
    }

    /// Best effort: what can't be aborted now is found by `pending_uploads` later.
    async fn abort(&mut self) {
        self.sending.shutdown().await;
        self.is_over = true;
        if let Err(error) = abort(&self.store, self.key.as_str(), &self.id).await {
            tracing::debug!(key = %self.key, %error, "an unfinished upload could not be removed now");
        }
    }
}

impl Drop for Multipart {
    fn drop(&mut self) {
        self.sending.abort_all();
        // Without a runtime there is nobody left to do it.
        if let (false, Ok(runtime)) = (self.is_over, tokio::runtime::Handle::try_current()) {
            let (store, key, id) = (self.store.clone(), self.key.clone(), self.id.clone());
            runtime.spawn(async move {
                if let Err(error) = abort(&store, key.as_str(), &id).await {
                    tracing::debug!(%key, %error, "an unfinished upload could not be removed now");
                }
            });
        }
    }
}

/// [`Store::abort_pending`]; `key` is relative.
pub(super) async fn abort(store: &S3Store, key: &str, id: &str) -> Result<(), StoreError> {
    let request = store.client().abort_multipart_upload().bucket(store.bucket()).key(store.full(key)).upload_id(id);
    match request.send().await {
        Ok(_) => Ok(()),
        Err(error) if answer(&error).code == Some("NoSuchUpload") => Ok(()),
        Err(error) => Err(store_error("remove the upload of", key, error)),
    }
}

/// [`Store::pending_uploads`].
pub(super) async fn pending(store: &S3Store, prefix: &str) -> Result<Vec<PendingUpload>, StoreError> {
    let mut found = Vec::new();
    let (mut key_marker, mut id_marker) = (None, None);
    loop {
        let request = store
            .client()
            .list_multipart_uploads()
            .bucket(store.bucket())
            .prefix(store.full(prefix))
            .set_key_marker(key_marker.take())
            .set_upload_id_marker(id_marker.take());
        let page = match request.send().await {
            Ok(page) => page,
            Err(error) if answer(&error).is_not_implemented() => return Ok(found),
            Err(error) => return Err(store_error("list the uploads of", prefix, error)),
        };
        let Some(is_truncated) = page.is_truncated() else { return Err(no_s3("list the uploads of", prefix)) };
        found.extend(page.uploads().iter().filter_map(|upload| {
            let key = store.relative(upload.key()?)?.to_owned();
            Some(PendingUpload { key, started: timestamp(upload.initiated()?)?, id: upload.upload_id()?.to_owned() })
        }));
        if !is_truncated {
            return Ok(found);
        }
        key_marker = page.next_key_marker().map(str::to_owned);
        id_marker = page.next_upload_id_marker().map(str::to_owned);
        if key_marker.is_none() {
            return Err(no_s3("list the uploads of", prefix));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thousand_parts_hold_60_gb_and_ten_thousand_hold_more_than_s3_takes() {
        let hold = |parts: usize| (1..=parts).map(|n| part_size(n) as u64).sum::<u64>();
        assert_eq!(part_size(1), 8 * MIB);
        assert_eq!(part_size(200), 8 * MIB);
        assert!(hold(1000) >= 60_000_000_000, "{}", hold(1000));
        assert!(hold(10_000) > 5 << 40, "{}", hold(10_000));
        assert!(part_size(10_000) <= 5 << 30, "S3's largest part");
        assert!((1..10_000).all(|n| part_size(n) <= part_size(n + 1)));
    }
}
