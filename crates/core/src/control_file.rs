//! `global/pg_control`: who a data directory is, how it was shut down and where its recovery starts.
//!
//! Reads the file of PostgreSQL 14 to 18 as it is laid out on every 64-bit little-endian platform. A server may
//! be rewriting the file meanwhile: a torn read shows as a wrong checksum ([`ControlFileError::is_torn`]).
//!
//! Source: `src/include/catalog/pg_control.h`. What is read here lies at the same offsets in all of them: 17 put
//! `wal_level` into padding of the checkpoint's copy (offset 60), 18 `default_char_signedness` before the nonce
//! (256), which moved nothing but the checksum. Tried with the files of servers 15 and 17. For 14 and 16, which
//! share version 1300 with 15, and for 18, the header file is the only witness.

use jiff::Timestamp;

use crate::{Lsn, SystemIdentifier, TimelineId, WalSegmentSize, le};

/// `DBState`: what the server was doing when it last wrote the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClusterState {
    /// `DB_STARTUP`, seen only while `initdb` runs.
    Startup,
    /// `DB_SHUTDOWNED`: a primary, shut down cleanly.
    ShutDown,
    /// `DB_SHUTDOWNED_IN_RECOVERY`: a standby, shut down cleanly.
    ShutDownInRecovery,
    /// `DB_SHUTDOWNING`: the shutdown checkpoint is being written.
    ShuttingDown,
    /// `DB_IN_CRASH_RECOVERY`.
    InCrashRecovery,
    /// `DB_IN_ARCHIVE_RECOVERY`: a standby, or a restore that isn't finished.
    InArchiveRecovery,
    /// `DB_IN_PRODUCTION`: running, or it crashed.
    InProduction,
}

impl ClusterState {
    fn from_number(number: u32) -> Option<ClusterState> {
        Some(match number {
            0 => ClusterState::Startup,
            1 => ClusterState::ShutDown,
            2 => ClusterState::ShutDownInRecovery,
            3 => ClusterState::ShuttingDown,
            4 => ClusterState::InCrashRecovery,
            5 => ClusterState::InArchiveRecovery,
            6 => ClusterState::InProduction,
            _ => return None,
        })
    }
}

/// What the control file says. An LSN that is 0/0 means that there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ControlFile {
    /// The database system.
    pub system_identifier: SystemIdentifier,
    /// The file's format: 1300 in PostgreSQL 13 to 16, 1700 in 17, 1800 in 18.
    pub control_version: u32,
    /// The system catalogs' format, which differs between all major versions: 202209061 in 15.
    pub catalog_version: u32,
    /// What the server was doing when it last wrote the file.
    pub state: ClusterState,
    /// When the server wrote the file last, by its clock, to the second (`time`).
    pub written_at: Timestamp,
    /// The last checkpoint's record.
    pub checkpoint: Lsn,
    /// Where recovery from the last checkpoint starts (`checkPointCopy.redo`).
    pub checkpoint_redo: Lsn,
    /// The timeline of the last checkpoint. The server may have moved on to a later one since.
    pub timeline: TimelineId,
    /// The timeline before, if the last checkpoint begins a new one; the same otherwise.
    pub previous_timeline: TimelineId,
    /// The next transaction's id at the last checkpoint (`FullTransactionId`: epoch in the upper half).
    pub next_xid: u64,
    /// How far recovery must go before the data directory is consistent; set during archive recovery only.
    pub minimum_recovery_point: Lsn,
    /// On which timeline that is; a promotion sets it before its first checkpoint is there.
    pub minimum_recovery_timeline: Option<TimelineId>,
    /// The redo point of the backup that is being restored, until the end of that backup is reached.
    pub backup_start_point: Lsn,
    /// 0 is `minimal`, 1 `replica`, 2 `logical`.
    pub wal_level: i32,
    /// The server's `max_prepared_transactions`: recovery needs room for as many.
    pub max_prepared_transactions: u32,
    /// The server's `max_locks_per_transaction`.
    pub max_locks_per_transaction: u32,
    /// Length of a data page in bytes (`BLCKSZ`), nearly always 8,192.
    pub block_size: u32,
    /// Pages in each file of a relation but its last (`RELSEG_SIZE`): 131,072 (1 GiB) unless compiled otherwise.
    pub relation_segment_blocks: u32,
    /// Length of a WAL page in bytes (`XLOG_BLCKSZ`), nearly always 8,192.
    pub wal_block_size: u32,
    /// Length of the WAL segments.
    pub wal_segment_size: WalSegmentSize,
    /// Whether data pages carry checksums.
    pub data_checksums: bool,
}

