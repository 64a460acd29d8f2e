//! The daemon beside a PostgreSQL, and the command-line tool.

use std::{
    fs::{self, OpenOptions},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Output, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};

use super::{Postgres, Repository, Scratch, command, free_port, run, told, wait_until};

/// A daemon. Killed on drop.
pub struct Sidecar {
    pub environment: Vec<(String, String)>,
    pub port: u16,
    pub health_port: u16,
    /// The limit for the daemon's private writable memory (RLIMIT_DATA), in bytes.
    pub memory_limit: Option<u64>,
    directory: PathBuf,
    child: Option<Child>,
}

impl Sidecar {
    /// The program under test.
    pub fn program() -> PathBuf {
        PathBuf::from(env!("CARGO_BIN_EXE_pgsidecar"))
    }

    /// The helper that PostgreSQL calls.
    pub fn helper() -> PathBuf {
        let beside = || Sidecar::program().with_file_name("pgsidecar-wal");
        let helper = std::env::var_os("PGSIDECAR_WAL").map_or_else(beside, PathBuf::from);
        assert!(helper.exists(), "no {}: cargo build --workspace makes it", helper.display());
        helper
    }

    /// A daemon for this server and this repository, not started yet.
    pub fn new(scratch: &Scratch, postgres: &Postgres, repository: &Repository) -> Sidecar {
        let (port, health_port) = (free_port(), free_port());
        let mut environment = vec![
            ("PGDATA".to_owned(), postgres.data.display().to_string()),
            ("PGHOST".to_owned(), postgres.socket.display().to_string()),
            ("PGUSER".to_owned(), "postgres".to_owned()),
            ("PGSIDECAR_WAL_LISTEN".to_owned(), format!("127.0.0.1:{port}")),
            ("PGSIDECAR_HEALTH_LISTEN".to_owned(), format!("127.0.0.1:{health_port}")),
            ("PGSIDECAR_CONTROL_SOCKET".to_owned(), scratch.path().join("control.sock").display().to_string()),
            ("PGSIDECAR_SERVER_STOP_WAIT".to_owned(), "1s".to_owned()),
            ("PGSIDECAR_HELPER".to_owned(), Sidecar::helper().display().to_string()),
            ("PGSIDECAR_LOG".to_owned(), "debug".to_owned()),
        ];
        environment.extend(repository.environment().into_iter().map(|(name, value)| (name.to_owned(), value)));
        Sidecar {
            environment,
            port,
            health_port,
            memory_limit: None,
            directory: scratch.path().to_owned(),
            child: None,
        }
    }

    /// A daemon for another server of the same scratch: its log and its socket lie in a directory of this name.
    pub fn another(scratch: &Scratch, name: &str, postgres: &Postgres, repository: &Repository) -> Sidecar {
        let mut sidecar = Sidecar::new(scratch, postgres, repository);
        sidecar.directory = scratch.dir(name);
        sidecar.set("PGSIDECAR_CONTROL_SOCKET", &sidecar.directory.join("control.sock").display().to_string());
        sidecar
    }

    /// Sets or replaces a variable of its environment.
    pub fn set(&mut self, name: &str, value: &str) {
        self.environment.retain(|(known, _)| known != name);
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// A command with the sidecar's environment.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = command(program);
        command.envs(self.environment.iter().map(|(name, value)| (name, value))).current_dir(&self.directory);
        command
    }

    /// Starts the daemon and waits until it answers.
    pub fn start(&mut self) {
        let log = OpenOptions::new().create(true).append(true).open(self.log_path()).unwrap();
        let mut daemon = match self.memory_limit {
            None => self.command(Sidecar::program()),
            Some(bytes) => {
                let mut limited = self.command("prlimit");
                limited.arg(format!("--data={bytes}")).arg(Sidecar::program());
                limited
            }
        };
        daemon.arg("run").stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.child = Some(daemon.spawn().unwrap());
        wait_until("the daemon answers", Duration::from_secs(20), || {
            if let Some(status) = self.child.as_mut().and_then(|child| child.try_wait().unwrap()) {
                panic!("the daemon ended with {status}:\n{}", self.log());
            }
            self.cli(&["status"]).status.success()
        });
    }

    /// Goes to the store through this proxy instead of directly.
    pub fn through(&mut self, proxy: &super::Wire) {
        self.set("AWS_ENDPOINT_URL_S3", &format!("http://{}", proxy.address()));
    }

