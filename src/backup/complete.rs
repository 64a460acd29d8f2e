//! What must hold before a backup is one: its WAL is in the repository, and so is every object of it.

use std::{collections::BTreeMap, time::Duration};

use pgsidecar_core::{
    ArchiveFileName, BackupRecord, ObjectKey, SegmentName, TimelineHistory, TimelineId, WalSegmentSize,
    backup_manifest::WalRange, chain, layout::BackupObject, plan::WalScan,
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

/// The WAL that has to be in the repository before something is complete.
#[derive(Clone, Debug)]
pub struct WalNeed {
    /// What needs it, for people: `backup ID`.
    pub what: String,
    /// From the segment of the start to that of the byte before the end.
    pub range: WalRange,
    /// Size of a segment.
    pub segment_size: WalSegmentSize,
    /// Whether the server is in recovery: then it doesn't switch segments by itself.
    pub from_standby: bool,
}

impl WalNeed {
    /// What a base backup needs.
    pub fn of(record: &BackupRecord) -> WalNeed {
        WalNeed {
            what: format!("backup {}", record.id),
            range: WalRange { timeline: record.timeline, start: record.start_lsn, end: record.stop_lsn },
            segment_size: record.wal_segment_size,
            from_standby: record.from_standby,
        }
    }
}

/// Waits until all the WAL that is needed is in the repository, and PostgreSQL knows it: a name that is there while
/// PostgreSQL still asks to have its own file archived may be another server's.
///
/// # Errors
/// The store's; [`Code::Timeout`] with the segment that doesn't come.
pub async fn wait_for_wal(
    repository: &Repository,
    pgdata: &DataDirectory,
    need: &WalNeed,
    timeout: Duration,
) -> Result<(), Failure> {
    let (size, range) = (need.segment_size, &need.range);
    let last = size.start_of(size.previous_segment_number(range.end));
    let history = history_of(repository, range.timeline).await?;
    let began = tokio::time::Instant::now();
    let mut told = false;
    let mut pause = WAL_POLL;
    // What has been seen isn't listed again: the scan goes on where it was.
    let mut scan = WalScan::new(history, size, range.start);
    loop {
        let looked = repository.scan_wal(scan.clone(), Some(last)).await;
        let missing = match looked {
            Ok(seen) if seen.reaches(last) => match unacknowledged(pgdata, need) {
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
                    "WAL segment {missing}, which {} needs, has not arrived in the repository within {timeout:?}",
                    need.what
                ),
            );
            return Err(if need.from_standby {
                failure.hint("Nothing makes a standby switch segments: run SELECT pg_switch_wal() on the primary, and look at its archive_command.")
            } else {
                failure.hint("Look at archive_command, at pg_stat_archiver and at PostgreSQL's log; 'pgsidecar check' tries the way.")
            });
        }
        if !told {
            tracing::info!("{}: waiting for its WAL to be archived", need.what);
            told = true;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(WAL_POLL_MOST);
    }
}

/// The first segment of these that PostgreSQL still wants to have archived.
fn unacknowledged(pgdata: &DataDirectory, need: &WalNeed) -> Option<SegmentName> {
    let (size, range) = (need.segment_size, &need.range);
    let numbers = size.segment_number(range.start)..=size.previous_segment_number(range.end);
    let mut segments = numbers.map(|number| SegmentName::from_number(range.timeline, number, size));
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

/// The objects of a backup that aren't in the repository, or not as they were stored. Looks at their sizes, not into them.
///
/// # Errors
/// The store's.
pub async fn missing_objects(repository: &Repository, record: &BackupRecord) -> Result<Vec<ObjectKey>, Failure> {
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
    Ok(missing.into_keys().collect())
}

/// Looks every object up once more: another run could have taken ours for remains.
///
/// # Errors
/// The store's; [`Code::Damaged`] with what isn't there.
pub async fn check_parts(repository: &Repository, record: &BackupRecord) -> Result<(), Failure> {
    match missing_objects(repository, record).await?.first() {
        None => Ok(()),
        Some(key) => Err(Failure::new(Code::Damaged, format!("{key} was stored, and isn't there any more as it was"))
            .hint("Find out who deletes or changes objects in the repository, then take the backup again.")),
    }
}

/// Looks once more for what an incremental backup builds on: it may have been removed meanwhile.
///
/// # Errors
/// The store's; [`Code::Damaged`] with what isn't there.
pub async fn check_chain(repository: &Repository, record: &BackupRecord) -> Result<(), Failure> {
    if record.parent.is_none() {
        return Ok(());
    }
    match chain::chain(record, &repository.backups().await?) {
        Ok(_) => Ok(()),
        Err(error) => Err(Failure::new(Code::Damaged, error.to_string()).hint("Take the backup again.")),
    }
}

/// The first segment that the backup needs and that isn't in the repository.
///
/// # Errors
/// The store's; [`Code::DataDirectory`] if the history of its timeline isn't there.
pub async fn missing_wal(repository: &Repository, record: &BackupRecord) -> Result<Option<SegmentName>, Failure> {
    let size = record.wal_segment_size;
    let last = size.start_of(size.previous_segment_number(record.stop_lsn));
    let scan = WalScan::new(history_of(repository, record.timeline).await?, size, record.start_lsn);
    let seen = repository.scan_wal(scan, Some(last)).await?;
    Ok((!seen.reaches(last)).then(|| seen.finish().missing))
}
