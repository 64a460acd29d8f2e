//! WAL back to PostgreSQL, through a spool.
//!
//! A file is handed out only when all of it is here and checked: decompressed, equal to the identity that was stored
//! with it, and a segment of the right size at the right place. 'Not in the archive' is said only when the store said
//! so (I5); whatever can't be told is an error of another code.

use std::{
    fs::{self, DirBuilder},
    io::{Read, Seek, SeekFrom},
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

use pgsidecar_core::{ArchiveFileName, WalHeader, check_segment, layout::RepositoryObject};
use tempfile::NamedTempFile;
use tokio::sync::Semaphore;

use crate::{
    failure::{Code, Failure},
    repository::{ClusterRecord, Repository, damaged},
    store::{ListRequest, Pages},
};

/// How many files are fetched at a time.
const CONCURRENCY: usize = 4;

/// Fetches WAL files into a spool directory.
pub struct Fetcher {
    spool: PathBuf,
    permits: Semaphore,
}

impl Fetcher {
    /// A fetcher with this spool directory, which is created when it's first needed.
    pub fn new(spool: &Path) -> Fetcher {
        Fetcher { spool: spool.to_owned(), permits: Semaphore::new(CONCURRENCY) }
    }

    /// Fetches a file. The result is removed from the spool when it's dropped.
    ///
    /// # Errors
    /// [`Code::NotInArchive`] if the store says so; anything else means 'can't tell'.
    pub async fn fetch(&self, repository: &Repository, name: ArchiveFileName) -> Result<NamedTempFile, Failure> {
        let _permit = self.permits.acquire().await.map_err(Failure::internal)?;
        let cluster = known_cluster(repository).await?;
        let key = match name {
            ArchiveFileName::Partial(segment) => {
                let mut pages =
                    Pages::new(repository.store(), ListRequest::under(repository.layout().partial_prefix(segment)));
                let mut keys = Vec::new();
                while let Some(page) = pages.next().await? {
                    keys.extend(page.objects.into_iter().map(|object| object.key));
                }
                match keys.as_slice() {
                    [] => return Err(not_in_archive(name)),
                    [key] => key.clone(),
                    _ => {
                        return Err(Failure::new(Code::Conflict, format!("the archive holds {} different files {name}", keys.len()))
                            .hint("Two standbys were promoted from this segment. PostgreSQL never asks for .partial files by itself; fetch the one you want from the store."));
                    }
                }
            }
            _ => repository.layout().wal(&name),
        };
        let spool = self.open_spool()?;
        match repository.read_plain(&key, spool).await? {
            None => Err(not_in_archive(name)),
            // No such file is ever empty, and PostgreSQL would take an empty history for a timeline without parents.
            Some((_, content)) if content.size == 0 => Err(damaged(&name.to_string(), "it is empty")),
            Some((mut file, _)) => {
                if let ArchiveFileName::Segment(segment) = name {
                    let mut head = [0; WalHeader::LEN];
                    let checked = file
                        .as_file_mut()
                        .seek(SeekFrom::Start(0))
                        .and_then(|_| file.as_file_mut().read_exact(&mut head));
                    checked.map_err(|error| damaged(&name.to_string(), &error.to_string()))?;
                    let size =
                        file.as_file().metadata().map_err(|error| Failure::io("reading the spool", &error))?.len();
                    check_segment(&segment, &head, size, cluster.system_identifier, cluster.wal_segment_size)
                        .map_err(|mismatch| damaged(&name.to_string(), &mismatch.to_string()))?;
                }
                Ok(file)
            }
        }
    }

    /// A new file in the spool.
    fn open_spool(&self) -> Result<NamedTempFile, Failure> {
        let doing = || format!("using the spool {}", self.spool.display());
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.spool)
            .map_err(|error| Failure::io(doing(), &error))?;
        // In a temporary directory, somebody else may have been first.
        let owner = fs::metadata(&self.spool).map_err(|error| Failure::io(doing(), &error))?.uid();
        if owner != rustix::process::geteuid().as_raw() {
            return Err(Failure::new(
                Code::Misconfigured,
                format!("the spool {} belongs to user {owner}", self.spool.display()),
            )
            .hint("Set PGSIDECAR_SPOOL to a directory of this container's own."));
        }
        tempfile::Builder::new().prefix("wal-").tempfile_in(&self.spool).map_err(|error| Failure::io(doing(), &error))
    }

    /// Empties the spool of what an earlier daemon left. Called once, before anything is fetched.
    pub fn clean(&self) {
        let Ok(entries) = fs::read_dir(&self.spool) else { return };
        for entry in entries.flatten() {
            if entry.file_name().as_encoded_bytes().starts_with(b"wal-") {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

/// The cluster's record. Without one the repository knows nothing of this database: whether a file is missing can't
/// be told then, because everything would be.
async fn known_cluster(repository: &Repository) -> Result<ClusterRecord, Failure> {
    repository.read_json(&RepositoryObject::Cluster).await?.ok_or_else(|| {
        let layout = repository.layout();
        Failure::new(
            Code::WrongCluster,
            format!(
                "the repository has nothing of a database with system identifier {} under the name {}",
                layout.system(),
                layout.cluster()
            ),
        )
        .hint("Check PGSIDECAR_REPOSITORY and PGSIDECAR_CLUSTER. PostgreSQL isn't told that its archive ends here.")
    })
}

fn not_in_archive(name: ArchiveFileName) -> Failure {
    Failure::new(Code::NotInArchive, format!("{name} is not in the archive"))
}
