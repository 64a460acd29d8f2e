//! Publishing `pgsidecar-wal` where PostgreSQL's container can run it.
//!
//! The daemon brings the helper of its own version: a sidecar whose image alone was changed would otherwise leave the
//! old one in place.

use std::{fs, io, os::unix::fs::PermissionsExt, path::Path};

use crate::failure::Failure;

/// The helper's file name.
pub const HELPER: &str = "pgsidecar-wal";

/// Copies the helper that lies beside this executable into a directory, by rename: PostgreSQL never runs half of it.
///
/// # Errors
/// If it isn't there or can't be written.
pub fn publish(directory: &Path) -> Result<(), Failure> {
    let target = directory.join(HELPER);
    let publish = || -> io::Result<()> {
        let beside = std::env::current_exe()?.with_file_name(HELPER);
        let temporary = tempfile::Builder::new().prefix(".pgsidecar-wal-").tempfile_in(directory)?;
        io::copy(&mut fs::File::open(&beside)?, &mut temporary.as_file())?;
        temporary.as_file().set_permissions(fs::Permissions::from_mode(0o755))?;
        temporary.persist(&target)?;
        Ok(())
    };
    publish().map_err(|error| Failure::io(format!("publishing {HELPER} to {}", target.display()), &error))
}
