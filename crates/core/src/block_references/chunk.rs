//! 2^16 successive blocks of a fork, of which some were changed.

/// As many bits as a chunk has blocks.
const BITMAP_WORDS: usize = 1 << 10;

/// From here on a bitmap takes no more than the offsets would (`MAX_ENTRIES_PER_CHUNK`).
pub(super) const MAX_OFFSETS: usize = 1 << 12;

/// Bytes of a bitmap.
pub(super) const BITMAP_BYTES: usize = 1 << 13;

/// The changed blocks' places in the chunk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Chunk {
    /// Ascending, fewer than [`MAX_OFFSETS`].
    Offsets(Vec<u16>),
    /// A bit for each block, the first the lowest.
    Bitmap(Box<[u64; BITMAP_WORDS]>),
}

impl Chunk {
    /// The offsets in any order, also more than once.
    pub(super) fn from_offsets(mut offsets: Vec<u16>) -> Chunk {
        offsets.sort_unstable();
        offsets.dedup();
        if offsets.len() < MAX_OFFSETS {
            offsets.shrink_to_fit();
            return Chunk::Offsets(offsets);
        }
        let mut bitmap = empty_bitmap();
        set_all(&mut bitmap, &offsets);
        Chunk::Bitmap(bitmap)
    }

    /// A bitmap as a summary has it: words of 16 bits, little-endian.
    pub(super) fn from_bitmap(bytes: &[u8; BITMAP_BYTES]) -> Chunk {
        let mut bitmap = empty_bitmap();
        for (word, bytes) in bitmap.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        Chunk::Bitmap(bitmap)
    }

    pub(super) fn is_empty(&self) -> bool {
        match self {
            Chunk::Offsets(offsets) => offsets.is_empty(),
            Chunk::Bitmap(bitmap) => bitmap.iter().all(|word| *word == 0),
        }
    }

    /// Adds what another chunk has.
    pub(super) fn add(&mut self, other: Chunk) {
        match (&mut *self, other) {
            (Chunk::Offsets(_), Chunk::Bitmap(mut bitmap)) => {
                if let Chunk::Offsets(offsets) = self {
                    set_all(&mut bitmap, offsets);
                }
                *self = Chunk::Bitmap(bitmap);
            }
            (Chunk::Offsets(offsets), Chunk::Offsets(others)) => {
                let mut offsets = std::mem::take(offsets);
                offsets.extend(others);
                *self = Chunk::from_offsets(offsets);
            }
            (Chunk::Bitmap(bitmap), Chunk::Offsets(offsets)) => set_all(bitmap, &offsets),
            (Chunk::Bitmap(bitmap), Chunk::Bitmap(other)) => {
                bitmap.iter_mut().zip(other.iter()).for_each(|(word, other)| *word |= other);
            }
        }
    }

    /// Forgets the blocks from this place on.
    pub(super) fn truncate(&mut self, limit: u16) {
        match self {
            Chunk::Offsets(offsets) => offsets.truncate(offsets.partition_point(|offset| *offset < limit)),
            Chunk::Bitmap(bitmap) => {
                let (word, bit) = place(limit);
                bitmap[word] &= bit - 1;
                bitmap[word + 1..].fill(0);
            }
        }
    }

    /// Ascending.
    pub(super) fn offsets(&self) -> impl Iterator<Item = u16> {
        let (offsets, bitmap): (&[u16], Option<_>) = match self {
            Chunk::Offsets(offsets) => (offsets, None),
            Chunk::Bitmap(bitmap) => (&[], Some(bitmap)),
        };
        let set = bitmap.into_iter().flat_map(|bitmap| {
            (0..=u16::MAX).filter(|offset| {
                let (word, bit) = place(*offset);
                bitmap[word] & bit != 0
            })
        });
        offsets.iter().copied().chain(set)
    }
}

fn empty_bitmap() -> Box<[u64; BITMAP_WORDS]> {
    Box::new([0; BITMAP_WORDS])
}

fn set_all(bitmap: &mut [u64; BITMAP_WORDS], offsets: &[u16]) {
    for offset in offsets {
        let (word, bit) = place(*offset);
        bitmap[word] |= bit;
    }
}

/// The word and the bit in it.
fn place(offset: u16) -> (usize, u64) {
    (usize::from(offset >> 6), 1 << (offset & 63))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_offsets_become_a_bitmap() {
        let mut chunk = Chunk::from_offsets((0..4095).rev().chain(0..10).collect());
        assert!(matches!(&chunk, Chunk::Offsets(offsets) if offsets.len() == 4095));
        chunk.add(Chunk::from_offsets(vec![u16::MAX]));
        assert!(matches!(chunk, Chunk::Bitmap(_)));
        assert!(chunk.offsets().eq((0..4095).chain([u16::MAX])));
        chunk.truncate(64);
        assert!(chunk.offsets().eq(0..64));
        chunk.truncate(0);
        assert!(chunk.is_empty());
    }

    #[test]
    fn a_bitmap_has_the_lowest_block_in_the_lowest_bit() {
        let mut bytes = [0; BITMAP_BYTES];
        (bytes[0], bytes[3], bytes[BITMAP_BYTES - 1]) = (0b101, 1, 0x80);
        let mut chunk = Chunk::from_offsets(vec![7, 2]);
        chunk.add(Chunk::from_bitmap(&bytes));
        assert!(chunk.offsets().eq([0, 2, 7, 24, u16::MAX]));
        let mut twice = Chunk::from_bitmap(&[0; BITMAP_BYTES]);
        twice.add(Chunk::from_bitmap(&bytes));
        twice.add(Chunk::from_offsets(vec![7]));
        assert_eq!(twice, chunk);
    }
}
