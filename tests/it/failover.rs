//! A primary dies, is replaced, comes back, or is there twice: the archive gets no hole, and nobody takes a name that
//! is another's.

use std::{fs, path::Path, time::Duration};

use crate::support::{
    Look, Mode, Postgres, Repository, Scratch, Sidecar, Wire,
    restoring::{archiving_configured, back_up, restored, ship_wal},
    run, wait_until,
};

const PATIENCE: Duration = Duration::from_secs(90);

/// A standby that streams from this primary, with a sidecar of its own that its `archive_command` uses once promoted.
pub fn standby_of(scratch: &Scratch, primary: &Postgres, repository: &Repository) -> (Postgres, Sidecar) {
    let directory = scratch.path().join("standby");
    run(primary.client("pg_basebackup").args(["-c", "fast", "-X", "stream", "--no-sync", "-R", "-D"]).arg(&directory));
    let mut standby = Postgres::on(scratch, directory, primary.major);
    let mut sidecar = Sidecar::another(scratch, "beside-standby", &standby, repository);
    standby.configure(&sidecar.archive_settings().iter().map(String::as_str).collect::<Vec<_>>());
    standby.start(&[]);
    wait_until("the standby streams", PATIENCE, || {
        primary.sql("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'") == "1"
    });
    sidecar.start();
    (standby, sidecar)
}

fn wait_for_replay(primary: &Postgres, standby: &Postgres) {
    let lsn = primary.sql("SELECT pg_current_wal_flush_lsn()");
    wait_until("the standby has replayed it", PATIENCE, || {
        standby.sql(&format!("SELECT pg_last_wal_replay_lsn() >= '{lsn}'")) == "t"
    });
}

fn insert(postgres: &Postgres, rows: u32) {
    postgres.sql(&format!("INSERT INTO t SELECT n, gen_random_uuid() FROM generate_series(1, {rows}) n"));
}

fn ready(postgres: &Postgres) -> Vec<String> {
    let entries = fs::read_dir(postgres.data.join("pg_wal/archive_status")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter_map(|name| name.strip_suffix(".ready").map(str::to_owned)).collect()
}

/// Makes a primary of it.
pub fn promote(standby: &mut Postgres) {
    assert_eq!(standby.sql("SELECT pg_promote()"), "t");
    standby.wait_for_promotion();
}

/// The primary's archive is cut off, it goes on, its standby receives all of it; then the primary dies for good.
fn what_a_dead_primary_never_archived_is_shipped_by_its_standby(major: u32) {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let Repository::S3(server) = &repository else { unreachable!("it's on S3") };
    let proxy = Wire::to(&server.address());
    let mut primary = Postgres::initdb(&scratch, major, &["--wal-segsize=1"]);
    let mut sidecar = Sidecar::new(&scratch, &primary, &repository);
    sidecar.through(&proxy);
    primary.configure(&sidecar.archive_settings().iter().map(String::as_str).collect::<Vec<_>>());
    primary.start(&[]);
    sidecar.start();
    primary.sql("CREATE TABLE t (n int, u uuid)");
    back_up(&sidecar);
    let (mut standby, beside_standby) = standby_of(&scratch, &primary, &repository);

    proxy.set(Mode::Refuse);
    insert(&primary, 60_000);
    wait_for_replay(&primary, &standby);
    let look = Look::into(&repository);
    let never_archived = ready(&primary);
    assert!(never_archived.len() >= 4, "{never_archived:?}");
    assert!(never_archived.iter().all(|name| look.wal(name).is_none()));
    primary.stop("immediate");
    sidecar.kill();
    // Longer than the primary's time, which is over: its standby need not be promoted for it.
    let (last, shipped) = never_archived.iter().max().map(|last| (last, &never_archived)).unwrap();
    wait_until("the standby's sidecar ships what is missing", PATIENCE, || {
        shipped.iter().filter(|name| *name != last).all(|name| look.wal(name).is_some())
    });
    for name in shipped.iter().filter(|name| look.wal(name).is_some()) {
        assert!(look.wal(name).unwrap() == fs::read(primary.data.join("pg_wal").join(name)).unwrap(), "{name}");
    }

    promote(&mut standby);
    insert(&standby, 10_000);
    ship_wal(&standby);
    beside_standby.ok(&["wal", "verify", "--deep"]);
    let expected = standby.sql("SELECT count(*), sum(n), min(u::text) FROM t");
    let copy = restored(&scratch, &beside_standby, major, "restored", &[]);
    assert_eq!(copy.sql("SELECT count(*), sum(n), min(u::text) FROM t"), expected);

    // The former primary's volume is found again. Its sidecar ships what waits there; what the standby's sidecar has
    // shipped is the same to the byte, and nothing is refused.
    proxy.set(Mode::Pass);
    sidecar.start();
    wait_until("what the former primary had is in the repository", PATIENCE, || {
        never_archived.iter().all(|name| look.wal(name).is_some())
    });
    for name in &never_archived {
        assert!(look.wal(name).unwrap() == fs::read(primary.data.join("pg_wal").join(name)).unwrap(), "{name}");
    }
    assert_eq!(sidecar.metric("pgsidecar_archive_conflicts_total"), "0");
    beside_standby.ok(&["wal", "verify"]);
}

#[test]
fn what_a_dead_primary_never_archived_is_shipped_by_its_standby_s3s_pg15() {
    what_a_dead_primary_never_archived_is_shipped_by_its_standby(15);
}

#[test]
fn what_a_dead_primary_never_archived_is_shipped_by_its_standby_s3s_pg17() {
    what_a_dead_primary_never_archived_is_shipped_by_its_standby(17);
}

#[test]
fn while_its_primary_archives_a_standby_s_sidecar_ships_nothing_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (primary, sidecar) = archiving_configured(&scratch, 15, &["--wal-segsize=1"], &repository, &[]);
    primary.sql("CREATE TABLE t (n int, u uuid)");
    let (standby, beside_standby) = standby_of(&scratch, &primary, &repository);
    insert(&primary, 40_000);
    ship_wal(&primary);
    wait_for_replay(&primary, &standby);
    // Longer than a primary is given.
    std::thread::sleep(Duration::from_secs(20));
    assert_eq!(beside_standby.metric("pgsidecar_archived_files_total"), "0");
    let owner: serde_json::Value = serde_json::from_str(&Look::into(&repository).text("owner.json")).unwrap();
    let workload = owner["workload"].as_str().unwrap();
    assert!(workload.ends_with(&format!(":{}", primary.data.display())), "{workload}");
    drop((standby, sidecar));
}

