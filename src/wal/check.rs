//! What a file of pg_wal must be, by its name, before it may be stored under it.

use std::{
    fs::File,
    io::{self, Read, Seek, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use pgsidecar_core::{
    ArchiveFileName, ClusterState, Completeness, ControlFile, Lsn, PageScan, TimelineHistory, TimelineId, WalHeader,
    backup_label::is_whole_backup_history, check_segment,
};

use crate::{
    codec::{CHUNK, FRAME, fill},
    failure::{Code, Failure},
    histories::MAX_HISTORY_BYTES,
    pgdata::FileStamp,
};

/// Opens the file of this name in pg_wal; with it, what tells it from another file.
///
/// # Errors
/// [`Code::NotFound`] if it isn't there; [`Code::Io`] for every other reason.
pub fn open(path: &Path, name: &ArchiveFileName) -> Result<(File, FileStamp), Failure> {
    open_regular(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            Failure::new(Code::NotFound, format!("{name} is not in pg_wal ({})", path.display()))
                .hint("PGDATA of the sidecar must be the data directory of the server that asks.")
        }
        _ => Failure::io(format!("opening {}", path.display()), &error),
    })
}

/// Opens a copy of a file, which must still be the one that has this stamp.
///
/// # Errors
/// [`Code::Busy`] if it's another by now, or none; [`Code::Io`] if it can't be read.
pub fn open_copy(path: &Path, stamp: FileStamp) -> Result<File, Failure> {
    match open_regular(path) {
        Ok((file, found)) if found == stamp => Ok(file),
        Ok(_) => Err(written_to(path)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(written_to(path)),
        Err(error) => Err(Failure::io(format!("opening {}", path.display()), &error)),
    }
}

fn written_to(what: impl AsRef<Path>) -> Failure {
    let what = what.as_ref().display();
    Failure::new(Code::Busy, format!("{what} was written to while it was read")).hint("Nothing was stored of it.")
}

fn open_regular(path: &Path) -> io::Result<(File, FileStamp)> {
    // A name that has been parsed can't leave the directory; a link in it could.
    let no_follow = i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or(0);
    let file = File::options().read(true).custom_flags(no_follow).open(path)?;
    let meta = file.metadata()?;
    if meta.is_file() { Ok((file, FileStamp::of(&meta))) } else { Err(io::Error::other("not a regular file")) }
}

const INCOMPLETE_HINT: &str =
    "It is taken as soon as it is complete. If nothing writes to it any more, its copy was broken off: copy it again.";

/// Why a file's content could not be taken.
#[derive(Debug)]
pub enum Trouble {
    /// It could not be read.
    Read(io::Error),
    /// It isn't what its name says.
    Refused(Failure),
}

/// What a file must be, by its name and by the server that it comes from.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    /// Its name.
    pub name: ArchiveFileName,
    /// Of the server.
    pub control: ControlFile,
    /// What the file is, which can be written to while it's read. `None`: it can't.
    pub stamp: Option<FileStamp>,
}

impl Check {
    /// The most bytes that such a file can have.
    pub fn largest(&self) -> u64 {
        match self.name {
            ArchiveFileName::Segment(_) | ArchiveFileName::Partial(_) => self.control.wal_segment_size.bytes(),
            ArchiveFileName::History(_) | ArchiveFileName::BackupHistory { .. } => MAX_HISTORY_BYTES,
        }
    }

    /// Checks the size, which must fit before anything is read.
    ///
    /// # Errors
    /// If it isn't what such a file has.
    pub fn size(&self, size: u64) -> Result<(), Failure> {
        let name = self.name;
        match name {
            ArchiveFileName::Segment(_) | ArchiveFileName::Partial(_) => {
                let expected = self.control.wal_segment_size.bytes();
                if size == expected {
                    return Ok(());
                }
                let code = if size > expected { Code::TooLarge } else { Code::InvalidSegment };
                Err(Failure::new(
                    code,
                    format!("{name} has {size} bytes; a WAL segment of this database has {expected}"),
                )
                .hint("Nothing was stored. A segment is always full size in pg_wal: the file or the transfer was cut."))
            }
            ArchiveFileName::History(_) | ArchiveFileName::BackupHistory { .. } => match size {
                0 => Err(Failure::new(Code::InvalidSegment, format!("{name} is empty")).hint("Nothing was stored.")),
                1..=MAX_HISTORY_BYTES => Ok(()),
                _ => Err(Failure::new(
                    Code::TooLarge,
                    format!("{name} has {size} bytes; such a file has at most {MAX_HISTORY_BYTES}"),
                )),
            },
        }
    }

    /// Copies the content while checking it: the beginning of a segment, the whole of a history, the size of all.
    ///
    /// # Errors
    /// Why the content isn't to be stored.
    pub fn copy(&self, reader: &mut dyn Read, out: &mut dyn Write) -> Result<(), Trouble> {
        let limit = self.largest();
        // One byte more than allowed is read, to see that there is one.
        let mut limited = reader.take(limit + 1);
        let mut buffer = vec![0; FRAME.min(usize::try_from(limit).unwrap_or(FRAME))];
        let (mut total, mut history) = (0, Vec::new());
        loop {
            let filled = fill(&mut limited, &mut buffer).map_err(Trouble::Read)?;
            let chunk = &buffer[..filled];
            if total == 0 {
                self.beginning(chunk).map_err(Trouble::Refused)?;
            }
            if matches!(self.name, ArchiveFileName::History(_)) {
                history.extend_from_slice(chunk);
            }
            total += filled as u64;
            if filled == 0 || total > limit {
                break;
            }
            out.write_all(chunk).map_err(Trouble::Read)?;
        }
        self.size(total).map_err(Trouble::Refused)?;
        if let ArchiveFileName::History(timeline) = self.name {
            TimelineHistory::parse(timeline, &history).map_err(|error| {
                Trouble::Refused(Failure::new(
                    Code::InvalidSegment,
                    format!("{} is not a timeline history: {error}", self.name),
                ))
            })?;
        }
        Ok(())
    }

