//! Backups of servers that do what servers do: promoted in the middle, busy, with their pages in memory or not.

use std::{
    fs::{self, File},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::fs::{Advice, fadvise};

use crate::{
    chains::{SUMMARIZED, take},
    support::{
        Postgres, Repository, Scratch, Sidecar,
        restoring::{AS_A_COPY, archiving_configured, back_up, restore, restored, ship_wal},
        run, told, wait_until,
    },
};

const SMALL_WAL: &[&str] = &["--wal-segsize=1"];
const PATIENCE: Duration = Duration::from_secs(60);

/// Begins a backup that reads so much in a second, and waits until it reads.
fn begin(sidecar: &Sidecar, rate: &str) -> Child {
    let mut create = sidecar.command(Sidecar::program());
    let create = create.args(["backup", "create", "--fast", "--max-rate", rate]);
    let create = create.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("files are being read", PATIENCE, || {
        let job = &sidecar.json(&["status"])["last_job"];
        job["outcome"].is_null() && job["bytes"].as_u64().is_some_and(|bytes| bytes > 1 << 20)
    });
    create
}

fn a_promotion_in_the_middle_ends_a_standby_s_backup_and_leaves_nothing(major: u32) {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (primary, sidecar) = archiving_configured(&scratch, major, SMALL_WAL, &repository, &[]);
    let directory = scratch.path().join("standby");
    run(primary.client("pg_basebackup").args(["-c", "fast", "-X", "stream", "--no-sync", "-R", "-D"]).arg(&directory));
    let mut standby = Postgres::on(&scratch, directory, major);
    let mut beside = Sidecar::another(&scratch, "beside-standby", &standby, &repository);
    standby.configure(&beside.archive_settings().iter().map(String::as_str).collect::<Vec<_>>());
    standby.start(&[]);
    beside.set("PGSIDECAR_BACKUP_WAL_TIMEOUT", "30s");
    beside.start();
    let create = begin(&beside, "4MB");
    standby.sql("SELECT pg_promote()");
    let ended = create.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(69), "{}", told(&ended));
    assert!(told(&ended).contains("the standby was promoted during online backup"), "{}", told(&ended));
    assert_eq!(beside.json(&["backup", "list"]), serde_json::json!([]));
    let left = fs::read_dir(scratch.path().join("repository")).unwrap().count();
    assert!(left > 0, "there is WAL");
    let system = primary.sql("SELECT system_identifier FROM pg_control_system()");
    let backups = scratch.path().join("repository/main").join(system).join("backups");
    assert_eq!(fs::read_dir(backups).map_or(0, Iterator::count), 0, "remains");
    // The sidecar of a standby asks how far it has replayed, in a session of its own.
    let in_backup =
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgsidecar' AND query ~ 'backup_st'";
    wait_until("no session is left that holds a backup", PATIENCE, || standby.sql(in_backup) == "0");
    // On its own timeline it can be backed up as any.
    let id = back_up(&beside);
    assert_eq!(beside.json(&["backup", "show", &id])["timeline"], 2);
    drop(sidecar);
}

#[test]
fn a_promotion_in_the_middle_ends_a_standby_s_backup_and_leaves_nothing_pg15() {
    a_promotion_in_the_middle_ends_a_standby_s_backup_and_leaves_nothing(15);
}

#[test]
fn a_promotion_in_the_middle_ends_a_standby_s_backup_and_leaves_nothing_pg17() {
    a_promotion_in_the_middle_ends_a_standby_s_backup_and_leaves_nothing(17);
}

