//! A night under load: whatever moment is named, what comes back is every transaction up to it and none behind.

use std::time::Duration;

use crate::support::{
    Postgres, Repository, Scratch, Sidecar,
    background::Background,
    restoring::{archiving_configured, back_up, restored, ship_wal},
    run,
};

/// A transaction of the load, as the WAL has it.
struct Commit {
    xid: String,
    /// Where its commit record begins: a restore to there ends just behind it, or just before it.
    lsn: String,
    time: String,
}

struct Night {
    scratch: Scratch,
    /// Serves while it lives.
    _repository: Repository,
    postgres: Postgres,
    sidecar: Sidecar,
    /// Where the commits are told from, in their order.
    began: String,
}

const CONF: &[&str] = &["track_commit_timestamp = on", "autovacuum = off", "wal_keep_size = 2GB"];
/// What the load keeps equal, in every transaction.
const BALANCED: &str = "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT coalesce(sum(delta), 0) FROM pgbench_history) \
     AND (SELECT sum(tbalance) FROM pgbench_tellers) = (SELECT sum(bbalance) FROM pgbench_branches) \
     AND (SELECT sum(bbalance) FROM pgbench_branches) = (SELECT coalesce(sum(delta), 0) FROM pgbench_history)";
/// Each transaction of the load writes one row, which keeps its number.
const CONTENT: &str = "count(*) || ' rows, ' || coalesce(sum(delta), 0) || ', ' || coalesce(sum(xmin::text::bigint), 0) FROM pgbench_history";

impl Night {
    fn new(major: u32) -> Night {
        let scratch = Scratch::new();
        let repository = Repository::s3();
        let (postgres, sidecar) = archiving_configured(&scratch, major, &["--wal-segsize=1"], &repository, CONF);
        postgres.sql("CREATE EXTENSION pg_walinspect");
        run(postgres.client("pgbench").args(["-i", "-q", "-s", "2"]));
        let began = postgres.sql("SELECT pg_current_wal_lsn()");
        Night { scratch, _repository: repository, postgres, sidecar, began }
    }

    /// All commits of the load in the WAL, in its order, as a table expression.
    fn commits(&self) -> String {
        format!(
            "commits AS MATERIALIZED (SELECT xid, start_lsn, pg_xact_commit_timestamp(xid) AS time \
             FROM pg_get_wal_records_info('{}', pg_current_wal_flush_lsn()) \
             WHERE resource_manager = 'Transaction' AND record_type = 'COMMIT')",
            self.began
        )
    }

    /// A commit of the load, so far into it.
    fn commit(&self, share: f64) -> Commit {
        let row = self.postgres.sql(&format!(
            "WITH {}, load AS (SELECT c.*, row_number() OVER (ORDER BY start_lsn) AS n, count(*) OVER () AS all \
             FROM commits c JOIN pgbench_history h ON h.xmin = c.xid) \
             SELECT xid || '|' || start_lsn || '|' || to_char(time AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') || '+00' \
             FROM load WHERE n = greatest(1, (\"all\" * {share})::int)",
            self.commits()
        ));
        let parts: Vec<String> = row.split('|').map(str::to_owned).collect();
        let [xid, lsn, time] = <[String; 3]>::try_from(parts).unwrap();
        Commit { xid, lsn, time }
    }

    /// What there was when the commits up to a condition were all.
    fn content(&self, before_the_first: &str) -> String {
        self.postgres.sql(&format!(
            "WITH {}, ending AS (SELECT coalesce(min(start_lsn), 'FFFFFFFF/FFFFFFFF') AS lsn FROM commits WHERE {before_the_first}) \
             SELECT {CONTENT} WHERE xmin IN (SELECT xid FROM commits, ending WHERE start_lsn < lsn)",
            self.commits()
        ))
    }

    #[track_caller]
    fn comes_back(&self, name: &str, arguments: &[&str], expected: &str) {
        let server = restored(&self.scratch, &self.sidecar, self.postgres.major, name, arguments);
        assert_eq!(server.sql(BALANCED), "t", "{name}: half of a transaction");
        assert_eq!(server.sql(&format!("SELECT {CONTENT}")), expected, "{name} {arguments:?}");
    }
}

fn every_moment_under_load_comes_back_exactly(major: u32) {
    let night = Night::new(major);
    let (postgres, sidecar) = (&night.postgres, &night.sidecar);
    let load = Background::start(postgres.client("pgbench").args(["-n", "-c", "4", "-R", "150", "-T", "600"]));
    std::thread::sleep(Duration::from_secs(2));
    back_up(sidecar);
    std::thread::sleep(Duration::from_secs(2));
    let point = sidecar.json(&["restore-point", "create", "before the migration"]);
    let at_the_point = point["lsn"].as_str().unwrap().to_owned();
    std::thread::sleep(Duration::from_secs(2));
    drop(load);
    ship_wal(postgres);

    let commit = night.commit(0.7);
    let Commit { xid, lsn, time } = &commit;
    let with = night.content(&format!("start_lsn > '{lsn}'"));
    let without = night.content(&format!("start_lsn >= '{lsn}'"));
    assert_ne!(with, without);
    night.comes_back("xid", &["--target-xid", xid], &with);
    night.comes_back("before-xid", &["--target-xid", xid, "--target-exclusive"], &without);
    night.comes_back("lsn", &["--target-lsn", lsn], &with);
    night.comes_back("before-lsn", &["--target-lsn", lsn, "--target-exclusive"], &without);
    night.comes_back("time", &["--target-time", time], &night.content(&format!("time > '{time}'")));
    let just_before = night.content(&format!("time >= '{time}'"));
    night.comes_back("before-time", &["--target-time", time, "--target-exclusive"], &just_before);
    let at_point = night.content(&format!("start_lsn >= '{at_the_point}'"));
    night.comes_back("name", &["--target-name", "before the migration"], &at_point);
    night.comes_back("latest", &[], &night.content("false"));

    // The plan had said so.
    let plan = sidecar.json(&["restore", "plan", "--target-xid", xid]);
    assert!(plan["expected_end"].to_string().contains(xid.as_str()), "{}", plan["expected_end"]);
    assert!(night.sidecar.fails(65, &["restore", "plan", "--target-xid", "4000000"]).contains("4000000"));
}

#[test]
fn every_moment_under_load_comes_back_exactly_pg15() {
    every_moment_under_load_comes_back_exactly(15);
}

#[test]
fn every_moment_under_load_comes_back_exactly_pg17() {
    every_moment_under_load_comes_back_exactly(17);
}
