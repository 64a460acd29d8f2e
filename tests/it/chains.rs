//! Chains of backups: restored, they are what was there, and what PostgreSQL's own tools make of them.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::support::{
    Background, Postgres, Repository, Scratch, Sidecar, command,
    increments::files,
    path_with,
    restoring::{AS_A_COPY, archiving_configured, restore, ship_wal, text},
    run, wait_until,
};

/// Summaries, and nothing going on but what the test does.
pub const SUMMARIZED: &[&str] = &["summarize_wal = on", "autovacuum = off", "max_wal_size = 10GB"];

/// Takes a backup of this kind, which isn't allowed to become another; answers with its id.
#[track_caller]
pub fn take(sidecar: &Sidecar, kind: &str) -> String {
    let id = sidecar.json(&["backup", "create", "--fast", "--type", kind])["id"].as_str().unwrap().to_owned();
    assert!(id.ends_with(&format!("-{kind}")), "{id}\n{}", sidecar.log());
    id
}

/// Unpacks a backup into a directory of this name as the documentation says.
fn unpacked(scratch: &Scratch, id: &str) -> PathBuf {
    let to = scratch.dir(&format!("parts-{id}"));
    let script = "for part in repository/main/*/backups/$1/part-*.tar.zst; do zstd -qdc \"$part\" | tar x -C \"$2\"; done\n\
                  zstd -qdc repository/main/*/backups/$1/backup_manifest.zst >\"$2/backup_manifest\"";
    let mut bash = command("bash");
    run(bash.args(["-euo", "pipefail", "-c", script, "bash", id, text(&to)]).current_dir(scratch.path()));
    to
}

/// What recovery settings change.
const NOT_COMPARED: [&str; 3] = ["postgresql.auto.conf", "recovery.signal", "tablespace_map"];

/// Compares a restored directory with what pg_combinebackup makes of the unpacked backups, full one first. Where a
/// tablespace is, it lies in the directory itself here.
fn same_as_combined(postgres: &Postgres, scratch: &Scratch, chain: &[PathBuf], restored: &Path) {
    let output = scratch.path().join(format!("combined-{}", restored.file_name().unwrap().to_str().unwrap()));
    let mut combine = postgres.client("pg_combinebackup");
    run(combine.arg("--no-sync").arg("-o").arg(&output).args(chain));
    run(postgres.client("pg_verifybackup").arg("-n").arg(&output));
    let (mut theirs, mut ours) = (files(&output), files(restored));
    for path in NOT_COMPARED {
        theirs.remove(path);
        ours.remove(path);
    }
    assert_eq!(ours, theirs);
    assert!(ours.len() > 900, "{}", ours.len());
    for path in ours {
        assert!(fs::read(restored.join(&path)).unwrap() == fs::read(output.join(&path)).unwrap(), "{path}");
    }
    fs::remove_dir_all(output).unwrap();
}

fn verified(postgres: &Postgres, directory: &Path) {
    run(postgres.client("pg_verifybackup").arg("-n").arg(directory));
    let left: Vec<String> = files(directory).into_iter().filter(|path| path.contains("INCREMENTAL.")).collect();
    assert_eq!(left, [""; 0]);
}

fn dump(postgres: &Postgres) -> String {
    let dump = run(postgres.client("pg_dumpall").args(["--no-sync", "--no-unlogged-table-data"]));
    // Each dump of the latest minors has a random word in \restrict.
    dump.lines().filter(|line| !line.contains("restrict ")).map(|line| format!("{line}\n")).collect()
}

/// What PostgreSQL's own checks find: nothing.
fn sound(postgres: &Postgres) {
    run(postgres.client("pg_amcheck").args(["--all", "--install-missing", "--heapallindexed"]));
    postgres.sql("CREATE EXTENSION IF NOT EXISTS pg_visibility");
    let wrong = "SELECT count(*) FROM pg_class c, LATERAL (SELECT pg_check_visible(c.oid) UNION ALL \
                 SELECT pg_check_frozen(c.oid)) t WHERE c.relkind IN ('r', 't', 'm') AND c.relpersistence = 'p'";
    assert_eq!(postgres.sql(wrong), "0");
}

