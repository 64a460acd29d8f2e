//! Planning a restore: which backup, which timeline, which WAL, and where recovery will end.

use pgsidecar_core::{
    ArchiveFileName, Lsn, SegmentName, TimelineHistory, WalSegmentSize,
    plan::{ExpectedEnd, RestorePlan, RestoreRequest, Search, WalFacts, WalScan, select},
    recovery::RecoveryTarget,
};

use crate::{
    failure::{Code, Failure},
    repository::{Repository, damaged},
};

/// How many segments behind a position are listed: the first record behind it may be there.
const BEHIND: u64 = 8;

/// Plans a restore: which backup, which timeline, which WAL. Reads as much of the WAL as it takes to say where recovery
/// will end, and says so where that would be too much.
///
/// # Errors
/// [`crate::failure::Code::TargetUnreachable`] if the target can't be reached; the store's.
pub async fn plan(repository: &Repository, request: RestoreRequest) -> Result<RestorePlan, Failure> {
    let selection = select(&repository.catalog().await?, &request)?;
    let (history, size) = (selection.history.clone(), selection.backup.wal_segment_size);
    let range = (selection.backup.start_lsn, selection.backup.stop_lsn);
    let point = selection.restore_point.as_ref().map(|point| point.lsn);
    let facts = list(repository, &history, size, range, (&request.target, point)).await?;
    let plan = RestorePlan::new(selection, request.target, facts)?;
    match plan.search(request.inclusive, facts) {
        None => Ok(plan),
        Some(search) => {
            let end = look(repository, &history, size, search).await?;
            Ok(plan.expecting(end))
        }
    }
}

/// Lists the WAL from a start on that is consistent at a stop, as far as it takes for a target; with that, where a restore
/// point lies.
pub(super) async fn list(
    repository: &Repository,
    history: &TimelineHistory,
    size: WalSegmentSize,
    (start, stop): (Lsn, Lsn),
    (target, point): (&RecoveryTarget, Option<Lsn>),
) -> Result<WalFacts, Failure> {
    let behind = |lsn: Lsn| Some(size.start_of(size.segment_number(lsn.max(stop)) + BEHIND));
    // How far the listing must go. A time or a transaction can lie anywhere.
    let until = match (target, point) {
        (RecoveryTarget::Immediate, _) => Some(size.start_of(size.previous_segment_number(stop))),
        (RecoveryTarget::Lsn(lsn), _) => behind(*lsn),
        (RecoveryTarget::Name(_), Some(point)) => behind(point),
        _ => None,
    };
    let mut scan = WalScan::new(history.clone(), size, start);
    if let RecoveryTarget::Time(time) = target {
        scan = scan.noting(*time);
    }
    Ok(repository.scan_wal(scan, until).await?.finish())
}

/// Reads the segments that a search asks for.
pub(super) async fn look(
    repository: &Repository,
    history: &TimelineHistory,
    size: WalSegmentSize,
    mut search: Search,
) -> Result<ExpectedEnd, Failure> {
    while let Some(number) = search.next_segment() {
        let timeline = history.timeline_of_segment(number, size).unwrap_or(history.timeline());
        let segment = SegmentName::from_number(timeline, number, size);
        let key = repository.layout().wal(&ArchiveFileName::Segment(segment));
        tracing::trace!(%segment, "looking for the target");
        let read = match repository.read_while(&key, search, |search, bytes| search.feed(bytes)).await {
            // It may lie behind the target, and not be needed. Where it is, PostgreSQL won't get it.
            Err(failure) if failure.code == Code::Damaged => {
                return Ok(ExpectedEnd::NotVerified { because: failure.message });
            }
            read => read?,
        };
        search = read.ok_or_else(|| damaged(key.as_str(), "it was there a moment ago, and isn't any more"))?;
        search.segment_read()?;
    }
    Ok(search.finish())
}
