//! What pg_dump writes: on its way to the store, and read back.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    process::Stdio,
};

use bytes::Bytes;
use pgsidecar_core::{ContentId, ObjectKey};
use tokio::{sync::mpsc, task::JoinHandle};

use super::{
    program::{Killer, Program, pump},
    tools::Tools,
};
use crate::{
    codec::{self, ChannelReader, ChannelWriter, HashingWriter, ReadFailure},
    failure::{Code, Failure},
    repository::{Repository, damaged},
};

/// What pg_dump and pg_dumpall write when they're through.
const COMPLETE: [&str; 2] = ["-- PostgreSQL database dump complete", "-- PostgreSQL database cluster dump complete"];
/// How far from the end that stands, at most.
const TRAILER_BYTES: usize = 1024;

/// Chunks of a program's output for an upload. What is left when they have ended: whether they're all of it.
pub struct Dumping<T> {
    /// The chunks.
    pub chunks: mpsc::Receiver<Bytes>,
    /// Resolves when the program has ended with 0.
    pub done: JoinHandle<Result<T, Failure>>,
    /// Ends the program when the upload is given up.
    pub killer: Killer,
}

fn upload_ended(_: &io::Error) -> Failure {
    Failure::new(Code::StoreUnavailable, "the upload ended before pg_dump had")
}

/// A program's output as it is.
pub fn raw(program: Program, counted: impl Fn(u64) + Send + 'static) -> Dumping<ContentId> {
    let killer = program.killer();
    let (writer, chunks) = ChannelWriter::new();
    let done = tokio::task::spawn_blocking(move || {
        let mut hashing = HashingWriter::new(writer);
        pump(program, &mut hashing, counted, upload_ended)?;
        let (mut writer, content) = hashing.finish();
        writer.flush_rest().map_err(|error| upload_ended(&error))?;
        Ok(content)
    });
    Dumping { chunks, done, killer }
}

/// A program's output, which is SQL, compressed. It has to say at its end that it's complete.
pub fn sql(program: Program, level: i32, counted: impl Fn(u64) + Send + 'static) -> Dumping<codec::Compressed> {
    let killer = program.killer();
    let (chunks, done) = codec::compress(level, move |out| {
        let mut tail = TailWriter { inner: out, tail: Vec::new() };
        pump(program, &mut tail, counted, upload_ended)?;
        match is_complete(&tail.tail) {
            true => Ok(()),
            false => {
                Err(Failure::new(Code::PostgresUnavailable, "pg_dump ended with 0, and its output isn't complete"))
            }
        }
    });
    Dumping { chunks, done, killer }
}

/// Whether SQL of pg_dump's that ends so is complete.
pub fn is_complete(tail: &[u8]) -> bool {
    let tail = String::from_utf8_lossy(tail);
    COMPLETE.iter().any(|line| tail.contains(line))
}

/// A `Write` that passes everything on, and keeps the end of it.
pub struct TailWriter<W> {
    /// The writer beneath.
    pub inner: W,
    /// The end of what went through.
    pub tail: Vec<u8>,
}

impl<W: Write> Write for TailWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.tail.extend_from_slice(&bytes[..n][n.saturating_sub(TRAILER_BYTES)..]);
        let surplus = self.tail.len().saturating_sub(TRAILER_BYTES);
        self.tail.drain(..surplus);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// The object of a database, from its beginning on.
///
/// # Errors
/// The store's; [`Code::Damaged`] if it isn't there.
pub async fn open(repository: &Repository, key: &ObjectKey) -> Result<ChannelReader, Failure> {
    let opened = repository.open_stream(key).await?;
    Ok(opened.ok_or_else(|| damaged(key.as_str(), "it isn't there"))?.1)
}

/// Reads the table of contents at the beginning of an archive in the store, with pg_restore; `entry` sees each line of it.
/// No more is read of the object than that takes.
///
/// # Errors
/// The store's; [`Code::Damaged`] if pg_restore can't read it.
pub async fn table_of_contents(
    tools: &Tools,
    repository: &Repository,
    key: &ObjectKey,
    mut entry: impl FnMut(&str) + Send + 'static,
) -> Result<(), Failure> {
    let mut object = open(repository, key).await?;
    let mut command = tools.command("pg_restore");
    command.arg("--list").env("LC_ALL", "C").stdin(Stdio::piped()).stdout(Stdio::piped());
    let program = Program::start(&mut command)?;
    let killer = program.killer();
    let name = key.to_string();
    let read = tokio::task::spawn_blocking(move || {
        let (stdin, stdout) = (program.stdin(), program.stdout());
        let why = object.failure();
        let feeding = std::thread::spawn(move || feed(&mut object, stdin));
        if let Some(stdout) = stdout {
            // Names may be of any encoding: of a server that doesn't convert them.
            let mut lines = BufReader::new(stdout);
            let mut line = Vec::new();
            while lines.read_until(b'\n', &mut line).map_err(|error| Failure::io("reading from pg_restore", &error))?
                > 0
            {
                let text = String::from_utf8_lossy(&line);
                let text = text.trim_end_matches('\n');
                if !text.is_empty() && !text.starts_with(';') {
                    entry(text);
                }
                line.clear();
            }
        }
        let listed = program.finish();
        let fed = feeding.join().map_err(|_| Failure::internal("feeding pg_restore"))?;
        if let Err(error) = fed {
            return Err(why.or_io("reading the archive", &error));
        }
        listed.map_err(|failure| damaged(&name, &format!("its table of contents can't be read: {failure}")))
    });
    let read = read.await?;
    drop(killer);
    read
}

/// Gives a program what there is, until it wants no more.
///
/// # Errors
/// The reader's.
pub fn feed(object: &mut impl Read, stdin: Option<impl Write>) -> io::Result<()> {
    let Some(mut stdin) = stdin else { return Ok(()) };
    let mut buffer = vec![0; codec::CHUNK];
    loop {
        match codec::fill(object, &mut buffer)? {
            0 => return Ok(()),
            // It has read what it wanted, or has failed, which it says itself.
            filled if stdin.write_all(&buffer[..filled]).is_err() => return Ok(()),
            _ => {}
        }
    }
}

/// What came of feeding an object while it was hashed: the store's failure where there was one, else whether it's what was
/// stored.
///
/// # Errors
/// The store's, or what `damaged` makes of the difference.
pub fn judge(
    fed: io::Result<Result<(), String>>,
    why: &ReadFailure,
    damaged: impl Fn(&str) -> Failure,
) -> Result<(), Failure> {
    let same = fed.map_err(|error| why.or_io("reading the archive", &error))?;
    same.map_err(|how| match why.or_io("", &io::Error::other("")) {
        sent if sent.code != Code::Io => sent,
        _ => damaged(&how),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_what_is_written_is_kept() {
        let mut tail = TailWriter { inner: Vec::new(), tail: Vec::new() };
        tail.write_all(&vec![b'x'; 3000]).unwrap();
        assert!(!is_complete(&tail.tail) && tail.tail.len() == TRAILER_BYTES);
        let (first, second) = ("--\n-- PostgreSQL database dump", " complete\n--\n\n\\unrestrict abc\n");
        tail.write_all(first.as_bytes()).unwrap();
        tail.write_all(second.as_bytes()).unwrap();
        assert!(is_complete(&tail.tail));
        tail.write_all(&vec![b'x'; TRAILER_BYTES]).unwrap();
        assert!(!is_complete(&tail.tail));
        assert_eq!(tail.inner.len(), 3000 + first.len() + second.len() + TRAILER_BYTES);
    }
}