/// Starts what was restored and waits until it is promoted.
fn started(scratch: &Scratch, to: PathBuf) -> Postgres {
    let mut copy = Postgres::on(scratch, to, 17);
    copy.spawn(AS_A_COPY);
    copy.wait_for_promotion();
    copy
}

/// DDL of all sorts, again and again, until the file `stop` appears.
const DDL: &str = "i=10; until [ -e stop ]; do i=$((i+1))
  psql -X -q -v ON_ERROR_STOP=1 \
    -c \"CREATE TABLE t$i AS SELECT generate_series(1, 3000) n, repeat('x', 50) AS text\" -c \"CREATE INDEX ON t$i (n)\" \
    -c \"UPDATE t$i SET n = -n WHERE n % 700 = 0\" -c \"DELETE FROM t$((i-1)) WHERE n % 2 = 0\" \
    -c \"VACUUM t$((i-1))\" -c \"CLUSTER t$i USING t${i}_n_idx\" \
    -c \"TRUNCATE churn\" -c \"COPY churn FROM PROGRAM 'seq 1 5000'\" \
    -c \"DELETE FROM churn WHERE n > 100\" -c \"VACUUM (TRUNCATE) churn\" -c \"COPY churn FROM PROGRAM 'seq 1 5000'\" \
    -c \"DROP TABLE IF EXISTS t$((i-5))\" \
    -c \"CREATE DATABASE d$i TABLESPACE space\" -c \"DROP DATABASE IF EXISTS d$((i-2))\" || exit 1
  echo $i >rounds
done";

