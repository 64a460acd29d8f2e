//! Compressing and hashing in one pass, on threads of their own, with bounded channels to the async side.
//!
//! Nothing here knows what the bytes are. A channel holds at most [`CHANNEL_CHUNKS`] chunks of about
//! [`CHUNK`] bytes, so the memory of a stream doesn't depend on its length.

use std::{
    cell::Cell,
    io::{self, Read, Write},
    sync::Arc,
};

use bytes::Bytes;
use pgsidecar_core::{ContentId, Sha256Digest, backup::StoredObject};
use sha2::{Digest, Sha256};
use tokio::{sync::mpsc, task::JoinHandle};

use crate::failure::{Code, Failure};

/// Bytes that are handed over at a time.
pub const CHUNK: usize = 256 * 1024;
/// The most plain bytes in one frame of [`compress_whole`], and how many should be written to it at a time: little enough
/// to stay in a processor's cache between reading, hashing and compressing.
pub const FRAME: usize = 2 << 20;
/// Chunks that wait in a channel at most.
pub const CHANNEL_CHUNKS: usize = 4;

/// A `Read` over what an async task sends: the blocking end of a bounded channel. The sender being dropped
/// means the end; it must send an error first if the stream broke.
pub struct ChannelReader {
    receiver: mpsc::Receiver<Result<Bytes, Failure>>,
    current: Bytes,
    failure: Arc<std::sync::Mutex<Option<Failure>>>,
}

/// What made a [`ChannelReader`] fail, for whoever holds only the `io::Error`.
#[derive(Clone, Default)]
pub struct ReadFailure(Arc<std::sync::Mutex<Option<Failure>>>);

impl ReadFailure {
    /// The failure that was sent through the channel, or else one made of `error`.
    pub fn or_io(&self, doing: &str, error: &io::Error) -> Failure {
        let sent = self.0.lock().ok().and_then(|mut failure| failure.take());
        sent.unwrap_or_else(|| Failure::io(doing, error))
    }
}

impl ChannelReader {
    /// A reader, and the sender that feeds it.
    pub fn new() -> (mpsc::Sender<Result<Bytes, Failure>>, ChannelReader) {
        let (sender, receiver) = mpsc::channel(CHANNEL_CHUNKS);
        (sender, ChannelReader { receiver, current: Bytes::new(), failure: Arc::default() })
    }

    /// Where to look for the reason when reading fails.
    pub fn failure(&self) -> ReadFailure {
        ReadFailure(self.failure.clone())
    }
}

impl Read for ChannelReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.receiver.blocking_recv() {
                None => return Ok(0),
                Some(Ok(chunk)) => self.current = chunk,
                Some(Err(failure)) => {
                    let error = io::Error::other(failure.to_string());
                    if let Ok(mut slot) = self.failure.lock() {
                        *slot = Some(failure);
                    }
                    return Err(error);
                }
            }
        }
        let n = self.current.len().min(buffer.len());
        buffer[..n].copy_from_slice(&self.current.split_to(n));
        Ok(n)
    }
}

/// A `Write` whose bytes arrive in chunks at an async task. Dropping it without [`ChannelWriter::flush_rest`]
/// loses what has not filled a chunk.
pub struct ChannelWriter {
    sender: mpsc::Sender<Bytes>,
    buffer: Vec<u8>,
}

impl ChannelWriter {
    /// A writer, and the receiver of its chunks.
    pub fn new() -> (ChannelWriter, mpsc::Receiver<Bytes>) {
        let (sender, receiver) = mpsc::channel(CHANNEL_CHUNKS);
        (ChannelWriter { sender, buffer: Vec::with_capacity(CHUNK) }, receiver)
    }

    /// Sends what is left.
    ///
    /// # Errors
    /// If the receiver is gone: it has failed and knows why.
    pub fn flush_rest(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let chunk = Bytes::from(std::mem::replace(&mut self.buffer, Vec::with_capacity(CHUNK)));
        self.sender.blocking_send(chunk).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
    }
}

impl Write for ChannelWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = bytes.len().min(CHUNK - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..n]);
        if self.buffer.len() == CHUNK {
            self.flush_rest()?;
        }
        Ok(n)
    }

    /// Chunks are sent when they are full; [`ChannelWriter::flush_rest`] sends the last one.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A `Write` that passes everything on and computes SHA-256 and length on the way.
pub struct HashingWriter<W> {
    inner: W,
    hasher: Sha256,
    length: u64,
}

impl<W: Write> HashingWriter<W> {
    /// Hashes what goes through to `inner`.
    pub fn new(inner: W) -> HashingWriter<W> {
        HashingWriter { inner, hasher: Sha256::new(), length: 0 }
    }

    /// Bytes written so far.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The writer beneath.
    pub fn get_mut(&mut self) -> &mut W {
        &mut self.inner
    }

    /// The writer beneath, and the identity of what went through.
    pub fn finish(self) -> (W, ContentId) {
        let sha256 = Sha256Digest::new(self.hasher.finalize().into());
        (self.inner, ContentId { sha256, size: self.length })
    }
}

