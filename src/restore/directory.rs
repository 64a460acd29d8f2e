//! The directory that is restored to: claimed while it's filled, and cleared if that fails.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    sync::Arc,
};

use pgsidecar_core::{BackupId, BackupRecord};

use super::room;
use crate::failure::{Code, Failure};

/// Says that what is in the directory comes from a restore that isn't complete.
pub const MARKER: &str = "pgsidecar.restoring";
const HOLDS_A_DATABASE: &str = "holds a database";
const BEING_RESTORED_TO: &str = "is being restored to at this moment";

/// Who is to own what is restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Whoever we are.
    Ourselves,
    /// We are root, and the directory that was there belongs to somebody: PostgreSQL runs as its owner.
    Of {
        /// User id.
        uid: u32,
        /// Group id.
        gid: u32,
    },
    /// We are root, and only the backup tells.
    AsInBackup,
}

/// A directory that has been claimed for a restore.
#[derive(Clone, Debug)]
pub struct TargetDirectory {
    path: PathBuf,
    created: bool,
    owner: Owner,
    /// Tablespaces' directories, and whether we created them.
    tablespaces: Vec<(PathBuf, bool)>,
    /// The markers, locked: another restore into the same directory is told from the remains of one.
    locks: Vec<Arc<File>>,
}

/// What is to be restored to.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// The data directory.
    pub path: &'a Path,
    /// The tablespaces' directories, by their OIDs.
    pub tablespaces: &'a BTreeMap<u32, PathBuf>,
    /// A data directory that there is: what is restored belongs to its owner and has its mode.
    pub like: Option<&'a Path>,
}

impl TargetDirectory {
    /// Checks that the directory and those of the tablespaces are absent or empty and have room for what is `needed` in
    /// each, then claims them. Answers as well with how much has to stay free while they are filled.
    ///
    /// # Errors
    /// [`Code::TargetDirectory`] with what is in the way. Nothing has been touched then.
    pub fn prepare(
        target: &Target<'_>,
        needed: &[(PathBuf, u64)],
        beside: room::Beside,
        backup: &BackupRecord,
    ) -> Result<(TargetDirectory, room::Floor), Failure> {
        let Target { path, tablespaces, like } = *target;
        if !path.is_absolute() {
            return Err(Failure::new(Code::InvalidRequest, format!("{} is not an absolute path", path.display())));
        }
        let targets: Vec<&Path> = std::iter::once(path).chain(tablespaces.values().map(PathBuf::as_path)).collect();
        for (n, target) in targets.iter().enumerate() {
            check_free(target)?;
            if targets[..n].iter().any(|other| target.starts_with(other) || other.starts_with(target)) {
                return Err(Failure::new(
                    Code::TargetDirectory,
                    format!("{} would lie in another directory of the restore, or hold it", target.display()),
                )
                .hint("Give the data directory and each tablespace a directory of its own, side by side."));
            }
        }
        let floor = room::check(needed, beside)?;
        let mut directory = TargetDirectory {
            path: path.to_owned(),
            created: false,
            owner: Owner::Ourselves,
            tablespaces: Vec::new(),
            locks: Vec::new(),
        };
        for (n, target) in targets.into_iter().enumerate() {
            let claimed = directory.claim(target, n == 0, backup.id, like);
            if let Err(failure) = claimed {
                // Without a lock nothing here is ours.
                if !directory.locks.is_empty() {
                    let _ = directory.clear();
                }
                return Err(failure);
            }
        }
        Ok((directory, floor))
    }

    /// A directory that holds a database and keeps it. Nothing is claimed: [`TargetDirectory::release`] and
    /// [`TargetDirectory::clear`] aren't for it.
    ///
    /// # Errors
    /// If it can't be looked at.
    pub fn existing(path: &Path, tablespaces: impl IntoIterator<Item = PathBuf>) -> Result<TargetDirectory, Failure> {
        let meta = fs::metadata(path).map_err(|error| Failure::io(format!("reading {}", path.display()), &error))?;
        let root = rustix::process::geteuid().is_root();
        let owner = if root { Owner::Of { uid: meta.uid(), gid: meta.gid() } } else { Owner::Ourselves };
        let tablespaces = tablespaces.into_iter().map(|path| (path, false)).collect();
        Ok(TargetDirectory { path: path.to_owned(), created: false, owner, tablespaces, locks: Vec::new() })
    }

