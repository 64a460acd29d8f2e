//! Private servers: `extract` and `drill` restore beside the live server, and touch nothing of it.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::support::{
    Postgres, Repository, Scratch, Sidecar, archiving,
    restoring::{archiving_configured, back_up, ship_wal, text},
    run, told,
};

const SMALL_WAL: &[&str] = &["--wal-segsize=1"];

/// A server with a backup, a daemon, and a scratch directory for private servers.
pub struct Beside {
    pub scratch: Scratch,
    pub sidecar: Sidecar,
    pub postgres: Postgres,
    pub runs: PathBuf,
    pub repository: PathBuf,
}

impl Beside {
    pub fn new(major: u32, options: &[&str]) -> Beside {
        let scratch = Scratch::new();
        let repository = Repository::directory(&scratch);
        let (postgres, mut sidecar) = archiving(&scratch, major, &[SMALL_WAL, options].concat(), &repository);
        let runs = scratch.dir("runs");
        sidecar.set("PGSIDECAR_SCRATCH", text(&runs));
        sidecar.set("PG_BINDIR", text(&Postgres::bin(major)));
        let repository = scratch.path().join("repository");
        Beside { scratch, sidecar, postgres, runs, repository }
    }

    /// All objects but drills' records.
    pub fn keys(&self) -> Vec<String> {
        let mut keys = files(&self.repository);
        keys.retain(|key| !key.contains("/drills/"));
        keys
    }

    /// Everything that a private server could change of the live one, but what that changes by itself.
    pub fn is_untouched(&self, keys: &[String], timeline: &str) {
        assert_eq!(self.keys(), keys);
        assert_eq!(self.postgres.sql("SELECT timeline_id FROM pg_control_checkpoint()"), timeline);
        assert_eq!(self.postgres.sql("SELECT failed_count FROM pg_stat_archiver"), "0");
        assert_eq!(files(&self.runs), Vec::<String>::new(), "nothing is left");
    }
}

/// The files below a directory, by their paths in it.
pub fn files(directory: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(next) = directories.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let entry = entry.unwrap();
            match entry.file_type().unwrap().is_dir() {
                true => directories.push(entry.path()),
                false => found.push(entry.path().strip_prefix(directory).unwrap().display().to_string()),
            }
        }
    }
    found.sort();
    found
}

/// The steps of a drill, each with its outcome.
pub fn steps(record: &serde_json::Value) -> Vec<(&str, &str)> {
    let steps = record["steps"].as_array().unwrap();
    steps.iter().map(|step| (step["step"].as_str().unwrap(), step["outcome"].as_str().unwrap())).collect()
}

