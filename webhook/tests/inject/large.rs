//! Pods of a megabyte, of any shape: each is answered at once, because whoever may create pods must not be able to hold up
//! everybody else's.

use std::time::{Duration, Instant};

use pgsidecar_webhook::inject::inject;
use serde_json::{Value, json};

use crate::{invariants, settings};

fn pod() -> Value {
    json!({
        "metadata": {"labels": {"pgsidecar.dev/inject": "true"}, "annotations": {}},
        "spec": {
            "containers": [{
                "name": "postgres",
                "image": "postgres:17",
                "args": ["postgres"],
                "volumeMounts": [{"name": "data", "mountPath": "/var/lib/postgresql/data"}],
            }],
            "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}],
        },
    })
}

/// Many times the limit of a build without optimization on a loaded machine, and far from what is quadratic.
const LIMIT: Duration = Duration::from_secs(2);

#[test]
fn a_large_pod_of_any_shape_is_answered_at_once() {
    let lists = |path: &str, element: &dyn Fn(usize) -> Value| -> [(String, Value); 2] {
        let many = |count: usize| json!((0..count).map(element).collect::<Vec<Value>>());
        // As many as are taken, and as many as a megabyte holds.
        let taken = if path.ends_with("ontainers") || path.ends_with("envFrom") { 190 } else { 490 };
        [(path.to_owned(), many(taken)), (path.to_owned(), many(20_000))]
    };
    let long = |text: &str| text.repeat((1 << 20) / text.len());
    let mut shapes: Vec<(String, Value)> = Vec::new();
    let postgres = "/spec/containers/0";
    shapes.extend(lists(
        &format!("{postgres}/env"),
        &|n| json!({"name": format!("PG{n}"), "value": format!("$(PG{})", n + 1)}),
    ));
    shapes.extend(lists(&format!("{postgres}/env"), &|n| json!({"name": format!("PG{n}"), "value": "$(".repeat(20)})));
    shapes.extend(lists(&format!("{postgres}/env"), &|_| json!({"name": "PGPASSWORD", "value": "$(PGPASSWORD)"})));
    shapes.extend(lists(&format!("{postgres}/envFrom"), &|n| json!({"secretRef": {"name": format!("s{n}")}})));
    shapes.extend(lists(&format!("{postgres}/args"), &|n| json!(format!("-cx{n}=y"))));
    shapes.extend(lists(&format!("{postgres}/ports"), &|n| json!({"name": format!("p{n}"), "containerPort": n})));
    shapes.extend(lists(
        &format!("{postgres}/volumeMounts"),
        &|n| json!({"name": "data", "mountPath": format!("/var/lib/postgresql/data{}", "/x".repeat(n % 9))}),
    ));
    shapes.extend(lists("/spec/volumes", &|n| json!({"name": format!("v{n}"), "emptyDir": {}})));
    shapes.extend(lists("/spec/containers", &|n| json!({"name": format!("c{n}"), "image": "postgres:17"})));
    shapes.extend(lists("/spec/initContainers", &|n| json!({"name": format!("c{n}"), "image": "nginx"})));
    shapes.extend(lists("/metadata/annotations", &|n| json!({"pgsidecar.dev/x": n})));
    for text in ["$(", "$", "$(X)", "x", "/", ":", "@", "-", "a=", "://", "%p "] {
        shapes.push((format!("{postgres}/env"), json!([{"name": "PGUSER", "value": long(text)}])));
        shapes.push((format!("{postgres}/env"), json!([{"name": long(text), "value": "x"}])));
        shapes.push((format!("{postgres}/image"), json!(long(text))));
        shapes.push((format!("{postgres}/name"), json!(long(text))));
        shapes.push((format!("{postgres}/args"), json!(["postgres", "-c", long(text)])));
        shapes.push((format!("{postgres}/command"), json!([long(text)])));
        shapes.push((format!("{postgres}/volumeMounts"), json!([{"name": "data", "mountPath": long(text)}])));
        for name in ["repository", "image", "schedule", "resources", "restore", "pgdata", "status", "nonsense"] {
            shapes.push((format!("/metadata/annotations/pgsidecar.dev~1{name}"), json!(long(text))));
        }
    }
    let mut slowest = (Duration::ZERO, String::new());
    for (path, value) in shapes {
        let mut pod = pod();
        let (parent, name) = path.rsplit_once('/').unwrap();
        let name = name.replace("~1", "/");
        let description = format!("{path} = {}", value.to_string().chars().take(60).collect::<String>());
        match pod.pointer_mut(parent).unwrap() {
            Value::Object(members) => drop(members.insert(name, value)),
            other => panic!("{other}"),
        }
        let began = Instant::now();
        let answer = inject(&pod, "shop", &settings());
        let took = began.elapsed();
        assert!(took < LIMIT, "{took:?}: {description}");
        if let Err(rejection) = &answer {
            assert!(rejection.to_string().len() < 64 << 10, "{} bytes: {description}", rejection.to_string().len());
        }
        if let Ok(injection) = answer {
            let after = invariants::apply(&pod, &injection);
            let began = Instant::now();
            let _ = inject(&after, "shop", &settings());
            assert!(began.elapsed() < LIMIT, "again: {:?}: {description}", began.elapsed());
        }
        slowest = slowest.max((took, description));
    }
    println!("slowest: {slowest:?}");
}

#[test]
fn what_has_more_than_any_pod_is_refused() {
    for (list, count) in [("env", 1_001), ("envFrom", 201), ("volumeMounts", 501), ("args", 1_001), ("ports", 501)] {
        let mut large = pod();
        large["spec"]["containers"][0][list] = json!(vec!["x"; count]);
        let rejection = inject(&large, "shop", &settings()).unwrap_err();
        let expected = format!("spec.containers[0].{list} has {count} elements, more than {}", count - 1);
        assert_eq!(rejection.problem, expected);
    }
    for (list, count) in [("containers", 201), ("initContainers", 201), ("volumes", 1_001)] {
        let mut large = pod();
        large["spec"][list] = json!(vec![json!({"name": "x"}); count]);
        let rejection = inject(&large, "shop", &settings()).unwrap_err();
        assert_eq!(rejection.problem, format!("spec.{list} has {count} elements, more than {}", count - 1));
    }
}
