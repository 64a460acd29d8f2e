//! `pgsidecar prepare`: what an empty volume means, and that no half of a restore ever starts.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    time::{Duration, Instant},
};

use pgsidecar::prepare::RequestClaim;

use crate::support::{
    Look, Postgres, Repository, Scratch, Sidecar, give_to_servers,
    preparing::{
        Entrypoint, be, crash, empty_pod, entrypoint, is_empty, lose_volume, pod, prepare, prepared, start, stop,
    },
    restoring::{back_up, ship_wal, text},
    told, wait_until,
};

const PATIENCE: Duration = Duration::from_secs(60);
const RESTORE: (&str, &str) = ("PGSIDECAR_ON_EMPTY", "restore");

/// A database whose last row is in no whole segment. The pod has ended.
fn archived(scratch: &Scratch, major: u32, repository: &Repository) -> (Postgres, Sidecar) {
    let (mut postgres, mut sidecar) = pod(scratch, "db-0", major, repository);
    postgres.sql("CREATE TABLE rows AS SELECT n FROM generate_series(1, 1000) n");
    back_up(&sidecar);
    postgres.sql("INSERT INTO rows SELECT n FROM generate_series(1001, 2000) n");
    ship_wal(&postgres);
    postgres.sql("INSERT INTO rows VALUES (2001)");
    crash(&mut postgres, &mut sidecar);
    (postgres, sidecar)
}

fn rows(postgres: &Postgres) -> String {
    postgres.sql("SELECT count(*), sum(n) FROM rows")
}

const ALL: &str = "2001|2003001";

#[track_caller]
fn said(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} isn't in:\n{text}");
    }
}

fn a_lost_volume_heals_itself_with_its_last_rows_and_again(major: u32) {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (mut postgres, mut sidecar) = archived(&scratch, major, &repository);
    for timeline in [2, 3] {
        lose_volume(&postgres);
        said(&prepared(&sidecar, 0, &[RESTORE]), &["is empty", "comes back as it was in the end", "restored"]);
        start(&mut postgres, &mut sidecar);
        postgres.wait_for_promotion();
        assert_eq!(rows(&postgres), ALL);
        assert_eq!(postgres.sql("SELECT timeline_id FROM pg_control_checkpoint()"), timeline.to_string());
        ship_wal(&postgres);
        // A pod that is just started again.
        stop(&mut postgres, &mut sidecar);
        said(&prepared(&sidecar, 0, &[RESTORE]), &["holds a database"]);
        start(&mut postgres, &mut sidecar);
        postgres.wait_for_promotion();
        stop(&mut postgres, &mut sidecar);
    }
}

#[test]
fn a_lost_volume_heals_itself_with_its_last_rows_and_again_pg15() {
    a_lost_volume_heals_itself_with_its_last_rows_and_again(15);
}

#[test]
fn a_lost_volume_heals_itself_with_its_last_rows_and_again_pg17() {
    a_lost_volume_heals_itself_with_its_last_rows_and_again(17);
}

#[test]
fn a_volume_that_is_lost_just_after_it_healed_heals_again_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let look = Look::into(&repository);
    let (mut postgres, mut sidecar) = archived(&scratch, 15, &repository);
    let mut heal = |history: &str, row: u32, ends_in_order: bool| {
        lose_volume(&postgres);
        let text = prepared(&sidecar, 0, &[RESTORE]);
        start(&mut postgres, &mut sidecar);
        postgres.wait_for_promotion();
        let found = rows(&postgres);
        postgres.sql(&format!("INSERT INTO rows VALUES ({row})"));
        wait_until("the history is archived", PATIENCE, || !look.matching(history).is_empty());
        if ends_in_order {
            crash(&mut postgres, &mut sidecar);
        } else {
            sidecar.kill();
            postgres.kill();
        }
        (text, found)
    };
    // Of the new timeline there is its history, and in no whole segment the row.
    assert_eq!(heal("00000002.history", 1, true).1, ALL);
    let (text, found) = heal("00000003.history", 2, false);
    said(&text, &["of timeline 2 there is what the stopped server had"]);
    assert_eq!(found, "2002|2003002", "the row was kept as a tail");
    // Of that one there is nothing at all but its history.
    let (text, found) = heal("00000004.history", 3, false);
    said(&text, &["timeline 3 was begun, and nothing of it has been archived"]);
    assert_eq!(found, "2002|2003002");
}

