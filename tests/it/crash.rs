//! kill -9, as the OOM killer sends it: nothing acknowledged is lost, nothing half-done is listed, and what was
//! interrupted is simply done again.

use std::{
    fs,
    path::Path,
    process::{Child, Stdio},
    time::Duration,
};

use crate::support::{
    Look, Mode, Postgres, Repository, Scratch, Sidecar, Wire, archiving, give_to_servers, wait_until,
};

const PATIENCE: Duration = Duration::from_secs(60);

/// A repository on the S3 server, and a way to it that can be disturbed.
fn s3_with_proxy() -> (Repository, Wire) {
    let repository = Repository::s3();
    let Repository::S3(server) = &repository else { unreachable!("it's on S3") };
    let proxy = Wire::to(&server.address());
    (repository, proxy)
}

/// Like [`archiving`], through a proxy. 1 MB segments: they come by the dozen.
fn archiving_through(scratch: &Scratch, proxy: &Wire, repository: &Repository) -> (Postgres, Sidecar) {
    let mut postgres = Postgres::initdb(scratch, 15, &["--wal-segsize=1"]);
    let mut sidecar = Sidecar::new(scratch, &postgres, repository);
    sidecar.through(proxy);
    let settings = sidecar.archive_settings();
    postgres.configure(&settings.iter().map(String::as_str).collect::<Vec<_>>());
    postgres.start(&[]);
    sidecar.start();
    (postgres, sidecar)
}

fn status_files(postgres: &Postgres, suffix: &str) -> Vec<String> {
    let entries = fs::read_dir(postgres.data.join("pg_wal/archive_status")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter_map(|name| name.strip_suffix(suffix).map(str::to_owned)).collect()
}

/// I1: whatever PostgreSQL was told is archived is in the repository, byte for byte. Answers how many files those are.
fn check_acknowledged(postgres: &Postgres, look: &Look) -> usize {
    let done = status_files(postgres, ".done");
    for name in &done {
        let ours = fs::read(postgres.data.join("pg_wal").join(name)).unwrap();
        let theirs = look.wal(name).unwrap_or_else(|| panic!("{name} was acknowledged and isn't in the repository"));
        assert!(ours == theirs, "{name} was acknowledged, and other bytes are in the repository");
    }
    done.len()
}

fn backup_sessions(postgres: &Postgres) -> String {
    postgres.sql("SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_backup%' AND pid <> pg_backend_pid()")
}

fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Restores the newest backup, starts it and answers what a query says there.
fn restored_answer(scratch: &Scratch, sidecar: &Sidecar, name: &str, sql: &str) -> String {
    let to = scratch.path().join(name);
    sidecar.ok(&["restore", "run", "--to", to.to_str().unwrap()]);
    let mut restored = Postgres::on(scratch, to, 15);
    restored.start(&["-c", "archive_mode=off"]);
    restored.wait_for_promotion();
    restored.sql(sql)
}

#[test]
fn what_was_acknowledged_before_a_kill_under_load_is_in_the_repository_and_the_rest_drains_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let mut postgres = Postgres::initdb(&scratch, 15, &["--wal-segsize=1"]);
    let mut sidecar = Sidecar::new(&scratch, &postgres, &repository);
    let settings = sidecar.archive_settings();
    postgres.configure(&settings.iter().map(String::as_str).collect::<Vec<_>>());
    // What is acknowledged stays, to be compared.
    postgres.configure(&["wal_keep_size = 2GB", "max_wal_size = 2GB"]);
    postgres.start(&[]);
    sidecar.start();
    let look = Look::into(&repository);
    postgres.sql("CREATE TABLE t (n int, u uuid)");
    let script = scratch.path().join("load.sql");
    // Two segments each, so that there's always something under way.
    fs::write(&script, "INSERT INTO t SELECT n, gen_random_uuid() FROM generate_series(1, 20000) n;\n").unwrap();
    let mut load = postgres.client("pgbench");
    let load = load
        .args(["-n", "-c", "2", "-T", "60", "-f"])
        .arg(&script)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();

    let mut interrupted = 0;
    for round in 0..3 {
        let before = status_files(&postgres, ".done").len();
        wait_until("some more segments are archived", PATIENCE, || {
            status_files(&postgres, ".done").len() >= before + 4 + round
        });
        sidecar.kill();
        interrupted += usize::from(!status_files(&postgres, ".ready").is_empty());
        look.check_all_whole();
        assert!(check_acknowledged(&postgres, &look) >= 4);
        sidecar.start();
    }
    kill(load);
    assert!(interrupted > 0, "each kill came when there was nothing to do");
    postgres.switch_wal();
    postgres.wait_until_archived();
    assert!(check_acknowledged(&postgres, &look) > 20);
    look.check_all_whole();
    let failures =
        postgres.sql("SELECT last_archived_time > coalesce(last_failed_time, '-infinity') FROM pg_stat_archiver");
    assert_eq!(failures, "t");
}

