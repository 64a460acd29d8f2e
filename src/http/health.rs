//! For the kubelet and Prometheus: read-only, reachable from the pod's address.
//!
//! The sidecar's readiness counts for the pod's, so an outage of the store or a wrong setting must not make it
//! unready (I8): `/readyz` fails only while the daemon stops. What is wrong is in `/metrics` and `/v1/status`.

use std::sync::Arc;

use bytes::Bytes;
use hyper::{Method, Request, StatusCode, body::Incoming};

use super::{Answer, alive, bytes, no_such_route};
use crate::{
    daemon::App,
    failure::{Code, Failure},
};

/// Answers one request.
///
/// # Errors
/// What the answer tells.
pub async fn handle(app: Arc<App>, request: Request<Incoming>) -> Result<Answer, Failure> {
    let text =
        |text: &'static str| bytes(StatusCode::OK, "text/plain; charset=utf-8", Bytes::from_static(text.as_bytes()));
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/healthz") => Ok(alive()),
        (&Method::GET, "/readyz") if app.is_stopping() => Err(Failure::new(Code::Stopping, "pgsidecar is stopping")),
        (&Method::GET, "/readyz") => Ok(text("ready\n")),
        (&Method::GET, "/metrics") => {
            let metrics = crate::metrics::render(&app.status().await)?;
            Ok(bytes(
                StatusCode::OK,
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
                Bytes::from(metrics),
            ))
        }
        _ => Err(no_such_route(&request)),
    }
}
