//! WAL back to PostgreSQL, fetched ahead.
//!
//! PostgreSQL asks for one segment after the other. While it replays one, the next are fetched into the spool, so that
//! it finds them there. Only a sequence of requests is trusted to go on: a request backwards (`pg_rewind`), a jump or
//! another timeline throws away what was fetched ahead.
//!
//! Guarantees:
//! - A file is handed out only when all of it is here and checked: decompressed, equal to the identity that was stored
//!   with it, and a segment of the right size at the right place. And it's handed out once: it's PostgreSQL's then.
//! - 'Not in the archive' is said only when the store said so *after* the question (I5): that a segment wasn't there
//!   when it was looked for ahead proves nothing later, and a failure ahead fails nobody.
//! - The end of a stopped server's WAL stands in for a whole segment only where the store has said, after the question,
//!   that there is none, and only for those who asked for it.
//! - A file is fetched once however many ask for it; a caller who leaves finds it when it comes back.
//! - The spool is bounded: [`MOST_AHEAD`] segments or [`MOST_AHEAD_BYTES`], and what is asked for.

use std::{
    collections::HashMap,
    fs::File,
    io::{Read, Seek, SeekFrom},
    sync::{Arc, Mutex},
    time::Duration,
};

use pgsidecar_core::{
    ArchiveFileName, ObjectKey, SegmentName, SystemIdentifier, WalHeader, WalSegmentSize, check_segment,
};
use tokio::{
    sync::{Semaphore, watch},
    task::AbortHandle,
};

use super::{
    spool::{Spool, Spooled},
    tail,
};
use crate::{
    failure::{Code, Failure},
    pgdata::DataDirectory,
    repository::{ClusterRecord, Repository, damaged},
    store::{ListRequest, Pages},
};

/// How many files that were asked for are fetched at a time.
const ASKED_AT_A_TIME: usize = 4;
/// How many are fetched ahead at a time. They never keep those from being fetched that are asked for.
const AHEAD_AT_A_TIME: usize = 3;
/// Segments ahead of the last request, at most.
const MOST_AHEAD: u64 = 6;
/// Bytes of them.
const MOST_AHEAD_BYTES: u64 = 128 << 20;
/// Nothing is fetched ahead unless its file system has this many times the room for it.
const ROOM: u64 = 4;
/// How long a file waits for whoever asked for it, or may ask for it.
const KEPT: Duration = Duration::from_secs(120);
/// How often a request finds that what it waited for went to another, before it gives up.
const TRIES: u32 = 5;

/// Who asks for what.
#[derive(Clone, Debug)]
pub struct FetchRequest {
    /// The repository of the database system.
    pub repository: Repository,
    /// The file.
    pub name: ArchiveFileName,
    /// The data directory that it is for, if it's the daemon's own.
    pub pgdata: Option<DataDirectory>,
    /// Whether the end of a stopped server's WAL will do where the whole segment doesn't exist.
    pub tail: bool,
}

/// Fetches WAL files into a spool.
pub struct Fetcher {
    shared: Arc<Shared>,
}

struct Shared {
    spool: Spool,
    asked: Semaphore,
    ahead: Semaphore,
    clusters: Mutex<HashMap<SystemIdentifier, ClusterRecord>>,
    state: Mutex<State>,
}

type SlotName = (SystemIdentifier, ArchiveFileName);

#[derive(Default)]
struct State {
    slots: HashMap<SlotName, Arc<Slot>>,
    /// The segment that was asked for last.
    last: Option<(SystemIdentifier, SegmentName)>,
    /// How many segments behind it are fetched.
    window: u64,
}

impl State {
    /// Notes which segment was asked for. Answers with how many behind it are to be fetched ahead.
    fn note(&mut self, system: SystemIdentifier, segment: SegmentName, size: Option<WalSegmentSize>) -> u64 {
        let most = size.map_or(1, |size| MOST_AHEAD.min((MOST_AHEAD_BYTES / size.bytes()).max(1)));
        let (continues, window) = match self.last.replace((system, segment)) {
            Some(last) if last == (system, segment) => (true, self.window),
            Some((of, last)) if of == system && size.is_some_and(|size| last.next(size) == Some(segment)) => {
                (true, (self.window * 2).clamp(1, most))
            }
            // Somebody walks backwards, and won't want what lies ahead.
            Some((of, last)) if of == system && last.timeline() == segment.timeline() && segment < last => (false, 0),
            _ => (false, 1),
        };
        self.window = window;
        if !continues {
            self.slots.retain(|(of, name), slot| {
                let keep = !slot.ahead || (*of, *name) == (system, ArchiveFileName::Segment(segment));
                if !keep {
                    slot.stop();
                }
                keep
            });
        }
        window
    }
}

/// What came of a fetch.
struct Fetched {
    file: Spooled,
    /// Not the whole segment, but what a stopped server had of it.
    is_tail: bool,
}

/// A file that is being fetched, or waits to be taken.
struct Slot {
    /// It was begun before anybody asked.
    ahead: bool,
    done: watch::Receiver<bool>,
    result: Mutex<Option<Result<Fetched, Failure>>>,
    task: Mutex<Option<AbortHandle>>,
}