#[test]
fn a_blank_database_never_takes_the_place_of_one_that_has_backups_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let mut first = empty_pod(&scratch, "db-9", 15, &repository).1;
    be(&mut first, "db-0");
    // A volume that isn't mounted yet knows nothing, either.
    for policy in ["", "restore"] {
        let text = prepared(&first, 69, &[("PGSIDECAR_ON_EMPTY", policy)]);
        said(&text, &["can't be told", "isn't there", "where it's a new repository, make the directory"]);
    }
    prepared(&first, 0, &[("PGSIDECAR_ON_EMPTY", "initdb")]);
    assert!(!scratch.path().join("repository").exists());
    scratch.dir("repository");
    // Nothing is known of it yet: the image makes a new one.
    for policy in ["", "initdb", "restore"] {
        let mut newcomer =
            Sidecar::new(&scratch, &Postgres::on(&scratch, scratch.path().join("data"), 15), &repository);
        be(&mut newcomer, "db-0");
        said(&prepared(&newcomer, 0, &[("PGSIDECAR_ON_EMPTY", policy)]), &["a new database may be made"]);
    }
    let newcomer = prepared(&first, 73, &[("PGSIDECAR_ON_EMPTY", "refuse")]);
    said(&newcomer, &["must not start", "PGSIDECAR_ON_EMPTY is refuse"]);

    let (postgres, sidecar) = archived(&scratch, 15, &repository);
    lose_volume(&postgres);
    said(&prepared(&sidecar, 73, &[]), &["has backups of this cluster", "HINT: ", "PGSIDECAR_ON_EMPTY=restore"]);
    assert!(is_empty(&postgres.data));
    said(&prepared(&sidecar, 73, &[("PGSIDECAR_ON_EMPTY", "refuse")]), &["must not start"]);
    // Another cluster's name is another database.
    prepared(&sidecar, 0, &[("PGSIDECAR_CLUSTER", "shop/other")]);
    said(&prepared(&sidecar, 0, &[("PGSIDECAR_ON_EMPTY", "initdb")]), &["PGSIDECAR_ON_EMPTY is initdb"]);
    assert_eq!(entrypoint(&postgres.data, 15), Entrypoint::Initialised);
    said(&prepared(&sidecar, 0, &[]), &["holds a database"]);
}

#[test]
fn while_the_store_is_away_nothing_is_made_of_an_empty_directory_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (postgres, mut sidecar) = archived(&scratch, 15, &repository);
    let with_database = postgres.data.with_file_name("kept");
    fs::rename(&postgres.data, &with_database).unwrap();
    drop(repository);
    for policy in ["", "restore"] {
        let text = prepared(&sidecar, 69, &[("PGSIDECAR_ON_EMPTY", policy)]);
        said(&text, &["can't be told", "tried again"]);
        assert!(!text.contains("service mesh"), "{text}");
        assert!(is_empty(&postgres.data));
    }
    // Where an init container may have no network at all.
    let in_kubernetes = ("KUBERNETES_SERVICE_HOST", "10.96.0.1");
    said(&prepared(&sidecar, 69, &[in_kubernetes]), &["tried again", "If the pod belongs to a service mesh"]);
    prepared(&sidecar, 0, &[("PGSIDECAR_ON_EMPTY", "initdb")]);
    // A database starts all the same, and soon.
    sidecar.set("PGDATA", with_database.to_str().unwrap());
    let began = Instant::now();
    said(&prepared(&sidecar, 0, &[RESTORE, ("PGSIDECAR_RESTORE", "id=a")]), &["holds a database", "isn't known"]);
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

