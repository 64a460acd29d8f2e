//! Retention: what of a repository is still needed, and what may go. Pure: [`plan`] decides from an [`Inventory`], a
//! [`Policy`] and the time; others list and delete.
//!
//! The promise (I4): whatever could be restored within the recovery window can be restored afterwards, and every backup
//! that stays can be restored to its own end. In the order of the rules:
//!
//! - **Nothing goes** while it can't be told what is needed: a record that can't be read, a newest backup that is
//!   damaged, incomplete or lacks WAL, a timeline whose history is missing ([`Blocker`]).
//! - **The window ends at the last moment that the repository knows**, not at the clock's now, if that is later: where
//!   archiving has stopped, or a clock runs ahead, the window doesn't slide over what is left.
//! - **Timelines each count for themselves.** A timeline matters if anything of it was stored within the window (or the
//!   last week, if that is longer, so that a backup under way finds its WAL), or if the newest backup is of it. On the way
//!   to each of these stay: all backups that were complete within the window; the newest that was so before it, and can be
//!   restored, to reach its beginning; the newest full ones, as many as the policy wants at least; what these build on; and
//!   all WAL from the oldest of them on. Storage snapshots count in the same way, for themselves: whether the storage still
//!   has them isn't known here, so that none stands in for a backup.
//! - **What is pinned stays**, with what it builds on and the WAL to its own end. WAL that leads on from there goes.
//! - **A backup that is broken** never stands in for one that isn't, and goes when its time has come like any other. One
//!   with damaged pages, or that builds on such a one, stays as its time demands, and never in the place of a clean one.
//!
//! Which of two backups is the later one on a way is told by the WAL. When one was complete is told by two clocks, of
//! which the later counts: the server's, and the store's. The server's is believed up to a day ahead of the store's.

mod delete;
mod dumps;
mod growth;
mod inventory;
mod policy;
pub mod records;
mod wal;

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use crate::{BackupId, DumpId, Lsn, SnapshotId, TimelineHistory, TimelineId};

use self::wal::Needs;
pub use self::{
    delete::{DeleteRefusal, may_delete},
    dumps::DumpReason,
    growth::{Growth, GrowthOf, Kind, Measured, forecast},
    inventory::{BackupFacts, Inventory, TimelineStock, Unreadable},
    policy::{DumpCounts, Policy, RecoveryWindow, Redundancy},
    wal::{NeededRange, TimelinePlan},
};

/// For how long an incomplete backup or dump is taken to be under way after the last object of it was stored.
pub const UNDER_WAY: SignedDuration = SignedDuration::from_hours(7 * 24);

/// Why a backup or snapshot stays.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The policy has no recovery window: all stay.
    NoWindow,
    /// It was complete within the recovery window.
    Window,
    /// It's the newest before the window, and leads to the window's beginning.
    WindowBegin,
    /// It's one of the full backups that stay at least.
    Redundancy,
    /// No other on the way to its timeline can be restored either.
    NothingBetter,
    /// It's pinned.
    Pinned,
    /// The store didn't let it go.
    Held,
    /// This one builds on it.
    BuiltOnBy(BackupId),
}

/// What becomes of a backup, a snapshot or a dump.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Decision<Id, Why> {
    /// Which one.
    pub id: Id,
    /// Why it stays, in order; it goes if there is no reason.
    pub kept: Vec<Why>,
}

/// What may go, and why the rest stays.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct RetentionPlan {
    /// The end of the window: now, or the last moment that the repository knows.
    pub window_end: Timestamp,
    /// The beginning of the window, if the policy has one.
    pub window_begin: Option<Timestamp>,
    /// All complete backups, oldest first.
    pub backups: Vec<Decision<BackupId, Reason>>,
    /// All complete snapshots, oldest first.
    pub snapshots: Vec<Decision<SnapshotId, Reason>>,
    /// All complete dumps, oldest first. Those stay without a reason of their own for which there is no policy.
    pub dumps: Vec<Decision<DumpId, DumpReason>>,
    /// All timelines of which there is anything, in order.
    pub timelines: Vec<TimelinePlan>,
    /// Backups that were never completed, and that nobody works at any more.
    pub remains: Vec<BackupId>,
    /// Dumps that were never completed, and that nobody works at any more.
    pub dump_remains: Vec<DumpId>,
    /// Records of dumps that can't be read: while there are such, no dump goes that the policy would have go.
    pub unreadable_dumps: Vec<Unreadable>,
    #[serde(skip)]
    dumps_are_counted: bool,
}

impl RetentionPlan {
    /// The backups that go, those that build on others before these.
    pub fn backups_to_remove(&self) -> Vec<BackupId> {
        self.backups.iter().rev().filter(|backup| backup.kept.is_empty()).map(|backup| backup.id).collect()
    }

