//! A PostgreSQL server on a Unix socket of its own.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};

use super::{Scratch, command, give_to_servers, run, wait_until};

/// A data directory and, while it runs, the server on it. Killed on drop.
pub struct Postgres {
    pub data: PathBuf,
    pub socket: PathBuf,
    pub major: u32,
    /// At which it listens: a part of the socket's name.
    pub port: u16,
    /// Variables of the server's environment.
    pub environment: Vec<(String, String)>,
    child: Option<Child>,
}

impl Postgres {
    /// The binaries of a major version.
    pub fn bin(major: u32) -> PathBuf {
        let name = format!("PG_BIN_{major}");
        let usual = match major {
            15 => "/usr/lib/postgresql/15/bin".to_owned(),
            _ => format!("/var/cache/pgsidecar-dev/postgresql-{major}/usr/lib/postgresql/{major}/bin"),
        };
        let bin = PathBuf::from(std::env::var(&name).unwrap_or(usual));
        assert!(
            bin.join("initdb").exists(),
            "no PostgreSQL {major} at {}: `make test` installs it; {name} names another",
            bin.display()
        );
        bin
    }

    /// A new database cluster; `options` are initdb's.
    pub fn initdb(scratch: &Scratch, major: u32, options: &[&str]) -> Postgres {
        let data = scratch.path().join("data");
        let mut initdb = command(Postgres::bin(major).join("initdb"));
        run(initdb
            .arg("-D")
            .arg(&data)
            .args(["-A", "trust", "-U", "postgres", "--no-sync"])
            .args(options)
            .current_dir(scratch.path()));
        let postgres = Postgres::on(scratch, data, major);
        postgres.configure(&["wal_level = replica", "max_wal_senders = 5", "fsync = off", "max_connections = 30"]);
        postgres
    }

    /// A data directory that is there already, e.g. a restored one.
    pub fn on(scratch: &Scratch, data: PathBuf, major: u32) -> Postgres {
        let name = data.file_name().unwrap().to_str().unwrap();
        let socket = scratch.path().join(format!("s-{name}"));
        if !socket.exists() {
            fs::create_dir(&socket).unwrap();
            give_to_servers(&socket);
        }
        Postgres { data, socket, major, port: 5432, environment: Vec::new(), child: None }
    }

    /// Adds lines to postgresql.conf.
    pub fn configure(&self, lines: &[&str]) {
        let mut conf = OpenOptions::new().append(true).open(self.data.join("postgresql.conf")).unwrap();
        for line in lines {
            writeln!(conf, "{line}").unwrap();
        }
    }

