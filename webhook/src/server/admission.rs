//! `POST /inject`, with bounds on what a request may cost: bytes, memory, time.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::{
    HeaderMap, Method, Request, Response, StatusCode,
    body::{Body, Incoming},
    header::{self, HeaderValue},
};
use serde_json::Value;

use super::{
    App,
    room::{Held, MAX_BODY_BYTES, Room},
};
use crate::{
    inject::{Injection, Rejection},
    metrics,
    review::{self, Outcome},
};

/// What is asked of a pod in a namespace.
pub type Injector = Arc<dyn Fn(&Value, &str) -> Result<Injection, Rejection> + Send + Sync>;

/// From a request's head to its answer. The API server waits for 5 s (`timeoutSeconds`), and should get a reason.
const TIME_LIMIT: Duration = Duration::from_secs(4);
/// What a body is read into at first, unless it's said to be smaller.
const FIRST_CAPACITY: usize = 16 << 10;

/// Computes an answer in another thread, so that connections and probes are served meanwhile and the time limit holds.
/// What has been begun goes on when nobody waits any more; its turn and its body's room end with it.
async fn compute(room: &Room, body: BytesMut, held: Held, injector: Injector) -> Result<review::Answer, Refused> {
    let turn = room.turn().await;
    let computed = tokio::task::spawn_blocking(move || {
        let answer = review::answer(&body, |pod, namespace| injector(pod, namespace));
        drop((body, held, turn));
        answer
    });
    let failed = |error| Refused::new(StatusCode::INTERNAL_SERVER_ERROR, format!("no answer was computed: {error}"));
    computed.await.map_err(failed)?.map_err(|bad| {
        let status = match bad {
            review::BadReview::TooManyValues => StatusCode::PAYLOAD_TOO_LARGE,
            review::BadReview::Unwritable(_) => StatusCode::INTERNAL_SERVER_ERROR,
            _ => StatusCode::BAD_REQUEST,
        };
        Refused::new(status, bad.to_string())
    })
}

/// Why there's no review in the answer. The API server shows status and text in its own words.
struct Refused {
    status: StatusCode,
    why: String,
}

impl Refused {
    fn new(status: StatusCode, why: impl Into<String>) -> Refused {
        Refused { status, why: why.into() }
    }
}

/// Answers a request.
pub async fn handle(app: &App, room: &Arc<Room>, request: Request<Incoming>) -> Response<Full<Bytes>> {
    if request.uri().path() != "/inject" {
        return text(StatusCode::NOT_FOUND, "there is only /inject here\n");
    }
    let began = Instant::now();
    let answered = match tokio::time::timeout(TIME_LIMIT, inject(app, room, request)).await {
        Ok(answered) => answered,
        Err(_) => Err(Refused::new(
            StatusCode::REQUEST_TIMEOUT,
            "it took too long: the body didn't come, or there was no room for it, or others were computed",
        )),
    };
    match answered {
        Ok(answer) => {
            let outcome = match answer.outcome {
                Outcome::Admitted => metrics::Outcome::Admitted,
                Outcome::Unchanged => metrics::Outcome::Unchanged,
                Outcome::Rejected => metrics::Outcome::Rejected,
            };
            app.metrics.answered(outcome, began.elapsed());
            let (namespace, pod) = (&answer.namespace, &answer.pod);
            match &answer.rejection {
                Some(rejection) => tracing::warn!(namespace, pod, "not admitted: {rejection}"),
                None => tracing::debug!(namespace, pod, outcome = ?answer.outcome, "answered"),
            }
            let mut response = Response::new(Full::new(Bytes::from(answer.body)));
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
            response
        }
        Err(refused) => {
            app.metrics.answered(metrics::Outcome::Bad, began.elapsed());
            tracing::warn!(status = refused.status.as_u16(), "a request was refused: {}", refused.why);
            let mut response = text(refused.status, format!("{}\n", refused.why));
            if refused.status == StatusCode::METHOD_NOT_ALLOWED {
                response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("POST"));
            }
            response
        }
    }
}

async fn inject(app: &App, room: &Arc<Room>, request: Request<Incoming>) -> Result<review::Answer, Refused> {
    if request.method() != Method::POST {
        return Err(Refused::new(StatusCode::METHOD_NOT_ALLOWED, "only POST is answered"));
    }
    if !is_json(request.headers()) {
        return Err(Refused::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "only application/json is read"));
    }
    let too_large =
        || Refused::new(StatusCode::PAYLOAD_TOO_LARGE, format!("a body may have {} MiB", MAX_BODY_BYTES >> 20));
    let body = request.into_body();
    let announced = body.size_hint().exact();
    let most = match announced.map(usize::try_from) {
        None => MAX_BODY_BYTES,
        Some(Ok(length)) if length <= MAX_BODY_BYTES => length,
        Some(_) => return Err(too_large()),
    };
    let mut held = room.hold();
    let bytes = read(body, most, &mut held).await?.ok_or_else(too_large)?;
    compute(room, bytes, held, app.injector.clone()).await
}

/// The body, unless it has more bytes than that. A piece that there's no room for waits in the connection's window.
async fn read(mut body: Incoming, most: usize, held: &mut Held) -> Result<Option<BytesMut>, Refused> {
    let mut bytes = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame =
            frame.map_err(|error| Refused::new(StatusCode::BAD_REQUEST, format!("the body broke off: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > most {
            return Ok(None);
        }
        held.grow(bytes.len() + data.len()).await;
        if bytes.is_empty() {
            bytes.reserve(most.min(FIRST_CAPACITY));
        }
        bytes.extend_from_slice(&data);
    }
    Ok(Some(bytes))
}

/// Whether a body is said to be JSON; parameters such as the charset don't matter.
fn is_json(headers: &HeaderMap) -> bool {
    let stated = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let (kind, _) = stated.split_once(';').unwrap_or((stated, ""));
    kind.trim().eq_ignore_ascii_case("application/json")
}

/// A plain answer.
pub fn text(status: StatusCode, text: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}
