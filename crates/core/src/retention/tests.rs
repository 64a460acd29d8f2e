//! What can be restored before and after is asked of the restore planner, which knows nothing of retention.

mod world;

use proptest::prelude::*;

use self::world::{Event, HOUR, World, at, event};
use super::*;
use crate::{
    ArchiveFileName, BackupKind, BackupRecord, SegmentName, SnapshotRecord, chain::chain, layout::RepositoryObject,
    plan::tests as sample, recovery::RecoveryTarget, snapshot::tests::record as snapshot,
};
use sample::{SIZE, tli};

fn policy(window_hours: u64, redundancy: u32) -> Policy {
    Policy {
        window: Some(RecoveryWindow::from_seconds(window_hours * 3600).unwrap()),
        redundancy: redundancy.to_string().parse().unwrap(),
        dumps: None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn nothing_needed_goes_and_what_is_not_needed_does(
        events in proptest::collection::vec(event(), 1..45), hours in 1..60u64, redundancy in 1..4u32, ahead in 0..100i64,
        last in proptest::option::weighted(0.9, (0..8usize, 0..20u64)),
    ) {
        // Mostly, the newest backup is a good one: otherwise nothing goes.
        let good = last.map(|(server, segments)| [
            Event::Backup { server, kind: 0, segments: 0, clock_behind: 0 }, Event::Write { server, segments },
        ]);
        let events: Vec<Event> = events.into_iter().chain(good.into_iter().flatten()).collect();
        let (before, now) = World::simulate(&events);
        let policy = policy(hours, redundancy);
        let now = at(now + ahead * HOUR);
        let Ok(planned) = plan(&before.inventory(), &policy, now) else {
            // Only what is damaged blocks it.
            let hurt = !before.torn.is_empty() || before.backups.iter().any(|b| !before.restores_to_its_end(b));
            prop_assert!(hurt, "nothing is damaged");
            return Ok(());
        };
        let after = before.without(&planned);

        // Every moment of the window.
        let begin = planned.window_begin.unwrap();
        for timeline in before.timelines() {
            for moment in before.moments(begin, now) {
                let target = RecoveryTarget::Time(moment);
                let leads = |world: &World| world.backups.iter().any(|b| world.restores(b.id, tli(timeline), &target));
                prop_assert!(!leads(&before) || leads(&after), "{moment} on timeline {timeline}: {planned:#?}");
            }
        }
        // Every backup that stays, and that nothing was missing of.
        for backup in &after.backups {
            prop_assert!(!before.restores_to_its_end(backup) || after.restores_to_its_end(backup), "{backup:?}");
        }
        for pin in &before.pins {
            prop_assert!(after.backups.iter().any(|backup| backup.id == *pin));
        }
        // Redundancy: the newest full backups on the way to the timeline of the newest backup, to its end.
        if let Some(newest) = before.backups.iter().max_by_key(|b| (before.stored[&b.id], b.id)) {
            let way = newest.timeline;
            let history = before.history(way.get());
            let full = |b: &&BackupRecord| b.id.kind() == BackupKind::Full && history.contains(b.timeline, b.stop_lsn);
            let mut fulls: Vec<_> = before.backups.iter().filter(full).filter(|b| before.restores_to_its_end(b)).collect();
            fulls.sort_by_key(|b| std::cmp::Reverse((b.stop_lsn, b.id)));
            for backup in fulls.iter().take(policy.redundancy.count()) {
                prop_assert!(after.restores_to_its_end(backup), "{planned:#?}");
                let latest = |world: &World| world.restores(backup.id, way, &RecoveryTarget::Latest);
                prop_assert!(!latest(&before) || latest(&after), "{} to the end: {planned:#?}", backup.id);
            }
        }
        // Broken off after any number of backups, the chains of the others are whole.
        let order = planned.backups_to_remove();
        for removed in 0..=order.len() {
            let left: Vec<BackupRecord> =
                before.backups.iter().filter(|b| !order[..removed].contains(&b.id)).cloned().collect();
            for backup in &left {
                prop_assert_eq!(chain(backup, &before.backups).is_ok(), chain(backup, &left).is_ok());
            }
        }
        // A second time there is nothing to do.
        let again = plan(&after.inventory(), &policy, now).unwrap();
        prop_assert!(again.backups_to_remove().is_empty(), "{again:#?}");
        prop_assert_eq!(after.without(&again).segments.len(), after.segments.len());
        prop_assert_eq!(again.window_begin, planned.window_begin);

        // What stays has its reason.
        let ways = before.timelines().len().max(1);
        let old = planned.backups.iter().filter(|b| {
            let begins = b.kept.iter().any(|why| matches!(why, Reason::WindowBegin | Reason::Redundancy));
            begins && !b.kept.contains(&Reason::Window)
        });
        prop_assert!(old.count() <= ways * (1 + policy.redundancy.count()), "{planned:#?}");
        for backup in planned.backups.iter().filter(|b| b.kept.contains(&Reason::Window)) {
            let clocks = before.backups.iter().map(|b| b.stopped_at.max(at(before.stored[&b.id])));
            prop_assert!(clocks.max().unwrap() > begin, "{backup:?}");
        }
        for (timeline, number) in after.segments.keys() {
            let history = |b: &BackupRecord| before.histories.keys().chain([&1]).any(|way| {
                let way = before.history(*way);
                way.contains(b.timeline, b.stop_lsn) && way.spans().iter().any(|span| span.timeline == tli(*timeline))
            });
            let leads = |b: &&BackupRecord| SIZE.segment_number(b.start_lsn) <= *number && history(b);
            let alone = |b: &BackupRecord| {
                !before.history(*timeline).contains(b.timeline, b.stop_lsn) || !before.restores_to_its_end(b)
            };
            prop_assert!(
                after.backups.iter().any(|b| leads(&b)) || before.backups.iter().all(alone),
                "segment {number} of timeline {timeline}: {planned:#?}"
            );
        }
    }
}

/// Weekly full backups and daily incremental ones for this many days, on one timeline that writes a segment an hour.
fn a_month(days: i64) -> (World, i64) {
    let day = |day: i64| {
        let kind = if day % 7 == 0 { 0 } else { 2 };
        [Event::Backup { server: 0, kind, segments: 0, clock_behind: 0 }, Event::Write { server: 0, segments: 5 }]
    };
    let quiet = Event::Quiet { hours: 23 };
    let events: Vec<Event> = (0..days).flat_map(|n| day(n).into_iter().chain([quiet.clone()])).collect();
    World::simulate(&events)
}

fn kept(plan: &RetentionPlan) -> Vec<(String, Vec<Reason>)> {
    let kept = plan.backups.iter().filter(|backup| !backup.kept.is_empty());
    kept.map(|backup| (backup.id.to_string(), backup.kept.clone())).collect()
}

#[test]
fn a_chain_reaches_back_to_the_full_backup_before_the_window() {
    let (world, now) = a_month(30);
    // The window begins within the third week: that week's full backup and all that follow stay.
    let planned = plan(&world.inventory(), &policy(24 * 12, 1), at(now)).unwrap();
    let ids: Vec<BackupId> = world.backups.iter().map(|backup| backup.id).collect();
    assert_eq!(planned.backups_to_remove(), ids[..14].iter().rev().copied().collect::<Vec<_>>());
    let reasons = kept(&planned);
    assert_eq!(reasons[0].1, [Reason::BuiltOnBy(ids[15])]);
    assert!(reasons.iter().any(|(_, why)| why.contains(&Reason::WindowBegin)));
    let first = world.backups[14].start_lsn;
    let needed = &planned.timelines[0].needed;
    assert_eq!(
        (needed.len(), needed[0].first.start(SIZE), needed[0].last),
        (1, Some(SIZE.start_of(SIZE.segment_number(first))), None)
    );
}

#[test]
fn a_pinned_backup_keeps_its_own_wal_and_no_more() {
    let (mut world, now) = a_month(30);
    let pinned = &world.backups[2];
    world.pins.insert(pinned.id);
    let planned = plan(&world.inventory(), &policy(24 * 3, 1), at(now)).unwrap();
    let reasons = kept(&planned);
    assert_eq!(reasons[2], (pinned.id.to_string(), vec![Reason::Pinned]));
    assert_eq!(reasons[1].1, [Reason::BuiltOnBy(pinned.id)]);
    assert_eq!(planned.timelines[0].needed.len(), 4, "{:?}", planned.timelines[0].needed);
    let after = world.without(&planned);
    assert!(after.restores_to_its_end(pinned));
    assert!(!after.restores(pinned.id, tli(1), &RecoveryTarget::Time(at(now - 86_400))));
}

#[test]
fn where_archiving_has_stopped_the_window_stays_where_it_was() {
    let (world, now) = a_month(30);
    let at_once = plan(&world.inventory(), &policy(24 * 12, 1), at(now)).unwrap();
    for later in [86_400 * 40, 86_400 * 4000] {
        let planned = plan(&world.inventory(), &policy(24 * 12, 1), at(now + later)).unwrap();
        assert_eq!(planned, at_once);
    }
}

#[test]
fn nothing_goes_when_the_newest_backup_is_damaged() {
    let policy = policy(24 * 3, 1);
    let message = |world: &World, now: i64| plan(&world.inventory(), &policy, at(now)).unwrap_err().to_string();
    let (good, now) = a_month(30);
    let newest = good.backups[29].clone();

    let mut torn = good.clone();
    torn.torn.insert(newest.id);
    assert!(message(&torn, now).contains("not all of backup"));
    let mut parent_is_torn = good.clone();
    parent_is_torn.torn.insert(good.backups[28].id);
    assert!(message(&parent_is_torn, now).contains(&format!("not all of backup {}", good.backups[28].id)));
    let mut without_parent = good.clone();
    without_parent.backups.remove(28);
    assert!(message(&without_parent, now).contains("builds on"));
    let mut without_wal = good.clone();
    without_wal.segments.remove(&(1, SIZE.segment_number(newest.start_lsn)));
    assert!(message(&without_wal, now).contains("WAL is missing"));
    let mut damaged = good.clone();
    let file = crate::backup::DamagedFile { path: "base/5/1".into(), relation: None, blocks: vec![1], count: 1 };
    damaged.backups[29].damaged.push(file);
    assert!(message(&damaged, now).contains("damaged pages"));
    let mut inventory = good.inventory();
    inventory.unreadable.push(Unreadable { what: "backup X".into(), why: "it's of a newer version".into() });
    assert!(plan(&inventory, &policy, at(now)).unwrap_err().to_string().contains("newer version"));
}

#[test]
fn a_timeline_whose_history_is_missing_blocks_unless_its_own_backups_reach_far_enough() {
    let events = [
        Event::Backup { server: 0, kind: 0, segments: 0, clock_behind: 0 },
        Event::Promote { server: 0, back: 0 },
        Event::Backup { server: 1, kind: 0, segments: 0, clock_behind: 0 },
        Event::Quiet { hours: 100 },
        Event::Write { server: 1, segments: 3 },
    ];
    let (world, now) = World::simulate(&events);
    let mut inventory = world.inventory();
    inventory.histories.clear();
    assert!(plan(&inventory, &policy(24, 1), at(now)).is_ok());
    assert_eq!(plan(&inventory, &policy(24 * 30, 1), at(now)), Err(Blocker::NoHistory(tli(2))));
}

#[test]
fn a_timeline_that_was_given_up_goes_but_for_its_number_and_one_without_backups_stays_whole() {
    let events = [
        Event::Backup { server: 0, kind: 0, segments: 0, clock_behind: 0 },
        Event::Write { server: 0, segments: 10 },
        Event::Promote { server: 0, back: 4 },
        Event::Write { server: 1, segments: 5 },
        Event::Quiet { hours: 24 * 40 },
        Event::Backup { server: 0, kind: 0, segments: 0, clock_behind: 0 },
        Event::Write { server: 0, segments: 1 },
        Event::Quiet { hours: 48 },
        Event::Write { server: 0, segments: 1 },
    ];
    let (world, now) = World::simulate(&events);
    let planned = plan(&world.inventory(), &policy(24, 1), at(now)).unwrap();
    let left = world.without(&planned);
    assert_eq!((left.backups.len(), left.timelines()), (1, BTreeSet::from([1, 2])));
    assert!(left.segments.keys().all(|(timeline, _)| *timeline == 1));
    let given_up = planned.timeline(tli(2)).unwrap();
    assert!(given_up.needed.is_empty());
    for object in [RepositoryObject::Wal(ArchiveFileName::History(tli(2))), RepositoryObject::TimelineOwner(tli(2))] {
        assert!(!given_up.removes(&object), "another server would get its number");
    }
    // No backup leads to the server that began anew: one may be under way.
    let mut lonely = world.clone();
    lonely.histories.insert(3, (vec![], now));
    lonely.segments.insert((3, 400), now);
    let planned = plan(&lonely.inventory(), &policy(24, 1), at(now)).unwrap();
    assert!(planned.timeline(tli(3)).unwrap().needed[0].last.is_none());
}

#[test]
fn without_a_window_everything_stays_and_what_comes_later_always_does() {
    let (world, now) = a_month(30);
    let planned = plan(&world.inventory(), &Policy::default(), at(now)).unwrap();
    assert!(planned.backups_to_remove().is_empty() && world.without(&planned).segments.len() == world.segments.len());

    let mut inventory = world.inventory();
    inventory.backups.clear();
    inventory.facts.clear();
    let planned = plan(&inventory, &policy(1, 1), at(now)).unwrap();
    assert_eq!(world.without(&planned).segments.len(), world.segments.len(), "there is nothing to restore with");

    let planned = plan(&world.inventory(), &policy(1, 1), at(now)).unwrap();
    assert!(!planned.timelines[0].removes_segment(SegmentName::from_number(tli(1), 1_000_000, SIZE)));
    assert_eq!(planned.timeline(tli(2)), None);
}

#[test]
fn remains_go_when_nobody_has_worked_at_them_for_a_week() {
    let (world, now) = a_month(30);
    let mut inventory = world.inventory();
    let old: BackupId = "20260101T000000Z-full".parse().unwrap();
    let young: BackupId = "20260102T000000Z-full".parse().unwrap();
    inventory.unfinished = BTreeMap::from([(old, at(now - 9 * 86_400)), (young, at(now - 6 * 86_400))]);
    assert_eq!(plan(&inventory, &policy(24, 1), at(now)).unwrap().remains, [old]);
}

#[test]
fn deleting_by_name_refuses_what_others_need_and_the_last_one() {
    let (mut world, _) = a_month(10);
    let ids: Vec<BackupId> = world.backups.iter().map(|backup| backup.id).collect();
    let refused = may_delete(&world.inventory(), ids[5], false, false).unwrap_err();
    assert_eq!(refused, DeleteRefusal::BuiltOn { backup: ids[5], dependents: vec![ids[6]] });
    assert_eq!(may_delete(&world.inventory(), ids[5], true, false).unwrap(), [ids[6], ids[5]]);
    assert_eq!(may_delete(&world.inventory(), ids[9], false, false).unwrap(), [ids[9]]);
    let mut inventory = world.inventory();
    inventory.unreadable.push(Unreadable { what: "a record".into(), why: "it's of a newer version".into() });
    let refused = DeleteRefusal::Unreadable { what: "a record".into(), why: "it's of a newer version".into() };
    assert_eq!(may_delete(&inventory, ids[9], true, true), Err(refused));
    world.pins.insert(ids[6]);
    assert_eq!(may_delete(&world.inventory(), ids[5], true, true), Err(DeleteRefusal::Pinned(ids[6])));
    world.pins.clear();
    world.backups.truncate(7);
    assert_eq!(may_delete(&world.inventory(), ids[0], true, false), Err(DeleteRefusal::LastOne));
    assert_eq!(may_delete(&world.inventory(), ids[0], true, true).unwrap().len(), 7);
    assert_eq!(may_delete(&world.inventory(), ids[9], true, true), Err(DeleteRefusal::NoSuchBackup(ids[9])));
}

#[test]
fn snapshots_count_for_themselves_and_take_their_wal_along() {
    let events = [Event::Write { server: 0, segments: 200 }];
    let (world, now) = World::simulate(&events);
    let taken = |number: u64| {
        let stopped_at = at(i64::try_from(number).unwrap() * 600);
        SnapshotRecord {
            id: SnapshotId::new(stopped_at),
            timeline: tli(1),
            start_lsn: sample::lsn(number),
            stop_lsn: sample::lsn(number + 1),
            stopped_at,
            wal_segment_size: SIZE,
            ..snapshot()
        }
    };
    let mut inventory = world.inventory();
    inventory.snapshots = [10, 100, 150, 190].map(taken).to_vec();
    // The window begins with segment 170; the snapshot before it leads there.
    let planned = plan(&inventory, &policy(5, 1), at(now)).unwrap();
    assert_eq!(planned.snapshots_to_remove(), [taken(10).id, taken(100).id]);
    let kept: Vec<_> = planned.snapshots.iter().map(|snapshot| snapshot.kept.clone()).collect();
    assert_eq!(kept, [vec![], vec![], vec![Reason::WindowBegin], vec![Reason::Window, Reason::Redundancy]]);
    assert_eq!(planned.timelines[0].needed[0].first.number(SIZE), Some(150));
    // More of them stay if more are wanted.
    let planned = plan(&inventory, &policy(5, 3), at(now)).unwrap();
    assert_eq!(planned.snapshots_to_remove(), [taken(10).id]);
    // One whose WAL isn't there leads nowhere.
    inventory.wal.clear();
    let mut holed = world.clone();
    holed.segments.remove(&(1, 150));
    inventory.wal = holed.inventory().wal;
    let planned = plan(&inventory, &policy(5, 1), at(now)).unwrap();
    assert_eq!(planned.snapshots_to_remove(), [taken(10).id, taken(150).id]);
}

#[test]
fn a_backup_whose_server_s_clock_was_behind_is_no_older_for_that() {
    let backup = |clock_behind| Event::Backup { server: 0, kind: 0, segments: 0, clock_behind };
    let write = Event::Write { server: 0, segments: 20 };
    let (world, now) = World::simulate(&[backup(0), write.clone(), backup(300), write]);
    // The window begins between the two, whatever the second one's clock said: only the first leads there.
    let planned = plan(&world.inventory(), &policy(5, 1), at(now)).unwrap();
    assert_eq!(planned.backups_to_remove(), []);
    let planned = plan(&world.inventory(), &policy(2, 1), at(now)).unwrap();
    assert_eq!(planned.backups_to_remove(), [world.backups[0].id]);
}

/// The world in which these of its backups found damaged pages.
fn with_damaged_pages(world: &World, which: &[usize]) -> World {
    let mut world = world.clone();
    for at in which {
        let file = crate::backup::DamagedFile { path: "base/5/1".into(), relation: None, blocks: vec![1], count: 1 };
        world.backups[*at].damaged.push(file);
    }
    world
}

#[test]
fn a_backup_with_damaged_pages_never_stands_in_for_a_clean_one() {
    let (world, now) = a_month(30);
    let ids: Vec<BackupId> = world.backups.iter().map(|backup| backup.id).collect();
    let why = |planned: &RetentionPlan, at: usize| planned.backups[at].kept.clone();
    // The window begins behind backup 25, of the chain that begins with 21.
    let clean = plan(&world.inventory(), &policy(24 * 4, 2), at(now)).unwrap();
    let first = clean.backups.iter().position(|backup| backup.kept.contains(&Reason::WindowBegin)).unwrap();
    assert!((22..28).contains(&first), "{clean:#?}");
    assert_eq!((why(&clean, 21).contains(&Reason::Redundancy), why(&clean, 14)), (true, vec![]));
    // With damage in it, the last clean one before it leads there as well, and redundancy goes back further.
    let damaged = with_damaged_pages(&world, &[21]);
    let planned = plan(&damaged.inventory(), &policy(24 * 4, 2), at(now)).unwrap();
    assert!(why(&planned, first).contains(&Reason::WindowBegin) && why(&planned, 21).contains(&Reason::Redundancy));
    assert_eq!(why(&planned, 20), [Reason::WindowBegin]);
    assert_eq!(why(&planned, 14), [Reason::Redundancy, Reason::BuiltOnBy(ids[15])]);
    assert_eq!(planned.backups_to_remove().len(), 14);
    // Where none is clean, what there is has to do.
    let damaged = with_damaged_pages(&world, &[0, 7, 14, 21]);
    let planned = plan(&damaged.inventory(), &policy(24 * 4, 2), at(now)).unwrap();
    assert_eq!(planned.backups_to_remove(), clean.backups_to_remove());
    // Nor when somebody names the clean one.
    let two_weeks = World { backups: world.backups[..14].to_vec(), ..world };
    let damaged = with_damaged_pages(&two_weeks, &[0]);
    assert_eq!(may_delete(&two_weeks.inventory(), ids[7], true, false).unwrap().len(), 7);
    assert_eq!(may_delete(&damaged.inventory(), ids[7], true, false), Err(DeleteRefusal::LastOne));
    assert_eq!(may_delete(&damaged.inventory(), ids[0], true, false).unwrap().len(), 7);
}

#[test]
fn a_server_s_clock_that_was_far_ahead_makes_nothing_younger_than_a_day() {
    let backup = |clock_behind| Event::Backup { server: 0, kind: 0, segments: 0, clock_behind };
    let write = Event::Write { server: 0, segments: 1 };
    let quiet = Event::Quiet { hours: 72 };
    let (world, now) =
        World::simulate(&[backup(0), quiet.clone(), backup(-24 * 365), quiet.clone(), backup(0), quiet, write]);
    let planned = plan(&world.inventory(), &policy(48, 1), at(now)).unwrap();
    // By its own clock the second one would be within the window for a year, and the newest one: none would lead there.
    assert_eq!(planned.backups_to_remove(), [world.backups[1].id, world.backups[0].id]);
    assert_eq!(planned.backups[2].kept, [Reason::WindowBegin, Reason::Redundancy]);
}

#[test]
fn a_snapshot_is_as_young_as_the_later_of_its_clocks() {
    let (world, now) = World::simulate(&[Event::Write { server: 0, segments: 200 }]);
    let taken = |number: u64, by_the_server: i64| SnapshotRecord {
        id: SnapshotId::new(at(i64::try_from(number).unwrap() * 600)),
        timeline: tli(1),
        start_lsn: sample::lsn(number),
        stop_lsn: sample::lsn(number + 1),
        stopped_at: at(by_the_server),
        wal_segment_size: SIZE,
        ..snapshot()
    };
    // The window begins with segment 170. The second one's server had a clock that was ten hours behind.
    let (old, young) = (taken(100, 60_000), taken(180, 180 * 600 - 36_000));
    let mut inventory = world.inventory();
    inventory.snapshots = vec![old.clone(), young.clone()];
    let removed = |inventory: &Inventory| plan(inventory, &policy(5, 1), at(now)).unwrap().snapshots_to_remove();
    assert_eq!(removed(&inventory), [old.id]);
    inventory.snapshots_stored = [(old.id, at(60_010)), (young.id, at(180 * 600 + 10))].into();
    assert_eq!(removed(&inventory), [], "the second one doesn't reach the beginning of the window");
}
