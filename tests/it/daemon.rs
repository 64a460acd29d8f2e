//! The daemon: how it comes up, how it stops, what it says.

use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::{MetadataExt, PermissionsExt},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::support::{
    self, Postgres, Proxy, Repository, Scratch, Sidecar, Way, beside, command, connect, free_port, head, told,
    wait_until,
};

const MB: u32 = 1 << 20;
const NAME: &str = "000000010000000000000005";
const PATIENCE: Duration = Duration::from_secs(60);

/// A running daemon with these settings instead of the right ones.
fn with(scratch: &Scratch, settings: &[(&str, &str)]) -> (Postgres, Sidecar) {
    let (postgres, mut sidecar) = beside(scratch, 15, &["--wal-segsize=1"], &Repository::directory(scratch));
    settings.iter().for_each(|(name, value)| sidecar.set(name, value));
    sidecar.start();
    (postgres, sidecar)
}

fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

/// A second process of the daemon, whose output is read when it has ended.
fn run(sidecar: &Sidecar, arguments: &[&str]) -> Child {
    let mut daemon: Command = sidecar.command(Sidecar::program());
    daemon.arg("run").args(arguments).stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn with_wrong_settings_it_comes_up_refuses_with_the_reason_and_says_so_everywhere_pg15() {
    let scratch = Scratch::new();
    let settings = [("PGSIDECAR_REPOSITORY", ""), ("PGPORT", "70000"), ("PGSIDECAR_COMPRESSION_LEVEL", "fast")];
    let (postgres, sidecar) = with(&scratch, &settings);
    let bytes = postgres.segment(NAME, MB, 1);
    fs::write(postgres.data.join("pg_wal").join(NAME), &bytes).unwrap();

    let output = sidecar.wal(&postgres, &["archive", &format!("pg_wal/{NAME}")]);
    assert_eq!(output.status.code(), Some(1));
    let status = sidecar.json(&["status"]);
    assert_eq!(status["state"], "degraded");
    let answers = [sidecar.post(NAME), sidecar.put(NAME, &bytes), sidecar.get(NAME)];
    for answer in &answers {
        assert_eq!((answer.status, answer.code().as_str()), (503, "misconfigured"), "{answer:?}");
    }
    let texts =
        [told(&output), answers[0].text(), answers[1].text(), answers[2].text(), status.to_string(), sidecar.log()];
    for text in texts.iter().chain([&sidecar.ok(&["status"]), &sidecar.fails(78, &["backup", "list"])]) {
        for name in settings.map(|(name, _)| name) {
            assert!(text.contains(name), "no {name} in {text}");
        }
    }
    // A restore is told that this says nothing about the archive.
    assert_eq!(sidecar.wal(&postgres, &["restore", "--timeout", "1", NAME, "x"]).status.code(), Some(200));

    assert_eq!((sidecar.health("/healthz").status, sidecar.health("/readyz").status), (200, 200));
    assert_eq!(sidecar.metric("pgsidecar_degraded"), "1");
    assert_eq!(sidecar.metric("pgsidecar_archive_failures_total"), "3");
}

#[test]
fn with_an_unknown_log_level_it_comes_up_and_says_so_pg15() {
    let scratch = Scratch::new();
    let (_postgres, sidecar) = with(&scratch, &[("PGSIDECAR_LOG", "loud"), ("PGSIDECAR_LOG_FORMAT", "xml")]);
    let problems = sidecar.json(&["status"])["problems"].to_string();
    assert!(problems.contains("PGSIDECAR_LOG:") && problems.contains("PGSIDECAR_LOG_FORMAT:"), "{problems}");
}

#[test]
fn when_all_is_well_it_is_not_degraded_pg15() {
    let scratch = Scratch::new();
    let (postgres, sidecar) = with(&scratch, &[]);
    assert_eq!(sidecar.put(NAME, &postgres.segment(NAME, MB, 1)).status, 200);
    assert_eq!(sidecar.metric("pgsidecar_degraded"), "0");
    assert_eq!(sidecar.json(&["status"])["state"], "ok");
    let size = support::run(command("df").args(["--block-size=1", "--output=size"]).arg(&postgres.data));
    for holds in ["data", "wal"] {
        let told = |name: &str| sidecar.metric(&format!("pgsidecar_volume_{name}_bytes{{holds=\"{holds}\"}}"));
        assert_eq!(told("size"), size.lines().last().unwrap().trim());
        let (available, size) = (told("available").parse::<u64>().unwrap(), told("size").parse::<u64>().unwrap());
        assert!((1..=size).contains(&available), "{available} of {size}");
    }
    let ping = sidecar.wal(&postgres, &["ping"]);
    assert!(ping.status.success(), "{}", told(&ping));
}

/// A daemon in the middle of an upload that is held back, and the connection of who waits for it.
fn uploading(
    scratch: &Scratch,
    proxy: &Proxy,
    repository: &Repository,
    drain_timeout: &str,
) -> (Postgres, Sidecar, std::net::TcpStream) {
    let (postgres, mut sidecar) = beside(scratch, 15, &["--wal-segsize=1"], repository);
    sidecar.set("AWS_ENDPOINT_URL_S3", &proxy.url());
    sidecar.set("PGSIDECAR_DRAIN_TIMEOUT", drain_timeout);
    sidecar.start();
    let first = "000000010000000000000004";
    assert_eq!(sidecar.put(first, &postgres.segment(first, MB, 1)).status, 200);
    fs::write(postgres.data.join("pg_wal").join(NAME), postgres.segment(NAME, MB, 1)).unwrap();
    proxy.set(Way::Held);
    let mut caller = connect(sidecar.port);
    caller.write_all(head("POST", &format!("/v1/wal/{NAME}/archive"), "").as_bytes()).unwrap();
    wait_until("the upload is under way", PATIENCE, || proxy.holds(NAME));
    (postgres, sidecar, caller)
}

#[test]
fn sigterm_lets_an_upload_end_and_then_exits_with_0_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let proxy = Proxy::before(&repository);
    let (_postgres, mut sidecar, mut caller) = uploading(&scratch, &proxy, &repository, "60s");
    let socket = scratch.path().join("control.sock");
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o7777, 0o600);
    thread::scope(|scope| {
        let pid = sidecar.pid();
        let stopped = scope.spawn(|| sidecar.stop());
        wait_until("it is stopping", PATIENCE, || {
            fs::read_to_string(scratch.path().join("sidecar.log")).unwrap().contains("stopping: finishing")
        });
        thread::sleep(Duration::from_secs(2));
        assert!(fs::exists(format!("/proc/{pid}")).unwrap(), "it waits for the upload");
        proxy.set(Way::Open);
        let mut answer = String::new();
        caller.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert_eq!(stopped.join().unwrap().code(), Some(0));
    });
    assert!(!socket.exists());
    sidecar.start();
    assert_eq!(sidecar.get(NAME).status, 200);
}

