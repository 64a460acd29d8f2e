//! Logical dumps as the repository knows them: ids, names of databases, and their record, `dump.json`.

use std::{fmt, str::FromStr};

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{
    ParseIdError, SystemIdentifier,
    backup::{StoredObject, format_id_time, parse_id_time},
};

/// The identity of a dump within its cluster: when it began (UTC, to the second), `20261121T030000Z`. Ids sort by time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DumpId {
    began: Timestamp,
}

impl DumpId {
    /// The id of a dump that begins at this time; fractions of the second are dropped.
    pub fn new(began: Timestamp) -> DumpId {
        DumpId { began: Timestamp::from_second(began.as_second()).unwrap_or(began) }
    }

    /// When it began, to the second.
    pub fn began(&self) -> Timestamp {
        self.began
    }
}

impl fmt::Display for DumpId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format_id_time(self.began))
    }
}

impl fmt::Debug for DumpId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for DumpId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<DumpId, ParseIdError> {
        let id = parse_id_time(text).map(|began| DumpId { began });
        id.ok_or_else(|| ParseIdError::new("id of a dump (like 20261121T030000Z)", text))
    }
}

impl Serialize for DumpId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for DumpId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<DumpId, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The longest name of a database, in bytes: PostgreSQL's `NAMEDATALEN` without its end.
const MAX_NAME_BYTES: usize = 63;

/// A database's name: 1 to 63 bytes of UTF-8, any characters but NUL.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DatabaseName(String);

impl fmt::Debug for DatabaseName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl DatabaseName {
    /// The name as it is.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name as a part of a key: letters, digits, `_` and `-` as they are, every other byte as `=` and two digits in
    /// upper-case hexadecimal. Nothing else is written so: it can be read back.
    pub fn to_key(&self) -> String {
        self.0.bytes().fold(String::with_capacity(self.0.len()), |mut key, byte| {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'-' => key.push(char::from(byte)),
                _ => key.push_str(&format!("={byte:02X}")),
            }
            key
        })
    }

    /// The inverse of [`DatabaseName::to_key`]; `None` for what isn't exactly as that writes it.
    pub fn from_key(key: &str) -> Option<DatabaseName> {
        let mut bytes = Vec::with_capacity(key.len());
        let mut rest = key.as_bytes();
        while let Some((first, after)) = rest.split_first() {
            rest = after;
            if *first != b'=' {
                bytes.push(*first);
                continue;
            }
            let digits = std::str::from_utf8(after.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &after[2..];
        }
        let name: DatabaseName = String::from_utf8(bytes).ok()?.parse().ok()?;
        (name.to_key() == key).then_some(name)
    }

    /// The name in SQL, always quoted.
    pub fn quoted(&self) -> String {
        format!("\"{}\"", self.0.replace('"', "\"\""))
    }

    /// A connection string that means this database and nothing else: libpq takes a name that looks like one for one.
    pub fn conninfo(&self) -> String {
        format!("dbname='{}'", self.0.replace('\\', "\\\\").replace('\'', "\\'"))
    }
}

impl fmt::Display for DatabaseName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for DatabaseName {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<DatabaseName, ParseIdError> {
        let fits = (1..=MAX_NAME_BYTES).contains(&text.len()) && !text.contains('\0');
        fits.then(|| DatabaseName(text.to_owned()))
            .ok_or_else(|| ParseIdError::new("name of a database (1 to 63 bytes)", text))
    }
}

impl Serialize for DatabaseName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for DatabaseName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<DatabaseName, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A pattern for names of databases, as a shell's: `*` is any characters, `?` one of them, everything else itself. Upper
/// and lower case differ, as in the names.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NamePattern(String);

impl NamePattern {
    /// Whether the whole name fits.
    pub fn matches(&self, name: &str) -> bool {
        let (pattern, name): (Vec<char>, Vec<char>) = (self.0.chars().collect(), name.chars().collect());
        let (mut p, mut n) = (0, 0);
        // Where the last star was, and how far it reaches so far: it takes one more when what follows doesn't fit.
        let mut star: Option<(usize, usize)> = None;
        while n < name.len() {
            match pattern.get(p) {
                Some('*') => {
                    star = Some((p, n));
                    p += 1;
                }
                Some(c) if *c == '?' || *c == name[n] => {
                    p += 1;
                    n += 1;
                }
                _ => {
                    let Some((at, taken)) = star else { return false };
                    star = Some((at, taken + 1));
                    p = at + 1;
                    n = taken + 1;
                }
            }
        }
        pattern[p..].iter().all(|c| *c == '*')
    }

