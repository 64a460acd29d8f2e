//! Dumps that the daemon takes, and what it knows of them.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use pgsidecar_core::DumpId;
use serde::Serialize;

use super::App;
use crate::{
    dump::{self, DumpRequest, server::Way},
    failure::{Code, Failure},
    jobs::Job,
    repository::Repository,
};

/// How old what is known of the last dump may be.
const CACHE: Duration = Duration::from_secs(20);

/// The newest complete dump, for the status.
#[derive(Clone, Debug, Serialize)]
pub struct LastDump {
    /// Its id.
    pub id: DumpId,
    /// When it was complete.
    pub finished_at: Timestamp,
    /// How many databases it has.
    pub databases: usize,
}

/// A dump that failed, for the status.
#[derive(Clone, Debug, Serialize)]
pub struct FailedDump {
    /// When.
    pub at: Timestamp,
    /// Why.
    pub reason: Failure,
}

impl FailedDump {
    /// As one of the things that are wrong.
    pub(super) fn problem(&self) -> Failure {
        self.reason.clone().context(format!("the dump that was tried last failed at {}", self.at))
    }
}

/// What is known of dumps.
#[derive(Default)]
pub(super) struct Dumped {
    last: tokio::sync::Mutex<Option<(Instant, Option<LastDump>)>>,
    failure: Mutex<Option<FailedDump>>,
}

impl Dumped {
    /// How the last one that was tried failed.
    pub(super) fn failure(&self) -> Option<FailedDump> {
        self.failure.lock().ok().and_then(|failure| failure.clone())
    }

    /// The newest one that is complete.
    pub(super) async fn last(&self, repository: &Repository) -> Result<Option<LastDump>, Failure> {
        let mut cached = self.last.lock().await;
        if let Some((at, last)) = &*cached
            && at.elapsed() < CACHE
        {
            return Ok(last.clone());
        }
        let mut last = None;
        // The newest with a record: those without aren't complete.
        for id in repository.dump_ids().await?.into_iter().rev() {
            if let Some(record) = repository.dump(id).await? {
                last = Some(LastDump { id, finished_at: record.finished_at, databases: record.databases.len() });
                break;
            }
        }
        *cached = Some((Instant::now(), last.clone()));
        Ok(last)
    }

    async fn note(&self, failure: Option<&Failure>) {
        if let Ok(mut known) = self.failure.lock() {
            *known = failure.map(|reason| FailedDump { at: Timestamp::now(), reason: reason.clone() });
        }
        *self.last.lock().await = None;
    }
}

impl App {
    /// Starts a dump.
    ///
    /// # Errors
    /// Wrong settings, no data directory, or one that is under way.
    pub fn start_dump(self: &Arc<Self>, request: DumpRequest) -> Result<Arc<Job>, Failure> {
        let work = self.work()?;
        if self.is_stopping() {
            return Err(Failure::new(Code::Stopping, "pgsidecar is stopping"));
        }
        let system = work.data_directory()?.1.system_identifier;
        let (repository, settings, app) = (work.repository(system), work.settings.clone(), self.clone());
        self.jobs.start("dump", |progress| async move {
            let done = async {
                let server = dump::connect(&settings, Way::Own).await?;
                let there = server.system_identifier().await?;
                if there != system {
                    return Err(Failure::new(
                        Code::WrongCluster,
                        format!(
                            "the server at {} has system identifier {there}, the data directory {system}",
                            server.description()
                        ),
                    )
                    .hint("Check PGHOST, PGPORT and PGDATA; 'pgsidecar dump create --once' dumps any server."));
                }
                dump::create(&server, &repository, &settings.instance, &request, progress).await
            };
            let done = done.await;
            if let Ok(work) = &app.work {
                work.dumped.note(done.as_ref().err()).await;
            }
            done
        })
    }
}
