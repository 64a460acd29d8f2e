//! Restores end exactly where they were asked to, on the timeline that they were asked for.

use std::{fs, time::Duration};

use crate::support::{
    Postgres, Repository, Scratch, Sidecar,
    restoring::{AS_A_COPY, archiving_configured, back_up, restore, ship_wal},
    run, wait_until,
};

/// Rows 1 and 2, a backup, rows 3 to 6, the restore point "it's here", another backup, rows 7 and 8; everything
/// archived. Each row is a transaction of its own.
struct Source {
    scratch: Scratch,
    sidecar: Sidecar,
    postgres: Postgres,
    backups: Vec<String>,
    commits: Vec<Commit>,
}

/// The commit of a row.
struct Commit {
    xid: String,
    /// To the microsecond, as PostgreSQL compares it with a target.
    time: String,
    /// Where the commit's record begins, as PostgreSQL compares it with a target.
    lsn: String,
}

const SMALL_WAL: &[&str] = &["--wal-segsize=1"];
const CONF: &[&str] = &["track_commit_timestamp = on", "autovacuum = off"];

fn insert(postgres: &Postgres, row: u32) -> Commit {
    let before = postgres.sql("SELECT pg_current_wal_insert_lsn()");
    let xid = postgres.sql(&format!("INSERT INTO rows VALUES ({row}) RETURNING pg_current_xact_id()"));
    let time = postgres.sql(&format!(
        "SELECT to_char(pg_xact_commit_timestamp('{xid}') AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') || '+00'"
    ));
    let lsn = postgres.sql(&format!(
        "SELECT start_lsn FROM pg_get_wal_records_info('{before}', pg_current_wal_flush_lsn()) \
         WHERE xid = '{xid}' AND resource_manager = 'Transaction' AND record_type = 'COMMIT'"
    ));
    assert!(lsn.contains('/'), "no commit of {xid} after {before}");
    Commit { xid, time, lsn }
}

fn rows(postgres: &Postgres) -> String {
    postgres.sql("SELECT string_agg(n::text, ' ' ORDER BY n) FROM rows")
}

fn source(major: u32) -> Source {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (postgres, sidecar) = archiving_configured(&scratch, major, SMALL_WAL, &repository, CONF);
    postgres.sql("CREATE EXTENSION pg_walinspect");
    postgres.sql("CREATE TABLE rows (n int PRIMARY KEY)");
    let mut commits = vec![insert(&postgres, 1), insert(&postgres, 2)];
    let mut backups = vec![back_up(&sidecar)];
    commits.extend((3..=6).map(|row| insert(&postgres, row)));
    postgres.sql("SELECT pg_create_restore_point('it''s here')");
    backups.push(back_up(&sidecar));
    commits.extend((7..=8).map(|row| insert(&postgres, row)));
    ship_wal(&postgres);
    Source { scratch, sidecar, postgres, backups, commits }
}

