//! Whether a pod is one that ours fit into.

use serde_json::{Value, json};

use super::{
    Rejection, STATUS,
    container::Status,
    network,
    sidecar::{PREPARE, SIDECAR},
    view::{containers, has_annotation, init_containers, position, text},
};

/// Checks what has nothing to do with PostgreSQL's container.
///
/// # Errors
/// If it can't be one of ours.
pub(super) fn check(pod: &Value) -> Result<(), Rejection> {
    let system = pod.get("spec").and_then(|spec| text(spec.get("os")?, "name"));
    if system.is_some_and(|system| system.eq_ignore_ascii_case("windows")) {
        return Err(Rejection::new(
            "the pod is for Windows",
            "Take the label pgsidecar.dev/inject out of its template.",
        ));
    }
    let shares = ["shareProcessNamespace", "hostPID"];
    let shared = |field: &&str| pod.get("spec").and_then(|spec| spec.get(field)) == Some(&json!(true));
    if let Some(field) = shares.iter().find(|field| shared(field)) {
        return Err(Rejection::new(
            format!("the pod's containers see each other's processes ({field})"),
            format!(
                "Take {field} out of the pod template, or the label pgsidecar.dev/inject: both run as one user, so that whoever may run programs in PostgreSQL could read the store's keys there."
            ),
        ));
    }
    network::check_ports(pod)?;
    if has_annotation(pod, STATUS) {
        return Status::read(pod).map(drop).ok_or_else(|| {
            Rejection::new(
                format!("the annotation {STATUS} isn't what pgsidecar writes there, or its container is gone"),
                "Take it out of the pod template: it's pgsidecar's own note.",
            )
        });
    }
    let ours = |list: &[Value]| [SIDECAR, PREPARE].into_iter().find(|name| position(list, name).is_some());
    match ours(containers(pod)).or_else(|| ours(init_containers(pod))) {
        None => Ok(()),
        Some(name) => Err(Rejection::new(
            format!("the pod has a container {name:?} that wasn't injected"),
            "If it's written by hand, take the label pgsidecar.dev/inject out of the pod template; otherwise give it another name.",
        )),
    }
}

/// Checks that a sidecar among the containers, which doesn't end by itself, isn't in a pod that is to end.
///
/// # Errors
/// If it is.
pub(super) fn check_restart_policy(pod: &Value) -> Result<(), Rejection> {
    match pod.get("spec").and_then(|spec| text(spec, "restartPolicy")) {
        Some(policy @ ("Never" | "OnFailure")) => Err(Rejection::new(
            format!("the pod has restartPolicy {policy}: in classic mode it would never end, as pgsidecar doesn't"),
            "Use native sidecars (pgsidecar.dev/mode: native), from Kubernetes 1.29 on.",
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pod_that_is_to_end_gets_no_container_that_does_not() {
        for (policy, expected) in
            [(json!("Always"), true), (Value::Null, true), (json!("OnFailure"), false), (json!("Never"), false)]
        {
            assert_eq!(check_restart_policy(&json!({"spec": {"restartPolicy": policy}})).is_ok(), expected, "{policy}");
        }
    }
}
