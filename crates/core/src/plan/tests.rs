use super::*;
use jiff::Timestamp;

use crate::{
    BackupKind, Sha256Digest, SystemIdentifier, WalSegmentSize,
    backup::{BACKUP_FORMAT, StoredObject},
};
use proptest::prelude::*;

pub(crate) const SIZE: WalSegmentSize = WalSegmentSize::DEFAULT;

pub(crate) fn tli(number: u32) -> TimelineId {
    TimelineId::new(number).unwrap()
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).unwrap()
}

/// An LSN in the middle of a segment.
pub(crate) fn lsn(segment: u64) -> Lsn {
    Lsn::new(segment * SIZE.bytes() + 4096)
}

/// A backup that begins in one segment and ends in another; one second is one segment.
pub(crate) fn backup(timeline: u32, start: u64, stop: u64) -> BackupRecord {
    let object = StoredObject { size: 1, sha256: Sha256Digest::of(b"") };
    let second = i64::try_from(stop).unwrap();
    BackupRecord {
        format: BACKUP_FORMAT,
        id: BackupId::new(at(i64::try_from(start).unwrap()), BackupKind::Full),
        parent: None,
        system_identifier: SystemIdentifier::new(7),
        server_version: 150_000,
        timeline: tli(timeline),
        start_lsn: lsn(start),
        stop_lsn: lsn(stop),
        started_at: at(i64::try_from(start).unwrap()),
        stopped_at: at(second),
        next_xid_at_stop: 1000 + stop,
        from_standby: false,
        wal_segment_size: SIZE,
        block_size: 8192,
        data_checksums: true,
        tablespaces: vec![],
        parts: vec![],
        manifest: object,
        index: object,
        files: 0,
        restored_bytes: 0,
        damaged: Vec::new(),
        warnings: vec![],
        writer: "test".into(),
    }
}

pub(crate) fn history(timeline: u32, lines: &[(u32, Lsn)]) -> TimelineHistory {
    let text: String = lines.iter().map(|(tli, lsn)| format!("{tli}\t{lsn}\treason\n\n")).collect();
    TimelineHistory::parse(tli(timeline), text.as_bytes()).unwrap()
}

fn request(target: RecoveryTarget) -> RestoreRequest {
    RestoreRequest { target, timeline: None, backup: None, inclusive: true }
}

fn chosen(catalog: &Catalog, target: RecoveryTarget) -> Result<(u64, u32), PlanError> {
    let selection = select(catalog, &request(target))?;
    Ok((SIZE.segment_number(selection.backup.start_lsn), selection.history.timeline().get()))
}

/// Scans an archive that has these segments, stored in the second of their number.
fn scan(history: TimelineHistory, from: Lsn, segments: &[(u32, u64)]) -> WalFacts {
    let mut scan = WalScan::new(history, SIZE, from);
    let mut sorted = segments.to_vec();
    sorted.sort_unstable();
    for (timeline, number) in sorted {
        scan.found(SegmentName::from_number(tli(timeline), number, SIZE), 10, at(i64::try_from(number).unwrap()));
    }
    scan.finish()
}

fn plan(catalog: &Catalog, target: RecoveryTarget, segments: &[(u32, u64)]) -> Result<RestorePlan, PlanError> {
    let selection = select(catalog, &request(target.clone()))?;
    let facts = scan(selection.history.clone(), selection.backup.start_lsn, segments);
    RestorePlan::new(selection, target, facts)
}

