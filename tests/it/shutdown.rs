//! The end of a server and of its sidecar, in any order: what was committed is in the repository, or on the volume.

use std::{
    fs::{self, File},
    io::Write,
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::support::{
    Look, Mode, Postgres, Repository, Scratch, Sidecar, Wire, beside, free_port,
    restoring::{AS_A_COPY, back_up, restore},
    run, wait_until,
};

const PATIENCE: Duration = Duration::from_secs(60);

/// A server that archives, and listens at a port, as servers in pods do; its sidecar goes to the store by a proxy.
fn in_a_pod(scratch: &Scratch, major: u32, settings: &[(&str, &str)]) -> (Postgres, Sidecar, Repository, Wire) {
    let repository = Repository::s3();
    let Repository::S3(server) = &repository else { panic!("it's on S3") };
    let proxy = Wire::to(&server.address());
    let mut postgres = Postgres::initdb(scratch, major, &["--wal-segsize=1"]);
    postgres.port = free_port();
    let mut sidecar = Sidecar::new(scratch, &postgres, &repository);
    sidecar.through(&proxy);
    sidecar.set("PGPORT", &postgres.port.to_string());
    settings.iter().for_each(|(name, value)| sidecar.set(name, value));
    postgres.configure(&sidecar.archive_settings().iter().map(String::as_str).collect::<Vec<_>>());
    postgres.configure(&["wal_keep_size = 256MB"]);
    start(&mut postgres);
    sidecar.start();
    (postgres, sidecar, repository, proxy)
}

fn start(postgres: &mut Postgres) {
    postgres.start(&["-c", "listen_addresses=127.0.0.1"]);
}

/// Sessions that commit one row after the other and note each whose commit the server has acknowledged.
struct Load {
    clients: Vec<(Child, std::path::PathBuf)>,
}

impl Load {
    fn on(scratch: &Scratch, postgres: &Postgres) -> Load {
        postgres.sql("CREATE TABLE committed (client int, n int, filler text)");
        let clients = (1..=3).map(|client| {
            let script = scratch.path().join(format!("client-{client}.sql"));
            let mut statements = File::create(&script).unwrap();
            for n in 1..=200_000 {
                let insert =
                    format!("INSERT INTO committed VALUES ({client}, {n}, repeat(md5('{n}'), 20)) RETURNING n");
                writeln!(statements, "{insert};").unwrap();
            }
            let noted = scratch.path().join(format!("client-{client}.out"));
            let mut psql = postgres.client("psql");
            psql.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-f"]).arg(script);
            psql.stdout(File::create(&noted).unwrap()).stderr(Stdio::null()).stdin(Stdio::null());
            (psql.spawn().unwrap(), noted)
        });
        Load { clients: clients.collect() }
    }

    /// The last row that was acknowledged to each client, once the server is gone.
    fn end(self) -> Vec<u32> {
        let last = self.clients.into_iter().map(|(mut client, noted)| {
            assert!(!client.wait().unwrap().success(), "it worked until the server ended");
            let rows = fs::read_to_string(noted).unwrap();
            let rows: Vec<u32> = rows.lines().map(|line| line.parse().unwrap()).collect();
            assert_eq!(rows, (1..=rows.len()).map(|n| u32::try_from(n).unwrap()).collect::<Vec<_>>());
            *rows.last().unwrap()
        });
        last.collect()
    }
}

/// How many of the rows that were acknowledged the server lacks.
fn missing(server: &Postgres, acknowledged: &[u32]) -> usize {
    let sql = |client: usize, last: &u32| {
        format!("SELECT count(*) FROM committed WHERE client = {} AND n <= {last}", client + 1)
    };
    let there = acknowledged.iter().enumerate().map(|(client, last)| {
        let count: u32 = server.sql(&sql(client, last)).parse().unwrap();
        (last - count) as usize
    });
    there.sum()
}

/// Starts what was restored and waits for its promotion.
fn recovered(scratch: &Scratch, data: std::path::PathBuf, major: u32) -> Postgres {
    let mut server = Postgres::on(scratch, data, major);
    server.spawn(AS_A_COPY);
    server.wait_for_promotion();
    server
}

fn a_pod_that_stops_loses_nothing_with_its_volume(major: u32) {
    let scratch = Scratch::new();
    let (mut postgres, mut sidecar, _repository, _proxy) = in_a_pod(&scratch, major, &[]);
    back_up(&sidecar);
    let load = Load::on(&scratch, &postgres);
    thread::sleep(Duration::from_millis(1500));
    postgres.tell_to_stop("fast");
    sidecar.tell_to_stop();
    postgres.wait_for_end();
    assert!(sidecar.wait_for_end().success(), "{}", sidecar.log());
    assert!(sidecar.log().trim_end().ends_with("stopped"), "{}", sidecar.log());
    assert!(!postgres.log().contains("archive command failed"), "it was asked to the end: {}", postgres.log());

    let acknowledged = load.end();
    fs::remove_dir_all(&postgres.data).unwrap();
    sidecar.start();
    let server = recovered(&scratch, restore(&scratch, &sidecar, "restored", &[]), major);
    assert_eq!(missing(&server, &acknowledged), 0, "of {acknowledged:?}");
    // The shutdown checkpoint isn't in a segment that is archived, but it's kept, too.
    assert!(server.log().contains("restored log file"), "{}", server.log());
}

#[test]
fn a_pod_that_stops_under_load_loses_nothing_with_its_volume_pg15() {
    a_pod_that_stops_loses_nothing_with_its_volume(15);
}

#[test]
fn a_pod_that_stops_under_load_loses_nothing_with_its_volume_pg17() {
    a_pod_that_stops_loses_nothing_with_its_volume(17);
}

fn a_crash_before_the_stop_loses_nothing_with_the_volume(major: u32) {
    let scratch = Scratch::new();
    let (mut postgres, mut sidecar, repository, _proxy) = in_a_pod(&scratch, major, &[]);
    back_up(&sidecar);
    let load = Load::on(&scratch, &postgres);
    thread::sleep(Duration::from_millis(1500));
    postgres.kill();
    assert!(sidecar.stop().success(), "{}", sidecar.log());
    let tails = Look::into(&repository).matching("/tail/");
    assert!((1..=2).contains(&tails.len()), "{tails:?}");

    let acknowledged = load.end();
    fs::remove_dir_all(&postgres.data).unwrap();
    sidecar.start();
    let server = recovered(&scratch, restore(&scratch, &sidecar, "restored", &[]), major);
    assert_eq!(missing(&server, &acknowledged), 0, "of {acknowledged:?}\n{}", server.log());
    drop(server);

    // What the whole segments alone would give.
    let to = restore(&scratch, &sidecar, "without", &[]);
    let settings = fs::read_to_string(to.join("postgresql.auto.conf")).unwrap();
    assert!(settings.contains(" --tail "), "{settings}");
    fs::write(to.join("postgresql.auto.conf"), settings.replace(" --tail ", " ")).unwrap();
    let server = recovered(&scratch, to, major);
    assert!(missing(&server, &acknowledged) > 0, "the tail held nothing");
}

#[test]
fn a_crash_before_the_stop_loses_nothing_with_the_volume_pg15() {
    a_crash_before_the_stop_loses_nothing_with_the_volume(15);
}

#[test]
fn a_crash_before_the_stop_loses_nothing_with_the_volume_pg17() {
    a_crash_before_the_stop_loses_nothing_with_the_volume(17);
}

#[test]
fn a_server_that_was_killed_while_it_stopped_is_taken_for_gone_pg15() {
    let scratch = Scratch::new();
    let (mut postgres, mut sidecar, repository, _proxy) = in_a_pod(&scratch, 15, &[]);
    let mut session =
        postgres.client("psql").args(["-c", "SELECT pg_sleep(100)"]).stdout(Stdio::null()).spawn().unwrap();
    wait_until("a session holds the server", PATIENCE, || {
        postgres.sql("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'") == "1"
    });
    postgres.sql("CREATE TABLE t (n int)");
    let segment = postgres.sql("SELECT pg_walfile_name(pg_current_wal_insert_lsn())");
    postgres.tell_to_stop("smart");
    let stopping = || fs::read_to_string(postgres.data.join("postmaster.pid")).unwrap().contains("stopping");
    wait_until("it stops", PATIENCE, stopping);
    postgres.kill();
    session.wait().unwrap();
    let began = Instant::now();
    assert!(sidecar.stop().success(), "{}", sidecar.log());
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}\n{}", began.elapsed(), sidecar.log());
    assert_eq!(Look::into(&repository).matching(&format!("/tail/00000001/{segment}.")).len(), 1);
}

