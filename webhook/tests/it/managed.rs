//! Certificates from a CA of the webhook's own, kept through an API server's [stand-in](crate::support::api).

use std::{
    collections::BTreeSet,
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use jiff::SignedDuration;
use pgsidecar_webhook::{
    certificates::{Clock, managed::Manager, rotation::Periods, system_clock},
    settings::SelfManaged,
};
use serde_json::json;

use crate::support::{
    Server,
    api::{ApiServer, Fault},
    client::{self, Connection},
    fast_clock, review, until,
};

const POLL: Duration = Duration::from_millis(100);

fn names() -> SelfManaged {
    SelfManaged {
        namespace: "pgsidecar-system".to_owned(),
        secret: "pgsidecar-webhook-ca".to_owned(),
        configuration: "pgsidecar-webhook".to_owned(),
        service: "pgsidecar-webhook".to_owned(),
    }
}

async fn replica(api: &ApiServer, clock: Clock, periods: Periods) -> Server {
    let server = Server::start(clock, Duration::from_secs(1)).await;
    let certificates = server.app.certificates.clone();
    let manager = Manager { api: api.api.clone(), names: names(), periods, certificates };
    tokio::spawn(manager.keep(POLL));
    server
}

async fn asked(api: &ApiServer, server: &Server, clock: &Clock, late: Duration) -> Result<(), String> {
    let tls = client::trusting(&api.bundle(late), clock, &["h2"]);
    let answer = Connection::open(server.address, &tls).await?.review(&review("u")).await?;
    if answer["response"]["allowed"] == true { Ok(()) } else { Err(answer.to_string()) }
}

#[tokio::test]
async fn two_replicas_begin_with_one_ca() {
    let api = ApiServer::start().await;
    let (one, other) = tokio::join!(
        replica(&api, system_clock(), Periods::default()),
        replica(&api, system_clock(), Periods::default())
    );
    one.ready().await;
    other.ready().await;
    asked(&api, &one, &system_clock(), Duration::ZERO).await.unwrap();
    asked(&api, &other, &system_clock(), Duration::ZERO).await.unwrap();
    assert_eq!(api.bundle(Duration::ZERO).matches("BEGIN CERTIFICATE").count(), 1);
    let state = api.state.lock().unwrap();
    assert_eq!(state.patches, 1);
    let secret = state.secret.as_ref().unwrap();
    assert_eq!(secret["metadata"]["labels"], json!({"kept": "yes"}));
    assert_eq!(secret["data"]["ca.crt"], state.configuration["webhooks"][1]["clientConfig"]["caBundle"]);
    assert_eq!(
        state.configuration["webhooks"][0],
        json!({"name": "other.example.org", "clientConfig": {"url": "https://other", "caBundle": "b3RoZXI="}})
    );
}

/// Both replicas' clocks differ, API servers notice a new `caBundle` late, clients connect anew for each request:
/// none fails while the CA is rotated twice and leaves are renewed all the time.
#[tokio::test]
async fn no_request_fails_while_the_ca_is_rotated() {
    // Thirty seconds in one.
    let periods = Periods {
        authority: SignedDuration::from_secs(360),
        leaf: SignedDuration::from_secs(90),
        propagation: SignedDuration::from_secs(45),
        margin: SignedDuration::from_secs(30),
        backdate: SignedDuration::from_secs(30),
    };
    let api = Arc::new(ApiServer::start().await);
    let clock = fast_clock(30, 0);
    let servers =
        Arc::new([replica(&api, fast_clock(30, 6), periods).await, replica(&api, fast_clock(30, -6), periods).await]);
    for server in servers.iter() {
        server.ready().await;
    }
    // What is late by now has seen it by then.
    let latest = Duration::from_millis(700);
    tokio::time::sleep(latest).await;
    let (done, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..8_u32 {
        let (api, servers, clock) = (api.clone(), servers.clone(), clock.clone());
        let (done, answered) = (done.clone(), answered.clone());
        clients.spawn(async move {
            let late = latest * (client / 2) / 3;
            while !done.load(Relaxed) {
                let outcome = asked(&api, &servers[client as usize % 2], &clock, late).await;
                outcome.unwrap_or_else(|error| panic!("late by {late:?}: {error}\n{:#?}", api.bundles()));
                answered.fetch_add(1, Relaxed);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
    }
    let (mut leaves, mut removed) = (BTreeSet::new(), 0);
    for _ in 0..1200 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        leaves.extend(servers.iter().map(|server| server.app.certificates.loaded().unwrap().key.cert[0].to_vec()));
        let sizes = api.bundles().iter().map(|bundle| bundle.matches("BEGIN").count()).collect::<Vec<_>>();
        removed = sizes.windows(2).filter(|pair| pair[1] < pair[0]).count();
        if removed >= 2 || clients.try_join_next().is_some() {
            break;
        }
    }
    done.store(true, Relaxed);
    clients.join_all().await;
    assert_eq!(removed, 2, "rotations");
    assert!(leaves.len() >= 8, "{} leaves", leaves.len());
    assert!(answered.load(Relaxed) > 200, "{answered:?} requests");
    // Nothing flaps: each bundle has one CA more or one less than the one before, and none is there twice.
    let bundles = api.bundles();
    assert_eq!(bundles.iter().collect::<BTreeSet<_>>().len(), bundles.len());
    assert_eq!(servers.iter().map(|server| server.app.metrics.handshake_failures.get()).sum::<u64>(), 0);
}

#[tokio::test]
async fn a_bundle_that_was_emptied_is_mended() {
    let api = ApiServer::start().await;
    let server = replica(&api, system_clock(), Periods::default()).await;
    server.ready().await;
    let (bundle, leaf) = (api.bundle(Duration::ZERO), server.app.certificates.loaded().unwrap());
    for other in ["", "-----BEGIN CERTIFICATE-----\nbroken\n-----END CERTIFICATE-----\n", "text"] {
        api.set_bundle(other);
        until("it is mended", async || api.bundle(Duration::ZERO) == bundle).await;
    }
    assert!(Arc::ptr_eq(&server.app.certificates.loaded().unwrap().key, &leaf.key));
    asked(&api, &server, &system_clock(), Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn what_the_bundle_trusted_before_is_kept_when_the_secret_was_emptied() {
    let api = ApiServer::start().await;
    let server = replica(&api, system_clock(), Periods::default()).await;
    server.ready().await;
    let before = api.bundle(Duration::ZERO);
    api.state.lock().unwrap().secret.as_mut().unwrap()["data"] = json!({});
    api.state.lock().unwrap().secret.as_mut().unwrap()["metadata"]["resourceVersion"] = "other".into();
    until("both are in the bundle", async || {
        let now = api.bundle(Duration::ZERO);
        now.starts_with(&before) && now.matches("BEGIN CERTIFICATE").count() == 2
    })
    .await;
    // The leaf in use is still that of the old one.
    asked(&api, &server, &system_clock(), Duration::ZERO).await.unwrap();
    // And a replica that comes now has one at once.
    let late = replica(&api, system_clock(), Periods::default()).await;
    late.ready().await;
    asked(&api, &late, &system_clock(), Duration::ZERO).await.unwrap();
}

/// `kubectl replace` of the manifests, or Argo CD's `Replace=true`.
#[tokio::test]
async fn secret_and_bundle_wiped_together_are_mended_without_an_interruption() {
    let api = ApiServer::start().await;
    let server = replica(&api, system_clock(), Periods::default()).await;
    server.ready().await;
    let (before, leaf) = (api.bundle(Duration::ZERO), server.app.certificates.loaded().unwrap());
    api.replace_both(json!({}));
    until("both CAs are in the bundle", async || {
        let now = api.bundle(Duration::ZERO);
        now.starts_with(&before) && now.matches("BEGIN CERTIFICATE").count() == 2
    })
    .await;
    assert!(Arc::ptr_eq(&server.app.certificates.loaded().unwrap().key, &leaf.key));
    asked(&api, &server, &system_clock(), Duration::ZERO).await.unwrap();
    // One that comes now is served by the new CA, which is trusted as well.
    let late = replica(&api, system_clock(), Periods::default()).await;
    late.ready().await;
    asked(&api, &late, &system_clock(), Duration::ZERO).await.unwrap();
}

/// The Secret is another's, such as one from a backup: the leaf's CA is in neither object.
#[tokio::test]
async fn a_leaf_that_nobody_trusts_is_replaced_at_once() {
    let (api, other) = (ApiServer::start().await, ApiServer::start().await);
    replica(&other, system_clock(), Periods::default()).await.ready().await;
    let server = replica(&api, system_clock(), Periods::default()).await;
    server.ready().await;
    let data = other.state.lock().unwrap().secret.as_ref().unwrap()["data"].clone();
    api.replace_both(data);
    until("it is trusted", async || asked(&api, &server, &system_clock(), Duration::ZERO).await.is_ok()).await;
}

#[tokio::test]
async fn while_the_api_server_fails_it_serves_on_and_says_so() {
    let api = ApiServer::start().await;
    let server = replica(&api, system_clock(), Periods::default()).await;
    server.ready().await;
    for (fault, of) in
        [(Fault::Status(500), ""), (Fault::Status(403), "GET /api/v1"), (Fault::Status(409), "GET"), (Fault::Break, "")]
    {
        api.fail(fault, of);
        until("it is told", async || server.app.metrics.certificate_problem.get() == 1).await;
        asked(&api, &server, &system_clock(), Duration::ZERO).await.unwrap();
        assert_eq!(server.probe("/readyz").await.0, 200);
        api.fail(Fault::None, "");
        until("it is well again", async || server.app.metrics.certificate_problem.get() == 0).await;
    }
    // Silence is noticed later than this test lasts; requests don't wait for it.
    api.fail(Fault::Silence, "");
    tokio::time::sleep(3 * POLL).await;
    asked(&api, &server, &system_clock(), Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn without_its_secret_it_waits_and_another_content_is_left_alone() {
    let api = ApiServer::start().await;
    let secret = api.state.lock().unwrap().secret.take();
    let server = replica(&api, system_clock(), Periods::default()).await;
    until("it is told", async || server.app.metrics.certificate_problem.get() == 1).await;
    assert_eq!(server.probe("/readyz").await.0, 503);
    for content in ["[]x", "[{\"certificate\":\"none\"}]", "{}"] {
        let mut other = secret.clone().unwrap();
        other["data"] = json!({"authorities.json": STANDARD.encode(content)});
        api.state.lock().unwrap().secret = Some(other.clone());
        tokio::time::sleep(5 * POLL).await;
        assert_eq!(api.state.lock().unwrap().secret.as_ref(), Some(&other));
    }
    assert_eq!(server.probe("/readyz").await.0, 503);
    api.state.lock().unwrap().secret = secret;
    server.ready().await;
    assert_eq!(server.app.metrics.certificate_problem.get(), 0);
}

/// As when a database has to come up at once, and where manifests are applied in waves.
#[tokio::test]
async fn without_its_configuration_it_is_ready_and_says_so() {
    let api = ApiServer::start().await;
    api.fail(Fault::Status(404), "GET /apis/admissionregistration.k8s.io");
    let one = replica(&api, system_clock(), Periods::default()).await;
    one.ready().await;
    let other = replica(&api, system_clock(), Periods::default()).await;
    other.ready().await;
    for server in [&one, &other] {
        until("it is told", async || server.app.metrics.certificate_problem.get() == 1).await;
    }
    // It comes, and trusts what is served.
    api.fail(Fault::None, "");
    for server in [&one, &other] {
        until("it is well", async || server.app.metrics.certificate_problem.get() == 0).await;
        asked(&api, server, &system_clock(), Duration::ZERO).await.unwrap();
    }
    assert_eq!(api.bundle(Duration::ZERO).matches("BEGIN CERTIFICATE").count(), 1);
    // It goes, and one that comes meanwhile has a certificate of the same CA.
    api.fail(Fault::Status(404), "GET /apis/admissionregistration.k8s.io");
    let late = replica(&api, system_clock(), Periods::default()).await;
    late.ready().await;
    asked(&api, &late, &system_clock(), Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn the_token_is_read_anew() {
    let api = ApiServer::start().await;
    let server = replica(&api, system_clock(), Periods::default()).await;
    server.ready().await;
    api.state.lock().unwrap().token = "second".to_owned();
    until("the old one is refused", async || server.app.metrics.certificate_problem.get() == 1).await;
    fs::write(api.account.path().join("token"), "second").unwrap();
    until("the new one is taken", async || server.app.metrics.certificate_problem.get() == 0).await;
}

#[tokio::test]
async fn an_api_server_that_is_not_trusted_is_not_told_the_token() {
    let api = ApiServer::start().await;
    fs::write(api.account.path().join("ca.crt"), crate::support::pki::Ca::new().pem()).unwrap();
    let error = api.api.get(crate::support::api::SECRET).await.unwrap_err().to_string();
    assert!(error.contains("invalid peer certificate"), "{error}");
}