    /// One that is there, without a marker.
    #[cfg(test)]
    pub(super) fn unclaimed(path: &Path) -> TargetDirectory {
        let (owner, tablespaces, locks) = (Owner::Ourselves, Vec::new(), Vec::new());
        TargetDirectory { path: path.to_owned(), created: false, owner, tablespaces, locks }
    }

    /// Creates a directory, marks it as ours, and removes what an interrupted restore left in it. Between the look at it
    /// and this, another restore may have claimed it, or even have ended in it: then it's left alone.
    fn claim(&mut self, path: &Path, is_data: bool, backup: BackupId, like: Option<&Path>) -> Result<(), Failure> {
        let (created, owner) = create(path)?;
        let owner = match like {
            Some(like) => become_like(path, like)?,
            None => owner,
        };
        let marker = lock_marker(path).inspect_err(|_| {
            if created {
                // As it's not empty where another restore is at work, it stays.
                let _ = fs::remove_dir(path);
            }
        })?;
        if is_data {
            (self.created, self.owner) = (created, owner);
        } else {
            self.tablespaces.push((path.to_owned(), created));
        }
        let marker = Arc::new(marker);
        self.locks.push(marker.clone());
        let mark = || {
            clear_all_but_marker(path)?;
            marker.set_len(0)?;
            marker.write_all_at(format!("{backup}\n").as_bytes(), 0)?;
            let like = fs::metadata(&self.path)?;
            self.own(&path.join(MARKER), (like.uid(), like.gid()))?;
            File::open(path)?.sync_all()
        };
        mark().map_err(|error| Failure::io(format!("claiming {}", path.display()), &error))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives a new file or directory to whom it has to belong. `backup` is what the backup says.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn own(&self, path: &Path, backup: (u32, u32)) -> io::Result<()> {
        match self.owner {
            Owner::Ourselves => Ok(()),
            Owner::Of { uid, gid } => chown(path, Some(uid), Some(gid)),
            Owner::AsInBackup => chown(path, Some(backup.0), Some(backup.1)),
        }
    }

    /// Gives the directories themselves to whom the backup says, where nothing else does: as root, in a directory that
    /// wasn't there.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn adopt(&self, owner: (u32, u32)) -> Result<(), Failure> {
        if self.owner != Owner::AsInBackup {
            return Ok(());
        }
        for path in std::iter::once(&self.path).chain(self.tablespaces.iter().map(|(path, _)| path)) {
            let changed = chown(path, Some(owner.0), Some(owner.1));
            changed.map_err(|error| Failure::io(format!("changing the owner of {}", path.display()), &error))?;
        }
        Ok(())
    }

    /// A new file, mode 0600, owned like the directory. Not yet durable.
    ///
    /// # Errors
    /// If it exists or can't be made.
    pub fn create(&self, name: &str) -> Result<File, Failure> {
        let path = self.path.join(name);
        self.create_file(&path, b"").map_err(|error| Failure::io(format!("writing {}", path.display()), &error))
    }

    /// The same, with content.
    ///
    /// # Errors
    /// If it exists or can't be written.
    pub fn write(&self, name: &str, content: &[u8]) -> Result<(), Failure> {
        let path = self.path.join(name);
        let written = self.create_file(&path, content);
        written.map(|_| ()).map_err(|error| Failure::io(format!("writing {}", path.display()), &error))
    }

