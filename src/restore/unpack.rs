//! Unpacking the parts of a backup.
//!
//! A part is trusted only as a whole, when all its bytes have gone through SHA-256; until then what it says is
//! written below the target directory and nowhere else, whatever names it carries.
//!
//! Of a chain of backups each is unpacked over the ones before it. A whole file takes the place of what is there; the
//! blocks of an incremental file are written into the relation's file where it is, which is first cut to the length that
//! the incremental file says: what older backups have behind that was cut off by the database and doesn't come back.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, BufReader, Read, Write},
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt},
    path::{Component, Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
};

use jiff::Timestamp;
use pgsidecar_core::{
    backup::PartRecord,
    incremental_file::{IncrementalHeader, IncrementalHeaderError},
    page::PAGE_SIZE,
};

use super::{
    directory::TargetDirectory,
    layer::{Layer, Place},
};
use crate::{
    codec,
    failure::{Code, Failure},
    repository::{StoredReader, damaged},
};

const COPY_BYTES: usize = 256 * 1024;
const BLOCK: u64 = PAGE_SIZE as u64;
/// What only a backup's last part has, and what the restore itself writes. In another part they would make the
/// directory startable too early.
const NOT_IN_PARTS: [&str; 5] =
    ["PG_VERSION", "global/pg_control", "backup_label", "tablespace_map", "backup_manifest"];
/// The files of the last part are small; anything larger isn't one of them.
const MAX_HELD_BYTES: u64 = 1 << 20;

/// How far a restore is; read by whoever shows it.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes of files written.
    pub bytes: AtomicU64,
    cancelled: AtomicBool,
}

impl Progress {
    /// Makes all threads end soon that tell it of theirs. While they live, they hold it.
    pub fn cancel(&self) {
        self.cancelled.store(true, Relaxed);
    }
}

/// Writes parts below a directory.
#[derive(Clone)]
pub struct Unpacker {
    directory: TargetDirectory,
    tablespaces: Arc<BTreeMap<u32, PathBuf>>,
    progress: Arc<Progress>,
    /// Which backup of a chain it is; `None` if it's one by itself.
    layer: Option<Arc<Layer>>,
}

/// A file of the last part, kept in memory until its turn.
#[derive(Clone, Debug)]
pub struct HeldFile {
    /// Path relative to the data directory.
    pub path: String,
    /// Its content.
    pub content: Vec<u8>,
    /// Its owner's user and group id.
    pub owner: (u32, u32),
    /// Its modification time, to the second.
    pub modified: Timestamp,
}

/// An entry's metadata.
#[derive(Clone, Copy)]
struct Meta {
    mode: u32,
    owner: (u32, u32),
    modified: Timestamp,
}

impl Meta {
    fn of(header: &tar::Header) -> Meta {
        let id = |id: io::Result<u64>| id.ok().and_then(|id| u32::try_from(id).ok()).unwrap_or(u32::MAX);
        let modified = header.mtime().ok().and_then(|time| i64::try_from(time).ok());
        Meta {
            mode: header.mode().unwrap_or(0o600) & 0o777,
            owner: (id(header.uid()), id(header.gid())),
            modified: modified.and_then(|time| Timestamp::from_second(time).ok()).unwrap_or_default(),
        }
    }
}

impl Unpacker {
    /// An unpacker for this directory; tablespaces go to their own.
    pub fn new(directory: &TargetDirectory, tablespaces: BTreeMap<u32, PathBuf>, progress: Arc<Progress>) -> Unpacker {
        Unpacker { directory: directory.clone(), tablespaces: Arc::new(tablespaces), progress, layer: None }
    }

    /// The same for a backup of a chain.
    pub fn for_layer(&self, layer: Arc<Layer>) -> Unpacker {
        Unpacker { layer: Some(layer), ..self.clone() }
    }

    /// Makes all threads end soon.
    pub fn cancel(&self) {
        self.progress.cancel();
    }

    /// Unpacks one part and checks its bytes. Blocks.
    ///
    /// # Errors
    /// [`Code::Damaged`] if the part isn't what was stored, [`Code::Io`] if it can't be written.
    pub fn unpack(&self, mut reader: StoredReader, part: &PartRecord) -> Result<(), Failure> {
        let mut files = 0;
        match self.entries(&mut reader, &mut files) {
            Ok(()) => {}
            Err(Trouble::Cancelled) => return Err(Failure::new(Code::Busy, "given up")),
            Err(Trouble::Target(path, error)) => {
                return Err(Failure::io(format!("writing {}", path.display()), &error));
            }
            Err(Trouble::Source(error)) => return Err(reader.explain(&error)),
        }
        let key = reader.key().to_string();
        // What tar leaves unread behind its end belongs to the part as well.
        reader.finish()?;
        if files != part.files {
            return Err(damaged(&key, &format!("it holds {files} files, the backup's record says {}", part.files)));
        }
        Ok(())
    }

