//! How a backup ends: listed when it's whole, and otherwise with a reason and without a trace.

use std::{fs, path::PathBuf, process::Stdio, time::Duration};

use crate::support::{
    Postgres, Repository, Scratch, Sidecar,
    restoring::{archiving_configured, back_up, restored, ship_wal, text},
    told, wait_until,
};

const SMALL_WAL: &[&str] = &["--wal-segsize=1"];

/// The directory of the repository in which the backups lie.
fn backups(scratch: &Scratch, postgres: &Postgres) -> PathBuf {
    let system = postgres.sql("SELECT system_identifier FROM pg_control_system()");
    scratch.path().join("repository/main").join(system).join("backups")
}

/// Nothing of a backup that failed is left: neither in the repository nor in PostgreSQL.
fn without_a_trace(sidecar: &Sidecar, backups: &PathBuf) {
    assert_eq!(sidecar.json(&["backup", "list"]), serde_json::json!([]));
    let left: Vec<_> =
        fs::read_dir(backups).map(|entries| entries.map(|entry| entry.unwrap().path()).collect()).unwrap_or_default();
    assert_eq!(left, [""; 0].map(PathBuf::from), "remains");
}

fn no_session(postgres: &Postgres) {
    wait_until("no session of pgsidecar is left", Duration::from_secs(10), || {
        postgres.sql("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgsidecar'") == "0"
    });
}

#[test]
fn complete_backups_are_listed_and_shown_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (postgres, sidecar) = archiving_configured(&scratch, 15, SMALL_WAL, &repository, &[]);
    let output = sidecar.cli(&["backup", "list"]);
    assert!(output.status.success() && output.stdout.is_empty(), "{}", told(&output));
    assert!(told(&output).contains("no backups yet; 'pgsidecar backup create' takes one"));
    assert_eq!(sidecar.json(&["backup", "list"]), serde_json::json!([]));

    let created = sidecar.ok(&["backup", "create", "--fast", "--label", "before the upgrade"]);
    let first = created.lines().next().unwrap().split_whitespace().nth(1).unwrap().to_owned();
    let second = back_up(&sidecar);
    let labels: Vec<&str> = created.lines().map(|line| line.split_whitespace().next().unwrap()).collect();
    assert_eq!(labels, ["Backup", "Kind", "Complete", "WAL", "Server", "Database", "Stored"]);
    assert!(created.contains("PostgreSQL 15\n") && created.contains("on timeline 1\n"), "{created}");
    assert_eq!(sidecar.ok(&["backup", "show", &first]), created, "create and show say the same");

    let list = sidecar.ok(&["backup", "list"]);
    let rows: Vec<Vec<&str>> = list.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["BACKUP", "COMPLETE", "TIMELINE", "LSN", "DATABASE", "STORED"]);
    assert_eq!([rows[1][0], rows[2][0], rows[1][3]], [&first, &second, "1"], "oldest first\n{list}");
    assert_eq!(rows.len(), 3);

    let json = sidecar.json(&["backup", "list"]);
    assert_eq!(json[0], sidecar.json(&["backup", "show", &first]));
    let record = &json[0];
    let system = postgres.sql("SELECT system_identifier FROM pg_control_system()");
    assert_eq!(record["system_identifier"].to_string().trim_matches('"'), system);
    for (name, value) in
        [("timeline", 1.into()), ("parent", serde_json::Value::Null), ("warnings", serde_json::json!([]))]
    {
        assert_eq!(record[name], value, "{name}");
    }
    // The label is PostgreSQL's, in the backup.
    let copy = restored(&scratch, &sidecar, 15, "copy", &["--target-immediate", "--backup", &first]);
    let label = fs::read_to_string(copy.data.join("backup_label.old")).unwrap();
    assert!(label.contains("LABEL: before the upgrade\n"), "{label}");

    let said = sidecar.fails(1, &["backup", "show", "20200101T000000Z-full"]);
    assert!(said.contains("there is no backup 20200101T000000Z-full") && said.contains("HINT: "), "{said}");
    sidecar.fails(2, &["backup", "show", "latest"]);

    // Without its commit marker it isn't a backup.
    let directory = backups(&scratch, &postgres);
    fs::remove_file(directory.join(&second).join("backup.json")).unwrap();
    assert_eq!(sidecar.json(&["backup", "list"]).as_array().unwrap().len(), 1);
    sidecar.fails(1, &["backup", "show", &second]);
    ship_wal(&postgres);
    assert_eq!(sidecar.json(&["restore", "plan"])["backup"]["id"], first);
    // What this pod began and did not complete, its next run removes.
    back_up(&sidecar);
    assert!(!directory.join(&second).exists());
    assert!(directory.join(&first).join("backup.json").exists());
}

