//! pgsidecar as its users meet it: the real programs, a real PostgreSQL and a real S3 server.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, reason = "a test fails by panicking")]

mod ahead;
mod always;
mod archive_directory;
mod archiving;
mod backup;
mod backup_outcomes;
mod bad_input;
mod brought_along;
mod by_hand;
mod chain_outcomes;
mod chains;
mod checked;
mod clone;
mod crash;
mod daemon;
mod drills;
mod dumps;
mod failover;
mod hardened;
mod in_place;
mod incremental_formats;
mod memory;
mod misconfiguration;
mod outage;
mod point_in_time;
mod prefetch;
mod prepare;
mod promised_ends;
mod promises;
mod remains;
mod restore_refusals;
#[path = "../support/server.rs"]
mod server;
mod shutdown;
mod side;
mod snapshots;
mod standby_chains;
mod support;
mod taken_twice;
mod throttling;
mod wal_records;
mod wal_restoring;
mod wal_verify;
