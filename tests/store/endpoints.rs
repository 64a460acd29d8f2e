//! What an endpoint can do to us: not answer, answer nonsense, answer half.

use std::{net::TcpListener, time::Duration};

use bytes::Bytes;
use pgsidecar::store::{
    ByteRange, ConditionalCreation, Creation, ListRequest, S3Store, Store, StoreError, StoreErrorKind,
};
use pgsidecar_core::Sha256Digest;
use tokio::time::timeout;

use crate::{
    scripted::{Reply, Request, Scripted, impatient, probe},
    support::key,
};

const MODIFIED: &str = "Sat, 21 Nov 2026 08:00:00 GMT";

/// The failure of each operation, each within a few seconds.
async fn failures(store: &S3Store) -> Vec<(&'static str, StoreError)> {
    let limit = Duration::from_secs(10);
    let a = key("a");
    let upload = async {
        let mut upload = store.begin(&a).await?;
        upload.write(Bytes::from(vec![7; 9 << 20])).await?;
        upload.finish().await
    };
    let mut failures = vec![
        ("create", timeout(limit, store.create(&a, Bytes::from_static(b"x"), None)).await.unwrap().unwrap_err()),
        ("upload", timeout(limit, upload).await.unwrap().unwrap_err()),
        ("get", timeout(limit, store.get(&a, ByteRange::All)).await.unwrap().unwrap_err()),
        ("list", timeout(limit, store.list(&ListRequest::default())).await.unwrap().unwrap_err()),
        ("pending", timeout(limit, store.pending_uploads("")).await.unwrap().unwrap_err()),
        ("probe", timeout(limit, store.conditional_creation()).await.unwrap().unwrap_err()),
        ("delete", timeout(limit, store.delete(&[a.clone(), key("b")])).await.unwrap().unwrap_err()),
    ];
    // A HEAD's answer has no body: 404 is all that it can say, whoever says it.
    failures.extend(timeout(limit, store.head(&a)).await.unwrap().err().map(|error| ("head", error)));
    failures
}

async fn get_error(store: &S3Store) -> StoreError {
    store.get(&key("a"), ByteRange::All).await.unwrap_err()
}

#[tokio::test]
async fn an_endpoint_that_accepts_and_never_answers_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let store = S3Store::new(impatient(listener.local_addr().unwrap().port())).await;
    for (operation, error) in failures(&store).await {
        assert_eq!(error.kind(), StoreErrorKind::Unreachable, "{operation}: {error}");
        assert!(error.is_transient(), "{operation}");
    }
}

#[tokio::test]
async fn an_endpoint_that_refuses_is_unreachable() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let store = S3Store::new(impatient(port)).await;
    for (operation, error) in failures(&store).await {
        assert_eq!(error.kind(), StoreErrorKind::Unreachable, "{operation}: {error}");
        assert!(error.hint().unwrap().contains("endpoint"), "{operation}");
    }
}

#[tokio::test]
async fn an_endpoint_that_can_not_be_resolved_is_unreachable() {
    let mut config = impatient(1);
    config.endpoint = Some("http://store.invalid".to_owned());
    let error = get_error(&S3Store::new(config).await).await;
    assert_eq!(error.kind(), StoreErrorKind::Unreachable, "{error}");
}

#[tokio::test]
async fn every_status_and_code_has_its_kind() {
    use StoreErrorKind::*;
    for (status, code, kind) in [
        (500, "InternalError", Unavailable),
        (503, "ServiceUnavailable", Unavailable),
        (503, "SlowDown", Throttled),
        (429, "TooManyRequests", Throttled),
        (400, "RequestTimeout", Unavailable),
        (400, "ExpiredToken", Credentials),
        (403, "InvalidAccessKeyId", Credentials),
        (403, "SignatureDoesNotMatch", Credentials),
        (403, "RequestTimeTooSkewed", Credentials),
        (403, "AccessDenied", Denied),
        (404, "NoSuchBucket", NoBucket),
        (301, "PermanentRedirect", NoBucket),
        (507, "XMinioStorageFull", Full),
        (418, "Teapot", Unexpected),
    ] {
        let server = Scripted::start(move |_, _| Reply::error(status, code));
        for (operation, error) in failures(&server.store().await).await {
            // A HEAD's answer has no body, so it has no code: what the status alone says.
            let is_bare = operation == "head";
            assert!(error.kind() == kind || is_bare, "{operation} answered {status} {code}: {error}");
            assert!(error.to_string().contains(&status.to_string()), "{operation}: {error}");
        }
    }
}

#[tokio::test]
async fn a_server_error_is_tried_again_a_few_times() {
    let server = Scripted::start(|_, _| Reply::http(503, ""));
    get_error(&server.store().await).await;
    assert_eq!(server.asked().len(), 3);

    let recovering = Scripted::start(|_, before| match before {
        0..2 => Reply::http(500, ""),
        _ => Reply::http(200, "abc").with("last-modified", MODIFIED),
    });
    let download = recovering.store().await.get(&key("a"), ByteRange::All).await.unwrap().unwrap();
    assert_eq!(download.bytes(100).await.unwrap(), "abc");
}

