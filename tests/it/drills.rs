//! Drills that must not pass, servers that must not be started, and what killed drills leave.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{
    side::{Beside, files, steps},
    support::{
        Postgres, Sidecar,
        restoring::{back_up, ship_wal, text},
        told, wait_until,
    },
};

/// Runs a drill that has to end with this code. Answers with its record.
#[track_caller]
fn drill(sidecar: &Sidecar, code: i32, arguments: &[&str]) -> Value {
    let output = sidecar.cli(&[&["drill", "run", "--json"], arguments].concat());
    assert_eq!(output.status.code(), Some(code), "{}", told(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The message of a step.
fn message<'a>(record: &'a Value, step: &str) -> &'a str {
    let steps = record["steps"].as_array().unwrap();
    let found = steps.iter().find(|found| found["step"] == step);
    found.unwrap_or_else(|| panic!("no step {step}: {record}"))["message"].as_str().unwrap()
}

fn damage_that_was_backed_up_is_found_and_named(major: u32) {
    let mut beside = Beside::new(major, if major < 18 { &[] } else { &["--no-data-checksums"] });
    let postgres = &mut beside.postgres;
    postgres.sql("CREATE TABLE rows (n int); INSERT INTO rows SELECT generate_series(1, 100)");
    let file = postgres.data.join(postgres.sql("SELECT pg_relation_filepath('rows')"));
    postgres.sql("CHECKPOINT");
    postgres.stop("fast");
    // The sixth line pointer: of 100 bytes, at 8184 of 8192 (ItemIdData: 15 bits offset, 2 bits flags, 15 bits length).
    let pointer: u32 = 8184 | 1 << 15 | 100 << 17;
    OpenOptions::new().write(true).open(file).unwrap().write_all_at(&pointer.to_le_bytes(), 24 + 4 * 5).unwrap();
    postgres.start(&[]);
    back_up(&beside.sidecar);
    let record = drill(&beside.sidecar, 65, &["--query", "SELECT true"]);
    let expected =
        [("plan", "passed"), ("restore", "passed"), ("recovery", "passed"), ("amcheck", "failed"), ("query", "passed")];
    assert_eq!(steps(&record), expected);
    assert!(message(&record, "amcheck").contains("postgres.public.rows"), "{record}");
    let listed = beside.sidecar.json(&["drill", "list"]);
    assert_eq!((&listed[0]["id"], &listed[0]["outcome"]), (&record["id"], &"failed".into()));
    beside.sidecar.stop();
    beside.sidecar.start();
    let status = beside.sidecar.json(&["status"]);
    assert!(status["problems"].to_string().contains("postgres.public.rows"), "{status}");
    assert_eq!(beside.sidecar.metric("pgsidecar_last_drill_passed"), "0");
}

#[test]
fn damage_that_was_backed_up_is_found_and_named_pg15() {
    damage_that_was_backed_up_is_found_and_named(15);
}

#[test]
fn damage_that_was_backed_up_is_found_and_named_pg17() {
    damage_that_was_backed_up_is_found_and_named(17);
}

/// The object of a segment.
fn object(beside: &Beside, segment: &str) -> PathBuf {
    let name = format!("/{segment}.zst");
    let found = files(&beside.repository).into_iter().find(|key| key.ends_with(&name));
    beside.repository.join(found.unwrap())
}

#[test]
fn a_drill_says_which_wal_is_missing_or_damaged_pg17() {
    let beside = Beside::new(17, &[]);
    let Beside { sidecar, postgres, .. } = &beside;
    back_up(sidecar);
    postgres.sql("CREATE TABLE rows (n int)");
    let segments: Vec<String> = (0..3)
        .map(|n| {
            postgres.sql(&format!("INSERT INTO rows VALUES ({n})"));
            ship_wal(postgres)
        })
        .collect();
    // Damaged: the recovery can't get it, and it isn't the end of the archive.
    let damaged = object(&beside, &segments[1]);
    let whole = fs::read(&damaged).unwrap();
    let mut bytes = whole.clone();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&damaged, &bytes).unwrap();
    let record = drill(sidecar, 65, &["--no-amcheck"]);
    assert_eq!(steps(&record), [("plan", "passed"), ("restore", "passed"), ("recovery", "failed")]);
    let said = message(&record, "recovery");
    assert!(said.contains(&segments[1]) && said.contains("is damaged"), "{said}");
    // Missing: what can be restored is tried out, and is not all.
    fs::remove_file(&damaged).unwrap();
    let record = drill(sidecar, 65, &["--no-amcheck", "--query", "SELECT count(*) = 1 FROM rows"]);
    let expected =
        [("plan", "passed"), ("wal", "failed"), ("restore", "passed"), ("recovery", "passed"), ("query", "passed")];
    assert_eq!(steps(&record), expected);
    assert!(message(&record, "wal").contains(&segments[1]), "{record}");
    fs::write(&damaged, &whole).unwrap();
    assert_eq!(drill(sidecar, 0, &["--no-amcheck", "--query", "SELECT count(*) = 3 FROM rows"])["outcome"], "passed");
    // That of the backup itself: there is nothing to begin with.
    let backup = sidecar.json(&["backup", "list"])[0].clone();
    let start = postgres.sql(&format!("SELECT pg_walfile_name('{}')", backup["start_lsn"].as_str().unwrap()));
    fs::remove_file(object(&beside, &start)).unwrap();
    let record = drill(sidecar, 65, &["--no-amcheck"]);
    assert_eq!(steps(&record), [("plan", "failed")]);
    assert!(message(&record, "plan").contains(&start), "{record}");
}

