//! What the archive holds of each timeline. One pass over the listing; memory depends on the gaps alone.

use std::collections::BTreeMap;

use jiff::Timestamp;
use pgsidecar_core::{
    ArchiveFileName, ArchivedWal, Lsn, SegmentName, SegmentRange, SystemIdentifier, TimelineId, WalSegmentSize,
    layout::RepositoryObject,
};
use serde::Serialize;

use crate::{
    failure::{Code, Failure},
    repository::Repository,
};

/// What the archive holds.
#[derive(Clone, Debug, Serialize)]
pub struct Survey {
    /// The database system.
    pub system_identifier: SystemIdentifier,
    /// The size of its WAL segments in bytes.
    pub wal_segment_size: WalSegmentSize,
    /// Each timeline, in order.
    pub timelines: Vec<TimelineSurvey>,
    /// Objects among the WAL that aren't pgsidecar's.
    pub foreign_objects: u64,
}

/// What the archive holds of a timeline.
#[derive(Clone, Debug, Serialize)]
pub struct TimelineSurvey {
    /// The timeline.
    pub timeline: TimelineId,
    /// The timeline that it was begun from; `None` for the first, and where the history is missing or damaged.
    pub parent: Option<TimelineId>,
    /// Where it left its parent.
    pub switch_point: Option<Lsn>,
    /// The first segment that is there.
    pub first: Option<SegmentName>,
    /// The last segment that is there.
    pub last: Option<SegmentName>,
    /// How many segments are there.
    pub segments: u64,
    /// The bytes that they take in the repository.
    pub stored_bytes: u64,
    /// How many gaps are between the first and the last one.
    pub gaps: u64,
    /// How many segments are missing in these.
    pub missing_segments: u64,
    /// What is there without a gap; with more than [`pgsidecar_core::MAX_GAPS`] gaps, the oldest ranges.
    pub ranges: Vec<SegmentRange>,
    /// When the first of them was stored, by the store's clock.
    pub oldest_stored_at: Option<Timestamp>,
    /// When the last of them was stored.
    pub newest_stored_at: Option<Timestamp>,
}

/// Looks through the archive, or through one timeline of it.
///
/// # Errors
/// [`Code::NotFound`] if there is nothing of the timeline; [`Code::WrongCluster`]; the store's.
pub async fn survey(repository: &Repository, only: Option<TimelineId>) -> Result<Survey, Failure> {
    let size = repository.known_cluster().await?.wal_segment_size;
    let mut timelines: BTreeMap<TimelineId, (ArchivedWal, bool)> = BTreeMap::new();
    let mut foreign_objects = 0;
    let mut pages = repository.list_wal(only);
    while let Some(page) = pages.next().await? {
        for wal in page {
            match wal.object {
                Some(RepositoryObject::Wal(name)) => {
                    let timeline = name.timeline();
                    let (archived, has_history) =
                        timelines.entry(timeline).or_insert_with(|| (ArchivedWal::new(timeline, size), false));
                    match name {
                        ArchiveFileName::Segment(segment) => {
                            archived.found(segment, wal.listed.size, wal.listed.modified);
                        }
                        ArchiveFileName::History(_) => *has_history = true,
                        _ => {}
                    }
                }
                Some(_) => {}
                None => foreign_objects += 1,
            }
        }
    }
    if let Some(timeline) = only.filter(|_| timelines.is_empty()) {
        return Err(Failure::new(Code::NotFound, format!("the archive holds nothing of timeline {timeline}"))
            .hint("'pgsidecar wal list' shows the timelines."));
    }
    let mut surveys = Vec::new();
    for (timeline, (archived, has_history)) in timelines {
        foreign_objects += archived.misnamed();
        let origin = match has_history {
            true => origin(repository, timeline).await?,
            false => None,
        };
        surveys.push(TimelineSurvey {
            timeline,
            parent: origin.map(|(parent, _)| parent),
            switch_point: origin.map(|(_, switch_point)| switch_point),
            first: archived.first(),
            last: archived.last(),
            segments: archived.segments(),
            stored_bytes: archived.stored_bytes(),
            gaps: archived.gaps(),
            missing_segments: archived.missing_segments(),
            ranges: archived.ranges().collect(),
            oldest_stored_at: archived.stored_at().map(|(oldest, _)| oldest),
            newest_stored_at: archived.stored_at().map(|(_, newest)| newest),
        });
    }
    Ok(Survey {
        system_identifier: repository.layout().system(),
        wal_segment_size: size,
        timelines: surveys,
        foreign_objects,
    })
}

/// Where a timeline was begun. A damaged history hides only that.
async fn origin(repository: &Repository, timeline: TimelineId) -> Result<Option<(TimelineId, Lsn)>, Failure> {
    match repository.history(timeline).await {
        Ok(history) => Ok(history.and_then(|history| history.origin())),
        Err(failure) if failure.code == Code::Damaged => {
            tracing::warn!(hint = failure.hint, "{failure}");
            Ok(None)
        }
        Err(failure) => Err(failure),
    }
}
