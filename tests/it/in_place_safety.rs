//! What a restore in place must not do, whatever stands beside it: write into another's tablespace or WAL, begin while a server
//! runs, destroy what it can't put anything in the place of.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Output,
};

use crate::support::{
    Postgres, Repository, Scratch, Sidecar, archiving,
    restoring::{back_up, ship_wal, text},
    server_user, told,
};

fn rows(postgres: &Postgres) -> String {
    postgres.sql("SELECT string_agg(n::text, ',' ORDER BY n) FROM rows")
}

/// The files below a directory whose names are relations'.
fn relations(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(relations(&path));
        } else if path.file_name().unwrap().to_str().unwrap().starts_with(|first: char| first.is_ascii_digit()) {
            found.push(path);
        }
    }
    found
}

#[test]
fn a_tablespace_from_after_the_backup_has_no_pages_from_later_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (mut postgres, sidecar) = archiving(&scratch, 15, &["--wal-segsize=1"], &repository);
    postgres.sql("CREATE TABLE rows AS SELECT 1 AS n");
    back_up(&sidecar);
    let location = scratch.dir("later");
    postgres.sql(&format!("CREATE TABLESPACE later LOCATION '{}'", location.display()));
    postgres.sql("CREATE TABLE early TABLESPACE later AS SELECT g AS n, 'early' AS t FROM generate_series(1, 10) g");
    let before = postgres.now();
    postgres.sql("INSERT INTO early SELECT g, repeat('late', 50) FROM generate_series(1, 20000) g");
    postgres.sql("VACUUM (FREEZE) early");
    postgres.sql("CHECKPOINT");
    ship_wal(&postgres);
    let stranger = postgres.data.join("pg_wal/pgsql_tmp.before-restore-20261121T061500Z");
    fs::create_dir(&stranger).unwrap();
    fs::write(stranger.join("000000010000000000000001"), "kept").unwrap();
    sidecar.ok(&["restore", "run", "--in-place", "--replace", "--yes", "--target-time", &before]);
    postgres.stop("fast");
    assert!(!relations(&location).is_empty());
    sidecar.ok(&["restore", "switch"]);
    let left = relations(&location);
    assert!(left.is_empty(), "recovery would find what is from later: {left:?}");
    assert_eq!(fs::read_to_string(stranger.join("000000010000000000000001")).unwrap(), "kept");
    postgres.start(&[]);
    postgres.wait_for_promotion();
    assert_eq!(postgres.sql("SELECT count(*) || ' ' || max(t) FROM early"), "10 early");
}

#[test]
fn a_tablespace_from_after_the_staging_is_not_shared_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (mut postgres, sidecar) = archiving(&scratch, 15, &["--wal-segsize=1"], &repository);
    postgres.sql("CREATE TABLE rows AS SELECT 1 AS n");
    back_up(&sidecar);
    ship_wal(&postgres);
    sidecar.ok(&["restore", "run", "--in-place"]);
    let location = scratch.dir("later");
    postgres.sql(&format!("CREATE TABLESPACE later LOCATION '{}'", location.display()));
    postgres.sql("CREATE TABLE x TABLESPACE later AS SELECT generate_series(1, 1000) AS n");
    postgres.sql("CREATE TABLE y TABLESPACE later AS SELECT 'kept' AS t");
    let switched = |postgres: &mut Postgres| {
        postgres.stop("fast");
        sidecar.ok(&["restore", "switch"]);
        postgres.start(&[]);
        postgres.wait_for_promotion();
    };
    switched(&mut postgres);
    // To the end: recovery has made it again.
    assert_eq!(postgres.sql("SELECT count(*) FROM x"), "1000");
    postgres.sql("DELETE FROM x; UPDATE y SET t = 'by the restored one'");
    postgres.sql("VACUUM FULL x");
    postgres.sql("CHECKPOINT");
    sidecar.ok(&["restore", "undo"]);
    switched(&mut postgres);
    assert_eq!(postgres.sql("SELECT count(*) || (SELECT t FROM y) FROM x"), "1000kept");
}

