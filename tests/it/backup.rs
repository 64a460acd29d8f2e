//! Base backups: what is in them, and that none is listed that isn't whole.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::support::{
    Background, Postgres, Repository, Scratch, command, path_with,
    restoring::{AS_A_COPY, archiving_configured, back_up, restore, ship_wal, text},
    run, wait_until,
};

const QUIET: &[&str] = &["autovacuum = off"];

/// The content of all regular files below a directory, by their paths in it.
fn files(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if fs::metadata(&path).unwrap().is_dir() {
                directories.push(path);
            } else {
                files.insert(path.strip_prefix(root).unwrap().to_owned(), fs::read(&path).unwrap());
            }
        }
    }
    files
}

/// The paths in all parts of a backup, as tar lists them.
fn listed_by_tar(scratch: &Scratch, id: &str) -> Vec<String> {
    let script = "for part in repository/main/*/backups/$1/part-*.tar.zst; do zstd -qdc \"$part\" | tar t; done";
    let said = run(command("bash").args(["-euo", "pipefail", "-c", script, "bash", id]).current_dir(scratch.path()));
    said.lines().map(str::to_owned).collect()
}

fn verified(postgres: &Postgres, directory: &Path, options: &[&str]) {
    run(postgres.client("pg_verifybackup").arg("-n").args(options).arg(directory));
}

fn dump(postgres: &Postgres) -> String {
    let dump = run(postgres.client("pg_dumpall").arg("--no-sync"));
    // Each dump of the latest minors has a random word in \restrict.
    dump.lines().filter(|line| !line.contains("restrict ")).map(|line| format!("{line}\n")).collect()
}

fn what_is_restored_is_what_was_there(major: u32) {
    let scratch = Scratch::new();
    let options = &["--wal-segsize=1", "--data-checksums"];
    let repository = Repository::s3();
    let (postgres, sidecar) = archiving_configured(&scratch, major, options, &repository, QUIET);
    run(postgres.client("pgbench").args(["-i", "-q", "-s", "1"]));
    postgres.sql("CREATE DATABASE \"an other\"");
    postgres.sql("CREATE TABLE big AS SELECT g, repeat('x', 500) FROM generate_series(1, 5000) g");
    postgres.sql("CREATE TABLE empty (n int)");
    postgres.sql("SELECT lo_from_bytea(4711, 'large object')");
    postgres.sql("CHECKPOINT");
    back_up(&sidecar);

    let to = restore(&scratch, &sidecar, "restored", &[]);
    verified(&postgres, &to, &[]);
    let changed = ["backup_label", "backup_manifest", "postgresql.auto.conf", "recovery.signal", "global/pg_control"];
    let left_out = ["postmaster.pid", "postmaster.opts"];
    let (mut theirs, mut ours) = (files(&postgres.data), files(&to));
    theirs.retain(|path, _| {
        !["pg_wal", "pg_subtrans", "pg_notify", "pg_stat_tmp", "pg_dynshmem"].iter().any(|top| path.starts_with(top))
            && !path.ends_with("pg_internal.init")
            && !left_out.iter().chain(&changed).any(|other| path == Path::new(other))
    });
    for path in changed {
        assert!(ours.remove(Path::new(path)).is_some(), "{path} is there");
    }
    let differ: Vec<&PathBuf> = theirs
        .keys()
        .chain(ours.keys())
        .filter(|path| !theirs.contains_key(*path) || !ours.contains_key(*path))
        .collect();
    assert!(differ.is_empty(), "only in one: {differ:?}");
    for (path, content) in &theirs {
        assert!(*content == ours[path], "{} differs", path.display());
    }

    let mut copy = Postgres::on(&scratch, to, major);
    copy.spawn(AS_A_COPY);
    copy.wait_for_promotion();
    assert_eq!(dump(&postgres), dump(&copy));
    run(copy.client("pg_amcheck").args(["--all", "--install-missing", "--heapallindexed"]));
}

#[test]
fn what_is_restored_is_what_was_there_pg15() {
    what_is_restored_is_what_was_there(15);
}

#[test]
fn what_is_restored_is_what_was_there_pg17() {
    what_is_restored_is_what_was_there(17);
}

/// DDL of all sorts, again and again, until the file `stop` appears.
const DDL: &str = "i=10; until [ -e stop ]; do i=$((i+1))
  psql -X -q -v ON_ERROR_STOP=1 \
    -c \"CREATE TABLE t$i AS SELECT generate_series(1, 500) n\" -c \"CREATE INDEX ON t$i (n)\" \
    -c \"CREATE UNLOGGED TABLE u$i AS SELECT 1 AS n\" -c \"TRUNCATE churn\" -c \"INSERT INTO churn VALUES ($i)\" \
    -c \"DROP TABLE IF EXISTS t$((i-2)), u$((i-2))\" \
    -c \"CREATE DATABASE d$i\" -c \"DROP DATABASE IF EXISTS d$((i-2))\" || exit 1
  echo $i >rounds
done";

