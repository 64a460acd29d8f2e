//! Snapshots: volumes that the storage snapshots between `pg_backup_start` and `pg_backup_stop`, as the repository knows
//! them by `snapshots/<id>/snapshot.json`. The data stays with the storage; the record has what makes a database of it
//! again.

use std::{fmt, str::FromStr};

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{
    ClusterState, ControlFile, Lsn, ParseIdError, SystemIdentifier, TimelineId, WalHeader, WalSegmentSize,
    backup::{TablespaceRecord, format_id_time, parse_id_time},
};

/// The identity of a snapshot within its cluster: when it began (UTC, to the second), `20261121T061500Z-snapshot`. Ids
/// sort by time, and none is a backup's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SnapshotId {
    began: Timestamp,
}

/// What follows the time in an id.
const ID_SUFFIX: &str = "-snapshot";

impl SnapshotId {
    /// The id of a snapshot that begins at this time; fractions of the second are dropped.
    pub fn new(began: Timestamp) -> SnapshotId {
        SnapshotId { began: Timestamp::from_second(began.as_second()).unwrap_or(began) }
    }

    /// When it began, to the second.
    pub fn began(&self) -> Timestamp {
        self.began
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&(format_id_time(self.began) + ID_SUFFIX))
    }
}

impl fmt::Debug for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for SnapshotId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<SnapshotId, ParseIdError> {
        let id = text.strip_suffix(ID_SUFFIX).and_then(parse_id_time).map(|began| SnapshotId { began });
        id.ok_or_else(|| ParseIdError::new("snapshot id (like 20261121T061500Z-snapshot)", text))
    }
}

impl Serialize for SnapshotId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SnapshotId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<SnapshotId, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What a `pg_control` says, its first 512 bytes: PostgreSQL keeps the content within a disk sector
/// (PG_CONTROL_MAX_SAFE_SIZE) and fills the file up with zeros to 8,192. Written as hexadecimal digits.
#[derive(Clone, PartialEq, Eq)]
pub struct ControlBytes([u8; ControlBytes::LEN]);

impl ControlBytes {
    const LEN: usize = 512;
    /// PG_CONTROL_FILE_SIZE.
    const FILE_LEN: usize = 8192;

    /// The content of a file that can be understood; `None` for any other bytes.
    pub fn of(file: &[u8]) -> Option<ControlBytes> {
        ControlFile::parse(file).ok()?;
        file.get(..ControlBytes::LEN)?.try_into().ok().map(ControlBytes)
    }

    /// The whole file.
    pub fn to_file(&self) -> Vec<u8> {
        let mut file = self.0.to_vec();
        file.resize(ControlBytes::FILE_LEN, 0);
        file
    }

    fn from_hex(text: &str) -> Option<ControlBytes> {
        let digit =
            |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f').then(|| char::from(byte).to_digit(16)).flatten();
        let pair = |pair: &[u8]| u8::try_from(digit(*pair.first()?)? << 4 | digit(*pair.get(1)?)?).ok();
        let bytes: Option<Vec<u8>> = text.as_bytes().chunks(2).map(pair).collect();
        bytes.filter(|bytes| bytes.len() == ControlBytes::LEN).and_then(|bytes| ControlBytes::of(&bytes))
    }
}

impl fmt::Debug for ControlBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ControlBytes").field(&ControlFile::parse(&self.0)).finish()
    }
}

impl Serialize for ControlBytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let hex: String = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
        serializer.serialize_str(&hex)
    }
}

impl<'de> Deserialize<'de> for ControlBytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ControlBytes, D::Error> {
        let text = String::deserialize(deserializer)?;
        ControlBytes::from_hex(&text).ok_or_else(|| serde::de::Error::custom("not the content of a pg_control"))
    }
}

/// The newest layout of `snapshot.json` that this code writes and reads.
pub const SNAPSHOT_FORMAT: u32 = 1;

/// `snapshot.json`: the commit marker of a snapshot. Written when all of its WAL is in the repository; a snapshot without
/// it does not exist.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// [`SNAPSHOT_FORMAT`] of the writer.
    pub format: u32,
    /// The snapshot's id.
    pub id: SnapshotId,
    /// What whoever began it called it; also in `backup_label`.
    pub label: String,
    /// The database system.
    pub system_identifier: SystemIdentifier,
    /// `server_version_num`, e.g. 150018.
    pub server_version: u32,
    /// The system catalogs' format, e.g. 202209061.
    pub catalog_version: u32,
    /// The timeline on which the whole snapshot was taken.
    pub timeline: TimelineId,
    /// Where replay has to begin: `pg_backup_start`'s result.
    pub start_lsn: Lsn,
    /// The checkpoint that recovery begins with, from `backup_label`.
    pub checkpoint_lsn: Lsn,
    /// Where the snapshot is consistent: `pg_backup_stop`'s result.
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
    /// Tablespaces outside of the data directory.
    pub tablespaces: Vec<TablespaceRecord>,
    /// Content of `backup_label`, as `pg_backup_stop` returned it.
    pub backup_label: String,
    /// Content of `tablespace_map`; empty without tablespaces.
    pub tablespace_map: String,
    /// `pg_control` as it was just before `pg_backup_stop`: the one in a copy can be torn, and that of a standby's has to
    /// cover every page of a copy that wasn't made in one instant.
    pub pg_control: ControlBytes,
    /// The pgsidecar that made it.
    pub writer: String,
}

