//! WAL from PostgreSQL to the repository and back.

use crate::support::{Repository, Scratch, archiving};

#[test]
fn a_switched_segment_arrives_and_comes_back_byte_by_byte_pg15() {
    let scratch = Scratch::new();
    let repository = Repository::s3();
    let (postgres, sidecar) = archiving(&scratch, 15, &[], &repository);
    let name = postgres.switch_wal();
    postgres.wait_until_archived();
    let back = scratch.path().join("back");
    let (status, _) = sidecar.curl(&format!("/v1/wal/{name}"), &["-o", back.to_str().unwrap()]);
    assert_eq!(status, 200);
    assert!(std::fs::read(&back).unwrap() == std::fs::read(postgres.data.join("pg_wal").join(&name)).unwrap());
    let (status, body) = sidecar.curl("/v1/wal/0000000100000000000000FF", &[]);
    assert_eq!(status, 404);
    assert!(body.contains("\"not_in_archive\""), "{body}");
}
