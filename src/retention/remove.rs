//! Deleting, in an order that can be interrupted anywhere.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use pgsidecar_core::{
    BackupId, BackupRecord, DumpId, ObjectKey, SnapshotId,
    layout::{BackupObject, DumpObject, RepositoryObject},
    retention::{self, RetentionPlan, records::outdated},
    schedule::Task,
};
use serde::Serialize;

use super::{
    Removed,
    gather::{self, Gathered},
};
use crate::{
    backup::complete::missing_objects,
    failure::{Code, Failure},
    repository::{Repository, pins},
    store::{ListRequest, Pages, StoreError, StoreErrorKind},
};

/// How many refusals are told one by one; the others are counted.
const TOLD: usize = 20;

/// What the store refused to remove.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Refused {
    /// How many objects.
    pub objects: u64,
    /// Why, for the first of them.
    pub first: Vec<String>,
}

impl Refused {
    fn add(&mut self, error: &StoreError) {
        self.objects += 1;
        if self.first.len() < TOLD {
            self.first.push(error.to_string());
        }
    }
}

/// A prune under way.
pub(super) struct Removal<'a> {
    repository: &'a Repository,
    gathered: &'a Gathered,
    dry_run: bool,
    removed: Removed,
    refused: Refused,
    /// Backups whose commit marker is still there, or again.
    stayed: BTreeSet<BackupId>,
}

