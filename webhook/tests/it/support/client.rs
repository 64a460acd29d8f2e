//! Clients as the API server is one: TLS by the webhook's name, trusting a bundle and nothing else.

use std::{fmt, net::SocketAddr, sync::Arc};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, client::conn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use pgsidecar_webhook::certificates::{Clock, provider};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
    time_provider::TimeProvider,
};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::NAME;

struct ClientClock(Clock);

impl fmt::Debug for ClientClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientClock")
    }
}

impl TimeProvider for ClientClock {
    fn current_time(&self) -> Option<UnixTime> {
        let seconds = u64::try_from((self.0)().as_second()).unwrap();
        Some(UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds)))
    }
}

/// TLS that trusts the CAs in `bundle`, at the time that `clock` tells.
pub fn trusting(bundle: &str, clock: &Clock, alpn: &[&str]) -> TlsConnector {
    trusting_with(bundle, clock, alpn, rustls::DEFAULT_VERSIONS)
}

/// The same with these versions of TLS.
pub fn trusting_with(
    bundle: &str,
    clock: &Clock,
    alpn: &[&str],
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(bundle.as_bytes()) {
        roots.add(root.unwrap()).unwrap();
    }
    let mut config = ClientConfig::builder_with_details(provider(), Arc::new(ClientClock(clock.clone())))
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    TlsConnector::from(Arc::new(config))
}

/// A new connection to the webhook.
pub async fn connect(address: SocketAddr, tls: &TlsConnector) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    tls.connect(ServerName::try_from(NAME).unwrap(), stream).await
}

/// A connection over which requests go.
pub struct Connection(Sender);

enum Sender {
    Http1(conn::http1::SendRequest<Full<Bytes>>),
    Http2(conn::http2::SendRequest<Full<Bytes>>),
}

impl Connection {
    /// Connects anew. HTTP/2 where that was agreed on.
    pub async fn open(address: SocketAddr, tls: &TlsConnector) -> Result<Connection, String> {
        let stream = connect(address, tls).await.map_err(|error| error.to_string())?;
        let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        let io = TokioIo::new(stream);
        let failed = |error: hyper::Error| error.to_string();
        if http2 {
            let (sender, connection) = conn::http2::handshake(TokioExecutor::new(), io).await.map_err(failed)?;
            tokio::spawn(connection);
            Ok(Connection(Sender::Http2(sender)))
        } else {
            let (sender, connection) = conn::http1::handshake(io).await.map_err(failed)?;
            tokio::spawn(connection);
            Ok(Connection(Sender::Http1(sender)))
        }
    }

    /// Sends a request; answers with status and body.
    pub async fn send(&mut self, request: Request<Full<Bytes>>) -> Result<(u16, Bytes), String> {
        let answer = match &mut self.0 {
            Sender::Http1(sender) => sender.send_request(request).await,
            Sender::Http2(sender) => sender.send_request(request).await,
        };
        let answer = answer.map_err(|error| format!("{error:?}"))?;
        let status = answer.status().as_u16();
        let body = answer.into_body().collect().await.map_err(|error| format!("{error:?}"))?;
        Ok((status, body.to_bytes()))
    }

    /// Asks for a review.
    pub async fn review(&mut self, review: &Value) -> Result<Value, String> {
        let (status, body) = self.send(post(review.to_string())).await?;
        if status != 200 {
            return Err(format!("{status}: {}", String::from_utf8_lossy(&body)));
        }
        serde_json::from_slice(&body).map_err(|error| error.to_string())
    }
}

/// `POST /inject`.
pub fn post(body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    Request::post(format!("https://{NAME}/inject"))
        .header("content-type", "application/json")
        .header("host", NAME)
        .body(Full::new(body.into()))
        .unwrap()
}

/// Status and body of a GET in plain HTTP.
pub async fn plain_get(address: SocketAddr, path: &str) -> (u16, String) {
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut sender, connection) = conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let request = Request::get(path).header("host", "probe").body(Full::<Bytes>::default()).unwrap();
    let answer = sender.send_request(request).await.unwrap();
    let status = answer.status().as_u16();
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8_lossy(&body).into_owned())
}
