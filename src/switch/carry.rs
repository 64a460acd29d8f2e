//! Carrying a switch out. No server runs; a crash at any point is followed by the same again.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, chown},
    path::Path,
};

use pgsidecar_core::{
    recovery::{RecoveryMode, RecoverySettings, RecoveryTarget, TargetAction},
    switch::{Beside, Phase, Purpose, Role, Root, SHUT, Seen, Step, Switch, Way, stays_inside},
};
use rustix::{
    fs::{CWD, RenameFlags, renameat_with},
    io::Errno,
};

use super::{
    describe, has_begun, movable,
    note::{self, lock},
    places::{Place, inode, live_tablespaces, version_directory, wal_place},
    remove_staged, settled, wal,
};
use crate::{
    failure::{Code, Failure},
    pgdata::DataDirectory,
    restore::{
        self,
        running::{Stopped, refuse_if_running},
    },
};

/// Told before each step what comes next; an error ends it there, as a crash would.
pub type Watch<'a> = &'a mut dyn FnMut(&str) -> Result<(), Failure>;

/// Carries out what is prepared for a data directory, or goes on with it. `None` if nothing is.
///
/// # Errors
/// [`Code::TargetDirectory`] if a server runs there or things aren't as they were when it was prepared: nothing was changed.
/// Any other: it goes on when it's called again, and PostgreSQL doesn't start meanwhile.
pub fn carry_out(pgdata: &Path, stopped: Stopped, watch: Watch<'_>) -> Result<Option<Switch>, Failure> {
    carry_out_at(&Place::of_data(pgdata)?, stopped, watch)
}

fn carry_out_at(data: &Place, stopped: Stopped, watch: Watch<'_>) -> Result<Option<Switch>, Failure> {
    if note::pending(data)?.is_none() {
        return Ok(None);
    }
    let _lock = lock(data)?;
    let Some(mut switch) = settled(data)? else { return Ok(None) };
    if switch.phase == Phase::Staging {
        tracing::warn!(
            "a restore in this place was interrupted while it was staged; what it left is removed, the database is as it was"
        );
        remove_staged(data, &switch)?;
        return Ok(None);
    }
    let doing = describe(&switch.purpose);
    if switch.phase == Phase::Ready {
        prepare(data, &mut switch, stopped, watch).map_err(|failure| failure.context(&doing))?;
    }
    go_on(data, &mut switch, stopped, watch).map_err(|failure| {
        // Refused at the last moment: it's as it was.
        if let Ok(Some(Switch { phase: Phase::Ready, .. })) = settled(data) {
            return failure.context(&doing);
        }
        let hint = format!(
            "{}{}PostgreSQL doesn't start on the directory as it is, and nothing is lost: put right what is wrong, then 'pgsidecar restore switch' (or the pod's next start) goes on.",
            failure.hint,
            if failure.hint.is_empty() { "" } else { " " }
        );
        failure.context(&doing).hint(hint)
    })?;
    Ok(Some(switch))
}

