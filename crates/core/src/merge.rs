//! Where each block of a relation's file is found when a chain of incremental backups becomes one full backup.
//!
//! The rules are those of pg_combinebackup (`reconstruct_from_incremental_file` in `reconstruct.c`): the newest file
//! says how long the result is; each block comes from the newest file that has it, down to the first full one; what
//! none has is a block that the server added and wrote nothing to, which is all zero.
//!
//! But where pg_combinebackup goes on to search older files for a block behind the truncation block length of one
//! between, here it is zero: the relation was shorter then, so that what older ones have there was cut off, and what
//! grew there again later is empty unless a newer file has it. Taken from before the cut, deleted rows would be back
//! (seen with 17.11). Nothing here reads a file.

use crate::{incremental_file::IncrementalHeader, page::PAGE_SIZE};

const BLOCK: u64 = PAGE_SIZE as u64;

/// Where blocks come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BlockSource {
    /// No file has them: they are zero.
    Zero,
    /// They lie one after the other in a file of the chain.
    File {
        /// Which one: 0 is the newest.
        index: usize,
        /// Where in it the first block lies, in bytes.
        offset: u64,
    },
}

/// Successive blocks of the result that have one source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockRun {
    /// Where they come from.
    pub source: BlockSource,
    /// The first of them, counted from the beginning of the file.
    pub first_block: u32,
    /// How many there are, at least 1.
    pub count: u32,
}

/// How to make a file of a chain: its runs one after the other, without a gap.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Merge {
    runs: Vec<BlockRun>,
    is_copy_of_full: bool,
}

impl Merge {
    /// The merge of an incremental file with what older backups have of it: `older` incremental files from the newer
    /// to the oldest, then a full file of `full_size` bytes. In the runs `newest` is file 0, the first of `older` 1,
    /// and so on; the full file is the last. A chain whose newest file is full needs no merge: that file is the
    /// result.
    ///
    /// Of a full file that doesn't end with a whole block the rest isn't used. No run reaches beyond the end of a file
    /// that is as long as its header says: whether it is has to be checked before.
    pub fn new(newest: &IncrementalHeader, older: &[IncrementalHeader], full_size: u64) -> Merge {
        let full_index = older.len() + 1;
        // Beyond its truncation block length only the newest file's own blocks count.
        let inherited = newest.truncation_block_length();
        let full = u32::try_from(full_size / BLOCK).unwrap_or(u32::MAX).min(inherited);

        let mut sources = vec![BlockSource::Zero; newest.output_blocks() as usize];
        for block in 0..full {
            let offset = u64::from(block) * BLOCK;
            sources[block as usize] = BlockSource::File { index: full_index, offset };
        }
        // From the oldest to the newest: the newer one has the last word.
        for (index, header) in older.iter().enumerate().rev() {
            if let Some(cut_off) = sources.get_mut(header.truncation_block_length() as usize..) {
                cut_off.fill(BlockSource::Zero);
            }
            lay(header, index + 1, inherited, &mut sources);
        }
        lay(newest, 0, u32::MAX, &mut sources);

        let mut runs: Vec<BlockRun> = Vec::new();
        for (first_block, source) in (0..).zip(sources) {
            match runs.last_mut().filter(|run| run.goes_on_with(source)) {
                Some(run) => run.count += 1,
                None => runs.push(BlockRun { source, first_block, count: 1 }),
            }
        }
        let whole = BlockSource::File { index: full_index, offset: 0 };
        let is_copy_of_full =
            u64::from(newest.output_blocks()) * BLOCK == full_size && matches!(runs[..], [run] if run.source == whole);
        Merge { runs, is_copy_of_full }
    }

    /// What the result is made of, from its beginning to its end.
    pub fn runs(&self) -> &[BlockRun] {
        &self.runs
    }

    /// Size of the result in bytes.
    pub fn size(&self) -> u64 {
        self.runs.last().map_or(0, |run| (u64::from(run.first_block) + u64::from(run.count)) * BLOCK)
    }

    /// Whether the result is the full file, byte for byte, which may then be copied as it is.
    pub fn is_copy_of_full(&self) -> bool {
        self.is_copy_of_full
    }
}

/// Takes from a file of the chain what it has before block `end`.
fn lay(header: &IncrementalHeader, index: usize, end: u32, sources: &mut [BlockSource]) {
    for (place, block) in header.blocks().iter().enumerate().take_while(|(_, block)| **block < end) {
        sources[*block as usize] = BlockSource::File { index, offset: header.block_offset(place) };
    }
}

