//! Timeline histories: which stretch of the log belongs to which timeline.
//!
//! Each promotion and each point-in-time recovery begins a new timeline. Its history file lists the timelines that
//! it comes from and where each was left. Source: `src/backend/access/transam/timeline.c`.
//!
//! Switch points may go *backwards*, so a history isn't always the list of stretches that it seems to be. PostgreSQL
//! names the recovery's *target* timeline as the parent, even if recovery ended before that timeline began
//! (`StartupXLOG`: `writeTimeLineHistory(newTLI, recoveryTargetTLI, …)`). Whoever restores to 10:00, and then
//! again, to 9:00, gets for timeline 3 (as a server 15 wrote it, with tabs):
//!
//! ```text
//! 1    0/1000060    after LSN 0/1000028
//! 2    0/E72DF8     reached consistency
//! ```
//!
//! Of timeline 2, which began at 0/1000060, nothing is in timeline 3, and of timeline 1 only what lies before
//! 0/E72DF8. PostgreSQL copes by looking at the newest timelines first; here the spans are cut to what is theirs.

use crate::{Lsn, TimelineId, WalSegmentSize};

/// The longest history that is read, in bytes. A timeline takes about 40.
const MAX_BYTES: usize = 1 << 20;

/// A stretch of the log that was written on one timeline and belongs to a history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimelineSpan {
    /// The timeline.
    pub timeline: TimelineId,
    /// Where its stretch begins; 0/0 for the oldest.
    pub begin: Lsn,
    /// Where the next timeline of the history begins (exclusive). `None` for the history's own timeline, the last.
    /// Equal to `begin` if nothing of this timeline belongs to the history.
    pub end: Option<Lsn>,
}

/// Consecutive segments that recovery along a history reads from one timeline's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentStretch {
    /// The timeline in whose files they are.
    pub timeline: TimelineId,
    /// The number of the first one.
    pub first: u64,
    /// The number after the last one, always greater than `first`; `None` for the history's own timeline.
    pub end: Option<u64>,
}

/// The history of a timeline: itself, and the parts of its ancestors that lead to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimelineHistory {
    timeline: TimelineId,
    /// Oldest first, the timeline itself last. Timelines increase; each span begins where the one before ends.
    spans: Vec<TimelineSpan>,
}

/// Why a file is no timeline history. Lines are counted from 1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum HistoryError {
    /// A real one has a line for each timeline.
    #[error("the timeline history is {found} bytes long: more than the {MAX_BYTES} that are read")]
    TooLong { found: usize },
    /// A line that PostgreSQL couldn't read either.
    #[error("line {line} of the timeline history should be a timeline's number, a tab and an LSN, but is {text:?}")]
    Syntax { line: usize, text: String },
    /// Ancestors are listed oldest first, and a child's number is always higher than its parent's.
    #[error("line {line} of the timeline history has timeline {found} after timeline {previous}: they must increase")]
    NotIncreasing { line: usize, found: TimelineId, previous: TimelineId },
    /// The file belongs to another timeline.
    #[error("line {line} of the history of timeline {timeline} has timeline {found}, which can't be its ancestor")]
    NotAnAncestor { line: usize, found: TimelineId, timeline: TimelineId },
}

impl TimelineHistory {
    /// The history of a timeline without ancestors: that of timeline 1, which has no history file.
    pub fn first(timeline: TimelineId) -> TimelineHistory {
        TimelineHistory { timeline, spans: vec![TimelineSpan { timeline, begin: Lsn::INVALID, end: None }] }
    }