/// All that can be found wrong is found here, while nothing has been changed.
fn prepare(data: &Place, switch: &mut Switch, stopped: Stopped, watch: Watch<'_>) -> Result<(), Failure> {
    let refuse = |what: String, hint: &str| {
        Err(Failure::new(Code::TargetDirectory, format!("{what}; nothing was changed")).hint(hint))
    };
    refuse_if_running(&data.path, stopped)?;
    add_new_tablespaces(data, switch)?;
    movable::check(switch)?;
    let wal = wal_place(&data.path)?.map(|place| place.path);
    if wal.as_ref() != switch.roots.iter().find(|root| root.role == Role::Wal).map(|root| &root.live) {
        return refuse(
            format!("the WAL of {} isn't where it was when this was prepared", data.path.display()),
            "'pgsidecar restore cancel' takes it back; then restore again.",
        );
    }
    for root in &switch.roots {
        let as_noted = match root.way {
            Way::Whole => root.next(seen(root)?).is_ok(),
            Way::Content { .. } => {
                let Seen { live, staged, kept } = seen(root)?;
                live == root.old && staged == root.new && kept.is_none()
            }
        };
        if !as_noted {
            return refuse(
                format!("{} isn't as it was when this was prepared", root.live.display()),
                "'pgsidecar restore cancel' takes it back; then restore again.",
            );
        }
    }
    watch("take WAL along")?;
    match &switch.purpose {
        Purpose::Restore { timeline, to_the_end: true, wal_through, .. } => {
            wal::take_along(switch, *timeline, *wal_through)?;
        }
        Purpose::Restore { .. } => {}
        Purpose::Replace { .. } => return Err(Failure::internal("a database that is restored over is not switched")),
        Purpose::Undo { restore_command, .. } => leave_taken_timeline(switch, restore_command)?,
    }
    shut_staged(switch)?;
    switch.phase = Phase::Switching;
    watch("note that it begins")?;
    note::write_pending(data, switch)
}

/// Tablespaces that were made since it was prepared are the old database's, and go with it: both would write to them.
fn add_new_tablespaces(data: &Place, switch: &mut Switch) -> Result<(), Failure> {
    for location in live_tablespaces(&data.path)? {
        let is_known = |root: &Root| root.role == Role::Tablespace && root.live.parent() == Some(&location);
        if switch.roots.iter().any(is_known) {
            continue;
        }
        let live = location.join(version_directory(&DataDirectory::open(&data.path)?)?);
        let root = Root {
            role: Role::Tablespace,
            old: inode(&live)?,
            live,
            staged: None,
            kept: Beside::inside(&location).kept(switch.id, &switch.purpose),
            way: Way::Whole,
            new: None,
        };
        switch.roots.insert(0, root);
    }
    Ok(())
}

/// Where WAL or tablespaces are switched as well, nothing is to start on what is staged: its links lead to the others'.
pub fn shut_staged(switch: &Switch) -> Result<(), Failure> {
    let staged = switch.data().and_then(|root| root.staged.as_deref());
    match staged.filter(|staged| switch.must_be_shut() && staged.join("PG_VERSION").exists()) {
        Some(staged) => shut_directory(staged),
        None => Ok(()),
    }
}

/// From here on it's gone through with.
fn go_on(data: &Place, switch: &mut Switch, stopped: Stopped, watch: Watch<'_>) -> Result<(), Failure> {
    let data_root = switch.data().cloned().ok_or_else(|| Failure::internal("a switch without a data directory"))?;
    if !has_begun(data, switch)? {
        if switch.must_be_shut() {
            watch("shut the data directory")?;
            shut_directory(&data_root.live)?;
        }
        // A server that was started since it was looked for last; from here on none is, or it's about to be exchanged.
        if let Err(failure) = refuse_if_running(&data.path, stopped) {
            open_directory(&data_root.live)?;
            return Err(failure);
        }
    }
    let wal = switch.roots.iter().find(|root| root.role == Role::Wal).map(|root| root.live.clone());
    for n in 0..switch.roots.len() {
        match switch.roots[n].way {
            Way::Whole => rename(&switch.roots[n], watch)?,
            Way::Content { parted } => {
                if !parted {
                    watch("move the content out")?;
                    move_out(&switch.roots[n], wal.as_deref(), watch)?;
                    switch.roots[n].way = Way::Content { parted: true };
                    watch("note that it is out")?;
                    note::write_pending(data, switch)?;
                }
                watch("move the content in")?;
                move_in(&switch.roots[n], watch)?;
            }
        }
        if switch.roots[n].role == Role::Tablespace {
            remove_empty_stage(&switch.roots[n])?;
        }
    }
    watch("open the data directory")?;
    open_directory(&data_root.live)?;
    watch("note that it is done")?;
    note::finish(data, switch)
}

