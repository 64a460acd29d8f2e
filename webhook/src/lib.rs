//! The optional mutating admission webhook: it adds pgsidecar to pods that carry the label
//! `pgsidecar.dev/inject: "true"`.
//!
//! The mutation is a pure function, [`inject`](inject::inject): a pod goes in, an add-only JSON patch or a
//! rejection comes out. The server around it ([`server`]) and the offline command both call that function and
//! nothing else. The crate depends on `pgsidecar-core` for settings and names, never on the sidecar's library, the
//! AWS SDK or a PostgreSQL client.

pub mod certificates;
pub mod cli;
pub mod inject;
pub mod logging;
pub mod metrics;
pub mod offline;
pub mod review;
pub mod server;
pub mod settings;
