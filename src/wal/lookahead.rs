//! Archiving ahead: what PostgreSQL has marked `.ready` is uploaded, several files at a time, before it asks. And what lies
//! in an archive directory, for which nobody ever asks: both are a [`WalSource`], and this runs once for each.
//!
//! PostgreSQL asks for one file at a time and waits for the answer. With look-ahead the answer to nearly every question
//! is there already. It's only about time: what is archived, under which conditions and what a success means is the
//! archiver's matter, the same for both ways in.
//!
//! inotify is a hint, the directory the truth: it's read anew every few seconds and after each hint. Where inotify is
//! absent (network file systems, exhausted limits) that is all there is.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use pgsidecar_core::ArchiveFileName;
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
    time::Instant,
};

use super::{
    Origin, Origins,
    archive::{Archiver, Outcome},
    source::WalSource,
};
use crate::failure::Code;

/// Files that are under way at a time. The archiver's own limits on memory and threads come on top.
const AHEAD: usize = 8;
/// Names that are taken from a source at a time. A backlog can be of any length.
const BATCH: usize = 1_000;
/// How long the directory isn't looked at without a hint.
const RESCAN: Duration = Duration::from_secs(2);
/// How long it isn't looked at again in spite of hints.
const PAUSE: Duration = Duration::from_millis(20);
/// A file that could not be archived is tried again after this, then after twice as long, up to the most.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const MOST_BACKOFF: Duration = Duration::from_secs(30);

/// What is under way, and what has to wait.
#[derive(Default)]
struct Progress {
    tasks: JoinSet<(ArchiveFileName, Outcome)>,
    under_way: HashSet<ArchiveFileName>,
    /// What was ready at the last look and hasn't been begun since.
    queue: VecDeque<ArchiveFileName>,
    postponed: HashMap<ArchiveFileName, Postponed>,
    /// The store isn't there, or refuses: nothing is begun.
    outage: Option<Postponed>,
}

#[derive(Clone, Copy)]
struct Postponed {
    until: Instant,
    backoff: Duration,
}

impl Postponed {
    fn after(before: Option<Postponed>) -> Postponed {
        let backoff = before.map_or(FIRST_BACKOFF, |before| (before.backoff * 2).min(MOST_BACKOFF));
        Postponed { until: Instant::now() + backoff, backoff }
    }

    fn is_over(&self) -> bool {
        self.until <= Instant::now()
    }
}

/// Archives ahead until it's told to stop; what is under way then goes on by itself.
///
/// `origins` is asked before each look.
pub async fn run(
    archiver: Arc<Archiver>,
    origins: &dyn Origins,
    source: Arc<dyn WalSource>,
    mut stop: watch::Receiver<bool>,
) {
    let hint = Arc::new(Notify::new());
    let mut watched = Watched::default();
    let mut progress = Progress::default();
    let mut rescan = Instant::now();
    while !*stop.borrow() {
        if let Ok(origin) = origins.origin().await {
            if rescan <= Instant::now() || progress.queue.is_empty() {
                watched.watch(&source.watched(&origin), &hint);
                progress.look(&source, &archiver, &origin).await;
                rescan = Instant::now() + RESCAN;
            }
            progress.begin(&source, &archiver, &origin);
        }
        tokio::select! {
            () = hint.notified() => {
                tokio::time::sleep(PAUSE).await;
                rescan = Instant::now();
            }
            Some(done) = progress.tasks.join_next() => progress.note(done),
            () = tokio::time::sleep_until(rescan.max(Instant::now() + PAUSE)) => {}
            _ = stop.changed() => {}
        }
        while let Some(done) = progress.tasks.try_join_next() {
            progress.note(done);
        }
    }
    progress.tasks.detach_all();
}

impl Progress {
    /// Reads anew what is ready. What is archived stays so until PostgreSQL asks, and what was postponed may stay so
    /// for ever: neither may take the place of what is behind it.
    async fn look(&mut self, source: &Arc<dyn WalSource>, archiver: &Arc<Archiver>, origin: &Origin) {
        let (source, archiver, origin) = (source.clone(), archiver.clone(), origin.clone());
        let waiting: HashSet<_> =
            self.postponed.iter().filter(|(_, postponed)| !postponed.is_over()).map(|(name, _)| *name).collect();
        let looked = tokio::task::spawn_blocking(move || {
            source.look(&archiver, &origin, BATCH, &|name: &ArchiveFileName| !waiting.contains(name))
        });
        // That it can't be looked is told by the status.
        let Ok(Ok(found)) = looked.await else { return };
        self.postponed.retain(|name, postponed| !postponed.is_over() || found.ready.contains(name));
        self.queue = found.ready.into();
    }

    /// Begins as much of what is ready as there is room for.
    fn begin(&mut self, source: &Arc<dyn WalSource>, archiver: &Arc<Archiver>, origin: &Origin) {
        if self.outage.is_some_and(|outage| !outage.is_over()) {
            return;
        }
        while self.tasks.len() < AHEAD
            && let Some(name) = self.queue.pop_front()
        {
            let postponed = self.postponed.get(&name).is_some_and(|postponed| !postponed.is_over());
            if postponed || !source.is_waiting(archiver, origin, name) || !self.under_way.insert(name) {
                continue;
            }
            let (source, archiver, origin) = (source.clone(), archiver.clone(), origin.clone());
            self.tasks.spawn(async move { (name, source.archive(&archiver, &origin, name).await) });
        }
    }

    fn note(&mut self, done: Result<(ArchiveFileName, Outcome), tokio::task::JoinError>) {
        let Ok((name, outcome)) = done else { return };
        self.under_way.remove(&name);
        match outcome {
            Ok(_) => {
                self.postponed.remove(&name);
                self.outage = None;
            }
            Err(failure) if matches!(failure.code, Code::StoreUnavailable | Code::StoreDenied) => {
                // Once for all that were under way when it began.
                if self.outage.is_none_or(|outage| outage.is_over()) {
                    self.outage = Some(Postponed::after(self.outage));
                }
            }
            Err(_) => {
                let postponed = Postponed::after(self.postponed.get(&name).copied());
                self.postponed.insert(name, postponed);
            }
        }
    }
}

/// The directory that inotify watches, if it does.
#[derive(Default)]
struct Watched {
    directory: Option<(PathBuf, u64)>,
    watcher: Option<RecommendedWatcher>,
}

impl Watched {
    /// Watches this directory, also when another one has come under its path.
    fn watch(&mut self, directory: &Path, hint: &Arc<Notify>) {
        use std::os::unix::fs::MetadataExt;
        let Ok(meta) = std::fs::metadata(directory) else { return };
        let identity = (directory.to_owned(), meta.ino());
        if self.directory.as_ref() == Some(&identity) {
            return;
        }
        let hint = hint.clone();
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // PostgreSQL creates the `.ready`, and renames it when it's done. Lost events come as one that asks for a rescan.
            if event.is_ok_and(|event| matches!(event.kind, EventKind::Create(_)) || event.need_rescan()) {
                hint.notify_one();
            }
        });
        let watching = watcher.and_then(|mut watcher| {
            watcher.watch(directory, RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        match watching {
            Ok(watcher) => self.watcher = Some(watcher),
            Err(error) => {
                self.watcher = None;
                tracing::info!(directory = %directory.display(), %error, "no notice of new WAL from the kernel; looking every {RESCAN:?}");
            }
        }
        self.directory = Some(identity);
    }
}