#[test]
fn a_backup_whose_wal_does_not_arrive_is_not_done_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (postgres, mut sidecar) = archiving_configured(&scratch, 15, SMALL_WAL, &repository, &[]);
    sidecar.stop();
    sidecar.set("PGSIDECAR_BACKUP_WAL_TIMEOUT", "2s");
    sidecar.start();
    ship_wal(&postgres);
    postgres.sql("ALTER SYSTEM SET archive_command = 'false'");
    postgres.sql("SELECT pg_reload_conf()");
    wait_until("the archiver has the setting", Duration::from_secs(20), || {
        postgres.switch_wal();
        postgres.sql("SELECT failed_count > 0 FROM pg_stat_archiver") == "t"
    });
    let said = sidecar.fails(75, &["backup", "create", "--fast"]);
    let failed = postgres.sql("SELECT last_failed_wal FROM pg_stat_archiver");
    let missing = said.split("WAL segment ").nth(1).unwrap().split(',').next().unwrap();
    assert!(missing.len() == 24 && missing >= failed.as_str(), "{said}\n{failed}");
    assert!(
        said.contains("has not arrived in the repository") && said.contains("HINT: Look at archive_command"),
        "{said}"
    );
    without_a_trace(&sidecar, &backups(&scratch, &postgres));
    no_session(&postgres);

    postgres.sql("ALTER SYSTEM RESET archive_command");
    postgres.sql("SELECT pg_reload_conf()");
    postgres.wait_until_archived();
    back_up(&sidecar);
}

#[test]
fn one_backup_runs_at_a_time_and_one_whose_server_stops_leaves_nothing_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (mut postgres, mut sidecar) = archiving_configured(&scratch, 15, &[], &repository, &[]);
    postgres.sql(
        "CREATE TABLE big AS SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 500000) g GROUP BY g % 10000",
    );
    postgres.sql("CHECKPOINT");
    sidecar.stop();
    // As slow as can be, in parts that are stored one after the other.
    for (name, value) in
        [("PGSIDECAR_COMPRESSION_LEVEL", "19"), ("PGSIDECAR_PARALLELISM", "1"), ("PGSIDECAR_PART_SIZE", "1MB")]
    {
        sidecar.set(name, value);
    }
    sidecar.start();
    let directory = backups(&scratch, &postgres);
    let mut create = sidecar.command(Sidecar::program());
    let create = create.args(["backup", "create", "--fast"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let create = create.spawn().unwrap();
    wait_until("files are being read", Duration::from_secs(30), || {
        sidecar.json(&["status"])["last_job"]["bytes"].as_u64().is_some_and(|bytes| bytes > 1 << 20)
    });
    let said = sidecar.fails(75, &["backup", "create", "--fast"]);
    assert!(said.contains("a backup is already under way") && said.contains("HINT: Wait"), "{said}");

    postgres.stop("immediate");
    let ended = create.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(69), "{}", told(&ended));
    assert!(told(&ended).contains("the session with PostgreSQL ended during the backup"), "{}", told(&ended));
    without_a_trace(&sidecar, &directory);

    postgres.start(&[]);
    sidecar.stop();
    sidecar.set("PGSIDECAR_COMPRESSION_LEVEL", "1");
    sidecar.start();
    back_up(&sidecar);
}

#[test]
fn a_server_that_is_not_on_the_data_directory_is_not_backed_up_pg15() {
    let (scratch, elsewhere) = (Scratch::new(), Scratch::new());
    let repository = Repository::directory(&scratch);
    let (postgres, mut sidecar) = archiving_configured(&scratch, 15, SMALL_WAL, &repository, &[]);
    let mut other = Postgres::initdb(&elsewhere, 15, SMALL_WAL);
    other.start(&["-c", "archive_mode=on"]);
    sidecar.stop();
    sidecar.set("PGHOST", text(&other.socket));
    sidecar.start();
    let said = sidecar.fails(1, &["backup", "create", "--fast"]);
    for server in [&postgres, &other] {
        let system = server.sql("SELECT system_identifier FROM pg_control_system()");
        assert!(said.contains(&system), "{system}: {said}");
        no_session(server);
    }
    assert!(said.contains("HINT: PGHOST and PGPORT lead to another server"), "{said}");
    without_a_trace(&sidecar, &backups(&scratch, &postgres));
}
