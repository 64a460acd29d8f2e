//! Pins: backups that stay whatever the policy says, with what they build on and the WAL to their own end.

use std::collections::BTreeSet;

use jiff::Timestamp;
use pgsidecar_core::{BackupId, layout::RepositoryObject};
use serde::{Deserialize, Serialize};

use super::Repository;
use crate::{
    failure::{Code, Failure},
    store::{ListRequest, Pages, StoreError},
};

/// `pins/<backup id>.json`. That it's there is what counts; its content is for people.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Pin {
    /// The layout's version.
    pub format: u32,
    /// The backup.
    pub backup: BackupId,
    /// Why.
    #[serde(default)]
    pub reason: String,
    /// Since when.
    pub pinned_at: Timestamp,
}

/// The backups that are pinned.
///
/// # Errors
/// The store's.
pub async fn list(repository: &Repository) -> Result<BTreeSet<BackupId>, StoreError> {
    let mut pins = BTreeSet::new();
    let mut pages = Pages::new(repository.store(), ListRequest::under(repository.layout().pins_prefix()));
    while let Some(page) = pages.next().await? {
        pins.extend(page.objects.iter().filter_map(|object| match repository.layout().parse(&object.key) {
            Some(RepositoryObject::Pin(id)) => Some(id),
            _ => None,
        }));
    }
    Ok(pins)
}

/// Pins a backup. One that is pinned already stays so, for the reason that it was.
///
/// # Errors
/// [`Code::NotFound`] if there is no such backup; the store's.
pub async fn pin(repository: &Repository, id: BackupId, reason: &str) -> Result<Pin, Failure> {
    let not_there =
        || Failure::new(Code::NotFound, format!("there is no backup {id}")).hint("'pgsidecar backup list' shows them.");
    if repository.backup(id).await?.is_none() {
        return Err(not_there());
    }
    let object = RepositoryObject::Pin(id);
    let pin = Pin { format: 1, backup: id, reason: reason.to_owned(), pinned_at: Timestamp::now() };
    let pin = match repository.store_json(&object, &pin).await {
        Ok(_) => pin,
        Err(failure) if failure.code == Code::Conflict => repository.read_json(&object).await?.unwrap_or(pin),
        Err(failure) => return Err(failure),
    };
    // A prune that began before may have removed it. It looks for pins after it has taken the marker away, and puts that
    // back; this looks after the pin is there.
    if repository.backup(id).await?.is_none() {
        return Err(
            not_there().hint("It was removed at this moment. 'pgsidecar backup list' shows those that are there.")
        );
    }
    Ok(pin)
}

/// Takes a pin away.
///
/// # Errors
/// [`Code::NotFound`] if it isn't pinned; the store's.
pub async fn unpin(repository: &Repository, id: BackupId) -> Result<(), Failure> {
    let key = repository.layout().key(&RepositoryObject::Pin(id));
    if repository.store().head(&key).await?.is_none() {
        return Err(Failure::new(Code::NotFound, format!("backup {id} is not pinned"))
            .hint("'pgsidecar backup list' shows which are."));
    }
    match repository.store().delete(std::slice::from_ref(&key)).await?.into_iter().next() {
        Some((_, error)) => Err(error.into()),
        None => Ok(()),
    }
}
