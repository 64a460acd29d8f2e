//! What the server beside the daemon says of its archiving. WAL that is never offered is missed by nobody: a wrong
//! `archive_command` shows in no request, so the server is asked.
//!
//! It's asked when `postmaster.pid` tells that it has started, and every five minutes from then on: `archive_command` can
//! be changed by a reload. Each time in a session of its own, for an instant.

use std::{
    fs,
    sync::{Arc, Mutex},
    time::Duration,
};

use pgsidecar_core::archiving::{ArchivingSettings, OtherWays};
use tokio::{sync::watch, time::Instant};

use super::{App, Work};
use crate::{
    failure::{Code, Failure},
    pgdata::{DataDirectory, FileStamp, ServerState},
    postgres::Session,
};

/// How often it's looked whether the server has started.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How often one that runs is asked.
const ASK_EVERY: Duration = Duration::from_secs(300);
/// How long after one that can't be asked is asked again, at first.
const RETRY_AFTER: Duration = Duration::from_secs(10);
/// After so many tries in vain it's told: until then it may be on its way up.
const TRIES: u32 = 3;

/// What is known of the server.
#[derive(Default)]
pub(super) struct KnownServer(Mutex<Known>);

#[derive(Clone, Default)]
struct Known {
    archiving: Option<Found>,
    /// Why it can't be asked.
    silent: Option<Failure>,
}

/// What the server has said.
#[derive(Clone)]
struct Found {
    settings: ArchivingSettings,
    /// Since when this `archive_command` is known of this start of the server: who asked before says nothing of it.
    since: Instant,
}

impl KnownServer {
    fn set(&self, known: Known) {
        if let Ok(mut old) = self.0.lock() {
            *old = known;
        }
    }

    fn get(&self) -> Known {
        self.0.lock().map(|known| known.clone()).unwrap_or_default()
    }
}

impl Work {
    /// Why the server doesn't archive through us, if it's known and so.
    pub(super) fn archiving_fault(&self, asked_last: Option<Instant>) -> Option<Failure> {
        let Found { settings, since } = self.server.get().archiving?;
        let has_asked = asked_last.is_some_and(|at| at >= since);
        let others = OtherWays { by_directory: self.settings.archive_directory.is_some(), has_asked };
        let fault = settings.fault(others)?;
        let hint = fault.hint(&self.settings.helper.display().to_string());
        Some(Failure::new(Code::Misconfigured, fault.to_string()).hint(hint))
    }

    /// What should be known of the server, and keeps nothing from working.
    pub(super) fn server_warnings(&self) -> Vec<Failure> {
        let Known { archiving, silent } = self.server.get();
        let shadowed = archiving.iter().flat_map(|found| found.settings.shadowed());
        let shadowed = shadowed.map(|one| Failure::new(Code::Misconfigured, one.to_string()).hint(one.hint()));
        silent.into_iter().chain(shadowed).collect()
    }

    async fn ask(&self, pgdata: &DataDirectory) -> Result<ArchivingSettings, Failure> {
        let session = Session::connect(&self.settings.connection).await?;
        let (theirs, ours) = (session.server().system_identifier, pgdata.control()?.system_identifier);
        if theirs != ours {
            let what = format!("the server that answers has system identifier {theirs}, the data directory {ours}");
            return Err(Failure::new(Code::WrongCluster, what).hint("Correct PGHOST and PGPORT, or PGDATA."));
        }
        Ok(session.archiving().await)
    }
}

/// Asks the server, until it's told to stop.
pub(super) async fn keep(app: Arc<App>, mut stop: watch::Receiver<bool>) {
    let Ok(work) = app.work() else { return };
    let mut last = None;
    let mut next = Instant::now();
    let mut tries = 0;
    let mut told = Vec::new();
    while !*stop.borrow() {
        if let Ok((pgdata, stamp)) = running(work) {
            if last != Some(stamp) {
                (last, next, tries) = (Some(stamp), Instant::now(), 0);
            }
            if next <= Instant::now() {
                match work.ask(&pgdata).await {
                    Ok(settings) => {
                        let before = work.server.get().archiving;
                        let same = before.filter(|found| found.settings.archive_command == settings.archive_command);
                        let since = same.map_or_else(Instant::now, |found| found.since);
                        work.server.set(Known { archiving: Some(Found { settings, since }), silent: None });
                        (next, tries) = (Instant::now() + ASK_EVERY, 0);
                    }
                    Err(failure) => {
                        tracing::debug!(hint = failure.hint, "the server can't be asked how it archives: {failure}");
                        tries += 1;
                        next = Instant::now() + (RETRY_AFTER * 2_u32.saturating_pow(tries - 1)).min(ASK_EVERY);
                        if tries >= TRIES {
                            let silent = failure.context("the server can't be asked how it archives");
                            work.server.set(Known { silent: Some(silent), ..work.server.get() });
                        }
                    }
                }
                tell(&app, work, &mut told);
            }
        } else if last.take().is_some() {
            work.server.set(Known::default());
        }
        let _ = tokio::time::timeout(LOOK_EVERY, stop.changed()).await;
    }
}

/// The data directory, and what tells this start of its server, and each change of its state, from others.
fn running(work: &Work) -> Result<(DataDirectory, FileStamp), Failure> {
    let (pgdata, _) = work.data_directory()?;
    let gone = || Failure::new(Code::PostgresUnavailable, "no server runs on the data directory");
    match pgdata.server() {
        Ok(ServerState::Running(_)) => {
            let meta = fs::metadata(pgdata.path().join("postmaster.pid")).map_err(|_| gone())?;
            Ok((pgdata, FileStamp::of(&meta)))
        }
        _ => Err(gone()),
    }
}

/// Logs what is new.
fn tell(app: &App, work: &Work, told: &mut Vec<String>) {
    let fault = work.archiving_fault(app.asked_last());
    let warnings = work.server_warnings();
    for failure in fault.iter().filter(|failure| !told.contains(&failure.message)) {
        tracing::error!(hint = failure.hint, "{failure}");
    }
    for failure in warnings.iter().filter(|failure| !told.contains(&failure.message)) {
        tracing::warn!(hint = failure.hint, "{failure}");
    }
    *told = fault.into_iter().chain(warnings).map(|failure| failure.message).collect();
}
