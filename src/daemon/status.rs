//! What the daemon knows of itself, for `pgsidecar status`, the probes and the metrics.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use pgsidecar_core::{BackupId, DrillId, SystemIdentifier, drill::DrillOutcome, retention::Growth};
use serde::Serialize;

use super::{App, FailedDump, LastDump, Work};
use crate::{
    failure::{Code, Failure},
    jobs::Snapshot,
    pgdata::{DataDirectory, Volume, foreign_owner},
    repository::Repository,
    schedule::ScheduleStatus,
    store::ConditionalCreation,
    switch,
    wal::{directory::DirectoryStatus, statistics::ArchiveStatistics},
};

/// How old the list of backups may be that the status tells.
const STATUS_CACHE: Duration = Duration::from_secs(20);
/// How long the status waits for the store.
const STATUS_PATIENCE: Duration = Duration::from_secs(3);

/// The newest complete backup, for the status.
#[derive(Clone, Debug, Serialize)]
pub struct LastBackup {
    /// Its id.
    pub id: BackupId,
    /// When it was complete.
    pub stopped_at: Timestamp,
    /// How many pages of the database were damaged when it was taken.
    pub damaged_pages: u64,
}

/// How long what is known of the last drill holds. They're rare, and each look costs a listing.
const DRILL_CACHE: Duration = Duration::from_secs(60);
/// How far back a drill is looked for: a listing of at most a few thousand names.
const DRILLS_WITHIN: Duration = Duration::from_secs(400 * 24 * 3600);

/// The last drill, for the status.
#[derive(Clone, Debug, Serialize)]
pub struct LastDrill {
    /// Its id.
    pub id: DrillId,
    /// When it had ended.
    pub ended_at: Timestamp,
    /// How it went.
    pub outcome: DrillOutcome,
    /// The backup that was restored.
    pub backup: Option<BackupId>,
    /// What was wrong, a sentence for people.
    pub because: Option<String>,
}

/// `GET /v1/status`.
#[derive(Debug, Serialize)]
pub struct Status {
    /// pgsidecar's version.
    pub version: &'static str,
    /// `ok` or `degraded`.
    pub state: &'static str,
    /// What keeps it from working.
    pub problems: Vec<Failure>,
    /// What should be looked at, and keeps nothing from working.
    pub warnings: Vec<Failure>,
    /// Whether the data directory belongs to another user than pgsidecar runs as; unknown where that can't be told.
    pub foreign_data_directory: Option<bool>,
    /// The name in the repository.
    pub cluster: Option<String>,
    /// The database system of the data directory.
    pub system_identifier: Option<SystemIdentifier>,
    /// Where backups are kept.
    pub repository: Option<String>,
    /// `honoured`, or why the daemon has to look before it writes; unknown until the first write.
    pub conditional_creation: Option<String>,
    /// WAL archiving.
    pub archive: ArchiveStatus,
    /// The file systems of data directory and WAL; empty without a data directory.
    pub volumes: Vec<Volume>,
    /// The newest complete backup; unknown while the store can't be reached.
    pub last_backup: Option<LastBackup>,
    /// The newest complete dump; unknown while the store can't be reached.
    pub last_dump: Option<LastDump>,
    /// How the last dump that this daemon tried failed; `None` if it didn't.
    pub last_dump_failure: Option<FailedDump>,
    /// Restores in place: what is prepared, and what is kept; unknown without a data directory.
    pub restores: Option<RestoresStatus>,
    /// The last drill of the last 400 days that was recorded; unknown while the store can't be reached.
    pub last_drill: Option<LastDrill>,
    /// How the repository grows, and what the retention in force holds it at; unknown for a while after the start.
    pub growth: Option<Growth>,
    /// What is done by schedule: when next, and how it went.
    pub schedule: Vec<ScheduleStatus>,
    /// The job that was started last.
    pub last_job: Option<Snapshot>,
}

/// Restores in place, in the status.
#[derive(Debug, Serialize)]
pub struct RestoresStatus {
    /// What takes place at the next start of PostgreSQL, in words.
    pub pending: Option<String>,
    /// How many earlier databases are kept. They take up room.
    pub kept: usize,
}

