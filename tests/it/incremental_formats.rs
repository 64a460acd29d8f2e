//! PostgreSQL's incremental backups: what the pure core makes of their formats, compared with what PostgreSQL does.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use pgsidecar_core::{
    Lsn,
    backup_label::{BackupLabel, with_increment, without_increment},
    backup_manifest::{WalRange, parse_manifest},
    block_references::BlockReferences,
    data_directory::Fork,
    incremental_file::{IncrementalHeader, incremental_path, path_of_incremental},
    incremental_plan::{FileMethod, FullReason, IncrementalPlan, RelationPath},
    merge::{BlockSource, Merge},
    page::{PAGE_SIZE, PageState, check_page},
    wal_summary::{WalSummaryName, covering},
};

use crate::support::{Postgres, Scratch, run, wait_until};

const SEGMENT: u32 = 131_072;

/// A server that summarizes its WAL, with nothing going on but what the test does.
fn summarizing(scratch: &Scratch) -> Postgres {
    let mut postgres = Postgres::initdb(scratch, 17, &["-k"]);
    postgres.configure(&["summarize_wal = on", "autovacuum = off", "checkpoint_timeout = 1h", "max_wal_size = 10GB"]);
    postgres.start(&[]);
    postgres
}

/// pg_basebackup's, as files; an increment of `parent` if there is one.
fn base_backup(postgres: &Postgres, scratch: &Scratch, name: &str, parent: Option<&Path>) -> PathBuf {
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

fn tablespace(scratch: &Scratch) -> PathBuf {
    scratch.path().join("space")
}

/// The paths of all regular files below a directory, links followed, without the manifest.
fn files(root: &Path) -> BTreeSet<String> {
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

fn label(backup: &Path) -> BackupLabel {
    fs::read_to_string(backup.join("backup_label")).unwrap().parse().unwrap()
}

/// What the summaries say changed between the starts of two backups.
fn changed_between(postgres: &Postgres, parent: &Path, child: &Path) -> BlockReferences {
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

fn header(path: &Path) -> IncrementalHeader {
    let header = IncrementalHeader::read(&mut fs::File::open(path).unwrap(), SEGMENT).unwrap();
    let bytes = fs::read(path).unwrap();
    assert_eq!(header.file_length(), bytes.len() as u64, "{}", path.display());
    assert!(bytes.starts_with(&header.to_bytes()), "{}", path.display());
    header
}

/// Compares the server's decision for each of a backup's files with ours. Answers how often each was taken.
fn compare_plan(postgres: &Postgres, parent: &Path, child: &Path) -> BTreeMap<String, usize> {
    let references = changed_between(postgres, parent, child);
    let plan = IncrementalPlan::new(&references, SEGMENT);
    let manifest = parse_manifest(&fs::read(parent.join("backup_manifest")).unwrap()).unwrap();
    let in_parent: BTreeSet<&str> =
        manifest.files.iter().map(|file| std::str::from_utf8(&file.path).unwrap()).collect();
    let mut taken = BTreeMap::new();
    for path in files(child) {
        let marked = path_of_incremental(&path);
        let plain = marked.as_deref().unwrap_or(&path);
        let Some(relation) = RelationPath::parse(plain) else {
            assert_eq!(marked, None, "{path}");
            continue;
        };
        // Nothing changes the server's files between its backup and this.
        let size = fs::metadata(postgres.data.join(plain)).unwrap().len();
        let known = in_parent.contains(plain) || in_parent.contains(incremental_path(plain).as_str());
        let ours = plan.method(&relation, size, known);
        let theirs = marked.is_some().then(|| header(&child.join(&path)));
        let kind = match (&ours, theirs) {
            (FileMethod::Incremental(ours), Some(theirs)) => {
                assert_eq!(ours, &theirs, "{path}");
                format!("incremental, {}", if ours.blocks().is_empty() { "unchanged" } else { "changed" })
            }
            // Stricter than the server.
            (FileMethod::Full(FullReason::VisibilityMap), _) => {
                assert_eq!(relation.file.fork, Fork::VisibilityMap);
                "full, VisibilityMap".to_owned()
            }
            (FileMethod::Full(reason), None) => {
                assert_eq!(fs::metadata(child.join(&path)).unwrap().len(), size, "{path}");
                format!("full, {reason:?}")
            }
            (ours, theirs) => panic!("{path}: {ours:?}, but the server {theirs:?}"),
        };
        *taken.entry(kind).or_insert(0) += 1;
    }
    taken
}

/// A file of the newest backup of a chain, made of what the backups have (newest first).
fn merged(chain: &[&Path], plain: &str) -> Vec<u8> {
    let mut sources = Vec::new();
    let mut headers = Vec::new();
    for backup in chain {
        let full = backup.join(plain);
        if full.exists() {
            sources.push(fs::read(full).unwrap());
            break;
        }
        let path = backup.join(incremental_path(plain));
        headers.push(header(&path));
        sources.push(fs::read(path).unwrap());
    }
    assert_eq!(sources.len(), headers.len() + 1, "{plain}");
    let full = sources.last().unwrap();
    let Some((newest, older)) = headers.split_first() else { return full.clone() };
    let merge = Merge::new(newest, older, full.len() as u64);
    let mut made = Vec::new();
    for run in merge.runs() {
        let length = run.count as usize * PAGE_SIZE;
        match run.source {
            BlockSource::Zero => made.resize(made.len() + length, 0),
            BlockSource::File { index, offset } => {
                let offset = usize::try_from(offset).unwrap();
                made.extend(&sources[index][offset..offset + length]);
            }
        }
    }
    assert_eq!(made.len() as u64, merge.size());
    assert!(!merge.is_copy_of_full() || made == *full, "{plain}");
    made
}

/// Compares what we make of a chain (newest first) with what pg_combinebackup makes of it.
fn compare_merge(postgres: &Postgres, scratch: &Scratch, name: &str, chain: &[&Path]) -> usize {
    let output = scratch.path().join(name);
    let mut combine = postgres.client("pg_combinebackup");
    combine.args(["--no-sync", "-o"]).arg(&output).args(chain.iter().rev());
    let newest = scratch.path().join(format!("{}-space", chain[0].file_name().unwrap().to_str().unwrap()));
    combine.arg("-T").arg(format!("{}={}", newest.display(), scratch.path().join(format!("{name}-space")).display()));
    run(&mut combine);
    let mut incremental = 0;
    for path in files(chain[0]) {
        let marked = path_of_incremental(&path);
        let plain = marked.as_deref().unwrap_or(&path);
        incremental += usize::from(marked.is_some());
        let theirs = fs::read(output.join(plain)).unwrap();
        if plain == "backup_label" {
            let text = fs::read_to_string(chain[0].join(plain)).unwrap();
            assert_eq!(without_increment(&text).as_bytes(), theirs);
        } else if plain != "tablespace_map" {
            assert!(merged(chain, plain) == theirs, "{plain}");
        }
    }
    let without_marks = |path: String| path_of_incremental(&path).unwrap_or(path);
    assert_eq!(files(chain[0]).into_iter().map(without_marks).collect::<BTreeSet<_>>(), files(&output));
    incremental
}

/// How many pages of a backup are new and good. None may be anything else.
fn checked_pages(backup: &Path) -> (usize, usize) {
    let (mut new, mut good) = (0, 0);
    for path in files(backup) {
        let Some(relation) = RelationPath::parse(&path) else { continue };
        let first = relation.file.segment * SEGMENT;
        let bytes = fs::read(backup.join(&path)).unwrap();
        for (page, block) in bytes.as_chunks().0.iter().zip(first..) {
            // No page is newer than this: all are checked.
            match check_page(page, block, Lsn::new(u64::MAX)) {
                PageState::New => new += 1,
                PageState::Good => good += 1,
                state => panic!("{path}, block {block}: {state:?}"),
            }
        }
    }
    (new, good)
}

#[test]
fn plans_and_merges_are_those_of_postgres_pg17() {
    let scratch = Scratch::new();
    let postgres = summarizing(&scratch);
    scratch.dir("space");
    let sql = |sql: &str| {
        sql.split(';').for_each(|statement| {
            postgres.sql(statement);
        });
    };
    sql(&format!("CREATE TABLESPACE space LOCATION '{}'", tablespace(&scratch).display()));
    sql("CREATE DATABASE kept; CREATE DATABASE made_anew STRATEGY FILE_COPY; CREATE DATABASE moved");
    sql("CREATE TABLE large AS SELECT n, repeat('x', 200) AS text FROM generate_series(1, 40000) n;
        ALTER TABLE large ADD PRIMARY KEY (n);
        CREATE TABLE elsewhere TABLESPACE space AS SELECT n, repeat('x', 200) AS text FROM generate_series(1, 5000) n;
        CREATE TABLE still AS SELECT n FROM generate_series(1, 5000) n;
        CREATE TABLE truncated AS SELECT n FROM generate_series(1, 5000) n;
        CREATE TABLE dropped AS SELECT n FROM generate_series(1, 5000) n;
        CREATE TABLE shortened AS SELECT n, repeat('x', 200) AS text FROM generate_series(1, 9000) n;
        CREATE TABLE emptied AS SELECT n FROM generate_series(1, 5000) n;
        CREATE TABLE mostly AS SELECT n FROM generate_series(1, 5000) n;
        CREATE TABLE empty (n int);
        CREATE UNLOGGED TABLE unlogged AS SELECT n FROM generate_series(1, 500) n;
        CREATE SEQUENCE counter;
        VACUUM large; VACUUM shortened");
    let full = base_backup(&postgres, &scratch, "full", None);
    let (_, good) = checked_pages(&full);
    assert!(good > 2000, "{good}");

    sql("UPDATE large SET text = 'changed' WHERE n % 1000 = 0;
        INSERT INTO large SELECT n, repeat('y', 200) FROM generate_series(40001, 41000) n;
        UPDATE elsewhere SET text = 'changed' WHERE n = 17;
        TRUNCATE truncated;
        INSERT INTO truncated VALUES (1);
        DROP TABLE dropped;
        CREATE TABLE made AS SELECT n FROM generate_series(1, 5000) n;
        DELETE FROM shortened WHERE n > 3000;
        VACUUM (TRUNCATE) shortened;
        DELETE FROM emptied;
        VACUUM (TRUNCATE) emptied;
        INSERT INTO emptied VALUES (1);
        UPDATE mostly SET n = -n;
        VACUUM FULL pg_database;
        SELECT nextval('counter');
        VACUUM still;
        DROP DATABASE made_anew;
        CREATE DATABASE made_anew STRATEGY FILE_COPY;
        ALTER DATABASE moved SET TABLESPACE space;
        ALTER DATABASE moved SET TABLESPACE pg_default");
    let first = base_backup(&postgres, &scratch, "first", Some(&full));
    let taken = compare_plan(&postgres, &full, &first);
    for kind in [
        "incremental, changed",
        "incremental, unchanged",
        "full, VisibilityMap",
        "full, FreeSpaceMap",
        "full, NotInParent",
        "full, NewDatabase",
        "full, NewContent",
        "full, Empty",
        "full, MostlyChanged",
    ] {
        assert!(taken.contains_key(kind), "{kind}: {taken:?}");
    }
    assert!(taken["incremental, changed"] > 10 && taken["incremental, unchanged"] > 500, "{taken:?}");
    let incremental = compare_merge(&postgres, &scratch, "combined-1", &[&first, &full]);
    assert!(incremental > 500, "{incremental}");

    let marked = fs::read_to_string(first.join("backup_label")).unwrap();
    let parent = label(&full);
    assert_eq!(label(&first).incremental_from, Some(parent.start));
    assert_eq!(with_increment(&without_increment(&marked), parent.start, parent.timeline), marked);

    // Over a checkpoint, and with it more than one summary.
    sql("INSERT INTO shortened SELECT n, repeat('z', 200) FROM generate_series(1, 2000) n;
        UPDATE large SET text = 'again' WHERE n % 3000 = 1;
        CHECKPOINT;
        DELETE FROM large WHERE n > 30000;
        VACUUM (TRUNCATE) large;
        CREATE INDEX ON large (text)");
    let second = base_backup(&postgres, &scratch, "second", Some(&first));
    let taken = compare_plan(&postgres, &first, &second);
    assert!(taken["incremental, changed"] > 10 && taken["incremental, unchanged"] > 500, "{taken:?}");
    let incremental = compare_merge(&postgres, &scratch, "combined-2", &[&second, &first, &full]);
    assert!(incremental > 500, "{incremental}");
    checked_pages(&scratch.path().join("combined-2"));
}

#[test]
fn wal_that_is_not_summarized_is_missing_pg17() {
    let scratch = Scratch::new();
    let postgres = summarizing(&scratch);
    let position = |sql: &str| -> Lsn { postgres.sql(sql).parse().unwrap() };
    let start = position("SELECT redo_lsn FROM pg_control_checkpoint()");
    postgres.sql("CHECKPOINT");
    let end = position("SELECT redo_lsn FROM pg_control_checkpoint()");
    let directory = postgres.data.join("pg_wal/summaries");
    let names = || -> Vec<WalSummaryName> {
        let names = fs::read_dir(&directory).unwrap();
        names.filter_map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().ok()).collect()
    };
    let timeline = label_timeline(&postgres);
    wait_until("the WAL is summarized", Duration::from_secs(60), || {
        covering(&names(), &WalRange { timeline, start, end }).is_ok()
    });
    let later = Lsn::new(end.bytes() + (1 << 30));
    let error = covering(&names(), &WalRange { timeline, start, end: later }).unwrap_err();
    let last = names().iter().map(|name| name.end()).max().unwrap();
    assert_eq!(
        error.to_string(),
        format!("the WAL of timeline 1 from {start} to {later} is not summarized from {last} on")
    );
}

fn label_timeline(postgres: &Postgres) -> pgsidecar_core::TimelineId {
    postgres.sql("SELECT timeline_id FROM pg_control_checkpoint()").parse().unwrap()
}
