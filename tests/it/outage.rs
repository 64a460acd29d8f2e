//! The store goes away, hangs, is slow or cuts connections. PostgreSQL goes on (I8), a recovery waits and never ends
//! early (I5), and whatever was interrupted is taken up again.

use std::{
    fs,
    time::{Duration, Instant},
};

use crate::support::{Look, Mode, Postgres, Repository, Scratch, Sidecar, Wire, command, run, wait_until};

const PATIENCE: Duration = Duration::from_secs(90);

/// A server that archives to S3 through a proxy; 1 MB segments, so that there are many.
fn archiving_through_a_proxy(scratch: &Scratch) -> (Postgres, Sidecar, Repository, Wire) {
    archiving_through_a_proxy_with(scratch, 15)
}

fn archiving_through_a_proxy_with(scratch: &Scratch, major: u32) -> (Postgres, Sidecar, Repository, Wire) {
    let repository = Repository::s3();
    let Repository::S3(server) = &repository else { unreachable!("it's on S3") };
    let proxy = Wire::to(&server.address());
    let mut postgres = Postgres::initdb(scratch, major, &["--wal-segsize=1"]);
    let mut sidecar = Sidecar::new(scratch, &postgres, &repository);
    sidecar.through(&proxy);
    let settings = sidecar.archive_settings();
    postgres.configure(&settings.iter().map(String::as_str).collect::<Vec<_>>());
    postgres.configure(&["wal_keep_size = 1GB"]);
    postgres.start(&[]);
    sidecar.start();
    (postgres, sidecar, repository, proxy)
}

/// Rows that don't compress: about a megabyte of WAL for each 10,000.
fn insert(postgres: &Postgres, rows: u32) {
    postgres.sql(&format!("INSERT INTO t SELECT n, gen_random_uuid() FROM generate_series(1, {rows}) n"));
}

fn ready(postgres: &Postgres) -> usize {
    let entries = fs::read_dir(postgres.data.join("pg_wal/archive_status")).unwrap();
    entries.filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().ends_with(".ready")).count()
}

/// A recovery to the end of the archive, the case in which an early end wouldn't even be noticed.
fn recovery_through(outage: Mode) {
    let scratch = Scratch::new();
    let (postgres, sidecar, _repository, proxy) = archiving_through_a_proxy(&scratch);
    postgres.sql("CREATE TABLE t (n int, u uuid)");
    sidecar.ok(&["backup", "create", "--fast"]);
    (0..6).for_each(|_| insert(&postgres, 20_000));
    postgres.switch_wal();
    postgres.wait_until_archived();
    let expected = postgres.sql("SELECT count(*) FROM t");
    let to = scratch.path().join("restored");
    sidecar.ok(&["restore", "run", "--to", to.to_str().unwrap()]);
    proxy.set(Mode::Delay(Duration::from_millis(10)));
    let mut restored = Postgres::on(&scratch, to, 15);
    restored.spawn(&["-c", "archive_mode=off"]);
    let fetched = |restored: &Postgres| restored.log().matches("restored log file").count();
    wait_until("some segments are replayed", PATIENCE, || fetched(&restored) >= 2);
    proxy.set(outage);
    let before = fetched(&restored);
    if outage == Mode::BlackHole {
        // What hangs has no sign; the request is on its way, and stays there.
        wait_until("the helper waits", PATIENCE, || helpers_at_work(&scratch));
        std::thread::sleep(Duration::from_secs(3));
    } else {
        wait_until("the helper waits for the store", PATIENCE, || restored.log().contains("trying again"));
    }
    assert!(restored.exited().is_none(), "{}", restored.log());
    // One that was under way, and those that had been fetched ahead.
    assert!(fetched(&restored) <= before + 1 + 6);
    let log = restored.log();
    assert!(!log.contains("archive recovery complete") && !log.contains("selected new timeline"), "{log}");
    // Whoever asks by hand is told that it can't be told.
    if outage == Mode::Refuse {
        let (status, body) = sidecar.curl("/v1/wal/0000000100000000000000FE", &[]);
        assert_eq!(status, 503, "{body}");
        assert!(body.contains("store_unavailable"), "{body}");
    }
    proxy.set(Mode::Pass);
    restored.wait_for_promotion();
    assert_eq!(restored.sql("SELECT count(*) FROM t"), expected);
}

