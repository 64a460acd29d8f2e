//! What is in the data directory, and whether it can be written to.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::Path,
};

use pgsidecar_core::prepare::Directory;

use crate::{
    failure::{Code, Failure},
    pgdata::owner_hint,
    restore::MARKER,
};

/// Looks into a data directory.
///
/// # Errors
/// If it can't be read. Then nothing can be told.
pub fn look(pgdata: &Path) -> io::Result<Directory> {
    let entries = match fs::read_dir(pgdata) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Directory::Empty),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            return Ok(Directory::Other(pgdata.display().to_string()));
        }
        Err(error) => return Err(error),
    };
    match fs::metadata(pgdata.join("PG_VERSION")) {
        // As the official image's entrypoint does, which goes by this alone.
        Ok(meta) if meta.len() > 0 => return Ok(Directory::Database),
        Ok(_) => return Ok(Directory::Other("an empty PG_VERSION".to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let mut names: Vec<String> = Vec::new();
    for entry in entries {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(match names.as_slice() {
        [] => Directory::Empty,
        [only] if only == "lost+found" => Directory::OnlyLostAndFound,
        names if names.iter().any(|name| name == MARKER) => Directory::Interrupted,
        [first, ..] => Directory::Other(first.clone()),
    })
}

/// A restore that was killed after its last step but one has left its marker beside a whole database.
pub fn remove_stale_marker(pgdata: &Path) {
    let marker = pgdata.join(MARKER);
    if let Ok(file) = File::open(&marker)
        && file.try_lock().is_ok()
    {
        // Nothing depends on it any more.
        let _ = fs::remove_file(&marker);
    }
}

/// Whether what keeps us from looking into the data directory is root's: the directory itself, which PostgreSQL then
/// doesn't take for its own, or one above it that nobody but root may pass. There is no database that runs in it: most
/// likely it's a new volume, which the image's entrypoint, as root, would give to PostgreSQL and make a database in.
pub fn is_closed_by_root(pgdata: &Path) -> bool {
    // The first one that can be asked is the one that can't be read, or passed.
    let Some((path, meta)) = pgdata.ancestors().find_map(|path| Some((path, fs::metadata(path).ok()?))) else {
        return false;
    };
    let others_pass = meta.mode() & 0o001 != 0 || (meta.mode() & 0o010 != 0 && meta.gid() != 0);
    meta.uid() == 0 && (path == pgdata || !others_pass)
}

/// Checks that the data directory can be made and written to by us.
///
/// # Errors
/// [`Code::TargetDirectory`], with what to set.
pub fn check_writable(pgdata: &Path) -> Result<(), Failure> {
    let Some((path, meta)) = pgdata.ancestors().find_map(|path| Some((path, fs::metadata(path).ok()?))) else {
        return Ok(());
    };
    if rustix::fs::access(path, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK).is_ok() {
        return Ok(());
    }
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let what = format!(
        "{} belongs to user {} and group {} with mode {:04o}, and pgsidecar, which runs as user {uid} and group {gid}, can't write to it",
        path.display(),
        meta.uid(),
        meta.gid(),
        meta.mode() & 0o7777,
    );
    let owner = if path == pgdata { meta.uid() } else { 0 };
    Err(Failure::new(Code::TargetDirectory, what).hint(owner_hint(owner)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_a_directory_is_told_apart_as_the_image_does() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("data");
        let looked = || look(&path).unwrap();
        assert_eq!(looked(), Directory::Empty);
        fs::create_dir(&path).unwrap();
        assert_eq!(looked(), Directory::Empty);
        fs::create_dir(path.join("lost+found")).unwrap();
        assert_eq!(looked(), Directory::OnlyLostAndFound);
        fs::write(path.join("file"), "").unwrap();
        assert_eq!(looked(), Directory::Other("file".to_owned()));
        fs::write(path.join(MARKER), "").unwrap();
        assert_eq!(looked(), Directory::Interrupted);
        // The entrypoint asks whether it has content.
        fs::write(path.join("PG_VERSION"), "").unwrap();
        assert_eq!(looked(), Directory::Other("an empty PG_VERSION".to_owned()));
        fs::write(path.join("PG_VERSION"), "17\n").unwrap();
        assert_eq!(looked(), Directory::Database);
        remove_stale_marker(&path);
        assert!(!path.join(MARKER).exists());
        assert_eq!(look(&path.join("file")).unwrap(), Directory::Other(path.join("file").display().to_string()));
    }
}
