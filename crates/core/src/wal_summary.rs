//! The files of `pg_wal/summaries`, by their names: which of them tell what changed between two positions.
//!
//! PostgreSQL 17 and later write them with `summarize_wal = on` and remove them after `wal_summary_keep_time`.
//! What is in one: [`crate::block_references`]. Source: `src/backend/backup/walsummary.c`.

use std::{fmt, str::FromStr};

use crate::{Lsn, TimelineId, backup_manifest::WalRange, id::hex8};

/// The name of a summary, `TTTTTTTTSSSSSSSSSSSSSSSSEEEEEEEEEEEEEEEE.summary`: whose WAL it is about. Never an empty
/// range.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct WalSummaryName {
    timeline: TimelineId,
    start: Lsn,
    end: Lsn,
}

impl WalSummaryName {
    /// The timeline whose WAL it summarizes.
    pub const fn timeline(self) -> TimelineId {
        self.timeline
    }

    /// Where the summarized WAL begins.
    pub const fn start(self) -> Lsn {
        self.start
    }

    /// The first position that isn't summarized any more.
    pub const fn end(self) -> Lsn {
        self.end
    }
}

impl fmt::Display for WalSummaryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:016X}{:016X}.summary", self.timeline.to_hex(), self.start.bytes(), self.end.bytes())
    }
}

/// The text is no name of a WAL summary. Quotes the beginning of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not the name of a WAL summary: 40 upper-case hexadecimal digits and .summary")]
pub struct ParseWalSummaryNameError(String);

impl FromStr for WalSummaryName {
    type Err = ParseWalSummaryNameError;

    fn from_str(text: &str) -> Result<WalSummaryName, ParseWalSummaryNameError> {
        parse(text).ok_or_else(|| ParseWalSummaryNameError(text.chars().take(60).collect()))
    }
}

fn parse(text: &str) -> Option<WalSummaryName> {
    let digits = text.strip_suffix(".summary").filter(|digits| digits.len() == 40)?;
    let word = |at: usize| digits.get(at..at + 8).and_then(hex8);
    let lsn = |at: usize| Some(Lsn::new(u64::from(word(at)?) << 32 | u64::from(word(at + 8)?)));
    let name = WalSummaryName { timeline: TimelineId::new(word(0)?)?, start: lsn(8)?, end: lsn(24)? };
    (name.start < name.end).then_some(name)
}

/// Why summaries don't tell all that changed in a range of WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CoverageError {
    /// No summary covers the WAL from `missing` on.
    #[error("the WAL of timeline {timeline} from {start} to {end} is not summarized from {missing} on")]
    Missing {
        /// The timeline.
        timeline: TimelineId,
        /// Where the range begins.
        start: Lsn,
        /// Where the range ends.
        end: Lsn,
        /// The first position in it that no summary covers. Behind it there may be summaries again.
        missing: Lsn,
    },
    /// The range ends before it begins: what it was made of doesn't belong together.
    #[error("the WAL of timeline {timeline} from {start} to {end} can't be summarized: it ends before it begins")]
    Backwards {
        /// The timeline.
        timeline: TimelineId,
        /// Where the range begins.
        start: Lsn,
        /// Where the range ends.
        end: Lsn,
    },
}

