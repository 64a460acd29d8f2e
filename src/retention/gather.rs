//! Looking through a repository for what retention has to know. The listings are read page by page: memory depends on
//! the number of backups, timelines and gaps, not on that of the segments.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use pgsidecar_core::{
    ArchiveFileName, BackupId, BackupKind, BackupRecord, DumpId,
    layout::{BackupObject, DumpObject, RepositoryObject},
    retention::{BackupFacts, Inventory, Kind, Measured, Unreadable},
};

use crate::{
    failure::{Code, Failure},
    repository::Repository,
    store::{ListRequest, ListedObject, Pages},
};

/// What was found.
pub(super) struct Gathered {
    pub(super) inventory: Inventory,
    /// Bytes that each backup takes, complete or not.
    pub(super) backup_bytes: BTreeMap<BackupId, u64>,
    /// Bytes that each dump takes, complete or not.
    pub(super) dump_bytes: BTreeMap<DumpId, u64>,
    /// Backups of which there are parts and no record.
    without_record: BTreeSet<BackupId>,
    /// Dumps of which there is a record.
    recorded_dumps: BTreeSet<DumpId>,
    pub(super) foreign_objects: u64,
    pub(super) measured: [(Kind, Measured); 4],
}

/// What has been listed of a backup.
struct ListedBackup {
    id: BackupId,
    record: Option<Timestamp>,
    manifest: Option<u64>,
    index: Option<u64>,
    parts: BTreeMap<u32, u64>,
    bytes: u64,
    newest: Timestamp,
}

impl ListedBackup {
    fn new(id: BackupId) -> ListedBackup {
        let (record, manifest, index) = (None, None, None);
        ListedBackup { id, record, manifest, index, parts: BTreeMap::new(), bytes: 0, newest: Timestamp::MIN }
    }

    fn found(&mut self, object: BackupObject, listed: &ListedObject) {
        match object {
            BackupObject::Started => {}
            BackupObject::Record => self.record = Some(listed.modified),
            BackupObject::Manifest => self.manifest = Some(listed.size),
            BackupObject::Index => self.index = Some(listed.size),
            BackupObject::Part(number) => {
                self.parts.insert(number, listed.size);
            }
        }
        self.bytes += listed.size;
        self.newest = self.newest.max(listed.modified);
    }

    fn is_all_of(&self, record: &BackupRecord) -> bool {
        self.manifest == Some(record.manifest.size)
            && self.index == Some(record.index.size)
            && record.parts.iter().all(|part| self.parts.get(&part.number) == Some(&part.stored.size))
    }
}

/// Looks through the repository.
///
/// # Errors
/// The store's; [`Code::WrongCluster`] if the repository doesn't know the database. What can't be read is part of the
/// answer.
pub(super) async fn gather(repository: &Repository, now: Timestamp) -> Result<Gathered, Failure> {
    let size = repository.known_cluster().await?.wal_segment_size;
    let mut gathered = Gathered {
        inventory: Inventory::empty(size),
        backup_bytes: BTreeMap::new(),
        dump_bytes: BTreeMap::new(),
        without_record: BTreeSet::new(),
        recorded_dumps: BTreeSet::new(),
        foreign_objects: 0,
        measured: Kind::ALL.map(|kind| (kind, Measured::new(now))),
    };
    // Backups before WAL: what is complete by now has all of its WAL in a listing that begins later.
    gathered.backups(repository).await?;
    gathered.small_objects(repository).await?;
    gathered.wal(repository).await?;
    Ok(gathered)
}

impl Gathered {
    fn measure(&mut self, wanted: Kind, bytes: u64, stored_at: Timestamp) {
        let measured = self.measured.iter_mut().find(|(kind, _)| *kind == wanted);
        measured.into_iter().for_each(|(_, measured)| measured.found(bytes, stored_at));
    }

    fn unreadable(&mut self, what: String, failure: Failure) -> Result<(), Failure> {
        if failure.code != Code::Damaged {
            return Err(failure);
        }
        self.inventory.unreadable.push(Unreadable { what, why: failure.message });
        Ok(())
    }

    async fn backups(&mut self, repository: &Repository) -> Result<(), Failure> {
        let mut pages = Pages::new(repository.store(), ListRequest::under(repository.layout().backups_prefix()));
        let mut current: Option<ListedBackup> = None;
        while let Some(page) = pages.next().await? {
            for listed in page.objects {
                let Some(RepositoryObject::Backup(id, object)) = repository.layout().parse(&listed.key) else {
                    self.foreign_objects += 1;
                    continue;
                };
                // Keys come in order: those of a backup together.
                if let Some(done) = current.take_if(|current| current.id != id) {
                    self.backup(repository, done).await?;
                }
                current.get_or_insert_with(|| ListedBackup::new(id)).found(object, &listed);
            }
        }
        match current {
            Some(done) => self.backup(repository, done).await,
            None => Ok(()),
        }
    }

