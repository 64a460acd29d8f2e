//! Carrying a switch out. No server runs; a crash at any point is followed by the same again.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, chown},
    path::Path,
};

use pgsidecar_core::{
    recovery::{RecoveryMode, RecoverySettings, RecoveryTarget, TargetAction},
    switch::{Phase, Purpose, Role, Root, SHUT, Seen, Step, Switch, Way, stays_inside},
};
use rustix::{
    fs::{CWD, RenameFlags, renameat_with},
    io::Errno,
};

use super::{
    describe, is_moved,
    note::{self, lock},
    places::{Place, inode},
    remove_staged, wal,
};
use crate::{
    failure::{Code, Failure},
    pgdata::DataDirectory,
    restore,
    restore::running::server_on,
};

/// Told before each step what comes next; an error ends it there, as a crash would.
pub type Watch<'a> = &'a mut dyn FnMut(&str) -> Result<(), Failure>;

/// Carries out what is prepared for a data directory, or goes on with it. `None` if nothing is.
///
/// # Errors
/// [`Code::TargetDirectory`] if a server runs there or things aren't as they were when it was prepared: nothing was changed.
/// Any other: it goes on when it's called again, and PostgreSQL doesn't start meanwhile.
pub fn carry_out(pgdata: &Path, watch: Watch<'_>) -> Result<Option<Switch>, Failure> {
    carry_out_at(&Place::of_data(pgdata)?, watch)
}

