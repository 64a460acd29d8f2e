//! Snapshots by the storage: PostgreSQL's backup mode, held open by the daemon while somebody else snapshots the volumes.
//!
//! The order of effects:
//!
//! 1. `pg_backup_start`, in a session that the daemon holds. When the checkpoint is through, the storage may snapshot.
//! 2. Until the time limit, the session stays. It ends with the daemon, with the server, and when the time is up; then
//!    PostgreSQL forgets the backup by itself, and the snapshot can't be used any more: nothing says where its WAL ends.
//! 3. `pg_control` is read, then `pg_backup_stop`; the session is closed, whatever comes.
//! 4. The WAL from start to stop must be in the repository, with a deadline.
//! 5. `snapshot.json`, the commit marker. From here on it's a snapshot.
//!
//! Nothing is in the repository before step 5, so that there is nothing to be removed. One snapshot at a time; a base
//! backup may run beside it.

mod slot;

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use pgsidecar_core::{
    ControlFile, Lsn, SnapshotId, SnapshotRecord,
    backup::TablespaceRecord,
    backup_label::{BackupLabel, TablespaceMap},
    backup_manifest::WalRange,
    layout::RepositoryObject,
    snapshot::{ControlBytes, SNAPSHOT_FORMAT},
};
use serde::{Deserialize, Serialize};

pub use self::slot::Snapshots;
use crate::{
    backup::{
        check_label, check_same_server,
        complete::{WalNeed, wait_for_wal},
    },
    failure::{Code, Failure},
    histories,
    pgdata::DataDirectory,
    postgres::{BackupStart, ServerFacts, Session},
    repository::Repository,
    settings::WorkSettings,
};

/// What `begin` is asked for.
#[derive(Clone, Debug)]
pub struct SnapshotRequest {
    /// For `backup_label`; people see it, and `end` can go by it.
    pub label: String,
    /// Whether the checkpoint at the start is immediate instead of spread.
    pub fast: bool,
    /// How long the snapshot may stay open.
    pub timeout: Duration,
}

/// A snapshot that is open, as it's told.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct OpenSnapshot {
    /// Its id.
    pub id: SnapshotId,
    /// What whoever began it called it.
    pub label: String,
    /// Where replay will begin.
    pub start_lsn: Lsn,
    /// The server's clock when `pg_backup_start` had returned.
    pub started_at: Timestamp,
    /// When it's given up, by the daemon's clock.
    pub expires_at: Timestamp,
}

/// `GET /v1/snapshots`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct SnapshotList {
    /// The one that is open.
    pub open: Option<OpenSnapshot>,
    /// Those in the repository, oldest first.
    pub complete: Vec<SnapshotRecord>,
}

/// What belongs to one snapshot from its beginning to its end.
struct Begun {
    told: OpenSnapshot,
    repository: Repository,
    pgdata: DataDirectory,
    control: ControlFile,
    server: ServerFacts,
    session: Arc<Session>,
    wal_timeout: Duration,
}

impl Begun {
    /// Step 1. With it, how long it may last.
    async fn begin(
        repository: Repository,
        pgdata: DataDirectory,
        settings: &WorkSettings,
        request: SnapshotRequest,
    ) -> Result<Begun, Failure> {
        let session = Session::connect(&settings.connection).await?;
        let control = pgdata.control()?;
        check_same_server(&session, &control, &pgdata)?;
        repository.note_cluster(control.wal_segment_size).await?;
        histories::ship(&repository, &pgdata).await?;
        tracing::info!(label = request.label, fast = request.fast, "snapshot: waiting for the checkpoint");
        let start = session.backup_start(&request.label, request.fast).await?;
        let BackupStart { lsn, at } = start;
        let id = slot::free_id(&repository).await?;
        let expires_at = Timestamp::now().checked_add(request.timeout).map_err(Failure::internal)?;
        let told = OpenSnapshot { id, label: request.label, start_lsn: lsn, started_at: at, expires_at };
        tracing::info!(snapshot = %id, start_lsn = %lsn, until = %expires_at, "snapshot: the storage may snapshot now");
        let server = session.server().clone();
        let wal_timeout = settings.backup_wal_timeout;
        Ok(Begun { told, repository, pgdata, control, server, session: Arc::new(session), wal_timeout })
    }

