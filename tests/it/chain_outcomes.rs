//! What becomes of chains of backups: where one can't go on, isn't whole any more, or is interrupted.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use pgsidecar_core::page::PAGE_SIZE;

use crate::{
    chains::{SUMMARIZED, take},
    failover::{promote, standby_of},
    support::{
        Postgres, Repository, Scratch, Sidecar, Wire,
        increments::files,
        restoring::{AS_A_COPY, archiving_configured, restore, restored, ship_wal, text},
        run, wait_until,
    },
};

const SMALL_WAL: &[&str] = &["--wal-segsize=1"];
const ROWS: &str = "SELECT count(*), sum(n), min(text) FROM rows";

fn rows(postgres: &Postgres) {
    postgres.sql("CREATE TABLE rows AS SELECT n, repeat('x', 200) AS text FROM generate_series(1, 10000) n");
}

fn change(postgres: &Postgres) {
    postgres.sql("UPDATE rows SET n = n + 1 WHERE n % 1000 = 0");
}

/// A server with a full backup and two incremental ones on it.
fn chain(scratch: &Scratch, repository: &Repository) -> (Postgres, Sidecar, [String; 3]) {
    let (postgres, sidecar) = archiving_configured(scratch, 17, SMALL_WAL, repository, SUMMARIZED);
    rows(&postgres);
    let full = take(&sidecar, "full");
    change(&postgres);
    let first = take(&sidecar, "incremental");
    change(&postgres);
    let second = take(&sidecar, "incremental");
    change(&postgres);
    ship_wal(&postgres);
    (postgres, sidecar, [full, first, second])
}

fn backups(scratch: &Scratch, postgres: &Postgres) -> PathBuf {
    let system = postgres.sql("SELECT system_identifier FROM pg_control_system()");
    scratch.path().join("repository/main").join(system).join("backups")
}

#[test]
fn a_chain_without_its_middle_is_passed_over_and_refused_where_it_is_named_pg17() {
    let scratch = Scratch::new();
    let (postgres, sidecar, [full, first, second]) = chain(&scratch, &Repository::directory(&scratch));
    let shown = sidecar.ok(&["restore", "plan"]);
    assert!(shown.contains(&format!("Chain   {full}, then {first}, then {second}\n")), "{shown}");
    let plan = sidecar.json(&["restore", "plan"]);
    assert_eq!((&plan["backup"]["id"], &plan["passed_over"]), (&second.clone().into(), &serde_json::json!([])));
    let stored = |id: &String| {
        let record = sidecar.json(&["backup", "show", id]);
        let parts = record["parts"].as_array().unwrap().iter().chain([&record["manifest"], &record["index"]]);
        parts.map(|part| part["size"].as_u64().unwrap()).sum::<u64>()
    };
    assert_eq!(plan["download_bytes"], [&full, &first, &second].map(stored).iter().sum::<u64>());

    fs::remove_file(backups(&scratch, &postgres).join(&first).join("backup.json")).unwrap();
    let said = sidecar.fails(65, &["restore", "run", "--to", "/nowhere", "--backup", &second]);
    assert!(
        said.contains(&second) && said.contains(&format!("builds on {first}")) && said.contains("HINT: "),
        "{said}"
    );
    let shown = sidecar.ok(&["restore", "plan"]);
    assert!(shown.contains(&format!("WARNING backup {second} is newer but can't be restored")), "{shown}");
    let plan = sidecar.json(&["restore", "plan"]);
    assert_eq!((&plan["chain"], &plan["passed_over"][0]["backup"]), (&serde_json::json!([full]), &second.into()));
    let copy = restored(&scratch, &sidecar, 17, "older", &[]);
    assert_eq!(copy.sql(ROWS), postgres.sql(ROWS));

    // What can't be built on isn't.
    let next = sidecar.json(&["backup", "create", "--fast", "--type", "incremental"]);
    assert!(next["id"].as_str().unwrap().ends_with("-full"), "{next}");
    let warned = sidecar.log();
    assert!(warned.contains(&format!("builds on {first}, which is not in the repository")), "{warned}");
}