#[test]
fn wrong_settings_keep_no_database_from_starting_and_make_none_where_one_may_be_lost_pg15() {
    let scratch = Scratch::new();
    let (postgres, mut sidecar) = pod(&scratch, "db-0", 15, &Repository::directory(&scratch));
    drop(postgres);
    sidecar.kill();
    let wrong = [
        ("PGSIDECAR_REPOSITORY", "ftp://nowhere"),
        ("PGSIDECAR_ON_EMPTY", "maybe"),
        ("PGSIDECAR_RESTORE", "id=../a"),
        ("PGSIDECAR_CLONE_FROM", "s3://backups"),
    ];
    let text = prepared(&sidecar, 0, &wrong);
    said(&text, &["ERROR"]);
    wrong.iter().for_each(|(name, _)| said(&text, &[name]));
    let none = [("PGSIDECAR_REPOSITORY", "")];
    said(&prepared(&sidecar, 0, &none), &["PGSIDECAR_REPOSITORY: not set"]);

    sidecar.set("PGDATA", scratch.dir("empty").to_str().unwrap());
    for setting in wrong {
        said(&prepared(&sidecar, 78, &[setting]), &[setting.0, "no new one is made"]);
    }
    // Nobody has set up backups: a first start must not fail for that.
    said(&prepared(&sidecar, 0, &none), &["ERROR", "has no backups"]);
    // But somebody has said that this directory isn't to be empty.
    let source = ("PGSIDECAR_CLONE_FROM", "s3://backups?cluster=shop/orders");
    for setting in [RESTORE, ("PGSIDECAR_ON_EMPTY", "refuse"), ("PGSIDECAR_RESTORE", "id=a"), source] {
        prepared(&sidecar, 78, &[none[0], setting]);
    }
    prepared(&sidecar, 78, &[none[0], source, ("PGSIDECAR_ON_EMPTY", "initdb")]);
    said(&prepared(&sidecar, 0, &[("PGDATA", "")]), &["PGDATA"]);
    prepared(&sidecar, 78, &[("PGDATA", ""), RESTORE]);
    assert!(is_empty(&scratch.path().join("empty")));
}

fn a_request_is_served_once(major: u32) {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (mut postgres, mut sidecar) = pod(&scratch, "db-0", major, &repository);
    postgres.sql("CREATE TABLE rows AS SELECT 1 AS n");
    back_up(&sidecar);
    let time = postgres.now();
    postgres.sql("INSERT INTO rows VALUES (2)");
    ship_wal(&postgres);
    let request = format!("id=first target-time='{time}'");
    let wanted = [("PGSIDECAR_RESTORE", request.as_str())];
    said(&prepared(&sidecar, 0, &wanted), &["left alone", "restore run --in-place"]);
    stop(&mut postgres, &mut sidecar);
    lose_volume(&postgres);

    // The next one of the set waits for the first.
    let (mut standby, mut beside) = empty_pod(&scratch, "db-1", major, &repository);
    said(&prepared(&beside, 75, &wanted), &["server 1 of the set", "has not served the request yet"]);

    said(&prepared(&sidecar, 0, &wanted), &["request first is served: time", "restored"]);
    let look = Look::into(&repository);
    said(&look.text("requests/first.json"), &["\"claimed_by\": \"shop/db\"", "\"newest_timeline\": 1"]);
    said(&look.text("requests/first.served.json"), &["\"served_by\": \"shop/db\"", "\"backup\": \"2"]);
    said(&prepared(&beside, 75, &wanted), &["has not begun its timeline"]);
    start(&mut postgres, &mut sidecar);
    postgres.wait_for_promotion();
    assert_eq!(postgres.sql("SELECT n FROM rows"), "1");
    postgres.sql("INSERT INTO rows VALUES (3)");
    ship_wal(&postgres);

    said(&prepared(&beside, 0, &wanted), &["comes up as a standby"]);
    start(&mut standby, &mut beside);
    wait_until("the standby has followed to the new timeline", PATIENCE, || {
        standby.try_sql("SELECT string_agg(n::text, ',' ORDER BY n) FROM rows").is_ok_and(|rows| rows == "1,3")
    });

    said(&prepared(&sidecar, 0, &wanted), &["holds a database", "was served at"]);
    stop(&mut postgres, &mut sidecar);
    lose_volume(&postgres);
    let text = prepared(&sidecar, 73, &wanted);
    said(&text, &["request first", "isn't served again", "PostgreSQL must not start"]);
    // Neither is it where that it was served could not be noted, and the volume is lost before the next start.
    look.remove(&"shop/db/requests/first.served.json".parse().unwrap());
    let text = prepared(&sidecar, 73, &wanted);
    said(&text, &["request first", "isn't served again", "PostgreSQL must not start"]);
    // What is lost now is had back as it was in the end, not as it was before the request.
    prepared(&sidecar, 0, &[wanted[0], RESTORE]);
    start(&mut postgres, &mut sidecar);
    postgres.wait_for_promotion();
    assert_eq!(postgres.sql("SELECT string_agg(n::text, ',' ORDER BY n) FROM rows"), "1,3");
}

