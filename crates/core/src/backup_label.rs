//! What pg_backup_stop() returns beside the stop position: `backup_label`, which tells a restored server
//! where to begin its recovery, and `tablespace_map`, which tells it where the tablespaces are (xlogbackup.c,
//! do_pg_backup_start in xlog.c; read back by read_backup_label and read_tablespace_map in xlogrecovery.c).
//!
//! The label is parsed for what the sidecar records. What goes into a backup is the text that the server
//! returned, byte for byte; only what it is an increment of is added ([`with_increment`]) and, when a chain is merged,
//! taken out again ([`without_increment`]).

use std::{collections::BTreeMap, fmt, str::FromStr};

use crate::{Lsn, TimelineId};

/// What a `backup_label` says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackupLabel {
    /// Where the WAL that the backup needs begins: the checkpoint's redo point.
    pub start: Lsn,
    /// The checkpoint record that recovery begins with.
    pub checkpoint: Lsn,
    /// The timeline at the start.
    pub timeline: TimelineId,
    /// Whether the server was in recovery at the start.
    pub from_standby: bool,
    /// The start of the backup that this one is an increment of (17 and later).
    pub incremental_from: Option<Lsn>,
}

/// The text is no `backup_label` that a restore could begin with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseLabelError {
    /// A line that has to be there isn't.
    #[error("the backup label has no line {0:?}")]
    Missing(&'static str),
    /// A line is there more than once. A line break in the backup's name does that.
    #[error("the backup label has the line {0:?} more than once")]
    Twice(&'static str),
    /// A line's value can't be what it says.
    #[error("the backup label has {value:?} for {key:?}")]
    Value {
        /// The line's name.
        key: &'static str,
        /// What follows it.
        value: String,
    },
}

const START: &str = "START WAL LOCATION";
const CHECKPOINT: &str = "CHECKPOINT LOCATION";
const METHOD: &str = "BACKUP METHOD";
const FROM: &str = "BACKUP FROM";
const TIMELINE: &str = "START TIMELINE";
const STOP_TIMELINE: &str = "STOP TIMELINE";
const INCREMENTAL_LSN: &str = "INCREMENTAL FROM LSN";
const INCREMENTAL_TLI: &str = "INCREMENTAL FROM TLI";

/// Whether the text of a backup history file is all there: it begins as such a file does and its last line is the one
/// that PostgreSQL writes last, to its end (`build_backup_content` in xlogbackup.c; before 15 `do_pg_stop_backup` in
/// xlog.c). Two lines on what it is an increment of may follow those on the stop.
pub fn is_whole_backup_history(text: &[u8]) -> bool {
    let Some(lines) = text.strip_suffix(b"\n") else { return false };
    let last = lines.rsplit(|&byte| byte == b'\n').next().unwrap_or_default();
    text.starts_with(START.as_bytes())
        && [STOP_TIMELINE, INCREMENTAL_TLI].iter().any(|key| {
            let number = last.strip_prefix(key.as_bytes()).and_then(|rest| rest.strip_prefix(b": "));
            number.is_some_and(|number| !number.is_empty() && number.iter().all(u8::is_ascii_digit))
        })
}

impl FromStr for BackupLabel {
    type Err = ParseLabelError;

    fn from_str(text: &str) -> Result<BackupLabel, ParseLabelError> {
        let optional = |key| optional_line(text, key);
        let line = |key| optional(key)?.ok_or(ParseLabelError::Missing(key));

        // `0/2000028 (file 000000010000000000000002)`. The server takes the timeline from the file's name,
        // and refuses a START TIMELINE that differs.
        let location = line(START)?;
        let (start, file) = location.split_once(" (file ").ok_or_else(|| wrong(START, location))?;
        let timeline: TimelineId = parse(TIMELINE, line(TIMELINE)?)?;
        if file.len() != 25 || !file.ends_with(')') || file.get(..8).and_then(TimelineId::from_hex) != Some(timeline) {
            return Err(wrong(START, location));
        }
        // With any other method (pg_rewind's, an exclusive backup's) recovery wouldn't wait for the backup's
        // end before it calls the database consistent.
        let method = line(METHOD)?;
        if method != "streamed" {
            return Err(wrong(METHOD, method));
        }
        let from_standby = match line(FROM)? {
            "primary" => false,
            "standby" => true,
            other => return Err(wrong(FROM, other)),
        };
        let incremental_from = match (optional(INCREMENTAL_LSN)?, optional(INCREMENTAL_TLI)?) {
            (None, None) => None,
            (Some(lsn), Some(tli)) => {
                parse::<TimelineId>(INCREMENTAL_TLI, tli)?;
                Some(parse(INCREMENTAL_LSN, lsn)?)
            }
            (None, Some(_)) => return Err(ParseLabelError::Missing(INCREMENTAL_LSN)),
            (Some(_), None) => return Err(ParseLabelError::Missing(INCREMENTAL_TLI)),
        };
        let (start, checkpoint) = (parse(START, start)?, parse(CHECKPOINT, line(CHECKPOINT)?)?);
        Ok(BackupLabel { start, checkpoint, timeline, from_standby, incremental_from })
    }
}

/// The label with what the backup is an increment of at its end, as the server writes it: the earliest position in
/// the parent's WAL ranges and the timeline there. Without it pg_combinebackup takes the backup for a full one; with it
/// no server starts. A label that has such lines already gets these instead.
pub fn with_increment(label: &str, from: Lsn, timeline: TimelineId) -> String {
    let mut label = without_increment(label);
    if !label.is_empty() && !label.ends_with('\n') {
        label.push('\n');
    }
    label + &format!("{INCREMENTAL_LSN}: {from}\n{INCREMENTAL_TLI}: {timeline}\n")
}

/// The label of the full backup that a chain becomes: the newest one's, without what that was an increment of
/// (`write_backup_label` of pg_combinebackup).
pub fn without_increment(label: &str) -> String {
    let of_increment = |line: &str| {
        [INCREMENTAL_LSN, INCREMENTAL_TLI]
            .iter()
            .any(|key| line.strip_prefix(key).is_some_and(|rest| rest.starts_with(": ")))
    };
    label.split_inclusive('\n').filter(|line| !of_increment(line)).collect()
}

/// The value of the one line `key: value`.
fn optional_line<'a>(text: &'a str, key: &'static str) -> Result<Option<&'a str>, ParseLabelError> {
    let mut values =
        text.split('\n').filter_map(|line| line.strip_prefix(key).and_then(|rest| rest.strip_prefix(": ")));
    match (values.next(), values.next()) {
        (value, None) => Ok(value),
        (_, Some(_)) => Err(ParseLabelError::Twice(key)),
    }
}

fn parse<T: FromStr>(key: &'static str, value: &str) -> Result<T, ParseLabelError> {
    value.parse().map_err(|_| wrong(key, value))
}

fn wrong(key: &'static str, value: &str) -> ParseLabelError {
    ParseLabelError::Value { key, value: value.chars().take(80).collect() }
}

/// The tablespaces of a backup: the OID that is the link's name in `pg_tblspc`, and the location that the
/// link points to. `pg_default` and `pg_global` aren't among them, nor are tablespaces "in place", which are
/// directories in `pg_tblspc`.
///
/// A server that starts from a backup makes the links as this file says, whatever they point to at that
/// moment: a restore that puts a tablespace elsewhere has to write the [remapped](TablespaceMap::remap) file.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TablespaceMap(pub Vec<(u32, String)>);

/// The text is no `tablespace_map`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseTablespaceMapError {
    /// A line isn't an OID, one space and a location.
    #[error("the tablespace map has the line {0:?}, which is not an OID and a location")]
    Line(String),
    /// Two lines are about one tablespace.
    #[error("the tablespace map has tablespace {0} twice")]
    Twice(u32),
    /// The last line has no end.
    #[error("the tablespace map is cut off")]
    CutOff,
}

