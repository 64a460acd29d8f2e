use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::inject::Operation;

fn question() -> Value {
    json!({
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {
            "uid": "0df28fbd-5f5f-11e8-bc74-36e6bb280816",
            "kind": {"group": "", "version": "v1", "kind": "Pod"},
            "resource": {"group": "", "version": "v1", "resource": "pods"},
            "requestKind": {"group": "", "version": "v1", "kind": "Pod"},
            "namespace": "shop",
            "operation": "CREATE",
            "userInfo": {"username": "system:serviceaccount:kube-system:statefulset-controller"},
            "object": {"metadata": {"generateName": "db-"}, "spec": {"containers": [{"name": "postgres"}]}},
            "oldObject": null,
            "dryRun": false,
            "options": {"apiVersion": "meta.k8s.io/v1", "kind": "CreateOptions"}
        }
    })
}

fn operation() -> Operation {
    Operation::Add { path: "/spec/volumes".to_owned(), value: json!([{"name": "pgsidecar-run"}]) }
}

fn injection() -> Injection {
    Injection {
        patch: vec![operation()],
        warnings: vec!["it has no Secret".to_owned()],
        audit: vec![("mode", "native".to_owned())],
    }
}

fn answered(question: &Value) -> (Answer, Value) {
    let answer = answer(question.to_string().as_bytes(), |_, _| Ok(injection())).unwrap();
    let body = serde_json::from_slice(&answer.body).unwrap();
    (answer, body)
}

#[test]
fn a_pod_gets_a_patch_warnings_and_audit_annotations() {
    let (answer, body) = answered(&question());
    assert_eq!((answer.outcome, &*answer.namespace, &*answer.pod), (Outcome::Admitted, "shop", "db-"));
    let patch = STANDARD.decode(body["response"]["patch"].as_str().unwrap()).unwrap();
    let patch: Value = serde_json::from_slice(&patch).unwrap();
    assert_eq!(patch, json!([{"op": "add", "path": "/spec/volumes", "value": [{"name": "pgsidecar-run"}]}]));
    let mut expected = json!({
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "response": {
            "uid": "0df28fbd-5f5f-11e8-bc74-36e6bb280816",
            "allowed": true,
            "patchType": "JSONPatch",
            "warnings": ["it has no Secret"],
            "auditAnnotations": {"mode": "native"}
        }
    });
    expected["response"]["patch"] = body["response"]["patch"].clone();
    assert_eq!(body, expected);
}

#[test]
fn the_pod_and_its_namespace_are_what_is_injected_into() {
    let question = question();
    answer(question.to_string().as_bytes(), |pod, namespace| {
        assert_eq!((pod, namespace), (&question["request"]["object"], "shop"));
        Ok(Injection::default())
    })
    .unwrap();
}

#[test]
fn without_a_patch_there_is_no_patch_type_either() {
    let answer = answer(question().to_string().as_bytes(), |_, _| Ok(Injection::default())).unwrap();
    assert_eq!(answer.outcome, Outcome::Unchanged);
    let body: Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(body["response"], json!({"uid": "0df28fbd-5f5f-11e8-bc74-36e6bb280816", "allowed": true}));
}

#[test]
fn a_rejection_tells_the_client_what_is_wrong_and_what_to_do() {
    let rejection = Rejection { problem: "the pod is on the host's network".into(), remedy: "Take that away.".into() };
    let answer = answer(question().to_string().as_bytes(), |_, _| Err(rejection.clone())).unwrap();
    assert_eq!((answer.outcome, answer.rejection), (Outcome::Rejected, Some(rejection)));
    let body: Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(
        body["response"],
        json!({
            "uid": "0df28fbd-5f5f-11e8-bc74-36e6bb280816",
            "allowed": false,
            "status": {
                "status": "Failure",
                "message": "pgsidecar: the pod is on the host's network. Take that away.",
                "reason": "Forbidden",
                "code": 403
            }
        })
    );
}

#[test]
fn a_dry_run_is_answered_alike() {
    let mut dry = question();
    dry["request"]["dryRun"] = json!(true);
    assert_eq!(answered(&dry).1, answered(&question()).1);
}

#[test]
fn what_is_not_the_creation_of_a_pod_is_allowed_unchanged() {
    for (field, value) in [
        ("operation", json!("UPDATE")),
        ("operation", json!("DELETE")),
        ("operation", json!("CONNECT")),
        ("subResource", json!("ephemeralcontainers")),
        ("kind", json!({"group": "apps", "version": "v1", "kind": "StatefulSet"})),
        ("kind", json!({"group": "", "version": "v1", "kind": "Service"})),
        ("kind", json!({"group": "example.org", "version": "v1", "kind": "Pod"})),
        ("object", json!(null)),
        ("object", json!("a text")),
    ] {
        let mut question = question();
        question["request"][field] = value;
        let answer = answer(question.to_string().as_bytes(), |_, _| panic!("injected: {field}")).unwrap();
        assert_eq!(answer.outcome, Outcome::Unchanged);
        let body: Value = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!(body["response"], json!({"uid": "0df28fbd-5f5f-11e8-bc74-36e6bb280816", "allowed": true}));
    }
}

