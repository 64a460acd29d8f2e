//! Settings and directories that are wrong, and secrets that nobody is told, whatever goes wrong.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown},
    process::Output,
};

use crate::support::{Proxy, Repository, Scratch, Sidecar, Way, beside, command, server_user, told, wait_until};

const MB: u32 = 1 << 20;
const NAME: &str = "000000010000000000000005";

#[test]
fn all_that_is_wrong_with_the_settings_is_told_at_once() {
    let wrong = [
        ("PGSIDECAR_REPOSITORY", "ftp://nowhere"),
        ("PGSIDECAR_CLUSTER", "../other"),
        ("PGDATA", "relative/data"),
        ("PGPORT", "0"),
        ("AWS_ENDPOINT_URL_S3", "minio:9000"),
        ("PGSIDECAR_S3_PATH_STYLE", "maybe"),
        ("PGSIDECAR_COMPRESSION_LEVEL", "20"),
        ("PGSIDECAR_PARALLELISM", "0"),
        ("PGSIDECAR_PART_SIZE", "much"),
        ("PGSIDECAR_WAL_LISTEN", "0.0.0.0:7433"),
        ("PGSIDECAR_HEALTH_LISTEN", "everywhere"),
        ("PGSIDECAR_DRAIN_TIMEOUT", "soon"),
        ("PGSIDECAR_LOG", "loud"),
        ("PGSIDECAR_LOG_FORMAT", "xml"),
    ];
    for arguments in [&["backup", "list"][..], &["check"], &["restore", "run", "--to", "/nonexistent/x"]] {
        let output = command(Sidecar::program()).args(arguments).envs(wrong).output().unwrap();
        assert_eq!(output.status.code(), Some(78), "{arguments:?} {}", told(&output));
        for (name, _) in wrong {
            assert!(told(&output).contains(&format!("{name}: ")), "{name} in {}", told(&output));
        }
        assert!(told(&output).contains("14 settings are wrong"), "{}", told(&output));
    }
    let output = command(Sidecar::program()).args(["backup", "list"]).output().unwrap();
    assert_eq!(output.status.code(), Some(78));
    assert!(told(&output).contains("PGSIDECAR_REPOSITORY: not set"), "{}", told(&output));
}

/// What the daemon and check say about PGDATA.
fn data_directory_problems(sidecar: &mut Sidecar) -> [String; 3] {
    sidecar.start();
    let answer = sidecar.post(NAME);
    assert_eq!((answer.status, answer.code().as_str()), (503, "data_directory"), "{answer:?}");
    assert_eq!(sidecar.metric("pgsidecar_degraded"), "1");
    let check = sidecar.cli(&["check"]);
    assert_eq!(check.status.code(), Some(1));
    [answer.text(), sidecar.json(&["status"])["problems"].to_string(), told(&check)]
}

#[test]
fn a_data_directory_that_is_none_is_named_with_what_to_do_pg15() {
    let scratch = Scratch::new();
    let (postgres, mut sidecar) = beside(&scratch, 15, &[], &Repository::directory(&scratch));
    let (empty, missing) = (scratch.dir("empty"), scratch.path().join("missing"));
    for (path, says) in [(&empty, "has no PG_VERSION"), (&missing, "can't be read")] {
        sidecar.kill();
        sidecar.set("PGDATA", path.to_str().unwrap());
        for text in data_directory_problems(&mut sidecar) {
            assert!(text.contains(path.to_str().unwrap()) && text.contains(says), "{text}");
        }
    }
    // It's well again as soon as there is one.
    fs::remove_dir(&empty).unwrap();
    fs::rename(&postgres.data, &missing).unwrap();
    fs::write(missing.join("pg_wal").join(NAME), "").unwrap();
    assert_eq!(sidecar.post(NAME).code(), "invalid_segment");
}

#[test]
fn root_a_data_directory_of_another_user_is_told_with_both_users_pg15() {
    let scratch = Scratch::new();
    let (postgres, mut sidecar) = beside(&scratch, 15, &[], &Repository::directory(&scratch));
    let ours = server_user().expect("this test runs as root").0;
    let theirs = ours + 1;
    assert_eq!(fs::metadata(&postgres.data).unwrap().permissions().mode() & 0o777, 0o700);
    chown(&postgres.data, Some(theirs), None).unwrap();
    for text in data_directory_problems(&mut sidecar) {
        assert!(text.contains(&format!("belongs to user {theirs}, and pgsidecar runs as user {ours}")), "{text}");
        assert!(text.contains(&format!("runAsUser: {theirs}")), "{text}");
    }
    chown(&postgres.data, Some(ours), None).unwrap();
}

#[test]
fn secrets_are_never_told_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let proxy = Proxy::before(&repository);
    let (postgres, mut sidecar) = beside(&scratch, 15, &["--wal-segsize=1"], &repository);
    let secret = repository.environment().into_iter().find(|(name, _)| *name == "AWS_SECRET_ACCESS_KEY").unwrap().1;
    let secrets = [secret.as_str(), "session-token-5eed", "password-5eed", "another-password-5eed"];
    let passfile = scratch.path().join("pgpass");
    fs::write(&passfile, format!("*:*:*:*:{}\n", secrets[3])).unwrap();
    fs::set_permissions(&passfile, fs::Permissions::from_mode(0o644)).unwrap();
    sidecar.set("AWS_ENDPOINT_URL_S3", &proxy.url());
    sidecar.set("PGSIDECAR_LOG", "trace");
    sidecar.set("PGPASSWORD", secrets[2]);
    sidecar.start();

    let mut said: Vec<String> = Vec::new();
    let mut note = |output: &Output| said.push(told(output));
    let segment = postgres.segment(NAME, MB, 1);
    fs::write(postgres.data.join("pg_wal").join(NAME), &segment).unwrap();
    for way in [Way::Open, Way::Refused, Way::Failing(500, "InternalError"), Way::Failing(403, "SignatureDoesNotMatch")]
    {
        proxy.set(way);
        note(&sidecar.wal(&postgres, &["archive", NAME]));
        note(&sidecar.wal(&postgres, &["restore", "--timeout", "1", NAME, "x"]));
        for arguments in [&["backup", "list"][..], &["status", "--json"], &["check"], &["backup", "create"]] {
            note(&sidecar.cli(arguments));
        }
    }
    proxy.set(Way::Open);
    sidecar.set("PGPASSWORD", "");
    sidecar.set("PGPASSFILE", passfile.to_str().unwrap());
    note(&sidecar.cli(&["check"]));
    sidecar.set("AWS_SESSION_TOKEN", secrets[1]);
    note(&sidecar.cli(&["backup", "list"]));
    sidecar.set("PGPORT", "none");
    note(&sidecar.cli(&["backup", "list"]));
    note(&sidecar.cli(&["--help"]));
    said.push(sidecar.health("/metrics").text());
    sidecar.kill();
    sidecar.start();
    wait_until("it's up, with wrong settings", std::time::Duration::from_secs(20), || sidecar.log().contains("PGPORT"));
    said.push(sidecar.log());
    assert!(said.iter().any(|text| text.contains("TRACE") || text.contains("DEBUG")), "the log is as full as can be");
    for text in &said {
        for secret in secrets {
            assert!(!text.contains(secret), "{secret} in {text}");
        }
    }
}
