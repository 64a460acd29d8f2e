//! What a restore refuses: one clear message, and nothing that PostgreSQL would start on.

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use crate::support::{
    Postgres, Repository, Scratch, Sidecar, command,
    restoring::{archiving_configured, back_up, ship_wal, text},
    run, server_user, told,
};

/// A repository with two backups and WAL after them. The server has gone.
struct Archive {
    scratch: Scratch,
    sidecar: Sidecar,
    backups: Vec<String>,
    before: String,
    after: String,
    /// The segments that were left by a switch after the first and after the second backup.
    segments: Vec<String>,
    last_lsn: String,
}

fn archive(settings: &[(&str, &str)]) -> Archive {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let mut postgres = Postgres::initdb(&scratch, 15, &["--wal-segsize=1"]);
    let mut sidecar = Sidecar::new(&scratch, &postgres, &repository);
    postgres.configure(&sidecar.archive_settings().iter().map(String::as_str).collect::<Vec<_>>());
    for (name, value) in settings {
        sidecar.set(name, value);
    }
    postgres.start(&[]);
    sidecar.start();
    let before = postgres.now();
    let mut backups = vec![back_up(&sidecar)];
    postgres.sql("CREATE TABLE rows AS SELECT 1 AS n");
    let mut segments = vec![ship_wal(&postgres)];
    backups.push(back_up(&sidecar));
    postgres.sql("INSERT INTO rows VALUES (2)");
    segments.push(ship_wal(&postgres));
    let last_lsn = postgres.sql("SELECT pg_current_wal_lsn() + 16");
    let after = postgres.now();
    postgres.stop("immediate");
    Archive { scratch, sidecar, backups, before, after, segments, last_lsn }
}

impl Archive {
    fn system(&self) -> PathBuf {
        let clusters = fs::read_dir(self.scratch.path().join("repository/main")).unwrap();
        clusters.map(|entry| entry.unwrap().path()).next().unwrap()
    }

    fn backup(&self, index: usize) -> PathBuf {
        self.system().join("backups").join(&self.backups[index])
    }

    fn segment(&self, name: &str) -> PathBuf {
        self.system().join("wal").join(&name[..8]).join(&name[..16]).join(format!("{name}.zst"))
    }

    /// Runs a restore that has to fail with this code and these words, and leave the target as it was: absent.
    #[track_caller]
    fn refused(&self, code: i32, words: &[&str], arguments: &[&str]) {
        let to = self.scratch.path().join("refused");
        let all = [&["restore", "run", "--to", text(&to)], arguments].concat();
        let said = self.sidecar.fails(code, &all);
        clear(&said, words);
        assert!(!to.exists(), "{said}\nleft {:?}", entries(&to));
    }
}

/// One error and one hint, on a line each, with these words.
#[track_caller]
fn clear(said: &str, words: &[&str]) {
    for word in words {
        assert!(said.contains(word), "{word:?} isn't in:\n{said}");
    }
    let lines: Vec<&str> = said.lines().collect();
    assert!(
        matches!(lines.as_slice(), [error, hint] if error.starts_with("pgsidecar: error: ") && hint.starts_with("HINT: ")),
        "not an error and a hint:\n{said}"
    );
}

