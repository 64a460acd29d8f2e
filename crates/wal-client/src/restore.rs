//! `restore_command`: fetches one file of the archive from the daemon.
//!
//! To PostgreSQL, 1 to 125 means 'there is no such file': it ends recovery there and may promote. Above 125 it stops
//! (`RestoreArchivedFile` in xlogarchive.c). So 1 is said only when the daemon has answered, completely, that
//! the store doesn't have the file, and 200 for everything else. An outage is waited for first.
//!
//! On a standby it is the other way round: 200 would end a server that streams happily, and 1 is harmless there, for it
//! asks again every few seconds. Where `standby.signal` exists, 'can't tell' is said as 1, and at once,
//! so that the standby can go on to its primary. The daemon is told of it when a timeline history is asked for: for a
//! standby one that it has seen before will do.
//!
//! There is a moment in between, the end of a promotion: PostgreSQL 15 (not 17) removes `standby.signal` or
//! `recovery.signal` and then asks for the history of the timeline that it leaves. If 200 ended the server there, it
//! would come up as a primary on that timeline. It has what it asks for in pg_wal, and takes it from there if it's told
//! 1 (`StartupXLOG`, `writeTimeLineHistory` and `RestoreArchivedFile`): so 'can't tell' is said as 1 there as well.
//!
//! The daemon may leave a segment in pg_wal under a name of its own, where this is the directory that it shares; then
//! only a rename is left to do. That it's done here, not there, is what keeps an answer to a process that was killed
//! from landing under a name that its successor has been promised.
//!
//! The file appears under its name only when it is whole. It isn't synced: PostgreSQL syncs what it keeps of it
//! and, after a crash, asks the archive again.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Write},
    net::SocketAddr,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use crate::{
    World,
    args::RestoreRequest,
    http::{CONNECT_TIMEOUT, Client, Response},
    json::ErrorBody,
    problem::Problem,
};

/// The store has said that it doesn't have the file.
const EXIT_NOT_IN_ARCHIVE: u8 = 1;
/// Above 125, and PostgreSQL stops instead of taking it for the end of the archive. Its log would call 126 'command not
/// executable' and 127 'command not found', as a shell does, and send people looking for the wrong fault; from
/// 129 on, up to 192 on Linux, a code is 128 plus the number of a signal (143, SIGTERM, counts as a shutdown).
/// This one means nothing else.
const EXIT_CANNOT_TELL: u8 = 200;
/// The daemon's word for a definite 'not there'. A 404 without it may be anybody's.
const NOT_IN_ARCHIVE: &str = "not_in_archive";

/// What the names begin with of files that the daemon leaves in pg_wal.
const HANDED_OVER: &str = "pgsidecar-spool.";

const RETRY_EVERY: Duration = Duration::from_secs(1);
/// How long the daemon may say nothing while it fetches from the store.
const SILENCE: Duration = Duration::from_secs(60);
/// The same on a standby, which could be streaming instead.
const SILENCE_ON_STANDBY: Duration = Duration::from_secs(10);
const BUFFER_BYTES: usize = 256 * 1024;

/// What the daemon has answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Answer {
    Found,
    NotInArchive,
    /// The daemon has left it in a directory that isn't the one it's wanted in.
    Elsewhere,
}

/// Restores the file and returns the exit code: 0 found, 1 not in the archive, otherwise [`cannot_tell`].
pub fn restore(request: &RestoreRequest, address: SocketAddr, timeout: Duration, world: &mut World<'_>) -> u8 {
    match fetch_through_outages(request, address, timeout, world) {
        Ok(Answer::Found) => 0,
        Ok(Answer::NotInArchive) => EXIT_NOT_IN_ARCHIVE,
        Ok(Answer::Elsewhere) => cannot_tell(world.cwd),
        Err(problem) => {
            problem.report(&format!("restore {}", request.file), "", world);
            if ends_promotion(request, world.cwd) { EXIT_NOT_IN_ARCHIVE } else { cannot_tell(world.cwd) }
        }
    }
}

/// The exit code for 'can't tell' in this data directory.
pub fn cannot_tell(cwd: &Path) -> u8 {
    if is_standby(cwd) { EXIT_NOT_IN_ARCHIVE } else { EXIT_CANNOT_TELL }
}

/// Whether the server would ask again. If in doubt not: a server that stops loses no data.
fn is_standby(cwd: &Path) -> bool {
    cwd.join("standby.signal").exists()
}

