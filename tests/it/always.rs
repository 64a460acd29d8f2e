//! Standbys that archive on their own account, promotions, timelines and segments of every size.

use std::{fs, thread, time::Duration};

use crate::support::{
    Look, Postgres, Repository, Scratch, Sidecar, archiving, archiving_with, beside, command, free_port,
    restoring::{back_up, restored},
    run, wait_until,
};

const MB: u32 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

/// A standby of this server that archives everything it receives through a sidecar of its own, under the cluster name
/// `standby`.
fn archiving_standby(scratch: &Scratch, primary: &Postgres, repository: &Repository) -> (Postgres, Sidecar) {
    let data = scratch.path().join("standby");
    run(primary.client("pg_basebackup").args(["-c", "fast", "-X", "stream", "--no-sync", "-R", "-D"]).arg(&data));
    let mut standby = Postgres::on(scratch, data, primary.major);
    standby.port = free_port();
    let mut sidecar = Sidecar::another(scratch, "beside-standby", &standby, repository);
    sidecar.set("PGSIDECAR_CLUSTER", "standby");
    sidecar.set("PGPORT", &standby.port.to_string());
    standby.configure(&sidecar.archive_settings().iter().map(String::as_str).collect::<Vec<_>>());
    standby.configure(&["archive_mode = always", "wal_keep_size = 256MB"]);
    standby.start(&["-c", "listen_addresses=127.0.0.1"]);
    sidecar.start();
    (standby, sidecar)
}

/// Waits until the standby has replayed all that the primary has written.
fn in_step(primary: &Postgres, standby: &Postgres) {
    let lsn = primary.sql("SELECT pg_current_wal_lsn()");
    wait_until("the standby has replayed it", PATIENCE, || {
        standby.sql(&format!("SELECT pg_last_wal_replay_lsn() >= '{lsn}'")) == "t"
    });
}

/// What becomes of the primary.
#[derive(Clone, Copy, PartialEq)]
enum End {
    Killed,
    /// In order: the standby's last segment holds the shutdown checkpoint.
    Stopped,
}

fn a_promoted_standby_archives_what_it_received_in_part_apart_from_the_whole(major: u32, end: End) {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (mut primary, sidecar) = archiving(&scratch, major, &["--wal-segsize=1"], &repository);
    primary.sql("CREATE TABLE t (n int)");
    let (mut standby, mut beside_standby) = archiving_standby(&scratch, &primary, &repository);
    back_up(&sidecar);
    // The backup of a standby ends with the WAL that it needs, which the primary writes.
    let backup = thread::scope(|scope| {
        let backup = scope.spawn(|| back_up(&beside_standby));
        while !backup.is_finished() {
            primary.switch_wal();
            thread::sleep(Duration::from_millis(200));
        }
        backup.join().unwrap()
    });
    // Records of all lengths, some of several pages, through the ends of some thirty segments.
    primary.sql(
        "CREATE TABLE filler AS SELECT n, (SELECT string_agg(md5(i::text || n), '') FROM generate_series(1, n % 300) i) \
         FROM generate_series(1, 5000) n; CREATE INDEX ON filler (n); DELETE FROM filler WHERE n % 3 = 0",
    );
    let name = primary.switch_wal();
    wait_until("the standby archives", PATIENCE, || standby.is_marked(&name, "done"));
    primary.wait_until_archived();
    let look = Look::into(&repository);
    let whole = look.all_wal("standby");
    // Before that are those that came with the copy.
    let first = whole.keys().find(|name| name.len() == 24).unwrap();
    let sent =
        standby.wal_files("00000001").into_iter().filter(|sent| sent.len() == 24 && (first..=&name).contains(&sent));
    let sent: Vec<String> = sent.collect();
    assert!(sent.len() > 25, "{sent:?}");
    for sent in sent {
        assert!(whole.contains_key(&sent), "{sent} is whole: {:?}", whole.keys());
    }
    primary.sql("INSERT INTO t VALUES (1)");
    in_step(&primary, &standby);
    match end {
        End::Killed => primary.kill(),
        End::Stopped => primary.stop("fast"),
    }
    if end == End::Stopped {
        wait_until("the standby has lost its primary", PATIENCE, || standby.log().contains("terminated by primary"));
    }
    standby.sql("SELECT pg_promote()");
    standby.wait_for_promotion();
    standby.sql("INSERT INTO t VALUES (2)");
    let after = standby.switch_wal();
    standby.sql("INSERT INTO t VALUES (3)");
    let last = standby.switch_wal();
    for name in [&after, &last] {
        assert!(name.starts_with("00000002"), "{name}");
        wait_until("everything after drains", PATIENCE, || standby.is_marked(name, "done"));
    }
    standby.wait_until_archived();
    assert!(!standby.log().contains("archive command failed"), "{}\n{}", standby.log(), beside_standby.log());

    let archived = look.all_wal("standby");
    let partial: Vec<_> = archived.keys().filter(|name| name.contains(".partial.")).collect();
    assert!(!partial.is_empty(), "{:?}", archived.keys());
    let began_in = |name: &&String| name.starts_with("00000002") && name.len() == 24;
    let switch = &archived.keys().find(|name| began_in(name)).unwrap()[8..];
    let whole = format!("00000001{switch}");
    assert!(
        !archived.contains_key(&whole),
        "the segment of the old timeline in which the new one begins is no whole one"
    );
    // What both have is the same.
    let of_primary = look.all_wal("main");
    for (name, content) in archived.iter().filter(|(name, _)| of_primary.contains_key(*name) && name.len() == 24) {
        assert!(of_primary[name] == *content, "{name}");
    }

    beside_standby.stop();
    standby.stop("fast");
    fs::remove_dir_all(&standby.data).unwrap();
    beside_standby.start();
    let server = restored(&scratch, &beside_standby, major, "latest", &["--backup", &backup]);
    assert_eq!(server.sql("SELECT string_agg(n::text, ' ' ORDER BY n) FROM t"), "1 2 3");
}