#[test]
fn a_segment_that_was_stored_just_before_a_kill_is_acknowledged_on_the_next_try_pg15() {
    let scratch = Scratch::new();
    let (repository, proxy) = s3_with_proxy();
    let (postgres, mut sidecar) = archiving_through(&scratch, &proxy, &repository);
    postgres.switch_wal();
    postgres.wait_until_archived();
    proxy.hold_answer("PUT", "/wal/");
    let name = postgres.switch_wal();
    proxy.wait_for_held();
    sidecar.kill();
    let look = Look::into(&repository);
    assert!(look.wal(&name).is_some(), "the answer was held back, not the request");
    assert_eq!(status_files(&postgres, ".ready"), std::slice::from_ref(&name));
    proxy.release();
    sidecar.start();
    postgres.wait_until_archived();
    check_acknowledged(&postgres, &look);
    assert!(!sidecar.log().contains("other content"));
}

/// Where a backup is killed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Moment {
    Claimed,
    PartsGrow,
    WaitingForWal,
    BeforeRecord,
}

/// Kills the daemon at this moment of a backup, and checks that it's as if there had been none.
fn killed_backup(moment: Moment) {
    let scratch = Scratch::new();
    let (repository, proxy) = s3_with_proxy();
    let (postgres, mut sidecar) = archiving_through(&scratch, &proxy, &repository);
    let look = Look::into(&repository);
    postgres.sql("CREATE TABLE t AS SELECT n, gen_random_uuid() u FROM generate_series(1, 30000) n");
    // A multipart upload of three pieces.
    large_file(&postgres.data.join("large"), 20 << 20);
    let arguments: &[&str] = if moment == Moment::Claimed {
        // Slow: the checkpoint is spread over minutes.
        postgres.sql("UPDATE t SET n = n + 1 WHERE n % 10 = 0");
        &["backup", "create"]
    } else {
        &["backup", "create", "--fast"]
    };
    match moment {
        Moment::Claimed | Moment::WaitingForWal => {}
        Moment::PartsGrow => proxy.hold("PUT", "partNumber=2"),
        Moment::BeforeRecord => proxy.hold("PUT", "backup.json"),
    }
    if moment == Moment::WaitingForWal {
        postgres.sql("ALTER SYSTEM SET archive_command = 'false'");
        postgres.sql("SELECT pg_reload_conf()");
    }
    let (mut creating, log) = sidecar.spawn(arguments);
    let found = |part: &str| !look.matching(part).is_empty();
    match moment {
        Moment::Claimed => {
            wait_until("the id is claimed", PATIENCE, || found("/started.json"));
            wait_until("the backup waits for the checkpoint", PATIENCE, || backup_sessions(&postgres) == "1");
        }
        Moment::PartsGrow | Moment::BeforeRecord => proxy.wait_for_held(),
        Moment::WaitingForWal => {
            wait_until("it waits for WAL", PATIENCE, || sidecar.log().contains("waiting for its WAL"));
        }
    }
    sidecar.kill();
    let status = creating.wait().unwrap();
    let said = fs::read_to_string(log).unwrap();
    assert_eq!(status.code(), Some(69), "{said}");

    // Never listed, with or without a daemon.
    assert_eq!(sidecar.json(&["backup", "list"]), serde_json::json!([]));
    assert!(found("/started.json") && !found("/backup.json"));
    match moment {
        Moment::Claimed => assert!(!found("/part-")),
        // The large one can't be there; that of the other thread can.
        Moment::PartsGrow => {}
        Moment::WaitingForWal | Moment::BeforeRecord => assert!(found("/part-")),
    }
    let claim = look.text("/started.json");
    wait_until("PostgreSQL has ended the session", PATIENCE, || backup_sessions(&postgres) == "0");

    proxy.release();
    if moment == Moment::WaitingForWal {
        postgres.sql("ALTER SYSTEM RESET archive_command");
        postgres.sql("SELECT pg_reload_conf()");
    }
    sidecar.start();
    assert_eq!(sidecar.json(&["status"])["last_backup"], serde_json::Value::Null);
    let next = sidecar.json(&["backup", "create", "--fast"]);
    // The remains are gone: all that there is belongs to the new one. (Within the same second it has the same id.)
    let prefix = format!("/backups/{}/", next["id"].as_str().unwrap());
    let objects = look.matching("/backups/");
    assert!(objects.iter().all(|key| key.contains(&prefix)), "{objects:?}");
    assert_eq!(objects.len(), next["parts"].as_array().unwrap().len() + 4, "{objects:?}");
    assert_ne!(look.text("/started.json"), claim);
    assert_eq!(look.pending(), Vec::<String>::new());
    let listed = sidecar.json(&["backup", "list"]);
    assert_eq!(listed.as_array().unwrap().len(), 1);
    let expected = postgres.sql("SELECT count(*), sum(n) FROM t");
    assert_eq!(restored_answer(&scratch, &sidecar, "restored", "SELECT count(*), sum(n) FROM t"), expected);
}

