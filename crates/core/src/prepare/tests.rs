use super::*;

const FIRST: SystemIdentifier = SystemIdentifier::new(71);
const SECOND: SystemIdentifier = SystemIdentifier::new(72);

fn timeline(number: u32) -> Option<TimelineId> {
    TimelineId::new(number)
}

fn known(system: SystemIdentifier, has_backups: bool, newest: u32) -> KnownSystem {
    KnownSystem { system, has_backups, has_snapshots: false, has_dumps: false, newest_timeline: timeline(newest) }
}

fn served() -> RequestState {
    RequestState::Served { by: "shop/db-0".into(), at: Timestamp::UNIX_EPOCH, newest_timeline: timeline(1) }
}

fn once(source: Source) -> Option<(OneTimeRequest, Source)> {
    Some(("id=a".parse().unwrap(), source))
}

fn directories() -> Vec<(&'static str, Directory)> {
    vec![
        ("empty", Directory::Empty),
        ("lost+found", Directory::OnlyLostAndFound),
        ("database", Directory::Database),
        ("interrupted", Directory::Interrupted),
        ("other", Directory::Other("file".into())),
    ]
}

fn policies() -> Vec<(&'static str, Option<OnEmpty>)> {
    vec![
        ("default", None),
        ("initdb", Some(OnEmpty::Initdb)),
        ("refuse", Some(OnEmpty::Refuse)),
        ("restore", Some(OnEmpty::Restore)),
    ]
}

type Asked = Option<(OneTimeRequest, Source)>;

fn requests() -> Vec<(&'static str, Asked)> {
    vec![
        ("-", None),
        ("request", once(Source::Own)),
        ("clone", once(Source::Clone { named: false })),
        ("clone with id", once(Source::Clone { named: true })),
    ]
}

fn systems() -> Vec<(&'static str, Vec<KnownSystem>)> {
    let snapshot = KnownSystem { has_snapshots: true, ..known(FIRST, false, 1) };
    let dumps = KnownSystem { has_dumps: true, newest_timeline: None, ..known(FIRST, false, 1) };
    vec![
        ("nothing", vec![]),
        ("WAL", vec![known(FIRST, false, 1)]),
        ("dumps", vec![dumps]),
        ("snapshot", vec![snapshot]),
        ("backup", vec![known(FIRST, true, 1), known(SECOND, false, 1)]),
        ("promoted", vec![known(FIRST, true, 2)]),
        ("two", vec![known(FIRST, true, 1), known(SECOND, true, 1)]),
    ]
}

fn states() -> Vec<(&'static str, RequestState)> {
    vec![
        ("unclaimed", RequestState::Unclaimed),
        ("ours", RequestState::Ours { system: Some(FIRST), newest_timeline: timeline(1) }),
        ("ours, otherwise", RequestState::OursOtherwise("LSN 0/1".into())),
        ("another's", RequestState::Others("shop/db-9".into())),
        ("served", served()),
    ]
}

fn wishes(on_empty: Option<OnEmpty>, once: Asked) -> Wishes {
    Wishes { on_empty, replicas: Replicas::Standby, once, system: None }
}

