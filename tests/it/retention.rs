//! Prunes beside a running server: what stays restores, the archive is whole, and what a store refuses is told.

use std::{thread::sleep, time::Duration};

use crate::support::{
    Postgres, Repository, Scratch, Sidecar, Wire,
    restoring::{archiving_configured, restored, ship_wal},
    run, wait_until,
};

/// Two chains of a full and an incremental backup each, a row after each of them; then the window moves on.
fn two_chains(postgres: &Postgres, sidecar: &Sidecar) -> Vec<String> {
    postgres.sql("CREATE TABLE t (word text)");
    let take = |kind: &str, word: &str| {
        let record = sidecar.json(&["backup", "create", "--fast", "--type", kind]);
        postgres.sql(&format!("INSERT INTO t VALUES ('{word}')"));
        ship_wal(postgres);
        record["id"].as_str().unwrap().to_owned()
    };
    let ids = [("full", "one"), ("incremental", "two"), ("full", "three"), ("incremental", "four")];
    let ids = ids.map(|(kind, word)| take(kind, word)).to_vec();
    sleep(Duration::from_secs(3));
    postgres.sql("INSERT INTO t VALUES ('five')");
    ship_wal(postgres);
    ids
}

fn words(postgres: &Postgres) -> String {
    postgres.sql("SELECT string_agg(word, ' ' ORDER BY ctid) FROM t")
}

fn listed(sidecar: &Sidecar) -> Vec<String> {
    let listed = sidecar.json(&["backup", "list"]);
    listed.as_array().unwrap().iter().map(|record| record["id"].as_str().unwrap().to_owned()).collect()
}

fn names(value: &serde_json::Value) -> Vec<String> {
    value.as_array().unwrap().iter().map(|id| id.as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_prune_beside_a_running_server_leaves_what_restores_and_a_whole_archive_pg17() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (postgres, mut sidecar) =
        archiving_configured(&scratch, 17, &["--wal-segsize=1"], &repository, &["summarize_wal = on"]);
    let refused = sidecar.fails(78, &["prune"]);
    assert!(refused.contains("no retention is set"), "{refused}");
    let ids = two_chains(&postgres, &sidecar);
    sidecar.set("PGSIDECAR_RETENTION_WINDOW", "1s");

    let looked = sidecar.json(&["prune", "--dry-run"]);
    assert_eq!((names(&looked["removed"]["backups"]), listed(&sidecar)), (ids[..2].to_vec(), ids.clone()));
    let said = sidecar.ok(&["prune", "--dry-run"]);
    let kept = said.lines().find(|line| line.starts_with(&format!("Keeps    {}: ", ids[2]))).unwrap();
    assert!(kept.ends_with(&format!("{} builds on it", ids[3])), "{said}");
    assert!(said.contains(&format!("Would go {}", ids[0])), "{said}");

    let pruned = sidecar.json(&["prune"]);
    assert_eq!(pruned["removed"], looked["removed"]);
    assert!(pruned["removed"]["wal_files"].as_u64() > Some(2), "{pruned}");
    assert_eq!(listed(&sidecar), ids[2..]);
    sidecar.ok(&["backup", "verify", "--deep"]);
    sidecar.ok(&["wal", "verify", "--deep"]);
    assert_eq!(words(&restored(&scratch, &sidecar, 17, "latest", &[])), "one two three four five");
    let at_the_first = ["--backup", &ids[2], "--target-immediate"];
    assert_eq!(words(&restored(&scratch, &sidecar, 17, "first", &at_the_first)), "one two");
    assert_eq!(sidecar.json(&["prune"])["removed"]["wal_files"], 0);

    // The chain goes on.
    let next = sidecar.json(&["backup", "create", "--fast"]);
    assert_eq!(next["parent"], ids[3].as_str());
}

#[test]
fn a_pinned_backup_stays_restorable_and_one_that_is_needed_is_not_deleted_by_name_pg17() {
    let scratch = Scratch::new();
    let (postgres, mut sidecar) = archiving_configured(
        &scratch,
        17,
        &["--wal-segsize=1"],
        &Repository::directory(&scratch),
        &["summarize_wal = on"],
    );
    let ids = two_chains(&postgres, &sidecar);
    sidecar.set("PGSIDECAR_RETENTION_WINDOW", "1s");
    sidecar.ok(&["backup", "pin", &ids[1], "--reason", "before the upgrade"]);
    let shown = sidecar.ok(&["backup", "list"]);
    assert_eq!(shown.lines().filter(|line| line.ends_with("pinned")).count(), 1, "{shown}");
    let pruned = sidecar.json(&["prune"]);
    assert_eq!(names(&pruned["removed"]["backups"]), Vec::<String>::new());
    assert!(pruned["removed"]["wal_files"].as_u64() > Some(2), "{pruned}");
    sidecar.ok(&["wal", "verify"]);
    sidecar.ok(&["backup", "verify"]);
    let immediate = ["--backup", &ids[1], "--target-immediate"];
    assert_eq!(words(&restored(&scratch, &sidecar, 17, "pinned", &immediate)), "one");

    assert!(sidecar.fails(1, &["backup", "delete", &ids[1]]).contains("is pinned"));
    assert!(sidecar.fails(1, &["backup", "delete", &ids[2]]).contains("builds on"));
    sidecar.ok(&["backup", "unpin", &ids[1]]);
    sidecar.ok(&["backup", "delete", &ids[0], "--cascade"]);
    assert_eq!(listed(&sidecar), ids[2..]);
    let last = sidecar.fails(1, &["backup", "delete", &ids[2], "--cascade"]);
    assert!(last.contains("no other backup can be restored"), "{last}");
}

#[test]
fn without_the_right_to_delete_all_stays_and_the_exit_code_tells_pg17() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (postgres, mut sidecar) =
        archiving_configured(&scratch, 17, &["--wal-segsize=1"], &repository, &["summarize_wal = on"]);
    let ids = two_chains(&postgres, &sidecar);
    sidecar.set("PGSIDECAR_RETENTION_WINDOW", "1s");
    let Repository::S3(server) = &repository else { unreachable!() };
    let wire = Wire::to(server.endpoint().strip_prefix("http://").unwrap());
    let environment = sidecar.environment.clone();
    sidecar.through(&wire);
    wire.refuse("DELETE", "backup.json", u32::MAX);
    let output = sidecar.cli(&["prune"]);
    assert_eq!(output.status.code(), Some(77));
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("the store doesn't remove them") && said.contains("backup.json"), "{said}");
    assert_eq!(listed(&sidecar), ids);
    sidecar.ok(&["backup", "verify"]);
    sidecar.environment = environment;
    assert_eq!(names(&sidecar.json(&["prune"])["removed"]["backups"]), ids[..2]);
}

