use std::collections::BTreeMap;

use proptest::{collection::vec, prelude::*};

use super::*;

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn schedule(cron: &str, zone: &str, jitter_minutes: u64) -> Schedule {
    let jitter = Duration::from_secs(60 * jitter_minutes);
    Schedule::new(cron.parse().unwrap(), TimeZone::get(zone).unwrap(), jitter, "shop/orders")
}

fn since(from: &str) -> TaskState {
    TaskState { counts_from: Some(at(from)), failed: None }
}

fn punctual(time: &str) -> Slot {
    Slot { time: at(time), begins: at(time) }
}

#[test]
fn a_schedule_counts_from_when_it_is_first_seen() {
    let nightly = schedule("0 2 * * *", "UTC", 0);
    let now = at("2026-11-21T12:00:00Z");
    assert_eq!(nightly.decide(now, &TaskState::default()), Decision::Begin);
    let next = punctual("2026-11-22T02:00:00Z");
    assert_eq!(nightly.decide(now, &since("2026-11-21T12:00:00Z")), Decision::Wait(next));
    let due = Decision::Run { slot: next, catch_up: false };
    assert_eq!(nightly.decide(at("2026-11-22T02:00:00Z"), &since("2026-11-21T12:00:00Z")), due);
    assert_eq!(nightly.decide(at("2026-11-22T02:05:00Z"), &since("2026-11-21T12:00:00Z")), due);
}

#[test]
fn however_many_were_missed_the_last_one_makes_up_for_all() {
    let nightly = schedule("0 2 * * *", "UTC", 0);
    let now = at("2026-11-21T12:00:00Z");
    let slot = punctual("2026-11-21T02:00:00Z");
    assert_eq!(nightly.decide(now, &since("2026-11-07T02:00:00Z")), Decision::Run { slot, catch_up: true });
    let next = punctual("2026-11-22T02:00:00Z");
    assert_eq!(nightly.decide(now, &since("2026-11-21T02:00:00Z")), Decision::Wait(next));
}

#[test]
fn what_failed_is_tried_again_ever_more_rarely_until_the_next_run_takes_over() {
    let nightly = schedule("0 2 * * *", "UTC", 0);
    let slot = punctual("2026-11-21T02:00:00Z");
    let failed_at = at("2026-11-21T02:30:00Z");
    let decide = |times, now: &str| {
        let failed = Some(Failed { times, at: failed_at, slot: slot.time });
        nightly.decide(at(now), &TaskState { failed, ..since("2026-11-20T02:00:00Z") })
    };
    for (times, minutes) in [(1, 1), (2, 2), (3, 4), (6, 32), (7, 60), (8, 60), (4000, 60)] {
        let retry_at = failed_at + SignedDuration::from_mins(minutes);
        assert_eq!(decide(times, "2026-11-21T02:30:59Z"), Decision::Retry { slot, at: retry_at }, "{times}");
    }
    assert_eq!(decide(1, "2026-11-21T02:31:00Z"), Decision::Run { slot, catch_up: true });
    let tomorrow = punctual("2026-11-22T02:00:00Z");
    assert_eq!(decide(4000, "2026-11-22T02:00:00Z"), Decision::Run { slot: tomorrow, catch_up: true });
    // The clock is set back after the failure.
    let retry_at = at("2026-11-21T02:06:00Z");
    assert_eq!(decide(1, "2026-11-21T02:05:00Z"), Decision::Retry { slot, at: retry_at });
}

#[test]
fn a_clock_that_is_set_back_runs_nothing_twice_and_one_that_was_far_ahead_stops_nothing() {
    let nightly = schedule("0 2 * * *", "UTC", 0);
    let next = punctual("2026-11-23T02:00:00Z");
    assert_eq!(nightly.decide(at("2026-11-21T23:00:00Z"), &since("2026-11-22T02:00:00Z")), Decision::Wait(next));
    assert_eq!(nightly.decide(at("2026-11-21T23:00:00Z"), &since("2027-11-22T02:00:00Z")), Decision::Begin);
}

