//! A real S3 server, s3s-fs, for one test.

use std::{
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use pgsidecar::store::S3Config;

pub const BUCKET: &str = "backups";
pub const ACCESS_KEY: &str = "test-access-key";
pub const SECRET_KEY: &str = "test-secret-key";

/// A running server with an empty bucket. Stopped, and its files removed, on drop.
pub struct Server {
    child: Child,
    port: u16,
    files: tempfile::TempDir,
}

impl Server {
    pub fn start() -> Server {
        Server::start_with(&["--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY])
    }

    /// A server that asks nobody who they are.
    pub fn start_open() -> Server {
        Server::start_with(&[])
    }

    fn start_with(arguments: &[&str]) -> Server {
        let binary = binary();
        let files = tempfile::tempdir().unwrap();
        std::fs::create_dir(files.path().join(BUCKET)).unwrap();
        // Someone else can take the port before the server does; then it exits, and another is tried.
        for _ in 0..5 {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let mut child = Command::new(&binary)
                .args(["--host", "127.0.0.1", "--port", &port.to_string()])
                .args(arguments)
                .arg(files.path())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let patience = Instant::now() + Duration::from_secs(10);
            while child.try_wait().unwrap().is_none() && Instant::now() < patience {
                if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                    return Server { child, port, files };
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            child.kill().ok();
            child.wait().ok();
        }
        panic!("s3s-fs did not start");
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// A repository in the server's bucket.
    pub fn config(&self) -> S3Config {
        let config = S3Config {
            bucket: BUCKET.to_owned(),
            prefix: "/shop/db/".to_owned(),
            endpoint: Some(format!("http://{}", self.address())),
            ..S3Config::default()
        };
        config.with_credentials(ACCESS_KEY, SECRET_KEY)
    }

    /// How many multipart uploads the server knows of. It can't list them by its API; each has a file.
    pub fn unfinished_uploads(&self) -> usize {
        let names = std::fs::read_dir(self.files.path()).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| name.to_string_lossy().starts_with(".upload")).count()
    }

    pub fn bucket_files(&self) -> PathBuf {
        self.files.path().join(BUCKET)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("S3S_FS") {
        return path.into();
    }
    let home = std::env::var_os("HOME").unwrap_or_default();
    let path = Path::new(&home).join(".cache/pgsidecar-dev/s3s-fs-0.14.1/bin/s3s-fs");
    assert!(path.exists(), "no s3s-fs at {}: `make test` installs it, or name one by S3S_FS", path.display());
    path
}