/// All targets from one source: the restored servers recover side by side.
fn every_target_is_met_exactly(major: u32) {
    let source = source(major);
    let (fifth, first, second) = (&source.commits[4], source.backups[0].as_str(), source.backups[1].as_str());
    let cases: &[(&str, &[&str], &str, &str)] = &[
        ("time", &["--target-time", &fifth.time], first, "1 2 3 4 5"),
        ("time-exclusive", &["--target-time", &fifth.time, "--target-exclusive"], first, "1 2 3 4"),
        ("lsn", &["--target-lsn", &fifth.lsn], first, "1 2 3 4 5"),
        ("lsn-exclusive", &["--target-lsn", &fifth.lsn, "--target-exclusive"], first, "1 2 3 4"),
        ("xid", &["--target-xid", &fifth.xid], first, "1 2 3 4 5"),
        ("xid-exclusive", &["--target-xid", &fifth.xid, "--target-exclusive"], first, "1 2 3 4"),
        ("name", &["--target-name", "it's here", "--backup", first], first, "1 2 3 4 5 6"),
        ("immediate", &["--target-immediate"], second, "1 2 3 4 5 6"),
        ("immediate-first", &["--target-immediate", "--backup", first], first, "1 2"),
        ("latest", &[], second, "1 2 3 4 5 6 7 8"),
        ("latest-first", &["--backup", first], first, "1 2 3 4 5 6 7 8"),
    ];
    let servers: Vec<Postgres> = cases
        .iter()
        .map(|(name, arguments, backup, _)| {
            let to = source.scratch.path().join(name);
            let to = to.to_str().unwrap();
            let plan = source.sidecar.json(&[&["restore", "run", "--to", to], *arguments].concat());
            assert_eq!(plan["backup"]["id"], *backup, "the newest backup before the target, {name}");
            let mut server = Postgres::on(&source.scratch, to.into(), major);
            server.spawn(&[AS_A_COPY, &["-c", "shared_buffers=4MB"]].concat());
            server
        })
        .collect();
    for (mut server, (name, .., expected)) in servers.into_iter().zip(cases) {
        server.wait_for_promotion();
        assert_eq!(rows(&server), *expected, "{name}\n{}", server.log());
        server.sql("INSERT INTO rows VALUES (100)");
    }
    assert_eq!(rows(&source.postgres), "1 2 3 4 5 6 7 8", "the source is as it was");
}

#[test]
fn every_target_is_met_exactly_pg15() {
    every_target_is_met_exactly(15);
}

#[test]
fn every_target_is_met_exactly_pg17() {
    every_target_is_met_exactly(17);
}

fn the_server_does_at_the_target_what_it_was_told(major: u32) {
    let source = source(major);
    let third = source.commits[2].xid.as_str();

    let to = restore(&source.scratch, &source.sidecar, "pause", &["--target-xid", third, "--target-action", "pause"]);
    let mut paused = Postgres::on(&source.scratch, to, major);
    paused.start(AS_A_COPY);
    wait_until("replay is paused", Duration::from_secs(30), || {
        paused.sql("SELECT pg_get_wal_replay_pause_state()") == "paused"
    });
    assert_eq!(rows(&paused), "1 2 3");
    assert!(paused.try_sql("INSERT INTO rows VALUES (100)").unwrap_err().contains("read-only"));
    paused.sql("SELECT pg_wal_replay_resume()");
    paused.wait_for_promotion();
    assert_eq!(rows(&paused), "1 2 3");

    let to =
        restore(&source.scratch, &source.sidecar, "shutdown", &["--target-xid", third, "--target-action", "shutdown"]);
    let mut stopped = Postgres::on(&source.scratch, to, major);
    stopped.spawn(AS_A_COPY);
    wait_until("the server has shut down", Duration::from_secs(30), || stopped.exited().is_some());
    let control = run(stopped.client("pg_controldata").arg("-D").arg(&stopped.data));
    assert!(control.contains("shut down in recovery"), "{control}\n{}", stopped.log());
    // The WAL is still there to be replayed further: with a later target the same directory goes on.
    let conf = stopped.data.join("postgresql.auto.conf");
    let later = format!("recovery_target_xid = '{}'", source.commits[6].xid);
    let edited = fs::read_to_string(&conf).unwrap().replace(&format!("recovery_target_xid = '{third}'"), &later);
    fs::write(&conf, edited.replace("'shutdown'", "'promote'")).unwrap();
    stopped.spawn(AS_A_COPY);
    stopped.wait_for_promotion();
    assert_eq!(rows(&stopped), "1 2 3 4 5 6 7");
}

#[test]
fn the_server_does_at_the_target_what_it_was_told_pg15() {
    the_server_does_at_the_target_what_it_was_told(15);
}

#[test]
fn the_server_does_at_the_target_what_it_was_told_pg17() {
    the_server_does_at_the_target_what_it_was_told(17);
}

