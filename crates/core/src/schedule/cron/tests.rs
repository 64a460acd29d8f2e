use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const ZONES: [&str; 8] = [
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "Australia/Lord_Howe",
    "Asia/Kathmandu",
    "Pacific/Apia",
    "America/Santiago",
    "Africa/Casablanca",
];

fn zone(name: &str) -> TimeZone {
    TimeZone::get(name).unwrap()
}

fn cron(text: &str) -> CronExpression {
    text.parse().unwrap()
}

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

/// What is due from there on, as the zone's clock shows it.
fn due(text: &str, name: &str, from: &str, count: usize) -> Vec<String> {
    let (cron, zone) = (cron(text), zone(name));
    let next = |after: Timestamp| cron.next_after(after, &zone);
    let moments = std::iter::successors(next(at(from)), |last| next(*last)).take(count);
    moments.map(|moment| moment.to_zoned(zone.clone()).strftime("%m-%d %H:%M %:z").to_string()).collect()
}

#[test]
fn what_is_no_expression_is_told_with_what_would_be() {
    let errors: Vec<String> = [
        "",
        "* * * *",
        "0 0 0 * * *",
        "60 * * * *",
        "0 24 * * *",
        "0 0 0 * *",
        "0 0 1 13 *",
        "0 0 * * 8",
        "5/15 * * * *",
        "*/0 * * * *",
        "0 22-2 * * *",
        "0 0 * * fri-mon",
        "0,, * * * *",
        "+5 * * * *",
        "0 0 L * *",
        "@reboot",
        "0 0 30 2 *",
        "0 0 31 4,6,9,11 *",
    ]
    .map(|text| text.parse::<CronExpression>().unwrap_err().to_string())
    .to_vec();
    insta::assert_snapshot!(errors.join("\n"));
}

#[test]
fn fields_are_lists_ranges_steps_and_names() {
    let same = |one: &str, other: &str| {
        let (one, other) = (cron(one), cron(other));
        assert_eq!(
            CronExpression { text: String::new(), both_days: true, ..one },
            CronExpression { text: String::new(), both_days: true, ..other }
        );
    };
    same("*/15 0 * * *", "0,15,30,45 0 * * *");
    same("10-20/5,59 0 * * *", "10,15,20,59 0 * * *");
    same("0 0 * JAN-Mar mon-fri", "0 0 1-31 1,2,3 1-5");
    same("0 0 * * 7", "0 0 * * sun");
    same("0 0 * * 5-7", "0 0 * * 0,5,6");
    same(" 0\t0  1 * * ", "@monthly");
    assert_eq!(cron("@Daily").to_string(), "0 0 * * *");
    assert!("0 0 29 2 *".parse::<CronExpression>().is_ok());
    assert!("0 0 30 2 1".parse::<CronExpression>().is_ok(), "on Mondays in February");
}

#[test]
fn a_day_fits_one_of_two_restricted_fields_and_both_otherwise() {
    assert_eq!(
        due("0 2 1 * mon", "UTC", "2026-11-21T00:00:00Z", 4),
        ["11-23 02:00 +00:00", "11-30 02:00 +00:00", "12-01 02:00 +00:00", "12-07 02:00 +00:00"]
    );
    assert_eq!(due("0 2 */2 * mon", "UTC", "2026-11-21T00:00:00Z", 2), ["11-23 02:00 +00:00", "12-07 02:00 +00:00"]);
    let leap = cron("0 0 29 2 */7").next_after(at("2088-03-01T00:00:00Z"), &TimeZone::UTC);
    assert_eq!(leap, Some(at("2128-02-29T00:00:00Z")), "the next February 29 that is a Sunday");
}

