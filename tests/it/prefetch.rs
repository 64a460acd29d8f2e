//! WAL on its way back, fetched ahead and handed over: each file once, whole, and never a guess about what isn't there.

use std::{fs, os::unix::fs::MetadataExt, path::Path, thread, time::Duration};

use crate::support::{
    Postgres, Repository, Scratch, Sidecar, Wire, beside, command, give_to_servers, restoring::text, run, told,
    wait_until,
};

const MB: u32 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);
/// What the helper writes to when the file has to be sent.
const SENT_FILE: &str = "pg_wal/RECOVERYXLOG.pgsidecar-tmp";

fn through_a_proxy(scratch: &Scratch, major: u32) -> (Postgres, Sidecar, Repository, Wire) {
    let repository = Repository::s3();
    let Repository::S3(server) = &repository else { panic!("it's on S3") };
    let proxy = Wire::to(&server.address());
    let (postgres, mut sidecar) = beside(scratch, major, &["--wal-segsize=1"], &repository);
    sidecar.through(&proxy);
    (postgres, sidecar, repository, proxy)
}

fn name(timeline: u32, segment: u32) -> String {
    format!("{timeline:08X}00000000{segment:08X}")
}

/// A daemon whose archive holds these segments of timeline 1, and that has been asked for nothing.
fn holding(scratch: &Scratch, segments: impl IntoIterator<Item = u32>) -> (Postgres, Sidecar, Repository, Wire) {
    let (postgres, mut sidecar, repository, proxy) = through_a_proxy(scratch, 15);
    sidecar.start();
    for segment in segments {
        put(&postgres, &sidecar, &name(1, segment));
    }
    proxy.forget_requests();
    (postgres, sidecar, repository, proxy)
}

fn put(postgres: &Postgres, sidecar: &Sidecar, name: &str) {
    assert_eq!(sidecar.put(name, &content(postgres, name)).status, 200);
}

/// A segment that differs from all others.
fn content(postgres: &Postgres, name: &str) -> Vec<u8> {
    let seed = name.bytes().fold(7, |seed: u64, byte| seed.wrapping_mul(31).wrapping_add(byte.into()));
    postgres.segment(name, MB, seed)
}

#[track_caller]
fn asked(postgres: &Postgres, sidecar: &Sidecar, name: &str) {
    let answer = sidecar.get(name);
    assert_eq!(answer.status, 200, "{name}: {answer:?}");
    assert!(answer.body == content(postgres, name), "{name}");
}

/// How often a segment was asked for at the store.
fn fetched(proxy: &Wire, name: &str) -> usize {
    proxy.requests("GET", &format!("/{name}.zst")).len()
}

/// A server with a table, and a copy of it from before 35 segments of WAL, which are in the archive alone. The copy has
/// come to lie where the server was, and recovers to the end of the archive when it's started.
fn to_recover(scratch: &Scratch, major: u32) -> (Postgres, Sidecar, Repository, Wire) {
    let (mut postgres, mut sidecar, repository, proxy) = through_a_proxy(scratch, major);
    postgres.configure(&sidecar.archive_settings().iter().map(String::as_str).collect::<Vec<_>>());
    postgres.start(&[]);
    postgres.sql("CREATE TABLE t (n int)");
    postgres.sql("CHECKPOINT");
    postgres.stop("immediate");
    let copy = scratch.path().join("copy");
    run(command("cp").arg("-a").arg(&postgres.data).arg(&copy));
    postgres.start(&[]);
    sidecar.start();
    postgres.sql(
        "DO $$ BEGIN FOR i IN 1..35 LOOP INSERT INTO t SELECT n FROM generate_series(1, 1000) n; \
         PERFORM pg_switch_wal(); END LOOP; END $$",
    );
    postgres.switch_wal();
    postgres.wait_until_archived();
    postgres.stop("immediate");
    fs::remove_dir_all(&postgres.data).unwrap();
    fs::rename(copy, &postgres.data).unwrap();
    fs::remove_file(postgres.data.join("postmaster.pid")).ok();
    let helper = Sidecar::helper();
    let restore = format!("{} --address 127.0.0.1:{} --timeout 20 restore %f %p", helper.display(), sidecar.port);
    postgres.configure(&[&format!("restore_command = '{restore}'"), "archive_mode = off"]);
    fs::write(postgres.data.join("recovery.signal"), "").unwrap();
    proxy.forget_requests();
    (postgres, sidecar, repository, proxy)
}

