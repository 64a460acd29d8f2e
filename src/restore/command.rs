//! The `restore_command` of a restored server.

use std::{net::SocketAddr, path::Path};

use pgsidecar_core::SystemIdentifier;

use crate::failure::{Code, Failure};

/// The command that a restored server gets. It names the database system: the daemon may sit beside another one. With
/// `tail` it's for everything that there is: also the end of the WAL that a stopped server had, and that is in no whole
/// segment.
///
/// # Errors
/// [`Code::Misconfigured`] if the helper's path can't be written into one.
pub fn restore_command(
    helper: &Path,
    address: SocketAddr,
    system: SystemIdentifier,
    tail: bool,
) -> Result<String, Failure> {
    let helper = helper.display().to_string();
    // PostgreSQL hands it to a shell, after replacing %; quoting everything that is special there isn't worth it.
    if helper.contains(['"', '\\', '$', '`', '%', '\n', '\'']) {
        return Err(Failure::new(
            Code::Misconfigured,
            format!("PGSIDECAR_HELPER: {helper:?} has characters that are special to a shell"),
        )
        .hint("Choose another place for it, or give the whole command with --restore-command."));
    }
    let tail = if tail { " --tail" } else { "" };
    Ok(format!("\"{helper}\" --address {address} restore{tail} --system-identifier {system} %f \"%p\""))
}
