//! A stand-in for Kubernetes' API server: one Secret, one MutatingWebhookConfiguration, over TLS.
//!
//! No real API server can be had on a machine without a cluster; `tests/e2e` runs the webhook against one. This one
//! has what certificates of our own rely on: optimistic concurrency by `metadata.resourceVersion` for PUT and for PATCH,
//! strategic merge of `webhooks` by name, the account's token, a certificate that is checked, and it can refuse, break
//! and be silent. It has no opinion of its own on the objects.

use std::{
    collections::VecDeque,
    fs,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, Response, StatusCode, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use pgsidecar_webhook::certificates::{api::Api, files, managed::WEBHOOK, provider};
use rustls::ServerConfig;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::pki::Ca;

pub const SECRET: &str = "/api/v1/namespaces/pgsidecar-system/secrets/pgsidecar-webhook-ca";
pub const CONFIGURATION: &str = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/pgsidecar-webhook";

/// How it fails.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// It doesn't.
    None,
    /// It answers with this status.
    Status(u16),
    /// It never answers.
    Silence,
    /// It closes the connection.
    Break,
}

pub struct State {
    pub secret: Option<Value>,
    pub configuration: Value,
    version: u64,
    pub fault: Fault,
    /// Only requests whose `METHOD PATH` begins with this fail.
    pub fault_for: &'static str,
    pub token: String,
    pub conflicts: u32,
    pub patches: u32,
    /// The `caBundle`s that there were, the latest last, and since when.
    bundles: VecDeque<(Instant, String)>,
}

pub struct ApiServer {
    pub state: Arc<Mutex<State>>,
    pub api: Api,
    pub account: tempfile::TempDir,
}

impl ApiServer {
    pub async fn start() -> ApiServer {
        let ca = Ca::new();
        let leaf = ca.leaf("127.0.0.1");
        let account = tempfile::tempdir().unwrap();
        fs::write(account.path().join("ca.crt"), ca.pem()).unwrap();
        fs::write(account.path().join("token"), "first\n").unwrap();
        let key = files::load(leaf.certificate.as_bytes(), leaf.key.as_bytes()).unwrap().key;
        let tls = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(key)));
        let acceptor = TlsAcceptor::from(Arc::new(tls));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let api = Api::at("127.0.0.1", listener.local_addr().unwrap().port(), account.path());
        let state = Arc::new(Mutex::new(State {
            secret: Some(json!({
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": "pgsidecar-webhook-ca", "resourceVersion": "1", "labels": {"kept": "yes"}},
                "type": "Opaque",
            })),
            configuration: json!({
                "metadata": {"name": "pgsidecar-webhook", "resourceVersion": "1"},
                "webhooks": [
                    {"name": "other.example.org", "clientConfig": {"url": "https://other", "caBundle": "b3RoZXI="}},
                    {"name": WEBHOOK, "clientConfig": {"service": {"name": "pgsidecar-webhook"}}, "timeoutSeconds": 5},
                ],
            }),
            version: 1,
            fault: Fault::None,
            fault_for: "",
            token: "first".to_owned(),
            conflicts: 0,
            patches: 0,
            bundles: VecDeque::from([(Instant::now(), String::new())]),
        }));
        let shared = state.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (acceptor, state) = (acceptor.clone(), shared.clone());
                tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    let service = service_fn(move |request| answer(state.clone(), request));
                    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        ApiServer { state, api, account }
    }

    pub fn fail(&self, fault: Fault, of: &'static str) {
        let mut state = self.state.lock().unwrap();
        (state.fault, state.fault_for) = (fault, of);
    }

    /// The `caBundle`, as an API server sees it that is late by `late`.
    pub fn bundle(&self, late: Duration) -> String {
        let state = self.state.lock().unwrap();
        let at = Instant::now().checked_sub(late).unwrap();
        let known = state.bundles.iter().rev().find(|(since, _)| *since <= at).or(state.bundles.front());
        known.unwrap().1.clone()
    }

    /// Every `caBundle` that there was.
    pub fn bundles(&self) -> Vec<String> {
        self.state.lock().unwrap().bundles.iter().map(|(_, bundle)| bundle.clone()).collect()
    }

    /// Sets it, as `kubectl apply` does.
    pub fn set_bundle(&self, bundle: &str) {
        self.state.lock().unwrap().set_bundle(bundle);
    }

    /// Replaces the Secret's data and empties the `caBundle`, as replacing both objects does, with no pass in between.
    pub fn replace_both(&self, data: Value) {
        let mut state = self.state.lock().unwrap();
        let version = state.next_version();
        let secret = state.secret.as_mut().unwrap();
        secret["data"] = data;
        secret["metadata"]["resourceVersion"] = version;
        state.set_bundle("");
    }
}