#[test]
fn a_request_is_served_once_and_neither_for_a_new_volume_nor_for_the_next_server_pg15() {
    a_request_is_served_once(15);
}

#[test]
fn a_request_is_served_once_and_neither_for_a_new_volume_nor_for_the_next_server_pg17() {
    a_request_is_served_once(17);
}

#[test]
fn of_one_request_no_two_servers_are_made_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (postgres, sidecar) = archived(&scratch, 15, &repository);
    lose_volume(&postgres);
    // What a server leaves that is killed when it has claimed a request and not touched the directory yet.
    let claim = RequestClaim {
        format: 1,
        id: "a".to_owned(),
        what: "the end of the archive".to_owned(),
        claimed_by: "shop/db".to_owned(),
        claimed_at: jiff::Timestamp::now(),
        system_identifier: None,
        newest_timeline: None,
    };
    let key = "shop/db/requests/a.json".parse().unwrap();
    Look::into(&repository).put(&key, serde_json::to_vec(&claim).unwrap(), None);
    let requests = scratch.path().join("repository/shop/db/requests");
    give_to_servers(&requests);
    give_to_servers(&requests.join("a.json"));

    let wanted = [("PGSIDECAR_RESTORE", "id=a")];
    let copy = [wanted[0], ("POD_NAMESPACE", "copy"), ("PGSIDECAR_CLUSTER", "shop/db")];
    said(&prepared(&sidecar, 1, &copy), &["begun by shop/db"]);
    said(&prepared(&sidecar, 78, &[("PGSIDECAR_RESTORE", "id=a target-immediate")]), &["with another target"]);
    assert!(is_empty(&postgres.data));
    said(&prepared(&sidecar, 0, &wanted), &["request a is served"]);
    assert!(entrypoint_is_due(&postgres.data));
}

/// Whether the entrypoint would start PostgreSQL.
fn entrypoint_is_due(data: &Path) -> bool {
    data.join("PG_VERSION").exists()
}

#[test]
fn whenever_it_is_killed_nothing_starts_on_a_half_and_the_next_one_ends_it_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (mut postgres, mut sidecar) = archived(&scratch, 15, &repository);
    lose_volume(&postgres);
    let look = Look::into(&repository);
    let (mut kills, mut halves, mut whole) = (0, 0, false);
    for moment in 0.. {
        let mut child =
            sidecar.command(Sidecar::program()).env("PGSIDECAR_RESTORE", "id=a").arg("prepare").spawn().unwrap();
        let end = Instant::now() + Duration::from_millis(40 * moment);
        while Instant::now() < end && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(5));
        }
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{status}");
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
        if entrypoint_is_due(&postgres.data) {
            whole = true;
            break;
        }
        if !is_empty(&postgres.data) {
            halves += 1;
            assert_eq!(entrypoint(&postgres.data, 15), Entrypoint::Refuses);
            let text = prepared(&sidecar, 73, &[]);
            said(&text, &["an interrupted restore has left", "must not start"]);
        }
    }
    assert!(kills >= 3 && halves >= 1, "{kills} kills, {halves} with something half-done");
    // Killed with a database there, the request is noted as served at the next start.
    prepared(&sidecar, 0, &[("PGSIDECAR_RESTORE", "id=a")]);
    assert_eq!(look.matching("requests/a.served.json").len(), 1, "killed when it was whole: {whole}");
    start(&mut postgres, &mut sidecar);
    postgres.wait_for_promotion();
    assert_eq!(rows(&postgres), ALL);
    assert!(!postgres.data.join("pgsidecar.restoring").exists());
}

