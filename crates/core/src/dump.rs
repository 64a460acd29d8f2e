//! Logical dumps as the repository knows them: their ids.

use std::{fmt, str::FromStr};

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{
    ParseIdError,
    backup::{format_id_time, parse_id_time},
};

/// The identity of a dump within its cluster: when it began (UTC, to the second), `20261121T030000Z`. Ids sort by time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DumpId {
    began: Timestamp,
}

impl DumpId {
    /// The id of a dump that begins at this time; fractions of the second are dropped.
    pub fn new(began: Timestamp) -> DumpId {
        DumpId { began: Timestamp::from_second(began.as_second()).unwrap_or(began) }
    }

    /// When it began, to the second.
    pub fn began(&self) -> Timestamp {
        self.began
    }
}

impl fmt::Display for DumpId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format_id_time(self.began))
    }
}

impl fmt::Debug for DumpId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for DumpId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<DumpId, ParseIdError> {
        let id = parse_id_time(text).map(|began| DumpId { began });
        id.ok_or_else(|| ParseIdError::new("dump id (like 20261121T030000Z)", text))
    }
}

impl Serialize for DumpId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for DumpId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<DumpId, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_written_and_read_in_one_way() {
        let id = DumpId::new("2026-11-21T03:00:00.75Z".parse().unwrap());
        assert_eq!(id.to_string(), "20261121T030000Z");
        assert_eq!("20261121T030000Z".parse(), Ok(id));
        for text in ["", "20261121T030000", "20261121T030000Z-full", "20261321T030000Z"] {
            assert!(text.parse::<DumpId>().is_err(), "{text:?}");
        }
    }
}
