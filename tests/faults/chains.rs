//! A chain of backups restored from a store that fails at each call: what was there when the newest was taken, or nothing.

use std::{collections::BTreeMap, fs, path::Path};

use pgsidecar::{
    failure::Code,
    store::fault::{Fault, FaultPlan, Operation},
};
use pgsidecar_core::{
    BackupKind, backup_manifest::parse_manifest, incremental_file::IncrementalHeader, page::PAGE_SIZE,
};

use super::{
    noise,
    restores::{restore_to, sweep_restore},
    support::{PlainFile, SEGMENT_BLOCKS, World, backup_id, last_part},
};

const FULL: BackupKind = BackupKind::Full;
const INCREMENTAL: BackupKind = BackupKind::Incremental;

fn blocks(count: usize, seed: u64) -> Vec<u8> {
    noise(count * PAGE_SIZE, seed).to_vec()
}

/// An incremental file with these blocks, filled by this seed.
fn changes(path: &'static str, length: u32, numbers: &[u32], seed: u64) -> PlainFile {
    let header = IncrementalHeader::new(length, numbers.to_vec(), SEGMENT_BLOCKS).unwrap();
    (path, [header.to_bytes(), blocks(numbers.len(), seed)].concat())
}

/// A full backup and two on it by hand: files that change, grow, are cut off, come, go and stay as they are.
async fn make_chain(world: &World) {
    let parts: [Vec<PlainFile>; 3] = [
        vec![("base/1/1", blocks(60, 1)), ("postgresql.conf", b"# full".to_vec())],
        vec![("base/1/2", blocks(40, 2)), ("base/1/3", blocks(10, 3)), ("base/1/4", blocks(9, 4))],
        last_part(world),
    ];
    world.store_backup(backup_id(0, FULL), None, &parts).await;
    let parts: [Vec<PlainFile>; 3] = [
        vec![changes("base/1/INCREMENTAL.1", 60, &[3, 10, 11], 5), changes("base/1/INCREMENTAL.2", 20, &[], 0)],
        vec![
            changes("base/1/INCREMENTAL.4", 9, &[], 0),
            ("base/1/5", blocks(7, 6)),
            ("base/1/6", blocks(2, 7)),
            ("postgresql.conf", b"# first".to_vec()),
        ],
        last_part(world),
    ];
    world.store_backup(backup_id(1, INCREMENTAL), Some(backup_id(0, FULL)), &parts).await;
    let parts: [Vec<PlainFile>; 3] = [
        vec![changes("base/1/INCREMENTAL.1", 60, &[3, 60, 61], 8), changes("base/1/INCREMENTAL.2", 20, &[25], 9)],
        vec![
            changes("base/1/INCREMENTAL.4", 9, &[], 0),
            changes("base/1/INCREMENTAL.5", 7, &[0], 10),
            ("postgresql.conf", b"# second".to_vec()),
        ],
        last_part(world),
    ];
    world.store_backup(backup_id(2, INCREMENTAL), Some(backup_id(1, INCREMENTAL)), &parts).await;
    world.store_wal().await;
}

/// What is to come of the files whose blocks are in several backups.
fn expected() -> BTreeMap<&'static str, Vec<u8>> {
    let put = |into: &mut Vec<u8>, number: usize, from: &[u8], index: usize| {
        let (at, source) = (number * PAGE_SIZE, index * PAGE_SIZE);
        into.resize(into.len().max(at + PAGE_SIZE), 0);
        into[at..at + PAGE_SIZE].copy_from_slice(&from[source..source + PAGE_SIZE]);
    };
    let mut one = blocks(60, 1);
    for (number, (seed, count), index) in
        [(10, (5, 3), 1), (11, (5, 3), 2), (3, (8, 3), 0), (60, (8, 3), 1), (61, (8, 3), 2)]
    {
        put(&mut one, number, &blocks(count, seed), index);
    }
    let mut two = blocks(40, 2);
    two.truncate(20 * PAGE_SIZE);
    put(&mut two, 25, &blocks(1, 9), 0);
    let mut five = blocks(7, 6);
    put(&mut five, 0, &blocks(1, 10), 0);
    let second = b"# second".to_vec();
    [("base/1/1", one), ("base/1/2", two), ("base/1/4", blocks(9, 4)), ("base/1/5", five), ("postgresql.conf", second)]
        .into()
}

