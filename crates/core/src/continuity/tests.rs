use super::*;
use crate::{
    BackupKind, BackupRecord,
    plan::{
        WalFacts, WalScan,
        tests::{self as plan, SIZE, history, lsn, tli},
    },
};
use jiff::Timestamp;
use proptest::prelude::*;

/// A backup with these positions. `number` makes its id.
fn backup(number: i64, timeline: TimelineId, start_lsn: Lsn, stop_lsn: Lsn) -> BackupRecord {
    let id = BackupId::new(Timestamp::from_second(1_800_000_000 + number).unwrap(), BackupKind::Full);
    BackupRecord { id, timeline, start_lsn, stop_lsn, ..plan::backup(1, 0, 0) }
}

/// The catalog against an archive that has these segments.
fn check(
    requirements: &Requirements,
    there: &BTreeSet<(TimelineId, u64)>,
    damaged: &[(TimelineId, u64)],
    size: WalSegmentSize,
) -> Continuity {
    let listings = requirements.listings().into_iter().map(|NeededWal { first, mut wal, .. }| {
        for &(timeline, number) in there {
            let name = SegmentName::from_number(timeline, number, size);
            if timeline == wal.timeline() && name >= first {
                wal.found(name, 1, Timestamp::UNIX_EPOCH);
            }
        }
        wal
    });
    let damaged = damaged.iter().map(|(timeline, number)| SegmentName::from_number(*timeline, *number, size)).collect();
    requirements.check(listings.collect(), &damaged)
}

/// What is said of a catalog with these segments, in words.
fn said(catalog: &Catalog, only: Option<u32>, segments: &[(u32, &[u64])]) -> String {
    let there: BTreeSet<(TimelineId, u64)> = segments
        .iter()
        .flat_map(|(timeline, numbers)| numbers.iter().map(|number| (tli(*timeline), *number)))
        .collect();
    let timelines: Vec<TimelineId> = segments.iter().map(|(timeline, _)| tli(*timeline)).collect();
    let requirements = Requirements::new(catalog, &timelines, SIZE, only.map(tli));
    let found = check(&requirements, &there, &[], SIZE);
    let mut lines: Vec<String> =
        requirements.without_history().iter().map(|timeline| format!("no history of {timeline}")).collect();
    for wal in &found.timelines {
        lines.extend(wal.missing().map(|gap| format!("timeline {}: {gap}", wal.timeline())));
    }
    for limit in &found.limits {
        let timelines: Vec<String> = limit.timelines.iter().map(ToString::to_string).collect();
        let outcome = if limit.restorable { "up to" } else { "lost at" };
        lines.push(format!(
            "{} to {}: {outcome} {}, {}",
            limit.backup,
            timelines.join("+"),
            limit.reachable,
            limit.lacks
        ));
    }
    lines.join("\n")
}

/// One backup, of segments 4 to 5 on timeline 1.
fn one_backup(histories: Vec<TimelineHistory>) -> Catalog {
    Catalog { backups: vec![backup(0, tli(1), lsn(4), lsn(5))], histories, ..Catalog::default() }
}

#[test]
fn an_archive_without_a_gap_from_the_backup_on_is_whole() {
    assert_eq!(said(&one_backup(vec![]), None, &[(1, &[1, 4, 5, 6, 7])]), "");
    assert_eq!(said(&Catalog::default(), None, &[(1, &[1, 4, 7])]), "", "without a backup nothing is needed");
}

