//! Restoring in the place of the database that is there, without ever destroying it.
//!
//! The order of effects, and what a crash between two of them leaves:
//!
//! 1. *Staging*, while the server may run. A note says what is being prepared; the restored database is written beside the
//!    one that is there (`src/restore`), on the same volumes. A crash leaves something half written that nothing starts on, and
//!    the note: the next one, or `restore cancel`, removes it.
//! 2. *Ready*: all is durable, the note says so with the inodes of what will be switched.
//! 3. *Switching*, when no server runs: as the first thing that `pgsidecar prepare` does in a new pod, or with `restore
//!    switch`. For a restore to the end of the WAL, segments that are not archived are copied to the new pg_wal first. Then
//!    the note says *switching*, and from then on it's gone through with, however often it is interrupted: each step is
//!    told from what is where ([`Root::next`]), or from the note.
//!    A switch that was noted and has touched nothing yet is looked at again from here, as if it hadn't been noted.
//! 4. Where more than one directory is switched, or one can't be renamed, `PG_VERSION` gets another name first: until the
//!    end nothing starts on a database that is half the old and half the new one. WAL and tablespaces come next, the data
//!    directory last, and `PG_VERSION` gets its name at the very end. What is staged and what is kept has none in such a
//!    case: its links lead to WAL and tablespaces that are another database's. A data directory alone is exchanged by one
//!    rename.
//! 5. The note goes to what is kept.
//!
//! Where there's no room for two databases, one is restored over the other (`src/restore/replace.rs`): this is noted here in
//! the same way, WAL that is nowhere else is kept, and nothing is staged.
//!
//! `restore undo` is the same with what was kept in the place of what was restored. Only `restore clean` deletes a database,
//! and only one that is no longer in its place.

mod asked;
mod carry;
mod kept;
mod movable;
mod note;
mod places;
mod wal;

use std::path::Path;

use jiff::Timestamp;
use pgsidecar_core::{
    plan::RestorePlan,
    recovery::RecoveryTarget,
    switch::{Phase, Purpose, Role, Root, Switch, SwitchId, Way},
};

pub use self::{
    asked::{Asker, before_start},
    carry::carry_out,
    kept::{Kept, clean, list, undo},
};
use self::{
    note::lock,
    places::{Layout, NewTablespace, Place, inode, lay_out},
};
use crate::{
    failure::{Code, Failure},
    pgdata::DataDirectory,
    progress::Progress,
    repository::Repository,
    restore::{self, RestoreOptions, Staged, StagedWal, replace},
};

/// Restores beside the database in `pgdata`, so that it takes its place when the server has been stopped. `options.to` is of
/// no meaning here.
///
/// # Errors
/// [`Code::Busy`] if something is staged already; what keeps the restore from being made. The database that is there was not
/// touched.
///
/// # Cancellation
/// As [`restore::run`].
pub async fn stage(
    repository: &Repository,
    pgdata: &DataDirectory,
    plan: &RestorePlan,
    options: &RestoreOptions,
    progress: std::sync::Arc<Progress>,
) -> Result<Switch, Failure> {
    let data = Place::of_data(pgdata.path())?;
    let _lock = lock(&data)?;
    match note::pending(&data)? {
        None => {}
        Some(switch) if switch.phase == Phase::Staging => {
            tracing::info!("an interrupted restore had been staging; starting over");
            remove_staged(&data, &switch)?;
        }
        Some(switch) => return Err(already(&switch)),
    }
    let purpose = Purpose::Restore {
        backup: plan.backup.id,
        target: plan.target.to_string(),
        timeline: plan.timeline,
        // What the old directory has on another timeline doesn't follow on what is restored.
        to_the_end: plan.target == RecoveryTarget::Latest && is_on(pgdata, plan),
        wal_through: Some(plan.wal_through),
    };
    let id = new_id(&data)?;
    let tablespaces: Vec<NewTablespace> = plan
        .backup
        .tablespaces
        .iter()
        .map(|tablespace| NewTablespace {
            oid: tablespace.oid,
            location: options.tablespaces.get(&tablespace.location).unwrap_or(&tablespace.location).into(),
        })
        .collect();
    let Layout { roots, tablespaces, wal_link } = lay_out(pgdata, &data, &tablespaces, id, &purpose)?;
    let mut switch = Switch { id, purpose, phase: Phase::Staging, roots, refused: None };
    movable::check(&switch)?;
    let staged_at =
        |role: Role| switch.roots.iter().find(|root| root.role == role).and_then(|root| root.staged.clone());
    let wal = staged_at(Role::Wal).map(|written| StagedWal { link: wal_link, written });
    let to = staged_at(Role::Data).ok_or_else(|| Failure::internal("a switch without a data directory"))?;
    let options = RestoreOptions { to, ..options.clone() };
    note::write_pending(&data, &switch)?;
    let staged = Staged { tablespaces, wal, live: Some(data.path.clone()) };
    let restored = restore::run_staged(repository, plan, &options, &staged, progress).await;
    if let Err(failure) = restored {
        let removed = remove_staged(&data, &switch);
        return Err(match removed {
            Ok(()) => failure,
            Err(left) => failure.hint(format!("What was staged could not be removed ({left}); 'pgsidecar restore cancel' tries again. The database that is there was not touched.")),
        });
    }
    make_ready(&mut switch)?;
    carry::shut_staged(&switch)?;
    note::write_pending(&data, &switch)?;
    Ok(switch)
}

/// Whether the server is on the timeline that is restored.
fn is_on(pgdata: &DataDirectory, plan: &RestorePlan) -> bool {
    let ours = pgdata.control().map(|control| control.newest_timeline());
    let same = ours.as_ref().is_ok_and(|ours| *ours == plan.timeline);
    if !same {
        let ours = ours.map_or_else(|failure| failure.message, |ours| format!("timeline {ours}"));
        tracing::warn!(
            "the database is on {ours} and timeline {} is restored: WAL that it has not archived is not taken along",
            plan.timeline
        );
    }
    same
}

