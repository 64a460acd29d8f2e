//! WAL to the repository: each file checked, and durable before it's acknowledged.
//!
//! Guarantees: a success means that the identical bytes are in the repository and that the store has acknowledged
//! them (I1). A name that has other content is refused (I2). The same request while the first is under way waits for
//! it; a caller that goes away doesn't stop the upload, so that its next try finds it done. What was archived in this
//! daemon's time is remembered by its stamp, and asking for it again costs no request to the store.
//!
//! A segment is taken only once PostgreSQL has marked it, and under its own name only if all of it is there: what a
//! standby received in part is kept as `.partial` is, under a key with its hash, and acknowledged. Refusing it would
//! hold up everything behind it, and under its own name it would stand in the way of the complete segment.
//!
//! A file can also be a copy in another directory (`directory`). What is stored of it is what it was when it was found
//! complete: if it's written to while it's read, nothing becomes visible. Files of one name are archived one after the
//! other, wherever they lie.
//!
//! `archive_status` is never touched: PostgreSQL asks again for what it hasn't marked, and that costs little.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    io::{self, Seek},
    path::PathBuf,
    sync::{Arc, Mutex},
};

use pgsidecar_core::{ArchiveFileName, Completeness};
use tokio::sync::{Semaphore, watch};

use super::{
    Origin,
    check::{self, Check},
    owner::Owned,
    statistics::{ArchiveStatistics, Counters},
    storing::{Source, mebibytes, spooled, store_partial, store_whole},
};
use crate::{
    codec::ChannelReader,
    failure::{Code, Failure},
    histories::TAKEN_TWICE,
    pgdata::FileStamp,
    repository::{SINGLE_REQUEST_BYTES, Stored},
};

/// How many files are read and compressed at a time.
const COMPRESSORS: usize = 2;
/// How many request bodies are taken at a time. Their pace is the client's.
const BODIES: usize = 2;
/// What files under way may take together in MiB. While it's compressed a file takes as much as it may come to,
/// while it's sent what it came to.
const MEMORY_MIB: u32 = 40;
/// What a file takes that is too large for one request, whatever its size: a buffer and the parts under way.
const LARGE_FILE_MIB: u32 = 28;
/// Archived files that are remembered.
const REMEMBERED: usize = 50_000;

/// What the outcome of a request is, for everyone who waits for it.
pub type Outcome = Result<Stored, Failure>;

/// Ships WAL files, each once at a time.
pub struct Archiver {
    under_way: Mutex<HashMap<ArchiveFileName, UnderWay>>,
    archived: Mutex<BTreeMap<ArchiveFileName, (PathBuf, FileStamp)>>,
    compressors: Semaphore,
    bodies: Semaphore,
    memory: Semaphore,
    owned: Owned,
    counters: Counters,
}

impl Default for Archiver {
    fn default() -> Archiver {
        Archiver {
            under_way: Mutex::default(),
            archived: Mutex::default(),
            compressors: Semaphore::new(COMPRESSORS),
            bodies: Semaphore::new(BODIES),
            memory: Semaphore::new(MEMORY_MIB as usize),
            owned: Owned::default(),
            counters: Counters::default(),
        }
    }
}

/// Which file of a name it is.
#[derive(Clone, PartialEq, Eq)]
enum Place {
    PgWal,
    /// A copy that was complete when it had this stamp.
    Copy(PathBuf, FileStamp),
}

#[derive(Clone)]
struct UnderWay {
    place: Place,
    outcome: watch::Receiver<Option<Outcome>>,
}

impl Archiver {
    /// What has been done so far.
    pub fn statistics(&self) -> ArchiveStatistics {
        self.counters.snapshot()
    }

    /// Counts and tells a request that failed before it came here.
    pub fn note_failure(&self, name: ArchiveFileName, failure: &Failure) {
        self.counters.note_failure(name, failure);
    }

    /// Whether the file that lies in pg_wal under this name was archived in this daemon's time.
    pub fn is_archived(&self, origin: &Origin, name: ArchiveFileName) -> bool {
        let path = origin.pgdata.wal().join(name.to_string());
        // Looked up first: of a long backlog, most is not archived, and needs no look at the file.
        let known = self.archived.lock().ok().and_then(|archived| archived.get(&name).cloned());
        let Some((known_path, stamp)) = known else { return false };
        known_path == path && fs::symlink_metadata(&path).is_ok_and(|meta| FileStamp::of(&meta) == stamp)
    }

