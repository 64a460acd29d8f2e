//! The one snapshot that can be open: who holds it, and what ends it.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, Ordering::Relaxed},
    },
    time::Duration,
};

use jiff::Timestamp;
use pgsidecar_core::{SnapshotId, SnapshotRecord};
use tokio::{sync::watch, task::AbortHandle};

use super::{Begun, OpenSnapshot, SnapshotRequest, check_request, unusable};
use crate::{
    failure::{Code, Failure},
    pgdata::DataDirectory,
    repository::Repository,
    settings::WorkSettings,
};

/// How many snapshots that were given up are remembered, with the reason.
const REMEMBERED: usize = 20;
/// The second of the last id that this process has given.
static LAST_ID: AtomicI64 = AtomicI64::new(0);

type Ended = Option<Result<SnapshotRecord, Failure>>;

/// The snapshot that is open, and those that were given up since the daemon's start.
pub struct Snapshots {
    state: Mutex<State>,
    stopping: watch::Sender<bool>,
}

#[derive(Default)]
struct State {
    slot: Slot,
    given_up: VecDeque<(SnapshotId, String)>,
}

#[derive(Default)]
enum Slot {
    #[default]
    Free,
    /// PostgreSQL makes its checkpoint.
    Beginning,
    /// The storage may snapshot.
    Open(Box<Open>),
    /// `end` was called.
    Ending(SnapshotId, watch::Receiver<Ended>),
}

struct Open {
    begun: Begun,
    watcher: Watcher,
}

/// The task that waits for the time limit and for the session's end.
struct Watcher(AbortHandle);

impl Drop for Watcher {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Frees the slot if `begin` doesn't come to its end, e.g. because the caller went away.
struct Reservation<'a>(&'a Snapshots);

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        if matches!(state.slot, Slot::Beginning) {
            state.slot = Slot::Free;
        }
    }
}

/// An id that no snapshot has: that of this second, or of the next that is free.
pub(super) async fn free_id(repository: &Repository) -> Result<SnapshotId, Failure> {
    loop {
        let second = Timestamp::now().as_second().max(LAST_ID.load(Relaxed) + 1);
        LAST_ID.store(second, Relaxed);
        let id = SnapshotId::new(Timestamp::from_second(second).map_err(Failure::internal)?);
        if repository.snapshot(id).await?.is_none() {
            return Ok(id);
        }
    }
}

impl Default for Snapshots {
    fn default() -> Snapshots {
        Snapshots { state: Mutex::default(), stopping: watch::Sender::new(false) }
    }
}

impl Snapshots {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is one assignment: a panic leaves nothing half-done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a snapshot: returns when the checkpoint is through and the storage may snapshot.
    ///
    /// # Errors
    /// [`Code::Busy`] if one is open; what keeps PostgreSQL from it. Nothing is open then.
    ///
    /// # Cancellation
    /// Dropped, nothing is open.
    pub async fn begin(
        self: &Arc<Self>,
        repository: Repository,
        pgdata: DataDirectory,
        settings: &WorkSettings,
        request: SnapshotRequest,
    ) -> Result<OpenSnapshot, Failure> {
        check_request(&request)?;
        let timeout = request.timeout;
        let _reservation = self.reserve()?;
        let begun = tokio::select! {
            begun = Begun::begin(repository, pgdata, settings, request) => begun?,
            () = self.stopped() => return Err(Failure::new(Code::Stopping, "pgsidecar is stopping")),
        };
        let mut state = self.lock();
        if *self.stopping.borrow() {
            return Err(Failure::new(Code::Stopping, "pgsidecar is stopping"));
        }
        let told = begun.told.clone();
        let watcher = Watcher(tokio::spawn(self.clone().watch(told.id, begun.session.clone(), timeout)).abort_handle());
        state.slot = Slot::Open(Box::new(Open { begun, watcher }));
        Ok(told)
    }

