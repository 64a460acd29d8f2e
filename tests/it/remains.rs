//! What killed daemons leave in the repository, and nobody lists.

use std::{
    fs,
    time::{Duration, SystemTime},
};

use crate::support::{Look, Repository, Scratch, archiving, give_to_servers, wait_until};

const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn what_killed_daemons_left_of_uploads_of_wal_is_removed_when_the_next_one_starts_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::directory(&scratch);
    let (postgres, mut sidecar) = archiving(&scratch, 15, &[], &repository);
    let segment = postgres.switch_wal();
    postgres.wait_until_archived();
    let look = Look::into(&repository);
    let system = look.matching(&segment)[0].split("/wal/").next().unwrap().to_owned();
    sidecar.kill();
    let (hour, now) = (Duration::from_secs(60 * 60), SystemTime::now());
    let lay = |path: &str, age: Duration| {
        let path = scratch.path().join("repository").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let file = fs::File::create(&path).unwrap();
        file.set_modified(now - age).unwrap();
        for directory in path.ancestors().take(4) {
            give_to_servers(directory);
        }
        path
    };
    let remains = [
        lay(&format!("{system}/wal/00000001/0000000000000000/.tmp-old"), 7 * hour),
        lay(&format!("{system}/tail/00000001/.tmp-old"), 7 * hour),
    ];
    let others = [
        // Another daemon may be writing it.
        lay(&format!("{system}/wal/00000001/0000000000000000/.tmp-young"), 2 * hour),
        lay(&format!("{system}/backups/20200101T000000Z-full/.tmp-old"), 7 * hour),
        lay("main/1/wal/00000001/.tmp-old", 7 * hour),
        lay(&format!("other/{}/wal/00000001/.tmp-old", system.split_once('/').unwrap().1), 7 * hour),
    ];
    sidecar.start();
    wait_until("the remains are gone", PATIENCE, || !remains.iter().any(|path| path.exists()));
    wait_until("it's told", PATIENCE, || sidecar.log().contains("interrupted uploads of WAL"));
    for path in others {
        assert!(path.exists(), "{}", path.display());
    }
    assert!(look.wal(&segment).is_some());
}
