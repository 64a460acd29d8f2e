use super::*;
use crate::{
    SegmentName, TimelineId,
    wal_records::tests::{START, abort, at, commit, filler, point, wal},
};
use proptest::prelude::*;

const SIZE: u64 = 1 << 20;
const FIRST: u64 = START / SIZE;

/// The WAL of a test, as an archive holds it.
struct Archive {
    bytes: Vec<u8>,
    /// Where the backup begins, and by how much of it that is consistent.
    start: Lsn,
    stop: Lsn,
    /// Where a restore point is recorded.
    point: Option<Lsn>,
    gap: bool,
}

impl Archive {
    fn new(bytes: Vec<u8>) -> Archive {
        Archive { bytes, start: Lsn::new(START), stop: Lsn::new(START + 8), point: None, gap: false }
    }

    fn segments(&self) -> u64 {
        self.bytes.len() as u64 / SIZE
    }

    /// Searches with a guess; answers with how many segments were read, too.
    fn search(
        &self,
        target: &RecoveryTarget,
        inclusive: bool,
        guess: Option<u64>,
    ) -> (Result<ExpectedEnd, PlanError>, u64) {
        let (size, end) = (WalSegmentSize::new(SIZE).unwrap(), FIRST + self.segments());
        let wal = WalFacts {
            last: None,
            missing: SegmentName::from_number(TimelineId::FIRST, end, size),
            reachable: size.start_of(end),
            gap: self.gap,
            stored_by: guess.map(|guess| FIRST + guess % self.segments()),
            stored_bytes: 0,
        };
        let mut search = Search::new(target, inclusive, (self.start, self.stop), size, wal, self.point).unwrap();
        let mut read = 0;
        while let Some(number) = search.next_segment() {
            read += 1;
            let from = usize::try_from((number - FIRST) * SIZE).unwrap();
            let segment = &self.bytes[from..from + usize::try_from(SIZE).unwrap()];
            let _ = segment.chunks(100_000).all(|chunk| search.feed(chunk));
            if let Err(error) = search.segment_read() {
                return (Err(error), read);
            }
        }
        (Ok(search.finish()), read)
    }

    fn end(&self, target: &RecoveryTarget, inclusive: bool) -> Option<(Option<u32>, Option<u32>)> {
        match self.search(target, inclusive, None).0 {
            Ok(ExpectedEnd::Verified(end)) => {
                Some((end.last_commit.map(|commit| commit.xid), end.stops_at.map(|stop| stop.xid)))
            }
            Ok(ExpectedEnd::NotVerified { because }) => panic!("not verified: {because}"),
            Err(_) => None,
        }
    }
}

fn time(second: i64) -> RecoveryTarget {
    RecoveryTarget::Time(at(second))
}

#[test]
fn a_target_ends_where_postgresql_would_stop() {
    let archive = Archive::new(wal([
        commit(10, 10),
        abort(11, 20),
        commit(12, 30),
        filler(2_000_000),
        point("before"),
        abort(13, 40),
        commit(14, 50),
    ]));
    // Aborts stop recovery, too, and leave nothing.
    let cases = [
        (time(9), (None, Some(10)), (None, Some(10))),
        (time(10), (Some(10), Some(11)), (None, Some(10))),
        (time(15), (Some(10), Some(11)), (Some(10), Some(11))),
        (time(20), (Some(10), Some(12)), (Some(10), Some(11))),
        (time(49), (Some(12), Some(14)), (Some(12), Some(14))),
        (RecoveryTarget::Xid(12), (Some(12), Some(12)), (Some(10), Some(12))),
        (RecoveryTarget::Xid((7 << 32) + 13), (Some(12), Some(13)), (Some(12), Some(13))),
        (RecoveryTarget::Name("before".parse().unwrap()), (Some(12), None), (Some(12), None)),
        (RecoveryTarget::Latest, (Some(14), None), (Some(14), None)),
        (RecoveryTarget::Lsn(Lsn::new(START + 41)), (Some(10), Some(11)), (Some(10), Some(11))),
    ];
    for (target, inclusive, exclusive) in cases {
        assert_eq!(archive.end(&target, true), Some(inclusive), "{target}");
        assert_eq!(archive.end(&target, false), Some(exclusive), "{target}, exclusive");
    }
    for target in [time(50), time(51), RecoveryTarget::Xid(15), RecoveryTarget::Name("after".parse().unwrap())] {
        assert_eq!(archive.end(&target, true), None, "{target}");
    }
}

