//! How the repository grows, for the status and the metrics. Looked at rarely: the listing of a million segments takes a
//! thousand requests.

use std::{sync::Mutex, time::Duration};

use jiff::Timestamp;
use pgsidecar_core::retention::{Growth, Policy, forecast};
use tokio::sync::watch;

use super::gather;
use crate::{failure::Failure, repository::Repository, wal::Origins};

/// How often it's looked.
const LOOK_EVERY: Duration = Duration::from_secs(6 * 3600);
/// How long after the start it's looked first: there is more urgent work.
const FIRST_LOOK: Duration = Duration::from_secs(30);
/// How soon it's tried again when the store was away.
const RETRY: Duration = Duration::from_secs(600);

/// How the repository grows, and what it comes to under this policy.
///
/// # Errors
/// The store's.
pub async fn measure(repository: &Repository, policy: &Policy) -> Result<Growth, Failure> {
    let now = Timestamp::now();
    Ok(forecast(gather::gather(repository, now).await?.measured, policy, now))
}

/// What was found when it was looked last.
#[derive(Default)]
pub struct KnownGrowth(Mutex<Option<Growth>>);

impl KnownGrowth {
    /// What was found, if it has been looked.
    pub fn get(&self) -> Option<Growth> {
        self.0.lock().ok()?.clone()
    }

    /// Looks now and then until the daemon stops.
    pub async fn keep(&self, origins: &impl Origins, policy: &Policy, mut stop: watch::Receiver<bool>) {
        let mut pause = FIRST_LOOK;
        loop {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = stop.wait_for(|stop| *stop) => return,
            }
            let looked = async { measure(&origins.origin().await?.repository, policy).await };
            pause = match looked.await {
                Ok(growth) => {
                    if let Ok(mut known) = self.0.lock() {
                        *known = Some(growth);
                    }
                    LOOK_EVERY
                }
                Err(failure) => {
                    tracing::debug!(%failure, "how the repository grows was not looked at");
                    RETRY
                }
            };
        }
    }

    /// Takes note of what was found otherwise.
    pub fn note(&self, growth: Growth) {
        if let Ok(mut known) = self.0.lock() {
            *known = Some(growth);
        }
    }
}
