//! What a backup brings along: settings, signal files, tablespaces. None of it may lead the restored server astray.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    path::Path,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};

use crate::support::{
    Postgres, Repository, Scratch, Sidecar, command,
    restoring::{AS_A_COPY, archiving_configured, back_up, restore, restored, ship_wal, text},
    run, wait_until,
};

/// Everything about recovery that a server may have been left with.
const LEFT_BEHIND: &[&str] = &[
    "restore_command = 'exit 200'",
    "recovery_target_time = '2020-01-01 00:00:00+00'",
    "recovery_target_name = 'nowhere'",
    "recovery_target_timeline = '77'",
    "recovery_target_inclusive = off",
    "recovery_target_action = 'shutdown'",
    "recovery_end_command = 'touch the-end'",
    "archive_cleanup_command = 'touch cleaned'",
    "recovery_min_apply_delay = '1h'",
    "primary_conninfo = 'host=/nowhere user=nobody'",
    "primary_slot_name = 'a_slot'",
];

fn settings_and_signal_files_of_a_backup_do_not_count(major: u32) {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (postgres, sidecar) = archiving_configured(&scratch, major, &["--wal-segsize=1"], &repository, &[]);
    postgres.sql("CREATE TABLE rows (n int)");
    postgres.sql("ALTER SYSTEM SET work_mem = '7MB'");
    // In both files; the server was never restarted with them.
    postgres.configure(LEFT_BEHIND);
    let mut auto = OpenOptions::new().append(true).open(postgres.data.join("postgresql.auto.conf")).unwrap();
    for line in LEFT_BEHIND.iter().map(|line| line.replace("_time = '2020-01-01 00:00:00+00'", "_xid = '3'")) {
        writeln!(auto, "{line}").unwrap();
    }
    for signal in ["standby.signal", "recovery.signal"] {
        fs::write(postgres.data.join(signal), "").unwrap();
    }
    back_up(&sidecar);
    postgres.sql("INSERT INTO rows VALUES (1)");
    let xid = postgres.sql("INSERT INTO rows VALUES (2) RETURNING pg_current_xact_id()");
    postgres.sql("INSERT INTO rows VALUES (3)");
    ship_wal(&postgres);

    for (name, arguments, expected) in
        [("latest", &[][..], "1 2 3"), ("xid", &["--target-xid", &xid], "1 2"), ("lsn", &["--target-immediate"], "")]
    {
        let copy = restored(&scratch, &sidecar, major, name, arguments);
        assert_eq!(copy.sql("SELECT string_agg(n::text, ' ' ORDER BY n) FROM rows"), expected, "{}", copy.log());
        assert_eq!(copy.sql("SHOW work_mem"), "7MB", "what isn't about recovery stays");
        for trace in ["the-end", "cleaned", "standby.signal", "recovery.signal"] {
            assert!(!copy.data.join(trace).exists(), "{name}: {trace}");
        }
    }
}

#[test]
fn settings_and_signal_files_of_a_backup_do_not_count_pg15() {
    settings_and_signal_files_of_a_backup_do_not_count(15);
}

#[test]
fn settings_and_signal_files_of_a_backup_do_not_count_pg17() {
    settings_and_signal_files_of_a_backup_do_not_count(17);
}

#[test]
fn a_backup_of_a_streaming_standby_is_restored_and_promotes_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (primary, sidecar) = archiving_configured(&scratch, 15, &["--wal-segsize=1"], &repository, &[]);
    primary.sql("CREATE TABLE rows AS SELECT 1 AS n");
    let directory = scratch.path().join("standby");
    run(primary.client("pg_basebackup").args(["-c", "fast", "-X", "stream", "--no-sync", "-R", "-D"]).arg(&directory));
    let mut standby = Postgres::on(&scratch, directory, 15);
    standby.start(&[]);
    wait_until("the standby streams", Duration::from_secs(30), || {
        primary.sql("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'") == "1"
    });
    let mut beside_standby = Sidecar::another(&scratch, "beside-standby", &standby, &repository);
    beside_standby.set("PGSIDECAR_BACKUP_WAL_TIMEOUT", "2s");
    beside_standby.start();

    // Nobody switches the segment that the standby's pages reach into: said, and nothing is listed.
    primary.sql("INSERT INTO rows VALUES (0)");
    let lsn = primary.sql("CHECKPOINT; SELECT pg_current_wal_lsn()");
    wait_until("the standby has replayed it", Duration::from_secs(30), || {
        standby.sql(&format!("SELECT pg_last_wal_replay_lsn() >= '{lsn}'")) == "t"
    });
    let said = beside_standby.fails(75, &["backup", "create", "--fast"]);
    assert!(said.contains("00000001") && said.contains("pg_switch_wal() on the primary"), "{said}");
    assert_eq!(beside_standby.json(&["backup", "list"]), serde_json::json!([]));

    beside_standby.stop();
    beside_standby.set("PGSIDECAR_BACKUP_WAL_TIMEOUT", "60s");
    beside_standby.start();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let switching = scope.spawn(|| {
            while !done.load(Relaxed) {
                primary.sql("INSERT INTO rows VALUES (0)");
                primary.switch_wal();
                std::thread::sleep(Duration::from_millis(300));
            }
        });
        let id = back_up(&beside_standby);
        done.store(true, Relaxed);
        switching.join().unwrap();
        assert_eq!(beside_standby.json(&["backup", "show", &id])["from_standby"], true);
    });
    primary.sql("DELETE FROM rows");
    let xid = primary.sql("INSERT INTO rows VALUES (2) RETURNING pg_current_xact_id()");
    primary.sql("INSERT INTO rows VALUES (3)");
    ship_wal(&primary);

    for (name, arguments, expected) in [("latest", &[][..], "2 3"), ("xid", &["--target-xid", &xid], "2")] {
        let to = restore(&scratch, &sidecar, name, arguments);
        run(primary.client("pg_verifybackup").arg("-n").arg(&to));
        let mut copy = Postgres::on(&scratch, to, 15);
        copy.spawn(AS_A_COPY);
        copy.wait_for_promotion();
        assert_eq!(copy.sql("SELECT string_agg(n::text, ' ' ORDER BY n) FROM rows"), expected, "{}", copy.log());
    }
    assert_eq!(primary.sql("SELECT count(*) FROM pg_stat_replication"), "1", "only the standby streams");
}