    fn log_path(&self) -> PathBuf {
        self.directory.join("sidecar.log")
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// The daemon's process id.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// Ends the daemon at once, as the OOM killer would.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Sends SIGTERM and waits; answers with the exit status.
    pub fn stop(&mut self) -> ExitStatus {
        self.tell_to_stop();
        self.wait_for_end()
    }

    /// Sends SIGTERM, without waiting.
    pub fn tell_to_stop(&self) {
        let child = self.child.as_ref().expect("the daemon runs");
        kill_process(Pid::from_child(child), Signal::TERM).unwrap();
    }

    /// Waits until it has ended; answers with the exit status.
    pub fn wait_for_end(&mut self) -> ExitStatus {
        self.child.take().expect("the daemon ran").wait().unwrap()
    }

    /// Whether it runs.
    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| child.try_wait().unwrap().is_none())
    }

    /// Runs the command-line tool.
    pub fn cli(&self, arguments: &[&str]) -> Output {
        self.command(Sidecar::program()).args(arguments).output().unwrap()
    }

    /// The command-line tool in the background; its output goes to a file that is told with it.
    pub fn spawn(&self, arguments: &[&str]) -> (Child, PathBuf) {
        let path = self.directory.join("spawned.log");
        let log = fs::File::create(&path).unwrap();
        let mut command = self.command(Sidecar::program());
        command.args(arguments).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        (command.spawn().unwrap(), path)
    }

    /// Runs it; it has to succeed. Answers with what it printed.
    #[track_caller]
    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = self.cli(arguments);
        assert!(output.status.success(), "pgsidecar {}\n{}\n{}", arguments.join(" "), told(&output), self.log());
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs it; it has to fail with this exit code. Answers with what it said.
    #[track_caller]
    pub fn fails(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.cli(arguments);
        assert_eq!(output.status.code(), Some(code), "pgsidecar {}\n{}", arguments.join(" "), told(&output));
        String::from_utf8(output.stderr).unwrap()
    }

    /// The answer of `--json`, parsed.
    #[track_caller]
    pub fn json(&self, arguments: &[&str]) -> serde_json::Value {
        serde_json::from_str(&self.ok(&[arguments, &["--json"]].concat())).unwrap()
    }

    /// The lines that make PostgreSQL archive through this daemon.
    pub fn archive_settings(&self) -> Vec<String> {
        vec![
            "archive_mode = on".to_owned(),
            format!("archive_command = '{} --address 127.0.0.1:{} archive %p'", Sidecar::helper().display(), self.port),
        ]
    }

    /// The answer to a request with curl: status and body.
    pub fn curl(&self, path: &str, arguments: &[&str]) -> (u16, String) {
        let url = format!("http://127.0.0.1:{}{path}", self.port);
        let body = run(command("curl")
            .args(["-sS", "--max-time", "60", "--path-as-is", "-w", "\n%{http_code}"])
            .args(arguments)
            .arg(url));
        let (body, status) = body.rsplit_once('\n').unwrap();
        (status.parse().unwrap(), body.to_owned())
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A server that archives through a running daemon to a repository: what most tests begin with.
pub fn archiving(scratch: &Scratch, major: u32, options: &[&str], repository: &Repository) -> (Postgres, Sidecar) {
    archiving_with(scratch, major, options, repository, &[])
}

/// The same with settings of the daemon's environment.
pub fn archiving_with(
    scratch: &Scratch,
    major: u32,
    options: &[&str],
    repository: &Repository,
    settings: &[(&str, &str)],
) -> (Postgres, Sidecar) {
    let (mut postgres, mut sidecar) = beside(scratch, major, options, repository);
    settings.iter().for_each(|(name, value)| sidecar.set(name, value));
    let lines = sidecar.archive_settings();
    postgres.configure(&lines.iter().map(String::as_str).collect::<Vec<_>>());
    postgres.start(&[]);
    sidecar.start();
    (postgres, sidecar)
}

/// A new data directory and a daemon for it, neither of them started. `options` are initdb's.
pub fn beside(scratch: &Scratch, major: u32, options: &[&str], repository: &Repository) -> (Postgres, Sidecar) {
    let postgres = Postgres::initdb(scratch, major, options);
    let sidecar = Sidecar::new(scratch, &postgres, repository);
    (postgres, sidecar)
}
