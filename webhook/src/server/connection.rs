//! Connections: accepted, encrypted, served, and ended when they idle or when it's time to stop.

use std::{
    convert::Infallible,
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Request, Response, body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use rustls::{
    ServerConfig,
    server::NoServerSessionStorage,
    version::{TLS12, TLS13},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    task::JoinSet,
    time::Instant,
};
use tokio_rustls::TlsAcceptor;

use super::{App, admission, health};
use crate::certificates::provider;

/// Connections at a time; further ones wait to be accepted. An API server has one or two.
const MAX_CONNECTIONS: usize = 64;
const MAX_HEALTH_CONNECTIONS: usize = 16;
/// For a TLS handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// Until a connection's first request.
const FIRST_REQUEST_LIMIT: Duration = Duration::from_secs(10);
/// Between two requests. Longer than clients keep idle connections (Go: 90 s), so that it's they who close them: a
/// request must not meet a connection that is just being closed.
const IDLE_LIMIT: Duration = Duration::from_secs(150);
/// For a connection to end when it has been told to.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);
/// Bytes that HTTP/1 buffers, its head included.
const BUFFER_BYTES: usize = 64 << 10;
/// Bytes that HTTP/2 takes before they are read, for a stream and for a connection: a large body comes in as many round
/// trips as it has of these.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 256 << 10;
const MAX_STREAMS: u32 = 100;

/// TLS as it's served. Sessions aren't resumed: the API server doesn't, and they would outlive a certificate.
///
/// # Errors
/// If TLS can't be had.
pub fn tls(app: &App) -> Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13, &TLS12])?
        .with_no_client_auth()
        .with_cert_resolver(app.certificates.clone());
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// Serves the webhook until `stop`, then lets requests that are under way end.
///
/// # Errors
/// If TLS can't be had.
pub async fn serve_tls(app: Arc<App>, listener: TcpListener, stop: watch::Receiver<bool>) -> io::Result<()> {
    let acceptor = TlsAcceptor::from(Arc::new(tls(&app).map_err(io::Error::other)?));
    let room = Arc::new(admission::Room::default());
    accept(listener, MAX_CONNECTIONS, stop, move |stream, stop| {
        let (app, acceptor, room) = (app.clone(), acceptor.clone(), room.clone());
        async move {
            let shaken = tokio::time::timeout(HANDSHAKE_LIMIT, acceptor.accept(stream)).await;
            let stream = match shaken {
                Ok(Ok(stream)) => stream,
                outcome => {
                    app.metrics.handshake_failures.inc();
                    match outcome {
                        Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
                        _ => tracing::debug!("a TLS handshake took too long"),
                    }
                    return;
                }
            };
            app.metrics.connections.inc();
            let shared = app.clone();
            serve_connection(stream, stop, move |request| {
                let (app, room) = (shared.clone(), room.clone());
                async move { admission::handle(&app, &room, request).await }
            })
            .await;
            app.metrics.connections.dec();
        }
    })
    .await;
    Ok(())
}

/// Serves probes and metrics until `stop`.
pub async fn serve_health(app: Arc<App>, listener: TcpListener, stop: watch::Receiver<bool>) {
    accept(listener, MAX_HEALTH_CONNECTIONS, stop, move |stream, stop| {
        let app = app.clone();
        serve_connection(stream, stop, move |request| {
            let app = app.clone();
            async move { health::handle(&app, &request) }
        })
    })
    .await;
}

/// Accepts connections until `stop`, then waits for those that are open.
async fn accept<F>(
    listener: TcpListener,
    most: usize,
    mut stop: watch::Receiver<bool>,
    serve: impl Fn(TcpStream, watch::Receiver<bool>) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let permits = Arc::new(Semaphore::new(most));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = stopped(&mut stop) => break,
            Some(_) = connections.join_next() => continue,
            accepted = async {
                let permit = permits.clone().acquire_owned().await;
                listener.accept().await.map(|(stream, _)| (stream, permit))
            } => accepted,
        };
        match accepted {
            Ok((stream, permit)) => {
                let _ = stream.set_nodelay(true);
                let served = serve(stream, stop.clone());
                connections.spawn(async move {
                    let _permit = permit;
                    served.await;
                });
            }
            Err(error) => {
                // Most often too many open files: it passes, and must not become a busy loop.
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Returns when it's time to stop, or when nobody could say so any more.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Whether a connection is in use.
struct Activity {
    under_way: AtomicUsize,
    /// When it will have idled for too long.
    deadline: Mutex<Instant>,
}

impl Activity {
    fn new() -> Activity {
        Activity { under_way: AtomicUsize::new(0), deadline: Mutex::new(Instant::now() + FIRST_REQUEST_LIMIT) }
    }

    /// Counts a request as under way until what is answered is dropped.
    fn request(self: &Arc<Activity>) -> UnderWay {
        self.under_way.fetch_add(1, Relaxed);
        UnderWay(self.clone())
    }

    fn deadline(&self) -> Instant {
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when the connection has idled for too long.
    async fn idled(&self) {
        loop {
            let deadline = if self.under_way.load(Relaxed) > 0 { Instant::now() + IDLE_LIMIT } else { self.deadline() };
            if deadline <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(deadline).await;
        }
    }
}

/// A request that is under way, until this is dropped: also where its future is.
struct UnderWay(Arc<Activity>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Relaxed);
        *self.0.deadline.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now() + IDLE_LIMIT;
    }
}

/// Serves a connection until its client closes it, it idles, or `stop`.
async fn serve_connection<F>(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    mut stop: watch::Receiver<bool>,
    handle: impl Fn(Request<Incoming>) -> F + Send + Sync + 'static,
) where
    F: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    let activity = Arc::new(Activity::new());
    let counted = activity.clone();
    let service = service_fn(move |request| {
        let under_way = counted.request();
        let answer = handle(request);
        async move {
            let _under_way = under_way;
            Ok::<_, Infallible>(answer.await)
        }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    // HTTP/1 has one limit for a head and for idling before it.
    builder.http1().timer(TokioTimer::new()).header_read_timeout(IDLE_LIMIT).max_buf_size(BUFFER_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(16 << 10);
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stopped(&mut stop) => {
            // What is under way has its own time limit.
            connection.as_mut().graceful_shutdown();
            connection.await
        }
        () = activity.idled() => {
            connection.as_mut().graceful_shutdown();
            tokio::time::timeout(CLOSE_LIMIT, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = ended {
        tracing::debug!(error, "a connection broke off");
    }
}
