//! Where things lie in the repository: the one place that turns names into keys and keys into names.
//!
//! ```text
//! <cluster>/requests/<id>.json          a restore that was asked for once, begun; <id>.served.json: done
//! <cluster>/<system-identifier>/
//!   cluster.json                        what the segments are like; written before the first WAL
//!   wal/<timeline>/owner.json           which workload archives this timeline ; see the owner's record
//!   wal/<timeline>/<timeline><log>/<segment>.zst
//!   wal/<timeline>/<timeline><log>/<segment>.<offset>.backup.zst
//!   wal/<timeline>/<timeline><log>/<segment>.partial.<hash>.zst
//!   wal/<timeline>/<timeline>.history.zst
//!   tail/<timeline>/<segment>.<hash>.zst what a server that was stopped had of its last segment
//!   backups/<id>/started.json           the claim of the id, written first
//!   backups/<id>/part-00001.tar.zst
//!   backups/<id>/index.jsonl.zst, backup_manifest.zst
//!   backups/<id>/backup.json            the commit marker, written last
//!   snapshots/<id>/snapshot.json        what makes a database of a storage snapshot; its commit marker
//!   dumps/<id>/started.json             the claim of the id, written first
//!   dumps/<id>/<database>.dump          a database in pg_dump's custom format, or <database>.plain.sql.zst
//!   dumps/<id>/globals.sql.zst
//!   dumps/<id>/dump.json                the commit marker, written last
//!   drills/<id>.json                    how a restore went that was tried out
//!   runs/<task>/<time>.json             that a scheduled run was done; when its schedule began
//!   restore-points/<timeline>-<lsn>.json where a named restore point ends, 16 digits; the name is in the record
//!   pins/<backup id>.json               somebody wants to keep the backup
//! ```

use crate::{
    ArchiveFileName, BackupId, ClusterName, DrillId, DumpId, Lsn, ObjectKey, SegmentName, Sha256Digest, SnapshotId,
    SystemIdentifier, TimelineId,
    dump::{DatabaseName, DumpFormat},
    prepare::RequestId,
    schedule::{RunId, Task},
};

/// How many hexadecimal digits of the content's hash the keys of a `.partial` and of a tail carry.
const HASH_DIGITS: usize = 16;

/// The keys of one database system under one cluster name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Layout {
    cluster: ClusterName,
    system: SystemIdentifier,
}

/// What an object is, by its key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RepositoryObject {
    /// `cluster.json`.
    Cluster,
    /// `owner.json` of a timeline.
    TimelineOwner(TimelineId),
    /// A WAL segment, timeline history or backup history file.
    Wal(ArchiveFileName),
    /// A `.partial` segment with the first digits of its content's hash.
    PartialWal(SegmentName, String),
    /// What a stopped server had of its last segment, with the first digits of the content's hash.
    Tail(SegmentName, String),
    /// An object of a base backup.
    Backup(BackupId, BackupObject),
    /// `snapshot.json` of a snapshot.
    Snapshot(SnapshotId),
    /// The record of a drill.
    Drill(DrillId),
    /// `runs/<task>/<time>.json`: that a scheduled run was done.
    Run(Task, RunId),
    /// The record of the restore point that ends here. A name can be used again: it is no key.
    RestorePoint(TimelineId, Lsn),
    /// An object of a dump.
    Dump(DumpId, DumpObject),
    /// The wish to keep a backup.
    Pin(BackupId),
}

/// The objects of a base backup.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BackupObject {
    /// `started.json`: the claim of the backup's id.
    Started,
    /// `backup.json`: the commit marker.
    Record,
    /// PostgreSQL's manifest.
    Manifest,
    /// Where each file lies.
    Index,
    /// A tar archive, by its number from 1 on.
    Part(u32),
}

/// The objects of a dump.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DumpObject {
    /// `started.json`: the claim of the dump's id.
    Started,
    /// `dump.json`: the commit marker.
    Record,
    /// Roles and tablespaces.
    Globals,
    /// A database.
    Database(DatabaseName, DumpFormat),
}

/// Keys are made of parts that are valid in keys: names in hexadecimal, ids, fixed words.
fn key(text: String) -> ObjectKey {
    match text.parse() {
        Ok(key) => key,
        Err(error) => unreachable!("every component is valid by its type: {error}"),
    }
}

impl Layout {
    /// The layout of this database system under this cluster name.
    pub fn new(cluster: ClusterName, system: SystemIdentifier) -> Layout {
        Layout { cluster, system }
    }

