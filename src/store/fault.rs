//! A store that fails on purpose: for tests of whatever stands on a store.
//!
//! Faults are decided by a [`FaultPlan`]: scripted ones ("the second creation of a key with `history` in it fails after
//! it took effect"), and random ones from a seed, which fail in the same places in each run as long as the calls come in
//! the same order. A fault *after* is the outcome that a network really has in store: done, and the answer lost.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use pgsidecar_core::{ObjectKey, Sha256Digest};

use super::{
    Body, ByteRange, ConditionalCreation, Creation, Download, ListPage, ListRequest, ObjectInfo, PendingUpload, Store,
    StoreError, StoreErrorKind, Upload,
};

/// An operation of a store, to choose faults by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// [`Store::create`].
    Create,
    /// [`Store::begin`].
    Begin,
    /// [`Upload::write`].
    Write,
    /// [`Upload::finish`].
    Finish,
    /// [`Store::head`].
    Head,
    /// [`Store::get`], and the body that it gives.
    Get,
    /// [`Store::list`]; its key is the prefix.
    List,
    /// [`Store::delete`]; its key is the first one.
    Delete,
    /// [`Store::pending_uploads`] and [`Store::abort_pending`].
    Pending,
    /// [`Store::conditional_creation`]; its key is empty.
    Probe,
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing happens, and this is the error.
    Before(StoreErrorKind),
    /// It's done, and the answer is this error.
    After(StoreErrorKind),
    /// The body breaks off after this many bytes ([`Operation::Get`]).
    Cut(u64),
    /// The byte at this offset of what is read has one bit turned ([`Operation::Get`]).
    Flip(u64),
    /// It takes this much longer.
    Delay(Duration),
    /// Nothing happens, and it never comes back: whoever waits has to be killed.
    NeverBefore,
    /// It's done, and never comes back.
    NeverAfter,
}

#[derive(Debug, Clone)]
struct Rule {
    operation: Option<Operation>,
    key_contains: String,
    skip: u64,
    times: u64,
    fault: Fault,
}

/// Which calls fail, and how. Can be changed while the store is in use: clones share it.
#[derive(Debug, Clone, Default)]
pub struct FaultPlan {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    random: u64,
    chance_before: f64,
    chance_after: f64,
    chance_never: f64,
    rules: Vec<Rule>,
    injected: u64,
}

impl FaultPlan {
    /// Nothing fails.
    pub fn none() -> FaultPlan {
        FaultPlan::default()
    }

    /// Each call fails as `Unavailable` with these probabilities: before it does anything, and after it's done.
    pub fn random(seed: u64, before: f64, after: f64) -> FaultPlan {
        let plan = FaultPlan::none();
        {
            let mut state = plan.lock();
            (state.random, state.chance_before, state.chance_after) = (seed, before, after);
        }
        plan
    }

    /// And with this probability a call never comes back; half of those are done.
    pub fn and_never(self, chance: f64) -> FaultPlan {
        self.lock().chance_never = chance;
        self
    }

    /// The `nth` call (from 1 on) of this operation on a key that contains this text goes wrong.
    pub fn on_nth(self, nth: u64, operation: Operation, key_contains: &str, fault: Fault) -> FaultPlan {
        self.add(Some(operation), key_contains, nth.saturating_sub(1), 1, fault);
        self
    }

    /// Every call of this operation on a key that contains this text goes wrong.
    pub fn always(self, operation: Operation, key_contains: &str, fault: Fault) -> FaultPlan {
        self.add(Some(operation), key_contains, 0, u64::MAX, fault);
        self
    }

    /// Every operation fails from now on, as if the store were gone, until [`FaultPlan::heal`].
    pub fn outage(&self, kind: StoreErrorKind) {
        self.add(None, "", 0, u64::MAX, Fault::Before(kind));
    }

    /// Nothing fails from now on.
    pub fn heal(&self) {
        let mut state = self.lock();
        state.rules.clear();
        (state.chance_before, state.chance_after, state.chance_never) = (0.0, 0.0, 0.0);
    }

    /// How many faults there have been: a test that meant to meet some can tell that it did.
    pub fn injected(&self) -> u64 {
        self.lock().injected
    }

