//! Snapshots by the storage: a copy of the data directory that was taken while PostgreSQL wrote, between begin and end,
//! stands for the storage's.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::Duration,
};

use crate::support::{
    Postgres, Repository, Scratch, Sidecar, command,
    restoring::{AS_A_COPY, archiving_configured, back_up, ship_wal, text},
    run, told, wait_until,
};

const PATIENCE: Duration = Duration::from_secs(60);

/// Copies a directory as it is at this moment, whoever writes to it. Files may vanish meanwhile.
fn copy(from: &Path, to: &Path) {
    let copied = command("cp").args(["-a", "--reflink=auto"]).arg(from).arg(to).output().unwrap();
    let said = String::from_utf8_lossy(&copied.stderr);
    assert!(said.lines().all(|line| line.contains("No such file or directory")), "{}", told(&copied));
    assert!(to.join("PG_VERSION").exists() || !from.join("PG_VERSION").exists());
}

fn begin(sidecar: &Sidecar) -> String {
    sidecar.json(&["snapshot", "begin", "--fast"])["id"].as_str().unwrap().to_owned()
}

/// A snapshot of a server at rest, as a directory of this name.
fn snapshot(scratch: &Scratch, postgres: &Postgres, sidecar: &Sidecar, name: &str) -> (String, PathBuf) {
    let id = begin(sidecar);
    let to = scratch.path().join(name);
    copy(&postgres.data, &to);
    sidecar.ok(&["snapshot", "end", &id]);
    (id, to)
}

fn complete(sidecar: &Sidecar) -> Vec<String> {
    let list = sidecar.json(&["snapshot", "list"]);
    let ids = list["complete"].as_array().unwrap().iter().map(|record| record["id"].as_str().unwrap().to_owned());
    ids.collect()
}

/// The sessions in which a backup or snapshot was begun.
fn backup_sessions(postgres: &Postgres) -> String {
    postgres.sql("SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_backup%' AND pid <> pg_backend_pid()")
}

#[track_caller]
fn unusable(sidecar: &Sidecar, id: &str, why: &str) {
    let said = sidecar.cli(&["snapshot", "end", id]);
    let text = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(!said.status.success(), "{}", told(&said));
    assert!(text.contains(&format!("snapshot {id} must not be used")) && text.contains(why), "{text}");
    assert!(text.contains("HINT: ") && text.contains("begin again"), "{text}");
    assert_eq!(complete(sidecar), [""; 0]);
}