impl Slot {
    fn take(&self) -> Option<Result<Fetched, Failure>> {
        self.result.lock().ok().and_then(|mut result| result.take())
    }

    fn stop(&self) {
        if let Ok(mut task) = self.task.lock()
            && let Some(task) = task.take()
        {
            task.abort();
        }
        self.take();
    }
}

impl Fetcher {
    /// A fetcher that spools into this directory, or into pg_wal.
    pub fn new(spool: Option<std::path::PathBuf>) -> Fetcher {
        Fetcher {
            shared: Arc::new(Shared {
                spool: Spool::new(spool),
                asked: Semaphore::new(ASKED_AT_A_TIME),
                ahead: Semaphore::new(AHEAD_AT_A_TIME),
                clusters: Mutex::default(),
                state: Mutex::default(),
            }),
        }
    }

    /// Where its files lie.
    pub fn spool(&self) -> &Spool {
        &self.shared.spool
    }

    /// Fetches a file. It can be had once.
    ///
    /// # Errors
    /// [`Code::NotInArchive`] if the store says so; anything else means 'can't tell'.
    ///
    /// # Cancellation
    /// A dropped call leaves the fetch going on; the next one for the same file finds what came of it.
    pub async fn fetch(&self, request: &FetchRequest) -> Result<Spooled, Failure> {
        self.shared.fetch(request).await
    }

    /// Fetches a file for a process that won't be asked for another: nothing is fetched ahead.
    ///
    /// # Errors
    /// As [`Fetcher::fetch`].
    pub async fn fetch_alone(&self, request: &FetchRequest) -> Result<Spooled, Failure> {
        self.shared.fetch_now(request).await.map(|fetched| fetched.file)
    }
}

impl Shared {
    async fn fetch(self: &Arc<Self>, request: &FetchRequest) -> Result<Spooled, Failure> {
        let name = (request.repository.layout().system(), request.name);
        for _ in 0..TRIES {
            let (slot, is_ours) = self.slot(request, false)?;
            self.look_ahead(request);
            let mut done = slot.done.clone();
            // That the sender is gone means that the task was thrown away.
            let _ = done.wait_for(|done| *done).await;
            self.forget(&name, &slot);
            match slot.take() {
                // Whole, it's the file whenever it was fetched. What was looked for before the question, ahead or for
                // somebody who has left, doesn't say what there is now.
                Some(Ok(found)) if is_ours || !found.is_tail => return Ok(found.file),
                Some(Err(failure)) if is_ours => return Err(failure),
                Some(_) => {}
                // It went to somebody else who asked for the same, or was thrown away.
                None => {}
            }
        }
        Err(Failure::new(Code::Busy, format!("{} is being asked for by too many at once", request.name))
            .hint("PostgreSQL asks again."))
    }

    /// The slot of this file, and whether it was begun just now because there was none.
    fn slot(self: &Arc<Self>, request: &FetchRequest, ahead: bool) -> Result<(Arc<Slot>, bool), Failure> {
        let name = (request.repository.layout().system(), request.name);
        let mut state = self.state.lock().map_err(|_| Failure::internal("the spool is unusable"))?;
        if let Some(slot) = state.slots.get(&name) {
            return Ok((slot.clone(), false));
        }
        let (sender, done) = watch::channel(false);
        let slot = Arc::new(Slot { ahead, done, result: Mutex::default(), task: Mutex::default() });
        state.slots.insert(name, slot.clone());
        drop(state);
        let (shared, request, weak) = (self.clone(), request.clone(), Arc::downgrade(&slot));
        let task = tokio::spawn(async move {
            let work = tokio::spawn({
                let (shared, request) = (shared.clone(), request.clone());
                async move {
                    let permits = if ahead { &shared.ahead } else { &shared.asked };
                    let _permit = permits.acquire().await.map_err(Failure::internal)?;
                    shared.fetch_now(&request).await
                }
            });
            // Dropped with this task, so that throwing a slot away ends its fetch.
            let work = AbortOnDrop(work);
            let result = work.join().await;
            if let Some(slot) = weak.upgrade()
                && let Ok(mut place) = slot.result.lock()
            {
                *place = Some(result);
            }
            sender.send_replace(true);
            tokio::time::sleep(KEPT).await;
            // Only weakly held meanwhile: what was thrown away takes no room.
            if let Some(slot) = weak.upgrade() {
                shared.forget(&name, &slot);
            }
        });
        if let Ok(mut place) = slot.task.lock() {
            *place = Some(task.abort_handle());
        }
        Ok((slot, true))
    }

    fn forget(&self, name: &SlotName, slot: &Arc<Slot>) {
        if let Ok(mut state) = self.state.lock()
            && state.slots.get(name).is_some_and(|there| Arc::ptr_eq(there, slot))
        {
            state.slots.remove(name);
        }
    }