    /// The cluster name.
    pub fn cluster(&self) -> &ClusterName {
        &self.cluster
    }

    /// The database system.
    pub fn system(&self) -> SystemIdentifier {
        self.system
    }

    /// What the keys of every database system of this cluster begin with.
    pub fn cluster_prefix(cluster: &ClusterName) -> String {
        format!("{cluster}/")
    }

    /// The database system whose keys begin with this prefix of a shallow listing of
    /// [`Layout::cluster_prefix`].
    pub fn system_of_prefix(cluster: &ClusterName, prefix: &str) -> Option<SystemIdentifier> {
        prefix.strip_prefix(&Layout::cluster_prefix(cluster))?.strip_suffix('/')?.parse().ok()
    }

    /// The key of the claim of a request. It's the cluster's: where the data are lost, no database system is known yet.
    pub fn request(cluster: &ClusterName, id: &RequestId) -> ObjectKey {
        key(format!("{cluster}/requests/{id}.json"))
    }

    /// The key of what says that a request was served. Ids have no dots, so that it's no other request's claim.
    pub fn served_request(cluster: &ClusterName, id: &RequestId) -> ObjectKey {
        key(format!("{cluster}/requests/{id}.served.json"))
    }

    /// What every key of this database system begins with.
    pub fn prefix(&self) -> String {
        format!("{}/{}/", self.cluster, self.system)
    }

    /// The key of an object.
    pub fn key(&self, object: &RepositoryObject) -> ObjectKey {
        let path = match object {
            RepositoryObject::Cluster => "cluster.json".to_owned(),
            RepositoryObject::TimelineOwner(timeline) => format!("wal/{}/owner.json", timeline.to_hex()),
            RepositoryObject::Wal(name @ ArchiveFileName::History(timeline)) => {
                format!("wal/{}/{name}.zst", timeline.to_hex())
            }
            RepositoryObject::Wal(name) => format!("{}{name}.zst", wal_directory(name)),
            RepositoryObject::PartialWal(segment, hash) => {
                let name = ArchiveFileName::Partial(*segment);
                format!("{}{name}.{hash}.zst", wal_directory(&name))
            }
            RepositoryObject::Tail(segment, hash) => {
                format!("tail/{}/{segment}.{hash}.zst", segment.timeline().to_hex())
            }
            RepositoryObject::Backup(id, object) => format!("backups/{id}/{}", object.file_name()),
            RepositoryObject::Snapshot(id) => format!("snapshots/{id}/snapshot.json"),
            RepositoryObject::Dump(id, object) => format!("dumps/{id}/{}", object.file_name()),
            RepositoryObject::Drill(id) => format!("drills/{id}.json"),
            RepositoryObject::Run(task, id) => format!("runs/{task}/{id}.json"),
            RepositoryObject::RestorePoint(timeline, lsn) => {
                format!("restore-points/{}-{:016X}.json", timeline.to_hex(), lsn.bytes())
            }
            RepositoryObject::Pin(id) => format!("pins/{id}.json"),
        };
        key(self.prefix() + &path)
    }

    /// The key of a WAL file that isn't a `.partial`; [`Layout::partial`] is for those.
    pub fn wal(&self, name: &ArchiveFileName) -> ObjectKey {
        self.key(&RepositoryObject::Wal(*name))
    }

    /// The key of a `.partial` segment. Two standbys that are promoted may archive different ones under one
    /// name; both are kept.
    pub fn partial(&self, segment: SegmentName, content: &Sha256Digest) -> ObjectKey {
        self.key(&RepositoryObject::PartialWal(segment, short_hash(content)))
    }

    /// The key of what a stopped server had of its last segment. After a restart it writes other bytes there, so the
    /// same segment can have several of them.
    pub fn tail(&self, segment: SegmentName, content: &Sha256Digest) -> ObjectKey {
        self.key(&RepositoryObject::Tail(segment, short_hash(content)))
    }

    /// What the keys of all tails begin with.
    pub fn all_tails_prefix(&self) -> String {
        format!("{}tail/", self.prefix())
    }

    /// What the keys of a timeline's tails begin with.
    pub fn tails_prefix(&self, timeline: TimelineId) -> String {
        format!("{}{}/", self.all_tails_prefix(), timeline.to_hex())
    }

    /// What the keys of a segment's tails begin with.
    pub fn tail_prefix(&self, segment: SegmentName) -> String {
        format!("{}{segment}.", self.tails_prefix(segment.timeline()))
    }

