//! `wal-replay`: from the start of a server on a base backup until it has recovered all archived WAL and is promoted.

use crate::{
    machine::Watch,
    report::Report,
    run::{Bench, Daemon, Outcome, Place, say, undisturbed, wait_for, wait_for_quiet},
    tools::Tool,
    works::{Work, wal_drain},
};

pub fn run(bench: &mut Bench, tools: &[Box<dyn Tool>], report: &mut Report) {
    for tool in tools {
        say(&format!("wal-replay: {} archives", tool.name()));
        wal_drain::drain(bench, &**tool, &repository(&**tool));
    }
    bench.backlog();
    for turn in 1..=bench.options.repeat {
        for tool in tools {
            say(&format!("wal-replay {turn} of {}: {}", bench.options.repeat, tool.name()));
            let outcome = undisturbed(|| {
                let place = Place::new(bench, &repository(&**tool));
                bench.made_backlog().copy_base(&place.data);
                tool.configure(&place);
                replay(bench, &place, Some(&**tool))
            });
            report.add(Work::WalReplay, tool.name(), outcome);
        }
        if bench.options.has("floor") {
            say(&format!("wal-replay {turn} of {}: floor", bench.options.repeat));
            let outcome = undisturbed(|| {
                let place = Place::new(bench, "");
                bench.made_backlog().copy_base(&place.data);
                bench.made_backlog().link_segments(&place.data);
                replay(bench, &place, None)
            });
            report.add(Work::WalReplay, "floor", outcome);
        }
    }
    for tool in tools {
        bench.store.remove(&repository(&**tool));
    }
}

fn repository(tool: &dyn Tool) -> String {
    format!("replay-{}", tool.name())
}

/// Recovers with this tool, or from what is in `pg_wal` already.
fn replay(bench: &Bench, place: &Place, tool: Option<&dyn Tool>) -> Outcome {
    let backlog = bench.made_backlog();
    let restore_command = tool.map_or("/bin/false".to_owned(), |tool| tool.restore_command(place));
    let environment = tool.map(|tool| tool.environment(place)).unwrap_or_default();
    // A copy of a server archives nothing.
    let lines = ["archive_mode = off".to_owned(), format!("restore_command = '{restore_command}'")];
    let mut server = place.server(environment, &lines.each_ref().map(String::as_str));
    backlog.warm();

    wait_for_quiet();
    let watch = Watch::begin(tool.map_or("postgres", Tool::process));
    let daemon: Option<Daemon> = tool.and_then(|tool| tool.start(place));
    server.spawn(&[]);
    wait_for("the server is promoted", &server.log_path(), || {
        // For reads it is ready earlier; that line is another.
        let promoted = server.log().contains("database system is ready to accept connections");
        assert!(promoted || server.exited().is_none(), "PostgreSQL ended:\n{}", server.log());
        promoted
    });
    let mut usage = watch.end();
    if tool.is_none() {
        (usage.peak, usage.peak_anonymous) = (0, 0);
    }
    backlog.check_whole(&server);
    drop(daemon);
    server.stop("immediate");
    Outcome { usage, plain: backlog.bytes(), stored: None }
}