#[test]
fn a_time_that_does_not_exist_is_due_once_when_the_clock_was_put_forward() {
    let spring = "2026-03-28T12:00:00Z";
    assert_eq!(due("30 2 * * *", "Europe/Berlin", spring, 2), ["03-29 03:00 +02:00", "03-30 02:30 +02:00"]);
    assert_eq!(
        due("10,20 2,3 * * *", "Europe/Berlin", spring, 4),
        ["03-29 03:00 +02:00", "03-29 03:10 +02:00", "03-29 03:20 +02:00", "03-30 02:10 +02:00"]
    );
    assert_eq!(
        due("0 */2 * * *", "Europe/Berlin", "2026-03-28T23:30:00Z", 2),
        ["03-29 03:00 +02:00", "03-29 04:00 +02:00"]
    );
    assert_eq!(
        due("15 2 * * *", "Australia/Lord_Howe", "2026-10-03T12:00:00Z", 2),
        ["10-04 02:30 +11:00", "10-05 02:15 +11:00"]
    );
    assert_eq!(
        due("0 0 * * *", "America/Santiago", "2026-09-05T12:00:00Z", 2),
        ["09-06 01:00 -03:00", "09-07 00:00 -03:00"],
        "midnight"
    );
    // December 30, 2011 wasn't, in Samoa.
    assert_eq!(
        due("0 2 * * *", "Pacific/Apia", "2011-12-29T00:00:00Z", 4),
        ["12-29 02:00 -10:00", "12-31 00:00 +14:00", "12-31 02:00 +14:00", "01-01 02:00 +14:00"]
    );
}

#[test]
fn a_time_that_comes_twice_is_due_the_first_time() {
    assert_eq!(
        due("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00:00Z", 2),
        ["10-25 02:30 +02:00", "10-26 02:30 +01:00"]
    );
    assert_eq!(
        due("30 2 * * *", "Europe/Berlin", "2026-10-25T01:10:00Z", 1),
        ["10-26 02:30 +01:00"],
        "asked between the two"
    );
    assert_eq!(
        due("45 1 * * *", "Australia/Lord_Howe", "2026-04-04T12:00:00Z", 2),
        ["04-05 01:45 +11:00", "04-06 01:45 +10:30"]
    );
}

#[test]
fn what_is_due_every_hour_goes_by_the_clock_that_is_shown() {
    assert_eq!(
        due("*/30 * * * *", "Europe/Berlin", "2026-03-29T00:10:00Z", 3),
        ["03-29 01:30 +01:00", "03-29 03:00 +02:00", "03-29 03:30 +02:00"]
    );
    assert_eq!(
        due("30 * * * *", "Europe/Berlin", "2026-10-24T23:40:00Z", 3),
        ["10-25 02:30 +02:00", "10-25 02:30 +01:00", "10-25 03:30 +01:00"]
    );
    assert_eq!(
        due("*/20 * * * *", "Australia/Lord_Howe", "2026-04-04T14:30:00Z", 4),
        ["04-05 01:40 +11:00", "04-05 01:40 +10:30", "04-05 02:00 +10:30", "04-05 02:20 +10:30"]
    );
    assert_eq!(
        due("0 * * * *", "Pacific/Apia", "2011-12-30T08:30:00Z", 3),
        ["12-29 23:00 -10:00", "12-31 00:00 +14:00", "12-31 01:00 +14:00"]
    );
}

/// Every minute, tried: what next_after has to find, told from the rules alone.
fn by_trying(cron: &CronExpression, zone: &TimeZone, from: Timestamp, until: Timestamp) -> Vec<Timestamp> {
    let every_hour = cron.hours.0 == HOURS_OF_A_DAY;
    let minute = SignedDuration::from_mins(1);
    let mut found = Vec::new();
    // Each time of the calendar, and the first moment at which the clock shows it or a later one.
    let mut shown: BTreeMap<DateTime, Timestamp> = BTreeMap::new();
    let mut now = from - SignedDuration::from_hours(30);
    let mut latest: Option<DateTime> = None;
    while now <= until {
        let clock = zone.to_datetime(now);
        if every_hour {
            if now > from && cron.fits(clock) {
                found.push(now);
            }
        } else {
            let mut time = latest.map_or(clock, |latest| latest.checked_add(1.minute()).unwrap());
            while time <= clock {
                shown.insert(time, now);
                time = time.checked_add(1.minute()).unwrap();
            }
            latest = latest.max(Some(clock));
        }
        now += minute;
    }
    if !every_hour {
        let moments = shown.iter().filter(|(time, moment)| **moment > from && cron.fits(**time));
        found = moments.map(|(_, moment)| *moment).collect();
        found.dedup();
    }
    found
}

