//! CPU and memory, and the quality of service that comes of them.

use serde_json::{Value, json};

use super::view::{containers, init_containers};

/// What the annotation may name.
const NAMES: [&str; 3] = ["cpu", "memory", "ephemeral-storage"];

/// What ours get, and whether the pod keeps its class.
pub(super) struct Resources {
    /// A `ResourceRequirements`; `None` if the pod's own are for all of its containers.
    pub(super) requirements: Option<Value>,
    /// The pod was Guaranteed and won't be any more.
    pub(super) loses_guaranteed: bool,
}

/// What ours get in this pod, of which they aren't a part yet.
pub(super) fn choose(pod: &Value, wanted: Option<&Value>) -> Resources {
    if let Some(wanted) = wanted {
        let loses_guaranteed = is_guaranteed(pod) && !has_equal_limits(wanted);
        return Resources { requirements: Some(wanted.clone()), loses_guaranteed };
    }
    let own = pod.get("spec").and_then(|spec| spec.get("resources"));
    if own.is_some_and(|own| own.as_object().is_some_and(|own| !own.is_empty())) {
        return Resources { requirements: None, loses_guaranteed: false };
    }
    let requirements = if is_guaranteed(pod) {
        let both = json!({"cpu": "500m", "memory": "256Mi"});
        json!({"limits": both, "requests": both})
    } else {
        let mut limits = json!({"memory": "256Mi"});
        if all_limit_cpu(pod) {
            limits["cpu"] = json!("2");
        }
        json!({"limits": limits, "requests": {"cpu": "100m", "memory": "64Mi"}})
    };
    Resources { requirements: Some(requirements), loses_guaranteed: false }
}

/// The annotation: a `ResourceRequirements` as JSON.
pub(super) fn parse(text: &str) -> Result<Value, String> {
    let expected = r#"not JSON like {"requests": {"cpu": "100m"}, "limits": {"memory": "512Mi"}}"#;
    let value: Value = serde_json::from_str(text).map_err(|problem| format!("{expected}: {problem}"))?;
    for (name, amounts) in value.as_object().ok_or(expected)? {
        if !matches!(name.as_str(), "limits" | "requests") {
            return Err(format!("{name:?} is neither limits nor requests"));
        }
        for (resource, amount) in amounts.as_object().ok_or(expected)? {
            if !NAMES.contains(&resource.as_str()) {
                return Err(format!("{name}.{resource:?}: only {} are of use to pgsidecar", NAMES.join(", ")));
            }
            if quantity(amount).is_none() {
                return Err(format!("{name}.{resource}: {amount} is not a quantity like 100m or 256Mi"));
            }
        }
    }
    let amount = |name: &str, resource: &str| value.get(name)?.get(resource).and_then(quantity);
    for resource in NAMES {
        if let (Some(request), Some(limit)) = (amount("requests", resource), amount("limits", resource))
            && request > limit
        {
            return Err(format!("more {resource} is requested than the limit allows"));
        }
    }
    Ok(value)
}

/// Whether each container has a limit of CPU: a quota may demand it, which would refuse the pod for ours.
fn all_limit_cpu(pod: &Value) -> bool {
    let limit = |container: &Value| container.pointer("/resources/limits/cpu").and_then(quantity);
    let all = || containers(pod).iter().chain(init_containers(pod));
    all().next().is_some() && all().all(|container| limit(container).is_some())
}

/// Whether the pod's class is Guaranteed, by its containers.
fn is_guaranteed(pod: &Value) -> bool {
    let all = || containers(pod).iter().chain(init_containers(pod));
    all().next().is_some() && all().all(|container| container.get("resources").is_some_and(has_equal_limits))
}

fn has_equal_limits(requirements: &Value) -> bool {
    let amount = |name: &str, resource: &str| requirements.get(name)?.get(resource);
    ["cpu", "memory"].into_iter().all(|resource| {
        let limit = amount("limits", resource).and_then(quantity).filter(|&limit| limit > 0);
        // The API server fills in a request that is missing.
        let request = amount("requests", resource).map_or(limit, quantity);
        limit.is_some() && request == limit
    })
}