/// The segments that recovery got out of the archive.
fn restored(postgres: &Postgres) -> Vec<String> {
    let log = postgres.log();
    let lines = log.lines().filter_map(|line| line.split_once("restored log file \"")?.1.get(..24));
    lines.map(str::to_owned).filter(|name| !name.contains('.')).collect()
}

/// Each segment was fetched as often as PostgreSQL asked for it: the last one it reads again at the end of recovery.
fn fetched_once(proxy: &Wire, segments: &[String]) {
    for segment in segments {
        let times = segments.iter().filter(|other| *other == segment).count();
        assert_eq!(times, if Some(segment) == segments.last() { 2 } else { 1 }, "{segment}");
        assert_eq!(fetched(proxy, segment), times, "{segment}");
    }
}

fn a_recovery_gets_each_segment_handed_over_and_fetches_it_once(major: u32) {
    let scratch = Scratch::new();
    let (mut postgres, sidecar, _repository, proxy) = to_recover(&scratch, major);
    // What had to be sent could not be written.
    fs::create_dir(postgres.data.join(SENT_FILE)).unwrap();
    postgres.start(&[]);
    postgres.wait_for_promotion();
    assert_eq!(postgres.sql("SELECT count(*) FROM t"), "35000");
    let segments = restored(&postgres);
    assert!(segments.len() >= 35, "{segments:?}");
    fetched_once(&proxy, &segments);
    assert_eq!(postgres.wal_files("pgsidecar-spool"), [""; 0], "{}", sidecar.log());
}

#[test]
fn a_recovery_gets_each_segment_handed_over_and_fetches_it_once_pg15() {
    a_recovery_gets_each_segment_handed_over_and_fetches_it_once(15);
}

#[test]
fn a_recovery_gets_each_segment_handed_over_and_fetches_it_once_pg17() {
    a_recovery_gets_each_segment_handed_over_and_fetches_it_once(17);
}

#[test]
fn a_recovery_outlives_a_daemon_that_is_killed_in_the_middle_pg15() {
    let scratch = Scratch::new();
    let (mut postgres, mut sidecar, _repository, proxy) = to_recover(&scratch, 15);
    proxy.hold("GET", "000000000000001A.zst");
    postgres.spawn(&[]);
    proxy.wait_for_held();
    let orphan = postgres.data.join("pg_wal/pgsidecar-spool.1.1");
    fs::write(&orphan, "handed over, and not taken").unwrap();
    give_to_servers(&orphan);
    sidecar.kill();
    proxy.release();
    thread::sleep(Duration::from_secs(2));
    assert!(postgres.exited().is_none(), "{}", postgres.log());
    sidecar.start();
    postgres.wait_for_promotion();
    assert_eq!(postgres.sql("SELECT count(*) FROM t"), "35000");
    assert_eq!(postgres.wal_files("pgsidecar"), [""; 0]);
}

