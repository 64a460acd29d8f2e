//! What was in the place of the database before: bringing it back, and removing it.

use std::path::{Path, PathBuf};

use pgsidecar_core::switch::{Phase, Purpose, Role, Root, SHUT, Switch, Way};
use serde::{Deserialize, Serialize};

use super::{
    already, carry, make_ready, new_id,
    note::{self, lock},
    places::Place,
};
use crate::{
    failure::{Code, Failure},
    pgdata::DataDirectory,
};

/// What restores in this place have left.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Kept {
    /// The one that is prepared or under way.
    pub pending: Option<Switch>,
    /// Those that were carried out, and whose former database is still there; the newest first.
    pub done: Vec<Switch>,
}

/// What is prepared, and what is kept.
///
/// # Errors
/// If it can't be looked at.
pub fn list(pgdata: &Path) -> Result<Kept, Failure> {
    let data = Place::of_data(pgdata)?;
    let mut done: Vec<Switch> = note::done(&data)?.into_iter().map(|done| done.switch).collect();
    done.retain(|switch| switch.kept_data().is_some_and(Path::exists));
    Ok(Kept { pending: note::pending(&data)?, done })
}

/// Prepares that what was there before the last restore comes back. What is there now is kept in its turn.
///
/// # Errors
/// [`Code::NotFound`] if nothing is kept, [`Code::Busy`] if something else is prepared.
pub fn undo(pgdata: &DataDirectory, restore_command: &str) -> Result<Switch, Failure> {
    let data = Place::of_data(pgdata.path())?;
    let _lock = lock(&data)?;
    if let Some(switch) = note::pending(&data)? {
        return Err(already(&switch));
    }
    let done = note::done(&data)?.into_iter().map(|done| done.switch);
    let last = done.into_iter().find(|switch| {
        switch.kept_data().is_some_and(|kept| [SHUT, "PG_VERSION"].iter().any(|name| kept.join(name).exists()))
    });
    let Some(last) = last else {
        return Err(Failure::new(
            Code::NotFound,
            format!("nothing is kept of what was in {} before", data.path.display()),
        )
        .hint("'pgsidecar restore list' shows what is."));
    };
    let purpose = Purpose::Undo { of: last.id, restore_command: restore_command.to_owned() };
    let id = new_id(&data)?;
    let back = |root: &Root| -> Result<Root, Failure> {
        let beside = match root.role {
            Role::Tablespace => {
                let location = root.live.parent().unwrap_or(&root.live);
                pgsidecar_core::switch::Beside::inside(location)
            }
            Role::Data => data.beside.clone(),
            Role::Wal => Place::of(&root.live)?.beside,
        };
        let way = if let Way::Content { .. } = root.way { Way::Content { parted: false } } else { Way::Whole };
        let staged = root.kept.exists().then(|| root.kept.clone());
        Ok(Root { staged, kept: beside.kept(id, &purpose), way, old: None, new: None, ..root.clone() })
    };
    let roots = last.roots.iter().map(back).collect::<Result<Vec<Root>, Failure>>()?;
    let mut switch = Switch { id, purpose: purpose.clone(), phase: Phase::Staging, roots, refused: None };
    make_ready(&mut switch)?;
    note::write_pending(&data, &switch)?;
    Ok(switch)
}

/// Removes what is kept of earlier databases in this place; answers with what was removed.
///
/// # Errors
/// [`Code::Busy`] if something is prepared: it may be what it brings back.
pub fn clean(pgdata: &Path) -> Result<Vec<PathBuf>, Failure> {
    let data = Place::of_data(pgdata)?;
    let _lock = lock(&data)?;
    if let Some(switch) = note::pending(&data)? {
        return Err(already(&switch));
    }
    let mut removed = Vec::new();
    for done in note::done(&data)? {
        for root in &done.switch.roots {
            if root.kept.exists() {
                carry::remove_tree(&root.kept)?;
                removed.push(root.kept.clone());
            }
        }
        note::remove(&done.note)?;
    }
    Ok(removed)
}
