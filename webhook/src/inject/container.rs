//! Which container is PostgreSQL's.

use serde_json::Value;

use super::{
    Mode, Rejection, STATUS, images,
    sidecar::{PREPARE, SIDECAR},
    view::{annotation, containers, init_containers, named, position, text},
};

/// What PostgreSQL's container is usually called.
const USUAL: [&str; 7] = ["postgres", "postgresql", "db", "database", "pg", "postgis", "timescaledb"];

/// Images of other databases, by the last part of their names.
const OTHERS: [&str; 18] = [
    "cassandra",
    "clickhouse",
    "clickhouse-server",
    "cockroach",
    "couchdb",
    "elasticsearch",
    "etcd",
    "influxdb",
    "mariadb",
    "memcached",
    "mongo",
    "mongodb",
    "mysql",
    "neo4j",
    "opensearch",
    "percona",
    "redis",
    "valkey",
];

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

/// Our own container, if the pod was injected already.
pub(super) fn ours(pod: &Value) -> Option<&Value> {
    named(containers(pod), SIDECAR).or_else(|| {
        let init = init_containers(pod);
        named(init, SIDECAR).or_else(|| named(init, PREPARE))
    })
}

/// What our note on the pod says: the mode, and PostgreSQL's container.
pub(super) struct Status {
    pub(super) mode: Mode,
    container: String,
}

impl Status {
    /// Reads our note; `None` if it isn't what we write, or says what the pod doesn't have.
    pub(super) fn read(pod: &Value) -> Option<Status> {
        let status: Value = serde_json::from_str(annotation(pod, STATUS)?).ok()?;
        let (mode, list) = match text(&status, "mode")? {
            "native" => (Mode::Native, init_containers(pod)),
            "classic" => (Mode::Classic, containers(pod)),
            _ => return None,
        };
        named(list, SIDECAR)?;
        Some(Status { mode, container: text(&status, "container")?.to_owned() })
    }
}

/// The place of PostgreSQL's container among `spec.containers`.
pub(super) fn find(pod: &Value, wanted: Option<&str>) -> Result<usize, Rejection> {
    let all = containers(pod);
    let name = |index: &usize| text(&all[*index], "name").unwrap_or("");
    if let Some(wanted) = wanted {
        return position(all, wanted).ok_or_else(|| {
            if named(init_containers(pod), wanted).is_some() {
                return among_init_containers(wanted);
            }
            let problem =
                format!("pgsidecar.dev/container: there is no container {wanted:?} (there are: {})", list(all));
            Rejection::new(problem, "Name the container that PostgreSQL runs in.")
        });
    }
    // Another webhook may have given its image another name since.
    if let Some(index) = Status::read(pod).and_then(|status| position(all, &status.container)) {
        return Ok(index);
    }
    let theirs = (0..all.len()).filter(|index| ![SIDECAR, PREPARE, ""].contains(&name(index)));
    let theirs: Vec<usize> = theirs.filter(|index| !is_another(&all[*index])).collect();
    let by_image: Vec<usize> = theirs.iter().copied().filter(|index| is_postgres(&all[*index])).collect();
    let usual: Vec<usize> = theirs.iter().copied().filter(|index| USUAL.contains(&name(index))).collect();
    let alone: Vec<usize> = theirs.iter().copied().filter(|index| !is_companion(&all[*index])).collect();
    let found = match (by_image.as_slice(), usual.as_slice(), alone.as_slice()) {
        // The image says one thing and the name another: a database of their own build beside a job with the client.
        ([image], [usual], _) if image != usual => None,
        ([only], _, _) | (_, [only], _) | (_, _, [only]) => Some(*only),
        _ => None,
    };
    found.ok_or_else(|| {
        let init = init_containers(pod).iter().filter(|init| text(init, "restartPolicy") == Some("Always"));
        if let Some(init) = init.filter(|init| is_postgres(init)).find_map(|init| text(init, "name")) {
            return among_init_containers(init);
        }
        let problem = format!("it can't be told which container is PostgreSQL's (there are: {})", list(all));
        Rejection::new(problem, "Name it in the annotation pgsidecar.dev/container.")
    })
}