    /// What the keys of all `.partial` files of this segment begin with.
    pub fn partial_prefix(&self, segment: SegmentName) -> String {
        let name = ArchiveFileName::Partial(segment);
        format!("{}{}{name}.", self.prefix(), wal_directory(&name))
    }

    /// The key of an object of a base backup.
    pub fn backup(&self, id: BackupId, object: BackupObject) -> ObjectKey {
        self.key(&RepositoryObject::Backup(id, object))
    }

    /// What the keys of all WAL begin with.
    pub fn wal_prefix(&self) -> String {
        format!("{}wal/", self.prefix())
    }

    /// What the keys of a timeline's WAL begin with.
    pub fn timeline_prefix(&self, timeline: TimelineId) -> String {
        format!("{}{}/", self.wal_prefix(), timeline.to_hex())
    }

    /// The timeline whose keys begin with this prefix of a shallow listing of [`Layout::wal_prefix`].
    pub fn timeline_of_prefix(&self, prefix: &str) -> Option<TimelineId> {
        TimelineId::from_hex(prefix.strip_prefix(&self.wal_prefix())?.strip_suffix('/')?)
    }

    /// What the keys of all base backups begin with.
    pub fn backups_prefix(&self) -> String {
        format!("{}backups/", self.prefix())
    }

    /// What the keys of one base backup begin with.
    pub fn backup_prefix(&self, id: BackupId) -> String {
        format!("{}{id}/", self.backups_prefix())
    }

    /// The backup whose keys begin with this prefix of a shallow listing of [`Layout::backups_prefix`].
    pub fn backup_of_prefix(&self, prefix: &str) -> Option<BackupId> {
        prefix.strip_prefix(&self.backups_prefix())?.strip_suffix('/')?.parse().ok()
    }

    /// What the keys of all snapshots begin with.
    pub fn snapshots_prefix(&self) -> String {
        format!("{}snapshots/", self.prefix())
    }

    /// The snapshot whose keys begin with this prefix of a shallow listing of [`Layout::snapshots_prefix`].
    pub fn snapshot_of_prefix(&self, prefix: &str) -> Option<SnapshotId> {
        prefix.strip_prefix(&self.snapshots_prefix())?.strip_suffix('/')?.parse().ok()
    }

    /// The key of an object of a dump.
    pub fn dump(&self, id: DumpId, object: DumpObject) -> ObjectKey {
        self.key(&RepositoryObject::Dump(id, object))
    }

    /// What the keys of all dumps begin with.
    pub fn dumps_prefix(&self) -> String {
        format!("{}dumps/", self.prefix())
    }

    /// What the keys of one dump begin with.
    pub fn dump_prefix(&self, id: DumpId) -> String {
        format!("{}{id}/", self.dumps_prefix())
    }

    /// The dump whose keys begin with this prefix of a shallow listing of [`Layout::dumps_prefix`].
    pub fn dump_of_prefix(&self, prefix: &str) -> Option<DumpId> {
        prefix.strip_prefix(&self.dumps_prefix())?.strip_suffix('/')?.parse().ok()
    }

    /// What the keys of all drills' records begin with.
    pub fn drills_prefix(&self) -> String {
        format!("{}drills/", self.prefix())
    }

    /// What the keys of all run records of a task begin with.
    pub fn runs_prefix(&self, task: Task) -> String {
        format!("{}runs/{task}/", self.prefix())
    }

    /// What the keys of all restore points begin with.
    pub fn restore_points_prefix(&self) -> String {
        format!("{}restore-points/", self.prefix())
    }

    /// What the keys of all pins begin with.
    pub fn pins_prefix(&self) -> String {
        format!("{}pins/", self.prefix())
    }

    /// What this key names; `None` for whatever isn't ours.
    pub fn parse(&self, key: &ObjectKey) -> Option<RepositoryObject> {
        let path = key.as_str().strip_prefix(&self.prefix())?;
        let object = parse_path(path)?;
        // One key for one object: a segment in another timeline's directory isn't what it seems.
        (self.key(&object) == *key).then_some(object)
    }
}

fn short_hash(content: &Sha256Digest) -> String {
    content.to_string().chars().take(HASH_DIGITS).collect()
}

