use super::*;
use proptest::prelude::*;

const PAGE: usize = 8192;
const SEGMENT: usize = 1 << 20;
pub(crate) const START: u64 = 5 << 20;

/// A record to be written: manager, info, XID, what follows its header.
pub(crate) type Record = (u8, u8, u32, Vec<u8>);

/// WAL of whole segments of 1 MB from [`START`] on, as PostgreSQL writes it.
pub(crate) fn wal(records: impl IntoIterator<Item = Record>) -> Vec<u8> {
    let (mut bytes, mut previous) = (Vec::new(), START - 1000);
    let page = |bytes: &mut Vec<u8>, rest: usize| {
        let long = bytes.len().is_multiple_of(SEGMENT);
        let flags = if long { LONG_HEADER } else { 0 } | if rest > 0 { CONTINUES } else { 0 };
        bytes.extend(0xD116_u16.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(1_u32.to_le_bytes());
        bytes.extend((START + bytes.len() as u64 - 8).to_le_bytes());
        bytes.extend(u64::try_from(rest).unwrap().to_le_bytes());
        if long {
            bytes.extend(7_u64.to_le_bytes());
            bytes.extend(u32::try_from(SEGMENT).unwrap().to_le_bytes());
            bytes.extend(u32::try_from(PAGE).unwrap().to_le_bytes());
        }
    };
    for (manager, info, xid, content) in records {
        if bytes.len().is_multiple_of(PAGE) {
            page(&mut bytes, 0);
        }
        let begins = START + bytes.len() as u64;
        let mut record = u32::try_from(RECORD_HEADER + content.len()).unwrap().to_le_bytes().to_vec();
        record.extend(xid.to_le_bytes());
        record.extend(previous.to_le_bytes());
        record.extend([info, manager, 0, 0]);
        let checksum = crc32c::crc32c_append(crc32c::crc32c(&content), &record);
        record.extend(checksum.to_le_bytes());
        record.extend(content);
        let mut rest = record.as_slice();
        while !rest.is_empty() {
            if bytes.len().is_multiple_of(PAGE) {
                page(&mut bytes, rest.len());
            }
            let (now, later) = rest.split_at(rest.len().min(PAGE - bytes.len() % PAGE));
            bytes.extend_from_slice(now);
            rest = later;
        }
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        if (manager, info) == SWITCH {
            bytes.resize(bytes.len().next_multiple_of(SEGMENT), 0);
        }
        previous = begins;
    }
    bytes.resize(bytes.len().next_multiple_of(SEGMENT), 0);
    bytes
}

fn main_data(data: &[u8]) -> Vec<u8> {
    match u8::try_from(data.len()) {
        Ok(length) => [&[255, length], data].concat(),
        Err(_) => [&[254], &u32::try_from(data.len()).unwrap().to_le_bytes()[..], data].concat(),
    }
}

pub(crate) fn at(second: i64) -> Timestamp {
    Timestamp::from_second(946_684_800 + second).unwrap()
}

pub(crate) fn commit(xid: u32, second: i64) -> Record {
    (1, 0x00, xid, main_data(&(second * 1_000_000).to_le_bytes()))
}

pub(crate) fn abort(xid: u32, second: i64) -> Record {
    (1, 0x20, xid, main_data(&(second * 1_000_000).to_le_bytes()))
}

pub(crate) fn point(name: &str) -> Record {
    let mut data = [&[0; 8], name.as_bytes()].concat();
    data.resize(72, 0);
    (0, 0x70, 0, main_data(&data))
}

pub(crate) fn filler(length: usize) -> Record {
    (10, 0x30, 9, vec![0x5A; length])
}

fn walk(wal: &[u8], chunk: usize) -> (Vec<WalRecord>, WalRecords) {
    let (mut records, mut walk) = (Vec::new(), WalRecords::new(Lsn::new(START)));
    wal.chunks(chunk).for_each(|chunk| walk.feed(chunk, |record| records.push(record)));
    (records, walk)
}

fn contents(wal: &[u8]) -> Vec<RecordContent> {
    walk(wal, 1000).0.into_iter().map(|record| record.content).collect()
}

fn ended(xid: u32, second: i64, committed: bool) -> RecordContent {
    RecordContent::Transaction { xid, time: at(second), committed }
}

#[test]
fn transactions_restore_points_and_tablespaces_are_found() {
    let micros = |second: i64| (second * 1_000_000).to_le_bytes();
    let name = [&micros(4)[..], b"before the migration\0", &[b'x'; 43]].concat();
    let records = [
        // With an origin and a top-level XID in front.
        (1, 0x80, 700, [&[253, 1, 0, 252, 5, 0, 0, 0][..], &main_data(&[&micros(1)[..], &[0; 300]].concat())].concat()),
        (1, 0x20, 701, main_data(&micros(2))),
        // PREPARE, ASSIGNMENT and INVALIDATIONS end nothing.
        (1, 0x10, 702, main_data(&micros(2))),
        (1, 0x50, 702, main_data(&micros(2))),
        (1, 0x60, 702, main_data(&micros(2))),
        (0, 0x70, 0, main_data(&name)),
        (5, 0x00, 703, main_data(&[&16_400_u32.to_le_bytes()[..], b"/mnt/fast\0"].concat())),
        (5, 0x10, 704, main_data(&16_400_u32.to_le_bytes())),
        // A record with a block isn't looked into.
        (1, 0x00, 705, [&[0, 0, 0, 0][..], &main_data(&micros(5))].concat()),
        filler(100),
    ];
    let expected = [
        ended(700, 1, true),
        ended(701, 2, false),
        RecordContent::RestorePoint { name: "before the migration".into(), time: at(4) },
        RecordContent::CreateTablespace { oid: 16_400, location: "/mnt/fast".into() },
        RecordContent::DropTablespace { oid: 16_400 },
    ];
    assert_eq!(contents(&wal(records)), expected);
}

#[test]
fn the_xid_of_a_prepared_transaction_is_behind_everything_else() {
    let list =
        |each: usize, count: usize| [&u32::try_from(count).unwrap().to_le_bytes()[..], &vec![7; each * count]].concat();
    for statistics in [0, 3] {
        let mut data = 1_000_000_i64.to_le_bytes().to_vec();
        let dropped = if statistics > 0 { DROPPED } else { 0 };
        data.extend((0b1_1111_u32 | dropped | 1 << 7).to_le_bytes());
        data.extend([1; 8]);
        data.extend(list(4, 5000));
        data.extend(list(12, 3));
        if statistics > 0 {
            data.extend(list(12, statistics));
        }
        data.extend(list(16, 2));
        data.extend(4711_u32.to_le_bytes());
        data.extend(b"gid\0");
        let records = [(1, 0xB0, 800, main_data(&data)), (1, 0xC0, 801, main_data(&data))];
        assert_eq!(contents(&wal(records)), [ended(4711, 1, true), ended(4711, 1, false)]);
    }
    const DROPPED: u32 = 1 << 8;
}

#[test]
fn records_cross_pages_and_segments_and_a_switch_leaves_the_rest_of_a_segment() {
    let mut records = Vec::new();
    for n in 0..200_u32 {
        records.push(filler(usize::try_from(n.wrapping_mul(2_654_435_761) >> 16).unwrap() % 20_000));
        records.push(commit(n, n.into()));
        if n == 120 {
            records.push((SWITCH.0, SWITCH.1, 0, vec![]));
        }
    }
    records.push(filler(3 * SEGMENT));
    records.push(commit(200, 200));
    let bytes = wal(records);
    let expected: Vec<RecordContent> = (0..=200).map(|n| ended(n, n.into(), true)).collect();
    let (found, walked) = walk(&bytes, 1000);
    assert_eq!(found.len(), 201, "{:?}", walked.ended());
    assert_eq!(contents(&bytes), expected);
    for chunk in [1, 7, 8192, 1 << 18, bytes.len()] {
        let (found, walked) = walk(&bytes, chunk);
        assert_eq!(found.len(), 201, "{chunk}");
        assert_eq!(walked.ended(), Some(WalEnd::Unwritten { at: walked.reached() }), "{chunk}");
        assert_eq!(walked.last_record(), found.last().map(|record| record.lsn), "{chunk}");
        assert_eq!(walked.reached(), found.last().unwrap().end, "{chunk}");
    }
}

#[test]
fn a_walk_from_any_segment_begins_with_the_first_record_that_begins_there() {
    let records = (0..60).flat_map(|n| [commit(n, n.into()), filler(100_000)]);
    let bytes = wal(records);
    let (all, _) = walk(&bytes, 4096);
    for first in 1..bytes.len() / SEGMENT {
        let from = START + (first * SEGMENT) as u64;
        let (mut found, mut walk) = (Vec::new(), WalRecords::new(Lsn::new(from)));
        walk.feed(&bytes[first * SEGMENT..], |record| found.push(record));
        let expected: Vec<_> = all.iter().filter(|record| record.lsn.bytes() >= from).cloned().collect();
        assert_eq!(found, expected, "{first}");
    }
    // A segment that is all one record.
    let bytes = wal([filler(3 * SEGMENT), commit(1, 1)]);
    let mut found = Vec::new();
    let mut walk = WalRecords::new(Lsn::new(START + SEGMENT as u64));
    walk.feed(&bytes[SEGMENT..], |record| found.push(record.content));
    assert_eq!(found, [ended(1, 1, true)]);
}

#[test]
fn the_first_record_at_a_position_is_told_once() {
    let bytes = wal([commit(1, 1), filler(10), filler(10), filler(10)]);
    let (mut found, from) = (Vec::new(), START + 40 + 40);
    let mut walk = WalRecords::new(Lsn::new(START)).tell_of_record_at(Lsn::new(from));
    walk.feed(&bytes, |record| found.push((record.lsn.bytes() - START, record.end.bytes() - START, record.content)));
    assert_eq!(found, [(40, 80, ended(1, 1, true)), (80, 120, RecordContent::Other)]);
}

#[test]
fn a_record_that_was_never_ended_is_passed_over_where_the_server_says_so() {
    // A crash left the beginning of a record; after it the server goes on behind it.
    let mut bytes = wal([commit(1, 1), filler(PAGE), commit(2, 2)]);
    let follower = wal([commit(3, 3)]);
    let mut record = follower[40..80].to_vec();
    record[8..16].copy_from_slice(&(START + 40).to_le_bytes());
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&record[24..34]), &record[..20]);
    record[20..24].copy_from_slice(&checksum.to_le_bytes());
    bytes[PAGE + 2..PAGE + 4].copy_from_slice(&OVERWRITES.to_le_bytes());
    bytes[PAGE + 24..].fill(0);
    bytes[PAGE + 24..PAGE + 64].copy_from_slice(&record);
    assert_eq!(contents(&bytes), [ended(1, 1, true), ended(3, 3, true)]);
}

