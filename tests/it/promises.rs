//! What backups and restores promise at moments that are hard to meet.

use std::{fs, path::Path, time::Duration};

use crate::support::{
    Look, Mode, Postgres, Repository, Scratch, Sidecar, Wire, beside, give_to_servers,
    restoring::{restored, text},
    wait_until,
};

const PATIENCE: Duration = Duration::from_secs(60);

/// A repository on the S3 server, and a server with a daemon that goes there by a way that can be disturbed.
/// `before` is done before the server starts.
fn archiving_through_a_proxy(
    scratch: &Scratch,
    settings: &[(&str, &str)],
    before: impl FnOnce(&Postgres),
) -> (Postgres, Sidecar, Repository, Wire) {
    let repository = Repository::s3();
    let Repository::S3(server) = &repository else { unreachable!("it's on S3") };
    let proxy = Wire::to(&server.address());
    let (mut postgres, mut sidecar) = beside(scratch, 15, &["--wal-segsize=1"], &repository);
    sidecar.through(&proxy);
    settings.iter().for_each(|(name, value)| sidecar.set(name, value));
    postgres.configure(&sidecar.archive_settings().iter().map(String::as_str).collect::<Vec<_>>());
    before(&postgres);
    postgres.start(&[]);
    sidecar.start();
    (postgres, sidecar, repository, proxy)
}

fn is_listed_before(data: &Path, first: &str, second: &str) -> bool {
    let names = fs::read_dir(data).unwrap().map(|entry| entry.unwrap().file_name());
    let names: Vec<_> = names.filter(|name| name == first || name == second).collect();
    names[0] == first
}

/// Puts a directory with a thousand files into the data directory, where a walk comes to it before `pg_tblspc`.
fn thousand_files_before_pg_tblspc(postgres: &Postgres) {
    let tablespaces = postgres.data.join("pg_tblspc");
    for n in 0.. {
        let name = format!("thousand-{n}");
        let directory = postgres.data.join(&name);
        fs::create_dir(&directory).unwrap();
        // File systems list by name, by a hash of it, or by age in either direction.
        if !is_listed_before(&postgres.data, &name, "pg_tblspc") {
            fs::remove_dir(&tablespaces).unwrap();
            fs::create_dir(&tablespaces).unwrap();
            give_to_servers(&tablespaces);
        }
        if is_listed_before(&postgres.data, &name, "pg_tblspc") {
            for file in 0..1000 {
                fs::write(directory.join(file.to_string()), [b'x'; 4096]).unwrap();
                give_to_servers(&directory.join(file.to_string()));
            }
            return give_to_servers(&directory);
        }
        fs::remove_dir(&directory).unwrap();
    }
}

#[test]
fn a_tablespace_that_is_created_during_a_backup_ends_it_with_that_reason_pg15() {
    let scratch = Scratch::new();
    let settings = [("PGSIDECAR_PARALLELISM", "1"), ("PGSIDECAR_PART_SIZE", "1MB")];
    let (postgres, sidecar, repository, proxy) =
        archiving_through_a_proxy(&scratch, &settings, thousand_files_before_pg_tblspc);
    proxy.hold("PUT", "part-00001");
    let (mut creating, log) = sidecar.spawn(&["backup", "create", "--fast"]);
    proxy.wait_for_held();
    let place = scratch.dir("tablespace");
    postgres.sql(&format!("CREATE TABLESPACE late LOCATION '{}'", place.display()));
    let oid = postgres.sql("SELECT oid FROM pg_tablespace WHERE spcname = 'late'");
    proxy.release();
    assert_eq!(creating.wait().unwrap().code(), Some(75));
    let said = fs::read_to_string(log).unwrap();
    assert!(said.contains(&format!("the tablespace {oid} was created while the backup ran")), "{said}");
    assert!(said.contains("HINT: Take the backup again."), "{said}");
    assert_eq!(sidecar.json(&["backup", "list"]), serde_json::json!([]));
    assert_eq!(Look::into(&repository).matching("/backups/"), Vec::<String>::new());
    let next = sidecar.json(&["backup", "create", "--fast"]);
    assert_eq!(next["tablespaces"][0]["oid"].to_string(), oid, "{next:#}");
}

#[test]
fn a_second_restore_into_one_directory_is_refused_and_the_first_ends_well_pg15() {
    let scratch = Scratch::new();
    let (postgres, sidecar, _repository, proxy) = archiving_through_a_proxy(&scratch, &[], |_| ());
    postgres.sql("CREATE TABLE t AS SELECT generate_series(1, 1000) n");
    sidecar.ok(&["backup", "create", "--fast"]);
    postgres.switch_wal();
    postgres.wait_until_archived();
    let to = scratch.path().join("restored");
    let run = ["restore", "run", "--to", text(&to)];
    proxy.hold("GET", "part-00002");
    let (mut first, log) = sidecar.spawn(&run);
    proxy.wait_for_held();
    let entries = || fs::read_dir(&to).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
    let before = entries();
    let said = sidecar.fails(73, &run);
    assert!(said.contains("is being restored to at this moment; nothing was changed"), "{said}");
    assert_eq!(first.try_wait().unwrap(), None);
    assert!(before.iter().all(|name| entries().contains(name)), "{before:?}");
    proxy.release();
    assert!(first.wait().unwrap().success(), "{}", fs::read_to_string(log).unwrap());
    let said = sidecar.fails(73, &run);
    assert!(said.contains("holds a database"), "{said}");
    let mut server = Postgres::on(&scratch, to, 15);
    server.start(&["-c", "archive_mode=off"]);
    server.wait_for_promotion();
    assert_eq!(server.sql("SELECT count(*) FROM t"), "1000");
}