    async fn backup(&mut self, repository: &Repository, listed: ListedBackup) -> Result<(), Failure> {
        let id = listed.id;
        self.backup_bytes.insert(id, listed.bytes);
        let Some(stored_at) = listed.record else {
            self.inventory.unfinished.insert(id, listed.newest);
            if !listed.parts.is_empty() {
                self.without_record.insert(id);
            }
            return Ok(());
        };
        let kind = if id.kind() == BackupKind::Full { Kind::Full } else { Kind::Incremental };
        self.measure(kind, listed.bytes, stored_at);
        match repository.backup(id).await {
            Ok(Some(record)) => {
                let intact = listed.is_all_of(&record);
                self.inventory.facts.insert(id, BackupFacts { stored_at, intact, held: false });
                self.inventory.backups.push(record);
                Ok(())
            }
            // Another prune may have removed it since. Or the store has lost it, or shows a stale listing.
            Ok(None) => {
                let why = "it was listed, and isn't there".to_owned();
                self.inventory.unreadable.push(Unreadable { what: format!("the record of backup {id}"), why });
                Ok(())
            }
            Err(failure) => self.unreadable(format!("the record of backup {id}"), failure),
        }
    }

    /// Snapshots, pins and dumps.
    async fn small_objects(&mut self, repository: &Repository) -> Result<(), Failure> {
        let layout = repository.layout();
        for prefix in [layout.snapshots_prefix(), layout.pins_prefix(), layout.dumps_prefix()] {
            let mut pages = Pages::new(repository.store(), ListRequest::under(prefix));
            while let Some(page) = pages.next().await? {
                for listed in page.objects {
                    match layout.parse(&listed.key) {
                        Some(RepositoryObject::Snapshot(id)) => match repository.snapshot(id).await {
                            Ok(record) => {
                                self.inventory.snapshots_stored.insert(id, listed.modified);
                                self.inventory.snapshots.extend(record);
                            }
                            Err(failure) => self.unreadable(format!("the record of snapshot {id}"), failure)?,
                        },
                        Some(RepositoryObject::Pin(id)) => {
                            self.inventory.pins.insert(id);
                        }
                        Some(RepositoryObject::Dump(id, object)) => self.dump(id, &object, &listed),
                        _ => self.foreign_objects += 1,
                    }
                }
            }
        }
        // Only what was complete is pinned: its record was lost, or a removal was broken off.
        for id in self.inventory.pins.intersection(&self.without_record) {
            let why = "it isn't there, but its parts are, and it's pinned".to_owned();
            self.inventory.unreadable.push(Unreadable { what: format!("the record of backup {id}"), why });
        }
        for id in std::mem::take(&mut self.recorded_dumps) {
            self.inventory.unfinished_dumps.remove(&id);
            let bytes = self.dump_bytes.get(&id).copied().unwrap_or(0);
            self.measure(Kind::Dumps, bytes, id.began());
            let unreadable = match repository.dump(id).await {
                Ok(Some(record)) => {
                    let databases = record.databases.into_iter().map(|database| database.name).collect();
                    self.inventory.dumps.insert(id, databases);
                    continue;
                }
                Ok(None) => "it was listed, and isn't there".to_owned(),
                Err(failure) if failure.code == Code::Damaged => failure.message,
                Err(failure) => return Err(failure),
            };
            let what = format!("the record of dump {id}");
            self.inventory.unreadable_dumps.push(Unreadable { what, why: unreadable });
        }
        Ok(())
    }

    fn dump(&mut self, id: DumpId, object: &DumpObject, listed: &ListedObject) {
        *self.dump_bytes.entry(id).or_default() += listed.size;
        if *object == DumpObject::Record {
            self.recorded_dumps.insert(id);
        }
        let newest = self.inventory.unfinished_dumps.entry(id).or_insert(listed.modified);
        *newest = listed.modified.max(*newest);
    }

    /// WAL, histories and tails.
    async fn wal(&mut self, repository: &Repository) -> Result<(), Failure> {
        let layout = repository.layout();
        let mut timelines_with_history = Vec::new();
        for prefix in [layout.wal_prefix(), layout.all_tails_prefix()] {
            let mut pages = Pages::new(repository.store(), ListRequest::under(prefix));
            while let Some(page) = pages.next().await? {
                for listed in page.objects {
                    let (timeline, of) = match layout.parse(&listed.key) {
                        Some(RepositoryObject::Wal(ArchiveFileName::History(timeline))) => {
                            timelines_with_history.push(timeline);
                            (timeline, None)
                        }
                        Some(RepositoryObject::Wal(ArchiveFileName::Segment(segment))) => {
                            let stock = self.inventory.stock(segment.timeline());
                            stock.wal.found(segment, listed.size, listed.modified);
                            (segment.timeline(), Some(segment))
                        }
                        Some(
                            RepositoryObject::Wal(
                                ArchiveFileName::Partial(segment) | ArchiveFileName::BackupHistory { segment, .. },
                            )
                            | RepositoryObject::PartialWal(segment, _)
                            | RepositoryObject::Tail(segment, _),
                        ) => (segment.timeline(), Some(segment)),
                        Some(RepositoryObject::TimelineOwner(timeline)) => (timeline, None),
                        _ => {
                            self.foreign_objects += 1;
                            continue;
                        }
                    };
                    self.inventory.stock(timeline).found(of, listed.modified);
                    self.measure(Kind::Wal, listed.size, listed.modified);
                }
            }
        }
        for timeline in timelines_with_history {
            match repository.history(timeline).await {
                Ok(history) => self.inventory.histories.extend(history),
                Err(failure) => self.unreadable(format!("the history of timeline {timeline}"), failure)?,
            }
        }
        Ok(())
    }
}
