//! A real S3 server for one test: the one that the run is about.
//!
//! `PGSIDECAR_TEST_STORE` says which. `s3s`, the default, is s3s-fs: it honours `If-None-Match` (by a look before the
//! write). `garage` is Garage: it ignores it and replaces the object, but can list unfinished uploads. A test that needs
//! one of the two has its name in its own.
#![allow(dead_code, reason = "two test binaries share this, and neither uses all of it")]

use std::{
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use pgsidecar::store::S3Config;

/// A running server with an empty bucket. Stopped, and its files removed, on drop.
pub struct Server {
    process: Process,
    port: u16,
    bucket: String,
    access_key: String,
    secret_key: String,
    files: tempfile::TempDir,
}

enum Process {
    S3sFs(Child),
    /// Not a child of ours: `scripts/garage.sh` starts and stops it.
    Garage,
}

impl Server {
    /// The server of this run.
    pub fn start() -> Server {
        if is_garage_run() { Server::start_garage() } else { Server::start_s3s(true) }
    }

    /// s3s-fs, in every run, as a server that asks nobody who they are.
    pub fn start_s3s_open() -> Server {
        Server::start_s3s(false)
    }

    fn start_s3s(asks_for_keys: bool) -> Server {
        let binary = s3s_fs();
        let (bucket, access_key, secret_key) = ("backups", "test-access-key", "test-secret-key");
        let files = tempfile::tempdir().unwrap();
        std::fs::create_dir(files.path().join(bucket)).unwrap();
        let keys = ["--access-key", access_key, "--secret-key", secret_key];
        let (child, port) = with_a_free_port("s3s-fs", |port| {
            let mut command = Command::new(&binary);
            command.args(["--host", "127.0.0.1", "--port", &port.to_string()]);
            command.args(if asks_for_keys { keys.as_slice() } else { &[] }).arg(files.path());
            let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            let patience = Instant::now() + Duration::from_secs(10);
            while child.try_wait().unwrap().is_none() && Instant::now() < patience {
                if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                    return Ok(child);
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            child.kill().ok();
            Err(format!("it ended, or did not listen: {}", child.wait().unwrap()))
        });
        let [bucket, access_key, secret_key] = [bucket, access_key, secret_key].map(str::to_owned);
        Server { process: Process::S3sFs(child), port, bucket, access_key, secret_key, files }
    }

    fn start_garage() -> Server {
        let files = tempfile::tempdir().unwrap();
        let (said, port) = with_a_free_port("Garage", |port| {
            let output = garage("start", files.path()).arg(port.to_string()).output().unwrap();
            let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            if output.status.success() { Ok(said(&output.stdout)) } else { Err(said(&output.stderr)) }
        });
        let value = |name: &str| {
            let found = said.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            found.unwrap_or_else(|| panic!("garage.sh did not say {name}:\n{said}")).to_owned()
        };
        let [bucket, access_key, secret_key] = ["BUCKET", "ACCESS_KEY", "SECRET_KEY"].map(value);
        Server { process: Process::Garage, port, bucket, access_key, secret_key, files }
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address())
    }

    pub fn bucket(&self) -> &str {
        &self.bucket
    }

    pub fn access_key(&self) -> &str {
        &self.access_key
    }

    pub fn secret_key(&self) -> &str {
        &self.secret_key
    }

    /// Whether it refuses to replace an object where `If-None-Match: *` forbids it.
    pub fn honours_conditional_creation(&self) -> bool {
        self.is_s3s()
    }

    /// Whether it keeps objects as files of their keys' names, with all the limits that come of it.
    pub fn is_s3s(&self) -> bool {
        matches!(self.process, Process::S3sFs(_))
    }

    /// A repository in the server's bucket.
    pub fn config(&self) -> S3Config {
        let config = S3Config {
            bucket: self.bucket.clone(),
            prefix: "/shop/db/".to_owned(),
            endpoint: Some(self.endpoint()),
            ..S3Config::default()
        };
        config.with_credentials(&self.access_key, &self.secret_key)
    }

    /// How many multipart uploads s3s-fs knows of. It can't list them by its API; each has a file.
    pub fn s3s_unfinished_uploads(&self) -> usize {
        assert!(self.is_s3s());
        let names = std::fs::read_dir(self.files.path()).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| name.to_string_lossy().starts_with(".upload")).count()
    }

    /// Where s3s-fs keeps the bucket's objects.
    pub fn s3s_bucket_files(&self) -> PathBuf {
        assert!(self.is_s3s());
        self.files.path().join(&self.bucket)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        match &mut self.process {
            Process::S3sFs(child) => {
                child.kill().ok();
                child.wait().ok();
            }
            Process::Garage => {
                garage("stop", self.files.path()).status().ok();
            }
        }
    }
}

/// Whether this run is about Garage.
pub fn is_garage_run() -> bool {
    match std::env::var("PGSIDECAR_TEST_STORE").as_deref() {
        Err(_) | Ok("" | "s3s") => false,
        Ok("garage") => true,
        Ok(other) => panic!("PGSIDECAR_TEST_STORE={other}: it is s3s or garage"),
    }
}

/// Someone else can take a free port before the server does; then it fails, and another is tried.
fn with_a_free_port<T>(server: &str, mut start: impl FnMut(u16) -> Result<T, String>) -> (T, u16) {
    let mut failure = String::new();
    for _ in 0..5 {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        match start(port) {
            Ok(started) => return (started, port),
            Err(error) => failure = error,
        }
    }
    panic!("{server} did not start: {failure}");
}

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts")
}

fn garage(verb: &str, directory: &Path) -> Command {
    let mut command = Command::new(scripts().join("garage.sh"));
    command.arg(verb).arg(directory).stdin(Stdio::null());
    command
}

/// By `S3S_FS`, or where the scripts have put it.
fn s3s_fs() -> PathBuf {
    let path = std::env::var_os("S3S_FS").map_or_else(
        || {
            let mut ask = Command::new("bash");
            ask.args(["-c", "source \"$0/lib.sh\" && s3s_fs"]).arg(scripts());
            PathBuf::from(String::from_utf8(ask.output().unwrap().stdout).unwrap().trim_end())
        },
        PathBuf::from,
    );
    assert!(path.exists(), "no s3s-fs at {}: `make test` installs it, or name one by S3S_FS", path.display());
    path
}
