//! `part-NNNNN.tar.zst`: an ordinary tar archive in zstd frames that can be read independently.
//!
//! `zstd -d | tar x` reads the whole; a file can be read alone from the frame in which it begins. Small files
//! share a frame, and no file begins in the middle of another's. Everything is streamed: neither a part nor a
//! file is ever in memory.

use std::{
    fs::Metadata,
    io::{self, Read, Write},
    os::unix::fs::MetadataExt,
    path::Path,
};

use pgsidecar_core::backup::{PartRecord, StoredObject};
use serde::Serialize;
use zstd::stream::raw::{Encoder, InBuffer, Operation, OutBuffer};

use super::reading::BadPages;
use crate::codec::{ChannelWriter, HashingWriter};

/// A frame ends after the file with which it exceeds this many plain bytes: small enough to read one file from,
/// large enough to compress well.
const FRAME_BYTES: u64 = 4 << 20;
/// How much is read of a file at a time: what isn't read ahead by the kernel must not come in small pieces.
const READ_BYTES: usize = 256 * 1024;

/// Where a file lies, and what is to be checked when it comes back: a line of `index.jsonl.zst`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FileEntry {
    /// Path relative to the data directory; tablespaces lie under `pg_tblspc/<oid>`.
    #[serde(serialize_with = "lossy")]
    pub path: Vec<u8>,
    /// Number of the part.
    pub part: u32,
    /// Where the frame begins in the part's bytes.
    pub frame: u64,
    /// Where the file's content begins in the frame's plain bytes.
    pub offset: u64,
    /// The file's length in bytes.
    pub size: u64,
    /// CRC-32C of its content.
    pub crc32c: u32,
    /// Its modification time.
    pub modified: jiff::Timestamp,
    /// The length in bytes of the file that is made of it, if it's an incremental one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restored: Option<u64>,
    /// Its damaged pages.
    #[serde(skip)]
    pub bad: BadPages,
}

/// PostgreSQL's own files have ASCII names. Others' keep their exact name in tar and manifest.
fn lossy<S: serde::Serializer>(path: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&String::from_utf8_lossy(path))
}

/// Compresses into frames.
struct FrameWriter<W> {
    out: HashingWriter<W>,
    encoder: Encoder<'static>,
    buffer: Vec<u8>,
    /// Where the current frame begins in the compressed bytes.
    frame: u64,
    /// Plain bytes of the current frame so far.
    plain: u64,
}

impl<W: Write> FrameWriter<W> {
    fn new(out: W, level: i32) -> io::Result<FrameWriter<W>> {
        let mut encoder = Encoder::new(level)?;
        encoder.set_parameter(zstd::stream::raw::CParameter::ChecksumFlag(true))?;
        let buffer = vec![0; zstd::zstd_safe::CCtx::out_size()];
        Ok(FrameWriter { out: HashingWriter::new(out), encoder, buffer, frame: 0, plain: 0 })
    }

    fn end_frame(&mut self) -> io::Result<()> {
        if self.plain == 0 {
            return Ok(());
        }
        loop {
            let mut output = OutBuffer::around(&mut self.buffer[..]);
            let left = self.encoder.finish(&mut output, true)?;
            let written = output.pos();
            self.out.write_all(&self.buffer[..written])?;
            if left == 0 {
                break;
            }
        }
        self.encoder.reinit()?;
        self.frame = self.out.length();
        self.plain = 0;
        Ok(())
    }
}

impl<W: Write> Write for FrameWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut input = InBuffer::around(bytes);
        while input.pos() < bytes.len() {
            let mut output = OutBuffer::around(&mut self.buffer[..]);
            self.encoder.run(&mut input, &mut output)?;
            let written = output.pos();
            self.out.write_all(&self.buffer[..written])?;
        }
        self.plain += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A part that is being written.
pub struct PartWriter {
    number: u32,
    archive: tar::Builder<FrameWriter<ChannelWriter>>,
    buffer: Vec<u8>,
    files: u64,
    file_bytes: u64,
}