#[test]
fn jitter_stays_where_it_is_and_ends_before_the_next_run() {
    let hour = schedule("0 * * * *", "UTC", 20);
    let slots: Vec<Slot> = hour.after(at("2026-11-21T00:00:00Z")).take(100).collect();
    assert_eq!(slots, hour.after(at("2026-11-21T00:00:00Z")).take(100).collect::<Vec<_>>());
    let delays: Vec<i64> = slots.iter().map(|slot| slot.begins.as_second() - slot.time.as_second()).collect();
    assert!(delays.iter().all(|delay| (0..=1200).contains(delay)), "{delays:?}");
    assert!(delays.iter().min() < Some(&200) && delays.iter().max() > Some(&1000), "{delays:?}");
    // The other tasks of the cluster that are due then, and another cluster.
    let day = schedule("0 2 * * *", "Europe/Berlin", 20);
    let full = day.after(at("2026-11-21T00:00:00Z")).next().unwrap();
    assert!(slots.contains(&full), "{full:?}");
    let other = Schedule { seed: "shop/customers".into(), ..hour.clone() };
    assert_ne!(other.after(at("2026-11-21T00:00:00Z")).take(100).collect::<Vec<_>>(), slots);
    let often = schedule("* * * * *", "UTC", 60);
    assert!(
        often
            .after(at("2026-11-21T00:00:00Z"))
            .take(100)
            .all(|slot| slot.begins.as_second() - slot.time.as_second() <= 30)
    );
}

#[test]
fn a_full_backup_serves_for_the_lesser_ones_and_for_nothing_else() {
    let serves = |task: Task| Task::ALL.into_iter().filter(|other| task.serves(*other)).collect::<Vec<_>>();
    assert_eq!(serves(Task::Full), [Task::Full, Task::Differential, Task::Incremental]);
    assert_eq!(serves(Task::Differential), [Task::Differential, Task::Incremental]);
    for task in [Task::Incremental, Task::Dump, Task::Verify, Task::Prune] {
        assert_eq!(serves(task), [task]);
        assert_eq!(task.to_string().parse(), Ok(task));
    }
}

/// What happens to a daemon in a year: when it's down, when its runs fail, and how long one takes.
#[derive(Clone, Debug)]
struct Year {
    /// Minutes from the beginning, and how many it lasts.
    outages: Vec<(i64, i64)>,
    failing: Vec<(i64, i64)>,
    restarts: Vec<i64>,
    run_minutes: i64,
    /// Minutes at which the clock is set back, and by how many.
    set_back: Vec<(i64, i64)>,
}

const MINUTES: i64 = 366 * 24 * 60;

fn years() -> impl Strategy<Value = Year> {
    let span = |longest: i64| (0..MINUTES, 1..longest);
    (
        vec(span(20 * 24 * 60), 0..4),
        vec(span(5 * 24 * 60), 0..4),
        vec(0..MINUTES, 0..20),
        prop_oneof![0..30_i64, 0..180_i64],
        prop_oneof![2 => Just(Vec::new()), 1 => vec(span(120), 1..3)],
    )
        .prop_map(|(outages, failing, restarts, run_minutes, set_back)| Year {
            outages,
            failing,
            restarts,
            run_minutes,
            set_back,
        })
}

/// A run as the simulated daemon did it.
#[derive(Debug)]
struct Done {
    slot: Slot,
    /// In true time, whatever the clock showed.
    began: Timestamp,
    catch_up: bool,
    ok: bool,
}

