//! Memory is bounded (I7): by neither the size of the database nor the number of its files nor the length of the archive.
//!
//! Daemon and command run with RLIMIT_DATA at 128 MiB, the limit for private writable memory: what exceeds it fails.
//! `scripts/memory.sh` does the same with gigabytes.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::Child,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use crate::{
    chains::{SUMMARIZED, take},
    support::{
        Postgres, Repository, Scratch, Sidecar, give_to_servers,
        restoring::{AS_A_COPY, ship_wal},
        run, wait_until,
    },
};

const LIMIT: u64 = 128 << 20;
const LARGE_FILES: usize = 4;
const LARGE_FILE_BYTES: usize = 75 << 20;
const SMALL_FILES: usize = 100_000;
/// In a chain: files of relations, each of one page. What is known of them is known of each.
const SMALL_RELATIONS: usize = 20_000;
/// More than the limit's bytes.
const ROWS: usize = 800_000;

/// The peaks of a process, sampled while it runs.
struct Watch {
    stop: Arc<AtomicBool>,
    resident: Arc<AtomicU64>,
    anonymous: Arc<AtomicU64>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Watch {
    fn over(pid: u32) -> Watch {
        let (stop, resident, anonymous): (Arc<AtomicBool>, Arc<AtomicU64>, Arc<AtomicU64>) = Default::default();
        let thread = thread::spawn({
            let (stop, resident, anonymous) = (stop.clone(), resident.clone(), anonymous.clone());
            move || {
                while !stop.load(Ordering::Relaxed) {
                    let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else { return };
                    resident.fetch_max(field(&status, "VmHWM:"), Ordering::Relaxed);
                    anonymous.fetch_max(field(&status, "RssAnon:"), Ordering::Relaxed);
                    thread::sleep(Duration::from_millis(20));
                }
            }
        });
        Watch { stop, resident, anonymous, thread: Some(thread) }
    }

    /// Both peaks are within the limit. They are shown, too.
    fn check(mut self, what: &str) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
        let (resident, anonymous) = (self.resident.load(Ordering::Relaxed), self.anonymous.load(Ordering::Relaxed));
        eprintln!("{what}: peak {} MiB resident, {} MiB of it anonymous", resident >> 20, anonymous >> 20);
        assert!(anonymous > 1 << 20, "it was really watched");
        assert!(resident < LIMIT && anonymous < LIMIT, "{what}: {resident} resident, {anonymous} anonymous");
    }
}

/// A field of /proc/PID/status, which is in kB; 0 if there is none (the process has ended).
fn field(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.trim().strip_suffix(" kB")?.parse::<u64>().ok()).unwrap_or(0) << 10
}

fn random_file(path: &Path, bytes: usize) {
    let mut random = fs::File::open("/dev/urandom").unwrap();
    let mut file = fs::File::create(path).unwrap();
    std::io::copy(&mut std::io::Read::take(&mut random, bytes as u64), &mut file).unwrap();
    file.flush().unwrap();
    give_to_servers(path);
}

/// Waits for a child and its good end.
fn finish(mut child: Child, log: &Path) {
    let status = child.wait().unwrap();
    assert!(status.success(), "{status}\n{}", fs::read_to_string(log).unwrap());
}

/// Restores the newest backup, held to the limit.
fn restore_within(scratch: &Scratch, sidecar: &Sidecar, to: &Path) {
    let mut restore = sidecar.command("prlimit");
    let log: PathBuf = scratch.path().join("restore.log");
    restore.arg(format!("--data={LIMIT}")).arg(Sidecar::program()).args(["restore", "run", "--to"]).arg(to);
    let restore = restore.stdout(fs::File::create(&log).unwrap()).stderr(fs::File::create(&log).unwrap()).spawn();
    let restore = restore.unwrap();
    let restoring = Watch::over(restore.id());
    finish(restore, &log);
    restoring.check("the restore");
}

