//! Look-ahead: what PostgreSQL has marked `.ready` is archived before it asks, or without it ever asking.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use crate::support::{
    Look, Mode, Postgres, Repository, Scratch, Sidecar, Wire, archiving, beside, command, give_to_servers, run, told,
    wait_until,
};

const MB: u32 = 1 << 20;
const NAME: &str = "000000010000000000000005";
const PATIENCE: Duration = Duration::from_secs(60);

/// A data directory with segments of 1 MB, whose server doesn't run, and a daemon for it behind a proxy. Running.
fn idle(scratch: &Scratch, repository: &Repository) -> (Postgres, Sidecar, Wire) {
    let Repository::S3(server) = repository else { panic!("it's on S3") };
    let proxy = Wire::to(&server.address());
    let (postgres, mut sidecar) = beside(scratch, 15, &["--wal-segsize=1"], repository);
    sidecar.through(&proxy);
    sidecar.start();
    (postgres, sidecar, proxy)
}

/// The segments that are marked, either way, in their order.
fn marked(postgres: &Postgres, state: &str) -> Vec<String> {
    let names = fs::read_dir(postgres.data.join("pg_wal/archive_status")).unwrap();
    let mut names: Vec<_> = names
        .filter_map(|entry| {
            let name = entry.unwrap().file_name().into_string().unwrap();
            name.strip_suffix(state)?.strip_suffix('.').map(str::to_owned)
        })
        .collect();
    names.sort();
    names
}

fn archived_files(sidecar: &Sidecar) -> usize {
    sidecar.metric("pgsidecar_archived_files_total").parse().unwrap()
}

fn what_postgresql_does_not_ask_for_is_archived_and_its_question_answered_from_memory(major: u32) {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let Repository::S3(server) = &repository else { panic!("it's on S3") };
    let proxy = Wire::to(&server.address());
    let (mut postgres, mut sidecar) = beside(&scratch, major, &["--wal-segsize=1"], &repository);
    postgres.configure(&["archive_mode = on", "archive_command = '/bin/false'"]);
    postgres.start(&[]);
    sidecar.through(&proxy);
    sidecar.start();
    let names: Vec<String> = (0..12).map(|_| postgres.switch_wal()).collect();
    wait_until("all of it is archived", PATIENCE, || archived_files(&sidecar) >= names.len());
    let look = Look::into(&repository);
    let archived = look.all_wal("main");
    for name in &names {
        assert!(archived[name] == postgres.wal_file(name), "{name}");
        assert!(postgres.is_marked(name, "ready"), "archive_status is PostgreSQL's");
    }

    // Without the store nothing could be archived, nor could it be looked up whether it is.
    proxy.set(Mode::Refuse);
    let times = names.iter().map(|name| {
        let began = Instant::now();
        let output = sidecar.wal(&postgres, &["archive", &format!("pg_wal/{name}")]);
        assert_eq!(output.status.code(), Some(0), "{}", told(&output));
        began.elapsed()
    });
    let mut times: Vec<Duration> = times.collect();
    times.sort();
    assert!(times[times.len() / 2] < Duration::from_millis(100), "{times:?}");
}

#[test]
fn what_postgresql_does_not_ask_for_is_archived_and_its_question_answered_from_memory_pg15() {
    what_postgresql_does_not_ask_for_is_archived_and_its_question_answered_from_memory(15);
}

#[test]
fn what_postgresql_does_not_ask_for_is_archived_and_its_question_answered_from_memory_pg17() {
    what_postgresql_does_not_ask_for_is_archived_and_its_question_answered_from_memory(17);
}

#[test]
fn a_file_that_was_changed_since_is_not_acknowledged_from_memory_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (postgres, sidecar, _proxy) = idle(&scratch, &repository);
    let (first, second) = (postgres.segment(NAME, MB, 1), postgres.segment(NAME, MB, 2));
    postgres.lay(NAME, &first);
    postgres.mark(NAME, "ready");
    wait_until("it is archived ahead", PATIENCE, || archived_files(&sidecar) == 1);
    assert_eq!(sidecar.post(NAME).status, 200);

    // The same file, the same size, other bytes.
    fs::write(postgres.data.join("pg_wal").join(NAME), &second).unwrap();
    let answer = sidecar.post(NAME);
    assert_eq!((answer.status, answer.code().as_str()), (409, "conflict"), "{answer:?}");
    for bytes in [&first, &second] {
        let hash = pgsidecar_core::ContentId::of(bytes).sha256.to_string();
        assert!(answer.text().contains(&hash[..8]), "{hash} in {}", answer.text());
    }
    assert!(sidecar.get(NAME).body == first);
}