fn is_short_hash(text: &str) -> bool {
    text.len() == HASH_DIGITS && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// `wal/<timeline>/<timeline><log>/`, with the slash.
fn wal_directory(name: &ArchiveFileName) -> String {
    let timeline = name.timeline().to_hex();
    match name {
        ArchiveFileName::Segment(segment)
        | ArchiveFileName::Partial(segment)
        | ArchiveFileName::BackupHistory { segment, .. } => format!("wal/{timeline}/{}/", segment.log_hex()),
        ArchiveFileName::History(_) => format!("wal/{timeline}/"),
    }
}

fn parse_path(path: &str) -> Option<RepositoryObject> {
    let components: Vec<&str> = path.split('/').collect();
    match components.as_slice() {
        ["cluster.json"] => Some(RepositoryObject::Cluster),
        ["wal", timeline, "owner.json"] => TimelineId::from_hex(timeline).map(RepositoryObject::TimelineOwner),
        ["wal", _, file] | ["wal", _, _, file] => parse_wal(file.strip_suffix(".zst")?),
        ["tail", _, file] => {
            let (segment, hash) = file.strip_suffix(".zst")?.split_once('.')?;
            is_short_hash(hash).then(|| Some(RepositoryObject::Tail(segment.parse().ok()?, hash.to_owned()))).flatten()
        }
        ["backups", id, file] => Some(RepositoryObject::Backup(id.parse().ok()?, BackupObject::parse(file)?)),
        ["snapshots", id, "snapshot.json"] => Some(RepositoryObject::Snapshot(id.parse().ok()?)),
        ["dumps", id, file] => Some(RepositoryObject::Dump(id.parse().ok()?, DumpObject::parse(file)?)),
        ["drills", file] => Some(RepositoryObject::Drill(file.strip_suffix(".json")?.parse().ok()?)),
        ["runs", task, file] => {
            Some(RepositoryObject::Run(task.parse().ok()?, file.strip_suffix(".json")?.parse().ok()?))
        }
        ["restore-points", file] => {
            let (timeline, lsn) = file.strip_suffix(".json")?.split_once('-')?;
            let lsn = u64::from_str_radix(lsn, 16).ok()?;
            Some(RepositoryObject::RestorePoint(TimelineId::from_hex(timeline)?, Lsn::new(lsn)))
        }
        ["pins", file] => Some(RepositoryObject::Pin(file.strip_suffix(".json")?.parse().ok()?)),
        _ => None,
    }
}

fn parse_wal(name: &str) -> Option<RepositoryObject> {
    if let Some((segment, hash)) = name.split_once(".partial.") {
        let partial = || Some(RepositoryObject::PartialWal(segment.parse().ok()?, hash.to_owned()));
        return is_short_hash(hash).then(partial).flatten();
    }
    match name.parse().ok()? {
        ArchiveFileName::Partial(_) => None,
        name => Some(RepositoryObject::Wal(name)),
    }
}

impl BackupObject {
    fn file_name(self) -> String {
        match self {
            BackupObject::Started => "started.json".to_owned(),
            BackupObject::Record => "backup.json".to_owned(),
            BackupObject::Manifest => "backup_manifest.zst".to_owned(),
            BackupObject::Index => "index.jsonl.zst".to_owned(),
            BackupObject::Part(number) => format!("part-{number:05}.tar.zst"),
        }
    }

    fn parse(file: &str) -> Option<BackupObject> {
        match file {
            "started.json" => Some(BackupObject::Started),
            "backup.json" => Some(BackupObject::Record),
            "backup_manifest.zst" => Some(BackupObject::Manifest),
            "index.jsonl.zst" => Some(BackupObject::Index),
            _ => {
                let digits = file.strip_prefix("part-")?.strip_suffix(".tar.zst")?;
                let number = digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok()).flatten()?;
                (number > 0).then_some(BackupObject::Part(number))
            }
        }
    }
}

/// What follows a database's name in the keys of a plain dump. Names have no dots there: no database is taken for the globals.
const PLAIN_SUFFIX: &str = ".plain.sql.zst";

impl DumpObject {
    fn file_name(&self) -> String {
        match self {
            DumpObject::Started => "started.json".to_owned(),
            DumpObject::Record => "dump.json".to_owned(),
            DumpObject::Globals => "globals.sql.zst".to_owned(),
            DumpObject::Database(name, DumpFormat::Custom) => format!("{}.dump", name.to_key()),
            DumpObject::Database(name, DumpFormat::Plain) => format!("{}{PLAIN_SUFFIX}", name.to_key()),
        }
    }

