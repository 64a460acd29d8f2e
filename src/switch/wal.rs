//! The WAL that only the old directory has: a restore to the end replays it as well, as the manual wants it ("copy the
//! unarchived WAL segment files").

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, chown},
    path::{Path, PathBuf},
};

use pgsidecar_core::{
    ArchiveFileName, SegmentName, TimelineHistory, TimelineId, WalHeader,
    switch::{Role, Switch},
};

use crate::{failure::Failure, pgdata::DataDirectory};

/// Copies the segments of this timeline, and of those from which it comes, that aren't marked as archived or lie behind
/// what the archive had (`through`) to the new pg_wal, and the timeline's history. Done again, it does the same again.
///
/// # Errors
/// If they can't be read or written.
pub fn take_along(switch: &Switch, timeline: TimelineId, through: Option<SegmentName>) -> Result<(), Failure> {
    let (Some(root), Some(to)) = (switch.data(), staged_wal(switch)) else { return Ok(()) };
    let taken = put_unarchived(&root.live, &to, Some((timeline, through)), &copy)?;
    tracing::info!(files = taken, "WAL that isn't archived was taken along");
    Ok(())
}

/// Where the WAL of what is staged is.
fn staged_wal(switch: &Switch) -> Option<PathBuf> {
    let elsewhere = switch.roots.iter().find(|root| root.role == Role::Wal);
    match elsewhere {
        Some(root) => root.staged.clone(),
        None => Some(switch.data()?.staged.as_deref()?.join("pg_wal")),
    }
}

/// Copies the timeline histories that what is there has and what comes back hasn't.
///
/// # Errors
/// If they can't be read or written.
pub fn take_histories(switch: &Switch) -> Result<(), Failure> {
    let (Some(root), Some(to)) = (switch.data(), staged_wal(switch)) else { return Ok(()) };
    for path in files(&root.live.join("pg_wal"))? {
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        if matches!(name.parse(), Ok(ArchiveFileName::History(_))) && !to.join(name).exists() {
            copy(&path, &to).map_err(|error| Failure::io(format!("copying {}", path.display()), &error))?;
        }
    }
    let synced = File::open(&to).and_then(|directory| directory.sync_all());
    synced.map_err(|error| Failure::io(format!("syncing {}", to.display()), &error))
}

/// Puts the segments that aren't marked as archived, on the way to a timeline or of all, and histories into another
/// directory; of those on the way all that lie behind what an archive had.
fn put_unarchived(
    data: &Path,
    to: &Path,
    on_the_way: Option<(TimelineId, Option<SegmentName>)>,
    put: &dyn Fn(&Path, &Path) -> io::Result<()>,
) -> Result<usize, Failure> {
    let pgdata = DataDirectory::open(data)?;
    let size = match pgdata.control() {
        Ok(control) => control.wal_segment_size,
        // The restore is what repairs it.
        Err(failure) => {
            tracing::warn!("{failure}: WAL that isn't archived can't be told from the rest, and none is taken along");
            return Ok(0);
        }
    };
    let way = on_the_way.map(|(timeline, _)| way_to(&pgdata, timeline));
    let archive_end = on_the_way.and_then(|(_, through)| through?.start(size));
    let mut taken = 0;
    for path in files(&pgdata.wal())? {
        let Some(Ok(name)) = path.file_name().and_then(|name| name.to_str()).map(str::parse::<ArchiveFileName>) else {
            continue;
        };
        let wanted = match name {
            ArchiveFileName::Segment(segment) => {
                let start = segment.start(size);
                let number = start.map(|start| size.segment_number(start));
                let of = |way: &TimelineHistory| number.and_then(|number| way.timeline_of_segment(number, size));
                let is_on_the_way = way.as_ref().is_none_or(|way| of(way) == Some(segment.timeline()));
                let is_archived = pgdata.is_finished(&name) && !pgdata.is_ready(&name);
                let is_behind = archive_end.is_some_and(|end| start >= Some(end));
                is_on_the_way && (!is_archived || is_behind) && is_in_place(&path, start)
            }
            ArchiveFileName::History(of) => on_the_way.is_none_or(|(timeline, _)| of == timeline),
            _ => false,
        };
        if wanted {
            put(&path, to).map_err(|error| Failure::io(format!("copying {}", path.display()), &error))?;
            taken += 1;
        }
    }
    let synced = File::open(to).and_then(|directory| directory.sync_all());
    synced.map_err(|error| Failure::io(format!("syncing {}", to.display()), &error))?;
    Ok(taken)
}

