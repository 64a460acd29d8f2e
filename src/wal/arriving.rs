//! What a listing lacks only because it's being archived while the listing is made.

use std::time::Duration;

use jiff::Timestamp;
use pgsidecar_core::{ArchiveFileName, ArchivedWal, SegmentName, WalSegmentSize};

use crate::{failure::Failure, repository::Repository};

/// A segment that was stored less than this ago, give or take the clocks, may have overtaken others.
const NEW_SECONDS: i64 = 120;
/// How many segments are waited for before a new one.
const MAX_ARRIVING: u64 = 32;
/// How often it's waited for a segment that could still come, in all, and how long each time.
const LOOKS: u32 = 8;
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// Segments are archived several at a time, so the newest can be in a listing before those that precede it.
pub(super) struct Arriving {
    looks_left: u32,
}

impl Default for Arriving {
    fn default() -> Arriving {
        Arriving { looks_left: LOOKS }
    }
}

impl Arriving {
    /// The segments that the listing lacks before this one, if they have come or come within a moment. Looked for only
    /// before a segment that is new itself, and a few times in all: other gaps don't close.
    pub(super) async fn look(
        &mut self,
        repository: &Repository,
        wal: &ArchivedWal,
        before: SegmentName,
        stored_at: Timestamp,
        size: WalSegmentSize,
    ) -> Result<Vec<(SegmentName, u64, Timestamp)>, Failure> {
        let is_new = Timestamp::now().duration_since(stored_at).as_secs().abs() < NEW_SECONDS;
        let gap = wal.gap_before(before).filter(|gap| is_new && gap.segments() <= MAX_ARRIVING);
        let Some(gap) = gap else { return Ok(Vec::new()) };
        let mut come = Vec::new();
        for segment in gap.names(size) {
            let key = repository.layout().wal(&ArchiveFileName::Segment(segment));
            loop {
                if let Some(info) = repository.store().head(&key).await? {
                    come.push((segment, info.size, info.modified));
                    break;
                }
                if self.looks_left == 0 {
                    return Ok(come);
                }
                self.looks_left -= 1;
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        }
        Ok(come)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;
    use pgsidecar_core::{Layout, SystemIdentifier, TimelineId};
    use std::sync::Arc;

    #[tokio::test]
    async fn a_segment_that_others_have_overtaken_is_no_gap() {
        let store = MemoryStore::new();
        let layout = Layout::new("main".parse().unwrap(), SystemIdentifier::new(7));
        let repository = Repository::new(Arc::new(store.clone()), layout, 1);
        let (size, first) = (WalSegmentSize::DEFAULT, TimelineId::FIRST);
        let name = |number| SegmentName::from_number(first, number, size);
        let key = |number| repository.layout().wal(&ArchiveFileName::Segment(name(number)));
        let mut wal = ArchivedWal::new(first, size);
        wal.found(name(4), 1, Timestamp::now());

        store.fill([key(5)], 10, Timestamp::now());
        let late = async {
            tokio::time::sleep(LOOK_AGAIN).await;
            store.fill([key(6)], 10, Timestamp::now());
        };
        let mut arriving = Arriving::default();
        let look = arriving.look(&repository, &wal, name(7), Timestamp::now(), size);
        let (come, ()) = tokio::join!(look, late);
        let names: Vec<SegmentName> = come.unwrap().into_iter().map(|(name, ..)| name).collect();
        assert_eq!(names, [name(5), name(6)]);

        // What doesn't come is waited for once, and before an older one not at all.
        store.take_requests();
        let long_ago = Timestamp::now() - jiff::SignedDuration::from_hours(1);
        assert_eq!(arriving.look(&repository, &wal, name(7), long_ago, size).await.unwrap(), []);
        assert_eq!(store.take_requests(), 0);
        let come = arriving.look(&repository, &wal, name(9), Timestamp::now(), size).await.unwrap();
        assert_eq!((come.len(), arriving.looks_left), (2, 0));
        store.take_requests();
        assert_eq!(arriving.look(&repository, &wal, name(9), Timestamp::now(), size).await.unwrap().len(), 2);
        assert_eq!(store.take_requests(), 3);
    }
}
