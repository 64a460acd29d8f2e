//! `tps`, for pgsidecar alone: pgbench's transactions a second before, during and after full backups. WAL is archived all
//! the time.

use std::{
    process::Stdio,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    thread,
};

use crate::{
    database::Beside,
    machine::Watch,
    options::CLIENTS,
    report::{Report, Tps},
    run::{Bench, Outcome, say, wait_for_quiet},
    support::{command, run as run_command, told},
    tools::{Backups, Kind, Pgsidecar},
};

/// How long pgbench runs each time, in seconds.
const SECONDS: u32 = 10;

pub fn run(bench: &mut Bench, report: &mut Report) {
    if !bench.options.has("pgsidecar") {
        return;
    }
    bench.database();
    let bench = &*bench;
    let repository = "tps";
    let beside = Beside::start(bench, &Pgsidecar, repository, true);
    // Not counted: the first run on a database is like no other.
    pgbench(bench);
    for turn in 1..=bench.options.repeat {
        say(&format!("tps {turn} of {}", bench.options.repeat));
        settle(bench);
        let before = pgbench(bench);
        settle(bench);
        let (over, backups) = (AtomicBool::new(false), AtomicUsize::new(0));
        let during = thread::scope(|scope| {
            scope.spawn(|| {
                // One ends too soon: as many as fit.
                while !over.load(Relaxed) {
                    let output = Pgsidecar.create(&beside.place, Kind::Full).stdin(Stdio::null()).output().unwrap();
                    assert!(output.status.success(), "the backup failed: {}", told(&output));
                    backups.fetch_add(1, Relaxed);
                }
            });
            let during = pgbench(bench);
            over.store(true, Relaxed);
            during
        });
        settle(bench);
        let after = pgbench(bench);
        let disturbance = [before.1, during.1, after.1].into_iter().fold(0.0, f64::max);
        let (before, during, after) = (before.0, during.0, after.0);
        report.add_tps(Tps { before, during, after, backups: backups.into_inner(), disturbance });
    }
    drop(beside);
    bench.store.remove(repository);
}

/// The small tables are vacuumed, as pgbench does by itself, and all pages are written: each phase has the same first
/// changes of pages in its WAL.
fn settle(bench: &Bench) {
    bench.made_database().server().sql("VACUUM pgbench_branches, pgbench_tellers");
    bench.made_database().server().sql("CHECKPOINT");
    run_command(&mut command("sync"));
    wait_for_quiet();
}

/// pgbench's own figure, and the share of the machine that others had meanwhile.
fn pgbench(bench: &Bench) -> (f64, f64) {
    let (clients, seconds) = (CLIENTS.to_string(), SECONDS.to_string());
    let mut pgbench = bench.made_database().server().client("pgbench");
    let watch = Watch::begin("pgsidecar");
    let told = run_command(pgbench.args(["-n", "-c", &clients, "-j", "2", "-T", &seconds]));
    let usage = watch.end();
    let figure = told.lines().find_map(|line| line.strip_prefix("tps = ")?.split_whitespace().next()?.parse().ok());
    let figure = figure.unwrap_or_else(|| panic!("pgbench told no tps:\n{told}"));
    (figure, Outcome { usage, ..Outcome::default() }.disturbance())
}
