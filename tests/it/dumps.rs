//! Logical dumps: what is dumped comes back the same, and what can't be dumped is never published.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, time::Duration};

use pgsidecar_core::dump::DatabaseName;

use crate::support::{
    Postgres, Proxy, Repository, Scratch, Sidecar, Way, archiving, command, give_to_servers, run, told, wait_until,
};

/// Quotes, a slash, blanks, a backslash, upper case, an emoji, and what libpq would take for a connection string.
const ODD: &str = "O'dd \"na/me\" \\ 🐘=x";

/// A little of everything that a database can have.
const CONTENT: &str = r#"
    CREATE EXTENSION pg_trgm; CREATE EXTENSION hstore;
    CREATE SCHEMA "Sales 'n' ""more""";
    CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE DOMAIN positive AS int CHECK (VALUE > 0);
    CREATE TABLE orders (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, at date NOT NULL, note text, tags hstore, m mood);
    INSERT INTO orders (at, note, tags, m) SELECT date '2026-01-01' + n, E'line\\.\n\\.\nCOMMIT;\t' || n, ('a=>' || n)::hstore, 'ok' FROM generate_series(1, 500) n;
    CREATE INDEX orders_note ON orders USING gin (note gin_trgm_ops);
    CREATE TABLE serials (n serial PRIMARY KEY, p positive UNIQUE, o bigint REFERENCES orders);
    INSERT INTO serials (p, o) SELECT n, n FROM generate_series(1, 100) n;
    CREATE TABLE measured (at date, v int) PARTITION BY RANGE (at);
    CREATE TABLE measured_25 PARTITION OF measured FOR VALUES FROM ('2025-01-01') TO ('2026-01-01');
    CREATE TABLE "measured 26" PARTITION OF measured FOR VALUES FROM ('2026-01-01') TO ('2027-01-01') PARTITION BY LIST (v);
    CREATE TABLE measured_26_rest PARTITION OF "measured 26" DEFAULT;
    INSERT INTO measured SELECT date '2025-06-01' + n, n FROM generate_series(1, 400) n;
    CREATE TABLE "Sales 'n' ""more"""."Ünï 🐘 ""t""" ("Col;umn" int, b bytea);
    INSERT INTO "Sales 'n' ""more"""."Ünï 🐘 ""t""" SELECT n, decode(md5(n::text), 'hex') FROM generate_series(1, 50) n;
    CREATE VIEW v AS SELECT id, note FROM orders WHERE note % 'line'; CREATE MATERIALIZED VIEW mv AS SELECT count(*) FROM orders;
    CREATE FUNCTION f() RETURNS int LANGUAGE plpgsql AS $$
BEGIN
-- COMMIT;
RETURN 1; END $$;
    CREATE TRIGGER t BEFORE UPDATE ON orders FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger();
    COMMENT ON TABLE orders IS 'it''s a comment';
    GRANT SELECT ON orders TO shop; ALTER TABLE serials OWNER TO shop;
    SELECT lo_from_bytea(40001, 'large'), lo_from_bytea(40002, decode(repeat('00ff', 100000), 'hex'));
    COMMENT ON LARGE OBJECT 40001 IS 'one';
"#;

fn name(text: &str) -> DatabaseName {
    text.parse().unwrap()
}

/// A server with some databases.
fn filled(scratch: &Scratch, major: u32) -> Postgres {
    let mut postgres = Postgres::initdb(scratch, major, &["--encoding=UTF8", "--locale=C.UTF-8"]);
    postgres.start(&[]);
    fill(&postgres);
    postgres
}

fn fill(postgres: &Postgres) {
    postgres.sql("CREATE ROLE shop LOGIN");
    for database in [ODD, "UPPER"] {
        postgres.sql(&format!("CREATE DATABASE {}", name(database).quoted()));
        sql_in(postgres, database, CONTENT);
    }
    postgres.sql(&format!("ALTER DATABASE {} SET search_path = 'a', \"B\", public", name(ODD).quoted()));
    postgres.sql(&format!("ALTER DATABASE {} OWNER TO shop", name(ODD).quoted()));
}

#[track_caller]
fn sql_in(postgres: &Postgres, database: &str, sql: &str) -> String {
    let mut psql = postgres.client("psql");
    psql.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", &name(database).conninfo(), "-c", sql]);
    run(&mut psql).trim_end().to_owned()
}

/// All of a database, as SQL.
#[track_caller]
fn content(postgres: &Postgres, database: &str) -> String {
    let mut dump = postgres.client("pg_dump");
    let sql = run(dump.args(["-d", &name(database).conninfo()]));
    // A random key of newer minor versions.
    sql.lines()
        .filter(|line| !line.starts_with("\\restrict") && !line.starts_with("\\unrestrict"))
        .collect::<Vec<_>>()
        .join("\n")
}

/// The command-line tool for a server, without a daemon and without a data directory, with the tools of a major version.
fn alone(scratch: &Scratch, postgres: &Postgres, repository: &Repository, tools: u32) -> Sidecar {
    let mut sidecar = Sidecar::new(scratch, postgres, repository);
    sidecar.environment.retain(|(name, _)| name != "PGDATA");
    sidecar.set("PG_BINDIR", &Postgres::bin(tools).display().to_string());
    sidecar.set("PGSIDECAR_CLUSTER", "test/dumped");
    sidecar
}

