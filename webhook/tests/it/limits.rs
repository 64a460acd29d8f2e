//! What the server refuses, and what it bounds: whoever reaches the port can send what they like.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::Request;
use pgsidecar_webhook::certificates::{files, system_clock};
use rustls::version::{TLS12, TLS13};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

use crate::support::{
    NAME, SLOW, Server,
    client::{self, Connection, post},
    pki::Ca,
    review, until,
};

async fn served() -> (Server, TlsConnector) {
    served_by(&["h2"]).await
}

async fn served_by(alpn: &[&str]) -> (Server, TlsConnector) {
    let server = Server::start(system_clock(), Duration::from_secs(10)).await;
    let ca = Ca::new();
    let pair = ca.leaf(NAME);
    server.app.certificates.install(files::load(pair.certificate.as_bytes(), pair.key.as_bytes()).unwrap());
    (server, client::trusting(&ca.pem(), &system_clock(), alpn))
}

fn request(method: &str, path: &str, content_type: &str, body: &str) -> Request<Full<Bytes>> {
    Request::builder()
        .method(method)
        .uri(format!("https://{NAME}{path}"))
        .header("host", NAME)
        .header("content-type", content_type)
        .body(Full::new(Bytes::from(body.to_owned())))
        .unwrap()
}

#[tokio::test]
async fn only_posts_of_json_to_inject_are_answered() {
    for alpn in ["h2", "http/1.1"] {
        let (server, tls) = served_by(&[alpn]).await;
        let mut connection = Connection::open(server.address, &tls).await.unwrap();
        let review = review("u").to_string();
        let json = "application/json";
        for (method, path, kind, body, expected) in [
            ("POST", "/inject", json, review.as_str(), 200),
            ("POST", "/inject?timeout=5s", "application/json; charset=utf-8", &review, 200),
            ("POST", "/", json, &review, 404),
            ("POST", "/inject/", json, &review, 404),
            ("GET", "/metrics", json, "", 404),
            ("GET", "/inject", json, "", 405),
            ("PUT", "/inject", json, &review, 405),
            ("POST", "/inject", "application/yaml", &review, 415),
            ("POST", "/inject", "", &review, 415),
            ("POST", "/inject", json, "", 400),
            ("POST", "/inject", json, "{", 400),
            ("POST", "/inject", json, r#"{"apiVersion":"admission.k8s.io/v1beta1","kind":"AdmissionReview"}"#, 400),
        ] {
            let (status, answer) = connection.send(request(method, path, kind, body)).await.unwrap();
            assert_eq!(status, expected, "{alpn} {method} {path} {kind} {body}: {answer:?}");
        }
        let metrics = server.probe("/metrics").await.1;
        assert!(metrics.contains(r#"pgsidecar_webhook_requests_total{outcome="admitted"} 2"#), "{metrics}");
        assert!(metrics.contains(r#"pgsidecar_webhook_requests_total{outcome="bad"} 7"#), "{metrics}");
        assert!(metrics.contains("pgsidecar_webhook_request_duration_seconds_count 9"), "{metrics}");
        assert!(metrics.contains("pgsidecar_webhook_connections 1"), "{metrics}");
    }
}

#[tokio::test]
async fn while_an_answer_is_computed_others_are_served_and_the_time_limit_holds() {
    let (server, tls) = served().await;
    let mut slow = review("slow");
    slow["request"]["namespace"] = json!(SLOW);
    let mut connection = Connection::open(server.address, &tls).await.unwrap();
    let began = Instant::now();
    let asked = tokio::spawn(async move { connection.send(post(slow.to_string())).await.unwrap().0 });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(server.probe("/healthz").await.0, 200);
    let mut other = Connection::open(server.address, &tls).await.unwrap();
    assert_eq!(other.send(request("GET", "/inject", "", "")).await.unwrap().0, 405);
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert_eq!(asked.await.unwrap(), 408);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    // What is computed goes on, and then there's a turn again.
    assert_eq!(other.review(&review("next")).await.unwrap()["response"]["uid"], "next");
}

#[tokio::test]
async fn a_body_of_megabytes_is_read_and_one_that_is_too_large_refused() {
    for alpn in ["h2", "http/1.1"] {
        let (server, tls) = served_by(&[alpn]).await;
        let mut large = review("large");
        large["request"]["object"]["metadata"]["annotations"] = json!({"large": "x".repeat(3 << 20)});
        let mut connection = Connection::open(server.address, &tls).await.unwrap();
        assert_eq!(connection.review(&large).await.unwrap()["response"]["uid"], "large");
        large["request"]["object"]["metadata"]["annotations"] = json!({"large": "x".repeat(9 << 20)});
        // The answer may come before all of it is sent; HTTP/1 then closes the connection.
        match connection.send(post(large.to_string())).await {
            Ok((status, _)) => assert_eq!(status, 413),
            Err(error) => assert_eq!(alpn, "http/1.1", "{error}"),
        }
        let mut connection = Connection::open(server.address, &tls).await.unwrap();
        assert_eq!(connection.review(&review("next")).await.unwrap()["response"]["uid"], "next");
    }
}

#[tokio::test]
async fn a_body_without_a_length_is_bounded_too() {
    let (server, tls) = served_by(&["http/1.1"]).await;
    let mut stream = client::connect(server.address, &tls).await.unwrap();
    let head = format!("POST /inject HTTP/1.1\r\nhost: {NAME}\r\ncontent-type: application/json\r\n");
    stream.write_all(format!("{head}transfer-encoding: chunked\r\n\r\n").as_bytes()).await.unwrap();
    let chunk = format!("10000\r\n{}\r\n", " ".repeat(0x10000));
    let mut answer = Vec::new();
    for _ in 0..200 {
        if stream.write_all(chunk.as_bytes()).await.is_err() {
            break;
        }
    }
    let _ = stream.read_to_end(&mut answer).await;
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
}

#[tokio::test]
async fn a_body_that_does_not_come_is_given_up_before_the_api_server_gives_up() {
    let (server, tls) = served_by(&["http/1.1"]).await;
    let mut stream = client::connect(server.address, &tls).await.unwrap();
    let head = format!("POST /inject HTTP/1.1\r\nhost: {NAME}\r\ncontent-type: application/json\r\n");
    stream.write_all(format!("{head}content-length: 100\r\n\r\n{{").as_bytes()).await.unwrap();
    let (began, mut answer) = (Instant::now(), [0; 12]);
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 408");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

#[tokio::test]
async fn bodies_that_never_come_hold_nothing_up() {
    let (server, tls) = served_by(&["http/1.1"]).await;
    let head = format!("POST /inject HTTP/1.1\r\nhost: {NAME}\r\ncontent-type: application/json\r\n");
    let mut held = Vec::new();
    for _ in 0..40 {
        let mut stream = client::connect(server.address, &tls).await.unwrap();
        stream.write_all(format!("{head}content-length: {}\r\n\r\n{{", 8 << 20).as_bytes()).await.unwrap();
        held.push(stream);
    }
    let mut large = review("large");
    large["request"]["object"]["metadata"]["annotations"] = json!({"large": "x".repeat(3 << 20)});
    let began = Instant::now();
    for review in [review("small"), large] {
        let mut connection = Connection::open(server.address, &tls).await.unwrap();
        connection.review(&review).await.unwrap();
    }
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    assert_eq!(held.len(), 40);
}

/// Twice as many as there may be: some have made their handshake, some not, some a request.
#[tokio::test]
async fn connections_that_idle_make_way() {
    let (server, tls) = served_by(&["h2"]).await;
    let mut asked = Connection::open(server.address, &tls).await.unwrap();
    asked.review(&review("first")).await.unwrap();
    let (mut shaken, mut mute) = (Vec::new(), Vec::new());
    for _ in 0..64 {
        mute.push(TcpStream::connect(server.address).await.unwrap());
        shaken.push(client::connect(server.address, &tls).await.unwrap());
    }
    let began = Instant::now();
    let mut connection = Connection::open(server.address, &tls).await.unwrap();
    connection.review(&review("u")).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    assert!(server.app.metrics.connections.get() <= 64);
    // The one that had idled longest is closed in order.
    let error = asked.review(&review("second")).await.unwrap_err();
    assert!(error.contains("Canceled") || error.contains("NO_ERROR") || error.contains("Closed"), "{error}");
    assert_eq!((shaken.len(), mute.len()), (64, 64));
}

#[tokio::test]
async fn a_connection_with_a_request_under_way_does_not_make_way() {
    let (server, tls) = served_by(&["http/1.1"]).await;
    let mut slow = client::connect(server.address, &tls).await.unwrap();
    let body = review("slow").to_string();
    let head = format!("POST /inject HTTP/1.1\r\nhost: {NAME}\r\ncontent-type: application/json\r\n");
    slow.write_all(format!("{head}content-length: {}\r\n\r\n{{", body.len()).as_bytes()).await.unwrap();
    let mut idle = Vec::new();
    for _ in 0..80 {
        idle.push(client::connect(server.address, &tls).await.unwrap());
    }
    slow.write_all(&body.as_bytes()[1..]).await.unwrap();
    let mut answer = [0; 12];
    slow.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200");
    assert_eq!(idle.len(), 80);
}

#[tokio::test]
async fn probes_are_answered_whoever_holds_connections_to_their_port() {
    let (server, _) = served().await;
    let mut held = Vec::new();
    for which in 0..40 {
        let mut stream = TcpStream::connect(server.health).await.unwrap();
        if which % 2 == 0 {
            let _ = stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: probe\r\n\r\n").await;
        }
        held.push(stream);
    }
    let began = Instant::now();
    assert_eq!(server.probe("/healthz").await.0, 200);
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    // Neither one that has been answered nor one that asks nothing is kept.
    for mut stream in held {
        let _ = stream.read_to_end(&mut Vec::new()).await;
    }
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_connection_without_a_handshake_is_closed() {
    let (server, _) = served().await;
    let began = Instant::now();
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap_or(0), 0);
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    assert_eq!(server.app.metrics.handshake_failures.get(), 1);
}

#[tokio::test]
async fn a_connection_without_a_request_is_closed() {
    for alpn in ["h2", "http/1.1"] {
        let (server, tls) = served_by(&[alpn]).await;
        let began = Instant::now();
        let mut stream = client::connect(server.address, &tls).await.unwrap();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
        assert!(began.elapsed() < Duration::from_secs(17), "{:?}", began.elapsed());
    }
}

#[tokio::test]
async fn tls_1_2_and_1_3_are_spoken() {
    let (server, _) = served().await;
    let ca = Ca::new();
    let pair = ca.leaf(NAME);
    server.app.certificates.install(files::load(pair.certificate.as_bytes(), pair.key.as_bytes()).unwrap());
    for version in [&TLS12, &TLS13] {
        let tls = client::trusting_with(&ca.pem(), &system_clock(), &["h2"], &[version]);
        let stream = client::connect(server.address, &tls).await.unwrap();
        assert_eq!(stream.get_ref().1.protocol_version(), Some(version.version));
    }
}

#[tokio::test]
async fn without_a_certificate_the_handshake_fails_and_nothing_else() {
    let server = Server::start(system_clock(), Duration::from_secs(1)).await;
    let tls = client::trusting(&Ca::new().pem(), &system_clock(), &["h2"]);
    assert!(client::connect(server.address, &tls).await.is_err());
    assert_eq!(server.probe("/healthz").await.0, 200);
}

#[tokio::test]
async fn while_it_stops_connections_of_http_1_end_with_their_answer() {
    let (server, tls) = served_by(&["http/1.1"]).await;
    let mut stream = client::connect(server.address, &tls).await.unwrap();
    server.stop();
    until("it stops", async || server.app.metrics.draining.get() == 1).await;
    let (began, body) = (Instant::now(), review("last").to_string());
    let head = format!("POST /inject HTTP/1.1\r\nhost: {NAME}\r\ncontent-type: application/json\r\n");
    stream.write_all(format!("{head}content-length: {}\r\n\r\n{body}", body.len()).as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.contains("connection: close"), "{answer}");
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
}

#[tokio::test]
async fn stopping_turns_readiness_first_and_ends_what_is_under_way() {
    let (server, tls) = served_by(&["http/1.1"]).await;
    let mut idle = Connection::open(server.address, &tls).await.unwrap();
    idle.review(&review("before")).await.unwrap();
    // A request whose body is still on its way.
    let mut slow = client::connect(server.address, &tls).await.unwrap();
    let body = review("slow").to_string();
    let head = format!("POST /inject HTTP/1.1\r\nhost: {NAME}\r\ncontent-type: application/json\r\n");
    let (begin, end) = body.split_at(10);
    server.stop();
    until("it isn't ready", async || server.probe("/readyz").await == (503, "pgsidecar-webhook is stopping\n".into()))
        .await;
    assert_eq!(server.probe("/healthz").await.0, 200);
    // Endpoints notice late: new connections and requests are served on.
    idle.review(&review("after")).await.unwrap();
    Connection::open(server.address, &tls).await.unwrap().review(&review("new")).await.unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    slow.write_all(format!("{head}content-length: {}\r\n\r\n{begin}", body.len()).as_bytes()).await.unwrap();
    until("it accepts no more", async || Connection::open(server.address, &tls).await.is_err()).await;
    slow.write_all(end.as_bytes()).await.unwrap();
    let mut answer = String::new();
    slow.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.contains(r#""uid":"slow""#), "{answer}");
    tokio::time::timeout(Duration::from_secs(5), server.stopped()).await.unwrap();
}
