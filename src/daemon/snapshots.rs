//! Snapshots by the storage, as the control socket asks for them.

use std::time::Duration;

use pgsidecar_core::{SnapshotId, SnapshotRecord};

use super::App;
use crate::{
    failure::{Code, Failure},
    snapshot::{OpenSnapshot, SnapshotList, SnapshotRequest},
};

impl App {
    /// Begins a snapshot by the storage; `timeout` is the setting's where none is given.
    ///
    /// # Errors
    /// Wrong settings, no data directory, one that is open, or PostgreSQL's.
    pub async fn begin_snapshot(
        &self,
        label: Option<String>,
        fast: bool,
        timeout: Option<Duration>,
    ) -> Result<OpenSnapshot, Failure> {
        let work = self.work()?;
        if self.is_stopping() {
            return Err(Failure::new(Code::Stopping, "pgsidecar is stopping"));
        }
        let (pgdata, control) = work.data_directory()?;
        let repository = work.repository(control.system_identifier);
        let label = label.unwrap_or_else(|| "pgsidecar snapshot".to_owned());
        let request = SnapshotRequest { label, fast, timeout: timeout.unwrap_or(work.settings.snapshot_timeout) };
        self.snapshots.begin(repository, pgdata, &work.settings, request).await
    }

    /// Ends a snapshot, and answers with its record.
    ///
    /// # Errors
    /// Why it must not be used.
    pub async fn end_snapshot(&self, id: SnapshotId) -> Result<SnapshotRecord, Failure> {
        self.snapshots.end(id, &self.repository()?).await
    }

    /// Gives up the snapshot that is open.
    ///
    /// # Errors
    /// If it isn't.
    pub fn abort_snapshot(&self, id: SnapshotId) -> Result<OpenSnapshot, Failure> {
        self.snapshots.abort(id)
    }

    /// The snapshot that is open, and those that are complete.
    ///
    /// # Errors
    /// The store's; wrong settings, or no data directory.
    pub async fn snapshots(&self) -> Result<SnapshotList, Failure> {
        Ok(SnapshotList { open: self.snapshots.open(), complete: self.repository()?.snapshots().await? })
    }
}