/// Why a data directory isn't this snapshot. Worded to follow the directory's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// It is another database.
    #[error("is of the database system {found}, and the snapshot of {expected}")]
    OtherSystem {
        /// What is there.
        found: SystemIdentifier,
        /// What the snapshot was taken of.
        expected: SystemIdentifier,
    },
    /// Another major version, or compiled otherwise.
    #[error("has {what} {found}, and the snapshot {expected}")]
    OtherFormat {
        /// The property's name.
        what: &'static str,
        /// What is there.
        found: u64,
        /// What the snapshot has.
        expected: u64,
    },
    /// Older than the snapshot.
    #[error("is older than the snapshot: its last checkpoint is at {found}, that of the snapshot at {expected}")]
    Older {
        /// The last checkpoint there.
        found: Lsn,
        /// The one that the snapshot began with.
        expected: Lsn,
    },
    /// A server ran on it after the snapshot.
    #[error("isn't as it was in the snapshot: a server has written to it since ({0})")]
    WrittenSince(String),
}

impl SnapshotRecord {
    /// PostgreSQL's major version, e.g. 15.
    pub fn major_version(&self) -> u32 {
        self.server_version / 10_000
    }

    /// Whether a data directory with this `pg_control` can be what was snapshotted: no other database, nothing older, and
    /// nothing that a server has written to since.
    ///
    /// # Errors
    /// What doesn't fit.
    pub fn fits(&self, control: &ControlFile) -> Result<(), Misfit> {
        if control.system_identifier != self.system_identifier {
            return Err(Misfit::OtherSystem { found: control.system_identifier, expected: self.system_identifier });
        }
        let formats = [
            ("the catalog version", control.catalog_version.into(), self.catalog_version.into()),
            ("blocks of", control.block_size.into(), self.block_size.into()),
            ("WAL segments of", control.wal_segment_size.bytes(), self.wal_segment_size.bytes()),
        ];
        if let Some((what, found, expected)) = formats.into_iter().find(|(_, found, expected)| found != expected) {
            return Err(Misfit::OtherFormat { what, found, expected });
        }
        if control.checkpoint < self.checkpoint_lsn {
            return Err(Misfit::Older { found: control.checkpoint, expected: self.checkpoint_lsn });
        }
        // While the snapshot lasted the server ran and was what it had been at its beginning.
        let running = if self.from_standby { ClusterState::InArchiveRecovery } else { ClusterState::InProduction };
        let since = if control.state != running {
            Some(format!("its state is {:?}", control.state))
        } else if control.timeline != self.timeline {
            Some(format!("it is on timeline {}", control.timeline))
        } else if control.checkpoint > self.stop_lsn {
            Some(format!("its last checkpoint is at {}, the snapshot ended at {}", control.checkpoint, self.stop_lsn))
        } else if control.minimum_recovery_point > self.stop_lsn {
            Some(format!(
                "it has recovered up to {}, the snapshot ended at {}",
                control.minimum_recovery_point, self.stop_lsn
            ))
        } else if control.written_at > self.stopped_at {
            Some(format!("its pg_control is of {}, the snapshot ended at {}", control.written_at, self.stopped_at))
        } else {
            None
        };
        since.map_or(Ok(()), |how| Err(Misfit::WrittenSince(how)))
    }

