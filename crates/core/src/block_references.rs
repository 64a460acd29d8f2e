//! Which blocks of which relations WAL changed, as WAL summaries tell: a block reference table.
//!
//! Each fork of a relation has the blocks that were changed and its limit block, the shortest length that it was cut
//! to: 0 if it was made or dropped. Blocks are kept in chunks of 2^16 as PostgreSQL does, so that a block takes at
//! most 2 bytes and a chunk at most 8 kB: at most a 65,536th of the relations' size (160 MB for 10 TB, all changed)
//! and about what the summaries themselves take. Source: `src/common/blkreftable.c`.

mod chunk;
mod read;

use std::{
    collections::HashMap,
    io::{BufReader, Read},
    ops::Range,
};

use crate::data_directory::Fork;
use chunk::Chunk;

pub use read::SummaryError;

/// A fork of a relation, as WAL names it (`RelFileLocator`, `ForkNumber`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RelationFork {
    /// The tablespace's OID: 1663 for pg_default, 1664 for pg_global.
    pub tablespace: u32,
    /// The database's OID, 0 for the relations that all databases share.
    pub database: u32,
    /// relfilenumber. 0 stands for the whole database within that tablespace.
    pub number: u32,
    /// Which fork.
    pub fork: Fork,
}

/// What summaries say of one fork.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ForkReferences {
    limit_block: Option<u32>,
    /// None empty, ascending by their numbers. Mostly it is only one.
    chunks: Vec<(u16, Chunk)>,
}

impl ForkReferences {
    /// The shortest length in blocks that the fork was cut to; `None` if it never was.
    pub fn limit_block(&self) -> Option<u32> {
        self.limit_block
    }

    /// The changed blocks in this range, ascending.
    pub fn blocks(&self, range: Range<u32>) -> impl Iterator<Item = u32> {
        let first = self.chunks.partition_point(|(number, _)| u32::from(*number) < range.start >> 16);
        self.chunks[first..]
            .iter()
            .take_while({
                let end = range.end;
                move |(number, _)| u32::from(*number) << 16 < end
            })
            .flat_map(|(number, chunk)| chunk.offsets().map(|offset| u32::from(*number) << 16 | u32::from(offset)))
            .filter(move |block| range.contains(block))
    }

    /// As `BlockRefTableEntrySetLimitBlock`: a limit that isn't lower than the one that is known says nothing new;
    /// otherwise what was changed from it on is gone.
    fn set_limit_block(&mut self, limit: u32) {
        if self.limit_block.is_some_and(|known| known <= limit) {
            return;
        }
        self.limit_block = Some(limit);
        let (limit_chunk, limit_offset) = split(limit);
        self.chunks.retain_mut(|(number, chunk)| {
            if *number == limit_chunk {
                chunk.truncate(limit_offset);
            }
            *number <= limit_chunk && !chunk.is_empty()
        });
    }

    /// As `BlockRefTableEntryMarkBlockModified` for all blocks of a chunk.
    fn add(&mut self, number: u16, added: Chunk) {
        if added.is_empty() {
            return;
        }
        match self.chunks.binary_search_by_key(&number, |(number, _)| *number) {
            Ok(at) => self.chunks[at].1.add(added),
            Err(at) => self.chunks.insert(at, (number, added)),
        }
    }
}

/// Which chunk a block is in, and its place there.
fn split(block: u32) -> (u16, u16) {
    let [a, b, c, d] = block.to_be_bytes();
    (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
}

/// What one or several summaries say.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct BlockReferences {
    forks: HashMap<RelationFork, ForkReferences>,
}

impl BlockReferences {
    /// Adds what a summary says to what older ones said: merged from the oldest to the newest
    /// ([`covering`](crate::wal_summary::covering) sorts them so), a truncation forgets what was changed before it
    /// and nothing that was changed after it.
    ///
    /// # Errors
    ///
    /// [`SummaryError`], and what was merged before is gone: a part of a summary is worth nothing.
    pub fn merge_summary(mut self, summary: impl Read) -> Result<BlockReferences, SummaryError> {
        read::summary(BufReader::with_capacity(1 << 16, summary), &mut self)?;
        Ok(self)
    }

