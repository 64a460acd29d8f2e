//! WAL back to PostgreSQL: what is there, what isn't, and what can't be told.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use crate::support::{
    Postgres, Proxy, Repository, Scratch, Sidecar, Way, Wire, archiving_with, beside, command, give_to_servers, run,
    wait_until,
};

const MB: u32 = 1 << 20;
const NAME: &str = "000000010000000000000005";
const NEXT: &str = "000000010000000000000006";

/// A running daemon, and an archive that holds NAME and NEXT. PostgreSQL doesn't run.
fn archived(scratch: &Scratch, repository: &Repository, endpoint: Option<&str>) -> (Postgres, Sidecar) {
    let (postgres, mut sidecar) = beside(scratch, 15, &["--wal-segsize=1"], repository);
    endpoint.iter().for_each(|url| sidecar.set("AWS_ENDPOINT_URL_S3", url));
    sidecar.start();
    for (name, seed) in [(NAME, 1), (NEXT, 2)] {
        assert_eq!(sidecar.put(name, &postgres.segment(name, MB, seed)).status, 200);
    }
    (postgres, sidecar)
}

/// Where an object lies in a repository that is a directory.
fn object(directory: &Path, name: &str) -> PathBuf {
    let inside = |path: PathBuf| fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    let system = inside(directory.join("main")).next().unwrap();
    let directory = match name.ends_with(".history") {
        true => system.join("wal").join(&name[..8]),
        false => system.join("wal").join(&name[..8]).join(&name[..16]),
    };
    directory.join(format!("{name}.zst"))
}

/// The helper's exit code; it must not have left a file unless it's 0.
fn restore(postgres: &Postgres, sidecar: &Sidecar, name: &str, more: &[&str]) -> i32 {
    let to = postgres.data.join("pg_wal/RECOVERYXLOG");
    fs::remove_file(&to).ok();
    let arguments = [&["restore", "--timeout", "2"], more, &[name, "pg_wal/RECOVERYXLOG"]].concat();
    let code = sidecar.wal(postgres, &arguments).status.code().unwrap();
    assert_eq!(to.exists(), code == 0, "{name}");
    code
}

#[test]
fn a_file_comes_back_with_its_length_and_its_exact_bytes_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (postgres, sidecar) = archived(&scratch, &repository, None);
    let bytes = postgres.segment(NAME, MB, 1);
    let answer = sidecar.get(NAME);
    assert_eq!(answer.status, 200);
    assert!(answer.head.contains("content-length: 1048576"), "{}", answer.head);
    assert!(answer.body == bytes);
    assert_eq!(restore(&postgres, &sidecar, NAME, &[]), 0);
    assert!(fs::read(postgres.data.join("pg_wal/RECOVERYXLOG")).unwrap() == bytes);
    let left = fs::read_dir(postgres.data.join("pg_wal")).unwrap().flatten();
    let left: Vec<_> = left.filter(|entry| entry.file_name().to_string_lossy().starts_with("pgsidecar")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn not_in_the_archive_is_said_only_when_the_store_says_so_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let proxy = Proxy::before(&repository);
    let (postgres, sidecar) = archived(&scratch, &repository, Some(&proxy.url()));
    for name in ["000000010000000000000007", "00000002.history", "000000010000000000000005.00000028.backup"] {
        let answer = sidecar.get(name);
        assert_eq!((answer.status, answer.code().as_str()), (404, "not_in_archive"), "{name}");
        assert_eq!(restore(&postgres, &sidecar, name, &[]), 1, "{name}");
    }
    let ways = [
        (Way::Refused, 503, "store_unavailable"),
        (Way::Failing(500, "InternalError"), 503, "store_unavailable"),
        (Way::Failing(503, "SlowDown"), 503, "store_unavailable"),
        (Way::Failing(404, "NoSuchBucket"), 503, "store_denied"),
        (Way::Failing(403, "AccessDenied"), 503, "store_denied"),
    ];
    for (way, status, code) in ways {
        proxy.set(way);
        for name in [NAME, "00000002.history"] {
            let answer = sidecar.get(name);
            assert_eq!((answer.status, answer.code().as_str()), (status, code), "{way:?} {name}");
        }
        assert_eq!(restore(&postgres, &sidecar, "000000010000000000000007", &[]), 200, "{way:?}");
    }
    // A standby could be streaming: it's told at once to go on.
    fs::write(postgres.data.join("standby.signal"), "").unwrap();
    let began = Instant::now();
    assert_eq!(restore(&postgres, &sidecar, NAME, &[]), 1);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    proxy.set(Way::Held);
    assert_eq!(restore(&postgres, &sidecar, NAME, &[]), 1);
    fs::remove_file(postgres.data.join("standby.signal")).unwrap();
    assert_eq!(restore(&postgres, &sidecar, NAME, &[]), 200);
    proxy.set(Way::Open);
    assert_eq!(restore(&postgres, &sidecar, NAME, &[]), 0);
}

