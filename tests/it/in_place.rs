//! Restores in the place of the database that is there: prepared while it runs, carried out when it doesn't, undone.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use crate::support::{
    Postgres, Repository, Scratch, Sidecar, archiving, give_to_servers,
    restoring::{back_up, ship_wal, text},
    server_user, told, wait_until,
};

/// The names in a directory that aren't PostgreSQL's.
fn beside(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("pgsidecar") || name.contains("before-"))
        .collect();
    names.sort();
    names
}

/// Stops the server, switches and starts it again.
#[track_caller]
fn switched(postgres: &mut Postgres, sidecar: &Sidecar) -> String {
    postgres.stop("fast");
    let said = sidecar.ok(&["restore", "switch"]);
    postgres.start(&[]);
    postgres.wait_for_promotion();
    said
}

fn rows(postgres: &Postgres) -> String {
    postgres.sql("SELECT string_agg(n::text, ',' ORDER BY n) FROM rows")
}

fn timeline(postgres: &Postgres) -> String {
    postgres.sql("SELECT timeline_id FROM pg_control_checkpoint()")
}

/// The story of one night: rows 1 and 2, then a mistake.
#[track_caller]
fn story(postgres: &mut Postgres, sidecar: &mut Sidecar) {
    postgres.sql("CREATE TABLE rows AS SELECT 1 AS n");
    back_up(sidecar);
    postgres.sql("INSERT INTO rows VALUES (2)");
    let before = postgres.now();
    postgres.sql("INSERT INTO rows VALUES (3)");
    ship_wal(postgres);

    let said = sidecar.ok(&["restore", "run", "--in-place", "--target-time", &before]);
    assert!(said.contains("PostgreSQL was not touched") && said.contains("restore switch"), "{said}");
    postgres.sql("INSERT INTO rows VALUES (4)");
    assert_eq!(rows(postgres), "1,2,3,4", "the server goes on meanwhile");
    let again = sidecar.fails(75, &["restore", "run", "--in-place"]);
    assert!(again.contains("is prepared already"), "{again}");
    assert!(sidecar.json(&["status"])["restores"]["pending"].as_str().unwrap().contains("the restore of backup"));
    let running = sidecar.fails(73, &["restore", "switch"]);
    assert!(running.contains("a server runs on") && running.contains("nothing was changed"), "{running}");

    let said = switched(postgres, sidecar);
    assert!(said.contains("What was there before is kept in"), "{said}");
    assert_eq!(rows(postgres), "1,2");
    assert_eq!(timeline(postgres), "2");
    postgres.sql("INSERT INTO rows VALUES (20)");
    ship_wal(postgres);

    // It was the wrong second: everything back as it was.
    sidecar.ok(&["restore", "undo"]);
    switched(postgres, sidecar);
    assert_eq!(rows(postgres), "1,2,3,4");
    // Timeline 2 is the other's: 'the newest' has to be this one again.
    postgres.sql("CHECKPOINT");
    assert_eq!(timeline(postgres), "3");
    postgres.sql("INSERT INTO rows VALUES (5)");
    ship_wal(postgres);

    // To the end, with what isn't archived yet.
    sidecar.ok(&["restore", "run", "--in-place"]);
    postgres.sql("INSERT INTO rows VALUES (6)");
    let kept = sidecar.json(&["restore", "list"]);
    assert_eq!(kept["pending"]["phase"], "ready");
    assert_eq!(kept["done"].as_array().unwrap().len(), 1, "the undone restore: {kept}");
    sidecar.kill();
    postgres.sql("INSERT INTO rows VALUES (7)");
    postgres.stop("immediate");
    sidecar.start();
    sidecar.ok(&["restore", "switch"]);
    postgres.start(&[]);
    postgres.wait_for_promotion();
    assert_eq!(rows(postgres), "1,2,3,4,5,6,7");
    assert!(sidecar.fails(1, &["restore", "switch"]).contains("no restore is prepared"));
    back_up(sidecar);
}

