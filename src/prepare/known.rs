//! What a repository has of a cluster: which databases, with backups or without.

use std::sync::Arc;

use pgsidecar_core::{Layout, SystemIdentifier, TimelineId, prepare::KnownSystem, settings::RepositoryUrl};

use crate::{
    failure::{Code, Failure},
    repository::Repository,
    settings::WorkSettings,
    store::Store,
};

/// Checks that a directory repository is there. Where the volume isn't mounted yet, an empty listing says nothing.
///
/// # Errors
/// [`Code::StoreUnavailable`] if it isn't.
pub(super) fn check_root(repository: &RepositoryUrl) -> Result<(), Failure> {
    match repository {
        RepositoryUrl::Directory(path) if !path.is_dir() => Err(Failure::new(
            Code::StoreUnavailable,
            format!("the repository's directory {} isn't there, or can't be looked at", path.display()),
        )
        .hint("Mount its volume in this container; where it's a new repository, make the directory.")),
        _ => Ok(()),
    }
}

/// The newest timeline of a database, if it's among them.
pub(super) fn newest_timeline(systems: &[KnownSystem], system: SystemIdentifier) -> Option<TimelineId> {
    systems.iter().find(|known| known.system == system)?.newest_timeline
}

/// The databases under the cluster's name.
///
/// # Errors
/// The store's.
pub(super) async fn known_systems(store: &Arc<dyn Store>, work: &WorkSettings) -> Result<Vec<KnownSystem>, Failure> {
    let mut known = Vec::new();
    for system in Repository::systems(&**store, &work.cluster).await? {
        let layout = Layout::new(work.cluster.clone(), system);
        let repository = Repository::new(store.clone(), layout, work.compression_level);
        known.push(KnownSystem {
            system,
            has_backups: has_backups(&repository).await?,
            has_snapshots: !repository.snapshots().await?.is_empty(),
            has_dumps: has_dumps(&repository).await?,
            newest_timeline: repository.timelines().await?.into_iter().max(),
        });
    }
    Ok(known)
}

/// Whether there is a complete backup. One whose record is damaged counts: there was a database.
async fn has_backups(repository: &Repository) -> Result<bool, Failure> {
    for id in repository.backup_ids().await?.into_iter().rev() {
        match repository.backup(id).await {
            Ok(None) => {}
            Ok(Some(_)) => return Ok(true),
            Err(failure) if failure.code == Code::Damaged => return Ok(true),
            Err(failure) => return Err(failure),
        }
    }
    Ok(false)
}

/// Whether there is a complete dump. One whose record is damaged counts here, too.
async fn has_dumps(repository: &Repository) -> Result<bool, Failure> {
    for id in repository.dump_ids().await?.into_iter().rev() {
        match repository.dump(id).await {
            Ok(None) => {}
            Ok(Some(_)) => return Ok(true),
            Err(failure) if failure.code == Code::Damaged => return Ok(true),
            Err(failure) => return Err(failure),
        }
    }
    Ok(false)
}