impl PartWriter {
    /// Begins a part.
    ///
    /// # Errors
    /// If zstd can't be set up.
    pub fn new(number: u32, out: ChannelWriter, level: i32) -> io::Result<PartWriter> {
        let archive = tar::Builder::new(FrameWriter::new(out, level)?);
        Ok(PartWriter { number, archive, buffer: vec![0; READ_BYTES], files: 0, file_bytes: 0 })
    }

    /// Plain bytes of files in this part so far.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Adds a directory without its content.
    ///
    /// # Errors
    /// If the part can't be written.
    pub fn directory(&mut self, path: &Path, meta: &Metadata) -> io::Result<()> {
        let mut header = header(meta, tar::EntryType::Directory, 0);
        // tar wants a directory's name to end with a slash.
        let mut name = path.as_os_str().to_owned();
        name.push("/");
        self.archive.append_data(&mut header, name, io::empty())
    }

    /// Adds a file of exactly `size` bytes: what `content` has more is left out, what it has less is filled with
    /// zeros. A file that PostgreSQL extends or truncates while it is read is put right by replay.
    ///
    /// `watch` is told of bytes read, and can end the work with an error.
    ///
    /// # Errors
    /// If reading or writing fails.
    pub fn file(
        &mut self,
        path: &Path,
        meta: &Metadata,
        size: u64,
        content: &mut dyn Read,
        watch: &mut dyn FnMut(u64) -> io::Result<()>,
    ) -> io::Result<FileEntry> {
        if self.archive.get_ref().plain >= FRAME_BYTES {
            self.archive.get_mut().end_frame()?;
        }
        let mut header = header(meta, tar::EntryType::Regular, size);
        // The header alone; the content follows by hand, because where it begins has to be known.
        self.archive.append_data(&mut header, path, io::empty())?;
        let out = self.archive.get_mut();
        let (frame, offset) = (out.frame, out.plain);
        let mut crc = 0;
        let mut left = size;
        while left > 0 {
            let want = usize::try_from(left).unwrap_or(READ_BYTES).min(READ_BYTES);
            let mut got = content.read(&mut self.buffer[..want])?;
            if got == 0 {
                self.buffer[..want].fill(0);
                got = want;
            }
            let bytes = &self.buffer[..got];
            crc = crc32c::crc32c_append(crc, bytes);
            out.write_all(bytes)?;
            left -= got as u64;
            watch(got as u64)?;
        }
        let padding = size.next_multiple_of(512) - size;
        out.write_all(&[0; 512][..usize::try_from(padding).unwrap_or(0)])?;
        self.files += 1;
        self.file_bytes += size;
        Ok(FileEntry {
            path: path.as_os_str().as_encoded_bytes().to_vec(),
            part: self.number,
            frame,
            offset,
            size,
            crc32c: crc,
            modified: modified(meta),
            restored: None,
            bad: BadPages::default(),
        })
    }

    /// Ends the part. All its bytes have been handed to the channel afterwards.
    ///
    /// # Errors
    /// If they can't be written.
    pub fn finish(self) -> io::Result<PartRecord> {
        let mut frames = self.archive.into_inner()?;
        frames.end_frame()?;
        let (mut channel, stored) = frames.out.finish();
        channel.flush_rest()?;
        Ok(PartRecord {
            number: self.number,
            stored: StoredObject { size: stored.size, sha256: stored.sha256 },
            files: self.files,
            file_bytes: self.file_bytes,
        })
    }
}

fn header(meta: &Metadata, kind: tar::EntryType, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(meta.mode() & 0o7777);
    header.set_uid(u64::from(meta.uid()));
    header.set_gid(u64::from(meta.gid()));
    header.set_mtime(meta.mtime().try_into().unwrap_or(0));
    header.set_size(size);
    header
}

/// A file's modification time, to the second as tar and manifest keep it.
pub fn modified(meta: &Metadata) -> jiff::Timestamp {
    jiff::Timestamp::from_second(meta.mtime()).unwrap_or_default()
}