impl State {
    fn next_version(&mut self) -> Value {
        self.version += 1;
        self.version.to_string().into()
    }

    fn set_bundle(&mut self, bundle: &str) {
        let entry = json!({"name": WEBHOOK, "clientConfig": {"caBundle": STANDARD.encode(bundle)}});
        self.patch(&json!({"webhooks": [entry]}));
    }

    fn put(&mut self, object: Value) -> (StatusCode, Value) {
        let Some(secret) = &self.secret else { return status(404, "secrets not found") };
        if secret["metadata"]["resourceVersion"] != object["metadata"]["resourceVersion"] {
            self.conflicts += 1;
            return status(409, "the object has been modified");
        }
        let version = self.next_version();
        let mut object = object;
        object["metadata"]["resourceVersion"] = version;
        self.secret = Some(object.clone());
        (StatusCode::OK, object)
    }

    fn patch(&mut self, patch: &Value) -> (StatusCode, Value) {
        let condition = &patch["metadata"]["resourceVersion"];
        if !condition.is_null() && *condition != self.configuration["metadata"]["resourceVersion"] {
            self.conflicts += 1;
            return status(409, "the object has been modified");
        }
        self.patches += 1;
        for change in patch["webhooks"].as_array().unwrap() {
            let entries = self.configuration["webhooks"].as_array_mut().unwrap();
            let entry = entries.iter_mut().find(|entry| entry["name"] == change["name"]).expect("no such webhook");
            assert_eq!(change.as_object().unwrap().len(), 2, "more than the caBundle: {change}");
            entry["clientConfig"]["caBundle"] = change["clientConfig"]["caBundle"].clone();
            let bundle = STANDARD.decode(change["clientConfig"]["caBundle"].as_str().unwrap()).unwrap();
            self.bundles.push_back((Instant::now(), String::from_utf8(bundle).unwrap()));
        }
        let version = self.next_version();
        self.configuration["metadata"]["resourceVersion"] = version;
        (StatusCode::OK, self.configuration.clone())
    }
}

fn status(code: u16, message: &str) -> (StatusCode, Value) {
    (StatusCode::from_u16(code).unwrap(), json!({"kind": "Status", "message": message, "code": code}))
}

async fn answer(state: Arc<Mutex<State>>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, std::io::Error> {
    let what = format!("{} {}", request.method(), request.uri().path());
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let token = request.headers().get("authorization").map(|value| value.to_str().unwrap().to_owned());
    let kind = request.headers().get("content-type").map(|value| value.to_str().unwrap().to_owned());
    let body = request.into_body().collect().await.map_err(std::io::Error::other)?.to_bytes();
    let fault = {
        let state = state.lock().unwrap();
        if what.starts_with(state.fault_for) { state.fault } else { Fault::None }
    };
    match fault {
        Fault::Silence => std::future::pending().await,
        Fault::Break => return Err(std::io::Error::other("broken on purpose")),
        _ => {}
    }
    let mut state = state.lock().unwrap();
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let (status, answer) = match (method, path.as_str()) {
        _ if matches!(fault, Fault::Status(_)) => {
            let Fault::Status(code) = fault else { unreachable!() };
            status(code, "refused on purpose")
        }
        _ if token != Some(format!("Bearer {}", state.token)) => status(401, "Unauthorized"),
        (Method::GET, SECRET) => match &state.secret {
            Some(secret) => (StatusCode::OK, secret.clone()),
            None => status(404, "secrets \"pgsidecar-webhook-ca\" not found"),
        },
        (Method::PUT, SECRET) => state.put(body),
        (Method::GET, CONFIGURATION) => (StatusCode::OK, state.configuration.clone()),
        (Method::PATCH, CONFIGURATION) if kind.as_deref() == Some("application/strategic-merge-patch+json") => {
            state.patch(&body)
        }
        _ => status(403, "no right to do that"),
    };
    let mut response = Response::new(Full::new(Bytes::from(answer.to_string())));
    *response.status_mut() = status;
    Ok(response)
}
