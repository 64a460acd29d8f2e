//! As much of an HTTP/1.1 client (RFC 9112) as the daemon's local API needs.
//!
//! One request per connection, without a body. Everything is bounded: the time until the deadline, each
//! silence in between, the head, and the bodies that are kept in memory. No name resolution, no redirects, no TLS.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

/// How long connecting may take: on the local host it takes no time at all or never happens.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// The daemon and the helper next to it may come from different releases; this header, in every request and every
/// answer, tells what is spoken. It also tells the daemon from anything else that listens on its port.
const PROTOCOL_HEADER: &str = "Pgsidecar-Protocol";
/// The only value that is spoken here.
pub const PROTOCOL: &str = "1";
/// In the answer to a restore: the file lies in pg_wal under this name.
const FILE_HEADER: &[u8] = b"pgsidecar-file";
const MAX_HEAD_BYTES: usize = 16 * 1024;
const MAX_HEADERS: usize = 64;
const MAX_ERROR_BODY_BYTES: usize = 64 * 1024;
/// The reason for a failure isn't worth waiting for.
const ERROR_BODY_SILENCE: Duration = Duration::from_secs(2);
const BUFFER_BYTES: usize = 64 * 1024;

/// Why there is no answer, or only a part of it.
#[derive(Debug)]
pub enum HttpError {
    /// Nobody took the connection: the request hasn't been seen.
    Unreachable(io::Error),
    /// The connection ended too early: the request may have been carried out.
    Broken(io::Error),
    /// The deadline passed, or nothing was heard for too long: the request may have been carried out.
    TimedOut,
    /// Something answered, but not in HTTP.
    NotHttp(&'static str),
    /// An answer with this status, but not from a daemon: it names no protocol. It means nothing, whatever it says.
    Foreign(u16),
    /// A daemon that speaks this protocol. What its answer means isn't known here.
    OtherProtocol(String),
}

impl HttpError {
    /// Whether the same request may succeed in a moment.
    pub fn is_transient(&self) -> bool {
        match self {
            HttpError::Unreachable(_) | HttpError::Broken(_) | HttpError::TimedOut => true,
            HttpError::NotHttp(_) | HttpError::Foreign(_) | HttpError::OtherProtocol(_) => false,
        }
    }

    fn cut() -> HttpError {
        HttpError::Broken(io::Error::new(io::ErrorKind::UnexpectedEof, "closed before the answer was complete"))
    }
}

/// From an established connection.
impl From<io::Error> for HttpError {
    fn from(error: io::Error) -> HttpError {
        match error.kind() {
            // What the socket's timeouts are called depends on the platform.
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => HttpError::TimedOut,
            _ => HttpError::Broken(error),
        }
    }
}

/// Where requests go, and how long they may take.
pub struct Client {
    pub address: SocketAddr,
    /// When all must be over, the body included.
    pub deadline: Instant,
    /// The longest time without a byte.
    pub silence: Duration,
    pub connect_timeout: Duration,
}

impl Client {
    /// Sends a request without a body and reads the head of the answer, which is one of a daemon that speaks
    /// [`PROTOCOL`]: any other is an error. `target` is sent as it is: it must consist of characters that need
    /// no escape.
    pub fn send(&self, method: &str, target: &str) -> Result<Response, HttpError> {
        let mut wire = Wire { stream: self.connect()?, deadline: self.deadline, silence: self.silence };
        let length = if method == "POST" { "Content-Length: 0\r\n" } else { "" };
        let request = format!(
            "{method} {target} HTTP/1.1\r\nHost: {address}\r\nUser-Agent: pgsidecar-wal/{version}\r\n\
             {PROTOCOL_HEADER}: {PROTOCOL}\r\nConnection: close\r\n{length}\r\n",
            address = self.address,
            version = env!("CARGO_PKG_VERSION"),
        );
        wire.write_all(request.as_bytes())?;
        Response::read(BufReader::with_capacity(BUFFER_BYTES, wire))
    }

