//! `pgsidecar status`

use serde_json::Value;

use super::{OutputArgs, output};
use crate::{client::Client, failure::Failure, settings::Settings};

/// Shows the daemon's status.
///
/// # Errors
/// If the daemon can't be reached.
pub async fn run(settings: &Settings, args: OutputArgs) -> Result<(), Failure> {
    // As the daemon tells it: a newer daemon may tell more than this program knows.
    let status: Value = Client::new(&settings.process.control_socket).get("/v1/status").await?;
    if args.json {
        return output::print_json(&status);
    }
    let text = |path: &str| match status.pointer(path) {
        None | Some(Value::Null) => "unknown".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    };
    let lines = [
        ("State", text("/state")),
        ("Repository", text("/repository")),
        ("Cluster", format!("{} (system identifier {})", text("/cluster"), text("/system_identifier"))),
        (
            "Last archived",
            match status.pointer("/archive/last_archived/file") {
                Some(Value::String(file)) => format!("{file} at {}", text("/archive/last_archived/at")),
                _ => "none since the daemon's start".to_owned(),
            },
        ),
        (
            "Backlog",
            match status.pointer("/archive/directory/files") {
                None => format!("{} files", text("/archive/backlog_files")),
                Some(_) => format!(
                    "{} files, and {} in the archive directory, of which {} stay there",
                    text("/archive/backlog_files"),
                    text("/archive/directory/files"),
                    text("/archive/directory/held_files")
                ),
            },
        ),
        (
            "Last backup",
            match status.pointer("/last_backup/id") {
                Some(Value::String(id)) => format!("{id}, complete at {}", text("/last_backup/stopped_at")),
                _ => "none".to_owned(),
            },
        ),
        (
            "Last dump",
            match status.pointer("/last_dump/id") {
                Some(Value::String(id)) => {
                    format!(
                        "{id}, {} databases, complete at {}",
                        text("/last_dump/databases"),
                        text("/last_dump/finished_at")
                    )
                }
                _ => "none".to_owned(),
            },
        ),
        (
            "Last drill",
            match status.pointer("/last_drill/id") {
                Some(Value::String(_)) => {
                    format!("{} at {}", text("/last_drill/outcome").replace('_', " "), text("/last_drill/ended_at"))
                }
                _ => "none".to_owned(),
            },
        ),
        ("Overwrite guard", text("/conditional_creation")),
    ];
    for (name, value) in lines {
        output::print_line(&format!("{name:<15} {value}"))?;
    }
    if let Some(pending) = status.pointer("/restores/pending").and_then(Value::as_str) {
        output::print_line(&format!("At next start   {pending} takes place"))?;
    }
    if let Some(kept) = status.pointer("/restores/kept").and_then(Value::as_u64).filter(|kept| *kept > 0) {
        output::print_line(&format!(
            "Kept            {kept} earlier databases ('pgsidecar restore clean' removes them)"
        ))?;
    }
    print_growth(&status["growth"])?;
    for (list, name) in [("problems", "Problem"), ("warnings", "Warning")] {
        for one in status[list].as_array().into_iter().flatten() {
            output::print_line(&format!("{name}         {}", one["message"].as_str().unwrap_or_default()))?;
            if let Some(hint) = one["hint"].as_str().filter(|hint| !hint.is_empty()) {
                output::print_line(&format!("                HINT: {hint}"))?;
            }
        }
    }
    Ok(())
}

/// How the repository grows, a line for each kind that there is.
fn print_growth(growth: &Value) -> Result<(), Failure> {
    let bytes = |of: &Value, name: &str| of[name].as_u64().map(output::size);
    let line = |name: &str, of: &Value| {
        let size = bytes(of, "bytes").unwrap_or_default();
        let rate = bytes(of, "bytes_per_day").map_or_else(String::new, |rate| format!(", {rate} a day"));
        let level = match bytes(of, "levels_off_at_bytes") {
            Some(level) => format!(", levels off at about {level}"),
            None => String::new(),
        };
        output::print_line(&format!("{name:<15} {size}{rate}{level}"))
    };
    if growth.is_null() {
        return Ok(());
    }
    line("Stored", growth)?;
    for kind in growth["kinds"].as_array().into_iter().flatten() {
        if kind["objects"].as_u64() > Some(0) {
            line(&format!("  {}", kind["kind"].as_str().unwrap_or_default()), kind)?;
        }
    }
    Ok(())
}
