//! Taking a base backup.
//!
//! The order of effects, and what a crash between two of them leaves:
//!
//! 1. `pg_backup_start` in a session of its own. When we die the session ends, and PostgreSQL holds nothing. An
//!    incremental backup then waits until PostgreSQL has summarized its WAL up to here, or becomes a full one.
//! 2. `started.json` claims the id, which tells the kind. A crash from here on leaves objects without `backup.json`: not a
//!    backup, never listed, removed by the next run of the same pod.
//! 3. The files, in parallel, into parts; the lists grow along.
//! 4. `pg_control`, the last file that is read, so that its minimum recovery point covers every page of a standby's backup.
//! 5. `pg_backup_stop`; the session is closed, whatever comes.
//! 6. The last part: `backup_label`, `tablespace_map`, `pg_control`, `PG_VERSION`. Then the lists.
//! 7. The WAL from start to stop must be in the repository. PostgreSQL archives it meanwhile; we look, with a deadline.
//! 8. Every part is looked up once more: what is listed must be there.
//! 9. `backup.json`, the commit marker. From here on it's a backup. What it builds on is looked up once more then: if it
//!    was removed at that very moment, the marker goes again.

pub mod claim;
pub mod complete;
mod damage;
pub mod incremental;
pub mod index;
pub mod kind;
pub mod listing;
pub mod pace;
pub mod pack;
pub mod part;
pub mod reading;
pub mod verify;
pub mod walk;

use std::sync::{Arc, atomic::Ordering::Relaxed};

use pgsidecar_core::{
    BackupId, BackupRecord, ControlFile,
    backup::{BACKUP_FORMAT, TablespaceRecord},
    backup_label::{BackupLabel, TablespaceMap, with_increment},
    backup_manifest::{ManifestVersion, ManifestWriter, WalRange},
    chain::{BackupType, Choice},
    data_directory::tablespace_version_directory,
    layout::{BackupObject, RepositoryObject},
    page::PAGE_SIZE,
};
use tokio::runtime::Handle;

use self::{
    claim::{claim, remove, remove_remains},
    complete::{WalNeed, check_chain, check_parts, wait_for_wal},
    kind::Basis,
    listing::Listing,
    pack::{Effort, LastFile, Packer, PageRule, Source},
};
use crate::{
    failure::{Code, Failure},
    histories,
    pgdata::DataDirectory,
    postgres::{BackupStart, BackupStop, Session},
    progress::{Phase, Progress},
    repository::Repository,
    settings::WorkSettings,
};

/// PostgreSQL's limit for the label is MAXPGPATH.
const MAX_LABEL_BYTES: usize = 1000;

/// What is wanted.
#[derive(Clone, Debug)]
pub struct BackupRequest {
    /// For `backup_label`; people see it.
    pub label: String,
    /// Whether the checkpoint at the start is immediate instead of spread.
    pub fast: bool,
    /// What kind of backup.
    pub wanted: BackupType,
    /// Bytes of the data directory that are read in a second, at most; `None` for the setting's.
    pub max_rate: Option<u64>,
}