    /// Whether a segment of this beginning was written after the snapshot. Segments that were only renamed for later use
    /// begin with another position. On a primary `pg_backup_stop` leaves the segment, so that what is behind it is later; a
    /// standby can have received any amount beyond its own end.
    pub fn is_later_wal(&self, header: &WalHeader) -> bool {
        let last = self.wal_segment_size.previous_segment_number(self.stop_lsn);
        !self.from_standby
            && header.system_identifier == self.system_identifier
            && header.page_address > self.wal_segment_size.start_of(last)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Of a server 17, shut down: the first 512 bytes.
    const CONTROL: &[u8] = include_bytes!("../tests/fixtures/pg_control-17");

    /// A snapshot that begins with the fixture's checkpoint and ends a segment later.
    pub(crate) fn record() -> SnapshotRecord {
        let control = ControlFile::parse(CONTROL).unwrap();
        SnapshotRecord {
            format: SNAPSHOT_FORMAT,
            id: "20261121T061500Z-snapshot".parse().unwrap(),
            label: "velero".into(),
            system_identifier: control.system_identifier,
            server_version: 170_006,
            catalog_version: control.catalog_version,
            timeline: control.timeline,
            start_lsn: control.checkpoint_redo,
            checkpoint_lsn: control.checkpoint,
            stop_lsn: "0/3000100".parse().unwrap(),
            started_at: control.written_at,
            stopped_at: Timestamp::from_second(control.written_at.as_second() + 60).unwrap(),
            next_xid_at_stop: 1000,
            from_standby: false,
            wal_segment_size: control.wal_segment_size,
            block_size: control.block_size,
            tablespaces: vec![],
            backup_label: String::new(),
            tablespace_map: String::new(),
            pg_control: ControlBytes::of(CONTROL).unwrap(),
            writer: "test".into(),
        }
    }

    fn control() -> ControlFile {
        ControlFile { state: ClusterState::InProduction, ..ControlFile::parse(CONTROL).unwrap() }
    }

    #[test]
    fn ids_are_written_and_read_in_one_way_and_are_no_backup_s() {
        let id = SnapshotId::new("2026-11-21T06:15:00.75Z".parse().unwrap());
        assert_eq!(id.to_string(), "20261121T061500Z-snapshot");
        assert_eq!("20261121T061500Z-snapshot".parse(), Ok(id));
        assert!(id.to_string().parse::<crate::BackupId>().is_err());
        for text in
            ["", "20261121T061500Z", "20261121T061500Z-full", "20261321T061500Z-snapshot", "-snapshot", "../x-snapshot"]
        {
            assert!(text.parse::<SnapshotId>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let json = serde_json::to_string(&record()).unwrap();
        assert_eq!(serde_json::from_str::<SnapshotRecord>(&json).unwrap(), record());
        let file = record().pg_control.to_file();
        assert_eq!((file.len(), &file[..512]), (8192, CONTROL));
        // Damage in the middle of pg_control is found out.
        let digits = json.split("\"pg_control\":\"").nth(1).unwrap();
        let damaged = json.replacen(&digits[80..90], "0123456789", 1);
        assert!(serde_json::from_str::<SnapshotRecord>(&damaged).is_err());
        assert!(serde_json::from_str::<ControlBytes>(&format!("{:?}", &digits[..1022])).is_err());
        assert!(serde_json::from_str::<ControlBytes>(&format!("{:?}", digits[..1024].to_uppercase())).is_err());
    }

    #[test]
    fn only_what_was_snapshotted_fits() {
        let (record, fitting) = (record(), control());
        let (mut texts, later) = (Vec::new(), "0/4000028".parse().unwrap());
        assert_eq!(record.fits(&fitting), Ok(()));
        assert_eq!(record.fits(&ControlFile { checkpoint: "0/3000028".parse().unwrap(), ..fitting }), Ok(()));
        for control in [
            ControlFile { system_identifier: SystemIdentifier::new(7), ..fitting },
            ControlFile { catalog_version: 202209061, ..fitting },
            ControlFile { wal_segment_size: WalSegmentSize::new(1 << 20).unwrap(), ..fitting },
            ControlFile { checkpoint: "0/1000028".parse().unwrap(), ..fitting },
            ControlFile { state: ClusterState::ShutDown, ..fitting },
            ControlFile { timeline: TimelineId::new(2).unwrap(), ..fitting },
            ControlFile { checkpoint: later, ..fitting },
            ControlFile { minimum_recovery_point: later, ..fitting },
            ControlFile { written_at: Timestamp::from_second(fitting.written_at.as_second() + 61).unwrap(), ..fitting },
        ] {
            texts.push(record.fits(&control).unwrap_err().to_string());
        }
        insta::assert_snapshot!(texts.join("\n"), @r"
        is of the database system 7, and the snapshot of 7710528727378908380
        has the catalog version 202209061, and the snapshot 202406281
        has WAL segments of 1048576, and the snapshot 16777216
        is older than the snapshot: its last checkpoint is at 0/1000028, that of the snapshot at 0/2000028
        isn't as it was in the snapshot: a server has written to it since (its state is ShutDown)
        isn't as it was in the snapshot: a server has written to it since (it is on timeline 2)
        isn't as it was in the snapshot: a server has written to it since (its last checkpoint is at 0/4000028, the snapshot ended at 0/3000100)
        isn't as it was in the snapshot: a server has written to it since (it has recovered up to 0/4000028, the snapshot ended at 0/3000100)
        isn't as it was in the snapshot: a server has written to it since (its pg_control is of 2026-11-21T07:50:28Z, the snapshot ended at 2026-11-21T07:50:27Z)
        ");
        let standby = SnapshotRecord { from_standby: true, ..record };
        assert!(standby.fits(&fitting).is_err());
        assert_eq!(standby.fits(&ControlFile { state: ClusterState::InArchiveRecovery, ..fitting }), Ok(()));
    }

    #[test]
    fn wal_behind_the_segment_of_the_stop_was_written_later() {
        let record = record();
        let header = |address: &str| WalHeader {
            magic: 0xD116,
            timeline: TimelineId::FIRST,
            page_address: address.parse().unwrap(),
            system_identifier: record.system_identifier,
            segment_size: record.wal_segment_size,
            block_size: 8192,
        };
        assert!(!record.is_later_wal(&header("0/3000000")));
        assert!(record.is_later_wal(&header("0/4000000")));
        assert!(
            !record.is_later_wal(&WalHeader { system_identifier: SystemIdentifier::new(7), ..header("0/4000000") })
        );
        assert!(!SnapshotRecord { from_standby: true, ..record.clone() }.is_later_wal(&header("0/4000000")));
    }
}
