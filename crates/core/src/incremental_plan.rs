//! What an incremental backup takes of a relation's file: all of it, or the blocks that changed since its parent.
//!
//! The decision is that of PostgreSQL's own (`GetFileBackupMethod` in `basebackup_incremental.c`, 17 and 18), but that
//! two things more are taken:
//!
//! - Visibility maps always whole: servers before late minor releases of 18 left out of the summaries that bits of
//!   them were cleared, and index-only scans went wrong.
//! - All blocks from the limit block on, and all behind the end of the parent's file, as `blkreftable.h` says that one has to. A relation that was cut and grew
//!   again has blocks of which no WAL tells as long as they are empty: COPY adds many at a time. The server leaves
//!   them out, and pg_combinebackup takes what was there before the cut: deleted rows are back (seen with 17.11).
//!
//! Files that are no relation's are always taken whole and don't come here.
//!
//! What has to hold before: the parent's WAL is a part of this server's history and ends before the backup begins,
//! and the summaries cover all from the parent's start to the backup's.

use crate::{
    block_references::{BlockReferences, ForkReferences, RelationFork},
    data_directory::{Fork, RelationFile, is_relation_directory, relation_file},
    incremental_file::IncrementalHeader,
    page::PAGE_SIZE,
};

/// The OID of pg_default (`DEFAULTTABLESPACE_OID`).
const PG_DEFAULT: u32 = 1663;

/// The OID of pg_global (`GLOBALTABLESPACE_OID`).
const PG_GLOBAL: u32 = 1664;

/// A relation's file, by its path: which tablespace and database it belongs to, and what of them it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RelationPath {
    /// The tablespace's OID.
    pub tablespace: u32,
    /// The database's OID, 0 in `global`.
    pub database: u32,
    /// Which file of which relation.
    pub file: RelationFile,
}

impl RelationPath {
    /// The relation's file at this path, relative to the data directory; `None` if it is none.
    pub fn parse(path: &str) -> Option<RelationPath> {
        let (directory, name) = path.rsplit_once('/')?;
        if !is_relation_directory(directory) {
            return None;
        }
        let file = relation_file(name)?;
        let components: Vec<&str> = directory.split('/').collect();
        let (tablespace, database) = match components[..] {
            ["global"] => (PG_GLOBAL, 0),
            ["base", database] => (PG_DEFAULT, database.parse().ok()?),
            ["pg_tblspc", tablespace, _, database] => (tablespace.parse().ok()?, database.parse().ok()?),
            _ => return None,
        };
        Some(RelationPath { tablespace, database, file })
    }

    /// The fork that the file is a part of.
    pub fn fork(&self) -> RelationFork {
        let RelationPath { tablespace, database, file } = *self;
        RelationFork { tablespace, database, number: file.number, fork: file.fork }
    }
}

/// How a file is backed up.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FileMethod {
    /// As in a full backup.
    Full(FullReason),
    /// As an incremental file with this header and the blocks that it names, read from the file. None if nothing
    /// changed: then the file isn't read at all.
    Incremental(IncrementalHeader),
}

/// Why a file is taken whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FullReason {
    /// Its size isn't that of whole blocks, or more than a file can have.
    OddSize,
    /// The free space map's changes aren't in the WAL.
    FreeSpaceMap,
    /// The visibility map's changes are not all in the summaries.
    VisibilityMap,
    /// The parent doesn't have it.
    NotInParent,
    /// Its database was made or moved there since.
    NewDatabase,
    /// It is empty: an incremental file would be larger.
    Empty,
    /// All of it is new: the relation was made, or cut to a length before this file, since.
    NewContent,
    /// More than nine tenths of its blocks changed.
    MostlyChanged,
}

/// The decisions of one backup.
#[derive(Clone, Copy, Debug)]
pub struct IncrementalPlan<'a> {
    references: &'a BlockReferences,
    segment_blocks: u32,
}

