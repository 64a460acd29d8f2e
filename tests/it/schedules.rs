//! Work by schedule: done in time and once, made up for, tried again, and only on the primary.

use std::{fs, path::PathBuf, time::Duration};

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::{
    failover::{promote, standby_of},
    support::{
        Look, Postgres, Repository, Scratch, Sidecar, beside, give_to_servers,
        restoring::{archiving_configured, back_up, ship_wal},
        wait_until,
    },
};

const PATIENCE: Duration = Duration::from_secs(60);
/// Longer than the daemon waits before it looks again, where something stands in the way.
const A_WHILE: Duration = Duration::from_secs(24);
/// Checkpoints of backups are spread.
const SOON: &[&str] = &["checkpoint_completion_target = 0.01"];

fn name_of(time: Timestamp) -> String {
    time.strftime("%Y%m%dT%H%M%SZ").to_string()
}

/// An expression that was due half an hour ago, and is due again tomorrow; and that time.
fn half_an_hour_ago() -> (String, Timestamp) {
    let then = Timestamp::now() - SignedDuration::from_mins(30);
    let then = Timestamp::from_second(then.as_second() / 60 * 60).unwrap();
    (then.strftime("%-M %-H * * *").to_string(), then)
}

fn runs(scratch: &Scratch, postgres: &Postgres, task: &str) -> PathBuf {
    let control = fs::read(postgres.data.join("global/pg_control")).unwrap();
    let system = u64::from_le_bytes(control[..8].try_into().unwrap());
    scratch.path().join(format!("repository/main/{system}/runs/{task}"))
}

fn records(scratch: &Scratch, postgres: &Postgres, task: &str) -> Vec<Value> {
    let Ok(entries) = fs::read_dir(runs(scratch, postgres, task)) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| serde_json::from_slice(&fs::read(path).unwrap()).unwrap()).collect()
}

/// A schedule that was seen for the first time three days ago, as the daemon would have noted it.
fn seen_days_ago(scratch: &Scratch, postgres: &Postgres, task: &str, cron: &str) {
    let directory = runs(scratch, postgres, task);
    let system = directory.ancestors().nth(2).unwrap().file_name().unwrap().to_str().unwrap().to_owned();
    fs::create_dir_all(&directory).unwrap();
    directory.ancestors().take(5).for_each(give_to_servers);
    let time = Timestamp::from_second((Timestamp::now() - SignedDuration::from_hours(72)).as_second()).unwrap();
    let record = json!({
        "format": 1, "id": name_of(time), "task": task, "system_identifier": system, "instance": "earlier",
        "schedule": format!("{cron} UTC"), "started_at": time, "ended_at": time, "outcome": "begun",
    });
    fs::write(directory.join(format!("{}.json", name_of(time))), record.to_string()).unwrap();
}

fn task(sidecar: &Sidecar, name: &str) -> Value {
    let schedule = sidecar.json(&["schedule"]);
    let mut tasks = schedule.as_array().unwrap().iter();
    tasks.find(|task| task["task"] == name).unwrap_or_else(|| panic!("no {name} in {schedule}")).clone()
}

fn schedule(sidecar: &mut Sidecar, settings: &[(&str, &str)]) {
    for (task, cron) in settings {
        sidecar.set(&format!("PGSIDECAR_SCHEDULE_{task}"), cron);
    }
    sidecar.set("PGSIDECAR_SCHEDULE_JITTER", "0s");
}