fn copy_directory(from: &Path, to: &Path) {
    run(crate::support::command("cp").arg("-a").arg(from).arg(to));
}

/// A copy of the volume is started elsewhere, with a sidecar that has the same settings.
#[test]
fn of_two_live_primaries_the_owner_wins_and_the_other_is_told_at_its_first_call_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (mut primary, mut sidecar) = archiving_configured(&scratch, 15, &["--wal-segsize=1"], &repository, &[]);
    primary.sql("CREATE TABLE t (n int, u uuid)");
    ship_wal(&primary);
    primary.stop("fast");
    let directory = scratch.path().join("copy");
    copy_directory(&primary.data, &directory);
    let mut copy = Postgres::on(&scratch, directory, 15);
    let mut beside_copy = Sidecar::another(&scratch, "beside-copy", &copy, &repository);
    copy.configure(&beside_copy.archive_settings().iter().map(String::as_str).collect::<Vec<_>>());
    copy.start(&[]);
    beside_copy.start();
    let look = Look::into(&repository);

    // The copy is faster, and takes no name.
    let name = copy.switch_wal();
    let told = || {
        let status = beside_copy.json(&["status"]);
        status["archive"]["last_failure"]["reason"]["code"] == "not_owner"
    };
    wait_until("the copy is told", PATIENCE, told);
    assert!(look.wal(&name).is_none());
    let log = copy.log();
    assert!(log.contains("timeline 1 is archived by") && log.contains("wal take-over"), "{log}");
    assert_eq!(ready(&copy).iter().filter(|ready| **ready == name).count(), 1);

    primary.start(&[]);
    insert(&primary, 10_000);
    let theirs = ship_wal(&primary);
    assert!(look.wal(&theirs).unwrap() == fs::read(primary.data.join("pg_wal").join(&theirs)).unwrap());
    assert_eq!(sidecar.json(&["status"])["state"], "ok");

    // The original is lost, and the copy takes its place: only then, and only because somebody says so. Both had the
    // same names for different WAL; that stays refused until the copy has left them behind.
    primary.stop("fast");
    sidecar.stop();
    let said = beside_copy.ok(&["wal", "take-over"]);
    assert!(said.starts_with("Timeline 1 is archived by ") && said.contains("before: "), "{said}");
    assert!(beside_copy.ok(&["wal", "take-over"]).contains("already"));
    wait_until("the copy's conflict is told", PATIENCE, || {
        let status = beside_copy.json(&["status"]);
        status["archive"]["last_failure"]["reason"]["code"] == "conflict"
    });
    primary.start(&[]);
    sidecar.start();
    primary.switch_wal();
    wait_until("the former owner is told", PATIENCE, || {
        sidecar.json(&["status"])["archive"]["last_failure"]["reason"]["code"] == "not_owner"
    });
}

/// Another host's standby is promoted: it owns its new timeline, and a clone that is restored owns the next one.
#[test]
fn a_legitimate_failover_and_a_restore_are_never_refused_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (mut primary, mut sidecar) = archiving_configured(&scratch, 15, &["--wal-segsize=1"], &repository, &[]);
    primary.sql("CREATE TABLE t (n int, u uuid)");
    back_up(&sidecar);
    let (mut standby, mut beside_standby) = standby_of(&scratch, &primary, &repository);
    insert(&primary, 10_000);
    wait_for_replay(&primary, &standby);
    primary.stop("immediate");
    sidecar.stop();
    promote(&mut standby);
    insert(&standby, 10_000);
    ship_wal(&standby);
    let expected = standby.sql("SELECT count(*) FROM t");
    standby.stop("fast");
    beside_standby.stop();

    let to = scratch.path().join("elsewhere");
    beside_standby.ok(&["restore", "run", "--to", to.to_str().unwrap()]);
    let mut restored = Postgres::on(&scratch, to, 15);
    let mut beside_restored = Sidecar::another(&scratch, "beside-restored", &restored, &repository);
    beside_restored.set("PGSIDECAR_WAL_LISTEN", &format!("127.0.0.1:{}", beside_standby.port));
    restored.configure(&beside_restored.archive_settings().iter().map(String::as_str).collect::<Vec<_>>());
    beside_restored.port = beside_standby.port;
    beside_restored.start();
    restored.spawn(&[
        "-c",
        &format!(
            "archive_command={} --address 127.0.0.1:{} archive %p",
            Sidecar::helper().display(),
            beside_restored.port
        ),
    ]);
    restored.wait_for_promotion();
    assert_eq!(restored.sql("SELECT count(*) FROM t"), expected);
    insert(&restored, 10_000);
    ship_wal(&restored);
    restored.wait_until_archived();
    let owners = Look::into(&repository).matching("owner.json");
    assert_eq!(owners.len(), 3, "{owners:?}");
    assert_eq!(beside_restored.json(&["status"])["state"], "ok");
}
