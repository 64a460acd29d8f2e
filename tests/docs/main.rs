//! The documentation says what the program does: settings, error codes and exit codes are compared with it, and the
//! `--help` texts are snapshots that a reviewer reads.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use clap::{Arg, Command, CommandFactory};
use pgsidecar::{cli::Cli, failure::Code};

const README: &str = include_str!("../../README.md");
const SETTINGS: &str = include_str!("../../docs/settings.md");
const API: &str = include_str!("../../docs/api.md");
const ARCHITECTURE: &str = include_str!("../../ARCHITECTURE.md");
const MANIFEST: &str = include_str!("../../Cargo.toml");
const FAILURES: &str = include_str!("../FAILURES.md");
const HELPER_ARGS: &str = include_str!("../../crates/wal-client/src/args.rs");

/// What is said of a setting: its flag and its default.
type Setting = (String, String);

/// `pgsidecar` and all its commands, by their names as they are typed.
fn commands() -> Vec<(String, Command)> {
    fn add(prefix: &str, command: Command, all: &mut Vec<(String, Command)>) {
        let name = format!("{prefix}{}", command.get_name());
        for below in command.get_subcommands() {
            add(&format!("{name} "), below.clone(), all);
        }
        all.push((name, command));
    }
    let mut root = Cli::command();
    root.build();
    let mut all = Vec::new();
    add("", root, &mut all);
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

/// The rows of the tables in a text whose first cell is code, without the marks of code.
fn rows(text: &str) -> Vec<Vec<String>> {
    let cells = |line: &str| -> Vec<String> {
        line.trim_matches('|').split('|').map(|cell| cell.trim().replace('`', "")).collect()
    };
    text.lines().filter(|line| line.starts_with("| `")).map(cells).collect()
}

fn setting_of(arg: &Arg) -> Setting {
    let help = arg.get_help().unwrap_or_default().to_string();
    let default = help.split_once("[default: ").map_or("", |(_, rest)| rest.trim_end_matches(']'));
    (format!("--{}", arg.get_long().unwrap()), default.to_owned())
}

#[test]
fn every_setting_is_in_the_reference_and_nothing_else_is() {
    let mut program: BTreeMap<String, Setting> = BTreeMap::new();
    for (_, command) in commands() {
        for arg in command.get_arguments() {
            if let Some(variable) = arg.get_env() {
                program.insert(variable.to_str().unwrap().to_owned(), setting_of(arg));
            }
        }
    }
    // The first part of the reference; what follows is honoured by libraries or belongs to the helper.
    let (settings, _) = SETTINGS.split_once("\n## Honoured by libraries").unwrap();
    let documented: BTreeMap<String, Setting> =
        rows(settings).into_iter().map(|row| (row[0].clone(), (row[1].clone(), row[2].clone()))).collect();
    assert_eq!(documented, program);
}

#[test]
fn every_variable_of_the_helper_is_in_the_reference_and_nothing_else_is() {
    let (_, section) = SETTINGS.split_once("\n## pgsidecar-wal").unwrap();
    let mut documented: Vec<String> = rows(section).into_iter().map(|row| row[0].clone()).collect();
    let mut program: Vec<String> = HELPER_ARGS
        .split(|c: char| !c.is_ascii_uppercase() && c != '_')
        .filter(|word| word.starts_with("PGSIDECAR_"))
        .map(str::to_owned)
        .collect();
    program.sort();
    program.dedup();
    documented.sort();
    assert_eq!(documented, program);
}

/// All codes. The match makes a new one a compile error here.
fn codes() -> Vec<Code> {
    use Code::*;
    let all = vec![
        InvalidRequest,
        InvalidName,
        NotFound,
        NotInArchive,
        NotYetArchived,
        Conflict,
        NotOwner,
        InvalidSegment,
        WrongCluster,
        TooLarge,
        Forbidden,
        Misconfigured,
        DataDirectory,
        StoreUnavailable,
        StoreDenied,
        PostgresUnavailable,
        DaemonUnavailable,
        Busy,
        Stopping,
        Timeout,
        TargetUnreachable,
        Damaged,
        TargetDirectory,
        Io,
        Internal,
    ];
    for code in &all {
        match code {
            InvalidRequest | InvalidName | NotFound | NotInArchive | NotYetArchived | Conflict | NotOwner
            | InvalidSegment | WrongCluster | TooLarge | Forbidden | Misconfigured | DataDirectory
            | StoreUnavailable | StoreDenied | PostgresUnavailable | DaemonUnavailable | Busy | Stopping | Timeout
            | TargetUnreachable | Damaged | TargetDirectory | Io | Internal => {}
        }
    }
    all
}

#[test]
fn every_error_code_is_in_the_api_with_its_statuses() {
    let (_, section) = API.split_once("\n## Errors").unwrap();
    let documented: BTreeMap<String, (String, String)> =
        rows(section).into_iter().map(|row| (row[0].clone(), (row[1].clone(), row[2].clone()))).collect();
    let program: BTreeMap<String, (String, String)> = codes()
        .into_iter()
        .map(|code| {
            let name = serde_json::to_value(code).unwrap().as_str().unwrap().to_owned();
            (name, (code.status().as_str().to_owned(), code.exit_code().to_string()))
        })
        .collect();
    assert_eq!(documented, program);
}

#[test]
fn every_exit_code_is_in_the_readme_and_in_help() {
    let (_, section) = README.split_once("\n## Exit codes").unwrap();
    let (section, _) = section.split_once("\n## ").unwrap();
    let documented: Vec<String> = rows(section).into_iter().map(|row| row[0].clone()).collect();
    let help = Cli::command().render_help().to_string();
    for code in codes() {
        let exit_code = code.exit_code().to_string();
        assert!(documented.contains(&exit_code), "{code:?}: {exit_code}");
        assert!(help.lines().any(|line| line.trim_start().starts_with(&format!("{exit_code}  "))), "{exit_code}");
    }
}

#[test]
fn every_dependency_has_its_reason_in_the_architecture() {
    let (_, section) = MANIFEST.split_once("\n[dependencies]\n").unwrap();
    let lines = section.lines().take_while(|line| !line.starts_with('['));
    let mut program: Vec<&str> = lines.filter_map(|line| line.split([' ', '.']).next()).collect();
    program.retain(|name| !name.is_empty());
    let (_, section) = ARCHITECTURE.split_once("\n## Dependencies").unwrap();
    let (section, _) = section.split_once("\n## ").unwrap();
    let documented: Vec<String> =
        rows(section).iter().flat_map(|row| row[0].split(", ").map(str::to_owned).collect::<Vec<_>>()).collect();
    let mut missing = program.clone();
    missing.retain(|name| !documented.iter().any(|known| known == name));
    assert!(missing.is_empty(), "without a reason: {missing:?}");
    let gone: Vec<&String> = documented.iter().filter(|name| !program.contains(&name.as_str())).collect();
    assert!(gone.is_empty(), "not used any more: {gone:?}");
}

#[test]
fn every_test_in_the_table_of_failures_exists() {
    let lines: Vec<&str> = FAILURES.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| |")).collect();
    let mut last = 0;
    for line in &lines {
        let number: u32 = line.trim_start_matches("| ").split(' ').next().unwrap().parse().unwrap();
        assert!(number > last, "out of order: {line}");
        last = number;
        let tests: Vec<_> = line.split('`').filter_map(|code| code.split_once(".rs::")).collect();
        assert!(!tests.is_empty(), "without a test: {line}");
        for (file, test) in tests {
            let path = format!("{}/{file}.rs", env!("CARGO_MANIFEST_DIR"));
            let source = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
            assert!(source.contains(&format!("fn {test}(")), "there is no {test} in {file}.rs");
        }
    }
    assert!(lines.len() >= 21, "{} lines", lines.len());
}

#[test]
fn help_texts() {
    for (name, mut command) in commands() {
        insta::assert_snapshot!(name.replace(' ', "-"), command.render_long_help().to_string());
    }
    insta::assert_snapshot!("pgsidecar-short", Cli::command().render_help().to_string());
}
