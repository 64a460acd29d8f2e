//! Base backups as the repository knows them: their ids and their record, `backup.json`.

use std::{fmt, str::FromStr};

use jiff::{Timestamp, civil, tz::TimeZone};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Lsn, ParseIdError, Sha256Digest, SystemIdentifier, TimelineId, WalSegmentSize};

/// How much of the database a backup holds by itself.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackupKind {
    /// Everything.
    Full,
    /// What has changed since the last full backup.
    Differential,
    /// What has changed since the last backup of any kind.
    Incremental,
}

impl BackupKind {
    const ALL: [BackupKind; 3] = [BackupKind::Full, BackupKind::Differential, BackupKind::Incremental];

    /// The kind's name, as in `backup create --type`.
    pub const fn as_str(self) -> &'static str {
        match self {
            BackupKind::Full => "full",
            BackupKind::Differential => "differential",
            BackupKind::Incremental => "incremental",
        }
    }
}

impl fmt::Display for BackupKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for BackupKind {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<BackupKind, ParseIdError> {
        BackupKind::ALL
            .into_iter()
            .find(|kind| kind.as_str() == text)
            .ok_or_else(|| ParseIdError::new("kind of backup (full, differential or incremental)", text))
    }
}

/// The identity of a base backup within its cluster: when it began (UTC, to the second) and its kind,
/// `20261121T061500Z-full`. Ids sort by time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackupId {
    began: Timestamp,
    kind: BackupKind,
}

impl BackupId {
    /// The id of a backup of this kind that begins at this time; fractions of the second are dropped.
    pub fn new(began: Timestamp, kind: BackupKind) -> BackupId {
        let began = Timestamp::from_second(began.as_second()).unwrap_or(began);
        BackupId { began, kind }
    }

    /// When the backup began, to the second.
    pub fn began(&self) -> Timestamp {
        self.began
    }

    /// What kind of backup it is.
    pub fn kind(&self) -> BackupKind {
        self.kind
    }
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}-{}", format_id_time(self.began), self.kind))
    }
}

impl fmt::Debug for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for BackupId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<BackupId, ParseIdError> {
        parse_backup_id(text).ok_or_else(|| ParseIdError::new("backup id (like 20261121T061500Z-full)", text))
    }
}

fn parse_backup_id(text: &str) -> Option<BackupId> {
    let (time, kind) = text.split_once('-')?;
    Some(BackupId { began: parse_id_time(time)?, kind: kind.parse().ok()? })
}

/// The time in an id: `20261121T061500Z`.
pub(crate) fn format_id_time(began: Timestamp) -> String {
    let t = TimeZone::UTC.to_datetime(began);
    format!("{:04}{:02}{:02}T{:02}{:02}{:02}Z", t.year(), t.month(), t.day(), t.hour(), t.minute(), t.second())
}

/// The inverse of [`format_id_time`].
pub(crate) fn parse_id_time(time: &str) -> Option<Timestamp> {
    let digits = |from: usize, to: usize| -> Option<i16> {
        let part = time.get(from..to)?;
        part.bytes().all(|b| b.is_ascii_digit()).then(|| part.parse().ok()).flatten()
    };
    let two = |from: usize| digits(from, from + 2).and_then(|number| i8::try_from(number).ok());
    if time.len() != 16 || time.as_bytes().get(8) != Some(&b'T') || !time.ends_with('Z') {
        return None;
    }
    let began = civil::DateTime::new(digits(0, 4)?, two(4)?, two(6)?, two(9)?, two(11)?, two(13)?, 0).ok()?;
    let began = TimeZone::UTC.to_timestamp(began).ok()?;
    // One text for one time: what isn't written exactly as we write it is not ours.
    (format_id_time(began) == time).then_some(began)
}

impl Serialize for BackupId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for BackupId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<BackupId, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The newest layout of `backup.json` that this code writes and reads.
pub const BACKUP_FORMAT: u32 = 1;