fn the_next_server_of_a_set_is_a_standby(major: u32) {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (mut postgres, mut sidecar) = pod(&scratch, "db-0", major, &repository);
    let (mut standby, mut beside) = empty_pod(&scratch, "db-1", major, &repository);
    said(&prepared(&beside, 75, &[RESTORE]), &["no backup yet"]);
    for policy in ["", "initdb", "restore"] {
        let refuse = [("PGSIDECAR_REPLICAS", "refuse"), ("PGSIDECAR_ON_EMPTY", policy)];
        said(&prepared(&beside, 73, &refuse), &["server 1 of a set"]);
        said(
            &prepared(&beside, 73, &[refuse[0], refuse[1], ("PGSIDECAR_CLUSTER", "shop/new")]),
            &["server 1 of a set"],
        );
    }
    postgres.sql("CREATE TABLE rows AS SELECT 1 AS n");
    back_up(&sidecar);
    said(&prepared(&beside, 73, &[]), &["must not come up as a database of its own"]);
    said(&prepared(&beside, 73, &[RESTORE, ("PGSIDECAR_REPLICAS", "refuse")]), &["server 1 of a set"]);
    assert!(is_empty(&standby.data));

    prepared(&beside, 0, &[RESTORE]);
    assert!(standby.data.join("standby.signal").exists() && !standby.data.join("recovery.signal").exists());
    start(&mut standby, &mut beside);
    postgres.sql("INSERT INTO rows VALUES (2)");
    ship_wal(&postgres);
    let has = |standby: &Postgres, rows: &str| standby.try_sql("SELECT max(n) FROM rows").is_ok_and(|max| max == rows);
    wait_until("it follows the archive", PATIENCE, || has(&standby, "2"));
    assert_eq!(standby.sql("SELECT pg_is_in_recovery()"), "t");
    assert_eq!(postgres.sql("SELECT count(*) FROM pg_stat_replication"), "0");
    stop(&mut standby, &mut beside);

    lose_volume(&standby);
    let conninfo = format!("host={} port={} user=postgres", postgres.socket.display(), postgres.port);
    prepared(&beside, 0, &[RESTORE, ("PGSIDECAR_PRIMARY_CONNINFO", &conninfo)]);
    start(&mut standby, &mut beside);
    wait_until("it streams", PATIENCE, || postgres.sql("SELECT count(*) FROM pg_stat_replication") == "1");
    postgres.sql("INSERT INTO rows VALUES (3)");
    wait_until("what is in no archived segment arrives", PATIENCE, || has(&standby, "3"));
    // Its own volume is kept like any other.
    stop(&mut standby, &mut beside);
    said(&prepared(&beside, 0, &[RESTORE]), &["holds a database"]);

    // The same by hand.
    let to = scratch.path().join("by-hand");
    let by_hand = ["restore", "run", "--to", text(&to), "--standby"];
    said(&sidecar.ok(&[&by_hand[..], &["--primary-conninfo", &conninfo]].concat()), &["is a standby", "streams"]);
    said(&sidecar.fails(2, &[&by_hand[..], &["--target-immediate"]].concat()), &["cannot be used with"]);
    assert!(to.join("standby.signal").exists() && !to.join("recovery.signal").exists());
    stop(&mut postgres, &mut sidecar);
    let mut by_hand = Postgres::on(&scratch, to, major);
    sidecar.start();
    by_hand.start(&["-c", "archive_mode=off"]);
    wait_until("it has what was archived", PATIENCE, || has(&by_hand, "3"));
    assert_eq!(by_hand.sql("SELECT pg_is_in_recovery()"), "t");
}

#[test]
fn the_next_server_of_a_set_is_a_standby_that_follows_the_archive_and_its_primary_pg15() {
    the_next_server_of_a_set_is_a_standby(15);
}

#[test]
fn the_next_server_of_a_set_is_a_standby_that_follows_the_archive_and_its_primary_pg17() {
    the_next_server_of_a_set_is_a_standby(17);
}