#[test]
fn a_second_signal_ends_it_at_once_and_nothing_was_acknowledged_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let proxy = Proxy::before(&repository);
    let (_postgres, mut sidecar, mut caller) = uploading(&scratch, &proxy, &repository, "60s");
    signal(sidecar.pid(), rustix::process::Signal::TERM);
    wait_until("it is stopping", PATIENCE, || sidecar.log().contains("stopping"));
    let began = Instant::now();
    assert_eq!(sidecar.stop().code(), Some(143));
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    let mut answer = Vec::new();
    caller.read_to_end(&mut answer).ok();
    assert!(answer.is_empty(), "{}", String::from_utf8_lossy(&answer));
}

#[test]
fn the_drain_timeout_bounds_the_stop_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let proxy = Proxy::before(&repository);
    let (_postgres, mut sidecar, _caller) = uploading(&scratch, &proxy, &repository, "500ms");
    let began = Instant::now();
    assert_eq!(sidecar.stop().code(), Some(0));
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert!(sidecar.log().contains("stopped before everything under way had ended"), "{}", sidecar.log());
}

#[test]
fn a_socket_that_a_killed_daemon_left_is_replaced_pg15() {
    let scratch = Scratch::new();
    let (_postgres, mut sidecar) = with(&scratch, &[]);
    sidecar.kill();
    assert!(scratch.path().join("control.sock").exists());
    assert!(sidecar.fails(69, &["status"]).contains("can't be reached"));
    sidecar.start();
    sidecar.ok(&["status"]);
}

