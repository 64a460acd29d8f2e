//! Requests that are served once: `<cluster>/requests/<id>.json` before a request is begun, `<id>.served.json` when what
//! it asked for is in the data directory. Both are created once and never change.

use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;
use pgsidecar_core::{
    BackupId, ClusterName, Layout, ObjectKey, Sha256Digest, SystemIdentifier, TimelineId,
    prepare::{RequestId, RequestState},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    failure::{Code, Failure},
    repository::damaged,
    store::{ByteRange, Creation, Store},
};

const MOST_BYTES: u64 = 64 << 10;

/// `<id>.json`: who has begun a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestClaim {
    /// The layout's version.
    pub format: u32,
    /// The request.
    pub id: String,
    /// What it asks for, in words.
    pub what: String,
    /// The server: `NAMESPACE/WORKLOAD`, or `HOST:PGDATA`.
    pub claimed_by: String,
    /// When.
    pub claimed_at: Timestamp,
    /// The database that is restored.
    pub system_identifier: Option<SystemIdentifier>,
    /// The newest timeline that it had then. What the request restores begins a newer one.
    pub newest_timeline: Option<TimelineId>,
}

/// `<id>.served.json`: what has come of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestServed {
    /// The layout's version.
    pub format: u32,
    /// The request.
    pub id: String,
    /// The server.
    pub served_by: String,
    /// When.
    pub served_at: Timestamp,
    /// The database in the data directory then.
    pub system_identifier: Option<SystemIdentifier>,
    /// The backup that was restored. Not known where it was noted only at the next start.
    pub backup: Option<BackupId>,
}

/// One request in a repository.
pub struct Request {
    store: Arc<dyn Store>,
    cluster: ClusterName,
    id: RequestId,
    what: String,
    server: String,
}

impl Request {
    /// This request, as `server` sees it.
    pub fn new(store: Arc<dyn Store>, cluster: ClusterName, id: RequestId, what: String, server: String) -> Request {
        Request { store, cluster, id, what, server }
    }

    /// Its id.
    pub fn id(&self) -> &RequestId {
        &self.id
    }

    /// What it asks for.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// How far it has come.
    ///
    /// # Errors
    /// The store's; [`Code::Damaged`] if a record can't be read.
    pub async fn state(&self) -> Result<RequestState, Failure> {
        let claim: Option<RequestClaim> = self.read(&Layout::request(&self.cluster, &self.id)).await?;
        let served: Option<RequestServed> = self.read(&Layout::served_request(&self.cluster, &self.id)).await?;
        Ok(match (claim, served) {
            (claim, Some(served)) => RequestState::Served {
                by: served.served_by,
                at: served.served_at,
                newest_timeline: claim.and_then(|claim| claim.newest_timeline),
            },
            (None, None) => RequestState::Unclaimed,
            (Some(claim), None) if claim.claimed_by != self.server => RequestState::Others(claim.claimed_by),
            (Some(claim), None) if claim.what != self.what => RequestState::OursOtherwise(claim.what),
            (Some(claim), None) => {
                RequestState::Ours { system: claim.system_identifier, newest_timeline: claim.newest_timeline }
            }
        })
    }

    /// Begins it. That it was begun by this server before, and with the same words, is no failure.
    ///
    /// # Errors
    /// [`Code::Conflict`] if another was faster; the store's.
    pub async fn claim(&self, system: SystemIdentifier, newest_timeline: Option<TimelineId>) -> Result<(), Failure> {
        let claim = RequestClaim {
            format: 1,
            id: self.id.to_string(),
            what: self.what.clone(),
            claimed_by: self.server.clone(),
            claimed_at: Timestamp::now(),
            system_identifier: Some(system),
            newest_timeline,
        };
        if self.create(&Layout::request(&self.cluster, &self.id), &claim).await? == Creation::Created {
            return Ok(());
        }
        match self.state().await? {
            RequestState::Ours { .. } => Ok(()),
            _ => Err(Failure::new(Code::Conflict, format!("request {} has been begun by another server", self.id))
                .hint("Nothing was changed. Give the request another id if that server runs no more.")),
        }
    }

    /// Notes that it's done. Once it's noted, nothing changes any more.
    ///
    /// # Errors
    /// The store's.
    pub async fn served(
        &self,
        system_identifier: Option<SystemIdentifier>,
        backup: Option<BackupId>,
    ) -> Result<(), Failure> {
        let served = RequestServed {
            format: 1,
            id: self.id.to_string(),
            served_by: self.server.clone(),
            served_at: Timestamp::now(),
            system_identifier,
            backup,
        };
        self.create(&Layout::served_request(&self.cluster, &self.id), &served).await.map(|_| ())
    }

    async fn create(&self, key: &ObjectKey, record: &impl Serialize) -> Result<Creation, Failure> {
        let mut json = serde_json::to_vec_pretty(record).map_err(Failure::internal)?;
        json.push(b'\n');
        let sha256 = Sha256Digest::of(&json);
        Ok(self.store.create(key, Bytes::from(json), Some(sha256)).await?)
    }

    async fn read<T: DeserializeOwned>(&self, key: &ObjectKey) -> Result<Option<T>, Failure> {
        let Some(download) = self.store.get(key, ByteRange::All).await? else { return Ok(None) };
        let json = download.bytes(MOST_BYTES).await?;
        serde_json::from_slice(&json).map(Some).map_err(|error| damaged(key.as_str(), &error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;

    const SYSTEM: SystemIdentifier = SystemIdentifier::new(71);

    fn request(store: &MemoryStore, what: &str, server: &str) -> Request {
        let cluster = "shop/orders".parse().unwrap();
        Request::new(Arc::new(store.clone()), cluster, "a".parse().unwrap(), what.to_owned(), server.to_owned())
    }

    #[tokio::test]
    async fn one_server_serves_a_request_once() {
        let store = MemoryStore::new();
        let ours = request(&store, "LSN 0/1", "shop/orders");
        let others = request(&store, "LSN 0/1", "shop/other");
        assert_eq!(ours.state().await.unwrap(), RequestState::Unclaimed);
        ours.claim(SYSTEM, TimelineId::new(3)).await.unwrap();
        // Killed and started again.
        ours.claim(SYSTEM, TimelineId::new(3)).await.unwrap();
        let begun = RequestState::Ours { system: Some(SYSTEM), newest_timeline: TimelineId::new(3) };
        assert_eq!(ours.state().await.unwrap(), begun);
        assert_eq!(others.state().await.unwrap(), RequestState::Others("shop/orders".to_owned()));
        assert_eq!(others.claim(SYSTEM, None).await.unwrap_err().code, Code::Conflict);
        let changed = request(&store, "LSN 0/2", "shop/orders");
        assert_eq!(changed.state().await.unwrap(), RequestState::OursOtherwise("LSN 0/1".to_owned()));
        assert_eq!(changed.claim(SYSTEM, None).await.unwrap_err().code, Code::Conflict);

        ours.served(None, None).await.unwrap();
        ours.served(None, None).await.unwrap();
        for any in [ours, others, changed] {
            let state = any.state().await.unwrap();
            let RequestState::Served { by, newest_timeline, .. } = state else { panic!("{state:?}") };
            assert_eq!((by.as_str(), newest_timeline), ("shop/orders", TimelineId::new(3)));
        }
    }
}
