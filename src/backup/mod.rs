//! Taking a base backup.
//!
//! The order of effects, and what a crash between two of them leaves:
//!
//! 1. `started.json` claims the id. A crash from here on leaves objects without `backup.json`: not a backup, never
//!    listed, removed by the next run of the same pod.
//! 2. `pg_backup_start` in a session of its own. When we die the session ends, and PostgreSQL holds nothing.
//! 3. The files, in parallel, into parts; the lists grow along.
//! 4. `pg_control`, the last file that is read, so that its minimum recovery point covers every page of a standby's backup.
//! 5. `pg_backup_stop`; the session is closed, whatever comes.
//! 6. The last part: `backup_label`, `tablespace_map`, `pg_control`, `PG_VERSION`. Then the lists.
//! 7. The WAL from start to stop must be in the repository. PostgreSQL archives it meanwhile; we look, with a deadline.
//! 8. Every part is looked up once more: what is listed must be there.
//! 9. `backup.json`, the commit marker. From here on it's a backup.

pub mod listing;
pub mod pack;
pub mod part;
pub mod walk;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering::Relaxed},
    },
    time::Duration,
};

use jiff::Timestamp;
use pgsidecar_core::{
    ArchiveFileName, BackupId, BackupKind, BackupRecord, ControlFile, ObjectKey, SegmentName, TimelineHistory,
    TimelineId,
    backup::{BACKUP_FORMAT, TablespaceRecord},
    backup_label::{BackupLabel, TablespaceMap},
    backup_manifest::{ManifestVersion, ManifestWriter, WalRange},
    data_directory::tablespace_version_directory,
    layout::{BackupObject, RepositoryObject},
    plan::WalScan,
};
use tokio::runtime::Handle;

use self::{
    listing::Listing,
    pack::{LastFile, Packer, Progress, Source},
};
use crate::{
    failure::{Code, Failure},
    histories,
    pgdata::DataDirectory,
    postgres::{BackupStop, Session},
    repository::{BackupClaim, Repository},
    settings::WorkSettings,
    store::{ListRequest, Pages},
};

/// PostgreSQL's limit for the label is MAXPGPATH.
const MAX_LABEL_BYTES: usize = 1000;
const WAL_POLL: Duration = Duration::from_millis(500);
/// How many ids are tried: each second has one.
const CLAIM_TRIES: i64 = 10;

/// What is wanted.
#[derive(Clone, Debug)]
pub struct BackupRequest {
    /// For `backup_label`; people see it.
    pub label: String,
    /// Whether the checkpoint at the start is immediate instead of spread.
    pub fast: bool,
}

/// Stops the threads when the task that waits for them is dropped.
struct CancelOnDrop(Arc<Progress>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// Takes a full base backup.
///
/// # Errors
/// What went wrong, with the step. Nothing is listed then, and PostgreSQL holds nothing for it.
///
/// # Cancellation
/// Dropped, it ends the session and stops reading; the remains are removed by the next run.
pub async fn create(
    repository: &Repository,
    pgdata: &DataDirectory,
    settings: &WorkSettings,
    request: &BackupRequest,
    progress: Arc<Progress>,
) -> Result<BackupRecord, Failure> {
    if request.label.len() > MAX_LABEL_BYTES || request.label.chars().any(char::is_control) {
        return Err(Failure::new(Code::InvalidRequest, "the label is longer than 1,000 bytes or has a line break"));
    }
    let removed = remove_remains(repository, &settings.instance).await;
    let session = Session::connect(&settings.connection).await?;
    let control = pgdata.control()?;
    check_same_server(&session, &control, pgdata)?;
    repository.note_cluster(control.wal_segment_size).await?;
    histories::ship(repository, pgdata).await?;

    let id = claim(repository, &settings.instance, removed).await?;
    tracing::info!(backup = %id, label = request.label, fast = request.fast, "base backup: waiting for the checkpoint");
    let taken =
        Taking { repository, pgdata, settings, request, id, control, progress: progress.clone() }.take(session).await;
    match taken {
        Ok(record) => {
            tracing::info!(
                backup = %id, files = record.files, bytes = record.plain_bytes(), stored_bytes = record.stored_bytes(),
                start_lsn = %record.start_lsn, stop_lsn = %record.stop_lsn, warnings = record.warnings.len(),
                "base backup complete"
            );
            Ok(record)
        }
        Err(failure) if progress.committing.load(Relaxed) => Err(failure
            .context(format!("base backup {id} may be complete, or not"))
            .hint("'pgsidecar backup list' tells. If it isn't listed, its remains are removed by the next backup.")),
        Err(failure) => {
            remove(repository, id).await;
            Err(failure.context(format!("base backup {id}")))
        }
    }
}

/// A backup whose id has been claimed.
struct Taking<'a> {
    repository: &'a Repository,
    pgdata: &'a DataDirectory,
    settings: &'a WorkSettings,
    request: &'a BackupRequest,
    id: BackupId,
    control: ControlFile,
    progress: Arc<Progress>,
}