#[test]
fn with_a_spool_elsewhere_files_are_sent_pg17() {
    let scratch = Scratch::new();
    let (mut postgres, mut sidecar, _repository, proxy) = to_recover(&scratch, 17);
    sidecar.kill();
    let spool = scratch.dir("spool");
    sidecar.set("PGSIDECAR_SPOOL", text(&spool));
    sidecar.start();
    postgres.start(&[]);
    postgres.wait_for_promotion();
    assert_eq!(postgres.sql("SELECT count(*) FROM t"), "35000");
    fetched_once(&proxy, &restored(&postgres));
    assert_eq!((postgres.wal_files("pgsidecar"), fs::read_dir(&spool).unwrap().count()), (Vec::new(), 0));
    let inode = fs::metadata(postgres.data.join("pg_wal")).unwrap().ino();
    let answer = sidecar.ask("GET", &format!("/v1/wal/{}?directory={inode}", name(1, 5)));
    assert_eq!((answer.status, answer.body.len()), (200, MB as usize), "{}", answer.head);
}

#[test]
fn who_asks_in_order_finds_the_next_fetched_already_pg15() {
    let scratch = Scratch::new();
    let (postgres, sidecar, _repository, proxy) = holding(&scratch, 0x10..0x20);
    for segment in 0x10..0x14 {
        asked(&postgres, &sidecar, &name(1, segment));
    }
    let ahead = name(1, 0x15);
    wait_until("it is fetched ahead", PATIENCE, || fetched(&proxy, &ahead) == 1);
    for segment in 0x14..0x20 {
        asked(&postgres, &sidecar, &name(1, segment));
    }
    for segment in 0x10..0x20 {
        assert_eq!(fetched(&proxy, &name(1, segment)), 1, "{segment:X}");
    }
}

#[test]
fn who_asks_backwards_gets_what_was_asked_for_and_nothing_ahead_pg15() {
    let scratch = Scratch::new();
    let (postgres, sidecar, _repository, proxy) = holding(&scratch, 0x10..0x20);
    for segment in (0x11..0x1E).rev() {
        asked(&postgres, &sidecar, &name(1, segment));
    }
    thread::sleep(Duration::from_millis(500));
    for segment in 0x10..0x20 {
        let expected = usize::from((0x11..0x1E).contains(&segment));
        assert_eq!(fetched(&proxy, &name(1, segment)), expected, "{segment:X}");
    }
}

#[test]
fn what_was_missing_ahead_is_looked_for_again_when_it_is_asked_for_pg15() {
    let scratch = Scratch::new();
    let (postgres, sidecar, _repository, proxy) = holding(&scratch, 0x10..0x13);
    for segment in 0x10..0x13 {
        asked(&postgres, &sidecar, &name(1, segment));
    }
    let next = name(1, 0x13);
    wait_until("it is looked for ahead", PATIENCE, || fetched(&proxy, &next) == 1);
    put(&postgres, &sidecar, &next);
    asked(&postgres, &sidecar, &next);
}

#[test]
fn what_was_missing_for_one_who_left_is_looked_for_again_pg15() {
    let scratch = Scratch::new();
    let (postgres, sidecar, _repository, proxy) = holding(&scratch, [0x10]);
    let next = name(1, 0x20);
    asked(&postgres, &sidecar, &name(1, 0x10));
    proxy.hold_answer("GET", &next);
    let asking = sidecar.begin("GET", &format!("/v1/wal/{next}"));
    proxy.wait_for_held();
    drop(asking);
    proxy.release();
    wait_until("the store has said that it isn't there", PATIENCE, || fetched(&proxy, &next) == 2);
    thread::sleep(Duration::from_millis(500));
    put(&postgres, &sidecar, &next);
    asked(&postgres, &sidecar, &next);
}

#[test]
fn a_failure_ahead_fails_nobody_pg15() {
    let scratch = Scratch::new();
    let (postgres, sidecar, _repository, proxy) = holding(&scratch, 0x10..0x18);
    // Not tried again by itself.
    proxy.refuse("GET", &name(1, 0x13), 1);
    for segment in 0x10..0x13 {
        asked(&postgres, &sidecar, &name(1, segment));
    }
    wait_until("it failed ahead", PATIENCE, || fetched(&proxy, &name(1, 0x13)) == 1);
    for segment in 0x13..0x18 {
        asked(&postgres, &sidecar, &name(1, segment));
    }
    assert_eq!(fetched(&proxy, &name(1, 0x13)), 2);
}