#[test]
fn a_question_about_what_is_being_uploaded_ahead_waits_for_that_upload_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (postgres, sidecar, proxy) = idle(&scratch, &repository);
    let bytes = postgres.segment(NAME, MB, 1);
    proxy.hold("PUT", NAME);
    postgres.lay(NAME, &bytes);
    postgres.mark(NAME, "ready");
    proxy.wait_for_held();
    thread::scope(|scope| {
        let asked = scope.spawn(|| sidecar.post(NAME));
        thread::sleep(Duration::from_secs(1));
        assert!(!asked.is_finished(), "the store hasn't acknowledged it");
        assert_eq!(proxy.held(), 1, "one upload for both");
        proxy.release();
        let answer = asked.join().unwrap();
        assert_eq!(answer.status, 200, "{answer:?}");
        assert!(answer.text().contains("\"already_archived\":false"), "{answer:?}");
    });
    assert_eq!(proxy.requests("PUT", NAME).len(), 1);
    assert!(sidecar.get(NAME).body == bytes);
}

#[test]
fn a_file_that_is_gone_from_pg_wal_is_acknowledged_only_if_the_archive_has_it_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (postgres, mut sidecar, proxy) = idle(&scratch, &repository);
    postgres.lay(NAME, &postgres.segment(NAME, MB, 1));
    assert_eq!(sidecar.post(NAME).status, 200);
    // A killed daemon remembers nothing, and PostgreSQL has recycled the segment.
    sidecar.kill();
    fs::remove_file(postgres.data.join("pg_wal").join(NAME)).unwrap();
    sidecar.start();
    let helper = |name: &str| sidecar.wal(&postgres, &["archive", &format!("pg_wal/{name}")]);
    assert_eq!(helper(NAME).status.code(), Some(0), "{}", told(&helper(NAME)));

    let never = "0000000100000000000000F0";
    let refused = helper(never);
    assert_eq!(refused.status.code(), Some(1));
    assert!(told(&refused).contains(&format!("{never} is not in pg_wal")), "{}", told(&refused));
    assert_eq!((sidecar.post(never).status, sidecar.post(never).code().as_str()), (404, "not_found"));
    // Where the store can't tell, nothing is acknowledged.
    proxy.set(Mode::Refuse);
    assert_eq!(sidecar.post(NAME).status, 503);
}

#[test]
fn what_only_another_copy_of_the_database_has_in_pg_wal_is_not_acknowledged_to_it_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (postgres, sidecar, _proxy) = idle(&scratch, &repository);
    postgres.lay(NAME, &postgres.segment(NAME, MB, 1));
    assert_eq!(sidecar.post(NAME).status, 200);
    fs::remove_file(postgres.data.join("pg_wal").join(NAME)).unwrap();
    // A clone of the volume: its server asks the wrong daemon for a segment of its own.
    let copy = scratch.path().join("copy");
    run(command("cp").arg("-a").arg(&postgres.data).arg(&copy));
    let clone = Postgres::on(&scratch, copy, 15);
    clone.lay(NAME, &postgres.segment(NAME, MB, 2));
    let refused = sidecar.wal(&clone, &["archive", &format!("pg_wal/{NAME}")]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(told(&refused).contains("another copy"), "{}", told(&refused));
}