#[test]
fn runs_that_were_missed_are_made_up_for_by_one_and_a_restart_repeats_nothing_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (postgres, mut sidecar) = archiving_configured(&scratch, 15, &["--wal-segsize=1"], &repository, SOON);
    assert!(sidecar.ok(&["schedule"]).starts_with("Nothing is done by schedule"));
    sidecar.stop();
    let (cron, then) = half_an_hour_ago();
    schedule(&mut sidecar, &[("FULL", &cron), ("INCREMENTAL", &cron)]);
    sidecar.start();
    // A schedule that is new makes up for nothing.
    wait_until("the schedules begin", PATIENCE, || {
        ["full", "incremental"].iter().all(|task| records(&scratch, &postgres, task).len() == 1)
    });
    assert_eq!(records(&scratch, &postgres, "full")[0]["outcome"], "begun");
    assert_eq!(task(&sidecar, "full")["last_success"], Value::Null);
    sidecar.stop();
    fs::remove_dir_all(runs(&scratch, &postgres, "full").parent().unwrap()).unwrap();

    for task in ["full", "incremental"] {
        seen_days_ago(&scratch, &postgres, task, &cron);
    }
    sidecar.start();
    wait_until("the runs are made up for", PATIENCE, || {
        ["full", "incremental"].iter().all(|task| records(&scratch, &postgres, task).len() == 2)
    });
    let backups = sidecar.json(&["backup", "list"]);
    assert_eq!(backups.as_array().unwrap().len(), 1, "{backups}");
    let last = task(&sidecar, "full");
    assert_eq!(last["last_success"]["result"], backups[0]["id"]);
    assert_eq!(last["last_success"]["scheduled_for"], json!(then));
    assert_eq!(last["next"], json!(then + SignedDuration::from_hours(24)));
    assert_eq!(records(&scratch, &postgres, "incremental")[1]["outcome"], json!({"served_by": "full"}));
    let ended: Timestamp = last["last_success"]["ended_at"].as_str().unwrap().parse().unwrap();
    let metric = |name: &str| sidecar.metric(&format!("pgsidecar_schedule_{name}{{task=\"full\"}}"));
    assert_eq!(metric("last_success_timestamp_seconds"), ended.as_second().to_string());
    assert_eq!(metric("next_timestamp_seconds"), (then + SignedDuration::from_hours(24)).as_second().to_string());
    assert_eq!(metric("consecutive_failures"), "0");

    sidecar.kill();
    sidecar.start();
    wait_until("the repository was asked", PATIENCE, || task(&sidecar, "full")["last_success"] != Value::Null);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(sidecar.json(&["backup", "list"]), backups);
    assert!(sidecar.log().matches("a scheduled run begins").count() == 1, "{}", sidecar.log());
}

#[test]
fn a_run_begins_in_its_minute_and_what_can_not_be_done_is_told_pg15() {
    let scratch = Scratch::new();
    let (mut postgres, mut sidecar) = beside(&scratch, 15, &["--wal-segsize=1"], &Repository::directory(&scratch));
    postgres.start(&[]);
    let (cron, _) = half_an_hour_ago();
    schedule(
        &mut sidecar,
        &[("VERIFY", "* * * * *"), ("DUMP", &cron), ("PRUNE", &cron), ("TIME_ZONE", "Europe/Berlin")],
    );
    let wrong = [("VERIFY", "* * *"), ("TIME_ZONE", "Middle/Earth")];
    let mut mistaken = Sidecar::another(&scratch, "mistaken", &postgres, &Repository::directory(&scratch));
    schedule(&mut mistaken, &wrong);
    let error = mistaken.fails(78, &["schedule", "--offline"]);
    assert!(
        error.contains("PGSIDECAR_SCHEDULE_VERIFY: ") && error.contains("PGSIDECAR_SCHEDULE_TIME_ZONE: "),
        "{error}"
    );

    let offline = sidecar.json(&["schedule", "--offline"]);
    assert_eq!(offline[1]["task"], "verify");
    sidecar.set("PGSIDECAR_SCHEDULE_TIME_ZONE", "UTC");
    seen_days_ago(&scratch, &postgres, "dump", &cron);
    seen_days_ago(&scratch, &postgres, "prune", &cron);
    sidecar.start();
    // Nobody has said what is to be kept.
    wait_until("the prune is refused", PATIENCE, || task(&sidecar, "prune")["failures"] == 1);
    let status = sidecar.json(&["status"]);
    assert!(status["problems"].to_string().contains("the scheduled prune failed once"), "{status}");
    assert!(sidecar.ok(&["schedule"]).contains("PGSIDECAR_RETENTION_WINDOW"), "{}", sidecar.ok(&["schedule"]));
    wait_until("the dump is made", PATIENCE, || records(&scratch, &postgres, "dump").len() == 2);
    assert_eq!(task(&sidecar, "dump")["last_success"]["result"], sidecar.json(&["dump", "list"])[0]["id"]);
    wait_until("a minute begins", Duration::from_secs(80), || {
        records(&scratch, &postgres, "verify").iter().any(|record| record["outcome"]["succeeded"].is_string())
    });
    let record = records(&scratch, &postgres, "verify").pop().unwrap();
    let time = |field: &str| record[field].as_str().unwrap().parse::<Timestamp>().unwrap();
    let (ended, id) = (time("ended_at"), record["id"].as_str().unwrap());
    let scheduled = Timestamp::from_second(ended.as_second() / 60 * 60).unwrap();
    assert_eq!(id, name_of(scheduled), "{record}");
    assert!(time("started_at").duration_since(scheduled) < SignedDuration::from_secs(5), "{record}");
}