#[test]
fn a_damaged_link_is_named_and_leaves_nothing_to_start_on_pg17() {
    let scratch = Scratch::new();
    let (postgres, sidecar, chain) = chain(&scratch, &Repository::directory(&scratch));
    let to = scratch.path().join("refused");
    for id in &chain {
        let part = backups(&scratch, &postgres).join(id).join("part-00001.tar.zst");
        let whole = fs::read(&part).unwrap();
        let mut damaged = whole.clone();
        damaged[whole.len() / 2] ^= 1;
        fs::write(&part, damaged).unwrap();
        let said = sidecar.fails(65, &["restore", "run", "--to", text(&to)]);
        assert!(said.contains(&format!("{id}/part-00001.tar.zst")) && said.contains("damaged"), "{said}");
        assert!(!to.exists());
        fs::write(&part, whole).unwrap();
    }
    sidecar.ok(&["restore", "run", "--to", text(&to)]);
}

#[test]
fn a_restore_killed_between_links_starts_nothing_and_can_be_run_again_s3s_pg17() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (postgres, mut sidecar, [full, first, second]) = chain(&scratch, &repository);
    let Repository::S3(server) = &repository else { unreachable!("it's on S3") };
    let proxy = Wire::to(&server.address());
    let to = scratch.path().join("restored");
    sidecar.through(&proxy);
    let parts = sidecar.json(&["backup", "show", &second])["parts"].as_array().unwrap().len();
    let moments = [
        format!("{second}/index"),
        format!("{full}/part-00001"),
        format!("{first}/part-0000"),
        format!("{second}/part-00001"),
        format!("{second}/part-{parts:05}"),
    ];
    for request in moments {
        proxy.hold("GET", &request);
        let (mut restoring, log) = sidecar.spawn(&["restore", "run", "--to", text(&to)]);
        proxy.wait_for_held();
        assert!(restoring.try_wait().unwrap().is_none(), "{}", fs::read_to_string(&log).unwrap());
        restoring.kill().unwrap();
        restoring.wait().unwrap();
        proxy.release();
        assert!(to.join("pgsidecar.restoring").exists(), "{request}");
        for startable in ["PG_VERSION", "global/pg_control", "backup_label"] {
            assert!(!to.join(startable).exists(), "{request}: {startable}");
        }
    }
    let copy = restored(&scratch, &sidecar, 17, "restored", &[]);
    assert_eq!(copy.sql(ROWS), postgres.sql(ROWS));
    assert!(!files(&to).iter().any(|path| path.contains("pgsidecar") || path.contains("INCREMENTAL.")));
}

/// Blocks that are empty where another version of the file has something.
fn emptied(file: &[u8], other: &[u8]) -> usize {
    let pages = |bytes: &[u8]| bytes.chunks(PAGE_SIZE).map(|page| page.iter().all(|b| *b == 0)).collect::<Vec<_>>();
    pages(file).into_iter().zip(pages(other)).filter(|(empty, before)| *empty && !before).count()
}

#[test]
fn rows_that_were_cut_off_do_not_come_back_through_a_restore_pg17() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (postgres, sidecar) = archiving_configured(&scratch, 17, SMALL_WAL, &repository, SUMMARIZED);
    // COPY adds more blocks than it fills, and of those that stay empty no WAL tells.
    let fill = |table: &str| postgres.sql(&format!("COPY {table} FROM PROGRAM 'seq -f %0200g 1 3000'"));
    for table in ["at_once", "later"] {
        postgres.sql(&format!("CREATE TABLE {table} AS SELECT repeat('x', 200) || n FROM generate_series(1, 20000) n"));
        postgres.sql(&format!("VACUUM (FREEZE) {table}"));
    }
    let path = |table: &str| postgres.sql(&format!("SELECT pg_relation_filepath('{table}')"));
    let (at_once, later) = (path("at_once"), path("later"));
    let full = take(&sidecar, "full");
    for table in ["at_once", "later"] {
        postgres.sql(&format!("DELETE FROM {table} WHERE ctid >= '(100,0)'"));
        postgres.sql(&format!("VACUUM (TRUNCATE) {table}"));
    }
    fill("at_once");
    let first = take(&sidecar, "incremental");
    let live = |path: &str| fs::read(postgres.data.join(path)).unwrap();
    let same = |to: &Path| {
        for path in [&at_once, &later] {
            assert!(fs::read(to.join(path)).unwrap() == live(path), "{path}");
        }
    };
    let before = restore(&scratch, &sidecar, "full", &["--backup", &full]);
    assert!(emptied(&live(&at_once), &fs::read(before.join(&at_once)).unwrap()) > 0);
    same(&restore(&scratch, &sidecar, "first", &["--backup", &first]));
    fill("later");
    let second = take(&sidecar, "incremental");
    assert!(emptied(&live(&later), &fs::read(before.join(&later)).unwrap()) > 0);
    same(&restore(&scratch, &sidecar, "second", &["--backup", &second]));
    same(&restore(&scratch, &sidecar, "differential", &["--backup", &take(&sidecar, "differential")]));
    ship_wal(&postgres);
    let mut copy = Postgres::on(&scratch, scratch.path().join("second"), 17);
    copy.spawn(AS_A_COPY);
    copy.wait_for_promotion();
    for table in ["at_once", "later"] {
        let count = format!("SELECT count(*) FROM {table}");
        assert_eq!(copy.sql(&count), postgres.sql(&count));
    }
}