/// From here on nothing starts on it.
fn shut_directory(directory: &Path) -> Result<(), Failure> {
    rename_durably(&directory.join("PG_VERSION"), &directory.join(SHUT))
}

/// From here on a server starts on it.
fn open_directory(directory: &Path) -> Result<(), Failure> {
    match directory.join(SHUT).exists() {
        true => rename_durably(&directory.join(SHUT), &directory.join("PG_VERSION")),
        false => Ok(()),
    }
}

fn seen(root: &Root) -> Result<Seen, Failure> {
    let staged = root.staged.as_deref().map(inode).transpose()?.flatten();
    Ok(Seen { live: inode(&root.live)?, staged, kept: inode(&root.kept)? })
}

fn rename(root: &Root, watch: Watch<'_>) -> Result<(), Failure> {
    loop {
        let step = root.next(seen(root)?).map_err(|disturbed| {
            Failure::new(Code::TargetDirectory, disturbed.to_string())
                .hint("Somebody else has been at it. The directories that belong together are in the note beside the data directory.")
        })?;
        watch(&format!("{step:?} {}", root.live.display()))?;
        let staged = root.staged.as_deref().unwrap_or(&root.kept);
        match step {
            Step::Nothing => return Ok(()),
            Step::Exchange => match renameat_with(CWD, &root.live, CWD, staged, RenameFlags::EXCHANGE) {
                Ok(()) => sync_parents(&root.live, staged)?,
                Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => rename_durably(&root.live, &root.kept)?,
                Err(error) => {
                    return Err(Failure::io(
                        format!("exchanging {} and {}", root.live.display(), staged.display()),
                        &error.into(),
                    ));
                }
            },
            Step::Keep => rename_durably(&root.live, &root.kept)?,
            Step::KeepExchanged => rename_durably(staged, &root.kept)?,
            Step::Place => rename_durably(staged, &root.live)?,
        }
    }
}

/// Moves what is in the root to where it's kept, but for what is mounted there.
fn move_out(root: &Root, wal: Option<&Path>, watch: Watch<'_>) -> Result<(), Failure> {
    let make = || -> io::Result<()> {
        match DirBuilder::new().mode(0o700).create(&root.kept) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let like = fs::metadata(&root.live)?;
        fs::set_permissions(&root.kept, like.permissions())?;
        if rustix::process::geteuid().is_root() {
            chown(&root.kept, Some(like.uid()), Some(like.gid()))?;
        }
        Ok(())
    };
    make().map_err(|error| Failure::io(format!("creating {}", root.kept.display()), &error))?;
    for name in names(&root.live)? {
        let path = root.live.join(&name);
        if wal != Some(&path) {
            watch("move out")?;
            move_entry(&path, &root.kept.join(&name))?;
        }
    }
    sync(&[&root.live, &root.kept])
}

/// Moves what is staged to the root, and what `PG_VERSION` is called now as the last. When nothing is staged any more, all
/// of it is there.
fn move_in(root: &Root, watch: Watch<'_>) -> Result<(), Failure> {
    let Some(staged) = root.staged.as_deref().filter(|staged| staged.exists()) else { return Ok(()) };
    for name in names(staged)? {
        watch("move in")?;
        move_entry(&staged.join(&name), &root.live.join(&name))?;
    }
    sync(&[&root.live, staged])?;
    // That of what is kept stands in the way of that of what comes.
    for (from, to) in [(&root.live, &root.kept), (&staged.to_owned(), &root.live)] {
        if from.join(SHUT).exists() && !to.join(SHUT).exists() {
            watch("move PG_VERSION")?;
            rename_durably(&from.join(SHUT), &to.join(SHUT))?;
        }
    }
    watch("remove the empty stage")?;
    fs::remove_dir(staged).map_err(|error| Failure::io(format!("removing {}", staged.display()), &error))
}