#[test]
fn the_newest_backup_before_the_target_is_chosen() {
    let catalog = Catalog {
        backups: vec![backup(1, 10, 12), backup(1, 30, 33), backup(1, 20, 22)],
        histories: vec![],
        ..Catalog::default()
    };
    assert_eq!(chosen(&catalog, RecoveryTarget::Latest), Ok((30, 1)));
    assert_eq!(chosen(&catalog, RecoveryTarget::Immediate), Ok((30, 1)));
    assert_eq!(chosen(&catalog, RecoveryTarget::Time(at(32))), Ok((20, 1)));
    assert_eq!(chosen(&catalog, RecoveryTarget::Time(at(33))), Ok((30, 1)));
    assert_eq!(chosen(&catalog, RecoveryTarget::Lsn(lsn(21))), Ok((10, 1)));
    assert_eq!(chosen(&catalog, RecoveryTarget::Xid(1022)), Ok((20, 1)));
    assert_eq!(chosen(&catalog, RecoveryTarget::Xid(1021)), Ok((10, 1)));
}

#[test]
fn transactions_are_compared_as_postgresql_does_across_the_wraparound() {
    assert!(xid_not_before(5, 0xFFFF_FFF0));
    assert!(!xid_not_before(0xFFFF_FFF0, 5));
    assert!(xid_not_before(7, (3 << 32) + 7));
}

#[test]
fn a_target_before_every_backup_is_refused_with_what_there_is() {
    let catalog = Catalog { backups: vec![backup(1, 10, 12)], histories: vec![], ..Catalog::default() };
    let error = chosen(&catalog, RecoveryTarget::Time(at(11))).unwrap_err();
    insta::assert_snapshot!(error, @"the target, time 2027-01-15T08:00:11Z, lies before the end of the first backup that could lead to it: 20270115T080010Z-full was complete at 2027-01-15T08:00:12Z (0/C001000)");
    assert!(matches!(chosen(&Catalog::default(), RecoveryTarget::Latest), Err(PlanError::NoBackups)));
}

#[test]
fn a_named_backup_is_used_or_refused_never_replaced() {
    let catalog =
        Catalog { backups: vec![backup(1, 10, 12), backup(1, 20, 22)], histories: vec![], ..Catalog::default() };
    let named = |id: BackupId, target| {
        let request = RestoreRequest { target, timeline: None, backup: Some(id), inclusive: true };
        select(&catalog, &request).map(|selection| selection.backup.id)
    };
    let (first, second) = (catalog.backups[0].id, catalog.backups[1].id);
    assert_eq!(named(first, RecoveryTarget::Latest), Ok(first));
    assert!(
        matches!(named(second, RecoveryTarget::Time(at(15))), Err(PlanError::BeforeBackup { backup, .. }) if backup == second)
    );
    let unknown = BackupId::new(at(99), BackupKind::Full);
    assert_eq!(named(unknown, RecoveryTarget::Latest), Err(PlanError::NoSuchBackup(unknown)));
}

#[test]
fn a_backup_whose_chain_is_not_whole_is_passed_over_and_refused_where_it_was_named() {
    let on = |parent: &BackupRecord, start: u64, bytes: u64| {
        let own = backup(1, start, start + 2);
        let id = BackupId::new(own.id.began(), BackupKind::Incremental);
        let object = StoredObject { size: bytes, ..own.index };
        BackupRecord { id, parent: Some(parent.id), index: object, ..own }
    };
    let first = backup(1, 10, 12);
    let second = on(&first, 20, 100);
    let third = on(&second, 30, 10_000);
    let (all, ids) = (vec![first.clone(), second.clone(), third.clone()], [first.id, second.id, third.id]);
    let catalog = Catalog { backups: all, histories: vec![], ..Catalog::default() };
    let segments: Vec<(u32, u64)> = (10..40).map(|number| (1, number)).collect();
    let whole = plan(&catalog, RecoveryTarget::Latest, &segments).unwrap();
    let json = serde_json::to_value(&whole).unwrap();
    assert_eq!(json["chain"], serde_json::json!(ids));
    // The manifests have 1 byte each, and the first index as well.
    assert_eq!((whole.download_bytes, whole.passed_over), (2 + 101 + 10_001, vec![]));

    let cut = Catalog { backups: vec![third.clone(), first.clone()], histories: vec![], ..Catalog::default() };
    let older = plan(&cut, RecoveryTarget::Latest, &segments).unwrap();
    assert_eq!((older.backup.id, older.chain, older.download_bytes), (first.id, vec![first.clone()], 2));
    insta::assert_snapshot!(older.passed_over[0].because, @"backup 20270115T080030Z-incremental builds on 20270115T080020Z-incremental, which is not in the repository");
    assert_eq!(older.passed_over[0].backup, third.id);
    // Where it wouldn't have been chosen, nothing is to be told.
    assert_eq!(plan(&cut, RecoveryTarget::Time(at(31)), &segments).unwrap().passed_over, []);

    let named =
        RestoreRequest { target: RecoveryTarget::Latest, timeline: None, backup: Some(third.id), inclusive: true };
    let missing = ChainError::Missing { backup: third.id, missing: second.id };
    assert_eq!(select(&cut, &named), Err(PlanError::Chain(missing)));
    let alone = Catalog { backups: vec![third], histories: vec![], ..Catalog::default() };
    assert_eq!(select(&alone, &request(RecoveryTarget::Latest)), Err(PlanError::Chain(missing)));
}

