//! `backup-incremental`: a base backup of what some transactions have changed since a full one.
//!
//! Each tool has its full backup of the same state, then the transactions run once, and each takes the increment of the
//! same change. So a run can't be made again for itself: how much others disturbed it stands beside the figures.

use crate::{
    database::Beside,
    report::Report,
    run::{Bench, say},
    tools::{Kind, Tool},
    works::Work,
};

pub fn run(bench: &mut Bench, tools: &[Box<dyn Tool>], report: &mut Report) {
    bench.database();
    let bench = &*bench;
    let tools: Vec<&dyn Tool> = tools.iter().map(|tool| &**tool).filter(|tool| tool.backups().is_some()).collect();
    for turn in 1..=bench.options.repeat {
        let repository = |tool: &dyn Tool| format!("incremental-{}-{turn}", tool.name());
        for tool in &tools {
            say(&format!("backup-incremental {turn} of {}: {} takes a full one", bench.options.repeat, tool.name()));
            let beside = Beside::start(bench, *tool, &repository(*tool), true);
            beside.back_up(Kind::Full).unwrap_or_else(|why| panic!("{}'s full backup failed: {why}", tool.name()));
        }
        bench.made_database().write();
        for tool in &tools {
            say(&format!("backup-incremental {turn} of {}: {}", bench.options.repeat, tool.name()));
            let beside = Beside::start(bench, *tool, &repository(*tool), false);
            match beside.back_up(Kind::Incremental) {
                Ok((outcome, _)) => report.add(Work::BackupIncremental, tool.name(), outcome),
                Err(why) => report.add_failure(Work::BackupIncremental, tool.name(), why),
            }
        }
        for tool in &tools {
            bench.store.remove(&repository(*tool));
        }
    }
}
