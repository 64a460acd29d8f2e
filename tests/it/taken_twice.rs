//! A standby that is promoted while the store is away takes a timeline that another server has begun: it's told, and
//! what README.md says helps.

use std::{fs, time::Duration};

use serde_json::Value;

use crate::support::{
    Look, Mode, Postgres, Repository, Scratch, Sidecar, Wire, give_to_servers,
    restoring::{back_up, restored, ship_wal},
    run, told, wait_until,
};

const PATIENCE: Duration = Duration::from_secs(60);

fn restore_command(sidecar: &Sidecar) -> String {
    format!("{} --address 127.0.0.1:{} restore %f %p", Sidecar::helper().display(), sidecar.port)
}

fn signal(postgres: &Postgres, name: &str) {
    let path = postgres.data.join(name);
    fs::write(&path, "").unwrap();
    give_to_servers(&path);
}

/// Whether `check` fails, and what it finds of the timeline.
fn check(sidecar: &Sidecar) -> (bool, Value) {
    let output = sidecar.cli(&["check", "--json"]);
    let findings: Value = serde_json::from_slice(&output.stdout).unwrap();
    let finding = findings.as_array().unwrap().iter().find(|finding| finding["check"] == "timeline").unwrap();
    (!output.status.success(), finding.clone())
}

#[test]
fn a_timeline_that_was_taken_twice_is_told_and_left_for_the_next_pg15() {
    taken_twice(false);
}

/// Both servers write the same history; what differs are the segments.
#[test]
fn a_timeline_that_was_taken_twice_at_the_same_place_is_told_and_left_for_the_next_pg15() {
    taken_twice(true);
}

fn taken_twice(at_the_same_place: bool) {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let Repository::S3(server) = &repository else { unreachable!("it's on S3") };
    let proxy = Wire::to(&server.address());
    let mut other = Postgres::initdb(&scratch, 15, &["--wal-segsize=1"]);
    let mut beside_other = Sidecar::new(&scratch, &other, &repository);
    beside_other.set("PGSIDECAR_WORKLOAD", "prod/db");
    other.configure(&beside_other.archive_settings().iter().map(String::as_str).collect::<Vec<_>>());
    other.configure(&[&format!("restore_command = '{}'", restore_command(&beside_other))]);
    other.start(&[]);
    beside_other.start();
    other.sql("CREATE TABLE t (who text)");
    ship_wal(&other);
    let directory = scratch.path().join("standby");
    run(other.client("pg_basebackup").args(["-c", "fast", "-X", "stream", "--no-sync", "-R", "-D"]).arg(&directory));
    let mut ours = Postgres::on(&scratch, directory, 15);
    let mut sidecar = Sidecar::another(&scratch, "beside-standby", &ours, &repository);
    sidecar.set("PGSIDECAR_WORKLOAD", "prod/db");
    sidecar.through(&proxy);
    ours.configure(&sidecar.archive_settings().iter().map(String::as_str).collect::<Vec<_>>());
    ours.configure(&[&format!("restore_command = '{}'", restore_command(&sidecar))]);
    sidecar.start();
    ours.start(&[]);
    other.sql("INSERT INTO t VALUES ('both')");
    wait_until("it is replicated", PATIENCE, || ours.sql("SELECT count(*) FROM t") == "1");
    assert_eq!(check(&sidecar).1["state"], "ok");

    // The other server begins timeline 2; ours doesn't see it, and begins timeline 2.
    proxy.set(Mode::Refuse);
    let leave_alone = || {
        ours.sql("ALTER SYSTEM SET primary_conninfo = ''");
        ours.sql("SELECT pg_reload_conf()");
    };
    if at_the_same_place {
        // It ends when its standby has all of its WAL.
        other.stop("fast");
        leave_alone();
    } else {
        leave_alone();
        wait_until("it's alone", PATIENCE, || other.sql("SELECT count(*) FROM pg_stat_replication") == "0");
        other.sql("INSERT INTO t VALUES ('other')");
        other.stop("fast");
    }
    signal(&other, "recovery.signal");
    other.start(&[]);
    other.wait_for_promotion();
    other.sql("INSERT INTO t VALUES ('other')");
    // Ours will look for its last checkpoint where the archive has the other's WAL.
    (0..6).for_each(|_| drop(ship_wal(&other)));
    assert_eq!(ours.sql("SELECT pg_promote()"), "t");
    ours.sql("INSERT INTO t VALUES ('ours')");
    let (theirs, name) = (other.wal_file("00000002.history"), "00000002.history");
    assert_eq!(ours.wal_file(name) == theirs, at_the_same_place);
    let segment = ours.switch_wal();
    proxy.set(Mode::Pass);

    let last_failure = || sidecar.json(&["status"])["archive"]["last_failure"].clone();
    wait_until("what it writes is refused", PATIENCE, || last_failure()["reason"]["code"] == "conflict");
    assert!(ours.is_marked(if at_the_same_place { &segment } else { name }, "ready"));
    if !at_the_same_place {
        let hint = "hint: Nothing was overwritten. Two servers began";
        wait_until("PostgreSQL is told", PATIENCE, || ours.log().contains(hint));
    }
    let (failed, finding) = check(&sidecar);
    assert!(failed && finding["state"] == "failed", "{finding}");
    assert!(finding["message"].as_str().unwrap().contains("timeline 2 was taken twice"), "{finding}");
    assert!(finding["hint"].as_str().unwrap().contains("recovery.signal"), "{finding}");
    assert_eq!(check(&beside_other).1["state"], "ok");

    // As README.md says.
    ours.stop("fast");
    for entry in fs::read_dir(ours.data.join("pg_wal/archive_status")).unwrap() {
        let path = entry.unwrap().path();
        let mark = path.file_name().unwrap().to_str().unwrap();
        if mark.starts_with("00000002") && mark.ends_with(".ready") {
            fs::rename(&path, path.with_extension("done")).unwrap();
        }
    }
    signal(&ours, "recovery.signal");
    let histories =
        format!("case %f in 00000002.history) exit 1;; *.history) exec {};; esac; exit 1", restore_command(&sidecar));
    ours.configure(&["recovery_target_timeline = 'current'", &format!("restore_command = '{histories}'")]);
    ours.start(&[]);
    ours.wait_for_promotion();
    assert!(ours.log().contains("selected new timeline ID: 3"), "{}", ours.log());
    ours.configure(&["recovery_target_timeline = 'latest'", "restore_command = ''"]);

    assert!(ship_wal(&ours).starts_with("00000003"));
    ours.wait_until_archived();
    let look = Look::into(&repository);
    assert!(look.wal("00000003.history") == Some(ours.wal_file("00000003.history")));
    assert!(look.wal(name) == Some(theirs), "the other's is untouched");
    back_up(&sidecar);
    // The status goes on telling of what was refused, for two minutes.
    sidecar.stop();
    sidecar.start();
    let (failed, finding) = check(&sidecar);
    assert!(!failed && finding["state"] == "ok", "{}", told(&sidecar.cli(&["check"])));
    let copy = restored(&scratch, &sidecar, 15, "restored", &["--target-timeline", "3"]);
    assert_eq!(copy.sql("SELECT string_agg(who, ' ' ORDER BY who) FROM t"), "both ours");
}
