//! The WAL of a database that recovers: what `recovery.signal` says of it, and, for a clone, the archive of its source.
//!
//! A clone replays its source's WAL and nothing else; its own archive has none of it, or, from a clone before it, WAL of
//! the same timelines that went on differently. So the source alone is asked, until PostgreSQL removes
//! `recovery.signal`, and from then on never again: the source may begin a timeline with the number of the clone's.
//! Only histories are looked for in both, because PostgreSQL chooses its new timeline by which ones it doesn't find.

use std::{fs, io, sync::Arc};

use pgsidecar_core::{ArchiveFileName, Layout, recovery::RecoverySignal, settings::CloneSource};

use super::{Work, open_source};
use crate::{
    failure::{Code, Failure},
    pgdata::DataDirectory,
    repository::Repository,
    settings::WorkSettings,
    store::Store,
    wal::{
        fetch::{FetchRequest, Fetcher},
        spool::{Spool, Spooled},
    },
};

/// The repository that this database was cloned from.
pub(super) struct Source {
    from: CloneSource,
    /// Only read.
    store: Arc<dyn Store>,
    /// Its own: both repositories have files of one name.
    fetcher: Fetcher,
}

impl Source {
    /// The source that the settings name, if they do.
    pub(super) async fn open(settings: &WorkSettings) -> Option<Source> {
        let from = settings.clone_from.clone()?;
        let store = open_source(&from, settings).await;
        Some(Source { from, store, fetcher: Fetcher::new(settings.spool.clone()) })
    }
}

/// What is said of the recovery that the server is in, or begins when it's started. The default for a server that isn't
/// in recovery, is a standby, or whose recovery needs nothing special.
///
/// # Errors
/// If it can't be told.
pub(super) fn recovery_signal(pgdata: &DataDirectory) -> Result<RecoverySignal, Failure> {
    if pgdata.is_standby() {
        return Ok(RecoverySignal::default());
    }
    let path = pgdata.path().join("recovery.signal");
    match fs::read_to_string(&path) {
        // Whoever else makes that file may write into it what they like.
        Ok(text) if !text.contains("pgsidecar") => Ok(RecoverySignal::default()),
        Ok(text) => text.parse().map_err(|error| {
            Failure::new(Code::Misconfigured, format!("{}: {error}", path.display()))
                .hint("It was written by a newer pgsidecar: use that one. What isn't understood can't be ignored, recovery could end early.")
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(RecoverySignal::default()),
        Err(error) => Err(Failure::io(format!("reading {}", path.display()), &error)),
    }
}

impl Work {
    /// Fetches a file for a clone that recovers. `request` is that to its own archive.
    pub(super) async fn fetch_for_clone(
        &self,
        from: &CloneSource,
        request: FetchRequest,
    ) -> Result<(Spooled, &Spool), Failure> {
        let source = self.source.as_ref().filter(|source| source.from == *from).ok_or_else(|| {
            Failure::new(
                Code::Misconfigured,
                format!(
                    "this database recovers as a clone of {from}, and PGSIDECAR_CLONE_FROM doesn't say so any more"
                ),
            )
            .hint("Leave PGSIDECAR_CLONE_FROM as it was until PostgreSQL has been promoted; it waits until then.")
        })?;
        let (system, level) = (request.repository.layout().system(), self.settings.compression_level);
        let theirs = Repository::new(source.store.clone(), Layout::new(from.cluster.clone(), system), level);
        let asked = source.fetcher.fetch(&FetchRequest { repository: theirs, ..request.clone() }).await;
        match (asked, request.name) {
            (Ok(found), _) => Ok((found, source.fetcher.spool())),
            (Err(not_there), ArchiveFileName::History(_)) if not_there.code == Code::NotInArchive => {
                match self.fetcher.fetch(&request).await {
                    Ok(found) => Ok((found, self.fetcher.spool())),
                    // It says for certain that it has nothing of this database: the clone has archived nothing yet.
                    Err(failure) if failure.code == Code::WrongCluster => Err(not_there),
                    Err(failure) => Err(failure),
                }
            }
            (Err(failure), _) => Err(failure),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_recovery_signal_says_holds_until_it_is_gone_and_not_for_a_standby() {
        let scratch = tempfile::tempdir().unwrap();
        fs::create_dir(scratch.path().join("global")).unwrap();
        fs::write(scratch.path().join("PG_VERSION"), "17\n").unwrap();
        fs::write(scratch.path().join("global/pg_control"), "").unwrap();
        let pgdata = DataDirectory::open(scratch.path()).unwrap();
        let said = || recovery_signal(&pgdata);
        let write = |text: &str| fs::write(scratch.path().join("recovery.signal"), text).unwrap();
        let none = RecoverySignal::default();
        assert_eq!(said().unwrap(), none);
        for text in ["", "touched by hand"] {
            write(text);
            assert_eq!(said().unwrap(), none, "{text:?}");
        }
        let source = "s3://backups?cluster=shop/orders".parse().unwrap();
        let signal = RecoverySignal { tail: true, source: Some(source) };
        write(&signal.to_string());
        assert_eq!(said().unwrap(), signal);
        write(&format!("{signal}more = than this one knows\n"));
        assert_eq!(said().unwrap_err().code, Code::Misconfigured);
        fs::write(scratch.path().join("standby.signal"), "").unwrap();
        assert_eq!(said().unwrap(), none);
    }
}
