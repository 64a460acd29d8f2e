//! A switch is ended at each of its steps, and carried out by the next try.

use std::path::PathBuf;

use pgsidecar_core::switch::{Beside, SwitchId};

use super::*;
use crate::switch::make_ready;

/// A data directory, WAL and a tablespace elsewhere, each with what is there and what is to come.
struct Database {
    scratch: tempfile::TempDir,
    data: Place,
    alone: bool,
    as_content: bool,
}

const ID: &str = "20261121T061500Z";

impl Database {
    fn new(alone: bool, as_content: bool) -> Database {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path().canonicalize().unwrap();
        for directory in ["data/base", "wal/archive_status", "space/PG_15_1"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        for file in ["data/PG_VERSION", "data/base/rows", "wal/segment", "space/PG_15_1/rows"] {
            fs::write(root.join(file), "old").unwrap();
        }
        if !alone {
            std::os::unix::fs::symlink(root.join("wal"), root.join("data/pg_wal")).unwrap();
            fs::create_dir(root.join("data/pg_tblspc")).unwrap();
            std::os::unix::fs::symlink(root.join("space"), root.join("data/pg_tblspc/16400")).unwrap();
        }
        let path = root.join("data");
        let beside = if as_content { Beside::inside(&path) } else { Beside::next_to(&path).unwrap() };
        let database =
            Database { data: Place { path, beside, is_mount_point: as_content }, scratch, alone, as_content };
        let mut switch = database.switch();
        for root in &switch.roots {
            let staged = root.staged.as_deref().unwrap();
            fs::create_dir_all(staged).unwrap();
            let files: &[&str] = match root.role {
                Role::Data => &["PG_VERSION", "rows"],
                Role::Wal => &["segment", "later"],
                Role::Tablespace => &["rows"],
            };
            files.iter().for_each(|file| fs::write(staged.join(file), "new").unwrap());
        }
        make_ready(&mut switch).unwrap();
        shut_staged(&switch).unwrap();
        note::write_pending(&database.data, &switch).unwrap();
        database
    }

    fn switch(&self) -> Switch {
        let root = self.scratch.path().canonicalize().unwrap();
        let purpose = Purpose::Restore {
            backup: "20261121T051500Z-full".parse().unwrap(),
            target: "a time".to_owned(),
            timeline: pgsidecar_core::TimelineId::FIRST,
            to_the_end: false,
            wal_through: None,
        };
        let id: SwitchId = ID.parse().unwrap();
        let way = if self.as_content { Way::Content { parted: false } } else { Way::Whole };
        let make = |role, live: PathBuf, beside: &Beside, inner: &str, way| Root {
            role,
            staged: Some(if inner.is_empty() { beside.staged() } else { beside.staged().join(inner) }),
            kept: beside.kept(id, &purpose),
            live,
            way,
            old: None,
            new: None,
        };
        let wal = root.join("wal");
        let beside_wal = if self.as_content { Beside::inside(&wal) } else { Beside::next_to(&wal).unwrap() };
        let space = Beside::inside(&root.join("space"));
        let mut roots = vec![
            make(Role::Tablespace, root.join("space/PG_15_1"), &space, "PG_15_1", Way::Whole),
            make(Role::Wal, wal, &beside_wal, "", way),
            make(Role::Data, self.data.path.clone(), &self.data.beside, "", way),
        ];
        if self.alone {
            roots.drain(..2);
        }
        Switch { id, purpose, phase: Phase::Staging, roots, refused: None }
    }

    /// Carries it out, but ends at the step of this number. Answers with whether it came to its end.
    fn carry(&self, end_at: usize) -> bool {
        let mut step = 0;
        let ended = carry_out_at(&self.data, Stopped::Unknown, &mut |_| {
            step += 1;
            if step > end_at { Err(Failure::internal("ended here")) } else { Ok(()) }
        });
        match ended {
            Ok(_) => true,
            Err(failure) => {
                assert!(failure.message.contains("ended here"), "{failure}");
                false
            }
        }
    }

    /// What PostgreSQL would find at each place: `old` or `new`; `None` for a mix, or where nothing is.
    fn content(&self) -> Option<String> {
        let mut files = vec![self.data.path.join("PG_VERSION")];
        if !self.alone {
            files.extend(["wal/segment", "space/PG_15_1/rows"].map(|file| self.scratch.path().join(file)));
        }
        let contents: Vec<String> = files.iter().map(|file| fs::read_to_string(file).ok()).collect::<Option<_>>()?;
        let whole = |place: &str| {
            let is_new = self.data.path.join("rows").exists();
            contents.iter().all(|content| content == place) && is_new == (place == "new")
        };
        ["old", "new"].into_iter().find(|place| whole(place)).map(str::to_owned)
    }

    /// Nothing is to start on a mix, and nothing to take the directory for empty.
    fn check(&self, when: usize) {
        assert!(fs::read_dir(&self.data.path).unwrap().next().is_some(), "step {when}: the data directory is empty");
        if self.data.path.join("PG_VERSION").exists() {
            assert!(self.content().is_some(), "step {when}: PostgreSQL would start on a mix");
        }
        // What is staged or kept has links to WAL and tablespaces of another database.
        let root = self.switch().roots.pop().unwrap();
        let beside = [root.kept, root.staged.unwrap()];
        let starts = beside.iter().any(|beside| beside.join("PG_VERSION").exists());
        assert!(!starts || self.is_exchanged(), "step {when}: PostgreSQL would start on half a database");
    }

    /// Whether one exchange of two names is all.
    fn is_exchanged(&self) -> bool {
        self.alone && !self.as_content
    }

    fn check_kept(&self) {
        for root in self.switch().roots {
            let file = match root.role {
                Role::Data if self.is_exchanged() => "PG_VERSION",
                Role::Data => SHUT,
                Role::Wal => "segment",
                Role::Tablespace => "rows",
            };
            assert_eq!(fs::read_to_string(root.kept.join(file)).unwrap(), "old", "{root:?}");
            assert!(!root.live.join(SHUT).exists());
            assert!(!root.staged.unwrap().exists());
        }
        assert_eq!(note::done(&self.data).unwrap().len(), 1);
        assert_eq!(note::pending(&self.data).unwrap(), None);
    }
}

#[test]
fn a_switch_that_is_ended_at_any_step_goes_on_at_the_next_try() {
    for (alone, as_content) in [(true, false), (true, true), (false, false), (false, true)] {
        let mut steps = 0;
        for end_at in 0.. {
            let database = Database::new(alone, as_content);
            assert_eq!(database.content().as_deref(), Some("old"));
            let done = database.carry(end_at);
            database.check(end_at);
            if done {
                steps = end_at;
            } else {
                // Twice in a row.
                database.carry(end_at % 3);
                database.check(end_at);
                assert!(database.carry(usize::MAX));
            }
            assert_eq!(database.content().as_deref(), Some("new"), "{alone} {as_content} {end_at}");
            database.check_kept();
            if done {
                break;
            }
        }
        assert!(steps >= if alone && !as_content { 4 } else { 8 }, "{steps} steps: are all of them watched?");
    }
}

#[test]
fn what_somebody_else_has_touched_is_refused_before_anything_is_changed() {
    let database = Database::new(false, false);
    let root = database.scratch.path();
    fs::rename(root.join("wal"), root.join("away")).unwrap();
    fs::create_dir(root.join("wal")).unwrap();
    let refused = carry_out_at(&database.data, Stopped::Unknown, &mut |_| Ok(())).unwrap_err();
    assert!(
        refused.message.contains("isn't as it was") && refused.message.contains("nothing was changed"),
        "{refused}"
    );
    fs::remove_dir(root.join("wal")).unwrap();
    fs::rename(root.join("away"), root.join("wal")).unwrap();
    assert_eq!(database.content().as_deref(), Some("old"));
    assert!(database.carry(usize::MAX));
    database.check_kept();
}

#[test]
fn one_at_a_time() {
    let database = Database::new(true, false);
    let held = lock(&database.data).unwrap();
    assert_eq!(carry_out_at(&database.data, Stopped::Unknown, &mut |_| Ok(())).unwrap_err().code, Code::Busy);
    drop(held);
    assert!(database.carry(usize::MAX));
}

#[test]
fn a_tablespace_that_was_made_since_goes_with_the_old_database() {
    let database = Database::new(false, false);
    let root = database.scratch.path().canonicalize().unwrap();
    fs::create_dir_all(root.join("later/PG_15_202209061")).unwrap();
    fs::write(root.join("later/PG_15_202209061/rows"), "old").unwrap();
    std::os::unix::fs::symlink(root.join("later"), database.data.path.join("pg_tblspc/16500")).unwrap();
    let control = include_bytes!("../../../crates/core/tests/fixtures/pg_control-15");
    fs::create_dir(database.data.path.join("global")).unwrap();
    fs::write(database.data.path.join("global/pg_control"), control).unwrap();
    fs::write(database.data.path.join("PG_VERSION"), "15").unwrap();
    assert!(database.carry(usize::MAX));
    assert!(!root.join("later/PG_15_202209061").exists(), "both databases would write to it");
    let kept = root.join(format!("later/pgsql_tmp.before-restore-{ID}"));
    assert_eq!(fs::read_to_string(kept.join("rows")).unwrap(), "old");
}

#[test]
fn one_that_was_noted_and_has_touched_nothing_is_looked_at_again() {
    for (alone, as_content) in [(true, false), (false, true)] {
        let database = Database::new(alone, as_content);
        let noted = |phase| Switch { phase, ..note::pending(&database.data).unwrap().unwrap() };
        note::write_pending(&database.data, &noted(Phase::Switching)).unwrap();
        // A server has been started since: its socket is where its file says.
        let socket = database.scratch.path().join(".s.PGSQL.5433");
        let listening = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let (pid_file, at) = (database.data.path.join("postmaster.pid"), database.scratch.path().display());
        fs::write(&pid_file, format!("71\n/data\n1763714000\n5433\n{at}\n\n 1 1\nready\n")).unwrap();
        let refused = carry_out_at(&database.data, Stopped::BeforeItsStart, &mut |_| Ok(())).unwrap_err();
        assert!(refused.message.contains("a server runs on"), "{refused}");
        assert_eq!(database.content().as_deref(), Some("old"));
        assert_eq!(noted(Phase::Ready), note::pending(&database.data).unwrap().unwrap());

        // And one that comes after the first look.
        drop(listening);
        fs::remove_file(&socket).unwrap();
        let mut later = None;
        let refused = carry_out_at(&database.data, Stopped::BeforeItsStart, &mut |step| {
            if step == "note that it begins" {
                later = Some(std::os::unix::net::UnixListener::bind(&socket).unwrap());
            }
            Ok(())
        });
        let refused = refused.unwrap_err();
        assert!(refused.message.contains("a server runs on"), "{refused}");
        assert!(!refused.hint.contains("doesn't start"), "{}", refused.hint);
        assert_eq!(database.content().as_deref(), Some("old"));
        drop(later);
        fs::remove_file(&pid_file).unwrap();
        // Taken back, it leaves the database as it was.
        crate::switch::cancel(&database.data.path).unwrap();
        assert_eq!(database.content().as_deref(), Some("old"));
    }
}
