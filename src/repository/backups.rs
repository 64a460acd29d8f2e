//! The records of base backups.

use pgsidecar_core::{
    BackupId, BackupRecord,
    backup::BACKUP_FORMAT,
    layout::{BackupObject, RepositoryObject},
};

use super::{Repository, damaged};
use crate::{
    failure::{Code, Failure},
    store::{ListRequest, Pages},
};

impl Repository {
    /// All complete backups, oldest first. A record that is damaged is told in the log and left out: it must not keep
    /// the other backups from being restored.
    ///
    /// # Errors
    /// The store's.
    pub async fn backups(&self) -> Result<Vec<BackupRecord>, Failure> {
        let mut backups = Vec::new();
        for id in self.backup_ids().await? {
            match self.backup(id).await {
                Ok(backup) => backups.extend(backup),
                Err(failure) if failure.code == Code::Damaged => {
                    tracing::warn!(hint = failure.hint, "backup {id} is left out: {failure}");
                }
                Err(failure) => return Err(failure),
            }
        }
        Ok(backups)
    }

    /// The ids of all backups, complete or not, oldest first.
    ///
    /// # Errors
    /// The store's.
    pub async fn backup_ids(&self) -> Result<Vec<BackupId>, Failure> {
        let mut ids = Vec::new();
        let mut pages = Pages::new(&*self.store, ListRequest::shallow(self.layout.backups_prefix()));
        while let Some(page) = pages.next().await? {
            ids.extend(page.prefixes.iter().filter_map(|prefix| self.layout.backup_of_prefix(prefix)));
        }
        ids.sort_unstable();
        Ok(ids)
    }

    /// A backup's record; `None` if there is no such backup, or it isn't complete.
    ///
    /// # Errors
    /// The store's; [`Code::Damaged`] if the record can't be parsed.
    pub async fn backup(&self, id: BackupId) -> Result<Option<BackupRecord>, Failure> {
        let record: Option<BackupRecord> = self.read_json(&RepositoryObject::Backup(id, BackupObject::Record)).await?;
        let Some(record) = record else { return Ok(None) };
        if record.format > BACKUP_FORMAT {
            return Err(Failure::new(
                Code::Damaged,
                format!("backup {id} has format {}, and this pgsidecar knows {BACKUP_FORMAT}", record.format),
            )
            .hint("It was made by a newer pgsidecar: use that one."));
        }
        if record.system_identifier != self.layout.system() || record.id != id {
            return Err(damaged(&format!("the record of backup {id}"), "it is another backup's"));
        }
        Ok(Some(record))
    }
}
