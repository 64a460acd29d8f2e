//! Settings and directories that are wrong, and secrets that nobody is told, whatever goes wrong.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown},
    process::Output,
};

use crate::support::{
    Postgres, Proxy, Repository, Scratch, Sidecar, Way, beside, command, preparing::prepared, server_user, told,
    wait_until,
};

const MB: u32 = 1 << 20;
const NAME: &str = "000000010000000000000005";
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);

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
        assert!(text.contains(&format!("runAsUser: {theirs}")) && text.contains("pgsidecar.dev/run-as-user"), "{text}");
    }
    assert_eq!(sidecar.metric("pgsidecar_data_directory_foreign"), "1");
    // At once, and also where there is nothing to be done with it.
    sidecar.kill();
    sidecar.set("PGSIDECAR_REPOSITORY", "");
    sidecar.start();
    let problems = sidecar.json(&["status"])["problems"].to_string();
    assert!(problems.contains("PGSIDECAR_REPOSITORY") && problems.contains(&format!("user {theirs}")), "{problems}");
    let log = sidecar.log();
    let (_, log) = log.rsplit_once("pgsidecar is up").unwrap();
    assert!(log.lines().nth(1).unwrap().contains(&format!("belongs to user {theirs}")), "{log}");
    assert!(prepared(&sidecar, 0, &[]).contains(&format!("user of PostgreSQL, {theirs}")));
    chown(&postgres.data, Some(ours), None).unwrap();
    assert_eq!(sidecar.metric("pgsidecar_data_directory_foreign"), "0");
    // A volume of root's that nobody was given, and one that was opened to our group.
    let volume = scratch.path().join("volume");
    fs::create_dir(&volume).unwrap();
    sidecar.kill();
    sidecar.set("PGDATA", volume.to_str().unwrap());
    sidecar.start();
    let problems = || sidecar.json(&["status"])["problems"].to_string();
    assert!(
        problems().contains("belongs to user 0") && problems().contains("securityContext.fsGroup"),
        "{}",
        problems()
    );
    chown(&volume, None, Some(server_user().unwrap().1)).unwrap();
    fs::set_permissions(&volume, fs::Permissions::from_mode(0o2775)).unwrap();
    assert!(!problems().contains("belongs to"), "{}", problems());
}

#[test]
fn root_a_data_directory_of_another_user_that_can_be_read_is_a_warning_pg15() {
    let scratch = Scratch::new();
    let (mut postgres, mut sidecar) =
        beside(&scratch, 15, &["-g", "--wal-segsize=1"], &Repository::directory(&scratch));
    let (ours, gid) = server_user().expect("this test runs as root");
    let theirs = ours + 1;
    chown(&postgres.data, Some(theirs), Some(gid)).unwrap();
    sidecar.start();
    assert_eq!(sidecar.put(NAME, &postgres.segment(NAME, MB, 1)).status, 200);
    let status = sidecar.json(&["status"]);
    assert_eq!((&status["state"], &status["problems"]), (&"ok".into(), &serde_json::json!([])));
    let says = format!("belongs to user {theirs}, and pgsidecar runs as user {ours}");
    let check = told(&sidecar.cli(&["check"]));
    for text in
        [status["warnings"].to_string(), sidecar.ok(&["status"]), sidecar.log(), check, prepared(&sidecar, 0, &[])]
    {
        assert!(text.contains(&says), "{text}");
    }
    let metric = |name: &str| sidecar.metric(&format!("pgsidecar_{name}"));
    assert_eq!(["degraded", "warnings", "data_directory_foreign"].map(metric), ["0", "1", "1"].map(str::to_owned));
    chown(&postgres.data, Some(ours), None).unwrap();
    postgres.start(&[]);
}

