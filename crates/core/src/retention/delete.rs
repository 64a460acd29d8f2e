//! Whether a backup may be deleted that somebody names.

use std::collections::BTreeSet;

use super::{Inventory, Start, Unreadable};
use crate::{BackupId, BackupRecord};

/// Why a backup isn't deleted.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DeleteRefusal {
    /// It isn't there.
    #[error("there is no backup {0}")]
    NoSuchBackup(BackupId),
    /// It's not known what builds on it, or whether anything else can be restored.
    #[error("{what} can't be read, and may need it: {why}")]
    Unreadable {
        /// The object.
        what: String,
        /// Why.
        why: String,
    },
    /// Others would be lost with it.
    #[error("{} builds on backup {backup}", list(.dependents))]
    BuiltOn {
        /// The backup.
        backup: BackupId,
        /// What builds on it, directly or not.
        dependents: Vec<BackupId>,
    },
    /// Somebody wants to keep it.
    #[error("backup {0} is pinned")]
    Pinned(BackupId),
    /// Nothing could be restored any more, or nothing without damaged pages.
    #[error("no other backup can be restored, or none without damaged pages")]
    LastOne,
}

impl DeleteRefusal {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            DeleteRefusal::NoSuchBackup(_) => "'pgsidecar backup list' shows them.",
            DeleteRefusal::Unreadable { .. } => {
                "A newer pgsidecar may be able to read it. If it's damaged, get it back from an older version of the bucket, or move it away."
            }
            DeleteRefusal::BuiltOn { .. } => "With --cascade they go as well.",
            DeleteRefusal::Pinned(_) => "'pgsidecar backup unpin' takes the pin away.",
            DeleteRefusal::LastOne => "Take another one first; with --force it goes all the same.",
        }
    }
}

fn list(ids: &[BackupId]) -> String {
    ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// The backups that go if this one is to go, those that build on others first.
///
/// # Errors
/// [`DeleteRefusal`] if a record can't be read that may need it, if others build on it and don't go along (`cascade`), if one of them is pinned, or, without `force`,
/// if none would be left that can be restored, or none without damaged pages, although there is one now.
pub fn may_delete(
    inventory: &Inventory,
    backup: BackupId,
    cascade: bool,
    force: bool,
) -> Result<Vec<BackupId>, DeleteRefusal> {
    let records: &[BackupRecord] = &inventory.backups;
    if !records.iter().any(|record| record.id == backup) {
        return Err(DeleteRefusal::NoSuchBackup(backup));
    }
    if let Some(Unreadable { what, why }) = inventory.unreadable.first() {
        return Err(DeleteRefusal::Unreadable { what: what.clone(), why: why.clone() });
    }
    let mut going = BTreeSet::from([backup]);
    // Each round finds those that build on what the one before found.
    loop {
        let more = records.iter().filter(|record| record.parent.is_some_and(|parent| going.contains(&parent)));
        let more: Vec<BackupId> = more.map(|record| record.id).filter(|id| !going.contains(id)).collect();
        if more.is_empty() {
            break;
        }
        going.extend(more);
    }
    if let Some(pinned) = going.iter().find(|id| inventory.pins.contains(id)) {
        return Err(DeleteRefusal::Pinned(*pinned));
    }
    if going.len() > 1 && !cascade {
        let dependents = going.into_iter().filter(|id| *id != backup).collect();
        return Err(DeleteRefusal::BuiltOn { backup, dependents });
    }
    let (gone, left): (Vec<_>, Vec<_>) = records.iter().partition(|record| going.contains(&record.id));
    // One with damaged pages doesn't stand in for a clean one.
    for counts in [|start: &Start| start.restorable, |start: &Start| start.clean] {
        let any = |of: &[&BackupRecord]| of.iter().any(|record| counts(&inventory.backup_start(record)));
        if !force && any(&gone) && !any(&left) {
            return Err(DeleteRefusal::LastOne);
        }
    }
    Ok(going.into_iter().rev().collect())
}