fn a_backup_under_load_with_ddl_is_consistent_and_holds_nothing_that_it_should_not(major: u32) {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (postgres, mut sidecar) = archiving_configured(&scratch, major, &[], &repository, &["work_mem = '64kB'"]);
    sidecar.stop();
    sidecar.set("PGSIDECAR_PART_SIZE", "8MB");
    sidecar.start();
    run(postgres.client("pgbench").args(["-i", "-q", "-s", "2"]));
    postgres.sql("CREATE TABLE churn (n int)");
    postgres.sql("CREATE UNLOGGED TABLE fleeting AS SELECT generate_series(1, 1000) AS n");
    postgres.sql("CREATE INDEX ON fleeting (n)");

    // A temporary table, and a sort that has spilled to disk, both held open.
    let held = "CREATE TEMP TABLE passing AS SELECT generate_series(1, 1000); BEGIN; \
                DECLARE c CURSOR FOR SELECT * FROM generate_series(1, 100000) g ORDER BY random(); FETCH 1 FROM c";
    let _held = Background::start(postgres.client("psql").args(["-X", "-q", "-c", held, "-c", "SELECT pg_sleep(600)"]));
    let there = |pattern: &str| {
        let mut bash = command("bash");
        bash.arg("-c").arg(format!("compgen -G '{}/base/{pattern}'", text(&postgres.data)));
        bash.output().unwrap().status.success()
    };
    wait_until("temporary files are there", Duration::from_secs(30), || {
        there("pgsql_tmp/pgsql_tmp*") && there("5/t*_*")
    });
    let pgbench = Background::start(postgres.client("pgbench").args(["-n", "-c", "2", "-T", "600"]));
    let mut bash = command("bash");
    bash.args(["-c", DDL]).env("PATH", path_with(major)).current_dir(&postgres.socket);
    bash.env("PGHOST", &postgres.socket).env("PGUSER", "postgres").env("PGDATABASE", "postgres");
    let mut ddl = Background::start(&mut bash);
    let rounds = || fs::read_to_string(postgres.socket.join("rounds")).ok().and_then(|n| n.trim().parse::<u32>().ok());
    wait_until("DDL runs", Duration::from_secs(60), || rounds() >= Some(12));
    let before = rounds();
    let id = back_up(&sidecar);
    wait_until("DDL has gone on", Duration::from_secs(60), || rounds() > before);
    fs::write(postgres.socket.join("stop"), "").unwrap();
    assert!(ddl.wait().unwrap().success(), "{}", postgres.log());
    drop(pgbench);
    ship_wal(&postgres);

    let paths = listed_by_tar(&scratch, &id);
    assert!(paths.iter().any(|path| path == "global/pg_control") && paths.iter().any(|path| path == "pg_wal/"));
    let unlogged = postgres.sql("SELECT pg_relation_filepath('fleeting')");
    assert!(paths.contains(&format!("{unlogged}_init")), "the init fork of {unlogged}");
    for path in &paths {
        let name = path.trim_end_matches('/').rsplit('/').next().unwrap();
        let temporary = name.starts_with('t') && name[1..].starts_with(|c: char| c.is_ascii_digit());
        let directories = ["pg_wal", "pg_wal/archive_status", "pg_wal/summaries"];
        let wal = path.starts_with("pg_wal/") && !directories.contains(&path.trim_end_matches('/'));
        let bad = ["postmaster.pid", "postmaster.opts", "pg_internal.init"].contains(&name)
            || path.contains("pgsql_tmp")
            || temporary
            || wal
            || *path == unlogged;
        assert!(!bad, "{path} has no place in a backup");
    }
    assert_eq!(paths.last().map(String::as_str), Some("PG_VERSION"), "what makes it startable is last");

    let to = restore(&scratch, &sidecar, "restored", &[]);
    verified(&postgres, &to, &[]);
    let mut copy = Postgres::on(&scratch, to, major);
    copy.spawn(AS_A_COPY);
    copy.wait_for_promotion();
    let sums = "SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers), \
                (SELECT sum(bbalance) FROM pgbench_branches), (SELECT coalesce(sum(delta), 0) FROM pgbench_history)";
    let balances = copy.sql(sums);
    let all: Vec<&str> = balances.split('|').collect();
    assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "{balances}");
    assert_eq!(balances, postgres.sql(sums), "all that was committed was archived");
    assert_eq!(copy.sql("SELECT count(*) FROM fleeting"), "0", "an unlogged table comes back empty");
    let tables = "SELECT string_agg(relname, ' ' ORDER BY relname) FROM pg_class WHERE relname ~ '^[tu][0-9]+$'";
    let databases = "SELECT string_agg(datname, ' ' ORDER BY datname) FROM pg_database";
    for (sql, what) in [(tables, "tables"), (databases, "databases"), ("SELECT n FROM churn", "rows")] {
        assert_eq!(copy.sql(sql), postgres.sql(sql), "the same {what}");
    }
    run(copy.client("pg_amcheck").args(["--install-missing", "--heapallindexed"]));
}

#[test]
fn a_backup_under_load_with_ddl_is_consistent_and_holds_nothing_that_it_should_not_pg15() {
    a_backup_under_load_with_ddl_is_consistent_and_holds_nothing_that_it_should_not(15);
}

#[test]
fn a_backup_under_load_with_ddl_is_consistent_and_holds_nothing_that_it_should_not_pg17() {
    a_backup_under_load_with_ddl_is_consistent_and_holds_nothing_that_it_should_not(17);
}