/// Lets a daemon live through the year, to the minute, and answers with its runs.
fn live(schedule: &Schedule, begin: Timestamp, year: &Year) -> Vec<Done> {
    let within =
        |spans: &[(i64, i64)], minute: i64| spans.iter().any(|(from, long)| (*from..from + long).contains(&minute));
    let spans = year.outages.iter().chain(&year.failing).flat_map(|(from, long)| [*from, from + long]);
    let others = year.restarts.iter().copied().chain(year.set_back.iter().map(|(from, _)| *from));
    let events: Vec<i64> = spans.chain(others).collect();
    let (mut state, mut done, mut minute) = (TaskState::default(), Vec::new(), 0);
    while minute < MINUTES {
        let truly = begin + SignedDuration::from_mins(minute);
        let behind: i64 = year.set_back.iter().filter(|(from, _)| *from <= minute).map(|(_, by)| by).sum();
        let now = truly - SignedDuration::from_mins(behind);
        if year.restarts.contains(&minute) || within(&year.outages, minute) {
            // What is in memory is lost; what is in the repository isn't.
            state.failed = None;
        }
        if !within(&year.outages, minute) {
            match schedule.decide(now, &state) {
                Decision::Begin => state.counts_from = Some(now),
                Decision::Run { slot, catch_up } => {
                    let ok = !within(&year.failing, minute);
                    done.push(Done { slot, began: truly, catch_up, ok });
                    if ok {
                        state = TaskState { counts_from: Some(slot.time), failed: None };
                        minute += year.run_minutes;
                    } else {
                        let times = state.failed.map_or(1, |failed| failed.times + 1);
                        state.failed = Some(Failed { times, at: now, slot: slot.time });
                    }
                }
                Decision::Wait(Slot { begins: next, .. }) | Decision::Retry { at: next, .. } => {
                    assert!(next > now, "{next} at {now}");
                    // Meanwhile nothing changes, unless the world does.
                    let waited = minute + next.duration_since(now).as_secs() / 60;
                    let changes = events.iter().copied().filter(|event| *event > minute);
                    minute = changes.chain([waited]).min().unwrap().max(minute + 1) - 1;
                }
                Decision::Never => panic!("it's due every year"),
            }
        }
        minute += 1;
    }
    done
}

const SCHEDULES: [(&str, &str); 8] = [
    ("30 2 * * *", "Europe/Berlin"),
    ("30 1 * * *", "America/New_York"),
    ("15 2 * * 0", "Australia/Lord_Howe"),
    ("0 */6 * * *", "Asia/Kathmandu"),
    ("0 0 * * *", "America/Santiago"),
    ("15 * * * *", "Europe/Berlin"),
    ("0 2 1 * *", "UTC"),
    ("0 2 * * *", "Pacific/Apia"),
];

fn begin_of_year(zone: &str) -> Timestamp {
    at(if zone == "Pacific/Apia" { "2011-01-10T00:00:00Z" } else { "2026-01-10T00:00:00Z" })
}