/// Stops the threads when the task that waits for them is dropped.
struct CancelOnDrop(Arc<Progress>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// Takes a base backup.
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
    check_label(&request.label)?;
    let removed = remove_remains(repository, &settings.instance).await;
    let session = Session::connect(&settings.connection).await?;
    let control = pgdata.control()?;
    check_same_server(&session, &control, pgdata)?;
    repository.note_cluster(control.wal_segment_size).await?;
    histories::ship(repository, pgdata).await?;
    let choice = kind::choose(repository, pgdata, session.server(), settings, request.wanted).await?;

    let total = session.total_size().await.unwrap_or(0);
    progress.total_bytes.store(total, Relaxed);
    progress.pace.limit(request.max_rate.or(settings.max_rate));
    tracing::info!(
        label = request.label, fast = request.fast, kind = %choice.kind, because = choice.because,
        "base backup: waiting for the checkpoint"
    );
    let start = progress.unless_cancelled(session.backup_start(&request.label, request.fast)).await?;
    progress.enter(Phase::Summaries);
    let basis = progress.unless_cancelled(kind::found(repository, pgdata, choice, request.wanted, start.lsn)).await?;
    let after = removed.max(basis.parent.as_ref().map(|parent| parent.id));
    let id = claim(repository, &settings.instance, basis.choice.kind, after).await?;
    tracing::info!(backup = %id, start_lsn = %start.lsn, "base backup: reading files");
    progress.enter(Phase::Reading);
    let taking = Taking { repository, pgdata, settings, id, control, start, progress: progress.clone() };
    match taking.take(session, basis).await {
        Ok(record) => {
            tracing::info!(
                backup = %id, files = record.files, bytes = record.plain_bytes(), stored_bytes = record.stored_bytes(),
                start_lsn = %record.start_lsn, stop_lsn = %record.stop_lsn, warnings = record.warnings.len(),
                "base backup complete"
            );
            if !record.damaged.is_empty() {
                tracing::error!(
                    backup = %id, pages = record.damaged_pages(), files = record.damaged.len(),
                    "the database has damaged pages; 'pgsidecar backup show' names them"
                );
            }
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

/// Checks what goes into `backup_label`: a line break in it would make another line of that.
pub(crate) fn check_label(label: &str) -> Result<(), Failure> {
    if label.len() > MAX_LABEL_BYTES || label.chars().any(char::is_control) {
        return Err(Failure::new(Code::InvalidRequest, "the label is longer than 1,000 bytes or has a line break"));
    }
    Ok(())
}

/// What kind of backup it would be now, and why.
///
/// # Errors
/// What would keep it from being taken.
pub async fn plan(
    repository: &Repository,
    pgdata: &DataDirectory,
    settings: &WorkSettings,
    wanted: BackupType,
) -> Result<Choice, Failure> {
    let session = Session::connect(&settings.connection).await?;
    check_same_server(&session, &pgdata.control()?, pgdata)?;
    let choice = kind::choose(repository, pgdata, session.server(), settings, wanted).await?;
    if choice.parent.is_none() {
        return Ok(choice);
    }
    let summarized = session.summarized().await?;
    kind::foreseen(repository, pgdata, choice, wanted, summarized).await
}

/// A backup whose id has been claimed.
struct Taking<'a> {
    repository: &'a Repository,
    pgdata: &'a DataDirectory,
    settings: &'a WorkSettings,
    id: BackupId,
    control: ControlFile,
    start: BackupStart,
    progress: Arc<Progress>,
}

impl Taking<'_> {
    /// Steps 3 to 9.
    async fn take(self, session: Session, basis: Basis) -> Result<BackupRecord, Failure> {
        let Taking { repository, pgdata, settings, id, control, start, progress } = self;
        let server = session.server().clone();
        let source = Source {
            root: pgdata.path().to_owned(),
            major: server.major(),
            tablespace_directory: tablespace_version_directory(server.major(), control.catalog_version),
            pages: PageRule {
                checked: control.data_checksums,
                backup_start: start.lsn,
                segment_blocks: control.relation_segment_blocks,
            },
            base: basis.base,
        };
        let effort = Effort { parallelism: settings.parallelism, part_size: settings.part_size };
        let packer = Packer::new(repository.clone(), id, source, effort, progress.clone());
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
        let mut stop = session.backup_stop().await?;
        drop(session);
        tracing::info!(backup = %id, stop_lsn = %stop.lsn, "base backup: files read, PostgreSQL released");

        let label: BackupLabel = stop.label_file.parse().map_err(Failure::internal)?;
        let tablespaces: TablespaceMap = stop.tablespace_map.parse().map_err(Failure::internal)?;
        // Replay makes such a tablespace anew, and can't where its files are already.
        let late = found
            .walk
            .tablespaces
            .iter()
            .find(|oid| !tablespaces.0.iter().any(|(known, _)| known.to_string() == **oid));
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
        if let Some(parent) = &basis.parent {
            stop.label_file = with_increment(&stop.label_file, parent.start_lsn, parent.timeline);
        }
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
            parent: basis.parent.map(|parent| parent.id),
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
            restored_bytes: listed.restored_bytes,
            damaged: damage::named(&settings.connection, found.damaged).await,
            warnings: found.walk.warnings,
            writer: concat!("pgsidecar ", env!("CARGO_PKG_VERSION")).to_owned(),
        };
        progress.enter(Phase::Wal);
        let need = WalNeed::of(&record);
        progress.unless_cancelled(wait_for_wal(repository, pgdata, &need, settings.backup_wal_timeout)).await?;
        check_parts(repository, &record).await?;
        check_chain(repository, &record).await?;
        // From here on nothing may be removed: that the record was stored can't be ruled out any more.
        progress.committing.store(true, Relaxed);
        let marker = RepositoryObject::Backup(id, BackupObject::Record);
        repository.store_json(&marker, &record).await?;
        // Who removes a backup takes its marker away and then looks for ones that build on it; here it's the other way
        // round. Of two that pass each other, at least one sees the other.
        if let Err(failure) = check_chain(repository, &record).await
            && failure.code == Code::Damaged
        {
            let key = repository.layout().key(&marker);
            if let Some((_, error)) = repository.store().delete(std::slice::from_ref(&key)).await?.into_iter().next() {
                tracing::error!(backup = %id, %error, "a backup that can't be restored stays listed");
            }
            return Err(failure);
        }
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

/// Never assumed: page checksums and incremental files count in blocks.
fn check_block_size(control: &ControlFile) -> Result<(), Failure> {
    if control.block_size as usize == PAGE_SIZE {
        return Ok(());
    }
    let size = control.block_size;
    let message = format!("the database has blocks of {size} bytes, and pgsidecar backs up those with {PAGE_SIZE}");
    Err(Failure::new(Code::Misconfigured, message)
        .hint("PostgreSQL was compiled with another block size (--with-blocksize). Its WAL is archived all the same."))
}

/// The server that answers and the directory on the shared volume must be one database.
pub(crate) fn check_same_server(
    session: &Session,
    control: &ControlFile,
    pgdata: &DataDirectory,
) -> Result<(), Failure> {
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
    check_block_size(control)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_block_sizes_are_refused() {
        let control = ControlFile::parse(include_bytes!("../../crates/core/tests/fixtures/pg_control-15")).unwrap();
        check_block_size(&control).unwrap();
        for block_size in [4096, 16384, 32768] {
            let failure = check_block_size(&ControlFile { block_size, ..control }).unwrap_err();
            assert_eq!(failure.code, Code::Misconfigured);
            assert!(failure.message.contains(&block_size.to_string()), "{failure}");
        }
    }
}
