//! One WAL file from the repository, without a daemon: the `restore_command` of servers that have none beside them.
//!
//! Like the helper it never takes "can't tell" for "not there" (I5). Nothing is fetched ahead and nothing is known from
//! before: each call asks the store.

use std::{
    fs::{self, File},
    io::{self, BufReader, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use pgsidecar_core::{
    ArchiveFileName, Lsn, SegmentName, WalHeader, WalSegmentSize,
    tablespace_scan::{CutRecord, TablespaceScan},
};
use serde::{Deserialize, Serialize};

use super::{
    directory::ArchiveDirectory,
    fetch::{FetchRequest, Fetcher},
};
use crate::{
    failure::{Code, Failure},
    repository::{Repository, damaged},
};

/// Between two tries, at first; doubled up to [`LONGEST_PAUSE`].
const PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Which file, and where to.
#[derive(Clone, Debug)]
pub struct GetRequest {
    /// The file.
    pub name: ArchiveFileName,
    /// Where it is put, whole or not at all. What is there is replaced.
    pub to: PathBuf,
    /// Whether the end of a stopped server's WAL will do where the whole segment doesn't exist.
    pub tail: bool,
    /// The last segment that is handed out, on whatever timeline: all behind it is said not to be there.
    pub through: Option<SegmentName>,
    /// Where another `archive_command` copies WAL to: what lies there may still come into the repository.
    pub archive_directory: Option<PathBuf>,
    /// How long an outage of the store is waited for.
    pub patience: Duration,
    /// It's for a server that must not come near another's tablespaces.
    pub private: Option<Private>,
}

/// What keeps a private server from tablespaces that are created after its backup.
#[derive(Clone, Debug)]
pub struct Private {
    /// Where its replay begins: what was created before is in the backup.
    pub from: Lsn,
    /// A file in which is noted what the last segment ended with.
    pub notes: PathBuf,
}

/// What a private server's segment ended with.
#[derive(Debug, Serialize, Deserialize)]
struct Notes {
    segment: SegmentName,
    cut: Option<CutRecord>,
}

/// Gets the file.
///
/// # Errors
/// [`Code::NotInArchive`] if the store says so, or if it lies behind [`GetRequest::through`]; anything else means 'can't
/// tell'.
pub async fn get(repository: &Repository, request: &GetRequest) -> Result<(), Failure> {
    let name = request.name;
    if let (ArchiveFileName::Segment(segment), Some(through)) = (name, request.through)
        && lies_behind(segment, through)
    {
        return Err(Failure::new(Code::NotInArchive, format!("{name} lies behind {through}, and isn't wanted")));
    }
    let until = Instant::now() + request.patience;
    let mut pause = PAUSE;
    loop {
        let failure = match try_to_get(repository, request).await {
            Ok(()) => return Ok(()),
            Err(failure) => failure,
        };
        let may_pass =
            matches!(failure.code, Code::StoreUnavailable | Code::NotYetArchived | Code::Busy | Code::Timeout);
        if !may_pass || Instant::now() + pause > until {
            return Err(failure);
        }
        tracing::warn!(file = %name, "not yet, trying again: {failure}");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Names of segments have the same length, and behind the timeline's digits they sort by position.
fn lies_behind(segment: SegmentName, through: SegmentName) -> bool {
    const TIMELINE_DIGITS: usize = 8;
    let position = |segment: SegmentName| segment.to_string().split_off(TIMELINE_DIGITS);
    position(segment) > position(through)
}

async fn try_to_get(repository: &Repository, request: &GetRequest) -> Result<(), Failure> {
    let GetRequest { name, to, tail, archive_directory, .. } = request;
    let directory = match to.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    // Before the store is asked: what is removed from there has been stored by then.
    let waits = match archive_directory {
        Some(path) => ArchiveDirectory::new(path.clone()).has(*name),
        None => Ok(false),
    };
    let fetching = FetchRequest {
        repository: repository.clone(),
        name: *name,
        pgdata: None,
        // Where the whole segment will come, its beginning isn't handed out.
        tail: *tail && matches!(waits, Ok(false)),
    };
    let fetched = Fetcher::new(Some(directory.clone())).fetch_alone(&fetching).await;
    let spooled = fetched.map_err(|failure| match &waits {
        _ if failure.code != Code::NotInArchive => failure,
        Ok(false) => failure,
        Ok(true) => Failure::new(
            Code::NotYetArchived,
            format!("{name} is not in the repository, but lies in the archive directory"),
        ),
        Err(reason) => Failure { code: Code::NotYetArchived, ..reason.clone() },
    })?;
    let (to, name, private) = (to.clone(), *name, request.private.clone());
    let look = move || {
        if let (ArchiveFileName::Segment(segment), Some(private)) = (name, &private) {
            keep_from_tablespaces(&spooled.file, segment, private)?;
        }
        Ok::<_, Failure>(spooled)
    };
    let mut spooled = tokio::task::spawn_blocking(look).await??;
    let put = move || {
        // What never had a name can't be renamed over something: it's copied, which on many file systems shares the blocks.
        let mut named = tempfile::Builder::new().prefix("pgsidecar-get.").tempfile_in(&directory)?;
        spooled.file.seek(SeekFrom::Start(0))?;
        io::copy(&mut spooled.file, named.as_file_mut())?;
        named.persist(&to).map_err(|error| error.error)?;
        Ok::<(), io::Error>(())
    };
    let shown = request.to.display().to_string();
    tokio::task::spawn_blocking(put).await?.map_err(|error| Failure::io(format!("writing {shown}"), &error))
}

/// Refuses a segment in which a tablespace is created where something lies: replay would make it there, and write to and
/// remove what is another server's. An empty directory was made for it.
fn keep_from_tablespaces(mut file: &File, segment: SegmentName, private: &Private) -> Result<(), Failure> {
    let failed = |error: io::Error| Failure::io(format!("looking for tablespaces in {segment}"), &error);
    // Without notes of the segment before, this is the first one, or read for its checkpoint alone.
    let noted: Option<Notes> = fs::read(&private.notes).ok().and_then(|notes| serde_json::from_slice(&notes).ok());
    let length = file.metadata().map_err(failed)?.len();
    let size = WalSegmentSize::new(length);
    let follows = |notes: &Notes| {
        let next = size.and_then(|size| Some(notes.segment.number(size)? + 1 == segment.number(size)?));
        next.unwrap_or_default()
    };
    let mut scan = TablespaceScan::new(private.from, noted.filter(follows).and_then(|notes| notes.cut));
    file.seek(SeekFrom::Start(0)).map_err(failed)?;
    let mut header = [0; WalHeader::LEN];
    file.read_exact(&mut header).map_err(failed)?;
    let header = WalHeader::parse(&header).map_err(|error| damaged(&segment.to_string(), &error.to_string()))?;
    file.seek(SeekFrom::Start(0)).map_err(failed)?;
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let mut page = vec![0; usize::try_from(header.block_size).unwrap_or(8192)];
    for _ in 0..length / page.len() as u64 {
        reader.read_exact(&mut page).map_err(failed)?;
        scan.page(&page);
    }
    let (found, cut) = scan.finish();
    for creation in found {
        if is_in_use(Path::new(&creation.location)) {
            return Err(Failure::new(
                Code::TargetDirectory,
                format!(
                    "{segment} creates a tablespace at {} (record at {}), where something lies here: {PRIVATE_REFUSAL}",
                    creation.location, creation.lsn
                ),
            ));
        }
    }
    let notes = serde_json::to_vec(&Notes { segment, cut }).map_err(Failure::internal)?;
    let temporary = private.notes.with_extension("tmp");
    fs::write(&temporary, notes).and_then(|()| fs::rename(&temporary, &private.notes)).map_err(failed)
}

/// The end of the message with which a private server's WAL is refused.
pub const PRIVATE_REFUSAL: &str = "a private server must not come there";

fn is_in_use(location: &Path) -> bool {
    if location.as_os_str().is_empty() {
        return false;
    }
    match fs::read_dir(location) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_behind_is_told_on_whatever_timeline() {
        let behind = |segment: &str, through: &str| lies_behind(segment.parse().unwrap(), through.parse().unwrap());
        assert!(!behind("000000010000000000000007", "000000010000000000000007"));
        assert!(!behind("000000020000000000000007", "000000010000000000000007"));
        assert!(behind("000000010000000000000008", "000000020000000000000007"));
        assert!(behind("000000010000000100000000", "0000000100000000000000FF"));
    }
}
