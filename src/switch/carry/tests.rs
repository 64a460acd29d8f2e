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
        Switch { id, purpose, phase: Phase::Staging, roots }
    }

    /// Carries it out, but ends at the step of this number. Answers with whether it came to its end.
    fn carry(&self, end_at: usize) -> bool {
        let mut step = 0;
        let ended = carry_out_at(&self.data, &mut |_| {
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
    }

    fn check_kept(&self) {
        for root in self.switch().roots {
            let file = match root.role {
                Role::Data => "PG_VERSION",
                Role::Wal => "segment",
                Role::Tablespace => "rows",
            };
            assert_eq!(fs::read_to_string(root.kept.join(file)).unwrap(), "old", "{root:?}");
            assert!(!root.kept.join(SHUT).exists() && !root.live.join(SHUT).exists());
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
    let refused = carry_out_at(&database.data, &mut |_| Ok(())).unwrap_err();
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
    assert_eq!(carry_out_at(&database.data, &mut |_| Ok(())).unwrap_err().code, Code::Busy);
    drop(held);
    assert!(database.carry(usize::MAX));
}
