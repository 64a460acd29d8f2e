//! Reading the files of a living server.
//!
//! Two things are owed to it. Its page cache stays as it was: what a backup brings in would push out what the database
//! works with, and would count against the container's memory limit. So each piece is first asked for without waiting
//! (`RWF_NOWAIT`), which only gives what is in the cache already; what had to come from the disk is dropped again. Where
//! the file system can't answer that, nothing is dropped: what isn't ours mustn't go.
//!
//! And a page that is written while it's read comes torn. In a database with checksums each page is checked; one that
//! is wrong is read again, and only what stays wrong is damage.

use std::{
    fs::File,
    io::{self, IoSliceMut, Read},
    ops::Range,
    os::unix::fs::FileExt,
    path::Path,
    time::Duration,
};

use pgsidecar_core::{
    Lsn,
    incremental_file::IncrementalHeader,
    page::{PAGE_SIZE, PageState, check_page},
};
use rustix::{
    fs::{Advice, fadvise},
    io::{Errno, ReadWriteFlags, preadv2},
};

/// How often a page with a wrong checksum is read again, and after which pause. A file that is full of them isn't torn.
const READ_AGAIN: u32 = 5;
const PAUSE: Duration = Duration::from_millis(10);
/// Blocks of one file that are named as damaged; the rest is counted.
const MOST_NAMED: usize = 100;

/// A file of the data directory, read by position.
#[derive(Debug)]
pub struct LiveFile {
    file: File,
    /// Whether the file system tells what is in the cache.
    tells: bool,
}

