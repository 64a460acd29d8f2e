//! Restored servers: put into a directory of the scratch, started beside the server that they are copies of.

use std::path::{Path, PathBuf};

use super::{Postgres, Repository, Scratch, Sidecar};

/// What a server is started with that is a copy of another one nearby: it archives nothing.
pub const AS_A_COPY: &[&str] = &["-c", "archive_mode=off"];

/// A server that archives through a running daemon, with more lines in its postgresql.conf.
pub fn archiving_configured(
    scratch: &Scratch,
    major: u32,
    options: &[&str],
    repository: &Repository,
    lines: &[&str],
) -> (Postgres, Sidecar) {
    let mut postgres = Postgres::initdb(scratch, major, options);
    let mut sidecar = Sidecar::new(scratch, &postgres, repository);
    postgres.configure(lines);
    postgres.configure(&sidecar.archive_settings().iter().map(String::as_str).collect::<Vec<_>>());
    postgres.start(&[]);
    sidecar.start();
    (postgres, sidecar)
}

/// Takes a backup; answers with its id.
#[track_caller]
pub fn back_up(sidecar: &Sidecar) -> String {
    sidecar.json(&["backup", "create", "--fast"])["id"].as_str().unwrap().to_owned()
}

/// Restores to the directory `name` of the scratch.
#[track_caller]
pub fn restore(scratch: &Scratch, sidecar: &Sidecar, name: &str, arguments: &[&str]) -> PathBuf {
    let to = scratch.path().join(name);
    sidecar.ok(&[&["restore", "run", "--to", text(&to)], arguments].concat());
    to
}

/// Restores, starts the server as a copy and waits until it is promoted.
#[track_caller]
pub fn restored(scratch: &Scratch, sidecar: &Sidecar, major: u32, name: &str, arguments: &[&str]) -> Postgres {
    let mut postgres = Postgres::on(scratch, restore(scratch, sidecar, name, arguments), major);
    postgres.spawn(AS_A_COPY);
    postgres.wait_for_promotion();
    postgres
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Leaves the current segment and waits until all WAL is in the repository.
pub fn ship_wal(postgres: &Postgres) -> String {
    let name = postgres.switch_wal();
    // PostgreSQL marks the segment a moment after the switch.
    super::wait_until("the segment is archived", std::time::Duration::from_secs(60), || {
        postgres.data.join(format!("pg_wal/archive_status/{name}.done")).exists()
            || !postgres.data.join("pg_wal").join(&name).exists()
    });
    name
}
