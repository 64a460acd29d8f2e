//! A restore plan says where recovery will end, and recovery ends there; what isn't in the WAL is refused. Restore points
//! are found by their names.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use serde_json::Value;

use crate::support::{
    Postgres, Repository, Scratch, Sidecar, beside, give_to_servers,
    restoring::{archiving_configured, back_up, restored, ship_wal, text},
};

const SMALL_WAL: &[&str] = &["--wal-segsize=1"];
const CONF: &[&str] = &["track_commit_timestamp = on", "autovacuum = off"];

struct Source {
    scratch: Scratch,
    postgres: Postgres,
    sidecar: Sidecar,
}

/// The commit of a row.
#[derive(Clone)]
struct Commit {
    xid: String,
    time: String,
}

impl Source {
    fn new(major: u32) -> Source {
        let scratch = Scratch::new();
        let (postgres, sidecar) =
            archiving_configured(&scratch, major, SMALL_WAL, &Repository::directory(&scratch), CONF);
        postgres.sql("CREATE TABLE rows (n int PRIMARY KEY)");
        Source { scratch, postgres, sidecar }
    }

    fn insert(&self, row: u32) -> Commit {
        let xid = self.postgres.sql(&format!("INSERT INTO rows VALUES ({row}) RETURNING pg_current_xact_id()"));
        let time = self.postgres.sql(&format!(
            "SELECT to_char(pg_xact_commit_timestamp('{xid}') AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US') || 'Z'"
        ));
        Commit { xid, time }
    }

    fn plan(&self, arguments: &[&str]) -> Value {
        self.sidecar.json(&[&["restore", "plan"], arguments].concat())
    }

    /// The rows of a server that was restored like this.
    fn rows(&self, name: &str, arguments: &[&str]) -> String {
        let server = restored(&self.scratch, &self.sidecar, self.postgres.major, name, arguments);
        server.sql("SELECT string_agg(n::text, ' ' ORDER BY n) FROM rows")
    }

    /// The object of a segment.
    fn object(&self, segment: &str) -> PathBuf {
        let found = objects(&self.scratch.path().join("repository"));
        found.into_iter().find(|path| path.ends_with(format!("{segment}.zst"))).unwrap()
    }
}

/// All files below.
fn objects(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { objects(&path) } else { vec![path] }).collect()
}

/// Segments with commits in each: 2 rows before the backup, and 12 behind it.
fn spread(source: &Source) -> Vec<Commit> {
    let mut commits = vec![source.insert(1), source.insert(2)];
    back_up(&source.sidecar);
    for row in 3..=14 {
        commits.push(source.insert(row));
        if row % 2 == 0 {
            ship_wal(&source.postgres);
        }
    }
    commits
}

fn last_commit(plan: &Value) -> (&str, String, &str) {
    let end = &plan["expected_end"];
    assert_eq!(end["state"], "verified", "{end}");
    let last = &end["last_commit"];
    (last["time"].as_str().unwrap(), last["xid"].to_string(), end["lsn"].as_str().unwrap())
}

/// A time without the zeros at the end of its fraction.
fn time_of(commit: &Commit) -> jiff::Timestamp {
    commit.time.parse().unwrap()
}