#[test]
fn of_several_databases_under_one_name_none_is_guessed_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (postgres, sidecar) = archived(&scratch, 15, &repository);
    let system =
        |sidecar: &Sidecar| sidecar.json(&["backup", "list"])[0]["system_identifier"].as_str().unwrap().to_owned();
    let first = system(&sidecar);
    drop(sidecar);
    lose_volume(&postgres);
    fs::remove_file(scratch.path().join("control.sock")).ok();
    let (postgres, sidecar) = archived(&scratch, 15, &repository);
    let second = system(&sidecar);
    lose_volume(&postgres);
    said(&prepared(&sidecar, 78, &[RESTORE]), &[&first, &second, "PGSIDECAR_SYSTEM_IDENTIFIER"]);
    said(&prepared(&sidecar, 78, &[RESTORE, ("PGSIDECAR_SYSTEM_IDENTIFIER", "7")]), &["identifier 7 has no backup"]);
    assert!(is_empty(&postgres.data));
    prepared(&sidecar, 0, &[RESTORE, ("PGSIDECAR_SYSTEM_IDENTIFIER", &first)]);
    let found = fs::read_to_string(postgres.data.join("postgresql.auto.conf")).unwrap();
    said(&found, &[&format!("--system-identifier {first}")]);
}

#[test]
fn what_is_neither_empty_nor_a_database_is_left_alone_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (postgres, sidecar) = archived(&scratch, 15, &repository);
    lose_volume(&postgres);
    let make = |name: &str| {
        fs::create_dir_all(postgres.data.join(name)).unwrap();
        give_to_servers(&postgres.data);
    };
    make("lost+found");
    said(&prepared(&sidecar, 73, &[RESTORE]), &["lost+found", "a directory below the mount point"]);
    said(&prepared(&sidecar, 73, &[]), &["has backups"]);
    assert_eq!(entrypoint(&postgres.data, 15), Entrypoint::Refuses);
    make("somebody's");
    said(&prepared(&sidecar, 73, &[RESTORE]), &["neither a database nor empty"]);
    assert!(postgres.data.join("somebody's").exists() && postgres.data.join("lost+found").exists());
}

#[test]
fn the_helper_is_there_before_postgresql_is() {
    let scratch = Scratch::new();
    let shared = scratch.dir("shared");
    let (_, sidecar) = empty_pod(&scratch, "db-0", 15, &Repository::directory(&scratch));
    scratch.dir("repository");
    prepared(&sidecar, 0, &[("PGSIDECAR_PUBLISH_HELPER", shared.to_str().unwrap())]);
    assert!(shared.join("pgsidecar-wal").exists());
    // Neither that it can't be put there keeps a database from starting.
    let output = prepare(&sidecar, &[("PGSIDECAR_PUBLISH_HELPER", "/nonexistent")]);
    assert!(output.status.success(), "{}", told(&output));
    said(&told(&output), &["ERROR", "publishing pgsidecar-wal"]);
}

#[test]
fn as_root_it_leaves_a_directory_that_postgresql_owns_root_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (mut postgres, mut sidecar) = archived(&scratch, 15, &repository);
    lose_volume(&postgres);
    // A new volume is root's, and so is the init container.
    fs::create_dir(&postgres.data).unwrap();
    let mut as_root = std::process::Command::new(Sidecar::program());
    as_root.env_clear().envs(sidecar.environment.iter().map(|(name, value)| (name, value)));
    let output = as_root.env(RESTORE.0, RESTORE.1).arg("prepare").output().unwrap();
    assert!(output.status.success(), "{}", told(&output));
    start(&mut postgres, &mut sidecar);
    postgres.wait_for_promotion();
    assert_eq!(rows(&postgres), ALL);
}

#[test]
fn a_volume_that_can_not_be_written_to_is_told_with_what_to_set_root_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (_postgres, mut sidecar) = archived(&scratch, 15, &repository);
    let volume = scratch.path().join("volume");
    fs::create_dir(&volume).unwrap();
    sidecar.set("PGDATA", volume.join("pgdata").to_str().unwrap());
    said(&prepared(&sidecar, 73, &[RESTORE]), &["belongs to user 0", "securityContext.fsGroup"]);
    // The image would fail as well; that's its own to say.
    said(&prepared(&sidecar, 0, &[("PGSIDECAR_ON_EMPTY", "initdb")]), &["WARN", "securityContext.fsGroup"]);
}

