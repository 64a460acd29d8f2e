//! How a repository grows, and where that ends.

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::Policy;

/// How far back is looked to tell how fast it grows.
const LOOKED_BACK: SignedDuration = SignedDuration::from_hours(30 * 24);
/// What is known for less than that says nothing about a day.
const LEAST: SignedDuration = SignedDuration::from_hours(24);
const DAY_SECONDS: f64 = 86_400.0;

/// What takes room in a repository.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Full backups.
    Full,
    /// Differential and incremental backups.
    Incremental,
    /// WAL.
    Wal,
    /// Dumps.
    Dumps,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 4] = [Kind::Full, Kind::Incremental, Kind::Wal, Kind::Dumps];

    /// Its name, as in JSON and in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Kind::Full => "full",
            Kind::Incremental => "incremental",
            Kind::Wal => "wal",
            Kind::Dumps => "dumps",
        }
    }
}

/// What there is of a kind, found out object by object, in any order. Takes constant memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Measured {
    now: Timestamp,
    objects: u64,
    bytes: u64,
    recent_bytes: u64,
    oldest: Option<Timestamp>,
}

impl Measured {
    /// Nothing yet.
    pub fn new(now: Timestamp) -> Measured {
        Measured { now, objects: 0, bytes: 0, recent_bytes: 0, oldest: None }
    }

    /// Takes note of an object, or of a backup or dump as a whole.
    pub fn found(&mut self, bytes: u64, stored_at: Timestamp) {
        self.objects += 1;
        self.bytes = self.bytes.saturating_add(bytes);
        self.oldest = Some(self.oldest.map_or(stored_at, |oldest| oldest.min(stored_at)));
        if self.now.duration_since(stored_at) <= LOOKED_BACK {
            self.recent_bytes = self.recent_bytes.saturating_add(bytes);
        }
    }

    /// How many bytes came in a day; `None` for what isn't known for a day yet.
    fn per_day(&self, known_since: Option<Timestamp>) -> Option<f64> {
        let known_for = self.now.duration_since(known_since?);
        (known_for >= LEAST).then(|| self.recent_bytes as f64 * DAY_SECONDS / known_for.min(LOOKED_BACK).as_secs_f64())
    }
}

/// How a kind grows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct GrowthOf {
    /// The kind.
    pub kind: Kind,
    /// How many backups, dumps or WAL files there are.
    pub objects: u64,
    /// Bytes that they take.
    pub bytes: u64,
    /// Bytes that were added in a day, over the last 30 days; unknown on the first day.
    pub bytes_per_day: Option<u64>,
    /// The bytes at which the retention in force holds them; `None` if it never does, or while it's unknown.
    pub levels_off_at_bytes: Option<u64>,
}

/// How a repository grows.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Growth {
    /// When it was looked.
    pub measured_at: Timestamp,
    /// Each kind.
    pub kinds: Vec<GrowthOf>,
    /// Bytes of all kinds.
    pub bytes: u64,
    /// Of all kinds, as far as it's known.
    pub bytes_per_day: Option<u64>,
    /// Of all kinds that there are; `None` if one of them grows for ever, or while it's unknown.
    pub levels_off_at_bytes: Option<u64>,
}

/// Tells how a repository grows and what it comes to, if things go on as in the last 30 days.
///
/// With a recovery window, backups and WAL of the window stay and, until the next full backup is old enough, those of the
/// time between two full backups before it; with more full backups wanted at least, those of as many such times. Dumps
/// come to the numbers that stay.
pub fn forecast(measured: [(Kind, Measured); 4], policy: &Policy, now: Timestamp) -> Growth {
    let known_since = measured.iter().filter_map(|(_, measured)| measured.oldest).min();
    let days_known = known_since.map_or(0.0, |since| now.duration_since(since).as_secs_f64() / DAY_SECONDS);
    let fulls = measured.iter().find(|(kind, _)| *kind == Kind::Full).map_or(0, |(_, measured)| measured.objects);
    let days_kept = policy.window.filter(|_| fulls > 0).map(|window| {
        let between_fulls = days_known / fulls as f64;
        let window = window.duration().as_secs_f64() / DAY_SECONDS;
        (window + between_fulls).max(policy.redundancy.count() as f64 * between_fulls)
    });
    let kinds: Vec<GrowthOf> = (measured.iter())
        .map(|(kind, measured)| {
            let per_day = measured.per_day(known_since);
            let level = match kind {
                Kind::Dumps => policy.dumps.filter(|_| per_day.is_some()).map(|counts| {
                    let mean = measured.bytes as f64 / measured.objects.max(1) as f64;
                    mean * counts.most() as f64
                }),
                _ => per_day.zip(days_kept).map(|(per_day, days)| per_day * days),
            };
            GrowthOf {
                kind: *kind,
                objects: measured.objects,
                bytes: measured.bytes,
                bytes_per_day: per_day.map(whole),
                levels_off_at_bytes: level.map(whole),
            }
        })
        .collect();
    let there = || kinds.iter().filter(|kind| kind.objects > 0);
    let levels: Option<Vec<u64>> = there().map(|kind| kind.levels_off_at_bytes).collect();
    let rates: Option<Vec<u64>> = there().map(|kind| kind.bytes_per_day).collect();
    let sum = |bytes: Vec<u64>| (!bytes.is_empty()).then(|| bytes.into_iter().sum());
    Growth {
        measured_at: now,
        bytes: kinds.iter().map(|kind| kind.bytes).sum(),
        bytes_per_day: rates.and_then(sum),
        levels_off_at_bytes: levels.and_then(sum),
        kinds,
    }
}

