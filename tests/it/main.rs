//! pgsidecar as its users meet it: the real programs, a real PostgreSQL and a real S3 server.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, reason = "a test fails by panicking")]

mod archiving;
mod crash;
mod memory;
mod outage;
#[path = "../support/server.rs"]
mod server;
mod support;