#[test]
fn a_standby_whose_primary_was_killed_archives_on_and_restores_to_the_latest_pg15() {
    a_promoted_standby_archives_what_it_received_in_part_apart_from_the_whole(15, End::Killed);
}

#[test]
fn a_standby_whose_primary_was_stopped_archives_on_and_restores_to_the_latest_pg15() {
    a_promoted_standby_archives_what_it_received_in_part_apart_from_the_whole(15, End::Stopped);
}

#[test]
fn a_standby_whose_primary_was_killed_archives_on_and_restores_to_the_latest_pg17() {
    a_promoted_standby_archives_what_it_received_in_part_apart_from_the_whole(17, End::Killed);
}

/// A standby that follows another one when that is promoted is the case in which PostgreSQL itself hands over a segment
/// that isn't complete: it marks what it has of the old timeline's last one.
#[test]
fn what_a_standby_has_of_the_old_timeline_s_last_segment_is_acknowledged_and_kept_apart_pg17() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (mut primary, _sidecar) = archiving(&scratch, 17, &["--wal-segsize=1"], &repository);
    primary.sql("CREATE TABLE t (n int)");
    let data = scratch.path().join("first");
    run(primary.client("pg_basebackup").args(["-c", "fast", "-X", "stream", "--no-sync", "-R", "-D"]).arg(&data));
    let mut first = Postgres::on(&scratch, data, 17);
    first.start(&["-c", "archive_mode=off"]);
    first.configure(&["archive_mode = off"]);
    let (standby, beside_standby) = archiving_standby(&scratch, &first, &repository);
    let segment = primary.sql("INSERT INTO t VALUES (1) RETURNING pg_walfile_name(pg_current_wal_insert_lsn())");
    in_step(&primary, &standby);
    primary.kill();
    first.sql("SELECT pg_promote()");
    first.wait_for_promotion();
    first.sql("INSERT INTO t VALUES (2)");
    let next = first.switch_wal();
    wait_until("the standby archives what comes after", PATIENCE, || standby.is_marked(&next, "done"));
    assert!(standby.is_marked(&segment, "done"), "{:?}", standby.wal_files(""));
    assert!(!standby.log().contains("archive command failed"), "{}", standby.log());
    let archived = Look::into(&repository).all_wal("standby");
    assert!(archived[&next] == first.wal_file(&next));
    assert!(!archived.contains_key(&segment), "under its own name it would stand in the way of the whole");
    let part = archived.keys().find(|name| name.starts_with(&format!("{segment}.partial.")));
    assert!(archived[part.unwrap()] == standby.wal_file(&segment));
    assert_eq!(beside_standby.get(&segment).code(), "not_in_archive");
}

/// Archived as they come, fetched back by the helper, and by a recovery.
fn segments_of_a_size_come_back_identical(size: u32) {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (mut postgres, mut sidecar) = beside(&scratch, 15, &[&format!("--wal-segsize={size}")], &repository);
    postgres.configure(&sidecar.archive_settings().iter().map(String::as_str).collect::<Vec<_>>());
    let sizes = [format!("min_wal_size = {}MB", 2 * size), format!("max_wal_size = {}MB", 4 * size.max(64))];
    postgres.configure(&[&sizes[0], &sizes[1], &format!("wal_keep_size = {}MB", 3 * size)]);
    postgres.start(&[]);
    sidecar.start();
    if size < 1024 {
        back_up(&sidecar);
    }
    postgres.sql("CREATE TABLE t AS SELECT n, sha512(n::text::bytea) FROM generate_series(1, 5000) n");
    let names: Vec<String> = (0..if size < 1024 { 3 } else { 1 }).map(|_| postgres.switch_wal()).collect();
    for name in &names {
        wait_until("it is archived", Duration::from_secs(120), || postgres.is_marked(name, "done"));
        let output = sidecar.wal(&postgres, &["restore", name, "fetched"]);
        assert!(output.status.success(), "{output:?}");
        let fetched = postgres.data.join("fetched");
        assert_eq!(fs::metadata(&fetched).unwrap().len(), u64::from(size) * u64::from(MB));
        run(command("cmp").arg(&fetched).arg(postgres.data.join("pg_wal").join(name)));
        fs::remove_file(fetched).unwrap();
    }
    if size < 1024 {
        postgres.stop("fast");
        sidecar.stop();
        fs::remove_dir_all(&postgres.data).unwrap();
        sidecar.start();
        let server = restored(&scratch, &sidecar, 15, "latest", &[]);
        assert_eq!(server.sql("SELECT count(*) FROM t"), "5000");
        assert!(server.log().contains(&format!("restored log file \"{}\"", names[2])), "{}", server.log());
    }
}