/// Every combination of what there can be.
fn every(mut look: impl FnMut(&Directory, Place, &Wishes, &Repository, Decision)) {
    let mut repositories = vec![Repository::CantTell];
    for (_, systems) in systems() {
        for (_, request) in states() {
            repositories.push(Repository::Knows { systems: systems.clone(), request });
        }
    }
    for (_, directory) in directories() {
        for place in [Place::Primary, Place::Replica(1)] {
            for (_, on_empty) in policies() {
                for (_, once) in requests() {
                    for replicas in [Replicas::Standby, Replicas::Refuse] {
                        let wishes = Wishes { replicas, ..wishes(on_empty, once.clone()) };
                        for repository in &repositories {
                            let decision = decide(&directory, place, &wishes, repository);
                            look(&directory, place, &wishes, repository, decision);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn in_no_combination_is_a_database_lost_doubled_or_made_blank() {
    let mut combinations = 0;
    every(|directory, place, wishes, repository, decision| {
        combinations += 1;
        let case = format!("{directory:?} {place:?} {wishes:?} {repository:?}: {decision:?}");
        let writes =
            matches!(decision, Decision::ServeRequest(_) | Decision::Clone | Decision::Heal(_) | Decision::Standby(..));
        // A database is kept, whatever was asked for, and nothing else is taken for one.
        assert_eq!(decision == Decision::KeepDatabase, *directory == Directory::Database, "{case}");
        // Something is written only where nothing is, or what a restore of ours has left.
        assert!(!writes || matches!(directory, Directory::Empty | Directory::Interrupted), "{case}");
        // Said is said; otherwise a blank database comes up only where the store has said that nothing could be restored.
        if let Decision::LeaveToImage(why) = decision {
            assert_ne!(*directory, Directory::Interrupted, "{case}");
            let nothing_to_restore = match repository {
                Repository::CantTell => false,
                Repository::Knows { systems, .. } => !has_data(systems) && wishes.once.is_none(),
            };
            assert_eq!(why == Blank::Said, wishes.on_empty == Some(OnEmpty::Initdb), "{case}");
            assert!(why == Blank::Said || nothing_to_restore, "{case}");
            assert_ne!(wishes.on_empty, Some(OnEmpty::Refuse), "{case}");
        }
        // Where later servers aren't to come up, none does on an empty volume, whatever else was said and is known.
        if let (Place::Replica(_), Replicas::Refuse, Directory::Empty) = (place, wishes.replicas, directory) {
            assert_eq!(decision, Decision::Refuse(Refusal::Replica(1)), "{case}");
        }
        // The place of the primary is one server's, and standbys are the others'.
        match (place, &decision) {
            (Place::Replica(_), Decision::ServeRequest(_) | Decision::Clone | Decision::Heal(_)) => panic!("{case}"),
            (Place::Primary, Decision::Standby(..)) => panic!("{case}"),
            _ => {}
        }
        // What was served isn't served again, and what another has begun neither.
        if let Repository::Knows { request, systems } = repository {
            let open = match request {
                RequestState::Unclaimed => true,
                // What it made has been promoted since.
                RequestState::Ours { .. } => systems.first().and_then(|known| known.newest_timeline) != timeline(2),
                _ => false,
            };
            assert!(open || !matches!(decision, Decision::ServeRequest(_) | Decision::Clone), "{case}");
        }
    });
    assert_eq!(combinations, 5 * 2 * 4 * 4 * 2 * 36);
}

#[test]
fn what_an_empty_directory_means() {
    let mut table = Vec::new();
    for place in [Place::Primary, Place::Replica(1)] {
        for (policy, on_empty) in policies() {
            for (asked, once) in requests() {
                let states = if once.is_some() { states() } else { vec![("-", RequestState::Unclaimed)] };
                for (state, request) in states {
                    for (known, systems) in systems() {
                        let repository = Repository::Knows { systems, request: request.clone() };
                        let decision = decide(&Directory::Empty, place, &wishes(on_empty, once.clone()), &repository);
                        let decided = match decision {
                            Decision::Refuse(refusal) => format!("refuse: {refusal}"),
                            decision => format!("{decision:?}"),
                        };
                        let row = (place, policy, asked, state, decided);
                        match table.last_mut() {
                            // The same with more in the repository is told in one line.
                            Some((last, all)) if *last == row => *all = format!("{all}, {known}"),
                            _ => table.push((row, known.to_owned())),
                        }
                    }
                }
            }
        }
    }
    let lines: Vec<String> = table
        .into_iter()
        .map(|((place, policy, asked, state, decision), known)| {
            format!("{place:?} | {policy} | {asked} | {state} | {known} | {decision}")
        })
        .collect();
    insta::assert_snapshot!(lines.join("\n"));
}

#[test]
fn without_the_store_nothing_is_done_but_what_was_said() {
    for (policy, on_empty) in policies() {
        for (asked, once) in requests() {
            let decision =
                decide(&Directory::Empty, Place::Primary, &wishes(on_empty, once.clone()), &Repository::CantTell);
            let expected = match (policy, asked) {
                ("initdb", "-") => Decision::LeaveToImage(Blank::Said),
                ("refuse", "-") => Decision::Refuse(Refusal::Said),
                _ => Decision::Refuse(Refusal::CantTell),
            };
            assert_eq!(decision, expected, "{policy} {asked}");
        }
    }
}

#[test]
fn a_request_is_over_when_what_it_made_has_begun_its_timeline() {
    let system = Some(FIRST);
    for (state, newest, outlived) in [
        (RequestState::Ours { system, newest_timeline: timeline(1) }, known(FIRST, true, 1), false),
        (RequestState::Ours { system, newest_timeline: timeline(1) }, known(FIRST, true, 2), true),
        (RequestState::Ours { system, newest_timeline: timeline(3) }, known(FIRST, false, 4), true),
        // Another database's timelines say nothing, and neither do those of before what isn't known.
        (RequestState::Ours { system, newest_timeline: timeline(1) }, known(SECOND, true, 9), false),
        (RequestState::Ours { system: None, newest_timeline: timeline(1) }, known(FIRST, true, 2), false),
        (RequestState::Ours { system, newest_timeline: None }, known(FIRST, true, 2), false),
        (RequestState::Unclaimed, known(FIRST, true, 2), false),
    ] {
        assert_eq!(state.is_outlived(&[newest]), outlived, "{state:?} {newest:?}");
    }
}

#[test]
fn of_several_databases_the_one_is_restored_that_was_named() {
    let several = [known(FIRST, true, 1), known(SECOND, true, 1)];
    assert_eq!(choose(&several, None), Err(Refusal::SeveralSystems(vec![FIRST, SECOND])));
    assert_eq!(choose(&several, Some(SECOND)), Ok(Some(SECOND)));
    let third = SystemIdentifier::new(73);
    assert_eq!(choose(&several, Some(third)), Err(Refusal::NoSuchSystem(third, vec![FIRST, SECOND])));
    assert_eq!(choose(&[known(FIRST, false, 1), known(SECOND, true, 1)], None), Ok(Some(SECOND)));
    assert_eq!(choose(&[known(FIRST, false, 1)], None), Ok(None));
}

#[test]
fn the_ordinal_is_the_end_of_a_stateful_set_s_pod_s_name() {
    for (pod, place) in [
        ("orders-db-0", Place::Primary),
        ("orders-db-1", Place::Replica(1)),
        ("orders-db-12", Place::Replica(12)),
        ("orders-7c5ddbdf54-x2x4z", Place::Primary),
        ("orders-7c5ddbdf54-24567", Place::Primary),
        ("standalone", Place::Primary),
        ("db-", Place::Primary),
        ("", Place::Primary),
    ] {
        assert_eq!(Place::of_pod(pod), place, "{pod}");
    }
}

#[test]
fn each_refusal_says_what_it_is_and_what_to_do() {
    let id = || "a".parse::<RequestId>().unwrap();
    let refusals = [
        Refusal::CantTell,
        Refusal::NotEmpty("file".into()),
        Refusal::Remains,
        Refusal::LostAndFound,
        Refusal::Said,
        Refusal::LostVolume,
        Refusal::OnlyDumps,
        Refusal::ServedBefore(id()),
        Refusal::RequestChanged(id(), "LSN 0/1".into()),
        Refusal::RequestOfAnother(id(), "shop/db-0".into()),
        Refusal::NoBackups,
        Refusal::SeveralSystems(vec![FIRST, SECOND]),
        Refusal::NoSuchSystem(FIRST, vec![SECOND]),
        Refusal::Replica(1),
        Refusal::ReplicaWaits(1, Awaited::Request),
        Refusal::ReplicaWaits(1, Awaited::Promotion),
        Refusal::ReplicaWaits(1, Awaited::Backup),
    ];
    let told: Vec<String> = refusals.iter().map(|refusal| format!("{refusal}\n  {}", refusal.hint())).collect();
    insta::assert_snapshot!(told.join("\n"));
    assert!("now".parse::<OnEmpty>().is_err() && "many".parse::<Replicas>().is_err());
}