/// A backup whose record the store has taken, and whose answer is held back.
fn committing(scratch: &Scratch) -> (Postgres, Sidecar, Repository, Wire, std::process::Child) {
    let settings = [("PGSIDECAR_DRAIN_TIMEOUT", "3s")];
    let (postgres, sidecar, repository, proxy) = archiving_through_a_proxy(scratch, &settings, |_| ());
    postgres.sql("CREATE TABLE t AS SELECT generate_series(1, 1000) n");
    proxy.hold_answer("PUT", "backup.json");
    let (creating, _) = sidecar.spawn(&["backup", "create", "--fast"]);
    proxy.wait_for_held();
    assert_eq!(Look::into(&repository).matching("/backup.json").len(), 1, "the store has it");
    (postgres, sidecar, repository, proxy, creating)
}

/// The backup is there, with all its parts.
fn is_a_backup(scratch: &Scratch, postgres: &Postgres, sidecar: &Sidecar, parts: &[String]) {
    let listed = sidecar.json(&["backup", "list"]);
    assert_eq!(listed.as_array().unwrap().len(), 1, "{listed:#}");
    assert_eq!(listed[0]["parts"].as_array().unwrap().len(), parts.len());
    postgres.switch_wal();
    postgres.wait_until_archived();
    assert_eq!(restored(scratch, sidecar, 15, "restored", &[]).sql("SELECT count(*) FROM t"), "1000");
    sidecar.ok(&["backup", "create", "--fast"]);
    assert_eq!(sidecar.json(&["backup", "list"]).as_array().unwrap().len(), 2, "it isn't taken for remains");
}

#[test]
fn a_backup_whose_record_may_be_stored_is_not_removed_when_the_store_goes_away_pg15() {
    let scratch = Scratch::new();
    let (postgres, sidecar, repository, proxy, mut creating) = committing(&scratch);
    let parts = Look::into(&repository).matching("/part-");
    // The answer is lost, and nobody can be asked what came of it.
    proxy.set(Mode::Refuse);
    assert_eq!(creating.wait().unwrap().code(), Some(69));
    let said = fs::read_to_string(scratch.path().join("spawned.log")).unwrap();
    assert!(said.contains("may be complete, or not"), "{said}");
    assert!(said.contains("HINT: 'pgsidecar backup list' tells."), "{said}");
    proxy.release();
    proxy.set(Mode::Pass);
    assert_eq!(Look::into(&repository).matching("/part-"), parts);
    is_a_backup(&scratch, &postgres, &sidecar, &parts);
}

#[test]
fn a_backup_whose_record_may_be_stored_is_not_removed_when_the_daemon_is_stopped_pg15() {
    let scratch = Scratch::new();
    let (postgres, mut sidecar, repository, proxy, mut creating) = committing(&scratch);
    let parts = Look::into(&repository).matching("/part-");
    sidecar.stop();
    creating.wait().unwrap();
    proxy.release();
    assert_eq!(Look::into(&repository).matching("/part-"), parts);
    sidecar.start();
    is_a_backup(&scratch, &postgres, &sidecar, &parts);
}

#[test]
fn a_backup_waits_until_postgresql_knows_that_its_wal_is_archived_pg15() {
    let scratch = Scratch::new();
    let (postgres, sidecar, repository, _proxy) = archiving_through_a_proxy(&scratch, &[], |_| ());
    postgres.switch_wal();
    postgres.wait_until_archived();
    // The daemon archives ahead, and PostgreSQL isn't told of it.
    postgres.sql("ALTER SYSTEM SET archive_command = 'false'");
    postgres.sql("SELECT pg_reload_conf()");
    wait_until("the archiver has the setting", PATIENCE, || {
        postgres.switch_wal();
        postgres.sql("SELECT failed_count > 0 FROM pg_stat_archiver") == "t"
    });
    let (mut creating, log) = sidecar.spawn(&["backup", "create", "--fast"]);
    wait_until("the backup waits", PATIENCE, || sidecar.log().contains("waiting for its WAL to be archived"));
    let look = Look::into(&repository);
    let ready = || {
        let names = postgres.wal_files("0000000100000000");
        names.into_iter().filter(|name| postgres.is_marked(name, "ready")).collect::<Vec<_>>()
    };
    wait_until("all its WAL is in the repository", PATIENCE, || {
        ready().iter().all(|name| !look.matching(&format!("/{name}.zst")).is_empty())
    });
    // Several looks of the backup later.
    std::thread::sleep(Duration::from_secs(3));
    assert!(!ready().is_empty());
    assert_eq!(creating.try_wait().unwrap(), None, "{}", fs::read_to_string(&log).unwrap());
    assert_eq!(look.matching("/backup.json"), Vec::<String>::new());
    postgres.sql("ALTER SYSTEM RESET archive_command");
    postgres.sql("SELECT pg_reload_conf()");
    assert!(creating.wait().unwrap().success(), "{}", fs::read_to_string(&log).unwrap());
    assert_eq!(ready(), Vec::<String>::new());
}