#[test]
fn a_backup_reads_no_faster_than_it_may_and_says_how_long_it_takes_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (_postgres, sidecar) = archiving_configured(&scratch, 15, SMALL_WAL, &repository, &[]);
    let began = Instant::now();
    let create = begin(&sidecar, "2MB");
    wait_until("it's known how fast it goes", PATIENCE, || {
        let job = &sidecar.json(&["status"])["last_job"];
        let rate = job["estimate"]["bytes_per_second"].as_u64();
        assert!(job["outcome"].is_null(), "it has ended: {job}");
        job["phase"] == "reading"
            && rate.is_some_and(|rate| (1_000_000..=3_000_000).contains(&rate))
            && job["estimate"]["seconds_left"].as_u64().is_some_and(|seconds| (2..60).contains(&seconds))
    });
    let ended = create.wait_with_output().unwrap();
    assert!(ended.status.success(), "{}", told(&ended));
    let record = &sidecar.json(&["backup", "list"])[0];
    let (took, bytes) = (began.elapsed().as_secs_f64(), record["restored_bytes"].as_f64().unwrap());
    assert!(took > bytes / f64::from(2 << 20) * 0.9, "{bytes} bytes in {took} s");
    // Nobody watches: a line now and then.
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    let line = said.lines().find(|line| line.contains(" of about ")).unwrap_or_else(|| panic!("{said}"));
    assert!(line.contains("MB/s, ") || line.contains("kB/s, "), "{line}");
    assert!(!said.contains('\u{1b}') && !said.contains('\r'), "{said:?}");
    sidecar.fails(2, &["backup", "create", "--max-rate", "31kB"]);
}

/// How many bytes of a file are in the page cache.
fn cached(path: &Path) -> u64 {
    let output = Command::new("fincore").args(["--bytes", "--noheadings", "--output", "RES"]).arg(path).output();
    String::from_utf8(output.unwrap().stdout).unwrap().trim().parse().unwrap()
}

#[test]
fn the_database_s_page_cache_is_left_as_it_was_pg17() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (mut postgres, sidecar) = archiving_configured(&scratch, 17, SMALL_WAL, &repository, &["autovacuum = off"]);
    let path = |table: &str| postgres.data.join(postgres.sql(&format!("SELECT pg_relation_filepath('{table}')")));
    for table in ["hot", "cold", "lukewarm"] {
        postgres.sql(&format!("CREATE TABLE {table} AS SELECT repeat('x', 500) FROM generate_series(1, 40000)"));
        postgres.sql(&format!("VACUUM (FREEZE) {table}"));
    }
    let (hot, cold, lukewarm) = (path("hot"), path("cold"), path("lukewarm"));
    postgres.stop("fast");
    postgres.start(&[]);
    let size = fs::metadata(&hot).unwrap().len();
    assert!(size > 20 << 20);
    let drop_from_cache = |path: &Path, length| {
        let file = File::open(path).unwrap();
        file.sync_all().unwrap();
        fadvise(&file, 0, std::num::NonZeroU64::new(length), Advice::DontNeed).unwrap();
    };
    fs::read(&hot).unwrap();
    fs::read(&lukewarm).unwrap();
    drop_from_cache(&cold, size);
    drop_from_cache(&lukewarm, size / 2);
    let before = (cached(&hot), cached(&cold), cached(&lukewarm));
    assert_eq!((before.0, before.1), (size, 0), "what is to be seen");
    assert!(before.2 > size / 4 && before.2 < size * 3 / 4, "{before:?}");
    back_up(&sidecar);
    let after = (cached(&hot), cached(&cold), cached(&lukewarm));
    // The kernel may take a page of its own accord: one of 22 MB was seen to go.
    assert!(after.0 > size - size / 100, "what was there stays: {after:?} of {size}");
    assert!(after.1 < size / 20, "what wasn't isn't: {after:?}");
    assert!(after.2.abs_diff(before.2) < size / 20, "{before:?} {after:?}");
}

