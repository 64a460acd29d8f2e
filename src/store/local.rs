//! A local directory as a store: one file per object, under its key.
//!
//! A file is written under a temporary name beside its place, fsynced, and then given its name without replacing
//! another; its directory, and whatever directories are above it in the repository, are fsynced before the creation is
//! acknowledged. The bytes' hash is kept in an extended attribute (`user.pgsidecar-sha256`), set before the file gets its
//! name; a file system without them loses only that.
//!
//! All work is done on tokio's blocking threads. A missing root is an empty repository; it's made by the first write.

use std::{
    collections::HashSet,
    fmt,
    fs::{self, File},
    io::{self, Seek},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use pgsidecar_core::{ObjectKey, Sha256Digest};
use tempfile::NamedTempFile;

use super::{
    ByteRange, ConditionalCreation, Creation, Download, ListPage, ListRequest, ObjectInfo, PendingUpload, Store,
    StoreError, StoreErrorKind, Upload,
    local_io::{LocalBody, LocalUpload},
    local_walk,
};

/// How temporary files are named. No object's name begins like this.
pub(super) const TEMPORARY: &str = ".tmp-";
const ATTRIBUTE_SHA256: &str = "user.pgsidecar-sha256";
/// How many directories are remembered as durable; then the memory starts afresh.
const REMEMBERED_DIRECTORIES: usize = 1000;

/// A store in a local directory.
#[derive(Clone)]
pub struct LocalStore {
    root: Arc<Root>,
}

pub(super) struct Root {
    pub(super) path: PathBuf,
    /// Directories that this process has fsynced together with all above them.
    durable: Mutex<HashSet<PathBuf>>,
}

impl LocalStore {
    /// The repository in this directory, which need not exist yet. Touches nothing.
    pub fn new(root: impl Into<PathBuf>) -> LocalStore {
        LocalStore { root: Arc::new(Root { path: root.into(), durable: Mutex::default() }) }
    }

    async fn temporary(&self, key: &ObjectKey, sha256: Option<Sha256Digest>) -> Result<LocalUpload, StoreError> {
        check_name(key)?;
        let at = key.clone();
        let file = self.blocking("create", key.as_str(), move |root| {
            let file = root.temporary(&at)?;
            sha256.map_or(Ok(()), |sha256| mark(file.as_file(), sha256))?;
            Ok(file)
        });
        Ok(LocalUpload::new(self.clone(), key.clone(), file.await?))
    }

    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        operation: &'static str,
        object: &str,
        work: impl FnOnce(&Root) -> io::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let root = self.root.clone();
        let done = tokio::task::spawn_blocking(move || work(&root)).await.unwrap_or_else(|e| Err(io::Error::other(e)));
        done.map_err(|error| StoreError::io(operation, object, error))
    }
}

impl fmt::Debug for LocalStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LocalStore({})", self.root.path.display())
    }
}

impl Root {
    fn file(&self, key: &ObjectKey) -> PathBuf {
        self.path.join(key.as_str())
    }

    /// A temporary file in the directory where this key belongs. Makes the directory.
    fn temporary(&self, key: &ObjectKey) -> io::Result<NamedTempFile> {
        let target = self.file(key);
        let directory = target.parent().unwrap_or(&self.path);
        let mut attempts = 0;
        loop {
            let made = make_directory(directory)
                .and_then(|()| tempfile::Builder::new().prefix(TEMPORARY).tempfile_in(directory));
            match made {
                // A deletion has just removed the directory, or one above it, which had become empty.
                Err(error) if error.kind() == io::ErrorKind::NotFound && attempts < 100 => attempts += 1,
                result => return result,
            }
        }
    }

