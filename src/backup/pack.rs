//! Reads the data directory with several threads into parts that are uploaded while they are made.
//!
//! One thread walks, `parallelism` threads each read, compress and fill a part of their own, and the caller's
//! thread writes the lists. All hand over through bounded channels, so memory depends on the parallelism alone.
//! The first failure, or a cancellation, stops them all.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering::Relaxed},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
};

use pgsidecar_core::{
    BackupId, Lsn,
    backup::{DamagedFile, PartRecord},
    incremental_file::{incremental_path, path_of_incremental},
    incremental_plan::RelationPath,
    layout::BackupObject,
    page::PAGE_SIZE,
};
use tokio::runtime::Handle;

use super::{
    damage,
    incremental::Base,
    listing::{Listing, Uploading},
    part::{FileEntry, PartWriter},
    reading::{Content, LiveFile, PageCheck},
    walk::{Found, Item, walk},
};
use crate::{
    failure::{Code, Failure},
    progress::{Progress, given_up},
    repository::Repository,
};

/// How much the threads that read stand back for others, PostgreSQL first of all (nice(2)).
const NICE: i32 = 10;
/// Items and entries that wait in a channel at most.
const QUEUE: usize = 256;

/// How pages of relations are told and checked.
#[derive(Clone, Copy, Debug)]
pub struct PageRule {
    /// Whether they carry checksums.
    pub checked: bool,
    /// Where the backup began.
    pub backup_start: Lsn,
    /// Blocks in each file of a relation but its last (`RELSEG_SIZE`).
    pub segment_blocks: u32,
}

/// The data directory, as far as reading it needs to know.
pub struct Source {
    /// The data directory.
    pub root: PathBuf,
    /// PostgreSQL's major version.
    pub major: u32,
    /// The directory of this server's files in each tablespace.
    pub tablespace_directory: String,
    /// What its pages are checked for.
    pub pages: PageRule,
    /// What has changed since another backup; `None` if all is taken.
    pub base: Option<Base>,
}

/// What was found on the way.
pub struct Findings {
    /// By walking.
    pub walk: Found,
    /// Damaged pages.
    pub damaged: Vec<DamagedFile>,
}

/// How much is done at a time.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// How many threads read and compress.
    pub parallelism: usize,
    /// A part ends after the file with which it exceeds this many bytes.
    pub part_size: u64,
}

/// What to pack, and how.
pub struct Packer {
    repository: Repository,
    /// Runs the uploads.
    runtime: Handle,
    id: BackupId,
    source: Source,
    effort: Effort,
    progress: Arc<Progress>,
    last_number: AtomicU32,
}

/// A file that is put in at the end, from memory.
pub struct LastFile {
    /// Path relative to the data directory.
    pub path: &'static str,
    /// Its content.
    pub content: Vec<u8>,
}

struct OpenPart {
    writer: PartWriter,
    uploading: Uploading,
}

impl OpenPart {
    fn close(self) -> Result<PartRecord, Failure> {
        match self.writer.finish() {
            Ok(record) => self.uploading.finish(record.stored).map(|()| record),
            Err(error) => Err(self.uploading.explain(&error)),
        }
    }
}

impl Packer {
    /// A packer whose uploads run in the current runtime.
    pub fn new(
        repository: Repository,
        id: BackupId,
        source: Source,
        effort: Effort,
        progress: Arc<Progress>,
    ) -> Packer {
        Packer { repository, runtime: Handle::current(), id, source, effort, progress, last_number: AtomicU32::new(0) }
    }

    /// Packs everything but what has to be last. Blocks. Answers with the parts, in the order of their numbers,
    /// and warnings.
    ///
    /// # Errors
    /// The first that any thread met.
    pub fn pack(&self, listing: &mut Listing) -> Result<(Vec<PartRecord>, Findings), Failure> {
        let (items_in, items) = sync_channel::<Item>(QUEUE);
        let items = Mutex::new(items);
        let (entries_in, entries) = sync_channel::<FileEntry>(QUEUE);
        std::thread::scope(|scope| {
            let walker = scope.spawn(move || {
                let mut emit = |item| {
                    // The receivers are gone only if every worker has failed; theirs is the failure that counts.
                    items_in.send(item).map_err(|_| Failure::internal("nobody reads the files"))
                };
                walk(&self.source, &mut emit)
            });
            let workers: Vec<_> = (0..self.effort.parallelism)
                .map(|_| {
                    let entries_in = entries_in.clone();
                    let items = &items;
                    scope.spawn(move || self.work(items, &entries_in))
                })
                .collect();
            drop(entries_in);
            let mut listed = Ok(());
            let mut damaged = Vec::new();
            for mut entry in entries {
                if entry.bad.count > 0 && damaged.len() < damage::MOST_FILES {
                    let bad = std::mem::take(&mut entry.bad);
                    let path = String::from_utf8_lossy(&entry.path);
                    let path = path_of_incremental(&path).unwrap_or(path.into_owned());
                    tracing::warn!(path, pages = bad.count, blocks = ?bad.blocks, "damaged pages: wrong checksums");
                    damaged.push(DamagedFile { path, relation: None, blocks: bad.blocks, count: bad.count });
                }
                if listed.is_ok() {
                    listed = listing.add(&entry);
                    if listed.is_err() {
                        self.progress.cancel();
                    }
                }
            }
            let mut parts = Vec::new();
            let mut failures = Vec::new();
            for worker in workers {
                match worker.join() {
                    Ok(Ok(done)) => parts.extend(done),
                    Ok(Err(failure)) => failures.push(failure),
                    Err(_) => failures.push(Failure::internal("a thread that reads files panicked")),
                }
            }
            // Whoever was merely stopped says 'cancelled'; the reason comes first.
            failures.sort_by_key(|failure| failure.code == Code::Busy);
            let walked = walker.join().map_err(|_| Failure::internal("the thread that walks the files panicked"));
            if let Some(failure) = failures.into_iter().next() {
                return Err(failure);
            }
            listed.map_err(|error| Failure::io("listing the files", &error))?;
            parts.sort_unstable_by_key(|part: &PartRecord| part.number);
            Ok((parts, Findings { walk: walked??, damaged }))
        })
    }

