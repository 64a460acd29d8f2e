//! Restores in the place of the database that is there, as the control socket asks for them.

use std::sync::Arc;

use pgsidecar_core::{recovery::RestoreOrder, switch::Switch};

use super::App;
use crate::{
    failure::{Code, Failure},
    jobs::Job,
    restore::command::restore_command,
    switch::{self, Asker, Kept},
};

impl App {
    /// Starts a restore that takes the place of the database at its next start.
    ///
    /// # Errors
    /// Wrong settings, no data directory, or a restore is under way.
    pub fn start_restore(self: &Arc<Self>, order: RestoreOrder) -> Result<Arc<Job>, Failure> {
        let work = self.work()?;
        if self.is_stopping() {
            return Err(Failure::new(Code::Stopping, "pgsidecar is stopping"));
        }
        order.request()?;
        let (pgdata, control) = work.data_directory()?;
        let repository = work.repository(control.system_identifier);
        let (settings, process) = (work.settings.clone(), self.process.clone());
        self.jobs.start("restore", |progress| async move {
            Asker { work: &settings, process: &process }.prepare(&repository, pgdata.path(), &order, progress).await
        })
    }

    /// What is prepared, and what is kept.
    ///
    /// # Errors
    /// Wrong settings, or what can't be looked at.
    pub async fn restores(&self) -> Result<Kept, Failure> {
        let path = self.work()?.settings.pgdata()?.to_owned();
        tokio::task::spawn_blocking(move || switch::list(&path)).await?
    }

    /// Prepares that what was there before the last restore comes back.
    ///
    /// # Errors
    /// As [`switch::undo`].
    pub async fn undo_restore(&self) -> Result<Switch, Failure> {
        let work = self.work()?;
        let (pgdata, control) = work.data_directory()?;
        let system = control.system_identifier;
        let command = restore_command(&work.settings.helper, self.process.wal_listen, system, false)?;
        tokio::task::spawn_blocking(move || switch::undo(&pgdata, &command)).await?
    }

    /// Takes back what is prepared.
    ///
    /// # Errors
    /// As [`switch::cancel`].
    pub async fn cancel_restore(&self) -> Result<Switch, Failure> {
        let path = self.work()?.settings.pgdata()?.to_owned();
        tokio::task::spawn_blocking(move || switch::cancel(&path)).await?
    }

    /// Removes what is kept.
    ///
    /// # Errors
    /// As [`switch::clean`].
    pub async fn clean_restores(&self) -> Result<Vec<std::path::PathBuf>, Failure> {
        let path = self.work()?.settings.pgdata()?.to_owned();
        tokio::task::spawn_blocking(move || switch::clean(&path)).await?
    }
}