/// The history of a timeline, as far as pg_wal has it.
fn way_to(pgdata: &DataDirectory, timeline: TimelineId) -> TimelineHistory {
    let path = pgdata.wal().join(ArchiveFileName::History(timeline).to_string());
    let history = fs::read(path).ok().and_then(|text| TimelineHistory::parse(timeline, &text).ok());
    history.unwrap_or_else(|| TimelineHistory::first(timeline))
}

/// Keeps WAL that is nowhere else in `kept/pg_wal`, before a database is restored over. Only what `stays` in its place to be
/// replayed, that of this timeline, takes room twice.
///
/// # Errors
/// If it can't be read or written.
pub fn save(data: &Path, kept: &Path, stays: Option<TimelineId>) -> Result<(), Failure> {
    let to = kept.join("pg_wal");
    let make = || -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&to)?;
        if rustix::process::geteuid().is_root() {
            let like = fs::metadata(data)?;
            [kept, &to].iter().try_for_each(|made| chown(made, Some(like.uid()), Some(like.gid())))?;
        }
        Ok(())
    };
    make().map_err(|error| Failure::io(format!("creating {}", to.display()), &error))?;
    let put = |from: &Path, to: &Path| {
        let name = from.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let is_replayed = stays.is_some() && name.parse().ok().and_then(|name| timeline_of(&name)) == stays;
        if is_replayed { copy(from, to) } else { link(from, to).or_else(|_| copy(from, to)) }
    };
    let saved = put_unarchived(data, &to, None, &put)?;
    tracing::info!(files = saved, kept = %to.display(), "WAL that isn't archived is kept");
    Ok(())
}

/// The names of the files of this timeline that were saved.
///
/// # Errors
/// If they can't be read.
pub fn saved(kept: &Path, timeline: TimelineId) -> Result<Vec<String>, Failure> {
    let names = files(&kept.join("pg_wal"))?.into_iter().filter_map(|path| {
        let name = path.file_name()?.to_str()?.to_owned();
        (timeline_of(&name.parse().ok()?) == Some(timeline)).then_some(name)
    });
    Ok(names.collect())
}

fn timeline_of(name: &ArchiveFileName) -> Option<TimelineId> {
    match name {
        ArchiveFileName::Segment(segment) => Some(segment.timeline()),
        ArchiveFileName::History(timeline) => Some(*timeline),
        _ => None,
    }
}

/// A second name, on the same file system.
fn link(from: &Path, directory: &Path) -> io::Result<()> {
    let Some(name) = from.file_name() else { return Ok(()) };
    match fs::remove_file(directory.join(name)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => fs::hard_link(from, directory.join(name)),
    }
}

fn files(directory: &Path) -> Result<Vec<PathBuf>, Failure> {
    let read = || fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>();
    read().map_err(|error| Failure::io(format!("reading {}", directory.display()), &error))
}

/// A segment that was recycled for later begins with the position that it had before.
fn is_in_place(path: &Path, start: Option<pgsidecar_core::Lsn>) -> bool {
    let mut first = [0; WalHeader::LEN];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut first));
    let header = read.ok().and_then(|()| WalHeader::parse(&first).ok());
    header.is_some_and(|header| Some(header.page_address) == start)
}

/// A copy, not a link: the server reuses and overwrites its segments, and what is kept has to stay as it is.
fn copy(from: &Path, directory: &Path) -> io::Result<()> {
    let Some(name) = from.file_name() else { return Ok(()) };
    let (to, temporary) = (directory.join(name), directory.join("pgsidecar-copy.tmp"));
    let mut source = File::open(from)?;
    let mut target = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    io::copy(&mut source, &mut target)?;
    if rustix::process::geteuid().is_root() {
        let like = source.metadata()?;
        chown(&temporary, Some(like.uid()), Some(like.gid()))?;
    }
    target.sync_all()?;
    fs::rename(&temporary, &to)
}
