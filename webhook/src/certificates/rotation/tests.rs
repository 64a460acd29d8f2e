use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// Periods in which a whole life passes in few steps: in seconds.
fn periods() -> Periods {
    let minutes = SignedDuration::from_mins;
    Periods {
        authority: minutes(1200),
        leaf: minutes(60),
        propagation: minutes(10),
        margin: minutes(5),
        backdate: minutes(5),
    }
}

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + seconds).unwrap()
}

fn made(number: usize, now: Timestamp, periods: &Periods) -> Authority {
    let validity = Validity { not_before: now - periods.backdate, not_after: now + periods.authority };
    Authority { certificate: format!("<{number}>"), key: Some(String::new()), validity, published: None }
}

/// The two objects of the API.
#[derive(Clone, Default)]
struct World {
    secret: Vec<Authority>,
    secret_version: u32,
    bundle: String,
    bundle_version: u32,
    made: usize,
    /// From when to when each CA that was ever made is valid.
    validities: BTreeMap<String, Validity>,
    /// Since when each CA has been in the bundle without a break, on the true clock.
    in_bundle_since: BTreeMap<String, Timestamp>,
    /// How often the bundle changed.
    changes: usize,
}

impl World {
    fn set_bundle(&mut self, bundle: String, now: Timestamp) {
        self.in_bundle_since.retain(|certificate, _| bundle.contains(certificate.as_str()));
        for certificate in bundle.split_inclusive('>') {
            self.in_bundle_since.entry(certificate.to_owned()).or_insert(now);
        }
        self.bundle = bundle;
        self.bundle_version += 1;
        self.changes += 1;
    }

    /// What is valid of a bundle, without keys.
    fn adopt(&self, bundle: &str, now: Timestamp) -> Vec<Authority> {
        let certificates = bundle.split_inclusive('>').map(|certificate| Authority {
            certificate: certificate.to_owned(),
            key: None,
            validity: self.validities[certificate],
            published: Some(now),
        });
        certificates.filter(|authority| now <= authority.validity.not_after).collect()
    }

    /// The manifests were applied anew, with an empty Secret (and with an empty `caBundle`).
    fn lose(&mut self, bundle_too: bool, now: Timestamp) {
        self.secret.clear();
        self.secret_version += 1;
        if bundle_too {
            self.set_bundle(String::new(), now);
        }
    }
}

/// A replica, whose pass can be interrupted between reading and writing.
#[derive(Default)]
struct Replica {
    leaf: Option<Leaf>,
    /// What its clock is ahead, in seconds.
    ahead: i64,
    read: Option<(String, u32, Vec<Authority>, u32)>,
}

impl Replica {
    fn read(&mut self, world: &World) {
        self.read = Some((world.bundle.clone(), world.bundle_version, world.secret.clone(), world.secret_version));
    }

    /// What `Manager::pass` does with what was read.
    fn act(&mut self, world: &mut World, true_now: Timestamp, periods: &Periods) -> bool {
        let Some((seen, bundle_version, mut authorities, secret_version)) = self.read.take() else { return false };
        let now = true_now + SignedDuration::from_secs(self.ahead);
        let served = self.leaf.as_ref().is_some_and(|leaf| leaf.serves(&authorities, &seen, now));
        if let Some(signer) = signer(&authorities, Some(&seen), served, now, periods)
            && self.leaf.as_ref().is_none_or(|leaf| leaf.is_due(signer, now))
        {
            let validity = Validity { not_before: now - periods.backdate, not_after: now + periods.leaf };
            self.leaf = Some(Leaf { authority: signer.certificate.clone(), validity });
        }
        match next(&authorities, &seen, now, periods) {
            Step::Rest => return true,
            Step::Publish(bundle) => {
                if world.bundle_version == bundle_version {
                    world.set_bundle(bundle, true_now);
                }
                return false;
            }
            Step::Make => {
                if authorities.is_empty() {
                    authorities = adopted(&seen, self.leaf.as_ref(), now, 4, |bundle| world.adopt(bundle, now));
                }
                let made = made(world.made, now, periods);
                world.validities.insert(made.certificate.clone(), made.validity);
                authorities.push(made);
                world.made += 1;
            }
            Step::Remove(oldest) => drop(authorities.drain(..oldest)),
            Step::Note => authorities.iter_mut().for_each(|authority| authority.note_published(now, periods)),
        }
        if world.secret_version == secret_version {
            world.secret = authorities;
            world.secret_version += 1;
        }
        false
    }

