//! `pgsidecar-wal`.
fn main() {}
