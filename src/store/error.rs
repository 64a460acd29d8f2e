//! What can go wrong with a store, sorted by what to do about it.

use std::{fmt, io};

/// A store's operation failed. Displayed as one line; [`StoreError::hint`] says what to do, where that is known.
#[derive(Debug)]
pub struct StoreError {
    kind: StoreErrorKind,
    operation: &'static str,
    object: String,
    detail: String,
    hint: Option<&'static str>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// What kind of failure it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StoreErrorKind {
    /// No answer: refused, not resolved, or no word within the time allowed.
    Unreachable,
    /// It answers, and can't serve now (5xx), or an answer broke off.
    Unavailable,
    /// It asks us to slow down.
    Throttled,
    /// It knows us, and forbids this.
    Denied,
    /// It doesn't accept who we say we are, or we have nothing to say.
    Credentials,
    /// There is no such bucket, or it's in another region.
    NoBucket,
    /// No space, or no quota, is left.
    Full,
    /// The bytes aren't what they were: a checksum doesn't hold.
    Corrupt,
    /// An answer that fits nothing of the above: it can't be told what it means.
    Unexpected,
}

impl StoreErrorKind {
    fn words(self) -> &'static str {
        match self {
            StoreErrorKind::Unreachable => "the store can't be reached",
            StoreErrorKind::Unavailable => "the store isn't available",
            StoreErrorKind::Throttled => "the store asks to slow down",
            StoreErrorKind::Denied => "access denied",
            StoreErrorKind::Credentials => "the credentials aren't accepted",
            StoreErrorKind::NoBucket => "no such bucket",
            StoreErrorKind::Full => "no space left",
            StoreErrorKind::Corrupt => "damaged data",
            StoreErrorKind::Unexpected => "unexpected answer",
        }
    }

    fn usual_hint(self) -> Option<&'static str> {
        match self {
            StoreErrorKind::Unreachable => Some("Check the endpoint's address, DNS and network policies."),
            StoreErrorKind::Credentials => Some(
                "Check the access key, its secret and its session token, and that the clocks agree; where the identity \
                 comes from a role, check the role's binding.",
            ),
            StoreErrorKind::NoBucket => Some("Create the bucket, or correct its name, its region or the endpoint."),
            StoreErrorKind::Unavailable => Some("Look at the store's health; what failed can be tried again."),
            StoreErrorKind::Throttled => Some("Try again later, or raise the store's limit for requests."),
            StoreErrorKind::Full => Some("Free space, raise the quota, or shorten the retention."),
            _ => None,
        }
    }
}

impl StoreError {
    pub(crate) fn new(
        kind: StoreErrorKind,
        operation: &'static str,
        object: impl Into<String>,
        detail: impl Into<String>,
    ) -> StoreError {
        let (object, detail) = (object.into(), detail.into());
        StoreError { kind, operation, object, detail, hint: kind.usual_hint(), source: None }
    }

    pub(crate) fn with_hint(mut self, hint: &'static str) -> StoreError {
        self.hint = Some(hint);
        self
    }

    pub(crate) fn with_source(mut self, source: impl std::error::Error + Send + Sync + 'static) -> StoreError {
        self.source = Some(Box::new(source));
        self
    }

    /// A failure of the local file system.
    pub(crate) fn io(operation: &'static str, object: impl Into<String>, error: io::Error) -> StoreError {
        let kind = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StoreErrorKind::Full,
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => StoreErrorKind::Denied,
            io::ErrorKind::StaleNetworkFileHandle | io::ErrorKind::TimedOut => StoreErrorKind::Unavailable,
            _ => StoreErrorKind::Unexpected,
        };
        let error_line = StoreError::new(kind, operation, object, "the file system refused");
        if kind == StoreErrorKind::Denied {
            return error_line
                .with_hint("Check owner and mode of the repository's directory, and that it's mounted for writing.")
                .with_source(error);
        }
        error_line.with_source(error)
    }

    /// What kind of failure it is.
    pub fn kind(&self) -> StoreErrorKind {
        self.kind
    }

    /// Whether the same call may well succeed a little later, without anyone doing anything.
    pub fn is_transient(&self) -> bool {
        matches!(self.kind, StoreErrorKind::Unreachable | StoreErrorKind::Unavailable | StoreErrorKind::Throttled)
    }

    /// What to do about it, as a sentence, where that is known.
    pub fn hint(&self) -> Option<&'static str> {
        self.hint
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let StoreError { operation, object, detail, .. } = self;
        write!(f, "can't {operation} {object}: {}: {detail}", self.kind.words())
    }
}

impl std::error::Error for StoreError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_file_system_is_said_to_be_full() {
        let mut full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let error = StoreError::io("create", "a", io::Write::write_all(&mut full, b"x").unwrap_err());
        assert_eq!((error.kind(), error.is_transient()), (StoreErrorKind::Full, false));
        assert_eq!(error.to_string(), "can't create a: no space left: the file system refused");
        assert!(std::error::Error::source(&error).unwrap().to_string().contains("os error 28"));
    }
}
