//! The store of all tools: s3s-fs, behind nginx for TLS, which pgBackRest insists on.

use std::{
    fs,
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use crate::{
    delay::Delay,
    server::Server,
    support::{Scratch, command, free_port, run, wait_until},
};

/// A running store with one bucket. Ended on drop.
pub struct Store {
    server: Server,
    nginx: Child,
    port: u16,
    certificates: PathBuf,
    latency: Duration,
}

impl Store {
    /// `latency` is how much later than it could the server gets each request that comes by TLS.
    pub fn start(scratch: &Scratch, root: &Path, latency: Duration) -> Store {
        let server = Server::start();
        assert!(server.is_s3s(), "the bench runs with s3s-fs: unset PGSIDECAR_TEST_STORE");
        let directory = scratch.dir("tls");
        certificates(&directory);
        let port = free_port();
        let upstream = if latency.is_zero() { server.address() } else { Delay::before(&server.address(), latency) };
        fs::write(directory.join("nginx.conf"), configuration(port, &upstream)).unwrap();
        let mut nginx = command(root.join("usr/sbin/nginx"));
        nginx.arg("-p").arg(&directory).arg("-c").arg(directory.join("nginx.conf")).arg("-e").arg("nginx.log");
        let nginx = nginx.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let certificates = directory.join("ca.pem");
        let store = Store { server, nginx, port, certificates, latency };
        wait_until("nginx answers", Duration::from_secs(10), || TcpStream::connect(("127.0.0.1", port)).is_ok());
        store
    }

    /// The port of TLS, on loopback.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// How much later than it could the server gets each request that comes by TLS, in milliseconds.
    pub fn latency_ms(&self) -> u64 {
        u64::try_from(self.latency.as_millis()).unwrap_or(u64::MAX)
    }

    /// The server itself, without TLS and without a delay.
    pub fn plain_endpoint(&self) -> String {
        self.server.endpoint()
    }

    pub fn endpoint(&self) -> String {
        format!("https://localhost:{}", self.port)
    }

    pub fn bucket(&self) -> &str {
        self.server.bucket()
    }

    pub fn access_key(&self) -> &str {
        self.server.access_key()
    }

    pub fn secret_key(&self) -> &str {
        self.server.secret_key()
    }

    /// The certificate to be trusted, as a PEM file.
    pub fn certificates(&self) -> &Path {
        &self.certificates
    }

    /// The size of all objects under this prefix.
    pub fn bytes_under(&self, prefix: &str) -> u64 {
        self.sizes(prefix).iter().map(|(_, size)| size).sum()
    }

    /// The size of the objects under this prefix that have a directory of this name in their path.
    pub fn bytes_within(&self, prefix: &str, directory: &str) -> u64 {
        let within = |path: &Path| path.components().any(|component| component.as_os_str() == directory);
        self.sizes(prefix).iter().filter(|(path, _)| within(path)).map(|(_, size)| size).sum()
    }

    /// Reads all objects under this prefix once, so that they lie in the page cache.
    pub fn warm(&self, prefix: &str) {
        let files = self.server.s3s_bucket_files();
        for (path, _) in self.sizes(prefix) {
            std::io::copy(&mut fs::File::open(files.join(prefix).join(path)).unwrap(), &mut std::io::sink()).unwrap();
        }
    }

    /// The objects under this prefix, with their sizes in bytes.
    fn sizes(&self, prefix: &str) -> Vec<(PathBuf, u64)> {
        files(&self.server.s3s_bucket_files().join(prefix))
    }

    /// Removes all objects under this prefix.
    pub fn remove(&self, prefix: &str) {
        fs::remove_dir_all(self.server.s3s_bucket_files().join(prefix)).ok();
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // The master tells its worker.
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.nginx), rustix::process::Signal::TERM)
            .ok();
        self.nginx.wait().ok();
    }
}

/// All files below a directory, by their paths from there, with their sizes in bytes.
pub fn files(root: &Path) -> Vec<(PathBuf, u64)> {
    let (mut found, mut directories) = (Vec::new(), vec![PathBuf::new()]);
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(root.join(&directory)).into_iter().flatten().map(Result::unwrap) {
            let path = directory.join(entry.file_name());
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                directories.push(path);
            } else if kind.is_file() {
                found.push((path, entry.metadata().unwrap().len()));
            }
        }
    }
    found
}

fn configuration(port: u16, upstream: &str) -> String {
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|kind| format!("  {kind}_temp_path {kind};\n"))
        .collect();
    format!(
        "daemon off; worker_processes 1; pid nginx.pid; error_log nginx.log;
events {{ worker_connections 256; }}
http {{
  access_log off; client_max_body_size 0; keepalive_requests 1000000;
  proxy_http_version 1.1; proxy_request_buffering off; proxy_buffering off;
{temporary}  upstream s3 {{ server {upstream}; keepalive 16; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port} ssl; ssl_certificate cert.pem; ssl_certificate_key key.pem;
    location / {{ proxy_pass http://s3; proxy_set_header Host $http_host; proxy_set_header Connection \"\"; }}
  }}
}}
"
    )
}

/// A certificate for localhost, and that of who has signed it: some clients take no certificate for its own authority.
fn certificates(directory: &Path) {
    let openssl = |arguments: &[&str]| {
        let mut openssl: Command = command("openssl");
        let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30"];
        run(openssl.args(["req", "-x509"]).args(key).args(arguments).current_dir(directory));
    };
    openssl(&["-subj", "/CN=bench authority", "-keyout", "ca.key", "-out", "ca.pem"]);
    openssl(&[
        "-subj",
        "/CN=localhost",
        "-CA",
        "ca.pem",
        "-CAkey",
        "ca.key",
        "-keyout",
        "key.pem",
        "-out",
        "cert.pem",
        "-addext",
        "subjectAltName=DNS:localhost,IP:127.0.0.1",
        "-addext",
        "basicConstraints=critical,CA:FALSE",
    ]);
}
