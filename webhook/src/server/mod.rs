//! The server: TLS for the API server at one port, probes and metrics in plain HTTP at another.
//!
//! One thread serves, and one more computes answers, one at a time: parsing and writing JSON takes a millisecond, but a
//! pod may be large, and probes are answered meanwhile. Memory is that of one answer. Whoever reaches the port can send what they like (the API server shows no certificate),
//! so connections, bytes in bodies and every wait are bounded: see [`room`], [`activity`] and [`connection`].
//!
//! On SIGTERM or SIGINT `/readyz` turns first and requests are served on for a while, because endpoints notice late;
//! then nothing is accepted any more and what is under way ends, within the drain timeout. A second signal ends the
//! process at once.

pub mod activity;
pub mod admission;
pub mod connection;
pub mod health;
pub mod room;

use std::{io, process::ExitCode, sync::Arc, time::Duration};

use signal_hook::{
    consts::{SIGINT, SIGTERM},
    iterator::Signals,
};
use tokio::{net::TcpListener, sync::watch, task::JoinSet};

use crate::{
    certificates::{
        self, Certificates,
        api::Api,
        files,
        managed::{self, Manager},
        rotation::Periods,
    },
    inject,
    metrics::Metrics,
    settings::{self, Serve},
};
use admission::Injector;

/// How long requests are served after `/readyz` has turned; at most half of the drain timeout.
const NOTICE: Duration = Duration::from_secs(5);

/// Threads beside the one that serves: for answers, and for what else takes time. Each has an arena of memory of its own.
const MAX_BLOCKING_THREADS: usize = 1;

/// What all connections share.
pub struct App {
    /// The certificate.
    pub certificates: Arc<Certificates>,
    /// The metrics.
    pub metrics: Arc<Metrics>,
    /// What is asked of a pod.
    pub injector: Injector,
}

/// The two sockets.
pub struct Listeners {
    /// For the API server.
    pub webhook: TcpListener,
    /// For probes and Prometheus.
    pub health: TcpListener,
}

/// Serves until a signal comes. The program's `serve`.
pub fn run(settings: &Serve, injection: inject::Settings) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(MAX_BLOCKING_THREADS)
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return failed("starting", &error),
    };
    let outcome = runtime.block_on(async {
        let signalled = listen_for_signals()?;
        let bound = Listeners { webhook: bind(settings.listen).await?, health: bind(settings.health_listen).await? };
        let metrics = Arc::new(Metrics::default());
        let certificates = Arc::new(Certificates::new(certificates::system_clock(), metrics.clone()));
        let injector: Injector = Arc::new(move |pod, namespace| inject::inject(pod, namespace, &injection));
        let app = Arc::new(App { certificates: certificates.clone(), metrics, injector });
        let (listen, health_listen) = (bound.webhook.local_addr()?, bound.health.local_addr()?);
        let version = env!("CARGO_PKG_VERSION");
        tracing::info!(version, %listen, %health_listen, "pgsidecar-webhook is up");
        let kept = match &settings.certificates {
            settings::Certificates::Files(directory) => {
                tokio::spawn(files::keep(certificates, directory.clone(), files::POLL))
            }
            settings::Certificates::SelfManaged(names) => {
                let api = Api::in_cluster().map_err(io::Error::other)?;
                let manager = Manager { api, names: names.clone(), periods: Periods::default(), certificates };
                tokio::spawn(manager.keep(managed::POLL))
            }
        };
        serve(app, bound, signalled, settings.drain_timeout).await;
        kept.abort();
        io::Result::Ok(())
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed("starting", &error),
    }
}

fn failed(what: &str, error: &io::Error) -> ExitCode {
    tracing::error!("{what}: {error}");
    ExitCode::FAILURE
}

async fn bind(address: std::net::SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .map_err(|error| io::Error::new(error.kind(), format!("listening at {address}: {error}")))
}

/// Serves until `stopping` says so, then drains: within `drain_timeout`.
pub async fn serve(app: Arc<App>, listeners: Listeners, mut stopping: watch::Receiver<bool>, drain_timeout: Duration) {
    let (stop_webhook, webhook_stops) = watch::channel(false);
    let (stop_health, health_stops) = watch::channel(false);
    let mut webhook = JoinSet::new();
    webhook.spawn(connection::serve_tls(app.clone(), listeners.webhook, webhook_stops));
    let health = tokio::spawn(connection::serve_health(app.clone(), listeners.health, health_stops));

    let _ = stopping.wait_for(|stopping| *stopping).await;
    app.metrics.draining.set(1);
    let notice = NOTICE.min(drain_timeout / 2);
    tracing::info!(?notice, ?drain_timeout, "stopping: a second signal ends it at once");
    let drained = tokio::time::timeout(drain_timeout, async {
        tokio::time::sleep(notice).await;
        stop_webhook.send_replace(true);
        while webhook.join_next().await.is_some() {}
    });
    match drained.await {
        Ok(()) => tracing::info!("stopped"),
        Err(_) => tracing::warn!("stopped before every request under way was answered"),
    }
    stop_health.send_replace(true);
    health.abort();
}

/// The first signal stops in order, the second at once: from a thread of its own, whatever the runtime does.
fn listen_for_signals() -> io::Result<watch::Receiver<bool>> {
    let (signalled, stopping) = watch::channel(false);
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    std::thread::Builder::new().stack_size(64 << 10).spawn(move || {
        for signal in signals.forever() {
            if signalled.send_replace(true) {
                // The usual code of a process that a signal has ended.
                std::process::exit(128 + signal);
            }
        }
    })?;
    Ok(stopping)
}
