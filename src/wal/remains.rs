//! What killed daemons have left of uploads of WAL: temporary files in a directory, parts on S3. Nobody lists them, but
//! they take room and, on S3, cost money until somebody removes them.
//!
//! Only this database system's, and only what has been begun so long ago that no daemon still writes it: another one,
//! of a standby or of a pod that was just replaced, may archive to the same place. The age is told by our clock against
//! the store's; S3 refuses requests whose clocks are further apart than a quarter of an hour. Should an upload be
//! removed that is still under way, nothing is lost: it fails, and PostgreSQL asks again.

use jiff::{SignedDuration, Timestamp};

use crate::{
    repository::Repository,
    store::{PendingUpload, StoreError},
};

/// How old an unfinished upload must be to be nobody's any more. A segment of 1 GB over the slowest line that is waited
/// for takes less than half of it.
const NOBODYS_AFTER: SignedDuration = SignedDuration::from_hours(6);

/// Removes what is old enough now, and once more when what a daemon left that was killed just now will be.
pub async fn run(repository: &Repository) {
    remove(repository, Timestamp::now(), NOBODYS_AFTER).await;
    tokio::time::sleep(NOBODYS_AFTER.unsigned_abs()).await;
    remove(repository, Timestamp::now(), NOBODYS_AFTER).await;
}

/// Removes unfinished uploads of WAL that have been begun longer than `age` before `now`. As far as it goes: it's tidying,
/// and nothing depends on it.
async fn remove(repository: &Repository, now: Timestamp, age: SignedDuration) {
    let store = repository.store();
    let is_old = |upload: &PendingUpload| now.duration_since(upload.started) > age;
    let removed = async {
        let mut removed = 0_u64;
        for prefix in [repository.layout().wal_prefix(), repository.layout().all_tails_prefix()] {
            for upload in store.pending_uploads(&prefix).await?.into_iter().filter(is_old) {
                store.abort_pending(&upload).await?;
                tracing::debug!(upload = upload.key, started = %upload.started, "removed an unfinished upload");
                removed += 1;
            }
        }
        Ok::<_, StoreError>(removed)
    };
    match removed.await {
        Ok(0) => {}
        Ok(uploads) => tracing::info!(uploads, "removed what interrupted uploads of WAL had left"),
        Err(error) => tracing::warn!(
            hint = error.hint(),
            "what interrupted uploads of WAL may have left was not removed: {error}"
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pgsidecar_core::{Layout, SystemIdentifier};

    use super::*;
    use crate::store::{MemoryStore, Store};

    #[tokio::test]
    async fn old_uploads_of_this_databases_wal_are_removed_and_no_others() {
        let store = Arc::new(MemoryStore::default());
        let system: SystemIdentifier = "7000000000000000001".parse().unwrap();
        let layout = Layout::new("main".parse().unwrap(), system);
        let repository = Repository::new(store.clone(), layout, 1);
        let keys = [
            "main/7000000000000000001/wal/00000001/a.zst",
            "main/7000000000000000001/tail/00000001/b.zst",
            "main/7000000000000000001/backups/c/part",
            "main/7000000000000000002/wal/00000001/d.zst",
            "other/7000000000000000001/wal/00000001/e.zst",
        ];
        let mut under_way = Vec::new();
        for key in keys {
            under_way.push(store.begin(&key.parse().unwrap()).await.unwrap());
        }
        let pending = async || {
            let uploads = store.pending_uploads("").await.unwrap();
            let mut keys: Vec<_> = uploads.into_iter().map(|upload| upload.key).collect();
            keys.sort();
            keys
        };
        let (age, now) = (SignedDuration::from_hours(1), Timestamp::now());
        remove(&repository, now, age).await;
        assert_eq!(pending().await.len(), keys.len(), "they are young");
        // By a store whose clock is ahead of ours.
        remove(&repository, now - SignedDuration::from_hours(2), age).await;
        assert_eq!(pending().await.len(), keys.len(), "they are of the future");
        remove(&repository, now + SignedDuration::from_mins(61), age).await;
        assert_eq!(pending().await, keys[2..]);
        drop(under_way);
    }
}