#[test]
fn a_backup_on_a_new_timeline_builds_on_one_of_the_old_timeline_pg17() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (mut primary, mut sidecar) = archiving_configured(&scratch, 17, SMALL_WAL, &repository, SUMMARIZED);
    let (mut standby, beside_standby) = standby_of(&scratch, &primary, &repository);
    rows(&primary);
    let full = take(&sidecar, "full");
    change(&primary);
    let first = take(&sidecar, "incremental");
    change(&primary);
    ship_wal(&primary);
    primary.stop("fast");
    sidecar.stop();
    promote(&mut standby);
    change(&standby);
    let second = take(&beside_standby, "incremental");
    change(&standby);
    ship_wal(&standby);
    let record = beside_standby.json(&["backup", "show", &second]);
    assert_eq!((&record["parent"], &record["timeline"]), (&first.clone().into(), &2.into()));
    let plan = beside_standby.json(&["restore", "plan"]);
    assert_eq!(plan["chain"], serde_json::json!([full, first, second]));
    let to = restore(&scratch, &beside_standby, "restored", &[]);
    run(standby.client("pg_verifybackup").arg("-n").arg(&to));
    let mut copy = Postgres::on(&scratch, to, 17);
    copy.spawn(AS_A_COPY);
    copy.wait_for_promotion();
    assert_eq!(copy.sql(ROWS), standby.sql(ROWS));
    run(copy.client("pg_amcheck").args(["--all", "--install-missing", "--heapallindexed"]));
}

#[test]
fn without_summaries_auto_is_full_and_says_why_pg17() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (postgres, sidecar) = archiving_configured(&scratch, 17, SMALL_WAL, &repository, SUMMARIZED);
    let auto = |words: &str| {
        let id = sidecar.json(&["backup", "create", "--fast"])["id"].as_str().unwrap().to_owned();
        assert!(sidecar.log().contains(words), "{words}\n{}", sidecar.log());
        id.split_once('-').unwrap().1.to_owned()
    };
    assert_eq!(auto("there is no backup yet"), "full");
    rows(&postgres);
    assert_eq!(auto("incremental"), "incremental");
    let foreseen = || sidecar.ok(&["backup", "create", "--dry-run"]);
    // Of what was written since the last checkpoint there are no summaries yet.
    change(&postgres);
    assert!(foreseen().starts_with("It would be an incremental backup, on "), "{}", foreseen());
    postgres.sql("CHECKPOINT");
    let summaries = || fs::read_dir(postgres.data.join("pg_wal/summaries")).unwrap().map(|entry| entry.unwrap().path());
    let begin = postgres.sql("SELECT redo_lsn FROM pg_control_checkpoint()");
    wait_until("the WAL is summarized", Duration::from_secs(60), || {
        postgres.sql(&format!("SELECT summarized_lsn >= '{begin}' FROM pg_get_wal_summarizer_state()")) == "t"
    });
    summaries().filter(|path| path.extension().is_some_and(|end| end == "summary")).for_each(|path| {
        fs::remove_file(path).unwrap();
    });
    let said = foreseen();
    assert!(said.starts_with("It would be a full backup: the WAL of timeline 1 from "), "{said}");
    assert!(said.contains("the summaries were removed"), "{said}");
    let plan = |wanted: &str| sidecar.json(&["backup", "create", "--dry-run", "--type", wanted])["falls_back"].clone();
    assert_eq!((plan("auto"), plan("incremental")), (false.into(), true.into()));
    assert_eq!(auto("the summaries were removed"), "full");

    postgres.sql("ALTER SYSTEM SET summarize_wal = off");
    postgres.sql("SELECT pg_reload_conf()");
    wait_until("summarize_wal is off", Duration::from_secs(10), || postgres.sql("SHOW summarize_wal") == "off");
    let said = foreseen();
    assert_eq!(said, "It would be a full backup: the server doesn't summarize its WAL (summarize_wal is off).\n");
    assert_eq!(auto("summarize_wal is off"), "full");
}