#[test]
fn a_restore_point_needs_a_named_backup() {
    let catalog = Catalog { backups: vec![backup(1, 10, 12)], histories: vec![], ..Catalog::default() };
    let target = RecoveryTarget::Name("before-migration".parse().unwrap());
    assert!(matches!(chosen(&catalog, target.clone()), Err(PlanError::NameNeedsBackup { .. })));
    let request = RestoreRequest { target, timeline: None, backup: Some(catalog.backups[0].id), inclusive: true };
    assert!(select(&catalog, &request).is_ok());
}

#[test]
fn a_backup_of_an_abandoned_branch_is_not_on_the_way() {
    // Timeline 2 left timeline 1 in segment 15; the backup at 20 belongs to what was given up.
    let catalog = Catalog {
        backups: vec![backup(1, 10, 12), backup(1, 20, 22), backup(2, 17, 18)],
        histories: vec![history(2, &[(1, lsn(15))])],
        ..Catalog::default()
    };
    assert_eq!(chosen(&catalog, RecoveryTarget::Latest), Ok((17, 2)));
    assert_eq!(chosen(&catalog, RecoveryTarget::Time(at(17))), Ok((10, 2)));
    let old = RestoreRequest { target: RecoveryTarget::Latest, timeline: Some(tli(1)), backup: None, inclusive: true };
    let selection = select(&catalog, &old).unwrap();
    assert_eq!((selection.backup.start_lsn, selection.history.timeline()), (lsn(20), tli(1)));
}

#[test]
fn a_newer_timeline_without_a_way_to_it_is_passed_over() {
    // Timeline 2 began before the only backup was complete.
    let catalog =
        Catalog { backups: vec![backup(1, 10, 12)], histories: vec![history(2, &[(1, lsn(5))])], ..Catalog::default() };
    assert_eq!(chosen(&catalog, RecoveryTarget::Latest), Ok((10, 1)));
    let named =
        RestoreRequest { target: RecoveryTarget::Latest, timeline: Some(tli(2)), backup: None, inclusive: true };
    assert_eq!(select(&catalog, &named), Err(PlanError::NoBackupOnTimeline(tli(2))));
    let unknown =
        RestoreRequest { target: RecoveryTarget::Latest, timeline: Some(tli(9)), backup: None, inclusive: true };
    assert_eq!(select(&catalog, &unknown), Err(PlanError::NoSuchTimeline(tli(9))));
}

