//! Reads a manifest.

use std::collections::HashSet;

use jiff::Timestamp;
use serde::Deserialize;

use super::{ManifestVersion, TIME_FORMAT, WalRange};
use crate::{Lsn, Sha256Digest, SystemIdentifier, TimelineId};

/// Both cases: PostgreSQL reads either.
fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> =
        text.chars().map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok())).collect();
    let digits = digits.filter(|digits| digits.len() % 2 == 0)?;
    Some(digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}

/// What a manifest says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Manifest {
    /// The format that it was written in.
    pub version: ManifestVersion,
    /// Of which system the backup is; not told by version 1.
    pub system_identifier: Option<SystemIdentifier>,
    /// The files, in the manifest's order, each path once.
    pub files: Vec<ManifestFile>,
    /// The WAL that the backup needs.
    pub wal_ranges: Vec<WalRange>,
}

/// A file of a backup.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ManifestFile {
    /// Relative to the data directory, components joined by `/`, none of them empty, `.` or `..`.
    pub path: Vec<u8>,
    /// Its size in bytes.
    pub size: u64,
    /// When it was last modified, in whole seconds.
    pub modified: Timestamp,
    /// CRC32C of its content.
    pub crc32c: u32,
}

/// Why a manifest can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It was cut or changed after it was written.
    #[error("the backup manifest is damaged: its checksum is {actual}, it says {stated:?}")]
    Checksum {
        /// Of the bytes that are there.
        actual: Sha256Digest,
        /// What the manifest states.
        stated: String,
    },
    /// It doesn't end in a line of its own with the checksum.
    #[error("the backup manifest is cut off: its last line is missing")]
    CutOff,
    /// It isn't JSON of the shape that PostgreSQL writes.
    #[error("this is no backup manifest: {0}")]
    Json(#[from] serde_json::Error),
    /// Its version isn't one of those known.
    #[error("backup manifests of version {0} are not known here")]
    Version(u64),
    /// It has a system identifier and shouldn't, or the other way round.
    #[error("the backup manifest's system identifier does not fit its version {0}")]
    SystemIdentifier(u64),
    /// A path is absolute, leaves the data directory, or is there twice.
    #[error("the backup manifest names a file {0:?}, which can't be or is named twice")]
    Path(String),
    /// A value of a file or a WAL range can't be what it says.
    #[error("the backup manifest has {value:?} for the {what} of {of}")]
    Value {
        /// Of which file or range.
        of: String,
        /// Which of its fields.
        what: &'static str,
        /// The field's value.
        value: String,
    },
}

// As the server's parser does, unknown fields are refused: they may change what the known ones mean.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "PascalCase")]
struct RawManifest {
    #[serde(rename = "PostgreSQL-Backup-Manifest-Version")]
    version: u64,
    #[serde(rename = "System-Identifier")]
    system_identifier: Option<u64>,
    files: Vec<RawFile>,
    #[serde(rename = "WAL-Ranges")]
    wal_ranges: Vec<RawRange>,
    #[serde(rename = "Manifest-Checksum")]
    checksum: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "PascalCase")]
