//! Removing what nothing needs any more, and how the repository grows. What may go is decided by the core's
//! `retention`; here it's gathered, removed and told.
//!
//! The order of effects, and what an interruption between two of them leaves. Whatever it is, every backup that is listed
//! can be restored, and the next run goes on from there:
//!
//! 1. The commit markers of the backups that go, one after the other: what builds on others before these. A backup without
//!    its marker is none; where the store refuses to remove one, that backup stays, and so does what it builds on.
//! 2. A look whether a backup has been completed meanwhile that builds on one of these, or one was pinned: then its marker
//!    is put back, as nothing else of it is gone yet. A backup looks at its chain once more *after* its own marker is
//!    there, and a pin after the pin is: of two that pass each other, at least one sees the other.
//! 3. The other objects of these backups, and of backups that were never completed and that nobody has worked at for a
//!    week. Left behind, they are the same to the next run as those remains.
//! 4. The records of snapshots.
//! 5. The WAL, from the oldest on: planned anew if a backup stayed that should have gone. Histories and owners of timelines
//!    stay for ever: a number must not be given anew while anything may still name it, here or elsewhere.
//! 6. Dumps: `dump.json` first, then the files.
//! 7. Records of drills and of scheduled runs that are older than 400 days, but for the newest of each kind.
//!
//! A backup that is under way needs WAL from its start on only, and there is always an older one on its timeline that keeps
//! this WAL, or none, and then all of the timeline stays.
//!
//! Only objects whose keys the layout knows, under the cluster's own prefix and system identifier, are ever deleted.

mod gather;
pub mod growth;
mod remove;

use std::collections::BTreeSet;

use jiff::Timestamp;
use pgsidecar_core::{
    BackupId, DumpId, SnapshotId,
    retention::{self, Blocker, Policy, RetentionPlan},
};
use serde::Serialize;

pub use self::remove::{Refused, delete_backup};
use self::{gather::Gathered, remove::Removal};
use crate::{
    failure::{Code, Failure},
    repository::Repository,
};

/// What came of a prune, or would.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Pruned {
    /// Whether nothing was removed, only looked what would be.
    pub dry_run: bool,
    /// What is to be kept.
    pub policy: Policy,
    /// What goes, and why the rest stays.
    pub plan: RetentionPlan,
    /// What went, or would.
    pub removed: Removed,
    /// What the store refused to remove.
    pub refused: Refused,
    /// Objects among these that aren't pgsidecar's. They are left alone.
    pub foreign_objects: u64,
}

/// What went.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Removed {
    /// Backups.
    pub backups: Vec<BackupId>,
    /// What was left of backups that were never completed.
    pub remains: Vec<BackupId>,
    /// Records of snapshots by the storage. What the storage has of these is still there.
    pub snapshots: Vec<SnapshotId>,
    /// Dumps.
    pub dumps: Vec<DumpId>,
    /// Records of drills and of scheduled runs.
    pub records: u64,
    /// Files of WAL: segments, and what belongs to them.
    pub wal_files: u64,
    /// Bytes of all of these.
    pub bytes: u64,
}

/// Removes what the policy doesn't keep; with `dry_run` only looks.
///
/// # Errors
/// [`Code::Misconfigured`] without a policy; [`Code::Damaged`] if nothing may be removed before somebody has looked at
/// something; the store's. What the store refuses is no error.
///
/// # Cancellation
/// At any point: see above.
pub async fn prune(repository: &Repository, policy: &Policy, now: Timestamp, dry_run: bool) -> Result<Pruned, Failure> {
    if !policy.removes_anything() {
        return Err(Failure::new(Code::Misconfigured, "no retention is set: everything is kept for ever").hint(
            "Set PGSIDECAR_RETENTION_WINDOW for backups and WAL, PGSIDECAR_RETENTION_DUMPS for dumps, or both.",
        ));
    }
    let gathered = gather::gather(repository, now).await?;
    let plan = retention::plan(&gathered.inventory, policy, now).map_err(blocked)?;
    let mut removal = Removal::new(repository, &gathered, dry_run);
    removal.backups(&plan.backups_to_remove()).await?;
    removal.remains(&plan.remains).await?;
    removal.snapshots(&plan.snapshots_to_remove()).await?;
    let stayed: BTreeSet<BackupId> = removal.stayed().clone();
    let planned_anew = match stayed.is_empty() {
        true => None,
        false => Some(plan_again(repository, policy, now, &stayed).await?),
    };
    removal.wal(planned_anew.as_ref().unwrap_or(&plan)).await?;
    removal.dumps(&plan.dumps_to_remove(), &plan.dump_remains).await?;
    removal.records(now).await?;
    let (removed, refused) = removal.finish();
    Ok(Pruned { dry_run, policy: *policy, plan, removed, refused, foreign_objects: gathered.foreign_objects })
}

/// The plan with backups that stayed although they should have gone.
async fn plan_again(
    repository: &Repository,
    policy: &Policy,
    now: Timestamp,
    stayed: &BTreeSet<BackupId>,
) -> Result<RetentionPlan, Failure> {
    let mut gathered: Gathered = gather::gather(repository, now).await?;
    for (id, facts) in &mut gathered.inventory.facts {
        facts.held = stayed.contains(id);
    }
    retention::plan(&gathered.inventory, policy, now).map_err(blocked)
}

fn blocked(blocker: Blocker) -> Failure {
    Failure::new(Code::Damaged, format!("nothing was removed: {blocker}")).hint(match blocker {
        Blocker::Unreadable { .. } => {
            "A newer pgsidecar may be able to read it. If it's damaged, get it back from an older version of the bucket, or move it away."
        }
        Blocker::NewestBackup { .. } => {
            "'pgsidecar backup verify' says more. Take a full backup that is whole; what is older stays until then."
        }
        Blocker::NoHistory(_) => "Copy the history from the pg_wal of a server of the cluster, and archive it.",
    })
}
