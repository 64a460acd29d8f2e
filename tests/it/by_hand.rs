//! The data can be had back without pgsidecar, by the commands of the documentation.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, time::Duration};

use crate::{
    chains::{SUMMARIZED, take},
    support::{
        Postgres, Repository, Scratch, Sidecar, command,
        restoring::{AS_A_COPY, archiving_configured, back_up, ship_wal, text},
        run, wait_until,
    },
};

/// The code blocks of the section, in order: S3, directory.
fn blocks() -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/by-hand.md");
    let document = fs::read_to_string(path).unwrap();
    let section =
        document.split_once("<!-- by-hand: start -->").unwrap().1.split_once("<!-- by-hand: end -->").unwrap().0;
    let blocks: Vec<String> =
        section.split("```bash\n").skip(1).map(|rest| rest.split_once("```").unwrap().0.to_owned()).collect();
    assert_eq!(blocks.len(), 2);
    blocks
}

struct Source {
    postgres: Postgres,
    system: String,
    backup: String,
}

/// Rows before and after the backup, and settings that a restore has to get rid of.
fn source(scratch: &Scratch, repository: &Repository, major: u32, kinds: &[&str]) -> (Source, Sidecar) {
    let settings: &[&str] = if major >= 17 { SUMMARIZED } else { &[] };
    let (postgres, sidecar) = archiving_configured(scratch, major, &["--wal-segsize=1"], repository, settings);
    postgres.sql("CREATE TABLE large AS SELECT n, repeat('x', 200) FROM generate_series(1, 5000) n");
    postgres.sql("CREATE TABLE rows AS SELECT 1 AS n");
    postgres.sql("ALTER SYSTEM SET recovery_target_xid = '1'");
    postgres.sql("ALTER SYSTEM SET restore_command = 'false'");
    fs::write(postgres.data.join("standby.signal"), "").unwrap();
    let mut backup = back_up(&sidecar);
    for kind in kinds {
        postgres.sql("UPDATE large SET n = -n WHERE n % 1000 = 1");
        backup = take(&sidecar, kind);
    }
    postgres.sql("INSERT INTO rows VALUES (2)");
    ship_wal(&postgres);
    postgres.sql("INSERT INTO rows VALUES (3)");
    ship_wal(&postgres);
    let system = postgres.sql("SELECT system_identifier FROM pg_control_system()");
    (Source { postgres, system, backup }, sidecar)
}

/// Runs a block as PostgreSQL's user, checks the files and starts the server on them.
fn restores(scratch: &Scratch, source: &Source, block: &str, environment: &[(&str, String)]) {
    let to = scratch.path().join("by hand");
    let mut bash = command("bash");
    bash.arg("-c").arg(block).env("CLUSTER", "main").env("SYSTEM", &source.system).env("BACKUP", &source.backup);
    let path = format!("{}:{}", Postgres::bin(source.postgres.major).display(), std::env::var("PATH").unwrap());
    bash.env("PATH", path).env("PGDATA", &to).envs(environment.iter().map(|(name, value)| (name, value)));
    run(bash.current_dir(scratch.path()));
    run(source.postgres.client("pg_verifybackup").arg("-n").arg(&to));

    let mut copy = Postgres::on(scratch, to, source.postgres.major);
    copy.environment = environment.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
    copy.spawn(AS_A_COPY);
    copy.wait_for_promotion();
    assert_eq!(copy.sql("SELECT string_agg(n::text, ' ' ORDER BY n) FROM rows"), "1 2 3", "{}", copy.log());
    let large = "SELECT count(*), sum(n) FROM large";
    assert_eq!(copy.sql(large), source.postgres.sql(large));
}

/// The answer of the restore_command that the block has written.
fn fetch(scratch: &Scratch, name: &str, environment: &[(&str, String)]) -> Option<i32> {
    let mut fetch = command(scratch.path().join("by hand.fetch-wal"));
    fetch.arg(name).arg("fetched").envs(environment.iter().map(|(name, value)| (name, value)));
    fetch.current_dir(scratch.path()).output().unwrap().status.code()
}