    fn settle(&mut self, world: &mut World, now: Timestamp, periods: &Periods) {
        for _ in 0..16 {
            self.read(world);
            if self.act(world, now, periods) {
                return;
            }
        }
        panic!("it doesn't settle: {:?}", world.secret);
    }
}

/// What must hold whenever the API server calls: a valid leaf whose CA every API server has had time to notice.
fn is_trusted(
    replica: &Replica,
    world: &World,
    now: Timestamp,
    periods: &Periods,
    first: Timestamp,
) -> Result<(), String> {
    let leaf = replica.leaf.as_ref().ok_or("no leaf")?;
    if !leaf.validity.holds_at(now) {
        return Err(format!("the leaf isn't valid: {leaf:?} at {now}"));
    }
    let since = world.in_bundle_since.get(&leaf.authority).ok_or(format!("not in the bundle: {leaf:?}"))?;
    let noticed = now.duration_since(*since) >= periods.propagation - periods.margin;
    if noticed || *since == first {
        Ok(())
    } else {
        Err(format!("{leaf:?} is served, in the bundle only since {since}"))
    }
}

#[test]
fn at_the_very_start_a_leaf_is_signed_as_soon_as_the_bundle_has_its_ca() {
    let (mut world, mut replica, periods) = (World::default(), Replica::default(), periods());
    let mut steps = Vec::new();
    loop {
        replica.read(&world);
        let step = next(&world.secret, &world.bundle, at(0), &periods);
        steps.push(step.clone());
        assert!(replica.leaf.is_none() || matches!(step, Step::Rest));
        if replica.act(&mut world, at(0), &periods) {
            break;
        }
    }
    assert_eq!(steps, [Step::Make, Step::Publish("<0>".to_owned()), Step::Note, Step::Rest]);
    assert_eq!(replica.leaf.unwrap().authority, "<0>");
}