/// Notes why what is prepared wasn't carried out when PostgreSQL was started.
///
/// # Errors
/// If it can't be.
pub fn note_refusal(pgdata: &Path, failure: &Failure) -> Result<(), Failure> {
    let data = Place::of_data(pgdata)?;
    let _lock = lock(&data)?;
    match settled(&data)? {
        Some(switch) => note::write_pending(&data, &Switch { refused: Some(failure.message.clone()), ..switch }),
        None => Ok(()),
    }
}

/// Notes what is where, by which a switch is told from what a crash leaves of it.
fn make_ready(switch: &mut Switch) -> Result<(), Failure> {
    for root in &mut switch.roots {
        root.old = inode(&root.live)?;
        root.new = root.staged.as_deref().map(inode).transpose()?.flatten();
        if root.staged.is_some() && root.new.is_none() {
            // A tablespace without a file in it: the restore makes no directory for it.
            root.staged = None;
        }
    }
    switch.phase = Phase::Ready;
    Ok(())
}

/// The switch that is prepared or under way, when the directory is locked. One that was about to begin and hasn't is prepared
/// still: a server may have run since, so that all is looked at again, or it's taken back.
fn settled(data: &Place) -> Result<Option<Switch>, Failure> {
    let Some(mut switch) = note::pending(data)? else { return Ok(None) };
    if switch.phase == Phase::Switching && !has_begun(data, &switch)? {
        switch.phase = Phase::Ready;
        note::write_pending(data, &switch)?;
    }
    Ok(Some(switch))
}

/// Whether anything of the database has been touched.
fn has_begun(data: &Place, switch: &Switch) -> Result<bool, Failure> {
    if matches!(switch.purpose, Purpose::Replace { .. }) {
        return Ok(replace::has_begun(&data.path));
    }
    for root in &switch.roots {
        if inode(&root.live)? != root.old || root.way == (Way::Content { parted: true }) {
            return Ok(true);
        }
    }
    Ok(!data.path.join("PG_VERSION").exists())
}

/// The switch that is prepared or under way.
///
/// # Errors
/// If its note can't be read.
pub fn pending(pgdata: &Path) -> Result<Option<Switch>, Failure> {
    note::pending(&Place::of_data(pgdata)?)
}

/// Takes back what is prepared, and removes what was staged for it. What an undo would have brought back stays kept.
///
/// # Errors
/// [`Code::NotFound`] if nothing is, [`Code::Conflict`] if directories are being switched already.
pub fn cancel(pgdata: &Path) -> Result<Switch, Failure> {
    let data = Place::of_data(pgdata)?;
    let _lock = lock(&data)?;
    let Some(switch) = settled(&data)? else {
        return Err(Failure::new(Code::NotFound, "no restore is prepared for this data directory"));
    };
    if matches!(switch.phase, Phase::Switching | Phase::Done) {
        return Err(Failure::new(Code::Conflict, "directories are being switched already: it has to be gone through with")
            .hint("'pgsidecar restore switch' goes on with it; after that, 'pgsidecar restore undo' brings back what was there before."));
    }
    remove_staged(&data, &switch)?;
    Ok(switch)
}

/// The note goes last: until then it's known what there is to be removed.
fn remove_staged(data: &Place, switch: &Switch) -> Result<(), Failure> {
    if matches!(switch.purpose, Purpose::Restore { .. }) {
        for root in &switch.roots {
            let Some(staged) = &root.staged else { continue };
            // A tablespace's directory of the server's version lies in what stands for its location.
            let whole = if root.role == Role::Tablespace { staged.parent().unwrap_or(staged) } else { staged };
            carry::remove_tree(whole)?;
        }
    }
    note::remove(&data.beside.pending_note())
}

fn already(switch: &Switch) -> Failure {
    let failure = Failure::new(
        Code::Busy,
        format!("{} is prepared already, since {}; nothing was changed", describe(&switch.purpose), switch.id),
    );
    failure.hint("It takes place when the server is stopped: delete the pod, or stop PostgreSQL and run 'pgsidecar restore switch'. 'pgsidecar restore cancel' takes it back.")
}

/// What a switch is for, in words.
pub fn describe(purpose: &Purpose) -> String {
    match purpose {
        Purpose::Restore { backup, target, timeline, .. } => {
            format!("the restore of backup {backup}, to {target} on timeline {timeline},")
        }
        Purpose::Replace { backup, timeline, .. } => {
            format!("the restore of backup {backup} over the database, on timeline {timeline},")
        }
        Purpose::Undo { of, .. } => format!("the undoing of the restore of {of}"),
    }
}

/// The same of one that is prepared, with why it wasn't carried out.
pub fn describe_pending(switch: &Switch) -> String {
    let what = describe(&switch.purpose);
    let what = what.trim_end_matches(',');
    match &switch.refused {
        None => what.to_owned(),
        Some(why) => format!("{what}; refused when PostgreSQL was started: {why}"),
    }
}

/// An id that no other switch of this data directory has: they count seconds.
fn new_id(data: &Place) -> Result<SwitchId, Failure> {
    let taken = note::done(data)?;
    let mut time = Timestamp::now();
    while taken.iter().any(|done| done.switch.id == SwitchId::new(time)) {
        time += jiff::SignedDuration::from_secs(1);
    }
    Ok(SwitchId::new(time))
}

/// Whether the root's content is moved.
fn is_moved(root: &Root) -> bool {
    matches!(root.way, Way::Content { .. })
}
