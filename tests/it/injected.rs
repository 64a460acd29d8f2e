//! What a sidecar meets in a pod that it was injected into: PostgreSQL's own variables, its image's temporary server, a Secret
//! that isn't there yet, a root that can't be written to.

use std::{
    fs,
    net::TcpListener,
    os::unix::fs::{MetadataExt, PermissionsExt},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use crate::support::{
    Background, Look, Mode, Postgres, Repository, Scratch, Sidecar, Wire, beside, command, free_port, give_to_servers,
    preparing::{Entrypoint, be, empty_pod, entrypoint, prepared},
    run, server_user, told, wait_until,
};

const PATIENCE: Duration = Duration::from_secs(60);

/// Runs `await`; answers with its exit code, what it said, and how long that took.
fn waits(sidecar: &Sidecar, arguments: &[&str]) -> (Option<i32>, String, Duration) {
    let began = Instant::now();
    let output = sidecar.cli(&[&["await"], arguments].concat());
    assert!(output.stdout.is_empty(), "{}", told(&output));
    (output.status.code(), String::from_utf8(output.stderr).unwrap(), began.elapsed())
}

#[test]
fn await_ends_once_the_daemon_answers_whatever_its_settings_and_not_before_pg15() {
    let scratch = Scratch::new();
    let (_postgres, mut sidecar) = beside(&scratch, 15, &[], &Repository::directory(&scratch));
    // It asks nobody else: neither that there is no repository nor that there is no server matters.
    sidecar.set("PGSIDECAR_REPOSITORY", "");
    let (code, said, took) = waits(&sidecar, &["--timeout", "1500ms"]);
    assert_eq!((code, said.lines().count()), (Some(75), 2), "{said}");
    assert!(said.contains("hasn't come up within 1.5s") && said.contains("HINT: Its log says why"), "{said}");
    assert!((1500..4000).contains(&took.as_millis()), "{took:?}");
    let (code, said, _) = waits(&sidecar, &["--timeout", "0s", "--lenient"]);
    assert_eq!((code, said.lines().count()), (Some(0), 1), "{said}");
    assert!(said.contains("WARN") && said.contains("hasn't come up") && said.contains("goes on"), "{said}");

    let (mut waiting, path) = sidecar.spawn(&["await", "--timeout", "30s"]);
    std::thread::sleep(Duration::from_secs(1));
    assert!(waiting.try_wait().unwrap().is_none());
    sidecar.start();
    assert!(waiting.wait().unwrap().success());
    assert_eq!(fs::read_to_string(path).unwrap(), "");
    let (code, said, took) = waits(&sidecar, &[]);
    assert_eq!((code, said.as_str()), (Some(0), ""));
    assert!(took < Duration::from_secs(2), "{took:?}");
}

#[test]
fn await_takes_neither_a_daemon_that_hangs_nor_half_of_one_nor_another_program_for_it_pg15() {
    let scratch = Scratch::new();
    let (_postgres, mut sidecar) = beside(&scratch, 15, &[], &Repository::directory(&scratch));
    {
        // Connections are taken by the kernel, and nobody answers.
        let _hanging = TcpListener::bind(("127.0.0.1", sidecar.port)).unwrap();
        let (code, said, took) = waits(&sidecar, &["--timeout", "3s"]);
        assert_eq!(code, Some(75), "{said}");
        assert!(said.contains("takes connections and doesn't answer"), "{said}");
        assert!((3..6).contains(&took.as_secs()), "{took:?}");
        let (code, said, _) = waits(&sidecar, &["--timeout", "1s", "--lenient"]);
        assert!(code == Some(0) && said.contains("doesn't answer"), "{said}");
    }
    sidecar.start();
    let port = sidecar.port;
    let (socket, missing) = (scratch.path().join("control.sock"), scratch.path().join("other.sock"));
    sidecar.set("PGSIDECAR_CONTROL_SOCKET", missing.to_str().unwrap());
    let (code, said, _) = waits(&sidecar, &["--timeout", "500ms"]);
    assert!(code == Some(75) && said.contains(missing.to_str().unwrap()), "{said}");
    sidecar.set("PGSIDECAR_CONTROL_SOCKET", socket.to_str().unwrap());
    let other = format!("127.0.0.1:{}", free_port());
    sidecar.set("PGSIDECAR_WAL_LISTEN", &other);
    let (code, said, _) = waits(&sidecar, &["--timeout", "500ms"]);
    assert!(code == Some(75) && said.contains(&other), "{said}");
    // Another program says yes to everything.
    let stranger = TcpListener::bind(&other).unwrap();
    std::thread::spawn(move || {
        use std::io::{Read, Write};
        for stream in stranger.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}");
        }
    });
    let (code, said, _) = waits(&sidecar, &["--timeout", "500ms"]);
    assert!(code == Some(75) && said.contains("isn't pgsidecar"), "{said}");
    sidecar.set("PGSIDECAR_WAL_LISTEN", &format!("127.0.0.1:{port}"));
    assert_eq!(waits(&sidecar, &[]).0, Some(0));
}

