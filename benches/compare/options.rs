//! What is to be measured, from the environment.

use std::{env, path::PathBuf, str::FromStr, time::Duration};

use crate::works::Work;

/// The choices of one run of the bench.
pub struct Options {
    /// `BENCH`: the works, separated by spaces or commas.
    pub works: Vec<Work>,
    /// `TOOLS`: the tools' names.
    pub tools: Vec<String>,
    /// `REPEAT`: how often each work is run with each tool.
    pub repeat: usize,
    /// `SCALE`: pgbench's scale, 15 MB each.
    pub scale: u32,
    /// `SEGMENTS`: the least number of WAL segments (16 MiB) in the backlog.
    pub segments: usize,
    /// `BACKUP_SCALE`: pgbench's scale for the database that is backed up.
    pub backup_scale: u32,
    /// `TRANSACTIONS`: pgbench's transactions before an incremental backup.
    pub transactions: u32,
    /// `STORE_LATENCY_MS`: how much later than it could the store gets each request.
    pub store_latency: Duration,
    /// `PGSIDECAR_BENCH_ROOT`: the folder of `scripts/setup-bench.sh`.
    pub root: PathBuf,
    /// `PGSIDECAR_BENCH_RESULTS`: where the figures go, as JSON.
    pub results: PathBuf,
}

/// All tools. `floor` is no tool: what the work takes at the least on this machine.
pub const TOOLS: [&str; 4] = ["pgsidecar", "pgbackrest", "barman-cloud", "floor"];

/// pgbench's clients.
pub const CLIENTS: u32 = 4;

impl Options {
    pub fn from_environment() -> Options {
        let works = list("BENCH").into_iter().map(|name| name.parse().unwrap_or_else(|error| panic!("BENCH: {error}")));
        let works: Vec<Work> = works.collect();
        let mut tools = list("TOOLS");
        if let Some(unknown) = tools.iter().find(|tool| !TOOLS.contains(&tool.as_str())) {
            panic!("TOOLS: there is no {unknown}; there are {}", TOOLS.join(", "));
        }
        if tools.is_empty() {
            tools = TOOLS.map(str::to_owned).to_vec();
        }
        let options = Options {
            works: if works.is_empty() { Work::ALL.to_vec() } else { works },
            tools,
            repeat: number("REPEAT").unwrap_or(3),
            scale: number("SCALE").unwrap_or(30),
            segments: number("SEGMENTS").unwrap_or(128),
            backup_scale: number("BACKUP_SCALE").unwrap_or(100),
            transactions: number("TRANSACTIONS").unwrap_or(41_000),
            store_latency: Duration::from_millis(number("STORE_LATENCY_MS").unwrap_or(0)),
            root: path("PGSIDECAR_BENCH_ROOT"),
            results: path("PGSIDECAR_BENCH_RESULTS"),
        };
        assert!(
            options.repeat > 0 && options.scale > 0 && options.segments > 0 && options.backup_scale > 0,
            "REPEAT, SCALE, SEGMENTS and BACKUP_SCALE are at least 1"
        );
        assert!(options.transactions >= CLIENTS, "TRANSACTIONS is at least {CLIENTS}");
        assert!(options.store_latency <= Duration::from_secs(1), "STORE_LATENCY_MS is at most 1000");
        options
    }

    /// Whether this tool is to be measured.
    pub fn has(&self, tool: &str) -> bool {
        self.tools.iter().any(|chosen| chosen == tool)
    }
}

fn set(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

fn list(name: &str) -> Vec<String> {
    let value = set(name).unwrap_or_default();
    value.split([' ', ',']).filter(|part| !part.is_empty()).map(str::to_owned).collect()
}

fn number<T: FromStr>(name: &str) -> Option<T> {
    set(name).map(|value| value.parse().unwrap_or_else(|_| panic!("{name}={value}: it is a number")))
}

fn path(name: &str) -> PathBuf {
    set(name).unwrap_or_else(|| panic!("{name} isn't set: use `make bench`")).into()
}
