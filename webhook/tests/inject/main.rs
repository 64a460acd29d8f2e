//! The injection: golden pods, what holds for any pod, and the same without a cluster.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod golden;
mod invariants;
mod large;
mod offline;
mod property;
mod reinvocation;

use pgsidecar_webhook::inject::Settings;

/// What the webhook is told in these tests.
fn settings() -> Settings {
    Settings {
        image: "registry.example.com/pgsidecar:0.1.0".to_owned(),
        native_sidecars: true,
        config_secret: "pgsidecar".to_owned(),
    }
}