#[test]
fn a_timeline_that_was_only_begun_is_passed_over_unless_it_is_named() {
    let catalog = Catalog {
        backups: vec![backup(1, 10, 12), backup(2, 17, 18)],
        histories: vec![history(2, &[(1, lsn(15))]), history(3, &[(1, lsn(15))]), history(4, &[(2, lsn(19))])],
        begun_only: [tli(3), tli(4)].into(),
        ..Catalog::default()
    };
    assert_eq!(chosen(&catalog, RecoveryTarget::Latest), Ok((17, 2)));
    assert_eq!(chosen(&catalog, RecoveryTarget::Time(at(17))), Ok((10, 2)));
    let named =
        RestoreRequest { target: RecoveryTarget::Latest, timeline: Some(tli(4)), backup: None, inclusive: true };
    assert_eq!(select(&catalog, &named).unwrap().history.timeline(), tli(4));
    let begun_and_more = Catalog { begun_only: [tli(3)].into(), ..catalog };
    assert_eq!(chosen(&begun_and_more, RecoveryTarget::Latest), Ok((17, 4)));
}

#[test]
fn wal_is_followed_across_a_switch_and_not_into_the_abandoned_branch() {
    let way = history(2, &[(1, lsn(15))]);
    // Segment 15 is on both timelines; 16 and 17 of timeline 1 were given up.
    let segments = [(1, 13), (1, 14), (1, 15), (1, 16), (1, 17), (2, 15), (2, 16)];
    let facts = scan(way.clone(), lsn(13), &segments);
    assert_eq!((facts.reachable, facts.gap), (Lsn::new(17 * SIZE.bytes()), false));
    assert_eq!(facts.missing.to_string(), "000000020000000000000011");
}

#[test]
fn the_old_timeline_s_segment_is_not_taken_for_the_new_one_s_first() {
    let catalog = Catalog {
        backups: vec![backup(1, 10, 12)],
        histories: vec![history(2, &[(1, lsn(15))])],
        ..Catalog::default()
    };
    let segments = [(1, 10), (1, 11), (1, 12), (1, 13), (1, 14), (1, 15), (1, 16)];
    let error = plan(&catalog, RecoveryTarget::Latest, &segments).unwrap_err();
    insta::assert_snapshot!(error, @"timeline 2 can't be reached: its first WAL segment, 00000002000000000000000F, is not in the archive");
    assert!(plan(&catalog, RecoveryTarget::Immediate, &segments).is_ok());
    assert!(plan(&catalog, RecoveryTarget::Lsn(lsn(14)), &segments).is_ok());
    assert!(plan(&catalog, RecoveryTarget::Lsn(lsn(15)), &segments).is_err());
    let with_the_first = [&segments[..], &[(2, 15)]].concat();
    assert!(plan(&catalog, RecoveryTarget::Latest, &with_the_first).is_ok());
}

#[test]
fn the_listings_begin_where_the_way_does() {
    let way = history(3, &[(1, lsn(5)), (2, lsn(15))]);
    let listings =
        |from| WalScan::new(way.clone(), SIZE, from).listings().iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(listings(lsn(7)), ["000000020000000000000007", "00000003000000000000000F"]);
    assert_eq!(listings(lsn(4)), ["000000010000000000000004", "000000020000000000000005", "00000003000000000000000F"]);
}

#[test]
fn a_backup_whose_own_wal_is_missing_is_refused() {
    let catalog = Catalog { backups: vec![backup(1, 10, 12)], histories: vec![], ..Catalog::default() };
    let segments = [(1, 10), (1, 12), (1, 13)];
    let error = plan(&catalog, RecoveryTarget::Latest, &segments).unwrap_err();
    insta::assert_snapshot!(error, @"backup 20270115T080010Z-full can't be restored: WAL segment 00000001000000000000000B, which it needs, is not in the archive");
    assert!(plan(&catalog, RecoveryTarget::Latest, &[]).is_err());
    assert!(plan(&catalog, RecoveryTarget::Latest, &[(1, 10), (1, 11), (1, 12)]).is_ok());
}

#[test]
fn a_backup_that_stops_at_a_boundary_does_not_need_the_segment_after_it() {
    let mut at_boundary = backup(1, 10, 12);
    at_boundary.stop_lsn = Lsn::new(12 * SIZE.bytes());
    let catalog = Catalog { backups: vec![at_boundary], histories: vec![], ..Catalog::default() };
    assert!(plan(&catalog, RecoveryTarget::Latest, &[(1, 10), (1, 11)]).is_ok());
}

