//! A real server that ignores `If-None-Match`, as Garage does: s3s-fs behind a proxy that takes the header away.

use std::{
    io::{Read, Write},
    net::TcpStream,
};

use bytes::Bytes;
use pgsidecar::store::{ByteRange, ConditionalCreation, Creation, PROBE_KEY, S3Config, S3Store, Store};
use pgsidecar_core::Sha256Digest;

use crate::{
    scripted::{Reply, Request, Scripted},
    server::Server,
    support::{key, noise, read},
};

/// Passes a request on without `If-None-Match`. The signature covers it, so that is left out as well: the server behind
/// takes requests from anybody.
fn pass_on(address: &str, request: &Request) -> Reply {
    let mut head = format!("{} {} HTTP/1.1\r\n", request.method, request.target);
    for (name, value) in &request.headers {
        let is_dropped =
            ["if-none-match", "authorization", "x-amz-date", "x-amz-content-sha256", "connection", "expect"]
                .contains(&name.as_str());
        if !is_dropped {
            head += &format!("{name}: {value}\r\n");
        }
    }
    head += "connection: close\r\n\r\n";
    let mut server = TcpStream::connect(address).unwrap();
    server.write_all(&[head.into_bytes(), request.body.clone()].concat()).unwrap();
    let mut answer = Vec::new();
    server.read_to_end(&mut answer).unwrap();
    Reply::Raw(answer)
}

async fn server_that_replaces() -> (Server, Scripted, S3Store) {
    let server = Server::start_s3s_open();
    let address = server.address();
    let proxy = Scripted::start(move |request, _| pass_on(&address, request));
    let endpoint = Some(format!("http://127.0.0.1:{}", proxy.port));
    let store = S3Store::new(S3Config { endpoint, ..server.config() }).await;
    (server, proxy, store)
}

#[tokio::test]
async fn a_server_that_replaces_objects_is_found_out_s3s() {
    let (_server, proxy, store) = server_that_replaces().await;
    let ConditionalCreation::LookFirst { reason } = store.conditional_creation().await.unwrap() else { panic!() };
    assert!(reason.contains("replaced"), "{reason}");
    let tries = proxy.requests().len();
    store.conditional_creation().await.unwrap();
    assert_eq!((tries, proxy.requests().len()), (2, 2), "once, and remembered");
    assert!(read(&store, PROBE_KEY, ByteRange::All).await.is_some());
}

#[tokio::test]
async fn on_a_server_that_replaces_objects_nothing_is_replaced_s3s() {
    let (_server, proxy, store) = server_that_replaces().await;
    let (first, second) = (noise(1000, 1), noise(2000, 2));
    let sha256 = Sha256Digest::of(&first);
    assert_eq!(store.create(&key("a"), first.clone(), Some(sha256)).await.unwrap(), Creation::Created);
    assert_eq!(store.create(&key("a"), second, None).await.unwrap(), Creation::Exists);
    for size in [100, 9 << 20] {
        let mut upload = store.begin(&key("a")).await.unwrap();
        upload.write(noise(size, 3)).await.unwrap();
        assert_eq!(upload.finish().await.unwrap(), Creation::Exists);
    }
    assert_eq!(read(&store, "a", ByteRange::All).await.unwrap(), first);
    let mut upload = store.begin(&key("b")).await.unwrap();
    upload.write(noise(9 << 20, 4)).await.unwrap();
    assert_eq!(upload.finish().await.unwrap(), Creation::Created);
    assert_eq!(store.create(&key("empty"), Bytes::new(), None).await.unwrap(), Creation::Created);
    assert_eq!(store.create(&key("empty"), Bytes::new(), None).await.unwrap(), Creation::Exists);
    let conditional = proxy.requests().iter().filter(|request| request.header("if-none-match").is_some()).count();
    assert_eq!(conditional, 2, "only the probe sends the header");
}
