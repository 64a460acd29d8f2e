//! How plans of restores look.

use std::path::{Path, PathBuf};

use pgsidecar_core::{
    Lsn, SegmentName,
    plan::{End, ExpectedEnd, RestorePlan, SnapshotPlan, TransactionEnd},
    recovery::RecoveryTarget,
};
use serde::Serialize;

use super::output;
use crate::{failure::Failure, repository::Repository};

/// How much room there is on a file system.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Space {
    /// The nearest directory that exists.
    pub path: PathBuf,
    /// Bytes that we may use.
    pub available_bytes: u64,
}

impl Space {
    /// The room for what is put at `path`, which needn't exist; `None` if that can't be told.
    pub fn at(path: &Path) -> Option<Space> {
        let existing = path.ancestors().find(|ancestor| ancestor.exists())?;
        let stat = rustix::fs::statvfs(existing).ok()?;
        Some(Space { path: existing.to_owned(), available_bytes: stat.f_bavail.saturating_mul(stat.f_frsize) })
    }

    /// Prints it, and whether it's enough.
    ///
    /// # Errors
    /// If stdout is closed.
    pub fn print(&self, plan: &RestorePlan) -> Result<(), Failure> {
        let (path, available) = (self.path.display(), self.available_bytes);
        output::print_line(&format!("{:<7} {} available at {path}", "Room", output::size(available)))?;
        if available < plan.restored_bytes {
            output::print_line("WARNING that is not enough for the data directory and its tablespaces together")?;
        }
        Ok(())
    }
}

/// A plan, with the room that there is for it.
#[derive(Debug, Serialize)]
pub struct WithSpace<'a> {
    /// The plan.
    #[serde(flatten)]
    pub plan: &'a RestorePlan,
    /// Where it was asked about.
    pub space: Option<Space>,
}

/// Prints a plan.
///
/// # Errors
/// If stdout is closed.
pub fn print_plan(plan: &RestorePlan, repository: &Repository) -> Result<(), Failure> {
    let replay = match &plan.expected_end {
        ExpectedEnd::Verified(_) => "to be replayed",
        ExpectedEnd::NotVerified { .. } => "to be replayed at most",
    };
    let lines = [
        ("From", repository.store().description()),
        (
            "Backup",
            format!(
                "{}, complete at {} ({})",
                plan.backup.id,
                plan.backup.stopped_at.strftime("%Y-%m-%d %H:%M:%SZ"),
                plan.backup.stop_lsn
            ),
        ),
        ("Target", format!("{}, on timeline {}", plan.target, plan.timeline)),
        ("End", end(&plan.expected_end, &plan.target)),
        ("WAL", format!("from {}; without a gap through {} ({})", plan.wal_from, plan.wal_through, plan.reachable)),
        (
            "Size",
            format!(
                "{} to be written, {} to be read; {} of WAL {replay} ({} segments)",
                output::size(plan.restored_bytes),
                output::size(plan.download_bytes),
                output::size(plan.wal.bytes),
                plan.wal.segments
            ),
        ),
    ];
    for (name, value) in lines {
        output::print_line(&format!("{name:<7} {value}"))?;
        if name == "Backup" && plan.chain.len() > 1 {
            let links: Vec<String> = plan.chain.iter().map(|link| link.id.to_string()).collect();
            output::print_line(&format!("{:<7} {}", "Chain", links.join(", then ")))?;
        }
    }
    for passed in &plan.passed_over {
        output::print_line(&format!(
            "WARNING backup {} is newer but can't be restored: {}",
            passed.backup, passed.because
        ))?;
    }
    print_rolled_back(&plan.expected_end, &plan.target)?;
    print_gap(plan.gap, plan.reachable)
}

fn print_rolled_back(expected: &ExpectedEnd, target: &RecoveryTarget) -> Result<(), Failure> {
    match (target, expected) {
        (RecoveryTarget::Xid(xid), ExpectedEnd::Verified(End { stops_at: Some(stop), .. })) if !stop.committed => {
            output::print_line(&format!("WARNING transaction {xid} was rolled back: nothing of it will be there"))
        }
        _ => Ok(()),
    }
}

/// Where recovery will end, in words.
fn end(expected: &ExpectedEnd, target: &RecoveryTarget) -> String {
    let End { lsn, last_commit, stops_at } = match expected {
        ExpectedEnd::NotVerified { because } => {
            return format!("not verified: {because}. PostgreSQL ends with an error where it doesn't find the target");
        }
        ExpectedEnd::Verified(end) => end,
    };
    let last = match last_commit {
        Some(TransactionEnd { xid, time, lsn, .. }) => {
            format!("; the last transaction is {xid}, committed at {} ({lsn})", time.strftime("%Y-%m-%d %H:%M:%S%.6fZ"))
        }
        None => String::new(),
    };
    // A later transaction, which isn't there any more.
    let next = match stops_at {
        Some(stop) if stop.lsn >= *lsn => {
            format!("; the next one, {}, ended at {}", stop.xid, stop.time.strftime("%Y-%m-%d %H:%M:%S%.6fZ"))
        }
        _ => String::new(),
    };
    // Then there may be what a stopped server had in a segment that isn't whole.
    let later = if *target == RecoveryTarget::Latest { " or later" } else { "" };
    format!("{lsn}{later}{last}{next}")
}

/// Prints the plan for a snapshot.
///
/// # Errors
/// If stdout is closed.
pub fn print_snapshot_plan(plan: &SnapshotPlan, repository: &Repository) -> Result<(), Failure> {
    let SnapshotPlan { snapshot, wal_from, wal_through, reachable, .. } = plan;
    let complete = snapshot.stopped_at.strftime("%Y-%m-%d %H:%M:%SZ");
    let lines = [
        ("From", repository.store().description()),
        ("Snapshot", format!("{}, complete at {complete} ({})", snapshot.id, snapshot.stop_lsn)),
        ("Target", format!("{}, on timeline {}", plan.target, plan.timeline)),
        ("End", end(&plan.expected_end, &plan.target)),
        ("WAL", format!("from {wal_from}; without a gap through {wal_through} ({reachable})")),
    ];
    lines.iter().try_for_each(|(name, value)| output::print_line(&format!("{name:<8} {value}")))?;
    print_rolled_back(&plan.expected_end, &plan.target)?;
    print_gap(plan.gap, plan.reachable)
}

fn print_gap(gap: Option<SegmentName>, reachable: Lsn) -> Result<(), Failure> {
    match gap {
        None => Ok(()),
        Some(missing) => output::print_line(&format!(
            "WARNING {missing} is missing although later WAL is there: what was committed after {reachable} can't be restored"
        )),
    }
}