fn entries(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn pgbench(postgres: &Postgres) -> Child {
    let mut pgbench = postgres.client("pgbench");
    pgbench.args(["-n", "-c", "2", "-T", "600"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    pgbench.spawn().unwrap()
}

const SUMS: &str = "SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers), \
    (SELECT sum(bbalance) FROM pgbench_branches), (SELECT coalesce(sum(delta), 0) FROM pgbench_history)";
const ROWS: &str = "SELECT string_agg(n::text, ' ' ORDER BY n) FROM rows";

fn a_snapshot_under_load_restores(major: u32) {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let lines = ["checkpoint_timeout = 30s", "max_wal_size = 32MB", "min_wal_size = 4MB"];
    let (mut postgres, sidecar) = archiving_configured(&scratch, major, &["--wal-segsize=1"], &repository, &lines);
    let space = scratch.dir("space");
    postgres.sql(&format!("CREATE TABLESPACE space LOCATION '{}'", text(&space)));
    postgres.sql("ALTER SYSTEM SET work_mem = '5MB'");
    postgres.sql("SELECT pg_create_physical_replication_slot('held', true)");
    run(postgres.client("pgbench").args(["-i", "-q", "-s", "2", "--tablespace=space"]));
    postgres.sql("CREATE TABLE rows AS SELECT 1 AS n");
    let mut load = pgbench(&postgres);
    wait_until("pgbench writes", PATIENCE, || postgres.sql("SELECT count(*) > 100 FROM pgbench_history") == "t");
    let id = begin(&sidecar);
    let (cold, cold_space) = (scratch.path().join("cold"), scratch.path().join("cold-space"));
    copy(&postgres.data, &cold);
    postgres.sql("CHECKPOINT");
    copy(&space, &cold_space);
    let record = sidecar.json(&["snapshot", "end", &id]);
    assert_eq!(complete(&sidecar), [id.as_str()]);
    assert_eq!(record["tablespaces"][0]["location"], text(&space));
    assert!(cold.join("postmaster.pid").exists() && entries(&cold.join("pg_wal")).len() > 2);
    postgres.sql("INSERT INTO rows VALUES (2)");
    let between = postgres.now();
    postgres.sql("INSERT INTO rows VALUES (3)");
    load.kill().unwrap();
    load.wait().unwrap();
    wait_until("pgbench's sessions have ended", PATIENCE, || {
        postgres.sql("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgbench'") == "0"
    });
    ship_wal(&postgres);

    // A clone beside the living server, to the end of the archive.
    let (clone, clone_space) = (scratch.path().join("clone"), scratch.path().join("clone-space"));
    copy(&cold, &clone);
    copy(&cold_space, &clone_space);
    let mapping = format!("{}={}", text(&space), text(&clone_space));
    let arguments = ["restore", "run", "--from-snapshot", &id, "--to", text(&clone)];
    let said = sidecar.fails(73, &arguments);
    assert!(said.contains("of the living server") && said.contains("--tablespace-mapping"), "{said}");
    assert!(clone.join("postmaster.pid").exists());
    let plan = sidecar.json(&["restore", "plan", "--from-snapshot", &id]);
    assert_eq!((&plan["snapshot"]["id"], &plan["gap"]), (&serde_json::json!(id), &serde_json::Value::Null));
    sidecar.ok(&[&arguments[..], &["--tablespace-mapping", &mapping]].concat());
    let wal: &[&str] = if major >= 17 { &["archive_status", "summaries"] } else { &["archive_status"] };
    assert_eq!(entries(&clone.join("pg_wal")), wal);
    assert_eq!(entries(&clone.join("pg_replslot")), [""; 0]);
    assert!(clone.join("recovery.signal").exists() && !clone.join("postmaster.pid").exists());
    let oid = postgres.sql("SELECT oid FROM pg_tablespace WHERE spcname = 'space'");
    assert_eq!(fs::read_link(clone.join("pg_tblspc").join(&oid)).unwrap(), clone_space);
    let mut copied = Postgres::on(&scratch, clone, major);
    copied.spawn(AS_A_COPY);
    copied.wait_for_promotion();
    let sums = copied.sql(SUMS);
    let all: Vec<&str> = sums.split('|').collect();
    assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "{sums}");
    assert_eq!((copied.sql(ROWS), sums), ("1 2 3".to_owned(), postgres.sql(SUMS)));
    assert_eq!(
        (copied.sql("SHOW work_mem"), copied.sql("SELECT count(*) FROM pg_replication_slots")),
        ("5MB".into(), "0".into())
    );
    run(copied.client("pg_amcheck").args(["--install-missing", "--heapallindexed"]));
    copied.stop("fast");

    // The volumes rolled back in place, to a time. Not before they are.
    postgres.stop("fast");
    let data = postgres.data.clone();
    let in_place = ["restore", "run", "--from-snapshot", &id, "--to", text(&data), "--target-time", &between];
    let said = sidecar.fails(73, &in_place);
    assert!(said.contains("a server has written to it since"), "{said}");
    assert_eq!(
        postgres.data.join("backup_label").exists(),
        postgres.data.join("pgsidecar.finishing-snapshot").exists()
    );
    for (from, to) in [(&cold, &data), (&cold_space, &space)] {
        run(command("rm").arg("-r").arg(to).current_dir(scratch.path()));
        copy(from, to);
    }
    sidecar.ok(&in_place);
    postgres.spawn(&[]);
    postgres.wait_for_promotion();
    assert_eq!(postgres.sql(ROWS), "1 2");
    let sums = postgres.sql(SUMS);
    let all: Vec<&str> = sums.split('|').collect();
    assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "{sums}");
    // It goes on archiving, on a timeline of its own.
    assert!(ship_wal(&postgres).starts_with("00000002"));
    // What happened after that moment is on the timeline that was left.
    let said = sidecar.fails(73, &[&in_place[..], &["--target-timeline", "1"]].concat());
    assert!(said.contains("a server runs on it"), "{said}");
}

#[test]
fn a_snapshot_under_load_restores_to_the_end_and_to_a_time_pg15() {
    a_snapshot_under_load_restores(15);
}

#[test]
fn a_snapshot_under_load_restores_to_the_end_and_to_a_time_pg17() {
    a_snapshot_under_load_restores(17);
}

#[test]
fn one_snapshot_is_open_at_a_time_beside_a_backup_and_ends_once_pg17() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (postgres, sidecar) = archiving_configured(&scratch, 17, &["--wal-segsize=1"], &repository, &[]);
    let open = sidecar.json(&["snapshot", "begin", "--fast", "--label", "velero", "--timeout", "5min"]);
    let id = open["id"].as_str().unwrap();
    assert_eq!(sidecar.json(&["snapshot", "list"])["open"], open);
    let said = sidecar.fails(75, &["snapshot", "begin", "--fast"]);
    assert!(said.contains(id) && said.contains("velero"), "{said}");
    back_up(&sidecar);
    assert_eq!(backup_sessions(&postgres), "1");
    let said = sidecar.fails(1, &["snapshot", "end", "--label", "other"]);
    assert!(said.contains("must not be used"), "{said}");
    let record = sidecar.json(&["snapshot", "end", "--label", "velero"]);
    assert_eq!((&record["id"], &record["label"]), (&open["id"], &open["label"]));
    assert_eq!(backup_sessions(&postgres), "0");
    // The answer may have been lost: it's told again.
    assert_eq!(sidecar.json(&["snapshot", "end", id]), record);
    let said = sidecar.fails(1, &["snapshot", "abort", id]);
    assert!(said.contains("isn't open"), "{said}");
    assert_eq!(complete(&sidecar), [id]);

    let second = begin(&sidecar);
    assert!(second.as_str() > id);
    sidecar.ok(&["snapshot", "abort", &second]);
    wait_until("PostgreSQL has forgotten it", PATIENCE, || backup_sessions(&postgres) == "0");
    let said = sidecar.fails(1, &["snapshot", "end", &second]);
    assert!(said.contains("must not be used: it was aborted"), "{said}");
    assert_eq!(complete(&sidecar), [id]);
    for wrong in [["--timeout", "61min"], ["--timeout", "10ms"], ["--label", "two\nlines"]] {
        sidecar.fails(2, &[&["snapshot", "begin"], &wrong[..]].concat());
    }
    sidecar.fails(2, &["snapshot", "end"]);
    // What can only be one is told apart.
    sidecar.fails(2, &["backup", "show", id]);
}

