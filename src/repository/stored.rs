//! Compressed objects of a backup, read as a stream and compared with what was stored.

use std::io::{self, BufReader, Read};

use pgsidecar_core::{ObjectKey, backup::StoredObject};

use super::{Repository, damaged};
use crate::{
    codec::{ChannelReader, HashingReader, ReadFailure},
    failure::{Code, Failure},
};

/// The plain bytes of an object whose size and SHA-256 are known. What was read counts only if [`StoredReader::finish`]
/// says so. Blocks: not for async tasks.
pub struct StoredReader {
    decoder: zstd::stream::read::Decoder<'static, BufReader<HashingReader<ChannelReader>>>,
    why: ReadFailure,
    key: ObjectKey,
    stored: StoredObject,
}

impl Repository {
    /// Begins to read a compressed object that must be there.
    ///
    /// # Errors
    /// The store's; [`Code::Damaged`] if it isn't there. Later ones come through [`StoredReader::explain`].
    pub async fn open_stored(&self, key: &ObjectKey, stored: StoredObject) -> Result<StoredReader, Failure> {
        let Some((_, reader)) = self.open_stream(key).await? else {
            return Err(damaged(key.as_str(), "it is missing"));
        };
        let why = reader.failure();
        let decoder = zstd::stream::read::Decoder::new(HashingReader::new(reader));
        let decoder = decoder.map_err(|error| Failure::io("setting zstd up", &error))?;
        Ok(StoredReader { decoder, why, key: key.clone(), stored })
    }
}

impl StoredReader {
    /// The object's key.
    pub fn key(&self) -> &ObjectKey {
        &self.key
    }

    /// How many bytes of the object, as it is stored, have been read so far.
    pub fn stored_bytes(&self) -> u64 {
        self.decoder.get_ref().get_ref().length()
    }

    /// What an error while reading means: either the store failed, and said so, or the bytes aren't right.
    pub fn explain(&self, error: &io::Error) -> Failure {
        match self.why.or_io("", error) {
            failure if failure.code == Code::Io => damaged(self.key.as_str(), &error.to_string()),
            failure => failure,
        }
    }

    /// Reads what is left, and compares the bytes of the object with those that were stored.
    ///
    /// # Errors
    /// The store's; [`Code::Damaged`] if they aren't the same.
    pub fn finish(mut self) -> Result<(), Failure> {
        if let Err(error) = io::copy(&mut self.decoder, &mut io::sink()) {
            return Err(self.explain(&error));
        }
        let hashing = self.decoder.finish().into_inner();
        hashing.check(self.stored).map_err(|how| damaged(self.key.as_str(), &how))
    }
}

impl Read for StoredReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.decoder.read(buffer)
    }
}