/// Why bytes aren't a control file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlFileError {
    /// PostgreSQL always writes all of its 8,192 bytes.
    #[error("pg_control has only {found} bytes, PostgreSQL writes 8192: the file was cut off")]
    Truncated {
        /// How many there are.
        found: usize,
    },
    /// A format that isn't known here.
    #[error(
        "pg_control has the format version {version}{hint}: known are 1300 (PostgreSQL 13 to 16), \
         1700 (17) and 1800 (18)",
        version = .0,
        hint = byte_order_hint(*.0)
    )]
    UnknownVersion(u32),
    /// It was read while the server wrote it, or it is damaged.
    #[error(
        "pg_control's checksum is {found:08X}, its content's is {computed:08X}: it was read while the \
         server was writing it, or, if trying again doesn't help, it is damaged"
    )]
    BadCrc {
        /// The checksum in the file.
        found: u32,
        /// The checksum of what is in the file.
        computed: u32,
    },
    /// The checksum is right, but PostgreSQL doesn't write such a value.
    #[error("pg_control can't be understood: its checksum is right, but {field} is {found}")]
    Nonsense {
        /// The field's name in PostgreSQL.
        field: &'static str,
        /// What it holds.
        found: u32,
    },
}

impl ControlFileError {
    /// Whether reading the file again may help: the server writes it at any time, and a read isn't atomic.
    pub fn is_torn(&self) -> bool {
        matches!(self, ControlFileError::BadCrc { .. })
    }
}

/// `ReadControlFile` of xlog.c suspects the byte order, too.
fn byte_order_hint(version: u32) -> &'static str {
    match crc_offset(version.swap_bytes()) {
        Some(_) => ", as a computer with the other byte order writes it",
        None => "",
    }
}

/// Where the checksum lies, and with it the end of what it covers; `None` for unknown versions.
fn crc_offset(version: u32) -> Option<usize> {
    match version {
        1300 | 1700 => Some(288),
        1800 => Some(292),
        _ => None,
    }
}

impl ControlFile {
    /// The timeline on which the server was at last: it may have been promoted since its last checkpoint.
    pub fn newest_timeline(&self) -> TimelineId {
        self.minimum_recovery_timeline.map_or(self.timeline, |newest| newest.max(self.timeline))
    }

