//! An archive of a million segments: what looks through it asks for no more than it needs, and holds next to nothing.
//!
//! The only test of this program: it measures the memory of the whole process.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, reason = "a test fails by panicking")]

use std::{fs, sync::Arc, time::Instant};

use bytes::Bytes;
use pgsidecar::{
    repository::Repository,
    store::{MemoryStore, fault::Operation},
    wal::{
        survey::survey,
        verify::{VerifyOptions, VerifyProgress, verify},
    },
};
use pgsidecar_core::{
    ArchiveFileName, BackupId, BackupKind, BackupRecord, Layout, Lsn, SegmentName, Sha256Digest, SystemIdentifier,
    TimelineId, WalSegmentSize,
    backup::{BACKUP_FORMAT, StoredObject},
    layout::{BackupObject, RepositoryObject},
    plan::WalScan,
};

const SIZE: WalSegmentSize = WalSegmentSize::DEFAULT;
/// Timeline 1 has the segments before this one, timeline 10 those from it on.
const SWITCH: u64 = 700_000;
const SEGMENTS: u64 = 1_000_000;
/// Where the oldest backup begins.
const BACKUP: u64 = 600_000;
const STORED_BYTES: u64 = 5_000_000;
/// What the listing may hold: a page of a thousand keys, and the ranges.
const MEMORY_BYTES: u64 = 4 << 20;

fn tenth() -> TimelineId {
    TimelineId::new(10).unwrap()
}

fn segment(number: u64) -> SegmentName {
    let timeline = if number < SWITCH { TimelineId::FIRST } else { tenth() };
    SegmentName::from_number(timeline, number, SIZE)
}

/// Of segment 650,000 on timeline 1, and of 800,000 to 800,002 on timeline 10.
fn is_missing(number: u64) -> bool {
    number == 650_000 || (800_000..800_003).contains(&number)
}

fn backup(system: SystemIdentifier) -> BackupRecord {
    let began: jiff::Timestamp = "2026-11-01T06:15:00Z".parse().unwrap();
    let object = StoredObject { size: 1, sha256: Sha256Digest::of(b"") };
    BackupRecord {
        format: BACKUP_FORMAT,
        id: BackupId::new(began, BackupKind::Full),
        parent: None,
        system_identifier: system,
        server_version: 150_000,
        timeline: TimelineId::FIRST,
        start_lsn: Lsn::new(SIZE.start_of(BACKUP).bytes() + 40),
        stop_lsn: Lsn::new(SIZE.start_of(BACKUP + 1).bytes() + 256),
        started_at: began,
        stopped_at: began,
        next_xid_at_stop: 1000,
        from_standby: false,
        wal_segment_size: SIZE,
        block_size: 8192,
        data_checksums: true,
        tablespaces: vec![],
        parts: vec![],
        manifest: object,
        index: object,
        files: 0,
        restored_bytes: 0,
        damaged: Vec::new(),
        warnings: vec![],
        writer: "test".to_owned(),
    }
}

/// The repository, and the store that counts its requests.
async fn archive() -> (Repository, MemoryStore) {
    let store = MemoryStore::new();
    let system = SystemIdentifier::new(7_575_002_186_531_184_001);
    let layout = Layout::new("shop/orders".parse().unwrap(), system);
    let keys = (0..SEGMENTS).filter(|number| !is_missing(*number));
    let long_ago = "2026-11-01T06:15:00Z".parse().unwrap();
    store.fill(keys.map(|number| layout.wal(&ArchiveFileName::Segment(segment(number)))), STORED_BYTES, long_ago);
    let repository = Repository::new(Arc::new(store.clone()), layout, 1);
    repository.note_cluster(SIZE).await.unwrap();
    let history = format!("1\t{}\tno recovery target specified\n", SIZE.start_of(SWITCH));
    let name = ArchiveFileName::History(tenth());
    let key = repository.layout().wal(&name);
    repository.store_bytes(&key, "history", Bytes::from(history)).await.unwrap();
    let record = backup(system);
    repository.store_json(&RepositoryObject::Backup(record.id, BackupObject::Record), &record).await.unwrap();
    store.take_requests();
    (repository, store)
}

