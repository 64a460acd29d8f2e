//! PostgreSQL's own incremental backups, and ours made by hand of what the pure core says.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use pgsidecar_core::{
    backup_label::BackupLabel,
    backup_manifest::{WalRange, parse_manifest},
    block_references::BlockReferences,
    incremental_file::{IncrementalHeader, incremental_path},
    incremental_plan::{FileMethod, IncrementalPlan, RelationPath},
    page::PAGE_SIZE,
    wal_summary::{WalSummaryName, covering},
};

use super::{Postgres, Scratch, run};

/// Blocks in each file of a relation but its last.
pub const SEGMENT: u32 = 131_072;

/// A server that summarizes its WAL, with nothing going on but what the test does.
pub fn summarizing(scratch: &Scratch) -> Postgres {
    let mut postgres = Postgres::initdb(scratch, 17, &["-k"]);
    postgres.configure(&["summarize_wal = on", "autovacuum = off", "checkpoint_timeout = 1h", "max_wal_size = 10GB"]);
    postgres.start(&[]);
    postgres
}

/// pg_basebackup's, as files; an increment of `parent` if there is one.
pub fn base_backup(postgres: &Postgres, scratch: &Scratch, name: &str, parent: Option<&Path>) -> PathBuf {
    let directory = scratch.path().join(name);
    let mut command = postgres.client("pg_basebackup");
    command.args(["--checkpoint=fast", "--no-sync", "--wal-method=none", "-D"]).arg(&directory);
    command.args([
        "-T",
        &format!("{}={}", tablespace(scratch).display(), scratch.path().join(name.to_owned() + "-space").display()),
    ]);
    if let Some(parent) = parent {
        command.arg("--incremental").arg(parent.join("backup_manifest"));
    }
    run(&mut command);
    directory
}

/// Where the one tablespace lies, if the test makes one.
pub fn tablespace(scratch: &Scratch) -> PathBuf {
    scratch.path().join("space")
}

/// The paths of all regular files below a directory, links followed, without the manifest.
pub fn files(root: &Path) -> BTreeSet<String> {
    let mut files = BTreeSet::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if fs::metadata(&path).unwrap().is_dir() {
                directories.push(path);
            } else {
                files.insert(path.strip_prefix(root).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    files.remove("backup_manifest");
    files
}

/// The backup's label.
pub fn label(backup: &Path) -> BackupLabel {
    fs::read_to_string(backup.join("backup_label")).unwrap().parse().unwrap()
}

/// What the summaries say changed between the starts of two backups.
pub fn changed_between(postgres: &Postgres, parent: &Path, child: &Path) -> BlockReferences {
    let manifest = parse_manifest(&fs::read(parent.join("backup_manifest")).unwrap()).unwrap();
    let [WalRange { timeline, start, .. }] = manifest.wal_ranges[..] else { panic!("{:?}", manifest.wal_ranges) };
    assert_eq!(start, label(parent).start);
    let directory = postgres.data.join("pg_wal/summaries");
    let names: Vec<WalSummaryName> = fs::read_dir(&directory)
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().ok())
        .collect();
    let chosen = covering(&names, &WalRange { timeline, start, end: label(child).start }).unwrap();
    assert!(!chosen.is_empty());
    chosen.iter().fold(BlockReferences::default(), |references, name| {
        references.merge_summary(fs::File::open(directory.join(name.to_string())).unwrap()).unwrap()
    })
}

/// The header of an incremental file that is as long as it says and begins as we would write it.
pub fn header(path: &Path) -> IncrementalHeader {
    let header = IncrementalHeader::read(&mut fs::File::open(path).unwrap(), SEGMENT).unwrap();
    let bytes = fs::read(path).unwrap();
    assert_eq!(header.file_length(), bytes.len() as u64, "{}", path.display());
    assert!(bytes.starts_with(&header.to_bytes()), "{}", path.display());
    header
}

/// A file of the newest backup of a chain, made of what the backups have (newest first), block by block.
///
/// The rules are those of pg_combinebackup (`reconstruct_from_incremental_file` in `reconstruct.c`): the newest file says
/// how long the result is; each block comes from the newest file that has it; what none has is zero. But pg_combinebackup
/// goes on to search older files for a block behind the truncation block length of one between; here it is zero: what
/// older ones have there was cut off, and deleted rows would be back (seen with 17.11).
pub fn merged(chain: &[&Path], plain: &str) -> Vec<u8> {
    let mut increments = Vec::new();
    let full = chain.iter().find_map(|backup| {
        let full = fs::read(backup.join(plain)).ok();
        if full.is_none() {
            let path = backup.join(incremental_path(plain));
            increments.push((header(&path), fs::read(path).unwrap()));
        }
        full
    });
    let full = full.expect("a full file is at the chain's end");
    let Some((newest, _)) = increments.first() else { return full };
    let page = |file: &[u8], at: usize| file.get(at..at + PAGE_SIZE).map(<[u8]>::to_vec);
    let found = |block: u32| {
        for (header, file) in &increments {
            if let Some(index) = header.blocks().iter().position(|number| *number == block) {
                return page(file, usize::try_from(header.block_offset(index)).unwrap());
            }
            if block >= header.truncation_block_length() {
                return None;
            }
        }
        page(&full, block as usize * PAGE_SIZE)
    };
    (0..newest.output_blocks()).flat_map(|block| found(block).unwrap_or_else(|| vec![0; PAGE_SIZE])).collect()
}

/// How many blocks the file that a backup has of a relation's comes to when it's restored.
pub fn blocks_in(backup: &Path, plain: &str) -> Option<u32> {
    match fs::metadata(backup.join(plain)) {
        Ok(meta) => Some(u32::try_from(meta.len() / PAGE_SIZE as u64).unwrap()),
        Err(_) => {
            let path = backup.join(incremental_path(plain));
            path.exists().then(|| header(&path).output_blocks())
        }
    }
}

/// Writes what our plan takes of a file into a directory, as the shell of a backup would.
pub fn take(postgres: &Postgres, references: &BlockReferences, plain: &str, parent: &Path, into: &Path) {
    let bytes = fs::read(postgres.data.join(plain)).unwrap();
    let relation = RelationPath::parse(plain).unwrap();
    let target = |path: &str| {
        let target = into.join(path);
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        target
    };
    match IncrementalPlan::new(references, SEGMENT).method(&relation, bytes.len() as u64, blocks_in(parent, plain)) {
        FileMethod::Full(_) => fs::write(target(plain), &bytes).unwrap(),
        FileMethod::Incremental(header) => {
            let mut file = header.to_bytes();
            for block in header.blocks() {
                let start = *block as usize * PAGE_SIZE;
                file.extend(&bytes[start..start + PAGE_SIZE]);
            }
            fs::write(target(&incremental_path(plain)), file).unwrap();
        }
    }
}