#[test]
fn in_a_year_without_trouble_each_run_happens_once_and_within_its_jitter() {
    for (cron, zone) in SCHEDULES {
        let schedule = schedule(cron, zone, 5);
        let begin = begin_of_year(zone);
        let none = Year { outages: vec![], failing: vec![], restarts: vec![], run_minutes: 0, set_back: vec![] };
        let done = live(&schedule, begin, &none);
        let end = begin + SignedDuration::from_mins(MINUTES - 6);
        let expected: Vec<Slot> = schedule.after(begin).take_while(|slot| slot.time < end).collect();
        assert_eq!(done.iter().map(|done| done.slot).collect::<Vec<_>>()[..expected.len()], expected, "{cron} {zone}");
        for run in &done {
            let late = run.began.duration_since(run.slot.begins);
            assert!((SignedDuration::ZERO..SignedDuration::from_mins(1)).contains(&late), "{run:?}");
            assert!(!run.catch_up && run.ok, "{run:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn whatever_a_year_brings_nothing_is_served_twice_and_nothing_missed_for_good(which in 0..SCHEDULES.len(), year in years()) {
        let (cron, zone) = SCHEDULES[which];
        let schedule = schedule(cron, zone, 5);
        let begin = begin_of_year(zone);
        let done = live(&schedule, begin, &year);
        let mut served: BTreeMap<Timestamp, &Done> = BTreeMap::new();
        for run in done.iter().filter(|run| run.ok) {
            prop_assert!(served.insert(run.slot.time, run).is_none(), "twice: {:?}", run);
        }
        // In the order of their times, also where the clock was set back: none is gone back to.
        prop_assert!(done.iter().filter(|run| run.ok).map(|run| run.slot.time).is_sorted());

        // Without an outage or a failure at hand, each run is served in time.
        let calm = |minute: i64| {
            let near = |spans: &[(i64, i64)]| spans.iter().any(|(from, long)| (from - 400..from + long + 400).contains(&minute));
            !near(&year.outages) && !near(&year.failing) && year.set_back.is_empty() && year.run_minutes < 30
        };
        let end = begin + SignedDuration::from_mins(MINUTES - 200);
        for slot in schedule.after(begin).take_while(|slot| slot.time < end) {
            if calm((slot.time.as_second() - begin.as_second()) / 60) {
                let run = served.get(&slot.time);
                prop_assert!(run.is_some_and(|run| run.began.duration_since(slot.begins) < SignedDuration::from_mins(1)), "{:?}: {:?}", slot, run);
            }
        }
    }

    #[test]
    fn of_the_runs_that_fell_into_an_outage_exactly_the_last_is_made_up_for(
        which in 0..SCHEDULES.len(), from in 1..MINUTES - 40 * 24 * 60, long in 1..40 * 24 * 60_i64,
    ) {
        let (cron, zone) = SCHEDULES[which];
        let schedule = schedule(cron, zone, 5);
        let begin = begin_of_year(zone);
        let year = Year {
            outages: vec![(from, long)], failing: vec![], restarts: vec![], run_minutes: 0, set_back: vec![],
        };
        let done = live(&schedule, begin, &year);
        let minute = |minute: i64| begin + SignedDuration::from_mins(minute);
        // To the minute before it, the daemon was up.
        let (last_up, until) = (minute(from - 1), minute(from + long));
        let missed: Vec<Slot> =
            schedule.after(begin).skip_while(|slot| slot.begins <= last_up).take_while(|slot| slot.begins <= until).collect();
        let made_up: Vec<Slot> =
            done.iter().map(|run| run.slot).filter(|slot| slot.begins > last_up && slot.begins <= until).collect();
        // The last gives way to one whose time has come, and whose jitter hasn't passed.
        let gives_way = schedule.after(begin).find(|slot| slot.begins > until).is_some_and(|next| next.time <= until);
        let expected: Vec<Slot> = missed.last().copied().into_iter().filter(|_| !gives_way).collect();
        prop_assert_eq!(made_up, expected);
        prop_assert!(done.iter().all(|run| !run.catch_up || run.began == until || gives_way), "{:?}", done);
    }

    #[test]
    fn no_clock_and_no_state_makes_it_wait_for_what_is_over(
        which in 0..SCHEDULES.len(), now in 1_294_617_600_i64..1_893_456_000, ago in -90_000..50_000_000_i64,
        failed in prop::option::of((1..50_u32, -90_000..90_000_i64)),
    ) {
        let (cron, zone) = SCHEDULES[which];
        let schedule = schedule(cron, zone, 5);
        let second = |second: i64| Timestamp::from_second(second).unwrap();
        let from = second(now - ago);
        let now_at = second(now);
        let failed = failed.map(|(times, before)| Failed { times, at: second(now - before), slot: second(now - before) });
        match schedule.decide(now_at, &TaskState { counts_from: Some(from), failed }) {
            Decision::Begin => prop_assert!(-ago > 24 * 3600),
            Decision::Wait(slot) => prop_assert!(slot.begins > now_at && slot.time > from),
            Decision::Run { slot, .. } => prop_assert!(slot.time > from && slot.begins <= now_at),
            Decision::Retry { slot, at } => prop_assert!(slot.time > from && at > now_at && at <= now_at + LONGEST_RETRY),
            Decision::Never => prop_assert!(false),
        }
    }
}