#[test]
fn a_restore_takes_the_place_and_goes_again_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (mut postgres, mut sidecar) = archiving(&scratch, 15, &["--wal-segsize=1"], &repository);
    story(&mut postgres, &mut sidecar);
    assert!(sidecar.fails(2, &["restore", "clean"]).contains("--yes"));
    assert_eq!(beside(scratch.path()).len(), 4, "{:?}", beside(scratch.path()));
    sidecar.ok(&["restore", "clean", "--yes"]);
    assert_eq!(beside(scratch.path()), [""; 0]);
    assert!(sidecar.fails(1, &["restore", "undo"]).contains("nothing is kept"));
}

/// A directory whose parent can't be changed is as good as a mount point: nothing can be put beside it.
fn without_a_sibling(scratch: &Scratch, data: &Path) {
    let volume = scratch.path().join("volume");
    fs::create_dir(&volume).unwrap();
    fs::rename(data, volume.join("data")).unwrap();
    fs::set_permissions(&volume, fs::Permissions::from_mode(0o555)).unwrap();
}

struct Elsewhere {
    postgres: Postgres,
    sidecar: Sidecar,
    data: PathBuf,
}

/// PGDATA in a volume's root, WAL in another's, and two tablespaces.
fn elsewhere(scratch: &Scratch, repository: &Repository, major: u32) -> Elsewhere {
    let wal = scratch.path().join("wal-volume");
    fs::create_dir(&wal).unwrap();
    give_to_servers(&wal);
    let pg_wal = wal.join("pg_wal");
    Postgres::initdb(scratch, major, &["--wal-segsize=1", "--waldir", text(&pg_wal)]);
    without_a_sibling(scratch, &scratch.path().join("data"));
    fs::set_permissions(&wal, fs::Permissions::from_mode(0o555)).unwrap();
    let data = scratch.path().join("volume/data");
    let mut postgres = Postgres::on(scratch, data.clone(), major);
    let mut sidecar = Sidecar::new(scratch, &postgres, repository);
    postgres.configure(&sidecar.archive_settings().iter().map(String::as_str).collect::<Vec<_>>());
    postgres.start(&[]);
    sidecar.start();
    for name in ["one", "two"] {
        let location = scratch.dir(name);
        postgres.sql(&format!("CREATE TABLESPACE {name} LOCATION '{}'", location.display()));
        postgres.sql(&format!("CREATE TABLE in_{name} TABLESPACE {name} AS SELECT generate_series(1, 100) AS n"));
    }
    Elsewhere { postgres, sidecar, data }
}

impl Elsewhere {
    fn counts(&self) -> String {
        self.postgres.sql("SELECT (SELECT count(*) FROM in_one) || ' ' || (SELECT count(*) FROM in_two)")
    }
}

#[test]
fn it_does_so_on_a_mount_point_with_wal_and_tablespaces_elsewhere_pg17() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let mut there = elsewhere(&scratch, &repository, 17);
    story(&mut there.postgres, &mut there.sidecar);
    assert_eq!(there.counts(), "100 100");
    assert!(beside(&there.data).iter().all(|name| name.starts_with("pgsql_tmp.")), "{:?}", beside(&there.data));
    assert_eq!(beside(&there.data).len(), 4);
    assert_eq!(beside(&scratch.path().join("one")).len(), 2);

    // A tablespace that goes, and one that comes back, stay what they were through restore and undo.
    let before = there.postgres.now();
    there.postgres.sql("DROP TABLE in_one");
    there.postgres.sql("DROP TABLESPACE one");
    let three = scratch.dir("three");
    there.postgres.sql(&format!("CREATE TABLESPACE three LOCATION '{}'", three.display()));
    there.postgres.sql("CREATE TABLE in_three TABLESPACE three AS SELECT 3 AS n; DELETE FROM in_two");
    ship_wal(&there.postgres);
    there.sidecar.ok(&["restore", "run", "--in-place", "--target-time", &before]);
    switched(&mut there.postgres, &there.sidecar);
    assert_eq!(there.counts(), "100 100");
    there.postgres.sql("TRUNCATE in_one, in_two");
    there.sidecar.ok(&["restore", "undo"]);
    switched(&mut there.postgres, &there.sidecar);
    assert_eq!(there.postgres.sql("SELECT n FROM in_three"), "3");
    assert_eq!(there.postgres.sql("SELECT count(*) FROM in_two"), "0");
    assert!(there.postgres.try_sql("SELECT FROM in_one").is_err());
    there.sidecar.ok(&["restore", "clean", "--yes"]);
    for directory in [&there.data, &scratch.path().join("one"), &scratch.path().join("two"), &three] {
        assert_eq!(beside(directory), [""; 0], "{}", directory.display());
    }
    for volume in ["volume", "wal-volume"] {
        fs::set_permissions(scratch.path().join(volume), fs::Permissions::from_mode(0o755)).unwrap();
    }
}

