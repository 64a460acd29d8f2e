//! Timeline histories: small, and nothing can be restored across a promotion without them.
//!
//! PostgreSQL archives the history of the timeline that it begins, once. Those that a server brought along (from
//! the time before it was backed up by us) it never archives again; so all that lie in pg_wal are shipped when the
//! daemon starts and with each backup.
//!
//! A standby gets them also while the store is away ([`KnownHistories`]): with them it finds its primary's timeline, and
//! if it's promoted, one that nobody has taken.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    sync::Mutex,
    time::Duration,
};

use bytes::Bytes;
use pgsidecar_core::{ArchiveFileName, SystemIdentifier, TimelineHistory, TimelineId};
use tokio::sync::watch;

use crate::{
    codec::{self, HashingWriter},
    failure::{Code, Failure},
    pgdata::DataDirectory,
    repository::{Repository, Stored},
    wal::Origins,
};

/// The longest history file that is read, in bytes; the core's parser has the same limit.
pub const MAX_HISTORY_BYTES: u64 = 1 << 20;
/// The longest history that is kept in memory, in bytes: one with hundreds of ancestors.
const MAX_KNOWN_BYTES: usize = 16 << 10;
/// How many histories are kept in memory: those of the newest timelines.
const MOST_KNOWN: usize = 100;
/// How often the sidecar of a standby looks for new ones.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// What to do where two servers have begun one timeline.
pub const TAKEN_TWICE: &str = "Nothing was overwritten. Two servers began this timeline, as one can that is promoted while the store is \
     away; the one that isn't in the repository has to begin another. README.md, 'A timeline that was taken twice', says how: stop it, create \
     recovery.signal, and start it with recovery_target_timeline = 'current' and a restore_command for newer histories alone.";

/// Checks that the timeline that a server is on is its own, as far as the repository knows: that no history in pg_wal,
/// of this timeline or a newer one, differs from the one in the repository, and the first segment that waits to be
/// archived neither. (Servers that were promoted at the same place write the same history.)
///
/// # Errors
/// [`Code::Conflict`] if there is one; the store's, or if pg_wal can't be read.
pub async fn check_not_taken(
    repository: &Repository,
    pgdata: &DataDirectory,
    current: TimelineId,
) -> Result<(), Failure> {
    let mut timelines = pgdata.histories().map_err(|error| Failure::io("reading pg_wal", &error))?;
    timelines.sort_unstable();
    // Until the checkpoint after its promotion, pg_control names the timeline from which a server came.
    for timeline in timelines.into_iter().filter(|timeline| *timeline >= current) {
        let name = ArchiveFileName::History(timeline);
        let path = pgdata.wal().join(name.to_string());
        let ours = fs::read(&path).map_err(|error| Failure::io(format!("reading {}", path.display()), &error))?;
        let theirs = repository.history_file(timeline).await?;
        if theirs.is_some_and(|theirs| theirs != ours) {
            return Err(taken_twice(&name));
        }
    }
    let is_current = |name: &ArchiveFileName| matches!(name, ArchiveFileName::Segment(_)) && name.timeline() >= current;
    let waiting = pgdata.ready_files(1, is_current).map_err(|error| Failure::io("reading archive_status", &error))?;
    let Some(name) = waiting.first() else { return Ok(()) };
    let key = repository.layout().wal(name);
    let Some((theirs, _)) = repository.read_plain(&key, HashingWriter::new(io::sink())).await? else { return Ok(()) };
    let path = pgdata.wal().join(name.to_string());
    let hash = move || {
        let mut ours = HashingWriter::new(io::sink());
        codec::copy(&mut File::open(path)?, &mut ours)?;
        Ok::<_, io::Error>(ours.finish().1)
    };
    match tokio::task::spawn_blocking(hash).await? {
        Ok(ours) if ours != theirs.finish().1 => Err(taken_twice(name)),
        // What can't be read is told by who archives it.
        Ok(_) | Err(_) => Ok(()),
    }
}

fn taken_twice(name: &ArchiveFileName) -> Failure {
    let timeline = name.timeline();
    let what = format!("timeline {timeline} was taken twice: {name} in pg_wal isn't the one in the repository");
    Failure::new(Code::Conflict, what).hint(TAKEN_TWICE)
}

/// The history of a timeline, as it lies in pg_wal. `None` if it doesn't, or can't be read.
pub fn in_pg_wal(pgdata: &DataDirectory, timeline: TimelineId) -> Option<TimelineHistory> {
    let path = pgdata.wal().join(ArchiveFileName::History(timeline).to_string());
    TimelineHistory::parse(timeline, &fs::read(path).ok()?).ok()
}

