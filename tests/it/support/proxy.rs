//! A proxy in front of a store: it can be away, silent or failing for as long as a test wants it to.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use super::{Repository, free_port};

const TICK: Duration = Duration::from_millis(10);

/// What happens to those who want to reach the store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// They reach it.
    Open,
    /// Nobody listens.
    Refused,
    /// They are accepted, and nothing they send arrives until the way is open again.
    Held,
    /// They get this status and S3 error code.
    Failing(u16, &'static str),
}

struct Shared {
    way: Mutex<Way>,
    connections: Mutex<Vec<TcpStream>>,
    /// The beginnings of what is held back.
    held: Mutex<Vec<String>>,
}

/// The proxy. It serves until the process ends: a test has nothing to wait for.
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
}

impl Proxy {
    /// A proxy before the S3 server of this repository.
    pub fn before(repository: &Repository) -> Proxy {
        let endpoint = repository.environment().into_iter().find(|(name, _)| *name == "AWS_ENDPOINT_URL_S3").unwrap().1;
        let target = endpoint.strip_prefix("http://").unwrap().to_owned();
        let way = Mutex::new(Way::Open);
        let shared = Arc::new(Shared { way, connections: Mutex::default(), held: Mutex::default() });
        let port = free_port();
        let listener = listen(port);
        let accepting = shared.clone();
        thread::spawn(move || accept(&accepting, port, listener, &target));
        Proxy { port, shared }
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Changes the way, also for who is connected. Returns when it has come into force.
    pub fn set(&self, way: Way) {
        let before = std::mem::replace(&mut *self.shared.way.lock().unwrap(), way);
        if before != Way::Held || way != Way::Open {
            for connection in self.shared.connections.lock().unwrap().drain(..) {
                connection.shutdown(Shutdown::Both).ok();
            }
        }
        let listening = || TcpStream::connect(("127.0.0.1", self.port)).is_ok();
        while listening() == (way == Way::Refused) {
            thread::sleep(TICK);
        }
    }

    /// Whether a request about this is held back.
    pub fn holds(&self, name: &str) -> bool {
        self.shared.held.lock().unwrap().iter().any(|held| held.contains(name))
    }
}

fn listen(port: u16) -> TcpListener {
    let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
    listener.set_nonblocking(true).unwrap();
    listener
}

fn accept(shared: &Arc<Shared>, port: u16, listener: TcpListener, target: &str) {
    let mut listener = Some(listener);
    loop {
        let way = *shared.way.lock().unwrap();
        if way == Way::Refused {
            listener = None;
            thread::sleep(TICK);
            continue;
        }
        match listener.get_or_insert_with(|| listen(port)).accept() {
            Ok((client, _)) => {
                client.set_nonblocking(false).unwrap();
                shared.connections.lock().unwrap().push(client.try_clone().unwrap());
                let (shared, target) = (shared.clone(), target.to_owned());
                thread::spawn(move || match way {
                    Way::Failing(status, code) => answer(client, status, code),
                    _ => pass(&shared, client, &target),
                });
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(TICK),
            Err(error) => panic!("{error}"),
        }
    }
}

fn pass(shared: &Arc<Shared>, client: TcpStream, target: &str) {
    let Ok(server) = TcpStream::connect(target) else { return };
    let (from_server, to_client) = (server.try_clone().unwrap(), client.try_clone().unwrap());
    let answers = shared.clone();
    thread::spawn(move || pump(&answers, from_server, to_client));
    pump(shared, client, server);
}

fn pump(shared: &Shared, mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        let beginning = String::from_utf8_lossy(&buffer[..length.min(500)]).into_owned();
        while *shared.way.lock().unwrap() == Way::Held {
            let mut held = shared.held.lock().unwrap();
            if !held.contains(&beginning) {
                held.push(beginning.clone());
            }
            drop(held);
            thread::sleep(TICK);
        }
        shared.held.lock().unwrap().retain(|held| *held != beginning);
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    from.shutdown(Shutdown::Both).ok();
    to.shutdown(Shutdown::Both).ok();
}

/// Reads one request and refuses it.
fn answer(mut client: TcpStream, status: u16, code: &str) {
    let mut request = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    let length = |request: &[u8]| {
        let end = request.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
        let head = String::from_utf8_lossy(&request[..end]).to_ascii_lowercase();
        let body = head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
        Some(end + body.unwrap_or(0))
    };
    while length(&request).is_none_or(|length| request.len() < length) {
        match client.read(&mut buffer) {
            Ok(read @ 1..) => request.extend_from_slice(&buffer[..read]),
            _ => return,
        }
    }
    let body = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>Scripted.</Message></Error>");
    let body = if request.starts_with(b"HEAD") { String::new() } else { body };
    let head = format!("HTTP/1.1 {status} Scripted\r\ncontent-type: application/xml\r\ncontent-length: {}", body.len());
    let head = if matches!(status, 429 | 503) { format!("{head}\r\nretry-after: 1") } else { head };
    client.write_all(format!("{head}\r\nconnection: close\r\n\r\n{body}").as_bytes()).ok();
}