    fn reserve(&self) -> Result<Reservation<'_>, Failure> {
        let mut state = self.lock();
        let busy = match &state.slot {
            Slot::Free => {
                state.slot = Slot::Beginning;
                return Ok(Reservation(self));
            }
            Slot::Beginning => "a snapshot is just being begun".to_owned(),
            Slot::Open(open) => {
                let OpenSnapshot { id, label, expires_at, .. } = &open.begun.told;
                format!("snapshot {id} ({label}) is open, until {expires_at} at the latest")
            }
            Slot::Ending(id, _) => format!("snapshot {id} is just being ended"),
        };
        Err(Failure::new(Code::Busy, busy).hint("End it, or give it up with 'pgsidecar snapshot abort ID'."))
    }

    async fn stopped(&self) {
        let mut stopping = self.stopping.subscribe();
        let _ = stopping.wait_for(|stopping| *stopping).await;
    }

    /// Gives a snapshot up when its time is up or its session has ended.
    async fn watch(self: Arc<Self>, id: SnapshotId, session: Arc<crate::postgres::Session>, timeout: Duration) {
        let why = tokio::select! {
            () = tokio::time::sleep(timeout) => format!("its time limit of {timeout:?} ran out"),
            () = session.closed() => "the session with PostgreSQL ended: the server stopped, restarted or crashed".to_owned(),
        };
        drop(session);
        tracing::error!(snapshot = %id, "snapshot given up: {why}");
        self.give_up(id, why);
    }

    /// Closes the session of the open snapshot, if it's this one: PostgreSQL forgets the backup then.
    fn give_up(&self, id: SnapshotId, why: String) -> Option<OpenSnapshot> {
        let mut state = self.lock();
        match std::mem::take(&mut state.slot) {
            Slot::Open(open) if open.begun.told.id == id => {
                state.remember(id, why);
                Some(open.begun.told)
            }
            other => {
                state.slot = other;
                None
            }
        }
    }

    /// Ends a snapshot: returns when it is complete. Asked again, answers the same.
    ///
    /// # Errors
    /// Why what the storage has snapshotted must not be used.
    ///
    /// # Cancellation
    /// Dropped, it is ended all the same.
    pub async fn end(self: &Arc<Self>, id: SnapshotId, repository: &Repository) -> Result<SnapshotRecord, Failure> {
        let Some(mut ended) = self.start_ending(id) else {
            return match repository.snapshot(id).await? {
                Some(record) => Ok(record),
                None => Err(self.not_open(id)),
            };
        };
        let outcome = ended.wait_for(Option::is_some).await.ok().and_then(|outcome| (*outcome).clone());
        outcome.unwrap_or_else(|| Err(unusable(id, Failure::internal("ending it broke off"))))
    }

    /// Takes the open snapshot out of its slot; or joins in where it's being ended.
    fn start_ending(self: &Arc<Self>, id: SnapshotId) -> Option<watch::Receiver<Ended>> {
        let mut state = self.lock();
        let open = match std::mem::take(&mut state.slot) {
            Slot::Open(open) if open.begun.told.id == id => open,
            other => {
                state.slot = other;
                let Slot::Ending(ending, ended) = &state.slot else { return None };
                return (*ending == id).then(|| ended.clone());
            }
        };
        let Open { begun, watcher } = *open;
        drop(watcher);
        let (sender, ended) = watch::channel(None);
        state.slot = Slot::Ending(id, ended.clone());
        drop(state);
        let snapshots = self.clone();
        tokio::spawn(async move {
            // In a task of its own, so that a panic ends it instead of leaving the slot taken for ever.
            let ending = tokio::spawn({
                let snapshots = snapshots.clone();
                async move { begun.end(snapshots.stopped()).await }
            });
            let outcome = ending.await.unwrap_or_else(|panic| Err(panic.into()));
            let mut state = snapshots.lock();
            state.slot = Slot::Free;
            if let Err(failure) = &outcome {
                tracing::error!(snapshot = %id, hint = failure.hint, "snapshot failed: {failure}");
                state.remember(id, failure.message.clone());
            }
            sender.send_replace(Some(outcome.map_err(|failure| unusable(id, failure))));
        });
        Some(ended)
    }

    /// What is said of a snapshot that is neither open nor complete.
    fn not_open(&self, id: SnapshotId) -> Failure {
        let state = self.lock();
        let why = match state.given_up.iter().find(|(given_up, _)| *given_up == id) {
            Some((_, why)) => why.clone(),
            None => "it isn't open here. pgsidecar was restarted since, or it never began".to_owned(),
        };
        unusable(id, Failure::new(Code::NotFound, why))
    }

    /// Gives the open snapshot up because somebody wants it.
    ///
    /// # Errors
    /// [`Code::NotFound`] if it isn't open.
    pub fn abort(&self, id: SnapshotId) -> Result<OpenSnapshot, Failure> {
        let aborted = self.give_up(id, "it was aborted".to_owned());
        let aborted = aborted.ok_or_else(|| {
            Failure::new(Code::NotFound, format!("snapshot {id} isn't open"))
                .hint("'pgsidecar snapshot list' shows which one is, and which are complete.")
        })?;
        tracing::info!(snapshot = %id, "snapshot aborted");
        Ok(aborted)
    }

    /// The snapshot that is open.
    pub fn open(&self) -> Option<OpenSnapshot> {
        match &self.lock().slot {
            Slot::Open(open) => Some(open.begun.told.clone()),
            _ => None,
        }
    }

    /// Gives up what is open, and waits until what is being ended has ended.
    pub async fn stop(&self) {
        self.stopping.send_replace(true);
        let ending = {
            let state = self.lock();
            match &state.slot {
                Slot::Ending(_, ended) => Some(ended.clone()),
                _ => None,
            }
        };
        if let Some(told) = self.open() {
            tracing::error!(snapshot = %told.id, "snapshot given up: pgsidecar is stopping");
            self.give_up(told.id, "pgsidecar was stopped".to_owned());
        }
        if let Some(mut ending) = ending {
            let _ = ending.wait_for(Option::is_some).await;
        }
    }
}

impl State {
    fn remember(&mut self, id: SnapshotId, why: String) {
        self.given_up.push_back((id, why));
        if self.given_up.len() > REMEMBERED {
            self.given_up.pop_front();
        }
    }
}
