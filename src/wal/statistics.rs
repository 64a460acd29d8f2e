//! What the archiver has done since the start, for status, metrics and log.

use std::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use jiff::{SignedDuration, Timestamp};
use pgsidecar_core::ArchiveFileName;
use serde::Serialize;

use crate::failure::{Code, Failure};

/// How often a failure that goes on is told.
const TELL_AGAIN: SignedDuration = SignedDuration::from_mins(10);

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
    /// When the log was told of it.
    #[serde(skip)]
    told: Option<Timestamp>,
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

impl Last {
    /// Whether the log doesn't say it yet. PostgreSQL asks every second or so, and look-ahead for several files: an outage
    /// is told once, whatever file it hits, and again when it goes on; what concerns one file, once for that file.
    fn is_news(&self, failure: &Failure) -> bool {
        let (Some(last), Some(told)) = (&self.last_failure, self.told) else { return true };
        let of_all_files = matches!(
            failure.code,
            Code::StoreUnavailable | Code::StoreDenied | Code::Misconfigured | Code::DataDirectory | Code::NotOwner
        );
        let same = last.reason.code == failure.code && (of_all_files || last.reason.message == failure.message);
        !same || Timestamp::now().duration_since(told) >= TELL_AGAIN
    }
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
        if last.is_news(failure) {
            tracing::error!(file = %name, hint = failure.hint, "archiving failed: {failure}");
            last.told = Some(Timestamp::now());
        }
        last.last_failure = Some(LastFailure { file: name, at: Timestamp::now(), reason: failure.clone() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_told_once_whatever_file_it_hits_and_a_conflict_for_each() {
        let name = |number: u32| format!("{:024X}", (1_u128 << 64) + u128::from(number)).parse().unwrap();
        let (away, conflict) = (
            |n| Failure::new(Code::StoreUnavailable, format!("{n}")),
            |n| Failure::new(Code::Conflict, format!("{n}")),
        );
        let counters = Counters::default();
        let is_news = |failure: Failure, number| {
            let news = counters.last.lock().unwrap().is_news(&failure);
            counters.note_failure(name(number), &failure);
            news
        };
        assert!(is_news(away(1), 1));
        assert!(!is_news(away(2), 2));
        assert!(!is_news(away(1), 1));
        assert!(is_news(conflict(1), 1));
        assert!(!is_news(conflict(1), 1));
        assert!(is_news(conflict(2), 2));
        counters.note_success(name(2));
        assert!(is_news(conflict(2), 2));
    }
}