impl LiveFile {
    /// Opens it.
    ///
    /// # Errors
    /// If it isn't there or can't be read.
    pub fn open(path: &Path) -> io::Result<LiveFile> {
        let file = File::open(path)?;
        // Read-ahead would bring in what then seems to have been there before.
        let tells = fadvise(&file, 0, None, Advice::Random).is_ok();
        Ok(LiveFile { file, tells })
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Fills the buffer from this position on, as far as the file goes. Answers with how many bytes it got.
    ///
    /// # Errors
    /// The file system's.
    pub fn read_at(&mut self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        let cached = if self.tells { self.read_cached(buffer, position)? } else { 0 };
        let mut filled = cached;
        while filled < buffer.len() {
            match self.file.read_at(&mut buffer[filled..], position + filled as u64) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if self.tells
            && let Some(length) = std::num::NonZeroU64::new((filled - cached) as u64)
        {
            // A hint: what the database uses or has changed meanwhile stays.
            let _ = fadvise(&self.file, position + cached as u64, Some(length), Advice::DontNeed);
        }
        Ok(filled)
    }

    /// What of it is in the cache, from the beginning on.
    fn read_cached(&mut self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        let mut slices = [IoSliceMut::new(buffer)];
        match preadv2(&self.file, &mut slices, position, ReadWriteFlags::NOWAIT) {
            Ok(n) => Ok(n),
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::PERM) => {
                self.tells = false;
                Ok(0)
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// What the checksums of a relation's pages are checked against.
#[derive(Clone, Copy, Debug)]
pub struct PageCheck {
    /// The number in its fork of the file's first block: segment × RELSEG_SIZE.
    pub first_block: u32,
    /// Pages that were changed from here on are written anew by recovery.
    pub backup_start: Lsn,
}

/// Pages of a file that stayed wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BadPages {
    /// The numbers in their fork of the first of them, ascending.
    pub blocks: Vec<u32>,
    /// How many there are in all.
    pub count: u64,
}

/// The content of a file as it goes into the backup: all of it, or the blocks that an incremental file has, behind its
/// header.
pub struct Content<'a> {
    file: &'a mut LiveFile,
    header: io::Cursor<Vec<u8>>,
    left: Left,
    check: Option<PageCheck>,
    /// What was found wrong so far.
    pub bad: BadPages,
}

enum Left {
    /// From this position to the end.
    Rest(u64),
    /// These blocks of the file, from this index on.
    Blocks(Vec<u32>, usize),
}

impl<'a> Content<'a> {
    /// All of the file. With `check`, it's a relation's.
    pub fn whole(file: &'a mut LiveFile, check: Option<PageCheck>) -> Content<'a> {
        Content { file, header: io::Cursor::default(), left: Left::Rest(0), check, bad: BadPages::default() }
    }

    /// The incremental file with this header.
    pub fn incremental(file: &'a mut LiveFile, header: &IncrementalHeader, check: Option<PageCheck>) -> Content<'a> {
        Content {
            file,
            header: io::Cursor::new(header.to_bytes()),
            left: Left::Blocks(header.blocks().to_vec(), 0),
            check,
            bad: BadPages::default(),
        }
    }

    /// Reads consecutive blocks, or whatever lies there, and checks the whole pages among them.
    fn read_pages(&mut self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        let got = self.file.read_at(buffer, position)?;
        let Some(check) = self.check else { return Ok(got) };
        let first = position / PAGE_SIZE as u64;
        for (block, page) in (first..).zip(buffer[..got].chunks_exact_mut(PAGE_SIZE)) {
            let (Ok(page), Ok(block)) = (<&mut [u8; PAGE_SIZE]>::try_from(page), u32::try_from(block)) else { break };
            let number = check.first_block + block;
            if is_wrong(page, number, check.backup_start) && self.stays_wrong(page, block, number, check)? {
                self.bad.count += 1;
                if self.bad.blocks.len() < MOST_NAMED {
                    self.bad.blocks.push(number);
                }
            }
        }
        Ok(got)
    }

    /// Reads a page again until it's right. What was read last stays in its place.
    fn stays_wrong(
        &mut self,
        page: &mut [u8; PAGE_SIZE],
        block: u32,
        number: u32,
        check: PageCheck,
    ) -> io::Result<bool> {
        let tries = if self.bad.count < MOST_NAMED as u64 { READ_AGAIN } else { 1 };
        for _ in 0..tries {
            std::thread::sleep(PAUSE);
            let mut again = [0; PAGE_SIZE];
            // Cut off meanwhile: replay does the same.
            if self.file.read_at(&mut again, u64::from(block) * PAGE_SIZE as u64)? < PAGE_SIZE {
                return Ok(false);
            }
            *page = again;
            if !is_wrong(page, number, check.backup_start) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn is_wrong(page: &[u8; PAGE_SIZE], number: u32, backup_start: Lsn) -> bool {
    matches!(check_page(page, number, backup_start), PageState::Bad { .. } | PageState::NotEmpty)
}

impl Read for Content<'_> {
    /// Gives whole pages wherever the buffer has room for them. Blocks that are behind the end of the file by now come as
    /// zeros, as from PostgreSQL's own backup: replay cuts them off as well.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let header = self.header.read(buffer)?;
        if header > 0 {
            return Ok(header);
        }
        let (position, length, next) = match &self.left {
            Left::Rest(position) => (*position, buffer.len(), None),
            Left::Blocks(blocks, index) => {
                let run = run(&blocks[*index..], buffer.len() / PAGE_SIZE);
                if run.is_empty() {
                    return Ok(0);
                }
                let position = u64::from(run.start) * PAGE_SIZE as u64;
                (position, run.len() * PAGE_SIZE, Some(index + run.len()))
            }
        };
        let buffer = &mut buffer[..length];
        let got = self.read_pages(buffer, position)?;
        match (&mut self.left, next) {
            (Left::Blocks(_, index), Some(next)) => {
                buffer[got..].fill(0);
                *index = next;
                Ok(length)
            }
            (Left::Rest(position), _) => {
                *position += got as u64;
                Ok(got)
            }
            (Left::Blocks(..), None) => Ok(0),
        }
    }
}

/// The consecutive blocks at the beginning, but at most so many.
fn run(blocks: &[u32], most: usize) -> Range<u32> {
    let Some(first) = blocks.first().copied() else { return 0..0 };
    let expected = (first..).zip(blocks).take(most);
    let length = expected.take_while(|(expected, block)| expected == *block).count();
    first..first + u32::try_from(length).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use pgsidecar_core::page::page_checksum;

    use super::*;

    const SEGMENT: u32 = 131_072;
    const CHECK: PageCheck = PageCheck { first_block: SEGMENT, backup_start: Lsn::new(1 << 32) };

    /// A page with this content that is right as block `number`.
    fn page(seed: u8, number: u32) -> [u8; PAGE_SIZE] {
        let mut page = [seed; PAGE_SIZE];
        page[..8].fill(0);
        let checksum = page_checksum(&page, number);
        page[8..10].copy_from_slice(&checksum.to_le_bytes());
        page
    }

    fn file(pages: &[[u8; PAGE_SIZE]]) -> (tempfile::NamedTempFile, LiveFile) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        pages.iter().for_each(|page| file.write_all(page).unwrap());
        let live = LiveFile::open(file.path()).unwrap();
        (file, live)
    }

    fn all(mut content: Content<'_>, buffer: usize) -> (Vec<u8>, BadPages) {
        let (mut bytes, mut buffer) = (Vec::new(), vec![0; buffer]);
        loop {
            match content.read(&mut buffer).unwrap() {
                0 => return (bytes, content.bad),
                n => bytes.extend_from_slice(&buffer[..n]),
            }
        }
    }

    #[test]
    fn pages_are_checked_by_their_number_in_the_fork() {
        let good: Vec<_> = (0..20).map(|n| page(n + 1, SEGMENT + u32::from(n))).collect();
        let (_kept, mut live) = file(&good);
        let (bytes, bad) = all(Content::whole(&mut live, Some(CHECK)), 4 * PAGE_SIZE);
        assert!(bytes == good.concat());
        assert_eq!(bad, BadPages::default());
        let elsewhere = PageCheck { first_block: 0, ..CHECK };
        assert_eq!(all(Content::whole(&mut live, Some(elsewhere)), 4 * PAGE_SIZE).1.count, 20);
        // Without checksums there is nothing to check.
        assert_eq!(all(Content::whole(&mut live, None), 4 * PAGE_SIZE).1, BadPages::default());
    }

    #[test]
    fn damage_is_named_by_block_and_copied_as_it_is() {
        let mut pages: Vec<_> = (0..9).map(|n| page(n + 1, SEGMENT + u32::from(n))).collect();
        pages[3][5000] ^= 1;
        pages[7][200] ^= 1;
        let (_kept, mut live) = file(&pages);
        let (bytes, bad) = all(Content::whole(&mut live, Some(CHECK)), 2 * PAGE_SIZE);
        assert!(bytes == pages.concat());
        assert_eq!(bad, BadPages { blocks: vec![SEGMENT + 3, SEGMENT + 7], count: 2 });
        let header = IncrementalHeader::new(9, vec![2, 3, 4], SEGMENT).unwrap();
        let (_, bad) = all(Content::incremental(&mut live, &header, Some(CHECK)), 2 * PAGE_SIZE);
        assert_eq!(bad.blocks, [SEGMENT + 3]);
    }

    #[test]
    fn a_page_that_was_torn_is_read_again() {
        let (mut torn, whole) = (page(1, SEGMENT), page(1, SEGMENT));
        torn[6000] ^= 1;
        let (kept, mut live) = file(&[torn]);
        let path = kept.path().to_owned();
        let writer = std::thread::spawn(move || {
            std::thread::sleep(PAUSE * 2);
            std::fs::OpenOptions::new().write(true).open(path).unwrap().write_all_at(&whole, 0).unwrap();
        });
        let (bytes, bad) = all(Content::whole(&mut live, Some(CHECK)), PAGE_SIZE);
        writer.join().unwrap();
        assert!(bytes == whole);
        assert_eq!(bad.count, 0);
    }

    #[test]
    fn an_incremental_file_has_its_blocks_behind_its_header_whatever_the_buffer() {
        let pages: Vec<_> = (0..30).map(|n| page(n + 1, SEGMENT + u32::from(n))).collect();
        let (_kept, mut live) = file(&pages);
        let blocks = vec![0, 1, 2, 7, 9, 10, 29, 31];
        let header = IncrementalHeader::new(30, blocks, SEGMENT).unwrap();
        let mut expected = header.to_bytes();
        for block in [0, 1, 2, 7, 9, 10, 29] {
            expected.extend_from_slice(&pages[block]);
        }
        // Behind the end of the file: it was cut off since its length was looked at.
        expected.extend_from_slice(&[0; PAGE_SIZE]);
        assert_eq!(expected.len() as u64, header.file_length());
        for buffer in [1, 2, 64] {
            let (bytes, bad) = all(Content::incremental(&mut live, &header, Some(CHECK)), buffer * PAGE_SIZE);
            assert!(bytes == expected, "{buffer}");
            assert_eq!(bad, BadPages::default());
        }
        let nothing = IncrementalHeader::new(30, Vec::new(), SEGMENT).unwrap();
        assert_eq!(all(Content::incremental(&mut live, &nothing, None), PAGE_SIZE).0, nothing.to_bytes());
    }
}