    fn entries(&self, plain: &mut impl Read, files: &mut u64) -> Result<(), Trouble> {
        let mut archive = tar::Archive::new(plain);
        let mut buffer = vec![0; COPY_BYTES];
        for entry in archive.entries().map_err(Trouble::Source)? {
            let mut entry = entry.map_err(Trouble::Source)?;
            self.go_on()?;
            let path = entry.path().map_err(Trouble::Source)?.into_owned();
            let outside = || bad(format!("it names a file outside of the directory: {}", path.display()));
            let target = self.target(&path).ok_or_else(outside)?;
            // Without the slash at the end of a directory.
            let path: PathBuf = path.components().collect();
            let meta = Meta::of(entry.header());
            match entry.header().entry_type() {
                tar::EntryType::Directory => self.directory(&path, &target, meta)?,
                tar::EntryType::Regular => {
                    *files += 1;
                    self.file(&path, &target, meta, &mut entry, &mut buffer)?;
                }
                other => {
                    return Err(bad(format!("{} is of a kind that doesn't belong here: {other:?}", path.display())));
                }
            }
        }
        Ok(())
    }

    fn directory(&self, path: &Path, target: &Path, meta: Meta) -> Result<(), Trouble> {
        if let Some(layer) = &self.layer {
            // Those that have files come with them; the newest backup says which there are, and how they are.
            if layer.is_below_others() {
                return Ok(());
            }
            layer.note_directory(path);
        }
        self.make_directory(target, meta.mode, meta.owner).map_err(|error| Trouble::Target(target.to_owned(), error))
    }

