//! PostgreSQL's client programs, run to their end. One that nobody waits for any more is killed.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use crate::failure::{Code, Failure};

const POLL: Duration = Duration::from_millis(50);
/// How much of what a program has said is told.
const TOLD_BYTES: u64 = 64 << 10;

/// What a program's environment must not have: it would outrank what it's told, and may name the live server.
pub(crate) fn without_libpq(command: &mut Command) -> &mut Command {
    for (name, _) in std::env::vars_os() {
        let name = name.as_encoded_bytes();
        if name.starts_with(b"PG") && !name.starts_with(b"PGSIDECAR_") {
            command.env_remove(String::from_utf8_lossy(name).as_ref());
        }
    }
    command
}

/// What was said and how it ended.
#[derive(Debug)]
pub struct Ended {
    /// The exit status.
    pub status: ExitStatus,
    /// The end of what it said on stderr.
    pub stderr: String,
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a program. Its stderr goes to a file `log`.
///
/// # Errors
/// If it can't be started.
///
/// # Cancellation
/// Dropped, the program is killed.
pub async fn run(command: &mut Command, log: &Path) -> Result<Ended, Failure> {
    let program = PathBuf::from(command.get_program());
    let failed = |error: io::Error| Failure::io(format!("running {}", program.display()), &error);
    command.stdin(Stdio::null()).stderr(fs::File::create(log).map_err(failed)?);
    let mut running = Running(command.spawn().map_err(failed)?);
    let status = loop {
        match running.0.try_wait().map_err(failed)? {
            Some(status) => break status,
            None => tokio::time::sleep(POLL).await,
        }
    };
    Ok(Ended { status, stderr: tail(log).map_err(failed)? })
}

/// The end of a text file.
pub(super) fn tail(path: &Path) -> io::Result<String> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = fs::File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TOLD_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(TOLD_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).trim_end().to_owned())
}

/// A program that ended in a way that it shouldn't.
pub(super) fn ended_badly(name: &str, ended: &Ended) -> Failure {
    let said = ended.stderr.lines().rev().take(5).collect::<Vec<_>>();
    let said: Vec<&str> = said.into_iter().rev().collect();
    let said = if said.is_empty() { "it said nothing".to_owned() } else { said.join("; ") };
    Failure::new(Code::PostgresUnavailable, format!("{name} ended with {}: {said}", ended.status))
}