#[tokio::test]
async fn a_proxys_page_is_never_taken_for_an_answer_of_s3() {
    for status in [200, 404, 302] {
        let server = Scripted::start(move |_, _| Reply::page(status));
        for (operation, error) in failures(&server.store().await).await {
            assert_eq!(error.kind(), StoreErrorKind::Unexpected, "{operation} answered {status}: {error}");
            assert!(error.hint().unwrap().contains("proxy"), "{operation} answered {status}: {error}");
        }
    }
    for status in [502, 503, 504] {
        let server = Scripted::start(move |_, _| Reply::page(status));
        for (operation, error) in failures(&server.store().await).await {
            assert_eq!(error.kind(), StoreErrorKind::Unavailable, "{operation} answered {status}: {error}");
        }
    }
}

#[tokio::test]
async fn only_no_such_key_means_that_a_key_is_not_there() {
    let server = Scripted::start(|_, _| Reply::error(404, "NoSuchKey"));
    assert!(server.store().await.get(&key("a"), ByteRange::All).await.unwrap().is_none());
    for reply in [|| Reply::http(404, ""), || Reply::page(404), || Reply::error(404, "NoSuchBucket")] {
        let server = Scripted::start(move |_, _| reply());
        get_error(&server.store().await).await;
    }
}

#[tokio::test]
async fn a_403_for_a_key_hints_at_the_right_to_list() {
    let server = Scripted::start(|_, _| Reply::error(403, "AccessDenied"));
    let error = get_error(&server.store().await).await;
    assert_eq!(error.kind(), StoreErrorKind::Denied);
    assert!(error.hint().unwrap().contains("s3:ListBucket"));
    assert!(!error.is_transient());
    let message = "can't read a: access denied: it answered 403 AccessDenied: Scripted.";
    assert_eq!(error.to_string(), message);
}

async fn read_all(server: &Scripted) -> Result<Bytes, StoreError> {
    let download = server.store().await.get(&key("a"), ByteRange::All).await?.unwrap();
    timeout(Duration::from_secs(10), download.bytes(1 << 30)).await.unwrap()
}

fn head_of_ten_bytes() -> Vec<u8> {
    format!("HTTP/1.1 200 OK\r\ncontent-length: 10\r\nlast-modified: {MODIFIED}\r\n\r\n").into_bytes()
}

#[tokio::test]
async fn a_body_that_is_cut_is_an_error_and_no_end() {
    for got in 0..10 {
        let server = Scripted::start(move |_, _| Reply::Raw([head_of_ten_bytes(), vec![7; got]].concat()));
        let error = read_all(&server).await.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Unavailable, "after {got} bytes: {error}");
    }
}

#[tokio::test]
async fn a_body_that_stalls_is_given_up() {
    let server = Scripted::start(|_, _| Reply::Stall([head_of_ten_bytes(), vec![7; 4]].concat()));
    assert_eq!(read_all(&server).await.unwrap_err().kind(), StoreErrorKind::Unavailable);
}

#[tokio::test]
async fn a_body_whose_checksum_does_not_hold_is_damaged() {
    let server = Scripted::start(|_, _| {
        Reply::http(200, "abc").with("last-modified", MODIFIED).with("x-amz-checksum-crc32", "AAAAAA==")
    });
    assert_eq!(read_all(&server).await.unwrap_err().kind(), StoreErrorKind::Corrupt);
}

#[tokio::test]
async fn a_server_that_ignores_a_range_is_not_believed() {
    let server = Scripted::start(|_, _| Reply::http(200, "0123456789").with("last-modified", MODIFIED));
    let range = ByteRange::Bounded { from: 5, len: 2 };
    let error = server.store().await.get(&key("a"), range).await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Unexpected);
}

#[tokio::test]
async fn a_creation_is_conditional_and_carries_its_hash() {
    let server = Scripted::start(|request, _| probe(request).unwrap_or_else(Reply::stored));
    let sha256 = Sha256Digest::of(b"x");
    let creation = server.store().await.create(&key("a"), Bytes::from_static(b"x"), Some(sha256)).await;
    assert_eq!(creation.unwrap(), Creation::Created);
    let request = server.requests().pop().unwrap();
    assert_eq!(request.target.split('?').next(), Some("/backups/shop/db/a"));
    assert_eq!(request.header("if-none-match"), Some("*"));
    assert_eq!(request.header("x-amz-meta-pgsidecar-sha256"), Some(sha256.to_string().as_str()));
    assert!(request.header("x-amz-checksum-crc32").is_some(), "{request:?}");
}

#[tokio::test]
async fn a_creation_that_met_another_is_repeated() {
    let server = Scripted::start(|request, before| match (probe(request), before) {
        (Some(reply), _) => reply,
        (None, 0..2) => Reply::error(409, "ConditionalRequestConflict"),
        (None, _) => Reply::stored(),
    });
    let store = server.store().await;
    assert_eq!(store.create(&key("a"), Bytes::new(), None).await.unwrap(), Creation::Created);

    let server =
        Scripted::start(|request, _| probe(request).unwrap_or_else(|| Reply::error(409, "ConditionalRequestConflict")));
    let error = server.store().await.create(&key("a"), Bytes::new(), None).await.unwrap_err();
    assert!(error.is_transient(), "{error}");
}

