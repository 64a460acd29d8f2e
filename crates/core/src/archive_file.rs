//! Names of the files that PostgreSQL archives.
//!
//! A name that was parsed here is safe to join to a path or a key: nothing but digits, upper-case `A` to `F`
//! and one of three suffixes gets through. Source: `src/include/access/xlog_internal.h`.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{SegmentName, TimelineId, id::hex8};

/// The name of a file that PostgreSQL archives, or asks for in recovery. There are no others.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum ArchiveFileName {
    /// A complete segment.
    Segment(SegmentName),
    /// `….partial`: what a timeline had of its last segment when a standby was promoted. Never asked for.
    Partial(SegmentName),
    /// `….XXXXXXXX.backup`: the backup history file, written when a backup on a primary ends.
    BackupHistory {
        /// The segment in which the backup began.
        segment: SegmentName,
        /// Where in that segment, in bytes from its beginning.
        offset: u32,
    },
    /// `XXXXXXXX.history`: the timeline's history. PostgreSQL asks for 00000001.history too, which never exists.
    History(TimelineId),
}

impl ArchiveFileName {
    /// The timeline in the name.
    pub const fn timeline(self) -> TimelineId {
        match self {
            ArchiveFileName::Segment(segment)
            | ArchiveFileName::Partial(segment)
            | ArchiveFileName::BackupHistory { segment, .. } => segment.timeline(),
            ArchiveFileName::History(timeline) => timeline,
        }
    }
}

impl fmt::Display for ArchiveFileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ArchiveFileName::Segment(segment) => segment.fmt(f),
            ArchiveFileName::Partial(segment) => write!(f, "{segment}.partial"),
            ArchiveFileName::BackupHistory { segment, offset } => write!(f, "{segment}.{offset:08X}.backup"),
            ArchiveFileName::History(timeline) => write!(f, "{:08X}.history", timeline.get()),
        }
    }
}

/// The text is no name of a file that PostgreSQL archives. Quotes the beginning of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not the name of a WAL file: 24 upper-case hexadecimal digits, like 000000010000000300000042, which \
     may be followed by .partial or, for a backup's history, by .00000028.backup; or a timeline's history, like \
     00000002.history"
)]
pub struct ParseArchiveFileNameError(String);

impl FromStr for ArchiveFileName {
    type Err = ParseArchiveFileNameError;

    fn from_str(text: &str) -> Result<ArchiveFileName, ParseArchiveFileNameError> {
        archive_file_name(text).ok_or_else(|| ParseArchiveFileNameError(text.chars().take(60).collect()))
    }
}

fn archive_file_name(text: &str) -> Option<ArchiveFileName> {
    if let Some(stem) = text.strip_suffix(".history") {
        return TimelineId::from_hex(stem).map(ArchiveFileName::History);
    }
    if let Some(stem) = text.strip_suffix(".partial") {
        return stem.parse().ok().map(ArchiveFileName::Partial);
    }
    if let Some(stem) = text.strip_suffix(".backup") {
        let (segment, offset) = stem.split_once('.')?;
        return Some(ArchiveFileName::BackupHistory { segment: segment.parse().ok()?, offset: hex8(offset)? });
    }
    text.parse().ok().map(ArchiveFileName::Segment)
}

impl Serialize for ArchiveFileName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ArchiveFileName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ArchiveFileName, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{key::is_component, wal::tests::segments};
    use proptest::prelude::*;

    fn names() -> impl Strategy<Value = ArchiveFileName> {
        prop_oneof![
            segments().prop_map(ArchiveFileName::Segment),
            segments().prop_map(ArchiveFileName::Partial),
            (segments(), any::<u32>()).prop_map(|(segment, offset)| ArchiveFileName::BackupHistory { segment, offset }),
            segments().prop_map(|segment| ArchiveFileName::History(segment.timeline())),
        ]
    }

    proptest! {
        #[test]
        fn display_and_parse_are_inverse_and_give_what_is_safe_in_a_key(name in names()) {
            prop_assert_eq!(name.to_string().parse(), Ok(name));
            prop_assert!(is_component(&name.to_string()));
            let json = serde_json::to_string(&name).unwrap();
            prop_assert_eq!(serde_json::from_str::<ArchiveFileName>(&json).unwrap(), name);
        }

        #[test]
        fn one_changed_character_is_noticed_or_gives_another_name(name in names(), at: usize, character: char) {
            let mut text: Vec<char> = name.to_string().chars().collect();
            let at = at % text.len();
            prop_assume!(text[at] != character);
            text[at] = character;
            let text: String = text.into_iter().collect();
            if let Ok(other) = text.parse::<ArchiveFileName>() {
                prop_assert_ne!(other, name);
                prop_assert_eq!(other.to_string(), text);
            }
        }
    }

    #[test]
    fn what_is_no_wal_file_is_refused() {
        let segment = "000000010000000300000042";
        let shapes =
            "|.|..|/|../x|RECOVERYXLOG|RECOVERYHISTORY|.history|.partial|00000000.history|2.history|0000000a.history";
        let mut refused: Vec<String> = shapes.split('|').map(String::from).collect();
        refused.push("0".repeat(24));
        refused.push("é".repeat(12));
        refused.push(segment.replace('4', "a"));
        refused.push(segment[1..].to_owned());
        for prefix in ["../", "./", "/", " ", "0", "+"] {
            refused.push(format!("{prefix}{segment}"));
        }
        let suffixes = "0|\0|\n|/|.|.gz|.zst|.ready|.history|.PARTIAL|.partial.partial|.partial\n|.00000028.partial|\
                        .backup|.28.backup|.0000002a.backup|.00000028.backup.backup";
        for suffix in suffixes.split('|') {
            refused.push(format!("{segment}{suffix}"));
        }
        for text in refused {
            assert!(text.parse::<ArchiveFileName>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_refused_name_is_quoted_harmlessly_and_in_part() {
        let error = format!("../\n{}", "x".repeat(500)).parse::<ArchiveFileName>().unwrap_err().to_string();
        assert!(error.starts_with(r#""../\nxxx"#) && !error.contains('\n') && error.len() < 320, "{error}");
    }
}
