//! The values that settings are made of, as people write them. Which settings exist and where they come from
//! is decided where they are read; the webhook reads the same values from annotations.

use std::{fmt, path::PathBuf, str::FromStr, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::key::is_component;

/// The name under which a database is kept in a repository: one to four components joined by `/`, in
/// Kubernetes `<namespace>/<workload>`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ClusterName(String);

/// Why a text isn't a valid setting, with what would be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not {expected}")]
pub struct InvalidValue {
    text: String,
    expected: &'static str,
}

impl InvalidValue {
    pub(crate) fn new(text: &str, expected: &'static str) -> InvalidValue {
        InvalidValue { text: text.chars().take(80).collect(), expected }
    }
}

impl ClusterName {
    /// The name as it stands in keys.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ClusterName {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<ClusterName, InvalidValue> {
        let components = text.split('/').count();
        if text.len() <= 300 && components <= 4 && text.split('/').all(is_component) {
            Ok(ClusterName(text.to_owned()))
        } else {
            Err(InvalidValue::new(
                text,
                "a cluster name: up to four parts of letters, digits, '.', '_' or '-', joined by '/', like shop/orders-db",
            ))
        }
    }
}

impl Serialize for ClusterName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for ClusterName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ClusterName, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Where the repository is: `s3://BUCKET[/PREFIX]` or `file:///DIRECTORY`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RepositoryUrl {
    /// A bucket of an S3-compatible object store.
    S3 {
        /// The bucket's name.
        bucket: String,
        /// What every key begins with, without slashes at its ends; may be empty.
        prefix: String,
    },
    /// A local directory, by its absolute path.
    Directory(PathBuf),
}

const REPOSITORY_URL: &str = "a repository: s3://BUCKET/PREFIX or file:///absolute/directory";

impl FromStr for RepositoryUrl {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<RepositoryUrl, InvalidValue> {
        let invalid = || InvalidValue::new(text, REPOSITORY_URL);
        if let Some(path) = text.strip_prefix("file://") {
            let literal = !path.contains('\0') && !path.split('/').any(|part| part == "..");
            return (path.starts_with('/') && literal)
                .then(|| RepositoryUrl::Directory(PathBuf::from(path)))
                .ok_or_else(invalid);
        }
        let rest = text.strip_prefix("s3://").ok_or_else(invalid)?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let prefix = prefix.trim_matches('/');
        // S3's rules for bucket names, with the underscores and capitals that older buckets have.
        let bucket_ok = (3..=255).contains(&bucket.len())
            && bucket.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
            && !bucket.starts_with('.');
        let prefix_ok = prefix.is_empty() || (prefix.len() <= 200 && prefix.split('/').all(is_component));
        (bucket_ok && prefix_ok)
            .then(|| RepositoryUrl::S3 { bucket: bucket.to_owned(), prefix: prefix.to_owned() })
            .ok_or_else(invalid)
    }
}

impl fmt::Display for RepositoryUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RepositoryUrl::S3 { bucket, prefix } if prefix.is_empty() => write!(f, "s3://{bucket}"),
            RepositoryUrl::S3 { bucket, prefix } => write!(f, "s3://{bucket}/{prefix}"),
            RepositoryUrl::Directory(path) => write!(f, "file://{}", path.display()),
        }
    }
}

impl RepositoryUrl {
    /// Whether a cluster of this repository has the very keys of a cluster of that one, as far as the names tell: the
    /// border between prefix and cluster name can lie elsewhere.
    pub fn is_same_place(&self, cluster: &ClusterName, other: &RepositoryUrl, others: &ClusterName) -> bool {
        let place = |url: &RepositoryUrl, cluster: &ClusterName| match url {
            RepositoryUrl::S3 { bucket, prefix } if prefix.is_empty() => (bucket.clone(), format!("{cluster}")),
            RepositoryUrl::S3 { bucket, prefix } => (bucket.clone(), format!("{prefix}/{cluster}")),
            RepositoryUrl::Directory(path) => ("/".to_owned(), path.join(cluster.as_str()).display().to_string()),
        };
        place(self, cluster) == place(other, others)
    }
}

/// The cluster that a database is cloned from: `s3://BUCKET/PREFIX?cluster=NAME` or `file:///DIRECTORY?cluster=NAME`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CloneSource {
    /// The repository that it's in.
    pub repository: RepositoryUrl,
    /// Its name there.
    pub cluster: ClusterName,
}

impl FromStr for CloneSource {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<CloneSource, InvalidValue> {
        const EXPECTED: &str =
            "a repository and a cluster in it: s3://BUCKET/PREFIX?cluster=NAME or file:///DIRECTORY?cluster=NAME";
        let parse = || {
            let (repository, cluster) = text.rsplit_once("?cluster=")?;
            Some(CloneSource { repository: repository.parse().ok()?, cluster: cluster.parse().ok()? })
        };
        parse().filter(|source| !source.to_string().contains('\n')).ok_or_else(|| InvalidValue::new(text, EXPECTED))
    }
}

impl fmt::Display for CloneSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}?cluster={}", self.repository, self.cluster)
    }
}