    /// Reads a control file. Its first 512 bytes are enough: PostgreSQL keeps the content within a disk sector.
    ///
    /// # Errors
    /// It is no control file of a known version, or it is torn ([`ControlFileError::is_torn`]).
    pub fn parse(bytes: &[u8]) -> Result<ControlFile, ControlFileError> {
        let truncated = ControlFileError::Truncated { found: bytes.len() };
        let u32_at = |at| le::u32_at(bytes, at).ok_or(truncated.clone());
        let u64_at = |at| le::u64_at(bytes, at).ok_or(truncated.clone());
        let lsn_at = |at| u64_at(at).map(Lsn::new);
        let checked = |field, at, valid: fn(u32) -> bool| match u32_at(at)? {
            found if valid(found) => Ok(found),
            found => Err(ControlFileError::Nonsense { field, found }),
        };
        let timeline_at = |field, at| {
            let found = u32_at(at)?;
            TimelineId::new(found).ok_or(ControlFileError::Nonsense { field, found })
        };

        let control_version = u32_at(8)?;
        let crc_at = crc_offset(control_version).ok_or(ControlFileError::UnknownVersion(control_version))?;
        let found = u32_at(crc_at)?;
        let computed = crc32c::crc32c(bytes.get(..crc_at).ok_or(truncated.clone())?);
        if found != computed {
            return Err(ControlFileError::BadCrc { found, computed });
        }
        let (state, segment_size) = (u32_at(16)?, u32_at(228)?);
        Ok(ControlFile {
            system_identifier: SystemIdentifier::new(u64_at(0)?),
            control_version,
            catalog_version: u32_at(12)?,
            state: ClusterState::from_number(state)
                .ok_or(ControlFileError::Nonsense { field: "state", found: state })?,
            written_at: Timestamp::from_second(u64_at(24)?.cast_signed()).unwrap_or(Timestamp::MIN),
            checkpoint: lsn_at(32)?,
            checkpoint_redo: lsn_at(40)?,
            timeline: timeline_at("checkPointCopy.ThisTimeLineID", 48)?,
            previous_timeline: timeline_at("checkPointCopy.PrevTimeLineID", 52)?,
            next_xid: u64_at(64)?,
            minimum_recovery_point: lsn_at(136)?,
            minimum_recovery_timeline: TimelineId::new(u32_at(144)?),
            backup_start_point: lsn_at(152)?,
            wal_level: u32_at(172)?.cast_signed(),
            max_prepared_transactions: u32_at(192)?,
            max_locks_per_transaction: u32_at(196)?,
            // The sizes that PostgreSQL's configure allows.
            block_size: checked("blcksz", 216, |n| n.is_power_of_two() && (1 << 10..=1 << 15).contains(&n))?,
            relation_segment_blocks: checked("relseg_size", 220, |n| n > 0)?,
            wal_block_size: checked("xlog_blcksz", 224, |n| n.is_power_of_two() && (1 << 10..=1 << 16).contains(&n))?,
            wal_segment_size: WalSegmentSize::new(segment_size.into())
                .ok_or(ControlFileError::Nonsense { field: "xlog_seg_size", found: segment_size })?,
            data_checksums: u32_at(252)? != 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Of a server 15 with 1 MB segments and checksums, amid the restore of a base backup: the first 512 bytes.
    const IN_RESTORE_15: &[u8] = include_bytes!("../tests/fixtures/pg_control-15");
    /// Of a server 17, shut down after `pg_resetwal -e 3 -x 1048576`: the first 512 bytes.
    const SHUT_DOWN_17: &[u8] = include_bytes!("../tests/fixtures/pg_control-17");

    fn lsn(text: &str) -> Lsn {
        text.parse().unwrap()
    }

    /// The file with some bytes overwritten, and the checksum made right again.
    fn with(file: &[u8], at: usize, bytes: &[u8]) -> Vec<u8> {
        let mut file = file.to_vec();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        let crc_at = crc_offset(le::u32_at(&file, 8).unwrap()).unwrap();
        let crc = crc32c::crc32c(&file[..crc_at]);
        file[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
        file
    }

    // Expected values: what pg_controldata printed.
    #[test]
    fn the_file_of_a_server_15_is_understood() {
        let expected = ControlFile {
            system_identifier: SystemIdentifier::new(7710528266549583088),
            control_version: 1300,
            catalog_version: 202209061,
            state: ClusterState::InArchiveRecovery,
            written_at: Timestamp::from_second(1_795_247_391).unwrap(),
            checkpoint: lsn("0/900060"),
            checkpoint_redo: lsn("0/900028"),
            timeline: TimelineId::FIRST,
            previous_timeline: TimelineId::FIRST,
            next_xid: 726,
            minimum_recovery_point: lsn("0/900028"),
            minimum_recovery_timeline: Some(TimelineId::FIRST),
            backup_start_point: lsn("0/900028"),
            wal_level: 2,
            max_prepared_transactions: 0,
            max_locks_per_transaction: 64,
            block_size: 8192,
            relation_segment_blocks: 131072,
            wal_block_size: 8192,
            wal_segment_size: WalSegmentSize::new(1 << 20).unwrap(),
            data_checksums: true,
        };
        assert_eq!(ControlFile::parse(IN_RESTORE_15), Ok(expected));
    }

    fn expected_17() -> ControlFile {
        ControlFile {
            system_identifier: SystemIdentifier::new(7710528727378908380),
            control_version: 1700,
            catalog_version: 202406281,
            state: ClusterState::ShutDown,
            written_at: Timestamp::from_second(1_795_247_367).unwrap(),
            checkpoint: lsn("0/2000028"),
            checkpoint_redo: lsn("0/2000028"),
            timeline: TimelineId::FIRST,
            previous_timeline: TimelineId::FIRST,
            next_xid: 3 << 32 | 1048576,
            minimum_recovery_point: Lsn::INVALID,
            minimum_recovery_timeline: None,
            backup_start_point: Lsn::INVALID,
            wal_level: 0,
            max_prepared_transactions: 0,
            max_locks_per_transaction: 64,
            block_size: 8192,
            relation_segment_blocks: 131072,
            wal_block_size: 8192,
            wal_segment_size: WalSegmentSize::DEFAULT,
            data_checksums: false,
        }
    }

    #[test]
    fn the_file_of_a_server_17_is_understood() {
        assert_eq!(ControlFile::parse(SHUT_DOWN_17), Ok(expected_17()));
        let mut whole = SHUT_DOWN_17.to_vec();
        whole.resize(8192, 0);
        assert_eq!(ControlFile::parse(&whole), Ok(expected_17()));
    }

    /// Built from the header file, not written by a server: 17's with one byte more before the nonce.
    #[test]
    fn the_layout_of_18_is_understood() {
        let mut file = SHUT_DOWN_17.to_vec();
        file[256] = 1;
        file[257..289].copy_from_slice(&SHUT_DOWN_17[256..288]);
        let file = with(&file, 8, &1800u32.to_le_bytes());
        assert_eq!(ControlFile::parse(&file), Ok(ControlFile { control_version: 1800, ..expected_17() }));
    }

    #[test]
    fn what_can_not_be_understood_is_told_apart_from_what_is_torn() {
        let error = |file: &[u8]| ControlFile::parse(file).unwrap_err();
        assert_eq!(error(&[]), ControlFileError::Truncated { found: 0 });
        assert_eq!(error(&SHUT_DOWN_17[..291]), ControlFileError::Truncated { found: 291 });
        assert_eq!(error(&[0; 512]), ControlFileError::UnknownVersion(0));

        let mut big_endian = SHUT_DOWN_17.to_vec();
        big_endian[8..12].reverse();
        let message = error(&big_endian).to_string();
        assert!(message.contains("the other byte order") && message.contains("18"), "{message}");

        for (at, field) in [
            (16, "state"),
            (48, "checkPointCopy.ThisTimeLineID"),
            (216, "blcksz"),
            (224, "xlog_blcksz"),
            (228, "xlog_seg_size"),
        ] {
            let found = if at == 48 { 0 } else { 77 };
            let file = with(SHUT_DOWN_17, at, &u32::to_le_bytes(found));
            assert_eq!(error(&file), ControlFileError::Nonsense { field, found });
            assert!(!error(&file).is_torn());
        }
    }

    proptest! {
        #[test]
        fn a_read_that_is_torn_anywhere_is_noticed(at in 0..288usize) {
            // The old file up to some byte, the new one after it.
            let mut new = with(SHUT_DOWN_17, 24, &u64::MAX.to_le_bytes());
            new = with(&new, 284, &[1, 2, 3, 4]);
            let torn = [&SHUT_DOWN_17[..at], &new[at..]].concat();
            if torn != new && torn != SHUT_DOWN_17 {
                prop_assert!(ControlFile::parse(&torn).unwrap_err().is_torn());
            }
        }

        #[test]
        fn any_bytes_are_taken_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = ControlFile::parse(&bytes);
        }
    }
}