impl<W: Write> Write for HashingWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..n]);
        self.length += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// A `Read` that computes SHA-256 and length of what is read through it.
pub struct HashingReader<R> {
    inner: R,
    hasher: Sha256,
    length: u64,
}

impl<R: Read> HashingReader<R> {
    /// Hashes what is read from `inner`.
    pub fn new(inner: R) -> HashingReader<R> {
        HashingReader { inner, hasher: Sha256::new(), length: 0 }
    }

    /// Bytes read so far.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The identity of what was read.
    pub fn finish(self) -> ContentId {
        ContentId { sha256: Sha256Digest::new(self.hasher.finalize().into()), size: self.length }
    }

    /// Reads to the end and compares with what was stored; says how it differs.
    ///
    /// # Errors
    /// A description of the damage.
    pub fn check(mut self, stored: StoredObject) -> Result<(), String> {
        copy(&mut self, &mut io::sink()).map_err(|error| error.to_string())?;
        let found = self.finish();
        if found.size == stored.size && found.sha256 == stored.sha256 {
            return Ok(());
        }
        Err(format!(
            "it has {} bytes with SHA-256 {}, stored were {} with {}",
            found.size,
            found.sha256.short(),
            stored.size,
            stored.sha256.short()
        ))
    }
}

impl<R: Read> Read for HashingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..n]);
        self.length += n as u64;
        Ok(n)
    }
}

/// Copies all that there is, in pieces of [`CHUNK`] bytes; the standard library's are of 8 kB, each with a call of the
/// kernel and a start of the hash.
///
/// # Errors
/// The reader's or the writer's.
pub fn copy(reader: &mut impl Read, writer: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match fill(reader, &mut buffer)? {
            0 => return Ok(()),
            filled => writer.write_all(&buffer[..filled])?,
        }
    }
}

/// Decompresses all that there is. Answers with the identity of the compressed bytes, and how many plain ones there were.
///
/// # Errors
/// The reader's, the writer's, or zstd's.
pub fn decompress(reader: impl Read, writer: &mut impl Write) -> io::Result<(ContentId, u64)> {
    let mut decoder = zstd::stream::read::Decoder::new(HashingReader::new(reader))?;
    let mut buffer = vec![0; CHUNK];
    let mut length = 0;
    loop {
        match fill(&mut decoder, &mut buffer)? {
            0 => return Ok((decoder.finish().into_inner().finish(), length)),
            filled => {
                writer.write_all(&buffer[..filled])?;
                length += filled as u64;
            }
        }
    }
}

/// Reads until the buffer is full or the end.
///
/// # Errors
/// The reader's.
pub fn fill(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// A new zstd stream with a content checksum, so that damage is found by `zstd -d` as well.
///
/// # Errors
/// If the level isn't one of zstd's.
pub fn encoder<W: Write>(writer: W, level: i32) -> io::Result<zstd::stream::write::Encoder<'static, W>> {
    let mut encoder = zstd::stream::write::Encoder::new(writer, level)?;
    encoder.include_checksum(true)?;
    Ok(encoder)
}

/// What a compression made of a plain stream.
#[derive(Clone, Copy, Debug)]
pub struct Compressed {
    /// Identity of the plain bytes.
    pub plain: ContentId,
    /// Identity of the compressed ones.
    pub stored: ContentId,
}

/// Compresses what `produce` writes, on a thread of the blocking pool. The chunks arrive at the receiver; the
/// handle tells whether they are all of it: chunks of a stream whose handle ends in an error are to be thrown
/// away.
pub fn compress<F>(level: i32, produce: F) -> (mpsc::Receiver<Bytes>, JoinHandle<Result<Compressed, Failure>>)
where
    F: FnOnce(&mut dyn Write) -> Result<(), Failure> + Send + 'static,
{
    let (writer, receiver) = ChannelWriter::new();
    let handle = tokio::task::spawn_blocking(move || {
        let broken = |error: io::Error| match error.kind() {
            io::ErrorKind::BrokenPipe => {
                Failure::new(Code::StoreUnavailable, "the upload ended before all data was read")
            }
            _ => Failure::io("compressing", &error),
        };
        let encoder = encoder(HashingWriter::new(writer), level).map_err(broken)?;
        let mut plain = HashingWriter::new(encoder);
        produce(&mut plain)?;
        let (encoder, plain) = plain.finish();
        let (mut writer, stored) = encoder.finish().map_err(broken)?.finish();
        writer.flush_rest().map_err(broken)?;
        Ok(Compressed { plain, stored })
    });
    (receiver, handle)
}

