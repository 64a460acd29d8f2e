//! PostgreSQL's `backup_manifest`: the files of a base backup with their sizes and checksums, and the WAL
//! that it needs ("Backup Manifest Format" in the manual, backup_manifest.c, parse_manifest.c).
//!
//! [`ManifestWriter`] writes byte for byte what the server writes, so that pg_verifybackup and
//! pg_combinebackup read it; it keeps no list of files, its memory is the same for one and for a million.
//! [`parse_manifest`] holds all of it in memory, proves its own checksum, and refuses paths that would
//! leave the data directory. Checksums of files are CRC32C, PostgreSQL's default; manifests with others are
//! refused. Whether the files match is not decided here.

mod parse;

use jiff::Timestamp;
use sha2::{Digest, Sha256};

use crate::{Lsn, Sha256Digest, SystemIdentifier, TimelineId};

pub use parse::{Manifest, ManifestError, ManifestFile, parse_manifest};

/// The version of the format. A server reads its own and older ones.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ManifestVersion {
    /// PostgreSQL 13 to 16.
    V1,
    /// 17 and later: with the system identifier.
    V2,
}

impl ManifestVersion {
    /// What a server of this major version writes.
    pub fn for_major(major: u32) -> ManifestVersion {
        if major >= 17 { ManifestVersion::V2 } else { ManifestVersion::V1 }
    }
}

/// WAL that must be replayed on one timeline to make a backup consistent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WalRange {
    /// The timeline.
    pub timeline: TimelineId,
    /// The backup's start, or where this timeline began if the backup started on an earlier one.
    pub start: Lsn,
    /// The first byte that isn't needed: the backup's stop, or where the next timeline began.
    pub end: Lsn,
}

/// Writes a manifest piece by piece: [`begin`](ManifestWriter::begin), then
/// [`add_file`](ManifestWriter::add_file) for each file, then [`finish`](ManifestWriter::finish). Each
/// appends to `out`, which the caller empties whenever it likes.
pub struct ManifestWriter {
    version: ManifestVersion,
    system_identifier: SystemIdentifier,
    /// Over all that was written. The checksum's own line isn't part of it.
    sha256: Sha256,
    stage: Stage,
}

#[derive(PartialEq)]
enum Stage {
    NotBegun,
    NoFileYet,
    Files,
}

impl ManifestWriter {
    /// A manifest of a backup of this system. Version 1 doesn't tell the identifier.
    pub fn new(version: ManifestVersion, system_identifier: SystemIdentifier) -> ManifestWriter {
        ManifestWriter { version, system_identifier, sha256: Sha256::new(), stage: Stage::NotBegun }
    }

    /// Appends what stands before the first file. The other methods do so themselves when it wasn't called,
    /// and a second call appends nothing.
    pub fn begin(&mut self, out: &mut Vec<u8>) {
        if self.stage != Stage::NotBegun {
            return;
        }
        self.stage = Stage::NoFileYet;
        let head = match self.version {
            ManifestVersion::V1 => "{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n\"Files\": [".to_owned(),
            ManifestVersion::V2 => format!(
                "{{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n\"System-Identifier\": {},\n\"Files\": [",
                self.system_identifier
            ),
        };
        self.append(out, &head);
    }

    /// Appends one file: its path relative to the data directory with `/` between components
    /// (`pg_tblspc/<oid>/…` for what lies in a tablespace), its size in bytes, its modification time (of
    /// which whole seconds are kept), and the CRC32C of what was backed up of it. `backup_label` and
    /// `tablespace_map` are files as well; WAL and the manifest itself aren't.
    ///
    /// The same path twice makes a manifest that no one reads; this is not noticed here.
    pub fn add_file(&mut self, out: &mut Vec<u8>, path: &[u8], size: u64, modified: Timestamp, crc32c: u32) {
        self.begin(out);
        let separator = if self.stage == Stage::NoFileYet { "\n" } else { ",\n" };
        self.stage = Stage::Files;
        // A manifest is UTF-8 whatever the file system's names are; others go in as bytes.
        let path = match std::str::from_utf8(path) {
            Ok(text) => format!("\"Path\": {}", serde_json::Value::from(text)),
            Err(_) => format!("\"Encoded-Path\": \"{}\"", to_hex(path)),
        };
        let line = format!(
            "{separator}{{ {path}, \"Size\": {size}, \"Last-Modified\": \"{}\", \
             \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"{}\" }}",
            modified.strftime(TIME_FORMAT),
            // The server writes the digits of the integer as it lies in its memory. We run on the machine
            // of the server, and a data directory moves only between machines of equal byte order.
            to_hex(&crc32c.to_ne_bytes()),
        );
        self.append(out, &line);
    }

    /// Appends the WAL that the backup needs, the newest timeline first as the server does, and the
    /// manifest's own checksum.
    pub fn finish(mut self, out: &mut Vec<u8>, wal_ranges: &[WalRange]) {
        self.begin(out);
        let ranges: Vec<String> = wal_ranges
            .iter()
            .map(|WalRange { timeline, start, end }| {
                format!("{{ \"Timeline\": {timeline}, \"Start-LSN\": \"{start}\", \"End-LSN\": \"{end}\" }}")
            })
            .collect();
        self.append(out, &format!("\n],\n\"WAL-Ranges\": [\n{}\n],\n", ranges.join(",\n")));
        let checksum = Sha256Digest::new(self.sha256.finalize().into());
        out.extend_from_slice(format!("\"Manifest-Checksum\": \"{checksum}\"}}\n").as_bytes());
    }

