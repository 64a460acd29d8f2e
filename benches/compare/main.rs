//! `make bench`: pgsidecar beside other backup tools, on the same machine, with the same data, in one run.
//!
//! What is measured, and how to read it, is in `benches/README.md`. A work is a module of `works`, a tool one of
//! `tools`; each run of a work with a tool begins with the same files and an empty repository.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, reason = "a bench fails by panicking")]

mod backlog;
mod database;
mod delay;
mod machine;
mod options;
mod report;
mod run;
#[path = "../../tests/support/server.rs"]
mod server;
mod store;
#[allow(dead_code, unused_imports, reason = "the tests' kit, of which a bench uses a part")]
#[path = "../../tests/it/support/mod.rs"]
mod support;
mod targets;
mod tools;
mod works;

use options::Options;
use report::Report;
use run::Bench;

fn main() {
    let options = Options::from_environment();
    machine::adopt_orphans();
    let tools = tools::chosen(&options);
    let mut bench = Bench::start(options);
    let mut report = Report::new(&bench, &tools);
    for work in bench.options.works.clone() {
        works::run(work, &mut bench, &tools, &mut report);
    }
    report.print();
}
