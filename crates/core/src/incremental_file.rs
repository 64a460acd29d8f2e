//! The files in which PostgreSQL's incremental backups keep the changed blocks of a relation's file.
//!
//! `INCREMENTAL.16400` stands for `16400`: a header that tells which blocks it has, then these blocks. pg_combinebackup
//! of 17 and later reads them. All numbers count blocks of [`PAGE_SIZE`] from the beginning of the file, not of the
//! fork. Sources: `GetIncrementalHeaderSize` and its neighbours in `basebackup_incremental.c`, `sendFile` in
//! `basebackup.c`, `make_incremental_rfile` in `reconstruct.c`.

use std::io::{self, ErrorKind, Read};

use crate::page::PAGE_SIZE;

const MAGIC: u32 = 0xD3AE_1F0D;

/// Bytes before the block numbers: the magic number, how many blocks, the truncation block length.
const FIXED_BYTES: u64 = 12;

const BLOCK: u64 = PAGE_SIZE as u64;

/// What the names of incremental files begin with, in place of a directory's own files.
pub const INCREMENTAL_PREFIX: &str = "INCREMENTAL.";

/// The path of the incremental file for the relation's file at this path: `base/5/INCREMENTAL.16400.1` for
/// `base/5/16400.1`.
pub fn incremental_path(path: &str) -> String {
    let (directory, name) = path.split_at(path.rfind('/').map_or(0, |slash| slash + 1));
    format!("{directory}{INCREMENTAL_PREFIX}{name}")
}

/// The path of the file that the incremental file at this path stands for; `None` if it is none by its name.
pub fn path_of_incremental(path: &str) -> Option<String> {
    let (directory, name) = path.split_at(path.rfind('/').map_or(0, |slash| slash + 1));
    let name = name.strip_prefix(INCREMENTAL_PREFIX).filter(|name| !name.is_empty())?;
    Some(format!("{directory}{name}"))
}

/// Which blocks an incremental file has, and what of older backups still counts.
///
/// Neither it nor what is read into it ever holds more blocks than a relation's file does: half a megabyte.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct IncrementalHeader {
    truncation_block_length: u32,
    /// Strictly ascending.
    blocks: Vec<u32>,
}

/// Why something is no header of an incremental file.
#[derive(Debug, thiserror::Error)]
pub enum IncrementalHeaderError {
    /// It can't be read.
    #[error("the incremental file can't be read: {0}")]
    Io(#[source] io::Error),
    /// It ends within the header.
    #[error("the incremental file is cut off within its header")]
    CutOff,
    /// It doesn't begin as an incremental file does.
    #[error("this is no incremental file: it begins with {0:08X} instead of {MAGIC:08X}")]
    Magic(u32),
    /// It has more of something than a relation's file can have.
    #[error("the incremental file has {found} for its {field}, but a relation's file has at most {limit} blocks")]
    TooLarge {
        /// Of what.
        field: &'static str,
        /// How many.
        found: u64,
        /// `RELSEG_SIZE`
        limit: u32,
    },
    /// Its block numbers don't ascend.
    #[error("the incremental file has block {next} after block {previous}")]
    Order {
        /// A block.
        previous: u32,
        /// The next one, which isn't behind it.
        next: u32,
    },
}

impl IncrementalHeader {
    /// The header of a file with these blocks, in the order in which they follow it.
    ///
    /// `truncation_block_length` is the least length of the file that is made from it, in blocks: those before it
    /// that are not among `blocks` come from older backups. `segment_blocks` is `RELSEG_SIZE`
    /// ([`ControlFile::relation_segment_blocks`](crate::ControlFile::relation_segment_blocks)).
    ///
    /// # Errors
    ///
    /// The blocks don't ascend, or a number is beyond what a file can have.
    pub fn new(
        truncation_block_length: u32,
        blocks: Vec<u32>,
        segment_blocks: u32,
    ) -> Result<IncrementalHeader, IncrementalHeaderError> {
        let limit = segment_blocks;
        if truncation_block_length > limit {
            let found = truncation_block_length.into();
            return Err(IncrementalHeaderError::TooLarge { field: "truncation block length", found, limit });
        }
        if let Some(pair) = blocks.windows(2).find(|pair| pair[0] >= pair[1]) {
            return Err(IncrementalHeaderError::Order { previous: pair[0], next: pair[1] });
        }
        match blocks.last() {
            Some(last) if *last >= limit => {
                let found = u64::from(*last) + 1;
                Err(IncrementalHeaderError::TooLarge { field: "length with its last block", found, limit })
            }
            _ => Ok(IncrementalHeader { truncation_block_length, blocks }),
        }
    }

