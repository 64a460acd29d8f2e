//! A restore as it's asked for over the API.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{InvalidRestorePointName, RecoveryTarget, TargetAction, TargetTimeError, parse_target_time};
use crate::{BackupId, Lsn, TimelineId, plan::RestoreRequest};

/// A restore in the place of the database that is there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RestoreOrder {
    /// Where recovery ends.
    pub target: Target,
    /// The timeline on which it ends; the newest where it's left out.
    pub timeline: Option<TimelineId>,
    /// The backup to begin with; the newest that the target allows where it's left out.
    pub backup: Option<BackupId>,
    /// Whether recovery ends just before the target.
    pub exclusive: bool,
    /// What the server does there.
    pub action: TargetAction,
    /// Whether the database that is there is overwritten, because there's no room for two.
    pub replace: bool,
    /// Tablespaces that go elsewhere: their old location to the new one.
    pub tablespaces: BTreeMap<String, String>,
    /// With what the server gets its WAL; pgsidecar-wal where it's left out.
    pub restore_command: Option<String>,
}

/// Where recovery ends: `"latest"`, `"immediate"`, `{"time": "2026-11-21 06:15:00+01"}`, `{"lsn": "0/3000028"}`,
/// `{"xid": 740}` or `{"name": "before_the_update"}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// At the end of the archive.
    #[default]
    Latest,
    /// At the end of the backup.
    Immediate,
    /// At this time, with its zone.
    Time(String),
    /// At this LSN.
    Lsn(Lsn),
    /// At the commit of this transaction.
    Xid(u64),
    /// At this restore point.
    Name(String),
}

impl From<RecoveryTarget> for Target {
    fn from(target: RecoveryTarget) -> Target {
        match target {
            RecoveryTarget::Latest => Target::Latest,
            RecoveryTarget::Immediate => Target::Immediate,
            RecoveryTarget::Time(time) => Target::Time(time.to_string()),
            RecoveryTarget::Lsn(lsn) => Target::Lsn(lsn),
            RecoveryTarget::Xid(xid) => Target::Xid(xid),
            RecoveryTarget::Name(name) => Target::Name(name.to_string()),
        }
    }
}

/// The target makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTarget {
    /// As a time.
    #[error(transparent)]
    Time(#[from] TargetTimeError),
    /// As the name of a restore point.
    #[error(transparent)]
    Name(#[from] InvalidRestorePointName),
}

impl RestoreOrder {
    /// What has to be planned.
    ///
    /// # Errors
    /// If the target makes no sense.
    pub fn request(&self) -> Result<RestoreRequest, InvalidTarget> {
        let target = match &self.target {
            Target::Latest => RecoveryTarget::Latest,
            Target::Immediate => RecoveryTarget::Immediate,
            Target::Time(text) => RecoveryTarget::Time(parse_target_time(text)?),
            Target::Lsn(lsn) => RecoveryTarget::Lsn(*lsn),
            Target::Xid(xid) => RecoveryTarget::Xid(*xid),
            Target::Name(name) => RecoveryTarget::Name(name.parse()?),
        };
        Ok(RestoreRequest { target, timeline: self.timeline, backup: self.backup, inclusive: !self.exclusive })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_read_as_it_is_written() {
        let text = r#"{"target": {"time": "2026-11-21 06:15:00+01"}, "exclusive": true, "action": "pause"}"#;
        let order: RestoreOrder = serde_json::from_str(text).unwrap();
        assert_eq!(order.request().unwrap().target.to_string(), "time 2026-11-21T05:15:00Z");
        let again: Target = order.request().unwrap().target.into();
        assert_eq!(RestoreOrder { target: again, ..order.clone() }.request().unwrap(), order.request().unwrap());
        assert_eq!(serde_json::from_str::<RestoreOrder>(r#"{"target": "latest"}"#).unwrap(), RestoreOrder::default());
        assert!(serde_json::from_str::<RestoreOrder>(r#"{"to": "/data"}"#).is_err());
        let zoneless =
            RestoreOrder { target: Target::Time("2026-11-21 06:15:00".to_owned()), ..RestoreOrder::default() };
        assert!(matches!(zoneless.request(), Err(InvalidTarget::Time(_))));
    }
}