    fn parse(file: &str) -> Option<DumpObject> {
        let database = |key: &str, format| Some(DumpObject::Database(DatabaseName::from_key(key)?, format));
        match file {
            "started.json" => Some(DumpObject::Started),
            "dump.json" => Some(DumpObject::Record),
            "globals.sql.zst" => Some(DumpObject::Globals),
            _ => match file.strip_suffix(PLAIN_SUFFIX) {
                Some(key) => database(key, DumpFormat::Plain),
                None => database(file.strip_suffix(".dump")?, DumpFormat::Custom),
            },
        }
    }
}

impl RepositoryObject {
    /// The WAL segment that this object is, if it is one (a whole one, not a `.partial`).
    pub fn segment(&self) -> Option<SegmentName> {
        match self {
            RepositoryObject::Wal(ArchiveFileName::Segment(segment)) => Some(*segment),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn layout() -> Layout {
        Layout::new("shop/orders".parse().unwrap(), SystemIdentifier::new(7575002186531184001))
    }

    fn parse(path: &str) -> Option<RepositoryObject> {
        layout().parse(&format!("shop/orders/7575002186531184001/{path}").parse().unwrap())
    }

    #[test]
    fn every_object_has_one_key_and_every_key_one_object() {
        let segment: SegmentName = "0000000A0000000300000042".parse().unwrap();
        let id: BackupId = "20261121T061500Z-full".parse().unwrap();
        let snapshot: SnapshotId = "20261121T061500Z-snapshot".parse().unwrap();
        let dump = DumpId::new(id.began());
        let objects = [
            (RepositoryObject::Cluster, "cluster.json"),
            (RepositoryObject::TimelineOwner(segment.timeline()), "wal/0000000A/owner.json"),
            (
                RepositoryObject::Wal(ArchiveFileName::Segment(segment)),
                "wal/0000000A/0000000A00000003/0000000A0000000300000042.zst",
            ),
            (
                RepositoryObject::Wal(ArchiveFileName::BackupHistory { segment, offset: 0x28 }),
                "wal/0000000A/0000000A00000003/0000000A0000000300000042.00000028.backup.zst",
            ),
            (
                RepositoryObject::PartialWal(segment, "0123456789abcdef".into()),
                "wal/0000000A/0000000A00000003/0000000A0000000300000042.partial.0123456789abcdef.zst",
            ),
            (RepositoryObject::Wal(ArchiveFileName::History(segment.timeline())), "wal/0000000A/0000000A.history.zst"),
            (
                RepositoryObject::Tail(segment, "0123456789abcdef".into()),
                "tail/0000000A/0000000A0000000300000042.0123456789abcdef.zst",
            ),
            (RepositoryObject::Backup(id, BackupObject::Started), "backups/20261121T061500Z-full/started.json"),
            (RepositoryObject::Backup(id, BackupObject::Record), "backups/20261121T061500Z-full/backup.json"),
            (RepositoryObject::Backup(id, BackupObject::Manifest), "backups/20261121T061500Z-full/backup_manifest.zst"),
            (RepositoryObject::Backup(id, BackupObject::Index), "backups/20261121T061500Z-full/index.jsonl.zst"),
            (RepositoryObject::Backup(id, BackupObject::Part(7)), "backups/20261121T061500Z-full/part-00007.tar.zst"),
            (RepositoryObject::Snapshot(snapshot), "snapshots/20261121T061500Z-snapshot/snapshot.json"),
            (RepositoryObject::Dump(dump, DumpObject::Started), "dumps/20261121T061500Z/started.json"),
            (RepositoryObject::Dump(dump, DumpObject::Record), "dumps/20261121T061500Z/dump.json"),
            (RepositoryObject::Dump(dump, DumpObject::Globals), "dumps/20261121T061500Z/globals.sql.zst"),
            (
                RepositoryObject::Dump(dump, DumpObject::Database("a/b".parse().unwrap(), DumpFormat::Custom)),
                "dumps/20261121T061500Z/a=2Fb.dump",
            ),
            (
                RepositoryObject::Dump(dump, DumpObject::Database("globals".parse().unwrap(), DumpFormat::Plain)),
                "dumps/20261121T061500Z/globals.plain.sql.zst",
            ),
            (RepositoryObject::Drill(DrillId::new(id.began())), "drills/20261121T061500Z.json"),
            (
                RepositoryObject::Run(Task::Incremental, RunId::new(id.began())),
                "runs/incremental/20261121T061500Z.json",
            ),
            (
                RepositoryObject::RestorePoint(segment.timeline(), "3/42000128".parse().unwrap()),
                "restore-points/0000000A-0000000342000128.json",
            ),
            (RepositoryObject::Pin(id), "pins/20261121T061500Z-full.json"),
        ];
        for (object, path) in objects {
            assert_eq!(layout().key(&object).as_str(), format!("shop/orders/7575002186531184001/{path}"));
            assert_eq!(parse(path), Some(object));
        }
    }

    #[test]
    fn requests_are_the_cluster_s_and_no_database_system_s() {
        let (layout, id) = (layout(), "2026-11-21-a".parse().unwrap());
        let keys = [Layout::request(layout.cluster(), &id), Layout::served_request(layout.cluster(), &id)];
        assert_eq!(keys[0].as_str(), "shop/orders/requests/2026-11-21-a.json");
        assert_eq!(keys[1].as_str(), "shop/orders/requests/2026-11-21-a.served.json");
        assert!(keys.iter().all(|key| layout.parse(key).is_none()));
        assert_eq!(Layout::system_of_prefix(layout.cluster(), "shop/orders/requests/"), None);
    }

    #[test]
    fn what_is_not_exactly_ours_is_nobody_s() {
        for path in [
            "notes.txt",
            "wal/00000001/0000000100000000/000000010000000000000001",
            "wal/00000001/000000010000000000000001.zst",
            "wal/00000002/0000000100000000/000000010000000000000001.zst",
            "wal/00000001/0000000100000001/000000010000000000000001.zst",
            "wal/00000001/0000000100000000/000000010000000000000001.partial.zst",
            "wal/00000001/0000000100000000/000000010000000000000001.partial.0123456789ABCDEF.zst",
            "backups/20261121T061500Z-full/part-0.tar.zst",
            "backups/20261121T061500Z-full/part-00000.tar.zst",
            "backups/20261121T061500Z-full/part-1.tar.zst",
            "backups/latest/backup.json",
            "backups/20261121T061500Z-snapshot/backup.json",
            "snapshots/20261121T061500Z-full/snapshot.json",
            "snapshots/20261121T061500Z-snapshot/backup.json",
            "dumps/20261121T061500Z-full/dump.json",
            "dumps/20261121T061500Z/a.b.dump",
            "dumps/20261121T061500Z/.dump",
            "dumps/20261121T061500Z/shop.sql.zst",
            "drills/20261121T061500Z-full.json",
            "drills/20261121T061500Z/drill.json",
            "runs/20261121T061500Z.json",
            "runs/auto/20261121T061500Z.json",
            "restore-points/0000000A-342000128.json",
            "restore-points/0000000A-+000000342000128.json",
            "restore-points/0000000A-0000000342000aaa.json",
            "restore-points/00000000-0000000342000128.json",
            "restore-points/before.json",
            "dumps/20261121T030000Z/.dump",
            "dumps/20261121T030000Z/notes.txt",
            "dumps/yesterday/dump.json",
            "pins/20261121T061500Z-full",
            "pins/latest.json",
        ] {
            assert_eq!(parse(path), None, "{path}");
        }
        assert_eq!(layout().parse(&"shop/orders/1/cluster.json".parse().unwrap()), None);
    }

    #[test]
    fn prefixes_of_shallow_listings_are_read_back() {
        let layout = layout();
        let timeline = TimelineId::new(16).unwrap();
        assert_eq!(layout.timeline_of_prefix(&layout.timeline_prefix(timeline)), Some(timeline));
        let id: BackupId = "20261121T061500Z-full".parse().unwrap();
        assert_eq!(layout.backup_of_prefix(&layout.backup_prefix(id)), Some(id));
        let snapshots = layout.snapshots_prefix();
        let snapshot: SnapshotId = "20261121T061500Z-snapshot".parse().unwrap();
        assert_eq!(layout.snapshot_of_prefix(&format!("{snapshots}{snapshot}/")), Some(snapshot));
        assert_eq!(Layout::system_of_prefix(layout.cluster(), &layout.prefix()), Some(layout.system()));
    }

    proptest! {
        #[test]
        fn segments_of_a_timeline_are_listed_in_the_order_of_their_lsn(
            timeline in 1..u32::MAX, a in 0..1u64 << 40, b in 0..1u64 << 40,
        ) {
            let timeline = TimelineId::new(timeline).unwrap();
            let key = |number| {
                let segment = SegmentName::from_number(timeline, number, crate::WalSegmentSize::DEFAULT);
                layout().wal(&ArchiveFileName::Segment(segment))
            };
            prop_assert_eq!(key(a).cmp(&key(b)), a.cmp(&b));
        }
    }
}