#[test]
fn across_a_timeline_switch_each_timeline_s_own_segments_are_served_pg15() {
    let scratch = Scratch::new();
    let (postgres, sidecar, _repository, _proxy) = holding(&scratch, 0x10..0x1A);
    for segment in 0x13..0x18 {
        put(&postgres, &sidecar, &name(2, segment));
    }
    // As a recovery asks whose target is timeline 2, which began in segment 13.
    for segment in 0x10..0x13 {
        asked(&postgres, &sidecar, &name(1, segment));
    }
    for segment in 0x13..0x18 {
        asked(&postgres, &sidecar, &name(2, segment));
    }
    assert_eq!(sidecar.get(&name(2, 0x18)).code(), "not_in_archive");
    asked(&postgres, &sidecar, &name(1, 0x18));
    assert_eq!(sidecar.get(&name(2, 0x19)).code(), "not_in_archive");
}

#[test]
fn all_who_ask_for_one_segment_at_a_time_get_the_whole_of_it_pg15() {
    let scratch = Scratch::new();
    let (postgres, sidecar, _repository, proxy) = holding(&scratch, 0x10..0x12);
    proxy.hold("GET", &name(1, 0x10));
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| asked(&postgres, &sidecar, &name(1, 0x10)));
        }
        proxy.wait_for_held();
        proxy.release();
    });
    // A file is given away once.
    let inode = fs::metadata(postgres.data.join("pg_wal")).unwrap().ino();
    let answer = sidecar.ask("GET", &format!("/v1/wal/{}?directory={inode}", name(1, 0x10)));
    let file = answer.head.lines().find_map(|line| line.strip_prefix("pgsidecar-file: ")).unwrap();
    assert!(answer.body.is_empty() && postgres.wal_file(file) == content(&postgres, &name(1, 0x10)));
    asked(&postgres, &sidecar, &name(1, 0x10));
}

/// Whether the daemon holds a file in this directory open.
fn spools_into(sidecar: &Sidecar, directory: &Path) -> bool {
    let open = fs::read_dir(format!("/proc/{}/fd", sidecar.pid())).unwrap().flatten();
    open.filter_map(|fd| fs::read_link(fd.path()).ok()).any(|target| target.parent() == Some(directory))
}

#[test]
fn what_goes_to_another_directory_is_not_spooled_into_the_pg_wal_of_the_living_server_pg15() {
    let scratch = Scratch::new();
    let (postgres, sidecar, _repository, proxy) = holding(&scratch, [0x10, 0x20, 0x30]);
    let (pg_wal, elsewhere) = (postgres.data.join("pg_wal"), scratch.dir("elsewhere"));
    let inode = |path: &Path| fs::metadata(path).unwrap().ino();
    for (segment, query, expected) in [
        (0x10, format!("?directory={}", inode(&elsewhere)), false),
        (0x20, String::new(), false),
        (0x30, format!("?directory={}", inode(&pg_wal)), true),
    ] {
        let name = name(1, segment);
        proxy.hold_answer("GET", &format!("/{name}.zst"));
        thread::scope(|scope| {
            let asking = scope.spawn(|| sidecar.ask("GET", &format!("/v1/wal/{name}{query}")));
            proxy.wait_for_held();
            let spooled = spools_into(&sidecar, &pg_wal);
            proxy.release();
            let answer = asking.join().unwrap();
            assert_eq!((answer.status, spooled), (200, expected), "{query}");
            assert_eq!(answer.body.is_empty(), expected, "{query}");
        });
    }
    assert_eq!(postgres.wal_files("pgsidecar-spool").len(), 1);
}

