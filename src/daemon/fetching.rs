//! What PostgreSQL asks of the archive, and when "not there" may be said (I5).

use std::{
    io::Write,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    time::Duration,
};

use pgsidecar_core::{ArchiveFileName, SystemIdentifier, TimelineId};

use super::{App, Work, cloning::recovery_signal};
use crate::{
    failure::{Code, Failure},
    histories::MAX_HISTORY_BYTES,
    pgdata::DataDirectory,
    wal::{
        fetch::FetchRequest,
        spool::{Spool, Spooled},
    },
};

/// How long the store may take to answer a standby, which the helper doesn't let wait any longer than twice that, before
/// it's told what is known.
const STANDBY_PATIENCE: Duration = Duration::from_secs(5);

/// How a file is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Of which database system; the daemon's own if it isn't said.
    pub system: Option<SystemIdentifier>,
    /// The inode of the directory in which the file may be left, instead of sending it.
    pub directory: Option<u64>,
    /// Whether the end of a stopped server's WAL will do.
    pub tail: bool,
    /// Whether it's for a standby: it asks again, so that a history that was seen before will do.
    pub standby: bool,
}

impl App {
    /// Fetches a file from the archive.
    ///
    /// # Errors
    /// [`Code::NotInArchive`] if the store says so; anything else means 'can't tell'.
    pub async fn fetch(&self, name: ArchiveFileName, wanted: Wanted) -> Result<(Spooled, &Spool), Failure> {
        let Wanted { system, directory, tail, standby } = wanted;
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
        let signal = pgdata.as_ref().map(recovery_signal).transpose()?.unwrap_or_default();
        // Its restore_command may be another than the one that the restore wrote.
        let tail = tail || signal.tail;
        // Before the store is asked: what is removed from there has been stored by then.
        let waits = work.waits_to_be_archived(name, pgdata.as_ref()).await;
        // Where the whole segment will come, its beginning isn't handed out.
        let tail = tail && !matches!(waits, Some(Ok(true) | Err(_)));
        // Into pg_wal only what goes there: a database that is restored beside the living one must not fill its volume.
        let pgdata = pgdata.filter(|pgdata| directory.is_some() && directory == inode_of(&pgdata.wal()));
        let request = FetchRequest { repository: work.repository(system), name, pgdata, tail };
        if let Some(source) = &signal.source {
            return work.fetch_for_clone(source, request).await;
        }
        let fetched = match name {
            ArchiveFileName::History(timeline) => work.history(timeline, &request, standby).await,
            _ => work.fetcher.fetch(&request).await,
        };
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
    /// Fetches a history and notes it. A standby gets one that is known where the store can't be asked; whoever else
    /// asks may end its recovery by what it's told, and has to wait (I5).
    async fn history(&self, timeline: TimelineId, request: &FetchRequest, standby: bool) -> Result<Spooled, Failure> {
        let system = request.repository.layout().system();
        let known = || if standby { self.histories.get(system, timeline) } else { None };
        let asked = self.fetcher.fetch(request);
        tokio::pin!(asked);
        let in_time = match tokio::time::timeout(STANDBY_PATIENCE, &mut asked).await {
            Err(_) if known().is_some() => None,
            Err(_) => Some(asked.await),
            Ok(fetched) => Some(fetched),
        };
        let away = match in_time {
            Some(Ok(spooled)) => {
                self.note_history(system, timeline, &spooled);
                return Ok(spooled);
            }
            Some(Err(failure)) if !matches!(failure.code, Code::StoreUnavailable | Code::StoreDenied) => {
                return Err(failure);
            }
            Some(Err(failure)) => failure,
            None => Failure::new(Code::StoreUnavailable, "the store hasn't answered in time"),
        };
        let Some(bytes) = known() else { return Err(away) };
        tracing::info!(file = %request.name, %away, "the store can't be asked: handing out what was seen of it before");
        let mut spooled = self.fetcher.spool().create(None)?;
        spooled.file.write_all(&bytes).map_err(|error| Failure::io("using the spool", &error))?;
        Ok(spooled)
    }

    fn note_history(&self, system: SystemIdentifier, timeline: TimelineId, spooled: &Spooled) {
        let size = spooled.file.metadata().map_or(u64::MAX, |meta| meta.len());
        let mut bytes = vec![0; usize::try_from(size.min(MAX_HISTORY_BYTES)).unwrap_or_default()];
        if size <= MAX_HISTORY_BYTES && spooled.file.read_exact_at(&mut bytes, 0).is_ok() {
            self.histories.note(system, timeline, bytes.into());
        }
    }

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