/// A server as the official image makes it for POSTGRES_USER=shop, which wants a password of everybody.
fn of_the_image(scratch: &Scratch, repository: &Repository) -> (Postgres, Sidecar) {
    let mut postgres = Postgres::initdb(scratch, 15, &[]);
    postgres.port = free_port();
    let mut sidecar = Sidecar::new(scratch, &postgres, repository);
    let settings = sidecar.archive_settings();
    postgres.configure(&settings.iter().map(String::as_str).collect::<Vec<_>>());
    fs::write(postgres.data.join("pg_hba.conf"), "local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
        .unwrap();
    postgres.start(&["-c", "listen_addresses=127.0.0.1"]);
    postgres.sql("CREATE ROLE shop SUPERUSER LOGIN PASSWORD 'se:cret'");
    sidecar.environment.retain(|(name, _)| name != "PGUSER");
    sidecar.set("PGHOST", "127.0.0.1");
    sidecar.set("PGPORT", &postgres.port.to_string());
    sidecar.set("POSTGRES_USER", "shop");
    sidecar.set("PG_BINDIR", &Postgres::bin(15).display().to_string());
    (postgres, sidecar)
}

/// What check finds about the connection.
fn connection(sidecar: &Sidecar) -> (String, String) {
    let output = sidecar.cli(&["check", "--json"]);
    let findings: serde_json::Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", told(&output)));
    let found = findings.as_array().unwrap().iter().find(|finding| finding["check"] == "postgresql").unwrap().clone();
    (found["state"].as_str().unwrap().to_owned(), format!("{found}\n{}", String::from_utf8_lossy(&output.stderr)))
}

#[test]
fn the_image_s_user_and_password_are_those_that_count_last_pg15() {
    let scratch = Scratch::new();
    let (_postgres, mut sidecar) = of_the_image(&scratch, &Repository::directory(&scratch));
    let ok = |sidecar: &Sidecar| {
        let (state, said) = connection(sidecar);
        assert_eq!(state, "ok", "{said}");
        said
    };
    let failed = |sidecar: &Sidecar, says: &str| {
        let (state, said) = connection(sidecar);
        assert!(state == "failed" && said.contains(says), "{said}");
    };
    failed(&sidecar, "password missing");
    sidecar.set("POSTGRES_PASSWORD", "se:cret");
    assert!(ok(&sidecar).contains("as shop"));

    // As the image's shell reads it: without the newlines at its end.
    sidecar.set("POSTGRES_PASSWORD", "");
    let file = scratch.path().join("password");
    fs::write(&file, "se:cret\n\n").unwrap();
    give_to_servers(&file);
    sidecar.set("POSTGRES_PASSWORD_FILE", file.to_str().unwrap());
    ok(&sidecar);
    let user_file = scratch.path().join("user");
    fs::write(&user_file, "shop\n").unwrap();
    sidecar.set("POSTGRES_USER", "");
    sidecar.set("POSTGRES_USER_FILE", user_file.to_str().unwrap());
    assert!(ok(&sidecar).contains("as shop"));

    // A file that names it outranks the image's word, and PGPASSWORD both.
    fs::write(&file, "wrong").unwrap();
    failed(&sidecar, "password authentication failed");
    let passfile = scratch.path().join("passfile");
    fs::write(&passfile, "127.0.0.1:*:*:shop:se\\:cret\n").unwrap();
    fs::set_permissions(&passfile, fs::Permissions::from_mode(0o600)).unwrap();
    give_to_servers(&passfile);
    sidecar.set("PGPASSFILE", passfile.to_str().unwrap());
    ok(&sidecar);
    sidecar.set("PGPASSWORD", "wrong as well");
    failed(&sidecar, "password authentication failed");
    sidecar.set("PGPASSWORD", "");
    // One without a line for us, or one that PostgreSQL's container has alone, leaves it to the image.
    fs::write(&file, "se:cret").unwrap();
    fs::write(&passfile, "127.0.0.1:*:*:other:x\n").unwrap();
    ok(&sidecar);
    sidecar.set("PGPASSFILE", "/nonexistent/passfile");
    assert!(ok(&sidecar).contains("the password that PostgreSQL's image was told is used"));
    // It's nobody else's password.
    sidecar.set("PGPASSFILE", "");
    sidecar.set("PGUSER", "postgres");
    failed(&sidecar, "password missing");
}

#[test]
fn what_libpq_is_told_in_postgresql_s_container_reaches_neither_us_nor_our_tools_pg15() {
    let scratch = Scratch::new();
    let (postgres, mut sidecar) = of_the_image(&scratch, &Repository::directory(&scratch));
    postgres.sql("CREATE TABLE t AS SELECT 7 AS n");
    let file = scratch.path().join("password");
    fs::write(&file, "se:cret\n").unwrap();
    sidecar.set("POSTGRES_PASSWORD_FILE", file.to_str().unwrap());
    for (name, value) in [
        ("PGSERVICE", "elsewhere"),
        ("PGHOSTADDR", "192.0.2.1"),
        ("PGSSLMODE", "verify-full"),
        ("PGSSLROOTCERT", "/nonexistent/root.crt"),
        ("PGREQUIREAUTH", "none"),
        ("PGOPTIONS", "-c statement_timeout=1 -c search_path=nowhere"),
        ("PGTARGETSESSIONATTRS", "standby"),
        ("PGCLIENTENCODING", "SJIS"),
        ("PGTZ", "Nowhere/Else"),
        ("PGDATESTYLE", "SQL"),
        ("POSTGRES_DB", "shop"),
        ("POSTGRES_INITDB_ARGS", "--data-checksums"),
    ] {
        sidecar.set(name, value);
    }
    sidecar.start();
    sidecar.ok(&["backup", "create", "--fast"]);
    let record = sidecar.json(&["dump", "create"]);
    assert_eq!(record["server"], format!("127.0.0.1:{}", postgres.port));
    // Rotated: it's read anew, and a daemon needn't be restarted.
    postgres.sql("ALTER ROLE shop PASSWORD 'another'");
    assert!(sidecar.fails(69, &["dump", "create"]).contains("password authentication failed"));
    fs::write(&file, "another").unwrap();
    sidecar.ok(&["dump", "create"]);
    sidecar.ok(&["backup", "create", "--fast"]);
}

#[test]
fn the_temporary_server_of_an_image_stops_in_time_and_nothing_of_it_is_lost_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let Repository::S3(server) = &repository else { panic!("it's on S3") };
    let wire = Wire::to(&server.address());
    let (mut postgres, mut sidecar) = beside(&scratch, 15, &["--wal-segsize=1"], &repository);
    let settings = sidecar.archive_settings();
    postgres.configure(&settings.iter().map(String::as_str).collect::<Vec<_>>());
    sidecar.through(&wire);
    wire.set(Mode::BlackHole);
    let repository_url = sidecar.environment.iter().find(|(name, _)| name == "PGSIDECAR_REPOSITORY").unwrap().1.clone();
    let mut names = Vec::new();
    // A store that doesn't answer, and no Secret at all.
    for url in [repository_url.as_str(), ""] {
        sidecar.set("PGSIDECAR_REPOSITORY", url);
        sidecar.start();
        // As docker-entrypoint.sh does it: on a socket alone, and `pg_ctl -m fast -w stop` at the end, which waits for 60 s.
        postgres.start(&[]);
        names.extend((0..5).map(|_| postgres.switch_wal()));
        let began = Instant::now();
        let mut stop = command(Postgres::bin(15).join("pg_ctl"));
        run(stop.arg("-D").arg(&postgres.data).args(["-m", "fast", "-w", "stop"]).current_dir("/"));
        assert!(began.elapsed() < Duration::from_secs(50), "{:?}\n{}", began.elapsed(), postgres.log());
        assert!(names.iter().all(|name| postgres.is_marked(name, "ready")), "{}", postgres.log());
        postgres.wait_for_end();
        sidecar.kill();
    }
    assert!(postgres.log().contains("archive command failed"), "{}", postgres.log());
    wire.set(Mode::Pass);
    sidecar.set("PGSIDECAR_REPOSITORY", &repository_url);
    sidecar.start();
    postgres.start(&[]);
    postgres.wait_until_archived();
    let archived = Look::into(&repository).all_wal("main");
    assert!(names.iter().all(|name| archived.contains_key(name)), "{:?}", archived.keys());
}