    fn create_file(&self, path: &Path, content: &[u8]) -> io::Result<File> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(content)?;
        let like = fs::metadata(&self.path)?;
        self.own(path, (like.uid(), like.gid()))?;
        Ok(file)
    }

    /// Writes a file so that it's there with all of its content, durably, or not at all.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn write_durably(&self, name: &str, content: &[u8]) -> Result<(), Failure> {
        let path = self.path.join(name);
        let temporary = self.path.join(format!("{name}.pgsidecar-tmp"));
        let write = || {
            unless_absent(fs::remove_file(&temporary))?;
            self.create_file(&temporary, content)?.sync_all()?;
            fs::rename(&temporary, &path)?;
            File::open(path.parent().unwrap_or(&self.path))?.sync_all()
        };
        write().map_err(|error| Failure::io(format!("writing {}", path.display()), &error))
    }

    /// Makes everything that was written durable: one `syncfs` for each directory that may be a file system of its
    /// own, instead of an fsync for each of thousands of files.
    ///
    /// # Errors
    /// If the kernel reports a write error.
    pub fn sync_file_systems(&self) -> Result<(), Failure> {
        for path in std::iter::once(&self.path).chain(self.tablespaces.iter().map(|(path, _)| path)) {
            let sync = || rustix::fs::syncfs(File::open(path)?).map_err(io::Error::from);
            sync().map_err(|error| Failure::io(format!("syncing {}", path.display()), &error))?;
        }
        Ok(())
    }

    /// Everything is whole: takes the markers away, that of the data directory last.
    ///
    /// # Errors
    /// If one can't be removed.
    pub fn release(&self) -> Result<(), Failure> {
        for path in self.tablespaces.iter().map(|(path, _)| path).chain([&self.path]) {
            let release = || {
                fs::remove_file(path.join(MARKER))?;
                File::open(path)?.sync_all()
            };
            release().map_err(|error| Failure::io(format!("removing the marker of {}", path.display()), &error))?;
        }
        Ok(())
    }

    /// Removes what was written, `PG_VERSION` first. Directories that were there before stay.
    ///
    /// # Errors
    /// If something can't be removed.
    pub fn clear(&self) -> io::Result<()> {
        unless_absent(fs::remove_file(self.path.join("PG_VERSION")))?;
        for (path, created) in
            self.tablespaces.iter().map(|(path, created)| (path, *created)).chain([(&self.path, self.created)])
        {
            unless_absent(clear_content(path))?;
            if created {
                unless_absent(fs::remove_dir(path))?;
            }
        }
        Ok(())
    }
}

/// Gives a directory the owner and the mode of another one.
fn become_like(path: &Path, like: &Path) -> Result<Owner, Failure> {
    let become_so = || -> io::Result<Owner> {
        let like = fs::metadata(like)?;
        fs::set_permissions(path, fs::Permissions::from_mode(like.mode() & 0o750))?;
        if !rustix::process::geteuid().is_root() {
            return Ok(Owner::Ourselves);
        }
        chown(path, Some(like.uid()), Some(like.gid()))?;
        Ok(Owner::Of { uid: like.uid(), gid: like.gid() })
    };
    become_so().map_err(|error| Failure::io(format!("changing the owner of {}", path.display()), &error))
}

/// The marker of a directory, made if it isn't there, and locked.
fn lock_marker(directory: &Path) -> Result<File, Failure> {
    let path = directory.join(MARKER);
    let marker = || {
        let marker = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path)?;
        // Whoever held it may have removed it since it was opened.
        let is_ours = marker.try_lock().is_ok()
            && fs::symlink_metadata(&path)
                .is_ok_and(|meta| marker.metadata().is_ok_and(|ours| ours.ino() == meta.ino()));
        Ok::<_, io::Error>(is_ours.then_some(marker))
    };
    let marker = marker().map_err(|error| Failure::io(format!("claiming {}", directory.display()), &error))?;
    let Some(marker) = marker else { return Err(refusal(directory, BEING_RESTORED_TO)) };
    if directory.join("PG_VERSION").exists() {
        let _ = fs::remove_file(&path);
        return Err(refusal(directory, HOLDS_A_DATABASE));
    }
    Ok(marker)
}

/// Empties a directory. The marker goes last: until then the directory is known as ours.
fn clear_content(directory: &Path) -> io::Result<()> {
    clear_all_but_marker(directory)?;
    unless_absent(fs::remove_file(directory.join(MARKER)))
}

fn clear_all_but_marker(directory: &Path) -> io::Result<()> {
    let marker = directory.join(MARKER);
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path != marker {
            remove(&path)?;
        }
    }
    Ok(())
}

