//! The id of a backup: claimed before anything of it is stored, and given back with all that was, if it fails.

use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

use jiff::Timestamp;
use pgsidecar_core::{
    BackupId, BackupKind, ObjectKey,
    layout::{BackupObject, RepositoryObject},
};

use crate::{
    failure::{Code, Failure},
    repository::{BackupClaim, Repository},
    store::{ListRequest, Pages, StoreError},
};

/// How many ids are tried: each second has one.
const CLAIM_TRIES: i64 = 10;

/// The second of the last id that this process has claimed.
static LAST_CLAIMED: AtomicI64 = AtomicI64::new(0);

/// Claims an id: that of this second, or of one of the next if another took it. It comes after that of `after`, whatever
/// the clock says: the parent, or one that was there before and has been removed, because stores and their caches may still
/// know something under its keys.
///
/// # Errors
/// The store's; [`Code::Busy`] if others take one each second.
pub async fn claim(
    repository: &Repository,
    instance: &str,
    kind: BackupKind,
    after: Option<BackupId>,
) -> Result<BackupId, Failure> {
    let used = after.map_or(0, |id| id.began().as_second()).max(LAST_CLAIMED.load(Relaxed));
    let now = Timestamp::now();
    let now = Timestamp::from_second(now.as_second().max(used + 1)).unwrap_or(now);
    let attempt = format!("{}-{}", std::process::id(), Timestamp::now().as_nanosecond());
    for second in 0..CLAIM_TRIES {
        let began = Timestamp::from_second(now.as_second() + second).unwrap_or(now);
        let id = BackupId::new(began, kind);
        let claim = BackupClaim { id, instance: instance.to_owned(), attempt: attempt.clone() };
        match repository.store_json(&RepositoryObject::Backup(id, BackupObject::Started), &claim).await {
            Ok(_) => {
                LAST_CLAIMED.store(began.as_second(), Relaxed);
                return Ok(id);
            }
            Err(failure) if failure.code == Code::Conflict => {}
            Err(failure) => return Err(failure),
        }
    }
    Err(Failure::new(Code::Busy, "no id for the backup could be had: others take one each second").hint("Try again."))
}

/// Removes what killed backups of this pod have left. As far as it goes: it's tidying, nothing depends on it.
/// Answers with the youngest that there was.
pub async fn remove_remains(repository: &Repository, instance: &str) -> Option<BackupId> {
    let remains = async {
        let mut remains = Vec::new();
        for id in repository.backup_ids().await? {
            let started = RepositoryObject::Backup(id, BackupObject::Started);
            // The order matters: a record that appears after we looked for it would be a backup that is complete.
            let claim: Option<BackupClaim> = repository.read_json(&started).await?;
            if claim.is_some_and(|claim| claim.instance == instance) && repository.backup(id).await?.is_none() {
                remains.push(id);
            }
        }
        Ok::<_, Failure>(remains)
    };
    match remains.await {
        Ok(remains) => {
            for id in &remains {
                // It may have become a backup while the others were removed.
                if !matches!(repository.backup(*id).await, Ok(None)) {
                    continue;
                }
                tracing::info!(backup = %id, "removing the remains of a backup that was not completed");
                remove(repository, *id).await;
            }
            remains.last().copied()
        }
        Err(failure) => {
            tracing::warn!(%failure, "could not look for remains of earlier backups");
            None
        }
    }
}

/// Removes an incomplete backup, its claim last. As far as it goes.
pub async fn remove(repository: &Repository, id: BackupId) {
    let layout = repository.layout();
    let (claim, record) = (layout.backup(id, BackupObject::Started), layout.backup(id, BackupObject::Record));
    if let Err(error) = remove_objects(repository, &layout.backup_prefix(id), &claim, &record).await {
        tracing::warn!(backup = %id, %error, "the remains of an incomplete backup could not be removed");
    }
}

/// Removes what lies under a prefix, a record first and a claim last.
///
/// # Errors
/// The store's.
pub(crate) async fn remove_objects(
    repository: &Repository,
    prefix: &str,
    claim: &ObjectKey,
    record: &ObjectKey,
) -> Result<(), StoreError> {
    let delete = async |keys: &[ObjectKey]| match repository.store().delete(keys).await?.into_iter().next() {
        Some((_, error)) => Err(error),
        None => Ok(()),
    };
    for upload in repository.store().pending_uploads(prefix).await? {
        repository.store().abort_pending(&upload).await?;
    }
    // Without the record it's nothing that is listed; only then may the rest go.
    delete(std::slice::from_ref(record)).await?;
    let mut pages = Pages::new(repository.store(), ListRequest::under(prefix));
    while let Some(page) = pages.next().await? {
        let keys: Vec<_> = page.objects.into_iter().map(|object| object.key).filter(|key| key != claim).collect();
        delete(&keys).await?;
    }
    delete(std::slice::from_ref(claim)).await
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pgsidecar_core::Layout;

    use super::*;
    use crate::store::MemoryStore;

    #[tokio::test]
    async fn an_id_comes_after_its_parent_s_whatever_the_clock_says() {
        let layout = Layout::new("test/pg".parse().unwrap(), "7710543486334591142".parse().unwrap());
        let repository = Repository::new(Arc::new(MemoryStore::new()), layout, 1);
        let an_hour_ahead = Timestamp::from_second(Timestamp::now().as_second() + 3600).unwrap();
        let parent = BackupId::new(an_hour_ahead, BackupKind::Full);
        let first = claim(&repository, "pod", BackupKind::Incremental, Some(parent)).await.unwrap();
        assert!(first > parent, "{first} {parent}");
        let second = claim(&repository, "pod", BackupKind::Full, None).await.unwrap();
        assert!(second > first, "{second} {first}");
    }
}
