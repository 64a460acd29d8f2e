//! For any pod: a rejection, or a patch of which all of [`invariants`](crate::invariants) hold.

use pgsidecar_webhook::inject::inject;
use proptest::{prelude::*, sample::select};
use serde_json::{Map, Value, json};

use crate::{invariants, settings};

/// Names that mean something, and some that don't.
const WORDS: [&str; 24] = [
    "metadata",
    "labels",
    "annotations",
    "spec",
    "containers",
    "initContainers",
    "volumes",
    "volumeMounts",
    "env",
    "envFrom",
    "args",
    "command",
    "securityContext",
    "fsGroup",
    "name",
    "image",
    "mountPath",
    "resources",
    "limits",
    "ports",
    "pgsidecar.dev/status",
    "terminationGracePeriodSeconds",
    "~",
    "a/b~c",
];

/// Any JSON, made of such words.
fn anything() -> impl Strategy<Value = Value> {
    let word = || select(WORDS.to_vec()).prop_map(str::to_owned);
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(|value| json!(value)),
        any::<i64>().prop_map(|value| json!(value)),
        select(vec!["", "postgres", "postgres:17", "/var/lib/postgresql/data", "data", "$(X)", "ä~/\0", "true"])
            .prop_map(|value| json!(value)),
        word().prop_map(|value| json!(value)),
    ];
    leaf.prop_recursive(5, 48, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::Array),
            prop::collection::btree_map(word(), inner, 0..6).prop_map(|members| Value::Object(Map::from_iter(members))),
        ]
    })
}

fn optional<T: std::fmt::Debug + Clone + 'static>(values: Vec<T>) -> impl Strategy<Value = Option<T>> {
    prop::option::of(select(values))
}

/// PostgreSQL's container.
fn postgres() -> impl Strategy<Value = Value> {
    let images = vec![
        "postgres:17",
        "postgres:18-alpine",
        "postgis/postgis:16-3.4",
        "timescale/timescaledb:2.1-pg17",
        "someone/postgres:1",
    ];
    let arguments = vec![
        json!(["postgres"]),
        json!(["-c", "max_connections=5", "-p", "5433"]),
        json!(["docker-entrypoint.sh", "postgres", "-c", "archive_mode=on"]),
        json!([]),
        Value::Null,
        json!(["sh", "-c", "postgres"]),
    ];
    let env = vec![
        json!({"name": "PGDATA", "value": "/var/lib/postgresql/data/pg"}),
        json!({"name": "POSTGRES_USER", "value": "$(OTHER)"}),
        json!({"name": "OTHER", "value": "x"}),
        json!({"name": "POSTGRES_PASSWORD", "value": "hunter2"}),
        json!({"name": "PGPASSWORD", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}}),
        json!({"name": "AWS_REGION", "value": "eu"}),
        json!({"name": "PGHOST", "value": "elsewhere"}),
        json!({"name": "PGSIDECAR_CLUSTER", "value": "shop/db"}),
    ];
    let sources =
        vec![json!({"secretRef": {"name": "pgsidecar"}}), json!({"configMapRef": {"name": "a"}, "prefix": "PG"})];
    let mounts = vec![
        json!({"name": "wal", "mountPath": "/wal", "subPath": "x"}),
        json!({"name": "token", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}),
        json!({"name": "shared", "mountPath": "/shared/", "subPathExpr": "$(OTHER)", "mountPropagation": "Bidirectional"}),
    ];
    let resources = vec![
        json!({}),
        json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "1", "memory": "1Gi"}}),
        json!({"requests": {"cpu": "1"}}),
    ];
    let contexts = vec![json!({"runAsUser": 0}), json!({"runAsUser": 26, "runAsGroup": 0}), json!({})];
    (
        select(vec!["postgres", "db", "main"]),
        prop::option::weighted(0.95, select(images)),
        optional(arguments),
        prop::sample::subsequence(env, 0..=8),
        prop::sample::subsequence(sources, 0..=2),
        prop::sample::subsequence(mounts, 0..=3),
        optional(resources),
        optional(contexts),
        prop::option::of(anything()),
    )
        .prop_map(|(name, image, args, env, sources, more, resources, context, unknown)| {
            let mut mounts = vec![json!({"name": "data", "mountPath": "/var/lib/postgresql/data"})];
            mounts.extend(more);
            let mut container = json!({"name": name, "volumeMounts": mounts});
            let members = [
                ("image", image.map(Value::from)),
                ("args", args),
                ("env", (!env.is_empty()).then(|| json!(env))),
                ("envFrom", (!sources.is_empty()).then(|| json!(sources))),
                ("resources", resources),
                ("securityContext", context),
                ("x-unknown", unknown),
            ];
            for (name, value) in members {
                if let Some(value) = value {
                    container[name] = value;
                }
            }
            container
        })
}

