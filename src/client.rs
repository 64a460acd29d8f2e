//! The command-line tool's side of the control socket, and of the address that PostgreSQL's commands use.

use std::{fmt, io, net::SocketAddr, path::Path, time::Duration};

use bytes::{Buf, Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::{
    Method, Request, Response,
    body::Incoming,
    client::conn::http1::{self, SendRequest},
};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
};

use crate::{
    failure::{Code, Failure},
    http::{PROTOCOL, PROTOCOL_HEADER},
    jobs::Snapshot,
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest answer that is read whole, and the longest line of a stream.
const MAX_ANSWER_BYTES: usize = 256 << 20;

/// A daemon, by one of its listeners.
pub struct Client<'a> {
    place: Place<'a>,
}

#[derive(Clone, Copy)]
enum Place<'a> {
    Socket(&'a Path),
    Address(SocketAddr),
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Socket(path) => write!(f, "{}", path.display()),
            Place::Address(address) => write!(f, "{address}"),
        }
    }
}

#[derive(Deserialize)]
struct ErrorBody {
    error: Failure,
}

impl<'a> Client<'a> {
    /// The daemon behind this socket. Nothing is connected yet.
    pub fn new(socket: &'a Path) -> Client<'a> {
        Client { place: Place::Socket(socket) }
    }

    /// The daemon at the address where PostgreSQL's commands reach it. Nothing is connected yet.
    pub fn at(address: SocketAddr) -> Client<'static> {
        Client { place: Place::Address(address) }
    }

    /// Whether a daemon answers there. It's asked nothing that it would have to ask others. Has no end of its own once
    /// it's connected.
    ///
    /// # Errors
    /// [`Code::DaemonUnavailable`] if nobody answers, or somebody else does.
    pub async fn ping(&self) -> Result<(), Failure> {
        let response = self.request(Method::GET, "/healthz", Bytes::new()).await?;
        let speaks = response.headers().get(PROTOCOL_HEADER).is_some_and(|protocol| protocol == PROTOCOL);
        checked(response).await.map(drop)?;
        speaks.then_some(()).ok_or_else(|| self.gone(&"what answers there isn't pgsidecar, or is of another version"))
    }

    /// Asks for a resource.
    ///
    /// # Errors
    /// [`Code::DaemonUnavailable`], or what the daemon says.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        parse(&self.send(Method::GET, path, Bytes::new()).await?.1)
    }

    /// Posts a request.
    ///
    /// # Errors
    /// [`Code::DaemonUnavailable`], or what the daemon says.
    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, Failure> {
        let body = serde_json::to_vec(body).map_err(Failure::internal)?;
        parse(&self.send(Method::POST, path, Bytes::from(body)).await?.1)
    }

    /// Deletes a resource; answers with what it was.
    ///
    /// # Errors
    /// [`Code::DaemonUnavailable`], or what the daemon says.
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        parse(&self.send(Method::DELETE, path, Bytes::new()).await?.1)
    }

    /// Follows a job until it has ended; `watch` sees each state.
    ///
    /// # Errors
    /// If the daemon goes away.
    pub async fn follow(&self, job: u64, mut watch: impl FnMut(&Snapshot)) -> Result<Snapshot, Failure> {
        let response = self.request(Method::GET, &format!("/v1/jobs/{job}/events"), Bytes::new()).await?;
        let mut body = checked(response).await?;
        let mut line = BytesMut::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| self.gone(&error))?;
            line.extend_from_slice(frame.data_ref().unwrap_or(&Bytes::new()));
            while let Some(end) = line.iter().position(|b| *b == b'\n') {
                let snapshot: Snapshot = parse(&line[..end])?;
                line.advance(end + 1);
                watch(&snapshot);
                if snapshot.outcome.is_some() {
                    return Ok(snapshot);
                }
            }
            if line.len() > MAX_ANSWER_BYTES {
                return Err(Failure::internal("a line of the job's events has no end"));
            }
        }
        Err(Failure::new(Code::DaemonUnavailable, "the daemon stopped before the job had ended")
            .hint("Nothing half-done is listed. 'pgsidecar status' tells how it stands."))
    }

    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<(hyper::StatusCode, Bytes), Failure> {
        let response = self.request(method, path, body).await?;
        let status = response.status();
        let body = checked(response).await?;
        let bytes = http_body_util::Limited::new(body, MAX_ANSWER_BYTES).collect().await;
        Ok((status, bytes.map_err(|error| self.gone(&error))?.to_bytes()))
    }

    async fn request(&self, method: Method, path: &str, body: Bytes) -> Result<Response<Incoming>, Failure> {
        let connect = async {
            match self.place {
                Place::Socket(path) => handshake(UnixStream::connect(path).await).await,
                Place::Address(address) => handshake(TcpStream::connect(address).await).await,
            }
        };
        let connected = tokio::time::timeout(CONNECT_TIMEOUT, connect).await;
        let mut sender = connected.map_err(|elapsed| self.gone(&elapsed))?.map_err(|error| self.gone(&error))?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost")
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(Failure::internal)?;
        sender.send_request(request).await.map_err(|error| self.gone(&error))
    }

    fn gone(&self, error: &dyn fmt::Display) -> Failure {
        Failure::new(Code::DaemonUnavailable, format!("the daemon at {} can't be reached: {error}", self.place))
            .hint("Run this in the pgsidecar container (kubectl exec POD -c pgsidecar -- pgsidecar …), as the same user; 'pgsidecar run' is the daemon.")
    }
}

/// Speaks HTTP on what was connected.
async fn handshake(
    stream: io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static>,
) -> Result<SendRequest<Full<Bytes>>, Box<dyn std::error::Error + Send + Sync>> {
    let (sender, connection) = http1::handshake(TokioIo::new(stream?)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

/// The body, if the answer is a success; otherwise what the daemon says.
async fn checked(response: Response<Incoming>) -> Result<Incoming, Failure> {
    let status = response.status();
    if status.is_success() {
        return Ok(response.into_body());
    }
    let body = http_body_util::Limited::new(response.into_body(), 1 << 20).collect().await;
    let bytes = body.map(|body| body.to_bytes()).unwrap_or_default();
    Err(match serde_json::from_slice::<ErrorBody>(&bytes) {
        Ok(body) => body.error,
        Err(_) => Failure::new(Code::DaemonUnavailable, format!("the daemon answered {status} without a reason")),
    })
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(bytes).map_err(|error| {
        Failure::new(Code::DaemonUnavailable, format!("the daemon's answer makes no sense: {error}"))
            .hint("Daemon and command-line tool must be of the same version.")
    })
}