fn the_segment_in_writing_is_refused_both_ways_and_archived_once_it_is_complete(major: u32) {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (postgres, sidecar) = archiving(&scratch, major, &["--wal-segsize=1"], &repository);
    let name = postgres.sql("SELECT pg_walfile_name(pg_create_restore_point('now'))");
    for answer in [sidecar.post(&name), sidecar.put(&name, &postgres.wal_file(&name))] {
        assert_eq!((answer.status, answer.code().as_str()), (422, "invalid_segment"), "{answer:?}");
        assert!(answer.text().contains("is not finished"), "{answer:?}");
    }
    let refused = sidecar.wal(&postgres, &["archive", &format!("pg_wal/{name}")]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(told(&refused).contains("is not finished"), "{}", told(&refused));
    assert_eq!(sidecar.get(&name).code(), "not_in_archive");

    postgres.sql("SELECT pg_switch_wal()");
    wait_until("it is archived", PATIENCE, || postgres.is_marked(&name, "done"));
    assert!(sidecar.get(&name).body == postgres.wal_file(&name));
}

#[test]
fn the_segment_in_writing_is_refused_both_ways_and_archived_once_it_is_complete_pg15() {
    the_segment_in_writing_is_refused_both_ways_and_archived_once_it_is_complete(15);
}

#[test]
fn the_segment_in_writing_is_refused_both_ways_and_archived_once_it_is_complete_pg17() {
    the_segment_in_writing_is_refused_both_ways_and_archived_once_it_is_complete(17);
}

/// A library that takes inotify away, as a kernel does whose limits are exhausted.
fn without_inotify(scratch: &Scratch) -> String {
    let (source, library) = (scratch.path().join("no.c"), scratch.path().join("no.so"));
    fs::write(
        &source,
        "#include <errno.h>\nint inotify_init1(int flags) { (void)flags; errno = EMFILE; return -1; }\n",
    )
    .unwrap();
    run(command("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source));
    library.display().to_string()
}

#[test]
fn without_inotify_the_directory_is_looked_at_every_few_seconds_pg15() {
    let scratch = Scratch::new();
    let (postgres, mut sidecar) = beside(&scratch, 15, &["--wal-segsize=1"], &Repository::directory(&scratch));
    sidecar.set("LD_PRELOAD", &without_inotify(&scratch));
    sidecar.start();
    wait_until("it is told", PATIENCE, || sidecar.log().contains("no notice of new WAL from the kernel"));
    for name in [NAME, "000000010000000000000006"] {
        postgres.lay(name, &postgres.segment(name, MB, 1));
        postgres.mark(name, "ready");
        wait_until("it is archived", Duration::from_secs(10), || sidecar.get(name).status == 200);
    }
}

#[test]
fn a_directory_that_replaced_archive_status_is_looked_at_pg15() {
    let scratch = Scratch::new();
    let (postgres, mut sidecar) = beside(&scratch, 15, &["--wal-segsize=1"], &Repository::directory(&scratch));
    sidecar.start();
    let status = postgres.data.join("pg_wal/archive_status");
    fs::rename(&status, scratch.path().join("old_status")).unwrap();
    fs::create_dir(&status).unwrap();
    give_to_servers(&status);
    postgres.lay(NAME, &postgres.segment(NAME, MB, 1));
    postgres.mark(NAME, "ready");
    wait_until("it is archived", Duration::from_secs(10), || sidecar.get(NAME).status == 200);
}

/// 300 segments wait when the daemon comes.
fn a_backlog_drains(major: u32, killed: bool) {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (mut postgres, mut sidecar) = beside(&scratch, major, &["--wal-segsize=1"], &repository);
    postgres.configure(&sidecar.archive_settings().iter().map(String::as_str).collect::<Vec<_>>());
    postgres.configure(&["wal_keep_size = 1GB", "max_wal_size = 2GB"]);
    postgres.start(&[]);
    postgres.sql(
        "CREATE TABLE t (n int, u uuid); \
         DO $$ BEGIN FOR i IN 1..300 LOOP INSERT INTO t SELECT i, gen_random_uuid() FROM generate_series(1, 50); \
         PERFORM pg_switch_wal(); END LOOP; END $$",
    );
    let names = marked(&postgres, "ready");
    assert!(names.len() >= 300, "{}", names.len());
    sidecar.start();
    if killed {
        wait_until("some are archived", PATIENCE, || archived_files(&sidecar) >= 60);
        sidecar.kill();
        assert!(marked(&postgres, "ready").len() > 100, "it was in the middle");
        sidecar.start();
    }
    // It asks again at the next segment, or after a minute.
    postgres.switch_wal();
    wait_until("all are archived", PATIENCE, || marked(&postgres, "ready").is_empty());
    let archived = Look::into(&repository).all_wal("main");
    for name in &names {
        assert!(archived.get(name) == Some(&postgres.wal_file(name)), "{name}");
    }
}

#[test]
fn a_backlog_of_300_segments_drains_pg17() {
    a_backlog_drains(17, false);
}

#[test]
fn a_backlog_of_300_segments_drains_though_the_daemon_is_killed_in_the_middle_pg15() {
    a_backlog_drains(15, true);
}

#[test]
fn a_backlog_of_thousands_that_postgresql_does_not_ask_for_is_archived_to_the_last_pg15() {
    let scratch = Scratch::new();
    let (postgres, mut sidecar) = beside(&scratch, 15, &[], &Repository::directory(&scratch));
    for n in 1..=2_500 {
        let name = format!("{NAME}.{n:08X}.backup");
        postgres.lay(&name, b"START WAL LOCATION: 0/5000028 (file 000000010000000000000005)\n");
        postgres.mark(&name, "ready");
    }
    sidecar.start();
    wait_until("all of it is archived", PATIENCE, || archived_files(&sidecar) == 2_500);
}

#[test]
fn a_store_that_denies_everything_is_not_stormed_with_the_backlog_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (postgres, sidecar, proxy) = idle(&scratch, &repository);
    proxy.refuse("PUT", "/wal/", u32::MAX);
    for n in 0x10..0x40 {
        let name = format!("0000000100000000000000{n:02X}");
        postgres.lay(&name, &postgres.segment(&name, MB, n));
        postgres.mark(&name, "ready");
    }
    thread::sleep(Duration::from_secs(4));
    let asked = proxy.requests("PUT", "/wal/").len();
    assert!((1..=32).contains(&asked), "{asked} uploads in four seconds");
    proxy.refuse("PUT", "/wal/", 0);
    wait_until("all of it is archived", PATIENCE, || archived_files(&sidecar) == 48);
}