    fn connect(&self) -> Result<TcpStream, HttpError> {
        let limit = self.deadline.saturating_duration_since(Instant::now()).min(self.connect_timeout);
        if limit.is_zero() {
            return Err(HttpError::TimedOut);
        }
        let stream = TcpStream::connect_timeout(&self.address, limit).map_err(HttpError::Unreachable)?;
        // On a port of the ephemeral range, a connection to nobody can end up at itself.
        if stream.local_addr().is_ok_and(|own| own == self.address) {
            return Err(HttpError::Unreachable(io::ErrorKind::ConnectionRefused.into()));
        }
        Ok(stream)
    }
}

/// A connection whose reads and writes end in time.
struct Wire {
    stream: TcpStream,
    deadline: Instant,
    silence: Duration,
}

impl Wire {
    fn patience(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(left.min(self.silence).max(Duration::from_millis(1)))
    }
}

impl Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.patience()?))?;
        self.stream.read(buffer)
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.patience()?))?;
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// How the end of a body is found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Framing {
    Length(u64),
    Chunked,
    /// It ends with the connection: a complete body can't be told from a cut one.
    UntilClose,
}

/// The head of an answer; its body is still to be read.
pub struct Response {
    status: u16,
    file: Option<String>,
    framing: Framing,
    /// What of a body of known length hasn't been read yet.
    left: u64,
    wire: BufReader<Wire>,
}

/// The body of a failure.
pub struct SmallBody {
    pub bytes: Vec<u8>,
    /// It is known to be whole.
    pub complete: bool,
}

impl Response {
    /// The status code.
    pub fn status(&self) -> u16 {
        self.status
    }

    /// The name under which the daemon has left the file in pg_wal, instead of sending it.
    pub fn file(&self) -> Option<&str> {
        self.file.as_deref()
    }

    /// The body's length, if it was announced.
    pub fn content_length(&self) -> Option<u64> {
        match self.framing {
            Framing::Length(length) => Some(length),
            Framing::Chunked | Framing::UntilClose => None,
        }
    }

    /// Reads on in a body of known length; 0 when all of it was read. A body that ends earlier is an error.
    pub fn read_body(&mut self, buffer: &mut [u8]) -> Result<usize, HttpError> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let read = retry_interrupted(|| self.wire.read(&mut buffer[..most]))?;
        if read == 0 {
            return Err(HttpError::cut());
        }
        self.left -= read as u64;
        Ok(read)
    }

    /// Reads a body that explains a failure: what can be had of it, and not more than a little.
    pub fn error_body(mut self) -> SmallBody {
        let wire = self.wire.get_mut();
        wire.silence = wire.silence.min(ERROR_BODY_SILENCE);
        let mut bytes = Vec::new();
        let complete = match self.framing {
            Framing::Length(length) => {
                let bounded = length.min(MAX_ERROR_BODY_BYTES as u64);
                let read = self.wire.take(bounded).read_to_end(&mut bytes);
                read.is_ok_and(|read| read as u64 == length)
            }
            Framing::Chunked => read_chunks(&mut self.wire, &mut bytes).is_ok(),
            Framing::UntilClose => {
                let _ = self.wire.take(MAX_ERROR_BODY_BYTES as u64).read_to_end(&mut bytes);
                false
            }
        };
        SmallBody { bytes, complete }
    }

    fn read(mut wire: BufReader<Wire>) -> Result<Response, HttpError> {
        let mut budget = MAX_HEAD_BYTES;
        let status = parse_status(&read_line(&mut wire, &mut budget)?)?;
        let mut length = None;
        let mut encoded = None;
        let mut protocol = None;
        let mut file = None;
        let mut count = 0;
        loop {
            let line = read_line(&mut wire, &mut budget)?;
            if line.is_empty() {
                break;
            }
            count += 1;
            if count > MAX_HEADERS {
                return Err(HttpError::NotHttp("too many headers"));
            }
            let (name, value) = split_header(&line).ok_or(HttpError::NotHttp("a header without a name"))?;
            if name.eq_ignore_ascii_case(b"content-length") {
                let value = parse_length(value).ok_or(HttpError::NotHttp("a bad Content-Length"))?;
                if length.replace(value).is_some_and(|earlier| earlier != value) {
                    return Err(HttpError::NotHttp("two different Content-Lengths"));
                }
            } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
                encoded = Some(value.eq_ignore_ascii_case(b"chunked"));
            } else if name.eq_ignore_ascii_case(FILE_HEADER) {
                file = Some(String::from_utf8_lossy(value).into_owned());
            } else if name.eq_ignore_ascii_case(PROTOCOL_HEADER.as_bytes()) {
                let value = String::from_utf8_lossy(value).into_owned();
                if protocol.get_or_insert_with(|| value.clone()) != &value {
                    return Err(HttpError::NotHttp("two different protocols"));
                }
            }
        }
        let framing = match (encoded, length) {
            (None, Some(length)) => Framing::Length(length),
            (Some(true), None) => Framing::Chunked,
            (None, None) => Framing::UntilClose,
            (Some(_), _) => return Err(HttpError::NotHttp("an unexpected Transfer-Encoding")),
        };
        match protocol {
            Some(protocol) if protocol == PROTOCOL => {}
            Some(other) => return Err(HttpError::OtherProtocol(other)),
            None => return Err(HttpError::Foreign(status)),
        }
        Ok(Response { status, file, framing, left: length.unwrap_or(0), wire })
    }
}

