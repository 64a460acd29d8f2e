//! The API server calls again when another webhook has changed the pod since; and a pod may come that was injected
//! offline, by another version.

use pgsidecar_webhook::inject::{Settings, inject};
use serde_json::{Value, json};

use crate::{
    invariants::{apply, check},
    settings,
};

fn pod(mode: &str) -> Value {
    json!({
        "metadata": {"labels": {"pgsidecar.dev/inject": "true"}, "annotations": {"pgsidecar.dev/mode": mode}},
        "spec": {
            "containers": [{
                "name": "postgres",
                "image": "postgres:17",
                "volumeMounts": [{"name": "data", "mountPath": "/var/lib/postgresql/data"}],
            }],
            "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}],
        },
    })
}

fn injected(pod: &Value) -> Value {
    let injection = inject(pod, "shop", &settings()).unwrap();
    check(pod, &injection);
    apply(pod, &injection)
}

fn added(pod: &Value, settings: &Settings) -> Vec<(String, Value)> {
    let patch = json!(inject(pod, "shop", settings).unwrap().patch);
    let operations = patch.as_array().unwrap().iter();
    operations.map(|operation| (operation["path"].as_str().unwrap().to_owned(), operation["value"].clone())).collect()
}

fn push(list: &mut Value, value: &Value) {
    if list.is_null() {
        *list = json!([]);
    }
    list.as_array_mut().unwrap().push(value.clone());
}

#[test]
fn what_another_webhook_gave_to_postgres_since_is_given_to_ours() {
    for (mode, list, index) in [("native", "initContainers", 0), ("classic", "containers", 1)] {
        let mut pod = injected(&pod(mode));
        let token = json!({"name": "aws-iam-token", "mountPath": "/var/run/secrets/eks.amazonaws.com/serviceaccount"});
        let role = json!({"name": "AWS_ROLE_ARN", "value": "arn:aws:iam::111122223333:role/db"});
        let source = json!({"configMapRef": {"name": "proxy"}});
        push(&mut pod["spec"]["volumes"], &json!({"name": "aws-iam-token", "projected": {"sources": []}}));
        let postgres = &mut pod["spec"]["containers"][index];
        push(&mut postgres["volumeMounts"], &token);
        push(&mut postgres["env"], &role);
        push(&mut postgres["envFrom"], &source);
        let sidecar = if mode == "native" { 1 } else { 0 };
        let mut expected = Vec::new();
        for path in ["/spec/initContainers/0".to_owned(), format!("/spec/{list}/{sidecar}")] {
            expected.push((format!("{path}/env/-"), role.clone()));
            expected.push((format!("{path}/volumeMounts/-"), token.clone()));
            // Our settings stay the last ones, which outrank the others.
            expected.push((format!("{path}/envFrom/0"), source.clone()));
        }
        assert_eq!(added(&pod, &settings()), expected, "{mode}");
        let again = apply(&pod, &inject(&pod, "shop", &settings()).unwrap());
        assert_eq!(added(&again, &settings()), [], "{mode}");
    }
}

#[test]
fn what_was_injected_by_another_version_stays_as_it_is() {
    let newer = Settings {
        image: "registry.example.com/pgsidecar:9".into(),
        native_sidecars: false,
        config_secret: "pgsidecar".into(),
    };
    assert_eq!(added(&injected(&pod("auto")), &newer), []);
}

#[test]
fn an_image_that_another_webhook_renamed_is_still_the_same() {
    let mut pod = pod("native");
    pod["spec"]["containers"][0]["name"] = json!("main");
    push(&mut pod["spec"]["containers"], &json!({"name": "web", "image": "registry.example.com/web:1"}));
    let mut pod = injected(&pod);
    pod["spec"]["containers"][0]["image"] = json!("mirror.example.com/images/sha256-1234@sha256:abcd");
    assert_eq!(added(&pod, &settings()), []);
    // What is missing is as it was.
    let prepare = pod["spec"]["initContainers"].as_array_mut().unwrap().remove(0);
    assert_eq!(added(&pod, &settings()), [("/spec/initContainers/-".to_owned(), prepare)]);
}

#[test]
fn a_directory_of_configuration_stays_one_under_another_image_name() {
    let mut pod = pod("native");
    pod["spec"]["containers"][0]["image"] = json!("supabase/postgres:15.8.1.085");
    pod["metadata"]["annotations"]["pgsidecar.dev/run-as-user"] = json!("105");
    let mut pod = injected(&pod);
    pod["spec"]["containers"][0]["image"] = json!("mirror.example.com/images@sha256:abcd");
    assert_eq!(added(&pod, &settings()), []);
}