#[test]
fn a_whole_life_minute_by_minute() {
    let (mut world, mut replica, periods) = (World::default(), Replica::default(), periods());
    let mut told = Vec::new();
    for minute in 0..3600 {
        let now = at(minute * 60);
        replica.settle(&mut world, now, &periods);
        is_trusted(&replica, &world, now, &periods, at(0)).unwrap();
        let line = format!("bundle {}, leaf by {}", world.bundle, replica.leaf.as_ref().unwrap().authority);
        if told.last().is_none_or(|(_, last)| *last != line) {
            told.push((minute, line));
        }
    }
    let told: Vec<String> = told.into_iter().map(|(minute, line)| format!("{minute}: {line}")).collect();
    insta::assert_snapshot!(told.join("\n"), @"
    0: bundle <0>, leaf by <0>
    799: bundle <0><1>, leaf by <0>
    809: bundle <0><1>, leaf by <1>
    874: bundle <1>, leaf by <1>
    1598: bundle <1><2>, leaf by <1>
    1608: bundle <1><2>, leaf by <2>
    1673: bundle <2>, leaf by <2>
    2397: bundle <2><3>, leaf by <2>
    2407: bundle <2><3>, leaf by <3>
    2472: bundle <3>, leaf by <3>
    3196: bundle <3><4>, leaf by <3>
    3206: bundle <3><4>, leaf by <4>
    3271: bundle <4>, leaf by <4>
    ");
}

#[test]
fn a_bundle_that_was_emptied_is_set_again_and_nothing_else_changes() {
    let (mut world, mut replica, periods) = (World::default(), Replica::default(), periods());
    replica.settle(&mut world, at(0), &periods);
    let (secret, leaf) = (world.secret.clone(), replica.leaf.clone());
    world.set_bundle(String::new(), at(60));
    assert_eq!(next(&world.secret, "", at(90), &periods), Step::Publish("<0>".to_owned()));
    replica.settle(&mut world, at(90), &periods);
    assert_eq!((world.secret, replica.leaf, world.bundle.as_str()), (secret, leaf, "<0>"));
}

#[test]
fn what_was_trusted_before_the_secret_was_lost_stays_until_its_leaves_are_gone() {
    let (mut world, mut replica, periods) = (World::default(), Replica::default(), periods());
    replica.settle(&mut world, at(0), &periods);
    world.lose(false, at(60));
    let mut last = String::new();
    for minute in 1..200 {
        let now = at(minute * 60);
        replica.settle(&mut world, now, &periods);
        let leaf = replica.leaf.as_ref().unwrap();
        assert!(world.bundle.contains(&leaf.authority), "{} {leaf:?}", world.bundle);
        assert_eq!(leaf.authority, if minute < 11 { "<0>" } else { "<1>" }, "{minute}");
        last.clone_from(&world.bundle);
    }
    assert_eq!(last, "<1>");
}

/// At any time of a life, also while two replicas have leaves of two CAs.
#[test]
fn what_is_served_is_trusted_again_at_once_when_secret_and_bundle_were_lost_together() {
    let periods = periods();
    for lost in (1..1700).step_by(61).chain((795..890).step_by(3)) {
        let (mut world, mut replicas) = (World::default(), [Replica::default(), Replica::default()]);
        let mut leaves = [None, None];
        for minute in 0..lost + 200 {
            let now = at(minute * 60);
            if minute == lost {
                leaves = [0, 1].map(|which| replicas[which].leaf.clone());
                world.lose(true, now);
            }
            for which in [0, 1] {
                // The second one comes late.
                if which == 0 || minute % 3 == 0 || minute >= lost {
                    replicas[which].settle(&mut world, now, &periods);
                }
                let leaf = replicas[which].leaf.as_ref().unwrap();
                if minute >= lost {
                    assert!(leaf.validity.holds_at(now) && leaf.is_trusted(&world.bundle), "{lost} {minute} {which}");
                }
            }
            // Nobody changes to a CA that API servers haven't noticed, but who has one that nobody adopted.
            if minute == lost {
                assert_eq!(replicas[0].leaf, leaves[0], "{lost}");
                let same = leaves[0].as_ref().unwrap().authority == leaves[1].as_ref().unwrap().authority;
                assert_eq!(replicas[1].leaf == leaves[1], same, "{lost}");
            }
        }
        assert_eq!(world.bundle.matches('<').count(), 1, "{lost}: {}", world.bundle);
    }
}

#[test]
fn a_leaf_whose_ca_is_nowhere_is_of_no_use() {
    let (periods, now) = (periods(), at(60));
    let mut known = made(0, at(0), &periods);
    known.published = Some(at(0));
    let validity = Validity { not_before: at(0), not_after: at(3600) };
    let leaf = Leaf { authority: "<1>".to_owned(), validity };
    assert!(!leaf.serves(&[known.clone()], "<0>", now));
    assert!(leaf.serves(&[known.clone()], "<0><1>", now) && leaf.serves(&[made(1, at(0), &periods)], "", now));
    assert!(!leaf.serves(&[known], "<1>", at(3601)));
}

#[test]
fn a_time_noted_by_a_clock_that_was_wrong_is_noted_again() {
    let periods = periods();
    let mut authority = made(0, at(0), &periods);
    authority.published = Some(at(86_400));
    assert_eq!(next(&[authority.clone()], "<0>", at(60), &periods), Step::Note);
    authority.note_published(at(60), &periods);
    assert_eq!(authority.published, Some(at(60)));
    // A clock that is ahead by less is none that is wrong.
    authority.published = Some(at(60 + 299));
    assert_eq!(next(&[authority], "<0>", at(60), &periods), Step::Rest);
}

#[test]
fn an_expired_ca_does_not_sign_and_goes() {
    let periods = periods();
    let mut old = made(0, at(0), &periods);
    old.published = Some(at(0));
    let late = at(0) + periods.authority + periods.margin;
    assert_eq!(signer(&[old.clone()], Some("<0>"), false, late, &periods), None);
    assert_eq!(next(&[old.clone()], "<0>", late, &periods), Step::Make);
    assert_eq!(next(&[old, made(1, late, &periods)], "<0>", late, &periods), Step::Remove(1));
}

#[test]
fn without_a_configuration_the_newest_signs_for_who_has_no_leaf() {
    let (periods, now) = (periods(), at(0));
    let (mut old, new) = (made(0, now, &periods), made(1, now, &periods));
    let signed_by = |authorities: &[Authority], seen, served| {
        signer(authorities, seen, served, now, &periods).map(|authority| authority.certificate.clone())
    };
    assert_eq!(signed_by(&[old.clone(), new.clone()], None, false), Some("<1>".to_owned()));
    assert_eq!(signed_by(&[old.clone(), new.clone()], None, true), None);
    assert_eq!(signed_by(&[old.clone(), new.clone()], Some(""), false), None);
    // One that has been published for long signs on, whoever has a leaf.
    old.published = Some(now - periods.propagation);
    assert_eq!(signed_by(&[old.clone(), new.clone()], None, true), Some("<0>".to_owned()));
    old.key = None;
    assert_eq!(signed_by(&[old, new], None, false), Some("<1>".to_owned()));
}

/// What happens to two replicas in a minute.
#[derive(Clone, Debug)]
enum Event {
    /// A replica does its pass.
    Pass(usize),
    /// Both read, then both act: one of them on what is no more.
    Race,
    /// A replica reads, the other one does a pass, the first acts.
    Late(usize),
    /// A replica can't reach the API server.
    Away,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (0..2_usize).prop_map(Event::Pass),
        2 => Just(Event::Race),
        2 => (0..2_usize).prop_map(Event::Late),
        1 => Just(Event::Away),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Two replicas with clocks up to four minutes apart, whose passes come in any order and interrupt each other.
    #[test]
    fn two_replicas_never_serve_what_is_not_trusted_and_never_flap(
        ahead in -120..120_i64,
        events in prop::collection::vec(event(), 500),
        outage in 0..1400_usize,
    ) {
        let (mut world, periods) = (World::default(), periods());
        let mut replicas = [Replica { ahead, ..Replica::default() }, Replica { ahead: -ahead, ..Replica::default() }];
        for replica in &mut replicas {
            replica.settle(&mut world, at(0), &periods);
        }
        for minute in 1..2600 {
            let now = at(minute as i64 * 60);
            // One replica is cut off for as long as half a leaf's life.
            let cut_off = (outage..outage + 25).contains(&minute);
            // Just before and just after it does its pass: chance alone may leave one out for longer than there's room for.
            if minute + 1 == outage || minute == outage + 25 {
                replicas.iter_mut().for_each(|replica| replica.settle(&mut world, now, &periods));
            }
            match events[minute % events.len()].clone() {
                Event::Away => {}
                Event::Pass(which) => {
                    if !(cut_off && which == 1) {
                        replicas[which].settle(&mut world, now, &periods);
                    }
                }
                _ if cut_off => replicas[0].settle(&mut world, now, &periods),
                Event::Race => {
                    replicas.iter_mut().for_each(|replica| replica.read(&world));
                    for replica in &mut replicas {
                        replica.act(&mut world, now, &periods);
                    }
                }
                Event::Late(which) => {
                    replicas[which].read(&world);
                    replicas[1 - which].settle(&mut world, now, &periods);
                    replicas[which].act(&mut world, now, &periods);
                }
            }
            for replica in &replicas {
                prop_assert_eq!(is_trusted(replica, &world, now, &periods, at(0)), Ok(()), "minute {}", minute);
            }
        }
        // The first, then one more and one less for each rotation: nothing is set back.
        prop_assert!(world.made >= 3, "{} CAs", world.made);
        prop_assert!(world.changes <= 1 + 2 * world.made, "{} changes", world.changes);
    }
}
