//! A repository of one database in which things have happened for a month.

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
    failure::Failure,
    repository::{BackupClaim, Repository},
    retention::{Pruned, prune},
    store::{
        ListRequest, LocalStore, Pages,
        fault::{FaultPlan, FaultStore},
    },
};
use pgsidecar_core::{
    ArchiveFileName, BackupId, BackupKind, BackupRecord, DumpId, Layout, Lsn, ObjectKey, SegmentName, Sha256Digest,
    SystemIdentifier, TimelineId, WalSegmentSize,
    backup::{BACKUP_FORMAT, PartRecord, StoredObject},
    chain::chain,
    dump::{DUMP_FORMAT, DatabaseProperties, DumpFormat, DumpRecord, DumpedDatabase, DumpedGlobals},
    layout::{BackupObject, DumpObject, RepositoryObject},
    retention::Policy,
};

pub const SYSTEM: SystemIdentifier = SystemIdentifier::new(7_710_543_486_334_591_142);
pub const DAYS: i64 = 30;

/// A repository in which things have happened on the last thirty days.
pub struct Past {
    pub plan: FaultPlan,
    pub repository: Repository,
    pub now: Timestamp,
    pub segments_a_day: u64,
    directory: tempfile::TempDir,
}

pub fn size() -> WalSegmentSize {
    WalSegmentSize::new(1 << 20).unwrap()
}

pub fn policy(window: &str) -> Policy {
    let dumps = Some("daily=2".parse().unwrap());
    Policy { window: Some(window.parse().unwrap()), dumps, ..Policy::default() }
}

impl Past {
    pub fn empty(segments_a_day: u64) -> Past {
        let directory = tempfile::tempdir().unwrap();
        let plan = FaultPlan::none();
        let beneath = LocalStore::new(directory.path());
        let store = Arc::new(FaultStore::new(beneath, plan.clone()));
        let repository = Repository::new(store, Layout::new("main".parse().unwrap(), SYSTEM), 1);
        Past { plan, repository, now: Timestamp::now(), segments_a_day, directory }
    }

    /// Full backups on days 0, 10 and 20, an incremental one on each day after these; a dump every fifth day.
    pub async fn new(segments_a_day: u64) -> Past {
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
                past.put(
                    &RepositoryObject::Dump(id, DumpObject::Database("shop".parse().unwrap(), DumpFormat::Custom)),
                    day,
                )
                .await;
                past.record_dump(day, &["shop"], 0).await;
            }
        }
        past
    }

    /// Stores the record of a dump of these databases; its format is `newer` than ours by this.
    pub async fn record_dump(&self, day: i64, databases: &[&str], newer: u32) {
        let id = self.dump(day);
        let stored = StoredObject { size: 7, sha256: Sha256Digest::of(b"content") };
        let database = |name: &&str| DumpedDatabase {
            name: name.parse().unwrap(),
            oid: 16_384,
            stored,
            plain_bytes: None,
            toc_entries: None,
            properties: DatabaseProperties {
                owner: "postgres".to_owned(),
                encoding: "UTF8".to_owned(),
                collate: "C".to_owned(),
                ctype: "C".to_owned(),
                locale_provider: "libc".to_owned(),
                locale: None,
                settings: Vec::new(),
            },
        };
        let record = DumpRecord {
            format: DUMP_FORMAT + newer,
            id,
            system_identifier: SYSTEM,
            server_version: 170_000,
            tools_major: 17,
            tools_version: "17.5".to_owned(),
            started_at: id.began(),
            finished_at: id.began(),
            archives: DumpFormat::Custom,
            databases: databases.iter().map(database).collect(),
            globals: DumpedGlobals { stored, role_passwords: false },
            server: "localhost".to_owned(),
            warnings: Vec::new(),
            writer: "a test".to_owned(),
        };
        let object = RepositoryObject::Dump(id, DumpObject::Record);
        self.repository.store_json(&object, &record).await.unwrap();
        self.stored_on(&self.repository.layout().key(&object), day);
    }

    /// The store without its faults.
    pub fn beneath(&self) -> LocalStore {
        LocalStore::new(self.directory.path())
    }

    pub fn at(&self, day: i64) -> Timestamp {
        self.now - SignedDuration::from_hours(24 * (DAYS - day))
    }

    pub fn id(&self, day: i64) -> BackupId {
        BackupId::new(self.at(day), if day % 10 == 0 { BackupKind::Full } else { BackupKind::Incremental })
    }

    pub fn dump(&self, day: i64) -> DumpId {
        DumpId::new(self.at(day))
    }

    pub fn segment_of(&self, day: i64) -> u64 {
        1 + u64::try_from(day).unwrap() * self.segments_a_day
    }

    /// Puts an object there as if it had been stored on that day.
    pub async fn put_key(&self, key: &ObjectKey, content: &[u8], day: i64) -> StoredObject {
        self.repository.store().create(key, content.to_vec().into(), None).await.unwrap();
        self.stored_on(key, day);
        StoredObject { size: content.len() as u64, sha256: Sha256Digest::of(content) }
    }

    pub async fn put(&self, object: &RepositoryObject, day: i64) -> StoredObject {
        self.put_key(&self.repository.layout().key(object), b"content", day).await
    }

    pub fn path(&self, key: &ObjectKey) -> PathBuf {
        self.directory.path().join(key.as_str())
    }

    pub fn stored_on(&self, key: &ObjectKey, day: i64) {
        let ago = Duration::from_secs(86_400 * u64::try_from(DAYS - day).unwrap());
        File::options().write(true).open(self.path(key)).unwrap().set_modified(SystemTime::now() - ago).unwrap();
    }

    pub async fn back_up(&self, day: i64, parent: Option<BackupId>) {
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

    pub async fn store_record(&self, record: &BackupRecord, day: i64) {
        let object = RepositoryObject::Backup(record.id, BackupObject::Record);
        self.repository.store_json(&object, record).await.unwrap();
        self.stored_on(&self.repository.layout().key(&object), day);
    }

    pub async fn prune(&self, window: &str) -> Result<Pruned, Failure> {
        prune(&self.repository, &policy(window), Timestamp::now(), false).await
    }

    /// All keys, foreign ones too.
    pub async fn keys(&self) -> BTreeSet<String> {
        let beneath = LocalStore::new(self.directory.path());
        let mut keys = BTreeSet::new();
        let mut pages = Pages::new(&beneath, ListRequest::under(""));
        while let Some(page) = pages.next().await.unwrap() {
            keys.extend(page.objects.into_iter().map(|object| object.key.as_str().to_owned()));
        }
        keys
    }

    pub async fn ids(&self) -> Vec<BackupId> {
        self.repository.backups().await.unwrap().into_iter().map(|record| record.id).collect()
    }

    /// Everything that is listed can be restored to its own end.
    pub async fn check_all_listed(&self) {
        let records = self.repository.backups().await.unwrap();
        for record in &records {
            chain(record, &records).unwrap();
            assert_eq!(missing_objects(&self.repository, record).await.unwrap(), []);
            assert_eq!(missing_wal(&self.repository, record).await.unwrap(), None, "{}", record.id);
        }
    }

    pub fn paths_of(&self, backup: BackupId) -> String {
        self.repository.layout().backup_prefix(backup)
    }
}
