//! WAL that `archive_command = 'cp %p DIR/%f'` has copied to a directory: shipped whole, and removed once durable.

use std::{
    fs::{self, OpenOptions, Permissions},
    io::Write,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use serde_json::Value;

use crate::support::{
    Look, Mode, Postgres, Repository, Scratch, Sidecar, Wire, beside, give_to_servers,
    restoring::{back_up, restored},
    segment, wait_until,
};

const PATIENCE: Duration = Duration::from_secs(60);
/// Longer than a file must be left alone before it's looked into, and that twice.
const A_WHILE: Duration = Duration::from_secs(6);
const MB: u32 = 1 << 20;
const SMALL_WAL: &[&str] = &["--wal-segsize=1"];

/// A server that copies its WAL to a directory.
fn copying(scratch: &Scratch, major: u32, repository: &Repository) -> (Postgres, Sidecar, PathBuf) {
    let directory = scratch.dir("archive");
    let (mut postgres, mut sidecar) = beside(scratch, major, SMALL_WAL, repository);
    sidecar.set("PGSIDECAR_ARCHIVE_DIRECTORY", directory.to_str().unwrap());
    let copy = format!("archive_command = 'test ! -f {0}/%f && cp %p {0}/%f'", directory.display());
    postgres.configure(&["archive_mode = on", &copy, "wal_keep_size = 2GB", "max_wal_size = 2GB"]);
    postgres.start(&[]);
    (postgres, sidecar, directory)
}

/// Segments that a server has copied before it was stopped, and a daemon that looks into another directory.
struct Copied {
    scratch: Scratch,
    repository: Repository,
    postgres: Postgres,
    sidecar: Sidecar,
    /// Their names, in order, and where they lie.
    names: Vec<String>,
    copies: PathBuf,
    directory: PathBuf,
}

impl Copied {
    fn new() -> Copied {
        let (scratch, repository) = (Scratch::new(), Repository::s3());
        let (mut postgres, mut sidecar, copies) = copying(&scratch, 15, &repository);
        postgres.sql("CREATE TABLE t AS SELECT n, gen_random_uuid() FROM generate_series(1, 40000) n");
        postgres.switch_wal();
        postgres.wait_until_archived();
        postgres.stop("fast");
        let names = names(&copies);
        assert!(names.len() >= 4, "{names:?}");
        let directory = scratch.dir("inbox");
        sidecar.set("PGSIDECAR_ARCHIVE_DIRECTORY", directory.to_str().unwrap());
        Copied { scratch, repository, postgres, sidecar, names, copies, directory }
    }

    fn bytes(&self, number: usize) -> Vec<u8> {
        fs::read(self.copies.join(&self.names[number])).unwrap()
    }

    /// Puts a file into the directory that the daemon looks into.
    fn lay(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.directory.join(name);
        fs::write(&path, bytes).unwrap();
        give_to_servers(&path);
        path
    }

    fn lay_number(&self, number: usize) -> PathBuf {
        self.lay(&self.names[number], &self.bytes(number))
    }

    fn look(&self) -> Look {
        Look::into(&self.repository)
    }

    /// Waits until the file has been removed. It must be in the repository then.
    #[track_caller]
    fn wait_until_shipped(&self, number: usize) {
        let path = self.directory.join(&self.names[number]);
        wait_until("the file is removed", PATIENCE, || !path.exists());
        assert!(self.look().wal(&self.names[number]).unwrap() == self.bytes(number));
    }

    fn status(&self) -> Value {
        self.sidecar.json(&["status"])
    }

    /// The codes of what stays, by name.
    fn held(&self) -> Vec<(String, String)> {
        let held = self.status()["archive"]["directory"]["held"].clone();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        held.as_array().unwrap().iter().map(|held| (text(&held["file"]), text(&held["reason"]["code"]))).collect()
    }
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn is_empty(directory: &Path) -> bool {
    names(directory).is_empty()
}

/// What `pgsidecar check` says of the directory.
fn checked(sidecar: &Sidecar) -> String {
    let findings: Value = serde_json::from_slice(&sidecar.cli(&["check", "--json"]).stdout).unwrap();
    let finding = findings.as_array().unwrap().iter().find(|finding| finding["check"] == "archive dir").unwrap();
    finding["state"].as_str().unwrap().to_owned()
}

fn append(path: &Path, bytes: &[u8]) {
    OpenOptions::new().append(true).open(path).unwrap().write_all(bytes).unwrap();
}

fn what_cp_leaves_under_load_arrives_whole_is_removed_and_restores(major: u32) {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (postgres, mut sidecar, directory) = copying(&scratch, major, &repository);
    postgres.sql("CREATE TABLE t (n int, u uuid)");
    let script = scratch.path().join("load.sql");
    fs::write(&script, "INSERT INTO t SELECT n, gen_random_uuid() FROM generate_series(1, 5000) n;\n").unwrap();
    // Five segments a second where the machine can; however slow it is, half as many segments as transactions.
    let load = |transactions: &str| {
        let mut load = postgres.client("pgbench");
        load.args(["-n", "-c", "2", "-R", "10", "-t", transactions, "-f"])
            .arg(&script)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        load.spawn().unwrap()
    };
    // What was copied before there was a daemon is long marked as done: nobody asks for it any more.
    load("12").wait().unwrap();
    postgres.wait_until_archived();
    let before = names(&directory).len();
    assert!(before >= 5, "{before}");
    sidecar.start();
    let mut under_load = load("40");
    back_up(&sidecar);
    under_load.wait().unwrap();
    postgres.switch_wal();
    postgres.wait_until_archived();
    wait_until("the directory is empty", PATIENCE, || is_empty(&directory));

    let look = Look::into(&repository);
    look.check_all_whole();
    let mut compared = 0;
    for mark in names(&postgres.data.join("pg_wal/archive_status")) {
        let name = mark.strip_suffix(".done").unwrap();
        let ours = fs::read(postgres.data.join("pg_wal").join(name)).unwrap();
        assert!(look.wal(name).unwrap_or_else(|| panic!("{name} was removed and isn't stored")) == ours, "{name}");
        compared += 1;
    }
    assert!(compared > before + 5, "{compared}");
    let status = sidecar.json(&["status"]);
    assert_eq!((&status["state"], &status["archive"]["directory"]["files"]), (&"ok".into(), &0.into()), "{status}");
    assert_eq!(status["archive"]["conflicts"], 0);
    let copy = restored(&scratch, &sidecar, major, "restored", &[]);
    assert_eq!(copy.sql("SELECT count(*) FROM t"), postgres.sql("SELECT count(*) FROM t"));
}

#[test]
fn what_cp_leaves_under_load_arrives_whole_is_removed_and_restores_pg15() {
    what_cp_leaves_under_load_arrives_whole_is_removed_and_restores(15);
}

#[test]
fn what_cp_leaves_under_load_arrives_whole_is_removed_and_restores_pg17() {
    what_cp_leaves_under_load_arrives_whole_is_removed_and_restores(17);
}

fn what_a_promotion_and_a_backup_leave_is_shipped(major: u32) {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (mut postgres, mut sidecar, directory) = copying(&scratch, major, &repository);
    let backup = "SELECT pg_backup_start('by hand', true); SELECT pg_backup_stop(false)";
    postgres.sql(backup);
    postgres.stop("fast");
    fs::write(postgres.data.join("standby.signal"), "").unwrap();
    postgres.configure(&["restore_command = 'false'"]);
    postgres.start(&[]);
    postgres.sql("SELECT pg_promote()");
    postgres.wait_for_promotion();
    postgres.switch_wal();
    postgres.wait_until_archived();
    let copied: Vec<(String, Vec<u8>)> =
        names(&directory).into_iter().map(|name| (name.clone(), fs::read(directory.join(name)).unwrap())).collect();
    for end in [".backup", ".history", ".partial"] {
        assert!(copied.iter().any(|(name, _)| name.ends_with(end)), "{end}");
    }
    sidecar.start();
    wait_until("the directory is empty", PATIENCE, || is_empty(&directory));
    for (name, bytes) in copied {
        let answer = sidecar.get(&name);
        assert_eq!(answer.status, 200, "{name}: {answer:?}");
        assert!(answer.body == bytes, "{name}");
    }
}

#[test]
fn what_a_promotion_and_a_backup_leave_is_shipped_pg15() {
    what_a_promotion_and_a_backup_leave_is_shipped(15);
}

#[test]
fn what_a_promotion_and_a_backup_leave_is_shipped_pg17() {
    what_a_promotion_and_a_backup_leave_is_shipped(17);
}

#[test]
fn a_copy_that_is_being_written_is_taken_only_when_it_is_whole_pg15() {
    let mut copied = Copied::new();
    copied.sidecar.start();
    let halves = [copied.bytes(0), copied.bytes(1)];
    let half = halves[0].len() / 2;
    let growing = copied.lay(&copied.names[0], &halves[0][..half]);
    // Some tools make the file as long as it will be before they write to it.
    let laid_out = copied.lay(&copied.names[1], &halves[1][..half]);
    OpenOptions::new().write(true).open(&laid_out).unwrap().set_len(halves[1].len() as u64).unwrap();
    let history = copied.lay("00000002.history", b"1\t0/1000060\tno recovery target spec");
    std::thread::sleep(A_WHILE);
    assert_eq!(copied.look().matching("/wal/"), [] as [&str; 0]);
    assert_eq!(copied.sidecar.metric("pgsidecar_archive_failures_total"), "0");
    append(&growing, &halves[0][half..]);
    fs::write(&laid_out, &halves[1]).unwrap();
    append(&history, b"ified\n");
    copied.wait_until_shipped(0);
    copied.wait_until_shipped(1);
    wait_until("the history is removed", PATIENCE, || !history.exists());
    assert_eq!(copied.look().wal("00000002.history").unwrap(), b"1\t0/1000060\tno recovery target specified\n");
    assert!(!copied.sidecar.log().contains("stays in the archive directory"), "nothing had to be told");
}

#[test]
fn what_stays_incomplete_is_told_once_holds_up_nothing_and_is_taken_when_it_is_completed_pg15() {
    let mut copied = Copied::new();
    let cut = copied.bytes(0).len() - 8192;
    let short = copied.lay(&copied.names[0], &copied.bytes(0)[..cut]);
    copied.lay(&copied.names[1], b"");
    copied.lay_number(2);
    copied.sidecar.start();
    copied.wait_until_shipped(2);
    let incomplete = |number: usize| (copied.names[number].clone(), "invalid_segment".to_owned());
    wait_until("both are told", PATIENCE, || copied.held() == [incomplete(0), incomplete(1)]);
    let text = copied.sidecar.ok(&["status"]);
    assert!(text.contains("2 in the archive directory, of which 2 stay there"), "{text}");
    assert_eq!(copied.sidecar.metric("pgsidecar_archive_directory_held_files"), "2");
    assert_eq!(copied.sidecar.metric("pgsidecar_archive_directory_files"), "2");
    assert_eq!(copied.sidecar.metric("pgsidecar_degraded"), "1");
    let status = copied.status();
    let problem = status["problems"][0]["message"].as_str().unwrap();
    assert!(problem.starts_with("2 files stay in the archive directory"), "{problem}");
    std::thread::sleep(A_WHILE);
    let log = copied.sidecar.log();
    let told = log.lines().filter(|line| line.contains("stays in the archive directory")).count();
    assert_eq!(told, 2, "{log}");

    append(&short, &copied.bytes(0)[cut..]);
    copied.wait_until_shipped(0);
    copied.lay_number(1);
    copied.wait_until_shipped(1);
    wait_until("the status is clean", PATIENCE, || copied.status()["problems"] == serde_json::json!([]));
}

#[test]
fn a_file_that_was_stored_just_before_a_kill_is_removed_by_the_next_daemon_pg15() {
    let mut copied = Copied::new();
    let Repository::S3(server) = &copied.repository else { unreachable!("it's on S3") };
    let proxy = Wire::to(&server.address());
    copied.sidecar.through(&proxy);
    copied.sidecar.start();
    proxy.hold_answer("PUT", &copied.names[0]);
    let path = copied.lay_number(0);
    proxy.wait_for_held();
    copied.sidecar.kill();
    assert!(copied.look().wal(&copied.names[0]).is_some(), "the answer was held back, not the request");
    assert!(path.exists(), "it wasn't acknowledged");
    proxy.release();
    copied.sidecar.start();
    copied.wait_until_shipped(0);
    assert_eq!(copied.status()["problems"], serde_json::json!([]));
}

#[test]
fn during_an_outage_of_the_store_files_stay_and_drain_by_themselves_pg15() {
    let mut copied = Copied::new();
    let Repository::S3(server) = &copied.repository else { unreachable!("it's on S3") };
    let proxy = Wire::to(&server.address());
    copied.sidecar.through(&proxy);
    copied.sidecar.start();
    copied.lay_number(0);
    copied.wait_until_shipped(0);
    proxy.set(Mode::Refuse);
    (1..4).for_each(|number| drop(copied.lay_number(number)));
    wait_until("the status tells of it", PATIENCE, || copied.status()["problems"].to_string().contains("store_unav"));
    std::thread::sleep(A_WHILE);
    assert_eq!(names(&copied.directory), copied.names[1..4]);
    assert_eq!(copied.status()["archive"]["directory"]["files"], 3);
    assert_eq!(copied.status()["archive"]["directory"]["held_files"], 0);
    proxy.set(Mode::Pass);
    (1..4).for_each(|number| copied.wait_until_shipped(number));
}

#[test]
fn a_copy_with_other_content_than_the_repository_stays_and_is_told_pg15() {
    let mut copied = Copied::new();
    copied.sidecar.start();
    copied.lay_number(0);
    copied.wait_until_shipped(0);
    let mut other = copied.bytes(0);
    other[300_000] ^= 1;
    let path = copied.lay(&copied.names[0], &other);
    copied.lay_number(1);
    copied.wait_until_shipped(1);
    wait_until("it's told", PATIENCE, || copied.held() == [(copied.names[0].clone(), "conflict".to_owned())]);
    std::thread::sleep(A_WHILE);
    assert_eq!(copied.sidecar.metric("pgsidecar_archive_conflicts_total"), "1", "not tried again and again");
    assert!(fs::read(&path).unwrap() == other);
    assert!(copied.look().wal(&copied.names[0]).unwrap() == copied.bytes(0));
}

#[test]
fn what_is_no_wal_of_this_database_is_left_alone_pg15() {
    let mut copied = Copied::new();
    let (inside, bytes) = (&copied.directory, copied.bytes(0));
    let elsewhere = copied.scratch.path().join("elsewhere");
    fs::write(&elsewhere, &bytes).unwrap();
    give_to_servers(&elsewhere);
    symlink(&elsewhere, inside.join(&copied.names[0])).unwrap();
    fs::create_dir(inside.join(&copied.names[1])).unwrap();
    fs::write(inside.join(&copied.names[1]).join(&copied.names[2]), &bytes).unwrap();
    for name in
        ["README", "postgresql.conf", "000000010000000000000001.tmp", ".000000010000000000000001.XyZ", "archive"]
    {
        copied.lay(name, &bytes);
    }
    let foreign = "000000010000000000000042";
    copied.lay(foreign, &segment(7, foreign, MB, 1));
    let before = names(inside);
    copied.lay_number(3);
    copied.sidecar.start();
    copied.wait_until_shipped(3);
    wait_until("the foreign one is told", PATIENCE, || {
        copied.held() == [(foreign.to_owned(), "wrong_cluster".to_owned())]
    });
    std::thread::sleep(A_WHILE);
    assert_eq!(names(inside), before);
    assert!(fs::read(&elsewhere).unwrap() == bytes);
    assert!(inside.join(&copied.names[1]).join(&copied.names[2]).exists());
    assert_eq!(copied.look().matching("/wal/").len(), 1 + 1, "one segment, and who owns the timeline");
}

#[test]
fn files_of_a_timeline_that_another_workload_owns_stay_pg15() {
    let mut copied = Copied::new();
    copied.sidecar.set("PGSIDECAR_WORKLOAD", "here");
    copied.sidecar.start();
    copied.lay_number(0);
    copied.wait_until_shipped(0);
    copied.sidecar.stop();
    copied.sidecar.set("PGSIDECAR_WORKLOAD", "elsewhere");
    copied.sidecar.start();
    let path = copied.lay_number(1);
    wait_until("it's told", PATIENCE, || copied.held() == [(copied.names[1].clone(), "not_owner".to_owned())]);
    assert!(path.exists());
    assert!(copied.look().wal(&copied.names[1]).is_none());
}

#[test]
fn what_can_not_be_removed_is_told_once_and_not_uploaded_again_pg15() {
    let mut copied = Copied::new();
    copied.lay_number(0);
    copied.lay_number(1);
    fs::set_permissions(&copied.directory, Permissions::from_mode(0o555)).unwrap();
    copied.sidecar.start();
    let io = |number: usize| (copied.names[number].clone(), "io".to_owned());
    wait_until("both are told", PATIENCE, || copied.held() == [io(0), io(1)]);
    std::thread::sleep(A_WHILE);
    assert_eq!(copied.sidecar.metric("pgsidecar_archived_files_total"), "2");
    assert_eq!(copied.sidecar.log().matches("stays in the archive directory").count(), 1);
    assert_eq!(checked(&copied.sidecar), "failed");
    fs::set_permissions(&copied.directory, Permissions::from_mode(0o755)).unwrap();
    assert_eq!(checked(&copied.sidecar), "ok");
    copied.sidecar.stop();
    copied.sidecar.start();
    copied.wait_until_shipped(0);
    copied.wait_until_shipped(1);
}

#[test]
fn a_directory_that_is_missing_is_a_problem_until_it_is_there_pg15() {
    let mut copied = Copied::new();
    fs::remove_dir(&copied.directory).unwrap();
    copied.sidecar.start();
    let problems = || copied.status()["problems"].to_string();
    assert!(problems().contains("can't be read"), "{}", problems());
    wait_until("it's logged", PATIENCE, || copied.sidecar.log().contains("can't be read"));
    std::thread::sleep(A_WHILE);
    assert_eq!(copied.sidecar.log().matches("can't be read").count(), 1);
    fs::create_dir(&copied.directory).unwrap();
    give_to_servers(&copied.directory);
    copied.lay_number(0);
    copied.wait_until_shipped(0);
    assert_eq!(problems(), "[]");
}

#[test]
fn pg_wal_is_never_taken_for_an_archive_directory_pg15() {
    let mut copied = Copied::new();
    let wal = copied.postgres.data.join("pg_wal");
    let before = names(&wal);
    let by_another_way = copied.scratch.path().join("link");
    symlink(&wal, &by_another_way).unwrap();
    copied.sidecar.set("PGSIDECAR_ARCHIVE_DIRECTORY", by_another_way.to_str().unwrap());
    copied.sidecar.start();
    let problem = copied.status()["problems"][0].clone();
    assert_eq!(problem["code"], "misconfigured", "{problem}");
    std::thread::sleep(A_WHILE);
    assert_eq!(names(&wal), before);
}

#[test]
fn a_daemon_that_is_stopped_after_its_server_ships_what_lies_there_pg15() {
    let mut copied = Copied::new();
    copied.sidecar.start();
    (0..4).for_each(|number| drop(copied.lay_number(number)));
    assert!(copied.sidecar.stop().success());
    assert!(is_empty(&copied.directory), "{:?}\n{}", names(&copied.directory), copied.sidecar.log());
    (0..4).for_each(|number| assert!(copied.look().wal(&copied.names[number]).unwrap() == copied.bytes(number)));
}

#[test]
fn a_file_that_still_lies_in_the_directory_is_never_said_to_be_missing_pg15() {
    let mut copied = Copied::new();
    copied.sidecar.start();
    copied.lay_number(1);
    copied.wait_until_shipped(1);
    copied.lay(&copied.names[0], b"");
    let answer = copied.sidecar.get(&copied.names[0]);
    assert_eq!((answer.status, answer.code()), (503, "not_yet_archived".to_owned()));
    let absent = "0000000100000000000000FE";
    assert_eq!(copied.sidecar.get(absent).code(), "not_in_archive");
    // One that is there is handed out, whatever lies in the directory.
    copied.lay_number(0);
    copied.wait_until_shipped(0);
    copied.lay(&copied.names[0], b"");
    assert_eq!(copied.sidecar.get(&copied.names[0]).status, 200);
    // What isn't mounted could hold it.
    fs::remove_dir_all(&copied.directory).unwrap();
    let answer = copied.sidecar.get(absent);
    assert_eq!((answer.status, answer.code()), (503, "not_yet_archived".to_owned()));
}
