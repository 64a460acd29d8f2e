//! WAL on its way to the repository and back, and what there is of it.

pub mod archive;
mod arriving;
mod check;
pub mod directory;
pub mod fetch;
pub mod get;
pub mod lookahead;
pub mod owner;
pub mod remains;
mod set_apart;
pub mod shutdown;
pub mod source;
pub mod spool;
pub mod standby;
pub mod statistics;
mod storing;
pub mod survey;
pub mod tail;
pub mod verify;

use pgsidecar_core::ControlFile;

use crate::{failure::Failure, pgdata::DataDirectory, repository::Repository};

/// The server whose WAL is archived, and where it goes.
#[derive(Clone, Debug)]
pub struct Origin {
    /// The repository of its database system.
    pub repository: Repository,
    /// Its data directory.
    pub pgdata: DataDirectory,
    /// What its `pg_control` said just now.
    pub control: ControlFile,
    /// Who archives. `None`: timelines have no owners, and only conflicts are refused.
    pub claimant: Option<owner::Claimant>,
}

/// Tells what the data directory holds now: it can be replaced, and its server be promoted.
#[async_trait::async_trait]
pub trait Origins: Send + Sync {
    /// The server in the data directory.
    ///
    /// # Errors
    /// Wrong settings, no data directory, or a repository that couldn't be looked at yet.
    async fn origin(&self) -> Result<Origin, Failure>;
}
