//! Timeline histories: small, and nothing can be restored across a promotion without them.
//!
//! PostgreSQL archives the history of the timeline that it begins, once. Those that a server brought along (from
//! the time before it was backed up by us) it never archives again; so all that lie in pg_wal are shipped when the
//! daemon starts and with each backup.

use std::fs;

use bytes::Bytes;
use pgsidecar_core::{ArchiveFileName, TimelineHistory};

use crate::{
    failure::{Code, Failure},
    pgdata::DataDirectory,
    repository::{Repository, Stored},
};

/// The longest history file that is read, in bytes; the core's parser has the same limit.
pub const MAX_HISTORY_BYTES: u64 = 1 << 20;

/// Ships every timeline history of pg_wal that the repository lacks.
///
/// One that differs from what the repository has is left alone, with a warning: two servers have promoted to one
/// timeline, and which is right can't be told here.
///
/// # Errors
/// The store's, or if pg_wal can't be read.
pub async fn ship(repository: &Repository, pgdata: &DataDirectory) -> Result<(), Failure> {
    let wal = pgdata.wal();
    let entries = fs::read_dir(&wal).map_err(|error| Failure::io(format!("reading {}", wal.display()), &error))?;
    for entry in entries.flatten() {
        let name: ArchiveFileName = match entry.file_name().to_str().map(str::parse) {
            Some(Ok(name @ ArchiveFileName::History(_))) => name,
            _ => continue,
        };
        let path = entry.path();
        let size = entry.metadata().map_or(0, |meta| meta.len());
        let bytes = match fs::read(&path) {
            Ok(bytes) if size <= MAX_HISTORY_BYTES => bytes,
            _ => continue,
        };
        // PostgreSQL writes them under another name and renames them; one that doesn't parse was damaged later.
        if let Err(error) = TimelineHistory::parse(name.timeline(), &bytes) {
            tracing::warn!(file = %name, %error, "a timeline history in pg_wal can't be read; it was not shipped");
            continue;
        }
        let key = repository.layout().wal(&name);
        match repository.store_bytes(&key, &name.to_string(), Bytes::from(bytes)).await {
            Ok(Stored::New) => tracing::info!(file = %name, "timeline history shipped"),
            Ok(Stored::Already) => {}
            Err(failure) if failure.code == Code::Conflict => {
                tracing::error!(file = %name, %failure, "two servers began the same timeline");
            }
            Err(failure) => return Err(failure),
        }
    }
    Ok(())
}