    /// The snapshots whose records go, oldest first.
    pub fn snapshots_to_remove(&self) -> Vec<SnapshotId> {
        self.snapshots.iter().filter(|snapshot| snapshot.kept.is_empty()).map(|snapshot| snapshot.id).collect()
    }

    /// The dumps that go, oldest first.
    pub fn dumps_to_remove(&self) -> Vec<DumpId> {
        let go = self.dumps.iter().filter(|dump| self.dumps_are_counted && dump.kept.is_empty());
        go.map(|dump| dump.id).collect()
    }

    /// What becomes of a timeline's WAL; `None` for one that wasn't there when this was planned.
    pub fn timeline(&self, timeline: TimelineId) -> Option<&TimelinePlan> {
        self.timelines.iter().find(|plan| plan.timeline == timeline)
    }
}

/// Why nothing may be removed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Blocker {
    /// What it needs can't be told.
    #[error("{what} can't be read: {why}")]
    Unreadable {
        /// The object.
        what: String,
        /// Why.
        why: String,
    },
    /// It's the one that counts.
    #[error("the newest backup, {backup}, {why}")]
    NewestBackup {
        /// The backup.
        backup: BackupId,
        /// What is wrong with it.
        why: String,
    },
    /// Backups of earlier timelines may lead to it, or not.
    #[error("the history of timeline {0} is not in the repository: what leads to it can't be told")]
    NoHistory(TimelineId),
}

/// Something to begin a restore with.
struct Start {
    name: Name,
    timeline: TimelineId,
    start: Lsn,
    stop: Lsn,
    /// When it was complete, by the later of the clocks.
    complete: Timestamp,
    /// Whether all of it is there, with the WAL to its end.
    restorable: bool,
    /// Whether it's restorable, and neither it nor what it builds on found damaged pages in the database.
    clean: bool,
    full: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Name {
    Backup(BackupId),
    Snapshot(SnapshotId),
}

type Reasons = BTreeMap<Name, BTreeSet<Reason>>;

/// Decides what may go.
///
/// # Errors
/// [`Blocker`] if nothing may, because something is wrong that somebody has to look at first.
pub fn plan(inventory: &Inventory, policy: &Policy, now: Timestamp) -> Result<RetentionPlan, Blocker> {
    if let Some(Unreadable { what, why }) = inventory.unreadable.first() {
        return Err(Blocker::Unreadable { what: what.clone(), why: why.clone() });
    }
    let window_end = inventory.last_known().map_or(now, |known| known.min(now));
    let window_begin = policy.window.map(|window| window.begin(window_end));
    let backups: Vec<Start> = inventory.backups.iter().map(|record| inventory.backup_start(record)).collect();
    let snapshots: Vec<Start> = inventory.snapshots.iter().map(|record| inventory.snapshot_start(record)).collect();
    let newest = backups.iter().max_by_key(|backup| (backup.complete, backup.name));
    if let Some(Start { name: Name::Backup(backup), .. }) = newest
        && let Some(why) = inventory.what_is_wrong(*backup)
    {
        return Err(Blocker::NewestBackup { backup: *backup, why });
    }
    let mut reasons = Reasons::new();
    let mut needs = Needs::default();
    match window_begin.filter(|_| !backups.is_empty() || !snapshots.is_empty()) {
        None => {
            for start in backups.iter().chain(&snapshots) {
                reasons.entry(start.name).or_default().insert(Reason::NoWindow);
            }
            inventory.timelines().into_iter().for_each(|timeline| needs.all_of(timeline));
        }
        Some(begin) => {
            let recent = begin.min(window_end.checked_sub(UNDER_WAY).unwrap_or(Timestamp::MIN));
            for timeline in inventory.timelines() {
                let matters = inventory.stored_since(timeline, recent)
                    || newest.is_some_and(|newest| newest.timeline == timeline);
                if matters {
                    let way = Way { inventory, policy, begin, timeline };
                    way.keep([&backups, &snapshots], &mut reasons, &mut needs)?;
                }
            }
            for start in &backups {
                let Name::Backup(id) = start.name else { continue };
                let said = [(inventory.pins.contains(&id), Reason::Pinned), (inventory.is_held(id), Reason::Held)];
                for (_, reason) in said.into_iter().filter(|(applies, _)| *applies) {
                    reasons.entry(start.name).or_default().insert(reason);
                    inventory.note_parents(id, &mut reasons);
                }
            }
            // Whatever is listed can be restored, to its own end at least.
            for start in backups.iter().chain(&snapshots).filter(|start| reasons.contains_key(&start.name)) {
                needs.between(&inventory.way_to(start.timeline), start.start, start.stop, inventory.size);
            }
        }
    }
    let decide = |name: Name| reasons.get(&name).map(|why| why.iter().copied().collect()).unwrap_or_default();
    let mut decided: Vec<Decision<BackupId, Reason>> =
        inventory.backups.iter().map(|b| Decision { id: b.id, kept: decide(Name::Backup(b.id)) }).collect();
    decided.sort_by_key(|backup| backup.id);
    let mut snapshots: Vec<Decision<SnapshotId, Reason>> =
        inventory.snapshots.iter().map(|s| Decision { id: s.id, kept: decide(Name::Snapshot(s.id)) }).collect();
    snapshots.sort_by_key(|snapshot| snapshot.id);
    let mut kept_dumps = policy.dumps.map(|counts| dumps::kept(&inventory.dumps, &counts, now)).unwrap_or_default();
    // Without a policy nothing goes by them anyway.
    let unreadable_dumps = policy.dumps.map(|_| inventory.unreadable_dumps.clone()).unwrap_or_default();
    let abandoned = |last: Timestamp| window_end.duration_since(last) > UNDER_WAY;
    Ok(RetentionPlan {
        window_end,
        window_begin,
        backups: decided,
        snapshots,
        dumps: (inventory.dumps.keys())
            .map(|id| Decision { id: *id, kept: kept_dumps.remove(id).unwrap_or_default() })
            .collect(),
        timelines: (inventory.timelines().into_iter()).map(|timeline| needs.plan(timeline, inventory)).collect(),
        remains: inventory.unfinished.iter().filter(|(_, last)| abandoned(**last)).map(|(id, _)| *id).collect(),
        dump_remains: inventory
            .unfinished_dumps
            .iter()
            .filter(|(_, last)| abandoned(**last))
            .map(|(id, _)| *id)
            .collect(),
        dumps_are_counted: policy.dumps.is_some() && unreadable_dumps.is_empty(),
        unreadable_dumps,
    })
}

/// The way to a timeline that matters.
struct Way<'a> {
    inventory: &'a Inventory,
    policy: &'a Policy,
    begin: Timestamp,
    timeline: TimelineId,
}

