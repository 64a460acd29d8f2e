//! Which segments that a standby received it may ship, in case its primary never did.
//!
//! PostgreSQL marks all of them `.done`, also the last one of a timeline, of which only a part may have come. Final is
//! what was replayed and lies before the point at which its timeline was left.

use crate::{Lsn, SegmentName, TimelineHistory, WalSegmentSize};

/// Where a server is that receives WAL, or has received it before it was promoted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// The timelines that the server has followed.
    pub history: TimelineHistory,
    /// How far it has replayed; `None` once it was promoted.
    pub replayed: Option<Lsn>,
    /// The size of its segments.
    pub segment_size: WalSegmentSize,
}

impl Received {
    /// Whether all of this segment is final here. Of a promoted server's own timeline none is: that's what its
    /// `archive_command` is for.
    pub fn is_final(&self, segment: SegmentName) -> bool {
        let number = segment.number(self.segment_size);
        let span = self.history.spans().iter().find(|span| span.timeline == segment.timeline());
        let (Some(number), Some(span)) = (number, span) else { return false };
        let begin = self.segment_size.start_of(number);
        let end = Lsn::new(begin.bytes() + self.segment_size.bytes());
        // What lies before the timeline's beginning is in a segment of its parent.
        let follows = end > span.begin;
        follows
            && match (span.end, self.replayed) {
                (None, None) => false,
                (left, replayed) => left.into_iter().chain(replayed).all(|limit| end <= limit),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TimelineId;

    const MB: u64 = 1 << 20;

    fn received(history: Option<&str>, replayed: Option<u64>) -> Received {
        let history = match history {
            None => TimelineHistory::first(TimelineId::FIRST),
            Some(text) => TimelineHistory::parse(TimelineId::new(2).unwrap(), text.as_bytes()).unwrap(),
        };
        Received { history, replayed: replayed.map(Lsn::new), segment_size: WalSegmentSize::new(MB).unwrap() }
    }

    fn final_of(received: &Received, timeline: u32) -> Vec<u64> {
        let name = |number| SegmentName::from_number(TimelineId::new(timeline).unwrap(), number, received.segment_size);
        (0..12).filter(|number| received.is_final(name(*number))).collect()
    }

    #[test]
    fn a_standby_ships_what_it_has_replayed_to_the_end() {
        assert_eq!(final_of(&received(None, Some(5 * MB)), 1), [0, 1, 2, 3, 4]);
        assert_eq!(final_of(&received(None, Some(5 * MB - 1)), 1), [0, 1, 2, 3]);
        assert_eq!(final_of(&received(None, Some(5 * MB)), 2), [0; 0]);
    }

    #[test]
    fn of_a_timeline_that_was_left_only_what_lies_before_the_switch() {
        // 0/580000: in the middle of segment 5.
        let history = Some("1\t0/580000\tno recovery target specified\n");
        assert_eq!(final_of(&received(history, Some(9 * MB)), 1), [0, 1, 2, 3, 4]);
        assert_eq!(final_of(&received(history, Some(9 * MB)), 2), [5, 6, 7, 8]);
        assert_eq!(final_of(&received(history, Some(3 * MB)), 1), [0, 1, 2]);
        // Promoted: what it received, and nothing of its own timeline.
        assert_eq!(final_of(&received(history, None), 1), [0, 1, 2, 3, 4]);
        assert_eq!(final_of(&received(history, None), 2), [0; 0]);
    }
}
