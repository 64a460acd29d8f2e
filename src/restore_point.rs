//! Named restore points: made in PostgreSQL's WAL, and recorded in the repository, so that a restore finds them by name.
//!
//! The order of effects, and what a failure between two of them leaves:
//!
//! 1. The store is asked first: where it can't be, nothing is made.
//! 2. `pg_create_restore_point`. From here on the name is in the WAL. A crash leaves a restore point without a record:
//!    it can be restored to by its LSN, and [`record`] makes up for it.
//! 3. The record, a few tries. From here on plans find it.
//! 4. `pg_switch_wal`, and the segment arrives in the repository. From here on it can be restored to.

use std::time::Duration;

use pgsidecar_core::{
    ArchiveFileName, Lsn, SegmentName, TimelineId, WalSegmentSize,
    backup_manifest::WalRange,
    layout::RepositoryObject,
    recovery::RestorePointName,
    restore_point::{RESTORE_POINT_FORMAT, RestorePointRecord},
    wal_records::{RecordContent, WalRecords},
};
use serde::{Deserialize, Serialize};

use crate::{
    backup::{
        check_same_server,
        complete::{WalNeed, wait_for_wal},
    },
    failure::{Code, Failure},
    histories,
    pgdata::DataDirectory,
    postgres::Session,
    repository::Repository,
    settings::WorkSettings,
};

/// How often it's tried to store the record before it's given up, and how long after the first time; doubled each time.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(500);

/// What is wanted.
#[derive(Clone, Debug)]
pub struct RestorePointRequest {
    /// Its name.
    pub name: RestorePointName,
    /// What is to happen with its WAL.
    pub shipping: Shipping,
}

/// What is to happen with the WAL in which a restore point lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shipping {
    /// The segment is ended, and it's waited until that has arrived in the repository.
    #[default]
    Wait,
    /// The segment is ended.
    Switch,
    /// The segment is archived when it's full, or `archive_timeout` ends it.
    Later,
}

/// A restore point that was made.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct CreatedRestorePoint {
    /// Its record.
    #[serde(flatten)]
    pub record: RestorePointRecord,
    /// Whether its WAL is known to be in the repository, so that it can be restored to.
    pub archived: bool,
}

/// Makes a restore point.
///
/// # Errors
/// PostgreSQL's and the store's; [`Code::Timeout`] if its WAL doesn't arrive. Each says whether the restore point was
/// made.
///
/// # Cancellation
/// Not to be dropped: a restore point could stay without its record.
pub async fn create(
    repository: &Repository,
    pgdata: &DataDirectory,
    settings: &WorkSettings,
    request: RestorePointRequest,
) -> Result<CreatedRestorePoint, Failure> {
    let session = Session::connect(&settings.connection).await?;
    let control = pgdata.control()?;
    if session.server().in_recovery {
        return Err(Failure::new(Code::PostgresUnavailable, "the server is a standby: it can't make restore points")
            .hint("Ask the primary's pgsidecar. Nothing was made."));
    }
    check_same_server(&session, &control, pgdata)?;
    repository.note_cluster(control.wal_segment_size).await?;
    histories::ship(repository, pgdata).await?;
    let made = session.create_restore_point(request.name.as_str()).await?;
    let record = RestorePointRecord {
        format: RESTORE_POINT_FORMAT,
        name: request.name,
        lsn: made.lsn,
        timeline: made.timeline,
        created_at: made.at,
        system_identifier: control.system_identifier,
        writer: format!("pgsidecar {}", env!("CARGO_PKG_VERSION")),
    };
    tracing::info!(name = %record.name, lsn = %record.lsn, timeline = %record.timeline, "restore point made");
    let stored = store(repository, &record).await;
    stored.map_err(|failure| {
        let RestorePointRecord { name, lsn, timeline, .. } = &record;
        failure.context(format!("the restore point {name:?} is in the WAL, at {lsn} on timeline {timeline}, but couldn't be recorded", name = name.as_str()))
            .hint(format!("Once its WAL is archived and the store can be reached, 'pgsidecar restore-point record {name:?} --lsn {lsn}' makes up for it; --target-lsn {lsn} --target-exclusive leads there without a record.", name = name.as_str()))
    })?;
    if request.shipping == Shipping::Later {
        return Ok(CreatedRestorePoint { record, archived: false });
    }
    let recorded = |failure: Failure| {
        failure.context(format!("the restore point is recorded, at {}, but can't be restored to yet", record.lsn))
    };
    session.leave_segment().await.map_err(recorded)?;
    if request.shipping == Shipping::Switch {
        return Ok(CreatedRestorePoint { record, archived: false });
    }
    let need = WalNeed {
        what: format!("restore point {:?}", record.name.as_str()),
        range: WalRange { timeline: record.timeline, start: before(record.lsn), end: record.lsn },
        segment_size: control.wal_segment_size,
        from_standby: false,
    };
    wait_for_wal(repository, pgdata, &need, settings.backup_wal_timeout).await.map_err(recorded)?;
    Ok(CreatedRestorePoint { record, archived: true })
}

