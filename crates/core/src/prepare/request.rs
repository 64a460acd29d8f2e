//! A restore that was asked for once: `PGSIDECAR_RESTORE`, one text, so that it fits into an annotation.
//!
//! ```text
//! id=2026-11-21-a target-time='2026-11-21 06:15:00+01' exclusive
//! ```
//!
//! Words are separated by blanks, values can be quoted with `'` or `"`. `id` must be there; the others are called as the
//! options of `restore run` are.

use std::{fmt, str::FromStr};

use crate::{
    Sha256Digest,
    plan::RestoreRequest,
    recovery::{RecoveryTarget, parse_target_time},
    settings::CloneSource,
};

/// What tells one request from the next: 1 to 64 letters, digits, `_` and `-`. It's a part of keys.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RequestId(String);

/// A restore that is to be done once.
#[derive(Clone, PartialEq, Debug)]
pub struct OneTimeRequest {
    /// Its name: it isn't served again under that.
    pub id: RequestId,
    /// Where recovery ends.
    pub restore: RestoreRequest,
}

/// Why a text is no request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// It has no id.
    #[error(
        "there is no id. Give it one, as in id=2026-11-21-a: by that it's known that the request was served, so that it isn't served again"
    )]
    NoId,
    /// The id can't be one.
    #[error("{0:?} can't be an id: it has 1 to 64 letters, digits, '-' or '_'")]
    BadId(String),
    /// A word that means nothing.
    #[error(
        "{0:?} isn't known. There are id=, backup=, timeline=, exclusive, and one of latest, target-time=, target-lsn=, target-name=, target-xid=, target-immediate"
    )]
    UnknownWord(String),
    /// A value that can't be one.
    #[error("{word}: {problem}")]
    BadValue {
        /// The word before the `=`.
        word: String,
        /// What is wrong.
        problem: String,
    },
    /// Twice the same, or two targets.
    #[error("{0} is said twice, or beside another target")]
    Twice(String),
    /// A quote that isn't closed.
    #[error("a quotation mark is missing")]
    OpenQuote,
}

impl FromStr for RequestId {
    type Err = RequestError;

    fn from_str(text: &str) -> Result<RequestId, RequestError> {
        let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
        if plain && (1..=64).contains(&text.len()) {
            Ok(RequestId(text.to_owned()))
        } else {
            Err(RequestError::BadId(text.chars().take(80).collect()))
        }
    }
}

impl RequestId {
    /// The id as it stands in keys.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl OneTimeRequest {
    /// The request of a clone for which nothing else was said: all of the source, and an id that is the source's.
    pub fn clone_of(source: &CloneSource) -> OneTimeRequest {
        let hash = Sha256Digest::of(source.to_string().as_bytes()).to_string();
        OneTimeRequest {
            id: RequestId(format!("clone-{}", &hash[..16])),
            restore: RestoreRequest { target: RecoveryTarget::Latest, timeline: None, backup: None, inclusive: true },
        }
    }

    /// What is to be restored, as a sentence's end. Equal texts are equal requests: it's what is kept of one.
    pub fn what(&self) -> String {
        let RestoreRequest { target, timeline, backup, inclusive } = &self.restore;
        let mut what = target.to_string();
        if !inclusive {
            what += ", exclusive";
        }
        if let Some(timeline) = timeline {
            what += &format!(", on timeline {timeline}");
        }
        if let Some(backup) = backup {
            what += &format!(", from backup {backup}");
        }
        what
    }
}

impl FromStr for OneTimeRequest {
    type Err = RequestError;

    fn from_str(text: &str) -> Result<OneTimeRequest, RequestError> {
        let (mut id, mut target, mut timeline, mut backup, mut inclusive) = (None, None, None, None, true);
        for word in words(text)? {
            let (name, value) = match word.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (word.as_str(), None),
            };
            let bad = |problem: String| RequestError::BadValue { word: name.to_owned(), problem };
            match (name, value) {
                ("id", Some(value)) => set(&mut id, value.parse()?, name)?,
                ("latest", None) => set(&mut target, RecoveryTarget::Latest, name)?,
                ("target-immediate", None) => set(&mut target, RecoveryTarget::Immediate, name)?,
                ("target-time", Some(value)) => {
                    let time = parse_target_time(value).map_err(|error| bad(error.to_string()))?;
                    set(&mut target, RecoveryTarget::Time(time), name)?;
                }
                ("target-lsn", Some(value)) => {
                    set(&mut target, RecoveryTarget::Lsn(parsed(value).map_err(bad)?), name)?;
                }
                ("target-xid", Some(value)) => {
                    set(&mut target, RecoveryTarget::Xid(parsed(value).map_err(bad)?), name)?;
                }
                ("target-name", Some(value)) => {
                    set(&mut target, RecoveryTarget::Name(parsed(value).map_err(bad)?), name)?;
                }
                ("timeline", Some(value)) => set(&mut timeline, parsed(value).map_err(bad)?, name)?,
                ("backup", Some(value)) => set(&mut backup, parsed(value).map_err(bad)?, name)?,
                ("exclusive", None) if inclusive => inclusive = false,
                ("exclusive", None) => return Err(RequestError::Twice(word)),
                _ => return Err(RequestError::UnknownWord(word.chars().take(80).collect())),
            }
        }
        let target = target.unwrap_or(RecoveryTarget::Latest);
        let restore = RestoreRequest { target, timeline, backup, inclusive };
        Ok(OneTimeRequest { id: id.ok_or(RequestError::NoId)?, restore })
    }
}