fn helpers_at_work(scratch: &Scratch) -> bool {
    let restored = scratch.path().join("restored");
    fs::read_dir("/proc").unwrap().flatten().any(|process| {
        let is_helper = fs::read(process.path().join("cmdline")).is_ok_and(|line| {
            let line = String::from_utf8_lossy(&line).into_owned();
            line.contains("pgsidecar-wal") && line.contains("restore")
        });
        is_helper && fs::read_link(process.path().join("cwd")).is_ok_and(|cwd| cwd == restored)
    })
}

#[test]
fn a_recovery_waits_for_a_store_that_is_gone_and_ends_only_at_the_end_of_the_archive_pg15() {
    recovery_through(Mode::Refuse);
}

#[test]
fn a_recovery_waits_for_a_store_that_hangs_and_ends_only_at_the_end_of_the_archive_pg15() {
    recovery_through(Mode::BlackHole);
}

/// A data directory from which a server has ended in order, whose daemon knows that the repository has timelines 2 and
/// 3, and that nobody has ever asked for them.
fn standby_that_knows_of_timeline_3(scratch: &Scratch, major: u32) -> (Postgres, Sidecar, Repository, Wire) {
    let (mut postgres, mut sidecar, repository, proxy) = archiving_through_a_proxy_with(scratch, major);
    for (name, text) in HISTORIES {
        assert_eq!(sidecar.put(name, text.as_bytes()).status, 200, "{name}");
    }
    postgres.stop("fast");
    sidecar.stop();
    fs::write(postgres.data.join("standby.signal"), "").unwrap();
    sidecar.start();
    wait_until("it looks for them", PATIENCE, || !proxy.requests("GET", "/00000002.history.zst").is_empty());
    // The oldest is looked for last.
    wait_until("it has them", PATIENCE, || !proxy.requests("GET", "/00000001.history.zst").is_empty());
    (postgres, sidecar, repository, proxy)
}

const HISTORIES: [(&str, &str); 2] =
    [("00000002.history", "1\t0/F000000\tx\n"), ("00000003.history", "1\t0/F000000\tx\n2\t0/FF00000\tx\n")];

/// The helper's exit code, how long it took, and what it has left.
fn restore(postgres: &Postgres, sidecar: &Sidecar, name: &str) -> (Option<i32>, Duration, String) {
    let to = postgres.data.join("pg_wal/RECOVERYHISTORY");
    fs::remove_file(&to).ok();
    let began = Instant::now();
    let timeout = if postgres.data.join("standby.signal").exists() { "60" } else { "2" };
    let output = sidecar.wal(postgres, &["restore", "--timeout", timeout, name, "pg_wal/RECOVERYHISTORY"]);
    (output.status.code(), began.elapsed(), fs::read_to_string(to).unwrap_or_default())
}

#[test]
fn in_an_outage_a_standby_and_nobody_else_gets_the_histories_that_were_seen_before_pg15() {
    let scratch = Scratch::new();
    let (postgres, sidecar, _repository, proxy) = standby_that_knows_of_timeline_3(&scratch, 15);
    for outage in [Mode::Refuse, Mode::BlackHole] {
        proxy.set(outage);
        if outage == Mode::Refuse {
            assert_eq!(sidecar.ask("GET", "/v1/wal/00000004.history?standby=yes").code(), "store_unavailable");
            assert_eq!(sidecar.get("00000003.history").code(), "store_unavailable");
        }
        for (name, text) in HISTORIES {
            let (code, took, found) = restore(&postgres, &sidecar, name);
            assert_eq!((code, found.as_str()), (Some(0), text), "{outage:?} {name}");
            assert!(took < Duration::from_secs(9), "{took:?}");
        }
        // What wasn't seen can't be told, and neither can a segment.
        for name in ["00000004.history", "000000010000000000000001"] {
            let (code, took, _) = restore(&postgres, &sidecar, name);
            assert!(code == Some(1) && took < Duration::from_secs(12), "{outage:?} {name} {code:?} {took:?}");
        }
        fs::remove_file(postgres.data.join("standby.signal")).unwrap();
        assert_eq!(restore(&postgres, &sidecar, "00000003.history").0, Some(200), "{outage:?}: it waits");
        fs::write(postgres.data.join("standby.signal"), "").unwrap();
    }
    // The store's word counts as soon as it can be had.
    proxy.set(Mode::Pass);
    assert_eq!(sidecar.ask("GET", "/v1/wal/00000004.history?standby=yes").code(), "not_in_archive");
    assert_eq!(sidecar.ask("GET", "/v1/wal/00000003.history?standby=no").code(), "invalid_request");
}

