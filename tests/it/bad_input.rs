//! What must not lose data, hang or surprise: names, bodies, requests and stores that are wrong.

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    time::{Duration, Instant},
};

use crate::support::{
    Postgres, Proxy, Repository, Scratch, Sidecar, Way, beside, connect, exchange, give_to_servers, head, segment,
    told, wait_until,
};

const MB: u32 = 1 << 20;
const NAME: &str = "000000010000000000000005";

/// A running daemon with a repository in a directory, and a data directory with segments of 1 MB.
fn idle(scratch: &Scratch) -> (Postgres, Sidecar) {
    let (postgres, mut sidecar) = beside(scratch, 15, &["--wal-segsize=1"], &Repository::directory(scratch));
    sidecar.start();
    // The daemon's own note of this database.
    wait_until("the repository is there", Duration::from_secs(20), || wal_files(scratch).is_some());
    (postgres, sidecar)
}

/// The WAL that lies below the repository's wal/, by name; nothing as long as there is no repository.
fn wal_files(scratch: &Scratch) -> Option<Vec<String>> {
    fn files(directory: &Path, found: &mut Vec<String>) {
        for entry in fs::read_dir(directory).into_iter().flatten().map(Result::unwrap) {
            match entry.file_type().unwrap().is_dir() {
                true => files(&entry.path(), found),
                false => found.push(entry.file_name().into_string().unwrap()),
            }
        }
    }
    let system = fs::read_dir(scratch.path().join("repository/main")).ok()?.next()?.ok()?.path();
    fs::exists(system.join("cluster.json")).ok()?.then_some(())?;
    let mut found = Vec::new();
    files(&system.join("wal"), &mut found);
    // Whose a timeline is, is no WAL.
    found.retain(|name| name != "owner.json");
    Some(found)
}

#[test]
fn a_name_that_is_none_is_refused_as_such_pg15() {
    let scratch = Scratch::new();
    let (_postgres, sidecar) = idle(&scratch);
    let long = "0".repeat(10_000);
    let names = [
        "../x",
        "..",
        "%2e%2e%2fx",
        "..%2Fx",
        "a/b",
        "",
        "00000001000000000000000a",
        "00000001000000000000005",
        "0000000100000000000000055",
        "00000001000000000000005%00",
        "000000010000000000000005.zst",
        "000000010000000000000005.PARTIAL",
        "000000010000000000000005.28.backup",
        "1.history",
        "000000000000000000000005",
        &long,
    ];
    for name in names {
        for (method, path) in [("PUT", ""), ("GET", ""), ("POST", "/archive")] {
            let answer = sidecar.ask(method, &format!("/v1/wal/{name}{path}"));
            assert_eq!((answer.status, answer.code().as_str()), (400, "invalid_name"), "{method} {name:.80}");
            assert!(answer.body.len() < 1000, "{name:.80}");
        }
    }
    assert_eq!(wal_files(&scratch).unwrap(), [""; 0]);
}