#[test]
fn a_target_in_or_after_a_gap_names_the_missing_segment() {
    let catalog = Catalog { backups: vec![backup(1, 10, 12)], histories: vec![], ..Catalog::default() };
    let segments = [(1, 10), (1, 11), (1, 12), (1, 14)];
    let error = plan(&catalog, RecoveryTarget::Lsn(lsn(14)), &segments).unwrap_err();
    insta::assert_snapshot!(error, @"the target, LSN 0/E001000, can't be reached: WAL segment 00000001000000000000000D is missing in the archive, and later ones are there");
    assert!(plan(&catalog, RecoveryTarget::Lsn(lsn(12)), &segments).is_ok());
}

#[test]
fn a_target_after_the_archive_s_end_says_where_that_is() {
    let catalog = Catalog { backups: vec![backup(1, 10, 12)], histories: vec![], ..Catalog::default() };
    let segments = [(1, 10), (1, 11), (1, 12)];
    let error = plan(&catalog, RecoveryTarget::Lsn(Lsn::new(13 * SIZE.bytes())), &segments).unwrap_err();
    insta::assert_snapshot!(error, @"the target, LSN 0/D000000, lies after the last archived WAL: the archive ends at 0/D000000, in segment 00000001000000000000000C, stored at 2027-01-15T08:00:12Z");
    // Whether a time is reached isn't told by when segments were stored: the WAL has to be looked into.
    let planned = plan(&catalog, RecoveryTarget::Time(at(99)), &segments).unwrap();
    assert!(matches!(planned.expected_end, ExpectedEnd::NotVerified { .. }));
    assert!(plan(&catalog, RecoveryTarget::Lsn(lsn(12)), &segments).is_ok());
}

/// A restore point whose record ends in this segment.
fn point(name: &str, timeline: u32, segment: u64) -> RestorePointRecord {
    RestorePointRecord {
        format: 1,
        name: name.parse().unwrap(),
        lsn: lsn(segment),
        timeline: tli(timeline),
        created_at: at(i64::try_from(segment).unwrap()),
        system_identifier: SystemIdentifier::new(7),
        writer: "test".into(),
    }
}

fn named(name: &str) -> RecoveryTarget {
    RecoveryTarget::Name(name.parse().unwrap())
}

