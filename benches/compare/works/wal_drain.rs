//! `wal-drain`: from the moment that PostgreSQL gets an archive_command until nothing waits to be archived.

use std::process::Stdio;

use crate::{
    backlog::Backlog,
    machine::Watch,
    report::Report,
    run::{Bench, Outcome, Place, ready, reload, say, undisturbed, wait_for, wait_for_quiet},
    support::command,
    tools::Tool,
    works::Work,
};

pub fn run(bench: &mut Bench, tools: &[Box<dyn Tool>], report: &mut Report) {
    bench.backlog();
    for turn in 1..=bench.options.repeat {
        for tool in tools {
            say(&format!("wal-drain {turn} of {}: {}", bench.options.repeat, tool.name()));
            let repository = format!("drain-{}-{turn}", tool.name());
            let outcome = undisturbed(|| {
                let outcome = drain(bench, &**tool, &repository);
                bench.store.remove(&repository);
                outcome
            });
            report.add(Work::WalDrain, tool.name(), outcome);
        }
        if bench.options.has("floor") {
            say(&format!("wal-drain {turn} of {}: floor", bench.options.repeat));
            report.add(Work::WalDrain, "floor", undisturbed(|| floor(bench)));
        }
    }
}

/// Has a server archive the backlog to a new repository, which stays.
pub fn drain(bench: &mut Bench, tool: &dyn Tool, repository: &str) -> Outcome {
    bench.backlog();
    let bench = &*bench;
    let backlog = bench.made_backlog();
    let place = Place::new(bench, repository);
    backlog.copy(&place.data);
    tool.configure(&place);
    // Without a command the archiver waits to be told of one.
    let mut server = place.server(tool.environment(&place), &["archive_command = ''", "archive_mode = on"]);
    server.start(&[]);
    tool.create_repository(&place);
    server.configure(&[&format!("archive_command = '{}'", tool.archive_command(&place))]);
    assert_eq!(ready(&place.data).iter().filter(|name| name.len() == 24).count(), backlog.count());
    backlog.warm();

    wait_for_quiet();
    let watch = Watch::begin(tool.process());
    let daemon = tool.start(&place);
    reload(&place.data);
    wait_for("all WAL is archived", &server.log_path(), || ready(&place.data).is_empty());
    let usage = watch.end();
    drop(daemon);
    server.stop("immediate");
    let stored = Some(bench.store.bytes_under(repository));
    Outcome { usage, plain: backlog.bytes(), stored }
}

/// Only compressing: two processes of `zstd -1`, each with every other segment.
fn floor(bench: &Bench) -> Outcome {
    let backlog: &Backlog = bench.made_backlog();
    backlog.warm();
    wait_for_quiet();
    let paths = backlog.paths();
    let watch = Watch::begin("zstd");
    let mut processes: Vec<_> = (0..2)
        .map(|half| {
            let mut zstd = command(bench.options.root.join("usr/bin/zstd"));
            zstd.args(["-1", "-q", "-c", "--single-thread"]).args(paths.iter().skip(half).step_by(2));
            zstd.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
        })
        .collect();
    for process in &mut processes {
        assert!(process.wait().unwrap().success());
    }
    let usage = watch.end();
    Outcome { usage, plain: backlog.bytes(), stored: None }
}