const NO_SUCH_SEGMENT: &str = "0000000100000000000000FF";

#[test]
fn a_backup_in_a_directory_is_restored_by_the_documented_commands_pg17() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (source, mut sidecar) = source(&scratch, &repository, 17, &[]);
    sidecar.stop();
    let environment = [("REPOSITORY", text(&scratch.path().join("repository")).to_owned())];
    restores(&scratch, &source, &blocks()[1], &environment);
    assert_eq!(fetch(&scratch, NO_SUCH_SEGMENT, &[]), Some(1));
    fs::rename(scratch.path().join("repository"), scratch.path().join("unmounted")).unwrap();
    assert_eq!(fetch(&scratch, NO_SUCH_SEGMENT, &[]), Some(255));
}

#[test]
fn a_chain_in_a_directory_is_restored_by_the_documented_commands_pg17() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (source, mut sidecar) = source(&scratch, &repository, 17, &["incremental", "incremental"]);
    sidecar.stop();
    let environment = [("REPOSITORY", text(&scratch.path().join("repository")).to_owned())];
    restores(&scratch, &source, &blocks()[1], &environment);
}

#[test]
fn a_backup_in_s_3_is_restored_by_the_documented_commands_awscli_pg15() {
    restored_from_s3(15, &[]);
}

#[test]
fn a_chain_in_s_3_is_restored_by_the_documented_commands_awscli_pg17() {
    restored_from_s3(17, &["incremental", "differential"]);
}

fn restored_from_s3(major: u32, kinds: &[&str]) {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (source, mut sidecar) = source(&scratch, &repository, major, kinds);
    sidecar.stop();
    let Repository::S3(server) = &repository else { unreachable!() };
    // Debian 12's aws knows the endpoint only as an option.
    let aws = ["/usr/bin/aws", "aws"]
        .into_iter()
        .find(|aws| command(aws).arg("--version").output().is_ok_and(|said| said.status.success()));
    let aws = aws.expect("the AWS command-line tool: `make test` installs it");
    let bin = scratch.dir("bin");
    fs::write(bin.join("aws"), format!("#!/bin/sh\nexec {aws} --endpoint-url http://{} \"$@\"\n", server.address()))
        .unwrap();
    fs::set_permissions(bin.join("aws"), fs::Permissions::from_mode(0o755)).unwrap();
    let postgres = Postgres::bin(major);
    let path = format!("{}:{}:{}", bin.display(), postgres.display(), std::env::var("PATH").unwrap());
    let mut environment = vec![
        ("PATH", path),
        ("HOME", text(scratch.path()).to_owned()),
        ("AWS_REGION", "us-east-1".to_owned()),
        ("AWS_MAX_ATTEMPTS", "1".to_owned()),
        ("AWS_ACCESS_KEY_ID", server.access_key().to_owned()),
        ("AWS_SECRET_ACCESS_KEY", server.secret_key().to_owned()),
        ("BUCKET", server.bucket().to_owned()),
        ("PREFIX", "it".to_owned()),
    ];
    restores(&scratch, &source, &blocks()[0], &environment);

    assert_eq!(fetch(&scratch, NO_SUCH_SEGMENT, &environment), Some(1), "a definite 404");
    // Wrong keys and a store that is down are no end of the archive.
    for variable in &mut environment {
        if variable.0 == "AWS_SECRET_ACCESS_KEY" {
            "wrong".clone_into(&mut variable.1);
        }
    }
    assert_eq!(fetch(&scratch, NO_SUCH_SEGMENT, &environment), Some(255));
    let address = server.address();
    drop(repository);
    wait_until("the store is down", Duration::from_secs(10), || std::net::TcpStream::connect(&address).is_err());
    assert_eq!(fetch(&scratch, NO_SUCH_SEGMENT, &environment), Some(255));
}