    /// Packs what makes the directory startable, in the order given, into a part of its own.
    ///
    /// # Errors
    /// If it can't be stored.
    pub fn pack_last(&self, files: &[LastFile], listing: &mut Listing) -> Result<PartRecord, Failure> {
        let like = self.source.root.join("PG_VERSION");
        let meta = fs::metadata(&like).map_err(|error| Failure::io(format!("reading {}", like.display()), &error))?;
        let mut part = self.open_part()?;
        for file in files {
            let size = file.content.len() as u64;
            let added =
                part.writer.file(Path::new(file.path), &meta, size, &mut file.content.as_slice(), &mut |_| Ok(()));
            match added {
                Ok(entry) => listing.add(&entry).map_err(|error| Failure::io("listing the files", &error))?,
                Err(error) => return Err(part.uploading.explain(&error)),
            }
        }
        part.close()
    }

    fn open_part(&self) -> Result<OpenPart, Failure> {
        let number = self.last_number.fetch_add(1, Relaxed) + 1;
        let (writer, uploading) =
            Uploading::start(&self.runtime, &self.repository, self.id, BackupObject::Part(number));
        let writer = PartWriter::new(number, writer, self.repository.level())
            .map_err(|error| Failure::io("compressing", &error))?;
        Ok(OpenPart { writer, uploading })
    }

    fn work(&self, items: &Mutex<Receiver<Item>>, entries: &SyncSender<FileEntry>) -> Result<Vec<PartRecord>, Failure> {
        // On Linux it's the thread's own. Where it isn't allowed, all goes on as before.
        let _ = rustix::process::setpriority_process(None, NICE);
        let mut parts = Vec::new();
        let mut open: Option<OpenPart> = None;
        let result = (|| {
            while let Some(item) = next(items) {
                let part = match &mut open {
                    Some(part) => part,
                    none => none.insert(self.open_part()?),
                };
                let added = match &item {
                    Item::Directory { path, meta } => part.writer.directory(path, meta).map(|()| None),
                    Item::File { path, location } => self.file(&mut part.writer, path, location),
                };
                match added {
                    Ok(None) => {}
                    Ok(Some(entry)) => {
                        self.progress.files.fetch_add(1, Relaxed);
                        entries.send(entry).map_err(|_| Failure::internal("nobody lists the files"))?;
                    }
                    Err(error) if self.progress.check().is_err() => {
                        tracing::debug!(%error, "a thread was stopped");
                        return Err(given_up());
                    }
                    Err(error) => {
                        let failure = match open.take() {
                            Some(part) => part.uploading.explain(&error),
                            None => Failure::io("reading", &error),
                        };
                        let (Item::Directory { path, .. } | Item::File { path, .. }) = &item;
                        return Err(if failure.code == Code::Io { failure.context(path.display()) } else { failure });
                    }
                }
                if part.writer.file_bytes() >= self.effort.part_size
                    && let Some(part) = open.take()
                {
                    parts.push(part.close()?);
                }
            }
            if let Some(part) = open.take() {
                parts.push(part.close()?);
            }
            Ok(())
        })();
        if result.is_err() {
            self.progress.cancel();
            // The walker must not wait for a reader that no longer reads.
            while next(items).is_some() {}
        }
        result.map(|()| parts)
    }

    /// `None` if it has vanished: it was dropped, and replay will drop it again.
    fn file(&self, part: &mut PartWriter, path: &Path, location: &Path) -> io::Result<Option<FileEntry>> {
        self.progress.check()?;
        let mut file = match LiveFile::open(location) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let meta = file.file().metadata()?;
        let progress = &self.progress;
        let mut watch = |bytes| {
            progress.bytes.fetch_add(bytes, Relaxed);
            progress.pace.took(bytes, || progress.check().is_err());
            progress.check()
        };
        let shown = path.to_str();
        let relation = shown.and_then(RelationPath::parse);
        let PageRule { checked, backup_start, segment_blocks } = self.source.pages;
        let check = relation.filter(|_| checked).map(|relation| PageCheck {
            first_block: relation.file.segment.saturating_mul(segment_blocks),
            backup_start,
        });
        let header = match (&self.source.base, shown, relation) {
            (Some(base), Some(shown), Some(relation)) => base.header(shown, &relation, meta.len()),
            _ => None,
        };
        let entry = match (header, shown) {
            (Some(header), Some(shown)) => {
                let mut content = Content::incremental(&mut file, &header, check);
                let path = incremental_path(shown);
                let entry = part.file(Path::new(&path), &meta, header.file_length(), &mut content, &mut watch)?;
                let restored = Some(u64::from(header.output_blocks()) * PAGE_SIZE as u64);
                // The backup's progress is that through the database.
                progress.bytes.fetch_add(meta.len().saturating_sub(header.file_length()), Relaxed);
                FileEntry { restored, bad: content.bad, ..entry }
            }
            _ => {
                let mut content = Content::whole(&mut file, check);
                let entry = part.file(path, &meta, meta.len(), &mut content, &mut watch)?;
                FileEntry { bad: content.bad, ..entry }
            }
        };
        Ok(Some(entry))
    }
}

fn next(items: &Mutex<Receiver<Item>>) -> Option<Item> {
    // A poisoned lock means that another worker panicked while it waited; the receiver itself is whole.
    items.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).recv().ok()
}