/// One line for all files below a directory.
fn checksum(directory: &Path) -> String {
    let script = "find . -type f -print0 | sort -z | xargs -0 sha256sum; find . | sort";
    run(command("bash").args(["-euo", "pipefail", "-c", script]).current_dir(directory))
}

fn a_tablespace_is_put_elsewhere_and_the_live_one_is_never_touched(major: u32) {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let conf = &["autovacuum = off"];
    let (mut postgres, sidecar) = archiving_configured(&scratch, major, &["--wal-segsize=1"], &repository, conf);
    let live = scratch.dir("live space");
    let sql = |sql: &str| postgres.sql(sql);
    sql(&format!("CREATE TABLESPACE space LOCATION '{}'", live.display()));
    sql("CREATE TABLE far (n int) TABLESPACE space");
    sql("INSERT INTO far SELECT generate_series(1, 1000)");
    sql("CREATE UNLOGGED TABLE fleeting TABLESPACE space AS SELECT 1 AS n");
    let id = back_up(&sidecar);
    sql("INSERT INTO far VALUES (1001)");
    // Replayed on a copy that shares the tablespace, this would remove the live files.
    sql("CREATE TABLE gone TABLESPACE space AS SELECT 1 AS n");
    sql("DROP TABLE gone");
    ship_wal(&postgres);
    sql("CHECKPOINT");
    let before = checksum(&live);
    let record = sidecar.json(&["backup", "show", &id]);
    assert_eq!(record["tablespaces"][0]["location"], text(&live));

    let to = scratch.path().join("copy");
    let said = sidecar.fails(73, &["restore", "run", "--to", text(&to)]);
    assert!(said.contains(text(&live)) && said.contains("nothing was changed") && said.contains("HINT"), "{said}");
    assert!(!to.exists());
    let mapping = format!("{}={}", text(&live), text(&scratch.path().join("new space")));
    let to = restore(&scratch, &sidecar, "copy", &["--tablespace-mapping", &mapping]);
    let oid = record["tablespaces"][0]["oid"].to_string();
    let new = scratch.path().join("new space");
    assert_eq!(fs::read_to_string(to.join("tablespace_map")).unwrap(), format!("{oid} {}\n", text(&new)));
    assert_eq!(fs::read_link(to.join("pg_tblspc").join(&oid)).unwrap(), new);
    run(postgres.client("pg_verifybackup").args(["-n", "-i", "tablespace_map"]).arg(&to));
    let mut copy = Postgres::on(&scratch, to, major);
    copy.spawn(AS_A_COPY);
    copy.wait_for_promotion();
    assert_eq!(copy.sql("SELECT count(*), max(n) FROM far"), "1001|1001");
    assert_eq!(copy.sql("SELECT count(*) FROM fleeting"), "0");
    assert_eq!(copy.sql("SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'space'"), text(&new));
    copy.sql("DROP TABLE far");
    copy.sql("CHECKPOINT");
    assert_eq!(checksum(&live), before, "the live server's tablespace");
    assert_eq!(postgres.sql("SELECT count(*) FROM far"), "1001");

    // On a machine where the old place is free, no mapping is needed, and all of it verifies.
    postgres.stop("immediate");
    fs::rename(&live, scratch.path().join("moved away")).unwrap();
    let mut second = Postgres::on(&scratch, restore(&scratch, &sidecar, "second", &[]), major);
    run(second.client("pg_verifybackup").arg("-n").arg(&second.data));
    second.spawn(AS_A_COPY);
    second.wait_for_promotion();
    assert_eq!(second.sql("SELECT count(*) FROM far"), "1001");
}

#[test]
fn a_tablespace_is_put_elsewhere_and_the_live_one_is_never_touched_pg15() {
    a_tablespace_is_put_elsewhere_and_the_live_one_is_never_touched(15);
}

#[test]
fn a_tablespace_is_put_elsewhere_and_the_live_one_is_never_touched_pg17() {
    a_tablespace_is_put_elsewhere_and_the_live_one_is_never_touched(17);
}