#[test]
fn a_file_of_pg_wal_that_can_not_be_read_is_not_acknowledged_pg15() {
    let scratch = Scratch::new();
    let (postgres, mut sidecar) = idle(&scratch);
    // It's in the archive, so that its absence would be an acknowledgement.
    postgres.lay(NAME, &postgres.segment(NAME, MB, 1));
    assert_eq!(sidecar.post(NAME).status, 200);
    let path = postgres.data.join("pg_wal").join(NAME);
    let elsewhere = scratch.path().join("elsewhere");
    fs::rename(&path, &elsewhere).unwrap();
    // What it remembers of the file must not answer for it.
    sidecar.kill();
    sidecar.start();
    let forbidden = || {
        fs::copy(&elsewhere, &path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
        give_to_servers(&path);
    };
    let kinds: [(&str, &dyn Fn()); 4] = [
        ("without the right to read it", &forbidden),
        ("a directory", &|| fs::create_dir(&path).unwrap()),
        ("a link", &|| symlink(&elsewhere, &path).unwrap()),
        ("a link to itself", &|| symlink(&path, &path).unwrap()),
    ];
    for (kind, lay) in kinds {
        lay();
        let answer = sidecar.post(NAME);
        assert_eq!((answer.status, answer.code().as_str()), (500, "io"), "{kind}: {answer:?}");
        let helper = sidecar.wal(&postgres, &["archive", &format!("pg_wal/{NAME}")]);
        assert_eq!(helper.status.code(), Some(1), "{kind}: {}", told(&helper));
        if fs::symlink_metadata(&path).unwrap().is_dir() {
            fs::remove_dir(&path).unwrap();
        } else {
            fs::remove_file(&path).unwrap();
        }
    }
    assert_eq!(sidecar.post(NAME).status, 200, "gone altogether");
}

#[test]
fn a_body_that_is_not_the_segment_of_its_name_is_refused_and_not_stored_pg15() {
    let scratch = Scratch::new();
    let (postgres, sidecar) = idle(&scratch);
    let right = postgres.segment(NAME, MB, 1);
    let system = postgres.system_identifier();
    let bodies = [
        ("nothing", Vec::new(), 422, "invalid_segment", "0 bytes"),
        ("too small", right[..right.len() - 1].to_vec(), 422, "invalid_segment", "1048575 bytes"),
        ("too large", [right.as_slice(), b"x"].concat(), 413, "too_large", "1048577 bytes"),
        ("zeros", vec![0; 1 << 20], 422, "invalid_segment", "begins with zeros"),
        ("garbage", b"garbage!".repeat(1 << 17), 422, "invalid_segment", "is not a WAL segment"),
        ("another database's", segment(system ^ 1, NAME, MB, 1), 422, "wrong_cluster", "belongs to another database"),
        ("another segment", postgres.segment("000000010000000000000006", MB, 1), 422, "invalid_segment", "0/600000"),
        (
            "a later timeline's",
            postgres.segment("000000020000000000000005", MB, 1),
            422,
            "invalid_segment",
            "timeline 2",
        ),
    ];
    for (what, body, status, code, says) in bodies {
        for name in [NAME.to_owned(), format!("{NAME}.partial")] {
            let answer = sidecar.put(&name, &body);
            assert_eq!((answer.status, answer.code().as_str()), (status, code), "{what}: {}", answer.text());
            assert!(
                answer.text().contains(says) && answer.text().contains("\"hint\":\"Nothing was stored"),
                "{}",
                answer.text()
            );
        }
        fs::write(postgres.data.join("pg_wal").join(NAME), &body).unwrap();
        assert_eq!(sidecar.post(NAME).code(), code, "{what}");
    }
    for (name, body) in
        [("00000002.history", "nonsense"), ("00000002.history", ""), ("00000002.history", "2\t0/1\tno\n")]
    {
        assert_eq!(sidecar.put(name, body.as_bytes()).code(), "invalid_segment", "{body}");
    }
    fs::remove_file(postgres.data.join("pg_wal").join(NAME)).unwrap();
    assert_eq!(sidecar.post(NAME).code(), "not_found");
    symlink("/etc/passwd", postgres.data.join("pg_wal").join(NAME)).unwrap();
    assert_eq!(sidecar.post(NAME).code(), "io");
    assert_eq!(wal_files(&scratch).unwrap(), [""; 0]);
    assert_eq!(sidecar.put(NAME, &right).status, 200);
}

#[test]
fn a_body_that_breaks_off_is_not_stored_pg15() {
    let scratch = Scratch::new();
    let (postgres, sidecar) = idle(&scratch);
    let bytes = postgres.segment(NAME, MB, 1);
    let history = "1\t0/5000028\tno recovery target specified\n";
    let chunked = format!("Transfer-Encoding: chunked\r\n\r\n{:x}\r\n{history}\r\n", history.len());
    let cut = [
        (NAME, format!("Content-Length: {}\r\n", bytes.len()), bytes[..bytes.len() / 2].to_vec()),
        // What has come is a history in itself.
        ("00000002.history", "Content-Length: 100\r\n".to_owned(), history.into()),
        ("00000002.history", chunked, Vec::new()),
    ];
    for (name, headers, body) in cut {
        for way in [Shutdown::Write, Shutdown::Both] {
            let mut stream = connect(sidecar.port);
            let head = head("PUT", &format!("/v1/wal/{name}"), &headers);
            let head = if headers.contains("chunked") { head.trim_end().to_owned() + "\r\n" } else { head };
            stream.write_all(&[head.as_bytes(), &body].concat()).unwrap();
            stream.shutdown(way).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).ok();
            assert!(!answer.starts_with("HTTP/1.1 200"), "{name}: {answer}");
        }
    }
    // Whoever comes next isn't kept waiting by those who went.
    assert_eq!(sidecar.put("00000003.history", history.as_bytes()).status, 200);
    assert_eq!(sidecar.put(NAME, &bytes).status, 200);
    let mut stored = wal_files(&scratch).unwrap();
    stored.sort();
    assert_eq!(stored, [format!("{NAME}.zst"), "00000003.history.zst".to_owned()]);
}

#[test]
fn bodies_that_never_end_do_not_keep_others_waiting_for_long_pg15() {
    let scratch = Scratch::new();
    let (postgres, sidecar) = idle(&scratch);
    let stalled: Vec<TcpStream> = (0..4)
        .map(|n| {
            let mut stream = connect(sidecar.port);
            let head = head("PUT", &format!("/v1/wal/00000001000000000000001{n}"), "Content-Length: 1048576\r\n");
            stream.write_all(head.as_bytes()).unwrap();
            stream
        })
        .collect();
    let began = Instant::now();
    assert_eq!(sidecar.put(NAME, &postgres.segment(NAME, MB, 1)).status, 200);
    assert!(began.elapsed() < Duration::from_secs(40), "{:?}", began.elapsed());
    drop(stalled);
}

