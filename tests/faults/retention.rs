//! A prune on a store that fails, hangs or refuses at each call: whatever is listed restores, and the next run ends where
//! one without a fault does.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use jiff::Timestamp;
use pgsidecar::{
    backup::complete::{missing_objects, missing_wal},
    failure::Code,
    repository::{Repository, pins},
    retention::{delete_backup, prune},
    store::{
        ByteRange, ConditionalCreation, Creation, Download, ListPage, ListRequest, LocalStore, ObjectInfo,
        PendingUpload, Store, StoreError, StoreErrorKind, Upload,
        fault::{Fault, Operation},
    },
};
use pgsidecar_core::{
    ArchiveFileName, BackupId, BackupKind, DrillId, DumpId, ObjectKey, SegmentName, Sha256Digest, TimelineId,
    backup::DamagedFile,
    dump::DumpFormat,
    layout::{BackupObject, DumpObject, RepositoryObject},
    plan::{RestoreRequest, select},
    recovery::RecoveryTarget,
    retention::Policy,
    schedule::{RunId, Task},
};

use super::{
    FAULTS,
    past::{Past, SYSTEM, policy, size},
};

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
async fn records_of_drills_and_runs_go_when_they_are_old_but_for_the_newest() {
    let past = Past::new(1).await;
    let ago = |days: i64| past.now - jiff::SignedDuration::from_hours(24 * days);
    let runs =
        |task, days: Vec<i64>| days.into_iter().map(move |day| RepositoryObject::Run(task, RunId::new(ago(day))));
    // Yearly drills and weekly full backups stay or go each for themselves; so does what was done once.
    let drills = (0..22).map(|n| RepositoryObject::Drill(DrillId::new(ago(410 + 365 * n))));
    let full = runs(Task::Full, (0..60).map(|n| 7 * n).collect());
    let once = runs(Task::Prune, vec![5_000]);
    for object in drills.chain(full).chain(once) {
        past.put(&object, 0).await;
    }
    let foreign: ObjectKey = format!("main/{SYSTEM}/drills/20190101T000000Z.txt").parse().unwrap();
    past.put_key(&foreign, b"a note", 0).await;
    let keys = |keys: &BTreeSet<String>| -> Vec<String> {
        let of_records = keys.iter().cloned();
        of_records.filter(|key| key.contains("/drills/") || key.contains("/runs/")).collect()
    };
    let before = keys(&past.keys().await);
    assert_eq!(before.len(), 22 + 60 + 1 + 1);
    let looked = prune(&past.repository, &policy("12d"), Timestamp::now(), true).await.unwrap();
    assert_eq!(keys(&past.keys().await), before, "a dry run");
    let pruned = past.prune("12d").await.unwrap();
    // Two drills, and the runs of 406 and 413 days ago.
    assert_eq!((pruned.removed.records, looked.removed.records), (4, 4));
    let left = past.keys().await;
    let gone: Vec<String> = before.into_iter().filter(|key| !keys(&left).contains(key)).collect();
    let gone_as_wanted = [
        RepositoryObject::Drill(DrillId::new(ago(410 + 365 * 21))),
        RepositoryObject::Drill(DrillId::new(ago(410 + 365 * 20))),
    ]
    .into_iter()
    .chain(runs(Task::Full, vec![413, 406]));
    assert_eq!(
        gone,
        gone_as_wanted.map(|object| past.repository.layout().key(&object).to_string()).collect::<Vec<_>>()
    );
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
            // The fault answers never: whoever has met it is killed a moment later.
            let met = async {
                while past.plan.injected() == 0 {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            };
            let ended = tokio::select! {
                ended = past.prune("12d") => Some(ended),
                () = met => None,
            };
            let injected = past.plan.injected() > 0;
            past.plan.heal();
            past.check_all_listed().await;
            past.prune("12d").await.unwrap();
            past.check_all_listed().await;
            assert_eq!(past.ids().await.len(), 4);
            if !injected {
                ended.unwrap().unwrap();
                assert!(nth > 10);
                break;
            }
            assert!(ended.is_none(), "{nth}");
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
        // It may build on the one that somebody names.
        let failure = delete_backup(&past.repository, past.id(0), true, true).await.unwrap_err();
        assert_eq!((failure.code, past.ids().await.len()), (Code::Damaged, 5), "{failure}");
    }

    // A pin says that there was one.
    let past = Past::new(1).await;
    past.put(&RepositoryObject::Pin(past.id(1)), 1).await;
    std::fs::remove_file(past.path(&past.repository.layout().backup(past.id(1), BackupObject::Record))).unwrap();
    assert!(refused(&past).await.contains("it's pinned"));

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

/// A store on which something happens at the first deletion of a key, or that lists one and then hasn't it.
#[derive(Debug)]
struct Meanwhile {
    beneath: LocalStore,
    at: ObjectKey,
    put: Mutex<Vec<(ObjectKey, Vec<u8>)>>,
    lost: Option<ObjectKey>,
}

#[async_trait::async_trait]
impl Store for Meanwhile {
    async fn delete(&self, keys: &[ObjectKey]) -> Result<Vec<(ObjectKey, StoreError)>, StoreError> {
        if keys.contains(&self.at) {
            let put = std::mem::take(&mut *self.put.lock().unwrap());
            for (key, content) in put {
                self.beneath.create(&key, content.into(), None).await?;
            }
        }
        self.beneath.delete(keys).await
    }

    fn description(&self) -> String {
        self.beneath.description()
    }

    async fn create(
        &self,
        key: &ObjectKey,
        bytes: Bytes,
        sha256: Option<Sha256Digest>,
    ) -> Result<Creation, StoreError> {
        self.beneath.create(key, bytes, sha256).await
    }

    async fn begin(&self, key: &ObjectKey) -> Result<Box<dyn Upload>, StoreError> {
        self.beneath.begin(key).await
    }

    async fn head(&self, key: &ObjectKey) -> Result<Option<ObjectInfo>, StoreError> {
        self.beneath.head(key).await
    }

    async fn get(&self, key: &ObjectKey, range: ByteRange) -> Result<Option<Download>, StoreError> {
        if self.lost.as_ref() == Some(key) { Ok(None) } else { self.beneath.get(key, range).await }
    }

    async fn list(&self, request: &ListRequest) -> Result<ListPage, StoreError> {
        self.beneath.list(request).await
    }

    async fn pending_uploads(&self, prefix: &str) -> Result<Vec<PendingUpload>, StoreError> {
        self.beneath.pending_uploads(prefix).await
    }

    async fn abort_pending(&self, upload: &PendingUpload) -> Result<(), StoreError> {
        self.beneath.abort_pending(upload).await
    }

    async fn conditional_creation(&self) -> Result<ConditionalCreation, StoreError> {
        self.beneath.conditional_creation().await
    }
}

#[tokio::test]
async fn what_is_pinned_or_built_on_while_it_is_removed_is_put_back() {
    for (with_child, readable) in [(false, true), (true, true), (true, false)] {
        let past = Past::new(2).await;
        let layout = past.repository.layout().clone();
        let marker = layout.backup(past.id(1), BackupObject::Record);
        let (key, content) = if with_child {
            let mut child = past.repository.backup(past.id(21)).await.unwrap().unwrap();
            child.id = BackupId::new(past.at(22), BackupKind::Incremental);
            child.parent = Some(past.id(1));
            child.format += u32::from(!readable);
            (layout.backup(child.id, BackupObject::Record), serde_json::to_vec(&child).unwrap())
        } else {
            (layout.key(&RepositoryObject::Pin(past.id(1))), b"{}".to_vec())
        };
        let store =
            Meanwhile { beneath: past.beneath(), at: marker, put: Mutex::new(vec![(key, content)]), lost: None };
        let repository = Repository::new(Arc::new(store), layout, 1);
        let pruned = prune(&repository, &policy("12d"), Timestamp::now(), false).await;
        match pruned {
            Ok(pruned) => assert_eq!((pruned.removed.backups, readable), (vec![], true), "{with_child}"),
            // It's planned anew, and what it needs can't be told any more.
            Err(failure) => assert_eq!((failure.code, readable), (Code::Damaged, false), "{failure}"),
        }
        for day in [0, 1] {
            let record = past.repository.backup(past.id(day)).await.unwrap().unwrap();
            assert_eq!(missing_objects(&past.repository, &record).await.unwrap(), []);
            assert_eq!(missing_wal(&past.repository, &record).await.unwrap(), None);
        }
    }
}

#[tokio::test]
async fn a_dump_that_was_not_completed_counts_for_nothing_and_old_ones_stay_instead() {
    let past = Past::new(1).await;
    let begun = DumpId::new(past.at(29));
    past.put(&RepositoryObject::Dump(begun, DumpObject::Database("shop".parse().unwrap(), DumpFormat::Custom)), 29)
        .await;
    let abandoned = DumpId::new(past.at(12));
    past.put(&RepositoryObject::Dump(abandoned, DumpObject::Database("shop".parse().unwrap(), DumpFormat::Custom)), 12)
        .await;
    let removed = past.prune("12d").await.unwrap().removed.dumps;
    assert_eq!(removed, [0, 5, 10, 15, 12].map(|day| past.dump(day)), "the last two complete ones stay");
    assert!(past.keys().await.iter().any(|key| key.contains(&begun.to_string())));
}

#[tokio::test]
async fn a_timeline_that_was_given_up_leaves_its_history_and_misleads_no_restore() {
    let past = Past::new(1).await;
    let timeline = TimelineId::new(2).unwrap();
    let switch = size().start_of(past.segment_of(12));
    let history = RepositoryObject::Wal(ArchiveFileName::History(timeline));
    let key = past.repository.layout().key(&history);
    let text = format!("1\t{switch}\tno recovery target specified\n");
    past.repository.store_bytes(&key, "the history", text.into()).await.unwrap();
    past.stored_on(&key, 12);
    past.put(&RepositoryObject::TimelineOwner(timeline), 12).await;
    let segment = SegmentName::from_number(timeline, past.segment_of(12), size());
    past.put(&RepositoryObject::Wal(ArchiveFileName::Segment(segment)), 12).await;
    let latest = async || {
        let catalog = past.repository.catalog().await.unwrap();
        let request = RestoreRequest { target: RecoveryTarget::Latest, timeline: None, backup: None, inclusive: true };
        let selection = select(&catalog, &request).unwrap();
        (selection.history.timeline(), selection.backup.id)
    };
    assert_eq!(latest().await, (timeline, past.id(11)));
    assert_eq!(past.prune("12d").await.unwrap().removed.wal_files, 10 + 1);
    let keys = past.keys().await;
    let there = |object: &RepositoryObject| keys.contains(past.repository.layout().key(object).as_str());
    let objects =
        [history, RepositoryObject::TimelineOwner(timeline), RepositoryObject::Wal(ArchiveFileName::Segment(segment))];
    assert_eq!(objects.each_ref().map(there), [true, true, false]);
    assert_eq!(latest().await, (TimelineId::FIRST, past.id(21)));
    // What a stopped server had is more than a history.
    past.put(&RepositoryObject::Tail(segment, "0123456789abcdef".into()), 29).await;
    assert_eq!(latest().await.0, timeline);
    assert_eq!(past.prune("12d").await.unwrap().removed.wal_files, 0);
}

#[tokio::test]
async fn nothing_goes_when_a_record_is_listed_and_then_is_not_there() {
    let past = Past::new(1).await;
    let before = past.keys().await;
    let layout = past.repository.layout().clone();
    let lost = layout.backup(past.id(10), BackupObject::Record);
    let at = lost.clone();
    let store = Meanwhile { beneath: past.beneath(), at, put: Mutex::default(), lost: Some(lost) };
    let repository = Repository::new(Arc::new(store), layout, 1);
    let failure = prune(&repository, &policy("12d"), Timestamp::now(), false).await.unwrap_err();
    assert_eq!((failure.code, past.keys().await), (Code::Damaged, before), "{failure}");
}

#[tokio::test]
async fn a_dump_that_can_not_be_read_keeps_all_and_one_of_fewer_databases_pushes_none_out() {
    let past = Past::new(1).await;
    // Newer ones, without the database that all others have.
    for day in [26, 27, 28] {
        past.record_dump(day, &["other"], 0).await;
    }
    let unreadable =
        past.path(&past.repository.layout().key(&RepositoryObject::Dump(past.dump(29), DumpObject::Record)));
    past.record_dump(29, &["other"], 1).await;
    let pruned = past.prune("12d").await.unwrap();
    assert_eq!((pruned.removed.dumps, pruned.removed.wal_files), (vec![], 10));
    assert!(pruned.plan.unreadable_dumps[0].why.contains("format"), "{:?}", pruned.plan.unreadable_dumps);
    std::fs::remove_file(unreadable).unwrap();
    let removed = past.prune("12d").await.unwrap().removed.dumps;
    assert_eq!(removed, [0, 5, 10, 15, 26].map(|day| past.dump(day)));
}
