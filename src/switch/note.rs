//! The notes of switches on the disk: whole or not there, durable before what they speak of is done.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, chown},
    path::{Path, PathBuf},
};

use pgsidecar_core::switch::{Phase, Purpose, Switch};

use super::places::{Place, besides};
use crate::failure::{Code, Failure};

/// Reads a note; `None` if it isn't there.
///
/// # Errors
/// If it can't be read or understood.
pub fn read(path: &Path) -> Result<Option<Switch>, Failure> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Failure::io(format!("reading {}", path.display()), &error)),
    };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| {
        Failure::new(Code::DataDirectory, format!("{} isn't what pgsidecar writes: {error}", path.display())).hint(
            "A newer pgsidecar may have written it. It says which directories are to be switched; nothing was changed.",
        )
    })
}

/// The switch of a data directory that is prepared or under way.
///
/// # Errors
/// As [`read`].
pub fn pending(data: &Place) -> Result<Option<Switch>, Failure> {
    read(&data.beside.pending_note())
}

/// Writes the note of a pending switch.
///
/// # Errors
/// If it can't be written durably.
pub fn write_pending(data: &Place, switch: &Switch) -> Result<(), Failure> {
    write(&data.beside.pending_note(), switch)
}

/// Notes that it was carried out: its pending note goes.
///
/// # Errors
/// If it can't be noted durably.
pub fn finish(data: &Place, switch: &Switch) -> Result<(), Failure> {
    let carried_out = Switch { phase: Phase::Done, ..switch.clone() };
    write(&data.beside.done_note(switch.id, &switch.purpose), &carried_out)?;
    if let Purpose::Undo { of, .. } = switch.purpose {
        // What it kept is in its place again.
        for undone in done(data)?.iter().filter(|undone| undone.switch.id == of) {
            remove(&undone.note)?;
        }
    }
    remove(&data.beside.pending_note())
}

/// A switch that was carried out, with where its note is.
pub struct Done {
    /// The switch.
    pub switch: Switch,
    /// Its note.
    pub note: PathBuf,
}

/// Switches that were carried out, the newest first.
///
/// # Errors
/// If they can't be looked at.
pub fn done(data: &Place) -> Result<Vec<Done>, Failure> {
    let mut found = Vec::new();
    for beside in besides(&data.path) {
        let home = beside.home();
        let unreadable = |error: &io::Error| Failure::io(format!("reading {}", home.display()), error);
        let entries = match fs::read_dir(home) {
            // One that can't be looked into holds no note of ours.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => continue,
            entries => entries.map_err(|error| unreadable(&error))?,
        };
        for entry in entries {
            let entry = entry.map_err(|error| unreadable(&error))?;
            if entry.file_name().to_str().is_some_and(|name| beside.is_done_note(name))
                && let Some(switch) = read(&entry.path())?
            {
                found.push(Done { switch, note: entry.path() });
            }
        }
    }
    found.sort_by_key(|done| std::cmp::Reverse(done.switch.id));
    Ok(found)
}

fn write(path: &Path, switch: &Switch) -> Result<(), Failure> {
    let text = serde_json::to_vec_pretty(switch).map_err(Failure::internal)?;
    let mut temporary = path.as_os_str().to_owned();
    temporary.push("-tmp");
    let temporary = PathBuf::from(temporary);
    let parent = path.parent().unwrap_or(path);
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(&text)?;
        if rustix::process::geteuid().is_root() {
            // Whoever the sidecar runs as must be able to read it.
            let like = switch.data().map(|root| root.live.as_path()).filter(|live| live.exists()).unwrap_or(parent);
            let like = fs::metadata(like)?;
            chown(&temporary, Some(like.uid()), Some(like.gid()))?;
        }
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(parent)?.sync_all()
    };
    write().map_err(|error| Failure::io(format!("writing {}", path.display()), &error))
}

/// Removes a file, durably; it needn't be there.
///
/// # Errors
/// If it can't be removed.
pub fn remove(path: &Path) -> Result<(), Failure> {
    let remove = || match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(()) => File::open(path.parent().unwrap_or(path))?.sync_all(),
    };
    remove().map_err(|error| Failure::io(format!("removing {}", path.display()), &error))
}

/// Keeps others from preparing or carrying out a switch of the same data directory while it's held.
///
/// # Errors
/// [`Code::Busy`] if somebody does.
pub fn lock(data: &Place) -> Result<File, Failure> {
    let home = data.beside.home();
    let directory = File::open(home).map_err(|error| Failure::io(format!("opening {}", home.display()), &error))?;
    if directory.try_lock().is_err() {
        return Err(Failure::new(
            Code::Busy,
            format!(
                "a restore in the place of {} is being prepared or carried out at this moment",
                data.path.display()
            ),
        )
        .hint("Wait for it to end; 'pgsidecar restore list' shows it."));
    }
    Ok(directory)
}
