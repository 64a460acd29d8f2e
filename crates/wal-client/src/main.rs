//! `pgsidecar-wal`: what PostgreSQL calls as `archive_command` and `restore_command`.
//!
//! It hands one request to the pgsidecar daemon beside the server and turns the answer into the exit code
//! that PostgreSQL understands. It guarantees that exit code 0 of `archive` means that the daemon has
//! answered 200 or 204, and that 'not in the archive' is never said for 'can't tell' (except on a standby,
//! where it is harmless: see [`restore`]). It knows neither the repository nor the format of WAL, and
//! it depends on the standard library alone: it runs in other people's images, once per segment.

mod archive;
mod args;
mod http;
mod json;
mod ping;
mod problem;
mod restore;
#[cfg(test)]
mod testing;

use std::{
    ffi::OsString,
    io::Write,
    panic,
    path::Path,
    process::{self, ExitCode},
};

use args::{Action, Command, Kind, Parsed};

/// `archive` has failed, or `ping` found no daemon. PostgreSQL asks again. Above 125 the archiver would end.
const EXIT_FAILED: u8 = 1;
/// The command line names no known command.
const EXIT_USAGE: u8 = 2;

/// What a command sees of the process it runs in.
struct World<'a> {
    /// Looks up an environment variable.
    env: &'a dyn Fn(&str) -> Option<OsString>,
    /// The data directory: PostgreSQL runs its commands there.
    cwd: &'a Path,
    stdout: &'a mut dyn Write,
    stderr: &'a mut dyn Write,
}

impl World<'_> {
    /// Writes a line for PostgreSQL's log. In one piece, so that lines of two processes don't mix; that
    /// nobody reads it (a closed pipe) is no reason to fail.
    fn report(&mut self, line: &str) {
        let _ = self.stderr.write_all(format!("pgsidecar-wal: {line}\n").as_bytes());
    }
}

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    // Not the name of the directory but the directory itself: nothing to look up, nothing that can fail.
    let cwd = Path::new(".");

    // Rust's own exit code after a panic, 101, would mean 'no such file' to a restore, and a build with
    // `panic = "abort"` would end the archiver by a signal. The hook runs before either.
    let kind = args::kind_of(&args);
    panic::set_hook(Box::new(move |bug| {
        let _ = std::io::stderr().write_all(format!("pgsidecar-wal: this is a bug: {bug}\n").as_bytes());
        process::exit(failure_code(kind, cwd).into());
    }));

    let env = |name: &str| std::env::var_os(name);
    let (mut stdout, mut stderr) = (std::io::stdout(), std::io::stderr());
    ExitCode::from(run(&args, &mut World { env: &env, cwd, stdout: &mut stdout, stderr: &mut stderr }))
}

/// Runs the command of these arguments (without the program's name) and returns its exit code.
fn run(args: &[OsString], world: &mut World<'_>) -> u8 {
    match args::parse(args, world.env) {
        Ok(Parsed::Print(text)) => {
            let _ = world.stdout.write_all(text.as_bytes());
            0
        }
        Ok(Parsed::Run(Command { action, address, timeout })) => match action {
            Action::Archive { file } => archive::archive(&file, address, timeout, world),
            Action::Restore(request) => restore::restore(&request, address, timeout, world),
            Action::Ping => ping::ping(address, timeout),
        },
        Err(usage) => {
            world.report(&usage);
            failure_code(args::kind_of(args), world.cwd)
        }
    }
}

/// The exit code of a command that has come to nothing, for whatever reason.
fn failure_code(kind: Option<Kind>, cwd: &Path) -> u8 {
    match kind {
        Some(Kind::Archive | Kind::Ping) => EXIT_FAILED,
        Some(Kind::Restore) => restore::cannot_tell(cwd),
        None => EXIT_USAGE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TempDir, pgdata, run_in, standby};

    fn code(args: &[&str], cwd: &TempDir) -> u8 {
        run_in(args, &[], cwd).code
    }

    #[test]
    fn a_usage_error_has_the_exit_code_of_its_command() {
        let primary = pgdata();
        assert_eq!(code(&[], &primary), 2);
        assert_eq!(code(&["push", "pg_wal/000000010000000000000042"], &primary), 2);
        assert_eq!(code(&["archive"], &primary), 1);
        assert_eq!(code(&["--nonsense", "archive", "pg_wal/000000010000000000000042"], &primary), 1);
        assert_eq!(code(&["restore", "000000010000000000000042"], &primary), 200);
        assert_eq!(code(&["restore", "--timeout", "x", "00000002.history", "pg_wal/RECOVERYHISTORY"], &primary), 200);
        assert_eq!(code(&["restore", "00000002.history"], &standby()), 1);
        assert_eq!(code(&["ping", "pong"], &primary), 1);
    }

    #[test]
    fn help_and_version_go_to_stdout() {
        let here = pgdata();
        for (option, start) in [("--help", "pgsidecar-wal "), ("--version", "pgsidecar-wal 0.")] {
            let run = run_in(&[option], &[], &here);
            assert_eq!((run.code, run.stderr.as_str()), (0, ""));
            assert!(run.stdout.starts_with(start), "{}", run.stdout);
        }
    }

    #[test]
    fn help_in_an_archive_command_does_not_acknowledge_a_segment() {
        assert_eq!(code(&["archive", "--help", "pg_wal/000000010000000000000042"], &pgdata()), 1);
        assert_eq!(code(&["restore", "-V", "000000010000000000000042", "pg_wal/RECOVERYXLOG"], &pgdata()), 200);
    }

    #[test]
    fn a_bug_is_neither_an_acknowledgement_nor_the_end_of_the_archive() {
        assert_eq!(failure_code(Some(Kind::Archive), pgdata().path()), 1);
        assert_eq!(failure_code(Some(Kind::Restore), pgdata().path()), 200);
        assert_eq!(failure_code(Some(Kind::Restore), standby().path()), 1);
    }
}
