//! The pure part of pgsidecar: PostgreSQL's names and formats, the repository's layout, and the plans made
//! from them. No I/O, no clock, no runtime: the dependency list proves it.

mod content;
mod id;
mod key;
mod lsn;

pub use content::{ContentId, Sha256Digest};
pub use id::{ParseIdError, SystemIdentifier, TimelineId};
pub use key::{InvalidKey, ObjectKey};
pub use lsn::{Lsn, ParseLsnError};
