//! The optional mutating admission webhook: it will add pgsidecar to pods that carry the label
//! `pgsidecar.dev/inject: "true"`.
//!
//! Nothing is implemented yet. The crate stands here so that its boundary is fixed from the start: it
//! depends on `pgsidecar-core` (settings, names) and on the admission types alone, never on the
//! sidecar's library, the AWS SDK or a PostgreSQL client.
