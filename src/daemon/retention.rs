//! Retention, as the control socket asks for it.

use std::sync::Arc;

use jiff::Timestamp;
use pgsidecar_core::BackupId;

use super::App;
use crate::{
    failure::{Code, Failure},
    jobs::Job,
    repository::pins::{self, Pin},
    retention::{self, growth},
};

impl App {
    /// Starts to remove what the policy doesn't keep, or to look what would be.
    ///
    /// # Errors
    /// Wrong settings, no data directory, or a prune is under way.
    pub fn start_prune(self: &Arc<Self>, dry_run: bool) -> Result<Arc<Job>, Failure> {
        if self.is_stopping() {
            return Err(Failure::new(Code::Stopping, "pgsidecar is stopping"));
        }
        let repository = self.repository()?;
        let policy = self.work()?.settings.retention;
        let app = self.clone();
        self.jobs.start("prune", |_progress| async move {
            let pruned = retention::prune(&repository, &policy, Timestamp::now(), dry_run).await?;
            if let Ok(work) = &app.work
                && !dry_run
            {
                *work.recoverable.lock().await = None;
                work.growth.note(growth::measure(&repository, &policy).await?);
            }
            Ok(pruned)
        })
    }

    /// Pins a backup.
    ///
    /// # Errors
    /// As [`pins::pin`].
    pub async fn pin(&self, id: BackupId, reason: &str) -> Result<Pin, Failure> {
        pins::pin(&self.repository()?, id, reason).await
    }

    /// Takes a pin away.
    ///
    /// # Errors
    /// As [`pins::unpin`].
    pub async fn unpin(&self, id: BackupId) -> Result<(), Failure> {
        pins::unpin(&self.repository()?, id).await
    }
}