#[track_caller]
fn dump(sidecar: &Sidecar, arguments: &[&str]) -> serde_json::Value {
    sidecar.json(&[&["dump", "create", "--once"], arguments].concat())
}

#[track_caller]
fn refused(sidecar: &Sidecar, postgres: &Postgres, code: i32, arguments: &[&str]) -> String {
    let said = sidecar.fails(code, &[&["dump", "create", "--once"], arguments].concat());
    let listed = sidecar.json(&["dump", "list", "--system-identifier", &system(postgres)]);
    assert_eq!(listed.as_array().map(Vec::len), Some(0), "{listed}");
    said
}

/// All files of a local repository.
fn files(repository: &Repository) -> Vec<String> {
    fn walk(directory: &Path, all: &mut Vec<String>) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { walk(&path, all) } else { all.push(path.display().to_string()) }
        }
    }
    let Repository::Directory(path) = repository else { panic!("it's in S3") };
    let mut all = Vec::new();
    walk(path, &mut all);
    all.retain(|path| path.contains("/dumps/"));
    all.sort();
    all
}

/// A directory of client tools in which one is replaced by a shell script; `$REAL` is the real one.
fn tools_with(scratch: &Scratch, name: &str, tools: u32, program: &str, script: &str) -> String {
    let directory = scratch.dir(name);
    for other in ["pg_dump", "pg_dumpall", "pg_restore", "psql"] {
        let real = Postgres::bin(tools).join(other);
        let path = directory.join(other);
        let script = if other == program { script } else { "exec \"$REAL\" \"$@\"" };
        fs::write(&path, format!("#!/bin/sh\nREAL={}\n{script}\n", real.display())).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        give_to_servers(&path);
    }
    directory.display().to_string()
}

fn round_trip(major: u32, repository: impl FnOnce(&Scratch) -> Repository) {
    let scratch = Scratch::new();
    let postgres = filled(&scratch, major);
    let repository = repository(&scratch);
    let sidecar = alone(&scratch, &postgres, &repository, major);
    let record = dump(&sidecar, &[]);
    let id = record["id"].as_str().unwrap();
    let names: Vec<&str> =
        record["databases"].as_array().unwrap().iter().map(|d| d["name"].as_str().unwrap()).collect();
    assert_eq!(names, [ODD, "UPPER", "postgres"]);
    assert_eq!(record["tools_major"], major);
    assert!(record["databases"][0]["toc_entries"].as_u64().unwrap() > 40, "{record}");
    for deep in [&[][..], &["--deep"]] {
        sidecar.ok(&[&["dump", "verify"], deep].concat());
    }

    // Beside the old one, and in its place.
    let restored = sidecar.json(&["dump", "restore", id, "--database", ODD, "--into", "copy", "--create"]);
    assert_eq!(restored["warnings"].as_array().unwrap().len(), 0, "{restored}");
    assert_eq!(content(&postgres, "copy"), content(&postgres, ODD));
    let about = |database: &str| {
        postgres.sql(&format!(
            "SELECT pg_get_userbyid(datdba), encoding, datcollate, setconfig FROM pg_database d \
             JOIN pg_db_role_setting ON setdatabase = d.oid WHERE datname = '{}'",
            database.replace('\'', "''")
        ))
    };
    assert_eq!(about("copy"), about(ODD));
    let before = content(&postgres, "UPPER");
    sql_in(&postgres, "UPPER", "TRUNCATE orders CASCADE; DROP VIEW v");
    let said = sidecar.fails(1, &["dump", "restore", id, "--database", "UPPER"]);
    assert!(said.contains("isn't empty: it has ") && said.contains("Nothing was changed"), "{said}");
    assert_eq!(sql_in(&postgres, "UPPER", "SELECT count(*) FROM orders"), "0");
    sidecar.ok(&["dump", "restore", id, "--database", "UPPER", "--clean"]);
    assert_eq!(content(&postgres, "UPPER"), before);
    let said = sidecar.fails(1, &["dump", "restore", id, "--database", "UPPER", "--create"]);
    assert!(said.contains("exists already"), "{said}");
}

#[test]
fn a_dump_comes_back_with_extensions_large_objects_partitions_and_odd_names_pg15() {
    round_trip(15, |_| Repository::s3());
}

#[test]
fn a_dump_comes_back_with_extensions_large_objects_partitions_and_odd_names_pg17() {
    round_trip(17, Repository::directory);
}

