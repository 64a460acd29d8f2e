//! What the commands with a private server have in common: arguments, progress, and an orderly end by a signal.

use std::{pin::Pin, sync::Mutex, time::Duration};

use clap::Args;
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};
use tokio::sync::watch;

use super::{SystemArgs, progress::Shown};
use crate::{
    estimate::Estimate,
    failure::{Code, Failure},
    settings::WorkSettings,
    side::{Observer, SideOptions, config::ServerSetting},
};

/// How the private server is made.
#[derive(Args, Debug)]
pub struct SideArgs {
    /// Leave what was restored, and the server's log, in the scratch directory
    #[arg(long)]
    keep: bool,
    /// A setting of the private server, such as shared_preload_libraries=timescaledb; can be given several times. It reads
    /// none of the live server's configuration
    #[arg(long = "set", value_name = "NAME=VALUE")]
    settings: Vec<ServerSetting>,
    #[command(flatten)]
    pub(super) system: SystemArgs,
}

impl SideArgs {
    /// The options that these arguments make.
    ///
    /// # Errors
    /// If it isn't known where this program is.
    pub(super) fn options(&self, work: &WorkSettings, inclusive: bool) -> Result<SideOptions, Failure> {
        Ok(SideOptions {
            work: work.clone(),
            inclusive,
            settings: self.settings.clone(),
            keep: self.keep,
            program: std::env::current_exe().map_err(|error| Failure::io("finding this program", &error))?,
        })
    }
}

/// Tells on stderr what happens.
pub(super) struct Narrator {
    json: bool,
    shown: Mutex<Option<Shown>>,
}

impl Narrator {
    /// Silent with `--json`.
    pub(super) fn new(json: bool) -> Narrator {
        Narrator { json, shown: Mutex::new(None) }
    }

    fn shown(&self, show: impl FnOnce(&mut Shown)) {
        if let Ok(mut shown) = self.shown.lock() {
            show(shown.get_or_insert_with(|| Shown::new(self.json)));
        }
    }
}

impl Observer for Narrator {
    fn say(&self, line: &str) {
        // What is replaced on a terminal must not stand in the middle of it.
        if let Ok(mut shown) = self.shown.lock() {
            shown.take();
        }
        if !self.json {
            eprintln!("{line}");
        }
    }

    fn doing(&self, what: &str) {
        self.shown(|shown| shown.doing(what));
    }

    fn bytes(&self, done: u64, total: u64, elapsed: Duration) {
        self.shown(|shown| shown.bytes(done, total, Estimate::new(done, total, elapsed), "restored"));
    }
}

/// Does the work, unless a signal comes first: then it's dropped, which ends the private server and removes what was
/// restored. A second signal ends us at once; the server ends all the same, and the next run removes the rest.
///
/// # Errors
/// The work's.
pub(super) async fn unless_signalled<T>(
    mut work: Pin<Box<dyn Future<Output = Result<T, Failure>> + '_>>,
) -> Result<T, Failure> {
    let (signalled, mut stop) = watch::channel(None);
    let mut signals =
        Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(|error| Failure::io("listening for signals", &error))?;
    std::thread::spawn(move || {
        for signal in signals.forever() {
            if signalled.send_replace(Some(signal)).is_some() {
                std::process::exit(128 + signal);
            }
        }
    });
    let signal = tokio::select! {
        done = &mut work => return done,
        signal = stop.wait_for(Option::is_some) => signal.ok().and_then(|signal| *signal),
    };
    drop(work);
    super::output::print_failure(&Failure::new(
        Code::Stopping,
        "stopped by a signal: the private server was ended, and what was restored is removed",
    ));
    // Threads of a restore may still wait for the store.
    std::process::exit(128 + signal.unwrap_or(SIGTERM))
}
