//! Which directories a database consists of, and where what belongs to each can stand beside it.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use pgsidecar_core::{
    data_directory::tablespace_version_directory,
    switch::{Beside, Purpose, Role, Root, SHUT, SwitchId, Way},
};
use rustix::fs::{Access, AtFlags, CWD, StatxFlags};

use crate::{
    failure::{Code, Failure},
    pgdata::DataDirectory,
};

/// A data directory, and what stands beside it.
#[derive(Clone, Debug)]
pub struct Place {
    /// Without links.
    pub path: PathBuf,
    /// Where what belongs to it stands.
    pub beside: Beside,
    /// Whether its content is moved, and not itself renamed.
    pub is_mount_point: bool,
}

impl Place {
    /// The place of a directory that exists.
    ///
    /// # Errors
    /// If it can't be looked at.
    pub fn of(directory: &Path) -> Result<Place, Failure> {
        let unreadable = |error: &io::Error| Failure::io(format!("reading {}", directory.display()), error);
        let path = directory.canonicalize().map_err(|error| unreadable(&error))?;
        // A directory can be renamed within one mount, if its parent may be changed.
        let next_to = Beside::next_to(&path).filter(|beside| {
            is_same_mount(&path, beside.home()) && rustix::fs::access(beside.home(), Access::WRITE_OK).is_ok()
        });
        let is_mount_point = next_to.is_none();
        Ok(Place { beside: next_to.unwrap_or_else(|| Beside::inside(&path)), path, is_mount_point })
    }

    /// The place of a data directory, which a crash may have left absent in the middle of a switch. Where a switch is pending
    /// it's where its note is: who prepared it and who carries it out may have different rights, and so see different places.
    ///
    /// # Errors
    /// As [`Place::of`].
    pub fn of_data(pgdata: &Path) -> Result<Place, Failure> {
        let path = if pgdata.exists() {
            pgdata.canonicalize().map_err(|error| Failure::io(format!("reading {}", pgdata.display()), &error))?
        } else {
            let parent = pgdata.parent().and_then(|parent| parent.canonicalize().ok());
            match parent.zip(pgdata.file_name()) {
                Some((parent, name)) => parent.join(name),
                None => pgdata.to_owned(),
            }
        };
        let noted = besides(&path).into_iter().find(|beside| beside.pending_note().exists());
        match noted {
            Some(beside) => Ok(Place { is_mount_point: beside.home() == path, path, beside }),
            None if path.exists() => Place::of(&path),
            None => Ok(Place {
                beside: Beside::next_to(&path).unwrap_or_else(|| Beside::inside(&path)),
                path,
                is_mount_point: false,
            }),
        }
    }

    fn root(&self, role: Role, id: SwitchId, purpose: &Purpose) -> Root {
        Root {
            role,
            live: self.path.clone(),
            staged: Some(self.beside.staged()),
            kept: self.beside.kept(id, purpose),
            way: if self.is_mount_point { Way::Content { parted: false } } else { Way::Whole },
            old: None,
            new: None,
        }
    }
}

/// Wherever something may stand beside a directory.
pub fn besides(path: &Path) -> Vec<Beside> {
    Beside::next_to(path).into_iter().chain([Beside::inside(path)]).collect()
}

/// Whether two paths lie in one mount: a bind mount of the same file system is another one.
pub fn is_same_mount(one: &Path, other: &Path) -> bool {
    let mount = |path: &Path| {
        let stat = rustix::fs::statx(CWD, path, AtFlags::empty(), StatxFlags::BASIC_STATS | StatxFlags::MNT_ID).ok()?;
        Some((stat.stx_dev_major, stat.stx_dev_minor, stat.stx_mnt_id))
    };
    matches!((mount(one), mount(other)), (Some(one), Some(other)) if one == other)
}

/// A tablespace of what is restored.
#[derive(Clone, Debug)]
pub struct NewTablespace {
    /// Its OID.
    pub oid: u32,
    /// Where it will be: what the link in `pg_tblspc` leads to.
    pub location: PathBuf,
}

/// What a switch consists of, and where a restore for it writes.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The directories, the data directory last.
    pub roots: Vec<Root>,
    /// Where the content of each new tablespace is written, by OID: the directory that stands for its location.
    pub tablespaces: BTreeMap<u32, PathBuf>,
    /// What the link pg_wal leads to, where it's one.
    pub wal_link: Option<PathBuf>,
}