    /// Where the server logs.
    pub fn log_path(&self) -> PathBuf {
        let name = self.data.file_name().unwrap().to_str().unwrap();
        self.data.parent().unwrap().join(format!("{name}.log"))
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Starts the server, without waiting. `options` are postgres's.
    pub fn spawn(&mut self, options: &[&str]) {
        let log = OpenOptions::new().create(true).append(true).open(self.log_path()).unwrap();
        let mut postgres = command(Postgres::bin(self.major).join("postgres"));
        postgres.envs(self.environment.iter().map(|(name, value)| (name, value)));
        postgres.arg("-D").arg(&self.data).args(["-c", "listen_addresses="]);
        postgres.args(["-p", &self.port.to_string()]);
        postgres.arg("-c").arg(format!("unix_socket_directories={}", self.socket.display())).args(options);
        postgres
            .current_dir(self.data.parent().unwrap())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        self.child = Some(postgres.spawn().unwrap());
    }

    /// Starts the server and waits until it takes connections.
    pub fn start(&mut self, options: &[&str]) {
        self.spawn(options);
        let patience = Duration::from_secs(60);
        wait_until("PostgreSQL takes connections", patience, || {
            if let Some(status) = self.exited() {
                panic!("PostgreSQL ended with {status}:\n{}", self.log());
            }
            self.try_sql("SELECT 1").is_ok()
        });
    }

    /// Waits until recovery is over and the server takes writes.
    pub fn wait_for_promotion(&mut self) {
        wait_until("the server is promoted", Duration::from_secs(90), || {
            if let Some(status) = self.exited() {
                panic!("PostgreSQL ended with {status}:\n{}", self.log());
            }
            self.try_sql("SELECT pg_is_in_recovery()").is_ok_and(|answer| answer == "f")
        });
    }

    /// How the server ended, if it has.
    pub fn exited(&mut self) -> Option<std::process::ExitStatus> {
        self.child.as_mut().and_then(|child| child.try_wait().unwrap())
    }

    /// The answer to a query: rows by lines, columns by `|`.
    #[track_caller]
    pub fn sql(&self, sql: &str) -> String {
        self.try_sql(sql).unwrap_or_else(|error| panic!("{sql}\n{error}\n{}", self.log()))
    }

    pub fn try_sql(&self, sql: &str) -> Result<String, String> {
        let output =
            self.client("psql").args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", sql]).output().unwrap();
        if output.status.success() {
            Ok(String::from_utf8(output.stdout).unwrap().trim_end().to_owned())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }

    /// A client program of this version, connected to this server's database postgres.
    pub fn client(&self, program: &str) -> Command {
        let mut client = command(Postgres::bin(self.major).join(program));
        client
            .env("PGHOST", &self.socket)
            .env("PGPORT", self.port.to_string())
            .env("PGUSER", "postgres")
            .env("PGDATABASE", "postgres")
            .current_dir(&self.socket);
        client
    }

    /// The server's clock, as a recovery target wants it.
    pub fn now(&self) -> String {
        self.sql("SELECT clock_timestamp() AT TIME ZONE 'UTC' || '+00'")
    }

    /// Leaves the current WAL segment; answers with its name.
    pub fn switch_wal(&self) -> String {
        // Something has to be in the segment, or there is nothing to switch. (pg_current_wal_lsn() is what was written
        // so far, which this record isn't yet.)
        let name = self.sql("SELECT pg_walfile_name(pg_create_restore_point('switch'))");
        self.sql("SELECT pg_switch_wal()");
        name
    }

    /// Waits until everything that is ready has been archived.
    pub fn wait_until_archived(&self) {
        wait_until("all WAL is archived", Duration::from_secs(60), || {
            let ready = |entry: fs::DirEntry| entry.file_name().to_string_lossy().ends_with(".ready");
            !fs::read_dir(self.data.join("pg_wal/archive_status")).unwrap().any(|entry| ready(entry.unwrap()))
        });
    }

    /// Stops the server; `mode` is pg_ctl's.
    pub fn stop(&mut self, mode: &str) {
        if self.child.is_some() {
            self.tell_to_stop(mode);
            self.wait_for_end();
        }
    }

    /// Tells the server to stop, without waiting; `mode` is pg_ctl's.
    pub fn tell_to_stop(&self, mode: &str) {
        let signal = match mode {
            "smart" => Signal::TERM,
            "fast" => Signal::INT,
            "immediate" => Signal::QUIT,
            other => panic!("unknown mode {other}"),
        };
        kill_process(Pid::from_child(self.child.as_ref().unwrap()), signal).unwrap();
    }

    /// Waits until the server has ended.
    pub fn wait_for_end(&mut self) {
        self.child.take().unwrap().wait().unwrap();
    }

    /// Ends the server and all its processes at once, as the end of its container would.
    pub fn kill(&mut self) {
        let mut postmaster = self.child.take().unwrap();
        let pid = postmaster.id();
        // What it starts meanwhile has nothing to do yet.
        let children = fs::read_dir("/proc").unwrap().filter_map(|process| {
            let stat = fs::read_to_string(process.unwrap().path().join("stat")).ok()?;
            let (before, after) = stat.rsplit_once(") ")?;
            let parent: u32 = after.split(' ').nth(1)?.parse().ok()?;
            (parent == pid).then(|| before.split(' ').next()?.parse().ok()).flatten()
        });
        let children: Vec<i32> = children.collect();
        postmaster.kill().unwrap();
        for child in children {
            kill_process(Pid::from_raw(child).unwrap(), Signal::KILL).ok();
        }
        postmaster.wait().unwrap();
    }

    /// The names of the files in pg_wal that contain this, in order.
    pub fn wal_files(&self, part: &str) -> Vec<String> {
        let names = fs::read_dir(self.data.join("pg_wal")).unwrap();
        let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name.contains(part));
        names.sort();
        names
    }

    /// A file of pg_wal.
    #[track_caller]
    pub fn wal_file(&self, name: &str) -> Vec<u8> {
        fs::read(self.data.join("pg_wal").join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// Puts a file into pg_wal.
    pub fn lay(&self, name: &str, bytes: &[u8]) {
        let path = self.data.join("pg_wal").join(name);
        fs::write(&path, bytes).unwrap();
        give_to_servers(&path);
    }

    /// Marks a file of pg_wal as PostgreSQL does: `ready` or `done`.
    pub fn mark(&self, name: &str, state: &str) {
        self.lay(&format!("archive_status/{name}.{state}"), b"");
        let other = if state == "ready" { "done" } else { "ready" };
        fs::remove_file(self.data.join(format!("pg_wal/archive_status/{name}.{other}"))).ok();
    }

    /// Whether the mark is there.
    pub fn is_marked(&self, name: &str, state: &str) -> bool {
        self.data.join(format!("pg_wal/archive_status/{name}.{state}")).exists()
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if self.exited().is_none() {
            self.stop("immediate");
        }
    }
}