#[test]
fn a_replacement_that_is_refused_is_taken_back_and_one_that_is_done_stays_done_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (mut postgres, sidecar) = archiving(&scratch, 15, &["--wal-segsize=1"], &repository);
    let location = scratch.dir("space");
    postgres.sql(&format!("CREATE TABLESPACE space LOCATION '{}'", location.display()));
    postgres.sql("CREATE TABLE rows TABLESPACE space AS SELECT 1 AS n");
    let id = back_up(&sidecar);
    ship_wal(&postgres);

    // What is wrong at once is told at once.
    let replace = ["restore", "run", "--in-place", "--replace", "--yes"];
    let mapped = [&replace[..], &["--tablespace-mapping", "/nowhere=/else"]].concat();
    assert!(sidecar.fails(2, &mapped).contains("has no tablespace at /nowhere"));
    let mapping = format!("{}=/nowhere/at/all", location.display());
    let mapped = [&replace[..], &["--tablespace-mapping", &mapping]].concat();
    assert!(sidecar.fails(73, &mapped).contains("isn't there; nothing was changed"));
    assert!(sidecar.fails(1, &["restore", "cancel"]).contains("no restore is prepared"));

    // What goes wrong later leaves the database as it is, and can be taken back.
    sidecar.ok(&replace);
    postgres.stop("fast");
    let away = scratch.path().join("away");
    fs::rename(&location, &away).unwrap();
    assert!(sidecar.fails(73, &["restore", "switch"]).contains("isn't there; nothing was changed"));
    fs::rename(&away, &location).unwrap();
    let part =
        scratch.path().join("repository").join(walk(&scratch.path().join("repository"), &id, "part-00001.tar.zst"));
    let hidden = part.with_extension("hidden");
    fs::rename(&part, &hidden).unwrap();
    assert!(sidecar.fails(65, &["restore", "switch"]).contains("part-00001.tar.zst"));
    fs::rename(&hidden, &part).unwrap();
    sidecar.ok(&["restore", "cancel"]);
    postgres.start(&[]);
    assert_eq!(rows(&postgres), "1");

    // It ends after PostgreSQL can be started and before that is noted; a server runs; it isn't done again.
    sidecar.ok(&replace);
    postgres.stop("fast");
    let id = sidecar.json(&["restore", "list"])["pending"]["id"].as_str().unwrap().to_owned();
    let in_the_way = scratch.path().join(format!("data.before-restore-{id}.json-tmp"));
    fs::create_dir(&in_the_way).unwrap();
    sidecar.fails(74, &["restore", "switch"]);
    assert!(postgres.data.join("PG_VERSION").exists());
    postgres.start(&[]);
    postgres.wait_for_promotion();
    postgres.sql("INSERT INTO rows VALUES (77)");
    postgres.stop("fast");
    fs::remove_dir(&in_the_way).unwrap();
    sidecar.ok(&["restore", "switch"]);
    postgres.start(&[]);
    assert_eq!(rows(&postgres), "1,77", "the restore was carried out again, over what was written since");
    assert!(sidecar.fails(1, &["restore", "switch"]).contains("no restore is prepared"));
}

/// The one file of this name below a directory whose path holds this, as well.
fn walk(directory: &Path, part: &str, name: &str) -> PathBuf {
    let mut waiting = vec![directory.to_owned()];
    while let Some(directory) = waiting.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                waiting.push(path);
            } else if path.ends_with(name) && text(&path).contains(part) {
                return path;
            }
        }
    }
    panic!("no {name} of {part}");
}

#[test]
fn a_replacement_that_is_stuck_is_taken_over_by_another_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (mut postgres, sidecar) = archiving(&scratch, 15, &["--wal-segsize=1"], &repository);
    postgres.sql("CREATE TABLE rows AS SELECT 1 AS n");
    let good = back_up(&sidecar);
    postgres.sql("CREATE TABLE many AS SELECT n, gen_random_uuid() AS t FROM generate_series(1, 100000) n");
    let bad = back_up(&sidecar);
    postgres.sql("UPDATE many SET n = -n");
    let location = scratch.dir("later");
    postgres.sql(&format!("CREATE TABLESPACE later LOCATION '{}'", location.display()));
    ship_wal(&postgres);
    let part = walk(&scratch.path().join("repository"), &bad, "part-00001.tar.zst");
    let mut bytes = fs::read(&part).unwrap();
    bytes.iter_mut().for_each(|byte| *byte ^= 1);
    // Written in place: the object's attributes stay.
    fs::write(&part, bytes).unwrap();

    let replace = ["restore", "run", "--in-place", "--replace", "--yes", "--backup"];
    sidecar.ok(&[&replace[..], &[&bad]].concat());
    postgres.stop("fast");
    let stuck = sidecar.fails(65, &["restore", "switch"]);
    assert!(stuck.contains("part-00001.tar.zst") && stuck.contains("--replace --backup"), "{stuck}");
    assert!(!postgres.data.join("PG_VERSION").exists());
    assert!(sidecar.fails(1, &["restore", "cancel"]).contains("gone through with"));
    sidecar.ok(&[&replace[..], &[&good]].concat());
    sidecar.ok(&["restore", "switch"]);
    postgres.start(&[]);
    postgres.wait_for_promotion();
    assert_eq!(rows(&postgres), "1");
    assert_eq!(postgres.sql("SELECT max(n) FROM many"), "-1");
}

