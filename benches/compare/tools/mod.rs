//! The tools that are compared, each set up as its documentation recommends for speed.

mod barman;
mod pgbackrest;
mod pgsidecar;

pub use pgsidecar::Pgsidecar;

use crate::{
    options::Options,
    run::{Daemon, Place, say},
};

/// A backup tool.
pub trait Tool {
    fn name(&self) -> &'static str;

    /// The name of the processes that it consists of, as the kernel has it.
    fn process(&self) -> &'static str;

    /// Its release.
    fn version(&self) -> String;

    /// The environment of the server, and so of the commands that it starts.
    fn environment(&self, place: &Place) -> Vec<(String, String)>;

    /// Makes an empty repository for the running server. Not timed.
    fn create_repository(&self, place: &Place);

    /// Writes what its commands need beside the server, before anything is timed.
    fn configure(&self, place: &Place);

    /// Starts what has to run beside the server; timed.
    fn start(&self, place: &Place) -> Option<Daemon>;

    fn archive_command(&self, place: &Place) -> String;

    fn restore_command(&self, place: &Place) -> String;
}

/// Those that were asked for and work here.
pub fn chosen(options: &Options) -> Vec<Box<dyn Tool>> {
    let mut tools: Vec<Box<dyn Tool>> = Vec::new();
    if options.has("pgsidecar") {
        tools.push(Box::new(Pgsidecar));
    }
    if options.has("pgbackrest") {
        tools.push(Box::new(pgbackrest::PgBackRest { program: options.root.join("usr/bin/pgbackrest") }));
    }
    if options.has("barman-cloud") {
        match barman::Barman::find(&options.root) {
            Ok(barman) => tools.push(Box::new(barman)),
            Err(why) => say(&format!("barman-cloud is left out, it doesn't run here: {why}")),
        }
    }
    tools
}

/// The variables by which AWS's tools find the store.
fn aws(place: &Place) -> Vec<(String, String)> {
    let variables = [
        ("AWS_ACCESS_KEY_ID", place.store.access_key()),
        ("AWS_SECRET_ACCESS_KEY", place.store.secret_key()),
        ("AWS_REGION", "us-east-1"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ];
    variables.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec()
}