#[test]
fn what_it_builds_on_is_looked_for_again_before_a_backup_is_listed_pg17() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (postgres, sidecar) = archiving_configured(&scratch, 17, SMALL_WAL, &repository, SUMMARIZED);
    rows(&postgres);
    let full = take(&sidecar, "full");
    change(&postgres);
    let archiving = |command: &str| {
        postgres.sql(&format!("ALTER SYSTEM {command}"));
        postgres.sql("SELECT pg_reload_conf()");
    };
    archiving("SET archive_command = 'false'");
    let (mut creating, said) = sidecar.spawn(&["backup", "create", "--fast", "--type", "incremental"]);
    wait_until("it waits for its WAL", Duration::from_secs(60), || {
        sidecar.log().contains("-incremental: waiting for its WAL")
    });
    fs::remove_file(backups(&scratch, &postgres).join(&full).join("backup.json")).unwrap();
    archiving("RESET archive_command");
    let status = creating.wait().unwrap();
    let said = fs::read_to_string(said).unwrap();
    assert_eq!(status.code(), Some(65), "{said}");
    assert!(said.contains(&format!("builds on {full}, which is not in the repository")), "{said}");
    assert_eq!(sidecar.json(&["backup", "list"]), serde_json::json!([]));
    let left: Vec<_> = fs::read_dir(backups(&scratch, &postgres)).unwrap().map(|id| id.unwrap().file_name()).collect();
    assert_eq!(left, [full.as_str()], "what there was of it is removed");
}

#[test]
fn of_postgres_15_there_are_full_backups_only_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (_postgres, sidecar) = archiving_configured(&scratch, 15, SMALL_WAL, &repository, &[]);
    for kind in ["incremental", "differential"] {
        let said = sidecar.fails(2, &["backup", "create", "--fast", "--type", kind]);
        assert!(said.contains("only full backups") && said.contains("PostgreSQL 15"), "{said}");
    }
    assert_eq!(sidecar.json(&["backup", "list"]), serde_json::json!([]));
    let auto = sidecar.json(&["backup", "create", "--fast"]);
    assert!(auto["id"].as_str().unwrap().ends_with("-full"), "{auto}");
}

/// Every page changes then, and no WAL tells of it.
#[test]
fn after_checksums_were_turned_on_the_next_backup_is_a_full_one_pg17() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (mut postgres, sidecar) = archiving_configured(&scratch, 17, SMALL_WAL, &repository, SUMMARIZED);
    rows(&postgres);
    take(&sidecar, "full");
    postgres.stop("fast");
    run(postgres.client("pg_checksums").arg("--enable").arg("-D").arg(&postgres.data));
    postgres.start(&[]);
    change(&postgres);
    let said = sidecar.ok(&["backup", "create", "--dry-run"]);
    assert!(said.contains("page checksums were turned on or off"), "{said}");
    let id = sidecar.json(&["backup", "create", "--fast", "--type", "incremental"])["id"].as_str().unwrap().to_owned();
    assert!(id.ends_with("-full"), "{id}");
    take(&sidecar, "incremental");
    ship_wal(&postgres);
    let copy = restored(&scratch, &sidecar, 17, "copy", &[]);
    run(copy.client("pg_amcheck").args(["--install-missing", "--heapallindexed"]));
}