#[test]
fn a_second_daemon_at_the_same_addresses_says_so_and_leaves_the_first_alone_pg15() {
    let scratch = Scratch::new();
    let (_postgres, sidecar) = with(&scratch, &[]);
    let (wal, health) = (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
    let other_addresses = ["--wal-listen", &wal, "--health-listen", &health];
    for (arguments, place) in
        [(&[][..], format!("127.0.0.1:{}", sidecar.port)), (&other_addresses, "control.sock".into())]
    {
        let output = run(&sidecar, arguments).wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(74), "{}", told(&output));
        let text = told(&output);
        assert!(text.contains(&place) && text.contains("Is another pgsidecar running here?"), "{text}");
        sidecar.ok(&["status"]);
    }
}

#[test]
fn logs_are_lines_of_json_where_wanted_pg15() {
    let scratch = Scratch::new();
    let (postgres, mut sidecar) = with(&scratch, &[("PGSIDECAR_LOG_FORMAT", "json")]);
    assert_eq!(sidecar.put(NAME, &postgres.segment(NAME, MB, 1)).status, 200);
    assert_eq!(sidecar.put(NAME, &postgres.segment(NAME, MB, 2)).status, 409);
    assert!(sidecar.stop().success());
    let log = sidecar.log();
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.iter().all(|line| line["timestamp"].is_string() && line["level"].is_string()), "{log}");
    let archived = lines.iter().find(|line| line["message"] == "archived").unwrap();
    assert_eq!((archived["file"].as_str(), archived["level"].as_str()), (Some(NAME), Some("INFO")));
    let refused = lines.iter().find(|line| line["level"] == "ERROR").unwrap();
    assert!(refused["hint"].as_str().unwrap().contains("PGSIDECAR_CLUSTER"), "{refused}");
}

#[test]
fn logs_are_text_without_colours_otherwise_pg15() {
    let scratch = Scratch::new();
    let (_postgres, sidecar) = with(&scratch, &[("PGSIDECAR_LOG", "info")]);
    let log = sidecar.log();
    assert!(log.contains("INFO pgsidecar is up version="), "{log}");
    assert!(!log.contains('\x1b') && !log.contains("DEBUG"), "{log}");
}

#[test]
fn the_helper_is_published_whole_and_in_place_of_an_older_one_pg15() {
    let scratch = Scratch::new();
    let (_postgres, mut sidecar) = beside(&scratch, 15, &[], &Repository::directory(&scratch));
    let helper = scratch.dir("bin").join("pgsidecar-wal");
    fs::write(&helper, "an older one").unwrap();
    let mut older = fs::File::open(&helper).unwrap();
    sidecar.set("PGSIDECAR_PUBLISH_HELPER", helper.parent().unwrap().to_str().unwrap());
    sidecar.start();
    // By rename: who runs the older one goes on running that.
    let mut text = String::new();
    older.read_to_string(&mut text).unwrap();
    assert_eq!(text, "an older one");
    assert_ne!(older.metadata().unwrap().ino(), fs::metadata(&helper).unwrap().ino());
    assert_eq!(fs::metadata(&helper).unwrap().permissions().mode() & 0o7777, 0o755);
    assert_eq!(fs::read_dir(helper.parent().unwrap()).unwrap().count(), 1);
    let ping = Command::new(&helper).args(["--address", &format!("127.0.0.1:{}", sidecar.port), "ping"]).status();
    assert!(ping.unwrap().success());
}

#[test]
fn a_helper_that_can_not_be_published_does_not_keep_the_daemon_from_coming_up_pg15() {
    let scratch = Scratch::new();
    let missing = scratch.path().join("missing");
    let (postgres, sidecar) = with(&scratch, &[("PGSIDECAR_PUBLISH_HELPER", missing.to_str().unwrap())]);
    assert_eq!(sidecar.put(NAME, &postgres.segment(NAME, MB, 1)).status, 200);
    let problems = sidecar.json(&["status"])["problems"].to_string();
    assert!(problems.contains("publishing pgsidecar-wal to"), "{problems}");
    assert_eq!(sidecar.metric("pgsidecar_degraded"), "1");
}