#[test]
fn requests_that_are_not_from_here_are_refused_pg15() {
    let scratch = Scratch::new();
    let (postgres, sidecar) = idle(&scratch);
    fs::write(postgres.data.join("pg_wal").join(NAME), postgres.segment(NAME, MB, 1)).unwrap();
    let ask = |host: &str, more: &str| {
        let line = format!("POST /v1/wal/{NAME}/archive HTTP/1.1\r\n{host}{more}Connection: close\r\n\r\n");
        String::from_utf8(exchange(sidecar.port, line.as_bytes())).unwrap()
    };
    for host in ["evil.example", "127.0.0.1.evil.example", "evil.example:7433", "localhost.", "10.0.0.1", ""] {
        let answer = ask(&format!("Host: {host}\r\n"), "");
        assert!(answer.starts_with("HTTP/1.1 403 ") && answer.contains("\"forbidden\""), "{host}: {answer}");
    }
    assert!(ask("", "").starts_with("HTTP/1.1 403 "));
    for origin in ["http://evil.example", "http://localhost", "null"] {
        let answer = ask("Host: localhost\r\n", &format!("Origin: {origin}\r\n"));
        assert!(answer.starts_with("HTTP/1.1 403 "), "{origin}: {answer}");
    }
    assert_eq!(wal_files(&scratch).unwrap(), [""; 0]);
    for host in ["localhost", "127.0.0.1:1", "[::1]:7433", "[::1]"] {
        assert!(ask(&format!("Host: {host}\r\n"), "").starts_with("HTTP/1.1 200 "), "{host}");
    }
}

#[test]
fn heads_that_never_end_are_given_up_pg15() {
    let scratch = Scratch::new();
    let (_postgres, sidecar) = idle(&scratch);
    let mut slow = connect(sidecar.port);
    slow.write_all(b"GET /v1/status HTTP/1.1\r\nHost: loc").unwrap();
    let began = Instant::now();
    slow.read_to_end(&mut Vec::new()).ok();
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    // And one that is long beyond reason, at once.
    let mut long = connect(sidecar.port);
    long.write_all(format!("GET /{} HTTP/1.1\r\n", "x".repeat(100_000)).as_bytes()).ok();
    let mut answer = String::new();
    long.read_to_string(&mut answer).ok();
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    sidecar.ok(&["status"]);
}

/// What check finds about the store, and the failure of listing backups, with this exit code: one error with a hint.
fn store_trouble(sidecar: &Sidecar, code: i32, says: &str) {
    let began = Instant::now();
    let text = sidecar.fails(code, &["backup", "list"]);
    assert_eq!(text.matches("pgsidecar: error:").count(), 1, "{text}");
    assert!(text.contains(says) && text.contains("HINT: "), "{text}");
    let output = sidecar.cli(&["check", "--json"]);
    assert_eq!(output.status.code(), Some(1), "{}", told(&output));
    let findings: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let failed = findings.as_array().unwrap().iter();
    let failed: Vec<_> = failed
        .filter(|finding| ["store", "listing", "missing objects"].contains(&finding["check"].as_str().unwrap()))
        .filter(|finding| finding["state"] == "failed")
        .collect();
    assert!(failed.len() == 1 && failed[0]["message"].as_str().unwrap().contains(says), "{findings}");
    assert!(!failed[0]["hint"].as_str().unwrap().is_empty(), "{findings}");
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
}

#[test]
fn each_trouble_with_the_store_is_one_clear_error_with_a_hint_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let proxy = Proxy::before(&repository);
    let (_postgres, mut sidecar) = beside(&scratch, 15, &[], &repository);
    sidecar.set("AWS_ENDPOINT_URL_S3", &proxy.url());
    let troubles = [
        (Way::Refused, 69, "can't be reached"),
        (Way::Failing(500, "InternalError"), 69, "500 InternalError"),
        (Way::Failing(503, "SlowDown"), 69, "503 SlowDown"),
        (Way::Failing(403, "AccessDenied"), 77, "403 AccessDenied"),
        (Way::Failing(404, "NoSuchBucket"), 77, "404 NoSuchBucket"),
    ];
    for (way, code, says) in troubles {
        proxy.set(way);
        store_trouble(&sidecar, code, says);
    }
    proxy.set(Way::Open);
    sidecar.set("AWS_SECRET_ACCESS_KEY", "not-the-right-one");
    store_trouble(&sidecar, 77, "403");
}

#[test]
fn a_bucket_that_is_missing_is_named_s3s_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (_postgres, mut sidecar) = beside(&scratch, 15, &[], &repository);
    sidecar.set("PGSIDECAR_REPOSITORY", "s3://no-such-bucket/it");
    let text = sidecar.fails(77, &["backup", "list"]);
    assert!(text.contains("NoSuchBucket") && text.contains("HINT: "), "{text}");
}