#[test]
fn what_is_not_reached_is_told_with_what_can_be_had() {
    let mut archive = Archive::new(wal([commit(10, 10), filler(2_000_000), commit(12, 30), filler(10)]));
    let mut told = Vec::new();
    let late = RecoveryTarget::Lsn(Lsn::new(START + 3 * SIZE - 100));
    for target in [time(31), late, RecoveryTarget::Xid(11), RecoveryTarget::Name("x".parse().unwrap())] {
        let error = archive.search(&target, true, None).0.unwrap_err();
        told.push(format!("{error}. {}", error.hint()));
    }
    archive.stop = Lsn::new(START + SIZE);
    told.push(archive.search(&time(9), true, None).0.unwrap_err().to_string());
    archive.gap = true;
    told.push(archive.search(&time(31), true, None).0.unwrap_err().to_string());
    archive.bytes[100_000] ^= 1;
    told.push(archive.search(&time(31), true, None).0.unwrap_err().to_string());
    // PostgreSQL would take it for the end of the archive, and promote.
    archive.bytes[0x1E_9BD8 + 30] ^= 1;
    let Ok(ExpectedEnd::NotVerified { because }) = archive.search(&RecoveryTarget::Latest, true, None).0 else {
        panic!("the last transaction is damaged")
    };
    told.push(because);
    insta::assert_snapshot!(told.join("\n"), @r#"
    the target, time 2000-01-01T00:00:31Z, lies after the last archived WAL of timeline 1, which ends at 0/6E9C28; the last transaction before that, 12, was committed at 2000-01-01T00:00:30Z (0/6E9BD8). Leave the target out to replay everything that is there, or end with that transaction: --target-xid 12. If the database still runs, SELECT pg_switch_wal() ships the current segment.
    the target, LSN 0/7FFF9C, lies after the last archived WAL of timeline 1, which ends at 0/6E9C28; the last transaction before that, 12, was committed at 2000-01-01T00:00:30Z (0/6E9BD8). Leave the target out to replay everything that is there, or end with that transaction: --target-xid 12. If the database still runs, SELECT pg_switch_wal() ships the current segment.
    no transaction 11 has ended between the backup and the end of the archive at 0/6E9C28. It may have written nothing, be one of another transaction's savepoints, or not have ended when the archive did. Choose a time or an LSN.
    there is no restore point "x" between the backup and the end of the archive at 0/6E9C28. 'pgsidecar restore-point list' shows those that are recorded; --backup names a backup to begin with.
    the target, time 2000-01-01T00:00:09Z, is met at 0/500028, before the backup is complete at 0/600000
    the target, time 2000-01-01T00:00:31Z, can't be reached: WAL segment 000000010000000000000007 is missing in the archive, and later ones are there
    the target, time 2000-01-01T00:00:31Z, can't be reached: the archived WAL is damaged: the record at 0/500050 is not valid: its checksum is wrong; the last transaction before that, 10, was committed at 2000-01-01T00:00:10Z (0/500028)
    recovery would end early: the record at 0/500050 is not valid: its checksum is wrong
    "#);
    let empty = Archive::new(wal([filler(3_000_000)]));
    insta::assert_snapshot!(empty.search(&time(1), true, None).0.unwrap_err(), @"the target, time 2000-01-01T00:00:01Z, lies after the last archived WAL of timeline 1, which ends at 0/7DE988");
}

#[test]
fn what_is_before_the_backup_is_not_met_and_what_is_not_recorded_is() {
    let records = [commit(10, 10), point("x"), commit(11, 11), point("x"), commit(12, 12), point("x"), commit(13, 13)];
    let mut archive = Archive::new(wal(records));
    let name = RecoveryTarget::Name("x".parse().unwrap());
    let found = |archive: &Archive, target: &RecoveryTarget| match archive.search(target, true, None).0 {
        Ok(ExpectedEnd::Verified(end)) => (end.last_commit.unwrap().xid, end.lsn),
        other => panic!("{other:?}"),
    };
    let (first, first_point) = found(&archive, &name);
    // A record of a transaction has 34 bytes, one of a restore point 98.
    assert_eq!((first, first_point), (10, Lsn::new(START + 40 + 40 + 104)));
    archive.start = first_point;
    archive.stop = Lsn::new(first_point.bytes() + 8);
    let (second, second_point) = found(&archive, &name);
    assert_eq!((second, second_point), (11, Lsn::new(first_point.bytes() + 40 + 104)));
    assert_eq!(found(&archive, &time(11)).0, 11);
    // Earlier than all that is replayed.
    assert!(matches!(archive.search(&RecoveryTarget::Xid(10), true, None).0, Err(PlanError::NoSuchTransaction { .. })));
    archive.point = Some(second_point);
    assert_eq!(found(&archive, &name).1, second_point);
    let third_point = Lsn::new(second_point.bytes() + 40 + 104);
    archive.point = Some(third_point);
    let earlier = PlanError::NameMetEarlier { name: "x".to_owned(), newest: third_point, earlier: second_point };
    assert_eq!(archive.search(&name, true, None).0, Err(earlier));
}

#[test]
fn a_transaction_far_away_is_not_promised() {
    let archive = Archive::new(wal((0..100).flat_map(|n| [commit(n, n.into()), filler(1_000_000)])));
    let (found, read) = archive.search(&RecoveryTarget::Xid(99), true, None);
    assert_eq!((matches!(found, Ok(ExpectedEnd::NotVerified { .. })), read), (true, 64));
    assert_eq!(archive.end(&RecoveryTarget::Xid(50), true), Some((Some(50), Some(50))));
}

#[test]
fn a_good_guess_reads_few_segments_and_a_bad_one_not_many() {
    let archive = Archive::new(wal((0..3000).flat_map(|n| [commit(n, n.into()), filler(100_000)])));
    assert!(archive.segments() > 280);
    for second in [0, 7, 1234, 2000, 2998] {
        let right = u64::try_from(second).unwrap() * 100_060 / SIZE;
        for (guess, most) in [(right, 3), (0, 40), (archive.segments() - 1, 40)] {
            let (found, read) = archive.search(&time(second), true, Some(guess));
            let Ok(ExpectedEnd::Verified(end)) = found else { panic!("{second} from {guess}: {found:?} after {read}") };
            assert_eq!(end.last_commit.map(|commit| i64::from(commit.xid)), Some(second), "from {guess}");
            assert!(read <= most, "{second} from {guess}: {read} segments");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Wherever the search begins, and however idle the server was: what it says is what reading everything says.
    #[test]
    fn the_guess_does_not_matter(
        lengths in prop::collection::vec((1..4_i64, prop_oneof![Just(100_usize), Just(500_000), Just(6_000_000)]), 1..12),
        target in 0..40_i64, guess: u64,
    ) {
        let (mut second, mut records, mut times) = (0, Vec::new(), Vec::new());
        for (pause, length) in lengths {
            second += pause;
            times.push(second);
            records.extend([commit(u32::try_from(second).unwrap(), second), filler(length)]);
        }
        let archive = Archive::new(wal(records));
        let stops = times.iter().find(|time| **time > target).copied();
        let last = times.iter().rev().find(|time| **time <= target).copied();
        match (archive.search(&time(target), true, Some(guess)).0, stops) {
            (Ok(ExpectedEnd::Verified(end)), Some(stops)) => {
                prop_assert_eq!(end.stops_at.map(|stop| i64::from(stop.xid)), Some(stops));
                prop_assert_eq!(end.last_commit.map(|commit| i64::from(commit.xid)), last);
            }
            (Err(PlanError::AfterLastRecord { last_commit, .. }), None) => {
                prop_assert_eq!(last_commit.map(|commit| i64::from(commit.xid)), last);
            }
            (found, _) => prop_assert!(false, "{found:?}"),
        }
    }
}
