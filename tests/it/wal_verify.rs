//! `wal list` and `wal verify` tell what is in the archive, what is missing and what is damaged.

use std::process::Output;

use pgsidecar_core::{ObjectKey, Sha256Digest};
use serde_json::{Value, json};

use crate::support::{
    Look, Postgres, Repository, Scratch, Sidecar,
    restoring::{archiving_configured, back_up, restore, ship_wal},
    told,
};

/// A backup and some WAL after it on timeline 1, then a restored server that went on on timeline 2. No daemon runs, and
/// no PostgreSQL.
struct Archive {
    scratch: Scratch,
    repository: Repository,
    sidecar: Sidecar,
    backup: String,
    /// The segments that were switched, in order, on each of the timelines.
    shipped: [Vec<String>; 2],
}

fn ship(postgres: &Postgres, segments: u32) -> Vec<String> {
    (0..segments)
        .map(|n| {
            postgres.sql(&format!("INSERT INTO t VALUES ({n})"));
            ship_wal(postgres)
        })
        .collect()
}

fn archive(major: u32) -> Archive {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (mut postgres, mut sidecar) =
        archiving_configured(&scratch, major, &["--wal-segsize=1"], &repository, &["autovacuum = off"]);
    postgres.sql("CREATE TABLE t (n int)");
    let backup = back_up(&sidecar);
    let first = ship(&postgres, 5);
    postgres.stop("immediate");

    let to = restore(&scratch, &sidecar, "replacement", &[]);
    let mut replacement = Postgres::on(&scratch, to.clone(), major);
    assert_eq!(sidecar.stop().code(), Some(0));
    sidecar.set("PGDATA", to.to_str().unwrap());
    sidecar.set("PGHOST", replacement.socket.to_str().unwrap());
    sidecar.start();
    replacement.spawn(&[]);
    replacement.wait_for_promotion();
    let second = ship(&replacement, 3);
    replacement.wait_until_archived();
    replacement.stop("immediate");
    assert_eq!(sidecar.stop().code(), Some(0));
    Archive { scratch, repository, sidecar, backup, shipped: [first, second] }
}

impl Archive {
    /// Exit code and what was printed. Nothing else may have been said: stderr is for errors and for people who watch.
    #[track_caller]
    fn says(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let output: Output = self.sidecar.cli(arguments);
        assert!(output.stderr.is_empty(), "{}", told(&output));
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    }

    /// A verification that finds something, as JSON.
    #[track_caller]
    fn finds(&self, arguments: &[&str]) -> Value {
        let (code, said) = self.says(&[&["wal", "verify", "--json"], arguments].concat());
        assert_eq!(code, Some(65), "{said}");
        let found: Value = serde_json::from_str(&said).unwrap();
        assert_eq!(found["ok"], false);
        found
    }

    fn look(&self) -> Look {
        Look::into(&self.repository)
    }

    /// The only object whose key ends with this.
    fn key(&self, end: &str) -> ObjectKey {
        let keys = self.look().keys().into_iter().map(|(key, _)| key);
        let mut keys = keys.filter(|key| key.as_str().ends_with(end));
        let key = keys.next().unwrap_or_else(|| panic!("no {end}"));
        assert_eq!(keys.next(), None);
        key
    }

    fn segment(&self, name: &str) -> ObjectKey {
        self.key(&format!("/{name}.zst"))
    }

    /// Does something with the repository without this object, and puts it back.
    fn without(&self, key: &ObjectKey, check: impl FnOnce()) {
        self.instead(key, None, check);
    }

    /// The same with something else in its place, as it would be after damage: its metadata are the old ones.
    fn instead(&self, key: &ObjectKey, other: Option<Vec<u8>>, check: impl FnOnce()) {
        let look = self.look();
        let (bytes, sha256): (Vec<u8>, Option<Sha256Digest>) = look.object(key);
        match other {
            None => look.remove(key),
            Some(other) => look.put(key, other, sha256),
        }
        check();
        look.put(key, bytes, sha256);
    }
}

