//! Timelines and their histories.

use pgsidecar_core::{ArchiveFileName, TimelineHistory, TimelineId};

use super::{Repository, damaged};
use crate::{
    failure::Failure,
    store::{ListRequest, Pages},
};

impl Repository {
    /// The timelines that have WAL or a history.
    ///
    /// # Errors
    /// The store's.
    pub async fn timelines(&self) -> Result<Vec<TimelineId>, Failure> {
        let mut timelines = Vec::new();
        let mut pages = Pages::new(&*self.store, ListRequest::shallow(self.layout.wal_prefix()));
        while let Some(page) = pages.next().await? {
            timelines.extend(page.prefixes.iter().filter_map(|prefix| self.layout.timeline_of_prefix(prefix)));
        }
        Ok(timelines)
    }

    /// A timeline's history file, as PostgreSQL wrote it.
    ///
    /// # Errors
    /// The store's; [`Code::Damaged`].
    pub async fn history_file(&self, timeline: TimelineId) -> Result<Option<Vec<u8>>, Failure> {
        let key = self.layout.wal(&ArchiveFileName::History(timeline));
        Ok(self.read_plain(&key, Vec::new()).await?.map(|(bytes, _)| bytes))
    }

    /// A timeline's history, if the repository has its file.
    ///
    /// # Errors
    /// The store's; [`Code::Damaged`].
    pub async fn history(&self, timeline: TimelineId) -> Result<Option<TimelineHistory>, Failure> {
        let Some(bytes) = self.history_file(timeline).await? else { return Ok(None) };
        let parsed = TimelineHistory::parse(timeline, &bytes);
        let name = ArchiveFileName::History(timeline);
        parsed.map(Some).map_err(|error| damaged(&name.to_string(), &error.to_string()))
    }
}
