//! The one error that reaches a person or PostgreSQL: what happened, under a stable code, and what to do.
//!
//! Inside a module errors have types of their own where a caller branches on them; at its boundary they become
//! a [`Failure`]. The code decides the HTTP status and the exit code, here and nowhere else.

use std::fmt;

use hyper::StatusCode;
use serde::{Deserialize, Serialize};

use crate::store::{StoreError, StoreErrorKind};

/// What kind of failure it is. Stable: it's in the API's answers, and scripts may rely on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The request makes no sense as it is.
    InvalidRequest,
    /// The text is no name of a WAL file.
    InvalidName,
    /// No such route, backup or job, and no such file in pg_wal.
    NotFound,
    /// The store says that this WAL file isn't there. PostgreSQL may take it as the end of the archive.
    NotInArchive,
    /// The file isn't in the repository, but on its way there: can't tell.
    NotYetArchived,
    /// Other content is already there under that name.
    Conflict,
    /// Another workload archives this timeline.
    NotOwner,
    /// The file isn't a WAL segment of the size and at the position that its name promises.
    InvalidSegment,
    /// It belongs to another database system, or to one that the repository doesn't know.
    WrongCluster,
    /// The body exceeds what the name allows.
    TooLarge,
    /// The caller isn't local or has no right to ask.
    Forbidden,
    /// Something is wrong with the settings; they have to be changed.
    Misconfigured,
    /// The data directory isn't one, or can't be read.
    DataDirectory,
    /// The object store can't be reached, is full, or doesn't answer properly: can't tell.
    StoreUnavailable,
    /// The object store refuses: rights, credentials or bucket.
    StoreDenied,
    /// PostgreSQL can't be reached or refuses.
    PostgresUnavailable,
    /// The daemon can't be reached.
    DaemonUnavailable,
    /// Something else is under way.
    Busy,
    /// The daemon is stopping.
    Stopping,
    /// It didn't happen in time; it may still happen.
    Timeout,
    /// No backup and WAL lead to the recovery target.
    TargetUnreachable,
    /// What came back isn't what was stored.
    Damaged,
    /// The directory to restore to can't be used.
    TargetDirectory,
    /// Reading or writing a local file failed.
    Io,
    /// A bug.
    Internal,
}

impl Code {
    /// The HTTP status of an answer with this code.
    pub fn status(self) -> StatusCode {
        match self {
            Code::InvalidRequest | Code::InvalidName => StatusCode::BAD_REQUEST,
            Code::NotFound | Code::NotInArchive => StatusCode::NOT_FOUND,
            Code::Conflict | Code::NotOwner | Code::TargetDirectory | Code::Busy => StatusCode::CONFLICT,
            Code::InvalidSegment | Code::WrongCluster | Code::TargetUnreachable => StatusCode::UNPROCESSABLE_ENTITY,
            Code::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Code::Forbidden => StatusCode::FORBIDDEN,
            Code::Misconfigured
            | Code::DataDirectory
            | Code::StoreUnavailable
            | Code::StoreDenied
            | Code::NotYetArchived
            | Code::PostgresUnavailable
            | Code::Stopping
            | Code::DaemonUnavailable => StatusCode::SERVICE_UNAVAILABLE,
            Code::Timeout => StatusCode::GATEWAY_TIMEOUT,
            Code::Damaged | Code::Io | Code::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The exit code of a command that ends with this code: those of `sysexits.h` where one fits.
    pub fn exit_code(self) -> u8 {
        match self {
            Code::InvalidRequest | Code::InvalidName => 2,
            Code::NotFound | Code::NotInArchive | Code::Conflict | Code::InvalidSegment | Code::WrongCluster => 1,
            Code::NotOwner | Code::TooLarge | Code::Forbidden => 1,
            Code::TargetUnreachable | Code::Damaged => 65,
            Code::StoreUnavailable | Code::PostgresUnavailable | Code::DaemonUnavailable => 69,
            Code::Internal => 70,
            Code::TargetDirectory => 73,
            Code::Io => 74,
            Code::Busy | Code::Stopping | Code::Timeout | Code::NotYetArchived => 75,
            Code::StoreDenied => 77,
            Code::Misconfigured | Code::DataDirectory => 78,
        }
    }
}

/// A failure as it is told: one sentence that says what happened, one that says what to do.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// Its kind.
    pub code: Code,
    /// What happened, to what.
    pub message: String,
    /// What to do about it; may be empty.
    #[serde(default)]
    pub hint: String,
}

impl Failure {
    /// A failure without a hint.
    pub fn new(code: Code, message: impl Into<String>) -> Failure {
        Failure { code, message: message.into(), hint: String::new() }
    }

    /// Adds what to do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Failure {
        self.hint = hint.into();
        self
    }

    /// Says in front what was being done.
    #[must_use]
    pub fn context(mut self, doing: impl fmt::Display) -> Failure {
        self.message = format!("{doing}: {}", self.message);
        self
    }

    /// A local file that could not be read or written.
    pub fn io(doing: impl fmt::Display, error: &std::io::Error) -> Failure {
        let failure = Failure::new(Code::Io, format!("{doing}: {error}"));
        match error.raw_os_error() {
            Some(code) if code == rustix::io::Errno::NOSPC.raw_os_error() => {
                failure.hint("The file system is full: make room and try again.")
            }
            Some(code) if code == rustix::io::Errno::ACCESS.raw_os_error() => failure
                .hint("Run pgsidecar as the user that owns PostgreSQL's data directory (securityContext.runAsUser)."),
            _ => failure,
        }
    }

    /// A task or thread of ours ended by a panic.
    pub fn internal(what: impl fmt::Display) -> Failure {
        Failure::new(Code::Internal, format!("internal error: {what}"))
            .hint("This is a bug in pgsidecar: please report it with the log.")
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Failure {
        let code = match error.kind() {
            StoreErrorKind::Unreachable | StoreErrorKind::Unavailable | StoreErrorKind::Throttled => {
                Code::StoreUnavailable
            }
            StoreErrorKind::Unexpected | StoreErrorKind::Full => Code::StoreUnavailable,
            StoreErrorKind::Denied | StoreErrorKind::Credentials | StoreErrorKind::NoBucket => Code::StoreDenied,
            StoreErrorKind::Corrupt => Code::Damaged,
        };
        let mut message = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            let cause_text = cause.to_string();
            // Libraries repeat their causes in their own texts.
            if !message.contains(&cause_text) {
                message = format!("{message}: {cause_text}");
            }
            source = cause.source();
        }
        Failure::new(code, message).hint(error.hint().unwrap_or_default())
    }
}

impl From<pgsidecar_core::plan::PlanError> for Failure {
    fn from(error: pgsidecar_core::plan::PlanError) -> Failure {
        Failure::new(Code::TargetUnreachable, error.to_string()).hint(error.hint())
    }
}

impl From<pgsidecar_core::plan::SnapshotPlanError> for Failure {
    fn from(error: pgsidecar_core::plan::SnapshotPlanError) -> Failure {
        Failure::new(Code::TargetUnreachable, error.to_string()).hint(error.hint())
    }
}

impl From<pgsidecar_core::recovery::InvalidTarget> for Failure {
    fn from(error: pgsidecar_core::recovery::InvalidTarget) -> Failure {
        Failure::new(Code::InvalidRequest, error.to_string())
    }
}

impl From<tokio::task::JoinError> for Failure {
    fn from(error: tokio::task::JoinError) -> Failure {
        Failure::internal(error)
    }
}