#[test]
fn a_dump_restores_into_an_older_major_version_pg15_pg17() {
    let scratch = Scratch::new();
    let postgres = filled(&scratch, 17);
    let repository = Repository::directory(&scratch);
    let sidecar = alone(&scratch, &postgres, &repository, 17);
    let (custom, plain) = (dump(&sidecar, &[]), dump(&sidecar, &["--format", "plain"]));

    let older = scratch.dir("older");
    let data = older.join("data15");
    run(command(Postgres::bin(15).join("initdb"))
        .arg("-D")
        .arg(&data)
        .args(["-A", "trust", "-U", "postgres", "--no-sync", "--encoding=UTF8", "--locale=C.UTF-8"])
        .current_dir(&older));
    let mut old = Postgres::on(&scratch, data, 15);
    old.start(&[]);
    let mut sidecar = alone(&scratch, &old, &repository, 17);
    let globals = sidecar.json(&["dump", "restore", custom["id"].as_str().unwrap(), "--globals"]);
    assert_eq!(globals["created"], serde_json::json!(["shop"]));
    assert_eq!(globals["kept"], serde_json::json!(["postgres"]));
    let sums = "SELECT (SELECT sum(hashtext(o::text)) FROM orders o), (SELECT sum(v) FROM measured), (SELECT count(*) FROM serials), \
                md5(lo_get(40002)), (SELECT count(*) FROM pg_indexes WHERE schemaname = 'public')";
    for (dump, into) in [(&custom, "from_custom"), (&plain, "from_plain")] {
        let id = dump["id"].as_str().unwrap();
        let restored = sidecar.json(&["dump", "restore", id, "--database", "UPPER", "--into", into, "--create"]);
        assert!(restored["warnings"][0].as_str().unwrap().contains("the server is 15"), "{restored}");
        assert_eq!(sql_in(&old, into, sums), sql_in(&postgres, "UPPER", sums));
    }
    // Tools that can't read what newer ones have written.
    sidecar.set("PG_BINDIR", &Postgres::bin(15).display().to_string());
    let said = sidecar.fails(78, &["dump", "restore", custom["id"].as_str().unwrap(), "--database", "UPPER"]);
    assert!(said.contains("was made by pg_dump 17") && said.contains("15."), "{said}");
}

#[test]
fn a_server_newer_than_the_client_tools_is_refused_with_both_versions_pg15_pg17() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (postgres, mut sidecar) = archiving(&scratch, 17, &[], &repository);
    postgres.sql("CREATE TABLE t ()");
    let mut old = alone(&scratch, &postgres, &repository, 15);
    let said = refused(&old, &postgres, 78, &[]);
    assert!(said.contains("PostgreSQL 17 needs pg_dump 17") && said.contains("is older: 15."), "{said}");
    assert_eq!(files(&repository), [""; 0]);
    // 'check' says it before it's needed, and the daemon when it's asked.
    sidecar.set("PG_BINDIR", &Postgres::bin(15).display().to_string());
    let checked = sidecar.json(&["check"]);
    let finding = checked.as_array().unwrap().iter().find(|finding| finding["check"] == "dumps").unwrap();
    assert_eq!(finding["state"], "warning");
    sidecar.stop();
    sidecar.start();
    let said = sidecar.fails(78, &["dump", "create"]);
    assert!(said.contains("is older: 15."), "{said}");
    let status = sidecar.json(&["status"]);
    assert_eq!(status["last_dump_failure"]["reason"]["code"], "misconfigured");
    assert_eq!(status["state"], "degraded");
    let metrics = run(command("curl").args(["-sS", &format!("http://127.0.0.1:{}/metrics", sidecar.health_port)]));
    assert!(metrics.contains("pgsidecar_dump_failed 1"), "{metrics}");
    // Newer tools may dump an older server; of several, those of its own version are taken.
    old.environment.retain(|(name, _)| name != "PG_BINDIR");
    let path = format!("{}:{}:/usr/bin:/bin", Postgres::bin(15).display(), Postgres::bin(17).display());
    old.set("PATH", &path);
    assert_eq!(dump(&old, &[])["tools_major"], 17);
}

#[test]
fn the_daemon_dumps_and_tells_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (postgres, sidecar) = archiving(&scratch, 15, &[], &repository);
    fill(&postgres);
    let record =
        sidecar.json(&["dump", "create", "--include", "U*", "--include", ODD, "--exclude", "*OO*", "--exclude", "O*"]);
    assert_eq!(record["databases"].as_array().unwrap().len(), 1);
    assert_eq!(record["databases"][0]["name"], "UPPER");
    let status = sidecar.json(&["status"]);
    assert_eq!(status["last_dump"]["id"], record["id"]);
    assert_eq!(status["last_job"]["kind"], "dump");
    let metrics = run(command("curl").args(["-sS", &format!("http://127.0.0.1:{}/metrics", sidecar.health_port)]));
    assert!(metrics.contains("pgsidecar_dump_failed 0") && metrics.contains("pgsidecar_last_dump_timestamp_seconds "));
    assert_eq!(sidecar.json(&["dump", "show", record["id"].as_str().unwrap()]), record);
    assert_eq!(sidecar.json(&["dump", "list"]), serde_json::json!([record]));
    let said = sidecar.fails(1, &["dump", "create", "--include", "upper"]);
    assert!(said.contains("there is no database \"upper\""), "{said}");
}

