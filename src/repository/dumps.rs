//! The records of dumps.

use pgsidecar_core::{
    DumpId, DumpRecord,
    dump::DUMP_FORMAT,
    layout::{DumpObject, RepositoryObject},
};
use serde::{Deserialize, Serialize};

use super::{Repository, damaged};
use crate::{
    failure::{Code, Failure},
    store::{ListRequest, Pages},
};

/// `started.json` of a dump: the claim of its id, written before anything else of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DumpClaim {
    /// The dump.
    pub id: DumpId,
    /// The pod or host that takes it.
    pub instance: String,
    /// Distinguishes this attempt from every other.
    pub attempt: String,
}

impl Repository {
    /// The ids of all dumps, complete or not, oldest first.
    ///
    /// # Errors
    /// The store's.
    pub async fn dump_ids(&self) -> Result<Vec<DumpId>, Failure> {
        let mut ids = Vec::new();
        let mut pages = Pages::new(self.store(), ListRequest::shallow(self.layout().dumps_prefix()));
        while let Some(page) = pages.next().await? {
            ids.extend(page.prefixes.iter().filter_map(|prefix| self.layout().dump_of_prefix(prefix)));
        }
        ids.sort_unstable();
        Ok(ids)
    }

    /// All complete dumps, oldest first. A record that is damaged is told in the log and left out.
    ///
    /// # Errors
    /// The store's.
    pub async fn dumps(&self) -> Result<Vec<DumpRecord>, Failure> {
        let mut dumps = Vec::new();
        for id in self.dump_ids().await? {
            match self.dump(id).await {
                Ok(dump) => dumps.extend(dump),
                Err(failure) if failure.code == Code::Damaged => {
                    tracing::warn!(hint = failure.hint, "dump {id} is left out: {failure}");
                }
                Err(failure) => return Err(failure),
            }
        }
        Ok(dumps)
    }

    /// A dump's record; `None` if there is no such dump, or it isn't complete.
    ///
    /// # Errors
    /// The store's; [`Code::Damaged`] if the record can't be parsed.
    pub async fn dump(&self, id: DumpId) -> Result<Option<DumpRecord>, Failure> {
        let record: Option<DumpRecord> = self.read_json(&RepositoryObject::Dump(id, DumpObject::Record)).await?;
        let Some(record) = record else { return Ok(None) };
        if record.format > DUMP_FORMAT {
            return Err(Failure::new(
                Code::Damaged,
                format!("dump {id} has format {}, and this pgsidecar knows {DUMP_FORMAT}", record.format),
            )
            .hint("It was made by a newer pgsidecar: use that one."));
        }
        if record.system_identifier != self.layout().system() || record.id != id {
            return Err(damaged(&format!("the record of dump {id}"), "it is another dump's"));
        }
        Ok(Some(record))
    }
}
