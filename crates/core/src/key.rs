//! Keys of objects in a repository, relative to the repository's root.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The longest key, in bytes. S3 allows 1,024 for the whole key; the rest is left to the repository's prefix.
const MAX_KEY_BYTES: usize = 768;

/// The key of an object: one or more components joined by `/`, none of them empty, `.` or `..`, of
/// characters that every object store and every file system takes literally.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey(String);

/// Why a text is no key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} can't be the name of an object in the repository")]
pub struct InvalidKey(String);

impl ObjectKey {
    /// The key as the store is given it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What a component of a key may be.
pub(crate) fn is_component(text: &str) -> bool {
    !matches!(text, "" | "." | "..")
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'=' | b'+' | b'@'))
}

impl FromStr for ObjectKey {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<ObjectKey, InvalidKey> {
        if text.len() <= MAX_KEY_BYTES && text.split('/').all(is_component) {
            Ok(ObjectKey(text.to_owned()))
        } else {
            Err(InvalidKey(text.chars().take(120).collect()))
        }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for ObjectKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for ObjectKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ObjectKey, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_can_not_leave_the_repository() {
        for text in ["", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "a/./b", "a\\b", "a b", "a\0b", "ä", "a\nb"] {
            assert!(text.parse::<ObjectKey>().is_err(), "{text:?}");
        }
        assert!("a".repeat(MAX_KEY_BYTES + 1).parse::<ObjectKey>().is_err());
        assert!("shop/db/7575002186531184001/wal/00000001/owner.json".parse::<ObjectKey>().is_ok());
    }
}
