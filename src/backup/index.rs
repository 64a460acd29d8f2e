//! `index.jsonl.zst`: where each file of a backup lies, a line each, read without holding more than a line.

use std::{
    borrow::Cow,
    io::{BufRead, BufReader, Read},
};

use pgsidecar_core::{BackupRecord, incremental_file::path_of_incremental, layout::BackupObject};
use serde::Deserialize;

use crate::{
    failure::Failure,
    repository::{Repository, damaged},
};

/// No line is longer: a path of PostgreSQL's has less than 1,024 bytes.
const MOST_LINE_BYTES: u64 = 64 << 10;

/// A file in a backup.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct IndexEntry {
    /// Path relative to the data directory; tablespaces lie under `pg_tblspc/<oid>`. What isn't UTF-8 in it is replaced.
    pub path: String,
    /// Number of the part.
    pub part: u32,
    /// Where the frame begins in the part's bytes.
    pub frame: u64,
    /// Where the file's content begins in the frame's plain bytes.
    pub offset: u64,
    /// The file's length in bytes.
    pub size: u64,
    /// CRC-32C of its content.
    pub crc32c: u32,
    /// Its modification time.
    pub modified: jiff::Timestamp,
    /// The length in bytes of the file that is made of it, if it's an incremental one.
    #[serde(default)]
    pub restored: Option<u64>,
}

impl IndexEntry {
    /// The path of the file when it's restored, and its length in bytes.
    pub fn restored(&self) -> (Cow<'_, str>, u64) {
        match (self.restored, path_of_incremental(&self.path)) {
            (Some(length), Some(path)) => (path.into(), length),
            _ => (self.path.as_str().into(), self.size),
        }
    }
}

/// Reads a backup's index, and gives each file of it to `each`, which lives on with what it has collected. What was given
/// counts only if this succeeds: whether the index is the one that was stored is known at its end.
///
/// # Errors
/// The store's, `each`'s, or [`Code::Damaged`](crate::failure::Code::Damaged).
pub async fn read<T: Send + 'static>(
    repository: &Repository,
    backup: &BackupRecord,
    mut collected: T,
    mut each: impl FnMut(&mut T, IndexEntry) -> Result<(), Failure> + Send + 'static,
) -> Result<T, Failure> {
    let key = repository.layout().backup(backup.id, BackupObject::Index);
    let reader = repository.open_stored(&key, backup.index).await?;
    let files = backup.files;
    let read = move || {
        let mut lines = BufReader::new(reader);
        let (mut line, mut count) = (Vec::new(), 0);
        loop {
            line.clear();
            match (&mut lines).take(MOST_LINE_BYTES).read_until(b'\n', &mut line) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) => return Err(lines.get_ref().explain(&error)),
            }
            let entry = serde_json::from_slice(&line).map_err(|error| damaged(key.as_str(), &error.to_string()))?;
            each(&mut collected, entry)?;
            count += 1;
        }
        lines.into_inner().finish()?;
        if count != files {
            return Err(damaged(key.as_str(), &format!("it lists {count} files, the backup's record says {files}")));
        }
        Ok(collected)
    };
    tokio::task::spawn_blocking(read).await?
}