#[test]
fn a_pg_dump_that_dies_half_way_publishes_nothing_and_its_remains_go_pg15() {
    let scratch = Scratch::new();
    let postgres = filled(&scratch, 15);
    let repository = Repository::directory(&scratch);
    let mut sidecar = alone(&scratch, &postgres, &repository, 15);
    let whole = dump(&sidecar, &[]);
    let before = files(&repository);

    // Killed in the middle of its output; its output cut, with exit code 0; failing at the end of it.
    for (n, (script, told)) in [
        (
            "case \"$*\" in *postgres*) \"$REAL\" \"$@\" | head -c 600; kill -9 $$;; *) exec \"$REAL\" \"$@\";; esac",
            "signal: 9",
        ),
        (
            "case \"$*\" in *postgres*) \"$REAL\" \"$@\" | head -c 100; exit 0;; *) exec \"$REAL\" \"$@\";; esac",
            "table of contents",
        ),
        (
            "\"$REAL\" \"$@\"; echo 'pg_dump: error: lost' >&2; case \"$*\" in *postgres*) exit 1;; esac",
            "pg_dump: error: lost",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        sidecar.set("PG_BINDIR", &tools_with(&scratch, &format!("tools-{n}"), 15, "pg_dump", script));
        let output = sidecar.cli(&["dump", "create", "--once"]);
        assert!(!output.status.success());
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("database \"postgres\"") && said.contains(told), "{said}");
        // Others were through by then: they are gone, and the dump before is as it was.
        assert_eq!(files(&repository), before);
        assert_eq!(sidecar.json(&["dump", "list"]), serde_json::json!([whole]));
    }

    // We are killed ourselves: what we had begun is there, is no dump, and goes with the next one.
    let slow = "case \"$*\" in *postgres*) sleep 60;; *) exec \"$REAL\" \"$@\";; esac";
    sidecar.set("PG_BINDIR", &tools_with(&scratch, "slow", 15, "pg_dump", slow));
    let (mut child, _) = sidecar.spawn(&["dump", "create", "--once"]);
    wait_until("two databases are dumped", Duration::from_secs(60), || files(&repository).len() >= before.len() + 3);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(sidecar.json(&["dump", "list"]), serde_json::json!([whole]));
    sidecar.set("PG_BINDIR", &Postgres::bin(15).display().to_string());
    let next = dump(&sidecar, &[]);
    assert_eq!(files(&repository).len(), 2 * before.len());
    assert_eq!(sidecar.json(&["dump", "list"]), serde_json::json!([whole, next]));

    // Told to stop, it ends pg_dump and tidies up itself.
    sidecar.set("PG_BINDIR", &scratch.path().join("slow").display().to_string());
    let (mut child, log) = sidecar.spawn(&["dump", "create", "--once"]);
    wait_until("two databases are dumped", Duration::from_secs(60), || {
        files(&repository).len() >= 2 * before.len() + 3
    });
    run(command("kill").arg(child.id().to_string()));
    assert_eq!(child.wait().unwrap().code(), Some(75), "{}", fs::read_to_string(log).unwrap());
    assert_eq!(files(&repository).len(), 2 * before.len());
}

#[test]
fn a_store_that_goes_away_in_the_middle_fails_the_dump_pg15() {
    let scratch = Scratch::new();
    let postgres = filled(&scratch, 15);
    let repository = Repository::s3();
    let proxy = Proxy::before(&repository);
    let mut sidecar = alone(&scratch, &postgres, &repository, 15);
    let whole = dump(&sidecar, &[]);
    let slow = "case \"$*\" in *postgres*) touch \"$PGSIDECAR_MARK\"; sleep 3;; esac; exec \"$REAL\" \"$@\"";
    let mark = scratch.path().join("begun");
    let mut through = alone(&scratch, &postgres, &repository, 15);
    through.set("AWS_ENDPOINT_URL_S3", &proxy.url());
    through.set("PGSIDECAR_MARK", &mark.display().to_string());
    through.set("PG_BINDIR", &tools_with(&scratch, "slow", 15, "pg_dump", slow));
    let (mut child, log) = through.spawn(&["dump", "create", "--once"]);
    wait_until("the last database is begun", Duration::from_secs(60), || mark.exists());
    proxy.set(Way::Refused);
    assert_eq!(child.wait().unwrap().code(), Some(69), "{}", fs::read_to_string(log).unwrap());
    assert_eq!(sidecar.json(&["dump", "list"]), serde_json::json!([whole]));
    sidecar.set("PGSIDECAR_LOG", "info");
    let output = sidecar.cli(&["dump", "create", "--once"]);
    assert!(output.status.success() && told(&output).contains("removing the remains of a dump"), "{}", told(&output));
    sidecar.ok(&["dump", "verify", "--deep"]);
}

#[test]
fn a_table_that_may_not_be_read_fails_the_dump_and_is_named_pg15() {
    let scratch = Scratch::new();
    let postgres = filled(&scratch, 15);
    let repository = Repository::directory(&scratch);
    postgres.sql("CREATE ROLE dumper LOGIN");
    for database in ["UPPER", ODD, "postgres"] {
        sql_in(&postgres, database, "GRANT pg_read_all_data TO dumper");
    }
    let mut sidecar = alone(&scratch, &postgres, &repository, 15);
    sidecar.set("PGUSER", "dumper");
    // Large objects aren't what pg_read_all_data is about.
    let said = refused(&sidecar, &postgres, 69, &["--include", "UPPER"]);
    assert!(said.contains("database \"UPPER\"") && said.contains("permission denied for large object 40001"), "{said}");
    for database in ["UPPER", ODD] {
        sql_in(&postgres, database, "GRANT SELECT ON LARGE OBJECT 40001, 40002 TO dumper");
    }
    let record = dump(&sidecar, &[]);
    assert_eq!(record["globals"]["role_passwords"], true);
    sidecar.ok(&["dump", "verify", "--deep"]);

    sql_in(&postgres, "UPPER", "REVOKE pg_read_all_data FROM dumper");
    let said = sidecar.fails(69, &["dump", "create", "--once", "--include", "UPPER"]);
    assert!(said.contains("permission denied for table") && said.contains("pg_read_all_data"), "{said}");
    assert_eq!(sidecar.json(&["dump", "list"]), serde_json::json!([record]));
    // Where all may be read but the passwords, they are left out, and that is told.
    let record = dump(&sidecar, &["--include", "postgres"]);
    assert_eq!(record["globals"]["role_passwords"], false);
    assert!(record["warnings"][0].as_str().unwrap().contains("passwords aren't in the dump"), "{record}");
}