/// All files below a directory with their contents. The order in a manifest is that in which threads came by.
fn contents(root: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut contents = BTreeMap::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            let content = fs::read(&path).unwrap();
            let content = match name.as_str() {
                "backup_manifest" => {
                    let mut manifest = parse_manifest(&content).unwrap();
                    manifest.files.sort_by(|one, other| one.path.cmp(&other.path));
                    format!("{manifest:?}").into_bytes()
                }
                _ => content,
            };
            contents.insert(name, content);
        }
    }
    contents
}

/// The chain, and what it is when nothing fails.
async fn chain_and_its_restore(world: &World) -> BTreeMap<String, Vec<u8>> {
    make_chain(world).await;
    let to = world.restored();
    restore_to(&world.repository, &to, None).await.unwrap();
    let whole = contents(&to);
    for (path, content) in expected() {
        assert!(whole[path] == content, "{path}");
    }
    let files = whole.keys().filter(|path| path.starts_with("base/")).count();
    assert_eq!((files, whole["PG_VERSION"].as_slice()), (4, &b"15\n"[..]));
    fs::remove_dir_all(to).unwrap();
    whole
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_s_restore_with_a_fault_at_each_call_is_whole_or_leaves_nothing_and_succeeds_the_next_time() {
    let world = World::new();
    let whole = chain_and_its_restore(&world).await;
    // By its name: without the record of a link, the newest that can be restored is another one.
    let (met, failed) = sweep_restore(&world, Some(backup_id(2, INCREMENTAL)), |world| {
        assert!(contents(&world.restored()) == whole);
    })
    .await;
    assert!(met > 60 && failed > 40, "{met} {failed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_of_a_chain_that_lies_or_is_cut_off_for_good_is_named_and_nothing_is_left() {
    let world = World::new();
    let whole = chain_and_its_restore(&world).await;
    let to = world.restored();
    let refuses = async |key: String, fault: Fault, code: Code| {
        world.plan.clone().always(Operation::Get, &key, fault);
        let failure = restore_to(&world.repository, &to, None).await.unwrap_err();
        world.plan.heal();
        assert_eq!(failure.code, code, "{key} {fault:?}: {failure}");
        assert!(failure.message.contains(&key), "{key} {fault:?}: {failure}");
        assert!(!to.exists(), "{key} {fault:?} left something: {failure}");
    };
    let first = backup_id(1, INCREMENTAL);
    for id in [backup_id(0, FULL), first, backup_id(2, INCREMENTAL)] {
        for (part, at) in [(1, 0), (1, 9000), (2, 700)] {
            refuses(format!("{id}/part-{part:05}.tar.zst"), Fault::Flip(at), Code::Damaged).await;
        }
    }
    // Only one: it's tried again for seconds.
    refuses(format!("{first}/part-00002.tar.zst"), Fault::Cut(700), Code::StoreUnavailable).await;
    restore_to(&world.repository, &to, None).await.unwrap();
    assert!(contents(&to) == whole);
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_at_random_a_chain_is_restored_whole_or_not_at_all() {
    let first = std::env::var("PGSIDECAR_TEST_SEED").ok().map(|seed| seed.parse().unwrap());
    let world = World::new();
    let whole = chain_and_its_restore(&world).await;
    let (to, newest) = (world.restored(), Some(backup_id(2, INCREMENTAL)));
    let (mut failed, mut succeeded) = (0, 0);
    for seed in first.map_or(1..=12, |seed: u64| seed..=seed) {
        let plan = FaultPlan::random(seed, 0.03, 0.03);
        let repository = world.failing(plan.clone());
        for attempt in 0..8 {
            match restore_to(&repository, &to, newest).await {
                Ok(()) => {
                    succeeded += 1;
                    assert!(contents(&to) == whole, "PGSIDECAR_TEST_SEED={seed}, attempt {attempt}");
                    fs::remove_dir_all(&to).unwrap();
                }
                Err(failure) => {
                    failed += 1;
                    let told = format!("PGSIDECAR_TEST_SEED={seed}, attempt {attempt}: {failure}");
                    assert!(plan.injected() > 0 && failure.code == Code::StoreUnavailable, "{told}");
                    assert!(!to.exists(), "{told}");
                }
            }
        }
    }
    assert!(first.is_some() || (failed > 5 && succeeded > 5), "{failed} {succeeded}");
}