fn a_time_is_promised_exactly_or_refused(major: u32) {
    let source = Source::new(major);
    let commits = spread(&source);
    let (sixth, seventh, last) = (&commits[5], &commits[6], commits.last().unwrap());
    let promised = |arguments: &[&str], commit: &Commit| {
        let plan = source.plan(arguments);
        let (time, xid, _) = last_commit(&plan);
        assert_eq!(
            (time.parse::<jiff::Timestamp>().unwrap(), xid),
            (time_of(commit), commit.xid.clone()),
            "{arguments:?}"
        );
        plan
    };
    let refused = |arguments: &[&str], words: &[&str]| {
        let said = source.sidecar.fails(65, &[&["restore", "plan"], arguments].concat());
        assert!(words.iter().all(|word| said.contains(word)), "{words:?}\n{said}");
    };
    let between = (time_of(sixth).as_microsecond() + time_of(seventh).as_microsecond()) / 2;
    let between = jiff::Timestamp::from_microsecond(between).unwrap().to_string();
    let check = || {
        let plan = promised(&["--target-time", &between], sixth);
        assert_eq!(plan["expected_end"]["stops_at"]["xid"].to_string(), seventh.xid);
        promised(&["--target-time", &sixth.time], sixth);
        promised(&["--target-time", &sixth.time, "--target-exclusive"], &commits[4]);
        promised(&["--target-time", &commits[12].time], &commits[12]);
        promised(&["--target-time", &last.time, "--target-exclusive"], &commits[12]);
        let end = format!("--target-xid {}", last.xid);
        refused(&["--target-time", &last.time], &["after the last archived WAL", &time_of(last).to_string(), &end]);
        refused(&["--target-time", "2100-01-01 00:00Z"], &[&time_of(last).to_string(), &end]);
    };
    check();
    promised(&["--target-xid", &sixth.xid], sixth);
    promised(&[], last);
    assert_eq!(source.rows("between", &["--target-time", &between]), "1 2 3 4 5 6");
    assert_eq!(
        source.rows("last", &["--target-xid", &last.xid]),
        (1..=14).map(|n| n.to_string()).collect::<Vec<_>>().join(" ")
    );

    // The store's clock is hours off, in either direction, and goes back and forth.
    for (ahead, each) in [(true, 0), (false, 0), (true, 977)] {
        for (number, path) in (0..).zip(objects(&source.scratch.path().join("repository"))) {
            let off = Duration::from_secs(5 * 3600 + each * number % 7200);
            let now = SystemTime::now();
            File::options()
                .write(true)
                .open(path)
                .unwrap()
                .set_modified(if ahead { now + off } else { now - off })
                .unwrap();
        }
        check();
    }

    // What lies in a gap, or behind it.
    let next = source.insert(15);
    ship_wal(&source.postgres);
    promised(&["--target-time", &last.time], last);
    let plan = source.plan(&["--target-time", &between]);
    let lsn = plan["expected_end"]["lsn"].as_str().unwrap();
    let (_, low) = lsn.split_once('/').unwrap();
    let missing = format!("0000000100000000{:08X}", (u32::from_str_radix(low, 16).unwrap() >> 20) + 1);
    fs::remove_file(source.object(&missing)).unwrap();
    promised(&["--target-time", &between], sixth);
    refused(&["--target-time", &last.time], &[&missing, "missing"]);
    refused(&["--target-xid", &next.xid], &[&missing, "missing"]);
}

#[test]
fn a_time_is_promised_exactly_or_refused_pg15() {
    a_time_is_promised_exactly_or_refused(15);
}

#[test]
fn a_time_is_promised_exactly_or_refused_pg17() {
    a_time_is_promised_exactly_or_refused(17);
}