impl TablespaceMap {
    /// The map of a restore that puts tablespaces elsewhere: `locations` gives the new location for an old
    /// one. Others stay where they are. A slash at the end of either doesn't matter.
    ///
    /// The server cuts what is longer than MAXPGPATH (1,024 bytes with the OID) without a word; the links
    /// can't be made then, but that is not looked at here.
    pub fn remap(&self, locations: &BTreeMap<String, String>) -> TablespaceMap {
        let moved = |old: &str| {
            let found = locations.iter().find(|(from, _)| without_slash(from) == without_slash(old));
            found.map_or(old, |(_, to)| without_slash(to)).to_owned()
        };
        TablespaceMap(self.0.iter().map(|(oid, old)| (*oid, moved(old))).collect())
    }
}

fn without_slash(location: &str) -> &str {
    match location.trim_end_matches('/') {
        "" => location,
        trimmed => trimmed,
    }
}

/// As the server writes it: a backslash before line breaks and backslashes.
impl fmt::Display for TablespaceMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (oid, location) in &self.0 {
            write!(f, "{oid} ")?;
            for c in location.chars() {
                if matches!(c, '\n' | '\r' | '\\') {
                    f.write_str("\\")?;
                }
                write!(f, "{c}")?;
            }
            f.write_str("\n")?;
        }
        Ok(())
    }
}