/// Whether the server is about to begin its new timeline, and has the history that it asks for. The first timeline has
/// none, and its server asks all the same.
fn ends_promotion(request: &RestoreRequest, cwd: &Path) -> bool {
    let signalled = ["standby.signal", "recovery.signal"].iter().any(|name| cwd.join(name).exists());
    let name = request.file.to_string();
    let has_it = || name == "00000001.history" || cwd.join("pg_wal").join(&name).exists();
    request.file.is_history() && !signalled && has_it()
}

/// Tries until the deadline. The log gets a line when the waiting begins and one when it ends.
fn fetch_through_outages(
    request: &RestoreRequest,
    address: SocketAddr,
    timeout: Duration,
    world: &mut World<'_>,
) -> Result<Answer, Problem> {
    let started = Instant::now();
    let deadline = started + timeout;
    let standby = is_standby(world.cwd);
    let at_once = standby || ends_promotion(request, world.cwd);
    let silence = if at_once { SILENCE_ON_STANDBY } else { SILENCE };
    let client = Client { address, deadline, silence, connect_timeout: CONNECT_TIMEOUT };
    let target = world.cwd.join(&request.to);

    // Not on a standby: what comes next is what its primary says.
    let tail = request.tail && !standby;
    let mut directory = if request.file.is_segment() { directory_of(&target) } else { None };
    let mut waiting = false;
    loop {
        let problem = match fetch(request, Terms { directory, tail, standby }, &client, &target) {
            // It can't be reached where it was left: then it has to be sent.
            Ok(Answer::Elsewhere) => {
                directory = None;
                continue;
            }
            Ok(answer) => {
                if waiting {
                    world.report(&format!(
                        "restore {}: answered after {} s",
                        request.file,
                        started.elapsed().as_secs()
                    ));
                }
                return Ok(answer);
            }
            Err(problem) => problem,
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if at_once || !problem.transient || left <= RETRY_EVERY {
            return Err(problem);
        }
        if !waiting {
            waiting = true;
            let then = format!("; trying again for up to {} s", left.as_secs());
            problem.report(&format!("restore {}", request.file), &then, world);
        }
        thread::sleep(RETRY_EVERY);
    }
}

/// What the daemon is told beside the name.
#[derive(Clone, Copy)]
struct Terms {
    /// Where the file may be left.
    directory: Option<u64>,
    /// The end of a stopped server's WAL will do.
    tail: bool,
    /// A standby asks.
    standby: bool,
}

/// Asks once.
fn fetch(request: &RestoreRequest, terms: Terms, client: &Client, target: &Path) -> Result<Answer, Problem> {
    let Terms { directory, tail, standby } = terms;
    let query = [
        request.system_identifier.map(|id| format!("system-identifier={id}")),
        directory.map(|inode| format!("directory={inode}")),
        tail.then(|| "tail=yes".to_owned()),
        (standby && request.file.is_history()).then(|| "standby=yes".to_owned()),
    ];
    let query = query.into_iter().flatten().collect::<Vec<_>>().join("&");
    let query = if query.is_empty() { query } else { format!("?{query}") };
    let response = client
        .send("GET", &format!("/v1/wal/{}{query}", request.file))
        .map_err(|error| Problem::from_http(&error, client.address))?;
    match (response.status(), response.file()) {
        (200, Some(name)) if directory.is_some() => Ok(take(target, name)),
        _ => answer(response, client, target),
    }
}

/// The inode of the directory that a file goes to.
fn directory_of(target: &Path) -> Option<u64> {
    let directory = target.parent()?;
    fs::metadata(directory).ok().filter(fs::Metadata::is_dir).map(|meta| meta.ino())
}

/// Takes the file that the daemon has left beside the target.
fn take(target: &Path, name: &str) -> Answer {
    let plain = name.starts_with(HANDED_OVER) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.".contains(&b));
    let left = target.with_file_name(name);
    let whole = || fs::symlink_metadata(&left).is_ok_and(|meta| meta.is_file() && meta.len() > 0);
    if plain && whole() && fs::rename(&left, target).is_ok() { Answer::Found } else { Answer::Elsewhere }
}

/// What an answer says that brings the file along, if there is one.
fn answer(response: Response, client: &Client, target: &Path) -> Result<Answer, Problem> {
    match response.status() {
        200 => receive(response, client.address, target).map(|()| Answer::Found),
        404 => {
            let body = response.error_body();
            let error = ErrorBody::parse(&body.bytes);
            match error.code.as_deref() {
                Some(NOT_IN_ARCHIVE) if body.complete => Ok(Answer::NotInArchive),
                Some(NOT_IN_ARCHIVE) => Err(Problem::transient("the answer was cut off".to_owned())),
                _ => Err(Problem::from_answer(404, error, client.address)),
            }
        }
        _ => Err(Problem::from_response(response, client.address)),
    }
}

/// Writes the body under a temporary name and renames it when it is whole.
fn receive(mut response: Response, address: SocketAddr, target: &Path) -> Result<(), Problem> {
    match response.content_length() {
        None => return Err(Problem::lasting(format!("{address} answered with a file of unknown length"))),
        // A marker, a placeholder, a failed upload: no file of the archive is empty.
        Some(0) => return Err(Problem::lasting(format!("{address} answered with an empty file"))),
        Some(_) => {}
    }
    let mut file = TempFile::beside(target)?;
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let read = response.read_body(&mut buffer).map_err(|error| Problem::from_http(&error, address))?;
        if read == 0 {
            return file.rename_to(target);
        }
        file.file.write_all(&buffer[..read]).map_err(|error| local("write", &file.path, &error))?;
    }
}

