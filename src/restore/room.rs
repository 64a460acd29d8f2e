//! Whether there is room for what will be written, before anything is touched.

use std::{
    collections::BTreeMap,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use pgsidecar_core::plan::RestorePlan;

use super::RestoreOptions;
use crate::{
    backup::index,
    failure::{Code, Failure},
    repository::Repository,
};

/// What is kept free: a database that fills its volume to the last byte doesn't start.
const RESERVE_BYTES: u64 = 32 << 20;

/// How many bytes the restore writes to which directory: the data directory, and each tablespace by its OID.
///
/// # Errors
/// The store's.
pub async fn needed(
    repository: &Repository,
    plan: &RestorePlan,
    options: &RestoreOptions,
    tablespaces: &BTreeMap<u32, PathBuf>,
) -> Result<Vec<(PathBuf, u64)>, Failure> {
    if tablespaces.is_empty() {
        return Ok(vec![(options.to.clone(), plan.backup.restored_size())]);
    }
    let sizes = index::read(repository, &plan.backup, BTreeMap::<Option<u32>, u64>::new(), |sizes, entry| {
        let (path, size) = entry.restored();
        let oid = path.strip_prefix("pg_tblspc/").and_then(|rest| rest.split('/').next()?.parse().ok());
        *sizes.entry(oid).or_default() += size;
        Ok(())
    });
    let place = |oid: Option<u32>| oid.and_then(|oid| tablespaces.get(&oid)).unwrap_or(&options.to).clone();
    Ok(sizes.await?.into_iter().map(|(oid, size)| (place(oid), size)).collect())
}

/// Whether each file system has room for what goes to it.
///
/// # Errors
/// [`Code::TargetDirectory`] with what is there and what is needed.
pub fn check(needed: &[(PathBuf, u64)]) -> Result<(), Failure> {
    check_with(needed, &[])
}

/// The same where so many bytes in these directories will be replaced.
///
/// # Errors
/// As [`check`].
pub fn check_with(needed: &[(PathBuf, u64)], replaced: &[(PathBuf, u64)]) -> Result<(), Failure> {
    // The nearest directory that exists tells which file system it will be.
    let existing = |path: &Path| path.ancestors().find(|ancestor| ancestor.exists()).map(Path::to_owned);
    let mut systems: BTreeMap<u64, (PathBuf, u64)> = BTreeMap::new();
    for (path, bytes) in needed {
        let Some(path) = existing(path) else { continue };
        let Ok(meta) = path.metadata() else { continue };
        systems.entry(meta.dev()).or_insert((path, 0)).1 += bytes;
    }
    for (device, (path, bytes)) in systems {
        let Ok(stat) = rustix::fs::statvfs(&path) else { continue };
        let on_it = |path: &Path| path.metadata().is_ok_and(|meta| meta.dev() == device);
        let given_back: u64 = replaced.iter().filter(|(path, _)| on_it(path)).map(|(_, bytes)| bytes).sum();
        let free = stat.f_bavail.saturating_mul(stat.f_frsize).saturating_add(given_back);
        if free < bytes.saturating_add(RESERVE_BYTES) {
            return Err(Failure::new(
                Code::TargetDirectory,
                format!(
                    "the volume of {} has room for {} MB, and {} MB are needed; nothing was changed",
                    path.display(),
                    free >> 20,
                    (bytes >> 20) + (RESERVE_BYTES >> 20)
                ),
            )
            .hint("Make room ('pgsidecar restore clean' removes what earlier restores kept), or restore to another volume."));
        }
    }
    Ok(())
}
