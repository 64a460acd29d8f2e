//! A small cluster is simulated: servers that write, are backed up, promoted, rolled back and lose files.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use proptest::prelude::*;

use super::sample::{self, SIZE, lsn, tli};
use crate::{
    BackupId, BackupKind, BackupRecord, Lsn, SegmentName, TimelineHistory, TimelineId,
    plan::{Catalog, RestorePlan, RestoreRequest, WalScan, select},
    recovery::RecoveryTarget,
    retention::{BackupFacts, Inventory, RetentionPlan},
};

pub(super) const HOUR: i64 = 3600;

pub(super) fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).unwrap()
}

/// What a repository holds.
#[derive(Clone, Debug, Default)]
pub(super) struct World {
    pub(super) segments: BTreeMap<(u32, u64), i64>,
    pub(super) backups: Vec<BackupRecord>,
    pub(super) stored: BTreeMap<BackupId, i64>,
    pub(super) torn: BTreeSet<BackupId>,
    pub(super) pins: BTreeSet<BackupId>,
    pub(super) histories: BTreeMap<u32, (Vec<(u32, Lsn)>, i64)>,
}

/// A server: its timeline, and the segment that it writes next.
#[derive(Clone, Copy, Debug)]
pub(super) struct Server {
    timeline: u32,
    next: u64,
}

#[derive(Clone, Debug)]
pub(super) enum Event {
    Write {
        server: usize,
        segments: u64,
    },
    Quiet {
        hours: i64,
    },
    Backup {
        server: usize,
        kind: u8,
        segments: u64,
        clock_behind: i64,
    },
    /// A copy of the server as it was some segments ago goes on as a primary, beside it.
    Promote {
        server: usize,
        back: u64,
    },
    Lose {
        which: usize,
    },
    Tear {
        which: usize,
    },
    Pin {
        which: usize,
    },
}

pub(super) fn event() -> impl Strategy<Value = Event> {
    let server = 0..8usize;
    prop_oneof![
        6 => (server.clone(), 1..6u64).prop_map(|(server, segments)| Event::Write { server, segments }),
        2 => (1..20i64).prop_map(|hours| Event::Quiet { hours }),
        6 => (server.clone(), 0..3u8, 0..3u64, prop_oneof![5 => Just(0), 2 => 0..400i64])
            .prop_map(|(server, kind, segments, clock_behind)| Event::Backup { server, kind, segments, clock_behind }),
        2 => (server, 0..6u64).prop_map(|(server, back)| Event::Promote { server, back }),
        1 => (0..1000usize).prop_map(|which| Event::Lose { which }),
        2 => (0..1000usize).prop_map(|which| Event::Tear { which }),
        1 => (0..1000usize).prop_map(|which| Event::Pin { which }),
    ]
}

impl World {
    pub(super) fn history(&self, timeline: u32) -> TimelineHistory {
        let lines = self.histories.get(&timeline).map(|(lines, _)| lines.clone()).unwrap_or_default();
        sample::history(timeline, &lines)
    }

    pub(super) fn simulate(events: &[Event]) -> (World, i64) {
        let mut world = World::default();
        let mut servers = vec![Server { timeline: 1, next: 1 }];
        let mut now = 0;
        for event in events {
            now += 7;
            match *event {
                Event::Write { server, segments } => {
                    let at = server % servers.len();
                    world.write(&mut servers[at], segments, &mut now);
                }
                Event::Quiet { hours } => now += hours * HOUR,
                Event::Backup { server, kind, segments, clock_behind } => {
                    let at = server % servers.len();
                    world.back_up(&mut servers[at], kind, segments, clock_behind, &mut now);
                }
                Event::Promote { server, back } => {
                    let of = servers[server % servers.len()];
                    let mut lines =
                        world.histories.get(&of.timeline).map(|(lines, _)| lines.clone()).unwrap_or_default();
                    let begin = lines.last().map_or(0, |(_, begin)| SIZE.segment_number(*begin));
                    let next = of.next.saturating_sub(back).max(begin).max(1);
                    let timeline = world.histories.keys().max().map_or(2, |newest| newest + 1);
                    lines.push((of.timeline, lsn(next)));
                    world.histories.insert(timeline, (lines, now));
                    servers.push(Server { timeline, next });
                }
                Event::Lose { which } => {
                    let lost = world.segments.keys().nth(which % world.segments.len().max(1)).copied();
                    lost.map(|lost| world.segments.remove(&lost));
                }
                Event::Tear { which } => {
                    world.torn.extend(world.backups.get(which % world.backups.len().max(1)).map(|backup| backup.id));
                }
                Event::Pin { which } => {
                    world.pins.extend(world.backups.get(which % world.backups.len().max(1)).map(|backup| backup.id));
                }
            }
        }
        (world, now)
    }

    pub(super) fn write(&mut self, server: &mut Server, segments: u64, now: &mut i64) {
        for _ in 0..segments {
            *now += 600;
            self.segments.insert((server.timeline, server.next), *now);
            server.next += 1;
        }
    }

