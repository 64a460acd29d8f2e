//! A base backup's files on a store that fails at each call: what is listed restores, and nothing else is listed.
//!
//! What a backup asks PostgreSQL for isn't here (`tests/it/crash.rs`, `tests/it/outage.rs`); all that it does with the store
//! is: parts and lists in threads of their own, the look whether all is there, and the commit marker.

use std::{sync::Arc, time::Duration};

use pgsidecar::{
    backup::{
        claim::remove_remains,
        listing::Listing,
        pack::{Effort, LastFile, Packer, PageRule, Source},
    },
    failure::Failure,
    progress::Progress,
    repository::BackupClaim,
    store::fault::{Fault, Operation},
};
use pgsidecar_core::{
    BackupKind, BackupRecord, Lsn, TimelineId,
    backup_manifest::{ManifestVersion, ManifestWriter, WalRange},
    layout::{BackupObject, RepositoryObject},
};

use super::{
    FAULTS, noise,
    restores::{check_restored, restore_it},
    support::{StoredBackup, World, backup_id, last_part, positions},
};

/// Large enough that its part is written in several pieces.
const LARGE: usize = 2 << 20;

fn make_files(world: &World) {
    let root = world.pgdata.path();
    std::fs::create_dir_all(root.join("base/1")).unwrap();
    std::fs::write(root.join("base/1/1259"), noise(700_000, 1)).unwrap();
    std::fs::write(root.join("base/1/1260"), noise(300_000, 2)).unwrap();
    std::fs::write(root.join("base/1/1261"), noise(LARGE, 3)).unwrap();
    for n in 0..50 {
        std::fs::write(root.join(format!("base/1/{}", 2000 + n)), noise(1000, n)).unwrap();
    }
    std::fs::write(root.join("postgresql.conf"), "").unwrap();
}

/// All that a full backup does with the store.
async fn back_up(world: &World, second: i64) -> Result<BackupRecord, Failure> {
    let repository = world.repository.clone();
    let control = world.control();
    let id = backup_id(second, BackupKind::Full);
    let (start_lsn, stop_lsn) = positions(id);
    let source = Source {
        root: world.pgdata.path().to_owned(),
        major: 15,
        tablespace_directory: "PG_15_202209061".to_owned(),
        pages: PageRule { checked: false, backup_start: Lsn::INVALID, segment_blocks: 131_072 },
        base: None,
    };
    let effort = Effort { parallelism: 2, part_size: 1 << 20 };
    let packer = Packer::new(repository.clone(), id, source, effort, Arc::new(Progress::default()));
    let manifest = ManifestWriter::new(ManifestVersion::V1, control.system_identifier);
    let mut listing = Listing::start(&tokio::runtime::Handle::current(), &repository, id, manifest)?;
    let root = world.pgdata.path().to_owned();
    let packed = tokio::task::spawn_blocking(move || {
        let (mut parts, _) = packer.pack(&mut listing)?;
        let content = |path| std::fs::read(root.join(path)).unwrap();
        let last = [
            LastFile { path: "backup_label", content: b"label".to_vec() },
            LastFile { path: "global/pg_control", content: content("global/pg_control") },
            LastFile { path: "PG_VERSION", content: content("PG_VERSION") },
        ];
        parts.push(packer.pack_last(&last, &mut listing)?);
        let wal = [WalRange { timeline: TimelineId::FIRST, start: start_lsn, end: stop_lsn }];
        Ok::<_, Failure>((parts, listing.finish(&wal)?))
    });
    let (parts, listed) = packed.await??;
    let stored = StoredBackup {
        parts,
        manifest: listed.manifest,
        index: listed.index,
        files: listed.files,
        restored_bytes: listed.restored_bytes,
    };
    let record = world.record(id, None, stored);
    pgsidecar::backup::complete::check_parts(&repository, &record).await?;
    repository.store_json(&RepositoryObject::Backup(id, BackupObject::Record), &record).await?;
    Ok(record)
}

