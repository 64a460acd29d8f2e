//! `make webhook-load`: the webhook's program under a steady load, over TLS on the loopback interface.
//!
//! Like an API server it keeps two HTTP/2 connections, and like one that restarts it opens a new one each second. Requests
//! go out at fixed times, whether earlier ones have been answered or not, and each is measured from the time at which it
//! was due: a server that stalls can't hide it. Measured in the end: the latencies, and the server's resident memory.
//!
//! It fails if a request does, or beyond the limits (`LOAD_P99_MS`, `LOAD_RESIDENT_MIB`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a measurement fails by panicking")]

use std::{
    env, fs,
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, client::conn::http2::SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::{ClientConfig, RootCertStore, crypto::ring, pki_types::ServerName};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;

const NAME: &str = "pgsidecar-webhook.pgsidecar-system.svc";

fn setting(name: &str, default: u32) -> u32 {
    env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// The program, ended with this.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Server {
    /// A line of `/proc/PID/status`, in KiB.
    fn memory(&self, name: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(measure());
}

async fn measure() {
    let (rate, seconds) = (setting("LOAD_RATE", 500), setting("LOAD_SECONDS", 30));
    let directory = tempfile::tempdir().unwrap();
    let roots = make_certificates(directory.path());
    let mut tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let tls = TlsConnector::from(Arc::new(tls));
    let (address, health) = (free_address().await, free_address().await);
    let server = Command::new(env!("CARGO_BIN_EXE_pgsidecar-webhook"))
        .arg("serve")
        .args(["--image", "ghcr.io/example/pgsidecar:1", "--tls-directory", directory.path().to_str().unwrap()])
        .args(["--listen", &address.to_string(), "--health-listen", &health.to_string()])
        .env("PGSIDECAR_LOG", "warn")
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let server = Server(server);
    let mut connections = Vec::new();
    for _ in 0..500 {
        match connect(address, &tls).await {
            Ok(connection) => connections.push(connection),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
        if connections.len() == 2 {
            break;
        }
    }
    assert_eq!(connections.len(), 2, "the server doesn't come up");
    println!("at rest:      VmRSS {} KiB", server.memory("VmRSS"));

    let body = Bytes::from(review().to_string());
    println!("load:         {rate} requests/s for {seconds} s, {} bytes each", body.len());
    let began = Instant::now();
    let mut under_way = tokio::task::JoinSet::new();
    for number in 0..rate * seconds {
        let due = began + Duration::from_secs(1) * number / rate;
        tokio::time::sleep_until(due.into()).await;
        if number % rate == rate - 1 {
            connections[(number / rate % 2) as usize] = connect(address, &tls).await.unwrap();
        }
        let (mut connection, body) = (connections[(number % 2) as usize].clone(), body.clone());
        under_way.spawn(async move {
            let request = Request::post(format!("https://{NAME}/inject?timeout=5s"))
                .header("content-type", "application/json")
                .body(Full::new(body))
                .unwrap();
            let answer = connection.send_request(request).await.unwrap();
            let status = answer.status();
            let body = answer.into_body().collect().await.unwrap().to_bytes();
            (due.elapsed(), status.as_u16(), body)
        });
    }
    let answers = under_way.join_all().await;
    let took = began.elapsed();
    for (_, status, body) in &answers {
        let answer: Value = serde_json::from_slice(body).unwrap();
        assert!(*status == 200 && answer["response"]["allowed"] == true, "{status} {answer}");
    }
    let mut latencies: Vec<Duration> = answers.iter().map(|(latency, ..)| *latency).collect();
    latencies.sort();
    let percentile = |part: usize| latencies[(latencies.len() - 1) * part / 1000];
    let p99 = percentile(990);
    println!(
        "latency:      p50 {:?}, p90 {:?}, p99 {p99:?}, p99.9 {:?}, at most {:?} ({} requests, {:.0}/s)",
        percentile(500),
        percentile(900),
        percentile(999),
        percentile(1000),
        latencies.len(),
        latencies.len() as f64 / took.as_secs_f64()
    );
    let (resident, peak) = (server.memory("VmRSS"), server.memory("VmHWM"));
    println!(
        "memory:       VmRSS {resident} KiB (of them {} KiB anonymous), at most {peak} KiB",
        server.memory("RssAnon")
    );
    for (what, answers, review) in larger() {
        let began = Instant::now();
        let body = Bytes::from(review.to_string());
        let size = body.len() >> 10;
        ask_24_times(address, &tls, body, answers).await;
        println!(
            "{what}: VmRSS {} KiB, at most {} KiB, after 24 of {size} KiB at a time, {:?}",
            server.memory("VmRSS"),
            server.memory("VmHWM"),
            began.elapsed()
        );
    }
    assert!(server.memory("VmHWM") <= 64 << 10, "more than the limit in the manifests");
    let (p99_limit, resident_limit) = (setting("LOAD_P99_MS", 5), setting("LOAD_RESIDENT_MIB", 15));
    assert!(p99 <= Duration::from_millis(p99_limit.into()), "p99 is above {p99_limit} ms");
    assert!(peak <= u64::from(resident_limit) << 10, "more than {resident_limit} MiB");
}

/// What nobody sends but could, and whether it's admitted.
fn larger() -> [(&'static str, bool, Value); 4] {
    let env = |count: usize| -> Value {
        let reference = |n: usize| json!({"secretKeyRef": {"name": "db", "key": n.to_string(), "optional": true}});
        (0..count).map(|n| json!({"name": format!("PGX_{n}"), "valueFrom": reference(n)})).collect()
    };
    let with_env = |count: usize| {
        let mut review = review();
        let containers = &mut review["request"]["object"]["spec"]["containers"];
        containers[0]["env"] = env(count);
        containers.as_array_mut().unwrap().push(json!({"name": "metrics-exporter", "image": "x", "env": env(count)}));
        review
    };
    let mut values = review();
    values["request"]["object"]["metadata"]["annotations"] = json!({"large": "x".repeat(7 << 20)});
    values["request"]["object"]["spec"]["large"] = json!(vec![json!({"a": 0}); 16_000]);
    let mut nested = with_env(1_000);
    let mut deep = json!(0);
    for _ in 0..100 {
        deep = json!({ "a": deep });
    }
    nested["request"]["object"]["spec"]["large"] = json!(vec![deep; 140]);
    [
        ("variables:    1000 and 1000", true, with_env(1_000)),
        ("variables:    3000 and 3000", false, with_env(3_000)),
        ("values:       48,000", true, values),
        ("values:       nested, and variables", true, nested),
    ]
}

/// The same many times at once.
async fn ask_24_times(address: SocketAddr, tls: &TlsConnector, body: Bytes, allowed: bool) {
    let mut under_way = tokio::task::JoinSet::new();
    for _ in 0..24 {
        let (mut connection, body) = (connect(address, tls).await.unwrap(), body.clone());
        under_way.spawn(async move {
            let request = Request::post(format!("https://{NAME}/inject"))
                .header("content-type", "application/json")
                .body(Full::new(body))
                .unwrap();
            let answer = connection.send_request(request).await.unwrap();
            let status = answer.status().as_u16();
            let body = answer.into_body().collect().await.unwrap().to_bytes();
            // Some find no room in time.
            if status != 408 {
                let answer: Value = serde_json::from_slice(&body).unwrap_or_default();
                let start = String::from_utf8_lossy(&body[..body.len().min(500)]).into_owned();
                assert!(status == 200 && answer["response"]["allowed"] == allowed, "{status} {start}");
            }
        });
    }
    under_way.join_all().await;
}

/// `tls.crt` and `tls.key` for the server; answers with what to trust.
fn make_certificates(directory: &std::path::Path) -> RootCertStore {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(vec![NAME.to_owned()]).unwrap().signed_by(&key, &ca).unwrap();
    fs::write(directory.join("tls.crt"), leaf.pem()).unwrap();
    fs::write(directory.join("tls.key"), key.serialize_pem()).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(ca.der().clone()).unwrap();
    roots
}

async fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

async fn connect(address: SocketAddr, tls: &TlsConnector) -> std::io::Result<SendRequest<Full<Bytes>>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let stream = tls.connect(ServerName::try_from(NAME).unwrap(), stream).await?;
    let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .map_err(std::io::Error::other)?;
    tokio::spawn(connection);
    Ok(sender)
}

/// A pod of a StatefulSet as an API server sends it: defaults filled in, managed fields and token volume included.
fn review() -> Value {
    let probe = json!({
        "exec": {"command": ["sh", "-c", "pg_isready -U postgres -h 127.0.0.1"]},
        "failureThreshold": 3, "periodSeconds": 10, "successThreshold": 1, "timeoutSeconds": 1
    });
    let env: Vec<Value> = (0..20)
        .map(|n| json!({"name": format!("APP_SETTING_{n}"), "value": format!("a value that says something: {n}")}))
        .chain([
            json!({"name": "POSTGRES_PASSWORD", "valueFrom": {"secretKeyRef": {"name": "db", "key": "password"}}}),
            json!({"name": "PGDATA", "value": "/var/lib/postgresql/data/pgdata"}),
        ])
        .collect();
    let managed: Value =
        (0..60).map(|n| (format!("f:field-{n}"), json!({".": {}, "f:name": {}, "f:value": {}}))).collect();
    json!({
        "kind": "AdmissionReview",
        "apiVersion": "admission.k8s.io/v1",
        "request": {
            "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
            "kind": {"group": "", "version": "v1", "kind": "Pod"},
            "resource": {"group": "", "version": "v1", "resource": "pods"},
            "requestKind": {"group": "", "version": "v1", "kind": "Pod"},
            "requestResource": {"group": "", "version": "v1", "resource": "pods"},
            "namespace": "shop",
            "operation": "CREATE",
            "userInfo": {"username": "system:serviceaccount:kube-system:statefulset-controller", "uid": "1",
                "groups": ["system:serviceaccounts", "system:serviceaccounts:kube-system", "system:authenticated"]},
            "object": {
                "kind": "Pod",
                "apiVersion": "v1",
                "metadata": {
                    "name": "db-0", "generateName": "db-", "namespace": "shop",
                    "labels": {"app": "db", "pgsidecar.dev/inject": "true", "statefulset.kubernetes.io/pod-name": "db-0"},
                    "annotations": {"prometheus.io/scrape": "true"},
                    "ownerReferences": [{"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "db", "uid": "2",
                        "controller": true, "blockOwnerDeletion": true}],
                    "managedFields": [{"manager": "kube-controller-manager", "operation": "Update", "apiVersion": "v1",
                        "time": "2026-01-01T00:00:00Z", "fieldsType": "FieldsV1", "fieldsV1": managed}]
                },
                "spec": {
                    "volumes": [
                        {"name": "data", "persistentVolumeClaim": {"claimName": "data-db-0"}},
                        {"name": "config", "configMap": {"name": "db-config", "defaultMode": 420}},
                        {"name": "kube-api-access-x7k2p", "projected": {"defaultMode": 420, "sources": [
                            {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
                            {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}}]}}
                    ],
                    "containers": [{
                        "name": "postgres", "image": "postgres:17", "env": env,
                        "ports": [{"containerPort": 5432, "name": "postgres", "protocol": "TCP"}],
                        "resources": {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"memory": "2Gi"}},
                        "volumeMounts": [
                            {"name": "data", "mountPath": "/var/lib/postgresql/data"},
                            {"name": "config", "mountPath": "/etc/postgresql"},
                            {"name": "kube-api-access-x7k2p", "readOnly": true,
                                "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}
                        ],
                        "livenessProbe": probe, "readinessProbe": probe, "startupProbe": probe,
                        "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
                        "imagePullPolicy": "IfNotPresent"
                    }],
                    "restartPolicy": "Always", "terminationGracePeriodSeconds": 30, "dnsPolicy": "ClusterFirst",
                    "serviceAccountName": "default", "serviceAccount": "default", "hostname": "db-0", "subdomain": "db",
                    "securityContext": {"fsGroup": 999, "runAsUser": 999}, "schedulerName": "default-scheduler",
                    "tolerations": [{"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute",
                        "tolerationSeconds": 300}],
                    "priority": 0, "enableServiceLinks": true, "preemptionPolicy": "PreemptLowerPriority"
                },
                "status": {}
            },
            "oldObject": null,
            "dryRun": false,
            "options": {"kind": "CreateOptions", "apiVersion": "meta.k8s.io/v1"}
        }
    })
}
