//! Walks a local directory in the byte order of the keys.
//!
//! Within one directory that is the order of the names with a `/` added to those of directories: `a-b` comes before
//! `a/…` because `-` is less than `/`. Holds the names of the directories on the way down, never the whole tree.

use std::{fs, io, path::Path};

use super::{
    ListCursor, ListPage, ListRequest, ListedObject, PendingUpload,
    local::{TEMPORARY, is_absent, modified},
};

/// What a walk meets: a file, or a directory to descend into. `key` is relative to the root; a directory's ends with
/// a `/`.
struct Entry {
    key: String,
    is_directory: bool,
}

/// The entries of the directory `prefix` (empty, or with its trailing `/`), in key order. Symlinks are followed.
fn entries(root: &Path, prefix: &str) -> io::Result<Vec<Entry>> {
    let directory = match fs::read_dir(root.join(prefix)) {
        Ok(directory) => directory,
        // Removed meanwhile, or the repository was never written to.
        Err(error) if is_absent(&error) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut entries = Vec::new();
    for entry in directory {
        let entry = entry?;
        let Some(name) = entry.file_name().to_str().map(str::to_owned) else { continue };
        let mut kind = entry.file_type()?;
        if kind.is_symlink() {
            match fs::metadata(entry.path()) {
                Ok(target) => kind = target.file_type(),
                Err(_) => continue,
            }
        }
        match kind.is_dir() {
            true => entries.push(Entry { key: format!("{prefix}{name}/"), is_directory: true }),
            false if kind.is_file() => entries.push(Entry { key: format!("{prefix}{name}"), is_directory: false }),
            false => {}
        }
    }
    entries.sort_unstable_by(|a, b| a.key.cmp(&b.key));
    Ok(entries)
}

fn is_temporary(key: &str) -> bool {
    key.rsplit('/').next().is_some_and(|name| name.starts_with(TEMPORARY))
}

/// A key that a listing shows: ours, and no temporary file.
fn is_listed(key: &str) -> bool {
    key.parse::<pgsidecar_core::ObjectKey>().is_ok() && !key.split('/').any(|name| name.starts_with(TEMPORARY))
}

/// Whether the directory can't lead to a key at all: keys are bounded in length, so this also ends symlinked circles.
fn is_foreign(directory: &str) -> bool {
    !is_listed(directory.trim_end_matches('/'))
}

/// Whether there can be keys with this prefix under this directory.
fn overlaps(directory: &str, prefix: &str) -> bool {
    directory.starts_with(prefix) || prefix.starts_with(directory)
}

/// One page of a listing.
pub(super) fn page(root: &Path, request: &ListRequest) -> io::Result<ListPage> {
    let cursor = request.cursor.as_ref().map(|cursor| cursor.0.as_str());
    let mut walk = Walk { root, request, cursor, limit: request.page_size(), page: ListPage::default(), last: None };
    walk.directory("")?;
    Ok(walk.page)
}

struct Walk<'a> {
    root: &'a Path,
    request: &'a ListRequest,
    /// The last entry of the page before.
    cursor: Option<&'a str>,
    limit: usize,
    page: ListPage,
    last: Option<String>,
}

/// Whether to go on walking.
#[derive(PartialEq)]
enum Flow {
    Continue,
    PageIsFull,
}

impl Walk<'_> {
    fn directory(&mut self, prefix: &str) -> io::Result<Flow> {
        for entry in entries(self.root, prefix)? {
            let flow = if entry.is_directory { self.enter(&entry.key)? } else { self.file(entry.key)? };
            if flow == Flow::PageIsFull {
                return Ok(flow);
            }
        }
        Ok(Flow::Continue)
    }

    fn enter(&mut self, directory: &str) -> io::Result<Flow> {
        if is_foreign(directory) || !overlaps(directory, &self.request.prefix) {
            return Ok(Flow::Continue);
        }
        if self.request.shallow && directory.starts_with(&self.request.prefix) && directory != self.request.prefix {
            if !self.is_wanted(directory) || !has_objects(self.root, directory)? {
                return Ok(Flow::Continue);
            }
            return Ok(self.add(directory.to_owned(), |page, prefix| page.prefixes.push(prefix)));
        }
        let is_passed = |mark: &str| mark > directory && !mark.starts_with(directory);
        if self.cursor.is_some_and(is_passed) || self.request.after.as_deref().is_some_and(is_passed) {
            return Ok(Flow::Continue);
        }
        self.directory(directory)
    }

    fn file(&mut self, key: String) -> io::Result<Flow> {
        if !self.is_wanted(&key) || !is_listed(&key) {
            return Ok(Flow::Continue);
        }
        let metadata = match fs::metadata(self.root.join(&key)) {
            Ok(metadata) => metadata,
            Err(error) if is_absent(&error) => return Ok(Flow::Continue),
            Err(error) => return Err(error),
        };
        let (size, modified) = (metadata.len(), modified(&metadata)?);
        Ok(self.add(key, |page, key| {
            page.objects.extend(key.parse().ok().map(|key| ListedObject { key, size, modified }));
        }))
    }

    fn is_wanted(&self, name: &str) -> bool {
        self.request.wants(name) && self.cursor.is_none_or(|cursor| name > cursor)
    }

    /// Adds an entry, or finds that the page was full before it: only then is there a next one.
    fn add(&mut self, name: String, push: impl FnOnce(&mut ListPage, String)) -> Flow {
        if self.page.objects.len() + self.page.prefixes.len() == self.limit {
            self.page.next = self.last.take().map(ListCursor);
            return Flow::PageIsFull;
        }
        self.last = Some(name.clone());
        push(&mut self.page, name);
        Flow::Continue
    }
}

/// Whether there is any object under this directory: an empty one is none on S3 either.
fn has_objects(root: &Path, directory: &str) -> io::Result<bool> {
    for entry in entries(root, directory)? {
        let found = match entry.is_directory {
            true => !is_foreign(&entry.key) && has_objects(root, &entry.key)?,
            false => is_listed(&entry.key),
        };
        if found {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The temporary files under `prefix`.
pub(super) fn temporary_files(root: &Path, prefix: &str) -> io::Result<Vec<PendingUpload>> {
    let mut found = Vec::new();
    let mut directories = vec![String::new()];
    while let Some(directory) = directories.pop() {
        for Entry { key, is_directory } in entries(root, &directory)? {
            if is_directory && !is_foreign(&key) && overlaps(&key, prefix) {
                directories.push(key);
            } else if !is_directory && is_temporary(&key) && directory.starts_with(prefix) {
                match fs::metadata(root.join(&key)) {
                    Ok(metadata) => {
                        found.push(PendingUpload { id: key.clone(), key, started: modified(&metadata)? });
                    }
                    Err(error) if is_absent(&error) => {}
                    Err(error) => return Err(error),
                }
            }
        }
    }
    Ok(found)
}
