//! Damage, in the database and in the repository: found, told by its name, and no reason not to have a backup.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    path::PathBuf,
    process::Stdio,
};

use serde_json::{Value, json};

use crate::support::{
    Postgres, Repository, Scratch, Sidecar,
    restoring::{archiving_configured, back_up, restored},
};

const SMALL_WAL_CHECKSUMS: &[&str] = &["--wal-segsize=1", "--data-checksums"];
const PAGE: u64 = 8192;

fn path_of(postgres: &Postgres, relation: &str) -> String {
    postgres.sql(&format!("SELECT pg_relation_filepath('{relation}')"))
}

/// Changes a byte in the middle of these blocks of a relation, while nobody has them in memory.
fn damage(postgres: &mut Postgres, relation: &str, blocks: &[u64]) -> String {
    let path = path_of(postgres, relation);
    postgres.stop("fast");
    let file = OpenOptions::new().read(true).write(true).open(postgres.data.join(&path)).unwrap();
    for block in blocks {
        let mut byte = [0];
        file.read_exact_at(&mut byte, block * PAGE + 5000).unwrap();
        byte[0] ^= 0x10;
        file.write_all_at(&byte, block * PAGE + 5000).unwrap();
    }
    postgres.start(&[]);
    path
}

fn damage_in_the_database_is_named_and_backed_up_all_the_same(major: u32) {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (mut postgres, sidecar) = archiving_configured(&scratch, major, SMALL_WAL_CHECKSUMS, &repository, &[]);
    postgres.sql("CREATE TABLE t AS SELECT n, gen_random_uuid() u FROM generate_series(1, 20000) n");
    postgres.sql("CREATE TABLE good AS SELECT n FROM generate_series(1, 20000) n");
    postgres.sql("CREATE DATABASE other");
    let other = |sql: &str| {
        let mut client = postgres.client("psql");
        let status = client.args(["-X", "-q", "-d", "other", "-c", sql]).stdout(Stdio::null()).status();
        assert!(status.unwrap().success());
    };
    other("CREATE SCHEMA s; CREATE TABLE s.there AS SELECT n FROM generate_series(1, 20000) n");
    let clean = back_up(&sidecar);
    assert_eq!(sidecar.json(&["backup", "show", &clean])["damaged"], json!([]));
    assert_eq!(sidecar.json(&["backup", "verify", "--deep"])["ok"], true);

    let path = damage(&mut postgres, "t", &[3, 4, 17]);
    let there = {
        let mut client = postgres.client("psql");
        client.args(["-X", "-At", "-d", "other", "-c", "SELECT pg_relation_filepath('s.there')"]);
        String::from_utf8(client.output().unwrap().stdout).unwrap().trim().to_owned()
    };
    postgres.stop("fast");
    let file = OpenOptions::new().write(true).open(postgres.data.join(&there)).unwrap();
    file.write_all_at(&[0xFF; 100], PAGE + 4000).unwrap();
    postgres.start(&[]);
    let id = back_up(&sidecar);
    let record = sidecar.json(&["backup", "show", &id]);
    let mut expected = vec![
        json!({"path": path, "relation": "postgres.public.t", "blocks": [3, 4, 17], "count": 3}),
        json!({"path": there, "relation": "other.s.there", "blocks": [1], "count": 1}),
    ];
    expected.sort_by_key(|file| file["path"].as_str().unwrap().to_owned());
    assert_eq!(record["damaged"], Value::from(expected));
    let shown = sidecar.ok(&["backup", "show", &id]);
    assert!(shown.contains(&format!("Damaged    postgres.public.t ({path}): 3 pages: blocks 3, 4, 17\n")), "{shown}");
    assert!(sidecar.log().contains("the database has damaged pages"), "{}", sidecar.log());

    let status = sidecar.json(&["status"]);
    assert_eq!(
        (&status["state"], &status["last_backup"]["damaged_pages"]),
        (&"degraded".into(), &4.into()),
        "{status}"
    );
    assert!(status["problems"][0]["message"].as_str().unwrap().contains("4 damaged pages"), "{status}");
    assert_eq!(sidecar.metric("pgsidecar_last_backup_damaged_pages"), "4");
    let output = sidecar.cli(&["backup", "verify", "--json"]);
    assert_eq!(output.status.code(), Some(65));
    let verified: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(verified["backups"][0]["ok"], true);
    assert_eq!((&verified["backups"][1]["ok"], &verified["backups"][1]["problems"]), (&false.into(), &json!([])));
    assert!(sidecar.fails(65, &["backup", "verify", &id]).is_empty(), "it's a result, not an error");

    // As it was, and the rest is whole.
    let copy = restored(&scratch, &sidecar, major, "copy", &[]);
    assert_eq!(copy.sql("SELECT count(*) FROM good"), "20000");
    assert!(copy.try_sql("SELECT count(*) FROM t").unwrap_err().contains("invalid page in block 3"));
}

#[test]
fn damage_in_the_database_is_named_and_backed_up_all_the_same_pg15() {
    damage_in_the_database_is_named_and_backed_up_all_the_same(15);
}

#[test]
fn damage_in_the_database_is_named_and_backed_up_all_the_same_pg17() {
    damage_in_the_database_is_named_and_backed_up_all_the_same(17);
}

