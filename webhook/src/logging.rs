//! Structured logs on stderr, as text or as JSON: as the sidecar writes them.

use std::io::IsTerminal;

use tracing_subscriber::{EnvFilter, fmt};

use crate::settings::SettingError;

/// Starts logging. Answers with what is wrong: an unknown level, an unknown format. Logging has been started all the
/// same, with the defaults.
pub fn start(level: Option<&str>, format: Option<&str>) -> Vec<SettingError> {
    let mut wrong = Vec::new();
    let level = match level.filter(|level| !level.is_empty()).unwrap_or("info") {
        level @ ("error" | "warn" | "info" | "debug" | "trace") => level,
        other => {
            let problem = format!("{other:?} is none of error, warn, info, debug, trace");
            wrong.push(SettingError { name: "PGSIDECAR_LOG", problem });
            "info"
        }
    };
    let json = match format.filter(|format| !format.is_empty()) {
        None | Some("text") => false,
        Some("json") => true,
        Some(other) => {
            let problem = format!("{other:?} is neither text nor json");
            wrong.push(SettingError { name: "PGSIDECAR_LOG_FORMAT", problem });
            false
        }
    };
    // The libraries' own logs are of interest only to who debugs them.
    let libraries = if level == "trace" { "debug" } else { "warn" };
    let filter = EnvFilter::new(format!("{libraries},pgsidecar_webhook={level}"));
    let ansi = std::io::stderr().is_terminal();
    let builder = fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).with_ansi(ansi);
    // Fails only where logging has been started before, which then goes on.
    let _ = if json { builder.json().flatten_event(true).try_init() } else { builder.try_init() };
    wrong
}