fn a_dropped_table_is_extracted_and_the_live_server_keeps_going(major: u32) {
    let beside = Beside::new(major, &[]);
    let Beside { sidecar, postgres, scratch, .. } = &beside;
    postgres.sql("CREATE TABLE \"Odd Orders\" (n int PRIMARY KEY, note text)");
    postgres.sql("CREATE TABLE other (n int)");
    postgres.sql("CREATE SCHEMA parts; CREATE TABLE parts.whole (n int) PARTITION BY RANGE (n)");
    postgres.sql("CREATE TABLE parts.low PARTITION OF parts.whole FOR VALUES FROM (0) TO (10)");
    postgres.sql("CREATE TABLE parts.high PARTITION OF parts.whole FOR VALUES FROM (10) TO (20)");
    postgres.sql("INSERT INTO parts.whole VALUES (1), (11), (12)");
    back_up(sidecar);
    postgres.sql("INSERT INTO \"Odd Orders\" SELECT n, 'row ' || n FROM generate_series(1, 100) n");
    let before = postgres.now();
    std::thread::sleep(Duration::from_millis(20));
    postgres.sql("DROP TABLE \"Odd Orders\"");
    ship_wal(postgres);
    let keys = beside.keys();

    let dump = scratch.path().join("orders.dump");
    let table = "public.\"Odd Orders\"";
    let arguments = ["extract", "--database", "postgres", "--output", text(&dump), "--target-time", &before];
    let output = sidecar.cli(&[&arguments[..], &["--table", table]].concat());
    assert!(output.status.success(), "{}", told(&output));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("pg_restore --dbname=NAME") && said.contains("Recovery ended at"), "{said}");
    run(postgres.client("pg_restore").args(["--dbname=postgres"]).arg(&dump));
    assert_eq!(postgres.sql("SELECT count(*), max(note) FROM \"Odd Orders\""), "100|row 99");
    assert_eq!(postgres.sql("SELECT count(*) FROM other"), "0", "the other table isn't in it");

    // Once more to a file that exists; a table and a database that there weren't; to the end, where it's gone.
    let said = sidecar.fails(2, &arguments);
    assert!(said.contains("exists already"), "{said}");
    let elsewhere = scratch.path().join("more.dump");
    let arguments = ["extract", "--database", "postgres", "--output", text(&elsewhere)];
    let said = sidecar.fails(1, &[&arguments[..], &["--target-time", &before, "--table", "odd_orders"]].concat());
    assert!(said.contains("there was no table") && said.contains("\"Odd Orders\""), "{said}");
    let said = sidecar.fails(1, &[&arguments[..], &["--table", table]].concat());
    assert!(said.contains("there was no table") && said.contains("public.other"), "{said}");
    let said = sidecar.fails(1, &["extract", "--database", "shop", "--output", text(&elsewhere)]);
    assert!(said.contains("no database \"shop\"") && said.contains("postgres, template1"), "{said}");
    assert!(!elsewhere.exists());
    // With its partitions.
    let arguments = ["extract", "--database", "postgres", "--format", "plain", "--output", "-"];
    let sql = sidecar.ok(&[&arguments[..], &["--table", "parts.whole"]].concat());
    assert!(sql.contains("\n11\n12\n") && sql.contains("ATTACH PARTITION parts.low"), "{sql}");
    // All of it, to stdout.
    let sql = sidecar.ok(&[
        "extract",
        "--database",
        "postgres",
        "--format",
        "plain",
        "--output",
        "-",
        "--target-time",
        &before,
    ]);
    assert!(sql.contains("CREATE TABLE public.other") && sql.contains("row 57"), "{sql}");
    beside.is_untouched(&keys, "1");
}

#[test]
fn a_dropped_table_is_extracted_and_the_live_server_keeps_going_pg15() {
    a_dropped_table_is_extracted_and_the_live_server_keeps_going(15);
}

#[test]
fn a_dropped_table_is_extracted_and_the_live_server_keeps_going_pg17() {
    a_dropped_table_is_extracted_and_the_live_server_keeps_going(17);
}

