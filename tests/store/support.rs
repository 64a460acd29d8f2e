//! What the tests of stores share.
//!
//! One of the stores fails now and then. The helpers here do what every caller has to do: try again after a transient
//! error, and take `Exists` after an ambiguous one for the own first try if the content is the same.

use bytes::Bytes;
use pgsidecar::store::{ByteRange, Creation, ListPage, ListRequest, ObjectInfo, Pages, Store};
use pgsidecar_core::{ObjectKey, Sha256Digest};

pub fn key(text: &str) -> ObjectKey {
    text.parse().unwrap()
}

/// Bytes that don't repeat in a way that could hide a part in the wrong place.
pub fn noise(length: usize, seed: u64) -> Bytes {
    let mut state = seed;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&(state ^ (state >> 29)).to_le_bytes());
    }
    bytes.truncate(length);
    bytes.into()
}

/// How often a transient error is taken for one.
pub const PATIENCE: u32 = 50;

/// Tries again after transient errors.
macro_rules! insist {
    ($call:expr) => {{
        let mut failures = 0;
        loop {
            match $call.await {
                Err(error)
                    if pgsidecar::store::StoreError::is_transient(&error) && failures < $crate::support::PATIENCE =>
                {
                    failures += 1;
                }
                result => break result.unwrap(),
            }
        }
    }};
}
pub(crate) use insist;

pub async fn read(store: &dyn Store, at: &str, range: ByteRange) -> Option<Bytes> {
    let at = key(at);
    let once = || async {
        match store.get(&at, range).await? {
            Some(download) => download.bytes(u64::MAX).await.map(Some),
            None => Ok(None),
        }
    };
    insist!(once())
}

pub async fn create(store: &dyn Store, at: &str, bytes: &Bytes) -> Creation {
    let (at_key, sha256) = (key(at), Sha256Digest::of(bytes));
    let mut failures = 0;
    let creation = loop {
        match store.create(&at_key, bytes.clone(), Some(sha256)).await {
            Err(error) if error.is_transient() && failures < PATIENCE => failures += 1,
            result => break result.unwrap(),
        }
    };
    if failures > 0 && creation == Creation::Exists && read(store, at, ByteRange::All).await.as_ref() == Some(bytes) {
        return Creation::Created;
    }
    creation
}

pub async fn upload(store: &dyn Store, at: &str, bytes: &Bytes, chunk: usize) -> Creation {
    let at_key = key(at);
    let once = || async {
        let mut upload = store.begin(&at_key).await?;
        let mut left = bytes.clone();
        while !left.is_empty() {
            upload.write(left.split_to(chunk.min(left.len()))).await?;
        }
        upload.finish().await
    };
    let mut failures = 0;
    let creation = loop {
        match once().await {
            Err(error) if error.is_transient() && failures < PATIENCE => failures += 1,
            result => break result.unwrap(),
        }
    };
    if failures > 0 && creation == Creation::Exists && read(store, at, ByteRange::All).await.as_ref() == Some(bytes) {
        return Creation::Created;
    }
    creation
}

pub async fn head(store: &dyn Store, at: &str) -> Option<ObjectInfo> {
    let at = key(at);
    insist!(store.head(&at))
}

pub async fn delete(store: &dyn Store, keys: &[&str]) {
    let keys: Vec<_> = keys.iter().map(|text| key(text)).collect();
    let failed = insist!(store.delete(&keys));
    assert!(failed.is_empty(), "{failed:?}");
}

/// All the pages of a listing as one, after checking that each is in order and none too long.
pub async fn list(store: &dyn Store, request: ListRequest) -> ListPage {
    let limit = if request.limit == 0 { 1000 } else { request.limit };
    let mut pages = Pages::new(store, request);
    let mut all = ListPage::default();
    while let Some(page) = insist!(pages.next()) {
        assert!(page.objects.len() + page.prefixes.len() <= limit);
        all.objects.extend(page.objects);
        all.prefixes.extend(page.prefixes);
    }
    assert!(all.objects.is_sorted_by(|a, b| a.key < b.key), "{:?}", all.objects);
    assert!(all.prefixes.is_sorted_by(|a, b| a < b), "{:?}", all.prefixes);
    all
}

pub fn names(page: &ListPage) -> Vec<&str> {
    page.objects.iter().map(|object| object.key.as_str()).collect()
}