#[test]
fn a_drill_that_can_not_be_tried_is_told_from_one_that_failed_pg17() {
    let mut beside = Beside::new(17, &[]);
    back_up(&beside.sidecar);
    beside.sidecar.set("PG_BINDIR", text(&Postgres::bin(15)));
    let record = drill(&beside.sidecar, 78, &[]);
    assert_eq!(
        (steps(&record), &record["outcome"]),
        (vec![("plan", "passed"), ("restore", "not_tried")], &"not_tried".into())
    );
    let said = message(&record, "restore");
    assert!(said.contains("has PostgreSQL 15") && said.contains("backup is of 17"), "{said}");
    beside.sidecar.set("PG_BINDIR", text(&Postgres::bin(17)));
    let within = beside.postgres.data.join("scratch");
    fs::create_dir(&within).unwrap();
    beside.sidecar.set("PGSIDECAR_SCRATCH", text(&within));
    assert!(message(&drill(&beside.sidecar, 73, &["--no-record"]), "restore").contains("live data directory"));
    beside.sidecar.set("PGSIDECAR_SCRATCH", "");
    let said = beside.sidecar.fails(78, &["extract", "--database", "postgres", "--output", "/dev/shm/none.dump"]);
    assert!(said.contains("PGSIDECAR_SCRATCH"), "{said}");
    // A library that isn't here is asked for in vain, and only if somebody asks.
    beside.sidecar.set("PGSIDECAR_SCRATCH", text(&beside.runs));
    let record = drill(&beside.sidecar, 78, &["--set", "shared_preload_libraries=not_here"]);
    assert!(message(&record, "recovery").contains("not_here"), "{record}");
    assert_eq!(files(&beside.runs), Vec::<String>::new());
}

/// The processes with this name of which `parent` is one of the ancestors.
fn below(parent: u32, name: &str) -> Vec<i32> {
    let mut found = Vec::new();
    for process in fs::read_dir("/proc").unwrap() {
        let Ok(stat) = fs::read_to_string(process.unwrap().path().join("stat")) else { continue };
        let Some((before, after)) = stat.rsplit_once(") ") else { continue };
        let (pid, comm) = before.split_once(" (").unwrap();
        if after.split(' ').nth(1) == Some(&parent.to_string()) {
            let pid: i32 = pid.parse().unwrap();
            found.extend((comm == name).then_some(pid));
            found.extend(below(pid.unsigned_abs(), name));
        }
    }
    found
}

fn is_alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, state)| !state.starts_with('Z'))
}

