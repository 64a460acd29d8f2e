//! Clones: from another cluster's backups, with an archive of their own. The source isn't touched.

use std::{fs, time::Duration};

use crate::support::{
    Look, Postgres, Repository, Scratch, Sidecar, command,
    preparing::{crash, empty_pod, fingerprint, is_empty, lose_volume, pod, prepared, start, stop},
    restoring::{back_up, ship_wal},
    told, wait_until,
};

const SOURCE: &str = "shop/orders";
const CLONE: &str = "shop/copy";

/// Where the source is, as a clone names it.
fn source_url(repository: &Repository) -> String {
    let environment = repository.environment();
    let (_, url) = environment.iter().find(|(name, _)| *name == "PGSIDECAR_REPOSITORY").unwrap();
    format!("{url}?cluster={SOURCE}")
}

/// A source whose last row is in no whole segment. It has ended.
fn source(scratch: &Scratch, major: u32, repository: &Repository) -> (Postgres, Sidecar) {
    let (mut postgres, mut sidecar) = pod(scratch, "orders-0", major, repository);
    postgres.sql("CREATE TABLE rows AS SELECT n FROM generate_series(1, 1000) n");
    back_up(&sidecar);
    postgres.sql("INSERT INTO rows VALUES (1001)");
    ship_wal(&postgres);
    postgres.sql("INSERT INTO rows VALUES (1002)");
    crash(&mut postgres, &mut sidecar);
    (postgres, sidecar)
}

fn timeline(postgres: &Postgres) -> String {
    postgres.sql("SELECT substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)")
}

#[track_caller]
fn said(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} isn't in:\n{text}");
    }
}

fn a_clone_has_its_source_s_rows_and_an_archive_of_its_own(major: u32) {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let _source = source(&scratch, major, &repository);
    let look = Look::into(&repository);
    let before = fingerprint(&look, SOURCE);

    let (mut postgres, mut sidecar) = empty_pod(&scratch, "copy-0", major, &repository);
    sidecar.set("PGSIDECAR_CLONE_FROM", &source_url(&repository));
    said(&prepared(&sidecar, 0, &[]), &["a clone of", "restored", "no backup of its own"]);
    start(&mut postgres, &mut sidecar);
    postgres.wait_for_promotion();
    assert_eq!(postgres.sql("SELECT max(n) FROM rows"), "1002");
    assert_eq!(timeline(&postgres), "00000002");
    postgres.sql("INSERT INTO rows VALUES (1003)");
    let shipped = ship_wal(&postgres);
    assert!(
        look.matching(&shipped).iter().all(|key| key.starts_with(&format!("{CLONE}/"))),
        "{:?}",
        look.matching(&shipped)
    );
    assert_eq!(look.matching(&shipped).len(), 1);

    // Its volume is lost before it has a backup: nothing blank comes up, and another clone begins a timeline that neither
    // has, though the first one's archive has the source's next.
    stop(&mut postgres, &mut sidecar);
    lose_volume(&postgres);
    said(&prepared(&sidecar, 73, &[]), &["was served before"]);
    prepared(&sidecar, 0, &[("PGSIDECAR_RESTORE", "id=again")]);
    start(&mut postgres, &mut sidecar);
    postgres.wait_for_promotion();
    assert_eq!((timeline(&postgres).as_str(), postgres.sql("SELECT max(n) FROM rows").as_str()), ("00000003", "1002"));
    postgres.sql("INSERT INTO rows VALUES (1004)");
    back_up(&sidecar);
    ship_wal(&postgres);

    // Restarted, and then lost once more: from now on it's its own archive that counts, whatever the template says.
    stop(&mut postgres, &mut sidecar);
    said(&prepared(&sidecar, 0, &[]), &["holds a database"]);
    start(&mut postgres, &mut sidecar);
    postgres.wait_for_promotion();
    postgres.sql("INSERT INTO rows VALUES (1005)");
    stop(&mut postgres, &mut sidecar);
    lose_volume(&postgres);
    prepared(&sidecar, 0, &[("PGSIDECAR_ON_EMPTY", "restore")]);
    start(&mut postgres, &mut sidecar);
    postgres.wait_for_promotion();
    assert_eq!(postgres.sql("SELECT string_agg(n::text, ',' ORDER BY n) FROM rows WHERE n > 1001"), "1002,1004,1005");
    stop(&mut postgres, &mut sidecar);

    assert_eq!(fingerprint(&look, SOURCE), before, "the source's objects are what they were");
}

#[test]
fn a_clone_has_its_source_s_rows_and_an_archive_of_its_own_pg15() {
    a_clone_has_its_source_s_rows_and_an_archive_of_its_own(15);
}

#[test]
fn a_clone_has_its_source_s_rows_and_an_archive_of_its_own_pg17() {
    a_clone_has_its_source_s_rows_and_an_archive_of_its_own(17);
}