/// WAL archiving, in the status.
#[derive(Debug, Serialize)]
pub struct ArchiveStatus {
    /// `.ready` files; unknown without a data directory.
    pub backlog_files: Option<u64>,
    /// Age of the oldest.
    pub oldest_ready_seconds: Option<u64>,
    /// The archive directory, if there is one and the data directory can be read. Its files are counted here alone.
    pub directory: Option<DirectoryStatus>,
    /// Since the daemon's start.
    #[serde(flatten)]
    pub statistics: ArchiveStatistics,
}

impl App {
    /// Everything that is known.
    pub async fn status(&self) -> Status {
        let mut status = Status {
            version: env!("CARGO_PKG_VERSION"),
            state: "ok",
            problems: self.start_problem.iter().cloned().collect(),
            warnings: Vec::new(),
            foreign_data_directory: None,
            cluster: None,
            system_identifier: None,
            repository: None,
            conditional_creation: None,
            archive: ArchiveStatus {
                backlog_files: None,
                oldest_ready_seconds: None,
                directory: None,
                statistics: self.archiver.statistics(),
            },
            volumes: Vec::new(),
            last_backup: None,
            last_dump: None,
            last_dump_failure: None,
            restores: None,
            last_drill: None,
            growth: None,
            schedule: self.schedule_status(),
            last_job: self.jobs.last().map(|job| job.snapshot()),
        };
        status.problems.extend(status.schedule.iter().filter_map(ScheduleStatus::problem));
        match &self.work {
            Err(failure) => status.problems.push(failure.clone()),
            Ok(work) => {
                work.describe(&mut status).await;
                status.problems.extend(work.archiving_fault(self.asked_last()));
                status.warnings = work.server_warnings();
            }
        }
        self.describe_owner(&mut status);
        if !status.problems.is_empty() {
            status.state = "degraded";
        }
        status
    }
}

impl App {
    fn describe_owner(&self, status: &mut Status) {
        let Some(pgdata) = self.pgdata.as_deref().filter(|pgdata| pgdata.exists()) else { return };
        let foreign = foreign_owner(pgdata);
        status.foreign_data_directory = Some(foreign.is_some());
        let told = |failure: &Failure| status.problems.iter().any(|problem| problem.message == failure.message);
        // Where it can be read in spite of that, as by a group (initdb -g), WAL and backups work.
        let foreign = foreign.filter(|failure| !told(failure));
        match DataDirectory::open(pgdata) {
            Ok(_) => status.warnings.extend(foreign),
            Err(_) => status.problems.extend(foreign),
        }
    }
}

