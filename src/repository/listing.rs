//! Walking through the WAL of a repository, page by page.

use std::collections::BTreeSet;

use pgsidecar_core::{
    ArchiveFileName, Lsn, SegmentName, TimelineHistory, TimelineId, layout::RepositoryObject, plan::WalScan,
};

use super::{ClusterRecord, Repository};
use crate::{
    failure::{Code, Failure},
    store::{ListRequest, ListedObject, Pages},
};

/// A listing of WAL: timelines in their order, the segments of each in the order of their positions.
#[derive(Debug)]
pub struct WalListing<'a> {
    repository: &'a Repository,
    pages: Pages<'a>,
}

/// An object of a listing.
#[derive(Clone, Debug)]
pub struct ListedWal {
    /// What it is; `None` for what isn't ours.
    pub object: Option<RepositoryObject>,
    /// As it was listed.
    pub listed: ListedObject,
}

impl ListedWal {
    /// The WAL segment that it is, if it is one.
    pub fn segment(&self) -> Option<SegmentName> {
        self.object.as_ref().and_then(RepositoryObject::segment)
    }
}

impl WalListing<'_> {
    /// The next page; `None` after the last one.
    ///
    /// # Errors
    /// The store's.
    pub async fn next(&mut self) -> Result<Option<Vec<ListedWal>>, Failure> {
        let Some(page) = self.pages.next().await? else { return Ok(None) };
        let layout = self.repository.layout();
        let objects = page.objects.into_iter();
        Ok(Some(objects.map(|listed| ListedWal { object: layout.parse(&listed.key), listed }).collect()))
    }
}

impl Repository {
    /// All WAL, or that of one timeline.
    pub fn list_wal(&self, timeline: Option<TimelineId>) -> WalListing<'_> {
        let prefix = timeline.map_or_else(|| self.layout.wal_prefix(), |only| self.layout.timeline_prefix(only));
        WalListing { repository: self, pages: Pages::new(&*self.store, ListRequest::under(prefix)) }
    }

    /// The WAL of a timeline from this segment on. What comes before it isn't asked for.
    pub fn list_wal_from(&self, first: SegmentName) -> WalListing<'_> {
        // The key without its ending sorts directly before it.
        let first_key = self.layout.wal(&ArchiveFileName::Segment(first));
        let after = first_key.as_str().strip_suffix(".zst").unwrap_or(first_key.as_str()).to_owned();
        let request = ListRequest::under(self.layout.timeline_prefix(first.timeline())).after(after);
        WalListing { repository: self, pages: Pages::new(&*self.store, request) }
    }

    /// Whether there is a segment of this timeline.
    ///
    /// # Errors
    /// The store's.
    pub async fn has_segments(&self, timeline: TimelineId) -> Result<bool, Failure> {
        let mut listing = self.list_wal(Some(timeline));
        while let Some(page) = listing.next().await? {
            if page.iter().any(|listed| listed.segment().is_some()) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Those of these timelines of which there is nothing but the history; those that are `backed_up` aren't looked at.
    ///
    /// # Errors
    /// The store's.
    pub async fn begun_only(
        &self,
        histories: &[TimelineHistory],
        backed_up: BTreeSet<TimelineId>,
    ) -> Result<BTreeSet<TimelineId>, Failure> {
        let mut begun_only = BTreeSet::new();
        for timeline in histories.iter().map(TimelineHistory::timeline).filter(|timeline| !backed_up.contains(timeline))
        {
            let tails = ListRequest { limit: 1, ..ListRequest::under(self.layout.tails_prefix(timeline)) };
            if !self.has_segments(timeline).await? && self.store.list(&tails).await?.objects.is_empty() {
                tracing::info!(
                    "timeline {timeline} was begun, and there is nothing else of it: only who names it gets there"
                );
                begun_only.insert(timeline);
            }
        }
        Ok(begun_only)
    }

    /// Lists WAL into a scan, until it `reaches` a point or the archive ends.
    ///
    /// # Errors
    /// The store's.
    pub async fn scan_wal(&self, mut scan: WalScan, until: Option<Lsn>) -> Result<WalScan, Failure> {
        for first in scan.listings() {
            let mut pages = self.list_wal_from(first);
            while let Some(page) = pages.next().await? {
                for wal in page {
                    if let Some(segment) = wal.segment() {
                        scan.found(segment, wal.listed.size, wal.listed.modified);
                    }
                }
                if until.is_some_and(|lsn| scan.reaches(lsn)) {
                    return Ok(scan);
                }
            }
        }
        Ok(scan)
    }

    /// The cluster's record. Without one the repository knows nothing of this database: what is missing can't be told
    /// then, because everything would be.
    ///
    /// # Errors
    /// [`Code::WrongCluster`] if there is none; the store's.
    pub async fn known_cluster(&self) -> Result<ClusterRecord, Failure> {
        self.read_json(&RepositoryObject::Cluster).await?.ok_or_else(|| {
            Failure::new(
                Code::WrongCluster,
                format!(
                    "the repository has nothing of a database with system identifier {} under the name {}",
                    self.layout.system(),
                    self.layout.cluster()
                ),
            )
            .hint("Check PGSIDECAR_REPOSITORY and PGSIDECAR_CLUSTER. PostgreSQL isn't told that its archive ends here.")
        })
    }
}
