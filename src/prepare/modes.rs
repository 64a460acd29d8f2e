//! What the kubelet's `fsGroup` does to a database, undone.
//!
//! Where a pod has an `fsGroup`, the kubelet ORs 0660 onto the mode of each file of a volume, and 0110 and the setgid bit
//! onto that of each directory (`SetVolumeOwnership`, `pkg/volume/volume_linux.go`). PostgreSQL doesn't start on a data
//! directory that its group may write to or others may use (`checkDataDir`, `miscinit.c`), nor with a private key of its
//! own that anybody else may read (`check_ssl_key_file_permissions`, `be-secure-common.c`). It asks for no other file's
//! mode. The official image's entrypoint sets the directory back; the key it doesn't know, and not every image has it.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read},
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path, PathBuf},
};

use pgsidecar_core::server_config::setting;
use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat, fchmod, fstat, openat, statat},
    io::Errno,
    process::geteuid,
};

/// Where settings stand in a data directory.
const CONFIGURATION: [&str; 2] = ["postgresql.conf", "postgresql.auto.conf"];
/// The default of `ssl_key_file`.
const DEFAULT_KEY: &str = "server.key";
/// Of a file of settings, no more is read.
const MAX_CONFIGURATION_BYTES: u64 = 4 << 20;

/// What PostgreSQL refuses of a file of its own user's, and what it always accepts.
struct Rule {
    kind: FileType,
    refused: u32,
    accepted: u32,
}

/// `PG_MODE_MASK_GROUP`. Whether the group was allowed to read before can't be told any more once it may write: so 0700,
/// as the entrypoint sets it.
const DIRECTORY: Rule = Rule { kind: FileType::Directory, refused: 0o027, accepted: 0o700 };
const KEY: Rule = Rule { kind: FileType::RegularFile, refused: 0o077, accepted: 0o600 };

/// Closes a data directory, and the private keys in it, to all but their owner, where PostgreSQL would refuse them and
/// they belong to us. Whatever fails is told, and keeps nothing from starting. Symbolic links are left alone.
pub fn close(pgdata: &Path) {
    let mut closed = Vec::new();
    let mut tell = |path: &Path, outcome: Result<Option<u32>, Errno>| match outcome {
        Ok(None) => {}
        Ok(Some(mode)) => closed.push(format!("{} (its mode was {mode:04o})", path.display())),
        Err(error) => tracing::warn!(
            hint = "PostgreSQL doesn't start on a data directory that its group may write to, nor with a private key that others may read.",
            "the mode of {} can't be set: {error}",
            path.display()
        ),
    };
    match ours(pgdata) {
        Ok(Some(directory)) => {
            tell(pgdata, close_one(CWD, pgdata, &DIRECTORY));
            for key in keys(pgdata) {
                tell(&pgdata.join(&key), close_below(&directory, &key));
            }
        }
        Ok(None) => {}
        Err(error) => tell(pgdata, Err(error)),
    }
    if !closed.is_empty() {
        tracing::info!(
            "closed to all but PostgreSQL's user, as it wants them (a pod's fsGroup opens them): {}",
            closed.join(", ")
        );
    }
}

/// The directory, if it's one and belongs to us.
fn ours(pgdata: &Path) -> Result<Option<OwnedFd>, Errno> {
    let stat = statat(CWD, pgdata, AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory || stat.st_uid != geteuid().as_raw() {
        return Ok(None);
    }
    open(CWD, pgdata, OFlags::DIRECTORY).map(Some)
}

fn open(at: impl AsFd, path: &Path, more: OFlags) -> Result<OwnedFd, Errno> {
    // Whoever is in the group could have put another thing into its place since it was looked at, a pipe for example.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | more;
    openat(at, path, flags, Mode::empty())
}

/// Sets the mode of what breaks the rule and is ours; answers with the mode that it had. What isn't there needs nothing.
fn close_one(at: impl AsFd, name: &Path, rule: &Rule) -> Result<Option<u32>, Errno> {
    let breaks = |stat: &Stat| {
        FileType::from_raw_mode(stat.st_mode) == rule.kind
            && stat.st_uid == geteuid().as_raw()
            && stat.st_mode & rule.refused != 0
    };
    match statat(&at, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) if breaks(&stat) => {}
        Ok(_) | Err(Errno::NOENT) => return Ok(None),
        Err(error) => return Err(error),
    }
    let file = open(at, name, OFlags::empty())?;
    let stat = fstat(&file)?;
    if !breaks(&stat) {
        return Ok(None);
    }
    fchmod(&file, Mode::from_raw_mode(rule.accepted))?;
    Ok(Some(stat.st_mode & 0o7777))
}

