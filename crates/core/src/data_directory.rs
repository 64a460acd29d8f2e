//! What of a data directory belongs in a base backup.
//!
//! The rules are those of PostgreSQL's own base backup (basebackup.c, 14 to 18), as functions of a path
//! relative to the data directory, its components joined by `/`: what they leave out is what the server
//! removes or rebuilds when it starts. Unlike basebackup.c they anchor the names of directories at the top
//! and know a relation's directory by its whole path, so that a directory of the user's that happens to be
//! called `pg_notify`, or a data directory below one called `base`, loses nothing.
//!
//! A treatment holds wherever the walk begins: what lies below a directory that is skipped or kept empty is
//! skipped too. Nothing here reads a directory. Whether a relation is unlogged depends on the file beside it
//! (see [`skip_as_unlogged`]), and which of the version directories of a tablespace is the server's own on
//! its catalog version (see [`tablespace_version_directory`]): both are the walker's to ask.

use crate::incremental_file::INCREMENTAL_PREFIX;

/// What becomes of a file or directory in a backup.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Treatment {
    /// It belongs in the backup.
    Include,
    /// It doesn't, nor does anything below it.
    Skip,
    /// The directory does, for its mode and owner, but nothing below it.
    EmptyDirectory,
    /// It belongs in the backup, but is written after everything else: `PG_VERSION`, without which nothing
    /// takes the directory for a database, and `global/pg_control`, whose minimum recovery point has to cover
    /// every page that a standby's backup holds.
    Last,
}

/// Directories at the top whose content the server removes or rebuilds when it starts, and pg_wal, whose
/// segments come from the archive.
const KEPT_EMPTY: [&str; 8] =
    ["pg_dynshmem", "pg_notify", "pg_replslot", "pg_serial", "pg_snapshots", "pg_stat_tmp", "pg_subtrans", "pg_wal"];

/// Files that describe the running server or another backup, or were about to be renamed.
const LEFT_OUT: [&str; 8] = [
    ".DS_Store",
    "backup_label",
    "backup_manifest",
    "current_logfiles.tmp",
    "postgresql.auto.conf.tmp",
    "postmaster.opts",
    "postmaster.pid",
    "tablespace_map",
];

/// Whatever begins like this, in any directory: files and directories of sorts and hashes that spilled, and
/// the relation cache, finished or not.
const LEFT_OUT_PREFIXES: [&str; 2] = ["pgsql_tmp", "pg_internal.init"];

/// What a backup does with the directory `path`.
pub fn treat_directory(path: &str) -> Treatment {
    if skipped(path) {
        Treatment::Skip
    } else if KEPT_EMPTY.contains(&path) {
        Treatment::EmptyDirectory
    } else {
        Treatment::Include
    }
}

/// What a backup does with the file `path`. Files of unlogged relations are included here: see
/// [`skip_as_unlogged`].
pub fn treat_file(path: &str) -> Treatment {
    let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
    let temporary = is_temporary_relation(name) && is_relation_directory(directory);
    // No server writes one; in a backup it would be taken for a part of the relation's file.
    let increment = name.strip_prefix(INCREMENTAL_PREFIX).is_some_and(|name| relation_file(name).is_some())
        && is_relation_directory(directory);
    if skipped(path) || LEFT_OUT.contains(&name) || temporary || increment {
        Treatment::Skip
    } else if matches!(path, "PG_VERSION" | "global/pg_control") {
        Treatment::Last
    } else {
        Treatment::Include
    }
}

/// Whether a component of the path, or a directory above, is left out whatever it is.
fn skipped(path: &str) -> bool {
    let mut components = path.split('/');
    let top = components.next().unwrap_or_default();
    let below_the_top = path.len() > top.len();
    // Of a tablespace only the version directories are PostgreSQL's; its location may hold anything beside.
    let beside_versions =
        top == "pg_tblspc" && path.split('/').nth(2).is_some_and(|version| !is_version_directory(version));
    below_the_top && KEPT_EMPTY.contains(&top)
        || beside_versions
        || path.split('/').any(|component| LEFT_OUT_PREFIXES.iter().any(|prefix| component.starts_with(prefix)))
}

