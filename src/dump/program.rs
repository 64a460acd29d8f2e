//! Client programs whose output or input is a stream. What they say on stderr is told when they fail; one that nobody waits
//! for any more is killed.

use std::{
    io::{self, Read, Write},
    os::unix::process::CommandExt,
    process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
};

use rustix::process::{Pid, Signal};

use crate::failure::{Code, Failure};

/// How much of what a program says is kept: its beginning, where the reason is.
const KEPT_BYTES: usize = 16 << 10;
/// How many lines of it are told.
const TOLD_LINES: usize = 6;

/// A program that runs. Whoever holds a [`Killer`] of it can end it.
pub struct Program {
    name: String,
    child: Arc<Mutex<Child>>,
    stderr: Option<JoinHandle<String>>,
}

/// Kills the program when it's dropped, unless that has ended.
pub struct Killer(Arc<Mutex<Child>>);

impl Drop for Killer {
    fn drop(&mut self) {
        kill(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Kills the program with what it has started: a child of a wrapper's would hold the pipes open.
fn kill(child: &mut Child) {
    // Once it has been waited for, its number may be another's.
    if let Ok(None) = child.try_wait() {
        let _ = rustix::process::kill_process_group(Pid::from_child(child), Signal::KILL);
    }
}

impl Program {
    /// Starts it. Its stdin is empty unless the command says otherwise; stdout and stdin are to be taken.
    ///
    /// # Errors
    /// If it can't be run.
    pub fn start(command: &mut Command) -> Result<Program, Failure> {
        let name = std::path::Path::new(command.get_program());
        let name = name.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // In a group of its own: what a terminal's Ctrl-C ends is ended by us, in order.
        command.stderr(Stdio::piped()).process_group(0);
        let mut child = command.spawn().map_err(|error| Failure::io(format!("running {name}"), &error))?;
        let stderr = child.stderr.take().map(|mut stderr| std::thread::spawn(move || keep(&mut stderr)));
        Ok(Program { name, child: Arc::new(Mutex::new(child)), stderr })
    }

    /// What ends it when it's dropped.
    pub fn killer(&self) -> Killer {
        Killer(self.child.clone())
    }

    /// Its standard output, once, if that is a pipe.
    pub fn stdout(&self) -> Option<ChildStdout> {
        self.locked().stdout.take()
    }

    /// Its standard input, once, if that is a pipe.
    pub fn stdin(&self) -> Option<ChildStdin> {
        self.locked().stdin.take()
    }

    /// Waits until it has ended, which the end of its output announces.
    ///
    /// # Errors
    /// [`Code::PostgresUnavailable`] with what it said, if it ended with anything but 0.
    pub fn finish(self) -> Result<(), Failure> {
        let status = self.wait();
        self.judge(status)
    }

    /// Waits without holding the lock: somebody may want to kill it meanwhile.
    fn wait(&self) -> io::Result<ExitStatus> {
        loop {
            if let Some(status) = self.locked().try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }

    fn judge(mut self, status: io::Result<ExitStatus>) -> Result<(), Failure> {
        let status = status.map_err(|error| Failure::io(format!("waiting for {}", self.name), &error))?;
        let said = self.stderr.take().and_then(|stderr| stderr.join().ok()).unwrap_or_default();
        if status.success() {
            if !said.is_empty() {
                tracing::warn!("{}: {said}", self.name);
            }
            return Ok(());
        }
        let lines: Vec<&str> = said.lines().take(TOLD_LINES).collect();
        let lines = if lines.is_empty() { "it said nothing".to_owned() } else { lines.join("; ") };
        Err(Failure::new(Code::PostgresUnavailable, format!("{} ended with {status}: {lines}", self.name)))
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let mut child = self.locked();
        kill(&mut child);
        let _ = child.wait();
    }
}

fn keep(stderr: &mut impl Read) -> String {
    let mut kept = Vec::new();
    let _ = stderr.by_ref().take(KEPT_BYTES as u64).read_to_end(&mut kept);
    let _ = io::copy(stderr, &mut io::sink());
    String::from_utf8_lossy(&kept).trim_end().to_owned()
}

/// Runs a program to its end; its output, which must be small.
///
/// # Errors
/// As [`Program::finish`].
///
/// # Cancellation
/// Dropped, the program is killed.
pub async fn output(command: Command) -> Result<String, Failure> {
    output_for(command, String::new()).await
}

/// The same of a program that reads this on its standard input: what everybody may not see on a command line.
///
/// # Errors
/// As [`Program::finish`].
///
/// # Cancellation
/// Dropped, the program is killed.
pub async fn output_for(mut command: Command, input: String) -> Result<String, Failure> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let program = Program::start(&mut command)?;
    let killer = program.killer();
    let read = tokio::task::spawn_blocking(move || {
        let stdin = program.stdin();
        // Beside the reading: it may say more than a pipe holds before it has read all. One that wants no more says why.
        std::thread::spawn(move || stdin.map(|mut stdin| stdin.write_all(input.as_bytes())));
        let mut text = String::new();
        if let Some(mut stdout) = program.stdout() {
            stdout.read_to_string(&mut text).map_err(|error| Failure::io("reading a program's output", &error))?;
        }
        program.finish().map(|()| text)
    });
    let text = read.await?;
    drop(killer);
    text
}

/// Copies a program's output, and finishes it. That its output has ended says nothing: it may have crashed.
///
/// # Errors
/// As [`Program::finish`]; `broken` for what can't be written.
pub fn pump(
    program: Program,
    to: &mut dyn Write,
    counted: impl Fn(u64),
    broken: impl Fn(&io::Error) -> Failure,
) -> Result<(), Failure> {
    if let Some(mut stdout) = program.stdout() {
        let mut buffer = vec![0; crate::codec::CHUNK];
        loop {
            let n = match stdout.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Failure::io("reading a program's output", &error)),
            };
            to.write_all(&buffer[..n]).map_err(|error| broken(&error))?;
            counted(n as u64);
        }
    }
    program.finish()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn what_a_wrapper_has_started_is_killed_with_it() {
        let began = Instant::now();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut shell = Command::new("sh");
        shell.args(["-c", "sleep 60; true"]);
        let ended = runtime.block_on(async { tokio::time::timeout(Duration::from_millis(300), output(shell)).await });
        // Waits for the thread that reads, and so for the pipe's end.
        drop(runtime);
        assert!(ended.is_err() && began.elapsed() < Duration::from_secs(30));
    }

    #[tokio::test]
    async fn a_program_is_given_what_it_reads_whatever_it_does_with_it() {
        let long = "line\n".repeat(100_000);
        assert_eq!(output_for(Command::new("cat"), long.clone()).await.unwrap(), long);
        assert_eq!(output_for(Command::new("true"), long).await.unwrap(), "");
    }

    #[tokio::test]
    async fn a_program_that_fails_is_told_with_what_it_said() {
        let mut shell = Command::new("sh");
        shell.args(["-c", "echo half; echo 'error: lost' >&2; exit 3"]);
        let failure = output(shell).await.unwrap_err();
        assert_eq!(failure.message, "sh ended with exit status: 3: error: lost");
    }
}