    /// Whether it can mean one name only.
    pub fn is_literal(&self) -> bool {
        !self.0.contains(['*', '?'])
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for NamePattern {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<NamePattern, ParseIdError> {
        let fits = !text.is_empty() && !text.contains('\0');
        fits.then(|| NamePattern(text.to_owned())).ok_or_else(|| ParseIdError::new("pattern for names", text))
    }
}

/// Which databases are meant.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Selection {
    /// Those that fit one of these; none means all but templates.
    pub include: Vec<NamePattern>,
    /// Of those, not the ones that fit one of these.
    pub exclude: Vec<NamePattern>,
}

impl Selection {
    /// Whether a database is meant. A template only if it's included by its very name.
    pub fn selects(&self, name: &str, is_template: bool) -> bool {
        let fits = |pattern: &&NamePattern| pattern.matches(name) && (pattern.is_literal() || !is_template);
        let included = match self.include.is_empty() {
            true => !is_template,
            false => self.include.iter().any(|pattern| fits(&pattern)),
        };
        included && !self.exclude.iter().any(|pattern| pattern.matches(name))
    }
}

/// What pg_dump writes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DumpFormat {
    /// For pg_restore: compressed by pg_dump, any part of it can be restored.
    #[default]
    Custom,
    /// SQL for psql, compressed with zstd.
    Plain,
}

impl fmt::Display for DumpFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            DumpFormat::Custom => "custom",
            DumpFormat::Plain => "plain",
        })
    }
}

impl FromStr for DumpFormat {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<DumpFormat, ParseIdError> {
        [DumpFormat::Custom, DumpFormat::Plain]
            .into_iter()
            .find(|format| format.to_string() == text)
            .ok_or_else(|| ParseIdError::new("format of a dump (custom or plain)", text))
    }
}

/// The newest layout of `dump.json` that this code writes and reads.
pub const DUMP_FORMAT: u32 = 1;

/// `dump.json`: the commit marker of a dump. Written last; a dump without it does not exist.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct DumpRecord {
    /// [`DUMP_FORMAT`] of the writer.
    pub format: u32,
    /// The dump's id.
    pub id: DumpId,
    /// The database system.
    pub system_identifier: SystemIdentifier,
    /// `server_version_num`, e.g. 150018.
    pub server_version: u32,
    /// The major version of pg_dump: pg_restore has to be of the same or a newer one.
    pub tools_major: u32,
    /// pg_dump's version in full, e.g. `17.5`.
    pub tools_version: String,
    /// When it began, by our clock.
    pub started_at: Timestamp,
    /// When the last database was in the repository, by our clock.
    pub finished_at: Timestamp,
    /// What pg_dump wrote.
    pub archives: DumpFormat,
    /// The databases. Each is consistent in itself, as of when its pg_dump began; they aren't among each other.
    pub databases: Vec<DumpedDatabase>,
    /// What belongs to all databases: roles and tablespaces, as SQL.
    pub globals: DumpedGlobals,
    /// Where the server was reached.
    pub server: String,
    /// What was left out, a sentence each, for people.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// The pgsidecar that made it.
    pub writer: String,
}

impl DumpRecord {
    /// Bytes that the dump takes in the repository.
    pub fn stored_bytes(&self) -> u64 {
        self.databases.iter().map(|database| database.stored.size).sum::<u64>() + self.globals.stored.size
    }

    /// The database of this name.
    pub fn database(&self, name: &DatabaseName) -> Option<&DumpedDatabase> {
        self.databases.iter().find(|database| database.name == *name)
    }

    /// PostgreSQL's major version, e.g. 15.
    pub fn major_version(&self) -> u32 {
        self.server_version / 10_000
    }
}

