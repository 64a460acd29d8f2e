//! Pinned backups that retention has left alone on their way: the WAL behind their own end went because nothing needs it,
//! so that it isn't missing.

use std::collections::BTreeSet;

use pgsidecar_core::{
    BackupId, BackupRecord, TimelineHistory, TimelineId,
    plan::{Catalog, WalScan},
};

use crate::{
    failure::Failure,
    repository::{Repository, pins},
};

/// Takes the backups out of the catalog that are kept only because of a pin: pinned, or built on by a pinned one, whole
/// with their own WAL, and without the segment behind it on any way, although there are newer backups.
///
/// # Errors
/// The store's.
pub async fn set_apart(repository: &Repository, catalog: &mut Catalog) -> Result<(), Failure> {
    let mut pinned: BTreeSet<BackupId> = pins::list(repository).await?;
    // Parents have smaller ids: from the newest on, each is seen after what builds on it.
    let mut by_age: Vec<&BackupRecord> = catalog.backups.iter().collect();
    by_age.sort_by_key(|record| std::cmp::Reverse(record.id));
    for record in by_age {
        pinned.extend(record.parent.filter(|_| pinned.contains(&record.id)));
    }
    let newest = catalog.backups.iter().filter(|record| !pinned.contains(&record.id)).map(|record| record.id).max();
    let mut apart = BTreeSet::new();
    for record in catalog.backups.iter().filter(|record| pinned.contains(&record.id) && newest > Some(record.id)) {
        if ends_alone(repository, catalog, record).await? {
            apart.insert(record.id);
        }
    }
    catalog.backups.retain(|record| !apart.contains(&record.id));
    Ok(())
}

/// Whether a backup has its own WAL and not the segment behind it.
async fn ends_alone(repository: &Repository, catalog: &Catalog, record: &BackupRecord) -> Result<bool, Failure> {
    let size = record.wal_segment_size;
    let last = size.previous_segment_number(record.stop_lsn).max(size.segment_number(record.start_lsn));
    let (own, behind) = (size.start_of(last), size.start_of(last.saturating_add(1)));
    let first = TimelineHistory::first(TimelineId::FIRST);
    let leads_on = |history: &&TimelineHistory| history.contains(record.timeline, record.stop_lsn);
    let ways = catalog.histories.iter().chain([&first]).filter(leads_on);
    let mut is_whole = false;
    for way in ways {
        let scan = WalScan::new(way.clone(), size, record.start_lsn);
        let seen = repository.scan_wal(scan, Some(behind)).await?;
        if seen.reaches(behind) {
            return Ok(false);
        }
        is_whole |= seen.reaches(own);
    }
    Ok(is_whole)
}