fn kill(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

/// A drill in the middle of a query, and the processes of its server.
fn drill_amid_a_query(beside: &Beside) -> (std::process::Child, Vec<i32>) {
    let (child, log) = beside.sidecar.spawn(&["drill", "run", "--no-amcheck", "--query", "SELECT pg_sleep(600)"]);
    wait_until("the query runs", Duration::from_secs(60), || {
        fs::read_to_string(&log).unwrap_or_default().contains("recovery")
    });
    let servers = below(child.id(), "postgres");
    assert!(!servers.is_empty());
    (child, servers)
}

#[test]
fn a_server_ends_with_the_drill_however_that_ends_pg17() {
    let beside = Beside::new(17, &[]);
    back_up(&beside.sidecar);
    let all_end = |servers: &[i32]| {
        wait_until("the server ends", Duration::from_secs(20), || !servers.iter().any(|pid| is_alive(*pid)));
    };
    // By a signal: in order, and nothing is left.
    let (mut child, servers) = drill_amid_a_query(&beside);
    kill(child.id().cast_signed(), Signal::TERM);
    assert_eq!(child.wait().unwrap().code(), Some(143));
    all_end(&servers);
    assert_eq!(files(&beside.runs), Vec::<String>::new());
    // Killed: the server ends by itself, what was restored stays.
    let (mut child, servers) = drill_amid_a_query(&beside);
    child.kill().unwrap();
    child.wait().unwrap();
    all_end(&servers);
    assert!(!files(&beside.runs).is_empty());
    // Killed with the shell that would end it: the server lives, and the next drill ends it and removes everything.
    let (mut child, servers) = drill_amid_a_query(&beside);
    assert_eq!(fs::read_dir(&beside.runs).unwrap().count(), 1, "the remains of the one before are gone");
    below(child.id(), "sh").into_iter().for_each(|pid| kill(pid, Signal::KILL));
    child.kill().unwrap();
    child.wait().unwrap();
    std::thread::sleep(Duration::from_secs(1));
    assert!(is_alive(servers[0]));
    let said = told(&beside.sidecar.cli(&["drill", "run", "--no-amcheck"]));
    assert!(said.contains("Removed what 1 killed run") && said.contains("passed"), "{said}");
    all_end(&servers);
    assert_eq!(files(&beside.runs), Vec::<String>::new());
    // Kept on purpose.
    let said = told(&beside.sidecar.cli(&["drill", "run", "--no-amcheck", "--keep"]));
    assert!(said.contains("is left in"), "{said}");
    assert!(drill(&beside.sidecar, 0, &["--no-amcheck"])["outcome"] == "passed");
    let kept = fs::read_dir(&beside.runs).unwrap().next().unwrap().unwrap().path();
    assert!(kept.join("data/PG_VERSION").exists() && kept.join("server.log").exists());
}

/// Every file below a directory with its content.
fn contents(directory: &Path) -> Vec<(String, Vec<u8>)> {
    files(directory).into_iter().map(|file| (file.clone(), fs::read(directory.join(file)).unwrap())).collect()
}

fn no_private_server_comes_near_a_live_tablespace(major: u32) {
    let mut beside = Beside::new(major, &[]);
    let (old, new) = (beside.scratch.dir("old"), beside.scratch.dir("new"));
    let postgres = &beside.postgres;
    postgres.sql(&format!("CREATE TABLESPACE old LOCATION '{}'", old.display()));
    postgres.sql("CREATE TABLE known (n int) TABLESPACE old; INSERT INTO known VALUES (1)");
    back_up(&beside.sidecar);
    ship_wal(postgres);
    // One that the backup knows is put elsewhere.
    postgres.sql("CHECKPOINT");
    let before = contents(&old);
    drill(&beside.sidecar, 0, &["--query", "SELECT sum(n) = 1 FROM known"]);
    assert!(contents(&old) == before);
    // One that was created later, whose table the copy would drop.
    postgres.sql(&format!("CREATE TABLESPACE new LOCATION '{}'", new.display()));
    postgres.sql("CREATE TABLE unknown (n int) TABLESPACE new; INSERT INTO unknown VALUES (1)");
    let then = postgres.now();
    std::thread::sleep(Duration::from_millis(20));
    postgres.sql("INSERT INTO unknown VALUES (2)");
    ship_wal(postgres);
    postgres.sql("CHECKPOINT");
    let before = contents(&new);
    assert!(!before.is_empty());
    let record = drill(&beside.sidecar, 73, &[]);
    assert_eq!(steps(&record), [("plan", "passed"), ("restore", "not_tried")]);
    assert!(message(&record, "restore").contains(text(&new)), "{record}");
    // Where nothing tells of the live server, its WAL does.
    beside.sidecar.set("PGDATA", "");
    let record = drill(&beside.sidecar, 73, &["--target-time", &then]);
    assert_eq!(steps(&record).last(), Some(&("recovery", "not_tried")));
    let refused = format!("creates a tablespace at {}", new.display());
    assert!(message(&record, "recovery").contains(&refused), "before it got that WAL: {record}");
    let dump = beside.scratch.path().join("x.dump");
    let said = beside.sidecar.fails(73, &["extract", "--database", "postgres", "--output", text(&dump)]);
    assert!(said.contains(text(&new)), "{said}");
    assert!(contents(&new) == before, "not a byte of the live server's has changed");
    assert_eq!(beside.postgres.sql("SELECT sum(n) FROM unknown"), "3");
    assert_eq!(files(&beside.runs), Vec::<String>::new());
}

#[test]
fn no_private_server_comes_near_a_live_tablespace_pg15() {
    no_private_server_comes_near_a_live_tablespace(15);
}

#[test]
fn no_private_server_comes_near_a_live_tablespace_pg17() {
    no_private_server_comes_near_a_live_tablespace(17);
}

#[test]
fn what_a_stopped_server_had_last_is_in_the_drill_and_nothing_later_pg15() {
    let mut beside = Beside::new(15, &[]);
    beside.postgres.sql("CREATE TABLE rows (n int)");
    back_up(&beside.sidecar);
    ship_wal(&beside.postgres);
    beside.postgres.sql("INSERT INTO rows VALUES (1)");
    // Both stop as a pod does: what the last segment holds is kept beside the archive.
    beside.sidecar.tell_to_stop();
    beside.postgres.stop("fast");
    assert!(beside.sidecar.wait_for_end().success());
    let keys = beside.keys();
    let record = drill(&beside.sidecar, 0, &["--no-amcheck", "--query", "SELECT sum(n) = 1 FROM rows"]);
    assert_eq!(steps(&record).last(), Some(&("query", "passed")));
    assert_eq!(beside.keys(), keys);
}

#[test]
fn wal_get_tells_not_there_from_can_t_tell_pg15() {
    let mut beside = Beside::new(15, &[]);
    let segments: Vec<String> = (0..2).map(|_| ship_wal(&beside.postgres)).collect();
    // No daemon, no data directory.
    beside.sidecar.stop();
    beside.sidecar.set("PGDATA", "");
    let Beside { sidecar, postgres, .. } = &beside;
    let to = beside.scratch.dir("pg_wal").join("RECOVERYXLOG");
    let get = |arguments: &[&str]| {
        fs::remove_file(&to).ok();
        let output = sidecar.cli(&[&["wal", "get", "--timeout", "1s"], arguments].concat());
        let code = output.status.code().unwrap();
        assert_eq!(to.exists(), code == 0, "{}", told(&output));
        assert!(fs::read_dir(to.parent().unwrap()).unwrap().count() <= 1, "nothing else is left");
        code
    };
    assert_eq!(get(&[&segments[0], text(&to)]), 0);
    assert!(fs::read(&to).unwrap() == postgres.wal_file(&segments[0]));
    assert_eq!(get(&["00000002.history", text(&to)]), 1);
    assert_eq!(get(&["0000000100000000000000F0", text(&to)]), 1);
    // There, and not wanted.
    assert_eq!(get(&["--through", &segments[0], &segments[1], text(&to)]), 1);
    assert_eq!(get(&["--through", &segments[0], &segments[0], text(&to)]), 0);
    // Nothing of it is known, wrong usage, wrong settings, damage.
    assert_eq!(get(&["--system-identifier", "7", &segments[0], text(&to)]), 200);
    assert_eq!(get(&["no-name", text(&to)]), 200);
    assert_eq!(get(&["--no-such-option", &segments[0], text(&to)]), 200);
    assert_eq!(get(&["--repository", "ftp://x", &segments[0], text(&to)]), 200);
    assert_eq!(get(&["--repository", "file:///nonexistent", &segments[0], text(&to)]), 200);
    fs::write(object(&beside, &segments[0]), b"not zstd").unwrap();
    assert_eq!(get(&[&segments[0], text(&to)]), 200);
}

#[test]
fn a_drill_that_is_stopped_while_it_restores_leaves_nothing_pg15() {
    let beside = Beside::new(15, &[]);
    beside.postgres.sql("CREATE TABLE rows AS SELECT n, repeat('x', 500) FROM generate_series(1, 50000) n");
    back_up(&beside.sidecar);
    for milliseconds in [200, 350, 500, 650, 800, 1000] {
        let (mut child, log) =
            beside.sidecar.spawn(&["drill", "run", "--no-amcheck", "--query", "SELECT pg_sleep(600)"]);
        std::thread::sleep(Duration::from_millis(milliseconds));
        kill(child.id().cast_signed(), Signal::TERM);
        let code = child.wait().unwrap().code();
        assert_eq!(code, Some(143), "{milliseconds}: {}", fs::read_to_string(&log).unwrap());
        assert_eq!(fs::read_dir(&beside.runs).unwrap().count(), 0, "after {milliseconds} ms");
    }
}
