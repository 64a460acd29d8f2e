//! What only a local directory can get wrong.

use std::{collections::BTreeSet, fs, os::unix::fs::PermissionsExt};

use bytes::Bytes;
use pgsidecar::store::{
    ByteRange, Creation, ListRequest, LocalStore, Store, StoreErrorKind,
    fault::{Fault, FaultPlan, FaultStore, Operation},
};
use proptest::prelude::*;

use crate::support::{key, list, names, noise, read};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_listing_is_the_sorted_set_of_its_keys(
        texts in prop::collection::btree_set("[ab0.-]{1,2}(/[ab0.-]{1,2}){0,3}", 0..30),
        prefix in "([ab0.-]{1,2}(/[ab0.-]{0,2}){0,2})?",
        after in prop::option::of("[ab0.-]{1,2}(/[ab0.-]{1,2}){0,2}"),
        limit in 1..8_usize,
    ) {
        runtime().block_on(async {
            let directory = tempfile::tempdir().unwrap();
            let store = LocalStore::new(directory.path());
            let mut expected = BTreeSet::new();
            for text in &texts {
                // Neither "..", nor a file where there already is a directory, or the other way round.
                let Ok(at) = text.parse() else { continue };
                if store.create(&at, Bytes::new(), None).await.is_ok() {
                    expected.insert(text.clone());
                }
            }
            let wanted = |name: &String| name.starts_with(&prefix) && after.as_ref().is_none_or(|after| name > after);
            let request = ListRequest { limit, after: after.clone(), ..ListRequest::under(prefix.clone()) };
            let listed = list(&store, request.clone()).await;
            assert_eq!(names(&listed), expected.iter().filter(|name| wanted(name)).collect::<Vec<_>>());

            let rolled = |name: &String| match name.strip_prefix(&prefix)?.split_once('/') {
                Some((first, _)) => Some(format!("{prefix}{first}/")),
                None => Some(name.clone()),
            };
            let shallow: BTreeSet<_> = expected.iter().filter_map(rolled).filter(|name| wanted(name)).collect();
            let listed = list(&store, ListRequest { shallow: true, ..request }).await;
            let found: BTreeSet<_> = names(&listed).into_iter().map(str::to_owned).chain(listed.prefixes.clone()).collect();
            assert_eq!(found, shallow);
        });
    }
}

#[tokio::test]
async fn temporary_files_of_a_crash_are_listed_as_pending_and_removed() {
    let directory = tempfile::tempdir().unwrap();
    let store = LocalStore::new(directory.path());
    store.create(&key("wal/1"), noise(10, 1), None).await.unwrap();
    for crashed in ["wal/.tmp-crash", ".tmp-other", "dumps/.tmp-third"] {
        fs::create_dir_all(directory.path().join(crashed).parent().unwrap()).unwrap();
        fs::write(directory.path().join(crashed), "half").unwrap();
    }
    assert_eq!(names(&list(&store, ListRequest::default()).await), ["wal/1"]);
    assert_eq!(list(&store, ListRequest::shallow("")).await.prefixes, ["wal/"]);
    let pending = store.pending_uploads("wal/").await.unwrap();
    assert_eq!(pending.iter().map(|upload| upload.key.as_str()).collect::<Vec<_>>(), ["wal/.tmp-crash"]);
    let pending = store.pending_uploads("").await.unwrap();
    assert_eq!(pending.len(), 3);
    for upload in &pending {
        store.abort_pending(upload).await.unwrap();
        store.abort_pending(upload).await.unwrap();
    }
    assert!(store.pending_uploads("").await.unwrap().is_empty());
    assert!(directory.path().join("wal/1").exists() && !directory.path().join("dumps").exists());
    let error = store.create(&key("wal/.tmp-mine"), Bytes::new(), None).await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Unexpected);
}