#[test]
fn a_recorded_restore_point_chooses_the_newest_backup_before_it() {
    let catalog = Catalog {
        backups: vec![backup(1, 10, 12), backup(1, 20, 22), backup(1, 30, 32)],
        restore_points: vec![point("before", 1, 25), point("other", 1, 35)],
        histories: vec![],
        ..Catalog::default()
    };
    assert_eq!(chosen(&catalog, named("before")), Ok((20, 1)));
    assert_eq!(chosen(&catalog, named("other")), Ok((30, 1)));
    let error = chosen(&catalog, named("unknown")).unwrap_err();
    insta::assert_snapshot!(error.hint(), @r#"Name the last backup before the restore point with --backup ('pgsidecar backup list' shows them). Those that 'pgsidecar restore-point create' makes are found by their names. Recorded are: "other", "before"."#);
    // Its last byte has to be there, and nothing behind it.
    let segments: Vec<(u32, u64)> = (20..=25).map(|number| (1, number)).collect();
    let whole = plan(&catalog, named("before"), &segments).unwrap();
    assert_eq!(whole.restore_point, Some(point("before", 1, 25)));
    assert!(matches!(plan(&catalog, named("before"), &segments[..5]), Err(PlanError::AfterLastWal { .. })));
    let only_later = Catalog { backups: vec![backup(1, 30, 32)], ..catalog };
    assert!(matches!(chosen(&only_later, named("before")), Err(PlanError::BeforeFirstBackup { .. })));
}

#[test]
fn of_two_restore_points_of_a_name_the_newer_is_meant_and_must_be_the_first_to_be_met() {
    let points = vec![point("before", 1, 15), point("before", 1, 25)];
    let catalog = |backups| Catalog { backups, restore_points: points.clone(), ..Catalog::default() };
    assert_eq!(chosen(&catalog(vec![backup(1, 10, 12), backup(1, 20, 22)]), named("before")), Ok((20, 1)));
    // The one in between was made while the backup was taken.
    for backups in [vec![backup(1, 10, 12)], vec![backup(1, 10, 12), backup(1, 14, 16)]] {
        let error = chosen(&catalog(backups), named("before")).unwrap_err();
        insta::allow_duplicates! {
            insta::assert_snapshot!(format!("{error}. {}", error.hint()), @r#"the restore point "before" at 0/19001000 can't be reached by its name: there is another one of that name at 0/F001000, and no backup between them. Choose it by its position: --target-lsn 0/19001000 --target-exclusive."#);
        }
    }
    // Who names the backup means the first one behind it.
    let catalog = catalog(vec![backup(1, 10, 12), backup(1, 14, 16)]);
    let request = |backup: &BackupRecord| RestoreRequest { backup: Some(backup.id), ..request(named("before")) };
    let selection = select(&catalog, &request(&catalog.backups[0])).unwrap();
    assert_eq!(selection.restore_point, Some(point("before", 1, 15)));
    assert!(matches!(select(&catalog, &request(&catalog.backups[1])), Err(PlanError::BeforeBackup { .. })));
}

#[test]
fn a_restore_point_of_an_abandoned_branch_is_found_on_its_own_timeline_only() {
    let catalog = Catalog {
        backups: vec![backup(1, 10, 12)],
        histories: vec![history(2, &[(1, lsn(15))])],
        restore_points: vec![point("abandoned", 1, 17), point("common", 1, 14), point("new", 2, 17)],
        ..Catalog::default()
    };
    assert_eq!(chosen(&catalog, named("common")), Ok((10, 2)));
    assert_eq!(chosen(&catalog, named("new")), Ok((10, 2)));
    assert_eq!(chosen(&catalog, named("abandoned")), Ok((10, 1)));
    let on = |timeline| RestoreRequest { timeline: Some(tli(timeline)), ..request(named("abandoned")) };
    assert!(matches!(select(&catalog, &on(2)), Err(PlanError::NameNeedsBackup { .. })));
}

proptest! {
    /// Whatever lies in the archive: a plan is made only if every segment from the backup's start to the LSN is there.
    #[test]
    fn a_plan_never_crosses_a_gap(present in prop::collection::btree_set(5..30u64, 0..25), target in 8..30u64) {
        let catalog = Catalog { backups: vec![backup(1, 6, 8)], histories: vec![], ..Catalog::default() };
        let segments: Vec<(u32, u64)> = present.iter().map(|number| (1, *number)).collect();
        let planned = plan(&catalog, RecoveryTarget::Lsn(lsn(target)), &segments).is_ok();
        let complete = (6..=target.max(8)).all(|number| present.contains(&number));
        prop_assert_eq!(planned, complete);
    }

    /// The order and the number of backups don't matter: the one that is chosen is the last that is allowed.
    #[test]
    fn the_choice_does_not_depend_on_the_order(stops in prop::collection::btree_set(10..60u64, 1..8), target in 5..70i64, turn in 0..8usize) {
        let mut backups: Vec<_> = stops.iter().map(|stop| backup(1, stop - 3, *stop)).collect();
        let expected = stops.iter().filter(|stop| i64::try_from(**stop).unwrap() <= target).max().copied();
        let middle = turn % backups.len();
        backups.rotate_left(middle);
        let catalog = Catalog { backups, histories: vec![], ..Catalog::default() };
        let found = select(&catalog, &request(RecoveryTarget::Time(at(target)))).ok();
        prop_assert_eq!(found.map(|selection| SIZE.segment_number(selection.backup.stop_lsn)), expected);
    }
}
