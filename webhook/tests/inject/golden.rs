//! Pods as they are found in the field, beside what they get: `tests/golden/accepted/NAME.yaml` and `NAME.snap`, and what
//! those are told that are refused.

use std::{fmt::Write as _, fs, path::PathBuf};

use pgsidecar_webhook::inject::{Operation, inject};
use serde_json::Value;

use crate::{invariants, settings};

fn pods(kind: &str) -> Vec<(String, Value)> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(kind);
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|end| end == "yaml")).collect();
    files.sort();
    let read = |path: PathBuf| {
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        (name, serde_saphyr::from_str(&fs::read_to_string(&path).unwrap()).unwrap())
    };
    files.into_iter().map(read).collect()
}

fn snapshot(kind: &str, name: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path(format!("../golden/{kind}"));
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(name, text));
}

#[test]
fn each_pod_gets_what_it_lacks() {
    let pods = pods("accepted");
    assert!(pods.len() > 40, "{} pods", pods.len());
    for (name, pod) in pods {
        let injection = inject(&pod, "shop", &settings()).unwrap_or_else(|rejection| panic!("{name}: {rejection}"));
        let mut text = String::new();
        for warning in &injection.warnings {
            writeln!(text, "warning: {warning}").unwrap();
        }
        for Operation::Add { path, value } in &injection.patch {
            writeln!(text, "add {path}").unwrap();
            writeln!(text, "{}", pretty(value, 2)).unwrap();
        }
        snapshot("accepted", &name, &text);
        invariants::check(&pod, &injection);
    }
}

#[test]
fn each_pod_that_is_refused_is_told_why_and_what_to_do() {
    let pods = pods("rejected");
    assert!(pods.len() > 25, "{} pods", pods.len());
    for (name, pod) in pods {
        let rejection = inject(&pod, "shop", &settings()).expect_err(&name);
        assert!(rejection.remedy.ends_with('.') && !rejection.problem.ends_with('.'), "{name}: {rejection}");
        snapshot("rejected", &name, &rejection.to_string().replace("; pgsidecar.dev", "\npgsidecar.dev"));
    }
}

/// JSON in which what is short stands on one line.
fn pretty(value: &Value, indent: usize) -> String {
    const WIDTH: usize = 120;
    let line = value.to_string();
    let pad = " ".repeat(indent);
    if line.len() + indent <= WIDTH {
        return format!("{pad}{line}");
    }
    match value {
        Value::Array(list) => {
            let lines: Vec<String> = list.iter().map(|value| pretty(value, indent + 2)).collect();
            format!("{pad}[\n{}\n{pad}]", lines.join(",\n"))
        }
        Value::Object(members) => {
            let lines: Vec<String> = members
                .iter()
                .map(|(name, value)| format!("{pad}  {name:?}: {}", pretty(value, indent + 2).trim_start()))
                .collect();
            format!("{pad}{{\n{}\n{pad}}}", lines.join(",\n"))
        }
        _ => format!("{pad}{line}"),
    }
}