#[test]
fn a_sidecar_that_is_stopped_alone_ends_after_its_wait_and_leaves_the_rest_to_the_next_pg15() {
    let scratch = Scratch::new();
    let (postgres, mut sidecar, repository, _proxy) = in_a_pod(&scratch, 15, &[("PGSIDECAR_SERVER_STOP_WAIT", "2s")]);
    postgres.sql("CREATE TABLE t (n int)");
    let began = Instant::now();
    sidecar.tell_to_stop();
    thread::sleep(Duration::from_millis(1500));
    // Until then it works on: PostgreSQL may be about to stop.
    let name = postgres.switch_wal();
    wait_until("it is archived", Duration::from_secs(2), || postgres.is_marked(&name, "done"));
    assert!(sidecar.wait_for_end().success(), "{}", sidecar.log());
    assert!((2..5).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    assert_eq!(Look::into(&repository).matching("/tail/"), [""; 0], "the server writes on");
    assert_eq!(postgres.sql("SELECT 1"), "1");

    let name = postgres.switch_wal();
    sidecar.start();
    wait_until("it is archived", PATIENCE, || sidecar.get(&name).status == 200);
}

#[test]
fn a_server_that_stops_slowly_is_waited_for_pg17() {
    let scratch = Scratch::new();
    let (mut postgres, mut sidecar, repository, _proxy) = in_a_pod(&scratch, 17, &[]);
    let mut session = postgres.client("psql");
    session.args(["-c", "SELECT pg_sleep(5)", "-c", "CREATE TABLE late (n int)"]);
    let mut session = session.stdout(Stdio::null()).spawn().unwrap();
    wait_until("a session holds the server", PATIENCE, || {
        postgres.sql("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'") == "1"
    });
    postgres.tell_to_stop("smart");
    sidecar.tell_to_stop();
    thread::sleep(Duration::from_millis(3500));
    assert!(sidecar.is_running(), "{}", sidecar.log());
    assert!(session.wait().unwrap().success());
    postgres.wait_for_end();
    assert!(sidecar.wait_for_end().success(), "{}", sidecar.log());
    let archived = Look::into(&repository).all_wal("main");
    for name in postgres.wal_files("00000001").iter().filter(|name| postgres.is_marked(name, "done")) {
        assert!(archived.get(name) == Some(&postgres.wal_file(name)), "{name}");
    }
    assert!(!postgres.log().contains("archive command failed"), "{}", postgres.log());
    assert_eq!(Look::into(&repository).matching("/tail/").len(), 1, "the shutdown checkpoint");
}

#[test]
fn a_stop_without_the_store_ends_in_time_and_the_next_start_ships_what_is_left_pg15() {
    let scratch = Scratch::new();
    let (mut postgres, mut sidecar, repository, proxy) = in_a_pod(&scratch, 15, &[("PGSIDECAR_DRAIN_TIMEOUT", "4s")]);
    postgres.sql("CREATE TABLE t (n int)");
    proxy.set(Mode::Refuse);
    let names: Vec<String> = (0..5).map(|_| postgres.switch_wal()).collect();
    let began = Instant::now();
    postgres.tell_to_stop("fast");
    sidecar.tell_to_stop();
    assert!(sidecar.wait_for_end().success(), "{}", sidecar.log());
    assert!((4..7).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    postgres.wait_for_end();
    assert!(names.iter().all(|name| postgres.is_marked(name, "ready")), "{}", postgres.log());

    proxy.set(Mode::Pass);
    // Without PostgreSQL: nobody asks.
    sidecar.start();
    let look = Look::into(&repository);
    wait_until("the rest is archived", PATIENCE, || {
        let archived = look.all_wal("main");
        names.iter().all(|name| archived.get(name) == Some(&postgres.wal_file(name)))
    });
    // And its tail is kept at the next stop.
    assert!(sidecar.stop().success());
    assert_eq!(look.matching("/tail/").len(), 1);
}

#[test]
fn of_more_than_a_thousand_files_that_a_server_left_the_last_is_shipped_at_the_stop_pg15() {
    let scratch = Scratch::new();
    let (mut postgres, mut sidecar, repository, proxy) = in_a_pod(&scratch, 15, &[]);
    postgres.stop("fast");
    sidecar.stop();
    // Nothing is archived ahead: look-ahead tries again ten seconds after it couldn't begin.
    proxy.set(Mode::Refuse);
    sidecar.start();
    wait_until("it can't begin", PATIENCE, || sidecar.log().contains("not ready yet"));
    for n in 1..=1_050 {
        let name = format!("000000010000000000000005.{n:08X}.backup");
        postgres.lay(&name, b"START WAL LOCATION: 0/5000028 (file 000000010000000000000005)\n");
        postgres.mark(&name, "ready");
    }
    sidecar.tell_to_stop();
    proxy.set(Mode::Pass);
    assert!(sidecar.wait_for_end().success(), "{}", sidecar.log());
    assert_eq!(Look::into(&repository).matching(".backup.zst").len(), 1_050);
}

#[test]
fn a_tail_is_served_to_a_restore_that_asks_for_it_until_the_whole_segment_is_there_and_never_to_a_standby_pg15() {
    let scratch = Scratch::new();
    let (mut postgres, mut sidecar, repository, proxy) = in_a_pod(&scratch, 15, &[]);
    postgres.sql("CREATE TABLE t (n int)");
    let segment = postgres.sql("SELECT pg_walfile_name(pg_current_wal_insert_lsn())");
    postgres.kill();
    sidecar.stop();
    let tail = postgres.wal_file(&segment);
    sidecar.start();
    let with_tail = format!("/v1/wal/{segment}?tail=yes");
    assert_eq!(sidecar.get(&segment).code(), "not_in_archive");
    assert!(sidecar.ask("GET", &with_tail).body == tail);
    let helper = |arguments: &[&str]| {
        let arguments =
            [&["restore", "--timeout", "2"], arguments, &[segment.as_str(), "pg_wal/RECOVERYXLOG"]].concat();
        sidecar.wal(&postgres, &arguments).status.code()
    };
    assert_eq!((helper(&["--tail"]), helper(&[])), (Some(0), Some(1)));
    fs::write(postgres.data.join("standby.signal"), "").unwrap();
    assert_eq!(helper(&["--tail"]), Some(1));
    fs::remove_file(postgres.data.join("standby.signal")).unwrap();
    // Nor if one that asked for the tail went away before it came.
    proxy.hold("GET", "/tail/");
    let asking = sidecar.begin("GET", &with_tail);
    proxy.wait_for_held();
    drop(asking);
    proxy.release();
    wait_until("it was fetched for nobody", PATIENCE, || proxy.requests("GET", "/tail/0").len() > 2);
    thread::sleep(Duration::from_secs(1));
    assert_eq!(sidecar.get(&segment).code(), "not_in_archive");

    start(&mut postgres);
    postgres.sql("INSERT INTO t SELECT generate_series(1, 100)");
    assert_eq!(postgres.switch_wal(), segment, "it writes on where it was");
    wait_until("it is archived", PATIENCE, || postgres.is_marked(&segment, "done"));
    let whole = postgres.wal_file(&segment);
    assert!(whole != tail && sidecar.ask("GET", &with_tail).body == whole);
    // The next stop removes what has become superfluous.
    postgres.stop("fast");
    sidecar.stop();
    assert_eq!(Look::into(&repository).matching(&format!("/tail/00000001/{segment}")), [""; 0]);
}

#[test]
fn of_a_standby_that_stops_no_end_of_its_wal_is_kept_pg15() {
    let scratch = Scratch::new();
    let (primary, _beside_primary, repository, _proxy) = in_a_pod(&scratch, 15, &[]);
    let directory = scratch.path().join("standby");
    run(primary.client("pg_basebackup").args(["-c", "fast", "-X", "stream", "--no-sync", "-R", "-D"]).arg(&directory));
    let mut standby = Postgres::on(&scratch, directory, 15);
    let mut sidecar = Sidecar::another(&scratch, "beside-standby", &standby, &repository);
    for mode in ["fast", "immediate"] {
        standby.start(&[]);
        sidecar.start();
        primary.sql(&format!("CREATE TABLE {mode} (n int)"));
        let (segment, lsn) = (
            primary.sql("SELECT pg_walfile_name(pg_current_wal_insert_lsn())"),
            primary.sql("SELECT pg_current_wal_flush_lsn()"),
        );
        wait_until("it has received it", PATIENCE, || {
            standby.sql(&format!("SELECT pg_last_wal_receive_lsn() >= '{lsn}'")) == "t"
        });
        standby.stop(mode);
        assert!(sidecar.stop().success(), "{}", sidecar.log());
        // It has a part of it, and has marked none of it.
        assert!(!standby.wal_file(&segment).is_empty());
        assert!(!standby.is_marked(&segment, "ready") && !standby.is_marked(&segment, "done"), "{segment}");
        assert_eq!(Look::into(&repository).matching("/tail/"), [""; 0], "{mode}");
    }
}

#[test]
fn of_a_server_that_marks_no_segments_no_end_of_its_wal_is_kept_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (mut postgres, mut sidecar) = beside(&scratch, 15, &["--wal-segsize=1"], &repository);
    let tails = |postgres: &mut Postgres, sidecar: &mut Sidecar, switches: u32| {
        postgres.start(&["-c", "archive_mode=off"]);
        sidecar.start();
        postgres.sql("CHECKPOINT");
        (0..switches).for_each(|_| drop(postgres.switch_wal()));
        // Flushed, other than a restore point.
        postgres.sql(&format!("CREATE TABLE in_the_last_one_{switches} (n int)"));
        // Without a checkpoint, which would remove them.
        postgres.stop("immediate");
        assert!(sidecar.stop().success(), "{}", sidecar.log());
        Look::into(&repository).matching("/tail/")
    };
    let kept = tails(&mut postgres, &mut sidecar, 3);
    assert_eq!(kept.len(), 4, "a crash, and segments that were not marked yet: {kept:?}");
    assert_eq!(tails(&mut postgres, &mut sidecar, 4), kept, "PostgreSQL doesn't archive");
    assert!(sidecar.log().contains("PostgreSQL has marked none of its segments"), "{}", sidecar.log());
}