fn parsed<T: FromStr<Err: fmt::Display>>(text: &str) -> Result<T, String> {
    text.parse().map_err(|error: T::Err| error.to_string())
}

fn set<T>(place: &mut Option<T>, value: T, name: &str) -> Result<(), RequestError> {
    if place.replace(value).is_some() {
        return Err(RequestError::Twice(name.to_owned()));
    }
    Ok(())
}

/// Splits at blanks that aren't quoted, and takes the quotes away.
fn words(text: &str) -> Result<Vec<String>, RequestError> {
    let mut words = Vec::new();
    let (mut word, mut quote): (Option<String>, Option<char>) = (None, None);
    for c in text.chars() {
        match quote {
            Some(open) if c == open => quote = None,
            Some(_) => word.get_or_insert_default().push(c),
            None if matches!(c, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            None if c.is_whitespace() => words.extend(word.take()),
            None => word.get_or_insert_default().push(c),
        }
    }
    if quote.is_some() {
        return Err(RequestError::OpenQuote);
    }
    words.extend(word);
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(text: &str) -> OneTimeRequest {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn a_request_is_written_as_the_options_of_restore_run_are() {
        for (text, what) in [
            ("id=a", "the end of the archive"),
            ("latest\n id=a", "the end of the archive"),
            ("id=a target-time='2026-11-21 06:15:00+01'", "time 2026-11-21T05:15:00Z"),
            ("target-time=2026-11-21T06:15:00Z exclusive id=a", "time 2026-11-21T06:15:00Z, exclusive"),
            ("id=a target-lsn=16/B374D848 timeline=3", "LSN 16/B374D848, on timeline 3"),
            ("id=a target-xid=735", "transaction 735"),
            (
                "id=a target-name=\"before it's late\" backup=20261121T061500Z-full",
                "restore point before it's late, from backup 20261121T061500Z-full",
            ),
            ("id=a target-immediate", "the end of the backup"),
        ] {
            let request = request(text);
            assert_eq!((request.id.as_str(), request.what().as_str()), ("a", what), "{text}");
        }
    }

    #[test]
    fn what_is_no_request_says_what_would_be_one() {
        let told: Vec<String> = [
            "latest",
            "id=",
            "id=../x",
            "id=a id=b",
            "id=a latest target-xid=7",
            "id=a target-time='2026-11-21 06:15:00'",
            "id=a target-lsn=here",
            "id=a target='x'",
            "id=a target-time='2026-11-21",
            "id=a exclusive exclusive",
            "id=a timeline=0",
        ]
        .iter()
        .map(|text| format!("{text}: {}", text.parse::<OneTimeRequest>().unwrap_err()))
        .collect();
        insta::assert_snapshot!(told.join("\n"), @r#"
        latest: there is no id. Give it one, as in id=2026-11-21-a: by that it's known that the request was served, so that it isn't served again
        id=: "" can't be an id: it has 1 to 64 letters, digits, '-' or '_'
        id=../x: "../x" can't be an id: it has 1 to 64 letters, digits, '-' or '_'
        id=a id=b: id is said twice, or beside another target
        id=a latest target-xid=7: target-xid is said twice, or beside another target
        id=a target-time='2026-11-21 06:15:00': target-time: "2026-11-21 06:15:00" has no time zone. Add one: "2026-11-21 06:15:00Z" for UTC, or the offset of the clock that you read it from, as in "2026-11-21 06:15:00+02:00"
        id=a target-lsn=here: target-lsn: "here" is not an LSN: it is written as two hexadecimal numbers with a slash, like 16/B374D848
        id=a target='x': "target=x" isn't known. There are id=, backup=, timeline=, exclusive, and one of latest, target-time=, target-lsn=, target-name=, target-xid=, target-immediate
        id=a target-time='2026-11-21: a quotation mark is missing
        id=a exclusive exclusive: exclusive is said twice, or beside another target
        id=a timeline=0: timeline: "0" is not a timeline (a decimal number from 1 on)
        "#);
    }

    #[test]
    fn a_clone_s_own_request_is_the_same_for_the_same_source() {
        let of = |text: &str| OneTimeRequest::clone_of(&text.parse().unwrap());
        let one = of("s3://backups/prod?cluster=shop/orders");
        assert_eq!(one, of("s3://backups/prod/?cluster=shop/orders"));
        assert_ne!(one.id, of("s3://backups/prod?cluster=shop/other").id);
        assert_eq!(one.id.as_str().parse(), Ok(one.id));
    }

    proptest! {
        #[test]
        fn no_text_is_too_strange(text in "\\PC{0,60}") {
            if let Ok(request) = text.parse::<OneTimeRequest>() {
                prop_assert!(!request.id.as_str().is_empty());
            }
        }

        #[test]
        fn quoted_values_are_kept_as_they_are(name in "[^\\p{Cc}']{1,15}") {
            let request: OneTimeRequest = format!("id=a target-name='{name}'").parse().unwrap();
            prop_assert_eq!(request.restore.target, RecoveryTarget::Name(name.parse().unwrap()));
        }
    }
}
