//! Injection without a cluster: manifests in, manifests out.
//!
//! For GitOps, where what runs has to be in the repository; for review; and for the day the webhook is down. It calls
//! [`inject`] for every labelled pod and pod template. What isn't labelled passes through byte for byte.

use std::fmt;

use serde_json::{Value, json};

use crate::inject::{self, Operation, Rejection, Settings, inject};

/// How the result is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Format {
    /// YAML: the documents of the input in their order.
    #[default]
    Yaml,
    /// JSON: the object, or a `List` if there are several.
    Json,
    /// JSON patches alone: a list of `{"apiVersion", "kind", "namespace", "name", "patch"}`, one for each object that is
    /// changed.
    Patch,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Output {
    /// In the format that was asked for; ends with a line break.
    pub text: String,
    /// For the person who runs it, each with the object's name in front.
    pub warnings: Vec<String>,
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The input can't be read.
    #[error("document {number} is neither YAML nor JSON: {problem}")]
    Malformed {
        /// Which document, from 1.
        number: usize,
        /// What is wrong.
        problem: String,
    },
    /// Pods that are labelled can't be backed up as they are.
    #[error("{}", lines(.0))]
    Rejected(Vec<(Name, Rejection)>),
    /// The result can't be written as YAML.
    #[error("the result can't be written as YAML: {0}")]
    Unwritable(String),
}

/// An object as people name it: `StatefulSet shop/db`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    kind: String,
    namespace: String,
    name: String,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
    }
}

fn lines(rejections: &[(Name, Rejection)]) -> String {
    let lines: Vec<String> = rejections.iter().map(|(name, rejection)| format!("{name}: {rejection}")).collect();
    lines.join("\n")
}

/// A document of the input.
struct Document<'a> {
    /// As it was written.
    text: &'a str,
    object: Value,
    changed: bool,
}

/// What was found out about the objects so far.
struct Run<'a> {
    settings: &'a Settings,
    namespace: &'a str,
    patches: Vec<Value>,
    warnings: Vec<String>,
    rejections: Vec<(Name, Rejection)>,
}

/// Injects into what is labelled in `input`: YAML with any number of documents, or JSON, of Pods, of what has a pod
/// template, and of Lists. `namespace` is that of objects that name none.
///
/// # Errors
/// If the input can't be read, or pods in it are rejected: all of them are told.
pub fn run(input: &str, format: Format, namespace: &str, settings: &Settings) -> Result<Output, Error> {
    let mut run = Run { settings, namespace, patches: vec![], warnings: vec![], rejections: vec![] };
    let mut documents = Vec::new();
    for (index, text) in split(input).into_iter().enumerate() {
        if let Some(objects) = json_objects(text) {
            documents.extend(objects);
            continue;
        }
        let object = parse(text).map_err(|problem| Error::Malformed { number: index + 1, problem })?;
        documents.push(Document { text, object, changed: false });
    }
    for document in &mut documents {
        document.changed = run.visit(&mut document.object);
    }
    if !run.rejections.is_empty() {
        return Err(Error::Rejected(run.rejections));
    }
    let text = match format {
        Format::Yaml if !documents.iter().any(|document| document.changed) => input.to_owned(),
        Format::Yaml => yaml(&documents)?,
        Format::Json => {
            let mut objects: Vec<Value> =
                documents.into_iter().map(|document| document.object).filter(|object| !object.is_null()).collect();
            match objects.len() {
                1 => json_text(&objects.remove(0)),
                _ => json_text(&json!({"apiVersion": "v1", "kind": "List", "items": objects})),
            }
        }
        Format::Patch => json_text(&Value::Array(run.patches)),
    };
    Ok(Output { text, warnings: run.warnings })
}

impl Run<'_> {
    /// Whether the object was changed.
    fn visit(&mut self, object: &mut Value) -> bool {
        let kind = object.get("kind").and_then(Value::as_str).unwrap_or("").to_owned();
        if (kind == "List" || kind.ends_with("List"))
            && let Some(items) = object.get_mut("items").and_then(Value::as_array_mut)
        {
            return items.iter_mut().fold(false, |changed, item| self.visit(item) | changed);
        }
        let name = self.name(&kind, object);
        let Some(path) = template(&kind) else {
            let members = object.as_object().into_iter().flatten();
            if members.filter(|(name, _)| *name != "metadata").any(|(_, value)| has_labelled_template(value)) {
                self.warnings.push(format!(
                    "{name}: it has a labelled pod template, but {kind} isn't known here: nothing is injected"
                ));
            }
            return false;
        };
        let Some(pod) = object.pointer(path) else { return false };
        if !inject::is_labelled(pod) {
            if !path.is_empty() && inject::is_labelled(object) {
                self.warnings.push(format!(
                    "{name}: the label {} is on the {kind}, not on its pod template: nothing is injected",
                    inject::LABEL
                ));
            }
            return false;
        }
        let injected = check_replicas(&kind, object, pod).and_then(|()| inject(pod, &name.namespace, self.settings));
        let injection = match injected {
            Ok(injection) => injection,
            Err(rejection) => {
                self.rejections.push((name, rejection));
                return false;
            }
        };
        self.warnings.extend(injection.warnings.iter().map(|warning| format!("{name}: {warning}")));
        if injection.patch.is_empty() {
            return false;
        }
        let patch: Vec<Operation> = injection
            .patch
            .into_iter()
            .map(|Operation::Add { path: member, value }| Operation::Add { path: format!("{path}{member}"), value })
            .collect();
        let patch = json!(patch);
        let applied = serde_json::from_value::<json_patch::Patch>(patch.clone())
            .map_err(|problem| problem.to_string())
            .and_then(|patch| json_patch::patch(object, &patch).map_err(|problem| problem.to_string()));
        if let Err(problem) = applied {
            let problem = format!("its patch can't be applied: {problem}");
            self.rejections
                .push((name, Rejection { problem, remedy: "This is a bug in pgsidecar: please report it.".into() }));
            return false;
        }
        self.patches.push(json!({
            "apiVersion": object.get("apiVersion"),
            "kind": kind,
            "namespace": name.namespace,
            "name": name.name,
            "patch": patch,
        }));
        true
    }

    fn name(&self, kind: &str, object: &Value) -> Name {
        let metadata = |name: &str| object.get("metadata")?.get(name)?.as_str().filter(|text| !text.is_empty());
        Name {
            kind: kind.to_owned(),
            namespace: metadata("namespace").unwrap_or(self.namespace).to_owned(),
            name: metadata("name").or_else(|| metadata("generateName")).unwrap_or("").to_owned(),
        }
    }
}

