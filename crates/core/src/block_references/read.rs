//! Reads a WAL summary: a block reference table as `WriteBlockRefTable` writes it.
//!
//! All integers are of the server's byte order, which is little-endian here. A magic number; for each fork 24 bytes
//! with its locator, number, limit block and number of chunks, then how much each chunk has in 16-bit words, then
//! the words: offsets of changed blocks, or 4,096 words of bitmap; 24 zero bytes; the CRC32C of all before it.

use std::io::{self, ErrorKind, Read};

use super::{
    BlockReferences, RelationFork,
    chunk::{BITMAP_BYTES, Chunk, MAX_OFFSETS},
};
use crate::{data_directory::Fork, le};

const MAGIC: u32 = 0x652B_137B;

/// Bytes of `BlockRefTableSerializedEntry`.
const ENTRY_BYTES: usize = 24;

/// Chunks that 2^32 blocks make.
const MAX_CHUNKS: usize = 1 << 16;

/// `InvalidBlockNumber`: the fork was never cut.
const NO_LIMIT: u32 = u32::MAX;

/// Why something is no WAL summary that can be trusted.
#[derive(Debug, thiserror::Error)]
pub enum SummaryError {
    /// It can't be read.
    #[error("the WAL summary can't be read: {0}")]
    Io(#[source] io::Error),
    /// It ends before its end.
    #[error("the WAL summary is cut off")]
    CutOff,
    /// It doesn't begin as a summary does.
    #[error("this is no WAL summary: it begins with {0:08X} instead of {MAGIC:08X}")]
    Magic(u32),
    /// It has what no server writes.
    #[error("the WAL summary is damaged: it has {found} for {field}")]
    Value {
        /// The field's name in PostgreSQL.
        field: &'static str,
        /// What it holds.
        found: u32,
    },
    /// Its content isn't what was written.
    #[error("the WAL summary is damaged: its checksum is {found:08X}, its content's is {computed:08X}")]
    Checksum {
        /// The checksum in the file.
        found: u32,
        /// The checksum of what is in the file.
        computed: u32,
    },
    /// Something follows its end.
    #[error("the WAL summary goes on after its end")]
    TooLong,
}

/// Keeps the checksum of what was read.
struct Checked<R> {
    source: R,
    crc: u32,
}

impl<R: Read> Checked<R> {
    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), SummaryError> {
        self.source.read_exact(buffer).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => SummaryError::CutOff,
            _ => SummaryError::Io(error),
        })?;
        self.crc = crc32c::crc32c_append(self.crc, buffer);
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], SummaryError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn words(&mut self, buffer: &mut Vec<u8>, count: usize) -> Result<Vec<u16>, SummaryError> {
        buffer.resize(count * 2, 0);
        self.fill(buffer)?;
        Ok(buffer.as_chunks().0.iter().map(|bytes| u16::from_le_bytes(*bytes)).collect())
    }
}

/// Merges a whole summary into what is known.
pub(super) fn summary(source: impl Read, into: &mut BlockReferences) -> Result<(), SummaryError> {
    let mut source = Checked { source, crc: 0 };
    let magic = u32::from_le_bytes(source.array()?);
    if magic != MAGIC {
        return Err(SummaryError::Magic(magic));
    }
    let mut buffer = Vec::new();
    loop {
        let entry: [u8; ENTRY_BYTES] = source.array()?;
        if entry == [0; ENTRY_BYTES] {
            break;
        }
        fork(&mut source, &entry, &mut buffer, into)?;
    }
    let computed = source.crc;
    let found = u32::from_le_bytes(source.array()?);
    if found != computed {
        return Err(SummaryError::Checksum { found, computed });
    }
    match source.array::<1>() {
        Err(SummaryError::CutOff) => Ok(()),
        Err(error) => Err(error),
        Ok(_) => Err(SummaryError::TooLong),
    }
}

fn fork(
    source: &mut Checked<impl Read>,
    entry: &[u8; ENTRY_BYTES],
    buffer: &mut Vec<u8>,
    into: &mut BlockReferences,
) -> Result<(), SummaryError> {
    let field = |number: usize| le::u32_at(entry, number * 4).ok_or(SummaryError::CutOff);
    let wrong = |field, found| SummaryError::Value { field, found };
    let fork = fork_of_number(field(3)?).ok_or(wrong("forknum", field(3)?))?;
    let name = RelationFork { tablespace: field(0)?, database: field(1)?, number: field(2)?, fork };
    let references = into.fork(name);
    let limit = field(4)?;
    if limit != NO_LIMIT {
        references.set_limit_block(limit);
    }
    let chunks = usize::try_from(field(5)?).ok().filter(|chunks| *chunks <= MAX_CHUNKS);
    let usage = source.words(buffer, chunks.ok_or(wrong("nchunks", field(5)?))?)?;
    for (number, used) in (0..=u16::MAX).zip(usage) {
        let chunk = match usize::from(used) {
            MAX_OFFSETS => Chunk::from_bitmap(&source.array::<BITMAP_BYTES>()?),
            offsets if offsets < MAX_OFFSETS => Chunk::from_offsets(source.words(buffer, offsets)?),
            _ => return Err(wrong("chunk_usage", used.into())),
        };
        references.add(number, chunk);
    }
    Ok(())
}