#[test]
fn a_backup_killed_while_it_waits_for_the_checkpoint_was_never_there_pg15() {
    killed_backup(Moment::Claimed);
}

#[test]
fn a_backup_killed_while_its_parts_grow_was_never_there_pg15() {
    killed_backup(Moment::PartsGrow);
}

#[test]
fn a_backup_killed_while_it_waits_for_wal_was_never_there_pg15() {
    killed_backup(Moment::WaitingForWal);
}

#[test]
fn a_backup_killed_just_before_its_record_was_never_there_pg15() {
    killed_backup(Moment::BeforeRecord);
}

#[test]
fn a_backup_whose_record_was_stored_before_the_kill_is_a_backup_pg15() {
    let scratch = Scratch::new();
    let (repository, proxy) = s3_with_proxy();
    let (postgres, mut sidecar) = archiving_through(&scratch, &proxy, &repository);
    postgres.sql("CREATE TABLE t AS SELECT generate_series(1, 1000) n");
    proxy.hold_answer("PUT", "backup.json");
    let (mut creating, _) = sidecar.spawn(&["backup", "create", "--fast"]);
    proxy.wait_for_held();
    sidecar.kill();
    assert!(!creating.wait().unwrap().success());
    proxy.release();
    sidecar.start();
    let listed = sidecar.json(&["backup", "list"]);
    assert_eq!(listed.as_array().unwrap().len(), 1, "{listed}");
    sidecar.ok(&["backup", "create", "--fast"]);
    assert_eq!(sidecar.json(&["backup", "list"]).as_array().unwrap().len(), 2, "it was not taken for remains");
    let id = listed[0]["id"].as_str().unwrap();
    postgres.switch_wal();
    postgres.wait_until_archived();
    let to = scratch.path().join("restored");
    sidecar.ok(&["restore", "run", "--to", to.to_str().unwrap(), "--backup", id]);
    let mut restored = Postgres::on(&scratch, to, 15);
    restored.start(&["-c", "archive_mode=off"]);
    restored.wait_for_promotion();
    assert_eq!(restored.sql("SELECT count(*) FROM t"), "1000");
}

#[test]
fn the_pieces_of_a_part_that_a_killed_backup_left_in_a_directory_are_removed_by_the_next_one_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (postgres, mut sidecar) = archiving(&scratch, 15, &["--wal-segsize=1"], &repository);
    let look = Look::into(&repository);
    // Large enough to be met while it's written.
    large_file(&postgres.data.join("large"), 200 << 20);
    let (mut creating, _) = sidecar.spawn(&["backup", "create", "--fast"]);
    wait_until("a part grows", PATIENCE, || {
        let files = look.pending();
        let sizes = files.iter().filter_map(|file| fs::metadata(scratch.path().join("repository").join(file)).ok());
        sizes.map(|meta| meta.len()).max() > Some(1 << 20)
    });
    sidecar.kill();
    assert!(!creating.wait().unwrap().success());
    assert!(!look.pending().is_empty());
    assert_eq!(sidecar.json(&["backup", "list"]), serde_json::json!([]));
    fs::remove_file(postgres.data.join("large")).unwrap();
    sidecar.start();
    sidecar.ok(&["backup", "create", "--fast"]);
    assert!(!look.pending().iter().any(|file| file.contains("/backups/")), "{:?}", look.pending());
    assert_eq!(look.matching("/started.json").len(), 1);
    drop(postgres);
}

/// A file of bytes that don't compress.
fn large_file(path: &Path, size: usize) {
    let mut state = 88_172_645_463_325_252_u64;
    let mut bytes = Vec::with_capacity(size);
    while bytes.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    fs::write(path, bytes).unwrap();
    give_to_servers(path);
}

/// A server with a backup and some WAL after it, and what a complete restore of it answers.
fn with_backup(scratch: &Scratch, proxy: &Wire, repository: &Repository) -> (Postgres, Sidecar, String) {
    let (postgres, sidecar) = archiving_through(scratch, proxy, repository);
    postgres.sql("CREATE TABLE t AS SELECT n, gen_random_uuid() u FROM generate_series(1, 100000) n");
    sidecar.ok(&["backup", "create", "--fast"]);
    postgres.sql("INSERT INTO t SELECT n, gen_random_uuid() FROM generate_series(1, 1000) n");
    postgres.switch_wal();
    postgres.wait_until_archived();
    let answer = postgres.sql("SELECT count(*), sum(n) FROM t");
    (postgres, sidecar, answer)
}

