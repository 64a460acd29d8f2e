//! pgsidecar.
