//! What the sidecar reads in PostgreSQL's WAL is what pg_waldump reads in it.

use jiff::Timestamp;
use pgsidecar_core::{
    Lsn,
    wal_records::{RecordContent, WalRecords},
};

use crate::support::{Postgres, Scratch, run};

/// The WAL files that were written to, in order, and all their bytes.
fn wal(postgres: &Postgres) -> (Vec<String>, Vec<u8>) {
    let current = postgres.sql("SELECT pg_walfile_name(pg_current_wal_lsn())");
    let mut names = postgres.wal_files("00000001");
    names.retain(|name| name.len() == 24 && *name <= current);
    let bytes = names.iter().flat_map(|name| postgres.wal_file(name)).collect();
    (names, bytes)
}

/// As pg_waldump writes it: where it begins, and what it says.
fn as_waldump_says(wal: &[u8], begins: Lsn, chunk: usize) -> Vec<String> {
    let mut lines = Vec::new();
    let mut walk = WalRecords::new(begins);
    for chunk in wal.chunks(chunk) {
        walk.feed(chunk, |record| {
            let clock = |time: Timestamp| time.strftime("%Y-%m-%d %H:%M:%S%.6f UTC").to_string();
            let said = match record.content {
                RecordContent::Transaction { xid, time, committed } => {
                    format!("{} {xid} {}", if committed { "COMMIT" } else { "ABORT" }, clock(time))
                }
                RecordContent::RestorePoint { name, .. } => format!("RESTORE_POINT {name}"),
                RecordContent::CreateTablespace { oid, location } => format!("CREATE {oid} {location:?}"),
                RecordContent::DropTablespace { oid } => format!("DROP {oid}"),
                RecordContent::Other => panic!("nobody asked for it"),
            };
            lines.push(format!("{:08X} {said}", record.lsn.bytes()));
        });
    }
    lines
}

/// The same from the output of pg_waldump.
fn waldump(postgres: &Postgres, begins: Lsn) -> Vec<String> {
    let mut waldump = postgres.client("pg_waldump");
    waldump.env("TZ", "UTC").arg("-p").arg(postgres.data.join("pg_wal")).args(["-s", &begins.to_string()]);
    waldump.args(["-e", &postgres.sql("SELECT pg_current_wal_flush_lsn()")]);
    let between = |line: &str, from: &str, to: &str| {
        let (_, rest) = line.split_once(from).unwrap_or_else(|| panic!("no {from:?} in {line}"));
        rest.split_once(to).map_or(rest, |(found, _)| found).trim().to_owned()
    };
    let said = |line: &str| {
        let (manager, description) = (between(line, "rmgr: ", "len"), between(line, "desc: ", "\n"));
        let (operation, rest) = description.split_once(' ').unwrap_or((&description, ""));
        // "COMMIT 2026-… UTC; inval msgs: …", "COMMIT_PREPARED 741: 2026-… UTC; …" (since 17 with gid)
        let ended = |outcome: &str| match operation.strip_suffix("_PREPARED") {
            Some(_) => {
                let (xid, time) = rest.split_once(": ").unwrap();
                format!("{outcome} {xid} {}", time.split(';').next().unwrap())
            }
            None => format!("{outcome} {} {}", between(line, "tx:", ","), rest.split(';').next().unwrap()),
        };
        match (manager.as_str(), operation) {
            ("Transaction", "COMMIT" | "COMMIT_PREPARED") => Some(ended("COMMIT")),
            ("Transaction", "ABORT" | "ABORT_PREPARED") => Some(ended("ABORT")),
            ("XLOG", "RESTORE_POINT") => Some(description),
            ("Tablespace", "CREATE" | "DROP") => Some(description),
            _ => None,
        }
    };
    let position = |line: &str| between(line, "lsn: ", ",").parse::<Lsn>().unwrap();
    let output = run(&mut waldump);
    let records = output.lines().filter(|line| line.starts_with("rmgr: "));
    records.filter_map(|line| Some(format!("{:08X} {}", position(line).bytes(), said(line)?))).collect()
}

