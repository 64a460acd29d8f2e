//! What pgsidecar's backups and restores are meant to reach beside pgBackRest.

use crate::{report::Summary, works::Work};

/// Which figure, how it must compare, and to how much of the other's.
type Target = (&'static str, fn(&Summary) -> Option<f64>, Bound);

enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

const SECONDS: fn(&Summary) -> Option<f64> = |summary| Some(summary.seconds.median);
const MB_PER_S: fn(&Summary) -> Option<f64> = |summary| Some(summary.mb_per_s.median);
const CPU: fn(&Summary) -> Option<f64> = |summary| Some(summary.cpu.median);
const STORED: fn(&Summary) -> Option<f64> = |summary| summary.stored.map(|bytes| bytes as f64);

fn targets(work: Work) -> Vec<Target> {
    match work {
        Work::BackupFull => vec![("MB/s", MB_PER_S, Bound::AtLeast(1.5)), ("CPU", CPU, Bound::AtMost(0.8))],
        Work::BackupIncremental => {
            vec![("bytes stored", STORED, Bound::AtMost(0.4)), ("seconds", SECONDS, Bound::AtMost(0.4))]
        }
        Work::RestoreFull | Work::RestoreChain => vec![("seconds", SECONDS, Bound::AtMost(0.4))],
        Work::WalDrain | Work::WalReplay | Work::Tps | Work::Daemon => Vec::new(),
    }
}

/// A line for each target of this work.
pub fn lines(work: Work, ours: &Summary, theirs: &Summary) -> Vec<String> {
    let line = |(name, figure, bound): Target| {
        let ratio = figure(ours)? / figure(theirs)?;
        let (wanted, is_met) = match bound {
            Bound::AtLeast(least) => (format!("at least {least}x"), ratio >= least),
            Bound::AtMost(most) => (format!("at most {most}x"), ratio <= most),
        };
        Some(format!("target {}: {name} {ratio:.2}x of pgBackRest's, {wanted}", if is_met { "met" } else { "MISSED" }))
    };
    targets(work).into_iter().filter_map(line).collect()
}
