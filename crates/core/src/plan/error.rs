//! Why there is no plan.

use jiff::Timestamp;

use super::TransactionEnd;
use crate::{BackupId, Lsn, SegmentName, TimelineId, chain::ChainError, wal_records::WalEnd};

/// Why a target can't be reached. Each message says what is there instead; [`PlanError::hint`] what to do.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum PlanError {
    /// Nothing to begin with.
    #[error("the repository holds no complete backup of this database")]
    NoBackups,
    /// The backup that was named.
    #[error("there is no backup {0}")]
    NoSuchBackup(BackupId),
    /// The timeline that was named.
    #[error("timeline {0} is unknown: the repository has neither its history nor a backup of it")]
    NoSuchTimeline(TimelineId),
    /// No backup lies on the way to this timeline.
    #[error("no backup lies on the way to timeline {0}")]
    NoBackupOnTimeline(TimelineId),
    /// Every backup ends after the target.
    #[error(
        "the target, {target}, lies before the end of the first backup that could lead to it: {backup} was complete \
         at {stopped_at} ({stop_lsn})"
    )]
    BeforeFirstBackup {
        /// What was asked for.
        target: String,
        /// The earliest backup.
        backup: BackupId,
        /// Its end.
        stopped_at: Timestamp,
        /// Its end.
        stop_lsn: Lsn,
    },
    /// The backup that was named ends after the target.
    #[error(
        "the target, {target}, lies before the end of backup {backup}, which was complete at {stopped_at} ({stop_lsn})"
    )]
    BeforeBackup {
        /// What was asked for.
        target: String,
        /// The backup that was named.
        backup: BackupId,
        /// Its end.
        stopped_at: Timestamp,
        /// Its end.
        stop_lsn: Lsn,
    },
    /// A name says nothing about when, and this one isn't recorded.
    #[error("there is no record of a restore point {name:?}: which backup precedes it isn't known")]
    NameNeedsBackup {
        /// The name.
        name: String,
        /// Names that are recorded, the newest first, a few.
        known: Vec<String>,
    },
    /// The same name was used before, behind the backup.
    #[error(
        "the restore point {name:?} at {newest} can't be reached by its name: there is another one of that name at \
         {earlier}, and no backup between them"
    )]
    NameMetEarlier {
        /// The name.
        name: String,
        /// The one that was meant: where its record ends.
        newest: Lsn,
        /// The one at which PostgreSQL would stop.
        earlier: Lsn,
    },
    /// Recovery would stop before it may.
    #[error("the target, {target}, is met at {at}, before the backup is complete at {stop}")]
    MetTooEarly {
        /// What was asked for.
        target: String,
        /// Where PostgreSQL would stop, and end with an error.
        at: Lsn,
        /// The backup's end.
        stop: Lsn,
    },
    /// All WAL was read.
    #[error("no transaction {xid} has ended between the backup and the end of the archive at {reachable}")]
    NoSuchTransaction {
        /// What was asked for.
        xid: u64,
        /// The end of what can be replayed.
        reachable: Lsn,
    },
    /// All WAL was read.
    #[error("there is no restore point {name:?} between the backup and the end of the archive at {reachable}")]
    NoSuchRestorePoint {
        /// What was asked for.
        name: String,
        /// The end of what can be replayed.
        reachable: Lsn,
    },
    /// No record of the WAL shows that the target was passed.
    #[error(
        "the target, {target}, lies after the last archived WAL of timeline {timeline}, which ends at {reachable}{}", told(.last_commit.as_ref())
    )]
    AfterLastRecord {
        /// What was asked for.
        target: String,
        /// The timeline to end on.
        timeline: TimelineId,
        /// The end of what can be replayed.
        reachable: Lsn,
        /// The last transaction that can be restored.
        last_commit: Option<TransactionEnd>,
    },
    /// Recovery would end there.
    #[error(
        "the target, {target}, can't be reached: the archived WAL is damaged: {end}{}", told(.last_commit.as_ref())
    )]
    DamagedWal {
        /// What was asked for.
        target: String,
        /// Where and how.
        end: WalEnd,
        /// The last transaction before it.
        last_commit: Option<TransactionEnd>,
    },
    /// The backup that was named, or every one that leads to the target, builds on one that isn't there.
    #[error("{0}: it can't be restored")]
    Chain(ChainError),
    /// WAL from the time of the backup itself is missing.
    #[error("backup {backup} can't be restored: WAL segment {missing}, which it needs, is not in the archive")]
    BackupLacksWal {
        /// The backup.
        backup: BackupId,
        /// The first segment that is missing.
        missing: SegmentName,
    },
    /// There is a hole before the target.
    #[error(
        "the target, {target}, can't be reached: WAL segment {missing} is missing in the archive, and later ones are there"
    )]
    Gap {
        /// What was asked for.
        target: String,
        /// The first segment that is missing.
        missing: SegmentName,
        /// The end of what can be replayed.
        reachable: Lsn,
    },
    /// The first segment of the timeline isn't there. What the old timeline has in its place goes on differently.
    #[error("timeline {timeline} can't be reached: its first WAL segment, {missing}, is not in the archive")]
    TimelineNotReached {
        /// The timeline.
        timeline: TimelineId,
        /// Its first segment.
        missing: SegmentName,
    },
    /// The archive ends before the target.
    #[error(
        "the target, {target}, lies after the last archived WAL: the archive ends at {reachable}, in segment {last}, stored at {stored_at}"
    )]
    AfterLastWal {
        /// What was asked for.
        target: String,
        /// The last segment.
        last: SegmentName,
        /// When it was stored.
        stored_at: Timestamp,
        /// The end of what can be replayed.
        reachable: Lsn,
    },
}