#[test]
fn a_clone_to_a_moment_goes_on_beside_a_source_that_goes_on_too_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (original, original_sidecar) = pod(&scratch, "orders-0", 15, &repository);
    original.sql("CREATE TABLE rows AS SELECT 1 AS n");
    back_up(&original_sidecar);
    let time = original.now();
    original.sql("INSERT INTO rows VALUES (2)");
    ship_wal(&original);

    let (mut postgres, mut sidecar) = empty_pod(&scratch, "copy-0", 15, &repository);
    sidecar.set("PGSIDECAR_CLONE_FROM", &source_url(&repository));
    let request = format!("id=a target-time='{time}'");
    prepared(&sidecar, 0, &[("PGSIDECAR_RESTORE", &request)]);
    start(&mut postgres, &mut sidecar);
    postgres.wait_for_promotion();
    postgres.sql("INSERT INTO rows VALUES (20)");
    ship_wal(&postgres);
    original.sql("INSERT INTO rows VALUES (3)");
    ship_wal(&original);
    assert_eq!(postgres.sql("SELECT string_agg(n::text, ',' ORDER BY n) FROM rows"), "1,20");
    assert_eq!(original.sql("SELECT string_agg(n::text, ',' ORDER BY n) FROM rows"), "1,2,3");
    assert_eq!(timeline(&original), "00000001");
    let owners = Look::into(&repository).matching("owner.json");
    assert_eq!(owners.len(), 2, "{owners:?}");
    original_sidecar.ok(&["wal", "verify"]);
}

#[test]
fn a_clone_never_has_its_source_s_place_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let _source = source(&scratch, 15, &repository);
    let before = fingerprint(&Look::into(&repository), SOURCE);
    let (postgres, mut sidecar) = empty_pod(&scratch, "copy-0", 15, &repository);
    sidecar.set("PGSIDECAR_CLONE_FROM", &source_url(&repository));
    let same = [("PGSIDECAR_CLUSTER", SOURCE)];
    said(&prepared(&sidecar, 78, &same), &["PGSIDECAR_CLONE_FROM", "this database's own place"]);
    // The same by another name, and with the border between repository and cluster elsewhere.
    let link = scratch.path().join("link");
    std::os::unix::fs::symlink(scratch.path().join("repository"), &link).unwrap();
    let linked = format!("file://{}?cluster={SOURCE}", link.display());
    said(&prepared(&sidecar, 78, &[same[0], ("PGSIDECAR_CLONE_FROM", &linked)]), &["own place"]);
    let deeper = format!("file://{}/shop?cluster=orders", scratch.path().join("repository").display());
    said(&prepared(&sidecar, 78, &[same[0], ("PGSIDECAR_CLONE_FROM", &deeper)]), &["own place"]);
    // A source that isn't there, or has nothing, is told.
    let nothing = source_url(&repository).replace("orders", "nothing");
    said(&prepared(&sidecar, 1, &[("PGSIDECAR_CLONE_FROM", &nothing)]), &["holds no complete backup"]);
    assert!(is_empty(&postgres.data));
    assert_eq!(fingerprint(&Look::into(&repository), SOURCE), before);
}

#[test]
fn a_clone_s_recovery_does_not_end_because_its_source_can_not_be_asked_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let _source = source(&scratch, 15, &repository);
    let (mut postgres, mut sidecar) = empty_pod(&scratch, "copy-0", 15, &repository);
    sidecar.set("PGSIDECAR_CLONE_FROM", &source_url(&repository));
    prepared(&sidecar, 0, &[]);

    // What it says is "can't tell", for a segment that is there, one that isn't, and a history.
    let restore = |sidecar: &Sidecar, name: &str| {
        let mut helper = command(Sidecar::helper());
        helper.args([
            "--address",
            &format!("127.0.0.1:{}", sidecar.port),
            "--timeout",
            "3",
            "restore",
            name,
            "pg_wal/asked",
        ]);
        let output = helper.current_dir(&postgres.data).output().unwrap();
        output.status.code().unwrap_or_else(|| panic!("{}", told(&output)))
    };
    let names = ["000000010000000000000005", "0000000100000000000000F0", "00000002.history"];
    let clone_from = source_url(&repository);
    sidecar.set("PGSIDECAR_CLONE_FROM", "");
    sidecar.start();
    assert_eq!(names.map(|name| restore(&sidecar, name)), [200; 3]);
    said(&sidecar.curl("/v1/wal/00000002.history", &[]).1, &["misconfigured", "PGSIDECAR_CLONE_FROM"]);
    sidecar.stop();

    // With the source back in the settings the answers are certain: that of 5, the end, and no such timeline.
    sidecar.set("PGSIDECAR_CLONE_FROM", &clone_from);
    sidecar.start();
    assert_eq!([restore(&sidecar, names[1]), restore(&sidecar, names[2])], [1, 1]);
    sidecar.stop();
    start(&mut postgres, &mut sidecar);
    postgres.wait_for_promotion();
    assert_eq!(postgres.sql("SELECT max(n) FROM rows"), "1002");
    wait_until("recovery.signal is gone", Duration::from_secs(10), || {
        fs::metadata(postgres.data.join("recovery.signal")).is_err()
    });
}