#[test]
fn a_busy_database_is_no_damaged_one_pg17() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (postgres, sidecar) =
        archiving_configured(&scratch, 17, SMALL_WAL_CHECKSUMS, &repository, &["shared_buffers = 1MB"]);
    assert!(postgres.client("pgbench").args(["-i", "-s", "5", "-q"]).stderr(Stdio::null()).status().unwrap().success());
    let mut load = postgres.client("pgbench");
    let mut load =
        load.args(["-n", "-c", "4", "-T", "60"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    for _ in 0..4 {
        let id = back_up(&sidecar);
        assert_eq!(sidecar.json(&["backup", "show", &id])["damaged"], json!([]));
    }
    load.kill().unwrap();
    load.wait().unwrap();
    assert!(!sidecar.log().contains("damaged"), "{}", sidecar.log());
}

/// The files of a backup in a repository that is a directory.
fn directory(scratch: &Scratch, postgres: &Postgres, id: &str) -> PathBuf {
    let system = postgres.sql("SELECT system_identifier FROM pg_control_system()");
    scratch.path().join("repository/main").join(system).join("backups").join(id)
}

/// What is said of a backup: whether it's all right, and its problems.
type OfBackup = (String, bool, Vec<String>);

fn verified(sidecar: &Sidecar, arguments: &[&str]) -> (Option<i32>, Vec<OfBackup>) {
    let output = sidecar.cli(&[&["backup", "verify", "--json"], arguments].concat());
    let verified: Value = serde_json::from_slice(&output.stdout).unwrap();
    let backups = verified["backups"].as_array().unwrap().iter().map(|backup| {
        let problems = backup["problems"].as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned());
        (backup["backup"].as_str().unwrap().to_owned(), backup["ok"].as_bool().unwrap(), problems.collect())
    });
    (output.status.code(), backups.collect())
}

#[test]
fn damage_in_the_repository_is_found_by_verify_pg17() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let options = &["summarize_wal = on"];
    let (postgres, sidecar) = archiving_configured(&scratch, 17, SMALL_WAL_CHECKSUMS, &repository, options);
    postgres.sql("CREATE TABLE t AS SELECT n, gen_random_uuid() u FROM generate_series(1, 20000) n");
    let full = back_up(&sidecar);
    postgres.sql("UPDATE t SET n = -n WHERE n % 1000 = 0");
    let incremental = back_up(&sidecar);
    assert!(full.ends_with("-full") && incremental.ends_with("-incremental"), "{full} {incremental}");
    postgres.sql("SELECT pg_switch_wal()");
    for arguments in [&[][..], &["--deep"], &[&incremental], &[&full, "--deep"]] {
        let (code, backups) = verified(&sidecar, arguments);
        assert!(code == Some(0) && backups.iter().all(|(_, ok, _)| *ok), "{backups:?}");
    }
    assert_eq!(verified(&sidecar, &[&incremental]).1.len(), 2, "with what it builds on");

    let part = directory(&scratch, &postgres, &full).join("part-00001.tar.zst");
    let bytes = fs::read(&part).unwrap();
    // A bit: the size is what it was, so that only reading finds it.
    let mut flipped = bytes.clone();
    flipped[bytes.len() / 2] ^= 1;
    fs::write(&part, &flipped).unwrap();
    assert_eq!(verified(&sidecar, &[]).0, Some(0));
    let (code, backups) = verified(&sidecar, &["--deep"]);
    assert_eq!(code, Some(65));
    assert!(!backups[0].1 && backups[0].2[0].contains("part-00001.tar.zst"), "{backups:?}");
    assert!(!backups[1].1 && backups[1].2[0].contains(&format!("builds on backup {full}")), "{backups:?}");
    // Cut, and gone: that is seen in the list.
    for left in [Some(&bytes[..bytes.len() / 2]), None] {
        match left {
            Some(left) => fs::write(&part, left).unwrap(),
            None => fs::remove_file(&part).unwrap(),
        }
        let (code, backups) = verified(&sidecar, &[&incremental]);
        assert_eq!(code, Some(65));
        assert!(backups[0].2[0].contains("part-00001.tar.zst is missing"), "{backups:?}");
    }
    fs::write(&part, &bytes).unwrap();
    // An index that isn't the one that was stored, a manifest, WAL that it needs, a record.
    for name in ["index.jsonl.zst", "backup_manifest.zst"] {
        let path = directory(&scratch, &postgres, &incremental).join(name);
        let bytes = fs::read(&path).unwrap();
        let mut flipped = bytes.clone();
        flipped[bytes.len() - 5] ^= 1;
        fs::write(&path, &flipped).unwrap();
        let (code, backups) = verified(&sidecar, &["--deep"]);
        assert!(code == Some(65) && backups[0].1 && backups[1].2[0].contains(name), "{backups:?}");
        fs::write(&path, &bytes).unwrap();
    }
    let start = sidecar.json(&["backup", "show", &full])["start_lsn"].as_str().unwrap().to_owned();
    let segment = postgres.sql(&format!("SELECT pg_walfile_name('{start}')"));
    let wal = directory(&scratch, &postgres, "").parent().unwrap().join("wal");
    let found = walk(&wal).into_iter().find(|path| path.ends_with(format!("{segment}.zst"))).unwrap();
    let bytes = fs::read(&found).unwrap();
    fs::remove_file(&found).unwrap();
    let (code, backups) = verified(&sidecar, &[&full]);
    assert!(code == Some(65) && backups[0].2[0].contains(&segment), "{backups:?}");
    fs::write(&found, &bytes).unwrap();
    let record = directory(&scratch, &postgres, &full).join("backup.json");
    let text = fs::read(&record).unwrap();
    fs::write(&record, &text[..text.len() / 2]).unwrap();
    let (code, backups) = verified(&sidecar, &[]);
    assert!(code == Some(65) && backups.iter().all(|(_, ok, _)| !ok), "{backups:?}");
    fs::write(&record, &text).unwrap();
    assert_eq!(verified(&sidecar, &["--deep"]).0, Some(0));
    sidecar.fails(1, &["backup", "verify", "20200101T000000Z-full"]);
}

fn walk(directory: &std::path::Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}
