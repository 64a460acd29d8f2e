//! Lives and deaths of a daemon, by a seed: each call to the store can fail before or after it took effect, or never
//! come back; each life ends by a kill in the middle of whatever is under way, and the next one finds what was left.
//!
//! Meanwhile PostgreSQL asks for its files one after the other, look-ahead runs, others ask for files to be restored, and
//! somebody tries to put other content under names that are taken. What must hold: acknowledged ⇒ identical bytes in the
//! repository (I1), nothing is replaced (I2), and 'not in the archive' is never said of what was acknowledged (I5).
//!
//! `PGSIDECAR_TEST_SEED=7` runs one seed again: the choices are the same, the threads' timing is not.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use pgsidecar::{
    failure::{Code, Failure},
    wal::{Origin, Origins, archive::Archiver, fetch::Fetcher, lookahead, owner::Claimant, source::ArchiveStatus},
};
use pgsidecar_core::ArchiveFileName;
use tokio::sync::watch;

use crate::{
    content,
    support::{World, body, noise, segment},
};

const LIVES: u64 = 6;
const SEGMENTS: u64 = 12;
const PATIENCE: Duration = Duration::from_secs(30);

/// The server that the daemons of one seed live beside.
struct Server {
    world: World,
    files: BTreeMap<ArchiveFileName, Bytes>,
    acknowledged: Mutex<BTreeMap<ArchiveFileName, Bytes>>,
}

#[async_trait::async_trait]
impl Origins for Server {
    async fn origin(&self) -> Result<Origin, Failure> {
        self.world.repository.note_cluster(self.world.control().wal_segment_size).await?;
        let claimant = Claimant { workload: "shop/orders".to_owned(), instance: "orders-0".to_owned() };
        Ok(Origin { claimant: Some(claimant), ..self.world.server() })
    }
}

impl Server {
    fn new(seed: u64) -> Server {
        let world = World::deadly(seed, 0.08, 0.08, 0.04);
        let files: BTreeMap<_, _> = (1..=SEGMENTS).map(|number| segment(seed, number, 1)).collect();
        for (name, bytes) in &files {
            world.put_wal(name, bytes);
            world.mark(name, "ready");
        }
        Server { world, files, acknowledged: Mutex::default() }
    }

    fn is_acknowledged(&self, name: ArchiveFileName) -> bool {
        self.acknowledged.lock().unwrap().contains_key(&name)
    }

    fn acknowledge(&self, name: ArchiveFileName, bytes: &Bytes, told: &str) {
        let mut acknowledged = self.acknowledged.lock().unwrap();
        let known = acknowledged.entry(name).or_insert_with(|| bytes.clone());
        assert!(known == bytes, "two contents of {name} were acknowledged: {told}");
    }

