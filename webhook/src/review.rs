//! `AdmissionReview` of `admission.k8s.io/v1`: the API server's question as bytes, the answer as bytes.
//!
//! Pure: no clock, no network, no state. Only the creation of a pod is a question that is answered with more than
//! "allowed"; everything else passes unchanged, so a webhook configuration that selects too much does no harm.
//! `dryRun` is answered alike: nothing here has side effects.
//!
//! The format: <https://kubernetes.io/docs/reference/access-authn-authz/extensible-admission-controllers/>.

use std::{borrow::Cow, collections::BTreeMap};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::inject::{Injection, Rejection};

/// The only version that is spoken.
const API_VERSION: &str = "admission.k8s.io/v1";
const KIND: &str = "AdmissionReview";
/// Values that a body may hold. A large pod has a few thousand; an object in them takes 600 bytes of memory
/// once it is parsed, whereas in the body it may be eight: `{"a":0},`.
const MAX_VALUES: usize = 50_000;

/// What has become of a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The pod gets something.
    Admitted,
    /// Allowed as it is: it has all already, or it's nothing that is ours.
    Unchanged,
    /// The pod isn't admitted.
    Rejected,
}

/// An answer, and what of it is worth a line in the log.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The `AdmissionReview` that the API server is waiting for.
    pub body: Vec<u8>,
    /// What has become of it.
    pub outcome: Outcome,
    /// The pod's namespace; empty if it's no pod.
    pub namespace: String,
    /// The pod's name, or what its name will begin with.
    pub pod: String,
    /// Why it isn't admitted.
    pub rejection: Option<Rejection>,
}

/// Why a body can't be answered. The API server then does what its `failurePolicy` says.
#[derive(Debug, thiserror::Error)]
pub enum BadReview {
    /// It isn't JSON, or not of that shape.
    #[error("the body isn't an AdmissionReview: {0}")]
    Malformed(serde_json::Error),
    /// Parsing it would take too much memory.
    #[error("the body holds more than {MAX_VALUES} values")]
    TooManyValues,
    /// Another version, or another kind.
    #[error("{api_version:?} {kind:?} isn't {API_VERSION} {KIND}")]
    Version {
        /// What it says.
        api_version: String,
        /// What it says.
        kind: String,
    },
    /// There's no request in it, or one without a uid.
    #[error("the AdmissionReview has no request with a uid")]
    NoRequest,
    /// The answer could not be written.
    #[error("the answer can't be written: {0}")]
    Unwritable(serde_json::Error),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Question<'a> {
    #[serde(borrow, default)]
    api_version: Cow<'a, str>,
    #[serde(borrow, default)]
    kind: Cow<'a, str>,
    request: Option<Request<'a>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Request<'a> {
    #[serde(borrow, default)]
    uid: Cow<'a, str>,
    #[serde(borrow, default)]
    kind: GroupVersionKind<'a>,
    #[serde(borrow)]
    sub_resource: Option<Cow<'a, str>>,
    #[serde(borrow)]
    namespace: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    operation: Cow<'a, str>,
    #[serde(default)]
    object: Value,
}

#[derive(Default, Deserialize)]
struct GroupVersionKind<'a> {
    #[serde(borrow, default)]
    group: Cow<'a, str>,
    #[serde(borrow, default)]
    version: Cow<'a, str>,
    #[serde(borrow, default)]
    kind: Cow<'a, str>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Review<'a> {
    api_version: &'static str,
    kind: &'static str,
    response: Response<'a>,
}

#[derive(Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Response<'a> {
    uid: &'a str,
    allowed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    patch_type: Option<&'static str>,
    /// Base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    patch: Option<String>,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    warnings: &'a [String],
    /// The API server puts the webhook's name before each key.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    audit_annotations: BTreeMap<&'static str, &'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<Status>,
}

