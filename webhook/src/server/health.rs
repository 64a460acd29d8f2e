//! For the kubelet and Prometheus: `/healthz`, `/readyz`, `/metrics`.

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{self, HeaderValue},
};

use super::{App, admission::text};

/// Answers a request.
pub fn handle(app: &App, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/healthz") => text(StatusCode::OK, "alive\n"),
        (&Method::GET, "/readyz") if app.metrics.draining.get() != 0 => {
            text(StatusCode::SERVICE_UNAVAILABLE, "pgsidecar-webhook is stopping\n")
        }
        (&Method::GET, "/readyz") => match app.certificates.not_ready() {
            Some(why) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
            None => text(StatusCode::OK, "ready\n"),
        },
        (&Method::GET, "/metrics") => match app.metrics.render() {
            Ok(metrics) => {
                let mut response = text(StatusCode::OK, metrics);
                let kind = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
                response.headers_mut().insert(header::CONTENT_TYPE, kind);
                response
            }
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        },
        _ => text(StatusCode::NOT_FOUND, "there are /healthz, /readyz and /metrics here\n"),
    }
}