impl Taking<'_> {
    /// Steps 2 to 9.
    async fn take(self, session: Session) -> Result<BackupRecord, Failure> {
        let Taking { repository, pgdata, settings, request, id, control, progress } = self;
        progress.total_bytes.store(session.total_size().await.unwrap_or(0), Relaxed);
        let server = session.server().clone();
        let start = progress.unless_cancelled(session.backup_start(&request.label, request.fast)).await?;
        tracing::info!(backup = %id, start_lsn = %start.lsn, "base backup: reading files");

        let source = Source {
            root: pgdata.path().to_owned(),
            major: server.major(),
            tablespace_directory: tablespace_version_directory(server.major(), control.catalog_version),
        };
        let packer = Packer::new(repository.clone(), id, source, settings, progress.clone());
        let manifest = ManifestWriter::new(ManifestVersion::for_major(server.major()), control.system_identifier);
        let mut listing = Listing::start(&Handle::current(), repository, id, manifest)?;
        // To the very end: what is cancelled after that is nobody's any more.
        let _stop_threads = CancelOnDrop(progress.clone());
        let mut packing = tokio::task::spawn_blocking(move || {
            let packed = packer.pack(&mut listing);
            packed.map(|(parts, found)| (packer, listing, parts, found))
        });
        let packed = tokio::select! {
            packed = &mut packing => packed?,
            () = session.closed() => {
                // Only when no thread uploads any more can the remains be removed.
                progress.cancel();
                let _ = packing.await;
                Err(Failure::new(Code::PostgresUnavailable, "the session with PostgreSQL ended during the backup")
                    .hint("The server stopped, restarted or crashed. Take the backup again when it's up."))
            }
        };
        let (packer, mut listing, mut parts, found) = packed?;

        let (control_bytes, control_at_end) = blocking(pgdata, |pgdata| pgdata.control_bytes()).await?;
        let stop = session.backup_stop().await?;
        drop(session);
        tracing::info!(backup = %id, stop_lsn = %stop.lsn, "base backup: files read, PostgreSQL released");

        let label: BackupLabel = stop.label_file.parse().map_err(Failure::internal)?;
        let tablespaces: TablespaceMap = stop.tablespace_map.parse().map_err(Failure::internal)?;
        // Replay makes such a tablespace anew, and can't where its files are already.
        let late =
            found.tablespaces.iter().find(|oid| !tablespaces.0.iter().any(|(known, _)| known.to_string() == **oid));
        if let Some(oid) = late {
            return Err(Failure::new(Code::Busy, format!("the tablespace {oid} was created while the backup ran"))
                .hint("Take the backup again."));
        }
        if control_at_end.system_identifier != control.system_identifier {
            return Err(Failure::new(
                Code::WrongCluster,
                "the data directory was replaced by another database during the backup",
            ));
        }
        let version = std::fs::read(pgdata.path().join("PG_VERSION"))
            .map_err(|error| Failure::io("reading PG_VERSION", &error))?;
        let last = last_files(&stop, control_bytes, version);
        let wal = [WalRange { timeline: label.timeline, start: start.lsn, end: stop.lsn }];
        let (last_part, listed) = tokio::task::spawn_blocking(move || {
            let part = packer.pack_last(&last, &mut listing)?;
            Ok::<_, Failure>((part, listing.finish(&wal)?))
        })
        .await??;
        parts.push(last_part);

        let record = BackupRecord {
            format: BACKUP_FORMAT,
            id,
            parent: None,
            system_identifier: control.system_identifier,
            server_version: server.version,
            timeline: label.timeline,
            start_lsn: start.lsn,
            stop_lsn: stop.lsn,
            started_at: start.at,
            stopped_at: stop.at,
            next_xid_at_stop: stop.next_xid,
            from_standby: server.in_recovery,
            wal_segment_size: control.wal_segment_size,
            block_size: control.block_size,
            data_checksums: control.data_checksums,
            tablespaces: tablespaces.0.into_iter().map(|(oid, location)| TablespaceRecord { oid, location }).collect(),
            parts,
            manifest: listed.manifest,
            index: listed.index,
            files: listed.files,
            warnings: found.warnings,
            writer: concat!("pgsidecar ", env!("CARGO_PKG_VERSION")).to_owned(),
        };
        progress.unless_cancelled(wait_for_wal(repository, pgdata, &record, settings.backup_wal_timeout)).await?;
        check_parts(repository, &record).await?;
        // From here on nothing may be removed: that the record was stored can't be ruled out any more.
        progress.committing.store(true, Relaxed);
        repository.store_json(&RepositoryObject::Backup(id, BackupObject::Record), &record).await?;
        Ok(record)
    }
}

