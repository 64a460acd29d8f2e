//! pgsidecar: the PostgreSQL backup sidecar.
//!
//! A thin shell around `pgsidecar-core`, in which the formats, names and plans are. `ARCHITECTURE.md` has the map.

pub mod backup;
pub mod cli;
pub mod client;
pub mod codec;
pub mod daemon;
pub mod dump;
pub mod estimate;
pub mod failure;
pub mod helper;
pub mod histories;
pub mod http;
pub mod jobs;
pub mod logging;
pub mod metrics;
pub mod pgdata;
pub mod postgres;
pub mod prepare;
pub mod progress;
pub mod repository;
pub mod restore;
pub mod restore_point;
pub mod retention;
pub mod schedule;
pub mod settings;
pub mod side;
pub mod snapshot;
pub mod store;
pub mod switch;
pub mod wal;