#[test]
fn databases_and_their_load_go_on_in_the_middle_of_a_slow_backup_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (postgres, sidecar) = archiving_configured(&scratch, 15, SMALL_WAL, &repository, &[]);
    postgres.sql("CREATE TABLE t AS SELECT n FROM generate_series(1, 100000) n");
    postgres.sql("CREATE TABLE shrinks AS SELECT repeat('x', 500) FROM generate_series(1, 20000)");
    postgres.sql("CREATE DATABASE goes");
    let create = begin(&sidecar, "5MB");
    for statement in [
        "DROP DATABASE goes",
        "CREATE DATABASE comes",
        "TRUNCATE shrinks",
        "INSERT INTO t SELECT n FROM generate_series(1, 100000) n",
        "CREATE TABLE new AS SELECT n FROM generate_series(1, 1000) n",
        "VACUUM FULL t",
    ] {
        postgres.sql(statement);
    }
    assert!(create.wait_with_output().unwrap().status.success());
    ship_wal(&postgres);
    let copy = restored(&scratch, &sidecar, 15, "copy", &[]);
    for sql in [
        "SELECT count(*), sum(n) FROM t",
        "SELECT count(*) FROM shrinks",
        "SELECT count(*) FROM new",
        "SELECT string_agg(datname, ' ' ORDER BY datname) FROM pg_database",
    ] {
        assert_eq!(copy.sql(sql), postgres.sql(sql), "{sql}");
    }
    run(copy.client("pg_amcheck").args(["--install-missing", "--heapallindexed"]));
}

/// A relation in two files, of which the second is changed, shortened and grows again.
#[test]
fn a_relation_of_more_than_a_gigabyte_is_whole_in_a_chain_pg17() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (postgres, sidecar) = archiving_configured(&scratch, 17, &["--data-checksums"], &repository, SUMMARIZED);
    // A row to a page, most of which stays empty: 131,072 pages are a file's.
    postgres.sql("CREATE TABLE big (n int, t text) WITH (fillfactor = 10)");
    postgres.sql("ALTER TABLE big ALTER t SET STORAGE PLAIN");
    postgres.sql("INSERT INTO big SELECT n, repeat('x', 700) FROM generate_series(1, 131500) n");
    // Otherwise the first to read it marks each row as committed, and so changes every page.
    postgres.sql("VACUUM (FREEZE) big");
    let path = postgres.sql("SELECT pg_relation_filepath('big')");
    let second = postgres.data.join(format!("{path}.1"));
    assert!(second.exists(), "it has {} pages", postgres.sql("SELECT pg_relation_size('big') / 8192"));
    take(&sidecar, "full");
    postgres.sql("UPDATE big SET t = repeat('y', 600) WHERE n IN (7, 131100, 131499)");
    let first = take(&sidecar, "incremental");
    let record = sidecar.json(&["backup", "show", &first]);
    let stored: u64 = record["parts"].as_array().unwrap().iter().map(|part| part["file_bytes"].as_u64().unwrap()).sum();
    assert!(stored < 64 << 20, "{stored}");
    assert!(record["restored_bytes"].as_u64().unwrap() > 1 << 30, "{record}");
    // The second file goes, and comes again.
    postgres.sql("DELETE FROM big WHERE ctid >= '(130000,0)'");
    postgres.sql("VACUUM (TRUNCATE) big");
    postgres.sql("INSERT INTO big SELECT n, repeat('z', 700) FROM generate_series(200001, 202000) n");
    assert!(fs::metadata(&second).unwrap().len() > 0);
    take(&sidecar, "incremental");
    ship_wal(&postgres);
    let to = restore(&scratch, &sidecar, "copy", &[]);
    run(postgres.client("pg_verifybackup").arg("-n").arg(&to));
    let mut copy = Postgres::on(&scratch, to, 17);
    copy.spawn(AS_A_COPY);
    copy.wait_for_promotion();
    let sum = "SELECT count(*), sum(n), count(DISTINCT left(t, 1)), pg_relation_size('big') FROM big";
    assert_eq!(copy.sql(sum), postgres.sql(sum));
    assert_eq!(sidecar.json(&["backup", "list"]).as_array().unwrap().len(), 3);
}
