//! Looking at a pod. It may come from anywhere, so nothing about its shape is believed.

use serde_json::Value;

use super::Rejection;

/// How many elements a list may have. Pods have fewer; each costs time and memory, and what PostgreSQL's container has is
/// written twice more.
const MOST: [(&str, usize); 9] = [
    ("containers", 200),
    ("initContainers", 200),
    ("volumes", 1_000),
    ("args", 1_000),
    ("command", 1_000),
    ("env", 1_000),
    ("envFrom", 200),
    ("ports", 500),
    ("volumeMounts", 500),
];

/// The member that is a text.
pub(super) fn text<'a>(value: &'a Value, name: &str) -> Option<&'a str> {
    value.get(name)?.as_str()
}

/// The elements of the member that is a list; none if there is no such member.
pub(super) fn items<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value.get(name).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// The elements of the member that are texts.
pub(super) fn texts<'a>(value: &'a Value, name: &str) -> Vec<&'a str> {
    items(value, name).iter().filter_map(Value::as_str).collect()
}

/// The element that is called so.
pub(super) fn named<'a>(list: &'a [Value], name: &str) -> Option<&'a Value> {
    list.iter().find(|element| text(element, "name") == Some(name))
}

/// Where the element is that is called so.
pub(super) fn position(list: &[Value], name: &str) -> Option<usize> {
    list.iter().position(|element| text(element, "name") == Some(name))
}

/// The value in the container's `env` of this name, if it's a plain one: without a source or a reference.
pub(super) fn plain_variable<'a>(container: &'a Value, name: &str) -> Option<&'a str> {
    // Of several entries of one name Kubernetes takes the last.
    let entry = items(container, "env").iter().rev().find(|entry| text(entry, "name") == Some(name))?;
    text(entry, "value").filter(|value| !value.contains('$'))
}

/// A text with its references (`$(NAME)`) resolved as Kubernetes does it; `None` if a value isn't known here.
pub(super) fn expand(container: &Value, text: &str) -> Option<String> {
    // Longer than any path, number or address; each reference is looked for among all variables.
    if text.len() > 4096 {
        return None;
    }
    let mut expanded = String::new();
    let mut rest = text;
    while let Some((before, behind)) = rest.split_once('$') {
        expanded.push_str(before);
        rest = behind;
        if let Some(escaped) = behind.strip_prefix('$') {
            expanded.push('$');
            rest = escaped;
        } else if let Some((name, behind)) = behind.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            expanded.push_str(plain_variable(container, name)?);
            rest = behind;
        } else {
            expanded.push('$');
        }
    }
    expanded.push_str(rest);
    Some(expanded)
}

/// A pod's annotation.
pub(super) fn annotation<'a>(pod: &'a Value, name: &str) -> Option<&'a str> {
    pod.get("metadata")?.get("annotations")?.get(name)?.as_str()
}

pub(super) fn containers(pod: &Value) -> &[Value] {
    pod.get("spec").map_or(&[], |spec| items(spec, "containers"))
}

pub(super) fn init_containers(pod: &Value) -> &[Value] {
    pod.get("spec").map_or(&[], |spec| items(spec, "initContainers"))
}

/// Whether the pod has this annotation, whatever its value.
pub(super) fn has_annotation(pod: &Value, name: &str) -> bool {
    let annotations = pod.get("metadata").and_then(|metadata| metadata.get("annotations"));
    annotations.and_then(|annotations| annotations.get(name)).is_some()
}

/// Whether all is a list or an object that has to be one. The API server makes sure of it, but a file may hold anything.
pub(super) fn check_shape(pod: &Value) -> Result<(), Rejection> {
    object(pod, "metadata", "")?;
    object(pod.get("metadata").unwrap_or(&Value::Null), "annotations", "metadata.")?;
    let spec = pod.get("spec").filter(|spec| spec.is_object());
    let spec = spec.ok_or_else(|| odd("spec", "an object"))?;
    object(spec, "securityContext", "spec.")?;
    list(spec, "volumes", "spec.")?;
    for name in ["containers", "initContainers"] {
        list(spec, name, "spec.")?;
        for (index, container) in items(spec, name).iter().enumerate() {
            let prefix = format!("spec.{name}[{index}].");
            if !container.is_object() {
                return Err(odd(prefix.trim_end_matches('.'), "an object"));
            }
            for name in ["args", "command", "env", "envFrom", "ports", "volumeMounts"] {
                list(container, name, &prefix)?;
            }
            for name in ["args", "command"] {
                if items(container, name).iter().any(|text| !text.is_string()) {
                    return Err(odd(&format!("{prefix}{name}"), "a list of texts"));
                }
            }
        }
    }
    Ok(())
}

fn object(parent: &Value, name: &str, prefix: &str) -> Result<(), Rejection> {
    match parent.get(name) {
        None | Some(Value::Null | Value::Object(_)) => Ok(()),
        Some(_) => Err(odd(&format!("{prefix}{name}"), "an object")),
    }
}

fn list(parent: &Value, name: &str, prefix: &str) -> Result<(), Rejection> {
    let most = MOST.iter().find(|(list, _)| *list == name).map_or(usize::MAX, |(_, most)| *most);
    match parent.get(name) {
        Some(Value::Array(elements)) if elements.len() > most => Err(Rejection::new(
            format!("{prefix}{name} has {} elements, more than {most}", elements.len()),
            "pgsidecar takes no pod that is so large: take the label pgsidecar.dev/inject out of its template, or make it smaller.",
        )),
        None | Some(Value::Null | Value::Array(_)) => Ok(()),
        Some(_) => Err(odd(&format!("{prefix}{name}"), "a list")),
    }
}

fn odd(path: &str, expected: &str) -> Rejection {
    Rejection::new(format!("{path} is not {expected}"), "This is no pod: look at the indentation of the manifest.")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn references_are_resolved_where_their_values_are_plain() {
        let container = json!({"env": [
            {"name": "A", "value": "x"},
            {"name": "A", "value": "1"},
            {"name": "B", "value": "$(A)"},
            {"name": "C", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        ]});
        for (text, expected) in [
            ("/data", Some("/data")),
            ("/$(A)/$(A)", Some("/1/1")),
            ("$$(A)$", Some("$(A)$")),
            ("$(A", Some("$(A")),
            ("$(B)", None),
            ("$(C)", None),
            ("$(D)", None),
        ] {
            assert_eq!(expand(&container, text).as_deref(), expected, "{text}");
        }
        assert_eq!(expand(&container, &"$(A)".repeat(2_000)), None);
    }
}