    /// The least length of the file that is made from it, in blocks.
    pub fn truncation_block_length(&self) -> u32 {
        self.truncation_block_length
    }

    /// The blocks that the file has, ascending.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// The length in blocks of the file that is made from it: as far as its blocks reach, if that is further than
    /// the truncation block length.
    pub fn output_blocks(&self) -> u32 {
        self.blocks.last().map_or(0, |last| last + 1).max(self.truncation_block_length)
    }

    /// Length of the header in bytes. It is filled up to whole blocks, but only if blocks follow.
    pub fn header_length(&self) -> u64 {
        let length = FIXED_BYTES + 4 * self.blocks.len() as u64;
        if self.blocks.is_empty() { length } else { length.next_multiple_of(BLOCK) }
    }

    /// Length of the whole file in bytes.
    pub fn file_length(&self) -> u64 {
        self.header_length() + BLOCK * self.blocks.len() as u64
    }

    /// Where in the file the block lies that is `index` in [`blocks`](IncrementalHeader::blocks), in bytes.
    pub fn block_offset(&self, index: usize) -> u64 {
        self.header_length() + BLOCK * index as u64
    }

    /// The header as it stands in the file, filled up: what comes before the first block.
    pub fn to_bytes(&self) -> Vec<u8> {
        // As many as fit a file, whose length in blocks is 32 bits.
        let count = u32::try_from(self.blocks.len()).unwrap_or(u32::MAX);
        let numbers = [MAGIC, count, self.truncation_block_length];
        let mut bytes: Vec<u8> = numbers.iter().chain(&self.blocks).flat_map(|number| number.to_le_bytes()).collect();
        if !self.blocks.is_empty() {
            bytes.resize(bytes.len().next_multiple_of(PAGE_SIZE), 0);
        }
        bytes
    }

    /// Reads a header with what fills it up: the first block is next in `source`, if there is one. `segment_blocks`
    /// is as for [`new`](IncrementalHeader::new). The blocks themselves aren't looked at, nor whether there are as
    /// many: compare [`file_length`](IncrementalHeader::file_length).
    ///
    /// # Errors
    ///
    /// See [`IncrementalHeaderError`].
    pub fn read(source: &mut impl Read, segment_blocks: u32) -> Result<IncrementalHeader, IncrementalHeaderError> {
        let mut fixed = [0; 12];
        fill(source, &mut fixed)?;
        let [magic, count, truncation_block_length] = numbers(&fixed);
        if magic != MAGIC {
            return Err(IncrementalHeaderError::Magic(magic));
        }
        // Before anything is allocated.
        if count > segment_blocks {
            let (found, limit) = (count.into(), segment_blocks);
            return Err(IncrementalHeaderError::TooLarge { field: "number of blocks", found, limit });
        }
        let mut blocks = Vec::new();
        let mut page = [0; PAGE_SIZE];
        let mut left = u64::from(count) * 4;
        while left > 0 {
            let length = usize::try_from(left).unwrap_or(usize::MAX).min(PAGE_SIZE);
            fill(source, &mut page[..length])?;
            blocks.extend(page[..length].as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)));
            left -= length as u64;
        }
        let header = IncrementalHeader::new(truncation_block_length, blocks, segment_blocks)?;
        let filling = header.header_length() - FIXED_BYTES - 4 * u64::from(count);
        // Less than a block.
        fill(source, &mut page[..usize::try_from(filling).unwrap_or(PAGE_SIZE)])?;
        Ok(header)
    }
}

fn numbers(bytes: &[u8; 12]) -> [u32; 3] {
    let (numbers, _) = bytes.as_chunks::<4>();
    [numbers[0], numbers[1], numbers[2]].map(u32::from_le_bytes)
}

