//! Restore points that are recorded in the repository: what tells a plan where a name lies.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{Lsn, SystemIdentifier, TimelineId, recovery::RestorePointName};

/// The newest layout of a restore point's record that this code writes and reads.
pub const RESTORE_POINT_FORMAT: u32 = 1;

/// `restore-points/….json`: a restore point that is in the WAL. PostgreSQL takes the same name any number of times; what
/// tells them apart is the position.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct RestorePointRecord {
    /// [`RESTORE_POINT_FORMAT`] of the writer.
    pub format: u32,
    /// The name, for `recovery_target_name`.
    pub name: RestorePointName,
    /// Where its record ends: `pg_create_restore_point`'s result.
    pub lsn: Lsn,
    /// The timeline that it lies on.
    pub timeline: TimelineId,
    /// The server's clock when it was made.
    pub created_at: Timestamp,
    /// The database system.
    pub system_identifier: SystemIdentifier,
    /// The pgsidecar that recorded it.
    pub writer: String,
}