#[test]
fn a_lock_that_isn_t_given_up_fails_the_dump_in_time_pg15() {
    let scratch = Scratch::new();
    let postgres = filled(&scratch, 15);
    let repository = Repository::directory(&scratch);
    let sidecar = alone(&scratch, &postgres, &repository, 15);
    let mut psql = postgres.client("psql");
    psql.args(["-X", "-d", "UPPER", "-c", "BEGIN; LOCK TABLE orders; SELECT pg_sleep(300)"]);
    let mut locking = psql.stdout(std::process::Stdio::null()).spawn().unwrap();
    wait_until("the table is locked", Duration::from_secs(20), || {
        postgres.sql("SELECT count(*) FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND granted") != "0"
    });
    let said = refused(&sidecar, &postgres, 69, &["--include", "UPPER", "--lock-wait-timeout", "1s"]);
    assert!(said.contains("database \"UPPER\"") && said.contains("--lock-wait-timeout"), "{said}");
    locking.kill().unwrap();
    locking.wait().unwrap();
}

#[test]
fn a_database_that_is_dropped_in_the_middle_is_left_out_and_told_pg15() {
    let scratch = Scratch::new();
    let postgres = filled(&scratch, 15);
    let repository = Repository::directory(&scratch);
    for database in ["aaa", "zzz"] {
        postgres.sql(&format!("CREATE DATABASE {database}"));
    }
    let mut sidecar = alone(&scratch, &postgres, &repository, 15);
    // While aaa is dumped, zzz goes, which comes after it.
    let script = "case \"$*\" in *aaa*) \"$(dirname \"$REAL\")/psql\" -X -q -d postgres -c 'DROP DATABASE zzz';; esac; exec \"$REAL\" \"$@\"";
    sidecar.set("PG_BINDIR", &tools_with(&scratch, "tools", 15, "pg_dump", script));
    let record = dump(&sidecar, &["--include", "aaa", "--include", "UPPER", "--include", "zzz"]);
    let databases = record["databases"].as_array().unwrap();
    let names: Vec<&str> = databases.iter().map(|database| database["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["UPPER", "aaa"]);
    assert!(record["warnings"][0].as_str().unwrap().contains("\"zzz\" was dropped"), "{record}");
    sidecar.ok(&["dump", "verify", "--deep"]);
}

#[test]
fn a_storm_of_ddl_ends_in_a_whole_dump_or_in_none_pg15() {
    let scratch = Scratch::new();
    let postgres = filled(&scratch, 15);
    let repository = Repository::directory(&scratch);
    let sidecar = alone(&scratch, &postgres, &repository, 15);
    let storm = "DO $$ BEGIN FOR n IN 1..100000 LOOP \
        EXECUTE 'CREATE TABLE IF NOT EXISTS storm_' || n % 50 || ' AS SELECT ' || n; COMMIT; \
        EXECUTE 'ALTER TABLE storm_' || n % 50 || ' ADD c' || n || ' int'; COMMIT; \
        EXECUTE 'DROP TABLE IF EXISTS storm_' || (n + 25) % 50; COMMIT; END LOOP; END $$";
    let mut psql = postgres.client("psql");
    let mut storming =
        psql.args(["-X", "-q", "-d", "UPPER", "-c", storm]).stderr(std::process::Stdio::null()).spawn().unwrap();
    let mut taken = Vec::new();
    for _ in 0..6 {
        let output = sidecar.cli(&["dump", "create", "--once", "--include", "UPPER", "--json"]);
        if output.status.success() {
            let record: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
            taken.push(record["id"].as_str().unwrap().to_owned());
        } else {
            assert_eq!(output.status.code(), Some(69), "{}", told(&output));
            assert!(told(&output).contains("database \"UPPER\""), "{}", told(&output));
        }
    }
    assert!(storming.try_wait().unwrap().is_none(), "the storm lasted");
    storming.kill().unwrap();
    storming.wait().unwrap();
    eprintln!("{} of 6 dumps in the storm succeeded", taken.len());
    let listed = sidecar.json(&["dump", "list", "--system-identifier", &system(&postgres)]);
    let listed: Vec<&str> = listed.as_array().unwrap().iter().map(|dump| dump["id"].as_str().unwrap()).collect();
    assert_eq!(listed, taken);
    for (n, id) in taken.iter().enumerate() {
        sidecar.ok(&["dump", "verify", id, "--deep"]);
        sidecar.ok(&["dump", "restore", id, "--database", "UPPER", "--into", &format!("copy{n}"), "--create"]);
        assert_eq!(sql_in(&postgres, &format!("copy{n}"), "SELECT count(*) FROM orders"), "500");
    }
}

fn system(postgres: &Postgres) -> String {
    postgres.sql("SELECT system_identifier FROM pg_control_system()")
}

#[test]
fn a_dump_is_read_by_hand_with_pg_restore_zstd_and_psql_pg17() {
    let scratch = Scratch::new();
    let postgres = filled(&scratch, 17);
    let repository = Repository::directory(&scratch);
    let sidecar = alone(&scratch, &postgres, &repository, 17);
    dump(&sidecar, &["--include", "UPPER"]);
    dump(&sidecar, &["--include", "UPPER", "--format", "plain"]);
    let files = files(&repository);
    let find = |end: &str| files.iter().find(|path| path.ends_with(end)).unwrap_or_else(|| panic!("{end}: {files:?}"));
    postgres.sql("CREATE DATABASE by_hand");
    run(postgres.client("pg_restore").args(["--exit-on-error", "-d", "by_hand", find("/UPPER.dump")]));
    assert_eq!(content(&postgres, "by_hand"), content(&postgres, "UPPER"));
    postgres.sql("CREATE DATABASE by_hand_plain");
    let psql = Postgres::bin(17).join("psql");
    for (object, into) in [("/UPPER.plain.sql.zst", "by_hand_plain"), ("/globals.sql.zst", "postgres")] {
        // The roles are all there: those statements fail, and nothing else does.
        let stop = if into == "postgres" { "0" } else { "1" };
        let pipe = format!(
            "zstd -dc '{}' | '{}' -X -q -v ON_ERROR_STOP={stop} -d {into} >/dev/null",
            find(object),
            psql.display()
        );
        let mut by_hand = command("sh");
        by_hand.env("PGHOST", &postgres.socket).env("PGUSER", "postgres").args(["-c", &pipe]);
        run(&mut by_hand);
    }
    assert_eq!(content(&postgres, "by_hand_plain"), content(&postgres, "UPPER"));
}

#[test]
fn single_tables_come_back_and_nothing_is_overwritten_pg15() {
    let scratch = Scratch::new();
    let postgres = filled(&scratch, 15);
    let repository = Repository::directory(&scratch);
    let sidecar = alone(&scratch, &postgres, &repository, 15);
    let record = dump(&sidecar, &["--include", "UPPER"]);
    let restore = ["dump", "restore", record["id"].as_str().unwrap(), "--database", "UPPER"];
    let odd = "\"Sales 'n' \"\"more\"\"\".\"Ünï 🐘 \"\"t\"\"\"";
    postgres.sql("CREATE DATABASE target");
    sql_in(
        &postgres,
        "target",
        "CREATE EXTENSION hstore; CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE SCHEMA \"Sales 'n' \"\"more\"\"\"; CREATE TABLE serials ()",
    );
    let with = |more: &[&'static str]| [&restore[..], &["--into", "target"], more].concat();
    sidecar.ok(&[&with(&["--table", "orders", "--table"])[..], &[odd]].concat());
    let sums =
        format!("SELECT (SELECT sum(hashtext(o::text)) FROM orders o), (SELECT sum(hashtext(t::text)) FROM {odd} t)");
    assert_eq!(sql_in(&postgres, "target", &sums), sql_in(&postgres, "UPPER", &sums));
    assert_eq!(sql_in(&postgres, "target", "SELECT count(*) FROM pg_constraint WHERE conname = 'orders_pkey'"), "1");
    let said = sidecar.fails(1, &with(&["--table", "measured_25", "--table", "serials"]));
    assert!(said.contains("\"public\".\"serials\" exists in database \"target\""), "{said}");
    assert_eq!(sql_in(&postgres, "target", "SELECT to_regclass('measured_25') IS NULL"), "t");
    // There is a table "measured 26" as well: in an archive's table of contents the two can't be told apart.
    let said = sidecar.fails(2, &with(&["--table", "measured"]));
    assert!(said.contains("can't be told from others"), "{said}");
    let said = sidecar.fails(1, &with(&["--table", "nothing"]));
    assert!(said.contains("there is no table"), "{said}");
    // What fails on the way leaves nothing half: the type of a column isn't there.
    postgres.sql("CREATE DATABASE bare");
    let said =
        sidecar.fails(69, &[&restore[..], &["--into", "bare", "--table", "measured_25", "--table", "orders"]].concat());
    assert!(said.contains("hstore") && said.contains("rolled back"), "{said}");
    assert_eq!(sql_in(&postgres, "bare", "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"), "0");
    let said = sidecar.fails(1, &[&restore[..], &["--into", "nowhere"]].concat());
    assert!(said.contains("there is no database \"nowhere\""), "{said}");
}

#[test]
fn a_damaged_dump_is_found_and_restores_nothing_pg15() {
    let scratch = Scratch::new();
    let postgres = filled(&scratch, 15);
    let repository = Repository::directory(&scratch);
    let sidecar = alone(&scratch, &postgres, &repository, 15);
    let custom = dump(&sidecar, &["--include", "UPPER"]);
    let plain = dump(&sidecar, &["--include", "UPPER", "--format", "plain"]);
    for path in files(&repository).iter().filter(|path| path.contains("/UPPER.")) {
        let mut bytes = fs::read(path).unwrap();
        // Near the end: the beginning reads well.
        let at = bytes.len() - 40;
        bytes[at] ^= 0x10;
        fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
        fs::write(path, &bytes).unwrap();
    }
    sidecar.ok(&["dump", "verify"]);
    let output = sidecar.cli(&["dump", "verify", "--deep"]);
    assert_eq!(output.status.code(), Some(65));
    assert_eq!(told(&output).matches("DAMAGED").count(), 2, "{}", told(&output));
    for dump in [&custom, &plain] {
        let restore =
            ["dump", "restore", dump["id"].as_str().unwrap(), "--database", "UPPER", "--into", "new", "--create"];
        let output = sidecar.cli(&restore);
        assert!(!output.status.success(), "{}", told(&output));
        assert_eq!(postgres.sql("SELECT count(*) FROM pg_database WHERE datname = 'new'"), "0");
    }
}

#[test]
fn a_plain_dump_with_large_objects_goes_into_a_new_database_alone_pg15() {
    let scratch = Scratch::new();
    let postgres = filled(&scratch, 15);
    let repository = Repository::directory(&scratch);
    let sidecar = alone(&scratch, &postgres, &repository, 15);
    for database in ["there", "small"] {
        postgres.sql(&format!("CREATE DATABASE {database}"));
    }
    sql_in(&postgres, "small", "CREATE TABLE t AS SELECT 1 AS n");
    let record = dump(&sidecar, &["--include", "UPPER", "--include", "small", "--format", "plain"]);
    let restore = |of: &'static str| ["dump", "restore", record["id"].as_str().unwrap(), "--database", of];
    let said = sidecar.fails(2, &[&restore("UPPER")[..], &["--into", "there"]].concat());
    assert!(said.contains("has large objects") && said.contains("Nothing was changed"), "{said}");
    assert_eq!(sql_in(&postgres, "there", "SELECT count(*) FROM pg_class WHERE relname = 'orders'"), "0");
    sidecar.ok(&[&restore("UPPER")[..], &["--into", "new", "--create"]].concat());
    assert_eq!(content(&postgres, "new"), content(&postgres, "UPPER"));
    sidecar.ok(&[&restore("small")[..], &["--into", "there"]].concat());
    assert_eq!(sql_in(&postgres, "there", "SELECT n FROM t"), "1");
    // What fails behind the large objects leaves no database behind.
    postgres.sql("ALTER ROLE shop RENAME TO gone");
    let said = sidecar.fails(69, &[&restore("UPPER")[..], &["--into", "again", "--create"]].concat());
    assert!(said.contains("role \"shop\" does not exist"), "{said}");
    assert_eq!(postgres.sql("SELECT count(*) FROM pg_database WHERE datname = 'again'"), "0");
}

#[test]
fn bytes_that_are_no_text_come_back_pg15() {
    let scratch = Scratch::new();
    let mut postgres = Postgres::initdb(&scratch, 15, &["--encoding=UTF8", "--locale=C"]);
    postgres.start(&[]);
    let sidecar = alone(&scratch, &postgres, &Repository::directory(&scratch), 15);
    for (database, encoding) in [("bytes", "SQL_ASCII"), ("latin", "LATIN1")] {
        postgres.sql(&format!("CREATE DATABASE {database} TEMPLATE template0 ENCODING '{encoding}'"));
        // 0x81 is in LATIN1 nothing that has a place in every other encoding, and alone no UTF-8.
        let text = "convert_from(decode('e4ff81', 'hex'), getdatabaseencoding()::name)";
        sql_in(&postgres, database, &format!("CREATE TABLE t AS SELECT {text} AS t"));
    }
    let sums = "SELECT md5(convert_to(t, getdatabaseencoding()::name)) || pg_client_encoding() FROM t";
    for format in ["custom", "plain"] {
        let record = dump(&sidecar, &["--format", format]);
        for database in ["bytes", "latin"] {
            let into = format!("{database}_{format}");
            let id = record["id"].as_str().unwrap();
            sidecar.ok(&["dump", "restore", id, "--database", database, "--into", &into, "--create"]);
            assert_eq!(sql_in(&postgres, &into, sums), sql_in(&postgres, database, sums));
        }
    }
}

#[test]
fn globals_make_no_role_of_a_value_and_settings_are_on_no_command_line_pg15() {
    let scratch = Scratch::new();
    let postgres = filled(&scratch, 15);
    let mut sidecar = alone(&scratch, &postgres, &Repository::directory(&scratch), 15);
    sql_in(&postgres, "postgres", "CREATE ROLE me LOGIN; CREATE ROLE gone");
    let attack = "SET ROLE me; ALTER ROLE me SET search_path = E'\"x\nCREATE ROLE evil SUPERUSER LOGIN;\n--\"'";
    sql_in(&postgres, "postgres", attack);
    postgres.sql("ALTER DATABASE \"UPPER\" SET my.key = 'se:cret'");
    let record = dump(&sidecar, &["--include", "UPPER"]);
    let id = record["id"].as_str().unwrap();
    postgres.sql("DROP ROLE gone");
    let globals = sidecar.json(&["dump", "restore", id, "--globals"]);
    assert_eq!(globals["created"], serde_json::json!(["gone"]));
    assert_eq!(
        postgres.sql("SELECT string_agg(rolname, ' ' ORDER BY rolname) FROM pg_roles WHERE rolname !~ '^pg_'"),
        "gone me postgres shop"
    );

    let seen = scratch.path().join("seen");
    sidecar.set("PGSIDECAR_SEEN", &seen.display().to_string());
    let script = "printf '%s\\n' \"$*\" >> \"$PGSIDECAR_SEEN\"; exec \"$REAL\" \"$@\"";
    sidecar.set("PG_BINDIR", &tools_with(&scratch, "tools", 15, "psql", script));
    sidecar.ok(&["dump", "restore", id, "--database", "UPPER", "--into", "copy", "--create"]);
    assert_eq!(sql_in(&postgres, "copy", "SHOW my.key"), "se:cret");
    let seen = fs::read_to_string(seen).unwrap();
    assert!(seen.lines().count() > 3 && !seen.contains("cret") && !seen.contains("DATABASE"), "{seen}");
}

#[test]
fn a_host_that_asks_for_tls_and_a_password_is_dumped_without_a_daemon_pg15() {
    let scratch = Scratch::new();
    let mut postgres = Postgres::initdb(&scratch, 15, &[]);
    run(command("openssl")
        .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"])
        .args(["-keyout", "server.key", "-out", "server.crt"])
        .current_dir(&postgres.data));
    postgres.configure(&["ssl = on", "password_encryption = 'scram-sha-256'"]);
    fs::write(postgres.data.join("pg_hba.conf"), "local all all trust\nhostssl all all 127.0.0.1/32 scram-sha-256\n")
        .unwrap();
    postgres.port = crate::support::free_port();
    postgres.start(&["-c", "listen_addresses=127.0.0.1"]);
    postgres.sql("CREATE ROLE dumper SUPERUSER LOGIN PASSWORD 'se:cret'");
    let repository = Repository::s3();
    let mut sidecar = alone(&scratch, &postgres, &repository, 15);
    let passfile = scratch.path().join("passfile");
    for (name, value) in [("PGHOST", "127.0.0.1"), ("PGUSER", "dumper"), ("PGSSLMODE", "disable")] {
        sidecar.set(name, value);
    }
    sidecar.set("PGPORT", &postgres.port.to_string());
    sidecar.set("PGPASSFILE", &passfile.display().to_string());
    fs::write(&passfile, "127.0.0.1:*:*:dumper:se\\:cret\n").unwrap();
    fs::set_permissions(&passfile, fs::Permissions::from_mode(0o600)).unwrap();
    give_to_servers(&passfile);
    let said = sidecar.fails(69, &["dump", "create", "--once"]);
    assert!(said.contains("no pg_hba.conf entry") && said.contains("no encryption"), "{said}");
    sidecar.set("PGSSLMODE", "require");
    let record = dump(&sidecar, &[]);
    assert_eq!(record["server"], format!("127.0.0.1:{}", postgres.port));
    let id = record["id"].as_str().unwrap();
    sidecar.ok(&["dump", "restore", id, "--database", "postgres", "--into", "copy", "--create"]);
    fs::write(&passfile, "127.0.0.1:*:*:dumper:wrong\n").unwrap();
    let said = sidecar.fails(69, &["dump", "create", "--once"]);
    assert!(said.contains("password authentication failed") && !said.contains("wrong\n"), "{said}");
}

#[test]
fn dumps_and_restores_stay_within_128_mib_pg17() {
    let scratch = Scratch::new();
    let mut postgres = Postgres::initdb(&scratch, 17, &[]);
    postgres.start(&[]);
    postgres.sql("CREATE TABLE t AS SELECT n, (SELECT string_agg(gen_random_uuid()::text, '') FROM generate_series(1, 20 + n * 0)) r FROM generate_series(1, 360000) n");
    let repository = Repository::s3();
    let sidecar = alone(&scratch, &postgres, &repository, 17);
    let limited = |arguments: &[&str]| {
        let mut command = sidecar.command("prlimit");
        // The client tools inherit it.
        command.arg(format!("--data={}", 128 << 20)).arg(Sidecar::program()).args(arguments);
        run(&mut command)
    };
    let record: serde_json::Value = serde_json::from_str(&limited(&["dump", "create", "--once", "--json"])).unwrap();
    let size = record["databases"][0]["size"].as_u64().unwrap();
    assert!(size > 128 << 20, "{size}");
    limited(&["dump", "verify", "--deep"]);
    limited(&[
        "dump",
        "restore",
        record["id"].as_str().unwrap(),
        "--database",
        "postgres",
        "--into",
        "copy",
        "--create",
    ]);
    assert_eq!(
        sql_in(&postgres, "copy", "SELECT sum(hashtext(t::text)) FROM t"),
        postgres.sql("SELECT sum(hashtext(t::text)) FROM t")
    );
}
