//! Multipart uploads on servers that fail at their end.

use bytes::Bytes;
use pgsidecar::store::{Creation, Store, StoreError, StoreErrorKind};

use crate::{
    scripted::{Reply, Request, Scripted, probe},
    support::{key, noise},
};

const MODIFIED: &str = "Sat, 21 Nov 2026 08:00:00 GMT";

/// A server that takes all parts and then answers the completion like this; what stands under the key, if anything, is
/// decided by `is_there`.
fn server(
    completion: impl Fn(usize) -> Reply + Send + Sync + 'static,
    is_there: impl Fn(bool) -> bool + Send + Sync + 'static,
) -> Scripted {
    let completed = std::sync::atomic::AtomicBool::new(false);
    let ordering = std::sync::atomic::Ordering::SeqCst;
    Scripted::start(move |request: &Request, before| match request.what().as_str() {
        "POST uploads" => {
            Reply::http(200, "<InitiateMultipartUploadResult><UploadId>u1</UploadId></InitiateMultipartUploadResult>")
        }
        "PUT part" => Reply::stored(),
        "POST upload" => {
            completed.store(true, ordering);
            completion(before)
        }
        "DELETE upload" => Reply::http(204, ""),
        "GET object" if is_there(completed.load(ordering)) => {
            Reply::http(206, "x").with("last-modified", MODIFIED).with("content-range", "bytes 0-0/20000000")
        }
        "GET object" => Reply::error(404, "NoSuchKey"),
        _ => probe(request).unwrap_or_else(Reply::stored),
    })
}

async fn upload(server: &Scripted) -> Result<Creation, StoreError> {
    let store = server.store().await;
    let mut upload = store.begin(&key("a")).await?;
    for chunk in 0..20 {
        upload.write(noise(1_000_000, chunk)).await?;
    }
    upload.finish().await
}

fn completed() -> Reply {
    Reply::http(200, "<CompleteMultipartUploadResult><ETag>\"1-3\"</ETag></CompleteMultipartUploadResult>")
}

fn is_aborted(server: &Scripted) -> bool {
    server.asked().contains(&"DELETE upload".to_owned())
}

#[tokio::test]
async fn an_upload_is_made_of_parts_and_completed_conditionally() {
    let server = server(|_| completed(), |_| false);
    assert_eq!(upload(&server).await.unwrap(), Creation::Created);
    let requests = server.requests();
    let mut parts: Vec<_> = requests.iter().filter(|request| request.what() == "PUT part").collect();
    parts.sort_by(|a, b| a.target.cmp(&b.target));
    assert_eq!(
        parts.iter().map(|part| part.body.len()).collect::<Vec<_>>(),
        [8 << 20, 8 << 20, 20_000_000 - (16 << 20)]
    );
    let expected = Bytes::from((0..20).flat_map(|chunk| noise(1_000_000, chunk)).collect::<Vec<u8>>());
    assert!(parts.iter().flat_map(|part| part.body.clone()).collect::<Vec<u8>>() == expected);
    assert!(parts.iter().all(|part| part.header("x-amz-checksum-crc32").is_some()));
    let completion = requests.iter().find(|request| request.what() == "POST upload").unwrap();
    assert_eq!(completion.header("if-none-match"), Some("*"));
    assert!(!is_aborted(&server));
}

#[tokio::test]
async fn checksums_of_parts_are_repeated_to_a_server_that_asked_for_them_alone() {
    for asks in [false, true] {
        let server = Scripted::start(move |request, _| match request.what().as_str() {
            "POST uploads" => {
                let begun = "<InitiateMultipartUploadResult><UploadId>u1</UploadId></InitiateMultipartUploadResult>";
                let reply = Reply::http(200, begun);
                if asks { reply.with("x-amz-checksum-algorithm", "CRC32") } else { reply }
            }
            // Garage says it in any case, and refuses to be told again what wasn't announced.
            "PUT part" => Reply::stored().with("x-amz-checksum-crc32", "AAAAAA=="),
            "POST upload" => completed(),
            "GET object" => Reply::error(404, "NoSuchKey"),
            _ => probe(request).unwrap_or_else(Reply::stored),
        });
        assert_eq!(upload(&server).await.unwrap(), Creation::Created);
        let requests = server.requests();
        let begun = requests.iter().find(|request| request.what() == "POST uploads").unwrap();
        assert_eq!(begun.header("x-amz-checksum-algorithm"), Some("CRC32"));
        let completion = requests.iter().find(|request| request.what() == "POST upload").unwrap();
        let repeated = String::from_utf8_lossy(&completion.body).matches("<ChecksumCRC32>").count();
        assert_eq!(repeated, if asks { 3 } else { 0 });
    }
}