/// One database of a dump.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct DumpedDatabase {
    /// Its name.
    pub name: DatabaseName,
    /// Its OID.
    pub oid: u32,
    /// The object.
    #[serde(flatten)]
    pub stored: StoredObject,
    /// Bytes of SQL before compression; the custom format doesn't tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plain_bytes: Option<u64>,
    /// Entries of the archive's table of contents; a plain dump has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub toc_entries: Option<u64>,
    /// What the database itself is like, for whoever creates it anew.
    pub properties: DatabaseProperties,
}

/// What a database is created with.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DatabaseProperties {
    /// Its owner.
    pub owner: String,
    /// Its encoding, e.g. `UTF8`.
    pub encoding: String,
    /// `LC_COLLATE`.
    pub collate: String,
    /// `LC_CTYPE`.
    pub ctype: String,
    /// `libc`, `icu` or `builtin`.
    pub locale_provider: String,
    /// The provider's locale, if it isn't libc.
    pub locale: Option<String>,
    /// Settings of the database for all roles, `name=value` each (`ALTER DATABASE … SET`).
    pub settings: Vec<String>,
}

/// `globals.sql.zst`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DumpedGlobals {
    /// The object.
    #[serde(flatten)]
    pub stored: StoredObject,
    /// Whether the roles' passwords are in it (as hashes).
    pub role_passwords: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pattern(text: &str) -> NamePattern {
        text.parse().unwrap()
    }

    #[test]
    fn patterns_mean_what_a_shell_means_by_them() {
        for (text, fits, fits_not) in [
            ("shop", "shop", "shops"),
            ("shop*", "shop", "ashop"),
            ("*_test", "a_b_test", "a_test_b"),
            ("a?c", "aüc", "ac"),
            ("*a*b*", "xaaybz", "ba"),
            ("[x]", "[x]", "x"),
            ("**", "", "never\0"),
        ] {
            assert!(pattern(text).matches(fits), "{text} {fits}");
            assert!(text == "**" || !pattern(text).matches(fits_not), "{text} {fits_not}");
        }
        assert!("".parse::<NamePattern>().is_err());
        // Stars don't make it slow.
        assert!(!pattern(&"*a".repeat(40)).matches(&"a".repeat(39)));
    }

    #[test]
    fn a_template_is_meant_by_its_name_alone() {
        let all = Selection::default();
        assert!(all.selects("shop", false) && !all.selects("template1", true));
        let selection = |include: &[&str], exclude: &[&str]| Selection {
            include: include.iter().map(|text| pattern(text)).collect(),
            exclude: exclude.iter().map(|text| pattern(text)).collect(),
        };
        assert!(!selection(&["*"], &[]).selects("template1", true));
        assert!(selection(&["template1"], &[]).selects("template1", true));
        assert!(!selection(&["shop*"], &["*_test"]).selects("shop_test", false));
        assert!(!selection(&["shop*"], &[]).selects("other", false));
    }

    #[test]
    fn names_have_one_key_each() {
        let name: DatabaseName = "Ünï/../\"x".parse().unwrap();
        assert_eq!(name.to_key(), "=C3=9Cn=C3=AF=2F=2E=2E=2F=22x");
        assert_eq!(DatabaseName::from_key(&name.to_key()), Some(name));
        for key in ["", "=", "=4", "=61", "=c3=9c", "=FF", "a.b", "=00", "a b"] {
            assert_eq!(DatabaseName::from_key(key), None, "{key}");
        }
        assert!("x".repeat(64).parse::<DatabaseName>().is_err());
    }

    #[test]
    fn names_stay_names_in_sql_and_in_connection_strings() {
        let name: DatabaseName = "it's \"\\x\" host=y".parse().unwrap();
        assert_eq!(name.quoted(), "\"it's \"\"\\x\"\" host=y\"");
        assert_eq!(name.conninfo(), "dbname='it\\'s \"\\\\x\" host=y'");
    }

    proptest! {
        #[test]
        fn every_name_comes_back_from_its_key(text in "[^\0]{1,15}") {
            let name: DatabaseName = text.parse().unwrap();
            prop_assert!(crate::key::is_component(&name.to_key()));
            prop_assert_eq!(DatabaseName::from_key(&name.to_key()), Some(name));
        }
    }
}