    pub(super) fn back_up(&mut self, server: &mut Server, kind: u8, segments: u64, clock_behind: i64, now: &mut i64) {
        let history = self.history(server.timeline);
        let on_the_way = self.backups.iter().filter(|b| history.contains(b.timeline, b.stop_lsn));
        let parent = match kind {
            0 => None,
            1 => on_the_way.filter(|b| b.id.kind() == BackupKind::Full).max_by_key(|b| b.stop_lsn),
            _ => on_the_way.max_by_key(|b| b.stop_lsn),
        };
        let kind = match (parent, kind) {
            (None, _) => BackupKind::Full,
            (_, 1) => BackupKind::Differential,
            _ => BackupKind::Incremental,
        };
        let parent = parent.map(|parent| parent.id);
        let started = *now;
        let start = server.next;
        self.write(server, segments + 1, now);
        let record = BackupRecord {
            id: BackupId::new(at(started), kind),
            parent,
            started_at: at(started - clock_behind * HOUR),
            stopped_at: at(*now - clock_behind * HOUR),
            stop_lsn: Lsn::new(lsn(start + segments).bytes() + 100),
            ..sample::backup(server.timeline, start, start + segments)
        };
        self.stored.insert(record.id, *now + 5);
        self.backups.push(record);
        *now += 7;
    }

    pub(super) fn inventory(&self) -> Inventory {
        let mut inventory = Inventory::empty(SIZE);
        inventory.backups = self.backups.clone();
        inventory.facts = (self.backups.iter())
            .map(|b| {
                let stored_at = at(self.stored[&b.id]);
                (b.id, BackupFacts { stored_at, intact: !self.torn.contains(&b.id), held: false })
            })
            .collect();
        inventory.pins = self.pins.clone();
        inventory.histories = self.histories.keys().map(|timeline| self.history(*timeline)).collect();
        for (timeline, (_, stored)) in &self.histories {
            inventory.stock(tli(*timeline)).found(None, at(*stored));
        }
        for ((timeline, number), stored) in &self.segments {
            let segment = SegmentName::from_number(tli(*timeline), *number, SIZE);
            let stock = inventory.stock(tli(*timeline));
            stock.wal.found(segment, 100, at(*stored));
            stock.found(Some(segment), at(*stored));
        }
        inventory
    }

    pub(super) fn without(&self, plan: &RetentionPlan) -> World {
        let mut left = self.clone();
        let gone: BTreeSet<BackupId> = plan.backups_to_remove().into_iter().collect();
        left.backups.retain(|backup| !gone.contains(&backup.id));
        left.segments.retain(|(timeline, number), _| {
            let segment = SegmentName::from_number(tli(*timeline), *number, SIZE);
            !plan.timeline(tli(*timeline)).unwrap().removes_segment(segment)
        });
        left
    }

    /// Whether a restore to this target on this timeline, which begins with this backup, gets there.
    pub(super) fn restores(&self, backup: BackupId, timeline: TimelineId, target: &RecoveryTarget) -> bool {
        let histories = self.histories.keys().map(|timeline| self.history(*timeline)).collect();
        let catalog = Catalog { backups: self.backups.clone(), histories, ..Catalog::default() };
        let request =
            RestoreRequest { target: target.clone(), timeline: Some(timeline), backup: Some(backup), inclusive: true };
        let Ok(selection) = select(&catalog, &request) else { return false };
        if selection.chain.iter().any(|link| self.torn.contains(&link.id)) {
            return false;
        }
        let mut scan = WalScan::new(selection.history.clone(), SIZE, selection.backup.start_lsn);
        for ((timeline, number), stored) in &self.segments {
            scan.found(SegmentName::from_number(tli(*timeline), *number, SIZE), 0, at(*stored));
        }
        let wal = scan.finish();
        // A segment holds nothing younger than the moment at which it was stored. What a segment really holds, no world here
        // knows.
        let in_reach = match target {
            RecoveryTarget::Time(time) => wal.last.is_some_and(|(_, stored)| *time <= stored),
            _ => true,
        };
        in_reach && RestorePlan::new(selection, target.clone(), wal).is_ok()
    }

    pub(super) fn restores_to_its_end(&self, backup: &BackupRecord) -> bool {
        self.restores(backup.id, backup.timeline, &RecoveryTarget::Immediate)
    }

    pub(super) fn timelines(&self) -> BTreeSet<u32> {
        self.segments.keys().map(|(timeline, _)| *timeline).chain(self.histories.keys().copied()).collect()
    }

    /// The moments at which anything changes within these bounds.
    pub(super) fn moments(&self, from: Timestamp, to: Timestamp) -> BTreeSet<Timestamp> {
        let stops = self.backups.iter().map(|backup| backup.stopped_at);
        let stored = self.segments.values().map(|stored| at(*stored));
        let all = stops.chain(stored).chain([from, to]);
        all.flat_map(|at| [at, at + SignedDuration::from_secs(1)]).filter(|at| (from..=to).contains(at)).collect()
    }
}