#[test]
fn a_pod_whose_secret_is_missing_starts_says_so_and_ships_all_once_it_is_there_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (mut postgres, mut sidecar) = empty_pod(&scratch, "db-0", 15, &repository);
    be(&mut sidecar, "db-0");
    let secret = repository.environment();
    sidecar.environment.retain(|(name, _)| !secret.iter().any(|(known, _)| known == name));
    // A first start, and one on the database that it has made.
    let missing = "PGSIDECAR_REPOSITORY: not set";
    assert!(prepared(&sidecar, 0, &[]).contains(missing));
    assert_eq!(entrypoint(&postgres.data, 15), Entrypoint::Initialised);
    assert!(prepared(&sidecar, 0, &[]).contains(missing));
    let (mut waiting, _) = sidecar.spawn(&["await"]);
    sidecar.start();
    assert!(waiting.wait().unwrap().success());
    let settings = sidecar.archive_settings();
    let command = settings[1].replace(" = '", "=").replace('\'', "");
    let arguments = ["-c", "archive_mode=on", "-c", &command, "-c", "wal_keep_size=64MB"];
    postgres.start(&arguments);
    postgres.sql("CREATE TABLE rows AS SELECT generate_series(1, 1000) AS n");
    let names: Vec<String> = (0..2).map(|_| postgres.switch_wal()).collect();
    wait_until("PostgreSQL is told", PATIENCE, || postgres.log().contains("archive command failed"));
    assert!(postgres.log().contains(missing), "{}", postgres.log());
    assert!(names.iter().all(|name| postgres.is_marked(name, "ready")));
    let status = sidecar.json(&["status"]);
    assert!(status["state"] == "degraded" && status["problems"].to_string().contains(missing), "{status}");
    assert_eq!((sidecar.health("/healthz").status, sidecar.health("/readyz").status), (200, 200));
    assert_eq!(sidecar.metric("pgsidecar_degraded"), "1");
    assert_ne!(sidecar.metric("pgsidecar_archive_failures_total"), "0");
    assert!(sidecar.log().contains(missing));

    // It's made, and the container starts anew. PostgreSQL runs on.
    assert!(sidecar.stop().success(), "{}", sidecar.log());
    secret.iter().for_each(|(name, value)| sidecar.set(name, value));
    sidecar.start();
    postgres.wait_until_archived();
    let archived = Look::into(&repository).all_wal("shop/db");
    for name in &names {
        assert!(archived.get(name) == Some(&postgres.wal_file(name)), "{name} in {:?}", archived.keys());
    }
    wait_until("all is well", PATIENCE, || sidecar.json(&["status"])["state"] == "ok");
    assert_eq!(sidecar.metric("pgsidecar_degraded"), "0");
    sidecar.ok(&["backup", "create", "--fast"]);
}