impl<'a> Removal<'a> {
    pub(super) fn new(repository: &'a Repository, gathered: &'a Gathered, dry_run: bool) -> Removal<'a> {
        let (removed, refused, stayed) = (Removed::default(), Refused::default(), BTreeSet::new());
        Removal { repository, gathered, dry_run, removed, refused, stayed }
    }

    /// The backups that should have gone and didn't.
    pub(super) fn stayed(&self) -> &BTreeSet<BackupId> {
        &self.stayed
    }

    /// What went, and what didn't.
    pub(super) fn finish(self) -> (Removed, Refused) {
        (self.removed, self.refused)
    }

    /// Deletes objects. Answers with those that the store refused to delete.
    async fn delete(&mut self, keys: &[ObjectKey]) -> Result<BTreeSet<ObjectKey>, Failure> {
        // The last line of defence: nothing but what the layout knows, under this system's own prefix.
        let ours = |key: &&ObjectKey| self.repository.layout().parse(key).is_some();
        let keys: Vec<ObjectKey> = keys.iter().filter(ours).cloned().collect();
        if self.dry_run || keys.is_empty() {
            return Ok(BTreeSet::new());
        }
        let is_refusal =
            |error: &StoreError| matches!(error.kind(), StoreErrorKind::Denied | StoreErrorKind::Unexpected);
        let mut refused = BTreeSet::new();
        match self.repository.store().delete(&keys).await {
            Ok(failed) => {
                for (key, error) in failed {
                    if !is_refusal(&error) {
                        return Err(error.into());
                    }
                    self.refused.add(&error);
                    refused.insert(key);
                }
            }
            Err(error) if is_refusal(&error) => {
                keys.iter().for_each(|_| self.refused.add(&error));
                refused.extend(keys);
            }
            Err(error) => return Err(error.into()),
        }
        Ok(refused)
    }

    /// Steps 1 to 3: backups, those that build on others first.
    pub(super) async fn backups(&mut self, ids: &[BackupId]) -> Result<(), Failure> {
        let records: BTreeMap<BackupId, &BackupRecord> =
            self.gathered.inventory.backups.iter().map(|record| (record.id, record)).collect();
        let mut unmarked = BTreeSet::new();
        for id in ids {
            let is_needed = |stayed: &BackupId| records.get(stayed).is_some_and(|record| record.parent == Some(*id));
            let marker = self.repository.layout().backup(*id, BackupObject::Record);
            if self.stayed.iter().any(is_needed) || !self.delete(&[marker]).await?.is_empty() {
                self.stayed.insert(*id);
            } else {
                unmarked.insert(*id);
            }
        }
        if !self.dry_run && !unmarked.is_empty() {
            for id in self.needed_after_all(&unmarked).await? {
                if let Some(record) = records.get(&id)
                    && self.put_back(record).await?
                {
                    unmarked.remove(&id);
                    self.stayed.insert(id);
                }
            }
        }
        for id in unmarked.into_iter().rev() {
            self.objects_of(id).await?;
            self.removed.backups.push(id);
            tracing::info!(backup = %id, dry_run = self.dry_run, "backup removed");
        }
        self.removed.backups.sort_unstable();
        Ok(())
    }

    /// Makes a backup one again of which nothing but the marker is gone. Answers with whether it is: the next backup of its
    /// pod may have taken it for remains and removed it. Its marker is a new one to the store, so that it and what is newer
    /// count as complete now: for once, more stays than has to.
    async fn put_back(&mut self, record: &BackupRecord) -> Result<bool, Failure> {
        let object = RepositoryObject::Backup(record.id, BackupObject::Record);
        self.repository.store_json(&object, record).await?;
        let whole = missing_objects(self.repository, record).await?.is_empty();
        if whole {
            tracing::warn!(backup = %record.id, "put back: it was pinned, or built on, while it was being removed");
        } else {
            self.delete(&[self.repository.layout().key(&object)]).await?;
        }
        Ok(whole)
    }

    /// Which of these backups have been pinned meanwhile, or are built on by one that was completed meanwhile: all,
    /// if the record of such a one can't be read.
    async fn needed_after_all(&self, unmarked: &BTreeSet<BackupId>) -> Result<BTreeSet<BackupId>, Failure> {
        let known: BTreeMap<BackupId, Option<BackupId>> =
            self.gathered.inventory.backups.iter().map(|record| (record.id, record.parent)).collect();
        let mut wanted: Vec<BackupId> = pins::list(self.repository).await?.into_iter().collect();
        for id in self.repository.backup_ids().await?.into_iter().filter(|id| !known.contains_key(id)) {
            match self.repository.backup(id).await {
                Ok(record) => wanted.extend(record.and_then(|record| record.parent)),
                // It may build on any of them.
                Err(failure) if failure.code == Code::Damaged => {
                    tracing::warn!("backup {id} has come meanwhile and can't be read: {failure}");
                    return Ok(unmarked.clone());
                }
                Err(failure) => return Err(failure),
            }
        }
        let mut needed = BTreeSet::new();
        while let Some(id) = wanted.pop() {
            if unmarked.contains(&id) && needed.insert(id) {
                wanted.extend(known.get(&id).copied().flatten());
            }
        }
        Ok(needed)
    }

    /// What is left of backups that were never completed.
    pub(super) async fn remains(&mut self, ids: &[BackupId]) -> Result<(), Failure> {
        for id in ids {
            // It may have become a backup after all.
            if matches!(self.repository.backup(*id).await, Ok(None)) {
                self.objects_of(*id).await?;
                self.removed.remains.push(*id);
            }
        }
        Ok(())
    }

    /// The objects of a backup that has no commit marker any more; its claim last.
    async fn objects_of(&mut self, id: BackupId) -> Result<(), Failure> {
        let layout = self.repository.layout();
        let claim = layout.backup(id, BackupObject::Started);
        if !self.dry_run {
            for upload in self.repository.store().pending_uploads(&layout.backup_prefix(id)).await? {
                self.repository.store().abort_pending(&upload).await?;
            }
        }
        let marker = layout.backup(id, BackupObject::Record);
        self.all_under(&layout.backup_prefix(id), |key| *key != claim && *key != marker).await?;
        self.delete(&[claim]).await?;
        self.removed.bytes += self.gathered.backup_bytes.get(&id).copied().unwrap_or(0);
        Ok(())
    }

    /// Deletes all objects that begin with a prefix and that are `wanted`.
    async fn all_under(&mut self, prefix: &str, wanted: impl Fn(&ObjectKey) -> bool) -> Result<(), Failure> {
        let mut pages = Pages::new(self.repository.store(), ListRequest::under(prefix));
        while let Some(page) = pages.next().await? {
            let keys: Vec<ObjectKey> = page.objects.into_iter().map(|object| object.key).filter(&wanted).collect();
            self.delete(&keys).await?;
        }
        Ok(())
    }

    /// Step 4.
    pub(super) async fn snapshots(&mut self, ids: &[SnapshotId]) -> Result<(), Failure> {
        for id in ids {
            let key = self.repository.layout().key(&RepositoryObject::Snapshot(*id));
            if self.delete(&[key]).await?.is_empty() {
                self.removed.snapshots.push(*id);
            }
        }
        Ok(())
    }

    /// Step 5.
    pub(super) async fn wal(&mut self, plan: &RetentionPlan) -> Result<(), Failure> {
        let layout = self.repository.layout();
        for prefix in [layout.all_tails_prefix(), layout.wal_prefix()] {
            let mut pages = Pages::new(self.repository.store(), ListRequest::under(prefix));
            while let Some(page) = pages.next().await? {
                let mut going: Vec<(ObjectKey, u64)> = Vec::new();
                for listed in page.objects {
                    let Some(object) = layout.parse(&listed.key) else { continue };
                    let timeline = match &object {
                        RepositoryObject::Wal(name) => name.timeline(),
                        RepositoryObject::PartialWal(segment, _) | RepositoryObject::Tail(segment, _) => {
                            segment.timeline()
                        }
                        _ => continue,
                    };
                    if plan.timeline(timeline).is_some_and(|timeline| timeline.removes(&object)) {
                        going.push((listed.key, listed.size));
                    }
                }
                self.wal_files(&going).await?;
            }
        }
        Ok(())
    }

    async fn wal_files(&mut self, files: &[(ObjectKey, u64)]) -> Result<(), Failure> {
        let keys: Vec<ObjectKey> = files.iter().map(|(key, _)| key.clone()).collect();
        let refused = self.delete(&keys).await?;
        for (_, bytes) in files.iter().filter(|(key, _)| !refused.contains(key)) {
            self.removed.wal_files += 1;
            self.removed.bytes += bytes;
        }
        Ok(())
    }

    /// Step 6.
    pub(super) async fn dumps(&mut self, ids: &[DumpId], remains: &[DumpId]) -> Result<(), Failure> {
        let layout = self.repository.layout();
        for id in ids {
            let marker = layout.key(&RepositoryObject::Dump(*id, DumpObject::Record));
            if self.delete(&[marker]).await?.is_empty() {
                self.dump_files(*id).await?;
            }
        }
        for id in remains {
            // It may have been completed after all.
            let marker = layout.key(&RepositoryObject::Dump(*id, DumpObject::Record));
            if self.repository.store().head(&marker).await?.is_none() {
                self.dump_files(*id).await?;
            }
        }
        Ok(())
    }

    /// Step 7.
    pub(super) async fn records(&mut self, now: Timestamp) -> Result<(), Failure> {
        let layout = self.repository.layout();
        let kinds = std::iter::once(layout.drills_prefix()).chain(Task::ALL.map(|task| layout.runs_prefix(task)));
        for prefix in kinds {
            let mut found: BTreeMap<Timestamp, (ObjectKey, u64)> = BTreeMap::new();
            let mut pages = Pages::new(self.repository.store(), ListRequest::under(prefix));
            while let Some(page) = pages.next().await? {
                found.extend(page.objects.into_iter().filter_map(|listed| {
                    let time = match layout.parse(&listed.key)? {
                        RepositoryObject::Drill(id) => id.began(),
                        RepositoryObject::Run(_, id) => id.time(),
                        _ => return None,
                    };
                    Some((time, (listed.key, listed.size)))
                }));
            }
            let times = found.keys().copied().collect();
            let going: Vec<(ObjectKey, u64)> =
                outdated(&times, now).iter().filter_map(|time| found.remove(time)).collect();
            let keys: Vec<ObjectKey> = going.iter().map(|(key, _)| key.clone()).collect();
            let refused = self.delete(&keys).await?;
            for (_, bytes) in going.iter().filter(|(key, _)| !refused.contains(key)) {
                self.removed.records += 1;
                self.removed.bytes += bytes;
            }
        }
        Ok(())
    }

    async fn dump_files(&mut self, id: DumpId) -> Result<(), Failure> {
        let layout = self.repository.layout();
        let marker = layout.key(&RepositoryObject::Dump(id, DumpObject::Record));
        self.all_under(&layout.dump_prefix(id), |key| *key != marker).await?;
        self.removed.bytes += self.gathered.dump_bytes.get(&id).copied().unwrap_or(0);
        self.removed.dumps.push(id);
        Ok(())
    }
}