/// The file of a table, relative to the data directory.
fn file_of(postgres: &Postgres, table: &str) -> PathBuf {
    postgres.data.join(postgres.sql(&format!("SELECT pg_relation_filepath('{table}')")))
}

#[test]
fn without_room_for_two_it_replaces_what_differs_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let mut there = elsewhere(&scratch, &repository, 15);
    let Elsewhere { postgres, sidecar, data } = &mut there;
    postgres.sql("CREATE TABLE quiet AS SELECT n, repeat('x', 500) AS t FROM generate_series(1, 20000) n");
    postgres.sql("CREATE TABLE rows AS SELECT 1 AS n");
    postgres.sql("CREATE TABLE gone AS SELECT generate_series(1, 1000) AS n");
    // Hint bits, so that the table stays as it is.
    postgres.sql("VACUUM FREEZE");
    postgres.sql("CHECKPOINT");
    back_up(sidecar);
    let before = postgres.now();
    postgres.sql("INSERT INTO rows VALUES (2); DROP TABLE gone; DELETE FROM in_one");
    postgres.sql("CREATE DATABASE later");
    postgres.sql("CREATE TABLE later AS SELECT generate_series(1, 100000) AS n");
    let (quiet, later) = (file_of(postgres, "quiet"), file_of(postgres, "later"));
    let inode = fs::metadata(&quiet).unwrap().ino();
    ship_wal(postgres);
    postgres.sql("INSERT INTO rows VALUES (3)");

    let replace = ["restore", "run", "--in-place", "--replace", "--target-time", &before];
    let said = sidecar.fails(2, &replace);
    assert!(said.contains("has to be confirmed") && said.contains("--yes"), "{said}");
    sidecar.ok(&[&replace[..], &["--yes"]].concat());
    assert_eq!(rows(postgres), "1,2,3", "nothing has happened yet");
    assert!(sidecar.fails(73, &["restore", "switch"]).contains("a server runs on"));
    postgres.stop("fast");

    // Killed again and again: PostgreSQL never starts on it, and it goes on. It may be killed when it had nothing more to do
    // but to say so.
    let mut ended = false;
    for tries in 1..60 {
        let mut switch = sidecar.command(Sidecar::program());
        let mut switch =
            switch.args(["restore", "switch"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(20 * tries));
        switch.kill().unwrap();
        let output = switch.wait_with_output().unwrap();
        let begun = data.join("pgsidecar.replacing").exists();
        let pending = sidecar.json(&["restore", "list"])["pending"].clone();
        ended = output.status.success() || pending.is_null();
        // What is noted as done may have both for a moment.
        assert!(!begun || !data.join("PG_VERSION").exists() || ended || pending["phase"] == "done", "{pending}");
        assert!(output.status.code().is_none_or(|code| code == 0) || ended, "{}", told(&output));
        if ended {
            break;
        }
    }
    assert!(ended);
    assert!(!data.join("pgsidecar.replacing").exists() && !later.exists());
    assert_eq!(fs::metadata(&quiet).unwrap().ino(), inode, "a file that is the same was written anew");
    postgres.start(&[]);
    postgres.wait_for_promotion();
    assert_eq!(rows(postgres), "1");
    assert_eq!(postgres.sql("SELECT count(*) || ' ' || max(length(t)) FROM quiet"), "20000 500");
    assert_eq!(postgres.sql("SELECT count(*) FROM gone"), "1000");
    assert_eq!(postgres.sql("SELECT count(*) FROM pg_database WHERE datname = 'later'"), "0");
    assert_eq!(there.counts(), "100 100");
    let kept = there.sidecar.ok(&["restore", "list"]);
    assert!(kept.contains("Kept WAL that wasn't archived"), "{kept}");
    assert!(there.sidecar.fails(1, &["restore", "undo"]).contains("nothing is kept"));

    // To the end: what no archive has is still there.
    let Elsewhere { postgres, sidecar, .. } = &mut there;
    back_up(sidecar);
    ship_wal(postgres);
    sidecar.ok(&["restore", "run", "--in-place", "--replace", "--yes"]);
    sidecar.kill();
    postgres.sql("INSERT INTO rows VALUES (9)");
    postgres.stop("immediate");
    sidecar.start();
    sidecar.ok(&["restore", "switch"]);
    postgres.start(&[]);
    postgres.wait_for_promotion();
    assert_eq!(rows(postgres), "1,9");
    sidecar.ok(&["restore", "clean", "--yes"]);
    for volume in ["volume", "wal-volume"] {
        fs::set_permissions(scratch.path().join(volume), fs::Permissions::from_mode(0o755)).unwrap();
    }
}

