//! The repository of one database system: what its objects mean, on top of a [`Store`] that knows only keys.
//!
//! Guarantees: creating is idempotent. The same content again is a success, other content under the same name
//! is a [`Code::Conflict`] that shows both hashes. Reading survives a connection that breaks in the middle.

mod backups;
mod drills;
mod dumps;
mod listing;
mod objects;
mod partly;
pub mod pins;
mod restore_points;
mod runs;
mod snapshots;
mod stored;
mod timelines;

use std::sync::Arc;

use pgsidecar_core::{
    BackupId, ClusterName, Layout, SystemIdentifier, WalSegmentSize, layout::RepositoryObject, plan::Catalog,
};
use serde::{Deserialize, Serialize};

pub use self::{
    dumps::DumpClaim,
    listing::{ListedWal, WalListing},
    stored::StoredReader,
};
use crate::{
    failure::{Code, Failure},
    store::{ListRequest, Pages, Store},
};

/// Compressed content up to this size is sent in one request, whose bytes are held in memory: a segment of the
/// usual 16 MB, however badly it compresses.
pub const SINGLE_REQUEST_BYTES: usize = 17 << 20;

/// `cluster.json`: what is the same for all WAL of a database system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterRecord {
    /// The layout's version.
    pub format: u32,
    /// The database system.
    pub system_identifier: SystemIdentifier,
    /// Size of its WAL segments.
    pub wal_segment_size: WalSegmentSize,
}

/// `started.json`: the claim of a backup's id, written before anything else of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupClaim {
    /// The backup.
    pub id: BackupId,
    /// The pod or host that takes it.
    pub instance: String,
    /// Distinguishes this attempt from every other.
    pub attempt: String,
}

/// The repository of one database system.
#[derive(Clone, Debug)]
pub struct Repository {
    store: Arc<dyn Store>,
    layout: Layout,
    level: i32,
}

/// What came of storing content under a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// It's new.
    New,
    /// The same content was there already.
    Already,
}

impl Repository {
    /// The repository of this database system in this store; `level` is zstd's.
    pub fn new(store: Arc<dyn Store>, layout: Layout, level: i32) -> Repository {
        Repository { store, layout, level }
    }

    /// The database systems that a cluster name has in a store.
    ///
    /// # Errors
    /// If the store can't be listed.
    pub async fn systems(store: &dyn Store, cluster: &ClusterName) -> Result<Vec<SystemIdentifier>, Failure> {
        let mut systems = Vec::new();
        let mut pages = Pages::new(store, ListRequest::shallow(Layout::cluster_prefix(cluster)));
        while let Some(page) = pages.next().await? {
            systems.extend(page.prefixes.iter().filter_map(|prefix| Layout::system_of_prefix(cluster, prefix)));
        }
        Ok(systems)
    }

    /// Where its objects lie.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The store beneath.
    pub fn store(&self) -> &dyn Store {
        &*self.store
    }

    /// Notes what is the same for all WAL of this system, if it isn't noted yet.
    ///
    /// # Errors
    /// The store's; [`Code::Conflict`] if something else is noted.
    pub async fn note_cluster(&self, wal_segment_size: WalSegmentSize) -> Result<(), Failure> {
        let record = ClusterRecord { format: 1, system_identifier: self.layout.system(), wal_segment_size };
        self.store_json(&RepositoryObject::Cluster, &record).await.map(|_| ())
    }

    /// zstd's level for what is stored.
    pub fn level(&self) -> i32 {
        self.level
    }

    /// Backups, timeline histories and restore points: what a restore is planned from.
    ///
    /// # Errors
    /// The store's; [`Code::Damaged`].
    pub async fn catalog(&self) -> Result<Catalog, Failure> {
        let histories = self.histories().await?;
        let restore_points = self.restore_points().await?;
        let backups = self.backups().await?;
        let begun_only = self.begun_only(&histories, backups.iter().map(|backup| backup.timeline).collect()).await?;
        Ok(Catalog { backups, histories, begun_only, restore_points })
    }
}

/// Something in the repository isn't what was stored.
pub fn damaged(name: &str, how: &str) -> Failure {
    Failure::new(Code::Damaged, format!("{name} in the repository is damaged: {how}"))
        .hint("Nothing was changed. Restore another backup, or get this object back from a replica or an older version of the bucket.")
}
