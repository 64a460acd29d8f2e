//! What PostgreSQL asks of the archive, and when "not there" may be said (I5).

use std::{os::unix::fs::MetadataExt, path::Path};

use pgsidecar_core::{ArchiveFileName, SystemIdentifier};

use super::{App, Work};
use crate::{
    failure::{Code, Failure},
    pgdata::DataDirectory,
    wal::{
        fetch::FetchRequest,
        spool::{Spool, Spooled},
    },
};

impl App {
    /// Fetches a file from the archive, of this database system or of the one that is named. `directory` is the inode of
    /// where it goes to.
    ///
    /// # Errors
    /// [`Code::NotInArchive`] if the store says so; anything else means 'can't tell'.
    pub async fn fetch(
        &self,
        name: ArchiveFileName,
        system: Option<SystemIdentifier>,
        directory: Option<u64>,
        tail: bool,
    ) -> Result<(Spooled, &Spool), Failure> {
        let work = self.work()?;
        // A directory of another system than the daemon's own is restored elsewhere.
        let (pgdata, system) = match (work.data_directory(), system) {
            (Ok((pgdata, control)), None) => (Some(pgdata), control.system_identifier),
            (Ok((pgdata, control)), Some(system)) => {
                (Some(pgdata).filter(|_| control.system_identifier == system), system)
            }
            (Err(_), Some(system)) => (None, system),
            (Err(failure), None) => return Err(failure),
        };
        // Before the store is asked: what is removed from there has been stored by then.
        let waits = work.waits_to_be_archived(name, pgdata.as_ref()).await;
        // Where the whole segment will come, its beginning isn't handed out.
        let tail = tail && !matches!(waits, Some(Ok(true) | Err(_)));
        // Into pg_wal only what goes there: a database that is restored beside the living one must not fill its volume.
        let pgdata = pgdata.filter(|pgdata| directory.is_some() && directory == inode_of(&pgdata.wal()));
        let request = FetchRequest { repository: work.repository(system), name, pgdata, tail };
        let fetched = work.fetcher.fetch(&request).await;
        let spooled = fetched.map_err(|failure| match waits {
            Some(waits) if failure.code == Code::NotInArchive => not_yet_archived(name, waits).unwrap_or(failure),
            _ => failure,
        })?;
        Ok((spooled, work.fetcher.spool()))
    }
}

fn inode_of(path: &Path) -> Option<u64> {
    std::fs::metadata(path).ok().map(|meta| meta.ino())
}

impl Work {
    /// Whether the file lies in the archive directory. `None`: there is none, or it's another database's.
    async fn waits_to_be_archived(
        &self,
        name: ArchiveFileName,
        pgdata: Option<&DataDirectory>,
    ) -> Option<Result<bool, Failure>> {
        let directory = self.archive_directory.clone()?;
        // Without a data directory it can't be told whose files those are.
        if pgdata.is_none() && self.data_directory().is_ok() {
            return None;
        }
        let looked = tokio::task::spawn_blocking(move || directory.has(name)).await;
        Some(looked.unwrap_or_else(|panic| Err(panic.into())))
    }
}

/// Why a file that isn't in the repository may still come into it (I5). `None`: it won't.
fn not_yet_archived(name: ArchiveFileName, waits: Result<bool, Failure>) -> Option<Failure> {
    match waits {
        Ok(false) => None,
        Ok(true) => Some(
            Failure::new(Code::NotYetArchived, format!("{name} is not in the repository, but lies in the archive directory"))
                .hint("It is shipped within seconds. If it stays there, 'pgsidecar status' tells why; what isn't needed may be moved away."),
        ),
        Err(failure) => Some(Failure { code: Code::NotYetArchived, ..failure }
            .context(format!("{name} is not in the repository, and whether it is on its way there can't be told"))),
    }
}
