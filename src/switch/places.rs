//! Which directories a database consists of, and where what belongs to each can stand beside it.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use pgsidecar_core::{
    data_directory::tablespace_version_directory,
    switch::{Beside, Purpose, Role, Root, SwitchId, Way},
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
    let control = pgdata.control()?;
    let version = tablespace_version_directory(major_version(pgdata)?, control.catalog_version);
    let mut roots = Vec::new();
    let mut written = BTreeMap::new();
    let mut locations: BTreeMap<PathBuf, Option<u32>> = BTreeMap::new();
    for location in live_tablespaces(pgdata)? {
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
    let wal_link = fs::read_link(pgdata.wal()).ok();
    if wal_link.is_some() {
        roots.push(Place::of(&pgdata.wal())?.root(Role::Wal, id, purpose));
    }
    roots.push(data.root(Role::Data, id, purpose));
    Ok(Layout { roots, tablespaces: written, wal_link })
}

/// The data directory alone: it's restored over, and nothing is staged.
pub fn lay_out_data(data: &Place, id: SwitchId, purpose: &Purpose) -> Root {
    Root { staged: None, ..data.root(Role::Data, id, purpose) }
}

fn major_version(pgdata: &DataDirectory) -> Result<u32, Failure> {
    let path = pgdata.path().join("PG_VERSION");
    let text = fs::read_to_string(&path).map_err(|error| Failure::io(format!("reading {}", path.display()), &error))?;
    text.trim().parse().map_err(|_| Failure::new(Code::DataDirectory, format!("{} has no version", path.display())))
}

/// Where the tablespaces of a data directory are, without links.
///
/// # Errors
/// If they can't be looked at.
pub fn live_tablespaces(pgdata: &DataDirectory) -> Result<Vec<PathBuf>, Failure> {
    let path = pgdata.path().join("pg_tblspc");
    let unreadable = |error: &io::Error| Failure::io(format!("reading {}", path.display()), error);
    let mut locations = Vec::new();
    for entry in fs::read_dir(&path).map_err(|error| unreadable(&error))? {
        let entry = entry.map_err(|error| unreadable(&error))?;
        let is_link = entry.file_type().map_err(|error| unreadable(&error))?.is_symlink();
        // One that leads nowhere has nothing to be kept.
        if is_link && let Ok(location) = entry.path().canonicalize() {
            locations.push(location);
        }
    }
    Ok(locations)
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
