//! PostgreSQL's incremental backups: what the pure core makes of their formats, compared with what PostgreSQL does.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    time::Duration,
};

use pgsidecar_core::{
    Lsn,
    backup_label::{with_increment, without_increment},
    backup_manifest::WalRange,
    data_directory::Fork,
    incremental_file::{IncrementalHeader, incremental_path, path_of_incremental},
    incremental_plan::{FileMethod, FullReason, IncrementalPlan, RelationPath},
    page::{PAGE_SIZE, PageState, check_page},
    wal_summary::{WalSummaryName, covering},
};

use crate::support::{
    Postgres, Scratch,
    increments::{
        SEGMENT, base_backup, blocks_in, changed_between, files, header, label, merged, summarizing, tablespace, take,
    },
    run, wait_until,
};

fn blocks_of(method: &FileMethod) -> usize {
    if let FileMethod::Incremental(header) = method { header.blocks().len() } else { 0 }
}

/// What the server decided, with the blocks that it should have taken as well.
fn with_all_that_is_new(
    theirs: &IncrementalHeader,
    relation: &RelationPath,
    limit: Option<u32>,
    in_parent: Option<u32>,
    size: u64,
) -> FileMethod {
    let length = u32::try_from(size / PAGE_SIZE as u64).unwrap();
    let cut = limit.map_or(length, |limit| limit - relation.file.segment * SEGMENT);
    let new = cut.min(in_parent.unwrap());
    let blocks: BTreeSet<u32> = theirs.blocks().iter().copied().chain(new..length).collect();
    if blocks.len() as u64 * 10 > u64::from(length) * 9 {
        return FileMethod::Full(FullReason::MostlyChanged);
    }
    let blocks = blocks.into_iter().collect();
    FileMethod::Incremental(IncrementalHeader::new(theirs.truncation_block_length(), blocks, SEGMENT).unwrap())
}

/// Compares the server's decision for each of a backup's files with ours. Answers how often each was taken.
fn compare_plan(postgres: &Postgres, parent: &Path, child: &Path) -> BTreeMap<String, usize> {
    let references = changed_between(postgres, parent, child);
    let plan = IncrementalPlan::new(&references, SEGMENT);
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
        let known = blocks_in(parent, plain);
        let ours = plan.method(&relation, size, known);
        let theirs = marked.is_some().then(|| header(&child.join(&path)));
        let kind = match (&ours, theirs) {
            (ours @ (FileMethod::Incremental(_) | FileMethod::Full(FullReason::MostlyChanged)), Some(theirs)) => {
                let limit = references.get(&relation.fork()).and_then(|changed| changed.limit_block());
                assert_eq!(*ours, with_all_that_is_new(&theirs, &relation, limit, known, size), "{path}");
                let is_unchanged = *ours == FileMethod::Incremental(theirs) && blocks_of(ours) == 0;
                format!("incremental, {}", if is_unchanged { "unchanged" } else { "changed" })
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

/// Blocks that are empty where another version of the file has something.
fn emptied(file: &[u8], other: &[u8]) -> usize {
    let pages = |bytes: &[u8]| bytes.chunks(PAGE_SIZE).map(|page| page.iter().all(|b| *b == 0)).collect::<Vec<_>>();
    pages(file).into_iter().zip(pages(other)).filter(|(empty, before)| *empty && !before).count()
}

#[test]
fn rows_that_were_cut_off_do_not_come_back_pg17() {
    let scratch = Scratch::new();
    let postgres = summarizing(&scratch);
    scratch.dir("space");
    // COPY adds more blocks than it fills, and of those that stay empty no WAL tells.
    let fill = |table: &str| postgres.sql(&format!("COPY {table} FROM PROGRAM 'seq -f %0200g 1 3000'"));
    let cut = |table: &str| {
        postgres.sql(&format!("DELETE FROM {table} WHERE ctid >= '(100,0)'"));
        postgres.sql(&format!("VACUUM (TRUNCATE) {table}"));
    };
    for table in ["at_once", "later"] {
        postgres.sql(&format!("CREATE TABLE {table} AS SELECT repeat('x', 200) || n FROM generate_series(1, 20000) n"));
        postgres.sql(&format!("VACUUM (FREEZE) {table}"));
    }
    let path = |table: &str| postgres.sql(&format!("SELECT pg_relation_filepath('{table}')"));
    let (at_once, later) = (path("at_once"), path("later"));
    let live = |plain: &str| fs::read(postgres.data.join(plain)).unwrap();
    let full = base_backup(&postgres, &scratch, "full", None);

    cut("at_once");
    cut("later");
    fill("at_once");
    let first = base_backup(&postgres, &scratch, "first", Some(&full));
    let changed = changed_between(&postgres, &full, &first);
    let ours_first = scratch.path().join("ours-first");
    for plain in [&at_once, &later] {
        take(&postgres, &changed, plain, &full, &ours_first);
        assert!(merged(&[&ours_first, &full], plain) == live(plain), "{plain}");
    }
    assert!(emptied(&live(&at_once), &fs::read(full.join(&at_once)).unwrap()) > 0);

    fill("later");
    let second = base_backup(&postgres, &scratch, "second", Some(&first));
    let changed = changed_between(&postgres, &first, &second);
    let ours_second = scratch.path().join("ours-second");
    for plain in [&at_once, &later] {
        take(&postgres, &changed, plain, &ours_first, &ours_second);
        assert!(ours_second.join(incremental_path(plain)).exists());
        assert!(merged(&[&ours_second, &ours_first, &full], plain) == live(plain), "{plain}");
    }
    assert!(emptied(&live(&later), &fs::read(full.join(&later)).unwrap()) > 0);
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