    /// Reads the history file of this timeline. An empty one stands for no ancestors.
    ///
    /// # Errors
    /// The file is damaged, or it isn't the history of this timeline.
    pub fn parse(timeline: TimelineId, text: &[u8]) -> Result<TimelineHistory, HistoryError> {
        if text.len() > MAX_BYTES {
            return Err(HistoryError::TooLong { found: text.len() });
        }
        let mut ancestors: Vec<(TimelineId, Lsn)> = Vec::new();
        for (line, text) in (1..).zip(text.split(|&byte| byte == b'\n')) {
            let text = text.trim_ascii();
            if text.is_empty() || text.starts_with(b"#") {
                continue;
            }
            let (found, switch_point) = entry(text).ok_or_else(|| HistoryError::Syntax {
                line,
                text: String::from_utf8_lossy(text).chars().take(60).collect(),
            })?;
            if let Some(&(previous, _)) = ancestors.last().filter(|(previous, _)| *previous >= found) {
                return Err(HistoryError::NotIncreasing { line, found, previous });
            }
            if found >= timeline {
                return Err(HistoryError::NotAnAncestor { line, found, timeline });
            }
            ancestors.push((found, switch_point));
        }
        Ok(TimelineHistory::new(timeline, &ancestors))
    }

    /// Cuts each ancestor's stretch at the earliest point where it or a later one was left.
    fn new(timeline: TimelineId, ancestors: &[(TimelineId, Lsn)]) -> TimelineHistory {
        let mut spans = TimelineHistory::first(timeline).spans;
        let mut next_begin = None;
        for &(timeline, switch_point) in ancestors.iter().rev() {
            let end = next_begin.map_or(switch_point, |next: Lsn| next.min(switch_point));
            if let Some(next) = spans.last_mut() {
                next.begin = end;
            }
            spans.push(TimelineSpan { timeline, begin: Lsn::INVALID, end: Some(end) });
            next_begin = Some(end);
        }
        spans.reverse();
        TimelineHistory { timeline, spans }
    }

    /// The timeline whose history this is.
    pub fn timeline(&self) -> TimelineId {
        self.timeline
    }

    /// Which stretch of the log comes from which timeline: oldest first, without gaps, this timeline last.
    pub fn spans(&self) -> &[TimelineSpan] {
        &self.spans
    }

    /// Whether what was written on `timeline` up to the position `lsn` belongs to this history, so that a backup that
    /// ended there can be recovered into this timeline. The switch point itself counts as both timelines' position.
    pub fn contains(&self, timeline: TimelineId, lsn: Lsn) -> bool {
        self.span(timeline)
            .is_some_and(|span| span.begin <= lsn && span.end.is_none_or(|end| lsn <= end && span.begin < end))
    }

    /// Where this history leaves `timeline`; `None` for its own timeline and for those that aren't in it.
    pub fn switch_point(&self, timeline: TimelineId) -> Option<Lsn> {
        self.span(timeline)?.end
    }

    /// The timeline in whose file recovery looks first for a segment: the newest one that begins in it or before it
    /// (`XLogFileReadAnyTLI` in `xlogrecovery.c`). The segment of a switch point is looked for on the new timeline,
    /// whose file begins as a copy of the old one's. Recovery goes on to older timelines where the file is missing.
    pub fn timeline_of_segment(&self, segment_number: u64, size: WalSegmentSize) -> Option<TimelineId> {
        let begins_by_then = |span: &&TimelineSpan| size.segment_number(span.begin) <= segment_number;
        self.spans.iter().rev().find(begins_by_then).map(|span| span.timeline)
    }

    /// The segments from number `from` on, each on its [`TimelineHistory::timeline_of_segment`]: oldest first, without
    /// gaps. Timelines of which no segment is read are left out.
    pub fn stretches(&self, from: u64, size: WalSegmentSize) -> impl Iterator<Item = SegmentStretch> {
        self.spans.iter().filter_map(move |span| {
            let first = size.segment_number(span.begin).max(from);
            let end = span.end.map(|end| size.segment_number(end));
            end.is_none_or(|end| first < end).then_some(SegmentStretch { timeline: span.timeline, first, end })
        })
    }

    /// Where this timeline was begun, and the timeline whose WAL leads there. `None` if it has no ancestors.
    pub fn origin(&self) -> Option<(TimelineId, Lsn)> {
        let before = self.spans.iter().rev().skip(1).find(|span| span.end != Some(span.begin));
        before.and_then(|span| Some((span.timeline, span.end?)))
    }

    fn span(&self, timeline: TimelineId) -> Option<&TimelineSpan> {
        self.spans.iter().find(|span| span.timeline == timeline)
    }
}