impl<'a> IncrementalPlan<'a> {
    /// Decides by what the summaries say changed since the parent began. `segment_blocks` is `RELSEG_SIZE`
    /// ([`ControlFile::relation_segment_blocks`](crate::ControlFile::relation_segment_blocks)).
    pub fn new(references: &'a BlockReferences, segment_blocks: u32) -> IncrementalPlan<'a> {
        IncrementalPlan { references, segment_blocks }
    }

    /// How to back up this file of `size` bytes, of which exactly as many are then to be read. `in_parent` tells how many
    /// blocks the parent's file has, whole or made from an
    /// [incremental file](crate::incremental_file::incremental_path); `None` if the parent doesn't have it. What lies
    /// behind that is taken whether WAL tells of it or not.
    pub fn method(&self, path: &RelationPath, size: u64, in_parent: Option<u32>) -> FileMethod {
        match self.header(path, size, in_parent) {
            Ok(header) => FileMethod::Incremental(header),
            Err(reason) => FileMethod::Full(reason),
        }
    }

    fn header(&self, path: &RelationPath, size: u64, in_parent: Option<u32>) -> Result<IncrementalHeader, FullReason> {
        let block = PAGE_SIZE as u64;
        let blocks = u32::try_from(size / block).ok().filter(|blocks| *blocks <= self.segment_blocks);
        let blocks = blocks.filter(|_| size.is_multiple_of(block)).ok_or(FullReason::OddSize)?;
        match path.file.fork {
            Fork::FreeSpaceMap => return Err(FullReason::FreeSpaceMap),
            Fork::VisibilityMap => return Err(FullReason::VisibilityMap),
            Fork::Main | Fork::Init => {}
        }
        let in_parent = in_parent.ok_or(FullReason::NotInParent)?;
        if self.references.has_database(path.tablespace, path.database) {
            return Err(FullReason::NewDatabase);
        }
        let references = self.references.get(&path.fork());
        if references.is_none() && blocks == 0 {
            return Err(FullReason::Empty);
        }
        // A fork's last block is 2^32 - 2: files behind it aren't PostgreSQL's.
        let first = path.file.segment.checked_mul(self.segment_blocks).ok_or(FullReason::OddSize)?;
        let end = first.checked_add(blocks).ok_or(FullReason::OddSize)?;
        // Where the deepest cut was, and how many of this file's blocks it left.
        let (cut, left) = match references.and_then(ForkReferences::limit_block) {
            Some(limit) if limit <= first => return Err(FullReason::NewContent),
            Some(limit) => (limit.min(end), limit - first),
            None => (end, 0),
        };
        // Behind it, or behind what the parent has, all is newer than the parent.
        let new = cut.min(first.saturating_add(in_parent));
        let known = references.into_iter().flat_map(|references| references.blocks(first..new));
        let changed: Vec<u32> = known.chain(new..end).map(|block| block - first).collect();
        if changed.len() as u64 * 10 > u64::from(blocks) * 9 {
            return Err(FullReason::MostlyChanged);
        }
        self.incremental(left.max(blocks).min(self.segment_blocks), changed)
    }

    fn incremental(&self, truncation_block_length: u32, changed: Vec<u32>) -> Result<IncrementalHeader, FullReason> {
        // It always is one: the changed blocks ascend and lie within the file.
        IncrementalHeader::new(truncation_block_length, changed, self.segment_blocks).map_err(|_| FullReason::OddSize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEGMENT: u32 = 131_072;

    fn path(text: &str) -> RelationPath {
        RelationPath::parse(text).unwrap()
    }

    fn fork(number: u32) -> RelationFork {
        RelationFork { tablespace: PG_DEFAULT, database: 5, number, fork: Fork::Main }
    }

    /// Of a backup before which `limit` and `blocks` became of relation 16400.
    fn method(limit: Option<u32>, changed: &[u32], file: &str, blocks: u64) -> FileMethod {
        let mut references = BlockReferences::default();
        references.set(fork(16400), limit, changed);
        IncrementalPlan::new(&references, SEGMENT).method(&path(file), blocks * 8192, Some(SEGMENT))
    }

    fn incremental(length: u32, blocks: &[u32]) -> FileMethod {
        FileMethod::Incremental(IncrementalHeader::new(length, blocks.to_vec(), SEGMENT).unwrap())
    }

    #[test]
    fn a_path_tells_the_tablespace_and_the_database() {
        for (text, tablespace, database) in [
            ("global/1262", PG_GLOBAL, 0),
            ("base/5/1262", PG_DEFAULT, 5),
            ("pg_tblspc/16500/PG_17_202406281/16384/1262", 16500, 16384),
        ] {
            let file = RelationFile { number: 1262, fork: Fork::Main, segment: 0 };
            assert_eq!(RelationPath::parse(text), Some(RelationPath { tablespace, database, file }), "{text}");
        }
        assert_eq!(path("base/5/16400_vm.1").fork(), RelationFork { fork: Fork::VisibilityMap, ..fork(16400) });
        for text in ["base/5/PG_VERSION", "pg_xact/0000", "global/pg_control", "16400", "base/5/t3_16400"] {
            assert_eq!(RelationPath::parse(text), None, "{text}");
        }
    }

    #[test]
    fn changed_blocks_of_the_file_are_taken() {
        assert_eq!(method(None, &[3, 7, 99], "base/5/16400", 10), incremental(10, &[3, 7]));
        assert_eq!(method(None, &[3, SEGMENT + 7], "base/5/16400.1", 10), incremental(10, &[7]));
        assert_eq!(method(None, &[3], "base/5/16400_init", 1), incremental(1, &[]));
        assert_eq!(method(None, &[3], "base/6/16400", 10), incremental(10, &[]));
    }

    #[test]
    fn what_a_cut_left_counts_up_to_the_files_end() {
        // Cut off again after the backup began.
        assert_eq!(method(Some(20), &[7], "base/5/16400", 10), incremental(20, &[7]));
        assert_eq!(method(Some(2 * SEGMENT), &[7], "base/5/16400", 10), incremental(SEGMENT, &[7]));
        assert_eq!(method(Some(SEGMENT + 20), &[], "base/5/16400.1", 10), incremental(20, &[]));
        assert_eq!(method(Some(5), &[], "base/5/16400", 0), incremental(5, &[]));
    }

    #[test]
    fn all_that_grew_again_behind_a_cut_is_taken() {
        assert_eq!(method(Some(7), &[2, 8], "base/5/16400", 10), incremental(10, &[2, 7, 8, 9]));
        assert_eq!(method(Some(SEGMENT + 8), &[], "base/5/16400.1", 10), incremental(10, &[8, 9]));
        assert_eq!(method(Some(0), &[], "base/5/16400_init", 1), incremental(1, &[]));
        assert_eq!(method(Some(1), &[0], "base/5/16400", 10), FileMethod::Full(FullReason::MostlyChanged));
    }

    #[test]
    fn what_the_parent_s_file_is_too_short_for_is_taken_without_wal_that_tells_of_it() {
        let mut references = BlockReferences::default();
        references.set(fork(16400), None, &[2]);
        let plan = IncrementalPlan::new(&references, SEGMENT);
        let method = |file: &str, parent| plan.method(&path(file), 10 * 8192, Some(parent));
        assert_eq!(method("base/5/16400", 8), incremental(10, &[2, 8, 9]));
        assert_eq!(method("base/5/16400.1", 9), incremental(10, &[9]));
        assert_eq!(method("base/5/16401", 7), incremental(10, &[7, 8, 9]));
        assert_eq!(method("base/5/16401", 11), incremental(10, &[]));
        assert_eq!(method("base/5/16401", 0), FileMethod::Full(FullReason::MostlyChanged));
    }

    #[test]
    fn a_file_is_taken_whole_when_blocks_do_not_tell() {
        for (limit, changed, file, blocks, reason) in [
            (None, &[][..], "base/5/16400_fsm", 3, FullReason::FreeSpaceMap),
            (None, &[], "base/5/16400_vm", 1, FullReason::VisibilityMap),
            (None, &[], "base/5/16401", 0, FullReason::Empty),
            (None, &[], "base/5/16400", u64::from(SEGMENT) + 1, FullReason::OddSize),
            (Some(0), &[3], "base/5/16400", 10, FullReason::NewContent),
            (Some(SEGMENT), &[3], "base/5/16400.1", 10, FullReason::NewContent),
            (None, &[], "base/5/16400.32768", 10, FullReason::OddSize),
            (None, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], "base/5/16400", 10, FullReason::MostlyChanged),
        ] {
            assert_eq!(method(limit, changed, file, blocks), FileMethod::Full(reason), "{file} {reason:?}");
        }
        let nine = [0, 1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(method(None, &nine, "base/5/16400", 10), incremental(10, &nine));
    }

    #[test]
    fn what_the_parent_or_its_database_lacks_is_taken_whole() {
        let mut references = BlockReferences::default();
        references.set(RelationFork { database: 6, ..fork(0) }, Some(0), &[]);
        let plan = IncrementalPlan::new(&references, SEGMENT);
        let full = |text, size, in_parent: Option<u32>| match plan.method(&path(text), size, in_parent) {
            FileMethod::Full(reason) => Some(reason),
            FileMethod::Incremental(_) => None,
        };
        assert_eq!(full("base/6/16400", 8192, Some(1)), Some(FullReason::NewDatabase));
        assert_eq!(full("base/5/16400", 8192, None), Some(FullReason::NotInParent));
        assert_eq!(full("base/5/16400", 8193, Some(1)), Some(FullReason::OddSize));
        assert_eq!(full("base/5/16400", 8192, Some(1)), None);
        assert_eq!(full("pg_tblspc/1/PG_17_1/6/16400", 8192, Some(1)), None);
    }
}
