//! `restore-full` and `restore-chain`: from the start of the command until an empty directory holds the database durably.
//! A full backup, or an incremental one on an incremental one on a full one.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use crate::{
    database::{Beside, content_of},
    machine::Watch,
    report::Report,
    run::{Bench, MAJOR, Outcome, say, try_undisturbed, undisturbed, wait_for, wait_for_quiet},
    store::files,
    support::{Postgres, command, run as run_command, told},
    tools::{Kind, Tool},
    works::Work,
};

/// What there is to restore of a tool.
struct Backed<'a> {
    tool: &'a dyn Tool,
    repository: String,
    /// What the chosen backup is called, or why there is none.
    backup: Result<String, String>,
}

pub fn run(work: Work, bench: &mut Bench, tools: &[Box<dyn Tool>], report: &mut Report) {
    bench.database();
    let bench = &*bench;
    let mut backed: Vec<Backed<'_>> = tools
        .iter()
        .map(|tool| &**tool)
        .filter(|tool| tool.backups().is_some())
        .map(|tool| Backed { tool, repository: format!("restore-{}", tool.name()), backup: Err(String::new()) })
        .collect();
    let steps: &[Kind] =
        if work == Work::RestoreFull { &[Kind::Full] } else { &[Kind::Full, Kind::Incremental, Kind::Incremental] };
    for (step, kind) in steps.iter().enumerate() {
        if step > 0 {
            bench.made_database().write();
        }
        for Backed { tool, repository, backup } in &mut backed {
            if step > 0 && backup.is_err() {
                continue;
            }
            say(&format!("{}: {} backs up, {} of {}", work.name(), tool.name(), step + 1, steps.len()));
            *backup = Beside::start(bench, *tool, repository, step == 0).back_up(*kind).map(|(_, backup)| backup.id);
        }
    }
    let content = bench.made_database().content();
    for turn in 1..=bench.options.repeat {
        for backed in &mut backed {
            let Ok(id) = &backed.backup else { continue };
            say(&format!("{} {turn} of {}: {}", work.name(), bench.options.repeat, backed.tool.name()));
            match try_undisturbed(|| restore(bench, backed, id, &content)) {
                Ok(outcome) => report.add(work, backed.tool.name(), outcome),
                Err(why) => backed.backup = Err(why),
            }
        }
        if bench.options.has("floor") {
            say(&format!("{} {turn} of {}: floor", work.name(), bench.options.repeat));
            report.add(work, "floor", undisturbed(|| floor(bench)));
        }
    }
    for Backed { tool, repository, backup } in backed {
        if let Err(why) = backup {
            report.add_failure(work, tool.name(), why);
        }
        bench.store.remove(&repository);
    }
}

fn restore(bench: &Bench, backed: &Backed<'_>, id: &str, content: &str) -> Result<Outcome, String> {
    let tool = backed.tool;
    let beside = Beside::start(bench, tool, &backed.repository, false);
    let to = empty(bench);
    let mut restore = tool.backups().ok_or("it isn't compared")?.restore(&beside.place, id, &to);
    beside.place.store.warm(&backed.repository);
    run_command(&mut command("sync"));
    wait_for_quiet();
    let watch = Watch::begin(tool.process());
    let output = restore.output().unwrap();
    let usage = watch.end();
    let outcome = Outcome { usage, plain: size(&to), stored: None };
    let restored = if output.status.success() { check_whole(bench, &to, content) } else { Err(told(&output)) };
    fs::remove_dir_all(&to).unwrap();
    restored.map(|()| outcome)
}

/// The restored server holds what the original does.
fn check_whole(bench: &Bench, restored: &Path, content: &str) -> Result<(), String> {
    let mut server = Postgres::on(&bench.scratch, restored.to_owned(), MAJOR);
    server.spawn(&["-c", "archive_mode=off"]);
    let log = server.log_path();
    wait_for("the restored server is promoted, or ends", &log, || {
        let promoted = || server.try_sql("SELECT pg_is_in_recovery()").is_ok_and(|answer| answer == "f");
        promoted() || server.exited().is_some()
    });
    let checked = if server.exited().is_some() {
        Err(format!("PostgreSQL doesn't run on what was restored:\n{}", server.log()))
    } else if content_of(&server) == content {
        Ok(())
    } else {
        Err("the restored database isn't the one that was backed up".to_owned())
    };
    if server.exited().is_none() {
        server.stop("immediate");
    }
    fs::remove_dir_all(&server.socket).unwrap();
    fs::remove_file(server.log_path()).unwrap();
    checked
}

/// Only copying: the data directory from the page cache, and it's durable.
fn floor(bench: &Bench) -> Outcome {
    let to = empty(bench);
    let data = &bench.made_database().server().data;
    let mut copy = command("sh");
    // Without WAL, which a backup doesn't have.
    let script = r#"for name in *; do [ "$name" = pg_wal ] || cp -a --reflink=never "$name" "$1"/; done; sync -f "$1""#;
    copy.args(["-c", script, "sh"]).arg(&to).current_dir(data);
    run_command(&mut command("sync"));
    wait_for_quiet();
    let watch = Watch::begin("cp");
    run_command(&mut copy);
    let usage = watch.end();
    let outcome = Outcome { usage, plain: size(&to), stored: None };
    fs::remove_dir_all(&to).unwrap();
    outcome
}

fn empty(bench: &Bench) -> PathBuf {
    let to = bench.scratch.dir("restored");
    fs::set_permissions(&to, fs::Permissions::from_mode(0o700)).unwrap();
    to
}

fn size(directory: &Path) -> u64 {
    files(directory).iter().map(|(_, size)| size).sum()
}