#[test]
fn the_daemon_prunes_when_asked_and_tells_how_the_repository_grows_pg15() {
    let scratch = Scratch::new();
    let mut postgres = Postgres::initdb(&scratch, 15, &["--wal-segsize=1"]);
    let mut sidecar = Sidecar::new(&scratch, &postgres, &Repository::directory(&scratch));
    sidecar.set("PGSIDECAR_RETENTION_WINDOW", "7d");
    postgres.configure(&sidecar.archive_settings().iter().map(String::as_str).collect::<Vec<_>>());
    postgres.start(&[]);
    sidecar.start();
    let id = crate::support::restoring::back_up(&sidecar);
    let ask = |method: &str, path: &str, body: &str| -> serde_json::Value {
        let socket = scratch.path().join("control.sock");
        let mut curl = sidecar.command("curl");
        curl.args(["-sS", "-X", method, "-d", body, "--unix-socket"]).arg(socket);
        serde_json::from_str(&run(curl.arg(format!("http://localhost{path}")))).unwrap()
    };
    assert_eq!(ask("POST", &format!("/v1/backups/{id}/pin"), r#"{"reason":"x"}"#)["reason"], "x");
    assert_eq!(ask("DELETE", &format!("/v1/backups/{id}/pin"), "")["backup"], id.as_str());
    let job = ask("POST", "/v1/prune", r#"{"dry_run":false}"#)["job"].clone();
    let mut ended = serde_json::Value::Null;
    wait_until("the prune has ended", Duration::from_secs(20), || {
        ended = ask("GET", &format!("/v1/jobs/{job}"), "")["outcome"].clone();
        !ended.is_null()
    });
    assert_eq!(names(&ended["succeeded"]["removed"]["backups"]), Vec::<String>::new());
    let growth = sidecar.json(&["status"])["growth"].clone();
    let stored = sidecar.json(&["backup", "show", &id])["parts"].as_array().unwrap().len();
    assert!(stored > 0 && growth["kinds"][0]["objects"] == 1, "{growth}");
    let said = sidecar.ok(&["status"]);
    assert!(said.lines().any(|line| line.starts_with("  full ")), "{said}");
    let metrics =
        run(sidecar.command("curl").args(["-sS", &format!("http://127.0.0.1:{}/metrics", sidecar.health_port)]));
    assert!(metrics.contains(r#"pgsidecar_repository_bytes{kind="wal"}"#), "{metrics}");
}