#[tokio::test]
async fn a_missing_root_is_an_empty_repository_and_made_by_the_first_write() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("not/yet");
    let store = LocalStore::new(&root);
    assert!(list(&store, ListRequest::default()).await.objects.is_empty());
    assert!(store.get(&key("a"), ByteRange::All).await.unwrap().is_none());
    assert!(!root.exists());
    store.create(&key("a/b/c"), Bytes::new(), None).await.unwrap();
    assert!(root.join("a/b/c").exists());
    let mode = root.join("a/b/c").metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o077, 0, "a backup is nobody else's business");
}

#[tokio::test]
async fn a_directory_that_is_a_symlink_is_followed_and_circles_end() {
    let (directory, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let store = LocalStore::new(directory.path());
    store.create(&key("a"), Bytes::new(), None).await.unwrap();
    std::os::unix::fs::symlink(elsewhere.path(), directory.path().join("wal")).unwrap();
    std::os::unix::fs::symlink("nowhere", directory.path().join("dangling")).unwrap();
    store.create(&key("wal/1"), Bytes::new(), None).await.unwrap();
    assert!(elsewhere.path().join("1").exists());
    assert_eq!(names(&list(&store, ListRequest::default()).await), ["a", "wal/1"]);
    std::os::unix::fs::symlink(directory.path(), directory.path().join("z")).unwrap();
    let request = ListRequest { limit: 3, ..ListRequest::default() };
    let page = store.list(&request).await.unwrap();
    assert_eq!(names(&page), ["a", "wal/1", "z/a"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn creations_and_deletions_in_one_directory_do_not_disturb_each_other() {
    let directory = tempfile::tempdir().unwrap();
    let store = LocalStore::new(directory.path());
    let tasks = (0..8).map(|n| {
        let store = store.clone();
        tokio::spawn(async move {
            for _ in 0..25 {
                let at = key(&format!("a/b/{n}"));
                assert_eq!(store.create(&at, noise(10, n), None).await.unwrap(), Creation::Created);
                assert!(store.delete(&[at]).await.unwrap().is_empty());
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    assert!(!directory.path().join("a").exists());
}

#[tokio::test]
async fn faults_come_where_the_plan_says() {
    let directory = tempfile::tempdir().unwrap();
    let plan = FaultPlan::none()
        .on_nth(1, Operation::Create, "after", Fault::After(StoreErrorKind::Unreachable))
        .on_nth(2, Operation::Create, "before", Fault::Before(StoreErrorKind::Throttled))
        .on_nth(1, Operation::Get, "after", Fault::Cut(4))
        .on_nth(2, Operation::Get, "after", Fault::Flip(9));
    let store = FaultStore::new(LocalStore::new(directory.path()), plan.clone());
    let bytes = noise(10, 1);
    let create = |at: &'static str| {
        let (store, bytes) = (&store, bytes.clone());
        async move { store.create(&key(at), bytes, None).await }
    };
    assert_eq!(create("after").await.unwrap_err().kind(), StoreErrorKind::Unreachable);
    assert_eq!(create("after").await.unwrap(), Creation::Exists, "it had taken effect");
    assert_eq!(create("before/1").await.unwrap(), Creation::Created);
    assert_eq!(create("before/2").await.unwrap_err().kind(), StoreErrorKind::Throttled);
    assert_eq!(create("before/2").await.unwrap(), Creation::Created, "it had not taken effect");

    let mut cut = store.get(&key("after"), ByteRange::All).await.unwrap().unwrap();
    assert_eq!(cut.next().await.unwrap().unwrap(), bytes.slice(..4));
    assert_eq!(cut.next().await.unwrap_err().kind(), StoreErrorKind::Unavailable);
    let flipped = store.get(&key("after"), ByteRange::All).await.unwrap().unwrap().bytes(10).await.unwrap();
    assert_eq!((&flipped[..9], flipped[9]), (&bytes[..9], bytes[9] ^ 0x10));
    assert_eq!(read(&store, "after", ByteRange::All).await.unwrap(), bytes);
    assert_eq!(plan.injected(), 4);

    plan.outage(StoreErrorKind::Unreachable);
    assert!(store.list(&ListRequest::default()).await.is_err());
    plan.heal();
    assert_eq!(list(&store, ListRequest::default()).await.objects.len(), 3);
}
