//! A repository on a store that fails on purpose, and synthetic WAL.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use pgsidecar::{
    codec::ChannelReader,
    pgdata::DataDirectory,
    repository::Repository,
    store::{
        ByteRange, ListRequest, LocalStore, Pages, Store,
        fault::{FaultPlan, FaultStore},
    },
    wal::{Origin, archive::Archiver, fetch::FetchRequest},
};
use pgsidecar_core::{
    ArchiveFileName, BackupId, BackupKind, BackupRecord, ClusterState, ContentId, ControlFile, Layout, Lsn,
    SegmentName, Sha256Digest, SystemIdentifier, TimelineId, WalSegmentSize,
    backup::{BACKUP_FORMAT, PartRecord, StoredObject},
    incremental_file::{IncrementalHeader, path_of_incremental},
    layout::{BackupObject, RepositoryObject},
    page::PAGE_SIZE,
};

const CONTROL: &[u8] = include_bytes!("../../crates/core/tests/fixtures/pg_control-15");
pub const SYSTEM: SystemIdentifier = system();
/// Blocks in each file of a relation but its last.
pub const SEGMENT_BLOCKS: u32 = 131_072;

/// The system identifier of the fixture: its first eight bytes.
const fn system() -> SystemIdentifier {
    let mut bytes = [0; 8];
    let mut at = 0;
    while at < 8 {
        bytes[at] = CONTROL[at];
        at += 1;
    }
    SystemIdentifier::new(u64::from_le_bytes(bytes))
}

