//! The metrics, in the OpenMetrics text format; all begin with `pgsidecar_webhook_`.

use std::{fmt, time::Duration};

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::Registry,
};

/// What has become of a request to `/inject`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The pod got something.
    Admitted,
    /// Allowed as it is.
    Unchanged,
    /// The pod wasn't admitted.
    Rejected,
    /// No answer, but an HTTP status: what came was no review, too large, or not there in time.
    Bad,
}

impl EncodeLabelValue for Outcome {
    fn encode(&self, encoder: &mut LabelValueEncoder) -> fmt::Result {
        let text = match self {
            Outcome::Admitted => "admitted",
            Outcome::Unchanged => "unchanged",
            Outcome::Rejected => "rejected",
            Outcome::Bad => "bad",
        };
        text.encode(encoder)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    outcome: Outcome,
}

/// All of them.
pub struct Metrics {
    registry: Registry,
    requests: Family<Labels, Counter>,
    duration: Histogram,
    /// TLS connections that are open.
    pub connections: Gauge,
    /// TLS handshakes that failed or didn't end in time.
    pub handshake_failures: Counter,
    /// When the certificate expires, in seconds since 1970; 0 while there is none.
    pub certificate_expiry: Gauge,
    /// When the CA expires that signs, likewise. Self-managed only.
    pub authority_expiry: Gauge,
    /// Attempts to get or renew the certificate that failed.
    pub certificate_failures: Counter,
    /// 1 while the last such attempt has failed.
    pub certificate_problem: Gauge,
    /// 1 while it stops.
    pub draining: Gauge,
}

impl Default for Metrics {
    fn default() -> Metrics {
        let requests = Family::<Labels, Counter>::default();
        // They are there from the start, so that rates are right from the first one on.
        for outcome in [Outcome::Admitted, Outcome::Unchanged, Outcome::Rejected, Outcome::Bad] {
            let _ = requests.get_or_create(&Labels { outcome });
        }
        let duration = Histogram::new([0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5, 5.0]);
        let mut metrics = Metrics {
            registry: Registry::with_prefix("pgsidecar_webhook"),
            requests,
            duration,
            connections: Gauge::default(),
            handshake_failures: Counter::default(),
            certificate_expiry: Gauge::default(),
            authority_expiry: Gauge::default(),
            certificate_failures: Counter::default(),
            certificate_problem: Gauge::default(),
            draining: Gauge::default(),
        };
        metrics.register();
        metrics
    }
}

impl Metrics {
    fn register(&mut self) {
        let registry = &mut self.registry;
        let version = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "Version of pgsidecar-webhook", version);
        registry.register("requests", "Requests to /inject by what has become of them", self.requests.clone());
        registry.register(
            "request_duration_seconds",
            "Time from a request's head to its answer",
            self.duration.clone(),
        );
        registry.register("connections", "TLS connections that are open", self.connections.clone());
        registry.register(
            "handshake_failures",
            "TLS handshakes that failed: above all, clients that don't trust the certificate",
            self.handshake_failures.clone(),
        );
        registry.register(
            "certificate_expiry_timestamp_seconds",
            "When the certificate expires; 0 while there is none",
            self.certificate_expiry.clone(),
        );
        registry.register(
            "authority_expiry_timestamp_seconds",
            "When our own CA expires; 0 where it isn't our own",
            self.authority_expiry.clone(),
        );
        registry.register(
            "certificate_failures",
            "Attempts to read or renew the certificate, or to mend the caBundle, that failed",
            self.certificate_failures.clone(),
        );
        registry.register(
            "certificate_problem",
            "1 while the last attempt has failed; the log says why",
            self.certificate_problem.clone(),
        );
        registry.register("draining", "1 while it stops", self.draining.clone());
    }

    /// Counts a request.
    pub fn answered(&self, outcome: Outcome, took: Duration) {
        self.requests.get_or_create(&Labels { outcome }).inc();
        self.duration.observe(took.as_secs_f64());
    }

    /// All of them as text.
    ///
    /// # Errors
    /// If one can't be written.
    pub fn render(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}
