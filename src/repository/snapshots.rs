//! The records of snapshots.

use pgsidecar_core::{
    SnapshotId, SnapshotRecord, TimelineHistory, layout::RepositoryObject, snapshot::SNAPSHOT_FORMAT,
};

use super::{Repository, damaged};
use crate::{
    failure::{Code, Failure},
    store::{ListRequest, Pages},
};

impl Repository {
    /// All complete snapshots, oldest first. A record that is damaged is told in the log and left out.
    ///
    /// # Errors
    /// The store's.
    pub async fn snapshots(&self) -> Result<Vec<SnapshotRecord>, Failure> {
        let mut ids = Vec::new();
        let mut pages = Pages::new(self.store(), ListRequest::shallow(self.layout().snapshots_prefix()));
        while let Some(page) = pages.next().await? {
            ids.extend(page.prefixes.iter().filter_map(|prefix| self.layout().snapshot_of_prefix(prefix)));
        }
        ids.sort_unstable();
        let mut snapshots = Vec::new();
        for id in ids {
            match self.snapshot(id).await {
                Ok(snapshot) => snapshots.extend(snapshot),
                Err(failure) if failure.code == Code::Damaged => {
                    tracing::warn!(hint = failure.hint, "snapshot {id} is left out: {failure}");
                }
                Err(failure) => return Err(failure),
            }
        }
        Ok(snapshots)
    }

    /// A snapshot's record; `None` if there is no such snapshot, or it isn't complete.
    ///
    /// # Errors
    /// The store's; [`Code::Damaged`] if the record can't be parsed.
    pub async fn snapshot(&self, id: SnapshotId) -> Result<Option<SnapshotRecord>, Failure> {
        let Some(record) = self.read_json::<SnapshotRecord>(&RepositoryObject::Snapshot(id)).await? else {
            return Ok(None);
        };
        if record.format > SNAPSHOT_FORMAT {
            return Err(Failure::new(
                Code::Damaged,
                format!("snapshot {id} has format {}, and this pgsidecar knows {SNAPSHOT_FORMAT}", record.format),
            )
            .hint("It was made by a newer pgsidecar: use that one."));
        }
        if record.system_identifier != self.layout().system() || record.id != id {
            return Err(damaged(&format!("the record of snapshot {id}"), "it is another snapshot's"));
        }
        Ok(Some(record))
    }

    /// All timeline histories of the repository.
    ///
    /// # Errors
    /// The store's; [`Code::Damaged`].
    pub async fn histories(&self) -> Result<Vec<TimelineHistory>, Failure> {
        let mut histories = Vec::new();
        for timeline in self.timelines().await? {
            histories.extend(self.history(timeline).await?);
        }
        Ok(histories)
    }
}
