//! The files of a data directory that belong in a base backup, found while PostgreSQL goes on changing it.
//!
//! What disappears between being seen and being read is left out: it was dropped, and replay drops it again.
//! What can't be read for another reason ends the backup: one with a hole isn't one.

use std::{
    collections::HashSet,
    fs::{self, DirEntry, Metadata},
    io,
    path::{Path, PathBuf},
};

use pgsidecar_core::data_directory::{
    Fork, RelationFile, Treatment, empty_wal_subdirectories, is_relation_directory, relation_file, skip_as_unlogged,
    treat_directory, treat_file,
};

use super::pack::Source;
use crate::failure::{Code, Failure};

/// Something to be put into the backup.
#[derive(Debug)]
pub enum Item {
    /// A directory, without its content.
    Directory {
        /// Path relative to the data directory.
        path: PathBuf,
        /// Its metadata.
        meta: Metadata,
    },
    /// A regular file.
    File {
        /// Path relative to the data directory.
        path: PathBuf,
        /// Where to read it.
        location: PathBuf,
    },
}

/// What to walk, and where to report.
struct Walk<'a> {
    source: &'a Source,
    emit: &'a mut dyn FnMut(Item) -> Result<(), Failure>,
    found: Found,
}

/// What a walk has found besides the items.
#[derive(Debug, Default)]
pub struct Found {
    /// What was left out, for people.
    pub warnings: Vec<String>,
    /// The OIDs of the tablespaces outside of the data directory.
    pub tablespaces: Vec<String>,
}

/// Walks a data directory; `emit` gets each item and can end the walk.
///
/// # Errors
/// If a directory can't be read, or `emit` fails.
pub fn walk(source: &Source, emit: &mut dyn FnMut(Item) -> Result<(), Failure>) -> Result<Found, Failure> {
    let mut walk = Walk { source, emit, found: Found::default() };
    walk.directory(Path::new(""), &source.root)?;
    Ok(walk.found)
}

/// `None` if it has vanished.
fn unless_vanished<T>(result: io::Result<T>, what: &Path) -> Result<Option<T>, Failure> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Failure::io(format!("reading {}", what.display()), &error)),
    }
}

/// Whether the relation has an init fork by now: one that was made unlogged since the directory was listed.
fn is_unlogged(location: &Path, file: &RelationFile) -> bool {
    fs::symlink_metadata(location.join(format!("{}_init", file.number))).is_ok()
}