/// The directories that every data directory has: a server doesn't start without some of them.
/// Source: `subdirs` in src/bin/initdb/initdb.c, 14 to 18, but for those of databases and in pg_wal.
pub const STANDARD_DIRECTORIES: [&str; 20] = [
    "base",
    "global",
    "pg_commit_ts",
    "pg_dynshmem",
    "pg_logical",
    "pg_logical/mappings",
    "pg_logical/snapshots",
    "pg_multixact",
    "pg_multixact/members",
    "pg_multixact/offsets",
    "pg_notify",
    "pg_replslot",
    "pg_serial",
    "pg_snapshots",
    "pg_stat",
    "pg_stat_tmp",
    "pg_subtrans",
    "pg_tblspc",
    "pg_twophase",
    "pg_xact",
];

/// Whether what lies below this path is PostgreSQL's own and no person's: the path's first component is one of
/// [`STANDARD_DIRECTORIES`].
pub fn is_standard(path: &str) -> bool {
    path.split('/').next().is_some_and(|top| STANDARD_DIRECTORIES.contains(&top))
}

/// The directories that a server of this major version expects inside an otherwise empty pg_wal.
pub fn empty_wal_subdirectories(major: u32) -> &'static [&'static str] {
    if major >= 17 { &["archive_status", "summaries"] } else { &["archive_status"] }
}

/// The directory inside a tablespace's location that belongs to a server of this major and catalog version,
/// `PG_17_202406281` (TABLESPACE_VERSION_DIRECTORY). After an upgrade others may lie beside it; a backup
/// takes only this one. The catalog version is in pg_control and in `pg_control_system()`.
pub fn tablespace_version_directory(major: u32, catalog_version: u32) -> String {
    format!("PG_{major}_{catalog_version}")
}

fn is_version_directory(name: &str) -> bool {
    name.strip_prefix("PG_")
        .and_then(|versions| versions.split_once('_'))
        .is_some_and(|(major, catalog)| oid(major).is_some() && oid(catalog).is_some())
}

/// What a file of a relation holds (relpath.c).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Fork {
    /// The rows or the index entries; its files carry no suffix.
    Main,
    /// `_fsm`
    FreeSpaceMap,
    /// `_vm`
    VisibilityMap,
    /// `_init`: what an unlogged relation begins with after a crash. Its presence is what marks one.
    Init,
}

/// A file of a permanent or unlogged relation, as its name tells.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RelationFile {
    /// relfilenumber: not the relation's OID once it was rewritten.
    pub number: u32,
    /// The fork that the file belongs to.
    pub fork: Fork,
    /// Which part of the fork: 0 for the first, whose name carries none, then from 1 on. Each but the last
    /// holds RELSEG_SIZE blocks, 1 GB unless PostgreSQL was built otherwise.
    pub segment: u32,
}

/// Parses the name of a relation's file: `16400`, `16400_fsm`, `16400_vm.1`. `None` for anything else,
/// temporary relations among it. Names that the server never writes (leading zeros, a segment 0) are no
/// relations, as in parse_filename_for_nontemp_relation of 17 (reinit.c).
///
/// The name alone proves nothing: files of pg_xact and its like are numbers as well. Ask
/// [`is_relation_directory`] first.
pub fn relation_file(file_name: &str) -> Option<RelationFile> {
    let (fork_name, segment) = match file_name.split_once('.') {
        Some((fork_name, segment)) => (fork_name, oid(segment)?),
        None => (file_name, 0),
    };
    let (number, fork) = match fork_name.split_once('_') {
        Some((number, suffix)) => (number, fork(suffix)?),
        None => (fork_name, Fork::Main),
    };
    Some(RelationFile { number: oid(number)?, fork, segment })
}

fn fork(suffix: &str) -> Option<Fork> {
    match suffix {
        "fsm" => Some(Fork::FreeSpaceMap),
        "vm" => Some(Fork::VisibilityMap),
        "init" => Some(Fork::Init),
        _ => None,
    }
}