#[test]
fn the_walk_ends_where_recovery_would_and_says_why() {
    let bytes = wal([commit(1, 1), filler(20_000), commit(2, 2)]);
    let second = walk(&bytes, 1000).0[1].lsn;
    let place = usize::try_from(second.bytes() - START).unwrap();
    let damaged = |at: usize, with: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[at..at + with.len()].copy_from_slice(with);
        let (found, walked) = walk(&bytes, 1000);
        format!("{} found, {}", found.len(), walked.ended().unwrap())
    };
    let said = [
        damaged(place, &[0; 4]),
        damaged(place, &[5]),
        damaged(place + 8, &[1]),
        damaged(place + 30, &[1]),
        damaged(100, &[1]),
        damaged(PAGE, &[1]),
        damaged(PAGE + 8, &[1]),
        damaged(PAGE + 16, &[1]),
        damaged(PAGE + 2, &[0]),
        damaged(PAGE, &[0; 24]),
        damaged(0, &[0; 40]),
        damaged(36, &[1]),
    ];
    insta::assert_snapshot!(said.join("\n"), @"
    1 found, it ends at 0/504EB8
    1 found, the record at 0/504EB8 is not valid: its length can't be right
    1 found, the record at 0/504EB8 is not valid: it names another record as the one before it
    1 found, the record at 0/504EB8 is not valid: its checksum is wrong
    1 found, the record at 0/500050 is not valid: its checksum is wrong
    1 found, the record at 0/500050 is not valid: its page has no header that belongs there
    1 found, the record at 0/500050 is not valid: its page has no header that belongs there
    1 found, the record at 0/500050 is not valid: the next page doesn't go on with it
    1 found, the record at 0/500050 is not valid: the next page doesn't go on with it
    1 found, it ends at 0/500050
    0 found, it ends at 0/500000
    0 found, the record at 0/500000 is not valid: its page has no header that belongs there
    ");
}

proptest! {
    #[test]
    fn any_bytes_are_taken_without_panic(bytes: Vec<u8>, chunk in 1..100_usize) {
        walk(&bytes, chunk);
        let whole = wal([commit(1, 1), filler(100)]);
        walk(&[&whole[..40], &bytes[..]].concat(), chunk);
    }

    /// Whatever was changed: what is found before it is right, and what is found at all was written.
    #[test]
    fn damage_adds_nothing(
        changes in prop::collection::vec((0..SEGMENT, any::<u8>()), 1..6), chunk in 1..20_000_usize,
    ) {
        let whole = wal((0..70).flat_map(|n| [commit(n, n.into()), filler(13_000)]));
        let mut changed = whole.clone();
        changes.iter().for_each(|(at, byte)| changed[*at] = *byte);
        let (expected, found) = (walk(&whole, 8192).0, walk(&changed, chunk).0);
        prop_assert_eq!(&found[..], &expected[..found.len()]);
    }
}
