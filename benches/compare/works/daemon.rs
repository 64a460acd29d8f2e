//! `daemon`, for pgsidecar alone: what the daemon holds when it has nothing to do, and how long a call of
//! `archive_command` takes for a segment that is in the repository already.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use crate::{
    machine::status_bytes,
    report::Report,
    run::{Bench, Place, say, segments_ready, wait_for_quiet},
    support::{run as run_command, told},
    tools::Pgsidecar,
};

/// How long the daemon has had nothing to do when it's looked at.
const IDLE: Duration = Duration::from_secs(10);
const CALLS: usize = 200;

pub fn run(bench: &mut Bench, report: &mut Report) {
    if !bench.options.has("pgsidecar") {
        return;
    }
    bench.backlog();
    let bench = &*bench;
    let repository = "daemon";
    let place = Place::new(bench, repository);
    bench.made_backlog().copy(&place.data);
    let mut names = segments_ready(&place.data);
    // Nothing waits when the daemon is looked at, even for one that looks for work by itself.
    let status = |name: &str| place.data.join("pg_wal/archive_status").join(name);
    for name in &names {
        std::fs::rename(status(&format!("{name}.ready")), status(&format!("{name}.done"))).unwrap();
    }
    let mut server = place.server(Vec::new(), &["archive_command = ''", "archive_mode = on"]);
    server.start(&[]);
    // Without TLS: s3s-fs refuses what it has before it has read all of it, and nginx makes of that that it's broken.
    let daemon = Pgsidecar::daemon(&place, &place.store.plain_endpoint());
    say("daemon: idle");
    std::thread::sleep(IDLE);
    let idle = status_bytes(daemon.pid(), "VmRSS").unwrap();

    say("daemon: calls of archive_command");
    names.truncate(20);
    let archive = |name: &str| -> Command {
        let mut helper = Pgsidecar::helper(&place);
        helper.arg("archive").arg(format!("pg_wal/{name}")).current_dir(&place.data).stdin(Stdio::null());
        helper
    };
    for name in &names {
        run_command(&mut archive(name));
    }
    wait_for_quiet();
    let mut times: Vec<f64> = (0..CALLS)
        .map(|call| {
            let mut helper = archive(&names[call % names.len()]);
            let began = Instant::now();
            let output = helper.output().unwrap();
            let took = began.elapsed().as_secs_f64() * 1e3;
            assert!(output.status.success(), "{}", told(&output));
            took
        })
        .collect();
    times.sort_by(f64::total_cmp);
    drop(daemon);
    server.stop("immediate");
    bench.store.remove(repository);
    report.set_daemon(idle, times[CALLS / 2], times[CALLS * 99 / 100]);
}