/// A file in a backup: its path, and what it has.
pub type PlainFile = (&'static str, Vec<u8>);

/// What was stored of a backup.
pub struct StoredBackup {
    pub parts: Vec<PartRecord>,
    pub manifest: StoredObject,
    pub index: StoredObject,
    pub files: u64,
    pub restored_bytes: u64,
}

/// A repository with its faults, a look past them, and a data directory.
pub struct World {
    pub plan: FaultPlan,
    pub repository: Repository,
    pub pgdata: DataDirectory,
    beneath: LocalStore,
    segment_size: WalSegmentSize,
    directory: tempfile::TempDir,
}

impl World {
    /// Nothing fails yet; segments have 1 MB.
    pub fn new() -> World {
        World::with(FaultPlan::none(), 1)
    }

    pub fn with_segment_size(megabytes: u64) -> World {
        World::with(FaultPlan::none(), megabytes)
    }

    pub fn random(seed: u64, before: f64, after: f64) -> World {
        World::with(FaultPlan::random(seed, before, after), 1)
    }

    /// Calls fail before and after they took effect, or never come back, with these probabilities.
    pub fn deadly(seed: u64, before: f64, after: f64, never: f64) -> World {
        World::with(FaultPlan::random(seed, before, after).and_never(never), 1)
    }

    fn with(plan: FaultPlan, megabytes: u64) -> World {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        std::fs::create_dir_all(data.join("global")).unwrap();
        std::fs::create_dir_all(data.join("pg_wal/archive_status")).unwrap();
        std::fs::write(data.join("global/pg_control"), CONTROL).unwrap();
        std::fs::write(data.join("PG_VERSION"), "15\n").unwrap();
        let beneath = LocalStore::new(directory.path().join("repository"));
        let store = std::sync::Arc::new(FaultStore::new(beneath.clone(), plan.clone()));
        let repository = Repository::new(store, Layout::new("main".parse().unwrap(), SYSTEM), 1);
        let segment_size = WalSegmentSize::new(megabytes << 20).unwrap();
        World { plan, repository, pgdata: DataDirectory::open(&data).unwrap(), beneath, segment_size, directory }
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The fixture's control file, with this world's segment size, of a primary.
    pub fn control(&self) -> ControlFile {
        ControlFile {
            wal_segment_size: self.segment_size,
            // What it archives is vouched for by it: these segments are noise.
            state: ClusterState::InProduction,
            timeline: TimelineId::FIRST,
            ..self.pgdata.control().unwrap()
        }
    }

    /// The server, which has marked this file.
    pub fn origin(&self, name: ArchiveFileName) -> Origin {
        self.mark(&name, "done");
        self.server()
    }

    /// The server.
    pub fn server(&self) -> Origin {
        let (repository, pgdata) = (self.repository.clone(), self.pgdata.clone());
        Origin { repository, pgdata, control: self.control(), claimant: None }
    }

    /// Marks a file as `ready` or `done`, as PostgreSQL does.
    pub fn mark(&self, name: &ArchiveFileName, state: &str) {
        let mark = |state: &str| self.pgdata.wal().join(format!("archive_status/{name}.{state}"));
        if state == "done" && mark("ready").exists() {
            std::fs::rename(mark("ready"), mark("done")).unwrap();
        } else {
            std::fs::write(mark(state), "").unwrap();
        }
    }

    /// A request of this server for a file.
    pub fn wanted(&self, name: ArchiveFileName) -> FetchRequest {
        FetchRequest { repository: self.repository.clone(), name, pgdata: Some(self.pgdata.clone()), tail: false }
    }

    /// Puts a file into pg_wal.
    pub fn put_wal(&self, name: &ArchiveFileName, bytes: &[u8]) {
        std::fs::write(self.pgdata.wal().join(name.to_string()), bytes).unwrap();
    }

    /// Where backups are restored to.
    pub fn restored(&self) -> PathBuf {
        self.directory().join("restored")
    }

    /// The same repository with other faults.
    pub fn failing(&self, plan: FaultPlan) -> Repository {
        let store = std::sync::Arc::new(FaultStore::new(self.beneath.clone(), plan));
        Repository::new(store, self.repository.layout().clone(), 1)
    }

    /// The segment that the backups here need.
    pub async fn store_wal(&self) {
        let (name, bytes) = segment(1, 7, 1);
        Archiver::default().archive_body(&self.origin(name), name, body(&bytes), None).await.unwrap();
    }

    /// The record of a backup of this server.
    pub fn record(&self, id: BackupId, parent: Option<BackupId>, stored: StoredBackup) -> BackupRecord {
        let control = self.control();
        let (start_lsn, stop_lsn) = positions(id);
        BackupRecord {
            format: BACKUP_FORMAT,
            id,
            parent,
            system_identifier: control.system_identifier,
            server_version: 150_000,
            timeline: TimelineId::FIRST,
            start_lsn,
            stop_lsn,
            started_at: id.began(),
            stopped_at: id.began(),
            next_xid_at_stop: 800,
            from_standby: false,
            wal_segment_size: control.wal_segment_size,
            block_size: control.block_size,
            data_checksums: false,
            tablespaces: Vec::new(),
            parts: stored.parts,
            manifest: stored.manifest,
            index: stored.index,
            files: stored.files,
            restored_bytes: stored.restored_bytes,
            damaged: Vec::new(),
            warnings: Vec::new(),
            writer: "a test".to_owned(),
        }
    }

    /// Stores a backup of these files by hand, a list of them for each part.
    pub async fn store_backup(&self, id: BackupId, parent: Option<BackupId>, contents: &[Vec<PlainFile>]) {
        let store = async |object: BackupObject, plain: &[u8]| {
            let stored = zstd::encode_all(plain, 1).unwrap();
            let content = ContentId::of(&stored);
            let key = self.repository.layout().backup(id, object);
            self.repository.store().create(&key, stored.into(), None).await.unwrap();
            StoredObject { size: content.size, sha256: content.sha256 }
        };
        let (mut parts, mut index, mut restored_bytes) = (Vec::new(), String::new(), 0);
        for (number, part) in (1..).zip(contents) {
            let stored = store(BackupObject::Part(number), &part_of(number, part)).await;
            for (path, content) in part {
                let restored = path_of_incremental(path).map(|_| restored_length(content));
                restored_bytes += restored.unwrap_or(content.len() as u64);
                let entry = serde_json::json!({
                    "path": path, "part": number, "frame": 0, "offset": 0, "size": content.len(),
                    "crc32c": crc32c::crc32c(content), "modified": id.began(), "restored": restored,
                });
                index += &format!("{entry}\n");
            }
            let file_bytes = part.iter().map(|(_, content)| content.len() as u64).sum();
            parts.push(PartRecord { number, stored, files: part.len() as u64, file_bytes });
        }
        let stored = StoredBackup {
            files: parts.iter().map(|part| part.files).sum(),
            parts,
            manifest: store(BackupObject::Manifest, b"{}").await,
            index: store(BackupObject::Index, index.as_bytes()).await,
            restored_bytes,
        };
        let record = self.record(id, parent, stored);
        self.repository.store_json(&RepositoryObject::Backup(id, BackupObject::Record), &record).await.unwrap();
    }

    /// The plain bytes of a WAL file as they really lie in the store; `None` if it isn't there.
    pub async fn wal(&self, name: &ArchiveFileName) -> Option<Bytes> {
        let layout = self.repository.layout();
        let key = match name {
            ArchiveFileName::Partial(segment) => {
                let request = ListRequest::under(layout.partial_prefix(*segment));
                let page = self.beneath.list(&request).await.unwrap();
                assert!(page.objects.len() <= 1);
                page.objects.into_iter().next()?.key
            }
            _ => layout.wal(name),
        };
        let download = self.beneath.get(&key, ByteRange::All).await.unwrap()?;
        let stored = download.bytes(u64::MAX).await.unwrap();
        Some(Bytes::from(zstd::decode_all(&stored[..]).unwrap()))
    }

    /// Everything that is listed decodes to what it says that it is.
    pub async fn check_all_whole(&self) {
        let mut pages = Pages::new(&self.beneath, ListRequest::under(""));
        while let Some(page) = pages.next().await.unwrap() {
            for object in page.objects {
                let download = self.beneath.get(&object.key, ByteRange::All).await.unwrap().unwrap();
                let sha256 = download.info.sha256;
                let stored = download.bytes(u64::MAX).await.unwrap();
                assert_eq!(stored.len() as u64, object.size, "{}", object.key);
                if object.key.as_str().ends_with(".zst") {
                    zstd::decode_all(&stored[..]).unwrap();
                }
                assert!(sha256.is_none_or(|sha256| sha256 == Sha256Digest::of(&stored)), "{}", object.key);
            }
        }
    }
}

const FIRST_BACKUP: &str = "2026-11-21T06:15:00Z";

/// The id of the backup with this number, each a second after the one before.
pub fn backup_id(number: i64, kind: BackupKind) -> BackupId {
    let first: jiff::Timestamp = FIRST_BACKUP.parse().unwrap();
    BackupId::new(jiff::Timestamp::from_second(first.as_second() + number).unwrap(), kind)
}

/// Where such a backup begins and ends in the WAL: in the seventh segment, each behind the one before.
pub fn positions(id: BackupId) -> (Lsn, Lsn) {
    let first: jiff::Timestamp = FIRST_BACKUP.parse().unwrap();
    let number = u64::try_from(id.began().as_second() - first.as_second()).unwrap();
    (Lsn::new(0x70_0028 + number * 0x1000), Lsn::new(0x70_0100 + number * 0x1000))
}

/// The files that make a directory startable.
pub fn last_part(world: &World) -> Vec<PlainFile> {
    let control = std::fs::read(world.pgdata.path().join("global/pg_control")).unwrap();
    vec![("backup_label", b"label".to_vec()), ("global/pg_control", control), ("PG_VERSION", b"15\n".to_vec())]
}

/// The plain bytes of a part. The first one has the directories as well.
fn part_of(number: u32, files: &[PlainFile]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    if number == 1 {
        for directory in ["base/", "base/1/", "global/", "pg_tblspc/"] {
            header.set_entry_type(tar::EntryType::Directory);
            header.set_mode(0o700);
            header.set_size(0);
            tar.append_data(&mut header, directory, std::io::empty()).unwrap();
        }
    }
    header.set_entry_type(tar::EntryType::Regular);
    header.set_mode(0o600);
    for (path, content) in files {
        header.set_size(content.len() as u64);
        tar.append_data(&mut header, path, content.as_slice()).unwrap();
    }
    tar.into_inner().unwrap()
}

/// The length of what is made of an incremental file.
fn restored_length(mut content: &[u8]) -> u64 {
    let header = IncrementalHeader::read(&mut content, SEGMENT_BLOCKS).unwrap();
    u64::from(header.output_blocks()) * PAGE_SIZE as u64
}

/// Segment `number` of this many megabytes of the fixture's system on timeline 1, with content by this seed.
pub fn segment(seed: u64, number: u64, megabytes: u64) -> (ArchiveFileName, Bytes) {
    let size = WalSegmentSize::new(megabytes << 20).unwrap();
    let name = SegmentName::from_number(TimelineId::FIRST, number, size);
    let mut bytes = noise(usize::try_from(size.bytes()).unwrap(), seed ^ (number << 8)).to_vec();
    let start: Lsn = name.start(size).unwrap();
    let header = [
        &0xd110_u16.to_le_bytes()[..],
        &2_u16.to_le_bytes(),
        &1_u32.to_le_bytes(),
        &start.bytes().to_le_bytes(),
        &[0; 8],
        &SYSTEM.get().to_le_bytes(),
        &u32::try_from(size.bytes()).unwrap().to_le_bytes(),
        &8192_u32.to_le_bytes(),
    ]
    .concat();
    bytes[..header.len()].copy_from_slice(&header);
    (ArchiveFileName::Segment(name), bytes.into())
}

/// Bytes that don't compress.
pub fn noise(length: usize, seed: u64) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes.into()
}

/// A request's body of these bytes.
pub fn body(bytes: &Bytes) -> ChannelReader {
    let (sender, reader) = ChannelReader::new();
    let mut left = bytes.clone();
    tokio::spawn(async move {
        while !left.is_empty() {
            let chunk = left.split_to(left.len().min(64 * 1024));
            if sender.send(Ok(chunk)).await.is_err() {
                return;
            }
        }
    });
    reader
}
