//! Whether the WAL that restores could need is in the archive, and, if wanted, whether it is whole.
//!
//! What is needed and what is missing is decided in the core's `continuity`. Here it's listed, from the oldest
//! backup on, and read: each segment as recovery would get it, a few at a time, none of them ever in memory as a whole.
//! A store that doesn't answer is a failure of the whole, never a finding.

use std::{
    collections::BTreeMap,
    io::Write,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use pgsidecar_core::{
    ArchiveFileName, ArchivedWal, SegmentName, SegmentRange, SystemIdentifier, TimelineId, WalHeader, WalSegmentSize,
    check_segment,
    continuity::{BackupLimit, NeededWal, Requirements},
    plan::Catalog,
};
use serde::Serialize;
use tokio::task::JoinSet;

use super::{arriving::Arriving, set_apart::set_apart};
use crate::{
    failure::{Code, Failure},
    repository::{ClusterRecord, Repository},
};

/// How many damaged segments are named, and heeded in what is said of the backups. More are only counted.
const MAX_DAMAGED: usize = 1000;

/// What is to be verified.
#[derive(Clone, Copy, Debug)]
pub struct VerifyOptions {
    /// Only what restores to this timeline could need.
    pub timeline: Option<TimelineId>,
    /// Read the segments, this many at a time; 0 for not at all.
    pub readers: usize,
}

/// How far it has come.
#[derive(Debug, Default)]
pub struct VerifyProgress {
    /// Segments that have been listed.
    pub listed: AtomicU64,
    /// Segments that have been read.
    pub read: AtomicU64,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Verification {
    /// Whether nothing is missing and nothing was found to be damaged.
    pub ok: bool,
    /// The database system.
    pub system_identifier: SystemIdentifier,
    /// The size of its WAL segments in bytes.
    pub wal_segment_size: WalSegmentSize,
    /// How many backups there are to restore from. Without any, no WAL is needed.
    pub backups: usize,
    /// The timelines that restores could need WAL of, in order.
    pub timelines: Vec<VerifiedTimeline>,
    /// Timeline histories that aren't there. Without its history, restores can't follow a timeline.
    pub missing_histories: Vec<ArchiveFileName>,
    /// Timeline histories that can't be read.
    pub damaged_histories: Vec<Damage>,
    /// Backups that what is missing or damaged cuts short, or that can't be restored.
    pub limited_backups: Vec<BackupLimit>,
    /// How many segments were read; `None` if that wasn't asked for.
    pub read_segments: Option<u64>,
    /// How many of these are damaged.
    pub damaged_segments: u64,
    /// The first thousand of the damaged ones, by their names.
    pub damaged: Vec<Damage>,
    /// Objects among the WAL that was listed that aren't pgsidecar's.
    pub foreign_objects: u64,
}

/// What is there of a timeline, from the first segment that is needed.
#[derive(Clone, Debug, Serialize)]
pub struct VerifiedTimeline {
    /// The timeline.
    pub timeline: TimelineId,
    /// The first segment that is needed.
    pub from: SegmentName,
    /// The last segment that is there.
    pub last: Option<SegmentName>,
    /// How many are there.
    pub segments: u64,
    /// The bytes that they take in the repository.
    pub stored_bytes: u64,
    /// How many gaps there are.
    pub gaps: u64,
    /// How many segments are missing in these.
    pub missing_segments: u64,
    /// The gaps; with more than [`pgsidecar_core::MAX_GAPS`], the oldest.
    pub missing: Vec<SegmentRange>,
}

/// Something that is there and can't be used.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Damage {
    /// The file.
    pub file: ArchiveFileName,
    /// What is wrong with it.
    pub message: String,
}

/// Verifies the archive.
///
/// # Errors
/// [`Code::NotFound`] if there is no such timeline; [`Code::WrongCluster`]; the store's. What is wrong with the
/// archive is no error, but in the result.
///
/// # Cancellation
/// Can be dropped at any point.
pub async fn verify(
    repository: &Repository,
    options: VerifyOptions,
    progress: &Arc<VerifyProgress>,
) -> Result<Verification, Failure> {
    let cluster = repository.known_cluster().await?;
    let size = cluster.wal_segment_size;
    let timelines = repository.timelines().await?;
    let (mut catalog, damaged_histories) = catalog(repository, &timelines).await?;
    set_apart(repository, &mut catalog).await?;
    let unknown = |only: &TimelineId| !timelines.contains(only) && !catalog.backups.iter().any(|b| b.timeline == *only);
    if let Some(timeline) = options.timeline.filter(unknown) {
        return Err(Failure::new(Code::NotFound, format!("the repository holds nothing of timeline {timeline}"))
            .hint("'pgsidecar wal list' shows the timelines."));
    }
    let requirements = Requirements::new(&catalog, &timelines, size, options.timeline);
    let mut reader = (options.readers > 0).then(|| Reader::new(repository, &cluster, options.readers, progress));
    let mut arriving = Arriving::default();
    let (mut verified, mut archived, mut foreign_objects) = (Vec::new(), Vec::new(), 0);
    for NeededWal { first, end, mut wal } in requirements.listings() {
        let mut pages = repository.list_wal_from(first);
        'pages: while let Some(page) = pages.next().await? {
            for found in page {
                foreign_objects += u64::from(found.object.is_none());
                let Some(segment) = found.segment() else { continue };
                if end.is_some_and(|end| segment >= end) {
                    break 'pages;
                }
                let mut come = arriving.look(repository, &wal, segment, found.listed.modified, size).await?;
                come.push((segment, found.listed.size, found.listed.modified));
                for (segment, stored_bytes, stored_at) in come {
                    wal.found(segment, stored_bytes, stored_at);
                    progress.listed.fetch_add(1, Relaxed);
                    if let Some(reader) = &mut reader {
                        reader.read(segment).await?;
                    }
                }
            }
        }
        foreign_objects += wal.misnamed();
        verified.push(first);
        archived.push(wal);
    }
    let (read_segments, damaged_segments, damaged) = match reader {
        Some(reader) => reader.finish().await.map(|(read, count, damaged)| (Some(read), count, damaged))?,
        None => (None, 0, BTreeMap::new()),
    };
    let found = requirements.check(archived, &damaged.keys().copied().collect());
    let is_damaged = |timeline: &TimelineId| damaged_histories.iter().any(|d| d.file.timeline() == *timeline);
    let without_history = requirements.without_history().iter().filter(|timeline| !is_damaged(timeline));
    let missing_histories: Vec<_> = without_history.map(|timeline| ArchiveFileName::History(*timeline)).collect();
    let faults = found.gaps() + damaged_segments + (missing_histories.len() + damaged_histories.len()) as u64;
    Ok(Verification {
        ok: faults == 0 && found.limits.is_empty(),
        system_identifier: repository.layout().system(),
        wal_segment_size: size,
        backups: requirements.backups(),
        timelines: verified
            .into_iter()
            .zip(&found.timelines)
            .map(|(from, wal)| VerifiedTimeline::new(from, wal))
            .collect(),
        missing_histories,
        damaged_histories,
        limited_backups: found.limits,
        read_segments,
        damaged_segments,
        damaged: damaged.into_values().collect(),
        foreign_objects,
    })
}

