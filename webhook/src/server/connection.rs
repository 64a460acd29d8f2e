//! Connections: accepted, encrypted, served, and ended when they idle or when it's time to stop.

use std::{convert::Infallible, io, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Request, Response, Version,
    body::Incoming,
    header::{self, HeaderValue},
    service::service_fn,
};
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
    time::MissedTickBehavior,
};
use tokio_rustls::TlsAcceptor;

use super::{
    App,
    activity::{Activity, Limits, Open},
    admission, health,
    room::Room,
};
use crate::certificates::provider;

/// Connections at a time. When there are as many, a quarter of them are closed, those that have idled longest, so that
/// there are places for the next ones; if all are in use, those wait to be accepted. An API server has one or two.
const MAX_CONNECTIONS: usize = 64;
const MAX_HEALTH_CONNECTIONS: usize = 16;
/// For a TLS handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// Clients keep idle connections for less than this (Go: 90 s), so that it's they who close them: a request must not
/// meet a connection that is just being closed.
const LIMITS: Limits = Limits { first: Duration::from_secs(10), between: Duration::from_secs(150) };
/// The kubelet asks at once, and its probes have a timeout of a second or so. There's no second request.
const HEALTH_LIMITS: Limits = Limits { first: Duration::from_secs(2), between: Duration::from_secs(2) };
/// For a connection that makes way to end, while no request is under way.
const EVICTION_LIMIT: Duration = Duration::from_millis(50);
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
    let room = Arc::new(Room::default());
    accept(listener, MAX_CONNECTIONS, LIMITS, stop, move |stream, activity, stop| {
        let (app, acceptor, room) = (app.clone(), acceptor.clone(), room.clone());
        async move {
            let shaken = tokio::select! {
                shaken = acceptor.accept(stream) => shaken,
                () = tokio::time::sleep(HANDSHAKE_LIMIT) => Err(io::ErrorKind::TimedOut.into()),
                () = activity.evicted() => Err(io::Error::other("it made way for another connection")),
            };
            let stream = match shaken {
                Ok(stream) => stream,
                Err(error) => {
                    app.metrics.handshake_failures.inc();
                    tracing::debug!(%error, "a TLS handshake failed");
                    return;
                }
            };
            app.metrics.connections.inc();
            let shared = app.clone();
            serve_connection(stream, activity, stop, &http(), move |request| {
                let (app, room) = (shared.clone(), room.clone());
                async move {
                    let http1 = request.version() < Version::HTTP_2;
                    let mut answer = admission::handle(&app, &room, request).await;
                    if http1 && app.metrics.draining.get() != 0 {
                        // The next request is for another replica. HTTP/2 has GOAWAY for it, at the end.
                        answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                    }
                    answer
                }
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
    accept(listener, MAX_HEALTH_CONNECTIONS, HEALTH_LIMITS, stop, move |stream, activity, stop| {
        let app = app.clone();
        async move {
            serve_connection(stream, activity, stop, &plain_http(), move |request| {
                let app = app.clone();
                async move { health::handle(&app, &request) }
            })
            .await;
        }
    })
    .await;
}

/// Accepts connections until `stop`, then waits for those that are open.
async fn accept<F>(
    listener: TcpListener,
    most: usize,
    limits: Limits,
    mut stop: watch::Receiver<bool>,
    serve: impl Fn(TcpStream, Arc<Activity>, watch::Receiver<bool>) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let permits = Arc::new(Semaphore::new(most));
    let mut connections = JoinSet::new();
    let mut open = Open::default();
    // Between two looks for those that idle, while all places are taken.
    let mut look = tokio::time::interval(EVICTION_LIMIT);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let accepted = tokio::select! {
            () = stopped(&mut stop) => break,
            Some(_) = connections.join_next() => continue,
            _ = look.tick(), if permits.available_permits() == 0 => {
                open.evict(most / 4);
                continue;
            }
            accepted = async {
                let permit = permits.clone().acquire_owned().await;
                listener.accept().await.map(|(stream, _)| (stream, permit))
            } => accepted,
        };
        match accepted {
            Ok((stream, permit)) => {
                let _ = stream.set_nodelay(true);
                let activity = Arc::new(Activity::new(limits));
                open.add(&activity);
                let served = serve(stream, activity, stop.clone());
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

/// HTTP as the API server speaks it.
fn http() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    // HTTP/1 has one limit for a head and for idling before it.
    builder.http1().timer(TokioTimer::new()).header_read_timeout(LIMITS.between).max_buf_size(BUFFER_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(16 << 10);
    builder
}

/// HTTP for probes: one request for each connection, so that none is held.
fn plain_http() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new()).http1_only();
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEALTH_LIMITS.first).keep_alive(false);
    builder
}

/// Serves a connection until its client closes it, it idles, has to make way, or `stop`.
async fn serve_connection<F>(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    activity: Arc<Activity>,
    mut stop: watch::Receiver<bool>,
    builder: &auto::Builder<TokioExecutor>,
    handle: impl Fn(Request<Incoming>) -> F + Send + Sync + 'static,
) where
    F: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    let counted = activity.clone();
    let service = service_fn(move |request| {
        let under_way = counted.request();
        let answer = handle(request);
        async move {
            let _under_way = under_way;
            Ok::<_, Infallible>(answer.await)
        }
    });
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stopped(&mut stop) => {
            // What is under way has its own time limit.
            connection.as_mut().graceful_shutdown();
            connection.await
        }
        () = activity.evicted() => {
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                ended = connection => ended,
                () = activity.quiet(EVICTION_LIMIT) => Ok(()),
            }
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