/// What is written before it is whole. Removed unless renamed; if the process is killed it stays, and the next
/// one for the same file takes it over.
struct TempFile {
    file: File,
    path: PathBuf,
    renamed: bool,
}

impl TempFile {
    /// Creates `<target>.pgsidecar-tmp`, empty. Only one process at a time gets it: a helper that has outlived a
    /// killed server must not write into the file of its successor.
    fn beside(target: &Path) -> Result<TempFile, Problem> {
        let mut name = target.as_os_str().to_owned();
        name.push(".pgsidecar-tmp");
        let path = PathBuf::from(name);
        let opened = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = opened.map_err(|error| local("create", &path, &error))?;
        let taken = || Problem::transient(format!("another process is writing {}", path.display()));
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => return Err(taken()),
            // A file system without locks: rather the tiny risk than no restore.
            Err(TryLockError::Error(_)) | Ok(()) => {}
        }
        // The other one may have renamed or removed it between the two calls.
        let same = fs::metadata(&path).and_then(|there| Ok(there.ino() == file.metadata()?.ino())).unwrap_or(false);
        if !same {
            return Err(taken());
        }
        file.set_len(0).map_err(|error| local("truncate", &path, &error))?;
        Ok(TempFile { file, path, renamed: false })
    }

    fn rename_to(mut self, target: &Path) -> Result<(), Problem> {
        fs::rename(&self.path, target).map_err(|error| local("rename", &self.path, &error))?;
        self.renamed = true;
        Ok(())
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        if !self.renamed {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Not worth waiting: a full disk or a wrong path stays what it is.
fn local(verb: &str, path: &Path, error: &io::Error) -> Problem {
    Problem::lasting(format!("can't {verb} {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, Run, Server, TempDir, closed_port, pgdata, run_in, standby};
    use std::os::unix::fs::PermissionsExt;

    const SEGMENT: &str = "000000010000000000000042";
    const HISTORY: &str = "00000002.history";

    fn restore_in(data: &TempDir, address: SocketAddr, timeout: &str, file: &str) -> Run {
        let args = ["restore", "--timeout", timeout, file, "pg_wal/RECOVERYXLOG"];
        run_in(&args, &[("PGSIDECAR_ADDRESS", &address.to_string())], data)
    }

    /// One answer, then nobody listens any more.
    fn code_of(answer: testing::Answer) -> u8 {
        let data = pgdata();
        let code = restore_in(&data, Server::start([answer]).address, "1", SEGMENT).code;
        assert_eq!(data.files("pg_wal"), [""; 0]);
        code
    }

    fn found(body: &[u8]) -> testing::Answer {
        let mut answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len()).into_bytes();
        answer.extend_from_slice(body);
        testing::Answer::daemon(answer)
    }

    #[test]
    fn what_is_found_is_whole_and_private() {
        let data = pgdata();
        let body: Vec<u8> = (0..3_000_017_u32).map(|i| i.to_le_bytes()[1] ^ i.to_le_bytes()[0]).collect();
        let server = Server::start([found(&body)]);
        let run = restore_in(&data, server.address, "5", SEGMENT);
        assert_eq!((run.code, run.stderr.as_str()), (0, ""));
        assert_eq!(data.files("pg_wal"), ["RECOVERYXLOG"]);
        let path = data.path().join("pg_wal/RECOVERYXLOG");
        assert!(fs::read(&path).unwrap() == body);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(server.requests()[0].starts_with("GET /v1/wal/000000010000000000000042?directory="));
    }

    #[test]
    fn what_a_killed_predecessor_left_is_overwritten() {
        let data = pgdata();
        fs::write(data.path().join("pg_wal/RECOVERYXLOG.pgsidecar-tmp"), "longer than the file").unwrap();
        assert_eq!(restore_in(&data, Server::start([found(b"file")]).address, "5", SEGMENT).code, 0);
        assert_eq!(fs::read(data.path().join("pg_wal/RECOVERYXLOG")).unwrap(), b"file");
        assert_eq!(data.files("pg_wal"), ["RECOVERYXLOG"]);
    }

    #[test]
    fn what_was_left_in_pg_wal_is_taken_by_a_rename() {
        let data = pgdata();
        let left = |name: &str| {
            testing::Answer::daemon(format!("HTTP/1.1 200 OK\r\nPgsidecar-File: {name}\r\nContent-Length: 0\r\n\r\n"))
        };
        let path = data.path().join("pg_wal/pgsidecar-spool.7.1");
        fs::write(&path, "segment").unwrap();
        let inode = fs::metadata(data.path().join("pg_wal")).unwrap().ino();
        let server = Server::start([left("pgsidecar-spool.7.1")]);
        assert_eq!(restore_in(&data, server.address, "5", SEGMENT).code, 0);
        assert_eq!(data.files("pg_wal"), ["RECOVERYXLOG"]);
        assert!(server.requests()[0].starts_with(&format!("GET /v1/wal/{SEGMENT}?directory={inode} HTTP/1.1")));
        // What isn't there, is empty, or isn't one of these names is asked for again, to be sent.
        fs::write(data.path().join("pg_wal/pgsidecar-spool.7.3"), "").unwrap();
        for name in ["pgsidecar-spool.7.2", "pgsidecar-spool.7.3", "../PG_VERSION", "pgsidecar-spool./../RECOVERYXLOG"]
        {
            let server = Server::start([left(name), found(b"sent")]);
            assert_eq!(restore_in(&data, server.address, "5", SEGMENT).code, 0, "{name}");
            assert_eq!(fs::read(data.path().join("pg_wal/RECOVERYXLOG")).unwrap(), b"sent");
            assert!(server.requests()[1].starts_with(&format!("GET /v1/wal/{SEGMENT} HTTP/1.1")), "{name}");
        }
    }

    #[test]
    fn the_tail_is_asked_for_except_on_a_standby() {
        for (data, query) in [(pgdata(), "&tail=yes"), (standby(), "")] {
            let server = Server::start([testing::Answer::error(404, NOT_IN_ARCHIVE)]);
            let address = server.address.to_string();
            let args = ["restore", "--address", &address, "--tail", SEGMENT, "pg_wal/RECOVERYXLOG"];
            assert_eq!(run_in(&args, &[], &data).code, 1);
            let inode = fs::metadata(data.path().join("pg_wal")).unwrap().ino();
            let start = format!("GET /v1/wal/{SEGMENT}?directory={inode}{query} HTTP/1.1");
            assert!(server.requests()[0].starts_with(&start), "{}", server.requests()[0]);
        }
    }

    #[test]
    fn that_a_standby_asks_is_said_with_histories_alone() {
        for (data, file, told) in [
            (standby(), HISTORY, "?standby=yes HTTP/1.1"),
            (pgdata(), HISTORY, " HTTP/1.1"),
            (standby(), "00000002.histories", " HTTP/1.1"),
        ] {
            let server = Server::start([found(b"1\t0/1000000\tx\n")]);
            assert_eq!(restore_in(&data, server.address, "1", file).code, 0);
            let start = format!("GET /v1/wal/{file}{told}\r\n");
            assert!(server.requests()[0].starts_with(&start), "{}", server.requests()[0]);
        }
        let data = standby();
        let server = Server::start([testing::Answer::error(404, NOT_IN_ARCHIVE)]);
        assert_eq!(restore_in(&data, server.address, "1", SEGMENT).code, 1);
        assert!(!server.requests()[0].contains("standby"), "{}", server.requests()[0]);
    }

    #[test]
    fn two_processes_do_not_write_one_file() {
        let data = pgdata();
        let path = data.path().join("pg_wal/RECOVERYXLOG.pgsidecar-tmp");
        let other = File::create(&path).unwrap();
        other.lock().unwrap();
        let run = restore_in(&data, Server::start([found(b"file")]).address, "1", SEGMENT);
        assert_eq!((run.code, data.files("pg_wal").len()), (200, 1));
        assert!(run.stderr.contains("another process"), "{}", run.stderr);
    }

    #[test]
    fn another_database_system_is_asked_for_by_its_identifier() {
        let server = Server::start([testing::Answer::error(404, NOT_IN_ARCHIVE)]);
        let address = server.address.to_string();
        let args = ["restore", "--address", &address, HISTORY, "x", "--system-identifier", "7575002186531184001"];
        assert_eq!(run_in(&args, &[], &pgdata()).code, 1);
        let start = "GET /v1/wal/00000002.history?system-identifier=7575002186531184001 HTTP/1.1\r\n";
        assert!(server.requests()[0].starts_with(start));
    }

    #[test]
    fn only_a_definite_404_is_the_end_of_the_archive() {
        let error = |status, code| code_of(testing::Answer::error(status, code));
        assert_eq!(error(404, NOT_IN_ARCHIVE), 1);
        assert_eq!(error(404, "no_such_path"), 200);
        for status in [400, 401, 403, 409, 410, 429, 500, 501, 502, 503, 504] {
            assert_eq!(error(status, NOT_IN_ARCHIVE), 200, "{status}");
        }
        let body = r#"{"error":{"code":"not_in_archive"}}"#;
        let whole = format!("HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n23\r\n{body}\r\n0\r\n\r\n");
        assert_eq!(code_of(testing::Answer::daemon(whole.as_str())), 1);
        for unclear in [
            // Not the daemon's word.
            "HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\nNot Found".to_owned(),
            "HTTP/1.1 404 Not Found\r\nContent-Length: 14\r\n\r\nnot_in_archive".to_owned(),
            "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".to_owned(),
            // Cut, or not known to be whole.
            format!("HTTP/1.1 404 Not Found\r\nContent-Length: 99\r\n\r\n{body}"),
            format!("HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n23\r\n{body}\r\n"),
            format!("HTTP/1.1 404 Not Found\r\n\r\n{body}"),
            // No answer to the question.
            "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n".to_owned(),
            "HTTP/1.1 204 No Content\r\n\r\n".to_owned(),
            "garbage\r\n\r\n".to_owned(),
            String::new(),
        ] {
            assert_eq!(code_of(testing::Answer::daemon(unclear.as_str())), 200, "{unclear}");
        }
    }

    #[test]
    fn only_the_daemon_of_this_protocol_is_believed() {
        let body = r#"{"error":{"code":"not_in_archive"}}"#;
        let (foreign, other) = ("isn't pgsidecar", "speaks protocol 2, ");
        let (who, republished) =
            ("does something other than pgsidecar listen there?", "the daemon republishes the helper");
        for (header, message, hint) in [("Server: x", foreign, who), ("Pgsidecar-Protocol: 2", other, republished)] {
            for answer in [
                format!("HTTP/1.1 200 OK\r\n{header}\r\nContent-Length: 3\r\n\r\nabc"),
                format!("HTTP/1.1 404 Not Found\r\n{header}\r\nContent-Length: {}\r\n\r\n{body}", body.len()),
                format!("HTTP/1.1 503 Service Unavailable\r\n{header}\r\nContent-Length: 0\r\n\r\n"),
            ] {
                let data = pgdata();
                // A second attempt would succeed.
                let server = Server::start([testing::Answer::bytes(answer.as_str()), found(b"segment")]);
                let run = restore_in(&data, server.address, "30", SEGMENT);
                assert_eq!((run.code, server.requests().len()), (200, 1), "{answer}");
                assert_eq!(data.files("pg_wal"), [""; 0]);
                let lines: Vec<&str> = run.stderr.lines().collect();
                assert!(lines.len() == 2 && lines[0].contains(message) && lines[1].contains(hint), "{lines:?}");
            }
        }
    }

    #[test]
    fn a_file_that_may_not_be_whole_is_no_file() {
        for answer in [
            "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
            "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n",
            "HTTP/1.1 200 OK\r\n\r\nabc",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
            "HTTP/1.1 206 Partial Content\r\nContent-Length: 3\r\n\r\nabc",
        ] {
            assert_eq!(code_of(testing::Answer::daemon(answer)), 200, "{answer}");
        }
        let longer = testing::Answer::daemon("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcdef");
        let data = pgdata();
        assert_eq!(restore_in(&data, Server::start([longer]).address, "1", SEGMENT).code, 0);
        assert_eq!(fs::read(data.path().join("pg_wal/RECOVERYXLOG")).unwrap(), b"abc");
    }

    #[test]
    fn an_outage_is_waited_for_and_told_twice() {
        let data = pgdata();
        let unreachable = || testing::Answer::error(503, "repository_unreachable");
        let cut = testing::Answer::daemon("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc");
        let server = Server::start([unreachable(), unreachable(), cut, found(b"segment")]);
        let run = restore_in(&data, server.address, "30", SEGMENT);
        assert_eq!((run.code, server.requests().len()), (0, 4));
        assert_eq!(data.files("pg_wal"), ["RECOVERYXLOG"]);
        let lines: Vec<&str> = run.stderr.lines().collect();
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(lines[0].ends_with("(HTTP 503, repository_unreachable); trying again for up to 29 s"), "{}", lines[0]);
        assert!(lines[1].contains("restore 000000010000000000000042: answered after "), "{}", lines[1]);
    }

    #[test]
    fn an_outage_longer_than_the_deadline_stops_the_server() {
        let started = Instant::now();
        let run = restore_in(&pgdata(), closed_port(), "3", SEGMENT);
        assert_eq!(run.code, 200);
        let took = started.elapsed();
        assert!((Duration::from_secs(1)..Duration::from_secs(4)).contains(&took), "{took:?}");
        // Each time with its hint.
        assert_eq!(run.stderr.lines().count(), 4, "{}", run.stderr);
    }

    #[test]
    fn a_daemon_that_never_answers_is_left_at_the_deadline() {
        let started = Instant::now();
        assert_eq!(code_of(testing::Answer::BlackHole), 200);
        let stalled = "HTTP/1.1 200 OK\r\nPgsidecar-Protocol: 1\r\nContent-Length: 10\r\n\r\nabc";
        assert_eq!(code_of(testing::Answer::stall(stalled)), 200);
        assert!(started.elapsed() < Duration::from_secs(4));
    }

    #[test]
    fn a_standby_is_answered_at_once_and_lives_on() {
        let started = Instant::now();
        let data = standby();
        for file in [SEGMENT, HISTORY] {
            let run = restore_in(&data, closed_port(), "30", file);
            assert_eq!(run.code, 1);
            assert!(run.stderr.contains("no connection to pgsidecar"), "{}", run.stderr);
        }
        let server = Server::start([
            testing::Answer::error(503, "repository_unreachable"),
            testing::Answer::daemon("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"),
            testing::Answer::bytes("garbage"),
            testing::Answer::daemon("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc"),
            testing::Answer::bytes("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"),
            found(b"segment"),
        ]);
        let codes = [(); 6].map(|()| restore_in(&data, server.address, "30", SEGMENT).code);
        assert_eq!(codes, [1, 1, 1, 1, 1, 0]);
        assert!(started.elapsed() < Duration::from_secs(3));
    }

    #[test]
    fn at_the_end_of_a_promotion_what_the_server_has_itself_is_not_waited_for() {
        let started = Instant::now();
        let data = pgdata();
        fs::write(data.path().join("pg_wal").join(HISTORY), "1\t0/1000000\tx\n").unwrap();
        let restore = |file: &str| restore_in(&data, closed_port(), "2", file).code;
        assert_eq!((restore(HISTORY), restore("00000001.history")), (1, 1));
        assert!(started.elapsed() < Duration::from_secs(1));
        // What it doesn't have, and segments in any case.
        fs::write(data.path().join("pg_wal").join(SEGMENT), "").unwrap();
        assert_eq!((restore("00000003.history"), restore(SEGMENT)), (200, 200));
        // In a recovery it could be the end.
        fs::write(data.path().join("recovery.signal"), "").unwrap();
        assert_eq!((restore(HISTORY), restore("00000001.history")), (200, 200));
    }

    #[test]
    fn a_failure_on_the_local_disk_is_not_waited_for() {
        let started = Instant::now();
        let data = pgdata();
        let address = Server::start([found(b"segment")]).address.to_string();
        let run = run_in(&["restore", "--address", &address, SEGMENT, "nowhere/RECOVERYXLOG"], &[], &data);
        assert_eq!(run.code, 200);
        assert!(run.stderr.contains("can't create"), "{}", run.stderr);
        assert!(started.elapsed() < Duration::from_secs(1));
    }
}