/// What can be had instead.
fn told(last_commit: Option<&TransactionEnd>) -> String {
    last_commit.map_or_else(String::new, |last| {
        format!("; the last transaction before that, {}, was committed at {} ({})", last.xid, last.time, last.lsn)
    })
}

impl PlanError {
    /// What to do about it.
    pub fn hint(&self) -> String {
        match self {
            PlanError::NoBackups => {
                "Take one with 'pgsidecar backup create'; check that cluster name and repository are the right ones."
            }
            PlanError::NoSuchBackup(_) => "'pgsidecar backup list' shows the backups.",
            PlanError::NoSuchTimeline(_) => "Leave --target-timeline out to end on the newest one.",
            PlanError::NoBackupOnTimeline(_) => "Name another timeline with --target-timeline.",
            PlanError::BeforeFirstBackup { .. } => {
                "Choose a later target; --target-immediate with --backup ends at the backup's own end."
            }
            PlanError::BeforeBackup { .. } => {
                "Choose a later target, or leave --backup out so that an earlier one is found."
            }
            PlanError::NameNeedsBackup { known, .. } => return name_hint(known),
            PlanError::NameMetEarlier { newest, .. } => {
                return format!("Choose it by its position: --target-lsn {newest} --target-exclusive.");
            }
            PlanError::MetTooEarly { .. } => "Begin with an earlier backup: --backup.",
            PlanError::NoSuchTransaction { .. } => {
                "It may have written nothing, be one of another transaction's savepoints, or not have ended when the archive did. Choose a time or an LSN."
            }
            PlanError::NoSuchRestorePoint { .. } => {
                "'pgsidecar restore-point list' shows those that are recorded; --backup names a backup to begin with."
            }
            PlanError::AfterLastRecord { last_commit: Some(last), timeline, .. } => {
                let older = if *timeline == TimelineId::FIRST {
                    ""
                } else {
                    " What an older timeline had after it was left can be had with --target-timeline."
                };
                return format!(
                    "Leave the target out to replay everything that is there, or end with that transaction: --target-xid {}. \
                     If the database still runs, SELECT pg_switch_wal() ships the current segment.{older}",
                    last.xid
                );
            }
            PlanError::DamagedWal { .. } => {
                "Choose a target before it. 'pgsidecar wal verify' finds what is damaged; a replica or an older version of the bucket may have it whole."
            }
            PlanError::Chain(_) => {
                "'pgsidecar backup list' shows what is there. Choose another backup with --backup, or leave it out so that one is found that can be restored."
            }
            PlanError::BackupLacksWal { .. } => "Choose another backup with --backup.",
            PlanError::TimelineNotReached { .. } => {
                "Name the timeline before it with --target-timeline. If its server runs, SELECT pg_switch_wal() ships the segment."
            }
            PlanError::Gap { .. } => "Choose a target before the missing segment.",
            PlanError::AfterLastWal { .. } | PlanError::AfterLastRecord { last_commit: None, .. } => {
                "If the database still runs, SELECT pg_switch_wal() ships the current segment; otherwise choose an \
                 earlier target, or none at all to replay everything that is there."
            }
        }
        .to_owned()
    }
}

fn name_hint(known: &[String]) -> String {
    let list = match known {
        [] => String::new(),
        known => format!(" Recorded are: {}.", known.join(", ")),
    };
    format!(
        "Name the last backup before the restore point with --backup ('pgsidecar backup list' shows them). Those that \
         'pgsidecar restore-point create' makes are found by their names.{list}"
    )
}