/// Never negative, and far from what a number of 64 bits can't hold.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a sum of sizes; saturates")]
fn whole(bytes: f64) -> u64 {
    bytes.round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const GB: u64 = 1 << 30;

    fn day(day: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + day * 86_400).unwrap()
    }

    /// A full backup of 70 GB a week, an incremental one of 2 GB on the other days, 5 GB of WAL and 1 GB of dumps a day.
    fn measured(days: i64) -> [(Kind, Measured); 4] {
        let now = day(days);
        let mut all = Kind::ALL.map(|kind| (kind, Measured::new(now)));
        for at in 0..days {
            let backup = if at % 7 == 0 { 70 * GB } else { 2 * GB };
            all[usize::from(at % 7 != 0)].1.found(backup, day(at));
            all[2].1.found(5 * GB, day(at));
            all[3].1.found(GB, day(at));
        }
        all
    }

    fn near(found: Option<u64>, gigabytes: f64) {
        let found = found.unwrap() as f64 / GB as f64;
        assert!((found / gigabytes - 1.0).abs() < 0.15, "{found} GB, not {gigabytes}");
    }

    #[test]
    fn what_comes_in_a_day_and_stays_for_the_window_and_a_cycle_is_the_level() {
        let policy = Policy {
            window: Some("14d".parse().unwrap()),
            dumps: Some("daily=7,weekly=4".parse().unwrap()),
            ..Policy::default()
        };
        for days in [28, 70] {
            let growth = forecast(measured(days), &policy, day(days));
            let [full, incremental, wal, dumps] = growth.kinds[..] else { panic!("{growth:?}") };
            near(wal.bytes_per_day, 5.0);
            near(wal.levels_off_at_bytes, 5.0 * 21.0);
            near(full.bytes_per_day, 10.0);
            near(full.levels_off_at_bytes, 10.0 * 21.0);
            near(incremental.bytes_per_day, 12.0 / 7.0);
            near(dumps.levels_off_at_bytes, 11.0);
            near(growth.levels_off_at_bytes, 5.0 * 21.0 + 10.0 * 21.0 + 12.0 * 3.0 + 11.0);
            assert_eq!(growth.bytes, growth.kinds.iter().map(|kind| kind.bytes).sum::<u64>());
        }
        let more = Policy { redundancy: "6".parse().unwrap(), ..policy };
        near(forecast(measured(70), &more, day(70)).kinds[2].levels_off_at_bytes, 5.0 * 42.0);
    }

    #[test]
    fn without_retention_it_grows_for_ever_and_on_the_first_day_nothing_is_known() {
        let growth = forecast(measured(70), &Policy::default(), day(70));
        assert_eq!(growth.levels_off_at_bytes, None);
        near(growth.bytes_per_day, 5.0 + 10.0 + 12.0 / 7.0 + 1.0);
        let policy = Policy { window: Some("14d".parse().unwrap()), ..Policy::default() };
        let mut young = Kind::ALL.map(|kind| (kind, Measured::new(day(0))));
        young[0].1.found(GB, day(0) - SignedDuration::from_hours(3));
        let growth = forecast(young, &policy, day(0));
        assert_eq!((growth.bytes, growth.bytes_per_day, growth.levels_off_at_bytes), (GB, None, None));
        // Dumps have no policy here, and there are some.
        assert_eq!(forecast(measured(70), &policy, day(70)).levels_off_at_bytes, None);
    }
}