/// A field of /proc/self/status, in bytes.
fn memory(field: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
}

/// What the process held more, at most, while this ran than before.
async fn peak<T>(what: &str, work: impl Future<Output = T>) -> (T, u64) {
    // The peak begins anew (proc(5)).
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let (before, began) = (memory("VmRSS:"), Instant::now());
    let result = work.await;
    let grown = memory("VmHWM:").saturating_sub(before);
    eprintln!("{what}: {:?}, {} kB more", began.elapsed(), grown >> 10);
    (result, grown)
}

#[tokio::test]
async fn a_million_segments_are_looked_through_with_few_requests_and_little_memory() {
    let (repository, store) = archive().await;
    let held = async { vec![1_u8; 32 << 20].len() };
    assert!(peak("a control", held).await.1 > 30 << 20, "what is held is seen");

    let (all, grown) = peak("wal list", survey(&repository, None)).await;
    let all = all.unwrap();
    assert!(grown < MEMORY_BYTES, "{grown}");
    let [first, other] = all.timelines.as_slice() else { panic!("{} timelines", all.timelines.len()) };
    assert_eq!((first.segments, first.gaps, first.missing_segments), (SWITCH - 1, 1, 1));
    assert_eq!((other.segments, other.gaps, other.missing_segments), (SEGMENTS - SWITCH - 3, 1, 3));
    assert_eq!((other.parent, other.switch_point), (Some(TimelineId::FIRST), Some(SIZE.start_of(SWITCH))));
    assert_eq!(first.stored_bytes + other.stored_bytes, (SEGMENTS - 4) * STORED_BYTES);
    // The segments and a history, a thousand to a page. cluster.json and the history are read.
    assert_eq!((store.requests(Operation::List), store.requests(Operation::Get)), (1000, 2));
    assert_eq!(store.take_requests(), 1002);

    let (one, grown) = peak("wal list --timeline", survey(&repository, Some(tenth()))).await;
    assert!(grown < MEMORY_BYTES, "{grown}");
    assert_eq!(one.unwrap().timelines[0].segments, other.segments);
    assert_eq!(store.requests(Operation::List), 300);
    store.take_requests();

    let options = VerifyOptions { timeline: None, readers: 0 };
    let (verified, grown) =
        peak("wal verify", verify(&repository, options, &Arc::new(VerifyProgress::default()))).await;
    let verified = verified.unwrap();
    assert!(grown < MEMORY_BYTES, "{grown}");
    assert!(!verified.ok);
    let segments: Vec<u64> = verified.timelines.iter().map(|timeline| timeline.segments).collect();
    assert_eq!(segments, [SWITCH - BACKUP - 1, other.segments], "nothing from before the backup");
    let [limit] = verified.limited_backups.as_slice() else { panic!("{:?}", verified.limited_backups) };
    assert_eq!((limit.lacks, limit.reachable), (segment(650_000), SIZE.start_of(650_000)));
    // 100 and 300 pages of segments; the timelines, the backups and the pins.
    assert_eq!(store.requests(Operation::List), 403);
    assert_eq!(store.requests(Operation::Get), 4, "cluster.json, the history, that of timeline 1, backup.json");
    assert_eq!(store.take_requests(), 407);

    // What the daemon asks is a request each: whether a segment is there, for it, and from where on.
    let absent = repository.layout().wal(&ArchiveFileName::Segment(segment(650_000)));
    assert!(repository.read_plain(&absent, std::io::sink()).await.unwrap().is_none());
    assert_eq!(store.take_requests(), 1);
    let history = repository.history(tenth()).await.unwrap().unwrap();
    store.take_requests();
    let scan = WalScan::new(history, SIZE, SIZE.start_of(900_000));
    let scan = repository.scan_wal(scan, Some(SIZE.start_of(900_001))).await.unwrap();
    assert!(scan.reaches(SIZE.start_of(900_001)));
    assert_eq!(store.take_requests(), 1);
}
