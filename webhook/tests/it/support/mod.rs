//! What the tests share: a server in this process, clients that trust what they are told, and an API server's stand-in.

pub mod api;
pub mod client;
pub mod pki;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use jiff::Timestamp;
use pgsidecar_webhook::{
    certificates::{Certificates, Clock},
    inject::{Injection, Operation},
    metrics::Metrics,
    server::{self, App, Listeners},
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};

/// The name by which the API server calls the webhook.
pub const NAME: &str = "pgsidecar-webhook.pgsidecar-system.svc";

/// A clock that runs `factor` times as fast as the machine's, and is ahead of it by `ahead` seconds.
pub fn fast_clock(factor: i32, ahead: i64) -> Clock {
    let begin = Timestamp::now();
    let began = std::time::Instant::now();
    Arc::new(move || {
        let passed = jiff::SignedDuration::try_from(began.elapsed()).unwrap() * factor;
        begin + passed + jiff::SignedDuration::from_secs(ahead)
    })
}

/// A namespace for whose pods the injector takes longer than the time limit.
pub const SLOW: &str = "slow";

/// A server whose injector adds one annotation.
pub struct Server {
    pub address: SocketAddr,
    pub health: SocketAddr,
    pub app: Arc<App>,
    stop: watch::Sender<bool>,
    served: JoinHandle<()>,
}

impl Server {
    pub async fn start(clock: Clock, drain_timeout: Duration) -> Server {
        let metrics = Arc::new(Metrics::default());
        let certificates = Arc::new(Certificates::new(clock, metrics.clone()));
        let injector = Arc::new(|_: &Value, namespace: &str| {
            if namespace == SLOW {
                std::thread::sleep(Duration::from_secs(6));
            }
            let value = json!({ "namespace": namespace });
            let patch = vec![Operation::Add { path: "/metadata/annotations".to_owned(), value }];
            Ok(Injection { patch, ..Injection::default() })
        });
        let app = Arc::new(App { certificates, metrics, injector });
        let webhook = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let health = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, health_address) = (webhook.local_addr().unwrap(), health.local_addr().unwrap());
        let (stop, stopping) = watch::channel(false);
        let served = tokio::spawn(server::serve(app.clone(), Listeners { webhook, health }, stopping, drain_timeout));
        Server { address, health: health_address, app, stop, served }
    }

    /// As a signal does.
    pub fn stop(&self) {
        self.stop.send_replace(true);
    }

    /// Returns when it has stopped.
    pub async fn stopped(self) {
        self.served.await.unwrap();
    }

    /// Status and text of a plain GET at the port for probes.
    pub async fn probe(&self, path: &str) -> (u16, String) {
        client::plain_get(self.health, path).await
    }

    /// Waits until it's ready.
    pub async fn ready(&self) {
        until("ready", async || self.probe("/readyz").await.0 == 200).await;
    }
}

/// Waits up to 10 s for something to come true.
pub async fn until(what: &str, mut is: impl AsyncFnMut() -> bool) {
    for _ in 0..500 {
        if is().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("this didn't come true: {what}");
}

/// A question of the API server's.
pub fn review(uid: &str) -> Value {
    json!({
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {
            "uid": uid,
            "kind": {"group": "", "version": "v1", "kind": "Pod"},
            "namespace": "shop",
            "operation": "CREATE",
            "object": {"metadata": {"name": "db-0"}, "spec": {"containers": [{"name": "postgres"}]}},
        }
    })
}