/// One line, without its end. `budget` is what is left of the bytes that the head may have.
fn read_line(wire: &mut BufReader<Wire>, budget: &mut usize) -> Result<Vec<u8>, HttpError> {
    let first = *budget == MAX_HEAD_BYTES;
    let mut line = Vec::new();
    let read = wire.take(*budget as u64).read_until(b'\n', &mut line)?;
    *budget -= read;
    if line.pop_if(|last| *last == b'\n').is_none() {
        // Of a cut first line, that it is HTTP must be visible as far as it goes.
        let http = b"HTTP/1.";
        let visible = line.len().min(http.len());
        return Err(match *budget {
            0 => HttpError::NotHttp("a head without an end"),
            _ if first && line[..visible] != http[..visible] => HttpError::NotHttp("no HTTP"),
            _ => HttpError::cut(),
        });
    }
    line.pop_if(|last| *last == b'\r');
    Ok(line)
}

/// The code in `HTTP/1.1 200 OK`.
fn parse_status(line: &[u8]) -> Result<u16, HttpError> {
    let code = match line {
        [b'H', b'T', b'T', b'P', b'/', b'1', b'.', b'0' | b'1', b' ', code @ ..] => code.get(..3),
        _ => None,
    };
    let ended = matches!(line.get(12), None | Some(b' '));
    code.filter(|code| ended && code.iter().all(u8::is_ascii_digit))
        .and_then(|code| std::str::from_utf8(code).ok()?.parse().ok())
        .filter(|status| (200..600).contains(status))
        .ok_or(HttpError::NotHttp("no HTTP"))
}

fn split_header(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let colon = line.iter().position(|b| *b == b':').filter(|colon| *colon > 0)?;
    Some((&line[..colon], line[colon + 1..].trim_ascii()))
}

/// Digits alone: `u64::from_str` would take a sign as well.
fn parse_length(value: &[u8]) -> Option<u64> {
    std::str::from_utf8(value).ok().filter(|text| text.bytes().all(|b| b.is_ascii_digit()))?.parse().ok()
}

