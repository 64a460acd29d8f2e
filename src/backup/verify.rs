//! Whether backups can be restored: what they are made of is there and, if wanted, is what was stored.
//!
//! A store that doesn't answer is a failure of the whole, never a finding.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
    io::{self, Read},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use pgsidecar_core::{
    BackupId, BackupRecord,
    backup::{DamagedFile, PartRecord},
    chain,
    layout::BackupObject,
};
use serde::Serialize;
use tokio::task::JoinSet;

use super::{
    complete::{missing_objects, missing_wal},
    index,
};
use crate::{
    codec,
    failure::{Code, Failure},
    repository::{Repository, StoredReader},
};

/// How far it has come.
#[derive(Debug, Default)]
pub struct VerifyProgress {
    /// Bytes of parts that are to be read.
    pub total_bytes: AtomicU64,
    /// Bytes of them that have been read.
    pub read_bytes: AtomicU64,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Verification {
    /// Whether nothing is missing and nothing was found to be damaged.
    pub ok: bool,
    /// The backups that were looked at, oldest first.
    pub backups: Vec<VerifiedBackup>,
}

/// What was found of a backup.
#[derive(Clone, Debug, Serialize)]
pub struct VerifiedBackup {
    /// The backup.
    pub backup: BackupId,
    /// Whether nothing is wrong with it, or with what it builds on.
    pub ok: bool,
    /// Whether its parts were read.
    pub read: bool,
    /// What is missing or damaged in the repository, a sentence each.
    pub problems: Vec<String>,
    /// Files of the database that were damaged when the backup was taken, and are so in the backup.
    pub damaged: Vec<DamagedFile>,
}

/// Verifies one backup with all that it builds on, or all of them. With `readers`, every part is read, that many at a
/// time: its SHA-256, and each file's length and CRC-32C.
///
/// # Errors
/// [`Code::NotFound`] if there is no such backup; the store's. What is wrong with a backup is in the result.
///
/// # Cancellation
/// Can be dropped at any point.
pub async fn verify(
    repository: &Repository,
    only: Option<BackupId>,
    readers: usize,
    progress: &Arc<VerifyProgress>,
) -> Result<Verification, Failure> {
    let (mut records, mut unreadable) = (Vec::new(), BTreeMap::new());
    for id in repository.backup_ids().await? {
        match repository.backup(id).await {
            Ok(record) => records.extend(record),
            Err(failure) if failure.code == Code::Damaged => drop(unreadable.insert(id, failure.message)),
            Err(failure) => return Err(failure),
        }
    }
    let wanted = match only {
        None => records.iter().collect(),
        Some(id) => match records.iter().find(|record| record.id == id) {
            // Of a chain that isn't whole, what there is of it.
            Some(record) => chain::chain(record, &records).unwrap_or_else(|_| vec![record]),
            None if unreadable.contains_key(&id) => Vec::new(),
            None => {
                return Err(Failure::new(Code::NotFound, format!("there is no backup {id}"))
                    .hint("'pgsidecar backup list' shows them."));
            }
        },
    };
    if readers > 0 {
        let parts = wanted.iter().flat_map(|record| &record.parts);
        progress.total_bytes.store(parts.map(|part| part.stored.size).sum(), Relaxed);
    }
    let mut backups: Vec<VerifiedBackup> = unreadable
        .into_iter()
        .filter(|(id, _)| only.is_none_or(|only| only == *id))
        .map(|(backup, problem)| VerifiedBackup {
            backup,
            ok: false,
            read: false,
            problems: vec![problem],
            damaged: Vec::new(),
        })
        .collect();
    for record in wanted {
        let mut problems = problems(repository, record).await?;
        if readers > 0 {
            problems.extend(read(repository, record, readers, progress).await?);
        }
        match chain::chain(record, &records) {
            Err(error) => problems.push(error.to_string()),
            Ok(links) => {
                let broken = |link: &&&BackupRecord| backups.iter().any(|other| other.backup == link.id && !other.ok);
                if let Some(link) = links.iter().filter(|link| link.id != record.id).find(broken) {
                    problems.push(format!("it builds on backup {}, with which something is wrong", link.id));
                }
            }
        }
        backups.push(VerifiedBackup {
            backup: record.id,
            ok: problems.is_empty() && record.damaged.is_empty(),
            read: readers > 0,
            problems,
            damaged: record.damaged.clone(),
        });
    }
    backups.sort_unstable_by_key(|backup| backup.backup);
    Ok(Verification { ok: backups.iter().all(|backup| backup.ok), backups })
}

/// What can be told without reading the parts.
async fn problems(repository: &Repository, record: &BackupRecord) -> Result<Vec<String>, Failure> {
    let missing = missing_objects(repository, record).await?;
    let mut problems: Vec<String> = missing
        .into_iter()
        .map(|key| format!("{key} is missing, or hasn't the size that it was stored with"))
        .collect();
    match missing_wal(repository, record).await {
        Ok(None) => {}
        Ok(Some(segment)) => problems.push(format!("WAL segment {segment}, which it needs, is missing")),
        Err(failure) if matches!(failure.code, Code::DataDirectory | Code::Damaged) => problems.push(failure.message),
        Err(failure) => return Err(failure),
    }
    Ok(problems)
}

/// How many files a part has, and a sum over their paths, lengths and checksums that doesn't depend on their order: so
/// that neither list is ever in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Files {
    count: u64,
    sum: u64,
}