impl Work {
    async fn describe(&self, status: &mut Status) {
        status.cluster = Some(self.settings.cluster.to_string());
        status.repository = Some(self.store.description());
        status.growth = self.growth.get();
        status.conditional_creation = self.conditional.lock().ok().and_then(|known| {
            known.as_ref().map(|known| match known {
                ConditionalCreation::Honoured => "honoured".to_owned(),
                ConditionalCreation::LookFirst { reason } => format!("look first: {reason}"),
            })
        });
        let (pgdata, control) = match self.data_directory() {
            Ok(found) => found,
            Err(failure) => return status.problems.push(failure),
        };
        status.system_identifier = Some(control.system_identifier);
        match switch::list(pgdata.path()) {
            Ok(kept) => {
                let pending = kept.pending.map(|switch| switch::describe_pending(&switch));
                status.restores = Some(RestoresStatus { pending, kept: kept.done.len() });
            }
            Err(failure) => status.problems.push(failure),
        }
        status.volumes = pgdata.volumes();
        if let Ok(backlog) = pgdata.backlog() {
            status.archive.backlog_files = Some(backlog.files);
            status.archive.oldest_ready_seconds = backlog.oldest.map(|age| age.as_secs());
        }
        if let Some(directory) = self.archive_directory.clone() {
            // It can be on a file system that doesn't answer.
            let looked = tokio::task::spawn_blocking(move || directory.status(&pgdata));
            match tokio::time::timeout(STATUS_PATIENCE, looked).await {
                Ok(Ok(found)) => {
                    status.problems.extend(found.problems());
                    status.archive.directory = Some(found);
                }
                Ok(Err(panic)) => status.problems.push(panic.into()),
                Err(_) => status.problems.push(Failure::new(Code::Io, "the archive directory does not answer in time")),
            }
        }
        if let Some(last) = &status.archive.statistics.last.last_failure {
            status
                .problems
                .push(last.reason.clone().context(format!("{} could not be archived at {}", last.file, last.at)));
        }
        status.last_dump_failure = self.dumped.failure();
        status.problems.extend(status.last_dump_failure.as_ref().map(FailedDump::problem));
        let repository = self.repository(control.system_identifier);
        match tokio::time::timeout(STATUS_PATIENCE, self.last_backup(&repository)).await {
            Ok(Ok(last)) => {
                let damaged = last.as_ref().filter(|last| last.damaged_pages > 0);
                status.problems.extend(damaged.map(damaged_database));
                status.last_backup = last;
            }
            Ok(Err(failure)) => return status.problems.push(failure),
            Err(_) => {
                return status.problems.push(Failure::new(Code::StoreUnavailable, "the store does not answer in time"));
            }
        }
        if let Ok(Ok(last)) = tokio::time::timeout(STATUS_PATIENCE, self.dumped.last(&repository)).await {
            status.last_dump = last;
        }
        // Without it the status is no worse: who may archive needn't be allowed to see drills.
        if let Ok(Ok(last)) = tokio::time::timeout(STATUS_PATIENCE, self.last_drill(&repository)).await {
            let failed = last.as_ref().filter(|last| last.outcome == DrillOutcome::Failed);
            status.problems.extend(failed.map(failed_drill));
            status.last_drill = last;
        }
    }

    async fn last_drill(&self, repository: &Repository) -> Result<Option<LastDrill>, Failure> {
        let mut cached = self.drilled.lock().await;
        if let Some((at, last)) = &*cached
            && at.elapsed() < DRILL_CACHE
        {
            return Ok(last.clone());
        }
        let mut last = None;
        for id in repository.drill_ids(DRILLS_WITHIN).await?.into_iter().rev() {
            if let Some(record) = repository.drill(id).await? {
                let wrong = record.steps.iter().find(|step| step.outcome == record.outcome);
                let because = wrong.filter(|_| record.outcome != DrillOutcome::Passed).map(|step| step.message.clone());
                let (ended_at, outcome, backup) = (record.ended_at, record.outcome, record.backup);
                last = Some(LastDrill { id, ended_at, outcome, backup, because });
                break;
            }
        }
        *cached = Some((Instant::now(), last.clone()));
        Ok(last)
    }

    async fn last_backup(&self, repository: &Repository) -> Result<Option<LastBackup>, Failure> {
        let mut cached = self.recoverable.lock().await;
        if let Some((at, last)) = &*cached
            && at.elapsed() < STATUS_CACHE
        {
            return Ok(last.clone());
        }
        let mut last = None;
        // The newest with a record: those without aren't complete.
        for id in repository.backup_ids().await?.into_iter().rev() {
            if let Some(record) = repository.backup(id).await? {
                let damaged_pages = record.damaged_pages();
                last = Some(LastBackup { id, stopped_at: record.stopped_at, damaged_pages });
                break;
            }
        }
        *cached = Some((Instant::now(), last.clone()));
        Ok(last)
    }
}

fn failed_drill(drill: &LastDrill) -> Failure {
    let because = drill.because.as_deref().unwrap_or("its record doesn't say why");
    Failure::new(Code::Damaged, format!("the drill of {} failed: {because}", drill.id))
        .hint("'pgsidecar drill list' shows the drills. Once the cause is gone, 'pgsidecar drill run' passes again.")
}

fn damaged_database(backup: &LastBackup) -> Failure {
    let LastBackup { id, damaged_pages, .. } = backup;
    Failure::new(Code::Damaged, format!("backup {id} found {damaged_pages} damaged pages in the database"))
        .hint("'pgsidecar backup show' names the relations. Look at the disk first; an index can be rebuilt (REINDEX), a table's rows be had from an older backup.")
}
