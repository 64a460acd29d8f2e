//! No private server may come near a live tablespace.
//!
//! Those that a backup knows are put elsewhere. One that was created after it isn't in the backup: replay would make the
//! link that the live server has, with the live path, and what is written to, cut or dropped there on the copy is the live
//! server's file. So no restore is begun where such a path is known here; no WAL is handed out that creates one where
//! something lies ([`crate::wal::get`]); and a server that has such a link all the same is ended.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use pgsidecar_core::{SystemIdentifier, backup::TablespaceRecord};

use crate::{
    failure::{Code, Failure},
    pgdata::DataDirectory,
};

/// The links of a data directory: where each tablespace lies, by its OID. Those that lie in the directory itself
/// (`allow_in_place_tablespaces`) have none.
///
/// # Errors
/// If they can't be read.
pub fn links(data: &Path) -> io::Result<BTreeMap<u32, PathBuf>> {
    let directory = data.join("pg_tblspc");
    let mut links = BTreeMap::new();
    for entry in fs::read_dir(&directory)? {
        let entry = entry?;
        let Some(oid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if entry.file_type()?.is_symlink() {
            links.insert(oid, fs::read_link(entry.path())?);
        }
    }
    Ok(links)
}

/// Refuses if the live data directory has a tablespace that the backup doesn't know. Where there is no data directory,
/// or that of another database, there is nothing to refuse.
///
/// # Errors
/// [`Code::TargetDirectory`] with the paths; what keeps them from being known.
pub fn check(pgdata: Option<&Path>, system: SystemIdentifier, known: &[TablespaceRecord]) -> Result<(), Failure> {
    let Some(pgdata) = pgdata.filter(|pgdata| pgdata.join("PG_VERSION").exists()) else { return Ok(()) };
    let live = DataDirectory::open(pgdata)?;
    if live.control()?.system_identifier != system {
        return Ok(());
    }
    let links = links(live.path())
        .map_err(|error| Failure::io(format!("reading the tablespaces of {}", pgdata.display()), &error))?;
    let unknown: Vec<String> = links
        .iter()
        .filter(|(oid, location)| {
            !known.iter().any(|known| known.oid == **oid && Path::new(&known.location) == location.as_path())
        })
        .map(|(_, location)| location.display().to_string())
        .collect();
    if unknown.is_empty() {
        return Ok(());
    }
    Err(Failure::new(
        Code::TargetDirectory,
        format!(
            "the live server has a tablespace at {} that isn't in the backup: a copy that replays its creation would write there",
            unknown.join(", ")
        ),
    )
    .hint("Nothing was started. Take a new backup and choose a target after it, or run this where the live server's volumes aren't: in Kubernetes as a Job of its own."))
}

/// The links that lead out of a directory: a server that has one must not go on.
///
/// # Errors
/// [`Code::TargetDirectory`] with one of them.
pub fn check_within(run: &Path, data: &Path) -> Result<(), Failure> {
    // While there is nothing that could be read there is no link.
    let Ok(links) = links(data) else { return Ok(()) };
    match links.values().find(|location| !location.starts_with(run)) {
        None => Ok(()),
        Some(location) => Err(leads_out(&location.display().to_string())),
    }
}

const WHAT_TO_DO: &str = "Take a new backup and choose a target after it, choose an earlier target, or run this where the live server's volumes aren't: as a Job of its own, with an empty directory at that path.";

/// What is said of a tablespace that was made.
fn leads_out(location: &str) -> Failure {
    refused(&format!("replay has made one at {location}, outside of the scratch directory"))
        .hint(format!("The private server was ended at once. {WHAT_TO_DO}"))
}

/// The failure of a private server that came to such a tablespace, and hasn't made it. `what` says how.
pub(super) fn refused(what: &str) -> Failure {
    Failure::new(Code::TargetDirectory, format!("a tablespace was created after the backup: {what}"))
        .hint(format!("The private server was ended, and nothing was written there. {WHAT_TO_DO}"))
}