    /// Gives the temporary file its name, durably.
    pub(super) fn publish(&self, file: NamedTempFile, key: &ObjectKey) -> io::Result<Creation> {
        // Before the name: a name must never lead to bytes that a power failure could take back.
        file.as_file().sync_all()?;
        let target = self.file(key);
        let creation = match file.persist_noclobber(&target) {
            Ok(_) => Creation::Created,
            Err(failed) if failed.error.kind() == io::ErrorKind::AlreadyExists => Creation::Exists,
            Err(failed) => return Err(failed.error),
        };
        // Also when it exists: the caller may take it for its own first try, whose fsync of the directory failed.
        let directory = target.parent().unwrap_or(&self.path);
        match sync_directory(directory).and_then(|()| self.make_durable(directory)) {
            // The object has been deleted meanwhile, and its directory with it.
            Err(error) if is_absent(&error) => Ok(creation),
            result => result.map(|()| creation),
        }
    }

    /// Fsyncs the directories above this one up to the root's parent, once per process: whoever made them, this
    /// process or another, may not have come to it yet.
    fn make_durable(&self, directory: &Path) -> io::Result<()> {
        if self.remembered().contains(directory) {
            return Ok(());
        }
        let mut above = directory.parent();
        while let Some(path) = above.filter(|path| path.starts_with(&self.path)) {
            sync_directory(path)?;
            above = path.parent();
        }
        // The root's own name. Its parent may be closed to us; whoever made it is then responsible.
        if let Some(Ok(parent)) = self.path.parent().map(File::open) {
            parent.sync_all()?;
        }
        let mut remembered = self.remembered();
        if remembered.len() >= REMEMBERED_DIRECTORIES {
            remembered.clear();
        }
        remembered.insert(directory.to_owned());
        Ok(())
    }

    fn remembered(&self) -> std::sync::MutexGuard<'_, HashSet<PathBuf>> {
        self.durable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes a file and the directories that become empty by it. Answers which directory to fsync.
    fn remove(&self, path: &Path) -> io::Result<Option<PathBuf>> {
        match fs::remove_file(path) {
            Ok(()) => {}
            Err(error) if is_absent(&error) => return Ok(None),
            Err(error) => return Err(error),
        }
        let mut directory = path.parent();
        while let Some(empty) = directory.filter(|path| *path != self.path && path.starts_with(&self.path)) {
            // Under the lock: a directory that is made anew must not be taken for the one that is remembered.
            let mut remembered = self.remembered();
            if fs::remove_dir(empty).is_err() {
                break;
            }
            remembered.remove(empty);
            directory = empty.parent();
        }
        Ok(directory.map(Path::to_owned))
    }
}

/// `mkdir -p` with fsync of the parents of what was made, for the part above the root as well.
fn make_directory(directory: &Path) -> io::Result<()> {
    if directory.is_dir() {
        return Ok(());
    }
    let parent = directory.parent().filter(|parent| !parent.as_os_str().is_empty());
    if let Some(parent) = parent {
        make_directory(parent)?;
    }
    match fs::create_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    sync_directory(parent.unwrap_or(Path::new(".")))
}

fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// No such file, or a file where its directory would have to be: there is no object of this name.
pub(super) fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn mark(file: &File, sha256: Sha256Digest) -> io::Result<()> {
    let value = sha256.to_string();
    match rustix::fs::fsetxattr(file, ATTRIBUTE_SHA256, value.as_bytes(), rustix::fs::XattrFlags::empty()) {
        // Not every file system has them. The hash is a help for the caller, not the content.
        Err(rustix::io::Errno::NOTSUP | rustix::io::Errno::PERM) => Ok(()),
        result => result.map_err(io::Error::from),
    }
}

fn info(file: &File) -> io::Result<Option<ObjectInfo>> {
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Ok(None);
    }
    let attribute = |name: &str| {
        let mut value = [0; 80];
        let length = rustix::fs::fgetxattr(file, name, &mut value[..]).ok()?;
        String::from_utf8(value.get(..length)?.to_vec()).ok()
    };
    let sha256 = attribute(ATTRIBUTE_SHA256).and_then(|digest| Sha256Digest::parse(&digest));
    Ok(Some(ObjectInfo { size: metadata.len(), sha256, modified: modified(&metadata)? }))
}

pub(super) fn modified(metadata: &fs::Metadata) -> io::Result<jiff::Timestamp> {
    jiff::Timestamp::try_from(metadata.modified()?).map_err(io::Error::other)
}