#[test]
fn a_snapshot_that_isn_t_ended_in_time_is_given_up_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (postgres, sidecar) = archiving_configured(&scratch, 15, &["--wal-segsize=1"], &repository, &[]);
    let open = sidecar.json(&["snapshot", "begin", "--fast", "--timeout", "1s"]);
    wait_until("it's given up", PATIENCE, || sidecar.json(&["snapshot", "list"])["open"].is_null());
    wait_until("PostgreSQL has forgotten it", PATIENCE, || backup_sessions(&postgres) == "0");
    unusable(&sidecar, open["id"].as_str().unwrap(), "time limit of 1s");
}

#[test]
fn a_daemon_that_is_killed_or_stopped_leaves_no_backup_in_progress_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (postgres, mut sidecar) = archiving_configured(&scratch, 15, &["--wal-segsize=1"], &repository, &[]);
    for end in [Sidecar::kill, |sidecar: &mut Sidecar| assert!(sidecar.stop().success())] {
        let id = begin(&sidecar);
        assert_eq!(backup_sessions(&postgres), "1");
        end(&mut sidecar);
        wait_until("PostgreSQL has forgotten it", PATIENCE, || backup_sessions(&postgres) == "0");
        sidecar.start();
        unusable(&sidecar, &id, "isn't open here");
    }
    let (id, _) = snapshot(&scratch, &postgres, &sidecar, "cold");
    assert_eq!(complete(&sidecar), [id]);
}