/// The last byte of a record that ends here.
fn before(lsn: Lsn) -> Lsn {
    Lsn::new(lsn.bytes().saturating_sub(1))
}

async fn store(repository: &Repository, record: &RestorePointRecord) -> Result<(), Failure> {
    let place = RepositoryObject::RestorePoint(record.timeline, record.lsn);
    let mut tries = 0;
    loop {
        match repository.store_json(&place, record).await {
            Ok(_) => return Ok(()),
            Err(failure) if failure.code == Code::StoreUnavailable && tries + 1 < TRIES => {
                tracing::warn!("recording a restore point: {failure}; trying again");
                tokio::time::sleep(PAUSE * 2_u32.pow(tries)).await;
                tries += 1;
            }
            Err(failure) => return Err(failure),
        }
    }
}

/// Records a restore point that is in the archived WAL: one that was made with `pg_create_restore_point`, or whose record
/// was lost. Answers with what is recorded, also if it was before.
///
/// # Errors
/// [`Code::NotFound`] if no restore point of this name ends there; the store's.
pub async fn record(
    repository: &Repository,
    name: RestorePointName,
    lsn: Lsn,
    timeline: TimelineId,
) -> Result<RestorePointRecord, Failure> {
    let size = repository.known_cluster().await?.wal_segment_size;
    let Some(created_at) = find(repository, &name, lsn, timeline, size).await? else {
        return Err(Failure::new(
            Code::NotFound,
            format!("in the archived WAL of timeline {timeline}, no restore point {:?} ends at {lsn}", name.as_str()),
        )
        .hint("The LSN is what pg_create_restore_point() answered. Its segment has to be archived: SELECT pg_switch_wal() ships it."));
    };
    let known = repository.restore_points().await?;
    if let Some(known) = known.into_iter().find(|point| (point.timeline, point.lsn) == (timeline, lsn)) {
        return Ok(known);
    }
    let record = RestorePointRecord {
        format: RESTORE_POINT_FORMAT,
        name,
        lsn,
        timeline,
        created_at,
        system_identifier: repository.layout().system(),
        writer: format!("pgsidecar {}", env!("CARGO_PKG_VERSION")),
    };
    store(repository, &record).await?;
    Ok(record)
}

/// When the restore point was made, going by the WAL; `None` if it isn't there.
async fn find(
    repository: &Repository,
    name: &RestorePointName,
    lsn: Lsn,
    timeline: TimelineId,
    size: WalSegmentSize,
) -> Result<Option<jiff::Timestamp>, Failure> {
    let last = size.previous_segment_number(lsn);
    // The record may begin in the segment before.
    let first = last.saturating_sub(1);
    let mut state = (WalRecords::new(size.start_of(first)), None);
    for number in first..=last {
        let segment = SegmentName::from_number(timeline, number, size);
        let key = repository.layout().wal(&ArchiveFileName::Segment(segment));
        let name = name.clone();
        let looked = repository.read_while(&key, state, move |(walk, found), bytes| {
            walk.feed(bytes, |record| match record.content {
                RecordContent::RestorePoint { name: there, time } if record.end == lsn && there == name.as_str() => {
                    *found = Some(time);
                }
                _ => {}
            });
            walk.ended().is_none()
        });
        match looked.await? {
            Some(looked) => state = looked,
            None if number < last => state = (WalRecords::new(size.start_of(last)), None),
            None => return Ok(None),
        }
    }
    Ok(state.1)
}
