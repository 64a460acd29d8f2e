//! Unpacking the parts of a backup.
//!
//! A part is trusted only as a whole, when all its bytes have gone through SHA-256; until then what it says is
//! written below the target directory and nowhere else, whatever names it carries.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, BufReader, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Component, Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
};

use pgsidecar_core::backup::PartRecord;

use super::directory::TargetDirectory;
use crate::{
    codec::{ChannelReader, HashingReader},
    failure::{Code, Failure},
    repository::damaged,
};

const COPY_BYTES: usize = 256 * 1024;
/// The files of the last part are small; anything larger isn't one of them.
const MAX_HELD_BYTES: u64 = 1 << 20;

/// How far a restore is; read by whoever shows it.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes of files written.
    pub bytes: AtomicU64,
    cancelled: AtomicBool,
}

/// Writes parts below a directory.
#[derive(Clone)]
pub struct Unpacker {
    directory: TargetDirectory,
    tablespaces: Arc<BTreeMap<u32, PathBuf>>,
    progress: Arc<Progress>,
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
}

impl Unpacker {
    /// An unpacker for this directory; tablespaces go to their own.
    pub fn new(directory: &TargetDirectory, tablespaces: BTreeMap<u32, PathBuf>, progress: Arc<Progress>) -> Unpacker {
        Unpacker { directory: directory.clone(), tablespaces: Arc::new(tablespaces), progress }
    }

    /// Makes all threads end soon.
    pub fn cancel(&self) {
        self.progress.cancelled.store(true, Relaxed);
    }

    /// Unpacks one part and checks its bytes. Blocks. Answers with the number of files.
    ///
    /// # Errors
    /// [`Code::Damaged`] if the part isn't what was stored, [`Code::Io`] if it can't be written.
    pub fn unpack(&self, reader: ChannelReader, part: &PartRecord) -> Result<u64, Failure> {
        let why = reader.failure();
        let hashing = HashingReader::new(reader);
        let mut decoder =
            zstd::stream::read::Decoder::new(hashing).map_err(|error| Failure::io("setting zstd up", &error))?;
        let mut files = 0;
        let unpacked = self.entries(&mut decoder, &mut files);
        // What tar leaves unread behind its end belongs to the part as well.
        let drained = unpacked.and_then(|()| io::copy(&mut decoder, &mut io::sink()).map_err(Trouble::Source));
        match drained {
            Ok(_) => {}
            Err(Trouble::Cancelled) => return Err(Failure::new(Code::Busy, "given up")),
            Err(Trouble::Target(path, error)) => {
                return Err(Failure::io(format!("writing {}", path.display()), &error));
            }
            Err(Trouble::Source(error)) => {
                // Either the store failed, and said so through the channel, or the bytes aren't right.
                return Err(match why.or_io("", &error) {
                    failure if failure.code == Code::Io => damaged("this part", &error.to_string()),
                    failure => failure,
                });
            }
        }
        decoder.finish().into_inner().check(part.stored).map_err(|how| damaged("this part", &how))?;
        Ok(files)
    }

    fn entries(&self, plain: &mut impl Read, files: &mut u64) -> Result<(), Trouble> {
        let mut archive = tar::Archive::new(plain);
        let mut buffer = vec![0; COPY_BYTES];
        for entry in archive.entries().map_err(Trouble::Source)? {
            let mut entry = entry.map_err(Trouble::Source)?;
            if self.progress.cancelled.load(Relaxed) {
                return Err(Trouble::Cancelled);
            }
            let path = entry.path().map_err(Trouble::Source)?.into_owned();
            let target = self
                .target(&path)
                .ok_or_else(|| bad(format!("it names a file outside of the directory: {}", path.display())))?;
            let header = entry.header();
            let (mode, owner) = (header.mode().unwrap_or(0o600) & 0o777, owner(header));
            match header.entry_type() {
                tar::EntryType::Directory => {
                    self.make_directory(&target, mode, owner).map_err(|error| Trouble::Target(target, error))?
                }
                tar::EntryType::Regular => {
                    self.make_file(&target, mode, owner, &mut entry, &mut buffer)?;
                    *files += 1;
                }
                other => {
                    return Err(bad(format!("{} is of a kind that doesn't belong here: {other:?}", path.display())));
                }
            }
        }
        Ok(())
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

    fn make_file(
        &self,
        path: &Path,
        mode: u32,
        owner: (u32, u32),
        content: &mut impl Read,
        buffer: &mut [u8],
    ) -> Result<(), Trouble> {
        let target = |error| Trouble::Target(path.to_owned(), error);
        let mut file = self.open_new(path, mode, owner).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => bad(format!("it holds {}, which another part holds too", path.display())),
            _ => target(error),
        })?;
        loop {
            let n = match content.read(buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Trouble::Source(error)),
            };
            file.write_all(&buffer[..n]).map_err(target)?;
            self.progress.bytes.fetch_add(n as u64, Relaxed);
            if self.progress.cancelled.load(Relaxed) {
                return Err(Trouble::Cancelled);
            }
        }
        self.directory.own(path, owner).map_err(target)
    }

    /// Each file is in the backup once, and the directory was empty: one that is there already came from a part that
    /// isn't what it should be.
    fn open_new(&self, path: &Path, mode: u32, owner: (u32, u32)) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(mode);
        match options.open(path) {
            // The directory's own entry can be in another part, which is not unpacked yet.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let parent = path.parent().unwrap_or(path);
                self.make_directory(parent, 0o700, owner)?;
                options.open(path)
            }
            opened => opened,
        }
    }
}

/// User and group id of an entry.
fn owner(header: &tar::Header) -> (u32, u32) {
    let id = |id: io::Result<u64>| id.ok().and_then(|id| u32::try_from(id).ok()).unwrap_or(u32::MAX);
    (id(header.uid()), id(header.gid()))
}

/// What ended the unpacking of a part, by whose fault.
enum Trouble {
    Source(io::Error),
    Target(PathBuf, io::Error),
    Cancelled,
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
        let owner = owner(entry.header());
        let mut content = Vec::new();
        entry.take(MAX_HELD_BYTES).read_to_end(&mut content)?;
        held.push(HeldFile { path, content, owner });
    }
    Ok(held)
}
