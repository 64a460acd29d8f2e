//! Plain dumps: looked through before anything of them is run.

use std::io::{self, Write};

use pgsidecar_core::{ObjectKey, backup::StoredObject};

use super::{archive, restore::not_as_stored};
use crate::{
    codec::{self, ChannelReader},
    failure::{Code, Failure},
    repository::Repository,
};

/// Reads a plain dump without running it. Answers whether it has a transaction of its own, as pg_dump puts around large
/// objects. A row of a table may look like the beginning of one: then it's taken for one.
pub(super) async fn look_through(
    repository: &Repository,
    key: &ObjectKey,
    stored: StoredObject,
) -> Result<bool, Failure> {
    let object = archive::open(repository, key).await?;
    let looked = tokio::task::spawn_blocking(move || {
        let mut beginnings = Beginnings { matched: Some(0), found: false };
        decompress_whole(object, stored, &mut beginnings).map(|()| beginnings.found)
    });
    looked.await?
}

/// Decompresses an object, and compares it with what was stored.
fn decompress_whole(object: ChannelReader, stored: StoredObject, to: &mut impl Write) -> Result<(), Failure> {
    let why = object.failure();
    let (found, _) = codec::decompress(object, to).map_err(|error| match why.or_io("", &error) {
        sent if sent.code != Code::Io => sent,
        _ => not_as_stored(&error.to_string()),
    })?;
    match (found.size, found.sha256) == (stored.size, stored.sha256) {
        true => Ok(()),
        false => Err(not_as_stored("its SHA-256 is another one")),
    }
}

/// What pg_dump writes before large objects, as a line.
const BEGIN: &[u8] = b"BEGIN;";

/// A `Write` that looks for lines that are [`BEGIN`].
struct Beginnings {
    /// How much of this line is as [`BEGIN`]; `None` if it's another.
    matched: Option<usize>,
    found: bool,
}

impl Write for Beginnings {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            self.matched = match (byte, self.matched) {
                (b'\n', matched) => {
                    self.found |= matched == Some(BEGIN.len());
                    Some(0)
                }
                (byte, Some(n)) if BEGIN.get(n) == Some(byte) => Some(n + 1),
                _ => None,
            };
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_of_a_plain_dump_s_own_is_found_wherever_it_is_cut() {
        let finds = |text: &str, at: usize| {
            let mut beginnings = Beginnings { matched: Some(0), found: false };
            beginnings.write_all(&text.as_bytes()[..at]).unwrap();
            beginnings.write_all(&text.as_bytes()[at..]).unwrap();
            beginnings.found
        };
        for at in 0..10 {
            assert!(finds("x\nBEGIN;\n\nSELECT", at) && finds("BEGIN;\n12345", at), "{at}");
            assert!(!finds("x\nBEGIN\n BEGIN;\nBEGIN; \nBEGIN;x\nxBEGIN;\n", at), "{at}");
        }
    }
}
