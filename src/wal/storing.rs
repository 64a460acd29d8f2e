//! Storing a WAL file whose place and right to be there have been settled: checked while it's read, in one pass.

use std::{
    fs::File,
    io::{self, Read, Seek, Write},
};

use pgsidecar_core::SegmentName;
use tokio::sync::SemaphorePermit;

use super::{
    archive::Outcome,
    check::{Check, Trouble},
};
use crate::{
    codec::{self, ChannelReader, HashingWriter},
    failure::Failure,
    repository::{Repository, SINGLE_REQUEST_BYTES},
};

/// Where a file's content comes from.
pub enum Source {
    File(File, u64),
    /// A request's body, and its announced length.
    Body(ChannelReader, Option<u64>),
}

/// In MiB, rounded up.
pub fn mebibytes(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX)
}

/// What is read, with the reason if it can't be.
pub fn content(check: Check, source: Source) -> impl FnOnce(&mut dyn Write) -> Result<(), Failure> + Send + 'static {
    move |out| match source {
        Source::File(file, size) => {
            check.copy(&mut (&file).take(size), out).map_err(|trouble| match trouble {
                Trouble::Refused(failure) => failure,
                Trouble::Read(error) => Failure::io(format!("reading {}", check.name), &error),
            })?;
            // Before anything of it becomes visible: that waits for this function's success.
            check.unchanged(&file)
        }
        Source::Body(mut body, _) => {
            let why = body.failure();
            check.copy(&mut body, out).map_err(|trouble| match trouble {
                Trouble::Refused(failure) => failure,
                Trouble::Read(error) => why.or_io("reading the request's body", &error),
            })
        }
    }
}

/// A file that can be read twice.
pub async fn spooled(check: &Check, source: Source) -> Result<File, Failure> {
    if let Source::File(file, _) = source {
        return Ok(file);
    }
    let content = content(*check, source);
    let spool = move || {
        let mut file = tempfile::tempfile().map_err(|error| Failure::io("creating a temporary file", &error))?;
        content(&mut file)?;
        file.rewind().map_err(|error| Failure::io("reading a temporary file", &error))?;
        Ok(file)
    };
    tokio::task::spawn_blocking(spool).await?
}

/// Stores a file under its own name. `turn` ends with the compression, and of `memory` stays what is needed to send it.
pub async fn store_whole(
    repository: &Repository,
    check: &Check,
    source: Source,
    turn: SemaphorePermit<'_>,
    mut memory: SemaphorePermit<'_>,
) -> Outcome {
    let (key, name, level) = (repository.layout().wal(&check.name), check.name.to_string(), repository.level());
    let content = content(*check, source);
    let most = usize::try_from(check.largest()).unwrap_or(SINGLE_REQUEST_BYTES);
    if check.largest() > SINGLE_REQUEST_BYTES as u64 {
        return repository.store_stream(&key, &name, codec::compress(level, content)).await.map(|(stored, _)| stored);
    }
    let (bytes, stored) = tokio::task::spawn_blocking(move || codec::compress_whole(level, most, content)).await??;
    drop(turn);
    let unneeded = memory.num_permits().saturating_sub(mebibytes(bytes.len() as u64) as usize);
    drop(memory.split(unneeded));
    repository.store_compressed(&key, &name, bytes, stored.sha256).await
}

/// Stores what isn't the whole segment, or can't be told from another of its name, under a key with its hash.
pub async fn store_partial(repository: &Repository, check: &Check, segment: SegmentName, file: File) -> Outcome {
    let check = *check;
    let hashed = move || {
        let size = file.metadata().map_err(|error| Failure::io(format!("reading {}", check.name), &error))?.len();
        let mut again = file.try_clone().map_err(|error| Failure::io(format!("reading {}", check.name), &error))?;
        let mut hashing = HashingWriter::new(io::sink());
        content(check, Source::File(file, size))(&mut hashing)?;
        again.rewind().map_err(|error| Failure::io(format!("reading {}", check.name), &error))?;
        Ok::<_, Failure>((again, size, hashing.finish().1))
    };
    let (file, size, plain) = tokio::task::spawn_blocking(hashed).await??;
    let key = repository.layout().partial(segment, &plain.sha256);
    let stream = codec::compress(repository.level(), content(check, Source::File(file, size)));
    repository.store_stream(&key, &check.name.to_string(), stream).await.map(|(stored, _)| stored)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{failure::Code, wal::check};
    use pgsidecar_core::ControlFile;

    /// Writes to the file while it's being read.
    struct Meddler(File);

    impl Write for Meddler {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.write_all(b"2\t0/2000000\tmore\n")?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_copy_that_is_written_to_while_it_is_read_is_not_stored() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("00000003.history");
        fs::write(&path, "1\t0/1000000\tno recovery target specified\n").unwrap();
        let (file, stamp) = check::open(&path, &"00000003.history".parse().unwrap()).unwrap();
        let control = include_bytes!("../../crates/core/tests/fixtures/pg_control-15");
        let control = ControlFile::parse(control).unwrap();
        let check = Check { name: "00000003.history".parse().unwrap(), control, stamp: Some(stamp) };
        let again = check::open_copy(&path, stamp).unwrap();
        content(check, Source::File(again, stamp.size))(&mut io::sink()).unwrap();
        let writer = File::options().append(true).open(&path).unwrap();
        let failure = content(check, Source::File(file, stamp.size))(&mut Meddler(writer)).unwrap_err();
        assert_eq!(failure.code, Code::Busy);
        assert_eq!(check::open_copy(&path, stamp).unwrap_err().code, Code::Busy);
    }
}