/// What is listed restores to what was there.
async fn check_all_listed(world: &World) -> usize {
    let backups = world.repository.backups().await.unwrap();
    if !backups.is_empty() {
        restore_it(world).await.unwrap();
        check_restored(world);
        let to = world.directory().join("restored");
        assert!(std::fs::read(to.join("base/1/1261")).unwrap() == noise(LARGE, 3));
        std::fs::remove_dir_all(to).unwrap();
    }
    backups.len()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_with_a_fault_at_each_call_is_whole_or_not_listed() {
    let (mut met, mut failed, mut survived) = (0, 0, 0);
    for operation in [Operation::Create, Operation::Begin, Operation::Write, Operation::Finish, Operation::List] {
        for fault in FAULTS {
            for nth in 1.. {
                assert!(nth < 200);
                let world = World::new();
                make_files(&world);
                world.store_wal().await;
                world.plan.clone().on_nth(nth, operation, "backups/", fault);
                let taken = back_up(&world, 0).await;
                let was_met = world.plan.injected() > 0;
                world.plan.heal();
                let listed = check_all_listed(&world).await;
                match taken {
                    Ok(_) => assert_eq!(listed, 1, "{operation:?} {nth} {fault:?}"),
                    // That it was stored and the answer was lost can't be told from here.
                    Err(failure) => {
                        assert!(was_met, "{failure}");
                        failed += 1;
                    }
                }
                if !was_met {
                    break;
                }
                met += 1;
                survived += usize::from(listed == 1);
                // The next one, with another id, is whole.
                if nth == 1 {
                    back_up(&world, 1).await.unwrap();
                    assert_eq!(check_all_listed(&world).await, listed + 1);
                }
                // Writes are many and alike.
                if operation == Operation::Write && nth > 12 {
                    break;
                }
            }
        }
    }
    // Of these, those whose record was stored and only the answer lost.
    assert!(met > 30 && failed > 30 && survived >= 1, "{met} {failed} {survived}");
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_at_random_what_is_listed_restores() {
    let first = std::env::var("PGSIDECAR_TEST_SEED").ok().map(|seed| seed.parse().unwrap());
    let mut listed = 0;
    for seed in first.map_or(0..12, |seed: u64| seed..seed + 1) {
        let world = World::random(seed, 0.02, 0.02);
        make_files(&world);
        for second in 0..3 {
            let _ = back_up(&world, second).await;
        }
        world.plan.heal();
        world.store_wal().await;
        listed += check_all_listed(&world).await;
    }
    assert!(first.is_some() || listed > 3, "{listed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_become_a_backup_since_it_looked_like_remains_is_kept() {
    let world = World::new();
    let ids = [0, 1, 2].map(|number| backup_id(number, BackupKind::Full));
    for id in ids {
        let claim = BackupClaim { id, instance: "pod-0".to_owned(), attempt: "a".to_owned() };
        world.repository.store_json(&RepositoryObject::Backup(id, BackupObject::Started), &claim).await.unwrap();
    }
    // The first of them takes its time to be removed; all have been looked at by then.
    let slow = Fault::Delay(Duration::from_secs(2));
    world.plan.clone().on_nth(1, Operation::Pending, &ids[0].to_string(), slow);
    let completing = async {
        while world.plan.injected() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        world.store_backup(ids[1], None, &[last_part(&world)]).await;
    };
    let (youngest, ()) = tokio::join!(remove_remains(&world.repository, "pod-0"), completing);
    assert_eq!(youngest, Some(ids[2]));
    assert_eq!(world.repository.backup_ids().await.unwrap(), [ids[1]], "and the others are gone");
    let record = world.repository.backup(ids[1]).await.unwrap().unwrap();
    pgsidecar::backup::complete::check_parts(&world.repository, &record).await.unwrap();
}
