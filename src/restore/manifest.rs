//! The `backup_manifest` of a directory that was made of several backups: written while its files are.
//!
//! No list of files is ever in memory. Each file is added when it has its last content, by whichever thread gave it that.

use std::{
    fs::File,
    io::{self, Write},
};

use jiff::Timestamp;
use pgsidecar_core::{
    BackupRecord,
    backup_manifest::{ManifestVersion, ManifestWriter, WalRange},
};

use super::unpack::HeldFile;

/// Text that is written at a time.
const BUFFER_BYTES: usize = 64 << 10;

/// A manifest that grows.
pub struct NewManifest {
    writer: ManifestWriter,
    file: File,
    buffer: Vec<u8>,
}

impl NewManifest {
    /// Begins the manifest of what this backup is restored to.
    pub fn new(file: File, backup: &BackupRecord) -> NewManifest {
        let version = ManifestVersion::for_major(backup.major_version());
        NewManifest { writer: ManifestWriter::new(version, backup.system_identifier), file, buffer: Vec::new() }
    }

    /// Adds a file by its path in the data directory.
    ///
    /// # Errors
    /// If the manifest can't be written.
    pub fn add(&mut self, path: &[u8], size: u64, modified: Timestamp, crc32c: u32) -> io::Result<()> {
        self.writer.add_file(&mut self.buffer, path, size, modified, crc32c);
        if self.buffer.len() < BUFFER_BYTES {
            return Ok(());
        }
        self.file.write_all(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }

    /// Adds the files of the last part, and ends the manifest with the WAL that the backup needs.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn finish(mut self, held: &[HeldFile], backup: &BackupRecord) -> io::Result<()> {
        for file in held {
            let crc = crc32c::crc32c(&file.content);
            self.add(file.path.as_bytes(), file.content.len() as u64, file.modified, crc)?;
        }
        let wal = [WalRange { timeline: backup.timeline, start: backup.start_lsn, end: backup.stop_lsn }];
        self.writer.finish(&mut self.buffer, &wal);
        self.file.write_all(&self.buffer)
    }
}
