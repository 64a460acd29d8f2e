//! The records of drills.

use std::time::Duration;

use jiff::Timestamp;
use pgsidecar_core::{DrillId, DrillRecord, drill::DRILL_FORMAT, layout::RepositoryObject};

use super::{Repository, Stored, damaged};
use crate::{
    failure::{Code, Failure},
    store::{ListRequest, Pages},
};

/// How many ids are tried for a record: two drills can begin in one second.
const TRIES: i64 = 10;

impl Repository {
    /// Stores the record of a drill. Where another has its id, it gets one that is some seconds later.
    ///
    /// # Errors
    /// The store's.
    pub async fn store_drill(&self, record: &mut DrillRecord) -> Result<(), Failure> {
        let first = record.id.began();
        for seconds in 0..TRIES {
            record.id = DrillId::new(first.saturating_add(jiff::SignedDuration::from_secs(seconds)).unwrap_or(first));
            match self.store_json(&RepositoryObject::Drill(record.id), record).await {
                Ok(Stored::New | Stored::Already) => return Ok(()),
                Err(failure) if failure.code == Code::Conflict => {}
                Err(failure) => return Err(failure),
            }
        }
        Err(Failure::new(Code::Conflict, format!("there are other drills' records from {first} on")))
    }

    /// The ids of the drills that began within the last `within`, oldest first.
    ///
    /// # Errors
    /// The store's.
    pub async fn drill_ids(&self, within: Duration) -> Result<Vec<DrillId>, Failure> {
        let prefix = self.layout().drills_prefix();
        let since = Timestamp::now() - jiff::SignedDuration::try_from(within).unwrap_or_default();
        let request = ListRequest::under(&prefix).after(format!("{prefix}{}", DrillId::new(since)));
        let mut ids = Vec::new();
        let mut pages = Pages::new(self.store(), request);
        while let Some(page) = pages.next().await? {
            ids.extend(page.objects.iter().filter_map(|object| match self.layout().parse(&object.key) {
                Some(RepositoryObject::Drill(id)) => Some(id),
                _ => None,
            }));
        }
        ids.sort_unstable();
        Ok(ids)
    }

    /// A drill's record; `None` if there is no such drill.
    ///
    /// # Errors
    /// The store's; [`Code::Damaged`] if the record can't be parsed.
    pub async fn drill(&self, id: DrillId) -> Result<Option<DrillRecord>, Failure> {
        let Some(record) = self.read_json::<DrillRecord>(&RepositoryObject::Drill(id)).await? else {
            return Ok(None);
        };
        if record.format > DRILL_FORMAT {
            return Err(Failure::new(
                Code::Damaged,
                format!(
                    "the record of drill {id} has format {}, and this pgsidecar knows {DRILL_FORMAT}",
                    record.format
                ),
            )
            .hint("It was made by a newer pgsidecar: use that one."));
        }
        if record.system_identifier != self.layout().system() || record.id != id {
            return Err(damaged(&format!("the record of drill {id}"), "it is another drill's"));
        }
        Ok(Some(record))
    }
}
