//! What is added to a pod.

use serde::Serialize;
use serde_json::Value;

/// What the webhook was told; the pod's annotations outrank it where they can.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The sidecar's image.
    pub image: String,
    /// Whether the cluster's kubelets know native sidecars (on by default since Kubernetes 1.29): the mode `auto`.
    pub native_sidecars: bool,
    /// The Secret in the pod's namespace that holds the sidecar's settings, unless an annotation names another.
    pub config_secret: String,
}

/// One operation of the patch (RFC 6902). There are no others: nothing that the pod has is changed or removed.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub enum Operation {
    /// `add`
    Add {
        /// Where, as a JSON pointer (RFC 6901).
        path: String,
        /// What.
        value: Value,
    },
}

/// What a pod gets.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Injection {
    /// Applied in this order. Empty where the pod has it all already.
    pub patch: Vec<Operation>,
    /// For the person who created the pod (`AdmissionResponse.warnings`), each at most 120 characters as the API asks.
    pub warnings: Vec<String>,
    /// For the audit log (`AdmissionResponse.auditAnnotations`): keys without prefix. No secret values.
    pub audit: Vec<(&'static str, String)>,
}

/// Why a pod isn't admitted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("pgsidecar: {problem}. {remedy}")]
pub struct Rejection {
    /// What is wrong; lower-case, without a full stop.
    pub problem: String,
    /// What to do; a full sentence.
    pub remedy: String,
}

/// What has to be added to `pod`, which is or will be in `namespace`.
///
/// # Errors
/// If the pod can't be backed up as it is, with what to change.
pub fn inject(pod: &Value, namespace: &str, settings: &Settings) -> Result<Injection, Rejection> {
    let _ = (pod, namespace, settings);
    Ok(Injection::default())
}
