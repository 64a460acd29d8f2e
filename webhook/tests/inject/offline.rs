//! The same without a cluster.

use pgsidecar_webhook::offline::{Error, Format, run};
use serde_json::Value;

use crate::settings;

fn offline(input: &str, format: Format) -> (String, Vec<String>) {
    let output = run(input, format, "default", &settings()).unwrap_or_else(|problem| panic!("{problem}"));
    (output.text, output.warnings)
}

const STATEFULSET: &str = r#"apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db, namespace: shop}
spec:
  serviceName: db
  replicas: 1
  template:
    metadata:
      labels: {app: db, pgsidecar.dev/inject: "true"}
    spec:
      containers:
      - name: postgres
        image: postgres:17
        volumeMounts: [{name: data, mountPath: /var/lib/postgresql/data}]
  volumeClaimTemplates:
  - metadata: {name: data}
    spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 10Gi}}}
"#;

const CONFIG: &str = "# A comment\nkind: ConfigMap\napiVersion: v1\ndata:\n  odd:   'spacing'   # kept\n  block: |\n    ----\n     --- not a separator\n---odd: neither\n";

#[test]
fn what_is_not_labelled_passes_through_byte_for_byte() {
    for input in
        [CONFIG, &format!("---\n{CONFIG}---\n# nothing\n---\r\n{CONFIG}"), "", "kind: Pod\n", "{\"kind\": \"Pod\"}"]
    {
        assert_eq!(offline(input, Format::Yaml), (input.to_owned(), vec![]));
    }
}

#[test]
fn a_stateful_set_gets_it_in_its_template_and_its_neighbours_stay() {
    let input = format!("{CONFIG}---\n{STATEFULSET}---\n{CONFIG}");
    let (text, warnings) = offline(&input, Format::Yaml);
    insta::assert_snapshot!(text);
    assert!(text.starts_with(CONFIG) && text.ends_with(CONFIG));
    assert!(warnings.iter().all(|warning| warning.starts_with("StatefulSet shop/db: ")), "{warnings:?}");
    // And once more: nothing is missing any more, so that not a byte changes.
    assert_eq!(offline(&text, Format::Yaml).0, text);
}

#[test]
fn json_and_patches_say_the_same() {
    let input = format!("{STATEFULSET}---\n{CONFIG}");
    let (text, _) = offline(&input, Format::Json);
    let list: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(list["kind"], "List");
    let (yaml, _) = offline(STATEFULSET, Format::Yaml);
    let from_yaml: Value = serde_saphyr::from_str(&yaml).unwrap();
    assert_eq!(list["items"][0], from_yaml);
    let (text, _) = offline(STATEFULSET, Format::Json);
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), from_yaml);

    let (text, _) = offline(&input, Format::Patch);
    let patches: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(patches.as_array().unwrap().len(), 1);
    assert_eq!(
        (&patches[0]["kind"], &patches[0]["namespace"], &patches[0]["name"]),
        (&"StatefulSet".into(), &"shop".into(), &"db".into())
    );
    let mut object: Value = serde_saphyr::from_str(STATEFULSET).unwrap();
    let patch: json_patch::Patch = serde_json::from_value(patches[0]["patch"].clone()).unwrap();
    json_patch::patch(&mut object, &patch).unwrap();
    assert_eq!(object, from_yaml);
}

