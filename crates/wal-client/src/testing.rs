//! A scripted server, a data directory and a way to run commands, for the tests.

use std::{
    collections::VecDeque,
    ffi::OsString,
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU16, AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use crate::World;

/// What the server does with one connection, after it has read the request.
pub enum Answer {
    /// Sends these bytes, with a pause after each if one is given, and closes or, if it stalls, does nothing more.
    Bytes { bytes: Vec<u8>, pause: Duration, stall: bool },
    /// Never answers.
    BlackHole,
}

impl Answer {
    pub fn bytes(bytes: impl Into<Vec<u8>>) -> Answer {
        Answer::Bytes { bytes: bytes.into(), pause: Duration::ZERO, stall: false }
    }

    /// The same, with the header that the daemon sends in every answer behind the first line.
    pub fn daemon(answer: impl Into<Vec<u8>>) -> Answer {
        let mut bytes = answer.into();
        if let Some(end) = bytes.windows(2).position(|end| end == b"\r\n") {
            bytes.splice(end..end, *b"\r\nPgsidecar-Protocol: 1");
        }
        Answer::bytes(bytes)
    }

    pub fn drip(text: &str, pause: Duration) -> Answer {
        Answer::Bytes { bytes: text.into(), pause, stall: false }
    }

    pub fn stall(text: &str) -> Answer {
        Answer::Bytes { bytes: text.into(), pause: Duration::ZERO, stall: true }
    }

    /// As the daemon refuses.
    pub fn error(status: u16, code: &str) -> Answer {
        let body = format!(r#"{{"error":{{"code":"{code}","message":"no","hint":null}}}}"#);
        Answer::daemon(format!(
            "HTTP/1.1 {status} Whatever\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ))
    }
}

/// Gives one answer per connection; after the last one the port is closed.
pub struct Server {
    pub address: SocketAddr,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Server {
    pub fn start<const N: usize>(answers: [Answer; N]) -> Server {
        Server::start_at(own_address(), answers)
    }

    pub fn start_at<const N: usize>(address: SocketAddr, answers: [Answer; N]) -> Server {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&requests);
        thread::spawn(move || {
            let mut answers = VecDeque::from(answers);
            while let Some(answer) = answers.pop_front() {
                let (mut stream, _) = listener.accept().unwrap();
                log.lock().unwrap().push(read_head(&mut stream));
                let _ = give(&mut stream, &answer);
                if matches!(answer, Answer::BlackHole | Answer::Bytes { stall: true, .. }) {
                    // Until the client has had enough.
                    let _ = stream.read(&mut [0]);
                }
            }
        });
        Server { address, requests }
    }

    /// The heads of the requests so far.
    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

fn read_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|read| read == 1) {
        head.push(byte[0]);
    }
    String::from_utf8(head).unwrap()
}

fn give(stream: &mut TcpStream, answer: &Answer) -> std::io::Result<()> {
    let Answer::Bytes { bytes, pause, .. } = answer else { return Ok(()) };
    if pause.is_zero() {
        return stream.write_all(bytes);
    }
    for byte in bytes {
        stream.write_all(&[*byte])?;
        thread::sleep(*pause);
    }
    Ok(())
}

/// An address where nobody listens.
pub fn closed_port() -> SocketAddr {
    TcpListener::bind(own_address()).unwrap().local_addr().unwrap()
}

/// Any port of a loopback address that no other test uses: a port that one test has closed must not come back as the
/// server of another.
fn own_address() -> SocketAddr {
    static COUNT: AtomicU16 = AtomicU16::new(1);
    let [high, low] = COUNT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    SocketAddr::from(([127, 77, high, low], 0))
}

/// A directory that goes with the test.
pub struct TempDir(PathBuf);

impl TempDir {
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The names in a directory below.
    pub fn files(&self, below: &str) -> Vec<String> {
        let entries = fs::read_dir(self.0.join(below)).unwrap();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The data directory of a server that isn't a standby.
pub fn pgdata() -> TempDir {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name = format!("pgsidecar-wal-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let path = std::env::temp_dir().join(name);
    fs::create_dir_all(path.join("pg_wal")).unwrap();
    TempDir(path)
}

/// The data directory of a standby.
pub fn standby() -> TempDir {
    let data = pgdata();
    fs::write(data.path().join("standby.signal"), "").unwrap();
    data
}

/// What a command has left behind.
pub struct Run {
    pub code: u8,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a command as PostgreSQL would: in the data directory.
pub fn run_in(args: &[&str], env: &[(&str, &str)], data: &TempDir) -> Run {
    let args: Vec<OsString> = args.iter().map(OsString::from).collect();
    let env = |name: &str| env.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value));
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let mut world = World { env: &env, cwd: data.path(), stdout: &mut stdout, stderr: &mut stderr };
    let code = crate::run(&args, &mut world);
    Run { code, stdout: String::from_utf8(stdout).unwrap(), stderr: String::from_utf8(stderr).unwrap() }
}