pub(super) fn names(directory: &Path) -> Result<Vec<std::ffi::OsString>, Failure> {
    let read = || -> io::Result<Vec<std::ffi::OsString>> {
        let names: io::Result<Vec<_>> = fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name())).collect();
        Ok(names?.into_iter().filter(|name| !name.to_str().is_some_and(stays_inside)).collect())
    };
    read().map_err(|error| Failure::io(format!("reading {}", directory.display()), &error))
}

fn move_entry(from: &Path, to: &Path) -> Result<(), Failure> {
    // Never over something that is there: a rename would replace a file without a word.
    let moved = match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) if !to.exists() => fs::rename(from, to),
        moved => moved.map_err(io::Error::from),
    };
    moved.map_err(|error| Failure::io(format!("moving {} to {}", from.display(), to.display()), &error))
}

fn rename_durably(from: &Path, to: &Path) -> Result<(), Failure> {
    fs::rename(from, to)
        .map_err(|error| Failure::io(format!("renaming {} to {}", from.display(), to.display()), &error))?;
    sync_parents(from, to)
}

fn sync_parents(one: &Path, other: &Path) -> Result<(), Failure> {
    sync(&[one.parent().unwrap_or(one), other.parent().unwrap_or(other)])
}

fn sync(directories: &[&Path]) -> Result<(), Failure> {
    directories.iter().try_for_each(|directory| {
        let synced = File::open(directory).and_then(|directory| directory.sync_all());
        synced.map_err(|error| Failure::io(format!("syncing {}", directory.display()), &error))
    })
}

/// What stood for a tablespace's location is empty now.
fn remove_empty_stage(root: &Root) -> Result<(), Failure> {
    let Some(stage) = root
        .staged
        .as_deref()
        .and_then(Path::parent)
        .filter(|stage| stage.file_name().and_then(|name| name.to_str()).is_some_and(stays_inside))
    else {
        return Ok(());
    };
    match fs::remove_dir(stage) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Failure::io(format!("removing {}", stage.display()), &error))
        }
        _ => Ok(()),
    }
}

/// An undone restore's server may have taken the next timeline, and its WAL is in the archive. What comes back must not end
/// on the timeline that it left, where 'the newest timeline' would not find it any more: it goes to a new one of its own.
fn leave_taken_timeline(switch: &Switch, restore_command: &str) -> Result<(), Failure> {
    let Some(root) = switch.data() else { return Ok(()) };
    let Some(back) = root.staged.as_deref() else { return Ok(()) };
    let (leaving, back) = (DataDirectory::open(&root.live)?, DataDirectory::shut(back));
    if ["recovery.signal", "standby.signal", "backup_label"].iter().any(|name| back.path().join(name).exists()) {
        // It was recovering when it was replaced, and goes on with that, to where it was told to.
        return Ok(());
    }
    let ours = back.control()?.newest_timeline();
    // It can have been promoted and have ended before the checkpoint that tells pg_control.
    let histories = leaving.histories().unwrap_or_default();
    let newest = histories
        .into_iter()
        .chain([leaving.control().map_or(ours, |control| control.newest_timeline())])
        .max()
        .unwrap_or(ours);
    if newest <= ours {
        return Ok(());
    }
    // The archive may not have them yet, and what comes back must not take one of these timelines again.
    wal::take_histories(switch)?;
    let settings = RecoverySettings {
        mode: RecoveryMode::default(),
        target: RecoveryTarget::Latest,
        inclusive: true,
        timeline: ours,
        action: TargetAction::Promote,
        restore_command: restore_command.to_owned(),
    };
    restore::recover_again(back.path(), &settings)
}

/// Removes a directory and what is in it, whatever of it is there. `PG_VERSION` goes first.
pub fn remove_tree(path: &Path) -> Result<(), Failure> {
    let remove = || {
        match fs::remove_file(path.join("PG_VERSION")) {
            Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Err(error);
            }
            _ => {}
        }
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    };
    remove().map_err(|error| Failure::io(format!("removing {}", path.display()), &error))
}

#[cfg(test)]
mod tests;
