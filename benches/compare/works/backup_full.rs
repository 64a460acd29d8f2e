//! `backup-full`: a base backup of an idle database, from the command's start to its end.

use std::process::Stdio;

use crate::{
    database::Beside,
    machine::Watch,
    report::Report,
    run::{Bench, Outcome, say, undisturbed, wait_for_quiet},
    store::files,
    support::command,
    tools::{Kind, Tool},
    works::Work,
};

pub fn run(bench: &mut Bench, tools: &[Box<dyn Tool>], report: &mut Report) {
    bench.database();
    let bench = &*bench;
    for turn in 1..=bench.options.repeat {
        for tool in tools.iter().filter(|tool| tool.backups().is_some()) {
            say(&format!("backup-full {turn} of {}: {}", bench.options.repeat, tool.name()));
            let repository = format!("full-{}-{turn}", tool.name());
            let outcome = undisturbed(|| {
                let beside = Beside::start(bench, &**tool, &repository, true);
                let taken = beside.back_up(Kind::Full);
                drop(beside);
                bench.store.remove(&repository);
                taken.unwrap_or_else(|why| panic!("{}'s backup failed: {why}", tool.name())).0
            });
            report.add(Work::BackupFull, tool.name(), outcome);
        }
        if bench.options.has("floor") {
            say(&format!("backup-full {turn} of {}: floor", bench.options.repeat));
            report.add(Work::BackupFull, "floor", undisturbed(|| floor(bench)));
        }
    }
}

/// Only compressing: two processes of `zstd -1`, each with about half of the bytes.
fn floor(bench: &Bench) -> Outcome {
    let database = bench.made_database();
    let data = &database.server().data;
    let mut halves = [(0, Vec::new()), (0, Vec::new())];
    let mut all = files(data);
    all.retain(|(path, _)| path.starts_with("base"));
    all.sort_by_key(|(_, size)| std::cmp::Reverse(*size));
    for (path, size) in all {
        let half = usize::from(halves[1].0 < halves[0].0);
        halves[half].0 += size;
        halves[half].1.push(path);
    }
    wait_for_quiet();
    let watch = Watch::begin("zstd");
    let mut processes = halves.each_ref().map(|(_, paths)| {
        let mut zstd = command(bench.options.root.join("usr/bin/zstd"));
        zstd.args(["-1", "-q", "-c", "--single-thread"]).args(paths).current_dir(data);
        zstd.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
    });
    for process in &mut processes {
        assert!(process.wait().unwrap().success());
    }
    let usage = watch.end();
    Outcome { usage, plain: database.bytes(), stored: None }
}
