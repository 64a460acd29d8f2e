//! The webhook over real TLS: what it answers, what it refuses, and certificates that change meanwhile.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod docs;
mod files;
mod limits;
mod managed;
mod program;

mod support;
