//! What the tests ask the daemon and the helper for, and WAL segments made by hand.

use std::{
    fmt,
    io::{Read, Write},
    net::TcpStream,
    process::Output,
    time::Duration,
};

use serde_json::Value;

use super::{Postgres, Sidecar};

/// The answer to a request.
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n\n{:.1000}", self.head, self.text())
    }
}

impl Answer {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The code of an error.
    pub fn code(&self) -> String {
        let body: Value = serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("{self:?}"));
        body["error"]["code"].as_str().unwrap_or_default().to_owned()
    }

    fn parse(bytes: &[u8]) -> Answer {
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").unwrap_or_else(|| {
            panic!("this is no answer: {:?}", String::from_utf8_lossy(bytes));
        });
        let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Answer { status, head, body: bytes[end + 4..].to_vec() }
    }
}

/// A connection on which nothing takes longer than a minute.
pub fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream
}

/// Sends these bytes and reads until the other side closes.
pub fn exchange(port: u16, bytes: &[u8]) -> Vec<u8> {
    let mut stream = connect(port);
    stream.write_all(bytes).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    answer
}

/// The head of a request.
pub fn head(method: &str, path: &str, headers: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n{headers}\r\n")
}

impl Sidecar {
    /// A request without a body.
    pub fn ask(&self, method: &str, path: &str) -> Answer {
        Answer::parse(&exchange(self.port, head(method, path, "").as_bytes()))
    }

    /// Sends a request without waiting for the answer.
    pub fn begin(&self, method: &str, path: &str) -> TcpStream {
        let mut stream = connect(self.port);
        stream.write_all(head(method, path, "").as_bytes()).unwrap();
        stream
    }

    pub fn get(&self, name: &str) -> Answer {
        self.ask("GET", &format!("/v1/wal/{name}"))
    }

    /// Asks for a file of pg_wal to be archived.
    pub fn post(&self, name: &str) -> Answer {
        self.ask("POST", &format!("/v1/wal/{name}/archive"))
    }

    /// Sends a file, as curl does: the body follows when the daemon asks for it.
    pub fn put(&self, name: &str, body: &[u8]) -> Answer {
        let headers = format!("Content-Length: {}\r\nExpect: 100-continue\r\n", body.len());
        let mut stream = connect(self.port);
        stream.write_all(head("PUT", &format!("/v1/wal/{name}"), &headers).as_bytes()).unwrap();
        let mut answer = vec![0; 25];
        let wanted = b"HTTP/1.1 100 Continue\r\n\r\n";
        if body.is_empty() || stream.read_exact(&mut answer).is_ok() && answer != wanted {
            answer.truncate(if body.is_empty() { 0 } else { answer.len() });
        } else {
            // What is refused may be refused before all of it is sent.
            let _ = stream.write_all(body);
            answer.clear();
        }
        stream.read_to_end(&mut answer).unwrap();
        Answer::parse(&answer)
    }

    /// A page for probes and Prometheus.
    pub fn health(&self, path: &str) -> Answer {
        Answer::parse(&exchange(self.health_port, head("GET", path, "").as_bytes()))
    }

    /// The value of a metric.
    #[track_caller]
    pub fn metric(&self, name: &str) -> String {
        let text = self.health("/metrics").text();
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("no {name} in\n{text}")).to_owned()
    }

    /// Runs the helper in the data directory, as PostgreSQL does.
    pub fn wal(&self, postgres: &Postgres, arguments: &[&str]) -> Output {
        let mut helper = super::command(Sidecar::helper());
        helper.args(["--address", &format!("127.0.0.1:{}", self.port)]).args(arguments);
        helper.current_dir(&postgres.data).output().unwrap()
    }
}

impl Postgres {
    /// The system identifier, out of pg_control.
    pub fn system_identifier(&self) -> u64 {
        let control = std::fs::read(self.data.join("global/pg_control")).unwrap();
        u64::from_le_bytes(*control.first_chunk().unwrap())
    }

    /// A segment of this database with a right header, filled with noise that `seed` decides. It's marked as one that
    /// PostgreSQL has finished.
    pub fn segment(&self, name: &str, size: u32, seed: u64) -> Vec<u8> {
        let mark = self.data.join(format!("pg_wal/archive_status/{name}.done"));
        std::fs::write(&mark, "").unwrap();
        super::give_to_servers(&mark);
        segment(self.system_identifier(), name, size, seed)
    }
}

/// A WAL segment with a right header, filled with noise that `seed` decides.
pub fn segment(system: u64, name: &str, size: u32, seed: u64) -> Vec<u8> {
    let number = |from: usize| u32::from_str_radix(&name[from..from + 8], 16).unwrap();
    let start = (u64::from(number(8)) << 32) + u64::from(number(16)) * u64::from(size);
    let mut bytes = vec![0x10, 0xD1, 0x02, 0x00];
    bytes.extend(number(0).to_le_bytes());
    bytes.extend(start.to_le_bytes());
    bytes.extend([0; 8]);
    bytes.extend(system.to_le_bytes());
    bytes.extend(size.to_le_bytes());
    bytes.extend(8192_u32.to_le_bytes());
    let mut noise = seed.wrapping_mul(2).wrapping_add(0x9E37_79B9_7F4A_7C15);
    while bytes.len() < size as usize {
        noise ^= noise << 13;
        noise ^= noise >> 7;
        noise ^= noise << 17;
        bytes.extend(noise.to_le_bytes());
    }
    bytes
}