#[test]
fn a_directory_that_can_not_be_read_is_left_alone_only_where_a_database_may_be_in_it_root_pg15() {
    const REFUSE: (&str, &str) = ("PGSIDECAR_ON_EMPTY", "refuse");
    const INITDB: (&str, &str) = ("PGSIDECAR_ON_EMPTY", "initdb");
    const REQUEST: (&str, &str) = ("PGSIDECAR_RESTORE", "id=a");
    const CLONE: (&str, &str) = ("PGSIDECAR_CLONE_FROM", "file:///srv/backups?cluster=shop/orders");
    const NOWHERE: (&str, &str) = ("PGSIDECAR_REPOSITORY", "");
    const NOTHING: (&str, &str) = ("PGSIDECAR_ON_EMPTY", "");
    let scratch = Scratch::new();
    let (_postgres, sidecar) = empty_pod(&scratch, "db-0", 15, &Repository::directory(&scratch));
    let closed = |name: &str, owner: u32| {
        let path = scratch.path().join(name);
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
        std::os::unix::fs::chown(&path, Some(owner), Some(owner)).unwrap();
        path
    };
    // Another user's, a new volume as it's mounted at PGDATA, and one that is mounted above it.
    let (theirs, roots) = (closed("theirs", 12_345), closed("roots", 0));
    let below = roots.join("pgdata");
    let hint = "HINT: ";
    for (pgdata, setting, code, words) in [
        (&theirs, NOTHING, 0, ["ERROR", "PostgreSQL is left to itself", "runAsUser"]),
        (&theirs, INITDB, 0, ["ERROR", "PostgreSQL is left to itself", "runAsUser"]),
        (&theirs, RESTORE, 73, ["can't be told", hint, "the user of PostgreSQL, 12345"]),
        (&theirs, REFUSE, 73, ["can't be told", hint, "runAsUser"]),
        (&theirs, REQUEST, 73, ["can't be told", hint, "runAsUser"]),
        (&theirs, CLONE, 73, ["can't be told", hint, "runAsUser"]),
        (&roots, NOTHING, 73, ["it's root's", hint, "securityContext.fsGroup"]),
        (&roots, RESTORE, 73, ["it's root's", hint, "securityContext.fsGroup"]),
        (&below, NOTHING, 73, ["it's root's", hint, "securityContext.fsGroup"]),
        (&roots, INITDB, 0, ["ERROR", "PostgreSQL is left to itself", "securityContext.fsGroup"]),
        (&roots, NOWHERE, 0, ["ERROR", "PostgreSQL is left to itself", "securityContext.fsGroup"]),
    ] {
        said(&prepared(&sidecar, code, &[("PGDATA", text(pgdata)), setting]), &words);
    }
}

#[test]
fn a_database_of_which_there_are_only_dumps_does_not_come_up_blank_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (mut postgres, mut sidecar) = pod(&scratch, "db-0", 15, &repository);
    ship_wal(&postgres);
    stop(&mut postgres, &mut sidecar);
    lose_volume(&postgres);
    said(&prepared(&sidecar, 0, &[]), &["has WAL of this cluster but no backup"]);
    // A dump that was begun and not ended is none. One whose record can't be read may have been one.
    let look = Look::into(&repository);
    let system = look.keys()[0].0.as_str().split('/').nth(2).unwrap().to_owned();
    let dump = |object: &str, content: &str| {
        let directory = format!("shop/db/{system}/dumps/20261121T030000Z");
        let key = format!("{directory}/{object}").parse().unwrap();
        look.put(&key, content.as_bytes().to_vec(), None);
        let path = scratch.path().join("repository").join(directory);
        for path in [path.parent().unwrap(), &path, &path.join(object)] {
            give_to_servers(path);
        }
    };
    dump("started.json", "{}");
    said(&prepared(&sidecar, 0, &[]), &["has WAL of this cluster but no backup"]);
    dump("dump.json", "{");
    for policy in ["", "restore"] {
        let text = prepared(&sidecar, 73, &[("PGSIDECAR_ON_EMPTY", policy)]);
        said(&text, &["has dumps of this cluster and no backup", "HINT: ", "pgsidecar dump restore"]);
    }
    prepared(&sidecar, 0, &[("PGSIDECAR_ON_EMPTY", "initdb")]);
    assert!(is_empty(&postgres.data));
}
