//! Structured logs on stderr, as text or as JSON.

use std::io::IsTerminal;

use tracing_subscriber::{EnvFilter, fmt};

use crate::settings::SettingError;

/// Starts logging. `default_level` applies where no level was set.
///
/// Answers with what is wrong: an unknown level, an unknown format. Logging has been started all the same, with the
/// defaults.
pub fn start(level: Option<&str>, format: Option<&str>, default_level: &str) -> Vec<SettingError> {
    let wanted = level.filter(|level| !level.is_empty()).unwrap_or(default_level);
    let (level, bad_level) = match wanted {
        "error" | "warn" | "info" | "debug" | "trace" => (wanted, None),
        other => {
            let problem = format!("{other:?} is none of error, warn, info, debug, trace");
            (default_level, Some(SettingError { name: "PGSIDECAR_LOG", problem }))
        }
    };
    // The libraries' own logs are of interest only to who debugs them.
    let libraries = if level == "trace" { "debug" } else { "warn" };
    let filter = EnvFilter::new(format!("{libraries},pgsidecar={level}"));
    let (json, bad_format) = match format.filter(|format| !format.is_empty()) {
        None | Some("text") => (false, None),
        Some("json") => (true, None),
        Some(other) => {
            let problem = format!("{other:?} is neither text nor json");
            (false, Some(SettingError { name: "PGSIDECAR_LOG_FORMAT", problem }))
        }
    };
    let ansi = std::io::stderr().is_terminal();
    let builder = fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).with_ansi(ansi);
    // Fails only where logging has been started before, which then goes on.
    let _ = if json { builder.json().flatten_event(true).try_init() } else { builder.try_init() };
    bad_level.into_iter().chain(bad_format).collect()
}