#[tokio::test]
async fn a_lost_answer_to_a_creation_ends_as_exists() {
    let server = Scripted::start(|request, before| match (probe(request), before) {
        (Some(reply), _) => reply,
        // Stored, but the answer never comes; the SDK tries again.
        (None, 0) => Reply::Raw(Vec::new()),
        (None, _) => Reply::error(412, "PreconditionFailed"),
    });
    let store = server.store().await;
    assert_eq!(store.create(&key("a"), Bytes::new(), None).await.unwrap(), Creation::Exists);
}

#[tokio::test]
async fn a_proxys_error_about_an_object_that_is_there_ends_as_exists() {
    // A server that refuses before it has read the body makes some proxies answer 502, as often as one tries.
    let server = |there: bool| {
        Scripted::start(move |request, _| match (probe(request), request.what().starts_with("HEAD")) {
            (Some(reply), _) => reply,
            (None, true) if there => Reply::http(200, "").with("last-modified", MODIFIED),
            (None, true) => Reply::http(404, ""),
            (None, false) => Reply::page(502),
        })
    };
    let store = server(true).store().await;
    assert_eq!(store.create(&key("a"), Bytes::new(), None).await.unwrap(), Creation::Exists);
    let missing = server(false);
    let error = missing.store().await.create(&key("a"), Bytes::new(), None).await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Unavailable);
}

#[tokio::test]
async fn a_server_without_conditional_creation_is_looked_at_first_and_not_sent_the_header() {
    for refusal in [|| Reply::error(501, "NotImplemented"), || Reply::error(400, "NotImplemented")] {
        let server =
            Scripted::start(move |request, _| match (request.header("if-none-match"), request.method.as_str()) {
                (Some(_), _) => refusal(),
                (None, "GET") => Reply::error(404, "NoSuchKey"),
                (None, _) => Reply::stored(),
            });
        let store = server.store().await;
        assert_eq!(store.create(&key("a"), Bytes::new(), None).await.unwrap(), Creation::Created);
        assert_eq!(server.asked(), ["GET object", "PUT object"]);
        let ConditionalCreation::LookFirst { reason } = store.conditional_creation().await.unwrap() else { panic!() };
        assert!(reason.contains("NotImplemented"), "{reason}");
    }
}

#[tokio::test]
async fn a_probe_that_fails_is_tried_again_by_the_next_creation() {
    let server = Scripted::start(|request, before| match (probe(request), before) {
        (Some(_), 0..3) => Reply::http(503, ""),
        (Some(reply), _) => reply,
        (None, _) => Reply::stored(),
    });
    let store = server.store().await;
    assert!(store.create(&key("a"), Bytes::new(), None).await.unwrap_err().is_transient());
    assert_eq!(store.create(&key("a"), Bytes::new(), None).await.unwrap(), Creation::Created);
}

fn keys_in(request: &Request) -> usize {
    String::from_utf8_lossy(&request.body).matches("<Key>").count()
}

#[tokio::test]
async fn a_thousand_keys_are_deleted_by_one_request() {
    let server = Scripted::start(|_, _| Reply::http(200, "<DeleteResult></DeleteResult>"));
    let keys: Vec<_> = (0..2001).map(|n| key(&format!("k/{n}"))).collect();
    assert!(server.store().await.delete(&keys).await.unwrap().is_empty());
    let requests = server.requests();
    assert_eq!(requests.iter().map(keys_in).collect::<Vec<_>>(), [1000, 1000, 0]);
    assert_eq!(requests[2].what(), "DELETE object");
}

#[tokio::test]
async fn a_key_that_may_not_be_deleted_is_named() {
    let server = Scripted::start(|_, _| {
        let body = "<DeleteResult><Error><Key>shop/db/a</Key><Code>AccessDenied</Code><Message>Locked.</Message></Error>\
                    <Error><Key>shop/db/b</Key><Code>NoSuchKey</Code></Error></DeleteResult>";
        Reply::http(200, body)
    });
    let failed = server.store().await.delete(&[key("a"), key("b"), key("c")]).await.unwrap();
    let [(failed, error)] = failed.as_slice() else { panic!("{failed:?}") };
    assert_eq!((failed, error.kind()), (&key("a"), StoreErrorKind::Denied));
    assert!(error.hint().unwrap().contains("object lock"));
}

#[tokio::test]
async fn a_server_without_bulk_deletion_gets_one_request_per_key() {
    for refusal in [|| Reply::error(501, "NotImplemented"), || Reply::error(400, "MissingContentMD5")] {
        let server = Scripted::start(move |request, _| match request.what().as_str() {
            "DELETE object" => Reply::http(204, ""),
            _ => refusal(),
        });
        assert!(server.store().await.delete(&[key("a"), key("b")]).await.unwrap().is_empty());
        assert_eq!(server.asked(), ["POST delete", "DELETE object", "DELETE object"]);
    }
}
