//! The daemon's HTTP interfaces: three listeners, each with routes and rights of its own.
//!
//! - [`wal`]: loopback TCP, every container of the pod reaches it. What PostgreSQL needs, nothing else.
//! - [`control`]: a Unix socket of mode 0600 in the sidecar's own file system, for the command-line tool.
//! - [`health`]: read-only, for the kubelet and Prometheus.
//!
//! Requests are untrusted. Connections, the time for a request's head and the size of bodies are bounded; names are
//! parsed, never joined to a path. Errors are JSON: `{"error":{"code":…,"message":…,"hint":…}}`.

pub mod control;
pub mod health;
pub mod wal;

use std::{convert::Infallible, io, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    Request, Response, StatusCode,
    body::{Frame, Incoming},
    header::{self, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::{Semaphore, mpsc, watch},
    task::JoinSet,
};

use crate::failure::{Code, Failure};

/// Spoken between helper and daemon, which may come from different releases. In every answer: the helper believes
/// nobody else.
pub const PROTOCOL: &str = "1";
/// The header that says it.
pub const PROTOCOL_HEADER: &str = "pgsidecar-protocol";
/// Connections that a listener serves at a time; further ones wait to be accepted.
const MAX_CONNECTIONS: usize = 64;
/// How long a client may take to send a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes that are buffered for a connection, its head included.
const BUFFER_BYTES: usize = 64 * 1024;

/// An answer's body.
pub type Body = UnsyncBoxBody<Bytes, io::Error>;
/// An answer.
pub type Answer = Response<Body>;

/// A place to listen at.
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// A Unix socket.
    Unix(UnixListener),
}

trait Connection: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Connection for T {}

impl Listener {
    /// Listens on a Unix socket that only our user can connect to. What an earlier daemon left is replaced; a socket
    /// that somebody answers is not.
    ///
    /// # Errors
    /// If it can't be made.
    pub async fn unix(path: &Path) -> io::Result<Listener> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        match tokio::net::UnixStream::connect(path).await {
            Ok(_) => return Err(io::Error::new(io::ErrorKind::AddrInUse, "another pgsidecar answers there")),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)?,
            Err(_) => {}
        }
        // Made under a mask, so that there is no moment at which others could connect.
        let mask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
        let bound = UnixListener::bind(path);
        rustix::process::umask(mask);
        bound.map(Listener::Unix)
    }

    async fn accept(&self) -> io::Result<Box<dyn Connection>> {
        match self {
            Listener::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok(Box::new(stream))
            }
            Listener::Unix(listener) => Ok(Box::new(listener.accept().await?.0)),
        }
    }
}

/// Serves a listener until `stop` becomes true, then lets the requests that are under way end.
pub async fn serve<H, F>(listener: Listener, handler: H, mut stop: watch::Receiver<bool>)
where
    H: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Result<Answer, Failure>> + Send + 'static,
{
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = stopped(&mut stop) => break,
            Some(_) = connections.join_next() => continue,
            accepted = async {
                let permit = permits.clone().acquire_owned().await;
                listener.accept().await.map(|stream| (stream, permit))
            } => accepted,
        };
        let (stream, permit) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Most often too many open files: it passes, and must not become a busy loop.
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (handler, mut stop) = (handler.clone(), stop.clone());
        connections.spawn(async move {
            let _permit = permit;
            let service = service_fn(move |request| answer(handler(request)));
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .max_buf_size(BUFFER_BYTES)
                .serve_connection(TokioIo::new(stream), service);
            tokio::pin!(connection);
            let ended = tokio::select! {
                ended = connection.as_mut() => ended,
                () = stopped(&mut stop) => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "a connection broke off");
            }
        });
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Returns when it's time to stop, or when nobody could say so any more.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

async fn answer(handled: impl Future<Output = Result<Answer, Failure>>) -> Result<Answer, Infallible> {
    let mut answer = handled.await.unwrap_or_else(|failure| error(&failure));
    answer.headers_mut().insert(PROTOCOL_HEADER, HeaderValue::from_static(PROTOCOL));
    Ok(answer)
}

/// An answer that tells a failure.
pub fn error(failure: &Failure) -> Answer {
    #[derive(Serialize)]
    struct Error<'a> {
        error: &'a Failure,
    }
    json(failure.code.status(), &Error { error: failure })
}

/// A JSON answer.
pub fn json(status: StatusCode, value: &impl Serialize) -> Answer {
    let mut text = serde_json::to_vec(value).unwrap_or_else(|_| b"{}".to_vec());
    text.push(b'\n');
    bytes(status, "application/json", Bytes::from(text))
}

/// The daemon is there. Asks nobody, unlike the status.
pub fn alive() -> Answer {
    bytes(StatusCode::OK, "text/plain; charset=utf-8", Bytes::from_static(b"alive\n"))
}

/// An answer of these bytes.
pub fn bytes(status: StatusCode, content_type: &'static str, body: Bytes) -> Answer {
    let mut answer = Response::new(Full::new(body).map_err(|never| match never {}).boxed_unsync());
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}

/// An answer whose body is what comes through a channel. With a length, a body that ends early is seen as cut.
pub fn streamed(content_type: &'static str, length: Option<u64>, chunks: mpsc::Receiver<io::Result<Bytes>>) -> Answer {
    let frames = stream::unfold(chunks, |mut chunks| async {
        let chunk = chunks.recv().await?;
        Some((chunk.map(Frame::data), chunks))
    });
    let mut answer = Response::new(StreamBody::new(frames).boxed_unsync());
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    if let Some(length) = length {
        answer.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    }
    answer
}

/// Nothing is there.
pub fn no_such_route(request: &Request<Incoming>) -> Failure {
    Failure::new(Code::NotFound, format!("there is no {} {} here", request.method(), request.uri().path()))
}