fn a_server_that_does_not_archive_through_us_is_told(major: u32, with_library: &str) {
    let scratch = Scratch::new();
    let (mut postgres, mut sidecar) = beside(&scratch, major, &["--wal-segsize=1"], &Repository::directory(&scratch));
    sidecar.start();
    let ours = sidecar.archive_settings()[1].replace(" = '", "=").replace('\'', "");
    let list = |sidecar: &Sidecar, name: &str| sidecar.json(&["status"])[name].to_string();
    let found = |sidecar: &Sidecar, name: &str, says: &str| {
        wait_until(says, PATIENCE, || list(sidecar, name).contains(says));
        list(sidecar, name)
    };
    let restart = |postgres: &mut Postgres, sidecar: &Sidecar, options: &[&str]| {
        postgres.stop("fast");
        wait_until("it's forgotten", PATIENCE, || {
            list(sidecar, "problems") == "[]" && list(sidecar, "warnings") == "[]"
        });
        postgres.start(options);
    };
    restart(&mut postgres, &sidecar, &[]);
    let problem = found(&sidecar, "problems", "archive_mode is off");
    let helper = format!("archive_command = '{} archive %p'", Sidecar::helper().display());
    assert!(problem.contains(&helper) && problem.contains("restart PostgreSQL"), "{problem}");
    assert_eq!(sidecar.metric("pgsidecar_degraded"), "1");
    let error = sidecar.log().lines().find(|line| line.contains("archive_mode is off")).unwrap().to_owned();
    assert!(error.contains("ERROR") && error.contains(&helper), "{error}");

    restart(&mut postgres, &sidecar, &["-c", "archive_mode=on"]);
    found(&sidecar, "problems", "archive_command is empty");
    restart(&mut postgres, &sidecar, &["-c", "archive_mode=on", "-c", &ours, "-c", "archive_library=basic_archive"]);
    found(&sidecar, "problems", with_library);
    assert!(told(&sidecar.cli(&["check"])).contains(with_library));

    // Somebody's own script may be ours as well: who asks is known.
    restart(&mut postgres, &sidecar, &["-c", "archive_mode=on", "-c", "archive_command=true"]);
    found(&sidecar, "problems", "archive_command is true, which doesn't call pgsidecar");
    let name = postgres.switch_wal();
    let asked = sidecar.wal(&postgres, &["archive", &format!("pg_wal/{name}")]);
    assert!(asked.status.success(), "{}", told(&asked));
    assert_eq!(list(&sidecar, "problems"), "[]");

    // What the command line outranks; and who may not read the files isn't told, and told everything else.
    postgres.configure(&["archive_command = 'cp %p /archive/%f'", "restore_command = 'cp /archive/%f %p'"]);
    restart(&mut postgres, &sidecar, &["-c", "archive_mode=on", "-c", &ours]);
    let warnings = found(&sidecar, "warnings", "the server's command line outranks");
    assert!(warnings.contains("archive_command is") && warnings.contains("postgresql.conf"), "{warnings}");
    assert!(!warnings.contains("restore_command"), "that one isn't outranked: {warnings}");
    let check = told(&sidecar.cli(&["check"]));
    assert!(check.contains("WARNING  archiving") && check.contains("outranks"), "{check}");
    assert_eq!(
        ["degraded", "warnings"].map(|name| sidecar.metric(&format!("pgsidecar_{name}"))),
        ["0", "1"].map(str::to_owned)
    );
    assert!(sidecar.ok(&["status"]).contains("Warning         archive_command is"));
    postgres.sql("CREATE ROLE backup LOGIN; GRANT pg_monitor TO backup");
    sidecar.kill();
    sidecar.set("PGUSER", "backup");
    sidecar.start();
    restart(&mut postgres, &sidecar, &["-c", "archive_mode=on", "-c", "archive_command=true"]);
    found(&sidecar, "problems", "archive_command is true");
    assert_eq!(list(&sidecar, "warnings"), "[]");
    assert!(!postgres.log().contains("permission denied"), "{}", postgres.log());
}

#[test]
fn a_server_that_does_not_archive_through_us_is_told_pg15() {
    a_server_that_does_not_archive_through_us_is_told(15, "archive_command is not used");
}

#[test]
fn a_server_that_does_not_archive_through_us_is_told_pg17() {
    a_server_that_does_not_archive_through_us_is_told(17, "PostgreSQL refuses both together");
}

fn what_check_explains_is_enough(major: u32) {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (mut postgres, mut sidecar) = beside(&scratch, major, &["--wal-segsize=1"], &repository);
    let ours = sidecar.archive_settings()[1].replace(" = '", "=").replace('\'', "");
    postgres.configure(&["archive_command = 'cp %p /archive/%f'"]);
    postgres.start(&["-c", "archive_mode=on", "-c", &ours]);
    let explained = sidecar.ok(&["check", "--explain"]);
    let (sql, policy) = explained.split_once("-- S3:").unwrap();
    assert!(policy.contains("s3:PutObject"));
    postgres.sql(sql);
    postgres.sql("CREATE TABLE t AS SELECT 7 AS n");
    sidecar.set("PGUSER", "pgsidecar");
    sidecar.set("PG_BINDIR", &Postgres::bin(major).display().to_string());
    sidecar.start();
    let output = sidecar.cli(&["check"]);
    let check = told(&output);
    assert!(output.status.success() && check.contains("outranks") && !check.contains("FAILED"), "{check}");
    assert_eq!(check.matches("WARNING").count(), 1, "{check}");
    sidecar.ok(&["backup", "create", "--fast"]);
    assert_eq!(sidecar.json(&["dump", "create"])["globals"]["role_passwords"], true);
    wait_until("it's told", PATIENCE, || sidecar.json(&["status"])["warnings"].to_string().contains("outranks"));
}

#[test]
fn what_check_explains_is_enough_pg15() {
    what_check_explains_is_enough(15);
}

#[test]
fn what_check_explains_is_enough_pg17() {
    what_check_explains_is_enough(17);
}

#[test]
fn a_server_that_can_not_be_asked_is_told_in_time_pg15() {
    let scratch = Scratch::new();
    let (mut postgres, mut sidecar) = beside(&scratch, 15, &[], &Repository::directory(&scratch));
    sidecar.set("PGUSER", "nobody");
    sidecar.start();
    postgres.start(&[]);
    let warnings = || sidecar.json(&["status"])["warnings"].to_string();
    wait_until("it's told", PATIENCE, || warnings().contains("can't be asked how it archives"));
    assert!(warnings().contains("role \\\"nobody\\\" does not exist"), "{}", warnings());
    assert!(postgres.log().matches("\"nobody\" does not exist").count() <= 3, "it's asked gently: {}", postgres.log());
    assert_eq!(sidecar.json(&["status"])["state"], "ok");
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