/// The same of a key somewhere below a directory, where no step on the way is a symbolic link.
fn close_below(directory: &OwnedFd, key: &Path) -> Result<Option<u32>, Errno> {
    let (Some(parent), Some(name)) = (key.parent(), key.file_name()) else { return Ok(None) };
    let mut at = open(directory, Path::new("."), OFlags::DIRECTORY)?;
    for step in parent.components() {
        at = match open(&at, step.as_ref(), OFlags::DIRECTORY) {
            Ok(next) => next,
            // It isn't there, or is a link.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
            Err(error) => return Err(error),
        };
    }
    close_one(at, name.as_ref(), &KEY)
}

/// The private keys that may be in the data directory, from there. Which of the settings counts isn't asked: the command
/// line and files that are included outrank them, and a private key that others may read is wrong in any case.
fn keys(pgdata: &Path) -> BTreeSet<PathBuf> {
    let named = CONFIGURATION.iter().filter_map(|name| {
        let path = pgdata.join(name);
        let read = read(&path).inspect_err(|error| {
            tracing::warn!("whether {} names a private key can't be told: {error}", path.display());
        });
        setting(&read.ok()?, "ssl_key_file")
    });
    let within = |value: Vec<u8>| {
        let path = Path::new(OsStr::from_bytes(&value));
        let path = if path.is_absolute() { path.strip_prefix(pgdata).ok()? } else { path };
        path.components().all(|part| matches!(part, Component::Normal(_))).then(|| path.to_owned())
    };
    named.filter_map(within).chain([PathBuf::from(DEFAULT_KEY)]).collect()
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    match fs::metadata(path) {
        // In Debian's packages they lie elsewhere.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
        Ok(meta) if !meta.is_file() => {}
        Ok(_) => _ = File::open(path)?.take(MAX_CONFIGURATION_BYTES).read_to_end(&mut content)?,
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn set(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn what_postgresql_would_refuse_is_closed_and_nothing_else_is_touched() {
        let scratch = tempfile::tempdir().unwrap();
        let (data, outside) = (scratch.path().join("data"), scratch.path().join("outside.key"));
        for directory in ["data", "data/tls", "data/base", "elsewhere"] {
            fs::create_dir(scratch.path().join(directory)).unwrap();
        }
        let files = ["PG_VERSION", "server.key", "server.crt", "tls/own.key", "tls/auto.key", "tls/old.key"];
        let all = files.map(|name| data.join(name));
        let linked = scratch.path().join("elsewhere/linked.key");
        for path in all.iter().chain([&outside, &linked]) {
            fs::write(path, "x").unwrap();
            set(path, 0o660);
        }
        for directory in [data.clone(), data.join("tls"), data.join("base")] {
            set(&directory, 0o2770);
        }
        fs::write(
            data.join("postgresql.conf"),
            "ssl_key_file = 'tls/old.key'\nssl_key_file = 'tls/own.key' # the last one counts\n",
        )
        .unwrap();
        fs::write(data.join("postgresql.auto.conf"), format!("ssl_key_file = '{}/tls/auto.key'\n", data.display()))
            .unwrap();
        close(&data);
        assert_eq!(mode(&data), 0o700);
        assert_eq!(all.each_ref().map(|path| mode(path)), [0o660, 0o600, 0o660, 0o600, 0o600, 0o660]);
        assert_eq!([data.join("tls"), data.join("base")].map(|path| mode(&path)), [0o2770; 2]);

        // Ways out of the data directory, and links.
        symlink(scratch.path().join("elsewhere"), data.join("way")).unwrap();
        symlink(&outside, data.join("link.key")).unwrap();
        for value in ["../outside.key", "way/linked.key", "link.key", outside.to_str().unwrap(), "none/such.key", ""] {
            fs::write(data.join("postgresql.conf"), format!("ssl_key_file = '{value}'\n")).unwrap();
            close(&data);
            assert_eq!((mode(&outside), mode(&linked)), (0o660, 0o660), "{value:?}");
        }
        let another = scratch.path().join("another");
        symlink(&data, &another).unwrap();
        set(&data, 0o2770);
        close(&another);
        assert_eq!(mode(&data), 0o2770);
    }

    #[test]
    fn what_postgresql_accepts_stays_as_it_is() {
        let scratch = tempfile::tempdir().unwrap();
        let (data, key) = (scratch.path(), scratch.path().join("server.key"));
        fs::write(&key, "x").unwrap();
        for (of_data, of_key) in [(0o700, 0o400), (0o750, 0o600), (0o2750, 0o600)] {
            set(data, of_data);
            set(&key, of_key);
            close(data);
            assert_eq!((mode(data), mode(&key)), (of_data, of_key));
        }
        for (opened, closed) in [(0o755, 0o700), (0o770, 0o700)] {
            set(data, opened);
            close(data);
            assert_eq!(mode(data), closed);
        }
    }
}
