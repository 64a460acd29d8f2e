//! Identities that PostgreSQL gives: the database system and its timelines.

use std::{fmt, num::NonZeroU32, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What `initdb` gave this database system, and its copies and standbys keep: `system_identifier` of
/// `pg_control_system()`. Written in decimal.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SystemIdentifier(u64);

impl SystemIdentifier {
    /// The identifier with this value.
    pub const fn new(value: u64) -> SystemIdentifier {
        SystemIdentifier(value)
    }

    /// Its value.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for SystemIdentifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The text is no identity of the kind that was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a {kind}")]
pub struct ParseIdError {
    kind: &'static str,
    text: String,
}

impl ParseIdError {
    pub(crate) fn new(kind: &'static str, text: &str) -> ParseIdError {
        ParseIdError { kind, text: text.chars().take(80).collect() }
    }
}

/// Digits alone: `u64::from_str` would take a sign as well.
fn decimal(text: &str) -> Option<u64> {
    let canonical = text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    canonical.then(|| text.parse().ok()).flatten()
}

impl FromStr for SystemIdentifier {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<SystemIdentifier, ParseIdError> {
        decimal(text)
            .map(SystemIdentifier)
            .ok_or_else(|| ParseIdError::new("system identifier (a decimal number)", text))
    }
}

// As text: JSON readers that keep numbers as doubles would round it.
impl Serialize for SystemIdentifier {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SystemIdentifier {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<SystemIdentifier, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A timeline's number. Written in decimal, as PostgreSQL's settings and messages do; file names carry it
/// as eight hexadecimal digits ([`TimelineId::to_hex`]).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TimelineId(NonZeroU32);

impl TimelineId {
    /// The timeline that `initdb` begins.
    pub const FIRST: TimelineId = TimelineId(NonZeroU32::MIN);

    /// The timeline with this number; `None` for 0, which PostgreSQL never uses.
    pub fn new(number: u32) -> Option<TimelineId> {
        NonZeroU32::new(number).map(TimelineId)
    }

    /// Its number.
    pub fn get(self) -> u32 {
        self.0.get()
    }

    /// As file names carry it: `0000000A` for timeline 10.
    pub fn to_hex(self) -> String {
        format!("{:08X}", self.get())
    }

    /// The inverse of [`TimelineId::to_hex`]: exactly eight upper-case digits.
    pub fn from_hex(text: &str) -> Option<TimelineId> {
        hex8(text).and_then(TimelineId::new)
    }
}

/// Exactly eight upper-case hexadecimal digits, as in the names of WAL files.
pub(crate) fn hex8(text: &str) -> Option<u32> {
    let exact = text.len() == 8 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F'));
    exact.then(|| u32::from_str_radix(text, 16).ok()).flatten()
}

impl fmt::Display for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for TimelineId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<TimelineId, ParseIdError> {
        decimal(text)
            .and_then(|number| u32::try_from(number).ok())
            .and_then(TimelineId::new)
            .ok_or_else(|| ParseIdError::new("timeline (a decimal number from 1 on)", text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timelines_are_decimal_for_people_and_hexadecimal_in_names() {
        let ten: TimelineId = "10".parse().unwrap();
        assert_eq!((ten.to_string(), ten.to_hex()), ("10".into(), "0000000A".into()));
        assert_eq!(TimelineId::from_hex("0000000A"), Some(ten));
        for text in ["0000000a", "A", "00000000", "+000000A", "0000000AB"] {
            assert_eq!(TimelineId::from_hex(text), None, "{text}");
        }
        for text in ["0", "-1", "+1", "01", "", "0A", "4294967296"] {
            assert!(text.parse::<TimelineId>().is_err(), "{text}");
        }
    }

    #[test]
    fn system_identifiers_keep_all_their_digits_in_json() {
        let id: SystemIdentifier = "7575002186531184001".parse().unwrap();
        assert_eq!(serde_json::to_string(&id).unwrap(), "\"7575002186531184001\"");
        assert_eq!(serde_json::from_str::<SystemIdentifier>("\"7575002186531184001\"").unwrap(), id);
    }
}
