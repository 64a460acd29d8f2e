//! pgsidecar as it is built here, with its defaults.

use std::{path::Path, process::Command};

use super::{Backup, Backups, Kind, PROCESSES, Tool, aws};
use crate::{
    run::{Daemon, Place},
    support::{Sidecar, command, run},
};

/// A daemon beside the server, and the helper that PostgreSQL calls.
pub struct Pgsidecar;

impl Pgsidecar {
    /// The helper, set to reach the daemon of this place.
    pub fn helper(place: &Place) -> Command {
        let mut helper = command(Sidecar::helper());
        helper.arg("--address").arg(format!("127.0.0.1:{}", place.port));
        helper
    }

    /// The daemon of this place, with the store at this endpoint.
    pub fn daemon(place: &Place, endpoint: &str) -> Daemon {
        let mut daemon = Pgsidecar::program(place, endpoint);
        daemon.arg("run").env("PGDATA", &place.data).env("PGHOST", &place.socket).env("PGUSER", "postgres");
        Daemon::start(place, daemon)
    }

    /// The program with the settings of this place.
    fn program(place: &Place, endpoint: &str) -> Command {
        let mut program = command(Sidecar::program());
        program
            .envs(aws(place))
            .env("AWS_ENDPOINT_URL_S3", endpoint)
            .env("SSL_CERT_FILE", place.store.certificates())
            .env("PGSIDECAR_REPOSITORY", format!("s3://{}/{}", place.store.bucket(), place.repository))
            .env("PGSIDECAR_WAL_LISTEN", format!("127.0.0.1:{}", place.port))
            .env("PGSIDECAR_HEALTH_LISTEN", "127.0.0.1:0")
            .env("PGSIDECAR_CONTROL_SOCKET", place.directory.join("control.sock"))
            .env("PGSIDECAR_HELPER", Sidecar::helper())
            .env("PGSIDECAR_PARALLELISM", PROCESSES.to_string())
            .current_dir(&place.directory);
        program
    }

    fn call(place: &Place, arguments: &str) -> String {
        format!("{} --address 127.0.0.1:{} {arguments}", Sidecar::helper().display(), place.port)
    }
}

impl Tool for Pgsidecar {
    fn name(&self) -> &'static str {
        "pgsidecar"
    }

    fn process(&self) -> &'static str {
        "pgsidecar"
    }

    fn version(&self) -> String {
        run(command(Sidecar::program()).arg("--version")).trim().to_owned()
    }

    fn environment(&self, _: &Place) -> Vec<(String, String)> {
        Vec::new()
    }

    fn create_repository(&self, _: &Place) {}

    fn configure(&self, _: &Place) {}

    fn start(&self, place: &Place) -> Option<Daemon> {
        Some(Pgsidecar::daemon(place, &place.store.endpoint()))
    }

    fn archive_command(&self, place: &Place) -> String {
        Pgsidecar::call(place, "archive %p")
    }

    fn restore_command(&self, place: &Place) -> String {
        Pgsidecar::call(place, "restore %f %p")
    }

    fn backups(&self) -> Option<&dyn Backups> {
        Some(self)
    }
}

impl Backups for Pgsidecar {
    fn directory(&self) -> &'static str {
        "backups"
    }

    fn create(&self, place: &Place, kind: Kind) -> Command {
        let mut program = Pgsidecar::program(place, &place.store.endpoint());
        let kind = if kind == Kind::Full { "full" } else { "incremental" };
        program.args(["backup", "create", "--fast", "--type", kind]);
        program
    }

    fn newest(&self, place: &Place) -> Backup {
        let mut program = Pgsidecar::program(place, &place.store.endpoint());
        let told = run(program.args(["backup", "list", "--json"]));
        let backups: serde_json::Value = serde_json::from_str(&told).unwrap();
        let backup = backups.as_array().unwrap().iter().max_by_key(|backup| backup["stop_lsn"].as_str().map(lsn));
        let backup = backup.expect("there is a backup");
        let kind = if backup["parent"].is_null() { Kind::Full } else { Kind::Incremental };
        Backup { id: backup["id"].as_str().unwrap().to_owned(), kind }
    }

    fn restore(&self, place: &Place, backup: &str, to: &Path) -> Command {
        let mut program = Pgsidecar::program(place, &place.store.endpoint());
        program.args(["restore", "run", "--backup", backup, "--target-immediate", "--to"]).arg(to);
        program
    }
}

fn lsn(text: &str) -> u64 {
    let (high, low) = text.split_once('/').unwrap();
    (u64::from_str_radix(high, 16).unwrap() << 32) | u64::from_str_radix(low, 16).unwrap()
}