/// Pods that look like some.
fn pod() -> impl Strategy<Value = Value> {
    let others = vec![
        json!({"name": "istio-proxy", "image": "istio/proxyv2:1"}),
        json!({"name": "web", "image": "nginx", "ports": [{"name": "pgsidecar", "containerPort": 80}]}),
        json!({"name": "metrics", "image": "postgres-exporter:1", "resources": {"limits": {"cpu": "1", "memory": "1Gi"}}}),
    ];
    let init = vec![
        json!({"name": "setup", "image": "busybox", "restartPolicy": "Always", "x-unknown": [null]}),
        json!({"name": "istio-init", "image": "istio/proxyv2:1"}),
    ];
    let annotations = vec![
        ("pgsidecar.dev/mode", "classic"),
        ("pgsidecar.dev/pgdata", "/var/lib/postgresql/data"),
        ("pgsidecar.dev/run-as-user", "26"),
        ("pgsidecar.dev/on-empty", "restore"),
        ("pgsidecar.dev/postgres-args", "skip"),
        ("pgsidecar.dev/grace-seconds", "60"),
        ("pgsidecar.dev/fs-group", "skip"),
        ("example.com/a~b", "/~"),
    ];
    let contexts = vec![json!({"fsGroup": 5}), json!({"runAsUser": 7, "fsGroupChangePolicy": "Always"}), json!({})];
    (
        postgres(),
        prop::sample::subsequence(others, 0..=2),
        prop::option::of(prop::sample::subsequence(init, 0..=2)),
        prop::sample::subsequence(annotations, 0..=4),
        any::<bool>(),
        optional(contexts),
        optional(vec![0_u64, 30, 180, 900]),
        prop::option::of(anything()),
    )
        .prop_map(|(postgres, others, init, annotations, first, context, grace, unknown)| {
            let mut containers = others;
            containers.insert(if first { 0 } else { containers.len() }, postgres);
            let volumes =
                ["data", "wal", "token", "shared"].map(|name| json!({"name": name, "hostPath": {"path": "/x"}}));
            let mut pod = json!({
                "metadata": {"labels": {"pgsidecar.dev/inject": "true"}},
                "spec": {"containers": containers, "volumes": volumes},
            });
            if !annotations.is_empty() {
                pod["metadata"]["annotations"] = Value::Object(
                    annotations.into_iter().map(|(name, value)| (name.to_owned(), json!(value))).collect(),
                );
            }
            let members = [
                ("initContainers", init.map(|init| json!(init))),
                ("securityContext", context),
                ("terminationGracePeriodSeconds", grace.map(Value::from)),
                ("x/~unknown", unknown),
            ];
            for (name, value) in members {
                if let Some(value) = value {
                    pod["spec"][name] = value;
                }
            }
            pod
        })
}

/// All places of a value, as JSON pointers.
fn places(value: &Value, path: &str, found: &mut Vec<String>) {
    found.push(path.to_owned());
    match value {
        Value::Object(members) => members.iter().for_each(|(name, value)| {
            places(value, &format!("{path}/{}", name.replace('~', "~0").replace('/', "~1")), found);
        }),
        Value::Array(list) => {
            list.iter().enumerate().for_each(|(index, value)| places(value, &format!("{path}/{index}"), found));
        }
        _ => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_pod_is_refused_or_gets_what_it_lacks(pod in pod()) {
        if let Ok(injection) = inject(&pod, "shop", &settings()) {
            invariants::check(&pod, &injection);
        }
    }

    #[test]
    fn whatever_stands_anywhere_nothing_panics_and_nothing_is_lost(
        mut pod in pod(), place in any::<prop::sample::Index>(), odd in anything()
    ) {
        let mut all = Vec::new();
        places(&pod, "", &mut all);
        if let Some(there) = pod.pointer_mut(&all[place.index(all.len())]) {
            *there = odd;
        }
        if let Ok(injection) = inject(&pod, "shop", &settings()) {
            invariants::holds_in_any_case(&pod, &injection);
        }
    }

    #[test]
    fn any_json_at_all_is_no_harm(mut pod in anything()) {
        prop_assert!(inject(&pod, "shop", &settings()).is_ok_and(|injection| injection.patch.is_empty()));
        if let Some(members) = pod.as_object_mut() {
            members.insert("metadata".to_owned(), json!({"labels": {"pgsidecar.dev/inject": "true"}}));
        }
        if let Ok(injection) = inject(&pod, "shop", &settings()) {
            invariants::holds_in_any_case(&pod, &injection);
        }
    }
}

#[test]
fn most_pods_of_these_properties_are_not_refused() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let accepted = (0..200)
        .filter(|_| {
            let pod = proptest::strategy::ValueTree::current(&pod().new_tree(&mut runner).unwrap());
            inject(&pod, "shop", &settings()).is_ok()
        })
        .count();
    assert!(accepted > 80, "{accepted} of 200");
}