fn what_is_missing_or_damaged_is_named(major: u32) {
    let archive = archive(major);
    let [first, second] = &archive.shipped;

    // All is well, and a script hears it from the exit code.
    let (code, said) = archive.says(&["wal", "verify", "--deep"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("Nothing is missing") && said.contains("segments read"), "{said}");
    let whole = archive.sidecar.json(&["wal", "verify", "--deep"]);
    assert_eq!(
        (&whole["ok"], &whole["backups"], &whole["wal_segment_size"]),
        (&json!(true), &json!(1), &json!(1 << 20))
    );
    let counted: u64 = whole["timelines"].as_array().unwrap().iter().map(|t| t["segments"].as_u64().unwrap()).sum();
    assert_eq!(whole["read_segments"], counted);

    let listed = archive.sidecar.json(&["wal", "list"]);
    let timelines = listed["timelines"].as_array().unwrap();
    assert_eq!(timelines.len(), 2, "{listed}");
    assert_eq!((&timelines[0]["parent"], &timelines[1]["parent"]), (&Value::Null, &json!(1)));
    assert_eq!(timelines[1]["last"], *second.last().unwrap());
    for timeline in timelines {
        assert_eq!((&timeline["gaps"], &timeline["ranges"].as_array().unwrap().len()), (&json!(0), &1), "{timeline}");
        assert!(timeline["stored_bytes"].as_u64().unwrap() > 0 && timeline["oldest_stored_at"].is_string());
        let name = timeline["first"].as_str().unwrap();
        archive.segment(name);
    }
    let history = archive.look().wal("00000002.history").unwrap();
    let switch_point = timelines[1]["switch_point"].as_str().unwrap();
    assert!(String::from_utf8(history).unwrap().contains(switch_point), "{switch_point}");
    let (_, said) = archive.says(&["wal", "list", "--timeline", "2"]);
    assert!(said.contains(&format!("1 at {switch_point}")) && !said.contains(&first[0]), "{said}");

    // One segment of timeline 1 is gone.
    let gone = &first[2];
    archive.without(&archive.segment(gone), || {
        let (code, said) = archive.says(&["wal", "verify"]);
        assert_eq!(code, Some(65), "{said}");
        assert!(said.contains(&format!("timeline 1: {gone} (1 segment) is missing")), "{said}");
        let limited = format!("backup {} can be restored to timelines 1, 2 only up to ", archive.backup);
        assert!(said.contains(&limited) && said.contains(&format!("{gone} is missing")), "{said}");
        let found = archive.finds(&[]);
        assert_eq!(found["timelines"][0]["missing"], json!([{ "first": gone, "last": gone, "segments": 1 }]));
        assert_eq!(found["limited_backups"][0]["restorable"], true);
        // The restore's planning sees the same.
        assert_eq!(archive.sidecar.json(&["restore", "plan", "--target-timeline", "1"])["gap"], *gone);

        let (code, said) = archive.says(&["wal", "list"]);
        assert!(code == Some(0) && said.contains("Timeline 1 has:"), "{said}");
        assert!(said.contains(&format!(" to {} (", first[1])) && said.contains(&format!("  {} ", first[3])), "{said}");
        let listed = archive.sidecar.json(&["wal", "list"]);
        assert_eq!((&listed["timelines"][0]["gaps"], &listed["timelines"][1]["gaps"]), (&json!(1), &json!(0)));
    });

    // The first segment of timeline 2: that of timeline 1, which goes on differently, is no stand-in.
    let branch = timelines[1]["first"].as_str().unwrap();
    archive.without(&archive.segment(branch), || {
        let found = archive.finds(&["--timeline", "2"]);
        assert_eq!(found["timelines"][1]["missing"][0]["first"], branch, "{found}");
        assert_eq!(found["limited_backups"][0]["timelines"], json!([2]));
        assert_eq!(archive.says(&["wal", "verify", "--timeline", "1"]).0, Some(0));
    });

    // The backup's own WAL.
    let start = whole["timelines"][0]["from"].as_str().unwrap();
    archive.without(&archive.segment(start), || {
        let (_, said) = archive.says(&["wal", "verify"]);
        let lost = format!("backup {} can't be restored to timelines 1, 2: {start}, which it needs", archive.backup);
        assert!(said.contains(&lost), "{said}");
        let why = archive.sidecar.fails(65, &["restore", "plan"]);
        assert!(why.contains(&format!("WAL segment {start}, which it needs")), "{why}");
    });

    archive.without(&archive.key("00000002.history.zst"), || {
        let found = archive.finds(&[]);
        assert_eq!(found["missing_histories"], json!(["00000002.history"]));
    });
    archive.instead(&archive.key("00000002.history.zst"), Some(b"not zstd".to_vec()), || {
        let found = archive.finds(&[]);
        assert_eq!(
            (&found["missing_histories"], &found["damaged_histories"][0]["file"]),
            (&json!([]), &json!("00000002.history"))
        );
    });

    // Damage is found by reading alone.
    let damaged = archive.segment(&first[3]);
    let (bytes, _) = archive.look().object(&damaged);
    let flipped = |at: usize| {
        let mut bytes = bytes.clone();
        bytes[at] ^= 0x10;
        bytes
    };
    let (other_segment, _) = archive.look().object(&archive.segment(&first[4]));
    archive.instead(&damaged, Some(flipped(0)), || {
        let (code, said) = archive.says(&["wal", "verify"]);
        assert!(code == Some(0) && said.contains("not looked at"), "{said}");
    });
    let long = zstd::encode_all(vec![7_u8; 3 << 20].as_slice(), 1).unwrap();
    for (other, words) in [
        (flipped(bytes.len() / 2), ""),
        (flipped(0), ""),
        (bytes[..bytes.len() / 2].to_vec(), ""),
        (Vec::new(), ""),
        (other_segment, "stored was"),
        (long, "longer than a WAL segment"),
    ] {
        archive.instead(&damaged, Some(other), || {
            let found = archive.finds(&["--deep"]);
            assert_eq!((&found["damaged_segments"], &found["damaged"][0]["file"]), (&json!(1), &json!(first[3])));
            let limit = &found["limited_backups"][0];
            assert_eq!((&limit["lacks"], &limit["damaged"]), (&json!(first[3]), &json!(true)), "{limit}");
            let message = found["damaged"][0]["message"].as_str().unwrap();
            assert!(message.contains(words), "{message}");
        });
    }
    let (_, said) = archive.says(&["wal", "verify", "--deep"]);
    assert!(said.contains("Nothing is missing"), "all has been put back: {said}");
    drop(archive.scratch);
}

#[test]
fn what_is_missing_or_damaged_is_named_pg15() {
    what_is_missing_or_damaged_is_named(15);
}

#[test]
fn what_is_missing_or_damaged_is_named_pg17() {
    what_is_missing_or_damaged_is_named(17);
}

#[test]
fn a_segment_under_another_name_is_found_by_its_header_and_foreign_objects_are_only_counted_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (postgres, sidecar) = archiving_configured(&scratch, 15, &["--wal-segsize=1"], &repository, &[]);
    let said = sidecar.ok(&["wal", "verify"]);
    assert!(said.contains("There is no backup"), "{said}");
    postgres.sql("CREATE TABLE t (n int)");
    back_up(&sidecar);
    let shipped = ship(&postgres, 3);

    let look = Look::into(&repository);
    let key = |name: &str| -> ObjectKey {
        look.matching(&format!("/{name}.zst")).pop().unwrap_or_else(|| panic!("no {name}")).parse().unwrap()
    };
    // With all that was stored beside it.
    let (bytes, content) = look.object(&key(&shipped[0]));
    look.put(&key(&shipped[1]), bytes, content);
    let wal = key(&shipped[0]);
    let (wal, _) = wal.as_str().split_once("00000001/").unwrap();
    look.put(&format!("{wal}notes.txt").parse().unwrap(), b"ours?".to_vec(), None);
    look.put(&format!("{wal}00000001/0000000100000000/copy.zst").parse().unwrap(), b"ours?".to_vec(), None);

    let output = sidecar.cli(&["wal", "verify", "--deep"]);
    let said = told(&output);
    assert_eq!(output.status.code(), Some(65), "{said}");
    assert!(said.contains(&format!("DAMAGED  {} holds the WAL from ", shipped[1])), "{said}");
    assert!(sidecar.ok(&["wal", "list"]).contains("2 objects among them are not pgsidecar's."));
    assert_eq!(sidecar.json(&["wal", "list"])["foreign_objects"], 2);
}

#[test]
fn what_can_not_be_told_is_an_error_and_no_finding_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (postgres, mut sidecar) = archiving_configured(&scratch, 15, &["--wal-segsize=1"], &repository, &[]);
    postgres.sql("CREATE TABLE t (n int)");
    ship(&postgres, 1);
    for command in [["wal", "list"], ["wal", "verify"]] {
        let said = sidecar.fails(1, &[command[0], command[1], "--timeline", "9"]);
        assert!(said.contains("nothing of timeline 9") && said.contains("HINT"), "{said}");
    }
    sidecar.kill();
    sidecar.set("PGSIDECAR_CLUSTER", "another");
    for command in [["wal", "list"], ["wal", "verify"]] {
        let said = sidecar.fails(1, &command);
        assert!(said.contains("nothing of a database with system identifier"), "{said}");
    }
    sidecar.set("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1");
    for command in [["wal", "list"], ["wal", "verify"]] {
        let said = sidecar.fails(69, &command);
        assert!(said.contains("can't be reached"), "{said}");
    }
}
