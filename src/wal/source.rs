//! Where WAL lies that the daemon archives by itself: `archive_status` of pg_wal says what is ready there, and a
//! directory that another `archive_command` copies to ([`super::directory`]).

use std::{path::PathBuf, sync::Arc};

use pgsidecar_core::ArchiveFileName;

use super::{
    Origin,
    archive::{Archiver, Outcome},
};
use crate::failure::Failure;

/// What a look has found.
#[derive(Debug, Default)]
pub struct Found {
    /// What can be archived now, in the order in which it should be.
    pub ready: Vec<ArchiveFileName>,
    /// There is more, which can't be taken just now and probably can in a moment.
    pub more_to_come: bool,
}

/// Which files are looked for.
pub type Wanted<'a> = &'a dyn Fn(&ArchiveFileName) -> bool;

/// Files that wait to be archived.
#[async_trait::async_trait]
pub trait WalSource: Send + Sync {
    /// The directory in which something is created when there is a new file.
    fn watched(&self, origin: &Origin) -> PathBuf;

    /// Looks for files, `limit` of those at most that are `wanted` and aren't known to be archived. Blocks.
    ///
    /// # Errors
    /// If it can't be looked.
    fn look(&self, archiver: &Archiver, origin: &Origin, limit: usize, wanted: Wanted<'_>) -> Result<Found, Failure>;

    /// Whether a file that was found still waits.
    fn is_waiting(&self, archiver: &Archiver, origin: &Origin, name: ArchiveFileName) -> bool;

    /// Archives a file that was found.
    ///
    /// # Errors
    /// Why it isn't in the repository.
    async fn archive(&self, archiver: &Arc<Archiver>, origin: &Origin, name: ArchiveFileName) -> Outcome;
}

/// What PostgreSQL has marked in `archive_status`. It asks for each itself, and only then the mark changes.
pub struct ArchiveStatus;

#[async_trait::async_trait]
impl WalSource for ArchiveStatus {
    fn watched(&self, origin: &Origin) -> PathBuf {
        origin.pgdata.wal().join("archive_status")
    }

    fn look(&self, archiver: &Archiver, origin: &Origin, limit: usize, wanted: Wanted<'_>) -> Result<Found, Failure> {
        let ready = origin.pgdata.ready_files(limit, |name| wanted(name) && !archiver.is_archived(origin, *name));
        let ready = ready.map_err(|error| Failure::io("reading archive_status", &error))?;
        Ok(Found { ready, more_to_come: false })
    }

    fn is_waiting(&self, archiver: &Archiver, origin: &Origin, name: ArchiveFileName) -> bool {
        origin.pgdata.is_ready(&name) && !archiver.is_archived(origin, name)
    }

    async fn archive(&self, archiver: &Arc<Archiver>, origin: &Origin, name: ArchiveFileName) -> Outcome {
        archiver.archive_file(origin, name).await
    }
}
