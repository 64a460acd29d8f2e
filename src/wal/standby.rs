//! A standby's part in a failover without a hole.
//!
//! PostgreSQL marks what a standby receives as `.done` without archiving it: that's the primary's work. What a dead
//! primary has received from its clients, sent to its standby and not archived yet, nobody would ever archive. So the
//! sidecar of a standby looks whether the segments that it has replayed arrive in the repository, and ships those that
//! don't. After a promotion it does so at once, before PostgreSQL's checkpoints remove them.
//!
//! What is shipped, and when it's final, is decided by [`Received`]; that it isn't a part of a segment, by the archiver,
//! page by page. Where the primary was only slow, it finds its own bytes there.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    sync::Arc,
    time::Duration,
};

use pgsidecar_core::{ArchiveFileName, ClusterState, Lsn, SegmentName, TimelineHistory, TimelineId, standby::Received};
use tokio::{sync::watch, time::Instant};

use super::{Origin, Origins, archive::Archiver};
use crate::{
    failure::Failure, histories::MAX_HISTORY_BYTES, pgdata::DataDirectory, postgres::Session, repository::ListedWal,
    settings::ConnectionSettings,
};

/// How often it's looked at what has come.
const LOOK_EVERY: Duration = Duration::from_secs(3);
/// How long the primary has to archive a segment, from when it was first seen to be final here.
const GRACE: Duration = Duration::from_secs(15);

/// What is known between two looks.
#[derive(Default)]
struct Watch {
    session: Option<Session>,
    /// Since when a segment that isn't known to be in the repository is final here.
    waiting: BTreeMap<SegmentName, Instant>,
    archived: BTreeSet<SegmentName>,
}

/// Looks after what the server receives, until it's told to stop. On a primary that never was a standby there is nothing
/// to do.
pub async fn run(
    archiver: Arc<Archiver>,
    origins: &dyn Origins,
    connection: &ConnectionSettings,
    mut stop: watch::Receiver<bool>,
) {
    let mut watch = Watch::default();
    let mut told = None;
    while !*stop.borrow() {
        if let Ok(origin) = origins.origin().await {
            match watch.look(&archiver, &origin, connection).await {
                Ok(()) => told = None,
                Err(failure) if told.as_ref() != Some(&failure.message) => {
                    tracing::warn!(hint = failure.hint, "looking after the WAL that this standby receives: {failure}");
                    told = Some(failure.message);
                }
                Err(_) => {}
            }
        }
        let _ = tokio::time::timeout(LOOK_EVERY, stop.changed()).await;
    }
}

impl Watch {
    async fn look(
        &mut self,
        archiver: &Arc<Archiver>,
        origin: &Origin,
        connection: &ConnectionSettings,
    ) -> Result<(), Failure> {
        let in_recovery = match origin.control.state {
            ClusterState::InArchiveRecovery | ClusterState::ShutDownInRecovery => true,
            ClusterState::InProduction | ClusterState::ShuttingDown | ClusterState::ShutDown => false,
            // What comes next isn't known.
            ClusterState::Startup | ClusterState::InCrashRecovery => return Ok(()),
        };
        let pgdata = origin.pgdata.clone();
        let timeline = origin.control.timeline;
        let (history, here) =
            tokio::task::spawn_blocking(move || Ok::<_, Failure>((followed(&pgdata, timeline)?, segments(&pgdata)?)))
                .await??;
        if !in_recovery && history.spans().len() == 1 {
            *self = Watch::default();
            return Ok(());
        }
        let replayed = if in_recovery { Some(self.replayed(origin, connection).await) } else { None };
        let received = Received { history, replayed, segment_size: origin.control.wal_segment_size };
        self.archived.retain(|segment| here.contains(segment));
        let now = Instant::now();
        let (before, archived) = (std::mem::take(&mut self.waiting), &self.archived);
        self.waiting = here
            .into_iter()
            .filter(|segment| !archived.contains(segment) && received.is_final(*segment))
            .map(|segment| (segment, before.get(&segment).copied().unwrap_or(now)))
            .collect();
        // A primary that is gone won't need time any more.
        let grace = if in_recovery { GRACE } else { Duration::ZERO };
        let due: Vec<SegmentName> =
            self.waiting.iter().filter(|(_, since)| since.elapsed() >= grace).map(|(segment, _)| *segment).collect();
        let missing = self.missing(origin, &due).await?;
        for segment in missing {
            let stored = archiver.archive_file(origin, ArchiveFileName::Segment(segment)).await;
            match stored {
                Ok(_) => {
                    tracing::info!(%segment, "shipped what the primary had not archived");
                    self.archived.insert(segment);
                }
                // PostgreSQL has removed it meanwhile, or the store is away. The archiver has told, once.
                Err(failure) => {
                    tracing::debug!(%segment, %failure, "what the primary had not archived was not shipped")
                }
            }
        }
        Ok(())
    }