#[test]
fn a_run_that_fails_is_tried_again_until_it_succeeds_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (mut postgres, mut sidecar) = archiving_configured(&scratch, 15, &["--wal-segsize=1"], &repository, SOON);
    sidecar.stop();
    postgres.stop("fast");
    let (cron, then) = half_an_hour_ago();
    schedule(&mut sidecar, &[("FULL", &cron)]);
    seen_days_ago(&scratch, &postgres, "full", &cron);
    sidecar.start();
    wait_until("it fails", PATIENCE, || task(&sidecar, "full")["failures"] == 1);
    let failed = task(&sidecar, "full");
    assert_eq!(failed["last_failure"]["code"], "postgres_unavailable");
    let time = |value: &Value| value.as_str().unwrap().parse::<Timestamp>().unwrap();
    let pause = time(&failed["next"]).duration_since(time(&failed["last_failure"]["at"]));
    assert_eq!(pause, SignedDuration::from_mins(1));
    assert_eq!(sidecar.metric("pgsidecar_schedule_consecutive_failures{task=\"full\"}"), "1");
    assert_eq!(sidecar.metric("pgsidecar_degraded"), "1");

    postgres.start(&[]);
    wait_until("it succeeds", Duration::from_secs(120), || task(&sidecar, "full")["failures"] == 0);
    let done = task(&sidecar, "full");
    assert_eq!(done["last_success"]["scheduled_for"], json!(then));
    assert_eq!(sidecar.json(&["backup", "list"]).as_array().unwrap().len(), 1);
    assert_eq!(sidecar.metric("pgsidecar_schedule_consecutive_failures{task=\"full\"}"), "0");
}

#[test]
fn a_hole_in_the_wal_behind_a_whole_backup_fails_the_verification_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (postgres, mut sidecar) = archiving_configured(&scratch, 15, &["--wal-segsize=1"], &repository, SOON);
    back_up(&sidecar);
    ship_wal(&postgres);
    let lost = ship_wal(&postgres);
    ship_wal(&postgres);
    sidecar.stop();
    let look = Look::into(&repository);
    let (key, _) = look.keys().into_iter().find(|(key, _)| key.as_str().contains(&lost)).unwrap();
    look.remove(&key);
    let (cron, _) = half_an_hour_ago();
    schedule(&mut sidecar, &[("VERIFY", &cron)]);
    seen_days_ago(&scratch, &postgres, "verify", &cron);
    sidecar.start();
    wait_until("it fails", PATIENCE, || task(&sidecar, "verify")["failures"] == 1);
    let failed = task(&sidecar, "verify");
    assert_eq!(failed["last_failure"]["code"], "damaged", "{failed}");
    assert!(failed.to_string().contains("WAL is missing"), "{failed}");
    assert_eq!(sidecar.metric("pgsidecar_schedule_consecutive_failures{task=\"verify\"}"), "1");
    assert_eq!(sidecar.json(&["backup", "verify"])["ok"], true);
}

#[test]
fn a_standby_runs_nothing_and_after_a_failover_not_what_its_primary_has_run_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (mut primary, mut sidecar) = archiving_configured(&scratch, 15, &["--wal-segsize=1"], &repository, SOON);
    let (mut standby, mut beside_standby) = standby_of(&scratch, &primary, &repository);
    beside_standby.stop();
    let (cron, then) = half_an_hour_ago();
    for daemon in [&mut sidecar, &mut beside_standby] {
        schedule(daemon, &[("FULL", &cron), ("VERIFY", &cron)]);
    }
    for task in ["full", "verify"] {
        seen_days_ago(&scratch, &primary, task, &cron);
    }
    beside_standby.start();
    wait_until("the standby waits", PATIENCE, || {
        task(&beside_standby, "full")["waiting"].as_str().is_some_and(|why| why.contains("in recovery"))
    });
    assert_eq!(beside_standby.metric("pgsidecar_schedule_consecutive_failures{task=\"full\"}"), "0");
    sidecar.stop();
    sidecar.start();
    wait_until("the primary runs them", PATIENCE, || task(&sidecar, "verify")["last_success"] != Value::Null);
    let backups = sidecar.json(&["backup", "list"]);
    assert_eq!(backups.as_array().unwrap().len(), 1, "{backups}");
    primary.stop("immediate");
    sidecar.kill();
    promote(&mut standby);
    std::thread::sleep(A_WHILE);
    let known = task(&beside_standby, "full");
    assert_eq!(known["last_success"]["result"], backups[0]["id"], "{known}");
    assert_eq!(known["next"], json!(then + SignedDuration::from_hours(24)), "{known}");
    assert_eq!(beside_standby.json(&["backup", "list"]), backups);
    assert!(!beside_standby.log().contains("a scheduled run begins"), "{}", beside_standby.log());
}
