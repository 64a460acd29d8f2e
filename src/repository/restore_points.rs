//! The records of restore points.

use pgsidecar_core::{
    layout::RepositoryObject,
    restore_point::{RESTORE_POINT_FORMAT, RestorePointRecord},
};

use super::{Repository, damaged};
use crate::{
    failure::{Code, Failure},
    store::{ListRequest, Pages},
};

impl Repository {
    /// All restore points that are recorded, by timeline and position. A record that is damaged is told in the log and
    /// left out.
    ///
    /// # Errors
    /// The store's.
    pub async fn restore_points(&self) -> Result<Vec<RestorePointRecord>, Failure> {
        let mut points = Vec::new();
        let mut pages = Pages::new(self.store(), ListRequest::under(self.layout().restore_points_prefix()));
        while let Some(page) = pages.next().await? {
            for object in page.objects {
                let Some(place @ RepositoryObject::RestorePoint(..)) = self.layout().parse(&object.key) else {
                    continue;
                };
                match self.restore_point(&place).await {
                    Ok(point) => points.extend(point),
                    Err(failure) if failure.code == Code::Damaged => {
                        tracing::warn!(hint = failure.hint, "a restore point is left out: {failure}");
                    }
                    Err(failure) => return Err(failure),
                }
            }
        }
        Ok(points)
    }

    async fn restore_point(&self, place: &RepositoryObject) -> Result<Option<RestorePointRecord>, Failure> {
        let Some(record) = self.read_json::<RestorePointRecord>(place).await? else { return Ok(None) };
        let key = self.layout().key(place);
        if record.format > RESTORE_POINT_FORMAT {
            return Err(Failure::new(
                Code::Damaged,
                format!("{key} has format {}, and this pgsidecar knows {RESTORE_POINT_FORMAT}", record.format),
            )
            .hint("It was made by a newer pgsidecar: use that one."));
        }
        let own = RepositoryObject::RestorePoint(record.timeline, record.lsn);
        if record.system_identifier != self.layout().system() || own != *place {
            return Err(damaged(key.as_str(), "it is another restore point's"));
        }
        Ok(Some(record))
    }
}
