//! The documentation says what the program does: settings and metrics are compared with it, `--help` is a snapshot.

use std::collections::BTreeMap;

use clap::CommandFactory;
use pgsidecar_webhook::{cli::Cli, metrics::Metrics};

const DOCS: &str = include_str!("../../../docs/webhook.md");
const ARCHITECTURE: &str = include_str!("../../../ARCHITECTURE.md");
const MANIFEST: &str = include_str!("../../Cargo.toml");

/// The rows of the tables in a text whose first cell is code, without the marks of code.
fn rows(text: &str) -> Vec<Vec<String>> {
    let cells = |line: &str| -> Vec<String> {
        line.trim_matches('|').split('|').map(|cell| cell.trim().replace('`', "")).collect()
    };
    text.lines().filter(|line| line.starts_with("| `")).map(cells).collect()
}

fn section(title: &str) -> &'static str {
    let (_, section) = DOCS.split_once(&format!("\n## {title}\n")).unwrap();
    section.split_once("\n## ").map_or(section, |(section, _)| section)
}

#[test]
fn every_setting_is_in_the_documentation_and_nothing_else_is() {
    let mut root = Cli::command();
    root.build();
    let mut program = BTreeMap::new();
    for command in root.get_subcommands() {
        for arg in command.get_arguments() {
            if let Some(variable) = arg.get_env() {
                let help = arg.get_help().unwrap().to_string();
                let default = help.split_once("[default: ").map_or("", |(_, rest)| rest.trim_end_matches(']'));
                let flag = format!("--{}", arg.get_long().unwrap());
                program.insert(variable.to_str().unwrap().to_owned(), (flag, default.to_owned()));
            }
        }
    }
    let documented: BTreeMap<String, (String, String)> =
        rows(section("Settings")).into_iter().map(|row| (row[0].clone(), (row[1].clone(), row[2].clone()))).collect();
    assert_eq!(documented, program);
}

#[test]
fn every_metric_is_in_the_documentation_and_nothing_else_is() {
    let text = Metrics::default().render().unwrap();
    // As they are shown: OpenMetrics leaves the suffixes out of the types.
    let shown = |line: &str| {
        let (name, kind) = line.strip_prefix("# TYPE ")?.split_once(' ')?;
        let suffix = match kind {
            "counter" => "_total",
            "info" => "_info",
            _ => "",
        };
        Some(format!("{name}{suffix}"))
    };
    let mut program: Vec<String> = text.lines().filter_map(shown).collect();
    program.sort_unstable();
    let mut documented: Vec<String> = rows(section("Metrics")).into_iter().map(|row| row[0].clone()).collect();
    documented.sort_unstable();
    assert_eq!(documented, program);
}

#[test]
fn every_dependency_has_its_reason_in_the_architecture() {
    let (_, section) = MANIFEST.split_once("\n[dependencies]\n").unwrap();
    let lines = section.lines().take_while(|line| !line.starts_with('['));
    let mut program: Vec<&str> = lines.filter_map(|line| line.split([' ', '.']).next()).collect();
    program.retain(|name| !name.is_empty());
    program.sort_unstable();
    let (_, section) = ARCHITECTURE.split_once("\n## Dependencies of the webhook\n").unwrap();
    let (section, _) = section.split_once("\n## ").unwrap();
    let mut documented: Vec<String> =
        rows(section).iter().flat_map(|row| row[0].split(", ").map(str::to_owned).collect::<Vec<_>>()).collect();
    documented.sort_unstable();
    assert_eq!(documented, program);
}

#[test]
fn help_texts() {
    let mut root = Cli::command();
    root.build();
    for name in ["serve", "inject"] {
        let help = root.find_subcommand_mut(name).unwrap().render_long_help().to_string();
        insta::assert_snapshot!(format!("pgsidecar-webhook-{name}"), help);
    }
    insta::assert_snapshot!("pgsidecar-webhook", root.render_long_help().to_string());
}