/// What isn't there needn't be removed.
fn unless_absent(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Removes a file, a link (not what it points to) or a directory with its content.
fn remove(path: &Path) -> io::Result<()> {
    if fs::symlink_metadata(path)?.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}

fn refusal(directory: &Path, what: &str) -> Failure {
    Failure::new(Code::TargetDirectory, format!("{} {what}; nothing was changed", directory.display()))
        .hint("Name a directory that is empty or doesn't exist, on a volume with enough room.")
}

/// Refuses a directory with anything in it, unless it's what an interrupted restore left.
fn check_free(path: &Path) -> Result<(), Failure> {
    let refuse = |what: &str| refusal(path, what);
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => return Err(refuse("is not a directory")),
        Err(error) => return Err(Failure::io(format!("reading {}", path.display()), &error)),
    };
    if entries.count() == 0 {
        return Ok(());
    }
    if path.join("PG_VERSION").exists() {
        return Err(refuse(HOLDS_A_DATABASE));
    }
    if let Ok(marker) = File::open(path.join(MARKER)) {
        if marker.try_lock().is_err() {
            return Err(refuse(BEING_RESTORED_TO));
        }
        tracing::info!(directory = %path.display(), "the directory holds the remains of an interrupted restore; starting over");
        return Ok(());
    }
    Err(refuse("is not empty"))
}

/// Creates a directory if it isn't there; tells whether it did, and who is to own what comes into it.
fn create(path: &Path) -> Result<(bool, Owner), Failure> {
    let root = rustix::process::geteuid().is_root();
    let create = || match fs::metadata(path) {
        Ok(meta) => {
            // PostgreSQL refuses a data directory that others can read.
            fs::set_permissions(path, fs::Permissions::from_mode(0o700))?;
            let owner = if root && meta.uid() != 0 {
                Owner::Of { uid: meta.uid(), gid: meta.gid() }
            } else {
                Owner::AsInBackup
            };
            Ok((false, if root { owner } else { Owner::Ourselves }))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            DirBuilder::new().recursive(true).mode(0o700).create(path)?;
            Ok((true, if root { Owner::AsInBackup } else { Owner::Ourselves }))
        }
        Err(error) => Err(error),
    };
    create().map_err(|error| Failure::io(format!("creating {}", path.display()), &error))
}

#[cfg(test)]
mod tests {
    use pgsidecar_core::BackupKind;

    use super::*;

    #[test]
    fn what_another_restore_has_claimed_since_it_was_looked_at_is_left_alone() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("restored");
        let backup = BackupId::new(jiff::Timestamp::UNIX_EPOCH, BackupKind::Full);
        let (mut first, mut second) = (TargetDirectory::unclaimed(&path), TargetDirectory::unclaimed(&path));
        first.claim(&path, true, backup, None).unwrap();
        assert!(fs::read_to_string(path.join(MARKER)).unwrap().starts_with(&backup.to_string()));
        fs::write(path.join("file"), "").unwrap();

        let refused = second.claim(&path, true, backup, None).unwrap_err();
        assert!(refused.message.contains(BEING_RESTORED_TO), "{refused}");
        assert!(second.locks.is_empty() && path.join("file").exists() && path.join(MARKER).exists());

        first.write("PG_VERSION", b"17").unwrap();
        first.release().unwrap();
        let refused = second.claim(&path, true, backup, None).unwrap_err();
        assert!(refused.message.contains(HOLDS_A_DATABASE), "{refused}");
        assert!(second.locks.is_empty() && path.join("file").exists() && !path.join(MARKER).exists());

        // What an interrupted one has left is taken over.
        fs::remove_file(path.join("PG_VERSION")).unwrap();
        fs::write(path.join(MARKER), "a longer text than the next one, to be gone with all of it").unwrap();
        drop(first);
        second.claim(&path, true, backup, None).unwrap();
        assert_eq!(fs::read_to_string(path.join(MARKER)).unwrap(), format!("{backup}\n"));
        assert!(!path.join("file").exists());
    }
}
