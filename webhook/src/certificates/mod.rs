//! The certificate that new TLS connections get.
//!
//! It comes from [`files`], or from a CA of our own ([`managed`]). Either keeps it current by calling
//! [`Certificates::install`]; a handshake takes what is there at that moment. What can't be read or renewed is said
//! once, counted, and leaves the certificate that is there in use.

pub mod api;
pub mod authority;
pub mod files;
pub mod managed;
pub mod rotation;
pub mod x509;

use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

use jiff::Timestamp;
use rustls::{
    crypto::{CryptoProvider, ring},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};

use crate::metrics::Metrics;
use x509::Validity;

/// What tells the time. Tests have another one.
pub type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// The machine's clock.
pub fn system_clock() -> Clock {
    Arc::new(Timestamp::now)
}

/// The TLS implementation: there is one, said wherever rustls asks.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// A certificate with its key, and until when it can be used.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// What TLS needs.
    pub key: Arc<CertifiedKey>,
    /// From when to when it is valid.
    pub validity: Validity,
}

/// The certificate in use, shared by who keeps it current and who serves it.
pub struct Certificates {
    loaded: RwLock<Option<Loaded>>,
    /// What was wrong last, as it was said.
    problem: RwLock<Option<String>>,
    clock: Clock,
    metrics: Arc<Metrics>,
}

impl Certificates {
    /// None yet.
    pub fn new(clock: Clock, metrics: Arc<Metrics>) -> Certificates {
        Certificates { loaded: RwLock::default(), problem: RwLock::default(), clock, metrics }
    }

    /// The time.
    pub fn now(&self) -> Timestamp {
        (self.clock)()
    }

    /// The metrics.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The certificate in use.
    pub fn loaded(&self) -> Option<Loaded> {
        self.loaded.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// New connections get this one from now on.
    pub fn install(&self, loaded: Loaded) {
        self.metrics.certificate_expiry.set(loaded.validity.not_after.as_second());
        *self.loaded.write().unwrap_or_else(PoisonError::into_inner) = Some(loaded);
    }

    /// Notes that the certificate could not be read or renewed. The same problem is said once.
    pub fn failed(&self, problem: impl fmt::Display, hint: &str) {
        self.metrics.certificate_failures.inc();
        self.metrics.certificate_problem.set(1);
        let problem = problem.to_string();
        let mut last = self.problem.write().unwrap_or_else(PoisonError::into_inner);
        if last.as_ref() == Some(&problem) {
            return;
        }
        let still = if self.loaded().is_some() { "; the one that is there stays in use" } else { "" };
        tracing::error!(hint, "certificate: {problem}{still}");
        *last = Some(problem);
    }

    /// Notes that all is well.
    pub fn succeeded(&self) {
        self.metrics.certificate_problem.set(0);
        if self.problem.write().unwrap_or_else(PoisonError::into_inner).take().is_some() {
            tracing::info!("certificate: well again");
        }
    }

    /// Why requests can't be served.
    pub fn not_ready(&self) -> Option<String> {
        match self.loaded() {
            None => Some("there is no certificate yet".to_owned()),
            Some(loaded) if loaded.validity.not_after <= self.now() => {
                Some(format!("the certificate has expired at {}", loaded.validity.not_after))
            }
            Some(loaded) if self.now() < loaded.validity.not_before => {
                Some(format!("the certificate is valid only from {} on", loaded.validity.not_before))
            }
            Some(_) => None,
        }
    }
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificates").field("loaded", &self.loaded()).finish_non_exhaustive()
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.loaded().map(|loaded| loaded.key)
    }
}