#[test]
fn a_transaction_that_was_rolled_back_or_never_was_is_told_pg15() {
    let source = Source::new(15);
    source.insert(1);
    back_up(&source.sidecar);
    source.insert(2);
    let output = source.postgres.sql("BEGIN; INSERT INTO rows VALUES (3) RETURNING pg_current_xact_id(); ROLLBACK");
    let aborted = output.lines().next().unwrap().to_owned();
    source.insert(4);
    let lsn = source.postgres.sql("SELECT pg_current_wal_insert_lsn()");
    ship_wal(&source.postgres);
    let plan = source.plan(&["--target-xid", &aborted]);
    assert_eq!(plan["expected_end"]["stops_at"]["committed"], false);
    let said = source.sidecar.ok(&[
        "restore",
        "plan",
        "--target-xid",
        &aborted,
        "--to",
        text(&source.scratch.path().join("a/b")),
    ]);
    assert!(
        said.contains(&format!("WARNING transaction {aborted} was rolled back")) && said.contains("Room "),
        "{said}"
    );
    assert_eq!(source.rows("aborted", &["--target-xid", &aborted]), "1 2");
    let never: u64 = aborted.parse::<u64>().unwrap() + 1000;
    let said = source.sidecar.fails(65, &["restore", "plan", "--target-xid", &never.to_string()]);
    assert!(said.contains(&format!("no transaction {never} has ended")), "{said}");
    // The position before the switch has a record behind it, the rest of the segment hasn't.
    let plan = source.plan(&["--target-lsn", &lsn]);
    assert_eq!(plan["expected_end"]["state"], "verified");
    let (high, low) = lsn.split_once('/').unwrap();
    let tail = format!("{high}/{:X}", u32::from_str_radix(low, 16).unwrap() | 0xFFFF0);
    let said = source.sidecar.fails(65, &["restore", "plan", "--target-lsn", &tail]);
    assert!(said.contains("after the last archived WAL"), "{said}");
    // How much it takes.
    assert_eq!(plan["restored_bytes"], plan["backup"]["restored_bytes"]);
    assert!(
        plan["wal"]["segments"].as_u64().unwrap() >= 1 && plan["wal"]["stored_bytes"].as_u64().unwrap() > 0,
        "{plan}"
    );
}

fn create(source: &Source, name: &str) -> Value {
    source.sidecar.json(&["restore-point", "create", name])
}