fn a_standby_that_is_started_in_an_outage_begins_a_timeline_behind_those_that_were_seen_before(major: u32) {
    let scratch = Scratch::new();
    let (mut postgres, sidecar, _repository, proxy) = standby_that_knows_of_timeline_3(&scratch, major);
    proxy.set(Mode::Refuse);
    let restore = format!("{} --address 127.0.0.1:{} restore %f %p", Sidecar::helper().display(), sidecar.port);
    postgres.configure(&[&format!("restore_command = '{restore}'")]);
    postgres.start(&[]);
    let log = postgres.log();
    assert!(log.contains("restored log file \"00000003.history\" from archive"), "{log}");
    assert_eq!(postgres.sql("SELECT pg_promote()"), "t");
    postgres.wait_for_promotion();
    assert!(postgres.log().contains("selected new timeline ID: 4"), "{}", postgres.log());
    let history = String::from_utf8(postgres.wal_file("00000004.history")).unwrap();
    assert!(history.starts_with(HISTORIES[1].1), "{history}");
}

#[test]
fn a_standby_that_is_started_in_an_outage_begins_a_timeline_behind_those_that_were_seen_before_pg15() {
    a_standby_that_is_started_in_an_outage_begins_a_timeline_behind_those_that_were_seen_before(15);
}

#[test]
fn a_standby_that_is_started_in_an_outage_begins_a_timeline_behind_those_that_were_seen_before_pg17() {
    a_standby_that_is_started_in_an_outage_begins_a_timeline_behind_those_that_were_seen_before(17);
}

#[test]
fn during_an_outage_postgresql_goes_on_the_pod_stays_ready_and_the_backlog_drains_by_itself_pg15() {
    let scratch = Scratch::new();
    let (mut postgres, sidecar, repository, proxy) = archiving_through_a_proxy(&scratch);
    postgres.sql("CREATE TABLE t (n int, u uuid)");
    postgres.switch_wal();
    postgres.wait_until_archived();
    proxy.set(Mode::Refuse);
    for _ in 0..5 {
        insert(&postgres, 10_000);
        postgres.switch_wal();
    }
    let problems = || sidecar.json(&["status"])["problems"].to_string();
    wait_until("the status tells of it", PATIENCE, || problems().contains("store_unavailable"));
    assert!(ready(&postgres) >= 5);
    assert_eq!(sidecar.json(&["status"])["archive"]["backlog_files"], ready(&postgres));
    let url = format!("http://127.0.0.1:{}/readyz", sidecar.health_port);
    assert_eq!(run(command("curl").args(["-sS", "-o", "/dev/null", "-w", "%{http_code}", &url])), "200");
    assert_eq!(postgres.sql("SELECT count(*) FROM t"), "50000");
    let why = sidecar.fails(69, &["backup", "create", "--fast"]);
    assert!(why.contains("store"), "{why}");
    proxy.set(Mode::Pass);
    // Nobody does anything.
    postgres.wait_until_archived();
    assert!(postgres.exited().is_none());
    let look = Look::into(&repository);
    for entry in fs::read_dir(postgres.data.join("pg_wal/archive_status")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let name = name.strip_suffix(".done").unwrap();
        assert!(look.wal(name).unwrap() == fs::read(postgres.data.join("pg_wal").join(name)).unwrap(), "{name}");
    }
    wait_until("the status is clean", PATIENCE, || problems() == "[]");
    assert!(sidecar.log().contains("archiving works again"));
}

#[test]
fn a_slow_store_makes_a_backup_slow_and_nothing_else_pg15() {
    let scratch = Scratch::new();
    let (postgres, sidecar, _repository, proxy) = archiving_through_a_proxy(&scratch);
    postgres.sql("CREATE TABLE t (n int, u uuid)");
    insert(&postgres, 30_000);
    proxy.set(Mode::Delay(Duration::from_millis(15)));
    sidecar.ok(&["backup", "create", "--fast"]);
    postgres.switch_wal();
    postgres.wait_until_archived();
    let to = scratch.path().join("restored");
    sidecar.ok(&["restore", "run", "--to", to.to_str().unwrap()]);
    let mut restored = Postgres::on(&scratch, to, 15);
    restored.spawn(&["-c", "archive_mode=off"]);
    restored.wait_for_promotion();
    assert_eq!(restored.sql("SELECT count(*) FROM t"), "30000");
}