fn bounded(repository: impl FnOnce(&Scratch) -> Repository) {
    let scratch = Scratch::new();
    let repository = repository(&scratch);
    let mut postgres = Postgres::initdb(&scratch, 15, &[]);
    let mut sidecar = Sidecar::new(&scratch, &postgres, &repository);
    // Several parts, made in parallel.
    sidecar.set("PGSIDECAR_PART_SIZE", "64MB");
    let settings = sidecar.archive_settings();
    postgres.configure(&settings.iter().map(String::as_str).collect::<Vec<_>>());
    for n in 0..LARGE_FILES {
        random_file(&postgres.data.join(format!("large-{n}")), LARGE_FILE_BYTES);
    }
    let small = postgres.data.join("small");
    fs::create_dir(&small).unwrap();
    give_to_servers(&small);
    for n in 0..SMALL_FILES {
        let path = small.join(format!("a-file-with-a-name-of-some-length-{n}"));
        fs::write(&path, n.to_string()).unwrap();
        give_to_servers(&path);
    }
    postgres.start(&[]);
    sidecar.memory_limit = Some(LIMIT);
    sidecar.start();
    let watch = Watch::over(sidecar.pid());
    // WAL flows meanwhile.
    let mut writing = postgres.client("psql");
    writing.args([
        "-X",
        "-q",
        "-c",
        "CREATE TABLE t AS SELECT n, gen_random_uuid() u FROM generate_series(1, 1000000) n",
    ]);
    let mut writing = writing.spawn().unwrap();
    sidecar.ok(&["backup", "create", "--fast"]);
    assert!(writing.wait().unwrap().success());
    postgres.switch_wal();
    postgres.wait_until_archived();

    let to = scratch.path().join("restored");
    restore_within(&scratch, &sidecar, &to);
    for name in ["large-0", "small/a-file-with-a-name-of-some-length-99999"] {
        assert!(fs::read(to.join(name)).unwrap() == fs::read(postgres.data.join(name)).unwrap(), "{name}");
    }
    assert_eq!(fs::read_dir(to.join("small")).unwrap().count(), SMALL_FILES);

    // And the WAL back, through the daemon.
    let mut restored = Postgres::on(&scratch, to, 15);
    restored.spawn(&["-c", "archive_mode=off"]);
    restored.wait_for_promotion();
    assert_eq!(restored.sql("SELECT count(*) FROM t"), "1000000");
    watch.check("the daemon");
    wait_until("the daemon still answers", Duration::from_secs(10), || sidecar.cli(&["status"]).status.success());
}

#[test]
fn backup_and_restore_on_s3_stay_within_128_mib_pg15() {
    bounded(|_| Repository::s3());
}

#[test]
fn backup_and_restore_in_a_directory_stay_within_128_mib_pg15() {
    bounded(Repository::directory);
}

#[test]
fn a_chain_and_its_restore_stay_within_128_mib_pg17() {
    let scratch = Scratch::new();
    let mut postgres = Postgres::initdb(&scratch, 17, &["--data-checksums"]);
    let repository = Repository::s3();
    let mut sidecar = Sidecar::new(&scratch, &postgres, &repository);
    sidecar.set("PGSIDECAR_PART_SIZE", "64MB");
    postgres.configure(SUMMARIZED);
    postgres.configure(&sidecar.archive_settings().iter().map(String::as_str).collect::<Vec<_>>());
    for n in 0..SMALL_RELATIONS {
        // A new page: all of it is zero. PostgreSQL doesn't come to that number.
        let path = postgres.data.join(format!("base/5/{}", 1_000_000 + n));
        fs::File::create(&path).unwrap().set_len(8192).unwrap();
        give_to_servers(&path);
    }
    postgres.start(&[]);
    sidecar.memory_limit = Some(LIMIT);
    sidecar.start();
    postgres.sql(&format!(
        "CREATE TABLE t AS SELECT n, gen_random_uuid() u, repeat(md5(n::text), 5) FROM generate_series(1, {ROWS}) n"
    ));
    take(&sidecar, "full");
    // The limit counts address space that glibc keeps after large buffers although nothing is in it any more: it's for
    // what one life does.
    sidecar.stop();
    sidecar.start();
    let watch = Watch::over(sidecar.pid());
    // A row of each page, so that all of them are in it.
    postgres.sql("UPDATE t SET n = -n WHERE n % 10 = 0");
    let first = take(&sidecar, "incremental");
    let read = sidecar.json(&["backup", "show", &first])["parts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|part| part["file_bytes"].as_u64().unwrap())
        .sum::<u64>();
    assert!(read > LIMIT, "{read} bytes are less than the limit");
    postgres.sql("UPDATE t SET n = n + 1000000 WHERE n % 1000 = 1");
    take(&sidecar, "incremental");
    ship_wal(&postgres);

    let to = scratch.path().join("restored");
    restore_within(&scratch, &sidecar, &to);
    run(postgres.client("pg_verifybackup").arg("-n").arg(&to));
    let mut restored = Postgres::on(&scratch, to, 17);
    restored.spawn(AS_A_COPY);
    restored.wait_for_promotion();
    let sums = "SELECT count(*), sum(n), sum(hashtext(u::text)) FROM t";
    assert_eq!(restored.sql(sums), postgres.sql(sums));
    watch.check("the daemon");
}
