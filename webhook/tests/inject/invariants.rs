//! What holds for every pod that was injected.

use std::collections::BTreeSet;

use pgsidecar_webhook::inject::{Injection, Operation, inject};
use serde_json::{Value, json};

use crate::settings;

/// The pod with the patch applied, as the API server applies it.
pub fn apply(pod: &Value, injection: &Injection) -> Value {
    let patch: json_patch::Patch = serde_json::from_value(json!(injection.patch)).unwrap();
    let mut after = pod.clone();
    json_patch::patch(&mut after, &patch).unwrap_or_else(|problem| panic!("{problem}: {pod}"));
    after
}

/// What holds even for pods that the API server would never let through.
pub fn holds_in_any_case(pod: &Value, injection: &Injection) -> Value {
    let after = apply(pod, injection);
    adds_only(pod, injection);
    assert_eq!(holds(&after, pod, ""), Ok(()));
    for warning in &injection.warnings {
        assert!(warning.chars().count() <= 120, "{warning}");
    }
    let again = inject(&after, "shop", &settings()).unwrap_or_else(|rejection| panic!("{rejection}: {after}"));
    assert_eq!(again.patch, [], "a second call adds more");
    after
}

/// Checks all of them. Whatever is a secret in `pod` has to be `hunter2`.
pub fn check(pod: &Value, injection: &Injection) {
    let after = holds_in_any_case(pod, injection);
    assert!(!json!(injection.patch).to_string().contains("hunter2"), "a secret is in the patch");
    assert!(!json!(injection.audit.iter().map(|(_, text)| text).collect::<Vec<_>>()).to_string().contains("hunter2"));
    assert!(!injection.warnings.concat().contains("hunter2"), "a secret is in a warning");

    let audit = |name: &str| {
        let found = injection.audit.iter().find(|(audited, _)| *audited == name);
        found.map_or("", |(_, text)| text.as_str())
    };
    let postgres = container(&after, "containers", audit("container")).expect("PostgreSQL's container");
    let was = container(pod, "containers", audit("container")).expect("PostgreSQL's container");
    postgres_is_untouched(was, postgres);
    assert!(after["metadata"]["annotations"]["pgsidecar.dev/status"].is_string());
    let prepare = container(&after, "initContainers", "pgsidecar-prepare").expect("pgsidecar-prepare");
    let native = audit("mode") == "native";
    let sidecar =
        container(&after, if native { "initContainers" } else { "containers" }, "pgsidecar").expect("pgsidecar");
    assert_eq!(sidecar.get("restartPolicy"), native.then_some(&json!("Always")));
    assert_eq!(prepare.get("restartPolicy"), None);
    if native {
        assert_eq!(list(&after["spec"], "initContainers").last().map(|last| text(last, "name")), Some("pgsidecar"));
    } else {
        assert_eq!(list(&after["spec"], "containers").first().map(|first| text(first, "name")), Some("pgsidecar"));
        assert!(after["metadata"]["annotations"]["kubectl.kubernetes.io/default-container"].is_string());
    }
    for ours in [prepare, sidecar] {
        is_restricted(&ours["securityContext"]);
        sees_what_postgres_sees(was, ours);
        names_are_unique(ours);
        is_valid(&after, ours);
    }
    if is_guaranteed(pod) && !pod["metadata"]["annotations"]["pgsidecar.dev/resources"].is_string() {
        assert!(is_guaranteed(&after), "the pod isn't Guaranteed any more");
    }
    assert!(
        after["spec"]["terminationGracePeriodSeconds"].as_u64().unwrap() >= 180
            || pod["metadata"]["annotations"]["pgsidecar.dev/grace-seconds"].is_string()
    );
}

/// Each operation makes what wasn't there; only the grace period may be raised.
fn adds_only(pod: &Value, injection: &Injection) {
    let mut document = pod.clone();
    for operation in &injection.patch {
        let Operation::Add { path, value } = operation;
        let (parent, name) = path.rsplit_once('/').unwrap();
        let inserts = document.pointer(parent).is_some_and(Value::is_array);
        let there = document.pointer(path).filter(|there| !there.is_null() && !inserts);
        if path == "/spec/terminationGracePeriodSeconds" {
            assert!(there.and_then(Value::as_u64).is_none_or(|there| Some(there) < value.as_u64()), "{path}");
        } else {
            assert_eq!(there, None, "{path} is there already");
        }
        assert!(!name.is_empty());
        let patch: json_patch::Patch = serde_json::from_value(json!([operation])).unwrap();
        json_patch::patch(&mut document, &patch).unwrap();
    }
}

/// Whether all of `before` is in `after`: members by their names, elements in their order.
fn holds(after: &Value, before: &Value, path: &str) -> Result<(), String> {
    match (after, before) {
        (_, Value::Null) => Ok(()),
        (Value::Object(after), Value::Object(before)) => before.iter().try_for_each(|(name, value)| {
            let path = format!("{path}/{name}");
            if path == "/spec/terminationGracePeriodSeconds" {
                return Ok(());
            }
            holds(after.get(name).ok_or_else(|| format!("{path} is gone"))?, value, &path)
        }),
        (Value::Array(after), Value::Array(before)) => {
            let mut rest = after.iter();
            before.iter().enumerate().try_for_each(|(index, value)| {
                let path = format!("{path}/{index}");
                let found = rest.any(|element| holds(element, value, &path).is_ok());
                if found { Ok(()) } else { Err(format!("{path} is gone")) }
            })
        }
        (after, before) if after == before => Ok(()),
        _ => Err(format!("{path} is {after}, not {before}")),
    }
}