#[test]
fn an_empty_sub_resource_is_none() {
    let mut question = question();
    question["request"]["subResource"] = json!("");
    assert_eq!(answered(&question).0.outcome, Outcome::Admitted);
}

#[test]
fn what_cannot_be_answered_says_why() {
    let refused = |question: &Value| {
        answer(question.to_string().as_bytes(), |_, _| panic!("injected: {question}")).unwrap_err().to_string()
    };
    let mut other = question();
    other["apiVersion"] = json!("admission.k8s.io/v1beta1");
    assert_eq!(
        refused(&other),
        r#""admission.k8s.io/v1beta1" "AdmissionReview" isn't admission.k8s.io/v1 AdmissionReview"#
    );
    let mut other = question();
    other["kind"] = json!("Pod");
    assert_eq!(refused(&other), r#""admission.k8s.io/v1" "Pod" isn't admission.k8s.io/v1 AdmissionReview"#);
    let mut other = question();
    other["request"] = json!(null);
    assert_eq!(refused(&other), "the AdmissionReview has no request with a uid");
    let mut other = question();
    other["request"]["uid"] = json!("");
    assert_eq!(refused(&other), "the AdmissionReview has no request with a uid");
    let mut other = question();
    other["request"]["operation"] = json!(1);
    assert!(refused(&other).starts_with("the body isn't an AdmissionReview: invalid type"));
    assert!(matches!(answer(b"", |_, _| panic!("injected")), Err(BadReview::Malformed(_))));
    assert!(matches!(answer(b"{} {}", |_, _| panic!("injected")), Err(BadReview::Malformed(_))));
}

#[test]
fn a_body_whose_parsing_would_take_too_much_memory_is_refused_before() {
    let mut question = question();
    question["request"]["object"]["spec"]["containers"] = json!(vec![0; MAX_VALUES]);
    assert!(matches!(
        answer(question.to_string().as_bytes(), |_, _| panic!("injected")),
        Err(BadReview::TooManyValues)
    ));
    // In a text they are nothing: a pod may have megabytes of them in an annotation.
    let text = format!("{}{}", r#"[{\","#.repeat(MAX_VALUES), "\"\\");
    question["request"]["object"] = json!({"metadata": {"annotations": {"large": text}}});
    assert_eq!(answered(&question).0.outcome, Outcome::Admitted);
}

#[test]
fn json_that_is_nested_too_deeply_is_refused() {
    let body = format!(r#"{{"request":{{"object":{}"#, "[".repeat(10_000));
    assert!(matches!(answer(body.as_bytes(), |_, _| panic!("injected")), Err(BadReview::Malformed(_))));
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::btree_map("[a-zA-Z]{1,8}", inner, 0..6)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn no_bytes_panic(body in prop::collection::vec(any::<u8>(), 0..512)) {
        let _ = answer(&body, |_, _| Ok(injection()));
    }

    /// A question with one field replaced by anything: either it is refused, or the answer carries the uid.
    #[test]
    fn whatever_a_field_holds_an_answer_echoes_the_uid(
        field in prop::sample::select(vec!["uid", "kind", "subResource", "namespace", "operation", "object", "other"]),
        value in any_json(),
    ) {
        let mut question = question();
        question["request"][field] = value;
        if let Ok(answer) = answer(question.to_string().as_bytes(), |_, _| Ok(injection())) {
            let body: Value = serde_json::from_slice(&answer.body).unwrap();
            prop_assert_eq!(&body["response"]["uid"], &question["request"]["uid"]);
            prop_assert_eq!(&body["response"]["allowed"], &Value::Bool(true));
        }
    }

    /// The estimate never refuses what holds fewer, and never lets through what holds more.
    #[test]
    fn values_are_counted_as_the_parser_finds_them(value in any_json()) {
        fn count(value: &Value) -> usize {
            match value {
                Value::Array(list) => 1 + list.iter().map(count).sum::<usize>(),
                Value::Object(map) => 1 + map.values().map(|value| 1 + count(value)).sum::<usize>(),
                _ => 1,
            }
        }
        let counted = values(value.to_string().as_bytes());
        prop_assert!(counted + 1 >= count(&value).div_ceil(2), "{counted} {value}");
        prop_assert!(counted <= 2 * count(&value), "{counted} {value}");
    }
}