impl Way<'_> {
    /// Notes what stays because of this timeline, and its WAL.
    fn keep(&self, kinds: [&[Start]; 2], reasons: &mut Reasons, needs: &mut Needs) -> Result<(), Blocker> {
        let Way { inventory, timeline, .. } = *self;
        let history = inventory.way_to(timeline);
        // Restores end here, and a backup that is under way here needs it. Or nothing does that is complete yet.
        let mut any_restorable = false;
        let mut reaches_begin = false;
        let mut from: Option<Lsn> = None;
        for starts in kinds {
            let kept = self.keep_of(starts, &history);
            any_restorable |= kept.any_restorable;
            reaches_begin |= kept.reaches_begin;
            let mut way = Reasons::new();
            for (name, reason) in kept.kept {
                way.entry(name).or_default().insert(reason);
                if let Name::Backup(id) = name {
                    inventory.note_parents(id, &mut way);
                }
            }
            let first = starts.iter().filter(|start| way.contains_key(&start.name)).map(|start| start.start).min();
            from = [from, first].into_iter().flatten().min();
            for (name, why) in way {
                reasons.entry(name).or_default().extend(why);
            }
        }
        if !reaches_begin && !inventory.knows_way_to(timeline) {
            return Err(Blocker::NoHistory(timeline));
        }
        if let Some(from) = from {
            needs.from(&history, from, inventory.size);
        }
        if !any_restorable {
            needs.all_of(timeline);
        }
        Ok(())
    }

    fn keep_of(&self, starts: &[Start], history: &TimelineHistory) -> KeptOnWay {
        let mut on: Vec<&Start> = starts.iter().filter(|start| history.contains(start.timeline, start.stop)).collect();
        on.sort_by_key(|start| (start.stop, start.name));
        let any_restorable = on.iter().any(|start| start.restorable);
        // One with damaged pages stays where its time demands it, and a clean one beside it.
        let (mut first, mut fulls) = (BTreeSet::new(), BTreeSet::new());
        for counts in [|start: &Start| start.restorable, |start: &Start| start.clean] {
            let counting = || on.iter().rev().filter(|start| counts(start));
            first.extend(counting().find(|start| start.complete <= self.begin).map(|start| start.name));
            let newest = counting().filter(|start| start.full).take(self.policy.redundancy.count());
            fulls.extend(newest.map(|start| start.name));
        }
        let mut kept = Vec::new();
        for start in &on {
            let said = [
                (start.complete > self.begin, Reason::Window),
                (first.contains(&start.name), Reason::WindowBegin),
                (fulls.contains(&start.name), Reason::Redundancy),
                (!any_restorable, Reason::NothingBetter),
            ];
            kept.extend(said.into_iter().filter(|(applies, _)| *applies).map(|(_, reason)| (start.name, reason)));
        }
        KeptOnWay { kept, any_restorable, reaches_begin: !first.is_empty() }
    }
}

/// What stays of one kind because of a way.
struct KeptOnWay {
    kept: Vec<(Name, Reason)>,
    any_restorable: bool,
    /// Whether the beginning of the window can be reached from one of them.
    reaches_begin: bool,
}

#[cfg(test)]
mod tests;