/// A quantity of Kubernetes' in billionths, rounded down; `None` if it's none or negative.
fn quantity(value: &Value) -> Option<u128> {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        _ => return None,
    };
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || whole.len() > 18 || fraction.contains('.') {
        return None;
    }
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let billionths = format!("{whole}{digits}").parse::<u128>().ok()?;
    let power = |power: u32| 10_u128.checked_pow(power)?.checked_mul(billionths);
    match suffix {
        "" => Some(billionths),
        "n" => Some(billionths / 1_000_000_000),
        "u" => Some(billionths / 1_000_000),
        "m" => Some(billionths / 1_000),
        "k" => power(3),
        "M" => power(6),
        "G" => power(9),
        "T" => power(12),
        "P" => power(15),
        "E" => power(18),
        "Ki" | "Mi" | "Gi" | "Ti" | "Pi" | "Ei" => {
            let exponent = "KMGTPE".find(suffix.chars().next()?)? + 1;
            billionths.checked_mul(1024_u128.checked_pow(u32::try_from(exponent).ok()?)?)
        }
        _ => match suffix.strip_prefix(['e', 'E'])?.parse::<i32>().ok()? {
            exponent @ 0..=18 => power(exponent.unsigned_abs()),
            exponent @ -9..0 => Some(billionths / 10_u128.checked_pow(exponent.unsigned_abs())?),
            _ => None,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_compared_by_what_they_mean() {
        for (one, same) in [
            (json!("1"), json!("1000m")),
            (json!(1), json!("1e0")),
            (json!("0.5"), json!("500m")),
            (json!("1Gi"), json!("1024Mi")),
            (json!("1073741824"), json!("1Gi")),
            (json!("1k"), json!("1E3")),
            (json!("100m"), json!("0.1")),
        ] {
            assert_eq!(quantity(&one), quantity(&same), "{one} {same}");
            assert!(quantity(&one).is_some(), "{one}");
        }
        for odd in
            [json!(""), json!("-1"), json!("1X"), json!("."), json!("1.2.3"), json!(null), json!("1e99"), json!("Mi")]
        {
            assert_eq!(quantity(&odd), None, "{odd}");
        }
    }

    #[test]
    fn a_guaranteed_pod_has_equal_limits_everywhere() {
        let equal = json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "1000m"}});
        let pod = |main: &Value, init: Option<&Value>| {
            let init: Vec<Value> = init.into_iter().map(|resources| json!({"resources": resources})).collect();
            json!({"spec": {"containers": [{"resources": main}], "initContainers": init}})
        };
        assert!(is_guaranteed(&pod(&equal, None)));
        assert!(is_guaranteed(&pod(&equal, Some(&equal))));
        assert!(!is_guaranteed(&pod(&equal, Some(&json!({})))));
        for less in [
            json!({}),
            json!({"limits": {"memory": "1Gi"}}),
            json!({"limits": {"cpu": "1", "memory": "0"}}),
            json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "500m"}}),
        ] {
            assert!(!is_guaranteed(&pod(&less, None)), "{less}");
        }
    }

    #[test]
    fn where_all_have_a_limit_of_cpu_ours_have_one_too() {
        let limited = json!({"resources": {"limits": {"cpu": "1"}, "requests": {"cpu": "100m"}}});
        let limits = |containers: &[&Value], init: &[&Value]| {
            let pod = json!({"spec": {"containers": containers, "initContainers": init}});
            choose(&pod, None).requirements.unwrap()["limits"].clone()
        };
        assert_eq!(limits(&[&limited], &[&limited]), json!({"cpu": "2", "memory": "256Mi"}));
        assert_eq!(limits(&[&limited, &json!({})], &[]), json!({"memory": "256Mi"}));
        assert_eq!(limits(&[&limited], &[&json!({})]), json!({"memory": "256Mi"}));
        assert_eq!(limits(&[], &[]), json!({"memory": "256Mi"}));
    }

    #[test]
    fn the_annotation_is_checked() {
        assert!(parse(r#"{"limits": {"ephemeral-storage": "2Gi"}, "requests": {"ephemeral-storage": "1Gi"}}"#).is_ok());
        assert!(parse(r#"{"limits": {"cpu": 1, "memory": "1Gi"}}"#).is_ok());
        for odd in [
            "1",
            "{",
            r#"{"limit": {}}"#,
            r#"{"limits": 1}"#,
            r#"{"limits": {"cpu": "much"}}"#,
            r#"{"limits": {"cpu": "1"}, "requests": {"cpu": "2"}}"#,
            r#"{"limits": {"ephemeral-storage": "1Gi"}, "requests": {"ephemeral-storage": "2Gi"}}"#,
            r#"{"limits": {"nvidia.com/gpu": "1"}}"#,
            r#"{"requests": {"CPU": "1"}}"#,
        ] {
            assert!(parse(odd).is_err(), "{odd}");
        }
    }
}
