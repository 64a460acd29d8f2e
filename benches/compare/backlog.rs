//! The data of the WAL's works: a database, a base backup of it, and the WAL that pgbench wrote afterwards.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    options::Options,
    run::{MAJOR, segments_ready},
    support::{Postgres, Scratch, command, run},
};

/// Bytes of a WAL segment.
const SEGMENT: u64 = 16 << 20;

/// A stopped server whose WAL nobody has archived.
pub struct Backlog {
    /// The data directory, without the segments that wait to be archived.
    data: PathBuf,
    /// These.
    segments: PathBuf,
    count: usize,
    /// The data directory as it was before all of them, without WAL.
    base: PathBuf,
    /// What the database holds in the end.
    content: String,
}

/// What tells whether a restored database is whole.
const CONTENT: &str =
    "SELECT count(*) || ' ' || sum(delta) || ' ' || (SELECT sum(abalance) FROM pgbench_accounts) FROM pgbench_history";

impl Backlog {
    /// Writes with pgbench until there are segments enough.
    pub fn make(scratch: &Scratch, options: &Options) -> Backlog {
        let mut postgres = Postgres::initdb(scratch, MAJOR, &[]);
        postgres.configure(&[
            "archive_mode = on",
            "archive_command = '/bin/true'",
            "shared_buffers = 512MB",
            "max_wal_size = 64GB",
            "checkpoint_timeout = 1h",
            "autovacuum = off",
            // The copies of a run share the segments by hard links: none may be written again.
            "wal_recycle = off",
        ]);
        postgres.start(&["-c", "synchronous_commit=off"]);
        run(postgres.client("pgbench").args(["-i", "-q", "-s", &options.scale.to_string()]));
        postgres.switch_wal();
        postgres.wait_until_archived();
        postgres.configure(&["archive_command = '/bin/false'"]);
        postgres.sql("SELECT pg_reload_conf()");
        postgres.sql("CHECKPOINT");

        let base = scratch.path().join("base");
        run(postgres.client("pg_basebackup").args(["-c", "fast", "-X", "fetch", "-D"]).arg(&base));
        for entry in fs::read_dir(base.join("pg_wal")).unwrap().map(Result::unwrap) {
            if entry.path().is_file() {
                fs::remove_file(entry.path()).unwrap();
            }
        }
        // Short transactions all over the database, now and then a statement that touches many pages at once, and a
        // checkpoint, after which the first change of each page brings all of it into the WAL.
        let accounts = options.scale * 100_000;
        for round in 0.. {
            run(postgres.client("pgbench").args(["-n", "-c", "4", "-j", "2", "-T", "5"]));
            let from = accounts / 4 * (round % 4);
            let these = format!("aid BETWEEN {from} AND {} AND aid % 12 = {}", from + accounts / 4, round % 12);
            postgres.sql(&format!("UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE {these}"));
            postgres.sql("CHECKPOINT");
            if segments_ready(&postgres.data).len() >= options.segments {
                break;
            }
        }
        let content = postgres.sql(CONTENT);
        // At its end the server leaves the last segment, so all of that is in segments that are ready.
        postgres.stop("fast");

        let segments = scratch.dir("segments");
        let names = segments_ready(&postgres.data);
        for name in &names {
            fs::rename(postgres.data.join("pg_wal").join(name), segments.join(name)).unwrap();
        }
        Backlog { data: postgres.data.clone(), segments, count: names.len(), base, content }
    }

    /// How many segments wait.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Their size in bytes.
    pub fn bytes(&self) -> u64 {
        self.count as u64 * SEGMENT
    }

    /// The paths of the segments, in order.
    pub fn paths(&self) -> Vec<PathBuf> {
        let mut paths: Vec<PathBuf> =
            fs::read_dir(&self.segments).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        paths
    }

    /// A new copy of the data directory with all segments waiting.
    pub fn copy(&self, to: &Path) {
        copy(&self.data, to);
        self.link_segments(to);
    }

    /// A new copy of the data directory before all of them, about to recover from its archive.
    pub fn copy_base(&self, to: &Path) {
        copy(&self.base, to);
        run(command("touch").arg(to.join("recovery.signal")));
    }

    /// Puts the segments into a data directory.
    pub fn link_segments(&self, data: &Path) {
        run(command("cp").arg("-l").args(self.paths()).arg(data.join("pg_wal")));
    }

    /// All of it into the page cache, and nothing else waiting to be written.
    pub fn warm(&self) {
        run(&mut command("sync"));
        for path in self.paths() {
            std::io::copy(&mut fs::File::open(path).unwrap(), &mut std::io::sink()).unwrap();
        }
    }

    /// That this server has recovered everything.
    #[track_caller]
    pub fn check_whole(&self, postgres: &Postgres) {
        assert_eq!(postgres.sql(CONTENT), self.content, "the recovered database isn't whole:\n{}", postgres.log());
    }
}

fn copy(from: &Path, to: &Path) {
    run(command("cp").args(["-a", "--reflink=auto"]).arg(from).arg(to));
}