/// `backup.json`: the commit marker of a base backup. Written last; a backup without it does not exist.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct BackupRecord {
    /// [`BACKUP_FORMAT`] of the writer.
    pub format: u32,
    /// The backup's id.
    pub id: BackupId,
    /// The backup that this one builds on; `None` for a full one.
    pub parent: Option<BackupId>,
    /// The database system that was backed up.
    pub system_identifier: SystemIdentifier,
    /// `server_version_num`, e.g. 150018.
    pub server_version: u32,
    /// The timeline on which the whole backup was taken.
    pub timeline: TimelineId,
    /// Where replay has to begin: `pg_backup_start`'s result.
    pub start_lsn: Lsn,
    /// Where the backup is consistent: `pg_backup_stop`'s result.
    pub stop_lsn: Lsn,
    /// The server's clock when `pg_backup_start` had returned.
    pub started_at: Timestamp,
    /// The server's clock when `pg_backup_stop` had returned. A recovery target in time must lie after it.
    pub stopped_at: Timestamp,
    /// The next transaction id to be given out at the stop (64 bits, with the epoch): an XID target must not lie before it.
    pub next_xid_at_stop: u64,
    /// Whether the server was in recovery.
    pub from_standby: bool,
    /// Size of a WAL segment.
    pub wal_segment_size: WalSegmentSize,
    /// Size of a block of a relation, in bytes.
    pub block_size: u32,
    /// Whether the database was created with page checksums.
    pub data_checksums: bool,
    /// Tablespaces outside of the data directory.
    pub tablespaces: Vec<TablespaceRecord>,
    /// The tar archives; together they are the data directory. The last one holds what makes the directory
    /// startable (`backup_label`, `global/pg_control`, `PG_VERSION`) and must be unpacked last.
    pub parts: Vec<PartRecord>,
    /// PostgreSQL's `backup_manifest`.
    pub manifest: StoredObject,
    /// Where each file lies in the parts, a JSON object a line.
    pub index: StoredObject,
    /// Number of files in all parts.
    pub files: u64,
    /// Bytes that the data directory has when it's restored. More than the parts hold if the backup builds on others.
    #[serde(default)]
    pub restored_bytes: u64,
    /// Files of relations with damaged pages: they were damaged in the database, and are in the backup as they are.
    #[serde(default)]
    pub damaged: Vec<DamagedFile>,
    /// What was left out because it is neither a file nor a directory, a sentence each, for people.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// The pgsidecar that made it.
    pub writer: String,
}

impl BackupRecord {
    /// Bytes of the database that the parts hold, before compression.
    pub fn plain_bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.file_bytes).sum()
    }

    /// Bytes that the backup takes in the repository.
    pub fn stored_bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.stored.size).sum::<u64>() + self.manifest.size + self.index.size
    }

    /// Bytes that the data directory has when the backup is restored, with what comes from backups that it builds on.
    pub fn restored_size(&self) -> u64 {
        // Records of the first versions, which knew full backups only, don't tell.
        self.restored_bytes.max(self.plain_bytes())
    }

    /// How many pages are damaged.
    pub fn damaged_pages(&self) -> u64 {
        self.damaged.iter().map(|file| file.count).sum()
    }

    /// PostgreSQL's major version, e.g. 15.
    pub fn major_version(&self) -> u32 {
        self.server_version / 10_000
    }
}

/// A tablespace outside of the data directory.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TablespaceRecord {
    /// Its OID, the name of its link in `pg_tblspc`.
    pub oid: u32,
    /// The directory that the link pointed to.
    pub location: String,
}

/// A file of a relation in which pages have a wrong checksum.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DamagedFile {
    /// Path relative to the data directory.
    pub path: String,
    /// The relation, `database.schema.name`, where the server could tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relation: Option<String>,
    /// The numbers of the damaged blocks in the relation's fork, ascending; the first hundred.
    pub blocks: Vec<u32>,
    /// How many there are in all.
    pub count: u64,
}

/// An object as it is stored, to be compared with what comes back.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StoredObject {
    /// Bytes.
    pub size: u64,
    /// SHA-256 of these bytes.
    pub sha256: Sha256Digest,
}

/// One `part-NNNNN.tar.zst`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PartRecord {
    /// Its number, from 1 on.
    pub number: u32,
    /// The object.
    #[serde(flatten)]
    pub stored: StoredObject,
    /// Number of files in it (directories and links aren't counted).
    pub files: u64,
    /// Sum of the sizes of these files.
    pub file_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_written_and_read_in_one_way() {
        let id = BackupId::new("2026-11-21T06:15:00.75Z".parse().unwrap(), BackupKind::Full);
        assert_eq!(id.to_string(), "20261121T061500Z-full");
        assert_eq!("20261121T061500Z-full".parse(), Ok(id));
        for text in [
            "",
            "20261121T061500Z",
            "20261121T061500Z-",
            "20261121T061500Z-FULL",
            "20261321T061500Z-full",
            "20261121T061560Z-full",
            "20261121t061500Z-full",
            "+0261121T061500Z-full",
            "20261121T061500Z-full/..",
            "2026-11-21T06:15:00Z-full",
            "２0261121T061500Z-full",
        ] {
            assert!(text.parse::<BackupId>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn ids_sort_by_time() {
        let id = |text: &str| text.parse::<BackupId>().unwrap();
        assert!(id("20261121T061500Z-incremental") < id("20261121T061501Z-full"));
    }
}
