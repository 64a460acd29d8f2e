//! The end of a stopped server's WAL: segments that were begun and never marked.
//!
//! They must not be archived under their own names: when the server starts again, it writes other bytes behind what is
//! there. So each is kept as an object of its own, with its hash in the key, and handed out only to a restore to the
//! latest point, and only where the whole segment doesn't exist.
//!
//! After an orderly stop there is one, with the shutdown checkpoint. After a crash it holds transactions that were
//! committed and are in no complete segment; a segment that was complete and not marked yet comes on top.

use std::{fs, io::Seek};

use pgsidecar_core::{ArchiveFileName, ClusterState, ContentId, SegmentName, layout::RepositoryObject};

use super::{
    Origin,
    check::{self, Check},
    storing::{Source, content},
};
use crate::{
    codec::{self, HashingWriter},
    failure::Failure,
    repository::{Repository, Stored},
    store::{ListRequest, ListedObject, Pages},
};

/// More segments than this are no end of a log: PostgreSQL doesn't archive (`archive_mode = off`).
const MOST_SEGMENTS: usize = 4;

/// Keeps the end of the WAL of a server that isn't running.
///
/// # Errors
/// The store's; or if pg_wal can't be read.
pub async fn keep(origin: &Origin) -> Result<(), Failure> {
    // A standby has no more than its primary has sent: its end, kept later, would pass for the newer one.
    if matches!(origin.control.state, ClusterState::InArchiveRecovery | ClusterState::ShutDownInRecovery) {
        return Ok(());
    }
    let looked = {
        let origin = origin.clone();
        tokio::task::spawn_blocking(move || unmarked_segments(&origin)).await??
    };
    for segment in looked {
        let kept = {
            let origin = origin.clone();
            tokio::task::spawn_blocking(move || hash(&origin, segment)).await??
        };
        let repository = &origin.repository;
        let key = repository.layout().tail(segment, &kept.sha256);
        let name = format!("the tail in {segment}");
        let (file, stamp) = open(origin, segment)?;
        let check = Check { name: ArchiveFileName::Segment(segment), control: origin.control, stamp: None };
        let stream = codec::compress(repository.level(), content(check, Source::File(file, stamp.size)));
        if repository.store_stream(&key, &name, stream).await?.0 == Stored::New {
            tracing::info!(%segment, "kept the end of the WAL beside the archive");
        }
        forget_earlier(repository, segment).await;
    }
    Ok(())
}

fn open(origin: &Origin, segment: SegmentName) -> Result<(fs::File, crate::pgdata::FileStamp), Failure> {
    check::open(&origin.pgdata.wal().join(segment.to_string()), &ArchiveFileName::Segment(segment))
}

fn hash(origin: &Origin, segment: SegmentName) -> Result<ContentId, Failure> {
    let (mut file, _) = open(origin, segment)?;
    let mut hashing = HashingWriter::new(std::io::sink());
    file.rewind()
        .and_then(|()| codec::copy(&mut file, &mut hashing))
        .map_err(|error| Failure::io(format!("reading {segment}"), &error))?;
    Ok(hashing.finish().1)
}

/// The segments in pg_wal that hold their own WAL and that PostgreSQL hasn't marked, in their order. Those that it has
/// laid in for later hold zeros or older WAL.
fn unmarked_segments(origin: &Origin) -> Result<Vec<SegmentName>, Failure> {
    let wal = origin.pgdata.wal();
    let failed = |error| Failure::io(format!("reading {}", wal.display()), &error);
    let mut segments = Vec::new();
    for entry in fs::read_dir(&wal).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let Some(Ok(name @ ArchiveFileName::Segment(segment))) = name.to_str().map(str::parse) else { continue };
        if origin.pgdata.is_finished(&name) {
            continue;
        }
        let (mut file, stamp) = open(origin, segment)?;
        let check = Check { name, control: origin.control, stamp: None };
        // It begins with its own WAL, however little of it there is.
        let begun = check.size(stamp.size).is_ok() && check.completeness(&mut file).is_ok();
        if begun {
            segments.push(segment);
        }
    }
    segments.sort_unstable();
    if segments.len() > MOST_SEGMENTS {
        tracing::info!(
            segments = segments.len(),
            "PostgreSQL has marked none of its segments: no end of its WAL is kept"
        );
        segments.clear();
    }
    Ok(segments)
}

/// The newest tail of a segment.
///
/// # Errors
/// The store's.
pub async fn newest(repository: &Repository, segment: SegmentName) -> Result<Option<ListedObject>, Failure> {
    let tails = list(repository, repository.layout().tail_prefix(segment)).await?;
    Ok(tails.into_iter().map(|(_, object)| object).max_by_key(|object| object.modified))
}

/// Removes the tails of segments before this one on its timeline: those are complete now, or were given up.
async fn forget_earlier(repository: &Repository, segment: SegmentName) {
    let prefix = repository.layout().tails_prefix(segment.timeline());
    let forgotten = async {
        let earlier: Vec<_> = list(repository, prefix)
            .await?
            .into_iter()
            .filter(|(there, _)| *there < segment)
            .map(|(_, object)| object.key)
            .collect();
        let mut complete = Vec::new();
        for key in earlier {
            if let Some(RepositoryObject::Tail(segment, _)) = repository.layout().parse(&key)
                && repository
                    .store()
                    .head(&repository.layout().wal(&ArchiveFileName::Segment(segment)))
                    .await?
                    .is_some()
            {
                complete.push(key);
            }
        }
        if !complete.is_empty() {
            repository.store().delete(&complete).await?;
        }
        Ok::<_, Failure>(())
    };
    if let Err(failure) = forgotten.await {
        // Keys that may only add are no fault: whoever prunes removes them.
        tracing::debug!(%failure, "earlier tails were left");
    }
}

async fn list(repository: &Repository, prefix: String) -> Result<Vec<(SegmentName, ListedObject)>, Failure> {
    let mut tails = Vec::new();
    let mut pages = Pages::new(repository.store(), ListRequest::under(prefix));
    while let Some(page) = pages.next().await? {
        tails.extend(page.objects.into_iter().filter_map(|object| match repository.layout().parse(&object.key) {
            Some(RepositoryObject::Tail(segment, _)) => Some((segment, object)),
            _ => None,
        }));
    }
    Ok(tails)
}
