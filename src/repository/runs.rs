//! The records of scheduled runs.

use jiff::{SignedDuration, Timestamp};
use pgsidecar_core::{
    layout::RepositoryObject,
    schedule::{RUN_FORMAT, RunId, RunRecord, Task},
};

use super::{Repository, damaged};
use crate::{
    failure::{Code, Failure},
    store::{ListRequest, Pages},
};

/// How far back the newest record is looked for: first close by, so that the list is short where runs are frequent.
const LOOK_BACK_DAYS: [i64; 3] = [3, 40, 800];

impl Repository {
    /// Stores the record of a run.
    ///
    /// # Errors
    /// The store's; [`Code::Conflict`] if there is one for that time.
    pub async fn store_run(&self, record: &RunRecord) -> Result<(), Failure> {
        self.store_json(&RepositoryObject::Run(record.task, record.id), record).await.map(|_| ())
    }

    /// The ids of a task's newest runs, oldest first: all from some day on, and none if the last was 800 days ago.
    ///
    /// # Errors
    /// The store's.
    pub async fn newest_runs(&self, task: Task) -> Result<Vec<RunId>, Failure> {
        let prefix = self.layout().runs_prefix(task);
        for days in LOOK_BACK_DAYS {
            let since = Timestamp::now().checked_sub(SignedDuration::from_hours(24 * days)).unwrap_or(Timestamp::MIN);
            let request = ListRequest::under(&prefix).after(format!("{prefix}{}", RunId::new(since)));
            let mut ids = Vec::new();
            let mut pages = Pages::new(self.store(), request);
            while let Some(page) = pages.next().await? {
                ids.extend(page.objects.iter().filter_map(|object| match self.layout().parse(&object.key) {
                    Some(RepositoryObject::Run(of, id)) if of == task => Some(id),
                    _ => None,
                }));
            }
            if !ids.is_empty() {
                ids.sort_unstable();
                return Ok(ids);
            }
        }
        Ok(Vec::new())
    }

    /// The record of a run; `None` if there is none.
    ///
    /// # Errors
    /// The store's; [`Code::Damaged`] if the record can't be parsed.
    pub async fn run(&self, task: Task, id: RunId) -> Result<Option<RunRecord>, Failure> {
        let Some(record) = self.read_json::<RunRecord>(&RepositoryObject::Run(task, id)).await? else {
            return Ok(None);
        };
        if record.format > RUN_FORMAT {
            return Err(Failure::new(
                Code::Damaged,
                format!(
                    "the record of run {task} {id} has format {}, and this pgsidecar knows {RUN_FORMAT}",
                    record.format
                ),
            )
            .hint("It was made by a newer pgsidecar: use that one."));
        }
        if record.system_identifier != self.layout().system() || record.id != id || record.task != task {
            return Err(damaged(&format!("the record of run {task} {id}"), "it is another run's"));
        }
        Ok(Some(record))
    }
}