fn postgres_is_untouched(was: &Value, is: &Value) {
    for (name, value) in is.as_object().unwrap() {
        match name.as_str() {
            "args" | "volumeMounts" => {
                let before = list(was, name);
                assert_eq!(&list(is, name)[..before.len()], before, "{name}");
            }
            _ => assert_eq!(Some(value), was.get(name), "{name}"),
        }
    }
    let added = &list(is, "volumeMounts")[list(was, "volumeMounts").len()..];
    assert!(
        added
            .iter()
            .all(|mount| *mount == json!({"name": "pgsidecar-run", "mountPath": "/pgsidecar", "readOnly": true}))
    );
    let args: Vec<&str> = list(is, "args")[list(was, "args").len()..].iter().map(|arg| arg.as_str().unwrap()).collect();
    let flags = args.strip_prefix(&["postgres"]).unwrap_or(&args);
    assert_eq!(flags.len() % 2, 0, "{flags:?}");
}

/// The Pod Security Standard "restricted", for a container without a pod's context to lean on.
fn is_restricted(context: &Value) {
    assert_eq!(context["allowPrivilegeEscalation"], json!(false));
    assert_eq!(context["capabilities"], json!({"drop": ["ALL"]}));
    assert_eq!(context["runAsNonRoot"], json!(true));
    assert!(context["runAsUser"].as_u64().unwrap() > 0 && context["runAsGroup"].is_u64());
    assert_eq!(context["seccompProfile"], json!({"type": "RuntimeDefault"}));
    assert_eq!(context["readOnlyRootFilesystem"], json!(true));
    assert_eq!(context.get("privileged"), None);
}

/// The volumes of PostgreSQL are at the same paths.
fn sees_what_postgres_sees(postgres: &Value, ours: &Value) {
    for mount in list(postgres, "volumeMounts") {
        let path = text(mount, "mountPath");
        let other = list(ours, "volumeMounts").iter().find(|other| text(other, "mountPath") == path);
        let left_out = ["/var/run/secrets/kubernetes.io", "/usr/local/bin", "/usr/lib/"];
        if left_out.iter().any(|left_out| path.starts_with(left_out)) {
            assert_eq!(other, None, "{path}");
            continue;
        }
        if path == "/pgsidecar" {
            continue;
        }
        let mut expected = mount.clone();
        if expected.get("mountPropagation") == Some(&json!("Bidirectional")) {
            expected.as_object_mut().unwrap().remove("mountPropagation");
        }
        assert_eq!(other, Some(&expected), "{path}");
        // Kubernetes expands it from the container's own environment.
        let references = text(mount, "subPathExpr").split("$(").skip(1).filter_map(|rest| rest.split(')').next());
        for name in references {
            let has = |container: &Value| list(container, "env").iter().any(|entry| text(entry, "name") == name);
            assert!(has(ours) || !has(postgres), "{name}");
        }
    }
}

fn names_are_unique(container: &Value) {
    for (field, key) in [("env", "name"), ("volumeMounts", "mountPath")] {
        let names: Vec<&str> = list(container, field).iter().map(|element| text(element, key)).collect();
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len(), "{field}: {names:?}");
    }
}

/// What the API server asks of a container, as far as ours could fail it.
fn is_valid(pod: &Value, container: &Value) {
    let volumes: BTreeSet<&str> = list(&pod["spec"], "volumes").iter().map(|volume| text(volume, "name")).collect();
    for mount in list(container, "volumeMounts") {
        assert!(volumes.contains(text(mount, "name")), "{mount}");
    }
    for port in list(container, "ports") {
        let name = text(port, "name");
        assert!(name.len() <= 15 && name.contains(|c: char| c.is_ascii_lowercase()), "{name}");
    }
    assert_eq!(text(list(container, "envFrom").last().unwrap(), "prefix"), "");
    assert_eq!(list(container, "envFrom").last().unwrap()["secretRef"]["optional"], json!(true));
}

fn is_guaranteed(pod: &Value) -> bool {
    let all: Vec<&Value> =
        list(&pod["spec"], "containers").iter().chain(list(&pod["spec"], "initContainers")).collect();
    let equal = |container: &&Value| {
        ["cpu", "memory"].iter().all(|name| {
            let resources = &container["resources"];
            let (limit, request) = (&resources["limits"][name], &resources["requests"][name]);
            let same = |a: &str, b: &str| a == b || format!("{a}000m") == b || format!("{b}000m") == a;
            limit.is_string() && (request.is_null() || same(limit.as_str().unwrap(), request.as_str().unwrap_or("")))
        })
    };
    !all.is_empty() && all.iter().all(equal)
}

fn container<'a>(pod: &'a Value, kind: &str, name: &str) -> Option<&'a Value> {
    list(&pod["spec"], kind).iter().find(|container| text(container, "name") == name)
}

fn list<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value[name].as_array().map_or(&[], Vec::as_slice)
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or("")
}