#[test]
fn a_killed_servers_file_does_not_stand_in_the_way_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (mut postgres, sidecar) = archiving(&scratch, 15, &["--wal-segsize=1"], &repository);
    postgres.sql("CREATE TABLE rows AS SELECT 1 AS n");
    back_up(&sidecar);
    ship_wal(&postgres);
    sidecar.ok(&["restore", "run", "--in-place"]);
    postgres.kill();
    assert!(postgres.data.join("postmaster.pid").exists());
    sidecar.ok(&["restore", "switch"]);
    postgres.start(&[]);
    postgres.wait_for_promotion();
    assert_eq!(rows(&postgres), "1");
}

#[test]
fn a_parent_that_can_not_be_read_is_no_hindrance_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    Postgres::initdb(&scratch, 15, &["--wal-segsize=1"]);
    let volume = scratch.path().join("volume");
    fs::create_dir(&volume).unwrap();
    fs::rename(scratch.path().join("data"), volume.join("data")).unwrap();
    let mut postgres = Postgres::on(&scratch, volume.join("data"), 15);
    let mut sidecar = Sidecar::new(&scratch, &postgres, &repository);
    postgres.configure(&sidecar.archive_settings().iter().map(String::as_str).collect::<Vec<_>>());
    postgres.start(&[]);
    sidecar.start();
    postgres.sql("CREATE TABLE rows AS SELECT 1 AS n");
    back_up(&sidecar);
    ship_wal(&postgres);
    fs::set_permissions(&volume, fs::Permissions::from_mode(0o111)).unwrap();
    sidecar.ok(&["restore", "run", "--in-place"]);
    postgres.stop("fast");
    sidecar.ok(&["restore", "switch"]);
    postgres.start(&[]);
    postgres.wait_for_promotion();
    assert_eq!(rows(&postgres), "1");
    fs::set_permissions(&volume, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Runs a script in namespaces of its own, as root; `$1` is pgsidecar, `as_server` what runs as PostgreSQL's user.
fn in_namespaces(sidecar: &Sidecar, scratch: &Scratch, namespaces: &[&str], script: &str) -> Output {
    let (uid, gid) = server_user().expect("this test runs as root");
    let script =
        format!("set -e; as_server() {{ setpriv --reuid={uid} --regid={gid} --clear-groups \"$@\"; }}\n{script}");
    let mut shell = std::process::Command::new("unshare");
    shell.args(namespaces).args(["bash", "-c", &script, "bash"]).arg(Sidecar::program());
    shell.envs(sidecar.environment.iter().map(|(name, value)| (name, value)));
    shell.current_dir(scratch.path()).output().unwrap()
}

#[test]
fn a_server_that_can_not_be_seen_is_not_taken_for_stopped_root_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (postgres, sidecar) = archiving(&scratch, 15, &["--wal-segsize=1"], &repository);
    postgres.sql("CREATE TABLE rows AS SELECT 1 AS n");
    back_up(&sidecar);
    ship_wal(&postgres);
    sidecar.ok(&["restore", "run", "--in-place"]);
    let socket = postgres.socket.join(".s.PGSQL.5432");
    assert!(socket.exists());
    let script = format!("mount --bind /dev/null {}; as_server \"$1\" restore switch", socket.display());
    // Another container of the pod, and one that shares nothing.
    for (namespaces, why) in [
        (&["-p", "-f", "-m", "--mount-proc"][..], "processes have its shared memory"),
        (&["-p", "-f", "-m", "--mount-proc", "-n", "-i"][..], "it can't be told whether that is so"),
    ] {
        let refused = in_namespaces(&sidecar, &scratch, namespaces, &script);
        assert_eq!(refused.status.code(), Some(73), "{}", told(&refused));
        assert!(told(&refused).contains(why) && told(&refused).contains("nothing was changed"), "{}", told(&refused));
    }
    postgres.sql("INSERT INTO rows VALUES (2)");
    assert_eq!(rows(&postgres), "1,2");
}