/// A number as PostgreSQL writes OIDs: not 0, no leading zeros, 32 bits.
fn oid(text: &str) -> Option<u32> {
    (is_digits(text) && !text.starts_with('0')).then(|| text.parse().ok()).flatten()
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

/// Whether relations lie in the directory `dir`: `global`, `base/<database>` and
/// `pg_tblspc/<tablespace>/PG_<versions>/<database>`, nothing else.
pub fn is_relation_directory(dir: &str) -> bool {
    let is_oid = |text: &str| oid(text).is_some();
    let mut components = dir.split('/');
    let matches = match components.next() {
        Some("global") => true,
        Some("base") => components.next().is_some_and(is_oid),
        Some("pg_tblspc") => {
            components.next().is_some_and(is_oid)
                && components.next().is_some_and(is_version_directory)
                && components.next().is_some_and(is_oid)
        }
        _ => false,
    };
    matches && components.next().is_none()
}

/// Whether the name is that of a temporary relation's file, `t3_16400` or `t3_16400_fsm.1`: `t`, the
/// backend's number, and the rest as for other relations (looks_like_temp_rel_name, fd.c).
pub fn is_temporary_relation(file_name: &str) -> bool {
    file_name
        .strip_prefix('t')
        .and_then(|rest| rest.split_once('_'))
        .is_some_and(|(backend, rest)| is_digits(backend) && relation_file(rest).is_some())
}

/// Whether the file is left out because its relation is unlogged, which it is if the same directory has an
/// init fork of the same number. All of it is left out but that fork, from which the server makes the
/// relation anew.
///
/// The walker must look for the init fork as late as it decides, not in a list made before: a relation made
/// unlogged or logged meanwhile has another number.
pub fn skip_as_unlogged(file: &RelationFile, has_init_fork: bool) -> bool {
    has_init_fork && file.fork != Fork::Init
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_database_itself_is_included() {
        for path in ["base", "base/5", "global", "pg_tblspc/16400/PG_17_202406281/5", "pg_xact", "pg_stat", "my/pg_wal"]
        {
            assert_eq!(treat_directory(path), Treatment::Include, "{path}");
        }
        for path in [
            "base/5/1259",
            "base/5/PG_VERSION",
            "base/5/16400_init",
            "global/pg_filenode.map",
            "pg_tblspc/16400/PG_17_202406281/5/16401",
            "pg_xact/0000",
            "postgresql.auto.conf",
            "current_logfiles",
            "archive/pg_wal",
            // A temporary relation's name, but no relation's directory.
            "extension/t3_16400",
            "extension/INCREMENTAL.16400",
            // `standby.signal` and `recovery.signal` are copied: the restore decides about them.
            "standby.signal",
        ] {
            assert_eq!(treat_file(path), Treatment::Include, "{path}");
        }
    }

    #[test]
    fn what_a_server_rebuilds_at_its_start_is_left_out() {
        for path in KEPT_EMPTY {
            assert_eq!(treat_directory(path), Treatment::EmptyDirectory, "{path}");
            assert_eq!(treat_file(&format!("{path}/x")), Treatment::Skip, "{path}");
            assert_eq!(treat_directory(&format!("{path}/x")), Treatment::Skip, "{path}");
        }
        for path in
            ["base/pgsql_tmp", "pg_tblspc/1/PG_15_202209061/pgsql_tmp", "pgsql_tmp.pgsidecar-staged", "pg_tblspc/1/PGX"]
        {
            assert_eq!(treat_directory(path), Treatment::Skip, "{path}");
        }
        for path in [
            "base/pgsql_tmp/pgsql_tmp123.0",
            "base/5/t3_16400_fsm.1",
            "base/5/INCREMENTAL.16400",
            "pg_tblspc/1/PG_15_202209061/5/t3_16400",
            "global/pg_internal.init",
            "base/5/pg_internal.init.4711",
            "postmaster.pid",
            "postmaster.opts",
            "backup_label",
            "tablespace_map",
            "backup_manifest",
            "postgresql.auto.conf.tmp",
            "current_logfiles.tmp",
            "base/.DS_Store",
            "pgsql_tmp.pgsidecar-staged/base/5/1259",
            "pg_tblspc/16400/PG_VERSION",
            "pg_tblspc/16400/lost+found/1",
        ] {
            assert_eq!(treat_file(path), Treatment::Skip, "{path}");
        }
    }

    #[test]
    fn what_makes_a_directory_a_database_comes_last() {
        assert_eq!(treat_file("global/pg_control"), Treatment::Last);
        assert_eq!(treat_file("PG_VERSION"), Treatment::Last);
        assert_eq!(treat_file("old/global/pg_control"), Treatment::Include);
    }

    #[test]
    fn an_empty_pg_wal_has_what_the_server_expects_in_it() {
        assert_eq!(empty_wal_subdirectories(16), ["archive_status"]);
        assert_eq!(empty_wal_subdirectories(17), ["archive_status", "summaries"]);
        assert_eq!(tablespace_version_directory(17, 202_406_281), "PG_17_202406281");
    }

    #[test]
    fn relations_lie_in_three_kinds_of_directories_only() {
        for dir in ["global", "base/5", "base/4294967295", "pg_tblspc/16400/PG_17_202406281/5"] {
            assert!(is_relation_directory(dir), "{dir}");
        }
        for dir in [
            "",
            "base",
            "base/",
            "base/05",
            "base/0",
            "base/5/6",
            "base/5/",
            "base/4294967296",
            "/base/5",
            "x/base/5",
            "base/pgsql_tmp",
            "global/5",
            "pg_xact",
            "pg_multixact/members",
            "pg_tblspc/16400",
            "pg_tblspc/16400/PG_17_202406281",
            "pg_tblspc/16400/PG_17/5",
            "pg_tblspc/16400/5/5",
            "pg_tblspc/x/PG_17_202406281/5",
        ] {
            assert!(!is_relation_directory(dir), "{dir}");
        }
    }

    #[test]
    fn names_that_the_server_never_writes_are_no_relations() {
        for name in [
            "",
            "0",
            "016400",
            "16400.",
            "16400.0",
            "16400.01",
            "16400_",
            "16400_main",
            "16400_fsm_vm",
            "16400_FSM",
            "16400.1_fsm",
            "4294967296",
            "+1",
            "-1",
            " 1",
            "16400.1.2",
            "t3_16400",
            "pg_filenode.map",
            "PG_VERSION",
            "1٣",
        ] {
            assert_eq!(relation_file(name), None, "{name:?}");
        }
        assert!(is_temporary_relation("t3_16400") && is_temporary_relation("t0_16400_vm.2"));
        for name in ["16400", "t_16400", "t3", "t3_", "tx_1", "t3_16400_tmp", "t3_t3_1"] {
            assert!(!is_temporary_relation(name), "{name:?}");
        }
    }

    #[test]
    fn of_an_unlogged_relation_only_the_init_fork_is_kept() {
        let kept = |name: &str, has_init| !skip_as_unlogged(&relation_file(name).unwrap(), has_init);
        assert!(kept("16400_init", true) && kept("16400_init.1", true) && kept("16400", false));
        assert!(!kept("16400", true) && !kept("16400.1", true) && !kept("16400_fsm", true) && !kept("16400_vm", true));
    }

    proptest! {
        #[test]
        fn a_relations_name_tells_number_fork_and_segment(number in 1u32.., fork in 0usize..4, segment: u32) {
            let (suffix, fork) =
                [("", Fork::Main), ("_fsm", Fork::FreeSpaceMap), ("_vm", Fork::VisibilityMap), ("_init", Fork::Init)][fork];
            let part = if segment == 0 { String::new() } else { format!(".{segment}") };
            let name = format!("{number}{suffix}{part}");
            prop_assert_eq!(relation_file(&name), Some(RelationFile { number, fork, segment }));
        }

        #[test]
        fn no_path_is_too_strange(path in "\\PC{0,40}") {
            treat_directory(&path);
            treat_file(&path);
        }
    }
}
