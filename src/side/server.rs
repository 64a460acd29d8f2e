//! The private server's process.
//!
//! It must not outlive us, however we end. So a shell stands between: it starts the server, and a part of it reads from a
//! pipe whose other end only we hold. When we are gone, whatever the way, the kernel closes the pipe, and the shell sends
//! the server SIGQUIT. (PostgreSQL itself doesn't notice that whoever started it is gone.)

use std::{
    fs,
    io::{self, Read, Seek, SeekFrom},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use tokio_postgres::error::SqlState;

use super::{
    Observer,
    program::without_libpq,
    scratch::end_server,
    sql::{SideSession, refused},
    tablespaces,
};
use crate::{
    failure::{Code, Failure},
    wal::get::PRIVATE_REFUSAL,
};

/// Starts the server, and ends it when stdin ends. `read` returns only then: nothing is ever written.
const KEEPER: &str = r#"exec 3<&0
"$@" 3<&- </dev/null &
server=$!
{ read -r _ <&3; kill -QUIT "$server"; } 2>/dev/null &
keeper=$!
wait "$server"; code=$?
kill "$keeper" 2>/dev/null
exit "$code""#;

const POLL: Duration = Duration::from_millis(100);
/// How long a server may take to stop in order: it writes all its buffers.
const STOP_PATIENCE: Duration = Duration::from_secs(600);
/// How many lines of its log are remembered.
const LINES: usize = 200;
/// How much of the log is read at a time.
const READ_BYTES: u64 = 1 << 20;

/// A server that runs. Dropped, it's ended at once.
pub struct SideServer {
    run: PathBuf,
    data: PathBuf,
    child: Child,
    /// Open for as long as the server may run.
    alive: Option<ChildStdin>,
    log: Log,
}

impl SideServer {
    /// Starts it.
    ///
    /// # Errors
    /// If that can't be done.
    pub fn start(
        run: &Path,
        data: &Path,
        postgres: &Path,
        guards: &[(&'static str, String)],
        environment: &[(&'static str, String)],
    ) -> Result<SideServer, Failure> {
        let failed = |error: io::Error| Failure::io(format!("starting {}", postgres.display()), &error);
        let log_path = run.join("server.log");
        let log = fs::File::create(&log_path).map_err(failed)?;
        let mut command = Command::new("sh");
        command.args(["-c", KEEPER, "sh"]).arg(postgres).arg("-D").arg(data);
        command.arg("-c").arg(format!("config_file={}", run.join("postgresql.conf").display()));
        // A file's would outrank -D.
        command.arg("-c").arg(format!("data_directory={}", data.display()));
        for (name, value) in guards {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        without_libpq(&mut command)
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .env("LC_MESSAGES", "C")
            .current_dir(run)
            // Ctrl-C is for us: we end it.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(log.try_clone().map_err(failed)?)
            .stderr(log);
        let mut child = command.spawn().map_err(failed)?;
        let alive = child.stdin.take();
        let log = Log { path: log_path, read: 0, rest: String::new(), lines: Vec::new() };
        Ok(SideServer { run: run.to_owned(), data: data.to_owned(), child, alive, log })
    }

    /// Waits until recovery has ended and it takes connections. Answers with a session.
    ///
    /// # Errors
    /// Why recovery didn't end where it should, by its log.
    pub async fn recovered(
        &mut self,
        databases: &[&str],
        users: &[&str],
        through: &str,
        observer: &dyn Observer,
    ) -> Result<SideSession, Failure> {
        let mut restored = 0u64;
        loop {
            tablespaces::check_within(&self.run, &self.data)?;
            let ended = self.child.try_wait().map_err(|error| Failure::io("waiting for the server", &error))?;
            for line in self.log.new_lines() {
                if let Some(segment) =
                    line.split_once("restored log file \"").and_then(|(_, rest)| rest.split('"').next())
                {
                    restored += 1;
                    observer.doing(&format!("replaying WAL: {restored} files, now {segment}, up to {through}"));
                }
            }
            if let Some(status) = ended {
                return Err(self.log.explain(status));
            }
            if let Some(session) = self.try_session(databases, users).await? {
                return Ok(session);
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// A session, in the first of the databases that there is, as the first of the users. `None`: not yet.
    async fn try_session(&self, databases: &[&str], users: &[&str]) -> Result<Option<SideSession>, Failure> {
        let mut refusal = None;
        for user in users {
            for database in databases {
                let error = match SideSession::connect(&self.run, database, user).await {
                    Ok(session) => return Ok(Some(session)),
                    Err(error) => error,
                };
                match error.code() {
                    // It doesn't listen, starts, or has gone.
                    None => return Ok(None),
                    Some(code) if *code == SqlState::CANNOT_CONNECT_NOW => return Ok(None),
                    Some(_) => refusal = refusal.or(Some(refused(&error))),
                }
            }
        }
        Err(refusal.unwrap_or_else(|| Failure::internal("nobody to connect as")).hint(
            "PGUSER names a role that may log in, and PGDATABASE a database; both as they were at the recovery target.",
        ))
    }

    /// Stops it in order, so that its files are consistent.
    ///
    /// # Errors
    /// If it doesn't.
    pub async fn stop(mut self) -> Result<(), Failure> {
        if let Some(pid) = self.postmaster() {
            let _ = kill_process(pid, Signal::INT);
        }
        let until = Instant::now() + STOP_PATIENCE;
        loop {
            match self.child.try_wait().map_err(|error| Failure::io("waiting for the server", &error))? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => return Err(self.log.explain(status)),
                None if Instant::now() > until => {
                    return Err(Failure::new(Code::Timeout, "the private server did not stop within ten minutes"));
                }
                None => tokio::time::sleep(POLL).await,
            }
        }
    }

    /// The server's own process, if the file that tells it speaks of one on this directory.
    fn postmaster(&self) -> Option<Pid> {
        let file = fs::read_to_string(self.data.join("postmaster.pid")).ok()?;
        let pid: i32 = file.lines().next()?.trim().parse().ok()?;
        let there = fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == self.data);
        there.then(|| Pid::from_raw(pid)).flatten()
    }
}

impl Drop for SideServer {
    fn drop(&mut self) {
        drop(self.alive.take());
        // Each of these is at most a few seconds: the scratch directory is removed next.
        end_server(&self.data);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The server's log, read as it grows.
struct Log {
    path: PathBuf,
    read: u64,
    rest: String,
    /// The last of what was read.
    lines: Vec<String>,
}

impl Log {
    fn new_lines(&mut self) -> Vec<String> {
        let mut bytes = Vec::new();
        let read = fs::File::open(&self.path).and_then(|mut file| {
            file.seek(SeekFrom::Start(self.read))?;
            file.take(READ_BYTES).read_to_end(&mut bytes)
        });
        self.read += read.unwrap_or_default() as u64;
        self.rest += &String::from_utf8_lossy(&bytes);
        let Some((whole, rest)) = self.rest.rsplit_once('\n') else { return Vec::new() };
        let lines: Vec<String> = whole.lines().map(str::to_owned).collect();
        self.rest = rest.to_owned();
        self.lines.extend(lines.iter().cloned());
        self.lines.drain(..self.lines.len().saturating_sub(LINES));
        lines
    }

    /// Why the server has ended, as far as its log tells.
    fn explain(&mut self, status: ExitStatus) -> Failure {
        while !self.new_lines().is_empty() {}
        explain(&self.lines, &status.to_string())
    }
}

/// Why a server has ended that shouldn't have, by the last lines of its log.
fn explain(lines: &[String], status: &str) -> Failure {
    let find = |part: &str| lines.iter().rev().find(|line| line.contains(part));
    let last = ["PANIC:  ", "FATAL:  "].iter().find_map(|severity| find(severity));
    let last = last.or(lines.last()).map_or("its log is empty", String::as_str);
    let ended = |code, what: &str| Failure::new(code, format!("the restored server ended ({status}): {what}"));
    if let Some(path) = find("directory \"").filter(|line| line.ends_with("\" does not exist")) {
        let location = path.split('"').nth(1).unwrap_or_default();
        return tablespaces::refused(&format!("replay comes to a tablespace at {location}, which doesn't exist here"));
    }
    if find("exit code 200").is_some() {
        if let Some(refused) = find(PRIVATE_REFUSAL) {
            return tablespaces::refused(refused.trim_start_matches("pgsidecar: error: "));
        }
        if let Some(damaged) = find("in the repository is damaged") {
            return ended(Code::Damaged, damaged.trim_start_matches("pgsidecar: error: "));
        }
        let why = find("pgsidecar: error: ").map_or(last, |line| line.trim_start_matches("pgsidecar: error: "));
        return ended(Code::StoreUnavailable, &format!("its WAL could not be had: {why}"));
    }
    if last.contains("recovery ended before configured recovery target was reached") {
        return ended(Code::TargetUnreachable, "recovery ended before the target was reached")
            .hint("The WAL that there is has nothing at or behind the target. Choose an earlier one, or none.");
    }
    if last.contains("could not access file \"") || last.contains("unrecognized configuration parameter") {
        return ended(Code::Misconfigured, last)
            .hint("Run it where the database's own PostgreSQL is installed, with its extensions; look at --set.");
    }
    ended(Code::Damaged, last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_tells_why_a_server_ended() {
        let explained = |log: &str| {
            let lines: Vec<String> = log.lines().map(str::to_owned).collect();
            let failure = explain(&lines, "exit status: 1");
            (failure.code, failure.message)
        };
        let (code, message) = explained(
            "pgsidecar: error: the store does not answer\nFATAL:  could not restore file \"0000000100000000000000A1\" from archive: child process exited with exit code 200\nLOG:  database system is shut down",
        );
        assert_eq!(code, Code::StoreUnavailable);
        assert!(message.contains("the store does not answer"), "{message}");
        let (code, _) =
            explained("FATAL:  recovery ended before configured recovery target was reached\nLOG:  shutting down");
        assert_eq!(code, Code::TargetUnreachable);
        let (code, message) =
            explained("FATAL:  directory \"/mnt/fast\" does not exist\nHINT:  Create this directory.");
        assert!(code == Code::TargetDirectory && message.contains("/mnt/fast"), "{message}");
        let (code, message) =
            explained("PANIC:  WAL contains references to invalid pages\nLOG:  startup process was terminated");
        assert!(code == Code::Damaged && message.contains("invalid pages"), "{message}");
        assert_eq!(
            explained("FATAL:  could not access file \"timescaledb\": No such file or directory").0,
            Code::Misconfigured
        );
    }
}
