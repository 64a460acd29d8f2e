//! What must hold before a backup is one: its WAL is in the repository, and so is every object of it.

use std::{collections::BTreeMap, time::Duration};

use pgsidecar_core::{
    ArchiveFileName, BackupRecord, ObjectKey, SegmentName, TimelineHistory, TimelineId, layout::BackupObject,
    plan::WalScan,
};

use crate::{
    failure::{Code, Failure},
    pgdata::DataDirectory,
    repository::Repository,
    store::{ListRequest, Pages},
};

/// How soon it's looked again for WAL that isn't there yet. It mostly comes within a few hundredths of a second, and then
/// hardly anything else is left to do: each time it's twice as long, up to a bound.
const WAL_POLL: Duration = Duration::from_millis(20);
const WAL_POLL_MOST: Duration = Duration::from_millis(500);

/// Waits until all the WAL of the backup is in the repository, and PostgreSQL knows it: a name that is there while
/// PostgreSQL still asks to have its own file archived may be another server's.
///
/// # Errors
/// The store's; [`Code::Timeout`] with the segment that doesn't come.
pub async fn wait_for_wal(
    repository: &Repository,
    pgdata: &DataDirectory,
    record: &BackupRecord,
    timeout: Duration,
) -> Result<(), Failure> {
    let size = record.wal_segment_size;
    let last = size.start_of(size.previous_segment_number(record.stop_lsn));
    let history = history_of(repository, record.timeline).await?;
    let began = tokio::time::Instant::now();
    let mut told = false;
    let mut pause = WAL_POLL;
    // What has been seen isn't listed again: the scan goes on where it was.
    let mut scan = WalScan::new(history, size, record.start_lsn);
    loop {
        let looked = repository.scan_wal(scan.clone(), Some(last)).await;
        let missing = match looked {
            Ok(seen) if seen.reaches(last) => match unacknowledged(pgdata, record) {
                None => return Ok(()),
                Some(segment) => Ok(segment),
            },
            Ok(seen) => {
                let missing = seen.finish().missing;
                scan = seen.resumed();
                Ok(missing)
            }
            Err(failure) => Err(failure),
        };
        if began.elapsed() > timeout {
            let missing = missing?;
            let failure = Failure::new(
                Code::Timeout,
                format!(
                    "WAL segment {missing}, which the backup needs, has not arrived in the repository within {timeout:?}"
                ),
            );
            return Err(if record.from_standby {
                failure.hint("Nothing makes a standby switch segments: run SELECT pg_switch_wal() on the primary, and look at its archive_command.")
            } else {
                failure.hint("Look at archive_command, at pg_stat_archiver and at PostgreSQL's log; 'pgsidecar check' tries the way.")
            });
        }
        if !told {
            tracing::info!(backup = %record.id, "base backup: waiting for its WAL to be archived");
            told = true;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(WAL_POLL_MOST);
    }
}

/// The first segment of the backup that PostgreSQL still wants to have archived.
fn unacknowledged(pgdata: &DataDirectory, record: &BackupRecord) -> Option<SegmentName> {
    let size = record.wal_segment_size;
    let numbers = size.segment_number(record.start_lsn)..=size.previous_segment_number(record.stop_lsn);
    let mut segments = numbers.map(|number| SegmentName::from_number(record.timeline, number, size));
    segments.find(|segment| pgdata.is_ready(&ArchiveFileName::Segment(*segment)))
}

/// The history of a timeline that the repository must know.
///
/// # Errors
/// The store's; [`Code::DataDirectory`] if it doesn't.
pub async fn history_of(repository: &Repository, timeline: TimelineId) -> Result<TimelineHistory, Failure> {
    let name = ArchiveFileName::History(timeline);
    match repository.history(timeline).await? {
        Some(history) => Ok(history),
        None if timeline == TimelineId::FIRST => Ok(TimelineHistory::first(timeline)),
        None => Err(Failure::new(Code::DataDirectory, format!("the timeline history {name} is neither in the repository nor in pg_wal"))
            .hint("Without it no restore can follow the timeline. Copy it from another server of the cluster into pg_wal and try again.")),
    }
}

/// Looks every object up once more: another run could have taken ours for remains.
///
/// # Errors
/// The store's; [`Code::Damaged`] with what isn't there.
pub async fn check_parts(repository: &Repository, record: &BackupRecord) -> Result<(), Failure> {
    let key = |object| repository.layout().backup(record.id, object);
    let mut missing: BTreeMap<ObjectKey, u64> =
        record.parts.iter().map(|part| (key(BackupObject::Part(part.number)), part.stored.size)).collect();
    missing.insert(key(BackupObject::Manifest), record.manifest.size);
    missing.insert(key(BackupObject::Index), record.index.size);
    let mut pages = Pages::new(repository.store(), ListRequest::under(repository.layout().backup_prefix(record.id)));
    while let Some(page) = pages.next().await? {
        for object in page.objects {
            if missing.get(&object.key) == Some(&object.size) {
                missing.remove(&object.key);
            }
        }
    }
    match missing.keys().next() {
        None => Ok(()),
        Some(key) => Err(Failure::new(Code::Damaged, format!("{key} was stored, and isn't there any more as it was"))
            .hint("Find out who deletes or changes objects in the repository, then take the backup again.")),
    }
}
