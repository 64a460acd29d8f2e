//! Every call to the store fails once: before it has done anything, and after it has, when only the answer is lost.
//!
//! Each operation is run with the first call failing, then with the second one, and so on, until it gets through
//! without meeting the fault. After each failure nothing half is visible and the same call again succeeds; an
//! acknowledged file is there, identical (I1), and other content under its name is refused (I2).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, reason = "a test fails by panicking")]

mod backups;
mod chains;
mod past;
mod restores;
mod retention;
mod support;
mod sweep;

use std::{
    collections::BTreeMap,
    io::{Read, Seek},
    sync::Arc,
};

use bytes::Bytes;
use pgsidecar::{
    failure::{Code, Failure},
    pgdata::FileStamp,
    repository::{BackupClaim, Stored},
    store::{
        StoreErrorKind,
        fault::{Fault, Operation},
    },
    wal::{archive::Archiver, fetch::Fetcher},
};
use pgsidecar_core::{
    ArchiveFileName, BackupId, BackupKind,
    layout::{BackupObject, RepositoryObject},
};
use support::{World, body, noise, segment};

/// Each fault that every call is to meet.
const FAULTS: [Fault; 2] = [Fault::Before(StoreErrorKind::Unavailable), Fault::After(StoreErrorKind::Unavailable)];

/// Runs `attempt` with the Nth call of this kind failing, for each N until none fails any more. `check` looks at the
/// world after the attempt.
async fn sweep<T>(
    operation: Operation,
    mut attempt: impl AsyncFnMut(&World) -> Result<T, Failure>,
    mut check: impl AsyncFnMut(&World, Result<T, Failure>),
) -> u64 {
    let mut met = 0;
    for fault in FAULTS {
        for nth in 1.. {
            let world = World::new();
            world.plan.clone().on_nth(nth, operation, "", fault);
            let outcome = attempt(&world).await;
            let injected = world.plan.injected();
            assert!(injected <= 1 && nth < 200, "{operation:?} {nth} {fault:?}");
            world.plan.heal();
            if injected == 0 {
                assert!(outcome.is_ok(), "{operation:?} {nth} {fault:?}: {:?}", outcome.err());
            }
            world.check_all_whole().await;
            check(&world, outcome).await;
            if injected == 0 {
                break;
            }
            met += 1;
        }
    }
    met
}

const OPERATIONS: [Operation; 9] = [
    Operation::Create,
    Operation::Begin,
    Operation::Write,
    Operation::Finish,
    Operation::Head,
    Operation::Get,
    Operation::List,
    Operation::Delete,
    Operation::Pending,
];

/// The sweep over all operations. Answers how many faults were met: none would prove nothing.
async fn sweep_all<T>(
    mut attempt: impl AsyncFnMut(&World) -> Result<T, Failure>,
    mut check: impl AsyncFnMut(&World, Result<T, Failure>),
) -> u64 {
    let mut met = 0;
    for operation in OPERATIONS {
        met += sweep(operation, &mut attempt, &mut check).await;
    }
    met
}

#[tokio::test(flavor = "multi_thread")]
async fn a_segment_in_one_request_survives_a_fault_at_each_call() {
    let (name, bytes) = segment(1, 7, 1);
    let other = segment(2, 7, 1).1;
    let archive = async |world: &World, bytes: &Bytes| {
        Archiver::default().archive_body(&world.origin(name), name, body(bytes), Some(bytes.len() as u64)).await
    };
    let met = sweep_all(
        async |world| archive(world, &bytes).await,
        async |world, outcome| {
            let there = world.wal(&name).await;
            match outcome {
                Ok(_) => assert!(there.as_ref() == Some(&bytes), "acknowledged"),
                Err(failure) => {
                    assert_eq!(failure.code, Code::StoreUnavailable, "{failure}");
                    assert!(there.is_none() || there.as_ref() == Some(&bytes));
                }
            }
            let again = archive(world, &bytes).await.unwrap();
            assert_eq!(again == Stored::Already, there.is_some());
            assert!(world.wal(&name).await.as_ref() == Some(&bytes));
            let refused = archive(world, &other).await.unwrap_err();
            assert_eq!(refused.code, Code::Conflict);
            assert!(world.wal(&name).await.as_ref() == Some(&bytes), "nothing was overwritten");
        },
    )
    .await;
    assert!(met >= 2, "{met}");
}

