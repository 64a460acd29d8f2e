//! Restores from a store that fails at each call: whole, or nothing is left.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use pgsidecar::{
    failure::{Code, Failure},
    repository::Repository,
    restore::{self, RestoreOptions, unpack::Progress},
    store::fault::{Fault, Operation},
};
use pgsidecar_core::{
    BackupId, BackupKind,
    plan::RestoreRequest,
    recovery::{RecoveryTarget, TargetAction},
};

use super::{
    FAULTS, noise,
    support::{PlainFile, SYSTEM, World, backup_id, last_part},
};

/// What goes wrong with what is read: calls that fail, bodies that break off, and bodies that lie.
const READ_FAULTS: [Fault; 6] =
    [FAULTS[0], FAULTS[1], Fault::Cut(0), Fault::Cut(1000), Fault::Flip(20), Fault::Flip(5000)];

/// A full backup's objects by hand: what the restore needs of one, without a server.
async fn make_backup(world: &World) {
    let parts: [Vec<PlainFile>; 3] = [
        vec![("base/1/1259", noise(700_000, 1).to_vec()), ("postgresql.conf", Vec::new())],
        vec![("base/1/1260", noise(300_000, 2).to_vec())],
        last_part(world),
    ];
    world.store_backup(backup_id(0, BackupKind::Full), None, &parts).await;
    world.store_wal().await;
}

/// Restores a backup, the newest if none is named, to a directory.
pub async fn restore_to(repository: &Repository, to: &Path, backup: Option<BackupId>) -> Result<(), Failure> {
    let request = RestoreRequest { target: RecoveryTarget::Immediate, timeline: None, backup, inclusive: true };
    let plan = restore::plan(repository, request).await?;
    let options = RestoreOptions {
        mode: pgsidecar_core::recovery::RecoveryMode::default(),
        to: to.to_owned(),
        inclusive: true,
        action: TargetAction::Promote,
        tablespaces: BTreeMap::new(),
        restore_command: "false".to_owned(),
        parallelism: 2,
    };
    restore::run(repository, &plan, &options, Arc::new(Progress::default())).await
}

pub async fn restore_it(world: &World) -> Result<(), Failure> {
    restore_to(&world.repository, &world.restored(), None).await
}

pub fn check_restored(world: &World) {
    let to = world.restored();
    assert!(std::fs::read(to.join("base/1/1259")).unwrap() == noise(700_000, 1));
    assert!(std::fs::read(to.join("base/1/1260")).unwrap() == noise(300_000, 2));
    assert_eq!(std::fs::read(to.join("PG_VERSION")).unwrap(), b"15\n");
    for name in ["recovery.signal", "backup_label", "postgresql.auto.conf", "backup_manifest", "global/pg_control"] {
        assert!(to.join(name).exists(), "{name}");
    }
    assert!(!to.join("pgsidecar.restoring").exists());
}

/// Restores with each read failing once in each way, which it survives or reports, leaving nothing; after that, it
/// succeeds. `check` looks at what was restored. Answers how many faults were met, and how many ended a restore.
pub async fn sweep_restore(world: &World, backup: Option<BackupId>, check: impl Fn(&World)) -> (u64, u64) {
    let to = world.restored();
    let whole = || {
        check(world);
        std::fs::remove_dir_all(&to).unwrap();
    };
    let (mut met, mut failed) = (0, 0);
    for operation in [Operation::Get, Operation::List] {
        for fault in READ_FAULTS {
            if operation == Operation::List && !FAULTS.contains(&fault) {
                continue;
            }
            // A record that lies is taken for another one: nothing vouches for it but the store.
            let keys = if matches!(fault, Fault::Flip(_)) { ".zst" } else { "" };
            for nth in 1.. {
                assert!(nth < 50);
                let told = format!("{operation:?} {nth} {fault:?}");
                world.plan.clone().on_nth(nth, operation, keys, fault);
                let before = world.plan.injected();
                let outcome = restore_to(&world.repository, &to, backup).await;
                let was_met = world.plan.injected() > before;
                world.plan.heal();
                match outcome {
                    Ok(()) => whole(),
                    Err(failure) => {
                        assert!(was_met, "{told}: {failure}");
                        assert!(matches!(failure.code, Code::StoreUnavailable | Code::Damaged), "{told}: {failure}");
                        assert!(!to.exists(), "{told} left something: {failure}");
                        restore_to(&world.repository, &to, backup).await.unwrap();
                        whole();
                        failed += 1;
                    }
                }
                if !was_met {
                    assert!(nth > 1, "{told} was never met");
                    break;
                }
                met += 1;
            }
        }
    }
    (met, failed)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_with_a_fault_at_each_call_is_whole_or_leaves_nothing_and_succeeds_the_next_time() {
    let world = World::new();
    make_backup(&world).await;
    let (met, failed) = sweep_restore(&world, Some(backup_id(0, BackupKind::Full)), check_restored).await;
    assert!(met > 30 && failed > 15, "{met} {failed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_whose_downloads_break_in_the_middle_takes_them_up_again() {
    let world = World::new();
    make_backup(&world).await;
    // As often as it tries again, each time a little further.
    for nth in 1..=4 {
        world.plan.clone().on_nth(1, Operation::Get, "part-00001", Fault::Cut(nth * 1000));
    }
    restore_it(&world).await.unwrap();
    assert_eq!(world.plan.injected(), 4);
    check_restored(&world);
    assert_eq!(SYSTEM, world.control().system_identifier);
}
