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

/// How long it must fail, or have failed no more, until what was told a while ago is news again. A store that throttles
/// takes one request and not the next.
const SETTLED: SignedDuration = SignedDuration::from_mins(1);

/// How long a file counts as refused after the last try. It's tried again more often.
const REFUSED_STILL: SignedDuration = SignedDuration::from_mins(2);

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
    /// The request that failed last. `None` once one has succeeded since; if it was the file's fault, one for that file.
    pub last_failure: Option<LastFailure>,
    #[serde(skip)]
    told: Told,
}

/// What the log says already.
#[derive(Clone, Debug, Default)]
struct Told {
    /// The failure that was told last, and when.
    failure: Option<(Failure, Timestamp)>,
    /// Whether it fails, as far as the log says.
    is_failing: bool,
    /// Since when no request has succeeded.
    failing_since: Option<Timestamp>,
    /// When a request failed last.
    failed_at: Option<Timestamp>,
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

impl Told {
    /// Notes a failure; answers whether the log has to be told. PostgreSQL asks every second or so, and look-ahead for
    /// several files: an outage is told once, whatever file it hits and whatever passes in between, and again when it
    /// goes on; what concerns one file, once for that file.
    fn failure(&mut self, failure: &Failure, now: Timestamp) -> bool {
        let failing_since = *self.failing_since.get_or_insert(now);
        let failed_before = self.failed_at.replace(now);
        let is_news = match &self.failure {
            None => true,
            Some((told, _)) if told.code != failure.code => true,
            Some((_, at)) if now.duration_since(*at) >= TELL_AGAIN => true,
            Some((told, _)) if !concerns_all_files(failure) => !self.is_failing || told.message != failure.message,
            Some(_) if self.is_failing => false,
            // It has worked meanwhile.
            Some(_) => {
                now.duration_since(failing_since) >= SETTLED
                    || failed_before.is_none_or(|before| now.duration_since(before) >= SETTLED)
            }
        };
        if is_news {
            self.failure = Some((failure.clone(), now));
            self.is_failing = true;
        }
        is_news
    }

    /// Notes a success; answers whether the log has to be told.
    fn success(&mut self) -> bool {
        self.failing_since = None;
        std::mem::take(&mut self.is_failing)
    }
}

fn concerns_all_files(failure: &Failure) -> bool {
    matches!(
        failure.code,
        Code::StoreUnavailable | Code::StoreDenied | Code::Misconfigured | Code::DataDirectory | Code::NotOwner
    )
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
        let now = Timestamp::now();
        last.last_archived = Some(LastArchived { file: name, at: now });
        // That another file gets through says nothing of one that is refused for what it is.
        last.last_failure = last.last_failure.take().filter(|last| {
            last.file != name && !concerns_all_files(&last.reason) && now.duration_since(last.at) < REFUSED_STILL
        });
        if last.last_failure.is_none() && last.told.success() {
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
        let now = Timestamp::now();
        if last.told.failure(failure, now) {
            tracing::error!(file = %name, hint = failure.hint, "archiving failed: {failure}");
        }
        last.last_failure = Some(LastFailure { file: name, at: now, reason: failure.clone() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_refused_stays_told_while_others_get_through() {
        let name = |number: u8| format!("{:024X}", (1_u128 << 64) + u128::from(number)).parse().unwrap();
        let counters = Counters::default();
        let refused = || counters.snapshot().last.last_failure.map(|failure| failure.file);
        counters.note_failure(name(1), &Failure::new(Code::Conflict, "other content"));
        counters.note_success(name(2));
        assert_eq!(refused(), Some(name(1)));
        counters.note_success(name(1));
        assert_eq!(refused(), None);
        counters.note_failure(name(1), &away("the store is away"));
        counters.note_success(name(2));
        assert_eq!(refused(), None);
    }

    /// Seconds after some moment.
    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + seconds).unwrap()
    }

    fn away(text: &str) -> Failure {
        Failure::new(Code::StoreUnavailable, text)
    }

    #[test]
    fn an_outage_is_told_once_whatever_file_it_hits_and_a_conflict_for_each() {
        let conflict = |text: &str| Failure::new(Code::Conflict, text);
        let mut told = Told::default();
        assert!(told.failure(&away("1"), at(0)));
        assert!(!told.failure(&away("2"), at(1)));
        assert!(!told.failure(&away("1"), at(599)));
        assert!(told.failure(&away("1"), at(600)), "it goes on");
        assert!(told.failure(&conflict("1"), at(601)));
        assert!(!told.failure(&conflict("1"), at(602)));
        assert!(told.failure(&conflict("2"), at(603)));
        assert!(told.success());
        assert!(!told.success());
        assert!(told.failure(&conflict("2"), at(604)));
    }

    #[test]
    fn what_fails_now_and_then_is_told_once_until_it_has_settled() {
        let mut told = Told::default();
        assert!(told.failure(&away("throttled"), at(0)));
        assert!(told.success());
        for second in 1..500 {
            assert!(!told.failure(&away("throttled"), at(second)), "{second}");
            assert!(!told.success(), "what wasn't told to fail isn't told to work");
        }
        // Nothing passes any more.
        assert!(!told.failure(&away("gone"), at(500)));
        assert!(!told.failure(&away("gone"), at(559)));
        assert!(told.failure(&away("gone"), at(560)));
        assert!(!told.failure(&away("gone"), at(561)));
        assert!(told.success());
        // It has worked for a minute.
        assert!(told.failure(&away("gone"), at(621)));
        assert!(told.success());
        // For as long as this, it's told now and then.
        assert!(!told.failure(&away("throttled"), at(640)));
        assert!(!told.success());
        (1..=58).for_each(|n| assert!(!told.failure(&away("throttled"), at(640 + n * 10)) && !told.success()));
        assert!(told.failure(&away("throttled"), at(1221)));
    }
}