#[test]
fn around_each_change_of_the_clocks_of_a_year_it_finds_what_trying_every_minute_finds() {
    for name in ZONES {
        let zone = zone(name);
        let year = if name == "Pacific/Apia" { 2011 } else { 2026 };
        let (begin, end) = (at(&format!("{year}-01-01T00:00:00Z")), at(&format!("{}-01-02T00:00:00Z", year + 1)));
        let changes = zone.following(begin).map(|change| change.timestamp()).take_while(|change| *change < end);
        for change in changes.chain([begin]) {
            let (from, until) = (change - SignedDuration::from_hours(50), change + SignedDuration::from_hours(50));
            for text in ["30 2 * * *", "*/20 * * * *", "0 */2 * * *", "10,50 0-3 * * sun", "0 0 1,15 * mon"] {
                let cron = cron(text);
                let next = |after: Timestamp| cron.next_after(after, &zone).filter(|next| *next <= until);
                let found: Vec<Timestamp> = std::iter::successors(next(from), |last| next(*last)).collect();
                assert_eq!(found, by_trying(&cron, &zone, from, until), "{text} in {name}");
            }
        }
    }
}

#[test]
fn in_a_year_every_day_and_every_hour_has_its_run() {
    for (name, days, hours) in [
        ("UTC", 365, 8760),
        ("Europe/Berlin", 365, 8760),
        ("America/New_York", 365, 8760),
        // Half an hour is put back, and the one that comes twice has this minute; the one that is left out has not.
        ("Australia/Lord_Howe", 365, 8761),
        ("Asia/Kathmandu", 365, 8760),
    ] {
        let zone = zone(name);
        let (begin, end) = (
            zone.to_timestamp(date(2026, 1, 1).at(0, 0, 0, 0)).unwrap() - SignedDuration::from_secs(1),
            zone.to_timestamp(date(2027, 1, 1).at(0, 0, 0, 0)).unwrap(),
        );
        let count = |text: &str| {
            let cron = cron(text);
            let next = |after: Timestamp| cron.next_after(after, &zone).filter(|next| *next < end);
            std::iter::successors(next(begin), |last| next(*last)).count()
        };
        assert_eq!((count("15 2 * * *"), count("45 * * * *")), (days, hours), "{name}");
    }
}

fn expressions() -> impl Strategy<Value = String> {
    let minute = prop_oneof!["[0-5]?[0-9]", Just("*/15".to_owned()), Just("*".to_owned())];
    let hour = prop_oneof![Just("*".to_owned()), "1?[0-9]", "2[0-3]", Just("*/3".to_owned()), Just("1-4".to_owned())];
    let day = prop_oneof![Just("*".to_owned()), "1?[1-9]", Just("29".to_owned())];
    let month = prop_oneof![Just("*".to_owned()), "[1-9]", Just("3,10".to_owned())];
    let weekday = prop_oneof![Just("*".to_owned()), "[0-7]", Just("mon-fri".to_owned())];
    (minute, hour, day, month, weekday).prop_map(|(a, b, c, d, e)| format!("{a} {b} {c} {d} {e}"))
}

proptest! {
    #[test]
    fn the_next_is_later_and_the_last_before_it_is_never_later_than_asked(
        text in expressions(), which in 0..ZONES.len(), second in 1_262_304_000_i64..1_893_456_000,
    ) {
        let (cron, zone) = (cron(&text), zone(ZONES[which]));
        let now = Timestamp::from_second(second).unwrap();
        let next = cron.next_after(now, &zone).unwrap();
        prop_assert!(next > now);
        prop_assert_eq!(cron.next_after(next - SignedDuration::from_secs(1), &zone), Some(next));
        prop_assert_eq!(cron.last_within(now, next, &zone), Some(next));
        prop_assert_eq!(cron.last_within(now, next - SignedDuration::from_secs(1), &zone), None);
        let long_ago = now - SignedDuration::from_hours(24 * 1500);
        if let Some(last) = cron.last_within(long_ago, now, &zone) {
            prop_assert!(last > long_ago && last <= now);
            prop_assert_eq!(cron.next_after(last, &zone), Some(next), "nothing between the last and the next");
        }
    }

    #[test]
    fn no_text_makes_it_panic(text in "\\PC{0,40}") {
        let _ = text.parse::<CronExpression>();
    }
}