/// Compresses what `produce` writes, about `most` bytes at most, into memory, on this thread; with it, the identity of
/// the compressed bytes.
///
/// The plain bytes aren't hashed: that would cost half as much again as compressing them.
///
/// Each piece that is written becomes a frame of its own, one behind the other, as `zstd -d` reads them. That costs a
/// percent of size where the pieces are of [`FRAME`] bytes, and saves what a stream costs: a copy of everything into the
/// encoder's window, and its slower search across the window's seam.
///
/// # Errors
/// What `produce` fails with.
pub fn compress_whole<F>(level: i32, most: usize, produce: F) -> Result<(Vec<u8>, ContentId), Failure>
where
    F: FnOnce(&mut dyn Write) -> Result<(), Failure>,
{
    let failed = |error: io::Error| Failure::io("compressing", &error);
    let mut frames = FrameWriter::new(level, most).map_err(failed)?;
    produce(&mut frames)?;
    if frames.compressed.is_empty() {
        // Nothing is a frame, too: no bytes at all would look like a cut file.
        frames.add(&[]).map_err(failed)?;
    }
    COMPRESSOR.set(Some((level, frames.compressor)));
    let stored = ContentId::of(&frames.compressed);
    // It waits to be sent, and others are compressed meanwhile.
    frames.compressed.shrink_to_fit();
    Ok((frames.compressed, stored))
}

thread_local! {
    /// A context takes longer to set up than a small frame to compress.
    static COMPRESSOR: Cell<Option<(i32, zstd::bulk::Compressor<'static>)>> = const { Cell::new(None) };
}

/// A `Write` that makes a frame of each piece.
struct FrameWriter {
    compressor: zstd::bulk::Compressor<'static>,
    compressed: Vec<u8>,
}

impl FrameWriter {
    fn new(level: i32, most: usize) -> io::Result<FrameWriter> {
        let compressor = match COMPRESSOR.take() {
            Some((of, compressor)) if of == level => compressor,
            _ => {
                let mut compressor = zstd::bulk::Compressor::new(level)?;
                compressor.include_checksum(true)?;
                compressor
            }
        };
        // All that it may take at once: what isn't touched costs nothing, and growing would hold the old and the new buffer,
        // of megabytes each, at each step.
        let frames = most.div_ceil(FRAME).max(1);
        let capacity = frames * zstd::zstd_safe::compress_bound(most.clamp(1, FRAME));
        Ok(FrameWriter { compressor, compressed: Vec::with_capacity(capacity) })
    }

    fn add(&mut self, piece: &[u8]) -> io::Result<()> {
        let end = self.compressed.len();
        self.compressed.reserve(zstd::zstd_safe::compress_bound(piece.len()));
        // Behind what is there, into room that nothing has to be written to first.
        let mut room = io::Cursor::new(&mut self.compressed);
        room.set_position(end as u64);
        self.compressor.compress_to_buffer(piece, &mut room).map(|_| ())
    }
}

impl Write for FrameWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = &bytes[..bytes.len().min(FRAME)];
        self.add(piece)?;
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn collect(mut receiver: mpsc::Receiver<Bytes>) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(chunk) = receiver.recv().await {
            assert!(chunk.len() <= CHUNK);
            all.extend_from_slice(&chunk);
        }
        all
    }

    #[tokio::test]
    async fn a_stream_comes_back_and_its_identities_hold() {
        let plain: Vec<u8> = (0..3_000_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        let input = plain.clone();
        let (chunks, done) = compress(1, move |out| out.write_all(&input).map_err(|e| Failure::io("writing", &e)));
        let stored = collect(chunks).await;
        let compressed = done.await.unwrap().unwrap();
        assert_eq!(compressed.plain, ContentId::of(&plain));
        assert_eq!(compressed.stored, ContentId::of(&stored));
        assert_eq!(zstd::decode_all(stored.as_slice()).unwrap(), plain);
    }

    #[test]
    fn frames_of_a_whole_come_back_and_its_identity_holds() {
        for length in [0, 1, FRAME - 1, FRAME, 2 * FRAME + 17] {
            let plain: Vec<u8> = (0..length).map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[2]).collect();
            for piece in [1 << 18, FRAME, 3 * FRAME] {
                let produce = |out: &mut dyn Write| {
                    plain
                        .chunks(piece)
                        .try_for_each(|piece| out.write_all(piece))
                        .map_err(|e| Failure::io("writing", &e))
                };
                let (bytes, stored) = compress_whole(1, length, produce).unwrap();
                assert_eq!(stored, ContentId::of(&bytes));
                assert!(zstd::decode_all(bytes.as_slice()).unwrap() == plain, "{length} {piece}");
                let mut back = Vec::new();
                assert_eq!(decompress(bytes.as_slice(), &mut back).unwrap(), (stored, plain.len() as u64));
                assert!(back == plain);
            }
        }
    }

    #[tokio::test]
    async fn a_producer_s_failure_is_the_result() {
        let (chunks, done) = compress(1, |_| Err(Failure::new(Code::InvalidSegment, "not WAL")));
        collect(chunks).await;
        assert_eq!(done.await.unwrap().unwrap_err().code, Code::InvalidSegment);
    }

    #[tokio::test]
    async fn a_reader_fails_with_what_was_sent() {
        let (sender, mut reader) = ChannelReader::new();
        let why = reader.failure();
        sender.send(Ok(Bytes::from_static(b"abc"))).await.unwrap();
        sender.send(Err(Failure::new(Code::Damaged, "cut"))).await.unwrap();
        let error =
            tokio::task::spawn_blocking(move || reader.read_to_end(&mut Vec::new()).unwrap_err()).await.unwrap();
        assert_eq!(why.or_io("reading", &error).code, Code::Damaged);
    }
}