impl VerifiedTimeline {
    fn new(from: SegmentName, wal: &ArchivedWal) -> VerifiedTimeline {
        VerifiedTimeline {
            timeline: wal.timeline(),
            from,
            last: wal.last(),
            segments: wal.segments(),
            stored_bytes: wal.stored_bytes(),
            gaps: wal.gaps(),
            missing_segments: wal.missing_segments(),
            missing: wal.missing().collect(),
        }
    }
}

/// Backups and timeline histories, and the histories that are damaged.
async fn catalog(repository: &Repository, timelines: &[TimelineId]) -> Result<(Catalog, Vec<Damage>), Failure> {
    let mut catalog = Catalog { backups: repository.backups().await?, ..Catalog::default() };
    let mut damaged = Vec::new();
    for &timeline in timelines {
        match repository.history(timeline).await {
            Ok(history) => catalog.histories.extend(history),
            Err(failure) if failure.code == Code::Damaged => {
                damaged.push(Damage { file: ArchiveFileName::History(timeline), message: failure.message });
            }
            Err(failure) => return Err(failure),
        }
    }
    Ok((catalog, damaged))
}

/// Reads segments, several at a time.
struct Reader {
    repository: Repository,
    cluster: ClusterRecord,
    readers: usize,
    progress: Arc<VerifyProgress>,
    running: JoinSet<(SegmentName, Result<Option<Damage>, Failure>)>,
    read: u64,
    damaged_segments: u64,
    damaged: BTreeMap<SegmentName, Damage>,
}