impl Files {
    fn add(&mut self, path: &str, size: u64, crc32c: u32) {
        let mut hasher = DefaultHasher::new();
        (path, size, crc32c).hash(&mut hasher);
        self.count += 1;
        self.sum = self.sum.wrapping_add(hasher.finish());
    }
}

/// Reads the index, the manifest and all parts. Answers with what is wrong.
async fn read(
    repository: &Repository,
    record: &BackupRecord,
    readers: usize,
    progress: &Arc<VerifyProgress>,
) -> Result<Vec<String>, Failure> {
    let mut problems = Vec::new();
    let listed = index::read(repository, record, BTreeMap::<u32, Files>::new(), |parts, entry| {
        parts.entry(entry.part).or_default().add(&entry.path, entry.size, entry.crc32c);
        Ok(())
    });
    let listed = match listed.await {
        Ok(listed) => Some(listed),
        Err(failure) if failure.code == Code::Damaged => {
            problems.push(failure.message);
            None
        }
        Err(failure) => return Err(failure),
    };
    let manifest = repository.layout().backup(record.id, BackupObject::Manifest);
    match repository.check_stored(&manifest, record.manifest).await {
        Ok(()) => {}
        Err(failure) if failure.code == Code::Conflict => problems.push(format!("{manifest} isn't what was stored")),
        Err(failure) => return Err(failure),
    }
    let (mut waiting, mut running) = (record.parts.iter(), JoinSet::new());
    loop {
        while running.len() < readers.max(1)
            && let Some(part) = waiting.next()
        {
            let (repository, id, part, progress) = (repository.clone(), record.id, *part, progress.clone());
            running.spawn(async move { (part, read_part(&repository, id, part, progress).await) });
        }
        let Some(ended) = running.join_next().await else { break };
        match ended? {
            (part, Ok(found)) => {
                let expected = listed.as_ref().map(|listed| listed.get(&part.number).copied().unwrap_or_default());
                if expected.is_some_and(|expected| expected != found) {
                    problems.push(format!("part {} doesn't hold the files that the index says", part.number));
                }
            }
            (_, Err(failure)) if failure.code == Code::Damaged => problems.push(failure.message),
            (_, Err(failure)) => return Err(failure),
        }
    }
    problems.sort_unstable();
    Ok(problems)
}

async fn read_part(
    repository: &Repository,
    id: BackupId,
    part: PartRecord,
    progress: Arc<VerifyProgress>,
) -> Result<Files, Failure> {
    let key = repository.layout().backup(id, BackupObject::Part(part.number));
    let reader = repository.open_stored(&key, part.stored).await?;
    let unpack = move || {
        let mut counted = Counted { reader, progress };
        let files = files_of(&mut counted).map_err(|error| counted.reader.explain(&error))?;
        counted.reader.finish()?;
        Ok(files)
    };
    tokio::task::spawn_blocking(unpack).await?
}

fn files_of(plain: &mut impl Read) -> io::Result<Files> {
    let mut files = Files::default();
    let mut buffer = vec![0; codec::CHUNK];
    let mut archive = tar::Archive::new(&mut *plain);
    for entry in archive.entries()? {
        let mut entry = entry?;
        if entry.header().entry_type() != tar::EntryType::Regular {
            continue;
        }
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let (mut size, mut crc) = (0, 0);
        loop {
            match codec::fill(&mut entry, &mut buffer)? {
                0 => break,
                filled => {
                    crc = crc32c::crc32c_append(crc, &buffer[..filled]);
                    size += filled as u64;
                }
            }
        }
        files.add(&path, size, crc);
    }
    // What is behind the end of the archive is hashed as well.
    codec::copy(plain, &mut io::sink())?;
    Ok(files)
}

/// Counts what is read.
struct Counted {
    reader: StoredReader,
    progress: Arc<VerifyProgress>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let before = self.reader.stored_bytes();
        let n = self.reader.read(buffer)?;
        self.progress.read_bytes.fetch_add(self.reader.stored_bytes() - before, Relaxed);
        Ok(n)
    }
}