/// What makes the directory startable, in the order in which it has to appear.
fn last_files(stop: &BackupStop, control: Vec<u8>, version: Vec<u8>) -> Vec<LastFile> {
    let mut files = vec![LastFile { path: "backup_label", content: stop.label_file.clone().into_bytes() }];
    if !stop.tablespace_map.is_empty() {
        files.push(LastFile { path: "tablespace_map", content: stop.tablespace_map.clone().into_bytes() });
    }
    files.push(LastFile { path: "global/pg_control", content: control });
    files.push(LastFile { path: "PG_VERSION", content: version });
    files
}

async fn blocking<T: Send + 'static>(
    pgdata: &DataDirectory,
    work: impl FnOnce(&DataDirectory) -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let pgdata = pgdata.clone();
    tokio::task::spawn_blocking(move || work(&pgdata)).await?
}

/// The server that answers and the directory on the shared volume must be one database.
fn check_same_server(session: &Session, control: &ControlFile, pgdata: &DataDirectory) -> Result<(), Failure> {
    let server = session.server();
    if server.system_identifier != control.system_identifier {
        return Err(Failure::new(
            Code::WrongCluster,
            format!(
                "the server's system identifier is {}, that of the data directory {} is {}",
                server.system_identifier,
                pgdata.path().display(),
                control.system_identifier
            ),
        )
        .hint(
            "PGHOST and PGPORT lead to another server than the one whose volume is mounted here. Correct one of them.",
        ));
    }
    if server.wal_level == "minimal" {
        return Err(Failure::new(
            Code::Misconfigured,
            "wal_level is minimal: the WAL doesn't hold what a restore needs",
        )
        .hint("Set wal_level to replica and restart PostgreSQL."));
    }
    if server.archive_mode == "off" {
        return Err(Failure::new(
            Code::Misconfigured,
            "archive_mode is off: the WAL that the backup needs would never be archived",
        )
        .hint("Set archive_mode = on and archive_command = 'pgsidecar-wal archive %p', and restart PostgreSQL."));
    }
    if server.in_recovery && !server.full_page_writes {
        return Err(Failure::new(
            Code::Misconfigured,
            "full_page_writes is off: a backup from a standby could hold torn pages",
        )
        .hint("Turn full_page_writes on at the primary."));
    }
    Ok(())
}

/// The second of the last id that this process has claimed.
static LAST_CLAIMED: AtomicI64 = AtomicI64::new(0);

/// Claims an id: that of this second, or of one of the next if another took it. One that was there before and has been
/// removed is never used again: stores and their caches may still know something under its keys.
async fn claim(repository: &Repository, instance: &str, removed: Option<BackupId>) -> Result<BackupId, Failure> {
    let used = removed.map_or(0, |id| id.began().as_second()).max(LAST_CLAIMED.load(Relaxed));
    let now = Timestamp::now();
    let now = Timestamp::from_second(now.as_second().max(used + 1)).unwrap_or(now);
    let attempt = format!("{}-{}", std::process::id(), Timestamp::now().as_nanosecond());
    for second in 0..CLAIM_TRIES {
        let began = Timestamp::from_second(now.as_second() + second).unwrap_or(now);
        let id = BackupId::new(began, BackupKind::Full);
        let claim = BackupClaim { id, instance: instance.to_owned(), attempt: attempt.clone() };
        match repository.store_json(&RepositoryObject::Backup(id, BackupObject::Started), &claim).await {
            Ok(_) => {
                LAST_CLAIMED.store(began.as_second(), Relaxed);
                return Ok(id);
            }
            Err(failure) if failure.code == Code::Conflict => {}
            Err(failure) => return Err(failure),
        }
    }
    Err(Failure::new(Code::Busy, "no id for the backup could be had: others take one each second").hint("Try again."))
}

