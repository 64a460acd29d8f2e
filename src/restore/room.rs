//! Whether there is room for what will be written, before anything is touched.

use std::{
    collections::BTreeMap,
    fmt::Display,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use pgsidecar_core::{WalSegmentSize, plan::RestorePlan};

use super::RestoreOptions;
use crate::{
    backup::index,
    failure::{Code, Failure},
    pgdata::DataDirectory,
    progress::Progress,
    repository::Repository,
};

/// What is kept free: a database that fills its volume to the last byte doesn't start.
const RESERVE_BYTES: u64 = 32 << 20;
/// A server that runs meanwhile needs room for its WAL and for what is written to it. More than this isn't asked for on its
/// behalf, unless the volume is so large that its twentieth is more.
const MOST_FOR_SERVER_BYTES: u64 = 1 << 30;
/// How often it's looked at while it's written.
const LOOK_EVERY: Duration = Duration::from_millis(500);

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

/// About how many bytes of WAL a server hasn't archived yet.
pub fn unarchived(data: &Path, size: WalSegmentSize) -> u64 {
    let waiting = DataDirectory::shut(data).backlog().map_or(0, |backlog| backlog.files);
    // And the one that is being written.
    waiting.saturating_add(1).saturating_mul(size.bytes())
}

/// Who needs room beside what is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beside {
    /// Nobody.
    Nobody,
    /// A server that runs on the same volumes, with so many bytes of WAL that will be copied as well.
    Server {
        /// Their number.
        wal: u64,
    },
}

impl Beside {
    /// What has to stay free on a volume of `total` bytes to which `written` go.
    fn reserve(self, total: u64, written: u64) -> u64 {
        match self {
            Beside::Nobody => RESERVE_BYTES,
            Beside::Server { wal } => {
                let for_server = (total / 20).max((written / 4).min(MOST_FOR_SERVER_BYTES)).max(RESERVE_BYTES);
                for_server.saturating_add(wal)
            }
        }
    }
}

/// Whether each file system has room for what goes to it. Answers with what has to stay free where.
///
/// # Errors
/// [`Code::TargetDirectory`] with what is there and what is needed.
pub fn check(needed: &[(PathBuf, u64)], beside: Beside) -> Result<Floor, Failure> {
    check_with(needed, &[], beside)
}

/// The same where so many bytes in these directories will be replaced.
///
/// # Errors
/// As [`check`].
pub fn check_with(needed: &[(PathBuf, u64)], replaced: &[(PathBuf, u64)], beside: Beside) -> Result<Floor, Failure> {
    let mut floor = Floor(Vec::new());
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
        let reserve = beside.reserve(stat.f_blocks.saturating_mul(stat.f_frsize), bytes);
        if free < bytes.saturating_add(reserve) {
            return Err(too_small(format!(
                "the volume of {} has room for {} MB, and {} MB are needed, {} of them to stay free; nothing was changed",
                path.display(),
                free >> 20,
                (bytes >> 20) + (reserve >> 20),
                reserve >> 20
            )));
        }
        floor.0.push((path, reserve / 2));
    }
    Ok(floor)
}

fn too_small(what: impl Display) -> Failure {
    Failure::new(Code::TargetDirectory, what.to_string()).hint(
        "Make room ('pgsidecar restore clean' removes what earlier restores kept), or restore to another volume; in place, --replace needs no second database.",
    )
}

/// What has to stay free on each volume while a restore writes beside a server: whatever else writes there.
#[derive(Clone, Debug)]
pub struct Floor(Vec<(PathBuf, u64)>);

impl Floor {
    fn short(&self) -> Option<Failure> {
        self.0.iter().find_map(|(path, least)| {
            let stat = rustix::fs::statvfs(path).ok()?;
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            (free < *least).then(|| {
                let (path, free) = (path.display(), free >> 20);
                too_small(format!(
                    "the volume of {path} fills up beside the running server: {free} MB are left; given up"
                ))
            })
        })
    }

    /// Does the work, and gives it up when too little room is left.
    ///
    /// # Errors
    /// [`Code::TargetDirectory`] then; the work's.
    ///
    /// # Cancellation
    /// As the work.
    pub async fn keep(
        &self,
        work: impl Future<Output = Result<(), Failure>>,
        progress: &Progress,
    ) -> Result<(), Failure> {
        tokio::pin!(work);
        let mut short = None;
        loop {
            tokio::select! {
                done = &mut work => return done.map_err(|failure| short.unwrap_or(failure)),
                () = tokio::time::sleep(LOOK_EVERY), if short.is_none() => {
                    short = self.short().inspect(|_| progress.cancel());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_server_that_runs_beside_it_keeps_its_room() {
        let (mb, gb) = (1_u64 << 20, 1_u64 << 30);
        assert_eq!(Beside::Nobody.reserve(1000 * gb, 500 * gb), 32 * mb);
        let server = Beside::Server { wal: 0 };
        assert_eq!(server.reserve(gb, 40 * mb), gb / 20);
        assert_eq!(server.reserve(10 * gb, 4 * gb), gb);
        assert_eq!(server.reserve(1000 * gb, 4 * gb), 50 * gb);
        assert_eq!(server.reserve(100 * mb, 8 * mb), 32 * mb);
        assert_eq!(Beside::Server { wal: 3 * gb }.reserve(10 * gb, 4 * gb), 4 * gb);
    }

    #[tokio::test]
    async fn what_fills_a_volume_up_is_given_up() {
        let scratch = tempfile::tempdir().unwrap();
        let progress = Arc::new(Progress::default());
        let until_cancelled = || {
            let progress = progress.clone();
            async move {
                while !progress.is_cancelled() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Err(Failure::new(Code::Busy, "given up"))
            }
        };
        let full = Floor(vec![(scratch.path().to_owned(), u64::MAX)]);
        let failure = full.keep(until_cancelled(), &progress).await.unwrap_err();
        assert!(failure.message.contains("fills up beside the running server"), "{failure}");
        let room = Floor(vec![(scratch.path().to_owned(), 0)]);
        room.keep(async { Ok(()) }, &progress).await.unwrap();
    }
}