    fn append(&mut self, out: &mut Vec<u8>, text: &str) {
        self.sha256.update(text);
        out.extend_from_slice(text.as_bytes());
    }
}

const TIME_FORMAT: &str = "%Y-%m-%d %H:%M:%S GMT";

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn time(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn range(timeline: u32, start: u64, end: u64) -> WalRange {
        WalRange { timeline: TimelineId::new(timeline).unwrap(), start: Lsn::new(start), end: Lsn::new(end) }
    }

    // The order of the checksum's digits is the machine's.
    #[cfg(target_endian = "little")]
    #[test]
    fn it_writes_what_the_server_writes() {
        let mut out = Vec::new();
        let mut writer = ManifestWriter::new(ManifestVersion::for_major(17), SystemIdentifier::new(7_575_002_186));
        writer.begin(&mut out);
        let modified = time("2026-11-21T06:15:00.999Z");
        writer.add_file(&mut out, b"backup_label", 227, modified, 0xD5F6_0A4B);
        writer.add_file(&mut out, "a \"b\" \\ \n \u{1} ä".as_bytes(), 0, modified, 0);
        writer.add_file(&mut out, b"latin-\xe4", 1, time("1970-01-01T00:00:00Z"), 0xFF);
        writer.finish(&mut out, &[range(2, 0x0300_0000, 0x0300_0120), range(1, 0x0200_0028, 0x0300_0000)]);
        insta::assert_snapshot!(String::from_utf8(out).unwrap(), @r#"
        { "PostgreSQL-Backup-Manifest-Version": 2,
        "System-Identifier": 7575002186,
        "Files": [
        { "Path": "backup_label", "Size": 227, "Last-Modified": "2026-11-21 06:15:00 GMT", "Checksum-Algorithm": "CRC32C", "Checksum": "4b0af6d5" },
        { "Path": "a \"b\" \\ \n \u0001 ä", "Size": 0, "Last-Modified": "2026-11-21 06:15:00 GMT", "Checksum-Algorithm": "CRC32C", "Checksum": "00000000" },
        { "Encoded-Path": "6c6174696e2de4", "Size": 1, "Last-Modified": "1970-01-01 00:00:00 GMT", "Checksum-Algorithm": "CRC32C", "Checksum": "ff000000" }
        ],
        "WAL-Ranges": [
        { "Timeline": 2, "Start-LSN": "0/3000000", "End-LSN": "0/3000120" },
        { "Timeline": 1, "Start-LSN": "0/2000028", "End-LSN": "0/3000000" }
        ],
        "Manifest-Checksum": "27ac6acfdda94e3cf7834432f76b0c8bf3bf429f529ec23b695c464d36f74c9e"}
        "#);
    }

    #[test]
    fn versions_before_17_do_not_tell_the_system_identifier() {
        let mut out = Vec::new();
        let writer = ManifestWriter::new(ManifestVersion::for_major(16), SystemIdentifier::new(1));
        writer.finish(&mut out, &[range(1, 0x0200_0028, 0x0200_0100)]);
        insta::assert_snapshot!(String::from_utf8(out).unwrap(), @r#"
        { "PostgreSQL-Backup-Manifest-Version": 1,
        "Files": [
        ],
        "WAL-Ranges": [
        { "Timeline": 1, "Start-LSN": "0/2000028", "End-LSN": "0/2000100" }
        ],
        "Manifest-Checksum": "3ef7e2e2841f9ebdc5727093812154c4fb52730ec4797f1495815f62c08d6ef2"}
        "#);
    }

    fn file() -> impl Strategy<Value = ManifestFile> {
        let component = prop::collection::vec(1u8.., 1..8)
            .prop_filter("a component", |c| !c.contains(&b'/') && c != b"." && c != b"..");
        let path = prop::collection::vec(component, 1..4).prop_map(|components| components.join(&b'/'));
        (path, any::<u64>(), 0i64..4_000_000_000, any::<u32>()).prop_map(|(path, size, modified, crc32c)| {
            ManifestFile { path, size, modified: Timestamp::from_second(modified).unwrap(), crc32c }
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(
            major in 14u32..20,
            mut files in prop::collection::vec(file(), 0..20),
            ranges in prop::collection::vec((1u32.., any::<u64>(), any::<u64>()), 0..3),
        ) {
            files.sort_by(|a, b| a.path.cmp(&b.path));
            files.dedup_by(|a, b| a.path == b.path);
            let version = ManifestVersion::for_major(major);
            let wal_ranges: Vec<_> = ranges.into_iter().map(|(timeline, start, end)| range(timeline, start, end)).collect();
            let mut writer = ManifestWriter::new(version, SystemIdentifier::new(u64::MAX));
            // The caller empties the buffer as it likes.
            let (mut out, mut whole) = (Vec::new(), Vec::new());
            for file in &files {
                writer.add_file(&mut out, &file.path, file.size, file.modified, file.crc32c);
                whole.append(&mut out);
            }
            writer.finish(&mut whole, &wal_ranges);
            let system_identifier = (version == ManifestVersion::V2).then_some(SystemIdentifier::new(u64::MAX));
            prop_assert_eq!(parse_manifest(&whole).unwrap(), Manifest { version, system_identifier, files, wal_ranges });
        }
    }
}