    /// Checks that a copy is still what it was when it was looked at. If it is once all of it has been read, what was
    /// read is what was looked at.
    ///
    /// # Errors
    /// [`Code::Busy`] if it isn't.
    pub fn unchanged(&self, file: &File) -> Result<(), Failure> {
        let Some(stamp) = self.stamp else { return Ok(()) };
        let meta = file.metadata().map_err(|error| Failure::io(format!("reading {}", self.name), &error))?;
        if FileStamp::of(&meta) == stamp { Ok(()) } else { Err(written_to(self.name.to_string())) }
    }

    /// Checks that all of a copy is there, as far as its content tells: nobody vouches for it.
    ///
    /// # Errors
    /// [`Code::InvalidSegment`] if it isn't; why it isn't this file at all; [`Code::Io`] if it can't be read.
    pub fn whole(&self, file: &mut File, size: u64) -> Result<(), Failure> {
        self.size(size)?;
        let unreadable = |error: io::Error| Failure::io(format!("reading {}", self.name), &error);
        let incomplete = |what: String| Err(Failure::new(Code::InvalidSegment, what).hint(INCOMPLETE_HINT));
        match self.name {
            ArchiveFileName::Segment(_) => match self.completeness(file)? {
                Completeness::Complete => Ok(()),
                Completeness::Incomplete { page } => {
                    incomplete(format!("{} is not complete: its WAL ends at {page}", self.name))
                }
            },
            ArchiveFileName::Partial(_) => {
                let mut head = [0; WalHeader::LEN];
                file.read_exact(&mut head).map_err(unreadable)?;
                self.beginning(&head)
            }
            ArchiveFileName::History(_) | ArchiveFileName::BackupHistory { .. } => {
                let mut text = Vec::new();
                file.take(MAX_HISTORY_BYTES).read_to_end(&mut text).map_err(unreadable)?;
                let whole = match self.name {
                    // Each line ends with a line break.
                    ArchiveFileName::History(timeline) => {
                        TimelineHistory::parse(timeline, &text).is_ok() && text.ends_with(b"\n")
                    }
                    _ => is_whole_backup_history(&text),
                };
                if whole {
                    Ok(())
                } else {
                    incomplete(format!("{} is not complete: its last line isn't there", self.name))
                }
            }
        }
    }

    /// Whether all of a segment's WAL is in this file, which is left at its beginning.
    ///
    /// # Errors
    /// If it can't be read, or isn't this segment at all.
    pub fn completeness<F: Read + Seek>(&self, file: &mut F) -> Result<Completeness, Failure> {
        let unreadable = |error: io::Error| Failure::io(format!("reading {}", self.name), &error);
        let mut buffer = vec![0; CHUNK];
        let mut scan = None;
        loop {
            let filled = fill(file, &mut buffer).map_err(unreadable)?;
            let chunk = &buffer[..filled];
            let scan = match &mut scan {
                Some(scan) => scan,
                None => {
                    self.beginning(chunk)?;
                    let header = WalHeader::parse(chunk).map_err(|error| damaged_here(self.name, &error))?;
                    scan.insert(PageScan::new(&header))
                }
            };
            scan.feed(chunk);
            if filled < buffer.len() {
                break;
            }
        }
        file.rewind().map_err(unreadable)?;
        let page = Lsn::INVALID;
        Ok(scan.map_or(Completeness::Incomplete { page }, PageScan::finish))
    }

    fn beginning(&self, chunk: &[u8]) -> Result<(), Failure> {
        let (ArchiveFileName::Segment(segment) | ArchiveFileName::Partial(segment)) = self.name else { return Ok(()) };
        let head = chunk.get(..WalHeader::LEN).unwrap_or(chunk);
        let size = self.control.wal_segment_size;
        match check_segment(&segment, head, size.bytes(), self.control.system_identifier, size) {
            Ok(_) => Ok(()),
            Err(mismatch) => {
                let code = match mismatch {
                    pgsidecar_core::SegmentMismatch::OtherSystem { .. } => Code::WrongCluster,
                    _ => Code::InvalidSegment,
                };
                Err(Failure::new(code, mismatch.to_string()).hint("Nothing was stored. The file is not what its name says: don't remove it by hand, and look at how it came there."))
            }
        }
    }
}

fn damaged_here(name: ArchiveFileName, error: &impl std::fmt::Display) -> Failure {
    Failure::new(Code::InvalidSegment, format!("{name} is not a WAL segment: it {error}")).hint("Nothing was stored.")
}

/// Whether PostgreSQL itself vouches for this segment being complete when it marks it: a primary does, for the
/// timeline that it is on. A standby marks the last segment of what it was sent, however little of it came, and
/// a server that was promoted still has those of its time as a standby.
///
/// `histories`: the timelines whose histories lie in pg_wal; the control file may be behind them.
pub fn is_vouched_for(
    segment: TimelineId,
    control: &ControlFile,
    histories: impl IntoIterator<Item = TimelineId>,
) -> bool {
    let primary = match control.state {
        ClusterState::InProduction | ClusterState::ShuttingDown | ClusterState::ShutDown => true,
        ClusterState::Startup
        | ClusterState::InCrashRecovery
        | ClusterState::InArchiveRecovery
        | ClusterState::ShutDownInRecovery => false,
    };
    primary && segment >= control.timeline && histories.into_iter().all(|timeline| timeline <= segment)
}
