//! WAL to the repository: one file at a time, checked, durable before it's acknowledged.
//!
//! Guarantees: a success means that the identical bytes are in the repository and that the store has acknowledged
//! them (I1). A name that has other content is refused (I2). The same request while the first is under way waits for
//! it; a caller that goes away doesn't stop the upload, so that its next try finds it done.
//!
//! `archive_status` is never touched: PostgreSQL asks again for what it hasn't marked, and that costs little.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use jiff::Timestamp;
use pgsidecar_core::{ArchiveFileName, ControlFile, ObjectKey, TimelineHistory, WalHeader, check_segment};
use serde::Serialize;
use tokio::sync::{Semaphore, watch};

use crate::{
    codec::{self, CHUNK, ChannelReader, HashingWriter},
    failure::{Code, Failure},
    histories::MAX_HISTORY_BYTES,
    pgdata::DataDirectory,
    repository::{Repository, Stored},
};

/// How many files are read and compressed at a time. Each can hold a compressed segment of the usual size in memory.
const CONCURRENCY: usize = 2;

/// What the outcome of a request is, for everyone who waits for it.
type Outcome = Result<Stored, Failure>;

/// Ships WAL files, each once at a time.
pub struct Archiver {
    under_way: Mutex<HashMap<ArchiveFileName, watch::Receiver<Option<Outcome>>>>,
    permits: Semaphore,
    counters: Counters,
}

/// What the archiver has done since the start.
#[derive(Default)]
struct Counters {
    archived: AtomicU64,
    failed: AtomicU64,
    conflicts: AtomicU64,
    last: Mutex<Last>,
}

/// The last success and the last failure.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Last {
    /// What was acknowledged last.
    pub last_archived: Option<LastArchived>,
    /// The request that failed last. `None` once one has succeeded since.
    pub last_failure: Option<LastFailure>,
}

/// A file that was acknowledged.
#[derive(Clone, Debug, Serialize)]
pub struct LastArchived {
    /// Its name.
    pub file: ArchiveFileName,
    /// When.
    pub at: Timestamp,
}

/// A request that failed.
#[derive(Clone, Debug, Serialize)]
pub struct LastFailure {
    /// The file's name.
    pub file: ArchiveFileName,
    /// When.
    pub at: Timestamp,
    /// Why.
    pub reason: Failure,
}

/// A snapshot of the counters.
#[derive(Clone, Debug, Serialize)]
pub struct ArchiveStatistics {
    /// Files acknowledged.
    pub archived_files: u64,
    /// Requests that failed, conflicts included.
    pub failures: u64,
    /// Requests refused because other content is there.
    pub conflicts: u64,
    /// The last ones.
    #[serde(flatten)]
    pub last: Last,
}

impl Default for Archiver {
    fn default() -> Archiver {
        Archiver { under_way: Mutex::default(), permits: Semaphore::new(CONCURRENCY), counters: Counters::default() }
    }
}

/// Where a file's content comes from.
enum Source {
    File(File, u64),
    /// A request's body, and its announced length.
    Body(ChannelReader, Option<u64>),
}

impl Archiver {
    /// What has been done so far.
    pub fn statistics(&self) -> ArchiveStatistics {
        let counters = &self.counters;
        ArchiveStatistics {
            archived_files: counters.archived.load(Relaxed),
            failures: counters.failed.load(Relaxed),
            conflicts: counters.conflicts.load(Relaxed),
            last: counters.last.lock().map(|last| last.clone()).unwrap_or_default(),
        }
    }

    /// Archives the file of this name in pg_wal. Goes on when the caller goes away.
    ///
    /// # Errors
    /// Why it isn't in the repository.
    pub async fn archive_file(
        self: &Arc<Self>,
        repository: &Repository,
        pgdata: &DataDirectory,
        control: &ControlFile,
        name: ArchiveFileName,
    ) -> Outcome {
        let mut outcome = self.start_or_join(repository, pgdata, control, name)?;
        let done = outcome.wait_for(Option::is_some).await.map(|outcome| outcome.clone());
        match done {
            Ok(Some(outcome)) => outcome,
            _ => Err(Failure::internal(format!("archiving {name} ended without a result"))),
        }
    }

    fn start_or_join(
        self: &Arc<Self>,
        repository: &Repository,
        pgdata: &DataDirectory,
        control: &ControlFile,
        name: ArchiveFileName,
    ) -> Result<watch::Receiver<Option<Outcome>>, Failure> {
        let poisoned = |_| Failure::internal("the list of uploads is unusable");
        let mut under_way = self.under_way.lock().map_err(poisoned)?;
        if let Some(outcome) = under_way.get(&name) {
            return Ok(outcome.clone());
        }
        let (sender, receiver) = watch::channel(None);
        under_way.insert(name, receiver.clone());
        drop(under_way);
        let path = pgdata.wal().join(name.to_string());
        let (archiver, repository, control) = (self.clone(), repository.clone(), *control);
        tokio::spawn(async move {
            // A panic must not leave the name in the list for ever: every later request would wait for nothing.
            let work = tokio::spawn({
                let archiver = archiver.clone();
                async move {
                    let (file, size) = open(&path, &name)?;
                    archiver.archive(&repository, &control, name, Source::File(file, size)).await
                }
            });
            let outcome = work.await.unwrap_or_else(|panic| Err(panic.into()));
            archiver.note(name, &outcome);
            if let Ok(mut under_way) = archiver.under_way.lock() {
                under_way.remove(&name);
            }
            let _ = sender.send(Some(outcome));
        });
        Ok(receiver)
    }