#[test]
fn uploads_and_downloads_that_are_cut_in_the_middle_are_taken_up_again_pg15() {
    let scratch = Scratch::new();
    let (postgres, sidecar, repository, proxy) = archiving_through_a_proxy(&scratch);
    postgres.sql("CREATE TABLE t (n int, u uuid)");
    insert(&postgres, 60_000);
    postgres.wait_until_archived();

    // A segment on its way up.
    proxy.set(Mode::CutUploads { after: 150_000, times: 2 });
    insert(&postgres, 10_000);
    let name = postgres.switch_wal();
    postgres.wait_until_archived();
    assert_eq!(proxy.cuts(), 2);
    let look = Look::into(&repository);
    let ours = fs::read(postgres.data.join("pg_wal").join(&name)).unwrap();
    assert!(look.wal(&name).unwrap() == ours);

    // The parts of a backup on their way up.
    proxy.set(Mode::CutUploads { after: 700_000, times: 2 });
    sidecar.ok(&["backup", "create", "--fast"]);
    assert_eq!(proxy.cuts(), 4);
    look.check_all_whole();

    // A segment on its way down, a full one.
    postgres.switch_wal();
    insert(&postgres, 1);
    let name = postgres.sql("SELECT pg_walfile_name(pg_current_wal_insert_lsn())");
    insert(&postgres, 30_000);
    postgres.switch_wal();
    postgres.wait_until_archived();
    let ours = fs::read(postgres.data.join("pg_wal").join(&name)).unwrap();
    proxy.set(Mode::CutDownloads { after: 60_000, times: 3 });
    let back = scratch.path().join("back");
    let (status, _) = sidecar.curl(&format!("/v1/wal/{name}"), &["-o", back.to_str().unwrap()]);
    assert_eq!((status, proxy.cuts()), (200, 7));
    assert!(fs::read(&back).unwrap() == ours);

    // The parts of a backup on their way down.
    proxy.set(Mode::CutDownloads { after: 400_000, times: 3 });
    let to = scratch.path().join("restored");
    sidecar.ok(&["restore", "run", "--to", to.to_str().unwrap()]);
    assert_eq!(proxy.cuts(), 10);
    let mut restored = Postgres::on(&scratch, to, 15);
    restored.start(&["-c", "archive_mode=off"]);
    restored.wait_for_promotion();
    assert_eq!(restored.sql("SELECT count(*) FROM t"), "100001");
}

#[test]
fn a_backup_or_restore_that_is_cut_again_and_again_fails_cleanly_pg15() {
    let scratch = Scratch::new();
    let (postgres, sidecar, repository, proxy) = archiving_through_a_proxy(&scratch);
    postgres.sql("CREATE TABLE t (n int, u uuid)");
    insert(&postgres, 60_000);
    postgres.wait_until_archived();
    proxy.set(Mode::CutUploads { after: 700_000, times: u32::MAX });
    let why = sidecar.fails(69, &["backup", "create", "--fast"]);
    assert!(why.contains("the store"), "{why}");
    proxy.set(Mode::Pass);
    assert_eq!(sidecar.json(&["backup", "list"]), serde_json::json!([]));
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgsidecar'";
    wait_until("PostgreSQL holds nothing", PATIENCE, || postgres.sql(sessions) == "0");

    sidecar.ok(&["backup", "create", "--fast"]);
    let look = Look::into(&repository);
    assert_eq!(look.matching("/started.json").len(), 1, "the failed one was removed");
    proxy.set(Mode::CutDownloads { after: 100_000, times: u32::MAX });
    let to = scratch.path().join("restored");
    let why = sidecar.fails(69, &["restore", "run", "--to", to.to_str().unwrap()]);
    assert!(why.contains("part-0000"), "it says what could not be read: {why}");
    assert!(!to.exists(), "nothing is left");
    proxy.set(Mode::Pass);
    sidecar.ok(&["restore", "run", "--to", to.to_str().unwrap()]);
}
