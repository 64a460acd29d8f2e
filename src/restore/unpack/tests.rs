use std::io::Cursor;

use pgsidecar_core::{
    backup_manifest::{Manifest, parse_manifest},
    incremental_file::incremental_path,
};

use super::{super::layer::Paths, *};
use crate::restore::manifest::NewManifest;

const SEGMENT: u32 = 131_072;
const FILE: &str = "base/5/16384";

fn blocks(seeds: &[u8]) -> Vec<u8> {
    seeds.iter().flat_map(|seed| [*seed; PAGE_SIZE]).collect()
}

fn increment(length: u32, numbers: &[u32], seeds: &[u8]) -> Vec<u8> {
    let header = IncrementalHeader::new(length, numbers.to_vec(), SEGMENT).unwrap();
    [header.to_bytes(), blocks(seeds)].concat()
}

fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(1_800_000_000);
        archive.append_data(&mut header, path, *content).unwrap();
    }
    archive.into_inner().unwrap()
}

/// A directory into which backups are unpacked, the full one first.
struct Target {
    scratch: tempfile::TempDir,
    unpacker: Unpacker,
    wanted: Arc<Paths>,
}

impl Target {
    fn new(wanted: &[&str]) -> Target {
        let scratch = tempfile::tempdir().unwrap();
        let directory = TargetDirectory::unclaimed(scratch.path());
        let unpacker = Unpacker::new(&directory, BTreeMap::new(), Arc::default());
        let mut paths = Paths::default();
        wanted.iter().for_each(|path| assert!(paths.insert(path.as_bytes())));
        Target { scratch, unpacker, wanted: Arc::new(paths) }
    }

    fn unpack(&self, layer: Layer, files: &[(&str, &[u8])]) -> Result<Paths, String> {
        let layer = Arc::new(layer);
        let unpacker = self.unpacker.for_layer(layer.clone());
        match unpacker.entries(&mut Cursor::new(tar_of(files)), &mut 0) {
            Ok(()) => Ok(layer.take_seen()),
            Err(Trouble::Source(error)) => Err(error.to_string()),
            Err(Trouble::Target(path, error)) => panic!("{}: {error}", path.display()),
            Err(Trouble::Cancelled) => panic!("nobody cancelled"),
        }
    }

    fn full(&self, files: &[(&str, &[u8])]) -> Result<Paths, String> {
        self.unpack(Layer::full(self.wanted.clone()), files)
    }

    fn between(&self, parent: Paths, files: &[(&str, &[u8])]) -> Result<Paths, String> {
        self.unpack(Layer::incremental(&self.wanted, parent, None, SEGMENT), files)
    }

    fn content(&self, path: &str) -> Vec<u8> {
        fs::read(self.scratch.path().join(path)).unwrap()
    }
}

#[test]
fn blocks_go_into_their_file_and_what_was_cut_off_does_not_come_back() {
    let target = Target::new(&[FILE]);
    let marked = incremental_path(FILE);
    // The last block isn't whole.
    let full = [blocks(&[1, 2, 3, 4]), vec![5; 100]].concat();
    let seen = target.full(&[(FILE, &full)]).unwrap();
    let seen = target.between(seen, &[(&marked, &increment(6, &[1, 5], &[12, 16]))]).unwrap();
    assert!(target.content(FILE) == blocks(&[1, 12, 3, 4, 0, 16]));
    let seen = target.between(seen, &[(&marked, &increment(2, &[4], &[25]))]).unwrap();
    assert!(target.content(FILE) == blocks(&[1, 12, 0, 0, 25]));
    // More than are written at a time.
    let (numbers, seeds): (Vec<u32>, Vec<u8>) = (2..90u8).filter(|n| n % 50 != 0).map(|n| (u32::from(n), n)).unzip();
    let seen = target.between(seen, &[(&marked, &increment(0, &numbers, &seeds))]).unwrap();
    let expected: Vec<u8> = (0..90).map(|n| if n < 2 || n % 50 == 0 { 0 } else { n }).collect();
    assert!(target.content(FILE) == blocks(&expected));
    let seen = target.between(seen, &[(&marked, &increment(3, &[], &[]))]).unwrap();
    assert!(target.content(FILE) == blocks(&[0, 0, 2]));
    target.between(seen, &[(FILE, b"whole")]).unwrap();
    assert_eq!(target.content(FILE), b"whole");
    assert_eq!(fs::read_dir(target.scratch.path().join("base/5")).unwrap().count(), 1);
}