fn carry_out_at(data: &Place, watch: Watch<'_>) -> Result<Option<Switch>, Failure> {
    if note::pending(data)?.is_none() {
        return Ok(None);
    }
    let _lock = lock(data)?;
    let Some(mut switch) = note::pending(data)? else { return Ok(None) };
    if switch.phase == Phase::Staging {
        tracing::warn!(
            "a restore in this place was interrupted while it was staged; what it left is removed, the database is as it was"
        );
        remove_staged(data, &switch)?;
        return Ok(None);
    }
    let doing = describe(&switch.purpose);
    if switch.phase == Phase::Ready {
        prepare(data, &mut switch, watch).map_err(|failure| failure.context(&doing))?;
    }
    go_on(data, &mut switch, watch).map_err(|failure| {
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
fn prepare(data: &Place, switch: &mut Switch, watch: Watch<'_>) -> Result<(), Failure> {
    let refuse = |what: String, hint: &str| {
        Err(Failure::new(Code::TargetDirectory, format!("{what}; nothing was changed")).hint(hint))
    };
    let server =
        server_on(&data.path).map_err(|error| Failure::io(format!("reading {}", data.path.display()), &error))?;
    if let Some(server) = server {
        return refuse(
            format!("a server runs on {} ({server})", data.path.display()),
            "Stop it first: in Kubernetes delete the pod, its successor switches before PostgreSQL starts.",
        );
    }
    check_movable(switch)?;
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
        Purpose::Restore { timeline, to_the_end: true, .. } => wal::take_along(switch, *timeline)?,
        Purpose::Restore { .. } => {}
        Purpose::Replace { .. } => return Err(Failure::internal("a database that is restored over is not switched")),
        Purpose::Undo { restore_command, .. } => leave_taken_timeline(switch, restore_command)?,
    }
    switch.phase = Phase::Switching;
    watch("note that it begins")?;
    note::write_pending(data, switch)
}

/// From here on it's gone through with.
fn go_on(data: &Place, switch: &mut Switch, watch: Watch<'_>) -> Result<(), Failure> {
    let shut = switch.must_be_shut();
    let data_root = switch.data().cloned().ok_or_else(|| Failure::internal("a switch without a data directory"))?;
    if shut && !has_begun(&data_root)? {
        watch("shut the data directory")?;
        shut_directory(&data_root.live)?;
    }
    for n in 0..switch.roots.len() {
        match switch.roots[n].way {
            Way::Whole => rename(&switch.roots[n], watch)?,
            Way::Content { parted } => {
                if !parted {
                    watch("move the content out")?;
                    move_out(&switch.roots[n], watch)?;
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
    if shut {
        watch("open what is kept")?;
        let from = if is_moved(&data_root) { &data_root.live } else { &data_root.kept };
        if from.join(SHUT).exists() {
            rename_durably(&from.join(SHUT), &data_root.kept.join("PG_VERSION"))?;
        }
    }
    watch("note that it is done")?;
    note::finish(data, switch)
}

/// Whether the data directory's own switch has begun: then it was shut before.
fn has_begun(root: &Root) -> Result<bool, Failure> {
    Ok(match root.way {
        Way::Content { parted } => parted || root.live.join(SHUT).exists(),
        Way::Whole => inode(&root.live)? != root.old || root.live.join(SHUT).exists(),
    })
}

/// From here on nothing starts on it.
fn shut_directory(directory: &Path) -> Result<(), Failure> {
    rename_durably(&directory.join("PG_VERSION"), &directory.join(SHUT))
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

/// Moves what is in the root to where it's kept.
fn move_out(root: &Root, watch: Watch<'_>) -> Result<(), Failure> {
    let make = || -> io::Result<()> {
        match DirBuilder::new().mode(0o700).create(&root.kept) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let like = fs::metadata(&root.live)?;
        if rustix::process::geteuid().is_root() {
            chown(&root.kept, Some(like.uid()), Some(like.gid()))?;
        }
        Ok(())
    };
    make().map_err(|error| Failure::io(format!("creating {}", root.kept.display()), &error))?;
    for name in names(&root.live)? {
        watch("move out")?;
        move_entry(&root.live.join(&name), &root.kept.join(&name))?;
    }
    sync_parents(&root.live.join("."), &root.kept.join("."))
}

/// Moves what is staged to the root, `PG_VERSION` last. When nothing is staged any more, all of it is there.
fn move_in(root: &Root, watch: Watch<'_>) -> Result<(), Failure> {
    let Some(staged) = root.staged.as_deref().filter(|staged| staged.exists()) else { return Ok(()) };
    for name in names(staged)?.into_iter().filter(|name| name != "PG_VERSION") {
        watch("move in")?;
        move_entry(&staged.join(&name), &root.live.join(&name))?;
    }
    sync_parents(&root.live.join("."), &staged.join("."))?;
    let version = staged.join("PG_VERSION");
    if version.exists() {
        watch("move PG_VERSION in")?;
        rename_durably(&version, &root.live.join("PG_VERSION"))?;
    }
    watch("remove the empty stage")?;
    fs::remove_dir(staged).map_err(|error| Failure::io(format!("removing {}", staged.display()), &error))
}

fn names(directory: &Path) -> Result<Vec<std::ffi::OsString>, Failure> {
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
    let sync = |path: &Path| File::open(path.parent().unwrap_or(path))?.sync_all();
    sync(one).and_then(|()| sync(other)).map_err(|error| Failure::io(format!("syncing {}", one.display()), &error))
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

/// Whether what has to be moved can be: a file that is mounted into the data directory can't.
pub fn check_movable(switch: &Switch) -> Result<(), Failure> {
    for root in switch.roots.iter().filter(|root| is_moved(root)) {
        for name in names(&root.live)? {
            let path = root.live.join(&name);
            if !super::places::is_same_mount(&root.live, &path) && !path.is_symlink() {
                return Err(Failure::new(
                    Code::TargetDirectory,
                    format!("{} is mounted into the data directory, which is a mount point itself: neither can be moved; nothing was changed", path.display()),
                )
                .hint("Let PGDATA be a subdirectory of the volume, or restore to an empty volume."));
            }
        }
    }
    Ok(())
}

/// An undone restore's server may have taken the next timeline, and its WAL is in the archive. What comes back must not end
/// on the timeline that it left, where 'the newest timeline' would not find it any more: it goes to a new one of its own.
fn leave_taken_timeline(switch: &Switch, restore_command: &str) -> Result<(), Failure> {
    let Some(root) = switch.data() else { return Ok(()) };
    let Some(back) = root.staged.as_deref() else { return Ok(()) };
    let (leaving, back) = (DataDirectory::open(&root.live)?, DataDirectory::open(back)?);
    let ours = back.control()?.timeline;
    // It can have been promoted and have ended before the checkpoint that tells pg_control.
    let histories = leaving.histories().unwrap_or_default();
    let newest = histories.into_iter().chain([leaving.control()?.timeline]).max().unwrap_or(ours);
    if newest <= ours || back.is_standby() {
        return Ok(());
    }
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