#[test]
fn without_a_daemon_nothing_can_be_told_pg15() {
    let scratch = Scratch::new();
    let (postgres, sidecar) = beside(&scratch, 15, &[], &Repository::directory(&scratch));
    assert_eq!(restore(&postgres, &sidecar, NAME, &[]), 200);
}

#[test]
fn of_a_database_that_the_repository_does_not_know_nothing_can_be_told_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (postgres, mut sidecar) = archived(&scratch, &repository, None);
    let answer = sidecar.ask("GET", &format!("/v1/wal/{NAME}?system-identifier=1"));
    assert_eq!((answer.status, answer.code().as_str()), (422, "wrong_cluster"));
    assert_eq!(restore(&postgres, &sidecar, NAME, &["--system-identifier", "1"]), 200);
    let own = postgres.system_identifier().to_string();
    assert_eq!(restore(&postgres, &sidecar, NAME, &["--system-identifier", &own]), 0);
    assert_eq!(sidecar.ask("GET", &format!("/v1/wal/{NAME}?system-identifier=x")).code(), "invalid_request");

    sidecar.kill();
    sidecar.set("PGSIDECAR_CLUSTER", "another");
    // A daemon notes its own database at its start; that of another name is as unknown as before.
    sidecar.start();
    assert_eq!(restore(&postgres, &sidecar, NAME, &["--system-identifier", "1"]), 200);
}

#[test]
fn a_damaged_object_is_never_served_pg15() {
    let scratch = Scratch::new();
    let (postgres, sidecar) = archived(&scratch, &Repository::directory(&scratch), None);
    let path = object(&scratch.path().join("repository"), NAME);
    let whole = fs::read(&path).unwrap();
    let check = |what: String, bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let answer = sidecar.get(NAME);
        assert_eq!((answer.status, answer.code().as_str()), (500, "damaged"), "{what}");
        assert!(answer.text().contains(NAME), "{what}: {}", answer.text());
    };
    // The magic number, the first block, the middle, the last block, the checksum.
    for at in [0, 40, whole.len() / 2, whole.len() - 5, whole.len() - 1] {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        check(format!("byte {at} flipped"), &bytes);
    }
    for length in [0, 1, whole.len() / 2, whole.len() - 1] {
        check(format!("cut to {length} bytes"), &whole[..length]);
    }
    check("something follows".to_owned(), &[whole.as_slice(), b"more"].concat());
    assert_eq!(restore(&postgres, &sidecar, NAME, &[]), 200);
    fs::write(&path, &whole).unwrap();
    assert_eq!(restore(&postgres, &sidecar, NAME, &[]), 0);
}

#[test]
fn another_segment_under_the_name_is_never_served_pg15() {
    let scratch = Scratch::new();
    let (postgres, sidecar) = archived(&scratch, &Repository::directory(&scratch), None);
    let repository = scratch.path().join("repository");
    // With all that was stored beside it: only the segment's own header tells.
    fs::rename(object(&repository, NEXT), object(&repository, NAME)).unwrap();
    let answer = sidecar.get(NAME);
    assert_eq!((answer.status, answer.code().as_str()), (500, "damaged"), "{answer:?}");
    assert!(answer.text().contains("0/600000"), "{}", answer.text());
    assert_eq!(restore(&postgres, &sidecar, NAME, &[]), 200);
}

#[test]
fn an_empty_history_is_never_served_pg15() {
    let scratch = Scratch::new();
    let (_postgres, sidecar) = archived(&scratch, &Repository::directory(&scratch), None);
    let history = "1\t0/5000028\tno recovery target specified\n";
    assert_eq!(sidecar.put("00000002.history", history.as_bytes()).status, 200);
    let path = object(&scratch.path().join("repository"), "00000002.history");
    for bytes in [Vec::new(), zstd::encode_all(&b""[..], 1).unwrap()] {
        // A new file: nothing of what was known of the old one's content is left.
        fs::remove_file(&path).unwrap();
        fs::write(&path, bytes).unwrap();
        let answer = sidecar.get("00000002.history");
        assert_eq!((answer.status, answer.code().as_str()), (500, "damaged"), "{answer:?}");
    }
}