/// Where an object of this kind has its pod, as a JSON pointer.
fn template(kind: &str) -> Option<&'static str> {
    match kind {
        "Pod" => Some(""),
        "DaemonSet" | "Deployment" | "Job" | "ReplicaSet" | "ReplicationController" | "StatefulSet" => {
            Some("/spec/template")
        }
        "CronJob" => Some("/spec/jobTemplate/spec/template"),
        _ => None,
    }
}

/// Whether there's something in it that looks like a pod template with the label.
fn has_labelled_template(value: &Value) -> bool {
    match value {
        Value::Object(members) => {
            (members.contains_key("spec") && inject::is_labelled(value)) || members.values().any(has_labelled_template)
        }
        Value::Array(list) => list.iter().any(has_labelled_template),
        _ => false,
    }
}

/// Several pods without an ordinal would each heal themselves into a primary.
fn check_replicas(kind: &str, object: &Value, pod: &Value) -> Result<(), Rejection> {
    let on_empty = pod.pointer("/metadata/annotations/pgsidecar.dev~1on-empty").and_then(Value::as_str);
    let replicas = object.pointer("/spec/replicas").and_then(Value::as_u64).unwrap_or(1);
    let several = match kind {
        "DaemonSet" => true,
        "Deployment" | "ReplicaSet" | "ReplicationController" => replicas > 1,
        _ => false,
    };
    if several && on_empty == Some("restore") {
        return Err(Rejection {
            problem: format!(
                "pgsidecar.dev/on-empty: restore in a {kind} of several pods: none has an ordinal, so each would become a primary"
            ),
            remedy: "Use a StatefulSet, or one replica, or take the annotation out.".into(),
        });
    }
    Ok(())
}

/// The documents of a YAML stream. A line that begins with `---` separates them, wherever it stands (YAML 1.2, 9.1.2).
fn split(input: &str) -> Vec<&str> {
    let mut documents = Vec::new();
    let (mut start, mut offset) = (0, 0);
    for line in input.split_inclusive('\n') {
        let rest = line.strip_prefix("---").filter(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']));
        if rest.is_some() {
            documents.push(&input[start..offset]);
            start = offset + 3;
        }
        offset += line.len();
    }
    documents.push(&input[start..]);
    documents.retain(|text| !text.trim().is_empty());
    documents
}

/// JSON objects one after the other, as kubectl reads them; `None` if it's something else.
fn json_objects(text: &str) -> Option<Vec<Document<'_>>> {
    if !text.trim_start().starts_with('{') {
        return None;
    }
    let mut objects = serde_json::Deserializer::from_str(text).into_iter::<Value>();
    let mut documents = Vec::new();
    let mut start = 0;
    while let Some(object) = objects.next() {
        let object = object.ok().filter(Value::is_object)?;
        let end = objects.byte_offset();
        documents.push(Document { text: &text[start..end], object, changed: false });
        start = end;
    }
    Some(documents)
}

fn parse(text: &str) -> Result<Value, String> {
    // Kubernetes reads YAML 1.1, where 0644 is octal; yes and on are booleans there as here.
    // What a person has on their own disk may be large.
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_events: 50_000_000,
            max_nodes: 25_000_000,
            max_total_scalar_bytes: 1 << 30,
        },
        legacy_octal_numbers: true,
        with_snippet: false,
    };
    serde_saphyr::from_str_with_options::<Option<Value>>(text, options)
        .map(Option::unwrap_or_default)
        .map_err(|problem| problem.to_string())
}

fn yaml(documents: &[Document<'_>]) -> Result<String, Error> {
    let mut texts = Vec::new();
    for document in documents {
        if document.changed {
            // What YAML 1.1 would take for something else is quoted by default. Nothing is folded.
            let options = serde_saphyr::ser_options! { folded_wrap_chars: 1 << 20 };
            let text = serde_saphyr::to_string_with_options(&document.object, options);
            texts.push(text.map_err(|problem| Error::Unwritable(problem.to_string()))?);
        } else {
            texts.push(format!("{}\n", document.text.trim_start_matches(['\r', '\n']).trim_end()));
        }
    }
    // A stream that begins with JSON is taken for JSON alone by some.
    let begin = if texts.len() > 1 && texts[0].trim_start().starts_with('{') { "---\n" } else { "" };
    Ok(format!("{begin}{}", texts.join("---\n")))
}

fn json_text(value: &Value) -> String {
    format!("{value:#}\n")
}
