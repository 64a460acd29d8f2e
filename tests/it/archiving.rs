//! WAL from PostgreSQL to the repository.

use std::{
    fs,
    io::Write,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use crate::support::{
    Postgres, Proxy, Repository, Scratch, Sidecar, Way, archiving, archiving_with, beside, command, connect, head,
    told, wait_until,
};

const MB: u32 = 1 << 20;
const NAME: &str = "000000010000000000000005";
const PATIENCE: Duration = Duration::from_secs(60);

/// A data directory with segments of 1 MB, whose server doesn't run, and a running daemon for it.
fn idle(scratch: &Scratch, repository: &Repository) -> (Postgres, Sidecar) {
    let (postgres, mut sidecar) = beside(scratch, 15, &["--wal-segsize=1"], repository);
    sidecar.start();
    (postgres, sidecar)
}

/// Puts a file into pg_wal.
fn lay(postgres: &Postgres, name: &str, bytes: &[u8]) {
    fs::write(postgres.data.join("pg_wal").join(name), bytes).unwrap();
}

/// The objects of a repository in a directory, by their paths in it.
fn objects(directory: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        match entry.file_type().unwrap().is_dir() {
            true => found.extend(objects(&entry.path()).into_iter().map(|below| format!("{name}/{below}"))),
            false => found.push(name),
        }
    }
    found.sort();
    found
}

fn a_switched_segment_arrives_and_comes_back_byte_by_byte(major: u32) {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (postgres, sidecar) = archiving(&scratch, major, &[], &repository);
    let name = postgres.switch_wal();
    postgres.wait_until_archived();
    let answer = sidecar.get(&name);
    assert_eq!(answer.status, 200);
    assert!(answer.body == fs::read(postgres.data.join("pg_wal").join(&name)).unwrap());
    assert_eq!(sidecar.json(&["status"])["archive"]["last_archived"]["file"], name);
}

#[test]
fn a_switched_segment_arrives_and_comes_back_byte_by_byte_pg15() {
    a_switched_segment_arrives_and_comes_back_byte_by_byte(15);
}

#[test]
fn a_switched_segment_arrives_and_comes_back_byte_by_byte_pg17() {
    a_switched_segment_arrives_and_comes_back_byte_by_byte(17);
}

#[test]
fn a_line_of_curl_archives_too_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (mut postgres, mut sidecar) = beside(&scratch, 15, &[], &repository);
    let line = format!("curl -fsS --max-time 60 -T %p http://127.0.0.1:{}/v1/wal/%f", sidecar.port);
    postgres.configure(&["archive_mode = on", &format!("archive_command = '{line}'")]);
    sidecar.start();
    postgres.start(&[]);
    let name = postgres.switch_wal();
    postgres.wait_until_archived();
    assert!(sidecar.get(&name).body == fs::read(postgres.data.join("pg_wal").join(&name)).unwrap());

    // What can't be archived stays with PostgreSQL.
    sidecar.kill();
    let name = postgres.switch_wal();
    wait_until("PostgreSQL tells the failure", PATIENCE, || postgres.log().contains("archive command failed"));
    assert!(postgres.data.join(format!("pg_wal/archive_status/{name}.ready")).exists());
}

#[test]
fn check_flags_a_curl_that_does_not_notice_errors_pg15() {
    let scratch = Scratch::new();
    let (postgres, sidecar) = archiving(&scratch, 15, &[], &Repository::directory(&scratch));
    let url = format!("http://127.0.0.1:{}/v1/wal/%f", sidecar.port);
    let state_with = |command: &str| {
        postgres.sql(&format!("ALTER SYSTEM SET archive_command = '{command}'"));
        postgres.sql("SELECT pg_reload_conf()");
        wait_until("the setting is in force", PATIENCE, || postgres.sql("SHOW archive_command") == command);
        let output = sidecar.cli(&["check", "--json"]);
        let findings: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let archiving = findings.as_array().unwrap().iter().find(|finding| finding["check"] == "archiving").unwrap();
        (output.status.code().unwrap(), archiving["state"].as_str().unwrap().to_owned())
    };
    for good in ["curl -fsS --max-time 60 -T %p", "/usr/bin/curl --fail -sS --max-time 60 --upload-file %p"] {
        assert_eq!(state_with(&format!("{good} {url}")), (0, "ok".to_owned()), "{good}");
    }
    for bad in ["curl -sS --max-time 60 -T %p", "test -f %p && curl -sS -T %p"] {
        assert_eq!(state_with(&format!("{bad} {url}")), (1, "failed".to_owned()), "{bad}");
    }
}

