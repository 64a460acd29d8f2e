//! Which dumps stay.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{Timestamp, civil::ISOWeekDate, tz::TimeZone};
use serde::Serialize;

use super::policy::DumpCounts;
use crate::{DumpId, dump::DatabaseName};

/// Why a dump stays.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DumpReason {
    /// It's one of the newest.
    Last,
    /// It's the newest of its day.
    Daily,
    /// It's the newest of its week.
    Weekly,
    /// It's the newest of its month.
    Monthly,
    /// It's the newest of its year.
    Yearly,
    /// It's of a time that hasn't come: a clock was ahead.
    Ahead,
}

/// The complete dumps that stay, with all reasons. One stands for an older one only if it has all of that one's databases;
/// one whose time is yet to come stands for none.
pub(super) fn kept(
    dumps: &BTreeMap<DumpId, BTreeSet<DatabaseName>>,
    counts: &DumpCounts,
    now: Timestamp,
) -> BTreeMap<DumpId, Vec<DumpReason>> {
    let is_ahead = |id: &DumpId| id.began() > now;
    let mut kept: BTreeMap<DumpId, Vec<DumpReason>> =
        dumps.keys().filter(|id| is_ahead(id)).map(|id| (*id, vec![DumpReason::Ahead])).collect();
    let counting = || dumps.iter().filter(|(id, _)| !is_ahead(id));
    let selections: BTreeSet<&BTreeSet<DatabaseName>> = counting().map(|(_, databases)| databases).collect();
    for selection in selections {
        let covering = counting().filter(|(_, databases)| databases.is_superset(selection)).map(|(id, _)| *id);
        let stay = newest_of_periods(&covering.collect(), counts);
        kept.extend(stay.into_iter().filter(|(id, _)| dumps.get(id) == Some(selection)));
    }
    kept
}