fn among_init_containers(name: &str) -> Rejection {
    Rejection::new(
        format!("PostgreSQL's container {name:?} is an init container, which starts before pgsidecar"),
        "Put it among the pod's containers.",
    )
}

/// Whether it's known by its image's name that this isn't PostgreSQL, whatever the container is called.
fn is_another(container: &Value) -> bool {
    let image = text(container, "image").unwrap_or("").split('@').next().unwrap_or("");
    let name = image.rsplit('/').next().and_then(|name| name.split(':').next()).unwrap_or("");
    OTHERS.contains(&name)
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
        // The image decides, unless a name contradicts it.
        assert_eq!(found(pair(("main", "postgres:17"), ("db", "mysql:8")), None), Ok(0));
        assert_eq!(found(pair(("main", "postgres:17"), ("database", "docker.io/library/redis@sha256:0")), None), Ok(0));
        assert_eq!(found(pair(("db", "registry.example.com/our-db"), ("web", "nginx")), None), Ok(0));
        assert_eq!(found(pair(("postgres", "postgres:17"), ("dumps", "postgres:17")), None), Ok(0));
        assert_eq!(found(pair(("db", "mysql:8"), ("postgres", "postgis/postgis:17-3.5")), None), Ok(1));
    }

    #[test]
    fn it_is_not_guessed() {
        let two = json!([{"name": "a", "image": "x"}, {"name": "b", "image": "y"}]);
        let problem = "it can't be told which container is PostgreSQL's (there are: a, b)";
        assert_eq!(found(two.clone(), None), Err(problem.to_owned()));
        let problem = "pgsidecar.dev/container: there is no container \"c\" (there are: a, b)";
        assert_eq!(found(two, Some("c")), Err(problem.to_owned()));
        let contradiction = json!([{"name": "db", "image": "x"}, {"name": "dumps", "image": "postgres:17"}]);
        assert!(found(contradiction, None).is_err());
        assert!(found(json!([{"name": "db", "image": "mysql:8"}]), None).is_err());
        assert!(found(json!([]), None).unwrap_err().ends_with("(there are: none)"));
    }

    #[test]
    fn among_the_init_containers_it_is_told_so() {
        let pod = json!({"spec": {
            "initContainers": [{"name": "db", "image": "postgres:17", "restartPolicy": "Always"}],
            "containers": [{"name": "a", "image": "x"}, {"name": "b", "image": "y"}],
        }});
        for named in [None, Some("db")] {
            let rejection = find(&pod, named).unwrap_err();
            assert!(rejection.problem.contains("\"db\" is an init container"), "{rejection}");
        }
    }

    #[test]
    fn our_note_is_believed_only_with_what_it_says() {
        let pod = |status: &str, list: &str| {
            let mut pod = json!({
                "metadata": {"annotations": {"pgsidecar.dev/status": status}},
                "spec": {"containers": [{"name": "main"}, {"name": "other"}]},
            });
            let ours = json!({"name": "pgsidecar"});
            match pod["spec"][list].as_array_mut() {
                Some(list) => list.push(ours),
                None => pod["spec"][list] = json!([ours]),
            }
            pod
        };
        let native = r#"{"mode":"native","container":"other"}"#;
        assert_eq!(find(&pod(native, "initContainers"), None), Ok(1));
        assert!(Status::read(&pod(native, "containers")).is_none());
        assert!(Status::read(&pod(r#"{"mode":"classic","container":"x"}"#, "initContainers")).is_none());
        for odd in ["", "{}", "[]", r#"{"mode":"native"}"#, r#"{"mode":"new","container":"x"}"#, r#"{"container":"x"}"#]
        {
            assert!(Status::read(&pod(odd, "initContainers")).is_none(), "{odd}");
        }
    }
}
