//! One WAL file from the repository, without a daemon: the `restore_command` of servers that have none beside them.
//!
//! Like the helper it never takes "can't tell" for "not there" (I5). Nothing is fetched ahead and nothing is known from
//! before: each call asks the store.

use std::{
    io::{self, Seek, SeekFrom},
    path::PathBuf,
    time::{Duration, Instant},
};

use pgsidecar_core::{ArchiveFileName, SegmentName};

use super::{
    directory::ArchiveDirectory,
    fetch::{FetchRequest, Fetcher},
};
use crate::{
    failure::{Code, Failure},
    repository::Repository,
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
    let mut spooled = fetched.map_err(|failure| match &waits {
        _ if failure.code != Code::NotInArchive => failure,
        Ok(false) => failure,
        Ok(true) => Failure::new(
            Code::NotYetArchived,
            format!("{name} is not in the repository, but lies in the archive directory"),
        ),
        Err(reason) => Failure { code: Code::NotYetArchived, ..reason.clone() },
    })?;
    let to = to.clone();
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
