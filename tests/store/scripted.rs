//! An HTTP server that answers what a test tells it to, whatever a real one would.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use pgsidecar::store::{S3Config, S3Store};

#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    /// Path and query.
    pub target: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// `PUT object`, `PUT part`, `POST uploads` and so on.
    pub fn what(&self) -> String {
        let query = self.target.split_once('?').map_or("", |(_, query)| query);
        let has = |name: &str| query.split('&').any(|pair| pair.split('=').next() == Some(name));
        let on = match () {
            () if has("partNumber") => "part",
            () if has("uploads") => "uploads",
            () if has("uploadId") => "upload",
            () if has("delete") => "delete",
            () if has("list-type") => "list",
            () => "object",
        };
        format!("{} {on}", self.method)
    }
}

pub enum Reply {
    Http {
        status: u16,
        headers: Vec<(&'static str, String)>,
        body: Vec<u8>,
    },
    /// These bytes as they are; then the connection is closed.
    Raw(Vec<u8>),
    /// These bytes, and then nothing more, with the connection left open.
    Stall(Vec<u8>),
}

impl Reply {
    pub fn http(status: u16, body: impl Into<Vec<u8>>) -> Reply {
        Reply::Http { status, headers: Vec::new(), body: body.into() }
    }

    /// An S3 error with this code.
    pub fn error(status: u16, code: &str) -> Reply {
        let body = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>Scripted.</Message></Error>");
        Reply::http(status, body).with("content-type", "application/xml")
    }

    /// What a web server or a proxy says.
    pub fn page(status: u16) -> Reply {
        let body = "<html><head><title>Hello</title></head><body><hr>nginx<br></body></html>";
        Reply::http(status, body).with("content-type", "text/html")
    }

    /// The answer to a successful PUT.
    pub fn stored() -> Reply {
        Reply::http(200, "").with("etag", "\"1\"")
    }

    pub fn with(mut self, name: &'static str, value: &str) -> Reply {
        if let Reply::Http { headers, .. } = &mut self {
            headers.push((name, value.to_owned()));
        }
        self
    }
}

pub struct Scripted {
    pub port: u16,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Scripted {
    /// Answers each request by `answer`, which also gets how many of the same kind came before it.
    pub fn start(answer: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static) -> Scripted {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let requests: Arc<Mutex<Vec<Request>>> = Arc::default();
        let (seen, answer) = (requests.clone(), Arc::new(answer));
        // Ends with the process: a test has nothing to wait for.
        thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let (seen, answer) = (seen.clone(), answer.clone());
                thread::spawn(move || serve(connection, &seen, answer.as_ref()));
            }
        });
        Scripted { port, requests }
    }

    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// What was asked, without the attempts at conditional creation.
    pub fn asked(&self) -> Vec<String> {
        self.requests().iter().filter(|request| !is_probe(request)).map(Request::what).collect()
    }

    /// A store there that gives up soon.
    pub async fn store(&self) -> S3Store {
        S3Store::new(impatient(self.port)).await
    }
}

/// An answer of a server that honours `If-None-Match`, if this is the question.
pub fn probe(request: &Request) -> Option<Reply> {
    is_probe(request).then(|| Reply::error(412, "PreconditionFailed"))
}

fn is_probe(request: &Request) -> bool {
    request.target.contains("conditional-creation.probe")
}

pub fn impatient(port: u16) -> S3Config {
    let config = S3Config {
        bucket: "backups".to_owned(),
        prefix: "shop/db".to_owned(),
        endpoint: Some(format!("http://127.0.0.1:{port}")),
        connect_timeout: Duration::from_millis(500),
        answer_timeout: Duration::from_millis(500),
        first_backoff: Duration::from_millis(1),
        ..S3Config::default()
    };
    config.with_credentials("a", "b")
}

fn serve(mut connection: TcpStream, seen: &Mutex<Vec<Request>>, answer: &dyn Fn(&Request, usize) -> Reply) {
    while let Some(request) = read_request(&mut connection) {
        let before = {
            let mut seen = seen.lock().unwrap();
            let same = |earlier: &&Request| earlier.what() == request.what() && is_probe(earlier) == is_probe(&request);
            let before = seen.iter().filter(same).count();
            seen.push(request.clone());
            before
        };
        match answer(&request, before) {
            Reply::Http { status, headers, body } => {
                let mut head = format!("HTTP/1.1 {status} Scripted\r\n");
                if !headers.iter().any(|(name, _)| *name == "content-length") {
                    head += &format!("content-length: {}\r\n", body.len());
                }
                for (name, value) in headers {
                    head += &format!("{name}: {value}\r\n");
                }
                head += "\r\n";
                let body = if request.method == "HEAD" { Vec::new() } else { body };
                if connection.write_all(&[head.into_bytes(), body].concat()).is_err() {
                    return;
                }
            }
            Reply::Raw(bytes) => {
                connection.write_all(&bytes).ok();
                return;
            }
            Reply::Stall(bytes) => {
                connection.write_all(&bytes).ok();
                // Until the client has had enough.
                connection.read_to_end(&mut Vec::new()).ok();
                return;
            }
        }
    }
}

/// The next request of a connection. Bodies need a `content-length`, which ours always have.
pub fn read_request(connection: &mut TcpStream) -> Option<Request> {
    let mut bytes = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    let end = loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break end;
        }
        match connection.read(&mut buffer) {
            Ok(0) | Err(_) => return None,
            Ok(length) => bytes.extend_from_slice(&buffer[..length]),
        }
    };
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let mut body = bytes.split_off(end + 4);
    let mut lines = head.lines();
    let mut first = lines.next()?.split(' ').map(str::to_owned);
    let (method, target) = (first.next()?, first.next()?);
    let headers: Vec<_> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let mut request = Request { method, target, headers, body: Vec::new() };
    if request.header("expect").is_some() {
        connection.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").ok()?;
    }
    let length = request.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    while body.len() < length {
        match connection.read(&mut buffer) {
            Ok(0) | Err(_) => return None,
            Ok(read) => body.extend_from_slice(&buffer[..read]),
        }
    }
    request.body = body;
    Some(request)
}