    fn file(
        &self,
        path: &Path,
        target: &Path,
        meta: Meta,
        entry: &mut tar::Entry<'_, impl Read>,
        buffer: &mut [u8],
    ) -> Result<(), Trouble> {
        if path.to_str().is_some_and(|path| NOT_IN_PARTS.contains(&path)) {
            return Err(bad(format!("it holds {}, which belongs in the last part", path.display())));
        }
        let Some(layer) = &self.layer else {
            return self.make_file(target, meta, entry, buffer, false).map(drop);
        };
        match layer.place(path).map_err(bad)? {
            Place::Nowhere => {
                self.progress.bytes.fetch_add(entry.size(), Relaxed);
                Ok(())
            }
            Place::Whole => {
                match fs::remove_file(target) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(Trouble::Target(target.to_owned(), error));
                    }
                    _ => {}
                }
                let crc = self.make_file(target, meta, entry, buffer, !layer.is_below_others())?;
                let added = layer.add_to_manifest(path, entry.size(), meta.modified, crc);
                added.map_err(|error| Trouble::Target(PathBuf::from("backup_manifest"), error))
            }
            Place::Into(plain) => {
                let target = target.with_file_name(Path::new(&plain).file_name().unwrap_or_default());
                let file = self.patch(&target, meta, entry, layer.segment_blocks(), buffer)?;
                if layer.is_below_others() {
                    return Ok(());
                }
                let (size, crc) = self.checksum(&file, buffer).map_err(|trouble| trouble.at(&target))?;
                let added = layer.add_to_manifest(Path::new(&plain), size, meta.modified, crc);
                added.map_err(|error| Trouble::Target(PathBuf::from("backup_manifest"), error))
            }
        }
    }

    /// Writes the blocks of an incremental file into the file of the relation.
    fn patch(
        &self,
        target: &Path,
        meta: Meta,
        entry: &mut tar::Entry<'_, impl Read>,
        segment_blocks: u32,
        buffer: &mut [u8],
    ) -> Result<File, Trouble> {
        let header = IncrementalHeader::read(entry, segment_blocks).map_err(|error| match error {
            IncrementalHeaderError::Io(error) => Trouble::Source(error),
            other => bad(format!("what is to go into {}: {other}", target.display())),
        })?;
        if header.file_length() != entry.size() {
            return Err(bad(format!("the incremental file for {} is not as long as it says", target.display())));
        }
        let failed = |error| Trouble::Target(target.to_owned(), error);
        let file = OpenOptions::new().read(true).write(true).open(target).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => bad(format!("there is no {} into which its blocks could go", target.display())),
            _ => failed(error),
        })?;
        let old = file.metadata().map_err(failed)?;
        if old.permissions().mode() & 0o777 != meta.mode {
            file.set_permissions(fs::Permissions::from_mode(meta.mode)).map_err(failed)?;
        }
        // Behind that, what older backups have was cut off. What is no whole block isn't used.
        let kept = (old.len() / BLOCK).min(u64::from(header.truncation_block_length()));
        file.set_len(kept * BLOCK).map_err(failed)?;
        file.set_len(u64::from(header.output_blocks()) * BLOCK).map_err(failed)?;
        let mut blocks = header.blocks();
        while let Some(first) = blocks.first() {
            let most = buffer.len() / PAGE_SIZE;
            let count = (*first..).zip(blocks).take(most).take_while(|(expected, block)| expected == *block).count();
            let run = &mut buffer[..count * PAGE_SIZE];
            entry.read_exact(run).map_err(Trouble::Source)?;
            file.write_all_at(run, u64::from(*first) * BLOCK).map_err(failed)?;
            self.progress.bytes.fetch_add(run.len() as u64, Relaxed);
            self.go_on()?;
            blocks = &blocks[count..];
        }
        Ok(file)
    }

    /// Length and CRC-32C of a file.
    fn checksum(&self, file: &File, buffer: &mut [u8]) -> Result<(u64, u32), Trouble> {
        let (mut position, mut crc) = (0, 0);
        loop {
            match file.read_at(buffer, position) {
                Ok(0) => return Ok((position, crc)),
                Ok(n) => {
                    crc = crc32c::crc32c_append(crc, &buffer[..n]);
                    position += n as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Trouble::Target(PathBuf::new(), error)),
            }
            self.go_on()?;
        }
    }

    fn go_on(&self) -> Result<(), Trouble> {
        if self.progress.cancelled.load(Relaxed) { Err(Trouble::Cancelled) } else { Ok(()) }
    }

    /// Where a path of the archive goes; `None` if it would leave the directory.
    fn target(&self, path: &Path) -> Option<PathBuf> {
        let components: Vec<&std::ffi::OsStr> = path
            .components()
            .map(|component| if let Component::Normal(name) = component { Some(name) } else { None })
            .collect::<Option<_>>()?;
        let tablespace = match components.as_slice() {
            [first, oid, ..] if *first == "pg_tblspc" => {
                oid.to_str().and_then(|oid| oid.parse().ok()).and_then(|oid: u32| self.tablespaces.get(&oid))
            }
            _ => None,
        };
        match tablespace {
            Some(target) => Some(components.iter().skip(2).fold(target.clone(), |path, name| path.join(name))),
            None if components.is_empty() => None,
            None => Some(components.iter().fold(self.directory.path().to_owned(), |path, name| path.join(name))),
        }
    }

    fn make_directory(&self, path: &Path, mode: u32, owner: (u32, u32)) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        self.directory.own(path, owner)
    }

    /// Answers with the CRC-32C of its content, if that is wanted.
    fn make_file(
        &self,
        path: &Path,
        meta: Meta,
        content: &mut impl Read,
        buffer: &mut [u8],
        with_crc: bool,
    ) -> Result<u32, Trouble> {
        let target = |error| Trouble::Target(path.to_owned(), error);
        let mut file = self.open_new(path, meta).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => bad(format!("it holds {}, which another part holds too", path.display())),
            _ => target(error),
        })?;
        let mut crc = 0;
        loop {
            let n = codec::fill(content, buffer).map_err(Trouble::Source)?;
            if n == 0 {
                break;
            }
            file.write_all(&buffer[..n]).map_err(target)?;
            if with_crc {
                crc = crc32c::crc32c_append(crc, &buffer[..n]);
            }
            self.progress.bytes.fetch_add(n as u64, Relaxed);
            self.go_on()?;
        }
        self.directory.own(path, meta.owner).map_err(target)?;
        Ok(crc)
    }

    /// Each file is in the backup once, and the directory was empty: one that is there already came from a part that
    /// isn't what it should be.
    fn open_new(&self, path: &Path, meta: Meta) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(meta.mode);
        match options.open(path) {
            // The directory's own entry can be in another part, which is not unpacked yet.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let parent = path.parent().unwrap_or(path);
                self.make_directory(parent, 0o700, meta.owner)?;
                options.open(path)
            }
            opened => opened,
        }
    }
}

/// What ended the unpacking of a part, by whose fault.
enum Trouble {
    Source(io::Error),
    Target(PathBuf, io::Error),
    Cancelled,
}

impl Trouble {
    /// With the file in which it was met.
    fn at(self, target: &Path) -> Trouble {
        if let Trouble::Target(_, error) = self { Trouble::Target(target.to_owned(), error) } else { self }
    }
}

fn bad(how: String) -> Trouble {
    Trouble::Source(io::Error::new(io::ErrorKind::InvalidData, how))
}

/// The files of the last part, from its plain bytes.
///
/// # Errors
/// If it isn't a tar archive of small files.
pub fn hold(plain: &[u8]) -> io::Result<Vec<HeldFile>> {
    let mut held = Vec::new();
    for entry in tar::Archive::new(BufReader::new(plain)).entries()? {
        let entry = entry?;
        let path = entry.path()?.to_string_lossy().into_owned();
        let Meta { owner, modified, .. } = Meta::of(entry.header());
        let mut content = Vec::new();
        entry.take(MAX_HELD_BYTES).read_to_end(&mut content)?;
        held.push(HeldFile { path, content, owner, modified });
    }
    Ok(held)
}

#[cfg(test)]
mod tests;
