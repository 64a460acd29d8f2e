//! What kind of backup it will be, and what it builds on.

use pgsidecar_core::{
    BackupId, BackupRecord, Lsn, TimelineHistory,
    chain::{self, BackupType, Choice, Server},
};

use super::{
    complete::check_parts,
    incremental::{Base, NoBase},
};
use crate::{
    failure::{Code, Failure},
    histories,
    pgdata::DataDirectory,
    postgres::ServerFacts,
    repository::Repository,
    settings::WorkSettings,
};

/// How long PostgreSQL may take to summarize the WAL up to the backup's start. It's a matter of seconds unless it lags.
const SUMMARY_PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);

/// What a backup is taken on.
pub struct Basis {
    /// What was chosen.
    pub choice: Choice,
    /// The parent; `None` for a full backup.
    pub parent: Option<BackupRecord>,
    /// What changed since the parent.
    pub base: Option<Base>,
}

/// Chooses what a new backup builds on by what the repository holds.
///
/// # Errors
/// The store's; [`Code::InvalidRequest`] if the server is too old for what was asked for.
pub async fn choose(
    repository: &Repository,
    pgdata: &DataDirectory,
    server: &ServerFacts,
    settings: &WorkSettings,
    wanted: BackupType,
) -> Result<Choice, Failure> {
    let backups = if wanted == BackupType::Full { Vec::new() } else { repository.backups().await? };
    let history = history(repository, pgdata).await?;
    let data_checksums = pgdata.control()?.data_checksums;
    let server = Server { major: server.major(), summarizes: server.summarize_wal, data_checksums, history };
    let choose = |broken: &[BackupId]| {
        chain::choose(wanted, &backups, broken, &server, settings.longest_chain).map_err(|error| {
            Failure::new(Code::InvalidRequest, error.to_string())
                .hint("Leave --type out, or ask for --type full. Incremental backups need PostgreSQL 17 or later.")
        })
    };
    let choice = choose(&[])?;
    // Only the chain that would be built on is looked up, object by object.
    let Some(parent) = choice.parent.and_then(|id| backups.iter().find(|backup| backup.id == id)) else {
        return Ok(choice);
    };
    let links = chain::chain(parent, &backups).map_err(Failure::internal)?;
    for link in links {
        match check_parts(repository, link).await {
            Ok(()) => {}
            Err(failure) if failure.code == Code::Damaged => return choose(&[link.id]),
            Err(failure) => return Err(failure),
        }
    }
    Ok(choice)
}

/// Gathers what changed since the chosen parent; where that isn't to be had, the backup will be a full one.
///
/// # Errors
/// The store's, or the file system's.
pub async fn found(
    repository: &Repository,
    pgdata: &DataDirectory,
    choice: Choice,
    wanted: BackupType,
    start: Lsn,
) -> Result<Basis, Failure> {
    let full = |choice: Choice| {
        // Also where nothing else was asked for: a full one takes more time and room than the last one did.
        if choice.falls_back || wanted == BackupType::Auto {
            tracing::warn!(because = choice.because, "base backup: a full one, wanted was {wanted}");
        }
        Ok(Basis { choice, parent: None, base: None })
    };
    let instead = |because: String| full(Choice::full_instead(wanted, because));
    let Some(id) = choice.parent else {
        return if choice.falls_back { full(choice) } else { Ok(Basis { choice, parent: None, base: None }) };
    };
    let Some(parent) = repository.backup(id).await? else {
        return instead(format!("backup {id} has been removed meanwhile"));
    };
    let history = history(repository, pgdata).await?;
    match Base::prepare(repository, pgdata, &parent, &history, start, SUMMARY_PATIENCE).await {
        Ok(base) => Ok(Basis { choice, parent: Some(parent), base: Some(base) }),
        Err(NoBase::Because(because)) => instead(because),
        Err(NoBase::Failed(failure)) => Err(failure),
    }
}

/// What will come of a choice if the backup is taken now: whether what [`found`] needs is there, as far as PostgreSQL says
/// that it has summarized its WAL.
///
/// # Errors
/// The store's, or the file system's.
pub async fn foreseen(
    repository: &Repository,
    pgdata: &DataDirectory,
    choice: Choice,
    wanted: BackupType,
    summarized: Lsn,
) -> Result<Choice, Failure> {
    let Some(id) = choice.parent else { return Ok(choice) };
    let Some(parent) = repository.backup(id).await? else {
        return Ok(Choice::full_instead(wanted, format!("backup {id} has been removed meanwhile")));
    };
    let history = history(repository, pgdata).await?;
    match Base::look(repository, pgdata, &parent, &history, summarized).await {
        Ok(()) => Ok(choice),
        Err(NoBase::Because(because)) => Ok(Choice::full_instead(wanted, because)),
        Err(NoBase::Failed(failure)) => Err(failure),
    }
}

/// The way to the timeline of the server's last checkpoint.
async fn history(repository: &Repository, pgdata: &DataDirectory) -> Result<TimelineHistory, Failure> {
    let timeline = pgdata.control()?.timeline;
    match histories::in_pg_wal(pgdata, timeline) {
        Some(history) => Ok(history),
        None => super::complete::history_of(repository, timeline).await,
    }
}
