//! `pgsidecar-webhook`.

fn main() {}