fn entries(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn targets_that_can_t_be_reached_are_refused_pg15() {
    let archive = archive(&[]);
    let (first, second) = (archive.backups[0].as_str(), archive.backups[1].as_str());
    // The message itself shows how to write it.
    let said = archive.sidecar.fails(2, &["restore", "plan", "--target-time", "2026-11-21 06:15:00"]);
    assert!(said.contains("has no time zone. Add one: \"2026-11-21 06:15:00Z\" for UTC"), "{said}");
    archive.refused(65, &["before the end of the first backup", first], &["--target-time", &archive.before]);
    archive.refused(65, &["before the end of the first backup", first], &["--target-lsn", "0/1"]);
    archive.refused(65, &["before the end of the first backup", first], &["--target-xid", "3"]);
    archive.refused(65, &["before the end of backup", second], &["--target-lsn", "0/1", "--backup", second]);
    let last = archive.segments[1].as_str();
    archive.refused(65, &["after the last archived WAL", "--target-xid"], &["--target-time", &archive.after]);
    archive.refused(65, &["after the last archived WAL", last], &["--target-lsn", &archive.last_lsn]);
    archive.refused(65, &["\"x\""], &["--target-name", "x"]);
    archive.refused(65, &["there is no backup 20200101T000000Z-full"], &["--backup", "20200101T000000Z-full"]);
    archive.refused(65, &["timeline 7 is unknown"], &["--target-timeline", "7"]);
    archive.refused(2, &["no tablespace at /nowhere"], &["--tablespace-mapping", "/nowhere=/else"]);

    // Holes in the WAL, from the last to the first.
    fs::remove_file(archive.segment(&archive.segments[0])).unwrap();
    let gap = ["can't be reached", &archive.segments[0], "is missing"];
    archive.refused(65, &gap, &["--target-time", &archive.after, "--backup", first]);
    archive.refused(65, &gap, &["--target-lsn", &archive.last_lsn, "--backup", first]);
    let record = archive.sidecar.json(&["backup", "show", second]);
    let stop = record["stop_lsn"].as_str().unwrap();
    archive.refused(65, &gap, &["--target-lsn", stop, "--backup", first]);
    let start = u64::from_str_radix(record["start_lsn"].as_str().unwrap().split_once('/').unwrap().1, 16).unwrap();
    let own = format!("0000000100000000{:08X}", start >> 20);
    fs::remove_file(archive.segment(&own)).unwrap();
    archive.refused(65, &["can't be restored", second, &own], &["--backup", second]);
}

#[test]
fn a_target_directory_in_use_is_refused_and_left_alone_pg15() {
    let archive = archive(&[]);
    let live = archive.scratch.path().join("data");
    let refused = |to: &Path, words: &[&str]| {
        let before = entries(to);
        let said = archive.sidecar.fails(73, &["restore", "run", "--to", text(to)]);
        clear(&said, words);
        assert_eq!(entries(to), before);
    };
    let control = fs::read(live.join("global/pg_control")).unwrap();
    refused(&live, &["holds a database", "nothing was changed"]);
    assert!(fs::read(live.join("global/pg_control")).unwrap() == control);
    let other = archive.scratch.dir("other");
    fs::write(other.join("notes"), "mine").unwrap();
    refused(&other, &["is not empty", "nothing was changed"]);
    refused(&other.join("notes"), &["is not a directory"]);
    assert_eq!(fs::read_to_string(other.join("notes")).unwrap(), "mine");
    let said = archive.sidecar.fails(2, &["restore", "run", "--to", "relative"]);
    assert!(said.contains("not an absolute path"), "{said}");
}

/// Makes a change to a file, and undoes it.
fn with(path: &Path, change: impl FnOnce(&Path), then: impl FnOnce()) {
    let aside = path.with_extension("aside");
    run(command("cp").arg("-a").arg(path).arg(&aside));
    change(path);
    then();
    fs::rename(aside, path).unwrap();
}

fn flip(path: &Path, at: u64) {
    let mut bytes = fs::read(path).unwrap();
    let at = usize::try_from(at).unwrap();
    bytes[at] ^= 1;
    // Written in place: the object's attributes stay.
    fs::write(path, bytes).unwrap();
}

fn append_a_frame(path: &Path) {
    let frame = [0x28, 0xB5, 0x2F, 0xFD, 0x20, 0x00, 0x01, 0x00, 0x00];
    fs::write(path, [fs::read(path).unwrap(), frame.to_vec()].concat()).unwrap();
}

#[test]
fn a_damaged_backup_is_named_and_leaves_nothing_to_start_on_pg15() {
    let archive = archive(&[("PGSIDECAR_PART_SIZE", "5MB")]);
    let directory = archive.backup(1);
    let parts = archive.sidecar.json(&["backup", "show", &archive.backups[1]])["parts"].as_array().unwrap().len();
    assert!(parts >= 4, "{parts} parts");
    let last = format!("part-{parts:05}.tar.zst");
    let cut = |to: u64| move |path: &Path| File::options().write(true).open(path).unwrap().set_len(to).unwrap();
    for part in ["part-00002.tar.zst", &last] {
        let path = directory.join(part);
        let length = fs::metadata(&path).unwrap().size();
        let refused = |words: &[&str]| archive.refused(65, &[&[part, "damaged"], words].concat(), &[]);
        with(&path, |path| fs::remove_file(path).unwrap(), || refused(&["missing"]));
        with(&path, cut(length / 2), || refused(&[]));
        with(&path, cut(length - 1), || refused(&[]));
        with(&path, |path| flip(path, length / 2), || refused(&[]));
        // Something that decompresses, appended.
        with(&path, append_a_frame, || refused(&[]));
    }
    let (one, two) = (directory.join("part-00001.tar.zst"), directory.join("part-00002.tar.zst"));
    with(&one, |path| flip(path, 0), || archive.refused(65, &["part-00001.tar.zst", "damaged"], &[]));
    // The same whole part twice.
    with(&one, |one| assert!(fs::copy(&two, one).unwrap() > 0), || archive.refused(65, &["part-0000", "damaged"], &[]));

    let manifest = directory.join("backup_manifest.zst");
    let half = fs::metadata(&manifest).unwrap().size() / 2;
    with(&manifest, |path| flip(path, half), || archive.refused(65, &["backup_manifest.zst", "damaged"], &[]));
    with(
        &manifest,
        |path| fs::remove_file(path).unwrap(),
        || archive.refused(65, &["backup_manifest.zst", "missing"], &[]),
    );
    let record = directory.join("backup.json");
    // A record that can't be read hides its own backup, loudly, and no other.
    let garbage = |path: &Path| fs::write(path, "garbage").unwrap();
    with(&record, garbage, || {
        let planned = archive.sidecar.cli(&["restore", "plan"]);
        assert!(planned.status.success(), "{}", told(&planned));
        let warned = String::from_utf8_lossy(&planned.stderr);
        assert!(warned.contains("backup.json") && warned.contains("damaged"), "{warned}");
        assert!(String::from_utf8_lossy(&planned.stdout).contains(&archive.backups[0]), "{}", told(&planned));
        archive.sidecar.fails(65, &["restore", "plan", "--backup", &archive.backups[1]]);
    });

    // All undone, it restores; and a directory that was there stays, empty, when a restore into it fails.
    let to = archive.scratch.dir("there");
    let half = fs::metadata(&two).unwrap().size() / 2;
    let say = || clear(&archive.sidecar.fails(65, &["restore", "run", "--to", text(&to)]), &["part-00002"]);
    with(&two, |path| flip(path, half), say);
    assert_eq!(entries(&to), [""; 0]);
    archive.sidecar.ok(&["restore", "run", "--to", text(&to)]);
    assert!(to.join("PG_VERSION").exists());
}

#[test]
fn a_volume_without_room_is_refused_and_one_that_fills_up_is_cleared_root_pg15() {
    let archive = archive(&[]);
    let (uid, gid) = server_user().expect("this test runs as root");
    // In a mount namespace of its own, which ends with the shell.
    let restore = |size: &str, prepare: &str| {
        let mount = archive.scratch.path().join("volume");
        fs::create_dir_all(&mount).unwrap();
        let script = format!(
            "set -e; mount -t tmpfs -o size={size},mode=0755,uid={uid},gid={gid} none \"$1\"\n{prepare}\n\
             status=0; setpriv --reuid={uid} --regid={gid} --clear-groups \"$2\" restore run --to \"$1/data\" >/dev/null || status=$?\n\
             find \"$1\" -mindepth 1; exit $status"
        );
        let mut shell = std::process::Command::new("unshare");
        shell.args(["-m", "bash", "-c", &script, "bash"]).arg(&mount).arg(Sidecar::program());
        shell.envs(archive.sidecar.environment.iter().map(|(name, value)| (name, value)));
        shell.current_dir(archive.scratch.path()).output().unwrap()
    };
    let said = restore("8m", "");
    assert_eq!(said.status.code(), Some(73), "{}", told(&said));
    clear(&String::from_utf8_lossy(&said.stderr), &["has room for 8 MB", "nothing was changed"]);
    assert_eq!(String::from_utf8_lossy(&said.stdout), "");

    // Room enough, but not for so many files: the check passes, the writing doesn't.
    let said = restore("1g,nr_inodes=500", "");
    assert_eq!(said.status.code(), Some(74), "{}", told(&said));
    clear(&String::from_utf8_lossy(&said.stderr), &["No space left on device", "The file system is full"]);
    assert_eq!(String::from_utf8_lossy(&said.stdout), "");
}

#[test]
fn a_repository_without_backups_has_nothing_to_restore_pg15() {
    let scratch = Scratch::new();
    let (postgres, sidecar) =
        archiving_configured(&scratch, 15, &["--wal-segsize=1"], &Repository::directory(&scratch), &[]);
    ship_wal(&postgres);
    let to = scratch.path().join("refused");
    let said = sidecar.fails(65, &["restore", "run", "--to", text(&to)]);
    clear(&said, &["no complete backup", "pgsidecar backup create"]);
    assert!(!to.exists());
}
