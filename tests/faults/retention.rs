//! A prune on a store that fails, hangs or refuses at each call: whatever is listed restores, and the next run ends where
//! one without a fault does.

use std::{
    collections::BTreeSet,
    fs::File,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use jiff::{SignedDuration, Timestamp};
use pgsidecar::{
    backup::complete::{missing_objects, missing_wal},
    failure::{Code, Failure},
    repository::{BackupClaim, Repository, pins},
    retention::{Pruned, delete_backup, prune},
    store::{
        ListRequest, LocalStore, Pages, StoreErrorKind,
        fault::{Fault, FaultPlan, FaultStore, Operation},
    },
};
use pgsidecar_core::{
    ArchiveFileName, BackupId, BackupKind, BackupRecord, DumpId, Layout, Lsn, ObjectKey, SegmentName, Sha256Digest,
    SystemIdentifier, TimelineId, WalSegmentSize,
    backup::{BACKUP_FORMAT, DamagedFile, PartRecord, StoredObject},
    chain::chain,
    layout::{BackupObject, DumpFile, DumpObject, RepositoryObject},
    retention::Policy,
};

use super::FAULTS;

const SYSTEM: SystemIdentifier = SystemIdentifier::new(7_710_543_486_334_591_142);
const DAYS: i64 = 30;

/// A repository in which things have happened on the last thirty days.
struct Past {
    plan: FaultPlan,
    repository: Repository,
    now: Timestamp,
    segments_a_day: u64,
    directory: tempfile::TempDir,
}

fn size() -> WalSegmentSize {
    WalSegmentSize::new(1 << 20).unwrap()
}

fn policy(window: &str) -> Policy {
    let dumps = Some("daily=2".parse().unwrap());
    Policy { window: Some(window.parse().unwrap()), dumps, ..Policy::default() }
}

impl Past {
    fn empty(segments_a_day: u64) -> Past {
        let directory = tempfile::tempdir().unwrap();
        let plan = FaultPlan::none();
        let beneath = LocalStore::new(directory.path());
        let store = Arc::new(FaultStore::new(beneath, plan.clone()));
        let repository = Repository::new(store, Layout::new("main".parse().unwrap(), SYSTEM), 1);
        Past { plan, repository, now: Timestamp::now(), segments_a_day, directory }
    }

    /// Full backups on days 0, 10 and 20, an incremental one on each day after these; a dump every fifth day.
    async fn new(segments_a_day: u64) -> Past {
        let past = Past::empty(segments_a_day);
        past.repository.note_cluster(size()).await.unwrap();
        for day in 0..DAYS {
            for at in 0..segments_a_day {
                let number = past.segment_of(day) + at;
                let segment = SegmentName::from_number(TimelineId::FIRST, number, size());
                past.put(&RepositoryObject::Wal(ArchiveFileName::Segment(segment)), day).await;
            }
            let parent = (day % 10 == 1).then(|| past.id(day - 1));
            if day % 10 < 2 {
                past.back_up(day, parent).await;
            }
            if day % 5 == 0 {
                let id = past.dump(day);
                past.put(&RepositoryObject::Dump(id, DumpObject::File(DumpFile::new("shop.dump").unwrap())), day).await;
                past.put(&RepositoryObject::Dump(id, DumpObject::Record), day).await;
            }
        }
        past
    }

    fn at(&self, day: i64) -> Timestamp {
        self.now - SignedDuration::from_hours(24 * (DAYS - day))
    }

    fn id(&self, day: i64) -> BackupId {
        BackupId::new(self.at(day), if day % 10 == 0 { BackupKind::Full } else { BackupKind::Incremental })
    }

    fn dump(&self, day: i64) -> DumpId {
        DumpId::new(self.at(day))
    }

    fn segment_of(&self, day: i64) -> u64 {
        1 + u64::try_from(day).unwrap() * self.segments_a_day
    }

    /// Puts an object there as if it had been stored on that day.
    async fn put_key(&self, key: &ObjectKey, content: &[u8], day: i64) -> StoredObject {
        self.repository.store().create(key, content.to_vec().into(), None).await.unwrap();
        self.stored_on(key, day);
        StoredObject { size: content.len() as u64, sha256: Sha256Digest::of(content) }
    }

    async fn put(&self, object: &RepositoryObject, day: i64) -> StoredObject {
        self.put_key(&self.repository.layout().key(object), b"content", day).await
    }

    fn path(&self, key: &ObjectKey) -> PathBuf {
        self.directory.path().join(key.as_str())
    }

    fn stored_on(&self, key: &ObjectKey, day: i64) {
        let ago = Duration::from_secs(86_400 * u64::try_from(DAYS - day).unwrap());
        File::options().write(true).open(self.path(key)).unwrap().set_modified(SystemTime::now() - ago).unwrap();
    }

    async fn back_up(&self, day: i64, parent: Option<BackupId>) {
        let id = self.id(day);
        let object = |object| RepositoryObject::Backup(id, object);
        let claim = BackupClaim { id, instance: "another pod".into(), attempt: "1".into() };
        self.repository.store_json(&object(BackupObject::Started), &claim).await.unwrap();
        self.stored_on(&self.repository.layout().backup(id, BackupObject::Started), day);
        let start = size().start_of(self.segment_of(day)).bytes();
        let record = BackupRecord {
            format: BACKUP_FORMAT,
            id,
            parent,
            system_identifier: SYSTEM,
            server_version: 170_000,
            timeline: TimelineId::FIRST,
            start_lsn: Lsn::new(start + 0x28),
            stop_lsn: Lsn::new(start + 0x100),
            started_at: id.began(),
            stopped_at: id.began(),
            next_xid_at_stop: 800,
            from_standby: false,
            wal_segment_size: size(),
            block_size: 8192,
            data_checksums: false,
            tablespaces: Vec::new(),
            parts: vec![PartRecord {
                number: 1,
                stored: self.put(&object(BackupObject::Part(1)), day).await,
                files: 1,
                file_bytes: 7,
            }],
            manifest: self.put(&object(BackupObject::Manifest), day).await,
            index: self.put(&object(BackupObject::Index), day).await,
            files: 1,
            restored_bytes: 7,
            damaged: Vec::new(),
            warnings: Vec::new(),
            writer: "a test".to_owned(),
        };
        self.store_record(&record, day).await;
    }

    async fn store_record(&self, record: &BackupRecord, day: i64) {
        let object = RepositoryObject::Backup(record.id, BackupObject::Record);
        self.repository.store_json(&object, record).await.unwrap();
        self.stored_on(&self.repository.layout().key(&object), day);
    }

    async fn prune(&self, window: &str) -> Result<Pruned, Failure> {
        prune(&self.repository, &policy(window), Timestamp::now(), false).await
    }

    /// All keys, foreign ones too.
    async fn keys(&self) -> BTreeSet<String> {
        let beneath = LocalStore::new(self.directory.path());
        let mut keys = BTreeSet::new();
        let mut pages = Pages::new(&beneath, ListRequest::under(""));
        while let Some(page) = pages.next().await.unwrap() {
            keys.extend(page.objects.into_iter().map(|object| object.key.as_str().to_owned()));
        }
        keys
    }

    async fn ids(&self) -> Vec<BackupId> {
        self.repository.backups().await.unwrap().into_iter().map(|record| record.id).collect()
    }

    /// Everything that is listed can be restored to its own end.
    async fn check_all_listed(&self) {
        let records = self.repository.backups().await.unwrap();
        for record in &records {
            chain(record, &records).unwrap();
            assert_eq!(missing_objects(&self.repository, record).await.unwrap(), []);
            assert_eq!(missing_wal(&self.repository, record).await.unwrap(), None, "{}", record.id);
        }
    }

    fn paths_of(&self, backup: BackupId) -> String {
        self.repository.layout().backup_prefix(backup)
    }
}

#[tokio::test]
async fn what_the_window_does_not_need_goes_and_the_rest_restores() {
    let past = Past::new(2).await;
    let before = past.keys().await;
    let looked = prune(&past.repository, &policy("12d"), Timestamp::now(), true).await.unwrap();
    assert_eq!(past.keys().await, before, "a dry run");
    let pruned = past.prune("12d").await.unwrap();
    assert_eq!((&pruned.removed, &pruned.plan), (&looked.removed, &looked.plan));
    // The window begins on day 18: the backup of day 11 leads there, and builds on that of day 10.
    assert_eq!(pruned.removed.backups, [past.id(0), past.id(1)]);
    assert_eq!(past.ids().await, [10, 11, 20, 21].map(|day| past.id(day)));
    assert_eq!(pruned.removed.wal_files, 20);
    assert_eq!(pruned.removed.dumps, [0, 5, 10, 15].map(|day| past.dump(day)));
    assert_eq!((pruned.refused.objects, pruned.foreign_objects), (0, 0));
    past.check_all_listed().await;
    let gone: Vec<_> = before.difference(&past.keys().await).cloned().collect();
    assert_eq!(gone.len(), 20 + 2 * 5 + 4 * 2, "{gone:?}");
    assert_eq!(past.prune("12d").await.unwrap().removed, Default::default());
}

#[tokio::test]
async fn a_prune_with_a_fault_at_each_call_leaves_what_restores_and_the_next_run_finishes() {
    let expected = {
        let past = Past::new(1).await;
        let before = past.keys().await.len();
        past.prune("12d").await.unwrap();
        assert!(past.keys().await.len() < before);
        past.keys().await.len()
    };
    let operations =
        [Operation::Delete, Operation::List, Operation::Get, Operation::Head, Operation::Pending, Operation::Create];
    let (mut met, mut deletes) = (0, 0);
    for operation in operations {
        for fault in FAULTS {
            for nth in 1.. {
                assert!(nth < 300);
                let past = Past::new(1).await;
                past.plan.clone().on_nth(nth, operation, "main/", fault);
                let outcome = past.prune("12d").await;
                let injected = past.plan.injected() > 0;
                past.plan.heal();
                past.check_all_listed().await;
                if !injected {
                    outcome.unwrap();
                    break;
                }
                assert_eq!(outcome.unwrap_err().code, Code::StoreUnavailable, "{operation:?} {nth}");
                past.prune("12d").await.unwrap();
                past.check_all_listed().await;
                assert_eq!(past.keys().await.len(), expected, "{operation:?} {nth} {fault:?}: {:?}", past.keys().await);
                met += 1;
                deletes += u64::from(operation == Operation::Delete);
            }
        }
    }
    assert!(met > 40 && deletes > 20, "{met} {deletes}");
}

#[tokio::test]
async fn a_prune_that_is_killed_at_each_delete_leaves_what_restores_and_the_next_run_finishes() {
    for fault in [Fault::NeverBefore, Fault::NeverAfter] {
        for nth in 1.. {
            let past = Past::new(1).await;
            past.plan.clone().on_nth(nth, Operation::Delete, "main/", fault);
            let killed = tokio::time::timeout(Duration::from_millis(700), past.prune("12d")).await;
            let injected = past.plan.injected() > 0;
            past.plan.heal();
            past.check_all_listed().await;
            past.prune("12d").await.unwrap();
            past.check_all_listed().await;
            assert_eq!(past.ids().await.len(), 4);
            if !injected {
                killed.unwrap().unwrap();
                assert!(nth > 10);
                break;
            }
            assert!(killed.is_err(), "{nth}");
        }
    }
}

#[tokio::test]
async fn what_the_store_refuses_to_delete_is_told_and_stays_whole() {
    for kind in [StoreErrorKind::Denied, StoreErrorKind::Unexpected] {
        let past = Past::new(2).await;
        let before = past.keys().await;
        past.plan.clone().always(Operation::Delete, "", Fault::Before(kind));
        let pruned = past.prune("12d").await.unwrap();
        assert_eq!((pruned.removed, past.keys().await), (Default::default(), before));
        assert!(pruned.refused.objects > 20 && !pruned.refused.first.is_empty());
        past.plan.heal();

        // One backup is locked: what it builds on stays with it, and the WAL to its end; all else goes.
        let locked = past.id(1);
        past.plan.clone().always(Operation::Delete, &past.paths_of(locked), Fault::Before(kind));
        let pruned = past.prune("12d").await.unwrap();
        past.plan.heal();
        assert_eq!((pruned.refused.objects, pruned.removed.backups), (1, vec![]));
        assert_eq!(past.ids().await, [0, 1, 10, 11, 20, 21].map(|day| past.id(day)));
        past.check_all_listed().await;
        assert_eq!(pruned.removed.wal_files, 20 - 2, "a segment for each of the two");
        // When the lock is over, the next run takes it.
        assert_eq!(past.prune("12d").await.unwrap().removed.backups, [past.id(0), locked]);
    }
}

#[tokio::test]
async fn what_is_not_ours_stays_whatever_it_is_called() {
    let past = Past::new(2).await;
    let system = SYSTEM.to_string();
    let mut foreign = BTreeSet::new();
    for name in [
        format!("main/{system}/wal/00000001/0000000100000000/notes.txt"),
        format!("main/{system}/wal/00000001/0000000100000000/000000010000000000000001"),
        format!("main/{system}/{}/readme", past.paths_of(past.id(0)).split_once(&system).unwrap().1.trim_matches('/')),
        format!("main/{system}/dumps/{}/notes.txt", past.dump(0)),
        format!("main/{system}/other/thing"),
        "main/7710543486334591143/wal/00000001/0000000100000000/000000010000000000000001.zst".to_owned(),
        format!("another/{system}/wal/00000001/0000000100000000/000000010000000000000001.zst"),
        "backup.json".to_owned(),
    ] {
        past.put_key(&name.parse().unwrap(), b"mine", 0).await;
        foreign.insert(name);
    }
    let pruned = past.prune("12d").await.unwrap();
    assert_eq!((pruned.removed.wal_files, pruned.removed.backups.len(), pruned.foreign_objects), (20, 2, 4));
    assert!(past.keys().await.is_superset(&foreign), "{:?}", foreign.difference(&past.keys().await));
}

#[tokio::test]
async fn nothing_goes_when_the_newest_backup_is_damaged_or_a_record_can_not_be_read() {
    let newest = |past: &Past| past.id(21);
    let refused = async |past: &Past| {
        let before = past.keys().await;
        let failure = past.prune("12d").await.unwrap_err();
        assert_eq!((failure.code, past.keys().await), (Code::Damaged, before), "{failure}");
        failure.message
    };
    let past = Past::new(1).await;
    std::fs::remove_file(past.path(&past.repository.layout().backup(newest(&past), BackupObject::Part(1)))).unwrap();
    assert!(refused(&past).await.contains("not all of backup"));

    let past = Past::new(1).await;
    let part = past.path(&past.repository.layout().backup(past.id(20), BackupObject::Part(1)));
    std::fs::write(part, "cut").unwrap();
    assert!(refused(&past).await.contains("not all of backup"), "it builds on this one");

    let past = Past::new(1).await;
    let needed = SegmentName::from_number(TimelineId::FIRST, past.segment_of(21), size());
    std::fs::remove_file(past.path(&past.repository.layout().wal(&ArchiveFileName::Segment(needed)))).unwrap();
    assert!(refused(&past).await.contains("WAL is missing"));

    // Any record: what an older one says may be needed as well.
    for change in ["{", r#"{"format": 99}"#] {
        let past = Past::new(1).await;
        let record = past.repository.layout().backup(past.id(10), BackupObject::Record);
        std::fs::write(past.path(&record), change).unwrap();
        assert!(refused(&past).await.contains("can't be read"));
    }

    let past = Past::new(1).await;
    let mut record = past.repository.backup(newest(&past)).await.unwrap().unwrap();
    record.damaged.push(DamagedFile { path: "base/5/1".into(), relation: None, blocks: vec![1], count: 1 });
    std::fs::remove_file(past.path(&past.repository.layout().backup(record.id, BackupObject::Record))).unwrap();
    past.store_record(&record, 21).await;
    assert!(refused(&past).await.contains("damaged pages"));
}

#[tokio::test]
async fn more_than_a_page_of_wal_goes_in_one_run_and_its_remains_go_too() {
    let past = Past::new(120).await;
    let old = past.id(2);
    let unfinished = RepositoryObject::Backup(old, BackupObject::Part(1));
    past.put(&unfinished, 2).await;
    let young = RepositoryObject::Backup(past.id(29), BackupObject::Part(1));
    past.put(&young, 29).await;
    let segment = SegmentName::from_number(TimelineId::FIRST, 5, size());
    let partial = RepositoryObject::PartialWal(segment, "0123456789abcdef".into());
    let tail = RepositoryObject::Tail(segment, "0123456789abcdef".into());
    past.put(&partial, 0).await;
    past.put(&tail, 0).await;
    let pruned = past.prune("12d").await.unwrap();
    assert_eq!((pruned.removed.wal_files, pruned.removed.remains), (1200 + 2, vec![old]));
    let keys = past.keys().await;
    let there = |object: &RepositoryObject| keys.contains(past.repository.layout().key(object).as_str());
    assert_eq!([&unfinished, &young, &partial, &tail].map(there), [false, true, false, false]);
}

#[tokio::test]
async fn pins_keep_and_deleting_by_name_refuses_what_is_needed() {
    let past = Past::new(2).await;
    pins::pin(&past.repository, past.id(1), "before the upgrade").await.unwrap();
    let again = pins::pin(&past.repository, past.id(1), "for fun").await.unwrap();
    assert_eq!(again.reason, "before the upgrade");
    let failure = pins::pin(&past.repository, past.id(3), "").await.unwrap_err();
    assert_eq!(failure.code, Code::NotFound);
    let pruned = past.prune("12d").await.unwrap();
    assert_eq!((pruned.removed.backups, pruned.removed.wal_files), (vec![], 20 - 2));
    past.check_all_listed().await;

    let refused = async |id, cascade| delete_backup(&past.repository, id, cascade, false).await.unwrap_err().code;
    assert_eq!(refused(past.id(0), true).await, Code::Conflict);
    assert_eq!(refused(past.id(10), false).await, Code::Conflict);
    pins::unpin(&past.repository, past.id(1)).await.unwrap();
    assert_eq!(pins::unpin(&past.repository, past.id(1)).await.unwrap_err().code, Code::NotFound);
    let removed = delete_backup(&past.repository, past.id(10), true, false).await.unwrap();
    assert_eq!(removed.backups, [past.id(10), past.id(11)]);
    past.check_all_listed().await;
    // Now the first chain is what leads to the window.
    assert_eq!(past.prune("12d").await.unwrap().removed.backups, []);
    assert_eq!(past.ids().await, [0, 1, 20, 21].map(|day| past.id(day)));
}

#[tokio::test]
async fn without_a_policy_nothing_is_removed() {
    let past = Past::new(1).await;
    let failure = prune(&past.repository, &Policy::default(), Timestamp::now(), false).await.unwrap_err();
    assert_eq!(failure.code, Code::Misconfigured);
    let dumps_only = Policy { window: None, ..policy("1d") };
    let pruned = prune(&past.repository, &dumps_only, Timestamp::now(), false).await.unwrap();
    assert_eq!((pruned.removed.dumps.len(), pruned.removed.backups.len(), pruned.removed.wal_files), (4, 0, 0));
}