    /// Archives the file of this name in pg_wal. Goes on when the caller goes away.
    ///
    /// # Errors
    /// Why it isn't in the repository.
    pub async fn archive_file(self: &Arc<Self>, origin: &Origin, name: ArchiveFileName) -> Outcome {
        if self.is_archived(origin, name) {
            return Ok(Stored::Already);
        }
        self.archive_at(origin, name, Place::PgWal).await
    }

    /// Archives a copy that was found complete when it had this stamp. Goes on when the caller goes away.
    ///
    /// # Errors
    /// [`Code::Busy`] if it's another by now; else why it isn't in the repository.
    pub async fn archive_copy(
        self: &Arc<Self>,
        origin: &Origin,
        name: ArchiveFileName,
        path: PathBuf,
        stamp: FileStamp,
    ) -> Outcome {
        self.archive_at(origin, name, Place::Copy(path, stamp)).await
    }

    async fn archive_at(self: &Arc<Self>, origin: &Origin, name: ArchiveFileName, place: Place) -> Outcome {
        loop {
            let mut joined = self.start_or_join(origin, name, &place)?;
            let done = joined.outcome.wait_for(Option::is_some).await.map(|outcome| outcome.clone());
            match done {
                // Another file of that name, which says nothing about this one. Both at once could pass each other
                // where the store doesn't refuse to overwrite.
                _ if joined.place != place => {}
                Ok(Some(outcome)) => return outcome,
                _ => return Err(Failure::internal(format!("archiving {name} ended without a result"))),
            }
        }
    }

    fn start_or_join(
        self: &Arc<Self>,
        origin: &Origin,
        name: ArchiveFileName,
        place: &Place,
    ) -> Result<UnderWay, Failure> {
        let poisoned = |_| Failure::internal("the list of uploads is unusable");
        let mut under_way = self.under_way.lock().map_err(poisoned)?;
        if let Some(joined) = under_way.get(&name) {
            return Ok(joined.clone());
        }
        let (sender, outcome) = watch::channel(None);
        let started = UnderWay { place: place.clone(), outcome };
        under_way.insert(name, started.clone());
        drop(under_way);
        let (archiver, origin, place) = (self.clone(), origin.clone(), place.clone());
        tokio::spawn(async move {
            // A panic must not leave the name in the list for ever: every later request would wait for nothing.
            let work = tokio::spawn({
                let archiver = archiver.clone();
                async move {
                    match place {
                        Place::PgWal => archiver.archive_from_pg_wal(&origin, name).await,
                        Place::Copy(path, stamp) => {
                            let check = Check { name, control: origin.control, stamp: Some(stamp) };
                            let file = check::open_copy(&path, stamp)?;
                            archiver.archive(&origin, check, Source::File(file, stamp.size)).await
                        }
                    }
                }
            });
            let outcome = work.await.unwrap_or_else(|panic| Err(panic.into()));
            archiver.note(name, &outcome);
            if let Ok(mut under_way) = archiver.under_way.lock() {
                under_way.remove(&name);
            }
            let _ = sender.send(Some(outcome));
        });
        Ok(started)
    }

    async fn archive_from_pg_wal(&self, origin: &Origin, name: ArchiveFileName) -> Outcome {
        let path = origin.pgdata.wal().join(name.to_string());
        let (file, stamp) = match check::open(&path, &name) {
            Ok(opened) => opened,
            // A daemon or a server that was killed can leave the question behind when the file is gone.
            Err(failure) if failure.code == Code::NotFound => return self.gone(origin, name, failure).await,
            Err(failure) => return Err(failure),
        };
        check_marked(origin, name)?;
        // What nobody has asked for PostgreSQL may recycle meanwhile, and write to.
        let check = Check { name, control: origin.control, stamp: Some(stamp) };
        let stored = self.archive(origin, check, Source::File(file, stamp.size)).await?;
        // Another file may lie there by now: PostgreSQL recycles them.
        let unchanged = fs::symlink_metadata(&path).is_ok_and(|meta| FileStamp::of(&meta) == stamp);
        if unchanged && let Ok(mut archived) = self.archived.lock() {
            archived.insert(name, (path, stamp));
            while archived.len() > REMEMBERED {
                archived.pop_first();
            }
        }
        Ok(stored)
    }

    /// A file that PostgreSQL asks for and that isn't in pg_wal: nothing is lost if the repository has it.
    async fn gone(&self, origin: &Origin, name: ArchiveFileName, failure: Failure) -> Outcome {
        let repository = &origin.repository;
        let known = match name {
            ArchiveFileName::Partial(_) => None,
            _ => repository.store().head(&repository.layout().wal(&name)).await?,
        };
        known.map(|_| Stored::Already).ok_or(failure)
    }