fn assert_postgres_refuses(scratch: &Scratch, directory: &Path) {
    assert!(!directory.join("PG_VERSION").exists());
    let mut postgres = Postgres::on(scratch, directory.to_owned(), 15);
    postgres.spawn(&["-c", "archive_mode=off"]);
    wait_until("PostgreSQL has ended", PATIENCE, || postgres.exited().is_some());
    assert!(!postgres.exited().unwrap().success(), "{}", postgres.log());
    let log = postgres.log();
    let reasons = ["is not a valid data directory", "could not access the server configuration file"];
    assert!(reasons.iter().any(|reason| log.contains(reason)), "{log}");
}

/// Kills `restore run` as soon as `ready` says so, each time into the same directory; then restores there.
/// What a moment is called, and how it's told from the files in the directory.
type InTheDirectory<'a> = (&'a str, &'a dyn Fn(&Path) -> bool);

fn killed_restores(moments: &[InTheDirectory]) {
    let scratch = Scratch::new();
    let (repository, proxy) = s3_with_proxy();
    let (_postgres, sidecar, expected) = with_backup(&scratch, &proxy, &repository);
    let to = scratch.path().join("restored");
    for (request, ready) in moments {
        if !request.is_empty() {
            proxy.hold("GET", request);
        }
        let (restoring, log) = sidecar.spawn(&["restore", "run", "--to", to.to_str().unwrap()]);
        let restoring = std::cell::RefCell::new(restoring);
        if !request.is_empty() {
            proxy.wait_for_held();
        }
        wait_until("the restore is as far as it's to be killed", PATIENCE, || {
            let ended = restoring.borrow_mut().try_wait().unwrap();
            assert!(ended.is_none(), "{ended:?}\n{}", fs::read_to_string(&log).unwrap());
            ready(&to)
        });
        kill(restoring.into_inner());
        proxy.release();
        assert_postgres_refuses(&scratch, &to);
    }
    assert_eq!(restored_answer(&scratch, &sidecar, "restored", "SELECT count(*), sum(n) FROM t"), expected);
    let left: Vec<_> = fs::read_dir(&to).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().contains("pgsidecar")), "{left:?}");
}

#[test]
fn a_restore_killed_before_between_and_after_its_parts_starts_nothing_and_can_be_run_again_pg15() {
    killed_restores(&[
        ("part-0000", &|to| to.join("pgsidecar.restoring").exists()),
        ("part-00002", &|to| to.join("base").exists()),
        // The last part: everything else is unpacked.
        ("part-00003", &|to| to.join("base/5").exists()),
        ("backup_manifest", &|to| to.join("base/5").exists()),
    ]);
}

#[test]
fn a_restore_killed_while_files_are_written_starts_nothing_and_can_be_run_again_pg15() {
    killed_restores(&[
        ("", &|to| to.join("pgsidecar.restoring").exists()),
        ("", &|to| to.join("base").exists()),
        ("", &|to| to.join("base/1").exists()),
    ]);
}

#[test]
fn a_daemon_killed_while_a_server_recovers_through_it_delays_the_recovery_and_never_ends_it_pg15() {
    let scratch = Scratch::new();
    let (repository, proxy) = s3_with_proxy();
    let (postgres, mut sidecar) = archiving_through(&scratch, &proxy, &repository);
    postgres.sql("CREATE TABLE t (n int, u uuid)");
    sidecar.ok(&["backup", "create", "--fast"]);
    for _ in 0..8 {
        postgres.sql("INSERT INTO t SELECT n, gen_random_uuid() FROM generate_series(1, 20000) n");
    }
    postgres.switch_wal();
    postgres.wait_until_archived();
    let expected = postgres.sql("SELECT count(*) FROM t");
    let to = scratch.path().join("restored");
    sidecar.ok(&["restore", "run", "--to", to.to_str().unwrap()]);
    // Slow, so that there is time to be killed in.
    proxy.set(Mode::Delay(Duration::from_millis(10)));
    let mut restored = Postgres::on(&scratch, to, 15);
    restored.spawn(&["-c", "archive_mode=off"]);
    let fetched = |restored: &Postgres| restored.log().matches("restored log file").count();
    for round in 1..=3 {
        let before = fetched(&restored);
        wait_until("some segments are replayed", PATIENCE, || fetched(&restored) >= before + 2);
        sidecar.kill();
        let waiting = |log: &str| log.matches("trying again").count();
        wait_until("the helper waits for the daemon", PATIENCE, || waiting(&restored.log()) >= round);
        assert!(restored.exited().is_none(), "{}", restored.log());
        assert!(!restored.log().contains("archive recovery complete"), "{}", restored.log());
        sidecar.start();
    }
    proxy.set(Mode::Pass);
    restored.wait_for_promotion();
    assert_eq!(restored.sql("SELECT count(*) FROM t"), expected);
}
