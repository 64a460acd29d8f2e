//! The id of a dump: claimed before anything of it is stored. What has a claim and no record is the remains of a dump that
//! failed or was killed, or a dump that is under way.

use jiff::{SignedDuration, Timestamp};
use pgsidecar_core::{
    DumpId, ObjectKey,
    layout::{DumpObject, RepositoryObject},
};

use crate::{
    failure::{Code, Failure},
    repository::{DumpClaim, Repository},
    store::{ListRequest, Pages, StoreError},
};

/// How many ids are tried: each second has one.
const CLAIM_TRIES: i64 = 10;
/// After this long, an incomplete dump of another instance is taken for remains. A CronJob's pods have a name each: they
/// would never find remains of their own. Should such a dump still run, it fails: it looks for all its objects before it
/// writes its record.
const OTHERS_AFTER: SignedDuration = SignedDuration::from_hours(48);

/// Claims the id of this second, or of one of the next if another took it.
///
/// # Errors
/// The store's; [`Code::Busy`] if others take one each second.
pub async fn claim(repository: &Repository, instance: &str) -> Result<DumpId, Failure> {
    let now = Timestamp::now();
    let attempt = format!("{}-{}", std::process::id(), now.as_nanosecond());
    for second in 0..CLAIM_TRIES {
        let id = DumpId::new(now.saturating_add(SignedDuration::from_secs(second)).unwrap_or(now));
        let claim = DumpClaim { id, instance: instance.to_owned(), attempt: attempt.clone() };
        match repository.store_json(&RepositoryObject::Dump(id, DumpObject::Started), &claim).await {
            Ok(_) => return Ok(id),
            Err(failure) if failure.code == Code::Conflict => {}
            Err(failure) => return Err(failure),
        }
    }
    Err(Failure::new(Code::Busy, "no id for the dump could be had: others take one each second").hint("Try again."))
}

/// Removes what dumps of this instance that failed have left, and of others after two days. As far as it goes: it's
/// tidying, nothing depends on it.
pub async fn remove_remains(repository: &Repository, instance: &str) {
    let remains = async {
        let mut remains = Vec::new();
        for id in repository.dump_ids().await? {
            let started = RepositoryObject::Dump(id, DumpObject::Started);
            // The order matters: a record that appears after we looked for it would be a dump that is complete.
            let Some(claim) = repository.read_json::<DumpClaim>(&started).await? else { continue };
            let is_old = Timestamp::now().duration_since(id.began()) > OTHERS_AFTER;
            if (claim.instance == instance || is_old) && repository.dump(id).await?.is_none() {
                remains.push(id);
            }
        }
        Ok::<_, Failure>(remains)
    };
    match remains.await {
        Ok(remains) => {
            for id in remains {
                tracing::info!(dump = %id, "removing the remains of a dump that was not completed");
                remove(repository, id).await;
            }
        }
        Err(failure) => tracing::warn!(%failure, "could not look for remains of earlier dumps"),
    }
}

/// Removes an incomplete dump, its claim last. As far as it goes. One that has a record by now stays, and a record is never
/// removed here: who takes long to look may find that the dump was completed meanwhile.
pub async fn remove(repository: &Repository, id: DumpId) {
    if let Err(error) = try_remove(repository, id).await {
        tracing::warn!(dump = %id, %error, "the remains of an incomplete dump could not be removed; the next dump tries again");
    }
}

async fn try_remove(repository: &Repository, id: DumpId) -> Result<(), StoreError> {
    let (store, layout) = (repository.store(), repository.layout());
    let (claim, record) = (layout.dump(id, DumpObject::Started), layout.dump(id, DumpObject::Record));
    let prefix = layout.dump_prefix(id);
    // Whatever is in it: a record that can't be read is for people to look at.
    let is_complete = async || Ok::<_, StoreError>(store.head(&record).await?.is_some());
    let delete = async |keys: &[ObjectKey]| match store.delete(keys).await?.into_iter().next() {
        Some((_, error)) => Err(error),
        None => Ok(()),
    };
    if is_complete().await? {
        return Ok(());
    }
    for upload in store.pending_uploads(&prefix).await? {
        store.abort_pending(&upload).await?;
    }
    let mut pages = Pages::new(store, ListRequest::under(&prefix));
    while let Some(page) = pages.next().await? {
        let keys = page.objects.into_iter().map(|object| object.key);
        let keys: Vec<_> = keys.filter(|key| *key != claim && *key != record).collect();
        if is_complete().await? {
            return Ok(());
        }
        delete(&keys).await?;
    }
    match is_complete().await? {
        true => Ok(()),
        false => delete(std::slice::from_ref(&claim)).await,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pgsidecar_core::Layout;

    use super::*;
    use crate::store::MemoryStore;

    #[tokio::test]
    async fn remains_go_and_what_others_are_at_stays() {
        let layout = Layout::new("test/pg".parse().unwrap(), "7710543486334591142".parse().unwrap());
        let repository = Repository::new(Arc::new(MemoryStore::new()), layout, 1);
        let ours = claim(&repository, "a").await.unwrap();
        let theirs = claim(&repository, "b").await.unwrap();
        let long_ago = DumpId::new(Timestamp::now() - SignedDuration::from_hours(49));
        let old = DumpClaim { id: long_ago, instance: "c".into(), attempt: "1".into() };
        repository.store_json(&RepositoryObject::Dump(long_ago, DumpObject::Started), &old).await.unwrap();
        assert_eq!(repository.dump_ids().await.unwrap(), [long_ago, ours, theirs]);
        remove_remains(&repository, "a").await;
        assert_eq!(repository.dump_ids().await.unwrap(), [theirs]);
    }

    #[tokio::test]
    async fn what_has_a_record_by_now_stays_whatever_the_record_says() {
        let layout = Layout::new("test/pg".parse().unwrap(), "7710543486334591142".parse().unwrap());
        let repository = Repository::new(Arc::new(MemoryStore::new()), layout.clone(), 1);
        let id = claim(&repository, "a").await.unwrap();
        let keys = [DumpObject::Globals, DumpObject::Record].map(|object| layout.dump(id, object));
        for key in &keys {
            repository.store().create(key, b"x".to_vec().into(), None).await.unwrap();
        }
        // As if it had been found incomplete before.
        remove(&repository, id).await;
        for key in &keys {
            assert!(repository.store().head(key).await.unwrap().is_some(), "{key}");
        }
        repository.store().delete(&keys[1..]).await.unwrap();
        remove(&repository, id).await;
        assert_eq!(repository.dump_ids().await.unwrap(), []);
    }
}