    /// Archives a request's body. A body that breaks off leaves nothing.
    ///
    /// # Errors
    /// Why it isn't in the repository.
    pub async fn archive_body(
        &self,
        origin: &Origin,
        name: ArchiveFileName,
        body: ChannelReader,
        length: Option<u64>,
    ) -> Outcome {
        let archived = async {
            check_marked(origin, name)?;
            let check = Check { name, control: origin.control, stamp: None };
            self.archive(origin, check, Source::Body(body, length)).await
        };
        let outcome = archived.await;
        self.note(name, &outcome);
        outcome
    }

    fn note(&self, name: ArchiveFileName, outcome: &Outcome) {
        match outcome {
            Ok(_) => self.counters.note_success(name),
            Err(failure) => self.counters.note_failure(name, failure),
        }
    }

    async fn archive(&self, origin: &Origin, check: Check, source: Source) -> Outcome {
        let name = check.name;
        let announced = match &source {
            Source::File(_, size) => Some(*size),
            Source::Body(_, length) => *length,
        };
        if let Some(size) = announced {
            check.size(size)?;
        }
        let vouched_for = is_vouched_for(origin, name)?;
        if let (true, Some(claimant)) = (vouched_for, &origin.claimant) {
            self.owned.claim(&origin.repository, name.timeline(), claimant).await?;
        }
        let memory = self.memory.acquire_many(memory_for(&check)).await.map_err(Failure::internal)?;
        let turn = match &source {
            Source::File(..) => self.compressors.acquire().await,
            Source::Body(..) => self.bodies.acquire().await,
        };
        let turn = turn.map_err(Failure::internal)?;
        let repository = &origin.repository;
        let stored = match name {
            ArchiveFileName::Partial(segment) => {
                store_partial(repository, &check, segment, spooled(&check, source).await?).await?
            }
            ArchiveFileName::Segment(segment) if !vouched_for => {
                let mut file = spooled(&check, source).await?;
                let (mut file, completeness) = tokio::task::spawn_blocking(move || {
                    let completeness = check.completeness(&mut file)?;
                    Ok::<_, Failure>((file, completeness))
                })
                .await??;
                match completeness {
                    Completeness::Complete => {
                        let size = file.seek(io::SeekFrom::End(0)).and_then(|size| file.rewind().map(|()| size));
                        let size = size.map_err(|error| Failure::io(format!("reading {name}"), &error))?;
                        store_whole(repository, &check, Source::File(file, size), turn, memory).await?
                    }
                    Completeness::Incomplete { page } => {
                        tracing::warn!(
                            file = %name, %page,
                            "kept as a partial segment: its WAL ends at this page, so that the complete one must come from the server that wrote it"
                        );
                        store_partial(repository, &check, segment, file).await?
                    }
                }
            }
            ArchiveFileName::History(_) => {
                let stored = store_whole(repository, &check, source, turn, memory).await;
                stored.map_err(|failure| match failure.code {
                    Code::Conflict => failure.hint(TAKEN_TWICE),
                    _ => failure,
                })?
            }
            _ => store_whole(repository, &check, source, turn, memory).await?,
        };
        if stored == Stored::New {
            tracing::info!(file = %name, "archived");
        } else {
            tracing::debug!(file = %name, "was archived already");
        }
        Ok(stored)
    }
}

/// What may be asked for before PostgreSQL has finished it is a segment only: the one that is being written.
fn check_marked(origin: &Origin, name: ArchiveFileName) -> Result<(), Failure> {
    if !matches!(name, ArchiveFileName::Segment(_)) || origin.pgdata.is_finished(&name) {
        return Ok(());
    }
    Err(Failure::new(
        Code::InvalidSegment,
        format!("{name} is not finished: PostgreSQL has marked it neither as .ready nor as .done in archive_status"),
    )
    .hint("Nothing was stored. PostgreSQL calls archive_command by itself once a segment is complete; SELECT pg_switch_wal() completes the current one."))
}

/// Whether the file is of a primary's own timeline.
fn is_vouched_for(origin: &Origin, name: ArchiveFileName) -> Result<bool, Failure> {
    let histories = origin.pgdata.histories().map_err(|error| Failure::io("reading pg_wal", &error))?;
    Ok(check::is_vouched_for(name.timeline(), &origin.control, histories))
}

/// In MiB, at most: nothing compressed is notably larger than the plain file.
fn memory_for(check: &Check) -> u32 {
    match check.largest() {
        size if size > SINGLE_REQUEST_BYTES as u64 => LARGE_FILE_MIB,
        size => mebibytes(size) + 1,
    }
}
