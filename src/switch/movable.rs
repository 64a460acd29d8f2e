//! Whether the directories of a switch can be renamed or moved: found before anything is.

use std::path::Path;

use pgsidecar_core::switch::{Role, Switch};
use rustix::fs::{Access, access};

use super::{carry::names, is_moved};
use crate::{
    failure::{Code, Failure},
    restore::mounts,
};

/// Refuses what can't be moved: what is mounted in a directory, but for the WAL, of which the content is moved; what
/// another user's rights forbid; directories of which one lies in another.
///
/// # Errors
/// [`Code::TargetDirectory`] with what it is.
pub fn check(switch: &Switch) -> Result<(), Failure> {
    let refuse = |what: String, hint: &str| {
        Err(Failure::new(Code::TargetDirectory, format!("{what}; nothing was changed")).hint(hint))
    };
    let wal = switch.roots.iter().find(|root| root.role == Role::Wal).map(|root| root.live.as_path());
    let mount_points = mounts::mount_points()?;
    for root in &switch.roots {
        let live = root.live.as_path();
        mounts::refuse_below(live, wal.filter(|_| is_moved(root)))?;
        if !is_moved(root) && mount_points.iter().any(|point| point == live) {
            return refuse(
                format!("{} is a mount point, and can't be renamed", live.display()),
                "Restore to an empty volume instead.",
            );
        }
        let holds = |other: &Path| live != other && live.starts_with(other);
        let is_mounted_wal = Some(live) == wal && mount_points.iter().any(|point| point == live);
        if let Some(other) = switch.roots.iter().find(|other| holds(&other.live) && !is_mounted_wal) {
            return refuse(
                format!("{} lies in {}: one can't be moved without the other", live.display(), other.live.display()),
                "Restore to another directory ('restore run --to'), with tablespaces and WAL outside of the data directory.",
            );
        }
        if let Some(path) = not_ours(live, is_moved(root), wal)? {
            return refuse(
                format!("{} can't be moved: this user may not write to it", path.display()),
                "Give it to the user of PostgreSQL, as whom pgsidecar has to run, or remove it.",
            );
        }
    }
    Ok(())
}

/// What of a directory this user can't move. The entry of a directory that comes to lie in another one is written to.
fn not_ours(live: &Path, is_moved: bool, wal: Option<&Path>) -> Result<Option<std::path::PathBuf>, Failure> {
    let may_write = |path: &Path| access(path, Access::WRITE_OK).is_ok();
    if !live.exists() {
        return Ok(None);
    }
    if !may_write(live) {
        return Ok(Some(live.to_owned()));
    }
    if !is_moved {
        return Ok(live.parent().filter(|parent| !may_write(parent)).map(Path::to_owned));
    }
    let entries = names(live)?.into_iter().map(|name| live.join(name));
    let mut directories = entries.filter(|path| Some(path.as_path()) != wal && path.is_dir() && !path.is_symlink());
    Ok(directories.find(|path| !may_write(path)))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use pgsidecar_core::switch::{Phase, Purpose, Root, Way};

    use super::*;

    #[test]
    fn directories_of_which_one_lies_in_another_are_refused() {
        let scratch = tempfile::tempdir().unwrap();
        let data = scratch.path().canonicalize().unwrap().join("data");
        fs::create_dir_all(data.join("spaces/PG_15_1")).unwrap();
        let root = |role, live: &Path| Root {
            role,
            live: live.to_owned(),
            staged: None,
            kept: data.with_extension("kept"),
            way: Way::Whole,
            old: None,
            new: None,
        };
        let id = "20261121T061500Z".parse().unwrap();
        let purpose = Purpose::Undo { of: id, restore_command: String::new() };
        let switch = |roots| Switch { id, purpose: purpose.clone(), phase: Phase::Ready, roots, refused: None };
        check(&switch(vec![root(Role::Data, &data)])).unwrap();
        let inner = root(Role::Tablespace, &data.join("spaces/PG_15_1"));
        let refused = check(&switch(vec![inner, root(Role::Data, &data)])).unwrap_err();
        assert!(refused.message.contains("lies in") && refused.message.contains("nothing was changed"), "{refused}");
        let mounted = check(&switch(vec![root(Role::Data, Path::new("/proc"))])).unwrap_err();
        assert_eq!(mounted.code, Code::TargetDirectory, "{mounted}");
    }
}