#[test]
fn a_chain_replaces_as_well_pg17() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (mut postgres, sidecar) = archiving(&scratch, 17, &["--wal-segsize=1"], &repository);
    postgres.sql("ALTER SYSTEM SET summarize_wal = on");
    postgres.sql("SELECT pg_reload_conf()");
    postgres.sql("CREATE TABLE rows AS SELECT 1 AS n");
    postgres.sql("CREATE TABLE many AS SELECT generate_series(1, 50000) AS n");
    sidecar.ok(&["backup", "create", "--fast", "--type", "full"]);
    postgres.sql("INSERT INTO rows VALUES (2); UPDATE many SET n = -n WHERE n < 1000");
    let id = sidecar.json(&["backup", "create", "--fast", "--type", "incremental"])["id"].as_str().unwrap().to_owned();
    assert!(id.ends_with("-incremental"), "{id}");
    let before = postgres.now();
    postgres.sql("DROP TABLE many; INSERT INTO rows VALUES (3)");
    ship_wal(&postgres);
    sidecar.ok(&["restore", "run", "--in-place", "--replace", "--yes", "--target-time", &before]);
    switched(&mut postgres, &sidecar);
    assert_eq!(rows(&postgres), "1,2");
    assert_eq!(postgres.sql("SELECT count(*) || ' ' || min(n) FROM many"), "50000 -999");
    assert!(!postgres.data.join("pgsidecar.replacing").exists());
}

/// Waits for what a restore in place writes first.
fn wait_for_staging(staged: &Path) {
    wait_until("files are being staged", Duration::from_secs(30), || staged.join("base").exists());
}

