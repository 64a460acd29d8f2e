//! pgsidecar as it is built here, with its defaults.

use std::process::Command;

use super::{Tool, aws};
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
        let path = |name: &str| place.directory.join(name).display().to_string();
        let mut daemon = command(Sidecar::program());
        daemon
            .arg("run")
            .envs(aws(place))
            .env("AWS_ENDPOINT_URL_S3", endpoint)
            .env("SSL_CERT_FILE", place.store.certificates())
            .env("PGSIDECAR_REPOSITORY", format!("s3://{}/{}", place.store.bucket(), place.repository))
            .env("PGDATA", &place.data)
            .env("PGHOST", &place.socket)
            .env("PGUSER", "postgres")
            .env("PGSIDECAR_WAL_LISTEN", format!("127.0.0.1:{}", place.port))
            .env("PGSIDECAR_HEALTH_LISTEN", "127.0.0.1:0")
            .env("PGSIDECAR_CONTROL_SOCKET", path("control.sock"))
            .env("PGSIDECAR_HELPER", Sidecar::helper());
        Daemon::start(place, daemon)
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
}