/// More than what is sent in one request, so that the store gets no identity along with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_segment_in_a_streamed_upload_survives_a_fault_at_each_kind_of_call() {
    let (name, bytes) = segment(1, 3, 32);
    let other = segment(2, 3, 32).1;
    for fault in FAULTS {
        for (operation, nth) in [
            (Operation::Begin, 1),
            (Operation::Write, 1),
            (Operation::Write, 2),
            (Operation::Write, 40),
            (Operation::Finish, 1),
        ] {
            let world = World::with_segment_size(32);
            let archiver = Archiver::default();
            let archive =
                async |bytes: &Bytes| archiver.archive_body(&world.origin(name), name, body(bytes), None).await;
            world.plan.clone().on_nth(nth, operation, "", fault);
            let failure = archive(&bytes).await.unwrap_err();
            assert_eq!((failure.code, world.plan.injected()), (Code::StoreUnavailable, 1), "{operation:?} {failure}");
            let there = world.wal(&name).await;
            assert_eq!(there.is_some(), operation == Operation::Finish && matches!(fault, Fault::After(_)));
            // Settling what is there takes reading it, and the reading fails too.
            if there.is_some() {
                for nth in 1..=2 {
                    world.plan.clone().on_nth(nth, Operation::Get, "", fault);
                    let _ = archive(&bytes).await;
                    world.plan.heal();
                }
            }
            let again = archive(&bytes).await.unwrap();
            assert_eq!(again == Stored::Already, there.is_some());
            assert!(world.wal(&name).await.as_ref() == Some(&bytes));
            assert_eq!(archive(&other).await.unwrap_err().code, Code::Conflict);
            assert!(world.wal(&name).await.as_ref() == Some(&bytes), "nothing was overwritten");
            world.check_all_whole().await;
        }
    }
}

// On one thread, so that the second question comes before the first one's answer.
#[tokio::test]
async fn a_file_of_pg_wal_survives_a_fault_at_each_call_and_one_upload_serves_all_who_ask() {
    let (name, bytes) = segment(1, 9, 1);
    let history: ArchiveFileName = "00000002.history".parse().unwrap();
    let partial: ArchiveFileName = "000000010000000000000009.partial".parse().unwrap();
    let text = Bytes::from_static(b"1\t0/900000\tno recovery target specified\n");
    for (name, bytes) in [(name, bytes.clone()), (history, text), (partial, bytes)] {
        let archive = async |world: &World| {
            let archiver = Arc::new(Archiver::default());
            let origin = world.origin(name);
            let ask = || archiver.archive_file(&origin, name);
            let (first, second) = tokio::join!(ask(), ask());
            assert_eq!(first, second, "both wait for the same upload");
            first
        };
        let met = sweep_all(
            async |world| {
                world.put_wal(&name, &bytes);
                archive(world).await
            },
            async |world, outcome| {
                if outcome.is_ok() {
                    assert!(world.wal(&name).await.as_ref() == Some(&bytes));
                }
                archive(world).await.unwrap();
                assert!(world.wal(&name).await.as_ref() == Some(&bytes));
                let mut other = bytes.to_vec();
                *other.last_mut().unwrap() ^= 1;
                world.put_wal(&name, &other);
                match (name, archive(world).await) {
                    // Its key carries its hash: two standbys' partial segments may differ.
                    (ArchiveFileName::Partial(_), stored) => assert_eq!(stored, Ok(Stored::New)),
                    // A history may become none by the change: refused anyhow.
                    (_, stored) => {
                        let code = stored.unwrap_err().code;
                        assert!(matches!(code, Code::Conflict | Code::InvalidSegment), "{code:?}");
                        assert!(world.wal(&name).await.as_ref() == Some(&bytes));
                    }
                }
            },
        )
        .await;
        assert!(met >= 2, "{name} {met}");
    }
}