    /// Begins what is likely to be asked for next, and throws away what was begun and isn't any more.
    fn look_ahead(self: &Arc<Self>, request: &FetchRequest) {
        let ArchiveFileName::Segment(segment) = request.name else { return };
        let system = request.repository.layout().system();
        // Not known before the first answer; the second request finds it.
        let size = self.clusters.lock().ok().and_then(|known| known.get(&system).map(|known| known.wal_segment_size));
        let window = {
            let Ok(mut state) = self.state.lock() else { return };
            state.note(system, segment, size)
        };
        let Some(size) = size else { return };
        let room = self.spool.room(request.pgdata.as_ref());
        if room.is_some_and(|room| room < ROOM * window * size.bytes()) {
            return;
        }
        let mut next = segment;
        for _ in 0..window {
            let Some(following) = next.next(size) else { return };
            next = following;
            let request = FetchRequest { name: ArchiveFileName::Segment(next), tail: false, ..request.clone() };
            let Ok((slot, _)) = self.slot(&request, true) else { return };
            // The archive ended here a moment ago: no use in asking for what is behind.
            if slot.result.lock().is_ok_and(|result| matches!(&*result, Some(Err(_)))) {
                return;
            }
        }
    }

    async fn fetch_now(&self, request: &FetchRequest) -> Result<Fetched, Failure> {
        let FetchRequest { repository, name, .. } = request;
        let cluster = self.known_cluster(repository).await?;
        let key = match *name {
            ArchiveFileName::Partial(segment) => partial_key(repository, segment).await?,
            _ => repository.layout().wal(name),
        };
        if let Some(found) = self.read(request, &cluster, &key).await? {
            return Ok(Fetched { file: found, is_tail: false });
        }
        if let (true, ArchiveFileName::Segment(segment)) = (request.tail, *name)
            && let Some(tail) = tail::newest(repository, segment).await?
            && let Some(found) = self.read(request, &cluster, &tail.key).await?
        {
            tracing::info!(%segment, "the archive ends before this segment: handing out what the stopped server had of it");
            return Ok(Fetched { file: found, is_tail: true });
        }
        Err(not_in_archive(*name))
    }

    /// Reads an object that holds the file, and checks it.
    async fn read(
        &self,
        request: &FetchRequest,
        cluster: &ClusterRecord,
        key: &ObjectKey,
    ) -> Result<Option<Spooled>, Failure> {
        let spooled = self.spool.create(request.pgdata.as_ref())?;
        let again = |error: std::io::Error| Failure::io("using the spool", &error);
        let writer = spooled.file.try_clone().map_err(again)?;
        let Some((_, length)) = request.repository.read_plain(key, writer).await? else { return Ok(None) };
        let name = request.name;
        // No such file is ever empty, and PostgreSQL would take an empty history for a timeline without parents.
        if length == 0 {
            return Err(damaged(&name.to_string(), "it is empty"));
        }
        if let ArchiveFileName::Segment(segment) = name {
            let mut head = [0; WalHeader::LEN];
            let mut file: &File = &spooled.file;
            file.seek(SeekFrom::Start(0))
                .and_then(|_| file.read_exact(&mut head))
                .map_err(|error| damaged(&name.to_string(), &error.to_string()))?;
            check_segment(&segment, &head, length, cluster.system_identifier, cluster.wal_segment_size)
                .map_err(|mismatch| damaged(&name.to_string(), &mismatch.to_string()))?;
        }
        spooled.write_back();
        Ok(Some(spooled))
    }

    /// The cluster's record, which never changes. Without one the repository knows nothing of this database: whether a
    /// file is missing can't be told then, because everything would be.
    async fn known_cluster(&self, repository: &Repository) -> Result<ClusterRecord, Failure> {
        let system = repository.layout().system();
        if let Some(known) = self.clusters.lock().ok().and_then(|known| known.get(&system).cloned()) {
            return Ok(known);
        }
        let record = repository.known_cluster().await?;
        if let Ok(mut known) = self.clusters.lock() {
            known.insert(system, record.clone());
        }
        Ok(record)
    }
}

/// A task that ends with whoever waits for it.
struct AbortOnDrop(tokio::task::JoinHandle<Result<Fetched, Failure>>);

impl AbortOnDrop {
    async fn join(mut self) -> Result<Fetched, Failure> {
        (&mut self.0).await.unwrap_or_else(|panic| Err(panic.into()))
    }
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn partial_key(repository: &Repository, segment: SegmentName) -> Result<ObjectKey, Failure> {
    let name = ArchiveFileName::Partial(segment);
    let mut pages = Pages::new(repository.store(), ListRequest::under(repository.layout().partial_prefix(segment)));
    let mut keys = Vec::new();
    while let Some(page) = pages.next().await? {
        keys.extend(page.objects.into_iter().map(|object| object.key));
    }
    match keys.as_slice() {
        [] => Err(not_in_archive(name)),
        [key] => Ok(key.clone()),
        _ => Err(Failure::new(Code::Conflict, format!("the archive holds {} different files {name}", keys.len()))
            .hint("Two standbys were promoted from this segment. PostgreSQL never asks for .partial files by itself; fetch the one you want from the store.")),
    }
}

fn not_in_archive(name: ArchiveFileName) -> Failure {
    Failure::new(Code::NotInArchive, format!("{name} is not in the archive"))
}