#[tokio::test]
async fn a_completion_that_answers_200_with_an_error_in_its_body_has_failed() {
    let failing = server(|_| Reply::error(200, "InternalError"), |_| false);
    let error = upload(&failing).await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Unavailable, "{error}");
    assert!(is_aborted(&failing));

    for reply in [|| Reply::http(200, ""), || Reply::page(200)] {
        let nonsense = server(move |_| reply(), |_| false);
        let error = upload(&nonsense).await.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Unexpected, "{error}");
    }
}

#[tokio::test]
async fn a_completion_whose_answer_was_lost_is_looked_after() {
    let lost = |before| if before == 0 { Reply::Raw(Vec::new()) } else { Reply::error(404, "NoSuchUpload") };
    let done = server(lost, |completed| completed);
    assert_eq!(upload(&done).await.unwrap(), Creation::Exists, "the caller compares");

    let not_done = server(lost, |_| false);
    let error = upload(&not_done).await.unwrap_err();
    assert!(error.to_string().contains("NoSuchUpload"), "{error}");
}

#[tokio::test]
async fn an_upload_of_a_key_that_was_taken_meanwhile_exists() {
    let taken = server(|_| Reply::error(412, "PreconditionFailed"), |_| false);
    assert_eq!(upload(&taken).await.unwrap(), Creation::Exists);
    assert!(is_aborted(&taken));

    let taken_before = server(|_| completed(), |_| true);
    assert_eq!(upload(&taken_before).await.unwrap(), Creation::Exists);
    assert!(!taken_before.asked().contains(&"POST upload".to_owned()), "it would have replaced the object");
    assert!(is_aborted(&taken_before));
}

#[tokio::test]
async fn a_part_that_fails_fails_the_upload_and_aborts_it() {
    let server = Scripted::start(|request, _| match request.what().as_str() {
        "POST uploads" => {
            Reply::http(200, "<InitiateMultipartUploadResult><UploadId>u1</UploadId></InitiateMultipartUploadResult>")
        }
        "DELETE upload" => Reply::http(204, ""),
        _ => Reply::http(503, ""),
    });
    let error = upload(&server).await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Unavailable);
    for _ in 0..100 {
        if is_aborted(&server) {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    panic!("not aborted: {:?}", server.asked());
}

#[tokio::test]
async fn unfinished_uploads_are_listed_over_all_pages_and_aborted() {
    let page = |key: &str, is_truncated: bool| {
        let next = "<NextKeyMarker>shop/db/a</NextKeyMarker><NextUploadIdMarker>1</NextUploadIdMarker>";
        format!(
            "<ListMultipartUploadsResult><IsTruncated>{is_truncated}</IsTruncated>{}<Upload><Key>{key}</Key>\
             <UploadId>id of {key}</UploadId><Initiated>2026-11-20T08:00:00.000Z</Initiated></Upload>\
             </ListMultipartUploadsResult>",
            if is_truncated { next } else { "" }
        )
    };
    let server = Scripted::start(move |request, before| match request.what().as_str() {
        "GET uploads" if before == 0 => Reply::http(200, page("shop/db/a", true)),
        "GET uploads" => Reply::http(200, page("shop/db/b", false)),
        "DELETE upload" => Reply::error(404, "NoSuchUpload"),
        other => panic!("{other}"),
    });
    let store = server.store().await;
    let pending = store.pending_uploads("").await.unwrap();
    let found: Vec<_> = pending.iter().map(|upload| upload.key.as_str()).collect();
    assert_eq!(found, ["a", "b"]);
    assert_eq!(pending[0].started.to_string(), "2026-11-20T08:00:00Z");
    assert!(server.requests()[1].target.contains("key-marker=shop%2Fdb%2Fa"));
    // Gone already is as good as removed.
    store.abort_pending(&pending[0]).await.unwrap();
    let last = server.requests().pop().unwrap();
    assert!(last.target.starts_with("/backups/shop/db/a?"), "{}", last.target);
}

#[tokio::test]
async fn a_server_that_can_not_list_uploads_has_none_to_show() {
    let server = Scripted::start(|_, _| Reply::error(501, "NotImplemented"));
    assert_eq!(server.store().await.pending_uploads("").await.unwrap(), []);
}
