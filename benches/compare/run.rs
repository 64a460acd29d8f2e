//! What a run consists of: a place of its own for one tool, a server in it, and what is measured.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::{
    backlog::Backlog,
    database::Database,
    machine::{self, Usage},
    options::Options,
    store::Store,
    support::{Postgres, Scratch, free_port},
};

/// The major version of PostgreSQL; `scripts/setup-bench.sh` has it too.
pub const MAJOR: u32 = 18;

/// No run may take longer.
pub const PATIENCE: Duration = Duration::from_secs(15 * 60);

/// With more than this share of the machine taken by others, figures say little.
pub const BUSY: f64 = 0.08;

/// What all runs share.
pub struct Bench {
    pub options: Options,
    pub store: Store,
    // After the store, which has its files there: fields are dropped in order.
    pub scratch: Scratch,
    backlog: Option<Backlog>,
    database: Option<Database>,
}

impl Bench {
    pub fn start(options: Options) -> Bench {
        let scratch = Scratch::new();
        let store = Store::start(&scratch, &options.root, options.store_latency);
        Bench { options, store, scratch, backlog: None, database: None }
    }

    /// The WAL that waits, made when it's first needed.
    pub fn backlog(&mut self) -> &Backlog {
        if self.backlog.is_none() {
            say("writing the backlog");
            let backlog = Backlog::make(&self.scratch, &self.options);
            say(&format!("{} segments of 16 MiB, pgbench scale {}", backlog.count(), self.options.scale));
            self.backlog = Some(backlog);
        }
        self.made_backlog()
    }

    /// The same, for who knows that it has been made.
    pub fn made_backlog(&self) -> &Backlog {
        self.backlog.as_ref().expect("the work has made the backlog")
    }

    /// The database that is backed up, made when it's first needed. Its server runs.
    pub fn database(&mut self) -> &Database {
        if self.database.is_none() {
            say("writing the database");
            let database = Database::make(&self.options);
            say(&format!("{:.0} MB, pgbench scale {}", database.bytes() as f64 / 1e6, self.options.backup_scale));
            self.database = Some(database);
        }
        self.made_database()
    }

    /// The same, for who knows that it has been made.
    pub fn made_database(&self) -> &Database {
        self.database.as_ref().expect("the work has made the database")
    }
}

/// A place for one run of one tool: directories of its own, and a name in the store. What is its own vanishes on drop.
pub struct Place<'a> {
    pub store: &'a Store,
    scratch: &'a Scratch,
    /// The prefix of its objects.
    pub repository: String,
    /// For spool, configuration and logs.
    pub directory: PathBuf,
    /// The data directory; for a server of the place's own, not there yet.
    pub data: PathBuf,
    /// The directory of the server's socket.
    pub socket: PathBuf,
    /// For who needs to listen.
    pub port: u16,
    /// What vanishes with it.
    own: Vec<PathBuf>,
}