    /// Steps 3 to 5.
    async fn end(self, stopping: impl Future<Output = ()>) -> Result<SnapshotRecord, Failure> {
        let Begun { told, repository, pgdata, control, server, session, wal_timeout } = self;
        let directory = pgdata.clone();
        let (bytes, at_end) = tokio::task::spawn_blocking(move || directory.control_bytes()).await??;
        if at_end.system_identifier != control.system_identifier {
            return Err(Failure::new(Code::WrongCluster, "the data directory was replaced by another database"));
        }
        let stop = session.backup_stop().await?;
        drop(session);
        tracing::info!(snapshot = %told.id, stop_lsn = %stop.lsn, "snapshot: PostgreSQL released");
        let label: BackupLabel = stop.label_file.parse().map_err(Failure::internal)?;
        let tablespaces: TablespaceMap = stop.tablespace_map.parse().map_err(Failure::internal)?;
        check_tablespaces(&pgdata, &tablespaces)?;
        let record = SnapshotRecord {
            format: SNAPSHOT_FORMAT,
            id: told.id,
            label: told.label,
            system_identifier: control.system_identifier,
            server_version: server.version,
            catalog_version: control.catalog_version,
            timeline: label.timeline,
            start_lsn: told.start_lsn,
            checkpoint_lsn: label.checkpoint,
            stop_lsn: stop.lsn,
            started_at: told.started_at,
            stopped_at: stop.at,
            next_xid_at_stop: stop.next_xid,
            from_standby: server.in_recovery,
            wal_segment_size: control.wal_segment_size,
            block_size: control.block_size,
            tablespaces: tablespaces.0.into_iter().map(|(oid, location)| TablespaceRecord { oid, location }).collect(),
            backup_label: stop.label_file,
            tablespace_map: stop.tablespace_map,
            pg_control: ControlBytes::of(&bytes).ok_or_else(|| Failure::internal("pg_control of 512 bytes"))?,
            writer: concat!("pgsidecar ", env!("CARGO_PKG_VERSION")).to_owned(),
        };
        // What doesn't fit now could never be restored.
        record
            .fits(&at_end)
            .map_err(|misfit| Failure::new(Code::DataDirectory, format!("{} {misfit}", pgdata.path().display())))?;
        let need = WalNeed {
            what: format!("snapshot {}", record.id),
            range: WalRange { timeline: record.timeline, start: record.start_lsn, end: record.stop_lsn },
            segment_size: record.wal_segment_size,
            from_standby: record.from_standby,
        };
        tokio::select! {
            arrived = wait_for_wal(&repository, &pgdata, &need, wal_timeout) => arrived?,
            () = stopping => return Err(Failure::new(Code::Stopping, "pgsidecar is stopping, and its WAL has not arrived yet")),
        }
        repository.store_json(&RepositoryObject::Snapshot(record.id), &record).await?;
        tracing::info!(snapshot = %record.id, stop_lsn = %record.stop_lsn, "snapshot complete");
        Ok(record)
    }
}

/// Refuses what a restore couldn't lead back: a tablespace that came after the start is in no map, so that its place
/// can't be chosen.
fn check_tablespaces(pgdata: &DataDirectory, map: &TablespaceMap) -> Result<(), Failure> {
    let directory = pgdata.path().join("pg_tblspc");
    let entries = std::fs::read_dir(&directory).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let entries = entries.map_err(|error| Failure::io(format!("reading {}", directory.display()), &error))?;
    let late = entries.iter().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_symlink())).find_map(|entry| {
        let oid: u32 = entry.file_name().to_str()?.parse().ok()?;
        (!map.0.iter().any(|(known, _)| *known == oid)).then_some(oid)
    });
    match late {
        None => Ok(()),
        Some(oid) => Err(Failure::new(Code::Busy, format!("the tablespace {oid} was created while it was open"))),
    }
}

/// The same failure, said of a snapshot that nothing can be made of any more.
fn unusable(id: SnapshotId, failure: Failure) -> Failure {
    let hint = format!(
        "{}{}Delete what the storage has snapshotted, and begin again.",
        failure.hint,
        if failure.hint.is_empty() { "" } else { " " }
    );
    Failure { message: format!("snapshot {id} must not be used: {}", failure.message), hint, ..failure }
}

/// Checks what `begin` was asked for.
fn check_request(request: &SnapshotRequest) -> Result<(), Failure> {
    check_label(&request.label)?;
    crate::settings::check_snapshot_timeout(request.timeout)
        .map_err(|problem| Failure::new(Code::InvalidRequest, format!("the time limit: {problem}")))
}