#[test]
fn the_same_content_again_is_a_success_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (postgres, sidecar) = idle(&scratch, &repository);
    let bytes = postgres.segment(NAME, MB, 1);
    lay(&postgres, NAME, &bytes);
    for (answer, already) in
        [(sidecar.put(NAME, &bytes), false), (sidecar.put(NAME, &bytes), true), (sidecar.post(NAME), true)]
    {
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(answer.text().trim(), format!("{{\"name\":\"{NAME}\",\"already_archived\":{already}}}"));
    }
    assert_eq!(sidecar.wal(&postgres, &["archive", &format!("pg_wal/{NAME}")]).status.code(), Some(0));
    // The helper's question was answered from memory.
    assert_eq!(sidecar.metric("pgsidecar_archived_files_total"), "3");
    assert_eq!(sidecar.metric("pgsidecar_archive_conflicts_total"), "0");
}

#[test]
fn other_content_under_a_name_is_refused_and_nothing_changes_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (postgres, sidecar) = idle(&scratch, &repository);
    let (first, second) = (postgres.segment(NAME, MB, 1), postgres.segment(NAME, MB, 2));
    assert_eq!(sidecar.put(NAME, &first).status, 200);

    let answer = sidecar.put(NAME, &second);
    assert_eq!((answer.status, answer.code().as_str()), (409, "conflict"));
    for bytes in [&first, &second] {
        let hash = pgsidecar_core::ContentId::of(bytes).sha256.to_string();
        assert!(answer.text().contains(&hash[..8]), "{hash} in {}", answer.text());
    }
    lay(&postgres, NAME, &second);
    let output = sidecar.wal(&postgres, &["archive", &format!("pg_wal/{NAME}")]);
    assert_eq!(output.status.code(), Some(1), "{}", told(&output));
    assert!(told(&output).contains("with other content"), "{}", told(&output));

    assert!(sidecar.get(NAME).body == first);
    assert_eq!(sidecar.metric("pgsidecar_archive_conflicts_total"), "2");
    assert_eq!(sidecar.metric("pgsidecar_degraded"), "1");
    let problem = sidecar.json(&["status"])["problems"][0].clone();
    assert_eq!(problem["code"], "conflict", "{problem}");
}

fn a_promotion_archives_the_history_and_the_partial_segment(major: u32) {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (mut postgres, sidecar) = archiving(&scratch, major, &["--wal-segsize=1"], &repository);
    postgres.switch_wal();
    postgres.wait_until_archived();
    postgres.stop("fast");
    fs::write(postgres.data.join("standby.signal"), "").unwrap();
    let restore = format!("{} --address 127.0.0.1:{} restore %f %p", Sidecar::helper().display(), sidecar.port);
    postgres.configure(&[&format!("restore_command = '{restore}'")]);
    postgres.start(&[]);
    // The shutdown's checkpoint has begun a segment that timeline 1 doesn't fill.
    postgres.sql("SELECT pg_promote()");
    postgres.wait_for_promotion();
    postgres.sql("CREATE TABLE t (n int)");
    let segment = postgres.switch_wal();
    assert!(segment.starts_with("00000002"), "{segment}");
    postgres.wait_until_archived();

    let wal = postgres.data.join("pg_wal");
    let partial = fs::read_dir(&wal).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let partial = partial.into_iter().find(|name| name.ends_with(".partial")).unwrap();
    for name in ["00000002.history", &partial, &segment] {
        let answer = sidecar.get(name);
        assert_eq!(answer.status, 200, "{name}: {answer:?}");
        assert!(answer.body == fs::read(wal.join(name)).unwrap(), "{name}");
    }
}