/// `ForkNumber`
fn fork_of_number(number: u32) -> Option<Fork> {
    Some(match number {
        0 => Fork::Main,
        1 => Fork::FreeSpaceMap,
        2 => Fork::VisibilityMap,
        3 => Fork::Init,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FORK: RelationFork = RelationFork { tablespace: 1663, database: 5, number: 16400, fork: Fork::Main };

    /// An entry of [`FORK`].
    fn entry(fork: u32, limit: u32, chunks: &[Vec<u16>]) -> Vec<u8> {
        let count = u32::try_from(chunks.len()).unwrap();
        let mut bytes: Vec<u8> =
            [1663, 5, 16400, fork, limit, count].iter().flat_map(|field: &u32| field.to_le_bytes()).collect();
        bytes.extend(chunks.iter().flat_map(|words| u16::try_from(words.len()).unwrap().to_le_bytes()));
        bytes.extend(chunks.iter().flatten().flat_map(|word| word.to_le_bytes()));
        bytes
    }

    fn sealed(entries: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = MAGIC.to_le_bytes().to_vec();
        bytes.extend(entries.concat());
        bytes.extend([0; ENTRY_BYTES]);
        bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
        bytes
    }

    fn read(bytes: &[u8]) -> Result<BlockReferences, SummaryError> {
        BlockReferences::default().merge_summary(bytes)
    }

    fn blocks(references: &BlockReferences) -> Vec<u32> {
        references.get(&FORK).unwrap().blocks(0..u32::MAX).collect()
    }

    #[test]
    fn a_summary_tells_changed_blocks_and_truncations() {
        let mut bitmap = vec![0; MAX_OFFSETS];
        bitmap[1] = 0b1001;
        let older = sealed(&[entry(0, NO_LIMIT, &[vec![7, 3], vec![], bitmap.clone()]), entry(2, 0, &[])]);
        let older = read(&older).unwrap();
        assert_eq!(blocks(&older), [3, 7, (2 << 16) + 16, (2 << 16) + 19]);
        assert_eq!(older.get(&FORK).unwrap().limit_block(), None);
        let map = older.get(&RelationFork { fork: Fork::VisibilityMap, ..FORK }).unwrap();
        assert_eq!((map.limit_block(), map.blocks(0..u32::MAX).count()), (Some(0), 0));

        let newer = sealed(&[entry(0, 5, &[vec![1000]])]);
        let both = older.merge_summary(newer.as_slice()).unwrap();
        assert_eq!(blocks(&both), [3, 1000]);
        assert_eq!(both.get(&FORK).unwrap().limit_block(), Some(5));
        assert!(read(&sealed(&[])).unwrap().is_empty());
    }

    #[test]
    fn what_no_server_writes_is_refused() {
        let whole = sealed(&[entry(0, NO_LIMIT, &[vec![7, 3]])]);
        let mut other_magic = whole.clone();
        other_magic[0] = 0;
        let mut too_many_chunks = sealed(&[entry(0, 0, &[])]);
        too_many_chunks[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
        let mut flipped = whole.clone();
        flipped[4 + ENTRY_BYTES + 2] ^= 1;
        let too_long = [whole.as_slice(), &[0]].concat();
        let told = |bytes: &[u8]| read(bytes).unwrap_err().to_string();
        let texts = [
            told(&other_magic),
            told(&sealed(&[entry(4, NO_LIMIT, &[])])),
            told(&sealed(&[entry(0, NO_LIMIT, &[vec![0; MAX_OFFSETS + 1]])])),
            told(&too_many_chunks),
            told(&flipped),
            told(&too_long),
        ];
        insta::assert_snapshot!(texts.join("\n"), @r"
        this is no WAL summary: it begins with 652B1300 instead of 652B137B
        the WAL summary is damaged: it has 4 for forknum
        the WAL summary is damaged: it has 4097 for chunk_usage
        the WAL summary is damaged: it has 4294967295 for nchunks
        the WAL summary is damaged: its checksum is 21750D58, its content's is 8360866C
        the WAL summary goes on after its end
        ");
        for cut in 0..whole.len() {
            assert!(matches!(read(&whole[..cut]), Err(SummaryError::CutOff)), "{cut}");
        }
    }

    #[test]
    fn a_source_that_fails_is_no_end() {
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::other("no disk"))
            }
        }
        let error = BlockReferences::default().merge_summary(Broken).unwrap_err();
        assert_eq!(error.to_string(), "the WAL summary can't be read: no disk");
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let with_magic = [MAGIC.to_le_bytes().as_slice(), &bytes].concat();
            prop_assert!(read(&bytes).is_err() && read(&with_magic).is_err());
        }

        #[test]
        fn any_damage_is_found(
            chunks in prop::collection::vec(prop::collection::vec(any::<u16>(), 0..20), 0..5),
            limit: u32, at: prop::sample::Index, change in 1u8..,
        ) {
            let whole = sealed(&[entry(0, limit, &chunks), entry(1, 0, &chunks)]);
            prop_assert!(read(&whole).is_ok());
            let mut damaged = whole;
            let at = at.index(damaged.len());
            damaged[at] ^= change;
            prop_assert!(read(&damaged).is_err());
        }
    }
}
