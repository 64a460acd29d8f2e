//! The data of the backups' works: a database that pgbench wrote, and its server.
//!
//! All tools back up the same server, one after the other, while nobody writes to it.

use std::{fs, io};

use crate::{
    machine::Watch,
    options::{CLIENTS, Options},
    run::{Bench, Daemon, MAJOR, Outcome, Place, ready, wait_for, wait_for_quiet},
    store::files,
    support::{Postgres, Scratch, command, run, told},
    tools::{Backup, Kind, Tool},
};

/// A running server that belongs to no tool for long.
pub struct Database {
    server: Postgres,
    transactions: u32,
    // After the server: fields are dropped in order.
    _scratch: Scratch,
}

/// What an archive_command says when nobody is to get the WAL.
const NOBODY: &str = "/bin/true";

/// What tells whether a restored database is whole.
const CONTENT: &str = "SELECT count(*) || ' ' || coalesce(sum(delta), 0) || ' ' || (SELECT sum(abalance) FROM pgbench_accounts) FROM pgbench_history";

/// What the database of this server holds.
pub fn content_of(server: &Postgres) -> String {
    server.sql(CONTENT)
}

impl Database {
    /// Writes it.
    pub fn make(options: &Options) -> Database {
        let scratch = Scratch::new();
        let mut server = Postgres::initdb(&scratch, MAJOR, &[]);
        server.configure(&[
            "archive_mode = on",
            "archive_command = '/bin/true'",
            "summarize_wal = on",
            "shared_buffers = 512MB",
            "max_wal_size = 16GB",
            "checkpoint_timeout = 1h",
            // Nobody writes but pgbench.
            "autovacuum = off",
        ]);
        server.start(&["-c", "synchronous_commit=off"]);
        run(server.client("pgbench").args(["-i", "-q", "-s", &options.backup_scale.to_string()]));
        server.configure(&["fsync = on"]);
        let database = Database { server, transactions: options.transactions, _scratch: scratch };
        // A database that has been in use has room in its pages: an update stays in its page then, and leaves the index
        // alone.
        database.write();
        database.server.sql("UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid % 12 = 0");
        database.server.sql("VACUUM ANALYZE");
        database.give_wal_to(NOBODY);
        database.settle();
        database
    }

    pub fn server(&self) -> &Postgres {
        &self.server
    }

    /// The size in bytes of what a backup has to take, nearly: the data directory without WAL.
    pub fn bytes(&self) -> u64 {
        let files = files(&self.server.data);
        files.iter().filter(|(path, _)| !path.starts_with("pg_wal")).map(|(_, size)| size).sum()
    }

    /// Some transactions all over it.
    pub fn write(&self) {
        let each = (self.transactions / CLIENTS).to_string();
        run(self.server.client("pgbench").args(["-n", "-c", &CLIENTS.to_string(), "-j", "2", "-t", &each]));
        self.settle();
    }

    /// What it holds.
    pub fn content(&self) -> String {
        content_of(&self.server)
    }

    /// All that was written is on disk and in the page cache, and no WAL of it is left for the archive of who comes next.
    fn settle(&self) {
        self.server.sql("CHECKPOINT");
        self.server.switch_wal();
        self.wait_until_archived();
        run(&mut command("sync"));
        for (path, _) in files(&self.server.data) {
            // A file that has gone meanwhile needs no cache.
            if let Ok(mut file) = fs::File::open(self.server.data.join(path)) {
                io::copy(&mut file, &mut io::sink()).unwrap();
            }
        }
    }

    fn wait_until_archived(&self) {
        wait_for("all WAL is archived", &self.server.log_path(), || ready(&self.server.data).is_empty());
    }

    fn give_wal_to(&self, archive_command: &str) {
        self.server.configure(&[&format!("archive_command = '{archive_command}'")]);
        self.server.sql("SELECT pg_reload_conf()");
        // The archiver has heard of it when it archives with it.
        let shown = || self.server.sql("SHOW archive_command") == archive_command;
        wait_for("the server knows the new command", &self.server.log_path(), shown);
    }
}

/// A tool beside the database: its daemon runs, if it has one, and it gets the WAL until it's dropped.
pub struct Beside<'a> {
    pub place: Place<'a>,
    tool: &'a dyn Tool,
    database: &'a Database,
    daemon: Option<Daemon>,
}

impl<'a> Beside<'a> {
    /// `repository` is empty if `is_new`.
    pub fn start(bench: &'a Bench, tool: &'a dyn Tool, repository: &str, is_new: bool) -> Beside<'a> {
        let place = Place::beside(bench, repository);
        let database = bench.made_database();
        tool.configure(&place);
        if is_new {
            tool.create_repository(&place);
        }
        let daemon = tool.start(&place);
        database.give_wal_to(&tool.archive_command(&place));
        Beside { place, tool, database, daemon }
    }

    /// Takes a backup. Answers with what it took, and with what it's called.
    pub fn back_up(&self, kind: Kind) -> Result<(Outcome, Backup), String> {
        let backups = self.tool.backups().ok_or("it isn't compared")?;
        let stored = || self.place.store.bytes_within(&self.place.repository, backups.directory());
        let before = stored();
        let mut create = backups.create(&self.place, kind);
        wait_for_quiet();
        let watch = Watch::begin(self.tool.process());
        let output = create.output().unwrap();
        let usage = watch.end();
        if !output.status.success() {
            return Err(told(&output));
        }
        let newest = backups.newest(&self.place);
        assert_eq!(newest.kind, kind, "the newest backup, {}, is of another kind", newest.id);
        let outcome = Outcome { usage, plain: self.database.bytes(), stored: Some(stored() - before) };
        Ok((outcome, newest))
    }
}

impl Drop for Beside<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.database.wait_until_archived();
            self.database.give_wal_to(NOBODY);
        }
        self.daemon.take();
    }
}
