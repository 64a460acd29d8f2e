//! The four requests to Kubernetes' API that certificates of our own need: GET and PUT of a Secret, GET and PATCH of a
//! MutatingWebhookConfiguration. As a pod's service account, with the token and the CA that the kubelet mounts.
//!
//! Each request is a connection of its own: there are two in half a minute. Token and CA are read for each, since both
//! change. Time and size are bounded.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, InvalidDnsNameError, ServerName, pem, pem::PemObject},
};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::provider;

/// Where the kubelet mounts what belongs to the service account.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// For a request: connecting, asking, the whole answer.
const TIME_LIMIT: Duration = Duration::from_secs(10);
/// An object of the API has 1.5 MB at most (etcd's limit).
const MAX_ANSWER_BYTES: usize = 4 << 20;
/// Of a message of the API server's, in our log.
const MAX_MESSAGE: usize = 500;

/// How the API server is reached.
#[derive(Clone, Debug)]
pub struct Api {
    host: String,
    port: u16,
    account: PathBuf,
}

/// Why a request has failed.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// There's no such environment: not in a cluster.
    #[error("{0} is not set or not usable: this isn't a pod")]
    NoCluster(&'static str),
    /// A file of the service account can't be read.
    #[error("{path}: {error}", path = .path.display())]
    Account {
        /// Which.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The CA isn't PEM.
    #[error("the CA of the service account: {0}")]
    Authority(pem::Error),
    /// The CA or TLS can't be used.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// The API server's address isn't one.
    #[error("the API server's address: {0}")]
    Address(#[from] InvalidDnsNameError),
    /// It can't be reached, or its certificate isn't trusted.
    #[error("the API server can't be reached: {0}")]
    Unreachable(io::Error),
    /// It doesn't speak HTTP as it should.
    #[error("the API server can't be asked: {0}")]
    Http(#[from] hyper::Error),
    /// The request can't be written.
    #[error("the request can't be written: {0}")]
    Request(#[from] hyper::http::Error),
    /// The answer broke off or is too large.
    #[error("the API server's answer: {0}")]
    Answer(Box<dyn std::error::Error + Send + Sync>),
    /// The answer isn't JSON.
    #[error("the API server's answer isn't JSON: {0}")]
    Malformed(#[from] serde_json::Error),
    /// It took too long.
    #[error("the API server didn't answer within {} s", TIME_LIMIT.as_secs())]
    Timeout,
    /// It answered that it won't.
    #[error("the API server answered {code} to {what}: {message}")]
    Refused {
        /// The HTTP status.
        code: u16,
        /// Method and path.
        what: String,
        /// What it says.
        message: String,
    },
}

impl ApiError {
    /// Whether somebody else was faster: what was read has to be read again.
    pub fn is_conflict(&self) -> bool {
        matches!(self, ApiError::Refused { code: 409, .. })
    }

    /// Whether the object isn't there.
    pub fn is_not_found(&self) -> bool {
        matches!(self, ApiError::Refused { code: 404, .. })
    }

    /// Whether we have no right to.
    pub fn is_forbidden(&self) -> bool {
        matches!(self, ApiError::Refused { code: 401 | 403, .. })
    }
}

impl Api {
    /// That of the cluster that we are in.
    ///
    /// # Errors
    /// If this isn't a pod.
    pub fn in_cluster() -> Result<Api, ApiError> {
        let variable = |name| env::var(name).ok().filter(|value| !value.is_empty()).ok_or(ApiError::NoCluster(name));
        let host = variable("KUBERNETES_SERVICE_HOST")?;
        let port = "KUBERNETES_SERVICE_PORT";
        let port = variable(port)?.parse().map_err(|_| ApiError::NoCluster(port))?;
        Ok(Api::at(host, port, ACCOUNT))
    }

    /// The one at this address, with the account whose `ca.crt` and `token` are in that directory.
    pub fn at(host: impl Into<String>, port: u16, account: impl AsRef<Path>) -> Api {
        Api { host: host.into(), port, account: account.as_ref().to_owned() }
    }

    /// Reads an object.
    ///
    /// # Errors
    /// If it can't be read.
    pub async fn get(&self, path: &str) -> Result<Value, ApiError> {
        self.request(Method::GET, path, None).await
    }

    /// Replaces an object by another with the same `metadata.resourceVersion`.
    ///
    /// # Errors
    /// If it can't be written; a conflict if it has changed since.
    pub async fn put(&self, path: &str, object: &Value) -> Result<Value, ApiError> {
        self.request(Method::PUT, path, Some(("application/json", object))).await
    }

    /// Merges into an object, lists by their keys. A `metadata.resourceVersion` in the patch is a condition.
    ///
    /// # Errors
    /// If it can't be written; a conflict if it has changed since.
    pub async fn patch(&self, path: &str, patch: &Value) -> Result<Value, ApiError> {
        self.request(Method::PATCH, path, Some(("application/strategic-merge-patch+json", patch))).await
    }

    async fn request(&self, method: Method, path: &str, body: Option<(&str, &Value)>) -> Result<Value, ApiError> {
        match tokio::time::timeout(TIME_LIMIT, self.ask(method, path, body)).await {
            Ok(answer) => answer,
            Err(_) => Err(ApiError::Timeout),
        }
    }

    async fn ask(&self, method: Method, path: &str, body: Option<(&str, &Value)>) -> Result<Value, ApiError> {
        let token = String::from_utf8_lossy(&self.account_file("token")?).trim().to_owned();
        let connector = TlsConnector::from(Arc::new(self.tls()?));
        let name = ServerName::try_from(self.host.clone())?;
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await.map_err(ApiError::Unreachable)?;
        let stream = connector.connect(name, stream).await.map_err(ApiError::Unreachable)?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // It ends with the sender.
        tokio::spawn(async move {
            let _ = connection.await;
        });
        let what = format!("{method} {path}");
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, self.authority())
            .header(header::AUTHORIZATION, format!("Bearer {token}"))
            .header(header::ACCEPT, "application/json")
            .header(header::USER_AGENT, concat!("pgsidecar-webhook/", env!("CARGO_PKG_VERSION")));
        let bytes = match body {
            Some((kind, value)) => {
                request = request.header(header::CONTENT_TYPE, kind);
                Bytes::from(serde_json::to_vec(value)?)
            }
            None => Bytes::new(),
        };
        let answer = sender.send_request(request.body(Full::new(bytes))?).await?;
        let status = answer.status();
        let bytes = Limited::new(answer.into_body(), MAX_ANSWER_BYTES).collect().await.map_err(ApiError::Answer)?;
        let bytes = bytes.to_bytes();
        if !status.is_success() {
            return Err(ApiError::Refused { code: status.as_u16(), what, message: message(&bytes) });
        }
        Ok(serde_json::from_slice(&bytes)?)
    }

    /// As it stands in a URL: IPv6 in brackets.
    fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    fn tls(&self) -> Result<ClientConfig, ApiError> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(&self.account_file("ca.crt")?) {
            roots.add(certificate.map_err(ApiError::Authority)?)?;
        }
        let config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(config)
    }

    fn account_file(&self, name: &str) -> Result<Vec<u8>, ApiError> {
        let path = self.account.join(name);
        fs::read(&path).map_err(|error| ApiError::Account { path, error })
    }
}

/// What a `Status` of the API says, or else the beginning of what came.
fn message(answer: &[u8]) -> String {
    let status: Option<Value> = serde_json::from_slice(answer).ok();
    let message = status.as_ref().and_then(|status| status.get("message")).and_then(Value::as_str);
    let text = message.map_or_else(|| String::from_utf8_lossy(answer), Into::into);
    text.chars().take(MAX_MESSAGE).collect()
}
