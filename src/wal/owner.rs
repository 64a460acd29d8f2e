//! Who archives a timeline: one workload, told by `owner.json`, which is created with the timeline's first file.
//!
//! Two servers that both write a timeline (a copy of the volume that was started elsewhere, a machine that was rolled
//! back) write different bytes under the same names, and whichever comes first takes a name from the other. So the
//! first workload to archive a timeline owns it, and a live primary of another one is refused at its first call,
//! before it has taken a name.
//!
//! Refused is only a live primary on its own timeline. A standby, or a former primary with WAL of a timeline that has
//! been left, may add what is missing: that's how an archive gets no hole. What differs is refused as always.

use std::{
    collections::HashMap,
    sync::Mutex,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use pgsidecar_core::{SystemIdentifier, TimelineId, layout::RepositoryObject};
use serde::{Deserialize, Serialize};

use crate::{
    failure::{Code, Failure},
    repository::{Repository, Stored},
};

/// How long it's believed that we are the owner: a takeover must be noticed.
const BELIEVED: Duration = Duration::from_secs(60);

/// `owner.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineOwner {
    /// The layout's version.
    pub format: u32,
    /// Who archives the timeline: `NAMESPACE/WORKLOAD` in Kubernetes, `HOST:PGDATA` elsewhere.
    pub workload: String,
    /// The pod or host that claimed it.
    pub claimed_by: String,
    /// When.
    pub claimed_at: Timestamp,
}

/// Who we are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claimant {
    /// What stays the same when a pod is replaced.
    pub workload: String,
    /// The pod or host.
    pub instance: String,
}

impl Claimant {
    fn claim(&self) -> TimelineOwner {
        TimelineOwner {
            format: 1,
            workload: self.workload.clone(),
            claimed_by: self.instance.clone(),
            claimed_at: Timestamp::now(),
        }
    }
}

/// The timelines that we have found to be ours.
#[derive(Default)]
pub struct Owned {
    known: Mutex<HashMap<(SystemIdentifier, TimelineId), Instant>>,
    /// Files come several at a time: one claims for all.
    claiming: tokio::sync::Mutex<()>,
}

impl Owned {
    /// Makes sure that the timeline is ours; claims it if it's nobody's.
    ///
    /// # Errors
    /// [`Code::NotOwner`] if it's another's; the store's.
    pub async fn claim(&self, repository: &Repository, timeline: TimelineId, us: &Claimant) -> Result<(), Failure> {
        let name = (repository.layout().system(), timeline);
        let believed =
            || self.known.lock().is_ok_and(|known| known.get(&name).is_some_and(|at| at.elapsed() < BELIEVED));
        if believed() {
            return Ok(());
        }
        let _one_at_a_time = self.claiming.lock().await;
        if believed() {
            return Ok(());
        }
        let object = RepositoryObject::TimelineOwner(timeline);
        let owner = match owner(repository, timeline).await? {
            Some(owner) => owner,
            None => match repository.store_json(&object, &us.claim()).await {
                Ok(Stored::New | Stored::Already) => us.claim(),
                // Somebody was faster.
                Err(failure) if failure.code == Code::Conflict => owner(repository, timeline).await?.ok_or(failure)?,
                Err(failure) => return Err(failure),
            },
        };
        if owner.workload != us.workload {
            return Err(Failure::new(
                Code::NotOwner,
                format!(
                    "timeline {timeline} is archived by {} since {}, and this is {}",
                    owner.workload, owner.claimed_at, us.workload
                ),
            )
            .hint(
                "Nothing was stored. If this is a copy of that database, give it another cluster name (PGSIDECAR_CLUSTER). \
                 If it has taken that one's place, which must not run any more: pgsidecar wal take-over. \
                 'pgsidecar check' tells whether both began this timeline.",
            ));
        }
        if let Ok(mut known) = self.known.lock() {
            known.insert(name, Instant::now());
        }
        Ok(())
    }
}

/// A timeline's owner; `None` if nobody has claimed it.
///
/// # Errors
/// The store's; [`Code::Damaged`] if the record can't be read.
pub async fn owner(repository: &Repository, timeline: TimelineId) -> Result<Option<TimelineOwner>, Failure> {
    repository.read_json(&RepositoryObject::TimelineOwner(timeline)).await
}

/// Takes a timeline from whoever owns it; answers with who that was. A daemon of theirs that still runs notices it
/// within a minute.
///
/// # Errors
/// The store's. Then the timeline may be nobody's, and the next to archive claims it.
pub async fn take_over(
    repository: &Repository,
    timeline: TimelineId,
    us: &Claimant,
) -> Result<Option<TimelineOwner>, Failure> {
    let before = owner(repository, timeline).await?;
    if before.as_ref().is_some_and(|owner| owner.workload == us.workload) {
        return Ok(before);
    }
    let object = RepositoryObject::TimelineOwner(timeline);
    let key = repository.layout().key(&object);
    if let Some((_, error)) = repository.store().delete(std::slice::from_ref(&key)).await?.into_iter().next() {
        return Err(error.into());
    }
    repository.store_json(&object, &us.claim()).await?;
    Ok(before)
}