/// Those of the summaries that tell all that changed in the range, oldest first, which is the order in which
/// [`BlockReferences::merge_summary`](crate::block_references::BlockReferences::merge_summary) wants them. None for
/// an empty range. The first and the last may reach beyond the range: then they tell more than changed in it.
///
/// A summary that lies wholly within another is left out: read after it, its truncations would seem to be later than
/// what the other says changed.
///
/// # Errors
///
/// See [`CoverageError`]. The server may be about to summarize what is missing at the end.
pub fn covering(summaries: &[WalSummaryName], range: &WalRange) -> Result<Vec<WalSummaryName>, CoverageError> {
    let WalRange { timeline, start, end } = *range;
    if end < start {
        return Err(CoverageError::Backwards { timeline, start, end });
    }
    let mut candidates: Vec<WalSummaryName> = summaries
        .iter()
        .copied()
        .filter(|summary| summary.timeline == timeline && summary.end > start && summary.start < end)
        .collect();
    // Of those that begin together the longest first: the others add nothing to it.
    candidates.sort_unstable_by(|a, b| a.start.cmp(&b.start).then(b.end.cmp(&a.end)));
    let (mut covered, mut chosen) = (start, Vec::new());
    for summary in candidates {
        if summary.start > covered || covered >= end {
            break;
        }
        if summary.end > covered {
            covered = summary.end;
            chosen.push(summary);
        }
    }
    if covered < end {
        return Err(CoverageError::Missing { timeline, start, end, missing: covered });
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn summary(timeline: u32, start: u64, end: u64) -> WalSummaryName {
        WalSummaryName { timeline: TimelineId::new(timeline).unwrap(), start: Lsn::new(start), end: Lsn::new(end) }
    }

    fn covered(summaries: &[WalSummaryName], start: u64, end: u64) -> Result<Vec<WalSummaryName>, CoverageError> {
        let (start, end) = (Lsn::new(start), Lsn::new(end));
        covering(summaries, &WalRange { timeline: TimelineId::FIRST, start, end })
    }

    fn missing(summaries: &[WalSummaryName], start: u64, end: u64) -> u64 {
        match covered(summaries, start, end) {
            Err(CoverageError::Missing { missing, .. }) => missing.bytes(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_name_tells_the_timeline_and_the_range() {
        let text = "0000000A0000000001000028000000AB02000100.summary";
        let name: WalSummaryName = text.parse().unwrap();
        assert_eq!(name, summary(10, 0x100_0028, 0xAB_0200_0100));
        assert_eq!(name.to_string(), text);
        for text in [
            "0000000A0000000001000028000000AB02000100",
            "0000000A0000000001000028000000AB0200010.summary",
            "0000000A0000000001000028000000AB020001000.summary",
            "0000000a0000000001000028000000AB02000100.summary",
            "000000000000000001000028000000AB02000100.summary",
            "0000000A00000000010000280000000001000028.summary",
            "0000000A0000000001000028000000AB0200010é.summary",
            "temp.summary",
            "",
        ] {
            assert!(text.parse::<WalSummaryName>().is_err(), "{text}");
        }
    }

    #[test]
    fn those_that_overlap_the_range_cover_it_in_order() {
        let all = [summary(1, 30, 40), summary(1, 10, 20), summary(2, 20, 30), summary(1, 20, 30), summary(1, 40, 50)];
        assert_eq!(covered(&all, 10, 30), Ok(vec![all[1], all[3]]));
        assert_eq!(covered(&all, 19, 31), Ok(vec![all[1], all[3], all[0]]));
        assert_eq!(covered(&all, 25, 25), Ok(vec![]));
    }

    #[test]
    fn one_within_another_adds_nothing() {
        let all = [summary(1, 10, 20), summary(1, 5, 40), summary(1, 5, 15), summary(1, 35, 50)];
        assert_eq!(covered(&all, 10, 50), Ok(vec![all[1], all[3]]));
    }

    #[test]
    fn the_first_position_that_is_missing_is_told() {
        let all = [summary(1, 10, 20), summary(1, 30, 40)];
        assert_eq!(missing(&all, 10, 40), 20);
        assert_eq!(missing(&all, 5, 20), 5);
        assert_eq!(missing(&all, 30, 41), 40);
        assert_eq!(missing(&[], 30, 41), 30);
        assert_eq!(
            covered(&all, 10, 25).unwrap_err().to_string(),
            "the WAL of timeline 1 from 0/A to 0/19 is not summarized from 0/14 on"
        );
        assert!(matches!(covered(&all, 20, 10), Err(CoverageError::Backwards { .. })));
    }

    proptest! {
        #[test]
        fn what_covers_has_no_gap_and_nothing_superfluous(
            ranges in prop::collection::vec((0u64..30, 1u64..10), 0..12), start in 0u64..30, length in 0u64..20,
        ) {
            let all: Vec<_> = ranges.iter().map(|(start, length)| summary(1, *start, start + length)).collect();
            let end = start + length;
            let is_covered = |at: u64, by: &[WalSummaryName]| by.iter().any(|s| s.start.bytes() <= at && at < s.end.bytes());
            match covered(&all, start, end) {
                Ok(chosen) => {
                    prop_assert!((start..end).all(|at| is_covered(at, &chosen)));
                    prop_assert!(chosen.iter().all(|s| s.start.bytes() < end && s.end.bytes() > start));
                    prop_assert!(chosen.is_sorted_by(|a, b| a.start <= b.start && a.end < b.end));
                }
                Err(CoverageError::Missing { missing, .. }) => {
                    let first = (start..end).find(|at| !is_covered(*at, &all));
                    prop_assert_eq!(Some(missing.bytes()), first);
                }
                Err(error) => prop_assert!(false, "{}", error),
            }
        }
    }
}
