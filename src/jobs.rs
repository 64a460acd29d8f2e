//! Work that the daemon was asked for and that outlives the request: base backups, restores.
//!
//! One job of a kind runs at a time. The last few are remembered, for whoever asks how they ended.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, atomic::Ordering::Relaxed},
    time::Duration,
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::{
    estimate::Estimate,
    failure::{Code, Failure},
    progress::{Phase, Progress},
};

/// How many jobs are remembered.
const REMEMBERED: usize = 20;

/// A job's number; counts from 1 since the daemon's start.
pub type JobId = u64;

/// How a job ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// With this result.
    Succeeded(serde_json::Value),
    /// With this failure.
    Failed(Failure),
}

/// A job as it's told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its number.
    pub job: JobId,
    /// What it does: `backup`, `restore` or `dump`.
    pub kind: String,
    /// When it began.
    pub started_at: Timestamp,
    /// Bytes of files read or, by a restore, written so far.
    pub bytes: u64,
    /// About how many there will be; 0 while unknown.
    pub total_bytes: u64,
    /// Files done.
    pub files: u64,
    /// What it's at.
    pub phase: Phase,
    /// Which of several things it's at: of a dump, the database.
    #[serde(default)]
    pub doing: Option<String>,
    /// How fast it goes, once that can be said.
    pub estimate: Option<Estimate>,
    /// How it ended; `None` while it runs.
    pub outcome: Option<Outcome>,
}

/// A job.
pub struct Job {
    id: JobId,
    kind: &'static str,
    started_at: Timestamp,
    progress: Arc<Progress>,
    outcome: watch::Receiver<Option<Outcome>>,
}

impl Job {
    /// How it stands.
    pub fn snapshot(&self) -> Snapshot {
        let (bytes, total_bytes) = (self.progress.bytes.load(Relaxed), self.progress.total_bytes.load(Relaxed));
        let moving = self.progress.moving_for();
        Snapshot {
            job: self.id,
            kind: self.kind.to_owned(),
            started_at: self.started_at,
            bytes,
            total_bytes,
            files: self.progress.files.load(Relaxed),
            phase: self.progress.phase(),
            doing: self.progress.doing(),
            estimate: moving.and_then(|elapsed| Estimate::new(bytes, total_bytes, elapsed)),
            outcome: self.outcome.borrow().clone(),
        }
    }

    /// Whether it has not ended.
    pub fn is_running(&self) -> bool {
        self.outcome.borrow().is_none()
    }

    /// Waits until it has ended, but no longer than this.
    pub async fn ended(&self, at_most: Duration) {
        let mut outcome = self.outcome.clone();
        let _ = tokio::time::timeout(at_most, outcome.wait_for(Option::is_some)).await;
    }
}

/// All jobs since the start.
#[derive(Default)]
pub struct Jobs {
    list: Mutex<(JobId, BTreeMap<JobId, Arc<Job>>)>,
}

impl Jobs {
    /// Starts a job.
    ///
    /// # Errors
    /// [`Code::Busy`] if one of its kind runs.
    pub fn start<T, F>(&self, kind: &'static str, work: impl FnOnce(Arc<Progress>) -> F) -> Result<Arc<Job>, Failure>
    where
        T: Serialize,
        F: Future<Output = Result<T, Failure>> + Send + 'static,
    {
        let mut list = self.list.lock().map_err(|_| Failure::internal("the list of jobs is unusable"))?;
        if let Some(running) = list.1.values().find(|job| job.kind == kind && job.is_running()) {
            return Err(Failure::new(
                Code::Busy,
                format!("a {kind} is already under way, since {}", running.started_at),
            )
            .hint("Wait for it to end; 'pgsidecar status' shows it."));
        }
        list.0 += 1;
        let id = list.0;
        let progress = Arc::new(Progress::default());
        let (sender, outcome) = watch::channel(None);
        let work = work(progress.clone());
        tokio::spawn(async move {
            // In a task of its own, so that a panic ends the job instead of leaving it running for ever.
            let ended = tokio::spawn(async move {
                let value = work.await?;
                serde_json::to_value(value).map_err(Failure::internal)
            });
            let ended = ended.await.unwrap_or_else(|panic| Err(panic.into()));
            if let Err(failure) = &ended {
                tracing::error!(hint = failure.hint, "{kind} failed: {failure}");
            }
            let _ = sender.send(Some(ended.map_or_else(Outcome::Failed, Outcome::Succeeded)));
        });
        let job = Arc::new(Job { id, kind, started_at: Timestamp::now(), progress, outcome });
        list.1.insert(id, job.clone());
        while list.1.len() > REMEMBERED {
            let Some(oldest) = list.1.iter().find(|(_, job)| !job.is_running()).map(|(id, _)| *id) else { break };
            list.1.remove(&oldest);
        }
        Ok(job)
    }

    /// A job by its number.
    pub fn get(&self, id: JobId) -> Option<Arc<Job>> {
        self.list.lock().ok()?.1.get(&id).cloned()
    }

    /// The youngest job.
    pub fn last(&self) -> Option<Arc<Job>> {
        self.list.lock().ok()?.1.values().next_back().cloned()
    }

    /// Makes running jobs end soon, and waits until they have.
    pub async fn cancel(&self) {
        let running: Vec<Arc<Job>> = match self.list.lock() {
            Ok(list) => list.1.values().filter(|job| job.is_running()).cloned().collect(),
            Err(_) => return,
        };
        for job in &running {
            job.progress.cancel();
        }
        for job in running {
            job.ended(Duration::MAX).await;
        }
    }
}