    /// What the summaries say of a fork; `None` if no WAL changed it.
    pub fn get(&self, fork: &RelationFork) -> Option<&ForkReferences> {
        self.forks.get(fork)
    }

    /// Whether the database was made within that tablespace, or dropped from it: then nothing that it holds there is
    /// what it was, and no WAL tells of its blocks (`CREATE DATABASE … STRATEGY FILE_COPY`, `ALTER DATABASE … SET
    /// TABLESPACE`).
    pub fn has_database(&self, tablespace: u32, database: u32) -> bool {
        self.forks.contains_key(&RelationFork { tablespace, database, number: 0, fork: Fork::Main })
    }

    /// How many forks the summaries say something of.
    pub fn len(&self) -> usize {
        self.forks.len()
    }

    /// Whether nothing was changed.
    pub fn is_empty(&self) -> bool {
        self.forks.is_empty()
    }

    fn fork(&mut self, fork: RelationFork) -> &mut ForkReferences {
        self.forks.entry(fork).or_default()
    }

    /// For the tests of what is made from it.
    #[cfg(test)]
    pub(crate) fn set(&mut self, fork: RelationFork, limit: Option<u32>, blocks: &[u32]) {
        let references = self.fork(fork);
        if let Some(limit) = limit {
            references.set_limit_block(limit);
        }
        for block in blocks {
            let (number, offset) = split(*block);
            references.add(number, Chunk::from_offsets(vec![offset]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const FORK: RelationFork = RelationFork { tablespace: 1663, database: 5, number: 16400, fork: Fork::Main };

    fn all(references: &BlockReferences) -> Vec<u32> {
        references.get(&FORK).unwrap().blocks(0..u32::MAX).collect()
    }

    #[test]
    fn a_truncation_forgets_what_was_changed_before_it_only() {
        let mut references = BlockReferences::default();
        references.set(FORK, None, &[5, 70_000, 49, 200_000, 50]);
        references.set(FORK, Some(50), &[60]);
        references.set(FORK, Some(100), &[150_000]);
        assert_eq!(all(&references), [5, 49, 60, 150_000]);
        let entry = references.get(&FORK).unwrap();
        assert_eq!(entry.limit_block(), Some(50));
        assert_eq!(entry.blocks(49..61).collect::<Vec<_>>(), [49, 60]);
        assert_eq!(entry.blocks(61..150_000).count(), 0);
        references.set(FORK, Some(0), &[]);
        assert_eq!(all(&references), [] as [u32; 0]);
    }

    #[test]
    fn an_entry_without_a_relation_stands_for_its_database() {
        let mut references = BlockReferences::default();
        references.set(FORK, None, &[1]);
        assert!(!references.has_database(1663, 5));
        references.set(RelationFork { number: 0, ..FORK }, Some(0), &[]);
        assert!(references.has_database(1663, 5) && !references.has_database(1663, 6));
        assert_eq!(references.len(), 2);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Limit(u32),
        Mark(u32, u32, usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0u32..300_000).prop_map(Step::Limit),
            (0u32..300_000, 1u32..40, 1usize..9_000).prop_map(|(first, by, count)| Step::Mark(first, by, count)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn it_holds_what_a_set_would(steps in prop::collection::vec(step(), 1..8), from in 0u32..400_000, len in 0u32..200_000) {
            let (mut references, mut limit, mut set) = (ForkReferences::default(), None, BTreeSet::new());
            for step in steps {
                match step {
                    Step::Limit(block) => {
                        references.set_limit_block(block);
                        if limit.is_none_or(|known| block < known) {
                            limit = Some(block);
                            set.split_off(&block);
                        }
                    }
                    Step::Mark(first, by, count) => {
                        let blocks: Vec<u32> = (first..).step_by(by as usize).take(count).collect();
                        for blocks in blocks.chunk_by(|a, b| a >> 16 == b >> 16) {
                            let offsets = blocks.iter().rev().map(|block| split(*block).1).collect();
                            references.add(split(blocks[0]).0, Chunk::from_offsets(offsets));
                        }
                        set.extend(blocks);
                    }
                }
                prop_assert!(references.blocks(0..u32::MAX).eq(set.iter().copied()));
            }
            prop_assert_eq!(references.limit_block(), limit);
            prop_assert!(references.blocks(from..from + len).eq(set.range(from..from + len).copied()));
        }
    }
}
