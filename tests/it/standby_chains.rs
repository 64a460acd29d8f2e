//! Chains of backups that are taken from a standby.

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::Duration,
};

use crate::{
    chains::{SUMMARIZED, take},
    failover::standby_of,
    support::{
        Postgres, Repository, Scratch,
        restoring::{AS_A_COPY, archiving_configured, restore, ship_wal},
        run, wait_until,
    },
};

const ROWS: &str = "SELECT count(*), sum(n), sum(hashtext(text)) FROM rows";

/// The standby has replayed all that the primary has written, and begins its backups behind `since`.
fn in_step(primary: &Postgres, standby: &Postgres, since: &str) {
    primary.sql("CHECKPOINT");
    let lsn = primary.sql("SELECT pg_current_wal_lsn()");
    wait_until("the standby has replayed it", Duration::from_secs(60), || {
        standby.sql(&format!("SELECT pg_last_wal_replay_lsn() >= '{lsn}'")) == "t"
    });
    standby.sql("CHECKPOINT");
    assert_eq!(standby.sql(&format!("SELECT redo_lsn >= '{since}' FROM pg_control_checkpoint()")), "t");
}

/// Runs `work` while the primary goes on: a standby's backup ends with WAL that only the primary completes.
fn while_wal_flows<T>(primary: &Postgres, work: impl FnOnce() -> T) -> T {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let flowing = scope.spawn(|| {
            while !done.load(Relaxed) {
                primary.sql("UPDATE rows SET n = n + 1 WHERE n % 977 = 0");
                primary.switch_wal();
                thread::sleep(Duration::from_millis(200));
            }
        });
        let result = work();
        done.store(true, Relaxed);
        flowing.join().unwrap();
        result
    })
}

#[test]
fn incremental_backups_of_a_standby_are_what_was_there_pg17() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let options = &["--wal-segsize=1", "--data-checksums"];
    let (primary, sidecar) = archiving_configured(&scratch, 17, options, &repository, SUMMARIZED);
    primary.sql("CREATE TABLE rows AS SELECT n, repeat('x', 200) AS text FROM generate_series(1, 20000) n");
    primary.sql("CREATE INDEX ON rows (n)");
    let (standby, beside_standby) = standby_of(&scratch, &primary, &repository);
    in_step(&primary, &standby, "0/0");
    let taken = |kind: &str| {
        let id = while_wal_flows(&primary, || take(&beside_standby, kind));
        let record = beside_standby.json(&["backup", "show", &id]);
        assert_eq!(record["from_standby"], true);
        (id, record)
    };
    let end = |record: &serde_json::Value| record["stop_lsn"].as_str().unwrap().to_owned();
    let (full, record) = taken("full");
    primary.sql("DELETE FROM rows WHERE n > 15000");
    primary.sql("VACUUM (TRUNCATE) rows");
    primary.sql("CREATE TABLE later AS SELECT n FROM generate_series(1, 5000) n");
    in_step(&primary, &standby, &end(&record));
    let (first, record) = taken("incremental");
    assert_eq!(record["parent"], serde_json::json!(full));
    primary.sql("UPDATE rows SET text = repeat('y', 200) WHERE n % 100 = 0");
    primary.sql("INSERT INTO rows SELECT n, 'new' FROM generate_series(30001, 32000) n");
    primary.sql("DELETE FROM later WHERE n % 3 = 0");
    in_step(&primary, &standby, &end(&record));
    let (second, record) = taken("incremental");
    assert_eq!(record["parent"], serde_json::json!(first));
    // One taken beside the primary builds on those.
    primary.sql("UPDATE rows SET text = 'z' WHERE n % 1000 = 0");
    let third = take(&sidecar, "incremental");
    assert_eq!(sidecar.json(&["backup", "show", &third])["parent"], serde_json::json!(second));
    ship_wal(&primary);

    let expected = (primary.sql(ROWS), primary.sql("SELECT count(*), sum(n) FROM later"));
    for (name, id) in [("first", &first), ("second", &second), ("third", &third)] {
        let to = restore(&scratch, &sidecar, name, &["--backup", id]);
        run(primary.client("pg_verifybackup").arg("-n").arg(&to));
        assert!(!to.join("standby.signal").exists());
        let mut copy = Postgres::on(&scratch, to, 17);
        copy.spawn(AS_A_COPY);
        copy.wait_for_promotion();
        assert_eq!((copy.sql(ROWS), copy.sql("SELECT count(*), sum(n) FROM later")), expected, "{name}");
        run(copy.client("pg_amcheck").args(["--all", "--install-missing", "--heapallindexed"]));
    }
    assert!(fs::read_to_string(standby.data.join("standby.signal")).is_ok(), "the standby is one still");
}

#[test]
fn a_standby_without_a_restartpoint_since_its_last_backup_takes_a_full_one_and_says_why_pg17() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let lines = [SUMMARIZED, &["checkpoint_timeout = 1h"]].concat();
    let (primary, _sidecar) = archiving_configured(&scratch, 17, &["--wal-segsize=1"], &repository, &lines);
    primary.sql("CREATE TABLE rows AS SELECT n, '' AS text FROM generate_series(1, 20000) n");
    let (standby, beside_standby) = standby_of(&scratch, &primary, &repository);
    in_step(&primary, &standby, "0/0");
    let full = while_wal_flows(&primary, || take(&beside_standby, "full"));
    let create = || while_wal_flows(&primary, || beside_standby.json(&["backup", "create", "--fast"]));
    let next = create()["id"].as_str().unwrap().to_owned();
    assert!(next.ends_with("-full"), "{next}");
    let log = beside_standby.log();
    assert!(log.contains(&format!("backup {full} ends at")), "{log}");
    assert!(log.contains("on a standby the primary has to make a checkpoint in between"), "{log}");
}
