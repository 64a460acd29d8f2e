//! The names of the relations whose pages are damaged: for people, and as far as the server tells them.

use std::collections::BTreeMap;

use pgsidecar_core::{backup::DamagedFile, incremental_plan::RelationPath};

use crate::{failure::Failure, postgres::Session, settings::ConnectionSettings};

/// Files that are told of; a disk that fails can damage any number.
pub const MOST_FILES: usize = 1_000;

/// Puts the relations' names to the files. Never fails: that a name can't be had must not cost the backup.
pub async fn named(settings: &ConnectionSettings, mut files: Vec<DamagedFile>) -> Vec<DamagedFile> {
    if files.is_empty() {
        return files;
    }
    files.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    let mut by_database: BTreeMap<u32, Vec<&mut DamagedFile>> = BTreeMap::new();
    for file in &mut files {
        if let Some(path) = RelationPath::parse(&file.path) {
            by_database.entry(path.database).or_default().push(file);
        }
    }
    for (database, files) in by_database {
        if let Err(failure) = name(settings, database, files).await {
            tracing::debug!(database, %failure, "the names of damaged relations could not be had");
        }
    }
    files
}

async fn name(settings: &ConnectionSettings, database: u32, files: Vec<&mut DamagedFile>) -> Result<(), Failure> {
    let any = Session::connect(settings).await?;
    let name = any.database_name(database).await?;
    let session = Session::connect(&ConnectionSettings { database: name, ..settings.clone() }).await?;
    for file in files {
        if let Some(path) = RelationPath::parse(&file.path) {
            file.relation = session.relation_name(path.tablespace, path.file.number).await?;
        }
    }
    Ok(())
}
