//! How far a backup or a restore is, and the way to stop it.

use std::{
    io,
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::{
    backup::pace::Pace,
    failure::{Code, Failure},
};

/// What it is at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// PostgreSQL makes the checkpoint with which it begins.
    #[default]
    Checkpoint,
    /// PostgreSQL summarizes the WAL from before it.
    Summaries,
    /// Files are read.
    Reading,
    /// Its WAL is on its way to the repository.
    Wal,
    /// A restore writes files.
    Writing,
    /// pg_dump runs.
    Dumping,
}

impl Phase {
    const ALL: [Phase; 6] =
        [Phase::Checkpoint, Phase::Summaries, Phase::Reading, Phase::Wal, Phase::Writing, Phase::Dumping];
}

/// How far it is; read by whoever shows it.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes of files read so far; by a restore, written.
    pub bytes: AtomicU64,
    /// About how many there will be; 0 while unknown.
    pub total_bytes: AtomicU64,
    /// Files done.
    pub files: AtomicU64,
    /// How fast the files may be read.
    pub pace: Pace,
    /// Set when the commit marker is about to be written: from then on nothing is removed.
    pub committing: AtomicBool,
    doing: Mutex<Option<String>>,
    phase: AtomicU8,
    moving_since: OnceLock<Instant>,
    cancelled: AtomicBool,
    cancellation: Notify,
}

impl Progress {
    /// Notes what it's at from now on.
    pub fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Relaxed);
        if matches!(phase, Phase::Reading | Phase::Writing | Phase::Dumping) {
            let _ = self.moving_since.set(Instant::now());
        }
    }

    /// What it's at.
    pub fn phase(&self) -> Phase {
        let number = self.phase.load(Relaxed);
        Phase::ALL.into_iter().find(|phase| *phase as u8 == number).unwrap_or_default()
    }

    /// Notes which of several things it's at, for people.
    pub fn note_doing(&self, what: &str) {
        if let Ok(mut doing) = self.doing.lock() {
            *doing = Some(what.to_owned());
        }
    }

    /// Which of several things it's at, for people.
    pub fn doing(&self) -> Option<String> {
        self.doing.lock().ok().and_then(|doing| doing.clone())
    }

    /// How long files have been read or written for; `None` before that.
    pub fn moving_for(&self) -> Option<Duration> {
        self.moving_since.get().map(Instant::elapsed)
    }

    /// Makes it end with an error soon.
    pub fn cancel(&self) {
        self.cancelled.store(true, Relaxed);
        self.cancellation.notify_waiters();
    }

    /// Waits for a step that isn't done by the packing threads, unless the backup is cancelled.
    ///
    /// # Errors
    /// The step's own, or [`Code::Busy`] after a cancellation.
    pub async fn unless_cancelled<T>(&self, step: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        let cancellation = self.cancellation.notified();
        // Looked at after the waiting has begun: a cancellation in between isn't missed.
        if self.is_cancelled() {
            return Err(given_up());
        }
        tokio::select! {
            done = step => done,
            () = cancellation => Err(given_up()),
        }
    }

    /// Whether it was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Relaxed)
    }

    /// An error if it was cancelled.
    pub(crate) fn check(&self) -> io::Result<()> {
        if self.is_cancelled() { Err(io::Error::other("cancelled")) } else { Ok(()) }
    }
}

/// Why the threads of a cancelled backup end.
pub(crate) fn given_up() -> Failure {
    Failure::new(Code::Busy, "the backup was given up").hint("Take it again.")
}