#[test]
fn a_line_of_curl_fetches_a_whole_file_pg15() {
    let scratch = Scratch::new();
    let (postgres, sidecar, _repository, _proxy) = holding(&scratch, [0x10]);
    let to = scratch.path().join("fetched");
    let url = format!("http://127.0.0.1:{}/v1/wal/{}", sidecar.port, name(1, 0x10));
    run(command("curl").args(["-fsS", "-o", text(&to), &url]));
    assert!(fs::read(&to).unwrap() == content(&postgres, &name(1, 0x10)));
    let url = format!("http://127.0.0.1:{}/v1/wal/{}", sidecar.port, name(1, 0x11));
    let missing = command("curl").args(["-fsS", "-o", text(&to), &url]).output().unwrap();
    assert_eq!(missing.status.code(), Some(22), "{}", told(&missing));
}

fn pg_rewind_finds_in_the_archive_what_is_gone_from_pg_wal(major: u32) {
    let scratch = Scratch::new();
    let (mut former, mut sidecar, _repository, proxy) = through_a_proxy(&scratch, major);
    former.configure(&sidecar.archive_settings().iter().map(String::as_str).collect::<Vec<_>>());
    former.configure(&["wal_log_hints = on"]);
    former.start(&[]);
    sidecar.start();
    former.sql("CREATE TABLE t (n int)");
    let data = scratch.path().join("promoted");
    run(former.client("pg_basebackup").args(["-c", "fast", "-X", "stream", "--no-sync", "-R", "-D"]).arg(&data));
    let mut promoted = Postgres::on(&scratch, data, major);
    promoted.start(&["-c", "archive_mode=off"]);
    promoted.sql("SELECT pg_promote()");
    promoted.wait_for_promotion();
    promoted.sql("INSERT INTO t VALUES (2)");
    promoted.sql("CHECKPOINT");

    // The former primary goes its own way, for some segments.
    former.sql(
        "DO $$ BEGIN FOR i IN 1..8 LOOP INSERT INTO t VALUES (1); PERFORM pg_switch_wal(); END LOOP; END $$; CHECKPOINT",
    );
    former.switch_wal();
    former.wait_until_archived();
    former.stop("fast");
    for name in former.wal_files("00000001").iter().filter(|name| former.is_marked(name, "done")) {
        fs::remove_file(former.data.join("pg_wal").join(name)).unwrap();
    }
    let restore = format!("{} --address 127.0.0.1:{} restore %f %p", Sidecar::helper().display(), sidecar.port);
    former.configure(&[&format!("restore_command = '{restore}'")]);
    let source = format!("host={} port={} user=postgres dbname=postgres", promoted.socket.display(), promoted.port);
    let mut rewind = command(Postgres::bin(major).join("pg_rewind"));
    rewind.args(["-c", "--no-sync", "-D"]).arg(&former.data).args(["--source-server", &source]);
    let output = rewind.current_dir(scratch.path()).output().unwrap();
    assert!(output.status.success(), "{}\n{}", told(&output), sidecar.log());
    assert!(proxy.requests("GET", "/wal/00000001/").len() > 4, "it found its WAL elsewhere");
    former.configure(&["archive_mode = off", &format!("primary_conninfo = '{source}'")]);
    fs::write(former.data.join("standby.signal"), "").unwrap();
    former.start(&[]);
    wait_until("it follows the promoted one", PATIENCE, || {
        former.try_sql("SELECT string_agg(n::text, ' ') FROM t").is_ok_and(|rows| rows == "2")
    });
    assert_eq!(former.wal_files("pgsidecar"), [""; 0]);
}

#[test]
fn pg_rewind_finds_in_the_archive_what_is_gone_from_pg_wal_pg15() {
    pg_rewind_finds_in_the_archive_what_is_gone_from_pg_wal(15);
}

#[test]
fn pg_rewind_finds_in_the_archive_what_is_gone_from_pg_wal_pg17() {
    pg_rewind_finds_in_the_archive_what_is_gone_from_pg_wal(17);
}