#[test]
fn a_promotion_archives_the_history_and_the_partial_segment_pg15() {
    a_promotion_archives_the_history_and_the_partial_segment(15);
}

#[test]
fn a_promotion_archives_the_history_and_the_partial_segment_pg17() {
    a_promotion_archives_the_history_and_the_partial_segment(17);
}

#[test]
fn a_backup_history_file_is_archived_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (postgres, sidecar) = archiving(&scratch, 15, &["--wal-segsize=1"], &repository);
    postgres.sql("SELECT pg_backup_start('by hand', true); SELECT pg_backup_stop(false)");
    postgres.wait_until_archived();
    let names = fs::read_dir(postgres.data.join("pg_wal")).unwrap();
    let mut names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let name = names.find(|name| name.ends_with(".backup")).unwrap();
    assert!(sidecar.get(&name).text().contains("LABEL: by hand"), "{name}");
}

#[test]
fn two_partial_files_of_one_name_are_both_kept_pg15() {
    let scratch = Scratch::new();
    let (postgres, sidecar) = idle(&scratch, &Repository::directory(&scratch));
    let name = format!("{NAME}.partial");
    for seed in [1, 2, 1] {
        let answer = sidecar.put(&name, &postgres.segment(NAME, MB, seed));
        assert_eq!(answer.status, 200, "{answer:?}");
    }
    let kept = objects(&scratch.path().join("repository"));
    assert_eq!(kept.iter().filter(|object| object.contains(".partial.")).count(), 2, "{kept:?}");
    // Which one is meant can't be told, and it isn't 'not there'.
    assert_eq!(sidecar.get(&name).status, 409);
    assert_eq!(sidecar.get(NAME).code(), "not_in_archive");
}

#[test]
fn segments_of_1_mb_arrive_and_come_back_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (postgres, sidecar) = archiving(&scratch, 15, &["--wal-segsize=1"], &repository);
    postgres.sql("CREATE TABLE t AS SELECT sha512(n::text::bytea) FROM generate_series(1, 30000) n");
    let last = postgres.switch_wal();
    postgres.wait_until_archived();
    let answer = sidecar.get(&last);
    assert_eq!((answer.status, answer.body.len()), (200, 1 << 20));
    assert!(sidecar.metric("pgsidecar_archived_files_total").parse::<u32>().unwrap() >= 4);
}

#[test]
fn a_segment_of_64_mb_that_does_not_compress_arrives_and_comes_back_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (postgres, mut sidecar) = beside(&scratch, 15, &["--wal-segsize=64"], &repository);
    sidecar.start();
    let bytes = postgres.segment(NAME, 64 * MB, 1);
    lay(&postgres, NAME, &bytes);
    assert_eq!(sidecar.post(NAME).status, 200);
    assert!(sidecar.get(NAME).body == bytes);
    // Its parts were sent before its identity was known; it's recognised all the same.
    assert_eq!(sidecar.post(NAME).text().trim(), format!("{{\"name\":\"{NAME}\",\"already_archived\":true}}"));
}

#[test]
fn timelines_are_hexadecimal_pg15() {
    let scratch = Scratch::new();
    let (postgres, sidecar) = idle(&scratch, &Repository::directory(&scratch));
    let name = "0000000A0000000100000FFF";
    let bytes = postgres.segment(name, MB, 1);
    assert_eq!(sidecar.put(name, &bytes).status, 200);
    assert!(sidecar.get(name).body == bytes);
    assert_eq!(sidecar.get("0000000100000001000000FF").status, 404);
    let history = "1\t0/5000028\tno recovery target specified\n";
    assert_eq!(sidecar.put("0000000A.history", history.as_bytes()).status, 200);
    assert_eq!(sidecar.get("0000000A.history").text(), history);
    let kept = objects(&scratch.path().join("repository"));
    let ends = |end: &str| kept.iter().any(|object| object.ends_with(end));
    assert!(ends("/wal/0000000A/0000000A00000001/0000000A0000000100000FFF.zst"), "{kept:?}");
    assert!(ends("/wal/0000000A/0000000A.history.zst"), "{kept:?}");
}