/// A line's timeline and switch point. The reason after them is for people and may be in any encoding.
fn entry(line: &[u8]) -> Option<(TimelineId, Lsn)> {
    let mut words = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
    let mut word = || str::from_utf8(words.next()?).ok();
    Some((word()?.parse().ok()?, word()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn timeline(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    fn lsn(text: &str) -> Lsn {
        text.parse().unwrap()
    }

    fn span(number: u32, begin: &str, end: Option<&str>) -> TimelineSpan {
        TimelineSpan { timeline: timeline(number), begin: lsn(begin), end: end.map(lsn) }
    }

    /// As a server 15 wrote it for timeline 3, but for the switch point of timeline 2.
    const HISTORY: &[u8] = b"1\t0/1000060\tafter LSN 0/1000028\n\n\n2\t0/3000028\treached consistency\n";

    #[test]
    fn spans_follow_each_other() {
        let history = TimelineHistory::parse(timeline(3), HISTORY).unwrap();
        assert_eq!(history.timeline(), timeline(3));
        assert_eq!(
            history.spans(),
            [span(1, "0/0", Some("0/1000060")), span(2, "0/1000060", Some("0/3000028")), span(3, "0/3000028", None)]
        );
        assert_eq!(history.switch_point(timeline(2)), Some(lsn("0/3000028")));
        assert_eq!((history.switch_point(timeline(3)), history.switch_point(timeline(4))), (None, None));
    }

    #[test]
    fn a_second_recovery_to_an_earlier_point_leaves_nothing_of_the_first() {
        let text = b"1\t0/1000060\tafter LSN 0/1000028\n\n\n2\t0/E72DF8\treached consistency\n";
        let history = TimelineHistory::parse(timeline(3), text).unwrap();
        assert_eq!(
            history.spans(),
            [span(1, "0/0", Some("0/E72DF8")), span(2, "0/E72DF8", Some("0/E72DF8")), span(3, "0/E72DF8", None)]
        );
        assert!(history.contains(timeline(1), lsn("0/E72DF8")));
        assert!(!history.contains(timeline(1), lsn("0/1000000")));
        assert!(!history.contains(timeline(2), lsn("0/1000060")));
        assert!(!history.contains(timeline(2), lsn("0/E72DF8")));
        assert_eq!(history.origin(), Some((timeline(1), lsn("0/E72DF8"))));
        assert_eq!(TimelineHistory::first(timeline(1)).origin(), None);
    }

    #[test]
    fn a_position_belongs_to_the_history_up_to_where_its_timeline_was_left() {
        let history = TimelineHistory::parse(timeline(3), HISTORY).unwrap();
        for (number, position, expected) in [
            (1, "0/1000060", true),
            (1, "0/1000061", false),
            (2, "0/100005F", false),
            (2, "0/1000060", true),
            (3, "0/3000027", false),
            (3, "FFFFFFFF/0", true),
            (4, "0/3000028", false),
        ] {
            assert_eq!(history.contains(timeline(number), lsn(position)), expected, "{number} {position}");
        }
    }

    #[test]
    fn comments_blank_lines_and_any_reason_are_passed_over() {
        let text = b"# by hand\r\n\n  1 \t 0/1000060\t\xff\xfe reason\r\n   # more\n2\t0/3000028";
        assert_eq!(TimelineHistory::parse(timeline(3), text), TimelineHistory::parse(timeline(3), HISTORY));
        assert_eq!(TimelineHistory::parse(timeline(9), b""), Ok(TimelineHistory::first(timeline(9))));
    }

    #[test]
    fn what_is_no_history_of_this_timeline_is_refused() {
        let message = |number, text: &[u8]| TimelineHistory::parse(timeline(number), text).unwrap_err().to_string();
        assert_eq!(
            message(2, b"\n1\tsomewhere"),
            r#"line 2 of the timeline history should be a timeline's number, a tab and an LSN, but is "1\tsomewhere""#
        );
        assert_eq!(
            message(9, b"2\t0/5\n2\t0/6\n"),
            "line 2 of the timeline history has timeline 2 after timeline 2: they must increase"
        );
        assert_eq!(
            message(2, b"2\t0/5\n"),
            "line 1 of the history of timeline 2 has timeline 2, which can't be its ancestor"
        );
        for text in ["1", "0\t0/5", "-1\t0/5", "x\t0/5", "1\t5", "1,0/5", "1\t0/5\0", "\0\0\0\0"] {
            assert!(TimelineHistory::parse(timeline(2), text.as_bytes()).is_err(), "{text:?}");
        }
        assert_eq!(message(2, &vec![b'\n'; MAX_BYTES + 1]).split(':').count(), 2);
    }

    /// Ancestors in increasing order, with switch points that go back and forth within a few segments.
    fn ancestors() -> impl Strategy<Value = Vec<(TimelineId, Lsn)>> {
        proptest::collection::btree_map(1..1000u32, 1..80u64 << 20, 0..6)
            .prop_map(|map| map.into_iter().map(|(number, at)| (timeline(number), Lsn::new(at))).collect())
    }

    proptest! {
        #[test]
        fn positions_and_segments_are_found_where_postgresql_finds_them(ancestors in ancestors(), at in 0..100u64 << 20) {
            let text: String = ancestors.iter().map(|(tli, lsn)| format!("{tli}\t{lsn}\treason\n")).collect();
            let history = TimelineHistory::parse(timeline(1000), text.as_bytes()).unwrap();

            // timeline.c: the entries as they stand in the file, each beginning where the one before ends.
            let begins = [Lsn::INVALID].into_iter().chain(ancestors.iter().map(|&(_, lsn)| lsn));
            let timelines = ancestors.iter().map(|&(tli, _)| tli).chain([timeline(1000)]);
            let entries: Vec<_> = begins.zip(timelines).collect();

            // tliOfPointInHistory: the newest that has begun; their ends never matter, for the next has begun there.
            let position = Lsn::new(at);
            let newest = entries.iter().rev().find(|(begin, _)| *begin <= position).unwrap().1;
            let of_position = history.spans().iter().rev().find(|span| span.begin <= position).unwrap();
            prop_assert_eq!(of_position.timeline, newest);
            prop_assert!(history.contains(newest, position));

            // XLogFileReadAnyTLI
            let size = WalSegmentSize::new(1 << 20).unwrap();
            let segment = size.segment_number(position);
            let newest = entries.iter().rev().find(|(begin, _)| size.segment_number(*begin) <= segment).unwrap().1;
            prop_assert_eq!(history.timeline_of_segment(segment, size), Some(newest));
        }

        #[test]
        fn stretches_are_the_segments_where_recovery_looks_for_them(
            ancestors in ancestors(), from in 0..200u64, ahead in 0..200u64,
        ) {
            let history = TimelineHistory::new(timeline(1000), &ancestors);
            let size = WalSegmentSize::new(1 << 20).unwrap();
            let stretches: Vec<_> = history.stretches(from, size).collect();
            prop_assert_eq!(stretches[0].first, from);
            for pair in stretches.windows(2) {
                prop_assert_eq!(pair[0].end, Some(pair[1].first));
                prop_assert!(pair[0].first < pair[1].first);
            }
            let at = stretches.iter().rev().find(|stretch| stretch.first <= from + ahead).unwrap();
            prop_assert_eq!(history.timeline_of_segment(from + ahead, size), Some(at.timeline));
        }

        #[test]
        fn spans_leave_no_gap(ancestors in ancestors()) {
            let history = TimelineHistory::new(timeline(1000), &ancestors);
            prop_assert_eq!(history.spans()[0].begin, Lsn::INVALID);
            for pair in history.spans().windows(2) {
                prop_assert!(pair[0].timeline < pair[1].timeline);
                prop_assert_eq!(pair[0].end, Some(pair[1].begin));
                prop_assert!(pair[0].begin <= pair[1].begin);
            }
            prop_assert_eq!(history.spans().last().unwrap().end, None);
        }

        #[test]
        fn any_bytes_are_taken_without_panic(text: Vec<u8>) {
            let _ = TimelineHistory::parse(timeline(7), &text);
        }
    }
}