#[test]
fn data_that_another_webhook_moved_since_are_refused() {
    let mut pod = injected(&pod("native"));
    let env = json!({"name": "PGDATA", "value": "/var/lib/postgresql/data/moved"});
    push(&mut pod["spec"]["containers"][0]["env"], &env);
    let rejection = inject(&pod, "shop", &settings()).unwrap_err();
    assert!(rejection.problem.contains("was injected when PGDATA was"), "{rejection}");
}

#[test]
fn what_somebody_took_away_is_added_again() {
    let mut pod = injected(&pod("native"));
    pod["spec"]["containers"][0]["args"] = json!(["postgres", "-c", "archive_mode=on"]);
    pod["spec"]["initContainers"].as_array_mut().unwrap().remove(0);
    let paths: Vec<String> = added(&pod, &settings()).into_iter().map(|(path, _)| path).collect();
    assert_eq!(paths[..6], ["/spec/containers/0/args/-"; 6].map(String::from));
    assert_eq!(paths[6..], ["/spec/initContainers/-"]);
}

#[test]
fn an_init_container_that_came_behind_ours_is_told() {
    let mut pod = injected(&pod("native"));
    assert!(!inject(&pod, "shop", &settings()).unwrap().warnings.concat().contains("vault-agent-init"));
    push(&mut pod["spec"]["initContainers"], &json!({"name": "vault-agent-init", "image": "vault"}));
    let injection = inject(&pod, "shop", &settings()).unwrap();
    let told = "it starts after pgsidecar-prepare, which gets nothing from it: init container vault-agent-init";
    assert!(injection.warnings.iter().any(|warning| warning == told), "{:?}", injection.warnings);
    assert_eq!(injection.patch, []);
}

#[test]
fn a_probe_that_would_kill_a_restore_is_told() {
    let warned = |probes: Value, annotations: Value| {
        let mut pod = pod("native");
        pod["metadata"]["annotations"] = annotations;
        for (name, probe) in probes.as_object().unwrap() {
            pod["spec"]["containers"][0][name] = probe.clone();
        }
        let warnings = inject(&pod, "shop", &settings()).unwrap().warnings;
        warnings.iter().any(|warning| warning.contains("add a startupProbe"))
    };
    let heals = json!({"pgsidecar.dev/on-empty": "restore"});
    let probe = json!({"exec": {"command": ["pg_isready"]}});
    assert!(warned(json!({"livenessProbe": probe}), heals.clone()));
    assert!(warned(json!({"livenessProbe": probe, "startupProbe": null}), heals.clone()));
    assert!(!warned(json!({"livenessProbe": probe, "startupProbe": probe}), heals.clone()));
    assert!(!warned(json!({"livenessProbe": probe}), json!({})));
    assert!(!warned(json!({}), heals));
}

#[test]
fn the_autoscaler_is_told_what_may_be_lost_unless_it_was_told_something() {
    const KEY: &str = "cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes";
    let mut pod = pod("native");
    assert_eq!(injected(&pod)["metadata"]["annotations"][KEY], "pgsidecar-spool,pgsidecar-run");
    pod["metadata"]["annotations"][KEY] = json!("cache");
    assert_eq!(injected(&pod)["metadata"]["annotations"][KEY], "cache");
}

#[test]
fn a_dry_run_is_answered_alike_and_the_label_alone_decides() {
    let labelled = pod("auto");
    assert_eq!(inject(&labelled, "shop", &settings()), inject(&labelled, "shop", &settings()));
    let with = |label: Value| {
        let mut pod = labelled.clone();
        pod["metadata"]["labels"]["pgsidecar.dev/inject"] = label;
        pod
    };
    for label in [json!("false"), Value::Null] {
        assert_eq!(added(&with(label), &settings()), []);
    }
    for label in [json!(true), json!(false), json!("True"), json!("yes"), json!(""), json!(1)] {
        let rejection = inject(&with(label.clone()), "shop", &settings()).unwrap_err();
        assert!(rejection.problem.starts_with("the label pgsidecar.dev/inject is"), "{label}: {rejection}");
        assert!(rejection.remedy.contains("Quote it: pgsidecar.dev/inject: \"true\""), "{label}: {rejection}");
    }
}
