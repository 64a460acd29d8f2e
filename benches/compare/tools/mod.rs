//! The tools that are compared, each set up as its documentation recommends for speed.

mod barman;
mod pgbackrest;
mod pgsidecar;

use std::{path::Path, process::Command};

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

    /// How it takes base backups, if that is compared.
    fn backups(&self) -> Option<&dyn Backups> {
        None
    }
}

/// A tool's base backups, read or written by [`PROCESSES`] threads or processes.
pub trait Backups {
    /// The directory of the repository that holds backups, and no WAL.
    fn directory(&self) -> &'static str;

    /// The command that takes a backup of the running server at once.
    fn create(&self, place: &Place, kind: Kind) -> Command;

    /// The newest backup in the repository.
    fn newest(&self, place: &Place) -> Backup;

    /// The command that restores this backup to an empty directory, to recover to where it's consistent.
    fn restore(&self, place: &Place, backup: &str, to: &Path) -> Command;
}

/// Threads or processes of each tool that work on a backup or a restore.
pub const PROCESSES: u32 = 2;

/// How much of the database a backup holds by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Full,
    /// What has changed since the last backup.
    Incremental,
}

/// A backup in a repository.
pub struct Backup {
    /// The name that the tool has given it.
    pub id: String,
    pub kind: Kind,
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
