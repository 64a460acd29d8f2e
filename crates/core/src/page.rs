//! Data pages and their checksums: whether a page that was read from a running server is damaged.
//!
//! Sources: `src/include/storage/bufpage.h` for the header, `checksum_impl.h` for the algorithm, and for what is
//! looked at in a backup `verify_page_checksum` in `basebackup.c`. Only pages of 8,192 bytes, as every packaged
//! PostgreSQL has them ([`ControlFile::block_size`](crate::ControlFile::block_size) tells), on little-endian
//! machines. All forks of a relation carry such pages, the maps as well as indexes and sequences; other files of a
//! data directory don't.

use crate::Lsn;

/// Length of a page in bytes (`BLCKSZ`).
pub const PAGE_SIZE: usize = 8192;

/// The columns that are summed up side by side (`N_SUMS`).
const LANES: usize = 32;

const ROW_BYTES: usize = LANES * 4;

/// The 32-bit FNV prime.
const FNV_PRIME: u32 = 16_777_619;

/// What each column begins with (`checksumBaseOffsets`).
const BASE_OFFSETS: [u32; LANES] = [
    0x5B1F_36E9,
    0xB852_5960,
    0x02AB_50AA,
    0x1DE6_6D2A,
    0x79FF_467A,
    0x9BB9_F8A3,
    0x217E_7CD2,
    0x83E1_3D2C,
    0xF8D4_474F,
    0xE39E_B970,
    0x42C6_AE16,
    0x9932_16FA,
    0x7B09_3B5D,
    0x98DA_FF3C,
    0xF718_902A,
    0x0B1C_9CDB,
    0xE58F_764B,
    0x1876_36BC,
    0x5D7B_3BB1,
    0xE73D_E7DE,
    0x92BE_C979,
    0xCCA6_C0B2,
    0x304A_0979,
    0x85AA_43D4,
    0x7831_25BB,
    0x6CA8_EAA2,
    0xE407_EAC6,
    0x4B5C_FC3E,
    0x9FBF_8C76,
    0x15CA_20BE,
    0xF2CA_9FD3,
    0x959B_D756,
];

/// The checksum that the page has to carry as block `block` of its fork (`pg_checksum_page`): counted from the
/// fork's beginning, not the file's, `segment * RELSEG_SIZE + n`. Never 0. The checksum that the page carries
/// doesn't matter.
pub fn page_checksum(page: &[u8; PAGE_SIZE], block: u32) -> u16 {
    let (rows, _) = page.as_chunks::<ROW_BYTES>();
    let mut sums = BASE_OFFSETS;
    for (number, row) in rows.iter().enumerate() {
        let mut values = words(row);
        if number == 0 {
            // pd_checksum counts as 0; the upper half of this word is pd_flags.
            values[2] &= 0xFFFF_0000;
        }
        add(&mut sums, &values);
    }
    for _ in 0..2 {
        add(&mut sums, &[0; LANES]);
    }
    let sum = sums.iter().fold(block, |folded, sum| folded ^ sum);
    // The remainder is at most 65,534.
    u16::try_from(sum % 65_535).map_or(u16::MAX, |remainder| remainder + 1)
}

fn words(row: &[u8; ROW_BYTES]) -> [u32; LANES] {
    let (bytes, _) = row.as_chunks::<4>();
    let mut words = [0; LANES];
    for (word, bytes) in words.iter_mut().zip(bytes) {
        *word = u32::from_le_bytes(*bytes);
    }
    words
}

// A plain loop over arrays of known length: the compiler makes vectors of it.
#[inline(always)]
fn add(sums: &mut [u32; LANES], values: &[u32; LANES]) {
    for (sum, value) in sums.iter_mut().zip(values) {
        let mixed = *sum ^ value;
        *sum = mixed.wrapping_mul(FNV_PRIME) ^ (mixed >> 17);
    }
}

/// What stands at the beginning of each page (`PageHeaderData`), as it is: nothing is checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageHeader {
    /// `pd_lsn`: the end of the WAL record that changed the page last; 0/0 if none did.
    pub lsn: Lsn,
    /// `pd_checksum`: meaningless in a cluster without checksums.
    pub checksum: u16,
    /// `pd_flags`
    pub flags: u16,
    /// `pd_lower`: where the free space begins, in bytes.
    pub lower: u16,
    /// `pd_upper`: where the free space ends, in bytes. 0 if the page was never initialized.
    pub upper: u16,
    /// `pd_special`: where the special space begins, in bytes.
    pub special: u16,
    /// `pd_pagesize_version`: the page's length in bytes plus the version of its layout, 4 since 8.3.
    pub size_and_version: u16,
    /// `pd_prune_xid`
    pub prune_xid: u32,
}