#[test]
fn a_gap_limits_the_backups_before_it() {
    let mut catalog = one_backup(vec![]);
    catalog.backups.push(backup(60, tli(1), lsn(10), lsn(10)));
    insta::assert_snapshot!(said(&catalog, None, &[(1, &[4, 5, 6, 10, 11, 13])]), @r"
    timeline 1: 000000010000000000000007 to 000000010000000000000009 (3 segments)
    timeline 1: 00000001000000000000000C (1 segment)
    20270115T080000Z-full to 1: up to 0/7000000, 000000010000000000000007
    20270115T080100Z-full to 1: up to 0/C000000, 00000001000000000000000C
    ");
}

#[test]
fn a_backup_without_its_own_wal_is_lost_whether_or_not_wal_follows() {
    for (segments, gap) in [
        (&[4, 6, 7][..], "000000010000000000000005 (1 segment)"),
        (&[4], "000000010000000000000005 (1 segment)"),
        (&[3], "000000010000000000000004 to 000000010000000000000005 (2 segments)"),
        (&[], "000000010000000000000004 to 000000010000000000000005 (2 segments)"),
    ] {
        let said = said(&one_backup(vec![]), None, &[(1, segments)]);
        assert!(said.starts_with(&format!("timeline 1: {gap}\n")), "{segments:?}: {said}");
        assert!(said.contains("20270115T080000Z-full to 1: lost at "), "{segments:?}: {said}");
    }
}

#[test]
fn the_segment_of_the_switch_point_is_needed_on_the_new_timeline_alone() {
    let catalog = one_backup(vec![history(2, &[(1, lsn(8))])]);
    assert_eq!(said(&catalog, None, &[(1, &[4, 5, 6, 7]), (2, &[8, 9])]), "");
    assert_eq!(said(&catalog, None, &[(1, &[4, 5, 6, 7, 8, 9]), (2, &[8, 9])]), "", "the old server went on");
    // Recovery would read timeline 1's file in its place, and past the switch point.
    insta::assert_snapshot!(said(&catalog, None, &[(1, &[4, 5, 6, 7, 8]), (2, &[9])]), @r"
    timeline 2: 000000020000000000000008 (1 segment)
    20270115T080000Z-full to 2: up to 0/8000000, 000000020000000000000008
    ");
    insta::assert_snapshot!(said(&catalog, None, &[(1, &[4, 5, 6]), (2, &[8, 9])]), @r"
    timeline 1: 000000010000000000000007 (1 segment)
    20270115T080000Z-full to 2: up to 0/7000000, 000000010000000000000007
    ");
}

#[test]
fn a_timeline_of_which_nothing_has_come_yet_needs_nothing() {
    let catalog = one_backup(vec![history(2, &[(1, lsn(8))])]);
    assert_eq!(said(&catalog, None, &[(1, &[4, 5, 6]), (2, &[])]), "");
}

#[test]
fn a_hole_of_the_common_past_limits_all_ways() {
    let catalog = one_backup(vec![history(2, &[(1, lsn(8))]), history(10, &[(1, lsn(8)), (2, lsn(9))])]);
    let archive: &[(u32, &[u64])] = &[(1, &[4, 5, 7, 8, 10]), (2, &[8, 9]), (10, &[9, 10])];
    insta::assert_snapshot!(said(&catalog, None, archive), @r"
    timeline 1: 000000010000000000000006 (1 segment)
    timeline 1: 000000010000000000000009 (1 segment)
    20270115T080000Z-full to 1+2+10: up to 0/6000000, 000000010000000000000006
    ");
    insta::assert_snapshot!(said(&catalog, Some(10), archive), @r"
    timeline 1: 000000010000000000000006 (1 segment)
    20270115T080000Z-full to 10: up to 0/6000000, 000000010000000000000006
    ");
}

#[test]
fn a_timeline_without_its_history_is_named_and_looked_at_by_itself() {
    let mut catalog = one_backup(vec![]);
    catalog.backups.push(backup(60, tli(10), lsn(9), lsn(9)));
    insta::assert_snapshot!(said(&catalog, None, &[(1, &[4, 5]), (10, &[8, 9, 11])]), @r"
    no history of 10
    timeline 10: 0000000A000000000000000A (1 segment)
    20270115T080100Z-full to 10: up to 0/A000000, 0000000A000000000000000A
    ");
}

#[test]
fn a_backup_that_ends_in_the_segment_of_the_switch_point_can_be_restored_to_either_timeline() {
    let end = Lsn::new(SIZE.start_of(5).bytes() + 100);
    let catalog = Catalog {
        backups: vec![backup(0, tli(1), lsn(4), end)],
        histories: vec![history(2, &[(1, lsn(5))])],
        ..Catalog::default()
    };
    assert_eq!(said(&catalog, None, &[(1, &[4]), (2, &[5, 6])]), "", "by way of timeline 2");
    assert_eq!(said(&catalog, None, &[(1, &[4, 5]), (2, &[])]), "", "by way of timeline 1");
    assert!(said(&catalog, None, &[(1, &[4]), (2, &[])]).contains("lost at 0/5000000, 000000010000000000000005"));
}

/// Timelines as promotions and recoveries make them, backups on them, and what is in the archive. Positions are quarters
/// of a segment.
#[derive(Clone, Debug)]
struct World {
    size: WalSegmentSize,
    catalog: Catalog,
    there: BTreeSet<(TimelineId, u64)>,
    damaged: Vec<(TimelineId, u64)>,
}

fn worlds() -> impl Strategy<Value = World> {
    let children = proptest::collection::vec((any::<proptest::sample::Index>(), 4..80u64, 1..4u32), 0..5);
    let backups = proptest::collection::vec((any::<proptest::sample::Index>(), 0..70u64, 1..10u64), 0..5);
    let lacking = proptest::collection::vec((0..6usize, 0..25u64), 0..6);
    let ends = proptest::collection::vec(0..25u64, 6);
    let damaged = proptest::collection::vec(any::<proptest::sample::Index>(), 0..3);
    let all = (20..=30u32, children, backups, lacking, ends, damaged);
    all.prop_map(|(log2, children, backups, lacking, ends, damaged)| {
        let size = WalSegmentSize::new(1 << log2).unwrap();
        let position = |quarters: u64| Lsn::new(quarters * size.bytes() / 4);
        // Each with the lines of its history.
        let mut timelines: Vec<(TimelineId, Vec<(TimelineId, Lsn)>)> = vec![(tli(1), vec![])];
        for (parent, switch, skipped) in children {
            let (parent, mut lines) = timelines[parent.index(timelines.len())].clone();
            // As PostgreSQL does: also to a point before the parent's own beginning.
            lines.push((parent, position(switch)));
            let newest = timelines.last().unwrap().0.get();
            timelines.push((tli(newest + skipped), lines));
        }
        let histories: Vec<TimelineHistory> = timelines
            .iter()
            .skip(1)
            .map(|(timeline, lines)| {
                let text: String = lines.iter().map(|(tli, lsn)| format!("{tli}\t{lsn}\tx\n")).collect();
                TimelineHistory::parse(*timeline, text.as_bytes()).unwrap()
            })
            .collect();
        let begins = |timeline: TimelineId| {
            let history = histories.iter().find(|history| history.timeline() == timeline);
            history.map_or(Lsn::INVALID, |history| history.spans().last().unwrap().begin)
        };
        let backups = (0..).zip(backups).map(|(number, (on, start, length))| {
            let timeline = timelines[on.index(timelines.len())].0;
            let start = begins(timeline).max(position(start));
            backup(number, timeline, start, Lsn::new(start.bytes() + length * size.bytes() / 4))
        });
        let backups = backups.collect();
        let mut there = BTreeSet::new();
        for ((timeline, _), end) in timelines.iter().zip(ends) {
            there.extend((size.segment_number(begins(*timeline))..end).map(|number| (*timeline, number)));
        }
        for (timeline, number) in lacking {
            if let Some((timeline, _)) = timelines.get(timeline) {
                there.remove(&(*timeline, number));
            }
        }
        let nth = |index: proptest::sample::Index| there.iter().nth(index.index(there.len().max(1))).copied();
        let damaged = damaged.into_iter().filter_map(nth).collect();
        World { size, catalog: Catalog { backups, histories, ..Catalog::default() }, there, damaged }
    })
}

/// What the restore's planning finds for a backup on the way to a timeline.
fn facts(world: &World, way: &TimelineHistory, backup: &BackupRecord) -> WalFacts {
    let mut scan = WalScan::new(way.clone(), world.size, backup.start_lsn);
    for &(timeline, number) in world.there.iter().filter(|segment| !world.damaged.contains(segment)) {
        scan.found(SegmentName::from_number(timeline, number, world.size), 1, Timestamp::UNIX_EPOCH);
    }
    scan.finish()
}

proptest! {
    #[test]
    fn gaps_and_limits_are_those_of_a_naive_model_and_of_the_restores_planning(world in worlds()) {
        let World { size, catalog, there, damaged } = &world;
        let timelines: Vec<TimelineId> = there.iter().map(|(timeline, _)| *timeline).collect();
        let requirements = Requirements::new(catalog, &timelines, *size, None);
        let found = check(&requirements, there, damaged, *size);
        prop_assert_eq!(requirements.without_history(), []);

        let ways: Vec<TimelineHistory> =
            catalog.histories.iter().cloned().chain([TimelineHistory::first(tli(1))]).collect();
        let mut needed = BTreeSet::new();
        let mut limits = BTreeSet::new();
        for backup in &catalog.backups {
            let first = size.segment_number(backup.start_lsn);
            let last = size.previous_segment_number(backup.stop_lsn);
            let mine: Vec<_> = ways.iter().filter(|way| way.contains(backup.timeline, backup.stop_lsn)).collect();
            let need = |way: &TimelineHistory, last: u64| -> Vec<(TimelineId, u64)> {
                let on_it = catalog.backups.iter().filter(|backup| way.contains(backup.timeline, backup.stop_lsn));
                let first = on_it.map(|backup| size.segment_number(backup.start_lsn)).min().unwrap();
                (first..=last).map(|number| (way.timeline_of_segment(number, *size).unwrap(), number)).collect()
            };
            let consistent =
                |way: &&TimelineHistory| facts(&world, way, backup).reachable > size.start_of(last);
            let lost = !mine.iter().any(consistent);
            for way in mine {
                let own = way.spans().last().unwrap();
                let own_first = size.segment_number(own.begin).max(first);
                let newest = there.range((own.timeline, own_first)..=(own.timeline, u64::MAX)).next_back();
                let facts = facts(&world, way, backup);
                let hole = newest.is_some_and(|(_, newest)| facts.reachable <= size.start_of(*newest));
                if let Some((_, newest)) = newest {
                    prop_assert!(facts.gap == hole || !damaged.is_empty());
                    needed.extend(need(way, *newest));
                }
                let lost_here = lost && way.timeline() == backup.timeline;
                if lost_here {
                    needed.extend(need(way, last));
                }
                if hole || lost_here {
                    let restorable = facts.reachable > size.start_of(last);
                    limits.insert((backup.id, way.timeline(), restorable, facts.missing, facts.reachable));
                }
            }
        }
        let mut said = BTreeSet::new();
        for limit in &found.limits {
            let lacks = (limit.lacks.timeline(), limit.lacks.number(*size).unwrap());
            prop_assert_eq!((limit.damaged, there.contains(&lacks)), (damaged.contains(&lacks), limit.damaged));
            for timeline in &limit.timelines {
                said.insert((limit.backup, *timeline, limit.restorable, limit.lacks, limit.reachable));
            }
        }
        prop_assert_eq!(said, limits);

        let missing: BTreeSet<(TimelineId, u64)> = needed.difference(there).copied().collect();
        let gaps: BTreeSet<(TimelineId, u64)> = found
            .timelines
            .iter()
            .flat_map(|wal| wal.missing().map(|gap| (wal.timeline(), gap)).collect::<Vec<_>>())
            .flat_map(|(timeline, gap)| {
                let numbers = gap.first().number(*size).unwrap()..=gap.last().number(*size).unwrap();
                numbers.map(move |number| (timeline, number))
            })
            .collect();
        prop_assert_eq!(gaps, missing);
    }
}
