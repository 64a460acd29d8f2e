//! The pure part of pgsidecar: PostgreSQL's names and formats, the repository's layout, and the plans made
//! from them. No I/O, no clock, no runtime: the dependency list proves it.

mod archive_file;
mod archived_wal;
pub mod backup;
pub mod backup_label;
pub mod backup_manifest;
pub mod block_references;
pub mod chain;
mod content;
pub mod continuity;
mod control_file;
pub mod data_directory;
mod history;
mod id;
pub mod incremental_file;
pub mod incremental_plan;
mod key;
pub mod layout;
mod le;
mod lsn;
pub mod page;
pub mod plan;
pub mod recovery;
pub mod settings;
pub mod snapshot;
pub mod standby;
pub mod switch;
mod wal;
mod wal_header;
mod wal_pages;
pub mod wal_summary;

pub use archive_file::{ArchiveFileName, ParseArchiveFileNameError};
pub use archived_wal::{ArchivedWal, MAX_GAPS, SegmentRange};
pub use backup::{BackupId, BackupKind, BackupRecord};
pub use content::{ContentId, Sha256Digest};
pub use control_file::{ClusterState, ControlFile, ControlFileError};
pub use history::{HistoryError, SegmentStretch, TimelineHistory, TimelineSpan};
pub use id::{ParseIdError, SystemIdentifier, TimelineId};
pub use key::{InvalidKey, ObjectKey};
pub use layout::Layout;
pub use lsn::{Lsn, ParseLsnError};
pub use settings::ClusterName;
pub use snapshot::{SnapshotId, SnapshotRecord};
pub use wal::{SegmentName, WalSegmentSize};
pub use wal_header::{SegmentMismatch, WalHeader, WalHeaderError, check_segment};
pub use wal_pages::{Completeness, PageScan};