/// Ships every timeline history of pg_wal that the repository lacks.
///
/// One that differs from what the repository has is left alone, with a warning: two servers have promoted to one
/// timeline, and which is right can't be told here.
///
/// # Errors
/// The store's, or if pg_wal can't be read.
pub async fn ship(repository: &Repository, pgdata: &DataDirectory) -> Result<(), Failure> {
    let wal = pgdata.wal();
    let entries = fs::read_dir(&wal).map_err(|error| Failure::io(format!("reading {}", wal.display()), &error))?;
    for entry in entries.flatten() {
        let name: ArchiveFileName = match entry.file_name().to_str().map(str::parse) {
            Some(Ok(name @ ArchiveFileName::History(_))) => name,
            _ => continue,
        };
        let path = entry.path();
        let size = entry.metadata().map_or(0, |meta| meta.len());
        let bytes = match fs::read(&path) {
            Ok(bytes) if size <= MAX_HISTORY_BYTES => bytes,
            _ => continue,
        };
        // PostgreSQL writes them under another name and renames them; one that doesn't parse was damaged later.
        if let Err(error) = TimelineHistory::parse(name.timeline(), &bytes) {
            tracing::warn!(file = %name, %error, "a timeline history in pg_wal can't be read; it was not shipped");
            continue;
        }
        let key = repository.layout().wal(&name);
        match repository.store_bytes(&key, &name.to_string(), Bytes::from(bytes)).await {
            Ok(Stored::New) => tracing::info!(file = %name, "timeline history shipped"),
            Ok(Stored::Already) => {}
            Err(failure) if failure.code == Code::Conflict => {
                tracing::error!(file = %name, %failure, hint = TAKEN_TWICE, "two servers began the same timeline");
            }
            Err(failure) => return Err(failure),
        }
    }
    Ok(())
}

/// Histories that the repository is known to hold. They never change there, so that what was seen once still holds when
/// the store is away; what wasn't seen says nothing. Those in its own pg_wal PostgreSQL finds without us.
#[derive(Debug, Default)]
pub struct KnownHistories {
    known: Mutex<BTreeMap<(SystemIdentifier, TimelineId), Bytes>>,
}

impl KnownHistories {
    /// Notes a history that came out of the repository.
    pub fn note(&self, system: SystemIdentifier, timeline: TimelineId, bytes: Bytes) {
        if bytes.len() > MAX_KNOWN_BYTES || TimelineHistory::parse(timeline, &bytes).is_err() {
            return;
        }
        if let Ok(mut known) = self.known.lock() {
            known.insert((system, timeline), bytes);
            while known.len() > MOST_KNOWN {
                known.pop_first();
            }
        }
    }

    /// A history, if it is known.
    pub fn get(&self, system: SystemIdentifier, timeline: TimelineId) -> Option<Bytes> {
        self.known.lock().ok()?.get(&(system, timeline)).cloned()
    }

    /// Looks, as long as the server is a standby, which histories come into the repository. Until it's told to stop.
    pub async fn keep(&self, origins: &dyn Origins, mut stop: watch::Receiver<bool>) {
        while !*stop.borrow() {
            if let Ok(origin) = origins.origin().await
                && origin.pgdata.is_standby()
                && let Err(failure) = self.look(&origin.repository).await
            {
                tracing::debug!(%failure, "new timeline histories were not looked for");
            }
            let _ = tokio::time::timeout(LOOK_EVERY, stop.changed()).await;
        }
    }

    /// Reads the histories of the newest timelines that aren't known yet.
    async fn look(&self, repository: &Repository) -> Result<(), Failure> {
        let system = repository.layout().system();
        let mut timelines = repository.timelines().await?;
        timelines.sort_unstable();
        for timeline in timelines.into_iter().rev().take(MOST_KNOWN) {
            if self.get(system, timeline).is_some() {
                continue;
            }
            match repository.history_file(timeline).await {
                Ok(Some(bytes)) => self.note(system, timeline, bytes.into()),
                // The first timeline has none.
                Ok(None) => {}
                // One that is damaged must not hide the others.
                Err(failure) if failure.code == Code::Damaged => {}
                Err(failure) => return Err(failure),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_of_histories_is_bounded_and_the_newest() {
        let known = KnownHistories::default();
        let system: SystemIdentifier = "7575002186531184001".parse().unwrap();
        let timeline = |n: u32| TimelineId::new(n).unwrap();
        for n in 2..=300 {
            known.note(system, timeline(n), Bytes::from_static(b"1\t0/1000000\tx\n"));
        }
        assert!(known.get(system, timeline(200)).is_none() && known.get(system, timeline(201)).is_some());
        assert_eq!(known.known.lock().unwrap().len(), MOST_KNOWN);
        known.note(system, timeline(301), Bytes::from(vec![b'#'; MAX_KNOWN_BYTES + 1]));
        known.note(system, timeline(302), Bytes::from_static(b"no history"));
        assert!(known.get(system, timeline(301)).is_none() && known.get(system, timeline(302)).is_none());
    }
}