    /// PostgreSQL's archiver: the oldest that is ready, again and again.
    async fn archiver(&self, archiver: &Arc<Archiver>, told: &str) {
        loop {
            let ready = self.world.pgdata.ready_files(1, |_| true).unwrap();
            let (Some(name), Ok(origin)) = (ready.first().copied(), self.origin().await) else {
                tokio::time::sleep(Duration::from_millis(5)).await;
                continue;
            };
            match archiver.archive_file(&origin, name).await {
                Ok(_) => {
                    self.acknowledge(name, &self.files[&name], told);
                    self.world.mark(&name, "done");
                }
                Err(failure) => {
                    // Somebody else's content may have come first.
                    assert!(matches!(failure.code, Code::StoreUnavailable | Code::Conflict), "{told}: {failure}");
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        }
    }

    /// Somebody who sends other content under names that PostgreSQL has marked.
    async fn intruder(&self, archiver: &Arc<Archiver>, mut choices: VecDeque<u8>, told: &str) {
        while let (Some(choice), Ok(origin)) = (choices.pop_front(), self.origin().await) {
            let (name, bytes) = segment(99, 1 + u64::from(choice) % SEGMENTS, 1);
            if archiver.archive_body(&origin, name, body(&bytes), None).await.is_ok() {
                self.acknowledge(name, &bytes, told);
            }
            tokio::time::sleep(Duration::from_millis(u64::from(choice % 64))).await;
        }
        std::future::pending().await
    }

    /// A standby that asks for one file after the other, and jumps.
    async fn reader(&self, fetcher: &Fetcher, mut choices: VecDeque<u8>, told: &str) {
        while let Some(choice) = choices.pop_front() {
            for number in u64::from(choice) % SEGMENTS..=SEGMENTS {
                let name = segment(0, 1 + number, 1).0;
                let acknowledged = self.is_acknowledged(name);
                match fetcher.fetch(&self.world.wanted(name)).await {
                    Ok(spooled) => {
                        let found = Bytes::from(content(&spooled.file));
                        let known =
                            [self.files.get(&name), Some(&segment(99, 1 + number, 1).1)].contains(&Some(&found));
                        assert!(known, "{name} came back as something else: {told}");
                    }
                    Err(failure) if failure.code == Code::NotInArchive => {
                        assert!(!acknowledged, "{name} was acknowledged, and is said not to be there: {told}");
                        break;
                    }
                    Err(failure) => {
                        // Before the first life has noted the cluster, nothing is known of it.
                        let known = matches!(failure.code, Code::StoreUnavailable | Code::WrongCluster);
                        assert!(known, "{told}: {failure}");
                    }
                }
            }
        }
        std::future::pending().await
    }

    /// One life, ended by a kill after this time.
    fn live(self: &Arc<Self>, choices: &[u8], length: Duration, told: &str) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (archiver, fetcher) = (Arc::new(Archiver::default()), Fetcher::new(None));
        let (_stop, stop) = watch::channel(false);
        let (some, others) = choices.split_at(choices.len() / 2);
        runtime.block_on(async {
            let _ = tokio::time::timeout(length, async {
                tokio::join!(
                    self.archiver(&archiver, told),
                    self.intruder(&archiver, some.iter().copied().collect(), told),
                    self.reader(&fetcher, others.iter().copied().collect(), told),
                    lookahead::run(archiver.clone(), &**self, Arc::new(ArchiveStatus), stop),
                )
            })
            .await;
        });
        // Nothing is finished, nothing is told.
        runtime.shutdown_background();
    }
}

/// A daemon for which everything works finds what the others have left.
fn check_the_end(server: &Arc<Server>, told: &str) {
    server.world.plan.heal();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let (archiver, origin) = (Arc::new(Archiver::default()), server.origin().await.unwrap());
        let fetcher = Fetcher::new(None);
        for (name, bytes) in &server.files {
            let outcome = tokio::time::timeout(PATIENCE, archiver.archive_file(&origin, *name)).await.unwrap();
            let known = server.acknowledged.lock().unwrap().get(name).cloned();
            let there = server.world.wal(name).await.unwrap();
            assert!(
                known.as_ref().is_none_or(|known| *known == there),
                "{name} was acknowledged with other bytes: {told}"
            );
            match outcome {
                Ok(_) => assert!(there == *bytes, "{name} was acknowledged with other bytes: {told}"),
                Err(failure) => {
                    assert_eq!(failure.code, Code::Conflict, "{told}: {failure}");
                    assert!(there != *bytes, "{name} is refused although it's the same: {told}");
                }
            }
            let fetched = tokio::time::timeout(PATIENCE, fetcher.fetch(&server.world.wanted(*name))).await.unwrap();
            assert!(content(&fetched.unwrap().file) == there, "{name}: {told}");
        }
        server.world.check_all_whole().await;
    });
    let left: Vec<_> = std::fs::read_dir(server.world.pgdata.wal())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("pgsidecar"))
        .collect();
    assert!(left.is_empty(), "{left:?}: {told}");
}

#[test]
fn whatever_fails_or_is_killed_what_was_acknowledged_is_in_the_repository() {
    let one = std::env::var("PGSIDECAR_TEST_SEED").ok().map(|seed| seed.parse().unwrap());
    let (mut acknowledged, mut faults) = (0, 0);
    for seed in one.map_or(1..=10, |seed: u64| seed..=seed) {
        let server = Arc::new(Server::new(seed));
        for life in 0..LIVES {
            let told = format!("PGSIDECAR_TEST_SEED={seed}, life {life}");
            let choices = noise(16, seed * 100 + life);
            let length = Duration::from_millis(60 + u64::from(choices[0]) * 2);
            server.live(&choices[1..], length, &told);
        }
        acknowledged += server.acknowledged.lock().unwrap().len();
        faults += server.world.plan.injected();
        check_the_end(&server, &format!("PGSIDECAR_TEST_SEED={seed}, the end"));
    }
    assert!(acknowledged >= 5 && faults >= 5, "{acknowledged} acknowledged, {faults} faults: nothing was tried");
}
