//! A repository on a store that fails on purpose, and synthetic WAL.

use std::path::Path;

use bytes::Bytes;
use pgsidecar::{
    codec::ChannelReader,
    pgdata::DataDirectory,
    repository::Repository,
    store::{
        ByteRange, ListRequest, LocalStore, Pages, Store,
        fault::{FaultPlan, FaultStore},
    },
    wal::{Origin, fetch::FetchRequest},
};
use pgsidecar_core::{
    ArchiveFileName, ClusterState, ControlFile, Layout, Lsn, SegmentName, Sha256Digest, SystemIdentifier, TimelineId,
    WalSegmentSize,
};

const CONTROL: &[u8] = include_bytes!("../../crates/core/tests/fixtures/pg_control-15");
pub const SYSTEM: SystemIdentifier = system();

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
