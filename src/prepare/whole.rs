//! The plan that brings a database back as it was in the end, also where it was lost just after a promotion.
//!
//! A server that is promoted archives its timeline's history at once, and the first segment when that is full. Lost
//! between the two, the newest timeline can't be reached by whole segments. Somebody who restores by hand is told so,
//! and chooses; a volume that heals itself has to choose by itself: what a stopped server kept of that segment (its
//! tail) leads to the newest timeline all the same. Where there is none, nothing of that timeline ever reached the
//! repository, and every plan passes it over: the one before it is the end of everything that did.

use pgsidecar_core::{
    SegmentName, TimelineHistory,
    plan::{RestorePlan, RestoreRequest},
    recovery::RecoveryTarget,
};

use crate::{
    failure::{Code, Failure},
    repository::Repository,
    restore,
    wal::tail,
};

/// A timeline of which there is nothing but a tail.
struct OnlyTail {
    history: TimelineHistory,
    first: SegmentName,
}

/// Plans the restore of all there is.
///
/// # Errors
/// As [`restore::plan`].
pub async fn plan(repository: &Repository) -> Result<RestorePlan, Failure> {
    let all = |timeline| RestoreRequest { target: RecoveryTarget::Latest, timeline, backup: None, inclusive: true };
    let unreachable = match restore::plan(repository, all(None)).await {
        Err(failure) if failure.code == Code::TargetUnreachable => failure,
        planned => return planned,
    };
    let size = repository.known_cluster().await?.wal_segment_size;
    let mut timelines = repository.timelines().await?;
    timelines.sort_unstable();
    let mut newest: Option<OnlyTail> = None;
    while let Some(timeline) = timelines.pop() {
        if repository.has_segments(timeline).await? {
            let Ok(mut plan) = restore::plan(repository, all(Some(timeline))).await else { return Err(unreachable) };
            if let Some(OnlyTail { history, first }) = newest
                && history.contains(plan.backup.timeline, plan.backup.stop_lsn)
                && first.number(size).is_some_and(|number| size.start_of(number) <= plan.reachable)
            {
                plan.timeline = history.timeline();
            }
            return Ok(plan);
        }
        let Some(history) = repository.history(timeline).await? else { continue };
        let begin = history.spans().last().map(|span| size.segment_number(span.begin));
        let first = begin.map(|number| SegmentName::from_number(timeline, number, size));
        match first {
            Some(first) if newest.is_none() && tail::newest(repository, first).await?.is_some() => {
                tracing::info!("of timeline {timeline} there is what the stopped server had of {first}");
                newest = Some(OnlyTail { history, first });
            }
            _ => tracing::warn!("timeline {timeline} was begun, and nothing of it has been archived: it's passed over"),
        }
    }
    Err(unreachable)
}