impl Walk<'_> {
    /// Walks one directory: `path` is its name in the backup, `location` where it is.
    fn directory(&mut self, path: &Path, location: &Path) -> Result<(), Failure> {
        let shown = path.to_string_lossy();
        let is_relation_directory = is_relation_directory(&shown);
        let unlogged = if is_relation_directory { self.init_forks(location)? } else { HashSet::new() };
        let Some(entries) = unless_vanished(fs::read_dir(location), location)? else { return Ok(()) };
        for entry in entries {
            let Some(entry) = unless_vanished(entry, location)? else { continue };
            let name = entry.file_name();
            if is_relation_directory
                && let Some(file) = relation_file(&name.to_string_lossy())
                && skip_as_unlogged(&file, unlogged.contains(&file.number) || is_unlogged(location, &file))
            {
                continue;
            }
            self.entry(&path.join(&name), &entry)?;
        }
        Ok(())
    }

    /// The relations of a directory that have an init fork: those that are unlogged.
    fn init_forks(&self, location: &Path) -> Result<HashSet<u32>, Failure> {
        let mut numbers = HashSet::new();
        let Some(entries) = unless_vanished(fs::read_dir(location), location)? else { return Ok(numbers) };
        for entry in entries {
            let Some(entry) = unless_vanished(entry, location)? else { continue };
            let file = relation_file(&entry.file_name().to_string_lossy());
            numbers.extend(file.filter(|file| file.fork == Fork::Init).map(|file| file.number));
        }
        Ok(numbers)
    }

    fn entry(&mut self, path: &Path, entry: &DirEntry) -> Result<(), Failure> {
        let location = entry.path();
        let Some(meta) = unless_vanished(fs::symlink_metadata(&location), &location)? else { return Ok(()) };
        let shown = path.to_string_lossy().into_owned();
        let kind = meta.file_type();
        // pg_wal and others can be links to directories elsewhere; only that they exist matters then.
        if (kind.is_dir() || kind.is_symlink()) && treat_directory(&shown) == Treatment::EmptyDirectory {
            return self.empty_directory(path, &location);
        }
        if kind.is_symlink() && path.parent() == Some(Path::new("pg_tblspc")) {
            return self.tablespace(path, &location);
        }
        if kind.is_dir() {
            if treat_directory(&shown) == Treatment::Include {
                (self.emit)(Item::Directory { path: path.to_owned(), meta })?;
                self.directory(path, &location)?;
            }
            return Ok(());
        }
        if kind.is_file() {
            // What makes the directory startable is written by itself, at the end.
            if treat_file(&shown) == Treatment::Include {
                (self.emit)(Item::File { path: path.to_owned(), location })?;
            }
            return Ok(());
        }
        self.found.warnings.push(format!("{shown} is neither a file nor a directory and was left out"));
        Ok(())
    }

    fn empty_directory(&mut self, path: &Path, location: &Path) -> Result<(), Failure> {
        let Some(meta) = unless_vanished(fs::metadata(location), location)? else { return Ok(()) };
        (self.emit)(Item::Directory { path: path.to_owned(), meta: meta.clone() })?;
        if path == Path::new("pg_wal") {
            for name in empty_wal_subdirectories(self.source.major) {
                (self.emit)(Item::Directory { path: path.join(name), meta: meta.clone() })?;
            }
        }
        Ok(())
    }

    /// A tablespace: the link becomes a directory in the backup. Were it kept, unpacking would write through it
    /// into the tablespace of the living server.
    fn tablespace(&mut self, path: &Path, link: &Path) -> Result<(), Failure> {
        let Some(meta) = unless_vanished(fs::metadata(link), link)? else {
            let target = fs::read_link(link).unwrap_or_default();
            // A dropped tablespace takes its link along; a link that leads nowhere is a missing mount.
            return match fs::symlink_metadata(link) {
                Err(_) => Ok(()),
                Ok(_) => Err(Failure::new(
                    Code::DataDirectory,
                    format!(
                        "the tablespace at {} can't be read: there is no such directory in this container",
                        target.display()
                    ),
                )
                .hint("Mount the tablespace's volume in the sidecar at the same path as in PostgreSQL's container.")),
            };
        };
        (self.emit)(Item::Directory { path: path.to_owned(), meta: meta.clone() })?;
        self.found.tablespaces.extend(path.file_name().map(|oid| oid.to_string_lossy().into_owned()));
        let own = &self.source.tablespace_directory;
        let (path, location) = (path.join(own), link.join(own));
        if let Some(meta) = unless_vanished(fs::symlink_metadata(&location), &location)? {
            (self.emit)(Item::Directory { path: path.clone(), meta })?;
            self.directory(&path, &location)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use pgsidecar_core::Lsn;

    use super::*;
    use crate::backup::pack::PageRule;

    #[test]
    fn a_relation_that_becomes_unlogged_while_its_directory_is_walked_is_left_out_from_then_on() {
        let root = tempfile::tempdir().unwrap();
        let base = root.path().join("base/5");
        fs::create_dir_all(&base).unwrap();
        for number in 16384..16394 {
            fs::write(base.join(number.to_string()), "").unwrap();
        }
        let source = Source {
            root: root.path().to_owned(),
            major: 17,
            tablespace_directory: String::new(),
            pages: PageRule { checked: false, backup_start: Lsn::INVALID, segment_blocks: 131_072 },
            base: None,
        };
        let mut mains = Vec::new();
        let walked = walk(&source, &mut |item| {
            let Item::File { path, .. } = item else { return Ok(()) };
            let file = relation_file(path.file_name().unwrap().to_str().unwrap()).unwrap();
            if file.fork != Fork::Init {
                mains.push(file.number);
            }
            // Whichever comes first: the directory and its init forks are listed by then.
            for number in (16384..16394).filter(|number| !mains.contains(number)) {
                fs::write(base.join(format!("{number}_init")), "").unwrap();
            }
            Ok(())
        });
        walked.unwrap();
        assert_eq!(mains.len(), 1, "{mains:?}");
    }
}