fn many_requests_for_one_name_all_succeed(scratch: &Scratch, repository: &Repository) {
    let (postgres, sidecar) = idle(scratch, repository);
    let bytes = postgres.segment(NAME, MB, 1);
    lay(&postgres, NAME, &bytes);
    thread::scope(|scope| {
        for n in 0..20 {
            let (sidecar, bytes) = (&sidecar, &bytes);
            scope.spawn(move || {
                let answer = if n % 2 == 0 { sidecar.put(NAME, bytes) } else { sidecar.post(NAME) };
                assert_eq!(answer.status, 200, "{answer:?}");
            });
        }
    });
    assert!(sidecar.get(NAME).body == bytes);
    assert_eq!(sidecar.metric("pgsidecar_archive_failures_total"), "0");
}

#[test]
fn twenty_requests_for_one_name_at_a_time_all_succeed_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    many_requests_for_one_name_all_succeed(&scratch, &repository);
}

#[test]
fn twenty_requests_for_one_name_at_a_time_leave_one_object_pg15() {
    let scratch = Scratch::new();
    many_requests_for_one_name_all_succeed(&scratch, &Repository::directory(&scratch));
    let kept = objects(&scratch.path().join("repository"));
    assert_eq!(kept.iter().filter(|object| object.contains(NAME)).count(), 1, "{kept:?}");
    assert!(!kept.iter().any(|object| object.contains(".tmp-")), "{kept:?}");
}

#[test]
fn the_helper_gives_up_soon_without_a_daemon() {
    let began = Instant::now();
    // Of the reserved ports: none that another test could get meanwhile.
    let address = "127.0.0.1:1".to_owned();
    let output = command(Sidecar::helper()).args(["--address", &address, "archive", NAME]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(told(&output).contains("no connection to pgsidecar at"), "{}", told(&output));
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
}

#[test]
fn a_caller_that_goes_away_does_not_stop_the_upload_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let proxy = Proxy::before(&repository);
    let (postgres, mut sidecar) = beside(&scratch, 15, &["--wal-segsize=1"], &repository);
    sidecar.set("AWS_ENDPOINT_URL_S3", &proxy.url());
    sidecar.start();
    let bytes = postgres.segment(NAME, MB, 1);
    lay(&postgres, NAME, &bytes);
    lay(&postgres, "000000010000000000000004", &postgres.segment("000000010000000000000004", MB, 1));
    assert_eq!(sidecar.post("000000010000000000000004").status, 200);

    proxy.set(Way::Held);
    let mut caller = connect(sidecar.port);
    caller.write_all(head("POST", &format!("/v1/wal/{NAME}/archive"), "").as_bytes()).unwrap();
    wait_until("the upload is under way", PATIENCE, || proxy.holds(NAME));
    drop(caller);
    proxy.set(Way::Open);
    wait_until("it is archived", PATIENCE, || sidecar.metric("pgsidecar_archived_files_total") == "2");
    assert!(sidecar.get(NAME).body == bytes);
}