/// Splits `text` after its leading digits; `None` if there are none or they overflow.
pub(crate) fn number_and_unit(text: &str) -> Option<(u64, &str)> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    Some((number.parse().ok()?, unit.trim_start()))
}

/// A time span with PostgreSQL's units: `500ms`, `30s`, `5min`, `2h`, `1d`.
///
/// # Errors
/// If it has no unit, an unknown one, or is longer than 366 days.
pub fn parse_duration(text: &str) -> Result<Duration, InvalidValue> {
    let milliseconds = number_and_unit(text.trim()).and_then(|(number, unit)| {
        number.checked_mul(match unit {
            "ms" => 1,
            "s" => 1_000,
            "min" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return None,
        })
    });
    milliseconds
        .filter(|&ms| ms <= 366 * 86_400_000)
        .map(Duration::from_millis)
        .ok_or_else(|| InvalidValue::new(text, "a time span with a unit: 500ms, 30s, 5min, 2h or 1d"))
}

/// A number of bytes with PostgreSQL's units, multiples of 1024: `64kB`, `8MB`, `1GB`, `2TB`; `B` or none
/// means bytes. Kubernetes' `Ki`, `Mi`, `Gi`, `Ti` mean the same.
///
/// # Errors
/// If the unit is unknown or the number too large for 64 bits.
pub fn parse_bytes(text: &str) -> Result<u64, InvalidValue> {
    let bytes = number_and_unit(text.trim()).and_then(|(number, unit)| {
        let shift = match unit {
            "" | "B" => 0,
            "kB" | "Ki" => 10,
            "MB" | "Mi" => 20,
            "GB" | "Gi" => 30,
            "TB" | "Ti" => 40,
            _ => return None,
        };
        number.checked_mul(1 << shift)
    });
    bytes.ok_or_else(|| InvalidValue::new(text, "a size: a number with kB, MB, GB or TB, like 64MB"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cluster_names_are_safe_in_keys() {
        for text in ["shop/orders-db", "main", "a.b_c-1/x"] {
            assert_eq!(text.parse::<ClusterName>().unwrap().as_str(), text);
        }
        for text in ["", "/", "a/", "../x", "a b", "a/b/c/d/e", "ä"] {
            assert!(text.parse::<ClusterName>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn repositories_are_buckets_or_absolute_directories() {
        let s3 = |bucket: &str, prefix: &str| RepositoryUrl::S3 { bucket: bucket.into(), prefix: prefix.into() };
        assert_eq!("s3://backups".parse(), Ok(s3("backups", "")));
        assert_eq!("s3://backups/pg/prod/".parse(), Ok(s3("backups", "pg/prod")));
        assert_eq!("file:///srv/repo".parse(), Ok(RepositoryUrl::Directory("/srv/repo".into())));
        for text in
            ["", "s3://", "s3:///x", "s3://ab", "s3://bucket/../x", "file://srv", "file:///a/../b", "/srv", "http://x"]
        {
            assert!(text.parse::<RepositoryUrl>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_clone_s_source_is_a_cluster_in_a_repository() {
        for text in
            ["s3://backups/prod?cluster=shop/orders", "s3://backups?cluster=main", "file:///srv/repo?cluster=main"]
        {
            assert_eq!(text.parse::<CloneSource>().unwrap().to_string(), text);
        }
        for text in [
            "s3://backups/prod",
            "s3://backups?cluster=",
            "?cluster=main",
            "s3://b?cluster=../x",
            "file:///a\nb?cluster=x",
        ] {
            assert!(text.parse::<CloneSource>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_place_is_the_same_wherever_the_prefix_ends() {
        let same = |one: &str, other: &str| {
            let (one, other): (CloneSource, CloneSource) = (one.parse().unwrap(), other.parse().unwrap());
            one.repository.is_same_place(&one.cluster, &other.repository, &other.cluster)
        };
        assert!(same("s3://backups/a?cluster=b/c", "s3://backups/a/b?cluster=c"));
        assert!(same("s3://backups?cluster=a/c", "s3://backups/a/?cluster=c"));
        assert!(same("file:///srv/a?cluster=c", "file:///srv/a/?cluster=c"));
        assert!(!same("s3://backups/a?cluster=b", "s3://backups/a?cluster=c"));
        assert!(!same("s3://backups/a?cluster=b", "s3://others/a?cluster=b"));
        assert!(!same("s3://srv/a?cluster=b", "file:///srv/a?cluster=b"));
    }

    #[test]
    fn spans_and_sizes_carry_postgresql_s_units() {
        assert_eq!(parse_duration("5min").unwrap(), Duration::from_secs(300));
        assert_eq!(parse_duration("250 ms").unwrap(), Duration::from_millis(250));
        assert_eq!(parse_bytes("64MB").unwrap(), 64 << 20);
        assert_eq!(parse_bytes("1Gi").unwrap(), 1 << 30);
        for text in ["", "5", "5m", "min", "-1s", "1.5h", "400d", "99999999999999999999s"] {
            assert!(parse_duration(text).is_err(), "{text:?}");
        }
        for text in ["", "MB", "-1", "1mb", "1PB", "99999999999TB"] {
            assert!(parse_bytes(text).is_err(), "{text:?}");
        }
    }
}
