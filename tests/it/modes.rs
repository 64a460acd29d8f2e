//! What the kubelet's `fsGroup` does to a database: PostgreSQL refuses it, and `pgsidecar prepare` mends it.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, time::Duration};

use crate::support::{Postgres, Repository, Scratch, Sidecar, command, preparing::prepared, run, wait_until};

const PATIENCE: Duration = Duration::from_secs(60);

/// What the kubelet does to a volume for a pod's fsGroup.
fn as_fs_group_does(path: &Path) {
    let meta = fs::symlink_metadata(path).unwrap();
    if meta.is_symlink() {
        return;
    }
    let more = if meta.is_dir() { 0o2770 } else { 0o660 };
    fs::set_permissions(path, fs::Permissions::from_mode(meta.permissions().mode() | more)).unwrap();
    if meta.is_dir() {
        fs::read_dir(path).unwrap().for_each(|entry| as_fs_group_does(&entry.unwrap().path()));
    }
}

/// Starts it as a container without the image's entrypoint does; it has to refuse.
#[track_caller]
fn refuses_to_start(postgres: &mut Postgres, why: &str) {
    postgres.spawn(&[]);
    wait_until("PostgreSQL refuses to start", PATIENCE, || postgres.exited().is_some());
    let log = postgres.log();
    assert!(log.trim_end().lines().rev().take(4).any(|line| line.contains(why)), "{log}");
}

fn a_database_that_fs_group_has_opened_starts(major: u32) {
    let scratch = Scratch::new();
    let mut postgres = Postgres::initdb(&scratch, major, &[]);
    let sidecar = Sidecar::new(&scratch, &postgres, &Repository::directory(&scratch));
    run(command("openssl")
        .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"])
        .args(["-keyout", "server.key", "-out", "server.crt"])
        .current_dir(&postgres.data));
    postgres.configure(&["ssl = on"]);
    postgres.start(&[]);
    postgres.sql("CREATE TABLE rows AS SELECT 1 AS n");
    postgres.stop("fast");

    for key in ["server.key", "own.key"] {
        if key == "own.key" {
            fs::rename(postgres.data.join("server.key"), postgres.data.join(key)).unwrap();
            postgres.configure(&[&format!("ssl_key_file = '{key}'")]);
        }
        as_fs_group_does(&postgres.data);
        refuses_to_start(&mut postgres, "has invalid permissions");
        // What the image's entrypoint does helps with the directory alone.
        fs::set_permissions(&postgres.data, fs::Permissions::from_mode(0o700)).unwrap();
        refuses_to_start(&mut postgres, "has group or world access");
        as_fs_group_does(&postgres.data);

        let text = prepared(&sidecar, 0, &[]);
        for words in ["holds a database", "(its mode was 2770), ", &format!("{key} (its mode was 0660)")] {
            assert!(text.contains(words), "{words:?} isn't in:\n{text}");
        }
        postgres.start(&[]);
        assert_eq!(postgres.sql("SELECT n, current_setting('ssl') FROM rows"), "1|on");
        postgres.stop("fast");
        assert!(!prepared(&sidecar, 0, &[]).contains("its mode was"), "nothing is left to be done");
    }
    // Nothing keeps it from starting, neither what prepare can't know nor what's wrong besides.
    as_fs_group_does(&postgres.data);
    let text = prepared(&sidecar, 0, &[("PGSIDECAR_REPOSITORY", "")]);
    assert!(text.contains("own.key (its mode was 0660)") && text.contains("ERROR"), "{text}");
    postgres.start(&[]);
}

#[test]
fn a_database_that_fs_group_has_opened_starts_pg15() {
    a_database_that_fs_group_has_opened_starts(15);
}

#[test]
fn a_database_that_fs_group_has_opened_starts_pg17() {
    a_database_that_fs_group_has_opened_starts(17);
}