/// Of dumps that can stand for each other, those that stay, with all reasons.
fn newest_of_periods(dumps: &BTreeSet<DumpId>, counts: &DumpCounts) -> BTreeMap<DumpId, Vec<DumpReason>> {
    let mut kept: BTreeMap<DumpId, Vec<DumpReason>> = BTreeMap::new();
    // What a dump has to differ in from the newer ones to count as one more.
    type Period = fn(DumpId) -> (i16, i16, i64);
    let periods: [(DumpReason, u32, Period); 5] = [
        (DumpReason::Last, counts.last, |id| (0, 0, id.began().as_second())),
        (DumpReason::Daily, counts.daily, |id| {
            let date = TimeZone::UTC.to_datetime(id.began()).date();
            (date.year(), date.day_of_year(), 0)
        }),
        (DumpReason::Weekly, counts.weekly, |id| {
            let week: ISOWeekDate = TimeZone::UTC.to_datetime(id.began()).date().iso_week_date();
            (week.year(), i16::from(week.week()), 0)
        }),
        (DumpReason::Monthly, counts.monthly, |id| {
            let date = TimeZone::UTC.to_datetime(id.began()).date();
            (date.year(), i16::from(date.month()), 0)
        }),
        (DumpReason::Yearly, counts.yearly, |id| (TimeZone::UTC.to_datetime(id.began()).date().year(), 0, 0)),
    ];
    for (reason, count, period) in periods {
        let mut left = count;
        let mut last = None;
        for id in dumps.iter().rev() {
            if left == 0 {
                break;
            }
            let of = period(*id);
            if last != Some(of) {
                kept.entry(*id).or_default().push(reason);
                last = Some(of);
                left -= 1;
            }
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ids(texts: &[&str]) -> BTreeSet<DumpId> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn the_newest_of_each_of_the_last_periods_that_have_one_stays() {
        let dumps = ids(&[
            "20241231T030000Z",
            "20260928T030000Z",
            "20261101T030000Z",
            "20261115T030000Z",
            "20261116T030000Z",
            "20261119T030000Z",
            "20261121T030000Z",
            "20261121T150000Z",
        ]);
        let kept = newest_of_periods(&dumps, &"daily=3,weekly=2,monthly=2,yearly=2".parse().unwrap());
        let kept: Vec<(String, Vec<DumpReason>)> = kept.into_iter().map(|(id, why)| (id.to_string(), why)).collect();
        use DumpReason::{Daily, Monthly, Weekly, Yearly};
        assert_eq!(
            kept,
            [
                ("20241231T030000Z".to_owned(), vec![Yearly]),
                ("20260928T030000Z".to_owned(), vec![Monthly]),
                ("20261115T030000Z".to_owned(), vec![Weekly]),
                ("20261116T030000Z".to_owned(), vec![Daily]),
                ("20261119T030000Z".to_owned(), vec![Daily]),
                ("20261121T150000Z".to_owned(), vec![Daily, Weekly, Monthly, Yearly]),
            ]
        );
    }

    fn name(text: &str) -> DatabaseName {
        text.parse().unwrap()
    }

    #[test]
    fn neither_one_with_fewer_databases_nor_one_of_a_time_to_come_pushes_another_out() {
        let dump = |id: &str, databases: &[&str]| -> (DumpId, BTreeSet<DatabaseName>) {
            (id.parse().unwrap(), databases.iter().map(|database| name(database)).collect())
        };
        let dumps = BTreeMap::from([
            dump("20261117T030000Z", &["orders", "shop"]),
            dump("20261118T030000Z", &["orders", "shop"]),
            dump("20261119T030000Z", &["shop"]),
            dump("20261120T030000Z", &["shop"]),
            dump("20261120T040000Z", &["shop"]),
            dump("20271120T030000Z", &["orders", "shop"]),
        ]);
        let kept = |counts: &str, now: &str| -> Vec<(String, Vec<DumpReason>)> {
            let kept = kept(&dumps, &counts.parse().unwrap(), now.parse().unwrap());
            kept.into_iter().map(|(id, why)| (id.to_string(), why)).collect()
        };
        let stay = |id: &str, why: DumpReason| (id.to_owned(), vec![why]);
        use DumpReason::{Ahead, Daily, Last};
        let before = "2026-11-21T00:00:00Z";
        let expected =
            [stay("20261118T030000Z", Last), stay("20261120T040000Z", Last), stay("20271120T030000Z", Ahead)];
        assert_eq!(kept("last=1", before), expected);
        let mut daily = expected.map(|(id, why)| (id, if why == [Last] { vec![Daily] } else { why })).to_vec();
        assert_eq!(kept("daily=1", before), daily);
        daily.insert(0, stay("20261117T030000Z", Daily));
        daily.insert(2, stay("20261119T030000Z", Daily));
        assert_eq!(kept("daily=2", before), daily);
        // Once its time has come, it has all that the others have.
        assert_eq!(kept("last=1", "2027-11-21T00:00:00Z"), [stay("20271120T030000Z", Last)]);
    }

    proptest! {
        #[test]
        fn the_newest_always_stays_no_more_than_counted_and_a_second_time_all(
            hours in proptest::collection::btree_set(0..200_000i64, 1..60),
            last in 0..4u32, daily in 0..8u32, weekly in 0..6u32, monthly in 0..14u32, yearly in 1..3u32,
        ) {
            let counts = DumpCounts { last, daily, weekly, monthly, yearly };
            let dumps: BTreeSet<DumpId> = hours
                .into_iter()
                .map(|hour| DumpId::new(Timestamp::from_second(1_500_000_000 + hour * 3600).unwrap()))
                .collect();
            let stay = newest_of_periods(&dumps, &counts);
            prop_assert!(stay.contains_key(dumps.last().unwrap()));
            prop_assert!(stay.len() as u64 <= counts.most());
            let left: BTreeSet<DumpId> = stay.keys().copied().collect();
            prop_assert_eq!(newest_of_periods(&left, &counts), stay.clone());
            // A dump more takes none but older ones away.
            let next = DumpId::new(dumps.last().unwrap().began() + jiff::SignedDuration::from_hours(30));
            let grown: BTreeSet<DumpId> = left.iter().copied().chain([next]).collect();
            prop_assert!(newest_of_periods(&grown, &counts).contains_key(&next));
        }

        #[test]
        fn for_each_that_goes_as_many_newer_ones_with_all_of_its_databases_stay(
            taken in proptest::collection::btree_map(0..3000i64, 1..8u8, 1..60), ahead in 0..500i64,
            last in 1..4u32, daily in 0..8u32, weekly in 0..6u32,
        ) {
            let counts = DumpCounts { last, daily, weekly, monthly: 0, yearly: 0 };
            let at = |hour: i64| Timestamp::from_second(1_500_000_000 + hour * 3600).unwrap();
            let databases = |bits: u8| (0..3).filter(move |bit| bits & (1 << bit) != 0).map(|bit| name(&format!("db{bit}")));
            let dumps: BTreeMap<DumpId, BTreeSet<DatabaseName>> =
                taken.iter().map(|(hour, bits)| (DumpId::new(at(*hour)), databases(*bits).collect())).collect();
            let now = at(3000 - ahead);
            let stay = kept(&dumps, &counts, now);
            for (id, databases) in dumps.iter().filter(|(id, _)| !stay.contains_key(id)) {
                let stands_for = |other: &&DumpId| {
                    **other > *id && other.began() <= now && dumps[other].is_superset(databases)
                };
                prop_assert!(stay.keys().filter(stands_for).count() >= last as usize, "{id}: {stay:?}");
            }
            let is_ahead = |id: &DumpId| id.began() > now;
            prop_assert!(dumps.keys().all(|id| is_ahead(id) == (stay.get(id) == Some(&vec![DumpReason::Ahead]))));
            let left = dumps.into_iter().filter(|(id, _)| stay.contains_key(id)).collect();
            prop_assert_eq!(kept(&left, &counts, now), stay);
        }
    }
}
