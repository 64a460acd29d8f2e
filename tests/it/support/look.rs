//! A look into a repository past everything that is under test but the store.

use std::{collections::BTreeMap, sync::Arc};

use pgsidecar::store::{ByteRange, Creation, ListRequest, LocalStore, Pages, S3Store, Store};
use pgsidecar_core::{ObjectKey, Sha256Digest};

use super::Repository;

/// The objects of a repository, as they lie there.
pub struct Look {
    store: Arc<dyn Store>,
    runtime: tokio::runtime::Runtime,
}

impl Look {
    pub fn into(repository: &Repository) -> Look {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let store: Arc<dyn Store> = match repository {
            Repository::Directory(path) => Arc::new(LocalStore::new(path)),
            Repository::S3(server) => {
                let mut config = server.config();
                config.prefix = "it".to_owned();
                Arc::new(runtime.block_on(S3Store::new(config)))
            }
        };
        Look { store, runtime }
    }

    /// All keys, with the sizes of their objects.
    pub fn keys(&self) -> Vec<(ObjectKey, u64)> {
        self.runtime.block_on(async {
            let mut keys = Vec::new();
            let mut pages = Pages::new(&*self.store, ListRequest::under(""));
            while let Some(page) = pages.next().await.unwrap() {
                keys.extend(page.objects.into_iter().map(|object| (object.key, object.size)));
            }
            keys
        })
    }

    /// The keys that contain this.
    pub fn matching(&self, part: &str) -> Vec<String> {
        self.keys().into_iter().map(|(key, _)| key.to_string()).filter(|key| key.contains(part)).collect()
    }

    /// An object's bytes, and their hash if it was stored with one.
    pub fn object(&self, key: &ObjectKey) -> (Vec<u8>, Option<Sha256Digest>) {
        self.runtime.block_on(async {
            let download = self.store.get(key, ByteRange::All).await.unwrap().expect("it was listed");
            let sha256 = download.info.sha256;
            (download.bytes(u64::MAX).await.unwrap().to_vec(), sha256)
        })
    }

    /// Removes an object, as somebody who shouldn't.
    pub fn remove(&self, key: &ObjectKey) {
        assert!(self.runtime.block_on(self.store.delete(std::slice::from_ref(key))).unwrap().is_empty());
    }

    /// Puts an object there, or another in its place.
    pub fn put(&self, key: &ObjectKey, bytes: Vec<u8>, sha256: Option<Sha256Digest>) {
        self.remove(key);
        let created = self.runtime.block_on(self.store.create(key, bytes.into(), sha256)).unwrap();
        assert_eq!(created, Creation::Created);
    }

    /// The only object whose key contains this, as text.
    pub fn text(&self, part: &str) -> String {
        let keys: Vec<_> = self.keys().into_iter().filter(|(key, _)| key.as_str().contains(part)).collect();
        assert_eq!(keys.len(), 1, "{keys:?}");
        String::from_utf8(self.object(&keys[0].0).0).unwrap()
    }

    /// The unfinished uploads that the store tells of.
    pub fn pending(&self) -> Vec<String> {
        let pending = self.runtime.block_on(self.store.pending_uploads("")).unwrap();
        pending.into_iter().map(|upload| upload.key).collect()
    }

    /// The plain content of a WAL file; `None` if it isn't there.
    pub fn wal(&self, name: &str) -> Option<Vec<u8>> {
        let end = format!("/{name}.zst");
        let (key, _) = self.keys().into_iter().find(|(key, _)| key.as_str().ends_with(&end))?;
        Some(zstd::decode_all(self.object(&key).0.as_slice()).unwrap())
    }

    /// The plain content of all WAL files of this cluster name, by their names.
    pub fn all_wal(&self, cluster: &str) -> BTreeMap<String, Vec<u8>> {
        let of_cluster = |key: &ObjectKey| {
            key.as_str().starts_with(&format!("{cluster}/"))
                && key.as_str().contains("/wal/")
                && key.as_str().ends_with(".zst")
        };
        let keys = self.keys().into_iter().filter(|(key, _)| of_cluster(key));
        let files = keys.map(|(key, _)| {
            let name = key.as_str().rsplit('/').next().unwrap().strip_suffix(".zst").unwrap().to_owned();
            (name, zstd::decode_all(self.object(&key).0.as_slice()).unwrap())
        });
        files.collect()
    }

    /// Each listed object is whole: as long as listed, and it decodes to what it says that it is.
    pub fn check_all_whole(&self) {
        for (key, size) in self.keys() {
            let (stored, sha256) = self.object(&key);
            assert_eq!(stored.len() as u64, size, "{key}");
            assert!(
                sha256.is_none_or(|sha256| sha256 == Sha256Digest::of(&stored)),
                "{key} isn't what its metadata say"
            );
            if key.as_str().ends_with(".zst") {
                zstd::decode_all(stored.as_slice()).unwrap_or_else(|error| panic!("{key}: {error}"));
            } else if key.as_str().ends_with(".json") {
                serde_json::from_slice::<serde_json::Value>(&stored).unwrap_or_else(|error| panic!("{key}: {error}"));
            }
        }
    }
}