/// Reads a chunked body up to its last chunk. What was read before an error stays in `bytes`.
fn read_chunks(wire: &mut BufReader<Wire>, bytes: &mut Vec<u8>) -> Result<(), HttpError> {
    // Of all the lines between the chunks.
    let mut budget = MAX_HEAD_BYTES - 1;
    loop {
        let line = read_line(wire, &mut budget)?;
        let digits = line.split(|b| *b == b';').next().unwrap_or_default().trim_ascii();
        let size = std::str::from_utf8(digits)
            .ok()
            .filter(|text| text.bytes().all(|b| b.is_ascii_hexdigit()))
            .and_then(|text| u64::from_str_radix(text, 16).ok())
            .ok_or(HttpError::NotHttp("a bad chunk"))?;
        if size == 0 {
            return Ok(());
        }
        let room = (MAX_ERROR_BODY_BYTES - bytes.len()) as u64;
        let read = wire.take(size.min(room)).read_to_end(bytes)?;
        if size > room {
            return Err(HttpError::NotHttp("too long a body"));
        }
        if read as u64 != size || !read_line(wire, &mut budget)?.is_empty() {
            return Err(HttpError::cut());
        }
    }
}

/// A signal (a debugger, a stopped container) is no reason to give up.
fn retry_interrupted(mut read: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match read() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Answer, Server, closed_port};

    fn client(address: SocketAddr) -> Client {
        let deadline = Instant::now() + Duration::from_secs(3);
        Client { address, deadline, silence: Duration::from_secs(3), connect_timeout: CONNECT_TIMEOUT }
    }

    fn get(answer: impl Into<Vec<u8>>) -> Result<Response, HttpError> {
        let server = Server::start([Answer::bytes(answer)]);
        client(server.address).send("GET", "/")
    }

    fn error_body(answer: impl Into<Vec<u8>>) -> (String, bool) {
        let body = get(answer).ok().unwrap().error_body();
        (String::from_utf8(body.bytes).unwrap(), body.complete)
    }

    fn whole(text: &str) -> (String, bool) {
        (text.to_owned(), true)
    }

    fn cut(text: &str) -> (String, bool) {
        (text.to_owned(), false)
    }

    #[test]
    fn the_request_names_host_version_and_protocol() {
        let server = Server::start([Answer::daemon("HTTP/1.1 204 No Content\r\n\r\n")]);
        let response = client(server.address).send("POST", "/v1/wal/00000002.history/archive").ok().unwrap();
        assert_eq!(response.status(), 204);
        let expected = format!(
            "POST /v1/wal/00000002.history/archive HTTP/1.1\r\nHost: {}\r\nUser-Agent: pgsidecar-wal/{}\r\n\
             Pgsidecar-Protocol: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
            server.address,
            env!("CARGO_PKG_VERSION")
        );
        assert_eq!(server.requests(), [expected]);
    }

    #[test]
    fn bodies_of_failures_are_read_in_every_framing() {
        let head = "HTTP/1.1 503 Service Unavailable\r\nPgsidecar-Protocol: 1\r\n";
        assert_eq!(error_body(format!("{head}content-length: 5\r\n\r\nabcde+")), whole("abcde"));
        assert_eq!(error_body(format!("{head}Content-Length: 5\r\n\r\nabc")), cut("abc"));
        let chunked = format!("{head}Transfer-Encoding: Chunked\r\n\r\n");
        assert_eq!(error_body(format!("{chunked}3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n")), whole("abcde"));
        assert_eq!(error_body(format!("{chunked}3\r\nabc\r\n")), cut("abc"));
        assert_eq!(error_body(format!("{chunked}3\r\nabcde\r\n0\r\n\r\n")), cut("abc"));
        assert_eq!(error_body(format!("{chunked}-3\r\nabc\r\n0\r\n\r\n")), cut(""));
        assert_eq!(error_body(format!("{chunked}fffffffffffffffff\r\nabc")), cut(""));
        assert_eq!(error_body(format!("{head}\r\nabc")), cut("abc"));
    }

    #[test]
    fn bodies_of_failures_are_bounded() {
        let long = "x".repeat(100_000);
        let head = "HTTP/1.1 500 Oops\r\nPgsidecar-Protocol: 1\r\n";
        for answer in [
            format!("{head}Content-Length: 100000\r\n\r\n{long}"),
            format!("{head}Transfer-Encoding: chunked\r\n\r\n186a0\r\n{long}\r\n0\r\n\r\n"),
            format!("{head}\r\n{long}"),
        ] {
            let body = get(answer).ok().unwrap().error_body();
            assert_eq!((body.bytes.len(), body.complete), (MAX_ERROR_BODY_BYTES, false));
        }
    }

    #[test]
    fn a_head_that_is_not_http_is_refused() {
        let many = "X: y\r\n".repeat(65);
        let long = "x".repeat(20_000);
        for answer in [
            "SSH-2.0-OpenSSH_9.9\r\n",
            "garbage",
            "HTTP/2 200\r\n\r\n",
            "HTTP/1.1 2000\r\n\r\n",
            "HTTP/1.1 2x0 OK\r\n\r\n",
            "HTTP/1.1 +20 OK\r\n\r\n",
            "HTTP/1.1 100 Continue\r\n\r\n",
            "HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
            "HTTP/1.1 200 OK\r\nPgsidecar-Protocol: 1\r\nPgsidecar-Protocol: 2\r\n\r\n",
            &format!("HTTP/1.1 200 OK\r\n{many}\r\n"),
            &format!("HTTP/1.1 200 OK\r\nX: {long}\r\n\r\n"),
            &long,
        ] {
            let start: String = answer.chars().take(60).collect();
            assert!(matches!(get(answer), Err(HttpError::NotHttp(_))), "{start}");
        }
    }

    #[test]
    fn an_answer_counts_only_in_this_protocol() {
        for header in ["Pgsidecar-Protocol: 1", "pgsidecar-protocol:1 ", "X: y\r\nPGSIDECAR-PROTOCOL: 1"] {
            assert!(get(format!("HTTP/1.1 200 OK\r\n{header}\r\n\r\n")).is_ok(), "{header}");
        }
        for header in ["Server: nginx", "X-Pgsidecar-Protocol: 1", "Pgsidecar-Protocols: 1", "Protocol: 1"] {
            for status in [200, 204, 404, 503] {
                let result = get(format!("HTTP/1.1 {status} Whatever\r\n{header}\r\n\r\nPgsidecar-Protocol: 1\r\n"));
                assert!(matches!(result, Err(HttpError::Foreign(told)) if told == status), "{header}");
            }
        }
        for value in ["2", "", "01", "1.0", "11", "+1", "1, 1", "one"] {
            let result = get(format!("HTTP/1.1 200 OK\r\nPgsidecar-Protocol: {value}\r\n\r\n"));
            assert!(matches!(result, Err(HttpError::OtherProtocol(told)) if told == value), "{value}");
        }
    }

    #[test]
    fn a_head_that_is_cut_is_told_from_one_that_is_wrong() {
        for answer in ["", "HTT", "HTTP/1.1 200 OK", "HTTP/1.1 200 OK\r\nContent-Le", "HTTP/1.1 200 OK\r\n"] {
            assert!(matches!(get(answer), Err(HttpError::Broken(_))), "{answer:?}");
        }
        assert!(matches!(client(closed_port()).send("GET", "/"), Err(HttpError::Unreachable(_))));
    }

    #[test]
    fn silence_ends_a_request_before_its_deadline() {
        let server = Server::start([Answer::BlackHole]);
        let started = Instant::now();
        let client = Client { silence: Duration::from_millis(200), ..client(server.address) };
        assert!(matches!(client.send("GET", "/"), Err(HttpError::TimedOut)));
        assert!(started.elapsed() < Duration::from_secs(2));
    }

    #[test]
    fn the_deadline_ends_an_answer_that_drips() {
        let server = Server::start([Answer::drip("HTTP/1.1 200 OK\r\n", Duration::from_millis(150))]);
        let started = Instant::now();
        let client = Client { deadline: started + Duration::from_millis(600), ..client(server.address) };
        assert!(matches!(client.send("GET", "/"), Err(HttpError::TimedOut)));
        assert!(started.elapsed() < Duration::from_secs(2));
    }
}