#[test]
fn a_caller_that_goes_away_before_the_checkpoint_is_through_leaves_nothing_open_pg17() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (postgres, sidecar) = archiving_configured(&scratch, 17, &[], &repository, &["checkpoint_timeout = 1h"]);
    // Spread over most of an hour.
    postgres.sql("CREATE TABLE big AS SELECT g, repeat('x', 500) FROM generate_series(1, 50000) g");
    let (mut caller, log) = sidecar.spawn(&["snapshot", "begin"]);
    wait_until("it waits for the checkpoint", PATIENCE, || backup_sessions(&postgres) == "1");
    let said = sidecar.fails(75, &["snapshot", "begin", "--fast"]);
    assert!(said.contains("just being begun"), "{said}");
    assert!(caller.try_wait().unwrap().is_none(), "{}", fs::read_to_string(log).unwrap());
    caller.kill().unwrap();
    caller.wait().unwrap();
    wait_until("PostgreSQL has forgotten it", PATIENCE, || backup_sessions(&postgres) == "0");
    let (id, _) = snapshot(&scratch, &postgres, &sidecar, "cold");
    assert_eq!(complete(&sidecar), [id]);
}

#[test]
fn a_tablespace_that_is_created_meanwhile_makes_it_unusable_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (postgres, sidecar) = archiving_configured(&scratch, 15, &["--wal-segsize=1"], &repository, &[]);
    let id = begin(&sidecar);
    postgres.sql(&format!("CREATE TABLESPACE space LOCATION '{}'", text(&scratch.dir("space"))));
    unusable(&sidecar, &id, "was created while it was open");
    assert_eq!(backup_sessions(&postgres), "0");
}

#[test]
fn a_server_that_restarts_ends_the_snapshot_pg17() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (mut postgres, sidecar) = archiving_configured(&scratch, 17, &["--wal-segsize=1"], &repository, &[]);
    let id = begin(&sidecar);
    postgres.stop("immediate");
    postgres.start(&[]);
    unusable(&sidecar, &id, "PostgreSQL");
    unusable(&sidecar, &id, "PostgreSQL");
}

#[test]
fn a_standby_s_snapshot_restores_and_its_promotion_ends_it_pg17() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (primary, _archiving) = archiving_configured(&scratch, 17, &["--wal-segsize=1"], &repository, &[]);
    primary.sql("CREATE TABLE rows AS SELECT 1 AS n");
    let data = scratch.path().join("standby");
    run(primary.client("pg_basebackup").args(["-c", "fast", "-X", "stream", "--no-sync", "-R", "-D"]).arg(&data));
    let mut standby = Postgres::on(&scratch, data, 17);
    let mut sidecar = Sidecar::another(&scratch, "beside-standby", &standby, &repository);
    sidecar.set("PGSIDECAR_BACKUP_WAL_TIMEOUT", "60s");
    standby.configure(&sidecar.archive_settings().iter().map(String::as_str).collect::<Vec<_>>());
    standby.start(&[]);
    sidecar.start();
    let id = begin(&sidecar);
    primary.sql("INSERT INTO rows VALUES (2)");
    let cold = scratch.path().join("cold");
    copy(&standby.data, &cold);
    let (mut end, log) = sidecar.spawn(&["snapshot", "end", &id]);
    // Nothing else makes a standby's last segment complete.
    wait_until("the snapshot ends", PATIENCE, || {
        primary.switch_wal();
        end.try_wait().unwrap().is_some()
    });
    assert!(end.wait().unwrap().success(), "{}", fs::read_to_string(log).unwrap());
    primary.sql("INSERT INTO rows VALUES (3)");
    ship_wal(&primary);
    sidecar.ok(&["restore", "run", "--from-snapshot", &id, "--to", text(&cold)]);
    assert!(!cold.join("standby.signal").exists());
    let mut copied = Postgres::on(&scratch, cold, 17);
    copied.spawn(AS_A_COPY);
    copied.wait_for_promotion();
    assert_eq!(copied.sql(ROWS), "1 2 3");

    let second = begin(&sidecar);
    standby.sql("SELECT pg_promote()");
    standby.wait_for_promotion();
    let said = sidecar.fails(69, &["snapshot", "end", &second]);
    assert!(said.contains("must not be used") && said.contains("promoted"), "{said}");
    assert_eq!(complete(&sidecar), [id]);
}

