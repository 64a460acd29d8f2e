//! Restore points, as the control socket asks for them.

use pgsidecar_core::restore_point::RestorePointRecord;

use super::App;
use crate::{
    failure::{Code, Failure},
    restore_point::{self, CreatedRestorePoint, RestorePointRequest},
};

impl App {
    /// Makes a restore point. Goes on where the caller goes away.
    ///
    /// # Errors
    /// Wrong settings, no data directory, PostgreSQL's or the store's.
    pub async fn create_restore_point(&self, request: RestorePointRequest) -> Result<CreatedRestorePoint, Failure> {
        let work = self.work()?;
        if self.is_stopping() {
            return Err(Failure::new(Code::Stopping, "pgsidecar is stopping"));
        }
        let (pgdata, control) = work.data_directory()?;
        let (repository, settings) = (work.repository(control.system_identifier), work.settings.clone());
        tokio::spawn(async move { restore_point::create(&repository, &pgdata, &settings, request).await }).await?
    }

    /// The restore points in the repository.
    ///
    /// # Errors
    /// The store's; wrong settings, or no data directory.
    pub async fn restore_points(&self) -> Result<Vec<RestorePointRecord>, Failure> {
        self.repository()?.restore_points().await
    }
}