    /// Archives a request's body. A body that breaks off leaves nothing.
    ///
    /// # Errors
    /// Why it isn't in the repository.
    pub async fn archive_body(
        &self,
        repository: &Repository,
        control: &ControlFile,
        name: ArchiveFileName,
        body: ChannelReader,
        length: Option<u64>,
    ) -> Outcome {
        let outcome = self.archive(repository, control, name, Source::Body(body, length)).await;
        self.note(name, &outcome);
        outcome
    }

    fn note(&self, name: ArchiveFileName, outcome: &Outcome) {
        match outcome {
            Ok(_) => self.note_success(name),
            Err(failure) => self.note_failure(name, failure),
        }
    }

    fn note_success(&self, name: ArchiveFileName) {
        let counters = &self.counters;
        let Ok(mut last) = counters.last.lock() else { return };
        counters.archived.fetch_add(1, Relaxed);
        last.last_archived = Some(LastArchived { file: name, at: Timestamp::now() });
        if last.last_failure.take().is_some() {
            tracing::info!(file = %name, "archiving works again");
        }
    }

    /// Counts and tells a request that failed.
    pub fn note_failure(&self, name: ArchiveFileName, failure: &Failure) {
        let counters = &self.counters;
        let Ok(mut last) = counters.last.lock() else { return };
        counters.failed.fetch_add(1, Relaxed);
        if failure.code == Code::Conflict {
            counters.conflicts.fetch_add(1, Relaxed);
        }
        // PostgreSQL asks every second or so: the same failure is told once.
        let known = last.last_failure.as_ref().is_some_and(|known| known.reason.message == failure.message);
        if !known {
            tracing::error!(file = %name, hint = failure.hint, "archiving failed: {failure}");
        }
        last.last_failure = Some(LastFailure { file: name, at: Timestamp::now(), reason: failure.clone() });
    }

    async fn archive(
        &self,
        repository: &Repository,
        control: &ControlFile,
        name: ArchiveFileName,
        source: Source,
    ) -> Outcome {
        let _permit = self.permits.acquire().await.map_err(Failure::internal)?;
        let check = Check { name, control: *control };
        let announced = match &source {
            Source::File(_, size) => Some(*size),
            Source::Body(_, length) => *length,
        };
        if let Some(size) = announced {
            check.size(size)?;
        }
        let why = match &source {
            Source::Body(body, _) => Some(body.failure()),
            Source::File(..) => None,
        };
        let text = name.to_string();
        let copy = move |out: &mut dyn Write| {
            let mut reader: Box<dyn Read> = match source {
                Source::File(file, size) => Box::new(file.take(size)),
                Source::Body(body, _) => Box::new(body),
            };
            check.copy(&mut reader, out).map_err(|trouble| match trouble {
                Trouble::Refused(failure) => failure,
                Trouble::Read(error) => match &why {
                    Some(why) => why.or_io("reading the request's body", &error),
                    None => Failure::io(format!("reading {text}"), &error),
                },
            })
        };
        let stored = match name {
            ArchiveFileName::Segment(_) | ArchiveFileName::BackupHistory { .. } | ArchiveFileName::History(_) => {
                let stream = codec::compress(repository.level(), copy);
                repository.store_stream(&repository.layout().wal(&name), &name.to_string(), stream).await?.0
            }
            ArchiveFileName::Partial(segment) => {
                // Its key carries its hash, so it has to be read before the key is known. It happens at a promotion.
                let spooled = tokio::task::spawn_blocking(move || {
                    let mut file = HashingWriter::new(
                        tempfile::tempfile().map_err(|error| Failure::io("creating a temporary file", &error))?,
                    );
                    copy(&mut file)?;
                    let (mut file, content) = file.finish();
                    io::Seek::rewind(&mut file).map_err(|error| Failure::io("reading a temporary file", &error))?;
                    Ok::<_, Failure>((file, content))
                });
                let (mut file, content) = spooled.await??;
                let key: ObjectKey = repository.layout().partial(segment, &content.sha256);
                let stream = codec::compress(repository.level(), move |out| {
                    io::copy(&mut file, out)
                        .map(|_| ())
                        .map_err(|error| Failure::io("reading a temporary file", &error))
                });
                repository.store_stream(&key, &name.to_string(), stream).await?.0
            }
        };
        if stored == Stored::New {
            tracing::info!(file = %name, "archived");
        } else {
            tracing::debug!(file = %name, "was archived already");
        }
        Ok(stored)
    }
}