    fn add(&self, operation: Option<Operation>, key_contains: &str, skip: u64, times: u64, fault: Fault) {
        let key_contains = key_contains.to_owned();
        self.lock().rules.push(Rule { operation, key_contains, skip, times, fault });
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The fault of this call, if it has one. Scripted ones come first, in the order in which they were added.
    fn draw(&self, operation: Operation, key: &str) -> Option<Fault> {
        let mut state = self.lock();
        let mut fault = None;
        for rule in &mut state.rules {
            if rule.operation.is_some_and(|only| only != operation) || !key.contains(&rule.key_contains) {
                continue;
            }
            if rule.skip > 0 {
                rule.skip -= 1;
            } else if rule.times > 0 && fault.is_none() {
                rule.times = if rule.times == u64::MAX { u64::MAX } else { rule.times - 1 };
                fault = Some(rule.fault);
            }
        }
        let chances = [state.chance_before, state.chance_after, state.chance_never / 2.0, state.chance_never / 2.0];
        if fault.is_none() && chances.iter().sum::<f64>() > 0.0 {
            let mut drawn = state.next_random();
            let faults = [
                Fault::Before(StoreErrorKind::Unavailable),
                Fault::After(StoreErrorKind::Unavailable),
                Fault::NeverBefore,
                Fault::NeverAfter,
            ];
            fault = faults.into_iter().zip(chances).find_map(|(fault, chance)| {
                let hit = (0.0..chance).contains(&drawn);
                drawn -= chance;
                hit.then_some(fault)
            });
        }
        state.injected += u64::from(fault.is_some());
        fault
    }

    /// Runs a call with the fault that it drew.
    async fn around<T>(
        &self,
        operation: Operation,
        key: &str,
        call: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<(T, Option<Fault>), StoreError> {
        let fault = self.draw(operation, key);
        match fault {
            Some(Fault::Before(kind)) => return Err(injected(kind, key, "before it was done")),
            Some(Fault::Delay(delay)) => tokio::time::sleep(delay).await,
            Some(Fault::NeverBefore) => std::future::pending().await,
            _ => {}
        }
        let result = call.await?;
        match fault {
            Some(Fault::NeverAfter) => std::future::pending().await,
            Some(Fault::After(kind)) => Err(injected(kind, key, "after it was done")),
            fault => Ok((result, fault)),
        }
    }
}

impl State {
    /// SplitMix64 (Steele, Lea and Flood 2014), as a number in [0, 1).
    fn next_random(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        f64::from(u32::try_from(mixed >> 32).unwrap_or(0)) / f64::from(u32::MAX)
    }
}

fn injected(kind: StoreErrorKind, key: &str, when: &str) -> StoreError {
    StoreError::new(kind, "use", key, format!("a fault injected {when}"))
}

/// A store that fails as its plan says, and otherwise is the store that it wraps.
#[derive(Debug)]
pub struct FaultStore<S> {
    store: S,
    plan: FaultPlan,
}

impl<S: Store> FaultStore<S> {
    /// This store with these faults.
    pub fn new(store: S, plan: FaultPlan) -> FaultStore<S> {
        FaultStore { store, plan }
    }

    /// The store beneath: without faults, to look at what really happened.
    pub fn beneath(&self) -> &S {
        &self.store
    }
}

#[async_trait::async_trait]
impl<S: Store> Store for FaultStore<S> {
    fn description(&self) -> String {
        format!("{} with injected faults", self.store.description())
    }

    async fn create(
        &self,
        key: &ObjectKey,
        bytes: Bytes,
        sha256: Option<Sha256Digest>,
    ) -> Result<Creation, StoreError> {
        let call = self.store.create(key, bytes, sha256);
        Ok(self.plan.around(Operation::Create, key.as_str(), call).await?.0)
    }

    async fn begin(&self, key: &ObjectKey) -> Result<Box<dyn Upload>, StoreError> {
        let call = self.store.begin(key);
        let (upload, _) = self.plan.around(Operation::Begin, key.as_str(), call).await?;
        Ok(Box::new(FaultUpload { upload, key: key.clone(), plan: self.plan.clone(), failed: false }))
    }

    async fn head(&self, key: &ObjectKey) -> Result<Option<ObjectInfo>, StoreError> {
        Ok(self.plan.around(Operation::Head, key.as_str(), self.store.head(key)).await?.0)
    }

    async fn get(&self, key: &ObjectKey, range: ByteRange) -> Result<Option<Download>, StoreError> {
        let call = self.store.get(key, range);
        let (found, fault) = self.plan.around(Operation::Get, key.as_str(), call).await?;
        let Some(download) = found else { return Ok(None) };
        let (info, expected) = (download.info.clone(), download.len());
        let body = FaultBody { download, key: key.clone(), fault, passed: 0 };
        Ok(Some(Download::new(key, info, expected, Box::new(body))))
    }

    async fn list(&self, request: &ListRequest) -> Result<ListPage, StoreError> {
        Ok(self.plan.around(Operation::List, &request.prefix, self.store.list(request)).await?.0)
    }

    async fn delete(&self, keys: &[ObjectKey]) -> Result<Vec<(ObjectKey, StoreError)>, StoreError> {
        let first = keys.first().map(ObjectKey::as_str).unwrap_or_default();
        Ok(self.plan.around(Operation::Delete, first, self.store.delete(keys)).await?.0)
    }

    async fn pending_uploads(&self, prefix: &str) -> Result<Vec<PendingUpload>, StoreError> {
        Ok(self.plan.around(Operation::Pending, prefix, self.store.pending_uploads(prefix)).await?.0)
    }

    async fn abort_pending(&self, upload: &PendingUpload) -> Result<(), StoreError> {
        self.plan.around(Operation::Pending, &upload.key, self.store.abort_pending(upload)).await.map(|_| ())
    }

    async fn conditional_creation(&self) -> Result<ConditionalCreation, StoreError> {
        Ok(self.plan.around(Operation::Probe, "", self.store.conditional_creation()).await?.0)
    }
}

struct FaultUpload {
    upload: Box<dyn Upload>,
    key: ObjectKey,
    plan: FaultPlan,
    failed: bool,
}

#[async_trait::async_trait]
impl Upload for FaultUpload {
    async fn write(&mut self, chunk: Bytes) -> Result<(), StoreError> {
        // As the real ones: after a failed write an upload is of no use.
        if self.failed {
            return Err(injected(StoreErrorKind::Unexpected, self.key.as_str(), "into an earlier write"));
        }
        let written = self.plan.around(Operation::Write, self.key.as_str(), self.upload.write(chunk)).await;
        self.failed = written.is_err();
        written.map(|_| ())
    }

    async fn finish(self: Box<Self>) -> Result<Creation, StoreError> {
        if self.failed {
            return Err(injected(StoreErrorKind::Unexpected, self.key.as_str(), "into an earlier write"));
        }
        Ok(self.plan.around(Operation::Finish, self.key.as_str(), self.upload.finish()).await?.0)
    }

    async fn abort(self: Box<Self>) {
        self.upload.abort().await;
    }
}

struct FaultBody {
    download: Download,
    key: ObjectKey,
    fault: Option<Fault>,
    passed: u64,
}

#[async_trait::async_trait]
impl Body for FaultBody {
    async fn next(&mut self) -> Result<Option<Bytes>, StoreError> {
        let Some(mut chunk) = self.download.next().await? else { return Ok(None) };
        let (from, to) = (self.passed, self.passed + chunk.len() as u64);
        self.passed = to;
        match self.fault {
            Some(Fault::Cut(at)) if at <= from => {
                Err(injected(StoreErrorKind::Unavailable, self.key.as_str(), "into the body"))
            }
            Some(Fault::Cut(at)) if at < to => {
                chunk.truncate(usize::try_from(at - from).unwrap_or(0));
                Ok(Some(chunk))
            }
            Some(Fault::Flip(at)) if (from..to).contains(&at) => {
                let mut flipped = BytesMut::from(&chunk[..]);
                if let Some(byte) = usize::try_from(at - from).ok().and_then(|at| flipped.get_mut(at)) {
                    *byte ^= 0x10;
                }
                Ok(Some(flipped.freeze()))
            }
            _ => Ok(Some(chunk)),
        }
    }
}