#[test]
fn wal_on_a_mount_of_its_own_stays_with_its_database_root_pg15() {
    let scratch = Scratch::new();
    let (uid, gid) = server_user().expect("this test runs as root");
    let repository = Repository::directory(&scratch);
    let (mut postgres, mut sidecar) = archiving(&scratch, 15, &["--wal-segsize=1"], &repository);
    postgres.sql("CREATE TABLE rows AS SELECT 1 AS n");
    back_up(&sidecar);
    postgres.stop("fast");
    sidecar.kill();
    let (volume, data) = (scratch.dir("volume"), postgres.data.display());
    let begin = format!(
        "v={volume}; mount -t tmpfs -o mode=0755,uid={uid},gid={gid} none $v; cp -a {data} $v/data; export PGDATA=$v/data\n\
         mkdir $v/wal; mv $PGDATA/pg_wal/* $v/wal; chown {uid}:{gid} $v/wal; chmod 700 $v/wal\n\
         mount --bind $v/wal $PGDATA/pg_wal; n=$(ls $v/wal | wc -l)\n",
        volume = volume.display()
    );
    let run = |script: &str| in_namespaces(&sidecar, &scratch, &["-m"], &format!("{begin}{script}"));
    let there = run("as_server \"$1\" restore run --in-place\n\
         test -e $PGDATA/pg_wal/pgsql_tmp.pgsidecar-staged/archive_status\n\
         test ! -e $v/data.pgsidecar-staged/PG_VERSION\n\
         as_server \"$1\" restore switch; findmnt -n -o TARGET -R $v\n\
         test -e $PGDATA/PG_VERSION; test -e $PGDATA/backup_label; mountpoint -q $PGDATA/pg_wal\n\
         test $(ls $v/wal/pgsql_tmp.before-restore-* | wc -l) = $n; ls $v/wal\n\
         as_server \"$1\" restore undo; as_server \"$1\" restore switch; test ! -e $PGDATA/backup_label\n\
         test $(ls $v/wal | grep -v pgsql_tmp | wc -l) = $n; as_server \"$1\" restore clean --yes; ls -A $v; ls $v/wal\n\
         diff -r {data} $PGDATA && echo unchanged".replace("{data}", text(&postgres.data)).as_str());
    assert!(there.status.success(), "{}", told(&there));
    assert!(told(&there).contains("unchanged"), "{}", told(&there));

    // Anything else can't be moved with it, nor is it to be removed.
    for how in ["", " --replace --yes"] {
        let refused = run(&format!(
            "mount --bind $PGDATA/postgresql.conf $PGDATA/postgresql.conf; as_server \"$1\" restore run --in-place{how}"
        ));
        assert_eq!(refused.status.code(), Some(73), "{}", told(&refused));
        assert!(told(&refused).contains("postgresql.conf is mounted in"), "{}", told(&refused));
    }
    let later = run(
        "as_server \"$1\" restore run --in-place; mount -t tmpfs none $PGDATA/base/1; as_server \"$1\" restore switch",
    );
    assert_eq!(later.status.code(), Some(73), "{}", told(&later));
    assert!(told(&later).contains("base/1 is mounted in"), "{}", told(&later));
}

#[test]
fn a_server_that_was_promoted_and_killed_before_its_checkpoint_comes_back_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (mut postgres, sidecar) = archiving(&scratch, 15, &["--wal-segsize=1"], &repository);
    // The checkpoint after a promotion takes its time.
    postgres.configure(&["checkpoint_completion_target = 1.0"]);
    postgres.sql("CREATE TABLE rows AS SELECT 1 AS n");
    back_up(&sidecar);
    ship_wal(&postgres);
    let switch = |postgres: &mut Postgres, how: &str| {
        postgres.stop(how);
        sidecar.ok(&["restore", "switch"]);
        postgres.start(&[]);
        postgres.wait_for_promotion();
    };
    sidecar.ok(&["restore", "run", "--in-place"]);
    switch(&mut postgres, "fast");
    postgres.sql("INSERT INTO rows VALUES (2)");
    ship_wal(&postgres);
    sidecar.ok(&["restore", "run", "--in-place"]);
    postgres.sql("INSERT INTO rows VALUES (3)");
    switch(&mut postgres, "immediate");
    assert_eq!(rows(&postgres), "1,2,3");
    postgres.sql("INSERT INTO rows VALUES (4)");
    postgres.sql("CHECKPOINT");
    sidecar.ok(&["restore", "undo"]);
    switch(&mut postgres, "fast");
    assert_eq!(rows(&postgres), "1,2,3");
    postgres.sql("CHECKPOINT");
    // Timelines 2 and 3 are others'.
    assert_eq!(postgres.sql("SELECT timeline_id FROM pg_control_checkpoint()"), "4");
}