fn a_drill_passes_and_status_and_metrics_tell_it(major: u32) {
    let mut beside = Beside::new(major, &["--data-checksums"]);
    let postgres = &mut beside.postgres;
    // What the live server loads, runs and keeps elsewhere isn't needed, nor wanted.
    postgres.sql("CREATE TABLE rows (n int PRIMARY KEY); INSERT INTO rows SELECT generate_series(1, 1000)");
    postgres.sql("ALTER SYSTEM SET max_prepared_transactions = 5");
    postgres.stop("fast");
    postgres.start(&[]);
    postgres.sql("CREATE DATABASE shop");
    postgres.sql("ALTER DATABASE shop SET session_preload_libraries = 'not_here_either'");
    postgres.sql("ALTER SYSTEM SET shared_preload_libraries = 'not_here'");
    postgres.sql("ALTER SYSTEM SET cluster_name = 'live'");
    postgres.configure(&["include 'not_here.conf'"]);
    back_up(&beside.sidecar);
    let postgres = &mut beside.postgres;
    postgres.sql("BEGIN; INSERT INTO rows VALUES (1001); PREPARE TRANSACTION 'p'");
    ship_wal(postgres);
    // The status keeps what it knows of drills for a minute.
    beside.sidecar.stop();
    let sidecar = &beside.sidecar;
    let keys = beside.keys();
    let good = "SELECT count(*) = 1000 FROM rows";
    let output =
        sidecar.cli(&["drill", "run", "--query", good, "--query", "SELECT current_setting('cluster_name')", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", told(&output));
    let record: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let passed = ["plan", "restore", "recovery", "amcheck", "query", "query", "checksums"].map(|step| (step, "passed"));
    assert_eq!(steps(&record), passed);
    assert_eq!((&record["outcome"], &record["recorded"]), (&"passed".into(), &true.into()));
    assert!(record["reached"].as_str().unwrap().contains('/'), "{record}");
    beside.sidecar.start();
    let sidecar = &beside.sidecar;
    let status = sidecar.json(&["status"]);
    assert_eq!((&status["last_drill"]["id"], &status["last_drill"]["outcome"]), (&record["id"], &"passed".into()));
    assert_eq!(sidecar.metric("pgsidecar_last_drill_passed"), "1");
    assert!(sidecar.ok(&["status"]).contains("Last drill"));
    assert!(sidecar.ok(&["drill", "list"]).contains("passed"));

    // A query that isn't true, one that can't be run, and without a record.
    let arguments =
        ["drill", "run", "--no-amcheck", "--no-record", "--query", "SELECT NOT (count(*) = 1000) FROM rows"];
    let output = sidecar.cli(&[&arguments[..], &["--query", "SELECT * FROM no_such_table"]].concat());
    let said = told(&output);
    assert_eq!(output.status.code(), Some(65), "{said}");
    assert!(
        said.contains("the answer is false, not true") && said.contains("no_such_table\" does not exist"),
        "{said}"
    );
    assert_eq!(sidecar.json(&["drill", "list"]).as_array().unwrap().len(), 1);
    beside.is_untouched(&keys, "1");
}

#[test]
fn a_drill_passes_and_status_and_metrics_tell_it_pg15() {
    a_drill_passes_and_status_and_metrics_tell_it(15);
}

#[test]
fn a_drill_passes_and_status_and_metrics_tell_it_pg17() {
    a_drill_passes_and_status_and_metrics_tell_it(17);
}

#[test]
fn a_chain_in_s3_is_tried_out_with_flags_alone_pg17() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (postgres, mut sidecar) = archiving_configured(&scratch, 17, SMALL_WAL, &repository, &["summarize_wal = on"]);
    postgres.sql("CREATE TABLE rows (n int); INSERT INTO rows SELECT generate_series(1, 1000)");
    let full = back_up(&sidecar);
    postgres.sql("UPDATE rows SET n = n + 1000");
    let incremental = back_up(&sidecar);
    assert!(incremental.ends_with("-incremental"), "{incremental}");
    postgres.sql("DELETE FROM rows WHERE n > 1500");
    ship_wal(&postgres);
    // Without a daemon, and with the settings as flags: the server's restore_command has to get them all the same.
    sidecar.stop();
    let runs = scratch.dir("runs");
    let mut flags = vec![format!("--scratch={}", text(&runs)), format!("--pg-bindir={}", text(&Postgres::bin(17)))];
    for (variable, flag) in
        [("PGSIDECAR_REPOSITORY", "repository"), ("AWS_ENDPOINT_URL_S3", "s3-endpoint"), ("AWS_REGION", "s3-region")]
    {
        let value = sidecar.environment.iter().find(|(name, _)| name == variable).unwrap().1.clone();
        flags.push(format!("--{flag}={value}"));
        sidecar.set(variable, "");
    }
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let arguments = ["drill", "run", "--query", "SELECT count(*) = 500 FROM rows", "--heapallindexed"];
    let record = sidecar.json(&[&arguments[..], &flags].concat());
    assert_eq!(record["chain"], serde_json::json!([full, incremental]));
    assert_eq!(steps(&record).last(), Some(&("query", "passed")));
    assert_eq!(files(&runs), Vec::<String>::new());
}
