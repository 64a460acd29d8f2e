//! What is known of the files in an archive directory: since when they are as they are, and why some stay there.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use pgsidecar_core::ArchiveFileName;
use serde::Serialize;

use crate::{
    failure::{Code, Failure},
    pgdata::FileStamp,
};

/// How long a file must not have changed before it's looked into. Measured with our own clock: a network file system's
/// can be another.
pub const SETTLE: Duration = Duration::from_secs(2);
/// How long a file that stays isn't looked at.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// How long one that hasn't changed isn't tried again.
const TRY_AGAIN: Duration = Duration::from_secs(60);
/// How long an incomplete file must not have changed before it's told: cp may just be slow.
const PATIENCE: Duration = Duration::from_secs(10);
/// Files that stay and are told with the reason; of the others only the number is.
const MOST_TOLD: usize = 20;
/// Files that are remembered. Should more of them stay, what is behind them in order may be held up.
const MOST_KNOWN: usize = 50_000;

/// A file that stays in the archive directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HeldFile {
    /// Its name.
    pub file: ArchiveFileName,
    /// Why.
    pub reason: Failure,
}

/// Why a file stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// It isn't complete, or isn't what its name says.
    Incomplete,
    /// It's not to be stored.
    Refused,
    /// It is stored, and can't be removed.
    NotRemoved,
}

/// What is to be done with a file that a look has met.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Sight {
    /// It may be being written.
    New,
    /// It can be taken.
    Settled,
    /// It stays.
    Held,
}

#[derive(Debug)]
struct Seen {
    stamp: FileStamp,
    /// When it was met with this stamp first.
    since: Instant,
    settled: bool,
    held: Option<Held>,
    /// The number of the look that has met it last.
    look: u64,
}

#[derive(Debug)]
struct Held {
    why: Why,
    tried: Instant,
    looked: Instant,
    is_invalid: bool,
}

impl Seen {
    /// Whether it's time to tell that it stays.
    fn is_told(&self, now: Instant) -> bool {
        self.held.as_ref().is_some_and(|held| {
            let may_come = held.why == Why::Incomplete && held.is_invalid;
            !may_come || now.duration_since(self.since) >= PATIENCE
        })
    }
}

#[derive(Debug)]
struct Reason {
    failure: Failure,
    logged: bool,
}

/// What is known of the files.
#[derive(Debug, Default)]
pub(super) struct Known {
    files: BTreeMap<ArchiveFileName, Seen>,
    /// Of the first files that stay.
    reasons: BTreeMap<ArchiveFileName, Reason>,
    look: u64,
    /// That nothing can be removed has been logged.
    removal_logged: bool,
}

impl Known {
    /// A look through the directory begins.
    pub(super) fn begin_look(&mut self) {
        self.look += 1;
    }

    /// Notes that this file is there. Answers whether nothing more is to be done with it at this look.
    pub(super) fn rests(&mut self, name: ArchiveFileName, now: Instant) -> bool {
        let Some(seen) = self.files.get_mut(&name) else { return false };
        seen.look = self.look;
        seen.held.as_ref().is_some_and(|held| now.duration_since(held.looked) < LOOK_AGAIN)
    }

    /// All files have been met: what is known of others is forgotten.
    pub(super) fn end_look(&mut self) {
        let look = self.look;
        self.files.retain(|_, seen| seen.look == look);
        let files = &self.files;
        self.reasons.retain(|name, _| files.contains_key(name));
    }

    /// Notes how a file looks now.
    pub(super) fn saw(&mut self, name: ArchiveFileName, stamp: FileStamp, now: Instant) -> Sight {
        let look = self.look;
        let Some(seen) = self.files.get_mut(&name).filter(|seen| seen.stamp == stamp) else {
            self.reasons.remove(&name);
            if self.files.len() < MOST_KNOWN || self.files.contains_key(&name) {
                self.files.insert(name, Seen { stamp, since: now, settled: false, held: None, look });
            }
            return Sight::New;
        };
        if let Some(held) = &mut seen.held {
            held.looked = now;
            if now.duration_since(held.tried) < TRY_AGAIN {
                return Sight::Held;
            }
        }
        seen.settled = now.duration_since(seen.since) >= SETTLE;
        if seen.settled { Sight::Settled } else { Sight::New }
    }

    /// The stamp of a file that can be taken, and whether it's stored already and only has to be removed.
    pub(super) fn settled(&self, name: ArchiveFileName) -> Option<(FileStamp, bool)> {
        let seen = self.files.get(&name).filter(|seen| seen.settled)?;
        Some((seen.stamp, seen.held.as_ref().is_some_and(|held| held.why == Why::NotRemoved)))
    }

    /// Notes that a file stays, if it's still the one with this stamp.
    pub(super) fn hold(&mut self, name: ArchiveFileName, stamp: FileStamp, why: Why, failure: Failure, now: Instant) {
        let Some(seen) = self.files.get_mut(&name).filter(|seen| seen.stamp == stamp) else { return };
        seen.settled = false;
        let is_invalid = failure.code == Code::InvalidSegment;
        seen.held = Some(Held { why, tried: now, looked: now, is_invalid });
        if let Some(reason) = self.reasons.get_mut(&name) {
            reason.logged &= reason.failure.message == failure.message;
            reason.failure = failure;
        } else if self.reasons.len() < MOST_TOLD {
            self.reasons.insert(name, Reason { failure, logged: false });
        }
    }

    /// The file is gone, or is another now.
    pub(super) fn forget(&mut self, name: ArchiveFileName) {
        self.files.remove(&name);
        self.reasons.remove(&name);
    }

