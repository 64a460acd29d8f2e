//! What is measured. Each work is a module with one function that makes all its runs, interleaved between the tools.

mod daemon;
mod wal_drain;
mod wal_replay;

use std::str::FromStr;

use crate::{report::Report, run::Bench, tools::Tool};

/// A work, by its name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Work {
    /// A backlog of WAL is archived.
    WalDrain,
    /// A base backup recovers from archived WAL.
    WalReplay,
    /// What pgsidecar's daemon needs when idle, and what a call of its helper takes.
    Daemon,
}

impl Work {
    pub const ALL: [Work; 3] = [Work::WalDrain, Work::WalReplay, Work::Daemon];

    pub fn name(self) -> &'static str {
        match self {
            Work::WalDrain => "wal-drain",
            Work::WalReplay => "wal-replay",
            Work::Daemon => "daemon",
        }
    }
}

impl FromStr for Work {
    type Err = String;

    fn from_str(name: &str) -> Result<Work, String> {
        Work::ALL
            .into_iter()
            .find(|work| work.name() == name)
            .ok_or_else(|| format!("there is no work {name}; there are {}", Work::ALL.map(Work::name).join(", ")))
    }
}

/// Runs a work with all tools, as often as was asked for.
pub fn run(work: Work, bench: &mut Bench, tools: &[Box<dyn Tool>], report: &mut Report) {
    match work {
        Work::WalDrain => wal_drain::run(bench, tools, report),
        Work::WalReplay => wal_replay::run(bench, tools, report),
        Work::Daemon => daemon::run(bench, report),
    }
}