fn chains_under_load_are_what_was_there(options: &[&str]) {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (mut postgres, mut sidecar) = archiving_configured(&scratch, 17, options, &repository, SUMMARIZED);
    sidecar.stop();
    sidecar.set("PGSIDECAR_PART_SIZE", "8MB");
    sidecar.start();
    for space in ["space", "early", "late"] {
        scratch.dir(space);
    }
    let tablespace = |name: &str| {
        postgres.sql(&format!("CREATE TABLESPACE {name} LOCATION '{}'", scratch.path().join(name).display()));
    };
    tablespace("space");
    tablespace("early");
    run(postgres.client("pgbench").args(["-i", "-q", "-s", "3"]));
    postgres.sql("CREATE TABLE churn (n int)");
    postgres.sql("CREATE TABLE t10 (n int)");
    postgres.sql("CREATE TABLE still TABLESPACE space AS SELECT n, repeat('y', 100) FROM generate_series(1, 20000) n");
    postgres.sql("CREATE TABLE soon TABLESPACE early AS SELECT n FROM generate_series(1, 20000) n");
    postgres.sql("CREATE DATABASE gone TABLESPACE early");
    postgres.sql("CREATE UNLOGGED TABLE fleeting AS SELECT generate_series(1, 1000) AS n");
    let pgbench = Background::start(postgres.client("pgbench").args(["-n", "-c", "2", "-R", "100", "-T", "600"]));
    let mut bash = command("bash");
    bash.args(["-c", DDL]).env("PATH", path_with(17)).current_dir(&postgres.socket);
    bash.env("PGHOST", &postgres.socket).env("PGUSER", "postgres").env("PGDATABASE", "postgres");
    bash.env("PGPORT", postgres.port.to_string());
    let mut ddl = Background::start(&mut bash);
    let rounds = || fs::read_to_string(postgres.socket.join("rounds")).ok().and_then(|n| n.trim().parse::<u32>().ok());
    let mut next = 12;
    let mut some_rounds = || {
        wait_until("DDL runs", Duration::from_secs(120), || {
            assert!(ddl.try_wait().unwrap().is_none(), "{}", postgres.log());
            rounds() >= Some(next)
        });
        next = rounds().unwrap() + 2;
    };
    some_rounds();
    let full = take(&sidecar, "full");
    some_rounds();
    postgres.sql("UPDATE still SET n = -n WHERE n % 1000 = 0");
    let first = take(&sidecar, "incremental");
    // A tablespace goes, another one comes, and a table moves.
    postgres.sql("DROP TABLE soon");
    postgres.sql("DROP DATABASE gone");
    postgres.sql("DROP TABLESPACE early");
    tablespace("late");
    postgres.sql("CREATE TABLE moved TABLESPACE late AS SELECT n FROM generate_series(1, 5000) n");
    some_rounds();
    let second = take(&sidecar, "incremental");
    postgres.sql("ALTER TABLE moved SET TABLESPACE space");
    postgres.sql("DELETE FROM still WHERE n > 10000");
    postgres.sql("VACUUM (TRUNCATE) still");
    some_rounds();
    let differential = take(&sidecar, "differential");
    some_rounds();
    fs::write(postgres.socket.join("stop"), "").unwrap();
    assert!(ddl.wait().unwrap().success(), "{}", postgres.log());
    drop(pgbench);
    wait_until("pgbench's sessions have ended", Duration::from_secs(20), || {
        postgres.sql("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgbench'") == "0"
    });
    ship_wal(&postgres);
    let expected = dump(&postgres);
    // Replay makes a tablespace that came after a backup where it was.
    postgres.stop("fast");

    let chains: BTreeMap<&str, Vec<&String>> = BTreeMap::from([
        ("full", vec![&full]),
        ("first", vec![&full, &first]),
        ("second", vec![&full, &first, &second]),
        ("differential", vec![&full, &differential]),
    ]);
    let parts: BTreeMap<&String, PathBuf> =
        [&full, &first, &second, &differential].map(|id| (id, unpacked(&scratch, id))).into();
    for (name, ids) in chains {
        let backup = *ids.last().unwrap();
        let planned = sidecar.json(&["restore", "plan", "--backup", backup]);
        assert_eq!(planned["chain"], serde_json::json!(ids), "{name}");
        let record = sidecar.json(&["backup", "show", backup]);
        let mut arguments = vec!["--backup".to_owned(), backup.clone()];
        for tablespace in record["tablespaces"].as_array().unwrap() {
            let old = tablespace["location"].as_str().unwrap();
            let new = format!("{}-{name}", Path::new(old).file_name().unwrap().to_str().unwrap());
            arguments.extend(["--tablespace-mapping".to_owned(), format!("{old}={}/{new}", text(scratch.path()))]);
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let to = restore(&scratch, &sidecar, name, &arguments);
        if ids.len() > 1 {
            verified(&postgres, &to);
            let chain: Vec<PathBuf> = ids.iter().map(|id| parts[id].clone()).collect();
            same_as_combined(&postgres, &scratch, &chain, &to);
        } else {
            run(postgres.client("pg_verifybackup").args(["-n", "-i", "tablespace_map"]).arg(&to));
        }
        let copy = started(&scratch, to);
        let moved = |dump: String| dump.replace(&format!("-{name}'"), "'");
        let there = moved(dump(&copy));
        let differ = there.lines().zip(expected.lines()).find(|(there, expected)| there != expected);
        assert!(there == expected, "{name}: not what was there: {differ:?}");
        assert_eq!(copy.sql("SELECT count(*) FROM fleeting"), "0");
        sound(&copy);
    }
}

#[test]
fn chains_under_load_are_what_was_there_with_checksums_pg17() {
    chains_under_load_are_what_was_there(&["--data-checksums", "--wal-segsize=4"]);
}

#[test]
fn chains_under_load_are_what_was_there_without_checksums_pg17() {
    chains_under_load_are_what_was_there(&["--wal-segsize=1"]);
}