/// Opens an object; `None` when there is none.
fn open(path: &Path) -> io::Result<Option<(File, ObjectInfo)>> {
    match File::open(path) {
        Ok(file) => Ok(info(&file)?.map(|info| (file, info))),
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A key that could be taken for a temporary file can't be written.
fn check_name(key: &ObjectKey) -> Result<(), StoreError> {
    if key.as_str().split('/').any(|component| component.starts_with(TEMPORARY)) {
        let detail = format!("names beginning with {TEMPORARY} are for temporary files");
        return Err(StoreError::new(StoreErrorKind::Unexpected, "create", key.as_str(), detail));
    }
    Ok(())
}

#[async_trait::async_trait]
impl Store for LocalStore {
    fn description(&self) -> String {
        format!("file://{}", self.root.path.display())
    }

    async fn create(
        &self,
        key: &ObjectKey,
        bytes: Bytes,
        sha256: Option<Sha256Digest>,
    ) -> Result<Creation, StoreError> {
        let mut upload = self.temporary(key, sha256).await?;
        upload.write(bytes).await?;
        Box::new(upload).finish().await
    }

    async fn begin(&self, key: &ObjectKey) -> Result<Box<dyn Upload>, StoreError> {
        Ok(Box::new(self.temporary(key, None).await?))
    }

    async fn head(&self, key: &ObjectKey) -> Result<Option<ObjectInfo>, StoreError> {
        let at = key.clone();
        let found = self.blocking("look at", key.as_str(), move |root| open(&root.file(&at))).await?;
        Ok(found.map(|(_, info)| info))
    }

    async fn get(&self, key: &ObjectKey, range: ByteRange) -> Result<Option<Download>, StoreError> {
        let at = key.clone();
        let opened = self.blocking("read", key.as_str(), move |root| {
            let Some((mut file, info)) = open(&root.file(&at))? else { return Ok(None) };
            file.seek(io::SeekFrom::Start(range.within(info.size).0))?;
            Ok(Some((file, info)))
        });
        let Some((file, info)) = opened.await? else { return Ok(None) };
        let (_, length) = range.within(info.size);
        let body = LocalBody::new(self.clone(), key.clone(), file, length);
        Ok(Some(Download::new(key, info, length, Box::new(body))))
    }

    async fn list(&self, request: &ListRequest) -> Result<ListPage, StoreError> {
        let wanted = request.clone();
        self.blocking("list", &request.prefix, move |root| local_walk::page(&root.path, &wanted)).await
    }

    async fn delete(&self, keys: &[ObjectKey]) -> Result<Vec<(ObjectKey, StoreError)>, StoreError> {
        let keys = keys.to_vec();
        self.blocking("delete from", &self.description(), move |root| {
            let (mut failed, mut touched) = (Vec::new(), HashSet::new());
            for key in keys {
                match root.remove(&root.file(&key)) {
                    Ok(directory) => touched.extend(directory),
                    Err(error) => failed.push((key.clone(), StoreError::io("delete", key.as_str(), error))),
                }
            }
            // A commit marker that comes back after a power failure would name parts that are gone.
            for directory in touched {
                match sync_directory(&directory) {
                    Err(error) if !is_absent(&error) => return Err(error),
                    _ => {}
                }
            }
            Ok(failed)
        })
        .await
    }

    async fn pending_uploads(&self, prefix: &str) -> Result<Vec<PendingUpload>, StoreError> {
        let under = prefix.to_owned();
        self.blocking("list", prefix, move |root| local_walk::temporary_files(&root.path, &under)).await
    }

    async fn abort_pending(&self, upload: &PendingUpload) -> Result<(), StoreError> {
        let name = upload.id.clone();
        self.blocking("remove", &upload.key, move |root| root.remove(&root.path.join(name)).map(|_| ())).await
    }

    async fn conditional_creation(&self) -> Result<ConditionalCreation, StoreError> {
        Ok(ConditionalCreation::Honoured)
    }
}
