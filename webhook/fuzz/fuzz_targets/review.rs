//! Any bytes, as the body of a request to `/inject`, and any JSON, as the pod in one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pgsidecar_webhook::{
    inject::{self, Settings},
    review,
};
use serde_json::{Value, json};

fn ask(body: &[u8], settings: &Settings) -> Option<Value> {
    let answer = review::answer(body, |pod, namespace| inject::inject(pod, namespace, settings)).ok()?;
    let body: Value = serde_json::from_slice(&answer.body).unwrap();
    let response = &body["response"];
    assert!(response["uid"].as_str().is_some_and(|uid| !uid.is_empty()));
    assert_eq!(response["allowed"].as_bool().unwrap(), answer.rejection.is_none());
    assert_eq!(response.get("patch").is_some(), response.get("patchType").is_some());
    Some(body)
}

fuzz_target!(|data: &[u8]| {
    let settings =
        Settings { image: "pgsidecar:1".to_owned(), native_sidecars: true, config_secret: "pgsidecar".to_owned() };
    ask(data, &settings);
    let Ok(object) = serde_json::from_slice::<Value>(data) else { return };
    let review = json!({
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {
            "uid": "u",
            "kind": {"group": "", "version": "v1", "kind": "Pod"},
            "namespace": "shop",
            "operation": "CREATE",
            "object": object,
        }
    });
    assert!(ask(review.to_string().as_bytes(), &settings).is_some());
});