/// Waits until all the WAL of the backup is in the repository, and PostgreSQL knows it: a name that is there while
/// PostgreSQL still asks to have its own file archived may be another server's.
async fn wait_for_wal(
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
        tokio::time::sleep(WAL_POLL).await;
    }
}

/// The first segment of the backup that PostgreSQL still wants to have archived.
fn unacknowledged(pgdata: &DataDirectory, record: &BackupRecord) -> Option<SegmentName> {
    let size = record.wal_segment_size;
    let numbers = size.segment_number(record.start_lsn)..=size.previous_segment_number(record.stop_lsn);
    let mut segments = numbers.map(|number| SegmentName::from_number(record.timeline, number, size));
    segments.find(|segment| pgdata.is_ready(&ArchiveFileName::Segment(*segment)))
}

async fn history_of(repository: &Repository, timeline: TimelineId) -> Result<TimelineHistory, Failure> {
    let name = ArchiveFileName::History(timeline);
    match repository.history(timeline).await? {
        Some(history) => Ok(history),
        None if timeline == TimelineId::FIRST => Ok(TimelineHistory::first(timeline)),
        None => Err(Failure::new(Code::DataDirectory, format!("the timeline history {name} is neither in the repository nor in pg_wal"))
            .hint("Without it no restore can follow the timeline. Copy it from another server of the cluster into pg_wal and try again.")),
    }
}

/// Looks every object up once more: another run could have taken ours for remains.
async fn check_parts(repository: &Repository, record: &BackupRecord) -> Result<(), Failure> {
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

/// Removes what killed backups of this pod have left. As far as it goes: it's tidying, nothing depends on it.
/// Answers with the youngest that there was.
async fn remove_remains(repository: &Repository, instance: &str) -> Option<BackupId> {
    let remains = async {
        let mut remains = Vec::new();
        for id in repository.backup_ids().await? {
            let started = RepositoryObject::Backup(id, BackupObject::Started);
            // The order matters: a record that appears after we looked for it would be a backup that is complete.
            let claim: Option<BackupClaim> = repository.read_json(&started).await?;
            if claim.is_some_and(|claim| claim.instance == instance) && repository.backup(id).await?.is_none() {
                remains.push(id);
            }
        }
        Ok::<_, Failure>(remains)
    };
    match remains.await {
        Ok(remains) => {
            for id in &remains {
                tracing::info!(backup = %id, "removing the remains of a backup that was not completed");
                remove(repository, *id).await;
            }
            remains.last().copied()
        }
        Err(failure) => {
            tracing::warn!(%failure, "could not look for remains of earlier backups");
            None
        }
    }
}

/// Removes an incomplete backup, its claim last. As far as it goes.
async fn remove(repository: &Repository, id: BackupId) {
    let prefix = repository.layout().backup_prefix(id);
    let claim = repository.layout().backup(id, BackupObject::Started);
    let removed = async {
        for upload in repository.store().pending_uploads(&prefix).await? {
            repository.store().abort_pending(&upload).await?;
        }
        // Without the record it's no backup; only then may the rest go.
        let record = repository.layout().backup(id, BackupObject::Record);
        if let Some((_, error)) = repository.store().delete(std::slice::from_ref(&record)).await?.into_iter().next() {
            return Err(error);
        }
        let mut pages = Pages::new(repository.store(), ListRequest::under(prefix.clone()));
        while let Some(page) = pages.next().await? {
            let keys: Vec<_> = page.objects.into_iter().map(|object| object.key).filter(|key| *key != claim).collect();
            if let Some((_, error)) = repository.store().delete(&keys).await?.into_iter().next() {
                return Err(error);
            }
        }
        match repository.store().delete(std::slice::from_ref(&claim)).await?.into_iter().next() {
            Some((_, error)) => Err(error),
            None => Ok(()),
        }
    };
    if let Err(error) = removed.await {
        tracing::warn!(backup = %id, %error, "the remains of an incomplete backup could not be removed");
    }
}