    /// Those of these segments, in their order, that the repository doesn't have; the others are noted.
    async fn missing(&mut self, origin: &Origin, due: &[SegmentName]) -> Result<Vec<SegmentName>, Failure> {
        let mut missing = Vec::new();
        for of_timeline in due.chunk_by(|a, b| a.timeline() == b.timeline()) {
            let (Some(first), Some(last)) = (of_timeline.first(), of_timeline.last()) else { continue };
            let mut listing = origin.repository.list_wal_from(*first);
            let mut there = BTreeSet::new();
            'pages: while let Some(page) = listing.next().await? {
                for segment in page.iter().filter_map(ListedWal::segment) {
                    if segment > *last {
                        break 'pages;
                    }
                    there.insert(segment);
                }
            }
            missing.extend(of_timeline.iter().filter(|segment| !there.contains(segment)));
            self.archived.extend(of_timeline.iter().filter(|segment| there.contains(segment)));
        }
        Ok(missing)
    }

    /// How far the standby has replayed; what `pg_control` guarantees, where it can't be asked.
    async fn replayed(&mut self, origin: &Origin, connection: &ConnectionSettings) -> Lsn {
        let asked = async {
            let session = match self.session.take() {
                Some(session) => session,
                None => Session::connect(connection).await?,
            };
            let replayed = session.replayed().await?;
            let ours = session.server().system_identifier == origin.control.system_identifier;
            self.session = Some(session);
            Ok::<_, Failure>(replayed.filter(|_| ours))
        };
        match asked.await {
            Ok(Some(replayed)) => replayed,
            Ok(None) => origin.control.minimum_recovery_point,
            Err(failure) => {
                tracing::debug!(%failure, "the standby can't be asked how far it has replayed");
                origin.control.minimum_recovery_point
            }
        }
    }
}

/// The timelines that a server has followed which was on this one at its last checkpoint: the newest of the histories
/// in its pg_wal that lead there.
fn followed(pgdata: &DataDirectory, timeline: TimelineId) -> Result<TimelineHistory, Failure> {
    let failed = |error| Failure::io("reading pg_wal", &error);
    let mut timelines = pgdata.histories().map_err(failed)?;
    timelines.sort_unstable();
    for newer in timelines.into_iter().rev().filter(|newer| *newer >= timeline) {
        let path = pgdata.wal().join(ArchiveFileName::History(newer).to_string());
        let size = fs::metadata(&path).map_or(0, |meta| meta.len());
        let Ok(bytes) = fs::read(&path) else { continue };
        if size <= MAX_HISTORY_BYTES
            && let Ok(history) = TimelineHistory::parse(newer, &bytes)
            && history.spans().iter().any(|span| span.timeline == timeline)
        {
            return Ok(history);
        }
    }
    Ok(TimelineHistory::first(timeline))
}

/// The segments in pg_wal that PostgreSQL has marked as finished.
fn segments(pgdata: &DataDirectory) -> Result<BTreeSet<SegmentName>, Failure> {
    let failed = |error| Failure::io("reading pg_wal", &error);
    let mut segments = BTreeSet::new();
    for entry in fs::read_dir(pgdata.wal().join("archive_status")).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let marked = name.to_str().and_then(|name| name.strip_suffix(".done").or_else(|| name.strip_suffix(".ready")));
        if let Some(Ok(ArchiveFileName::Segment(segment))) = marked.map(str::parse) {
            segments.insert(segment);
        }
    }
    Ok(segments)
}