#[test]
fn nothing_is_written_but_to_the_spool_and_no_home_is_needed_root_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (uid, gid) = server_user().expect("this test runs as root");
    let (mut postgres, mut sidecar) = beside(&scratch, 15, &["--wal-segsize=1"], &repository);
    let settings = sidecar.archive_settings();
    postgres.configure(&settings.iter().map(String::as_str).collect::<Vec<_>>());
    let spool = scratch.dir("spool");
    for name in ["PGSIDECAR_SPOOL", "TMPDIR"] {
        sidecar.set(name, spool.to_str().unwrap());
    }
    sidecar.set("PG_BINDIR", &Postgres::bin(15).display().to_string());
    assert!(!sidecar.environment.iter().any(|(name, _)| name == "HOME"));
    // The root can't be written to, and nothing else but what the pod mounts.
    let script = format!(
        "mount --bind {scratch} {scratch} && mount -o remount,bind,ro / && mount -o remount,bind,rw {scratch} && cd / || exit 1\n\
         exec setpriv --reuid={uid} --regid={gid} --clear-groups prlimit --data={limit} \"$@\"",
        scratch = scratch.path().display(),
        limit = 256 << 20,
    );
    let log = fs::File::create(scratch.path().join("read-only.log")).unwrap();
    let mut in_pod = Command::new("unshare");
    in_pod.args(["-m", "sh", "-c", &script, "sh"]).arg(Sidecar::program()).arg("run").env_clear();
    in_pod.env("PATH", std::env::var_os("PATH").unwrap());
    in_pod.envs(sidecar.environment.iter().map(|(name, value)| (name, value)));
    in_pod.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    let mut daemon = Background::of(in_pod.spawn().unwrap());
    let log = || fs::read_to_string(scratch.path().join("read-only.log")).unwrap();
    let (code, said, _) = waits(&sidecar, &["--timeout", "20s"]);
    assert_eq!(code, Some(0), "{said}\n{}", log());
    // It is so.
    let beside = scratch.path().with_extension("beside");
    let written = format!("/proc/{}/root{}", daemon.id(), beside.display());
    assert_eq!(fs::write(written, "").unwrap_err().kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    postgres.start(&[]);
    postgres.sql("CREATE TABLE t AS SELECT 7 AS n");
    let name = postgres.switch_wal();
    postgres.wait_until_archived();
    sidecar.ok(&["backup", "create", "--fast"]);
    sidecar.ok(&["dump", "create"]);
    let fetched = sidecar.wal(&postgres, &["restore", &name, "pg_wal/RECOVERYXLOG"]);
    assert!(fetched.status.success(), "{}\n{}", told(&fetched), log());
    postgres.stop("fast");
    rustix::process::kill_process(rustix::process::Pid::from_child(&daemon), rustix::process::Signal::TERM).unwrap();
    assert!(daemon.wait().unwrap().success(), "{}", log());
    assert!(!log().contains("Read-only file system"), "{}", log());
    assert_eq!(Look::into(&repository).matching("/tail/").len(), 1, "{}", log());
}

