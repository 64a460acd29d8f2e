//! Compressed objects of which only the beginning may be wanted.

use pgsidecar_core::ObjectKey;

use super::{Repository, damaged};
use crate::{
    codec::{self, CHUNK},
    failure::{Code, Failure},
};

impl Repository {
    /// Reads a compressed object, on a thread of the blocking pool, and hands its plain bytes to `take` until that says
    /// that it has enough. `None` only if the store says that it isn't there. What was handed over is checked by zstd's
    /// checksum where everything was read, and not at all otherwise: `take` has to know what is right.
    ///
    /// # Errors
    /// The store's; [`Code::Damaged`] if it can't be decompressed.
    pub async fn read_while<T, F>(&self, key: &ObjectKey, mut state: T, mut take: F) -> Result<Option<T>, Failure>
    where
        T: Send + 'static,
        F: FnMut(&mut T, &[u8]) -> bool + Send + 'static,
    {
        let Some((_, reader)) = self.open_stream(key).await? else { return Ok(None) };
        let (name, why) = (key.to_string(), reader.failure());
        let read = move || {
            let failed = |error: std::io::Error| match why.or_io("", &error) {
                sent if sent.code != Code::Io => sent,
                _ => damaged(&name, &error.to_string()),
            };
            let mut decoder = zstd::stream::read::Decoder::new(reader).map_err(failed)?;
            let mut buffer = vec![0; CHUNK];
            loop {
                match codec::fill(&mut decoder, &mut buffer).map_err(failed)? {
                    0 => return Ok(state),
                    filled if !take(&mut state, &buffer[..filled]) => return Ok(state),
                    _ => {}
                }
            }
        };
        tokio::task::spawn_blocking(read).await?.map(Some)
    }
}
