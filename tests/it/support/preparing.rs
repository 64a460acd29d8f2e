//! A pod of a StatefulSet, as `pgsidecar prepare` meets it: its volume, its init container and the official image's
//! entrypoint.

use std::{fs, path::Path, process::Output};

use super::{Postgres, Repository, Scratch, Sidecar, command, told};

/// What comes of the image's entrypoint.
#[derive(Debug, PartialEq, Eq)]
pub enum Entrypoint {
    /// It starts PostgreSQL on what is there.
    Starts,
    /// It has made a new database.
    Initialised,
    /// initdb refuses.
    Refuses,
}

/// What docker-entrypoint.sh does: `if [ -s "$PGDATA/PG_VERSION" ]`, start; otherwise initdb.
pub fn entrypoint(data: &Path, major: u32) -> Entrypoint {
    if fs::metadata(data.join("PG_VERSION")).is_ok_and(|meta| meta.len() > 0) {
        return Entrypoint::Starts;
    }
    let mut initdb = command(Postgres::bin(major).join("initdb"));
    initdb.arg("-D").arg(data).args(["-A", "trust", "-U", "postgres", "--no-sync"]).current_dir("/");
    match initdb.output().unwrap().status.success() {
        true => Entrypoint::Initialised,
        false => Entrypoint::Refuses,
    }
}

/// A server that archives as this pod of namespace shop, with a daemon beside it.
pub fn pod(scratch: &Scratch, name: &str, major: u32, repository: &Repository) -> (Postgres, Sidecar) {
    let mut postgres = Postgres::initdb(scratch, major, &["--wal-segsize=1"]);
    let mut sidecar = Sidecar::new(scratch, &postgres, repository);
    be(&mut sidecar, name);
    postgres.configure(&sidecar.archive_settings().iter().map(String::as_str).collect::<Vec<_>>());
    postgres.start(&[]);
    sidecar.start();
    (postgres, sidecar)
}

/// Another pod, with an empty volume: the directory `name` of the scratch.
pub fn empty_pod(scratch: &Scratch, name: &str, major: u32, repository: &Repository) -> (Postgres, Sidecar) {
    let postgres = Postgres::on(scratch, scratch.dir(name), major);
    let mut sidecar = Sidecar::another(scratch, &format!("sidecar-{name}"), &postgres, repository);
    be(&mut sidecar, name);
    (postgres, sidecar)
}

/// Gives a sidecar the pod's name.
pub fn be(sidecar: &mut Sidecar, pod: &str) {
    sidecar.set("POD_NAMESPACE", "shop");
    sidecar.set("POD_NAME", pod);
}

/// Stops the pod in order, as both containers are told to at once; the volume stays.
pub fn stop(postgres: &mut Postgres, sidecar: &mut Sidecar) {
    end(postgres, sidecar, "fast");
}

/// PostgreSQL crashes, and then the pod ends. What was committed last is in no whole segment then: an orderly stop would
/// have switched.
pub fn crash(postgres: &mut Postgres, sidecar: &mut Sidecar) {
    end(postgres, sidecar, "immediate");
}

fn end(postgres: &mut Postgres, sidecar: &mut Sidecar, mode: &str) {
    postgres.tell_to_stop(mode);
    sidecar.tell_to_stop();
    postgres.wait_for_end();
    assert!(sidecar.wait_for_end().success(), "{}", sidecar.log());
}

/// The volume is gone, and a new one in its place.
pub fn lose_volume(postgres: &Postgres) {
    fs::remove_dir_all(&postgres.data).unwrap();
}

/// Runs the init container.
pub fn prepare(sidecar: &Sidecar, settings: &[(&str, &str)]) -> Output {
    sidecar.command(Sidecar::program()).envs(settings.iter().copied()).arg("prepare").output().unwrap()
}

/// The same; it has to end with this code. Answers with what it said.
#[track_caller]
pub fn prepared(sidecar: &Sidecar, code: i32, settings: &[(&str, &str)]) -> String {
    let output = prepare(sidecar, settings);
    assert_eq!(output.status.code(), Some(code), "{settings:?}\n{}", told(&output));
    told(&output)
}

/// Starts the pod's containers as they are where the webhook injects them: restore_command stands on the command line and
/// knows neither the system nor the tail.
pub fn start(postgres: &mut Postgres, sidecar: &mut Sidecar) {
    sidecar.start();
    postgres.spawn(&[
        "-c",
        &restore_command(sidecar),
        "-c",
        &sidecar.archive_settings()[1].replace(" = '", "=").replace('\'', ""),
    ]);
}

fn restore_command(sidecar: &Sidecar) -> String {
    format!("restore_command={} --address 127.0.0.1:{} restore %f %p", Sidecar::helper().display(), sidecar.port)
}

/// Whether a directory holds nothing, or isn't there.
pub fn is_empty(path: &Path) -> bool {
    fs::read_dir(path).map_or(true, |mut entries| entries.next().is_none())
}

/// The SHA-256 of each object below a cluster's name.
pub fn fingerprint(look: &super::Look, cluster: &str) -> Vec<(String, String)> {
    let of_cluster = look.keys().into_iter().filter(|(key, _)| key.as_str().starts_with(&format!("{cluster}/")));
    of_cluster
        .map(|(key, _)| {
            let bytes = look.object(&key).0;
            (key.to_string(), pgsidecar_core::Sha256Digest::of(&bytes).to_string())
        })
        .collect()
}