fn open(path: &std::path::Path, name: &ArchiveFileName) -> Result<(File, u64), Failure> {
    // A name that has been parsed can't leave the directory; a link in it could.
    let no_follow = i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or(0);
    let opened = File::options().read(true).custom_flags(no_follow).open(path).and_then(|file| {
        let meta = file.metadata()?;
        if meta.is_file() { Ok((file, meta.len())) } else { Err(io::Error::other("not a regular file")) }
    });
    opened.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            Failure::new(Code::NotFound, format!("{name} is not in pg_wal ({})", path.display()))
                .hint("PGDATA of the sidecar must be the data directory of the server that asks.")
        }
        _ => Failure::io(format!("opening {}", path.display()), &error),
    })
}

/// Why a file's content could not be taken.
enum Trouble {
    Read(io::Error),
    Refused(Failure),
}

/// What a file must be, by its name.
struct Check {
    name: ArchiveFileName,
    control: ControlFile,
}

impl Check {
    /// The size must fit before anything is read.
    fn size(&self, size: u64) -> Result<(), Failure> {
        let name = self.name;
        match name {
            ArchiveFileName::Segment(_) | ArchiveFileName::Partial(_) => {
                let expected = self.control.wal_segment_size.bytes();
                if size == expected {
                    return Ok(());
                }
                let code = if size > expected { Code::TooLarge } else { Code::InvalidSegment };
                Err(Failure::new(
                    code,
                    format!("{name} has {size} bytes; a WAL segment of this database has {expected}"),
                )
                .hint("Nothing was stored. A segment is always full size in pg_wal: the file or the transfer was cut."))
            }
            ArchiveFileName::History(_) | ArchiveFileName::BackupHistory { .. } => match size {
                0 => Err(Failure::new(Code::InvalidSegment, format!("{name} is empty")).hint("Nothing was stored.")),
                1..=MAX_HISTORY_BYTES => Ok(()),
                _ => Err(Failure::new(
                    Code::TooLarge,
                    format!("{name} has {size} bytes; such a file has at most {MAX_HISTORY_BYTES}"),
                )),
            },
        }
    }

    /// Copies the content while checking it: the beginning of a segment, the whole of a history, the size of all.
    fn copy(&self, reader: &mut dyn Read, out: &mut dyn Write) -> Result<(), Trouble> {
        let limit = match self.name {
            ArchiveFileName::Segment(_) | ArchiveFileName::Partial(_) => self.control.wal_segment_size.bytes(),
            ArchiveFileName::History(_) | ArchiveFileName::BackupHistory { .. } => MAX_HISTORY_BYTES,
        };
        // One byte more than allowed is read, to see that there is one.
        let mut limited = reader.take(limit + 1);
        let mut buffer = vec![0; CHUNK];
        let (mut total, mut history) = (0, Vec::new());
        loop {
            let filled = fill(&mut limited, &mut buffer).map_err(Trouble::Read)?;
            let chunk = &buffer[..filled];
            if total == 0 {
                self.beginning(chunk).map_err(Trouble::Refused)?;
            }
            if matches!(self.name, ArchiveFileName::History(_)) {
                history.extend_from_slice(chunk);
            }
            total += filled as u64;
            if filled == 0 || total > limit {
                break;
            }
            out.write_all(chunk).map_err(Trouble::Read)?;
        }
        self.size(total).map_err(Trouble::Refused)?;
        if let ArchiveFileName::History(timeline) = self.name {
            TimelineHistory::parse(timeline, &history).map_err(|error| {
                Trouble::Refused(Failure::new(
                    Code::InvalidSegment,
                    format!("{} is not a timeline history: {error}", self.name),
                ))
            })?;
        }
        Ok(())
    }

    fn beginning(&self, chunk: &[u8]) -> Result<(), Failure> {
        let (ArchiveFileName::Segment(segment) | ArchiveFileName::Partial(segment)) = self.name else { return Ok(()) };
        let head = chunk.get(..WalHeader::LEN).unwrap_or(chunk);
        let size = self.control.wal_segment_size;
        match check_segment(&segment, head, size.bytes(), self.control.system_identifier, size) {
            Ok(_) => Ok(()),
            Err(mismatch) => {
                let code = match mismatch {
                    pgsidecar_core::SegmentMismatch::OtherSystem { .. } => Code::WrongCluster,
                    _ => Code::InvalidSegment,
                };
                Err(Failure::new(code, mismatch.to_string()).hint("Nothing was stored. The file is not what its name says: don't remove it by hand, and look at how it came there."))
            }
        }
    }
}

/// Reads until the buffer is full or the end.
fn fill(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
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