/// Transactions of all kinds, with records that cross pages and segments.
fn write_wal(postgres: &Postgres, scratch: &Scratch) {
    postgres.sql("CREATE TABLE t (n int, payload text)");
    postgres.sql("ALTER TABLE t ALTER payload SET STORAGE EXTERNAL");
    for n in 0..20 {
        postgres.sql(&format!("INSERT INTO t VALUES ({n}, 'committed')"));
        postgres.sql(&format!("BEGIN; INSERT INTO t VALUES ({n}, 'aborted'); ROLLBACK"));
    }
    // Hundreds of subtransactions, whose XIDs are all in the record.
    postgres.sql("DO $$ BEGIN FOR n IN 1..600 LOOP BEGIN INSERT INTO t VALUES (n); EXCEPTION WHEN others THEN NULL; END; END LOOP; END $$");
    // Tables that are dropped with their statistics, in a prepared transaction with subtransactions.
    for n in 0..3 {
        for end in ["ROLLBACK", "COMMIT"] {
            let subtransactions: String =
                (0..70).map(|n| format!("SAVEPOINT s{n}; INSERT INTO t VALUES ({n});")).collect();
            postgres.sql(&format!(
                "BEGIN; CREATE TABLE d{n} AS SELECT generate_series(1, 100) AS n; {subtransactions} PREPARE TRANSACTION 'gid {n}'"
            ));
            postgres.sql(&format!("{end} PREPARED 'gid {n}'"));
        }
        postgres
            .sql(&format!("BEGIN; DROP TABLE d{n}; SAVEPOINT a; INSERT INTO t VALUES (1); PREPARE TRANSACTION 'drop'"));
        postgres.sql("COMMIT PREPARED 'drop'");
    }
    postgres.sql("SELECT pg_create_restore_point('it''s here')");
    postgres.sql("SELECT pg_switch_wal()");
    // Logical messages are one record each, however long: longer than a segment.
    postgres.sql("SELECT pg_logical_emit_message(true, 'big', repeat('x', 3000000))");
    for n in 0..40 {
        postgres.sql(&format!("INSERT INTO t SELECT {n}, repeat('y', 900) FROM generate_series(1, {n})"));
        postgres.sql(&format!("SELECT pg_logical_emit_message(false, '', repeat('z', {}))", 37_777 * n));
    }
    let space = scratch.dir("space");
    postgres.sql(&format!("CREATE TABLESPACE fast LOCATION '{}'", space.display()));
    postgres.sql("DROP TABLESPACE fast");
    postgres.sql(&format!("SELECT pg_create_restore_point('{}')", "ä".repeat(31)));
    postgres.sql("CHECKPOINT");
}

fn records_are_read_as_pg_waldump_reads_them(major: u32) {
    let scratch = Scratch::new();
    let mut postgres = Postgres::initdb(&scratch, major, &["--wal-segsize=1"]);
    postgres.configure(&[
        "max_prepared_transactions = 5",
        "wal_level = logical",
        "wal_keep_size = 1GB",
        "autovacuum = off",
    ]);
    postgres.start(&[]);
    write_wal(&postgres, &scratch);
    // After a crash the WAL goes on behind what was whole.
    postgres.stop("immediate");
    postgres.start(&[]);
    postgres.sql("INSERT INTO t VALUES (1, 'after the crash')");
    let (names, bytes) = wal(&postgres);
    let begins = |index: usize| {
        let name: pgsidecar_core::SegmentName = names[index].parse().unwrap();
        name.start(pgsidecar_core::WalSegmentSize::new(1 << 20).unwrap()).unwrap()
    };
    let expected = waldump(&postgres, begins(0));
    assert!(expected.len() > 80 && names.len() > 20, "{} records in {} segments", expected.len(), names.len());
    for chunk in [1 << 18, 4099] {
        assert_eq!(as_waldump_says(&bytes, begins(0), chunk), expected);
    }
    // From the middle on, as a plan does.
    for first in 1..names.len() {
        let found = as_waldump_says(&bytes[first << 20..], begins(first), 1 << 18);
        let later: Vec<&String> =
            expected.iter().filter(|line| **line >= format!("{:08X}", begins(first).bytes())).collect();
        assert_eq!(found.iter().collect::<Vec<_>>(), later, "from {}", names[first]);
    }
}

#[test]
fn records_are_read_as_pg_waldump_reads_them_pg15() {
    records_are_read_as_pg_waldump_reads_them(15);
}

#[test]
fn records_are_read_as_pg_waldump_reads_them_pg17() {
    records_are_read_as_pg_waldump_reads_them(17);
}