#[test]
fn without_its_wal_a_snapshot_is_not_listed_and_not_restored_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (postgres, mut sidecar) = archiving_configured(&scratch, 15, &["--wal-segsize=1"], &repository, &[]);
    sidecar.stop();
    sidecar.set("PGSIDECAR_BACKUP_WAL_TIMEOUT", "2s");
    sidecar.start();
    let id = begin(&sidecar);
    postgres.sql("ALTER SYSTEM SET archive_command = 'false'");
    postgres.sql("SELECT pg_reload_conf()");
    postgres.sql("CREATE TABLE rows AS SELECT 1 AS n");
    let said = sidecar.fails(75, &["snapshot", "end", &id]);
    assert!(
        said.contains("must not be used") && said.contains("has not arrived") && said.contains("archive_command"),
        "{said}"
    );
    unusable(&sidecar, &id, "has not arrived");
    assert_eq!(backup_sessions(&postgres), "0");

    postgres.sql("ALTER SYSTEM RESET archive_command");
    postgres.sql("SELECT pg_reload_conf()");
    let (id, cold) = snapshot(&scratch, &postgres, &sidecar, "cold");
    let record = sidecar.json(&["snapshot", "list"])["complete"][0].clone();
    let start = u64::from_str_radix(record["start_lsn"].as_str().unwrap().split_once('/').unwrap().1, 16).unwrap();
    let first = format!("0000000100000000{:08X}", start >> 20);
    let mut find = command("find");
    run(find.arg(scratch.path().join("repository")).args(["-name", &format!("{first}.zst"), "-delete"]));
    for verb in [&["restore", "plan"][..], &["restore", "run", "--to", text(&cold)]] {
        let said = sidecar.fails(65, &[verb, &["--from-snapshot", &id]].concat());
        assert!(said.contains(&id) && said.contains(&first), "{said}");
    }
    assert!(cold.join("postmaster.pid").exists());
}

#[test]
fn only_the_directory_of_the_snapshot_is_finished_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (mut postgres, sidecar) = archiving_configured(&scratch, 15, &["--wal-segsize=1"], &repository, &[]);
    let before = postgres.now();
    let older = scratch.path().join("older");
    copy(&postgres.data, &older);
    postgres.sql("CHECKPOINT");
    let (id, cold) = snapshot(&scratch, &postgres, &sidecar, "cold");
    let refused = |code: i32, to: &Path, words: &str, more: &[&str]| {
        let there = to.exists().then(|| entries(to));
        let said = sidecar.fails(code, &[&["restore", "run", "--to", text(to), "--from-snapshot", &id], more].concat());
        assert!(said.contains(words), "{said}");
        assert_eq!(there, to.exists().then(|| entries(to)), "{said}");
    };
    let (nowhere, empty) = (scratch.path().join("nowhere"), scratch.dir("empty"));
    refused(73, &nowhere, "is no data directory", &[]);
    refused(73, &empty, "is no data directory", &[]);
    refused(73, &older, "is older than the snapshot", &[]);
    refused(73, &postgres.data, "a server runs on it", &[]);
    refused(65, &cold, "lies before the end of snapshot", &["--target-time", &before]);
    refused(2, &cold, "no tablespace at /nowhere", &["--tablespace-mapping", "/nowhere=/else"]);
    refused(2, &cold, "cannot be used with", &["--backup", "20200101T000000Z-full"]);
    let said = sidecar.fails(1, &["restore", "plan", "--from-snapshot", "20200101T000000Z-snapshot"]);
    assert!(said.contains("there is no snapshot"), "{said}");

    // It crashed without a checkpoint: only its WAL tells that it isn't the snapshot any more.
    postgres.sql("CREATE TABLE later AS SELECT 1");
    ship_wal(&postgres);
    postgres.stop("immediate");
    refused(73, &postgres.data, "which was written since", &[]);
    postgres.start(&[]);
    postgres.stop("fast");
    refused(73, &postgres.data, "a server has written to it since", &[]);
    // The link of pg_wal came with the snapshot: whose WAL it leads to can't be told.
    let elsewhere = scratch.path().join("elsewhere");
    run(command("mv").arg(cold.join("pg_wal")).arg(&elsewhere));
    run(command("ln").arg("-s").arg(&elsewhere).arg(cold.join("pg_wal")));
    refused(73, &cold, "where files are", &[]);
    run(command("mv").arg(&elsewhere).arg(scratch.path().join("away")));
    refused(73, &cold, "has no pg_wal", &[]);
    run(command("mv").arg(scratch.path().join("away")).arg(&elsewhere));
    run(command("find").arg(&elsewhere).args(["-type", "f", "-delete"]));
    sidecar.ok(&["restore", "run", "--to", text(&cold), "--from-snapshot", &id]);
    assert_eq!(entries(&elsewhere), ["archive_status"]);

    let elsewhere = Scratch::new();
    let other = Postgres::initdb(&elsewhere, 15, &["--wal-segsize=1"]);
    refused(73, &other.data, "is of the database system", &[]);
    fs::write(other.data.join("PG_VERSION"), "17\n").unwrap();
    refused(73, &other.data, "is of PostgreSQL 17", &[]);
}