impl FromStr for TablespaceMap {
    type Err = ParseTablespaceMapError;

    fn from_str(text: &str) -> Result<TablespaceMap, ParseTablespaceMapError> {
        let mut map = TablespaceMap::default();
        let mut line = String::new();
        let mut chars = text.chars();
        while let Some(c) = chars.next() {
            match c {
                '\\' => line.push(chars.next().ok_or(ParseTablespaceMapError::CutOff)?),
                '\n' | '\r' if line.is_empty() => {}
                '\n' | '\r' => {
                    let (oid, location) =
                        entry(&line).ok_or_else(|| ParseTablespaceMapError::Line(line.chars().take(200).collect()))?;
                    if map.0.iter().any(|(other, _)| *other == oid) {
                        return Err(ParseTablespaceMapError::Twice(oid));
                    }
                    map.0.push((oid, location.to_owned()));
                    line.clear();
                }
                c => line.push(c),
            }
        }
        if line.is_empty() { Ok(map) } else { Err(ParseTablespaceMapError::CutOff) }
    }
}

/// One space, as read_tablespace_map demands: a location may begin with more.
fn entry(line: &str) -> Option<(u32, &str)> {
    let (oid, location) = line.split_once(' ')?;
    let is_number = oid.bytes().all(|b| b.is_ascii_digit()) && !oid.starts_with('0');
    (is_number && !location.is_empty()).then_some(())?;
    Some((oid.parse().ok()?, location))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LABEL: &str = "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\n\
        CHECKPOINT LOCATION: 0/2000060\nBACKUP METHOD: streamed\nBACKUP FROM: primary\n\
        START TIME: 2026-11-21 06:15:00 UTC\nLABEL: pgsidecar\nSTART TIMELINE: 1\n";

    #[test]
    fn a_backup_history_is_whole_with_its_last_line_and_at_no_cut_before() {
        let history = LABEL
            .replace("CHECKPOINT", "STOP WAL LOCATION: 0/2000100 (file 000000010000000000000002)\nCHECKPOINT")
            + "STOP TIME: 2026-11-21 06:15:09 UTC\nSTOP TIMELINE: 1\n";
        for cut in 0..history.len() {
            assert!(!is_whole_backup_history(&history.as_bytes()[..cut]), "{cut}");
        }
        assert!(is_whole_backup_history(history.as_bytes()));
        let increment = format!("{history}INCREMENTAL FROM LSN: 0/1000028\nINCREMENTAL FROM TLI: 1\n");
        assert!(is_whole_backup_history(increment.as_bytes()));
        assert!(!is_whole_backup_history(LABEL.as_bytes()));
        assert!(!is_whole_backup_history(&[history.as_bytes(), &[0; 512]].concat()));
        assert!(!is_whole_backup_history(&history.as_bytes()[1..]));
    }

    #[test]
    fn a_label_tells_where_recovery_begins() {
        let label = BackupLabel {
            start: Lsn::new(0x200_0028),
            checkpoint: Lsn::new(0x200_0060),
            timeline: TimelineId::FIRST,
            from_standby: false,
            incremental_from: None,
        };
        assert_eq!(LABEL.parse(), Ok(label.clone()));
        let later =
            LABEL.replace("primary", "standby").replace("TIMELINE: 1", "TIMELINE: 10").replace("00000001", "0000000A")
                + "INCREMENTAL FROM LSN: 0/1000028\nINCREMENTAL FROM TLI: 9\n";
        let timeline = TimelineId::new(10).unwrap();
        let incremental_from = Some(Lsn::new(0x100_0028));
        assert_eq!(later.parse(), Ok(BackupLabel { timeline, from_standby: true, incremental_from, ..label }));
    }

    #[test]
    fn what_a_backup_is_an_increment_of_comes_and_goes() {
        let timeline = TimelineId::new(9).unwrap();
        let marked = with_increment(LABEL, Lsn::new(0x1_0100_0028), timeline);
        assert_eq!(marked, LABEL.to_owned() + "INCREMENTAL FROM LSN: 1/1000028\nINCREMENTAL FROM TLI: 9\n");
        assert_eq!(marked.parse::<BackupLabel>().unwrap().incremental_from, Some(Lsn::new(0x1_0100_0028)));
        assert_eq!(with_increment(&marked, Lsn::new(0x1_0100_0028), timeline), marked);
        assert_eq!(with_increment(LABEL.trim_end(), Lsn::new(0x1_0100_0028), timeline), marked);
        assert_eq!(without_increment(&marked), LABEL);
        assert_eq!(without_increment(LABEL), LABEL);
    }

    #[test]
    fn a_label_that_recovery_would_refuse_or_misread_is_refused() {
        let refused = |from: &str, to: &str| LABEL.replace(from, to).parse::<BackupLabel>().unwrap_err().to_string();
        let mut texts = vec![
            refused("START TIMELINE: 1", "START TIMELINE: 2"),
            refused("0/2000028", "2000028"),
            refused(")", ""),
            refused("BACKUP METHOD: streamed\n", ""),
            refused("streamed", "pg_rewind"),
            refused("primary", "elsewhere"),
            refused("LABEL: pgsidecar", "LABEL: evil\nSTART TIMELINE: 2"),
        ];
        texts.push((LABEL.to_owned() + "INCREMENTAL FROM LSN: 0/1\n").parse::<BackupLabel>().unwrap_err().to_string());
        insta::assert_snapshot!(texts.join("\n"), @r#"
        the backup label has "0/2000028 (file 000000010000000000000002)" for "START WAL LOCATION"
        the backup label has "2000028" for "START WAL LOCATION"
        the backup label has "0/2000028 (file 000000010000000000000002" for "START WAL LOCATION"
        the backup label has no line "BACKUP METHOD"
        the backup label has "pg_rewind" for "BACKUP METHOD"
        the backup label has "elsewhere" for "BACKUP FROM"
        the backup label has the line "START TIMELINE" more than once
        the backup label has no line "INCREMENTAL FROM TLI"
        "#);
    }

    #[test]
    fn a_tablespace_moves_by_its_location() {
        let map: TablespaceMap = "16400 /srv/fast\n16401  led by a space\n16402 /srv/slow\n".parse().unwrap();
        assert_eq!(map.0[1], (16401, " led by a space".to_owned()));
        let moves =
            BTreeMap::from([("/srv/fast/".to_owned(), "/tmp/a\\b".to_owned()), ("/srv".to_owned(), "/x".to_owned())]);
        let moved = map.remap(&moves);
        assert_eq!(moved.to_string(), "16400 /tmp/a\\\\b\n16401  led by a space\n16402 /srv/slow\n");
        assert_eq!("".parse(), Ok(TablespaceMap::default()));
    }

    #[test]
    fn what_is_no_tablespace_map_is_refused() {
        for text in [
            "16400 /a",
            "16400\n",
            "16400 \n",
            " /a\n",
            "x /a\n",
            "016400 /a\n",
            "0 /a\n",
            "16400 /a\\\n",
            "16400 /a\\",
            "4294967296 /a\n",
            "1 /a\n1 /b\n",
        ] {
            assert!(text.parse::<TablespaceMap>().is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn a_tablespace_map_survives_any_location(entries in prop::collection::btree_map(1u32.., "[ -~\n\r\\\\ä]{1,20}", 0..5)) {
            let map = TablespaceMap(entries.into_iter().collect());
            prop_assert_eq!(map.to_string().parse(), Ok(map));
        }
    }
}
