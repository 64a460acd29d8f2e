//! Records that no restore depends on: of drills, and of scheduled runs. There is one for each, for ever, unless they go.

use std::collections::BTreeSet;

use jiff::{SignedDuration, Timestamp};

/// How long they stay: somebody may want to see a year.
pub const RECORDS_STAY: SignedDuration = SignedDuration::from_hours(400 * 24);
/// How many of the newest of a kind stay, however old: what is due is told from the last run, and what went well last from
/// the last few.
pub const RECORDS_LEFT: usize = 20;

/// Which of the records of one kind, by their times, may go. Times that are yet to come, because a clock was ahead, stay
/// and stand for no other.
pub fn outdated(times: &BTreeSet<Timestamp>, now: Timestamp) -> Vec<Timestamp> {
    let past = times.iter().copied().filter(|time| *time <= now);
    let behind = past.rev().skip(RECORDS_LEFT);
    let mut outdated: Vec<Timestamp> = behind.filter(|time| now.duration_since(*time) > RECORDS_STAY).collect();
    outdated.reverse();
    outdated
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_go_when_they_are_old_and_enough_newer_ones_stay() {
        let now: Timestamp = "2026-11-21T06:15:00Z".parse().unwrap();
        let day = |ago: i64| now - SignedDuration::from_hours(24 * ago);
        let times = |days: &mut dyn Iterator<Item = i64>| -> BTreeSet<Timestamp> { days.map(day).collect() };
        // One each day: what is older than 400 days.
        assert_eq!(outdated(&times(&mut (0..403)), now), [day(402), day(401)]);
        // One each year, one each 50 days: the newest stay, whatever their age.
        assert_eq!(outdated(&times(&mut (0..20).map(|n| n * 365)), now), []);
        assert_eq!(outdated(&times(&mut (0..21).map(|n| n * 365)), now), [day(20 * 365)]);
        // Those of a clock that was ahead are no newer ones.
        let ahead = (-40..0).chain((0..20).map(|n| 500 + n));
        assert_eq!(outdated(&times(&mut ahead.chain([600])), now), [day(600)]);
        assert_eq!(outdated(&BTreeSet::new(), now), []);
    }
}