/// Starts a restore from the snapshot and kills it as soon as the directory is in this state; whether it was met.
fn killed(sidecar: &Sidecar, arguments: &[&str], state: impl Fn() -> bool) -> bool {
    let (mut restore, _) = sidecar.spawn(arguments);
    loop {
        if state() {
            restore.kill().unwrap();
            return !restore.wait().unwrap().success();
        }
        if restore.try_wait().unwrap().is_some() {
            return false;
        }
    }
}

#[test]
fn a_restore_that_was_killed_goes_on_when_it_is_run_again_pg17() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (postgres, sidecar) = archiving_configured(&scratch, 17, &["--wal-segsize=1"], &repository, &[]);
    postgres.sql("CREATE TABLE rows AS SELECT 1 AS n");
    postgres.sql("ALTER SYSTEM SET work_mem = '5MB'");
    back_up(&sidecar);
    let (id, cold) = snapshot(&scratch, &postgres, &sidecar, "cold");
    postgres.sql("INSERT INTO rows VALUES (2)");
    ship_wal(&postgres);
    // Enough to be found at it.
    let files = "for n in $(seq 4000); do : >\"$1/pg_replslot/$n\"; done";
    run(command("bash").args(["-c", files, "bash"]).arg(&cold));
    // Copied while it was written: the first 200 bytes of one write, the rest of another.
    let mut control = fs::read(cold.join("global/pg_control")).unwrap();
    control[200] ^= 0xFF;
    fs::write(cold.join("global/pg_control"), control).unwrap();

    type State = fn(&Path) -> bool;
    let unfinished = |to: &Path| !to.join("PG_VERSION").exists();
    let emptying: State = |to| to.join("pg_wal/archive_status").exists() && !to.join("postmaster.pid").exists();
    let settling: State = |to| to.join("recovery.signal").exists();
    for (name, state) in [("emptying", emptying), ("settling", settling)] {
        let to = scratch.path().join(name);
        let arguments = ["restore", "run", "--to", text(&to), "--from-snapshot", &id];
        let mut tries = 0;
        loop {
            tries += 1;
            assert!(tries <= 20, "never found {name}");
            run(command("rm").arg("-rf").arg(&to));
            copy(&cold, &to);
            let met = killed(&sidecar, &arguments, || to.exists() && unfinished(&to) && state(&to));
            if met && unfinished(&to) {
                break;
            }
        }
        // Nothing starts on it, and nothing takes it for something that can be thrown away.
        let mut half = Postgres::on(&scratch, to.clone(), 17);
        half.spawn(AS_A_COPY);
        wait_until("PostgreSQL refuses", PATIENCE, || half.exited().is_some_and(|status| !status.success()));
        let there = entries(&to);
        let said = sidecar.fails(73, &arguments[..4]);
        assert!(said.contains("is not empty"), "{said}");
        assert_eq!(entries(&to), there);
        sidecar.ok(&arguments);
        let mut copied = Postgres::on(&scratch, to, 17);
        copied.spawn(AS_A_COPY);
        copied.wait_for_promotion();
        assert_eq!((copied.sql(ROWS), copied.sql("SHOW work_mem")), ("1 2".into(), "5MB".into()));
        copied.stop("fast");
    }
}