fn fill(source: &mut impl Read, buffer: &mut [u8]) -> Result<(), IncrementalHeaderError> {
    source.read_exact(buffer).map_err(|error| match error.kind() {
        ErrorKind::UnexpectedEof => IncrementalHeaderError::CutOff,
        _ => IncrementalHeaderError::Io(error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SEGMENT: u32 = 131_072;

    fn read(bytes: &[u8]) -> Result<IncrementalHeader, IncrementalHeaderError> {
        IncrementalHeader::read(&mut &*bytes, SEGMENT)
    }

    #[test]
    fn a_name_is_marked_within_its_directory() {
        for (plain, marked) in [
            ("base/5/16400.1", "base/5/INCREMENTAL.16400.1"),
            ("pg_tblspc/1/PG_17_202406281/5/16400_fsm", "pg_tblspc/1/PG_17_202406281/5/INCREMENTAL.16400_fsm"),
            ("16400", "INCREMENTAL.16400"),
        ] {
            assert_eq!(incremental_path(plain), marked);
            assert_eq!(path_of_incremental(marked).as_deref(), Some(plain));
            assert_eq!(path_of_incremental(plain), None);
        }
        assert_eq!(path_of_incremental("base/INCREMENTAL.5/1"), None);
        assert_eq!(path_of_incremental("base/5/INCREMENTAL."), None);
    }

    #[test]
    fn a_header_without_blocks_is_not_filled_up() {
        let header = IncrementalHeader::new(3, vec![], SEGMENT).unwrap();
        assert_eq!(header.to_bytes(), b"\x0d\x1f\xae\xd3\0\0\0\0\x03\0\0\0");
        assert_eq!((header.header_length(), header.file_length(), header.output_blocks()), (12, 12, 3));
    }

    #[test]
    fn a_header_with_blocks_fills_whole_blocks() {
        let header = IncrementalHeader::new(3, vec![1, 7], SEGMENT).unwrap();
        let bytes = header.to_bytes();
        assert_eq!(bytes[..20], *b"\x0d\x1f\xae\xd3\x02\0\0\0\x03\0\0\0\x01\0\0\0\x07\0\0\0");
        assert!(bytes.len() == 8192 && bytes[20..].iter().all(|byte| *byte == 0));
        assert_eq!((header.file_length(), header.output_blocks()), (3 * 8192, 8));
        assert_eq!(header.block_offset(1), 2 * 8192);
        // 2,045 numbers fill the first block to its end, and one more begins the next.
        for (count, length) in [(2045, 8192), (2046, 16_384)] {
            let header = IncrementalHeader::new(0, (0..count).collect(), SEGMENT).unwrap();
            assert_eq!((header.header_length(), header.to_bytes().len() as u64), (length, length));
        }
    }

    #[test]
    fn what_no_file_can_have_is_refused() {
        let bytes = |numbers: &[u32]| numbers.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>();
        let told = |numbers: &[u32]| read(&bytes(numbers)).unwrap_err().to_string();
        let texts = [
            told(&[1, 0, 0]),
            told(&[MAGIC, u32::MAX, 0]),
            told(&[MAGIC, 0, SEGMENT + 1]),
            told(&[MAGIC, 1, 0, SEGMENT]),
            told(&[MAGIC, 2, 0, 7, 7]),
            told(&[MAGIC, 2, 0, 7]),
        ];
        insta::assert_snapshot!(texts.join("\n"), @r"
        this is no incremental file: it begins with 00000001 instead of D3AE1F0D
        the incremental file has 4294967295 for its number of blocks, but a relation's file has at most 131072 blocks
        the incremental file has 131073 for its truncation block length, but a relation's file has at most 131072 blocks
        the incremental file has 131073 for its length with its last block, but a relation's file has at most 131072 blocks
        the incremental file has block 7 after block 7
        the incremental file is cut off within its header
        ");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(
            blocks in prop::collection::btree_set(0..SEGMENT, 0..5_000), length in 0..=SEGMENT, cut in any::<prop::sample::Index>(),
        ) {
            let header = IncrementalHeader::new(length, blocks.into_iter().collect(), SEGMENT).unwrap();
            let mut bytes = header.to_bytes();
            prop_assert_eq!(bytes.len() as u64, header.header_length());
            let cut = cut.index(bytes.len());
            let is_cut_off = matches!(read(&bytes[..cut]), Err(IncrementalHeaderError::CutOff));
            prop_assert!(is_cut_off);
            bytes.extend(b"next");
            let mut source = bytes.as_slice();
            prop_assert_eq!(IncrementalHeader::read(&mut source, SEGMENT).unwrap(), header);
            prop_assert_eq!(source, b"next");
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let with_magic = [MAGIC.to_le_bytes().as_slice(), &bytes].concat();
            let short = |result: Result<IncrementalHeader, _>| result.map_or(0, |header| header.blocks().len());
            prop_assert!(short(read(&bytes)) == 0 && short(read(&with_magic)) < 100);
        }
    }
}