struct RawFile {
    path: Option<String>,
    #[serde(rename = "Encoded-Path")]
    encoded_path: Option<String>,
    size: u64,
    #[serde(rename = "Last-Modified")]
    modified: String,
    #[serde(rename = "Checksum-Algorithm")]
    algorithm: Option<String>,
    checksum: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRange {
    #[serde(rename = "Timeline")]
    timeline: TimelineId,
    #[serde(rename = "Start-LSN")]
    start: Lsn,
    #[serde(rename = "End-LSN")]
    end: Lsn,
}

/// Reads a whole manifest. Nothing of it is returned unless its checksum is right.
///
/// # Errors
///
/// See [`ManifestError`]. Damage can show as [`ManifestError::Json`] as well, when it hits the syntax.
pub fn parse_manifest(bytes: &[u8]) -> Result<Manifest, ManifestError> {
    // The checksum covers everything up to the line that states it, which is the last.
    let body = bytes.strip_suffix(b"\n").ok_or(ManifestError::CutOff)?;
    let covered = body.iter().rposition(|byte| *byte == b'\n').ok_or(ManifestError::CutOff)? + 1;
    let raw: RawManifest = serde_json::from_slice(bytes)?;
    let actual = Sha256Digest::of(&bytes[..covered]);
    if from_hex(&raw.checksum).as_deref() != Some(actual.as_bytes()) {
        return Err(ManifestError::Checksum { actual, stated: raw.checksum });
    }
    let version = match (raw.version, raw.system_identifier) {
        (1, None) => ManifestVersion::V1,
        (2, Some(_)) => ManifestVersion::V2,
        (version @ 1..=2, _) => return Err(ManifestError::SystemIdentifier(version)),
        (version, _) => return Err(ManifestError::Version(version)),
    };
    let wal_ranges = raw.wal_ranges.iter().map(|r| WalRange { timeline: r.timeline, start: r.start, end: r.end });
    let manifest = Manifest {
        version,
        system_identifier: raw.system_identifier.map(SystemIdentifier::new),
        wal_ranges: wal_ranges.collect(),
        files: raw.files.into_iter().map(parse_file).collect::<Result<_, _>>()?,
    };
    let mut seen = HashSet::with_capacity(manifest.files.len());
    match manifest.files.iter().find(|file| !seen.insert(&file.path)) {
        Some(twice) => Err(ManifestError::Path(lossy(&twice.path))),
        None => Ok(manifest),
    }
}

fn parse_file(raw: RawFile) -> Result<ManifestFile, ManifestError> {
    let path = match (raw.path, raw.encoded_path) {
        (Some(path), None) => path.into_bytes(),
        (None, Some(hex)) => from_hex(&hex).ok_or(ManifestError::Path(hex))?,
        (path, _) => return Err(ManifestError::Path(path.unwrap_or_default())),
    };
    let leaves = path.split(|byte| *byte == b'/').any(|component| matches!(component, b"" | b"." | b".."));
    if leaves || path.contains(&0) {
        return Err(ManifestError::Path(lossy(&path)));
    }
    let wrong = |what, value: &str| ManifestError::Value { of: lossy(&path), what, value: value.to_owned() };
    let algorithm = raw.algorithm.unwrap_or_else(|| "NONE".to_owned());
    if !algorithm.eq_ignore_ascii_case("CRC32C") {
        return Err(wrong("checksum algorithm", &algorithm));
    }
    let checksum = raw.checksum.unwrap_or_default();
    let crc32c = from_hex(&checksum)
        .and_then(|bytes| bytes.try_into().ok())
        .map(u32::from_ne_bytes)
        .ok_or_else(|| wrong("checksum", &checksum))?;
    let modified = jiff::civil::DateTime::strptime(TIME_FORMAT, &raw.modified)
        .and_then(|time| jiff::tz::Offset::UTC.to_timestamp(time))
        .map_err(|_| wrong("modification time", &raw.modified))?;
    Ok(ManifestFile { path, size: raw.size, modified, crc32c })
}

fn lossy(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backup_manifest::ManifestWriter;

    /// A manifest whose checksum is right, whatever the rest.
    fn checksummed(body: &str) -> Vec<u8> {
        let body = format!("{body}\n");
        format!("{body}\"Manifest-Checksum\": \"{}\"}}\n", Sha256Digest::of(body.as_bytes())).into_bytes()
    }

    fn with_file(file: &str) -> Vec<u8> {
        checksummed(&format!(r#"{{ "PostgreSQL-Backup-Manifest-Version": 1, "Files": [ {file} ], "WAL-Ranges": [],"#))
    }

    fn entry(path: &str) -> String {
        format!(
            r#"{{ {path}, "Size": 1, "Last-Modified": "2026-11-21 06:15:00 GMT", "Checksum-Algorithm": "CRC32C", "Checksum": "00000000" }}"#
        )
    }

    #[test]
    fn a_manifest_that_was_cut_or_changed_is_noticed() {
        let mut whole = Vec::new();
        let mut writer = ManifestWriter::new(ManifestVersion::V2, SystemIdentifier::new(1));
        writer.add_file(&mut whole, b"PG_VERSION", 3, Timestamp::UNIX_EPOCH, 7);
        writer.finish(&mut whole, &[]);
        assert!(parse_manifest(&whole).is_ok());
        for length in 0..whole.len() {
            assert!(parse_manifest(&whole[..length]).is_err(), "{length}");
        }
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] = if changed[at] == b'1' { b'2' } else { b'1' };
            assert!(parse_manifest(&changed).is_err(), "{at}");
        }
        let changed = String::from_utf8(whole).unwrap().replace("\"Size\": 3", "\"Size\": 4");
        let error = parse_manifest(changed.as_bytes()).unwrap_err();
        assert!(matches!(error, ManifestError::Checksum { .. }), "{error}");
    }

    #[test]
    fn a_path_can_not_leave_the_data_directory() {
        assert_eq!(parse_manifest(&with_file(&entry(r#""Path": "a/..b""#))).unwrap().files[0].path, b"a/..b");
        for path in ["", "/etc/passwd", "..", "a/../b", "a/./b", "a//b", "a/", "a\\u0000b"] {
            let manifest = with_file(&entry(&format!("\"Path\": \"{path}\"")));
            assert!(matches!(parse_manifest(&manifest), Err(ManifestError::Path(_))), "{path:?}");
        }
        for encoded in ["2e2e", "2F61", "6", "zz", "6100"] {
            let manifest = with_file(&entry(&format!("\"Encoded-Path\": \"{encoded}\"")));
            assert!(matches!(parse_manifest(&manifest), Err(ManifestError::Path(_))), "{encoded:?}");
        }
        let twice = with_file(&format!("{}, {}", entry(r#""Path": "a""#), entry(r#""Encoded-Path": "61""#)));
        assert!(matches!(parse_manifest(&twice), Err(ManifestError::Path(_))));
    }

    #[test]
    fn what_is_not_understood_is_refused_with_the_reason() {
        let text = |manifest: &[u8]| parse_manifest(manifest).unwrap_err().to_string();
        let a = entry(r#""Path": "a""#);
        insta::assert_snapshot!(text(&with_file(&a.replace("CRC32C", "SHA256"))), @r#"the backup manifest has "SHA256" for the checksum algorithm of a"#);
        insta::assert_snapshot!(text(&with_file(&a.replace("00000000", "0000"))), @r#"the backup manifest has "0000" for the checksum of a"#);
        insta::assert_snapshot!(text(&with_file(&a.replace("06:15:00 GMT", "06:15:00 CET"))), @r#"the backup manifest has "2026-11-21 06:15:00 CET" for the modification time of a"#);
        insta::assert_snapshot!(text(&with_file(&a.replace("\"Size\"", "\"Weight\": 2, \"Size\""))), @"this is no backup manifest: unknown field `Weight`, expected one of `Path`, `Encoded-Path`, `Size`, `Last-Modified`, `Checksum-Algorithm`, `Checksum` at line 1 column 77");
        insta::assert_snapshot!(text(&checksummed(r#"{ "PostgreSQL-Backup-Manifest-Version": 3, "Files": [], "WAL-Ranges": [],"#)), @"backup manifests of version 3 are not known here");
        insta::assert_snapshot!(text(&checksummed(r#"{ "PostgreSQL-Backup-Manifest-Version": 2, "Files": [], "WAL-Ranges": [],"#)), @"the backup manifest's system identifier does not fit its version 2");
        insta::assert_snapshot!(text(b"{}"), @"the backup manifest is cut off: its last line is missing");
    }
}