#[test]
fn staging_that_is_killed_leaves_the_database_as_it_was_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (mut postgres, mut sidecar) = archiving(&scratch, 15, &["--wal-segsize=1"], &repository);
    postgres.sql("CREATE TABLE rows AS SELECT 1 AS n");
    // What doesn't compress takes its time.
    postgres.sql("CREATE TABLE many AS SELECT n, gen_random_uuid() || gen_random_uuid()::text AS t FROM generate_series(1, 600000) n");
    back_up(&sidecar);
    ship_wal(&postgres);
    let staged = scratch.path().join("data.pgsidecar-staged");
    for how in ["the daemon is killed", "the daemon stops", "it is cancelled"] {
        let (mut asked, said) = sidecar.spawn(&["restore", "run", "--in-place"]);
        wait_for_staging(&staged);
        match how {
            "the daemon is killed" => {
                sidecar.kill();
                assert!(!staged.join("PG_VERSION").exists());
                sidecar.start();
                // In its place nothing has been prepared: what it left goes.
                assert!(sidecar.fails(1, &["restore", "switch"]).contains("no restore is prepared"));
            }
            "the daemon stops" => {
                assert!(sidecar.stop().success());
                sidecar.start();
            }
            _ => {
                let said = sidecar.fails(75, &["restore", "cancel"]);
                assert!(said.contains("at this moment"), "{said}");
                assert!(asked.wait().unwrap().success());
                sidecar.ok(&["restore", "cancel"]);
            }
        }
        let _ = asked.wait();
        let left = beside(scratch.path());
        assert_eq!(left, [""; 0], "{how}: {}", fs::read_to_string(said).unwrap());
        assert_eq!(rows(&postgres), "1");
    }
    sidecar.ok(&["restore", "run", "--in-place"]);
    switched(&mut postgres, &sidecar);
    assert_eq!(postgres.sql("SELECT count(*) FROM many"), "600000");
}

#[test]
fn a_volume_that_fills_up_while_it_stages_keeps_its_database_root_pg15() {
    let scratch = Scratch::new();
    let (uid, gid) = server_user().expect("this test runs as root");
    let repository = Repository::directory(&scratch);
    let (mut postgres, mut sidecar) = archiving(&scratch, 15, &["--wal-segsize=1"], &repository);
    postgres.sql("CREATE TABLE rows AS SELECT 1 AS n");
    back_up(&sidecar);
    ship_wal(&postgres);
    postgres.stop("fast");
    sidecar.kill();
    // The volume is one in a mount namespace of its own, which ends with the shell: the database is copied there.
    let volume = scratch.dir("volume");
    let restore = |room: u64, files: &str| {
        let script = format!(
            "set -e; bytes=$(( $(du -s --block-size=1 {data} | cut -f1) + {room} ))\n\
             files=$(( $(find {data} | wc -l) + {files} ))\n\
             mount -t tmpfs -o size=$bytes,nr_inodes=$files,mode=0755,uid={uid},gid={gid} none {volume}\n\
             cp -a {data} {volume}/data; export PGDATA={volume}/data\n\
             status=0; setpriv --reuid={uid} --regid={gid} --clear-groups \"$1\" restore run --in-place >/dev/null || status=$?\n\
             ls {volume}; diff -r {data} {volume}/data && echo unchanged; exit $status",
            data = postgres.data.display(),
            volume = volume.display(),
        );
        let mut shell = std::process::Command::new("unshare");
        shell.args(["-m", "bash", "-c", &script, "bash"]).arg(Sidecar::program());
        shell.envs(sidecar.environment.iter().map(|(name, value)| (name, value)));
        shell.current_dir(scratch.path()).output().unwrap()
    };
    let small = restore(8 << 20, "5000");
    assert_eq!(small.status.code(), Some(73), "{}", told(&small));
    assert!(told(&small).contains("has room for 8 MB") && told(&small).contains("restore clean"), "{}", told(&small));
    assert_eq!(String::from_utf8_lossy(&small.stdout), "data\nunchanged\n");

    // Room enough, but not for so many files.
    let full = restore(1 << 30, "300");
    assert_eq!(full.status.code(), Some(74), "{}", told(&full));
    assert!(
        told(&full).contains("No space left on device") && told(&full).contains("The file system is full"),
        "{}",
        told(&full)
    );
    assert_eq!(String::from_utf8_lossy(&full.stdout), "data\nunchanged\n");
    assert!(restore(1 << 30, "5000").status.success());
}