impl<'a> Place<'a> {
    pub fn new(bench: &'a Bench, repository: &str) -> Place<'a> {
        let directory = bench.scratch.dir("run");
        let data = bench.scratch.path().join("run-data");
        let socket = bench.scratch.path().join("s-run-data");
        let own = vec![directory.clone(), data.clone(), socket.clone()];
        let (store, scratch, repository) = (&bench.store, &bench.scratch, repository.to_owned());
        Place { store, scratch, repository, directory, data, socket, port: free_port(), own }
    }

    /// A place beside the database that is backed up.
    pub fn beside(bench: &'a Bench, repository: &str) -> Place<'a> {
        let directory = bench.scratch.dir("run");
        let server = bench.made_database().server();
        let (data, socket, own) = (server.data.clone(), server.socket.clone(), vec![directory.clone()]);
        let (store, scratch, repository) = (&bench.store, &bench.scratch, repository.to_owned());
        Place { store, scratch, repository, directory, data, socket, port: free_port(), own }
    }

    /// The server on its data directory, not started, with more lines in its configuration.
    pub fn server(&self, environment: Vec<(String, String)>, lines: &[&str]) -> Postgres {
        let mut postgres = Postgres::on(self.scratch, self.data.clone(), MAJOR);
        fs::remove_file(postgres.log_path()).ok();
        // As a server is run; the tests' kit does without.
        postgres.configure(&["fsync = on"]);
        postgres.configure(lines);
        postgres.environment = environment;
        postgres
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            for directory in &self.own {
                fs::remove_dir_all(directory).ok();
            }
        }
    }
}

/// A process beside the server, ended on drop.
pub struct Daemon {
    child: Child,
}

impl Daemon {
    /// Starts it; its output goes to a file of this place. Waits until it listens there.
    pub fn start(place: &Place, mut command: Command) -> Daemon {
        let log = fs::File::create(place.directory.join("daemon.log")).unwrap();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let mut daemon = Daemon { child: command.spawn().unwrap() };
        let end = Instant::now() + Duration::from_secs(20);
        while std::net::TcpStream::connect(("127.0.0.1", place.port)).is_err() {
            let log = || fs::read_to_string(place.directory.join("daemon.log")).unwrap_or_default();
            assert!(daemon.child.try_wait().unwrap().is_none(), "the daemon ended:\n{}", log());
            assert!(Instant::now() < end, "the daemon doesn't listen:\n{}", log());
            std::thread::sleep(Duration::from_millis(2));
        }
        daemon
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// What one run has come to.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    pub usage: Usage,
    /// Bytes of WAL that went through, uncompressed, or of the database.
    pub plain: u64,
    /// Bytes that are in the store of it.
    pub stored: Option<u64>,
}

/// Has the server on this data directory read its configuration again.
pub fn reload(data: &Path) {
    let lines = fs::read_to_string(data.join("postmaster.pid")).unwrap();
    let pid = lines.lines().next().unwrap().parse().unwrap();
    let postmaster = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(postmaster, rustix::process::Signal::HUP).unwrap();
}

impl Outcome {
    /// The share of the machine that others had meanwhile. The kernel's own threads are in it, and hardly show.
    pub fn disturbance(&self) -> f64 {
        let processors = std::thread::available_parallelism().unwrap().get() as f64;
        self.usage.split.get("other").unwrap_or(&0.0) / self.usage.seconds / processors
    }
}

/// Makes a run again, at most twice, when others used the machine meanwhile; the best of them counts. A long run is
/// left as it was.
pub fn undisturbed(mut run: impl FnMut() -> Outcome) -> Outcome {
    try_undisturbed(|| Ok(run())).unwrap_or_else(|why: String| panic!("{why}"))
}

/// The same of what can fail; the first failure ends it.
pub fn try_undisturbed(mut run: impl FnMut() -> Result<Outcome, String>) -> Result<Outcome, String> {
    let mut best = run()?;
    for _ in 0..2 {
        if best.disturbance() <= BUSY || best.usage.seconds > 30.0 {
            break;
        }
        say(&format!("{:.0} % of the machine went to something else: once more", best.disturbance() * 100.0));
        let again = run()?;
        if again.disturbance() < best.disturbance() {
            best = again;
        }
    }
    Ok(best)
}

/// The names of the segments in `pg_wal` that wait to be archived, in order.
pub fn segments_ready(data: &Path) -> Vec<String> {
    let mut names = ready(data);
    names.retain(|name| name.len() == 24);
    names.sort();
    names
}

/// The names of all files that wait to be archived.
pub fn ready(data: &Path) -> Vec<String> {
    let entries = fs::read_dir(data.join("pg_wal/archive_status")).unwrap();
    entries.filter_map(|entry| Some(entry.unwrap().file_name().to_str()?.strip_suffix(".ready")?.to_owned())).collect()
}

/// Looks at the machine before a run. Waits a while for others to end, and says so when they don't.
pub fn wait_for_quiet() {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let load = machine::background_load();
        if load <= BUSY {
            return;
        }
        if Instant::now() >= end {
            say(&format!("{:.0} % of the machine are busy with something else", load * 100.0));
            return;
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// Waits until a condition holds, looking often. The log is shown if it doesn't come true.
pub fn wait_for(what: &str, log: &Path, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "it did not come true within {PATIENCE:?}: {what}\n{}", log_of(log));
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn log_of(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// A line about what's going on.
pub fn say(line: &str) {
    eprintln!("== {line}");
}
