//! Which container is PostgreSQL's.

use serde_json::Value;

use super::{
    Rejection, images,
    sidecar::{PREPARE, SIDECAR},
    view::{containers, position, text},
};

/// What PostgreSQL's container is usually called.
const USUAL: [&str; 7] = ["postgres", "postgresql", "db", "database", "pg", "postgis", "timescaledb"];

/// Parts of the names of containers that stand beside a PostgreSQL.
const COMPANIONS: [&str; 11] = [
    "istio-proxy",
    "linkerd-proxy",
    "exporter",
    "pgbouncer",
    "pgcat",
    "vault-agent",
    "fluent-bit",
    "filebeat",
    "promtail",
    "cloud-sql-proxy",
    "otel-collector",
];

/// The place of PostgreSQL's container among `spec.containers`.
pub(super) fn find(pod: &Value, named: Option<&str>) -> Result<usize, Rejection> {
    let all = containers(pod);
    let name = |index: &usize| text(&all[*index], "name").unwrap_or("");
    if let Some(wanted) = named {
        return position(all, wanted).ok_or_else(|| {
            let problem =
                format!("pgsidecar.dev/container: there is no container {wanted:?} (there are: {})", list(all));
            Rejection::new(problem, "Name the container that PostgreSQL runs in.")
        });
    }
    let theirs: Vec<usize> = (0..all.len()).filter(|index| ![SIDECAR, PREPARE, ""].contains(&name(index))).collect();
    let usual: Vec<usize> = theirs.iter().copied().filter(|index| USUAL.contains(&name(index))).collect();
    let alone: Vec<usize> = theirs.iter().copied().filter(|index| !is_companion(&all[*index])).collect();
    let by_image: Vec<usize> = theirs.iter().copied().filter(|index| is_postgres(&all[*index])).collect();
    let only = [usual, alone, by_image].into_iter().find(|candidates| candidates.len() == 1);
    only.map(|candidates| candidates[0]).ok_or_else(|| {
        let problem = format!("it can't be told which container is PostgreSQL's (there are: {})", list(all));
        Rejection::new(problem, "Name it in the annotation pgsidecar.dev/container.")
    })
}

fn is_companion(container: &Value) -> bool {
    let name = text(container, "name").unwrap_or("");
    let image = text(container, "image").unwrap_or("");
    // Without the registry's name and the tag, which say nothing.
    let image = image.split('@').next().and_then(|image| image.rsplit('/').next()).unwrap_or("");
    COMPANIONS.iter().any(|part| name.contains(part) || image.contains(part))
}

fn is_postgres(container: &Value) -> bool {
    text(container, "image").and_then(images::look_up).is_some()
}

fn list(containers: &[Value]) -> String {
    let names: Vec<&str> = containers.iter().filter_map(|container| text(container, "name")).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn found(containers: Value, named: Option<&str>) -> Result<usize, String> {
        find(&json!({"spec": {"containers": containers}}), named).map_err(|rejection| rejection.problem)
    }

    #[test]
    fn it_is_found_by_annotation_name_being_alone_or_image() {
        let pair = |first: (&str, &str), second: (&str, &str)| json!([{"name": first.0, "image": first.1}, {"name": second.0, "image": second.1}]);
        assert_eq!(found(pair(("a", "x"), ("b", "y")), Some("b")), Ok(1));
        assert_eq!(found(pair(("web", "nginx"), ("postgres", "x")), None), Ok(1));
        assert_eq!(found(json!([{"name": "anything", "image": "x"}]), None), Ok(0));
        assert_eq!(found(pair(("metrics", "quay.io/prom/postgres-exporter:v1"), ("main", "x")), None), Ok(1));
        assert_eq!(found(pair(("istio-proxy", "istio/proxyv2:1"), ("main", "x")), None), Ok(1));
        assert_eq!(found(pair(("pgsidecar", "x"), ("main", "x")), None), Ok(1));
        assert_eq!(found(pair(("web", "nginx"), ("store", "postgres:17")), None), Ok(1));
        // Two that are called so: neither; the image decides.
        assert_eq!(found(pair(("db", "mysql:8"), ("postgres", "postgis/postgis:17-3.5")), None), Ok(1));
    }

    #[test]
    fn it_is_not_guessed() {
        let two = json!([{"name": "a", "image": "x"}, {"name": "b", "image": "y"}]);
        let problem = "it can't be told which container is PostgreSQL's (there are: a, b)";
        assert_eq!(found(two.clone(), None), Err(problem.to_owned()));
        let problem = "pgsidecar.dev/container: there is no container \"c\" (there are: a, b)";
        assert_eq!(found(two, Some("c")), Err(problem.to_owned()));
        assert!(found(json!([]), None).unwrap_err().ends_with("(there are: none)"));
    }
}