#[test]
fn a_helper_that_postgresql_runs_is_replaced_by_each_who_brings_it_pg15() {
    let scratch = Scratch::new();
    let (postgres, mut sidecar) = beside(&scratch, 15, &[], &Repository::directory(&scratch));
    let helper = scratch.dir("shared").join("pgsidecar-wal");
    sidecar.set("PGSIDECAR_PUBLISH_HELPER", helper.parent().unwrap().to_str().unwrap());
    let inode = || fs::metadata(&helper).unwrap().ino();
    prepared(&sidecar, 0, &[]);
    // Whoever writes to a file that is being run gets ETXTBSY; a copy that waits for an answer is run throughout.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let mut running = command(&helper);
    running.args(["--address", &address, "restore", "--timeout", "300", "000000010000000000000001", "x"]);
    let mut running = Background::start(running.current_dir(&postgres.data));
    silent.accept().unwrap();
    assert!(fs::OpenOptions::new().write(true).open(&helper).is_err_and(|error| error.raw_os_error() == Some(26)));
    let mut seen = vec![inode()];
    prepared(&sidecar, 0, &[]);
    seen.push(inode());
    for _ in 0..2 {
        sidecar.start();
        seen.push(inode());
        assert_eq!(sidecar.json(&["status"])["problems"], serde_json::json!([]));
        sidecar.kill();
    }
    // The first one is held by who runs it, so that its number can't be given anew.
    assert!(seen[1..].iter().all(|inode| *inode != seen[0]), "{seen:?}");
    assert!(running.try_wait().unwrap().is_none(), "it runs on");
    drop(running);
    assert_eq!(fs::read_dir(helper.parent().unwrap()).unwrap().count(), 1);
    assert!(run(command(&helper).arg("--version")).contains("pgsidecar-wal"));
}