impl Reader {
    fn new(repository: &Repository, cluster: &ClusterRecord, readers: usize, progress: &Arc<VerifyProgress>) -> Reader {
        Reader {
            repository: repository.clone(),
            cluster: cluster.clone(),
            readers,
            progress: progress.clone(),
            running: JoinSet::new(),
            read: 0,
            damaged_segments: 0,
            damaged: BTreeMap::new(),
        }
    }

    /// Begins to read a segment, once one of the readers is free.
    async fn read(&mut self, segment: SegmentName) -> Result<(), Failure> {
        while self.running.len() >= self.readers {
            self.join_one().await?;
        }
        let (repository, cluster) = (self.repository.clone(), self.cluster.clone());
        self.running.spawn(async move { (segment, read_segment(&repository, &cluster, segment).await) });
        Ok(())
    }

    async fn join_one(&mut self) -> Result<(), Failure> {
        let Some(ended) = self.running.join_next().await else { return Ok(()) };
        self.read += 1;
        self.progress.read.fetch_add(1, Relaxed);
        let (segment, found) = ended?;
        if let Some(damage) = found? {
            self.damaged_segments += 1;
            if self.damaged.len() < MAX_DAMAGED {
                self.damaged.insert(segment, damage);
            }
        }
        Ok(())
    }

    async fn finish(mut self) -> Result<(u64, u64, BTreeMap<SegmentName, Damage>), Failure> {
        while !self.running.is_empty() {
            self.join_one().await?;
        }
        Ok((self.read, self.damaged_segments, self.damaged))
    }
}

/// Reads a segment as recovery would get it, and throws it away. Answers with what is wrong with it.
async fn read_segment(
    repository: &Repository,
    cluster: &ClusterRecord,
    segment: SegmentName,
) -> Result<Option<Damage>, Failure> {
    let file = ArchiveFileName::Segment(segment);
    let damage = |message: String| Ok(Some(Damage { file, message }));
    let begin = SegmentBegin { bytes: Vec::with_capacity(WalHeader::LEN), left: cluster.wal_segment_size.bytes() };
    match repository.read_plain(&repository.layout().wal(&file), begin).await {
        Ok(Some((begin, length))) => {
            let (system, size) = (cluster.system_identifier, cluster.wal_segment_size);
            match check_segment(&segment, &begin.bytes, length, system, size) {
                Ok(_) => Ok(None),
                Err(mismatch) => damage(mismatch.to_string()),
            }
        }
        Ok(None) => damage(format!("{file} was listed, and gone when it was to be read")),
        Err(failure) if failure.code == Code::Damaged => damage(failure.message),
        Err(failure) => Err(failure),
    }
}

/// Keeps the first bytes of a segment, and ends one that is too long: a damaged object can decompress to anything.
struct SegmentBegin {
    bytes: Vec<u8>,
    /// How many bytes may still come.
    left: u64,
}

impl Write for SegmentBegin {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let too_long = || std::io::Error::other("it is longer than a WAL segment of this database");
        self.left = self.left.checked_sub(bytes.len() as u64).ok_or_else(too_long)?;
        let wanted = WalHeader::LEN - self.bytes.len();
        self.bytes.extend_from_slice(&bytes[..bytes.len().min(wanted)]);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