impl BlockRun {
    fn goes_on_with(&self, source: BlockSource) -> bool {
        match (self.source, source) {
            (BlockSource::Zero, BlockSource::Zero) => true,
            (BlockSource::File { index, offset }, BlockSource::File { index: next_index, offset: next_offset }) => {
                index == next_index && offset + u64::from(self.count) * BLOCK == next_offset
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SEGMENT: u32 = 131_072;

    fn header(length: u32, blocks: &[u32]) -> IncrementalHeader {
        IncrementalHeader::new(length, blocks.to_vec(), SEGMENT).unwrap()
    }

    fn run(index: usize, offset: u64, first_block: u32, count: u32) -> BlockRun {
        BlockRun { source: BlockSource::File { index, offset: offset * BLOCK }, first_block, count }
    }

    fn zero(first_block: u32, count: u32) -> BlockRun {
        BlockRun { source: BlockSource::Zero, first_block, count }
    }

    #[test]
    fn each_block_comes_from_the_newest_file_that_has_it() {
        let merge = Merge::new(&header(9, &[2, 3]), &[header(7, &[0, 3, 4, 6])], 6 * BLOCK + 1);
        let expected = [
            run(1, 1, 0, 1),
            run(2, 1, 1, 1),
            run(0, 1, 2, 2),
            run(1, 3, 4, 1),
            run(2, 5, 5, 1),
            run(1, 4, 6, 1),
            zero(7, 2),
        ];
        assert_eq!(merge.runs(), expected);
        assert_eq!(merge.size(), 9 * BLOCK);
    }

    #[test]
    fn beyond_the_truncation_only_the_newest_counts() {
        let merge = Merge::new(&header(2, &[5]), &[header(6, &[3, 4])], 6 * BLOCK);
        assert_eq!(merge.runs(), [run(2, 0, 0, 2), zero(2, 3), run(0, 1, 5, 1)]);
    }

    #[test]
    fn what_was_cut_off_between_does_not_come_back() {
        let merge = Merge::new(&header(9, &[7]), &[header(3, &[4]), header(9, &[0, 5])], 9 * BLOCK);
        assert_eq!(
            merge.runs(),
            [run(2, 1, 0, 1), run(3, 1, 1, 2), zero(3, 1), run(1, 1, 4, 1), zero(5, 2), run(0, 1, 7, 1), zero(8, 1)]
        );
    }

    #[test]
    fn an_unchanged_file_is_one_run_of_the_full_one() {
        let chain = vec![header(SEGMENT, &[]); 3];
        let size = u64::from(SEGMENT) * BLOCK;
        let merge = Merge::new(&chain[0], &chain[1..], size);
        assert_eq!(merge.runs(), [run(3, 0, 0, SEGMENT)]);
        assert!(merge.is_copy_of_full() && !Merge::new(&chain[0], &chain[1..], size + 1).is_copy_of_full());
        assert!(!Merge::new(&header(2, &[]), &[], BLOCK).is_copy_of_full());
        assert!(!Merge::new(&header(1, &[0]), &[], BLOCK).is_copy_of_full());
        assert_eq!(Merge::new(&header(0, &[]), &[], BLOCK).size(), 0);
    }

    /// For each block the file that it comes from and its number there.
    fn naive(incrementals: &[IncrementalHeader], full: u32) -> Vec<Option<(usize, u64)>> {
        let of_block = |block: u32| {
            for (index, header) in incrementals.iter().enumerate() {
                if let Some(place) = header.blocks().iter().position(|b| *b == block) {
                    return Some((index, header.header_length() / BLOCK + place as u64));
                }
                if block >= header.truncation_block_length() {
                    return None;
                }
            }
            (block < full).then_some((incrementals.len(), u64::from(block)))
        };
        (0..incrementals[0].output_blocks()).map(of_block).collect()
    }

    proptest! {
        #[test]
        fn it_is_what_looking_for_each_block_would_find(
            chain in prop::collection::vec((0u32..40, prop::collection::btree_set(0u32..40, 0..20)), 1..5),
            full in 0u32..40, rest in 0..BLOCK,
        ) {
            let chain: Vec<_> =
                chain.into_iter().map(|(length, blocks)| header(length, &Vec::from_iter(blocks))).collect();
            let merge = Merge::new(&chain[0], &chain[1..], u64::from(full) * BLOCK + rest);
            let mut found = Vec::new();
            for run in merge.runs() {
                prop_assert_eq!(run.first_block as usize, found.len());
                prop_assert!(run.count > 0);
                found.extend((0..u64::from(run.count)).map(|n| match run.source {
                    BlockSource::Zero => None,
                    BlockSource::File { index, offset } => Some((index, offset / BLOCK + n)),
                }));
            }
            prop_assert_eq!(found, naive(&chain, full));
            // As few as there can be.
            let is_shortest = merge.runs().windows(2).all(|pair| !pair[0].goes_on_with(pair[1].source));
            prop_assert!(is_shortest);
        }
    }
}