/// An outage of the store: PostgreSQL stays up and keeps its WAL, people are told, and all is well by itself afterwards.
fn an_outage_is_survived_and_told(major: u32, way: Way, code: &str) {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let proxy = Proxy::before(&repository);
    let settings = [("AWS_ENDPOINT_URL_S3", proxy.url())];
    let settings: Vec<_> = settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let (postgres, sidecar) = archiving_with(&scratch, major, &["--wal-segsize=1"], &repository, &settings);
    postgres.switch_wal();
    postgres.wait_until_archived();

    proxy.set(way);
    let name = postgres.switch_wal();
    let began = Instant::now();
    let output = sidecar.wal(&postgres, &["--timeout", "5", "archive", &format!("pg_wal/{name}")]);
    assert_eq!(output.status.code(), Some(1), "{}", told(&output));
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert!(postgres.data.join(format!("pg_wal/archive_status/{name}.ready")).exists());
    assert_eq!(postgres.sql("SELECT 1"), "1");
    // A store that is silent is given time to answer before it's called a problem.
    wait_until("the status tells the problem", PATIENCE, || sidecar.json(&["status"])["problems"][0]["code"] == code);
    let backlog = sidecar.json(&["status"])["archive"]["backlog_files"].as_u64();
    assert!(backlog.is_some_and(|files| files >= 1), "{backlog:?}");
    assert_eq!((sidecar.metric("pgsidecar_degraded").as_str(), sidecar.health("/readyz").status), ("1", 200));

    proxy.set(Way::Open);
    // PostgreSQL, after three refusals, asks again with the next segment or after a minute.
    let last = postgres.switch_wal();
    postgres.wait_until_archived();
    for name in [name, last] {
        assert!(sidecar.get(&name).body == fs::read(postgres.data.join("pg_wal").join(&name)).unwrap(), "{name}");
    }
    assert_eq!(sidecar.json(&["status"])["archive"]["last_failure"], serde_json::Value::Null);
}

#[test]
fn an_outage_with_a_store_that_refuses_is_survived_and_told_pg15() {
    an_outage_is_survived_and_told(15, Way::Refused, "store_unavailable");
}

#[test]
fn an_outage_with_a_store_that_refuses_is_survived_and_told_pg17() {
    an_outage_is_survived_and_told(17, Way::Refused, "store_unavailable");
}

#[test]
fn an_outage_with_a_store_that_answers_500_is_survived_and_told_pg15() {
    an_outage_is_survived_and_told(15, Way::Failing(500, "InternalError"), "store_unavailable");
}

#[test]
fn an_outage_with_a_store_that_is_silent_is_survived_and_told_pg15() {
    an_outage_is_survived_and_told(15, Way::Held, "store_unavailable");
}

#[test]
fn a_file_is_not_acknowledged_to_another_server_that_has_one_of_that_name_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (postgres, sidecar) = archiving(&scratch, 15, &[], &repository);
    let name = postgres.switch_wal();
    postgres.wait_until_archived();
    let ask = |directory: &Path| {
        let mut helper = command(Sidecar::helper());
        helper.args(["--address", &format!("127.0.0.1:{}", sidecar.port), "archive", &format!("pg_wal/{name}")]);
        helper.current_dir(directory).output().unwrap()
    };
    assert!(ask(&postgres.data).status.success());
    // A copy of the data directory on the same host, whose server asks the wrong sidecar.
    let copy = scratch.dir("copy");
    for directory in ["global", "pg_wal"] {
        fs::create_dir(copy.join(directory)).unwrap();
        crate::support::give_to_servers(&copy.join(directory));
    }
    for file in ["global/pg_control".to_owned(), format!("pg_wal/{name}")] {
        fs::copy(postgres.data.join(&file), copy.join(&file)).unwrap();
        crate::support::give_to_servers(&copy.join(&file));
    }
    let refused = ask(&copy);
    assert_eq!(refused.status.code(), Some(1));
    assert!(told(&refused).contains("another copy"), "{}", told(&refused));
    // Another database altogether.
    let mut control = fs::read(copy.join("global/pg_control")).unwrap();
    control[0] ^= 1;
    fs::write(copy.join("global/pg_control"), control).unwrap();
    let refused = ask(&copy);
    assert_eq!(refused.status.code(), Some(1));
    assert!(told(&refused).contains("system identifier"), "{}", told(&refused));
}