impl PageHeader {
    /// The header of this page.
    pub fn of(page: &[u8; PAGE_SIZE]) -> PageHeader {
        let u16_at = |at: usize| u16::from_le_bytes([page[at], page[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        PageHeader {
            // Its upper half comes first, on any machine.
            lsn: Lsn::new(u64::from(u32_at(0)) << 32 | u64::from(u32_at(4))),
            checksum: u16_at(8),
            flags: u16_at(10),
            lower: u16_at(12),
            upper: u16_at(14),
            special: u16_at(16),
            size_and_version: u16_at(18),
            prune_xid: u32_at(20),
        }
    }
}

/// What a backup makes of a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PageState {
    /// All zero: the relation was extended by it, and nothing put there yet.
    New,
    /// Changed since the backup began. It may have been read while it was written, and recovery writes it anew
    /// from the WAL anyway.
    Skipped,
    /// Its checksum is right.
    Good,
    /// Its checksum is wrong: it is damaged, or it was read while it was written for the first time since the
    /// backup began, so that the old LSN came with new content. Only one that stays like this when it is read
    /// again is damaged.
    Bad {
        /// Of what the page holds.
        expected: u16,
        /// What the page says (`pd_checksum`).
        found: u16,
    },
    /// It says that it was never initialized (`pd_upper` is 0), but isn't all zero. As with
    /// [`Bad`](PageState::Bad), only what stays so is damage. The server's own backup lets such a page pass, which
    /// hides a page whose first half was lost; but reading it the server would refuse it (`PageIsVerified`).
    NotEmpty,
}

/// Checks the page that was read as block `block` of its fork ([`page_checksum`]) by a backup that began at
/// `backup_start`, in a cluster with checksums.
///
/// A page whose damage hit its LSN so that it seems newer than the backup is skipped: nobody can tell it from one
/// that is newer.
pub fn check_page(page: &[u8; PAGE_SIZE], block: u32, backup_start: Lsn) -> PageState {
    let header = PageHeader::of(page);
    if header.upper == 0 && page.iter().all(|byte| *byte == 0) {
        return PageState::New;
    }
    if header.lsn >= backup_start {
        return PageState::Skipped;
    }
    if header.upper == 0 {
        return PageState::NotEmpty;
    }
    match page_checksum(page, block) {
        expected if expected == header.checksum => PageState::Good,
        expected => PageState::Bad { expected, found: header.checksum },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Block 1 of pg_attribute, as initdb of a server 15 wrote it.
    const OF_15: &[u8; PAGE_SIZE] = include_bytes!("../tests/fixtures/page-15");
    /// Block 2 of the same table of a server 17.
    const OF_17: &[u8; PAGE_SIZE] = include_bytes!("../tests/fixtures/page-17");

    fn later(lsn: Lsn) -> Lsn {
        Lsn::new(lsn.bytes() + 1)
    }

    #[test]
    fn pages_of_real_servers_are_good() {
        for (page, block, checksum, lsn) in [(OF_15, 1, 39_361, "0/14E8678"), (OF_17, 2, 11_632, "0/14DCDC8")] {
            let header = PageHeader::of(page);
            assert_eq!((header.checksum, header.size_and_version), (checksum, 8192 + 4));
            assert_eq!(header.special, 8192);
            assert!(header.lower < header.upper && header.upper < header.special);
            assert_eq!((header.flags, header.prune_xid), (4, 0));
            assert_eq!(page_checksum(page, block), checksum);
            let lsn: Lsn = lsn.parse().unwrap();
            assert_eq!(header.lsn, lsn);
            assert_eq!(check_page(page, block, later(lsn)), PageState::Good);
            assert_eq!(check_page(page, block, lsn), PageState::Skipped);
        }
    }

    #[test]
    fn a_page_that_lies_elsewhere_is_bad() {
        let expected = page_checksum(OF_15, 2);
        let state = check_page(OF_15, 2, Lsn::new(u64::MAX));
        assert_eq!(state, PageState::Bad { expected, found: 39_361 });
        assert_ne!(expected, 39_361);
    }

    #[test]
    fn an_empty_page_is_new_whenever_the_backup_began() {
        for start in [Lsn::INVALID, Lsn::new(u64::MAX)] {
            assert_eq!(check_page(&[0; PAGE_SIZE], 7, start), PageState::New);
        }
    }

    #[test]
    fn a_page_that_lost_its_beginning_is_not_new() {
        let mut page = *OF_15;
        page[..4096].fill(0);
        assert_eq!(check_page(&page, 1, Lsn::new(1)), PageState::NotEmpty);
    }

    // A checksum of 16 bits can't find all: one change of 65,535 gives the same remainder. Of this page's bits as few.
    #[test]
    fn a_flipped_bit_is_found() {
        let mut page = *OF_17;
        let mut unfound = 0;
        // 5 and 64 have no common divisor: each bit of a word has its turn.
        for bit in (8 * 8..8 * PAGE_SIZE).step_by(5) {
            page[bit / 8] ^= 1 << (bit % 8);
            unfound += u32::from(!matches!(check_page(&page, 2, Lsn::new(u64::MAX)), PageState::Bad { .. }));
            page[bit / 8] ^= 1 << (bit % 8);
        }
        assert!(unfound <= 2, "{unfound} of 13,094 flipped bits are not found");
    }
}