/// A server that archives, stopped; what it would recover lies in the archive alone.
fn stopped(scratch: &Scratch, major: u32, repository: &Repository, proxy: &Proxy) -> (Postgres, Sidecar) {
    let url = proxy.url();
    let settings = [("AWS_ENDPOINT_URL_S3", url.as_str())];
    let (mut postgres, sidecar) = archiving_with(scratch, major, &["--wal-segsize=1"], repository, &settings);
    postgres.sql("CREATE TABLE t (n int)");
    let copy = scratch.path().join("copy");
    postgres.sql("CHECKPOINT");
    postgres.stop("immediate");
    run(command("cp").arg("-a").arg(&postgres.data).arg(&copy));
    postgres.start(&[]);
    postgres.sql("INSERT INTO t VALUES (42)");
    postgres.switch_wal();
    postgres.wait_until_archived();
    postgres.stop("immediate");
    let restore =
        format!("{} --address 127.0.0.1:{} --timeout 2 restore %f %p", Sidecar::helper().display(), sidecar.port);
    let server = Postgres::on(scratch, copy, major);
    server.configure(&[&format!("restore_command = '{restore}'"), "archive_mode = off", "log_min_messages = debug1"]);
    fs::remove_file(server.data.join("postmaster.pid")).ok();
    (server, sidecar)
}

fn a_server_in_recovery_does_not_take_an_outage_for_the_end_of_the_archive(major: u32) {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let proxy = Proxy::before(&repository);
    let (mut server, sidecar) = stopped(&scratch, major, &repository, &proxy);
    fs::write(server.data.join("recovery.signal"), "").unwrap();
    // The history of timeline 2 is asked for first.
    proxy.set(Way::Failing(503, "ServiceUnavailable"));
    server.spawn(&[]);
    wait_until("PostgreSQL has stopped", Duration::from_secs(60), || server.exited().is_some());
    assert!(!server.exited().unwrap().success());
    assert!(server.log().contains("could not restore file"), "{}", server.log());
    assert!(server.data.join("recovery.signal").exists(), "it would go on from here");

    proxy.set(Way::Open);
    server.start(&[]);
    server.wait_for_promotion();
    assert_eq!(server.sql("SELECT n FROM t"), "42", "{}", sidecar.log());
}

#[test]
fn a_server_in_recovery_does_not_take_an_outage_for_the_end_of_the_archive_pg15() {
    a_server_in_recovery_does_not_take_an_outage_for_the_end_of_the_archive(15);
}

#[test]
fn a_server_in_recovery_does_not_take_an_outage_for_the_end_of_the_archive_pg17() {
    a_server_in_recovery_does_not_take_an_outage_for_the_end_of_the_archive(17);
}

#[test]
fn a_standby_survives_an_outage_and_goes_on_afterwards_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let proxy = Proxy::before(&repository);
    let (mut server, _sidecar) = stopped(&scratch, 15, &repository, &proxy);
    fs::write(server.data.join("standby.signal"), "").unwrap();
    proxy.set(Way::Refused);
    server.start(&[]);
    assert_eq!(server.sql("SELECT pg_is_in_recovery()"), "t");
    wait_until("the outage is in the log", Duration::from_secs(60), || server.log().contains("can't be reached"));
    proxy.set(Way::Open);
    wait_until("the standby has what the archive has", Duration::from_secs(60), || {
        server.try_sql("SELECT n FROM t").is_ok_and(|answer| answer == "42")
    });
    assert_eq!(server.sql("SELECT pg_is_in_recovery()"), "t", "{}", server.log());
}

/// A file system of its own; as root alone.
struct Mounted(PathBuf);

impl Mounted {
    fn at(path: PathBuf, options: &str) -> Mounted {
        run(Command::new("mount").args(["-t", "tmpfs", "-o", options, "none"]).arg(&path));
        give_to_servers(&path);
        Mounted(path)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        Command::new("umount").arg("-l").arg(&self.0).status().ok();
    }
}

#[test]
fn nothing_is_fetched_ahead_into_a_spool_without_room_root_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let Repository::S3(server) = &repository else { panic!("it's on S3") };
    let proxy = Wire::to(&server.address());
    let spool = Mounted::at(scratch.dir("spool"), "size=3m");
    let (postgres, mut sidecar) = beside(&scratch, 15, &["--wal-segsize=1"], &repository);
    sidecar.through(&proxy);
    sidecar.set("PGSIDECAR_SPOOL", spool.0.to_str().unwrap());
    sidecar.start();
    let names: Vec<String> = (0x10..0x16).map(|n| format!("0000000100000000000000{n:02X}")).collect();
    for name in &names {
        assert_eq!(sidecar.put(name, &postgres.segment(name, MB, 1)).status, 200);
    }
    proxy.forget_requests();
    for name in &names[..4] {
        assert!(sidecar.get(name).body == postgres.segment(name, MB, 1));
    }
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(proxy.requests("GET", &names[4]), [""; 0]);
    assert!(sidecar.get(&names[4]).body == postgres.segment(&names[4], MB, 1));
    drop(sidecar);
}
