//! What is measured. Each work is a module with one function that makes all its runs, interleaved between the tools.

mod backup_full;
mod backup_incremental;
mod daemon;
mod restore;
mod tps;
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
    /// A base backup of everything.
    BackupFull,
    /// A base backup of what has changed since that.
    BackupIncremental,
    /// A full backup is restored.
    RestoreFull,
    /// An incremental backup is restored that builds on another one, which builds on a full one.
    RestoreChain,
    /// What a backup leaves for the database's clients.
    Tps,
    /// What pgsidecar's daemon needs when idle, and what a call of its helper takes.
    Daemon,
}

impl Work {
    pub const ALL: [Work; 8] = [
        Work::WalDrain,
        Work::WalReplay,
        Work::BackupFull,
        Work::BackupIncremental,
        Work::RestoreFull,
        Work::RestoreChain,
        Work::Tps,
        Work::Daemon,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Work::WalDrain => "wal-drain",
            Work::WalReplay => "wal-replay",
            Work::BackupFull => "backup-full",
            Work::BackupIncremental => "backup-incremental",
            Work::RestoreFull => "restore-full",
            Work::RestoreChain => "restore-chain",
            Work::Tps => "tps",
            Work::Daemon => "daemon",
        }
    }

    /// What its figures are counted by.
    pub fn material(self) -> &'static str {
        match self {
            Work::WalDrain | Work::WalReplay => "WAL",
            _ => "database",
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
        Work::BackupFull => backup_full::run(bench, tools, report),
        Work::BackupIncremental => backup_incremental::run(bench, tools, report),
        Work::RestoreFull | Work::RestoreChain => restore::run(work, bench, tools, report),
        Work::Tps => tps::run(bench, report),
        Work::Daemon => daemon::run(bench, report),
    }
}
