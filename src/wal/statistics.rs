//! What the archiver has done since the start, for status, metrics and log.

use std::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use jiff::Timestamp;
use pgsidecar_core::ArchiveFileName;
use serde::Serialize;

use crate::failure::{Code, Failure};

/// What the archiver has done since the start.
#[derive(Default)]
pub struct Counters {
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

impl Counters {
    /// What has been done so far.
    pub fn snapshot(&self) -> ArchiveStatistics {
        ArchiveStatistics {
            archived_files: self.archived.load(Relaxed),
            failures: self.failed.load(Relaxed),
            conflicts: self.conflicts.load(Relaxed),
            last: self.last.lock().map(|last| last.clone()).unwrap_or_default(),
        }
    }

    /// Counts a file that was acknowledged.
    pub fn note_success(&self, name: ArchiveFileName) {
        let Ok(mut last) = self.last.lock() else { return };
        self.archived.fetch_add(1, Relaxed);
        last.last_archived = Some(LastArchived { file: name, at: Timestamp::now() });
        if last.last_failure.take().is_some() {
            tracing::info!(file = %name, "archiving works again");
        }
    }

    /// Counts and tells a request that failed.
    pub fn note_failure(&self, name: ArchiveFileName, failure: &Failure) {
        let Ok(mut last) = self.last.lock() else { return };
        self.failed.fetch_add(1, Relaxed);
        if failure.code == Code::Conflict {
            self.conflicts.fetch_add(1, Relaxed);
        }
        // PostgreSQL asks every second or so: the same failure is told once.
        let known = last.last_failure.as_ref().is_some_and(|known| known.reason.message == failure.message);
        if !known {
            tracing::error!(file = %name, hint = failure.hint, "archiving failed: {failure}");
        }
        last.last_failure = Some(LastFailure { file: name, at: Timestamp::now(), reason: failure.clone() });
    }
}