#[test]
fn segments_of_1_mb_come_back_identical_pg15() {
    segments_of_a_size_come_back_identical(1);
}

#[test]
fn segments_of_16_mb_come_back_identical_pg15() {
    segments_of_a_size_come_back_identical(16);
}

#[test]
fn segments_of_64_mb_come_back_identical_pg15() {
    segments_of_a_size_come_back_identical(64);
}

#[test]
fn a_segment_of_1_gb_comes_back_identical_pg15() {
    segments_of_a_size_come_back_identical(1024);
}

#[test]
fn timelines_beyond_the_ninth_are_archived_and_restored_along_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (mut postgres, sidecar) = archiving_with(&scratch, 15, &["--wal-segsize=1"], &repository, &[]);
    back_up(&sidecar);
    let helper = Sidecar::helper();
    let command =
        format!("restore_command = '{} --address 127.0.0.1:{} restore %f %p'", helper.display(), sidecar.port);
    postgres.configure(&[&command]);
    postgres.sql("CREATE TABLE t AS SELECT 1 AS n");
    for timeline in 2..=11 {
        postgres.stop("fast");
        fs::write(postgres.data.join("standby.signal"), "").unwrap();
        postgres.start(&[]);
        postgres.sql("SELECT pg_promote()");
        postgres.wait_for_promotion();
        postgres.sql(&format!("INSERT INTO t VALUES ({timeline})"));
        assert!(postgres.switch_wal().starts_with(&format!("{timeline:08X}")));
    }
    postgres.wait_until_archived();
    let look = Look::into(&repository);
    for timeline in ["0000000A", "0000000B"] {
        let history = look.all_wal("main").remove(&format!("{timeline}.history")).unwrap();
        let lines = String::from_utf8(history).unwrap().lines().filter(|line| !line.is_empty()).count();
        assert_eq!(lines, usize::from_str_radix(timeline, 16).unwrap() - 1);
        assert!(!look.matching(&format!("/wal/{timeline}/{timeline}00000000/{timeline}")).is_empty());
    }
    for (name, target, rows) in [("latest", &[][..], 11), ("tenth", &["--target-timeline", "10"], 10)] {
        let server = restored(&scratch, &sidecar, 15, name, target);
        assert_eq!(
            server.sql("SELECT string_agg(n::text, ' ' ORDER BY n) FROM t"),
            (1..=rows).map(|n| n.to_string()).collect::<Vec<_>>().join(" ")
        );
    }
}

#[test]
fn partial_segments_of_two_promoted_standbys_are_both_kept_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (mut primary, sidecar) = archiving(&scratch, 15, &["--wal-segsize=1"], &repository);
    primary.sql("CREATE TABLE t (n int)");
    let mut standbys: Vec<Postgres> = Vec::new();
    for name in ["first", "second"] {
        let data = scratch.path().join(name);
        run(primary.client("pg_basebackup").args(["-c", "fast", "-X", "stream", "--no-sync", "-R", "-D"]).arg(&data));
        let mut standby = Postgres::on(&scratch, data, 15);
        standby.start(&["-c", "archive_mode=always"]);
        standbys.push(standby);
    }
    // One of them gets more of the segment than the other.
    let segment = primary.sql("INSERT INTO t VALUES (1) RETURNING pg_walfile_name(pg_current_wal_insert_lsn())");
    in_step(&primary, &standbys[0]);
    standbys[0].stop("fast");
    primary.sql("INSERT INTO t VALUES (2)");
    in_step(&primary, &standbys[1]);
    primary.kill();
    standbys[0].start(&["-c", "archive_mode=always"]);
    for (n, standby) in standbys.iter_mut().enumerate() {
        let mut beside_it = Sidecar::another(&scratch, &format!("beside-{n}"), standby, &repository);
        beside_it.start();
        let lines = beside_it.archive_settings();
        standby.configure(&[&lines[1]]);
        standby.sql("SELECT pg_reload_conf()");
        standby.sql("SELECT pg_promote()");
        standby.wait_for_promotion();
        let partial = format!("{segment}.partial");
        // Whose timeline it is, is another matter: the second one's history and segments are refused.
        let output = beside_it.wal(standby, &["archive", &format!("pg_wal/{partial}")]);
        assert!(output.status.success(), "{output:?}");
    }
    let kept = Look::into(&repository).matching(&format!("/{segment}.partial."));
    assert_eq!(kept.len(), 2, "{kept:?}");
    drop(sidecar);
}
