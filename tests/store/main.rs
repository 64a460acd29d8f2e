//! What every store guarantees, checked on each of them, and what an S3 server can do to us, checked on servers that do it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod conformance;
mod endpoints;
mod environment;
mod local;
mod look_first;
mod scripted;
#[path = "../support/server.rs"]
mod server;
mod support;
mod uploads;