#[test]
fn an_increment_that_can_not_be_is_damage() {
    let marked = incremental_path(FILE);
    let refused = |change: &dyn Fn(&mut Vec<u8>)| {
        let target = Target::new(&[FILE]);
        let seen = target.full(&[(FILE, &blocks(&[1]))]).unwrap();
        let mut file = increment(2, &[1], &[2]);
        change(&mut file);
        target.between(seen, &[(&marked, &file)]).err()
    };
    assert_eq!(refused(&|_| {}), None);
    let of_header = |file: &mut Vec<u8>, at: usize, byte: u8| file[at] = byte;
    let said = [
        refused(&|file| file.truncate(PAGE_SIZE)),
        refused(&|file| file.push(0)),
        refused(&|file| of_header(file, 0, 0)),
        refused(&|file| of_header(file, 15, 1)),
    ];
    for (said, words) in
        said.iter().zip(["not as long as it says", "not as long as it says", "no incremental file", "at most"])
    {
        assert!(said.as_ref().is_some_and(|said| said.contains(words)), "{words}: {said:?}");
    }
    // Without the file that its blocks go into.
    let target = Target::new(&[FILE]);
    let seen = target.full(&[("base/5/1", b"")]).unwrap();
    let said = target.between(seen, &[(&marked, &increment(2, &[1], &[2]))]).err().unwrap();
    assert!(said.contains("the backup that it builds on lacks base/5/16384"), "{said}");
    let both = target.full(&[(FILE, b""), (FILE, b"")]).err().unwrap();
    assert!(both.contains("twice"), "{both}");
}

#[test]
fn what_makes_a_directory_startable_is_refused_in_other_parts() {
    for path in NOT_IN_PARTS {
        let target = Target::new(&[path]);
        assert!(target.full(&[(path, b"")]).is_err(), "{path}");
        assert_eq!(fs::read_dir(target.scratch.path()).unwrap().count(), 0);
    }
    let target = Target::new(&["base/5/PG_VERSION"]);
    target.full(&[("base/5/PG_VERSION", b"17\n")]).unwrap();
}

#[test]
fn a_manifest_tells_what_the_files_have_become() {
    let target = Target::new(&[FILE, "pg_xact/0000"]);
    let backup = record();
    let seen = target.full(&[(FILE, &blocks(&[1, 2, 3])), ("pg_xact/0000", b"old"), ("gone", b"gone")]).unwrap();
    let path = target.scratch.path().join("backup_manifest");
    let manifest = NewManifest::new(File::create(&path).unwrap(), &backup);
    let layer = Arc::new(Layer::incremental(&target.wanted, seen, Some(manifest), SEGMENT));
    let unpacker = target.unpacker.for_layer(layer.clone());
    let files: [(&str, &[u8]); 2] = [(&incremental_path(FILE), &increment(4, &[1], &[12])), ("pg_xact/0000", b"newer")];
    assert!(unpacker.entries(&mut Cursor::new(tar_of(&files)), &mut 0).is_ok());
    let held = hold(&tar_of(&[("PG_VERSION", b"17\n")])).unwrap();
    layer.finish_manifest(&held, &backup).unwrap();

    let Manifest { files, wal_ranges, .. } = parse_manifest(&fs::read(path).unwrap()).unwrap();
    assert_eq!((wal_ranges[0].start, wal_ranges[0].end), (backup.start_lsn, backup.stop_lsn));
    let expected =
        [(FILE, blocks(&[1, 12, 3, 0])), ("pg_xact/0000", b"newer".to_vec()), ("PG_VERSION", b"17\n".to_vec())];
    assert_eq!(files.len(), expected.len());
    for (file, (path, content)) in files.iter().zip(expected) {
        assert_eq!(file.path, path.as_bytes());
        assert_eq!((file.size, file.crc32c), (content.len() as u64, crc32c::crc32c(&content)), "{path}");
        assert_eq!(file.modified.as_second(), 1_800_000_000);
    }
    assert!(!target.scratch.path().join("gone").exists());
}

/// A record of which only the WAL and the server count.
fn record() -> pgsidecar_core::BackupRecord {
    let nothing = serde_json::json!({"size": 1, "sha256": "0".repeat(64)});
    serde_json::from_value(serde_json::json!({
        "format": 1, "id": "20261121T061500Z-incremental", "parent": "20261121T061400Z-full",
        "system_identifier": "7", "server_version": 170_010, "timeline": 1,
        "start_lsn": "0/2000028", "stop_lsn": "0/2000100",
        "started_at": "2026-11-21T06:15:00Z", "stopped_at": "2026-11-21T06:15:01Z", "next_xid_at_stop": 7,
        "from_standby": false, "wal_segment_size": 16_777_216, "block_size": 8192, "data_checksums": true,
        "tablespaces": [], "parts": [], "manifest": nothing, "index": nothing, "files": 0, "writer": "test",
    }))
    .unwrap()
}