#[test]
fn every_kind_with_a_pod_is_known_in_lists_too() {
    let spec = r#"{"containers": [{"name": "db", "image": "postgres:17", "volumeMounts": [{"name": "d", "mountPath": "/var/lib/postgresql/data"}]}]}"#;
    let pod = format!(r#""metadata": {{"name": "x", "labels": {{"pgsidecar.dev/inject": "true"}}}}, "spec": {spec}"#);
    let template =
        |kind: &str| format!(r#"{{"kind": "{kind}", "metadata": {{"name": "x"}}, "spec": {{"template": {{{pod}}}}}}}"#);
    let mut items = vec![format!(r#"{{"kind": "Pod", {pod}}}"#)];
    let kinds = ["DaemonSet", "Deployment", "Job", "ReplicaSet", "ReplicationController", "StatefulSet"];
    items.extend(kinds.map(template));
    items.push(format!(
        r#"{{"kind": "CronJob", "metadata": {{"name": "x"}}, "spec": {{"jobTemplate": {{"spec": {{"template": {{{pod}}}}}}}}}}}"#
    ));
    items.push(format!(r#"{{"kind": "Widget", {pod}}}"#));
    let input = format!(r#"{{"apiVersion": "v1", "kind": "List", "items": [{}]}}"#, items.join(", "));
    let (text, _) = offline(&input, Format::Json);
    let list: Value = serde_json::from_str(&text).unwrap();
    for item in list["items"].as_array().unwrap() {
        let expected = usize::from(item["kind"] != "Widget") * 2;
        assert_eq!(
            item.to_string().matches("\"name\":\"pgsidecar-prepare\"").count() * 2,
            expected,
            "{}",
            item["kind"]
        );
    }
    let (text, _) = offline(&input, Format::Patch);
    let patches: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(patches.as_array().unwrap().len(), 8);
    assert_eq!(patches[7]["patch"][0]["path"], "/spec/jobTemplate/spec/template/spec/volumes");
}

#[test]
fn all_rejections_are_told_with_the_names_of_what_is_rejected() {
    let old = STATEFULSET.replace("postgres:17", "postgres:13").replace("name: db,", "name: old,");
    let several = STATEFULSET
        .replace("kind: StatefulSet", "kind: Deployment")
        .replace("replicas: 1", "replicas: 2")
        .replace("    metadata:\n", "    metadata:\n      annotations: {pgsidecar.dev/on-empty: restore}\n");
    let input = format!("{old}---\n{STATEFULSET}---\n{several}");
    let error = run(&input, Format::Yaml, "default", &settings()).unwrap_err();
    insta::assert_snapshot!(error);
    assert!(matches!(error, Error::Rejected(rejections) if rejections.len() == 2));
    let everywhere = several.replace("kind: Deployment", "kind: DaemonSet").replace("  replicas: 2\n", "");
    assert!(matches!(run(&everywhere, Format::Yaml, "default", &settings()), Err(Error::Rejected(_))));
    // One is fine.
    offline(&several.replace("replicas: 2", "replicas: 1"), Format::Yaml);
}

#[test]
fn what_is_no_yaml_is_told_by_its_number() {
    let error = run(&format!("{CONFIG}---\na: [\n"), Format::Yaml, "default", &settings()).unwrap_err();
    assert!(error.to_string().starts_with("document 2 is neither YAML nor JSON: "), "{error}");
}

#[test]
fn a_label_in_the_wrong_place_is_told() {
    let input = STATEFULSET
        .replace("labels: {app: db, pgsidecar.dev/inject: \"true\"}", "labels: {app: db}")
        .replace("namespace: shop}", "namespace: shop, labels: {pgsidecar.dev/inject: \"true\"}}");
    let (text, warnings) = offline(&input, Format::Yaml);
    assert_eq!(text, input);
    assert_eq!(
        warnings,
        [
            "StatefulSet shop/db: the label pgsidecar.dev/inject is on the StatefulSet, not on its pod template: nothing is injected"
        ]
    );
}

#[test]
fn a_label_that_is_no_text_is_refused_with_what_to_write() {
    let input = STATEFULSET.replace(r#"pgsidecar.dev/inject: "true""#, "pgsidecar.dev/inject: true");
    let error = run(&input, Format::Yaml, "default", &settings()).unwrap_err().to_string();
    assert!(error.contains("is the boolean true") && error.contains("Quote it"), "{error}");
}

#[test]
fn a_labelled_template_in_a_kind_that_is_not_known_is_told() {
    let input = STATEFULSET.replace("kind: StatefulSet", "kind: Rollout");
    let (text, warnings) = offline(&input, Format::Yaml);
    assert_eq!(text, input);
    assert_eq!(
        warnings,
        ["Rollout shop/db: it has a labelled pod template, but Rollout isn't known here: nothing is injected"]
    );
    // The label of the object alone, which some tools put everywhere, says nothing.
    let service = "kind: Service\nmetadata: {name: db, labels: {pgsidecar.dev/inject: \"true\"}}\nspec: {ports: []}\n";
    assert_eq!(offline(service, Format::Yaml).1, [] as [&str; 0]);
}

#[test]
fn json_objects_one_after_the_other_are_read_as_kubectl_reads_them() {
    let (json, _) = offline(STATEFULSET, Format::Json);
    let original: Value = serde_saphyr::from_str(STATEFULSET).unwrap();
    let plain = r#"{"kind": "ConfigMap",   "a": 1}"#;
    let (text, _) = offline(&format!("{plain}\n{original}{plain}"), Format::Json);
    let list: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(list["items"].as_array().unwrap().len(), 3);
    assert_eq!(list["items"][1], serde_json::from_str::<Value>(&json).unwrap());
    let (text, _) = offline(&format!("{plain}\n{original}"), Format::Yaml);
    assert!(text.starts_with(&format!("---\n{plain}\n---\napiVersion: apps/v1\n")), "{text}");
    // Unchanged, it stays as it is; and what only begins like JSON is YAML.
    for input in [format!("{plain}{plain}"), "{kind: ConfigMap}\n".to_owned()] {
        assert_eq!(offline(&input, Format::Yaml).0, input);
    }
}

#[test]
fn a_large_document_is_no_hindrance() {
    let large = format!("kind: ConfigMap\ndata:\n{}", "  - {a: 1}\n".repeat(100_000));
    let (text, _) = offline(&format!("{large}---\n{STATEFULSET}"), Format::Yaml);
    assert!(text.starts_with(&large) && text.contains("pgsidecar-prepare"));
}

/// `kubectl` reads YAML 1.1: what it would take for another type has to be quoted.
#[test]
fn what_is_read_as_kubernetes_reads_it_is_written_so_that_it_stays_what_it_is() {
    let texts = [
        "on",
        "yes",
        "NO",
        "y",
        "true",
        "null",
        "~",
        "",
        "0644",
        "0x1f",
        "1e3",
        "1_000",
        "12:30:45",
        "2026-11-21",
        ".inf",
        "- a",
        "# x",
        "a: b",
        "a #b",
        " lead",
        "trail ",
        "two\nlines\n",
        "tab\t",
        "*a",
        "&a",
        "!x",
        "%x",
        "@x",
        "`x",
        "=",
        "<<",
        "ä",
    ];
    let args: Vec<String> = texts.iter().map(|text| serde_json::to_string(text).unwrap()).collect();
    let input = STATEFULSET.replace(
        "        image: postgres:17\n",
        &format!(
            "        image: postgres:17\n        env: [{{name: ODD, values: [{}], mode: 0644, flag: yes, float: 1.0}}]\n",
            args.join(", ")
        ),
    );
    let (yaml, _) = offline(&input, Format::Yaml);
    let (json, _) = offline(&input, Format::Json);
    let expected: Value = serde_json::from_str(&json).unwrap();
    let options = serde_saphyr::options! { legacy_octal_numbers: true };
    assert_eq!(serde_saphyr::from_str_with_options::<Value>(&yaml, options).unwrap(), expected, "{yaml}");
    let entry = &expected["spec"]["template"]["spec"]["containers"][0]["env"][0];
    assert_eq!(entry["values"], serde_json::json!(texts));
    assert_eq!((&entry["mode"], &entry["flag"], &entry["float"]), (&420.into(), &true.into(), &1.0.into()));
    for text in ["on", "yes", "NO", "y", "0644", "0x1f", "1e3", "12:30:45", "2026-11-21"] {
        assert!(!yaml.contains(&format!("- {text}\n")), "{text} isn't quoted:\n{yaml}");
    }
}