fn restore_points_are_found_by_their_names(major: u32) {
    let source = Source::new(major);
    source.insert(1);
    let first = back_up(&source.sidecar);
    source.insert(2);
    let one = create(&source, "before it's late");
    assert_eq!(one["archived"], true);
    source.insert(3);
    let plan = source.plan(&["--target-name", "before it's late"]);
    assert_eq!((&plan["backup"]["id"], &plan["expected_end"]["lsn"]), (&Value::from(first.as_str()), &one["lsn"]));
    assert_eq!(source.rows("first", &["--target-name", "before it's late"]), "1 2");

    // The same name again: PostgreSQL would stop at the first.
    let two = create(&source, "before it's late");
    source.insert(4);
    ship_wal(&source.postgres);
    let lsn = two["lsn"].as_str().unwrap();
    let said = source.sidecar.fails(65, &["restore", "plan", "--target-name", "before it's late"]);
    assert!(said.contains(&format!("--target-lsn {lsn} --target-exclusive")), "{said}");
    assert_eq!(source.rows("by-lsn", &["--target-lsn", lsn, "--target-exclusive"]), "1 2 3");
    assert_eq!(source.rows("first-again", &["--target-name", "before it's late", "--backup", &first]), "1 2");
    let second = back_up(&source.sidecar);
    source.insert(5);
    create(&source, "before it's late");
    let plan = source.plan(&["--target-name", "before it's late"]);
    assert_eq!(plan["backup"]["id"], second.as_str());
    assert_eq!(source.rows("third", &["--target-name", "before it's late"]), "1 2 3 4 5");

    // One that PostgreSQL made without us.
    let made = source.postgres.sql("SELECT pg_create_restore_point('ä by hand')");
    ship_wal(&source.postgres);
    let said = source.sidecar.fails(65, &["restore", "plan", "--target-name", "ä by hand"]);
    assert!(said.contains("no record") && said.contains("\"before it's late\""), "{said}");
    // With a backup it is looked for.
    let plan = source.plan(&["--target-name", "ä by hand", "--backup", &second]);
    assert_eq!(plan["expected_end"]["lsn"], made.as_str());
    let said = source.sidecar.fails(65, &["restore", "plan", "--target-name", "nowhere", "--backup", &second]);
    assert!(said.contains("no restore point \"nowhere\""), "{said}");
    let said = source.sidecar.fails(1, &["restore-point", "record", "by hand", "--lsn", &made]);
    assert!(said.contains("no restore point \"by hand\" ends at"), "{said}");
    for _ in 0..2 {
        let record = source.sidecar.json(&["restore-point", "record", "ä by hand", "--lsn", &made]);
        assert_eq!(record["lsn"], made.as_str());
    }
    assert_eq!(source.plan(&["--target-name", "ä by hand"])["backup"]["id"], second.as_str());
    let list = source.sidecar.json(&["restore-point", "list"]);
    let names: Vec<&str> = list.as_array().unwrap().iter().map(|point| point["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["before it's late", "before it's late", "before it's late", "ä by hand"]);
    assert!(source.sidecar.ok(&["restore-point", "list"]).contains(&made));
}

#[test]
fn restore_points_are_found_by_their_names_pg15() {
    restore_points_are_found_by_their_names(15);
}

#[test]
fn restore_points_are_found_by_their_names_pg17() {
    restore_points_are_found_by_their_names(17);
}

#[test]
fn what_postgresql_refuses_is_told_and_nothing_is_recorded_pg15() {
    let scratch = Scratch::new();
    let (mut postgres, mut sidecar) = beside(&scratch, 15, SMALL_WAL, &Repository::directory(&scratch));
    postgres.configure(&["wal_level = minimal", "max_wal_senders = 0"]);
    postgres.start(&[]);
    sidecar.start();
    let said = sidecar.fails(78, &["restore-point", "create", "x"]);
    assert!(said.contains("wal_level is minimal") && said.contains("HINT"), "{said}");
    postgres.stop("fast");
    postgres.configure(&["wal_level = replica", "hot_standby = on", "restore_command = 'false'"]);
    // As a primary once: a standby can't follow WAL that was written with less.
    postgres.start(&[]);
    postgres.stop("fast");
    fs::write(postgres.data.join("standby.signal"), "").unwrap();
    give_to_servers(&postgres.data.join("standby.signal"));
    postgres.start(&[]);
    let said = sidecar.fails(69, &["restore-point", "create", "x"]);
    assert!(said.contains("is a standby") && said.contains("HINT"), "{said}");
    assert_eq!(sidecar.json(&["restore-point", "list"]), Value::Array(Vec::new()));
}

#[test]
fn a_restore_point_without_its_record_is_told_and_recorded_later_pg15() {
    let source = Source::new(15);
    back_up(&source.sidecar);
    // What makes only its record fail.
    let cluster =
        objects(&source.scratch.path().join("repository")).into_iter().find(|path| path.ends_with("cluster.json"));
    let in_the_way = cluster.unwrap().with_file_name("restore-points");
    fs::write(&in_the_way, "").unwrap();
    let output = source.sidecar.cli(&["restore-point", "create", "lost"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && said.contains("is in the WAL, at") && said.contains("restore-point record"),
        "{said}"
    );
    let (_, lsn) = said.split_once("--lsn ").unwrap();
    let lsn = lsn.split('\'').next().unwrap();
    fs::remove_file(&in_the_way).unwrap();
    source.sidecar.fails(1, &["restore-point", "record", "lost", "--lsn", lsn]);
    ship_wal(&source.postgres);
    source.sidecar.ok(&["restore-point", "record", "lost", "--lsn", lsn]);
    assert_eq!(source.plan(&["--target-name", "lost"])["expected_end"]["lsn"], lsn);
    // The same name, and only the second is recorded.
    source.postgres.sql("SELECT pg_create_restore_point('twice')");
    source.sidecar.ok(&["restore-point", "create", "twice"]);
    let said = source.sidecar.fails(65, &["restore", "plan", "--target-name", "twice"]);
    assert!(said.contains("there is another one of that name at") && said.contains("--target-exclusive"), "{said}");

    // Not waited for, and so not to be had at once.
    let later = source.sidecar.json(&["restore-point", "create", "later", "--no-switch"]);
    assert_eq!(later["archived"], false);
    source.sidecar.fails(65, &["restore", "plan", "--target-name", "later"]);
    source.sidecar.json(&["restore-point", "create", "now", "--no-wait"]);
    source.postgres.wait_until_archived();
    source.plan(&["--target-name", "later"]);
    let said = source.sidecar.fails(2, &["restore-point", "create", "a\nb"]);
    assert!(said.contains("can't be the name of a restore point"), "{said}");
}