    /// The file has been removed.
    pub(super) fn removed(&mut self, name: ArchiveFileName) {
        self.forget(name);
        self.removal_logged = false;
    }

    /// What hasn't been logged yet and is to be now.
    pub(super) fn tell(&mut self, now: Instant) -> Vec<HeldFile> {
        let mut told = Vec::new();
        for (name, reason) in &mut self.reasons {
            let Some(seen) = self.files.get(name).filter(|seen| seen.is_told(now)) else { continue };
            // One for all: the others fail for the same reason.
            let not_removed = seen.held.as_ref().is_some_and(|held| held.why == Why::NotRemoved);
            let known = reason.logged || (not_removed && self.removal_logged);
            if !known {
                told.push(HeldFile { file: *name, reason: reason.failure.clone() });
            }
            self.removal_logged |= not_removed;
            reason.logged = true;
        }
        told
    }

    /// How many files stay, and the first of them.
    pub(super) fn held(&self, now: Instant) -> (u64, Vec<HeldFile>) {
        let held = |name: &ArchiveFileName| self.files.get(name).is_some_and(|seen| seen.is_told(now));
        let number = self.files.values().filter(|seen| seen.is_told(now)).count() as u64;
        let first = self.reasons.iter().filter(|(name, _)| held(name));
        (number, first.map(|(file, reason)| HeldFile { file: *file, reason: reason.failure.clone() }).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn name(number: u32) -> ArchiveFileName {
        format!("0000000100000000{number:08X}").parse().unwrap()
    }

    /// Stamps of a file that has this many bytes.
    fn stamp(bytes: usize) -> FileStamp {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, &vec![0; bytes]).unwrap();
        FileStamp::of(&file.metadata().unwrap())
    }

    fn incomplete() -> Failure {
        Failure::new(Code::InvalidSegment, "it's short")
    }

    /// A look that meets one file.
    fn look(known: &mut Known, name: ArchiveFileName, stamp: FileStamp, now: Instant) -> Option<Sight> {
        known.begin_look();
        let rests = known.rests(name, now);
        known.end_look();
        (!rests).then(|| known.saw(name, stamp, now))
    }

    #[test]
    fn a_file_is_taken_once_it_has_not_changed_for_a_while() {
        let (mut known, start, file) = (Known::default(), Instant::now(), name(1));
        let (half, whole) = (stamp(1), stamp(2));
        assert_eq!(look(&mut known, file, half, start), Some(Sight::New));
        assert_eq!(look(&mut known, file, half, start + SETTLE / 2), Some(Sight::New));
        assert_eq!(known.settled(file), None);
        assert_eq!(look(&mut known, file, whole, start + SETTLE), Some(Sight::New));
        assert_eq!(look(&mut known, file, whole, start + SETTLE * 2), Some(Sight::Settled));
        assert_eq!(known.settled(file), Some((whole, false)));
    }

    #[test]
    fn an_incomplete_file_rests_and_is_told_after_a_while_and_once() {
        let (mut known, start, file, half) = (Known::default(), Instant::now(), name(1), stamp(1));
        look(&mut known, file, half, start);
        let held_at = start + SETTLE;
        look(&mut known, file, half, held_at);
        known.hold(file, half, Why::Incomplete, incomplete(), held_at);
        assert_eq!(known.settled(file), None);
        assert_eq!(look(&mut known, file, half, held_at + SECOND), None);
        assert_eq!((known.tell(held_at), known.held(held_at)), (vec![], (0, vec![])));
        assert_eq!(look(&mut known, file, half, held_at + LOOK_AGAIN), Some(Sight::Held));
        let told = vec![HeldFile { file, reason: incomplete() }];
        let later = start + PATIENCE;
        assert_eq!((known.tell(later), known.held(later)), (told.clone(), (1, told.clone())));
        assert_eq!((known.tell(later), known.held(later)), (vec![], (1, told)));
        // It's tried again some time, and at once if it changes.
        assert_eq!(look(&mut known, file, half, held_at + TRY_AGAIN), Some(Sight::Settled));
        known.hold(file, half, Why::Incomplete, incomplete(), held_at + TRY_AGAIN);
        let changed = held_at + TRY_AGAIN + LOOK_AGAIN;
        assert_eq!(known.tell(changed), []);
        assert_eq!(look(&mut known, file, stamp(2), changed), Some(Sight::New));
        assert_eq!(known.held(changed), (0, vec![]));
        // What has been taken away is told no more.
        known.begin_look();
        known.end_look();
        assert_eq!((known.files.len(), known.reasons.len()), (0, 0));
    }

    #[test]
    fn what_is_found_out_of_a_file_that_has_changed_meanwhile_is_not_noted() {
        let (mut known, now, file) = (Known::default(), Instant::now(), name(1));
        look(&mut known, file, stamp(2), now);
        known.hold(file, stamp(1), Why::Refused, incomplete(), now);
        assert_eq!(known.held(now), (0, vec![]));
    }

    #[test]
    fn of_many_files_that_stay_a_few_are_told_and_of_many_that_can_not_be_removed_one_is_logged() {
        let (mut known, now, same) = (Known::default(), Instant::now(), stamp(1));
        let io = Failure::new(Code::Io, "denied");
        for number in 0..100 {
            known.saw(name(number), same, now);
            known.hold(name(number), same, Why::NotRemoved, io.clone(), now);
        }
        assert_eq!((known.held(now).0, known.held(now).1.len()), (100, MOST_TOLD));
        assert_eq!(known.tell(now), [HeldFile { file: name(0), reason: io }]);
        assert_eq!(known.tell(now), []);
    }
}
