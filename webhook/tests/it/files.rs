//! Certificates from files, as cert-manager and the kubelet bring them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use pgsidecar_webhook::certificates::{files, system_clock};

use crate::support::{
    NAME, Server,
    client::{self, Connection},
    pki::{Ca, Mount, Pair},
    review, until,
};

const POLL: Duration = Duration::from_millis(50);

async fn serving(mount: &Mount) -> Server {
    let server = Server::start(system_clock(), Duration::from_secs(1)).await;
    tokio::spawn(files::keep(server.app.certificates.clone(), mount.path(), POLL));
    server
}

#[tokio::test]
async fn without_files_it_waits_and_is_not_ready() {
    let mut mount = Mount::new();
    let server = serving(&mount).await;
    tokio::time::sleep(4 * POLL).await;
    assert_eq!(server.probe("/healthz").await, (200, "alive\n".to_owned()));
    assert_eq!(server.probe("/readyz").await, (503, "there is no certificate yet\n".to_owned()));
    let (_, metrics) = server.probe("/metrics").await;
    assert!(metrics.contains("pgsidecar_webhook_certificate_problem 1"), "{metrics}");
    mount.swap(&Ca::new().leaf(NAME));
    server.ready().await;
    let (_, metrics) = server.probe("/metrics").await;
    assert!(metrics.contains("pgsidecar_webhook_certificate_problem 0"), "{metrics}");
    assert!(metrics.contains("pgsidecar_webhook_certificate_expiry_timestamp_seconds 4070908800"), "{metrics}");
}

#[tokio::test]
async fn a_pair_that_does_not_fit_together_leaves_the_old_one_in_use() {
    let (mut mount, ca) = (Mount::new(), Ca::new());
    let server = serving(&mount).await;
    mount.swap(&ca.leaf(NAME));
    server.ready().await;
    let before = server.app.certificates.loaded().unwrap();
    let (one, other) = (ca.leaf(NAME), ca.leaf(NAME));
    for bad in [
        Pair { certificate: one.certificate.clone(), key: other.key.clone() },
        Pair { certificate: String::new(), key: one.key.clone() },
        Pair { certificate: one.certificate.clone(), key: "no key".to_owned() },
        Pair { certificate: one.certificate.replace('A', "B"), key: one.key.clone() },
    ] {
        mount.swap(&bad);
        until("the problem is told", async || server.app.metrics.certificate_problem.get() == 1).await;
        assert!(Arc::ptr_eq(&server.app.certificates.loaded().unwrap().key, &before.key));
        assert_eq!(server.probe("/readyz").await.0, 200);
        server.app.metrics.certificate_problem.set(0);
    }
    mount.swap(&one);
    until("the new one is served", async || !Arc::ptr_eq(&server.app.certificates.loaded().unwrap().key, &before.key))
        .await;
}

#[tokio::test]
async fn an_expired_certificate_is_served_but_not_ready() {
    let mut mount = Mount::new();
    let server = serving(&mount).await;
    mount.swap(&Ca::new().leaf_until(NAME, 2020));
    until("it is loaded", async || server.app.certificates.loaded().is_some()).await;
    let (status, text) = server.probe("/readyz").await;
    assert_eq!((status, text.as_str()), (503, "the certificate has expired at 2020-01-01T00:00:00Z\n"));
}

#[tokio::test]
async fn a_certificate_that_is_not_valid_yet_is_served_but_not_ready() {
    let mut mount = Mount::new();
    let server = serving(&mount).await;
    mount.swap(&Ca::new().leaf_from(NAME, 2098));
    until("it is loaded", async || server.app.certificates.loaded().is_some()).await;
    let (status, text) = server.probe("/readyz").await;
    assert_eq!((status, text.as_str()), (503, "the certificate is valid only from 2098-01-01T00:00:00Z on\n"));
}

/// Leaves change every tenth of a second, under clients that connect anew each time and clients that stay connected.
#[tokio::test]
async fn no_request_fails_while_files_change() {
    let (mut mount, ca) = (Mount::new(), Ca::new());
    let server = serving(&mount).await;
    mount.swap(&ca.leaf(NAME));
    server.ready().await;
    let done = Arc::new(AtomicBool::new(false));
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..6 {
        let alpn: &[&str] = if client % 2 == 0 { &["h2"] } else { &["http/1.1"] };
        let (tls, done, address) = (client::trusting(&ca.pem(), &system_clock(), alpn), done.clone(), server.address);
        let anew = client < 4;
        clients.spawn(async move {
            let mut connection = Connection::open(address, &tls).await.unwrap();
            let mut answered = 0;
            while !done.load(Relaxed) {
                if anew {
                    connection = Connection::open(address, &tls).await.unwrap();
                }
                let uid = format!("{client}-{answered}");
                let answer = connection.review(&review(&uid)).await.unwrap();
                assert_eq!((&answer["response"]["uid"], &answer["response"]["allowed"]), (&uid.into(), &true.into()));
                answered += 1;
            }
            answered
        });
    }
    let mut served = std::collections::BTreeSet::new();
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        mount.swap(&ca.leaf(NAME));
        served.insert(server.app.certificates.loaded().unwrap().key.cert[0].to_vec());
    }
    done.store(true, Relaxed);
    let answered: u32 = clients.join_all().await.into_iter().sum();
    assert!(answered > 50, "{answered} requests");
    assert!(served.len() >= 10, "{} certificates", served.len());
    assert_eq!(server.app.metrics.handshake_failures.get(), 0);
}