// On one thread, so that the second question comes before the first one's answer.
#[tokio::test]
async fn a_copy_in_an_archive_directory_survives_a_fault_at_each_call_and_waits_for_the_file_of_its_name_in_pg_wal() {
    let (name, bytes) = segment(1, 9, 1);
    let put = |world: &World, bytes: &[u8]| {
        let path = world.directory().join(name.to_string());
        std::fs::write(&path, bytes).unwrap();
        let stamp = FileStamp::of(&std::fs::metadata(&path).unwrap());
        (path, stamp)
    };
    let met = sweep_all(
        async |world| {
            world.put_wal(&name, &bytes);
            let (path, stamp) = put(world, &bytes);
            let (archiver, origin) = (Arc::new(Archiver::default()), world.origin(name));
            let asked = archiver.archive_file(&origin, name);
            let (asked, copied) = tokio::join!(asked, archiver.archive_copy(&origin, name, path, stamp));
            if asked == Ok(Stored::New) && copied.is_ok() {
                assert_eq!(copied, Ok(Stored::Already), "one after the other");
            }
            copied
        },
        async |world, outcome| {
            if outcome.is_ok() {
                assert!(world.wal(&name).await.as_ref() == Some(&bytes));
            }
            let (archiver, origin) = (Arc::new(Archiver::default()), world.origin(name));
            let (path, stamp) = put(world, &bytes);
            archiver.archive_copy(&origin, name, path, stamp).await.unwrap();
            assert!(world.wal(&name).await.as_ref() == Some(&bytes));
            let mut other = bytes.to_vec();
            *other.last_mut().unwrap() ^= 1;
            let (path, stamp) = put(world, &other);
            // Not taken for the other file of that name, which is archived at the same time.
            let asked = archiver.archive_file(&origin, name);
            let (asked, copied) = tokio::join!(asked, archiver.archive_copy(&origin, name, path, stamp));
            assert_eq!((asked, copied.unwrap_err().code), (Ok(Stored::Already), Code::Conflict));
            assert!(world.wal(&name).await.as_ref() == Some(&bytes));
        },
    )
    .await;
    assert!(met >= 2, "{met}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_breaks_off_leaves_nothing_whatever_the_store_does() {
    let (name, bytes) = segment(1, 7, 1);
    let world = World::new();
    for cut in [0, 1, 39, 40, 300_000, bytes.len() - 1] {
        let short = bytes.slice(..cut);
        let archiver = Archiver::default();
        let failure = archiver.archive_body(&world.origin(name), name, body(&short), None).await.unwrap_err();
        assert_eq!(failure.code, Code::InvalidSegment, "{cut}");
        assert_eq!(world.wal(&name).await, None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_survives_a_fault_at_each_call() {
    let id = BackupId::new("2026-11-21T06:15:00Z".parse().unwrap(), BackupKind::Full);
    let object = RepositoryObject::Backup(id, BackupObject::Started);
    let claim = |attempt: &str| BackupClaim { id, instance: "pod-0".to_owned(), attempt: attempt.to_owned() };
    let met = sweep_all(
        async |world| world.repository.store_json(&object, &claim("a")).await,
        async |world, outcome| {
            let there: Option<BackupClaim> = world.repository.read_json(&object).await.unwrap();
            if outcome.is_ok() {
                assert_eq!(there, Some(claim("a")));
            }
            let again = world.repository.store_json(&object, &claim("a")).await.unwrap();
            assert_eq!(again == Stored::Already, there.is_some());
            let refused = world.repository.store_json(&object, &claim("b")).await.unwrap_err();
            assert_eq!(refused.code, Code::Conflict);
            assert_eq!(world.repository.read_json::<BackupClaim>(&object).await.unwrap(), Some(claim("a")));
        },
    )
    .await;
    assert!(met >= 2, "{met}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_fetched_is_identical_or_an_error_and_never_said_to_be_missing() {
    let (name, bytes) = segment(1, 7, 1);
    let missing = segment(1, 8, 1).0;
    let size = bytes.len() as u64;
    let mut faults: Vec<Fault> = FAULTS.to_vec();
    faults.extend([0, 1, 1000, size / 2].map(Fault::Cut));
    faults.extend([0, 5, 1000, size / 2].map(Fault::Flip));
    faults.push(Fault::Before(StoreErrorKind::Unreachable));
    faults.push(Fault::Before(StoreErrorKind::Denied));
    faults.push(Fault::Before(StoreErrorKind::NoBucket));
    let mut failures = 0;
    for fault in faults {
        for nth in 1..=3 {
            let world = World::new();
            let control = world.control();
            world.repository.note_cluster(control.wal_segment_size).await.unwrap();
            let archiver = Archiver::default();
            archiver.archive_body(&world.origin(name), name, body(&bytes), None).await.unwrap();
            world.plan.clone().on_nth(nth, Operation::Get, "", fault);
            let fetcher = Fetcher::new(None);
            match fetcher.fetch(&world.wanted(name)).await {
                Ok(spooled) => assert!(content(&spooled.file) == bytes, "{fault:?} {nth}"),
                Err(failure) => {
                    failures += 1;
                    assert_ne!(failure.code, Code::NotInArchive, "{fault:?} {nth}: {failure}");
                }
            }
            world.plan.heal();
            assert_eq!(fetcher.fetch(&world.wanted(missing)).await.unwrap_err().code, Code::NotInArchive);
            // A missing one, when it can't be told.
            for key in ["cluster.json", &missing.to_string()] {
                let world_fault = Fault::Before(StoreErrorKind::Unavailable);
                world.plan.clone().on_nth(1, Operation::Get, key, world_fault);
                let code = Fetcher::new(None).fetch(&world.wanted(missing)).await.unwrap_err().code;
                assert_eq!(code, Code::StoreUnavailable);
                world.plan.heal();
            }
            let left = std::fs::read_dir(world.pgdata.wal()).unwrap().count();
            assert_eq!(left, 1, "only archive_status is in pg_wal");
        }
    }
    assert!(failures > 10, "{failures}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_that_breaks_again_and_again_goes_on_as_long_as_it_gets_on() {
    let world = World::new();
    let (key, bytes) = ("main/long".parse().unwrap(), noise(8 << 20, 1));
    world.repository.store_bytes(&key, "long", bytes.clone()).await.unwrap();
    let read = || world.repository.read_plain(&key, Vec::new());
    // More often than it's tried without progress.
    world.plan.clone().always(Operation::Get, "main/long", Fault::Cut(3 << 19));
    let (there, _) = read().await.unwrap().unwrap();
    assert!(there == bytes);
    assert!(world.plan.injected() > 5, "{}", world.plan.injected());
    world.plan.heal();
    // A few bytes each time are no progress.
    let before = world.plan.injected();
    world.plan.clone().always(Operation::Get, "main/long", Fault::Cut(1000));
    assert_eq!(read().await.unwrap_err().code, Code::StoreUnavailable);
    assert_eq!(world.plan.injected() - before, 5);
}

/// What lies in a file without a name.
fn content(file: &std::fs::File) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut file = file;
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Calls at random that fail at random; what was acknowledged is there in the end, whatever happened.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_at_random_what_was_acknowledged_is_there() {
    let first = std::env::var("PGSIDECAR_TEST_SEED").ok().map(|seed| seed.parse().unwrap());
    for seed in first.map_or(1..=12, |seed: u64| seed..=seed) {
        let world = World::random(seed, 0.15, 0.15);
        let archiver = Archiver::default();
        let mut acknowledged = BTreeMap::new();
        for round in 0..30 {
            // Twelve names, two contents: repetitions and conflicts are frequent.
            let choice = noise(4, seed * 1000 + round);
            let (name, bytes) = segment(1 + u64::from(choice[0] % 2), 1 + u64::from(choice[1] % 12), 1);
            let stored = archiver.archive_body(&world.origin(name), name, body(&bytes), None).await;
            let told = format!("PGSIDECAR_TEST_SEED={seed}, round {round}, {name}: {stored:?}");
            match stored {
                Ok(_) => {
                    let known = acknowledged.entry(name).or_insert_with(|| bytes.clone());
                    assert!(*known == bytes, "two contents were acknowledged: {told}");
                }
                Err(failure) => {
                    assert!(matches!(failure.code, Code::StoreUnavailable | Code::Conflict), "{told}");
                }
            }
        }
        world.plan.heal();
        world.check_all_whole().await;
        assert!(!acknowledged.is_empty(), "PGSIDECAR_TEST_SEED={seed}");
        for (name, bytes) in acknowledged {
            assert!(world.wal(&name).await.as_ref() == Some(&bytes), "PGSIDECAR_TEST_SEED={seed} {name}");
        }
    }
}
