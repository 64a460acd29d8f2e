//! What pgsidecar writes into `recovery.signal`.
//!
//! PostgreSQL asks only whether the file is there (readRecoverySignalFile, xlogrecovery.c) and removes it, durably, when
//! recovery has ended. So its content says something about just this one recovery: it's there before the server can
//! start, gone with the promotion, and survives what rewrites `postgresql.auto.conf`. The daemon reads it, because a
//! `restore_command` on the server's command line outranks the one that a restore wrote.

use std::{fmt, str::FromStr};

use crate::settings::CloneSource;

const COMMENT: &str = "# Written by pgsidecar for its daemon; to PostgreSQL it means something that this file exists.";

/// What the daemon has to know of a recovery. Empty for one that needs nothing but its own archive.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RecoverySignal {
    /// It goes to the end of everything, also of what a stopped server had in no whole segment.
    pub tail: bool,
    /// It's a clone's: the WAL is that of another cluster's archive.
    pub source: Option<CloneSource>,
}

/// The content isn't of pgsidecar's making, or of a newer one's.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} in recovery.signal is none of tail = on, source = URL?cluster=NAME")]
pub struct ParseRecoverySignalError(String);

impl fmt::Display for RecoverySignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == RecoverySignal::default() {
            return Ok(());
        }
        writeln!(f, "{COMMENT}")?;
        if self.tail {
            writeln!(f, "tail = on")?;
        }
        match &self.source {
            Some(source) => writeln!(f, "source = {source}"),
            None => Ok(()),
        }
    }
}

impl FromStr for RecoverySignal {
    type Err = ParseRecoverySignalError;

    fn from_str(text: &str) -> Result<RecoverySignal, ParseRecoverySignalError> {
        let mut signal = RecoverySignal::default();
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let understood = match line.split_once(" = ") {
                Some(("tail", "on")) => {
                    signal.tail = true;
                    true
                }
                Some(("source", url)) => url.parse().map(|source| signal.source = Some(source)).is_ok(),
                _ => false,
            };
            if !understood {
                return Err(ParseRecoverySignalError(line.chars().take(80).collect()));
            }
        }
        Ok(signal)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_and_an_empty_file_says_nothing() {
        let source: CloneSource = "s3://backups/prod?cluster=shop/orders".parse().unwrap();
        for source in [None, Some(source)] {
            for tail in [false, true] {
                let signal = RecoverySignal { tail, source: source.clone() };
                assert_eq!(signal.to_string().parse(), Ok(signal));
            }
        }
        assert_eq!(RecoverySignal::default().to_string(), "");
    }

    #[test]
    fn what_is_not_understood_is_no_empty_file() {
        for text in ["tail = off", "source = s3://b", "something", "source=s3://backups?cluster=a"] {
            assert!(text.parse::<RecoverySignal>().is_err(), "{text:?}");
        }
    }
}
