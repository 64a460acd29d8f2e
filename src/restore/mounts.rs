//! Other file systems that are mounted in a directory: they can't be renamed or removed with it, and a mount follows a
//! directory that is renamed, while the next container finds it where it was.

use std::{
    fs,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

use crate::failure::{Code, Failure};

/// Where file systems are mounted in this process's namespace.
///
/// # Errors
/// If the kernel doesn't tell.
pub fn mount_points() -> Result<Vec<PathBuf>, Failure> {
    let path = "/proc/self/mountinfo";
    let text = fs::read(path).map_err(|error| Failure::io(format!("reading {path}"), &error))?;
    Ok(parse(&text))
}

/// Source: proc(5). The fifth field is the mount point; what would end a field is written in octal.
fn parse(text: &[u8]) -> Vec<PathBuf> {
    let field = |line: &[u8]| line.split(|byte| *byte == b' ').nth(4).map(unescape);
    text.split(|byte| *byte == b'\n')
        .filter_map(field)
        .map(|bytes| std::ffi::OsString::from_vec(bytes).into())
        .collect()
}

fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, behind)) = rest.split_first() {
        let octal = rest.get(1..4).filter(|_| *first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => (bytes.push(byte), rest = &rest[4..]).1,
            None => (bytes.push(*first), rest = behind).1,
        }
    }
    bytes
}

/// Refuses a directory with something mounted anywhere in it, but for what is `spared`.
///
/// # Errors
/// [`Code::TargetDirectory`] with what it is.
pub fn refuse_below(directory: &Path, spared: Option<&Path>) -> Result<(), Failure> {
    // Mount points are told without links.
    let resolve = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let (directory, spared) = (resolve(directory), spared.map(resolve));
    let is_below =
        |point: &PathBuf| point.starts_with(&directory) && *point != directory && Some(point) != spared.as_ref();
    match mount_points()?.into_iter().find(is_below) {
        None => Ok(()),
        Some(point) => Err(Failure::new(
            Code::TargetDirectory,
            format!(
                "{} is mounted in {}, and can't be moved with it; nothing was changed",
                point.display(),
                directory.display()
            ),
        )
        .hint("Mount it elsewhere (for a file of configuration, outside of PGDATA), or restore to an empty volume.")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_read_as_the_kernel_writes_them() {
        let text = b"22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
            41 22 0:36 / /var/lib/with\\040space\\134back rw - tmpfs none rw\n";
        assert_eq!(parse(text), [PathBuf::from("/"), PathBuf::from("/var/lib/with space\\back")]);
    }

    #[test]
    fn what_is_mounted_in_a_directory_is_found() {
        let refused = refuse_below(Path::new("/"), None).unwrap_err();
        assert!(refused.message.contains("is mounted in /"), "{refused}");
        refuse_below(tempfile::tempdir().unwrap().path(), None).unwrap();
        refuse_below(Path::new("/proc/self/fd"), None).unwrap();
    }
}
