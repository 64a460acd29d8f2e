//! What the tests are made of: a scratch directory, a PostgreSQL, a repository, a sidecar.
//!
//! PostgreSQL refuses to run as root, and the sidecar runs as the same user as PostgreSQL: as root, the tests start
//! both as `PGSIDECAR_TEST_USER`.

pub mod background;
pub mod increments;
mod look;
mod postgres;
pub mod preparing;
mod proxy;
mod repository;
mod requests;
pub mod restoring;
mod sidecar;
mod wire;

use std::{
    ffi::OsStr,
    fs,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::{Command, Output},
    time::{Duration, Instant},
};

pub use background::{Background, path_with};
pub use look::Look;
pub use postgres::Postgres;
pub use proxy::{Proxy, Way};
pub use repository::Repository;
pub use requests::{connect, exchange, head, segment};
pub use sidecar::{Sidecar, archiving, archiving_with, beside};
pub use wire::{Mode, Wire};

/// A directory for one test, reachable and writable for the servers' user. Removed unless the test fails.
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    pub fn new() -> Scratch {
        let path = tempfile::Builder::new().prefix("it-").tempdir().unwrap().keep();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        give_to_servers(&path);
        Scratch { path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A new directory in it.
    pub fn dir(&self, name: &str) -> PathBuf {
        let path = self.path.join(name);
        fs::create_dir(&path).unwrap();
        give_to_servers(&path);
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("what the test left is in {}", self.path.display());
        } else {
            fs::remove_dir_all(&self.path).unwrap();
        }
    }
}

/// The user that servers run as, if it isn't who we are.
pub fn server_user() -> Option<(u32, u32)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let name = std::env::var("PGSIDECAR_TEST_USER").unwrap_or_else(|_| "postgres".to_owned());
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    let line = passwd.lines().find(|line| line.starts_with(&format!("{name}:"))).expect("the servers' user exists");
    let fields: Vec<&str> = line.split(':').collect();
    Some((fields[2].parse().unwrap(), fields[3].parse().unwrap()))
}

/// Makes a path belong to the servers' user.
pub fn give_to_servers(path: &Path) {
    if let Some((uid, gid)) = server_user() {
        chown(path, Some(uid), Some(gid)).unwrap();
    }
}

/// A command that runs as the servers' user, with nothing of our environment but `PATH`.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = match server_user() {
        None => Command::new(program),
        Some((uid, gid)) => {
            let mut command = Command::new("setpriv");
            command.arg(format!("--reuid={uid}")).arg(format!("--regid={gid}")).arg("--clear-groups").arg(program);
            command
        }
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    command.env_clear().env("PATH", path).env("LC_ALL", "C.UTF-8").env("TZ", "UTC");
    command
}

/// Runs a command and shows what it said if it fails.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}\n{}", told(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// Everything that a command printed.
pub fn told(output: &Output) -> String {
    format!("{}\n{}{}", output.status, String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Waits until a condition holds.
#[track_caller]
pub fn wait_until(what: &str, patience: Duration, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + patience;
    while !condition() {
        assert!(Instant::now() < end, "it did not come true within {patience:?}: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A port on loopback that nobody uses just now.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