/// Deletes a backup that somebody names, with what builds on it if `cascade`. WAL stays until the next prune.
///
/// # Errors
/// [`Code::NotFound`]; [`Code::Damaged`] if a record can't be read that may need it; [`Code::Conflict`] if it's pinned,
/// others build on it, or, without `force`, if no other could be
/// restored; [`Code::StoreDenied`] if the store refuses; the store's.
pub async fn delete_backup(
    repository: &Repository,
    id: BackupId,
    cascade: bool,
    force: bool,
) -> Result<Removed, Failure> {
    let gathered = gather::gather(repository, Timestamp::now()).await?;
    let order = retention::may_delete(&gathered.inventory, id, cascade, force).map_err(|refusal| {
        let code = match refusal {
            retention::DeleteRefusal::NoSuchBackup(_) => Code::NotFound,
            retention::DeleteRefusal::Unreadable { .. } => Code::Damaged,
            _ => Code::Conflict,
        };
        Failure::new(code, refusal.to_string()).hint(refusal.hint())
    })?;
    let mut removal = Removal::new(repository, &gathered, false);
    removal.backups(&order).await?;
    let stayed = removal.stayed().clone();
    let (removed, refused) = removal.finish();
    match refused.first.first() {
        Some(why) => {
            Err(Failure::new(Code::StoreDenied, format!("{} objects were not removed: {why}", refused.objects))
                .hint("These credentials may not delete, or the bucket keeps what it has for a time (object lock)."))
        }
        None if stayed.is_empty() => Ok(removed),
        None => Err(Failure::new(Code::Busy, format!("backup {id} was pinned or built on meanwhile, and stays"))
            .hint("'pgsidecar backup list' shows the backups.")),
    }
}
