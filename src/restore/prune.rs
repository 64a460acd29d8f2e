//! Removes what a directory has and the restored backup hasn't.

use std::{
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
};

use super::layer::Paths;

/// Removes all files and directories below `location` that aren't `kept`; `path` is where it lies in the data directory,
/// empty for that itself. What is `left_alone` by its name at the top stays. No link is followed: what one
/// points to isn't touched.
///
/// # Errors
/// If something can't be removed or read; with where.
pub fn prune(
    location: &Path,
    path: &Path,
    kept: &Paths,
    left_alone: &dyn Fn(&OsStr) -> bool,
) -> Result<(), (PathBuf, io::Error)> {
    let failed = |error| (location.to_owned(), error);
    for entry in fs::read_dir(location).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        if left_alone(&name) {
            continue;
        }
        let (inner, path) = (entry.path(), path.join(&name));
        let is_directory = entry.file_type().map_err(failed)?.is_dir();
        let removed = match (kept.contains(path.as_os_str().as_encoded_bytes()), is_directory) {
            (true, true) => {
                prune(&inner, &path, kept, &|_| false)?;
                Ok(())
            }
            (true, false) => Ok(()),
            (false, true) => fs::remove_dir_all(&inner),
            (false, false) => fs::remove_file(&inner),
        };
        removed.map_err(|error| (inner, error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn what_is_not_kept_goes_and_nothing_outside() {
        let scratch = tempfile::tempdir().unwrap();
        let (root, outside) = (scratch.path().join("data"), scratch.path().join("outside"));
        fs::create_dir_all(root.join("base/5")).unwrap();
        fs::create_dir_all(root.join("base/16400")).unwrap();
        fs::create_dir(&outside).unwrap();
        for file in ["base/5/1", "base/5/2", "base/16400/1", "marker", "gone"] {
            fs::write(root.join(file), "").unwrap();
        }
        fs::write(outside.join("1"), "").unwrap();
        symlink(&outside, root.join("link")).unwrap();
        symlink(&outside, root.join("base/5/link")).unwrap();
        let mut kept = Paths::default();
        for path in ["base", "base/5", "base/5/1", "base/9/1"] {
            assert!(kept.insert(path.as_bytes()));
        }
        prune(&root, Path::new(""), &kept, &|name| name == "marker").unwrap();
        let left = |directory: &Path| {
            let mut names: Vec<_> = fs::read_dir(directory)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        assert_eq!(left(&root), ["base", "marker"]);
        assert_eq!(left(&root.join("base")), ["5"]);
        assert_eq!(left(&root.join("base/5")), ["1"]);
        assert_eq!(left(&outside), ["1"]);
        // A tablespace's own directory.
        prune(&outside, Path::new("pg_tblspc/7"), &kept, &|_| false).unwrap();
        assert_eq!(left(&outside), [""; 0]);
    }
}
