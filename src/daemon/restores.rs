//! Restores in the place of the database that is there, as the control socket asks for them.

use std::sync::Arc;

use pgsidecar_core::{recovery::RecoveryTarget, switch::Switch};

use super::App;
use crate::{
    failure::{Code, Failure},
    jobs::Job,
    pgdata::DataDirectory,
    progress::Progress,
    repository::Repository,
    restore::{self, RestoreOptions, default_restore_command, order::RestoreOrder},
    settings::{ProcessSettings, WorkSettings},
    switch::{self, Kept},
};

/// Plans a restore and writes it beside the database that is there.
///
/// # Errors
/// As [`restore::plan`] and [`switch::stage`].
pub async fn stage(
    repository: &Repository,
    pgdata: &DataDirectory,
    settings: (&WorkSettings, &ProcessSettings),
    order: &RestoreOrder,
    progress: Arc<Progress>,
) -> Result<Switch, Failure> {
    let (work, process) = settings;
    let plan = restore::plan(repository, order.request()?).await?;
    // The end of the WAL is in the old directory's own pg_wal, from which it's taken along, unless that server had left the
    // timeline. A tail in the repository may be older.
    let has_the_end = pgdata.control()?.timeline == plan.timeline;
    let tail = plan.target == RecoveryTarget::Latest && !has_the_end;
    let restore_command = match &order.restore_command {
        Some(command) => command.clone(),
        None => default_restore_command(&work.helper, process.wal_listen, repository, tail)?,
    };
    let options = RestoreOptions {
        to: pgdata.path().to_owned(),
        inclusive: !order.exclusive,
        action: order.action,
        tablespaces: order.tablespaces.clone(),
        restore_command,
        parallelism: work.parallelism,
    };
    switch::stage(repository, pgdata, &plan, &options, progress).await
}

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
            stage(&repository, &pgdata, (&settings, &process), &order, progress).await
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
        let repository = work.repository(control.system_identifier);
        let command = default_restore_command(&work.settings.helper, self.process.wal_listen, &repository, false)?;
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
