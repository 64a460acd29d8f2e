//! Which dumps stay.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{civil::ISOWeekDate, tz::TimeZone};
use serde::Serialize;

use super::policy::DumpCounts;
use crate::DumpId;

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
}

/// The complete dumps that stay, with all reasons.
pub(super) fn kept(dumps: &BTreeSet<DumpId>, counts: &DumpCounts) -> BTreeMap<DumpId, Vec<DumpReason>> {
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
        let kept = kept(&dumps, &"daily=3,weekly=2,monthly=2,yearly=2".parse().unwrap());
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

    proptest! {
        #[test]
        fn the_newest_always_stays_no_more_than_counted_and_a_second_time_all(
            hours in proptest::collection::btree_set(0..200_000i64, 1..60),
            last in 0..4u32, daily in 0..8u32, weekly in 0..6u32, monthly in 0..14u32, yearly in 1..3u32,
        ) {
            let counts = DumpCounts { last, daily, weekly, monthly, yearly };
            let dumps: BTreeSet<DumpId> = hours
                .into_iter()
                .map(|hour| DumpId::new(jiff::Timestamp::from_second(1_500_000_000 + hour * 3600).unwrap()))
                .collect();
            let stay = kept(&dumps, &counts);
            prop_assert!(stay.contains_key(dumps.last().unwrap()));
            prop_assert!(stay.len() as u64 <= counts.most());
            let left: BTreeSet<DumpId> = stay.keys().copied().collect();
            prop_assert_eq!(kept(&left, &counts), stay.clone());
            // A dump more takes none but older ones away.
            let next = DumpId::new(dumps.last().unwrap().began() + jiff::SignedDuration::from_hours(30));
            let grown: BTreeSet<DumpId> = left.iter().copied().chain([next]).collect();
            prop_assert!(kept(&grown, &counts).contains_key(&next));
        }
    }
}