/// What the client gets: `admission webhook "…" denied the request: MESSAGE`, with this HTTP status and reason. For
/// a pod of a StatefulSet it's the text of the event FailedCreate.
#[derive(Serialize)]
struct Status {
    status: &'static str,
    message: String,
    reason: &'static str,
    code: u16,
}

impl Request<'_> {
    fn creates_a_pod(&self) -> bool {
        let kind = (&*self.kind.group, &*self.kind.version, &*self.kind.kind);
        kind == ("", "v1", "Pod")
            && self.operation == "CREATE"
            && self.sub_resource.as_deref().is_none_or(str::is_empty)
            && self.object.is_object()
    }
}

/// Answers one question. `inject` gets the pod and its namespace.
///
/// # Errors
/// If it isn't a question that can be answered.
pub fn answer(
    body: &[u8],
    inject: impl FnOnce(&Value, &str) -> Result<Injection, Rejection>,
) -> Result<Answer, BadReview> {
    if values(body) > MAX_VALUES {
        return Err(BadReview::TooManyValues);
    }
    let question: Question = serde_json::from_slice(body).map_err(BadReview::Malformed)?;
    if (&*question.api_version, &*question.kind) != (API_VERSION, KIND) {
        let (api_version, kind) = (question.api_version.into_owned(), question.kind.into_owned());
        return Err(BadReview::Version { api_version, kind });
    }
    let request = question.request.filter(|request| !request.uid.is_empty()).ok_or(BadReview::NoRequest)?;
    let namespace = request.namespace.as_deref().unwrap_or_default();
    let verdict = if request.creates_a_pod() { inject(&request.object, namespace) } else { Ok(Injection::default()) };
    let (response, outcome) = match &verdict {
        Ok(injection) => allowed(injection)?,
        Err(rejection) => (denied(rejection), Outcome::Rejected),
    };
    let review = Review { api_version: API_VERSION, kind: KIND, response: Response { uid: &request.uid, ..response } };
    Ok(Answer {
        body: serde_json::to_vec(&review).map_err(BadReview::Unwritable)?,
        outcome,
        namespace: namespace.to_owned(),
        pod: name(&request.object).to_owned(),
        rejection: verdict.err(),
    })
}

fn allowed(injection: &Injection) -> Result<(Response<'_>, Outcome), BadReview> {
    let patch = match injection.patch.as_slice() {
        [] => None,
        patch => Some(STANDARD.encode(serde_json::to_vec(patch).map_err(BadReview::Unwritable)?)),
    };
    let outcome = if patch.is_some() { Outcome::Admitted } else { Outcome::Unchanged };
    let response = Response {
        allowed: true,
        patch_type: patch.is_some().then_some("JSONPatch"),
        patch,
        warnings: &injection.warnings,
        audit_annotations: injection.audit.iter().map(|(key, value)| (*key, value.as_str())).collect(),
        ..Response::default()
    };
    Ok((response, outcome))
}

fn denied(rejection: &Rejection) -> Response<'static> {
    let status = Status { status: "Failure", message: rejection.to_string(), reason: "Forbidden", code: 403 };
    Response { status: Some(status), ..Response::default() }
}

/// What the object is called; pods of controllers have no name yet, only its beginning.
fn name(object: &Value) -> &str {
    let metadata = object.get("metadata");
    let field = |field: &str| metadata?.get(field)?.as_str().filter(|name| !name.is_empty());
    field("name").or_else(|| field("generateName")).unwrap_or_default()
}

/// How many values JSON holds, roughly, told without parsing it: in front of one is a bracket, a brace, a colon or a
/// comma outside of a text.
fn values(body: &[u8]) -> usize {
    let (mut values, mut in_text, mut escaped) = (0, false, false);
    for byte in body {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_text => escaped = true,
            b'"' => in_text = !in_text,
            b'[' | b'{' | b':' | b',' if !in_text => values += 1,
            _ => {}
        }
    }
    values
}

#[cfg(test)]
mod tests;