/// The replacement of a lost server goes on in the same repository, on a timeline of its own.
fn a_promoted_restore_goes_on_and_both_timelines_can_be_restored(major: u32) {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (mut lost, mut sidecar) = archiving_configured(&scratch, major, SMALL_WAL, &repository, CONF);
    lost.sql("CREATE EXTENSION pg_walinspect");
    lost.sql("CREATE TABLE rows (n int PRIMARY KEY)");
    insert(&lost, 1);
    let old_backup = back_up(&sidecar);
    let second = insert(&lost, 2);
    let third = insert(&lost, 3);
    // PostgreSQL knows that a time is reached only by a later commit.
    insert(&lost, 4);
    ship_wal(&lost);
    lost.stop("immediate");

    // The daemon now stands beside the restored directory, at the same address.
    let to = restore(&scratch, &sidecar, "replacement", &["--target-xid", &second.xid]);
    let mut replacement = Postgres::on(&scratch, to.clone(), major);
    assert_eq!(sidecar.stop().code(), Some(0));
    sidecar.set("PGDATA", to.to_str().unwrap());
    sidecar.set("PGHOST", replacement.socket.to_str().unwrap());
    sidecar.start();
    replacement.spawn(&[]);
    replacement.wait_for_promotion();
    assert_eq!(rows(&replacement), "1 2");
    insert(&replacement, 20);
    let segment = ship_wal(&replacement);
    assert!(segment.starts_with("00000002"), "{segment}");
    let new_backup = back_up(&sidecar);
    assert_eq!(sidecar.json(&["backup", "show", &new_backup])["timeline"], 2);
    insert(&replacement, 21);
    ship_wal(&replacement);

    let cases: &[(&str, &[&str], &str, &str)] = &[
        ("newest", &[], &new_backup, "1 2 20 21"),
        ("across", &["--backup", &old_backup], &old_backup, "1 2 20 21"),
        ("first-time", &["--target-timeline", "1", "--target-time", &third.time], &old_backup, "1 2 3"),
        // After the moment at which timeline 2 left timeline 1: what happened on the newest timeline counts.
        ("newest-time", &["--target-time", &third.time], &old_backup, "1 2"),
    ];
    let servers: Vec<Postgres> = cases
        .iter()
        .map(|(name, arguments, backup, _)| {
            let plan = sidecar.json(&[&["restore", "plan"], *arguments].concat());
            assert_eq!(plan["backup"]["id"], *backup, "{name}");
            let mut server = Postgres::on(&scratch, restore(&scratch, &sidecar, name, arguments), major);
            server.spawn(AS_A_COPY);
            server
        })
        .collect();
    for (mut server, (name, .., expected)) in servers.into_iter().zip(cases) {
        server.wait_for_promotion();
        assert_eq!(rows(&server), *expected, "{name}\n{}", server.log());
        // The repository knows timeline 2 already: a promoted copy must not take its name again.
        let file = server.sql("SELECT pg_walfile_name(pg_current_wal_lsn())");
        assert!(file.starts_with("00000003"), "{name}: {file}");
    }
    // On the newest timeline no transaction ended that late; a restore that is repeated has to name the old one.
    let said = sidecar.fails(65, &["restore", "plan", "--target-time", "2100-01-01 00:00Z"]);
    assert!(said.contains("of timeline 2") && said.contains("--target-timeline"), "{said}");
    let said = sidecar.fails(65, &["restore", "plan", "--target-timeline", "9"]);
    assert!(said.contains("timeline 9 is unknown") && said.contains("HINT"), "{said}");
}

#[test]
fn a_promoted_restore_goes_on_and_both_timelines_can_be_restored_pg15() {
    a_promoted_restore_goes_on_and_both_timelines_can_be_restored(15);
}

#[test]
fn a_promoted_restore_goes_on_and_both_timelines_can_be_restored_pg17() {
    a_promoted_restore_goes_on_and_both_timelines_can_be_restored(17);
}