/// Lays a switch out: from the database in `pgdata` to one with these tablespaces, of the same versions.
///
/// # Errors
/// If something of it can't be looked at, or the location of a tablespace isn't there.
pub fn lay_out(
    pgdata: &DataDirectory,
    data: &Place,
    tablespaces: &[NewTablespace],
    id: SwitchId,
    purpose: &Purpose,
) -> Result<Layout, Failure> {
    let mut roots = Vec::new();
    let mut written = BTreeMap::new();
    let mut locations: BTreeMap<PathBuf, Option<u32>> = BTreeMap::new();
    for location in live_tablespaces(&data.path)? {
        locations.insert(location, None);
    }
    for tablespace in tablespaces {
        let location = tablespace.location.canonicalize().map_err(|error| {
            Failure::new(
                Code::TargetDirectory,
                format!(
                    "the location of tablespace {}, {}, isn't there: {error}; nothing was changed",
                    tablespace.oid,
                    tablespace.location.display()
                ),
            )
            .hint("Mount its volume there, or name another place with --tablespace-mapping OLD=NEW.")
        })?;
        locations.insert(location, Some(tablespace.oid));
    }
    // A pg_control that is damaged matters only where its version does.
    let version = if locations.is_empty() { String::new() } else { version_directory(pgdata)? };
    for (location, oid) in locations {
        let beside = Beside::inside(&location);
        if let Some(oid) = oid {
            written.insert(oid, beside.staged());
        }
        roots.push(Root {
            role: Role::Tablespace,
            live: location.join(&version),
            staged: oid.map(|_| beside.staged().join(&version)),
            kept: beside.kept(id, purpose),
            way: Way::Whole,
            old: None,
            new: None,
        });
    }
    let wal = wal_place(&data.path)?;
    let mut data_root = data.root(Role::Data, id, purpose);
    if let Some(wal) = wal {
        if wal.path.starts_with(&data.path) {
            // What is mounted in a directory follows it when it's renamed, and the next container finds it where it was.
            data_root.way = Way::Content { parted: false };
        }
        roots.push(wal.root(Role::Wal, id, purpose));
    }
    roots.push(data_root);
    Ok(Layout { roots, tablespaces: written, wal_link: fs::read_link(pgdata.wal()).ok() })
}

/// Where a database's WAL is, if not simply in its data directory: where the link pg_wal leads to, or pg_wal itself where
/// another file system is mounted there.
///
/// # Errors
/// If it can't be looked at.
pub fn wal_place(data: &Path) -> Result<Option<Place>, Failure> {
    let wal = data.join("pg_wal");
    let is_elsewhere = wal.is_symlink() || wal.exists() && !is_same_mount(data, &wal);
    is_elsewhere.then(|| Place::of(&wal)).transpose()
}

/// The data directory alone: it's restored over, and nothing is staged.
pub fn lay_out_data(data: &Place, id: SwitchId, purpose: &Purpose) -> Root {
    Root { staged: None, ..data.root(Role::Data, id, purpose) }
}

/// The name of the directory that a tablespace has of this server's version.
///
/// # Errors
/// If the version can't be read.
pub fn version_directory(pgdata: &DataDirectory) -> Result<String, Failure> {
    Ok(tablespace_version_directory(major_version(pgdata)?, pgdata.control()?.catalog_version))
}

fn major_version(pgdata: &DataDirectory) -> Result<u32, Failure> {
    let open = pgdata.path().join("PG_VERSION");
    let path = if open.exists() { open } else { pgdata.path().join(SHUT) };
    let text = fs::read_to_string(&path).map_err(|error| Failure::io(format!("reading {}", path.display()), &error))?;
    text.trim().parse().map_err(|_| Failure::new(Code::DataDirectory, format!("{} has no version", path.display())))
}

/// Where the tablespaces of a data directory are, without links.
///
/// # Errors
/// If they can't be looked at.
pub fn live_tablespaces(data: &Path) -> Result<Vec<PathBuf>, Failure> {
    let links = tablespace_links(data)?;
    // One that leads nowhere has nothing to be kept.
    Ok(links.into_iter().filter_map(|link| link.canonicalize().ok()).collect())
}

/// The links in `pg_tblspc`, wherever they lead.
///
/// # Errors
/// If they can't be looked at.
pub fn tablespace_links(data: &Path) -> Result<Vec<PathBuf>, Failure> {
    let path = data.join("pg_tblspc");
    let unreadable = |error: &io::Error| Failure::io(format!("reading {}", path.display()), error);
    let mut links = Vec::new();
    let entries = match fs::read_dir(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(links),
        entries => entries.map_err(|error| unreadable(&error))?,
    };
    for entry in entries {
        let entry = entry.map_err(|error| unreadable(&error))?;
        if entry.file_type().map_err(|error| unreadable(&error))?.is_symlink() {
            links.push(entry.path());
        }
    }
    Ok(links)
}

/// The inode at a path; `None` if nothing is there.
///
/// # Errors
/// If it can't be looked at.
pub fn inode(path: &Path) -> Result<Option<u64>, Failure> {
    match fs::symlink_metadata(path) {
        Ok(meta) => Ok(Some(meta.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Failure::io(format!("reading {}", path.display()), &error)),
    }
}
