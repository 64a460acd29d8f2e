//! What PostgreSQL needs, on loopback TCP.
//!
//! ```text
//! PUT  /v1/wal/{name}            archive the request's body                        curl -fsS -T %p
//! POST /v1/wal/{name}/archive    archive the file of that name in pg_wal           pgsidecar-wal archive %p
//!                                ?system-identifier=N&inode=I  refused unless it's that server's file
//! GET  /v1/wal/{name}            the file; 404 not_in_archive only when the store said so
//!                                ?system-identifier=N  of another database system of this cluster name
//!                                &directory=INODE  may be left in pg_wal, if that is this directory, under the name
//!                                in the header Pgsidecar-File
//!                                &tail=yes  the end of a stopped server's WAL will do, where the segment isn't there
//!                                &standby=yes  a history that was seen before will do, where the store can't be asked
//! GET  /healthz                  whether the daemon is there
//! GET  /v1/status                state, problems, backlog, last backup and job
//! ```

use std::{io, os::unix::fs::FileExt, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::{
    Method, Request, StatusCode,
    body::Incoming,
    header::{self, HeaderValue},
};
use pgsidecar_core::{ArchiveFileName, SystemIdentifier};
use serde::Serialize;
use tokio::sync::mpsc;

use super::{Answer, alive, bytes, json, no_such_route, streamed};
use crate::{
    codec::{CHUNK, ChannelReader},
    daemon::{App, Wanted},
    failure::{Code, Failure},
    repository::Stored,
};

/// How long a client may send nothing of a body that is waited for: it occupies one of the archiver's few places.
const BODY_PATIENCE: Duration = Duration::from_secs(10);

/// How long a client may go on sending a body that was refused.
const REFUSED_PATIENCE: Duration = Duration::from_secs(2);
/// How long a client may take none of a file that it has asked for.
const TAKING_PATIENCE: Duration = Duration::from_secs(60);
const OCTETS: &str = "application/octet-stream";
/// Under which name the file lies in pg_wal; the helper renames it.
const FILE_HEADER: &str = "pgsidecar-file";

#[derive(Serialize)]
struct Archived {
    name: ArchiveFileName,
    already_archived: bool,
}

/// Answers one request.
///
/// # Errors
/// What the answer tells.
pub async fn handle(app: Arc<App>, request: Request<Incoming>) -> Result<Answer, Failure> {
    check_local(&request)?;
    let path = request.uri().path().to_owned();
    let segments: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    match (request.method(), segments.as_slice()) {
        (&Method::PUT, ["v1", "wal", name]) => {
            let name = parse_name(name)?;
            archive_body(&app, name, request).await.map(|stored| archived(name, stored))
        }
        (&Method::POST, ["v1", "wal", name, "archive"]) => {
            let name = parse_name(name)?;
            let asker = request.uri().query().map(Asker::parse).transpose()?;
            app.archive_file(name, asker).await.map(|stored| archived(name, stored))
        }
        (&Method::GET, ["v1", "wal", name]) => fetch(&app, parse_name(name)?, request.uri().query()).await,
        // A name with slashes in it is none.
        (&Method::PUT | &Method::GET, ["v1", "wal", name @ ..])
        | (&Method::POST, ["v1", "wal", name @ .., "archive"])
            if name.len() > 1 =>
        {
            parse_name(&name.join("/")).and_then(|_| Err(no_such_route(&request)))
        }
        (&Method::GET, ["healthz"]) => Ok(alive()),
        (&Method::GET, ["v1", "status"]) => Ok(json(StatusCode::OK, &app.status().await)),
        _ => Err(no_such_route(&request)),
    }
}

/// Browsers are brought to loopback by port-forwarding and by DNS names that change: neither has business here.
fn check_local(request: &Request<Incoming>) -> Result<(), Failure> {
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let refused = if !matches!(name, "127.0.0.1" | "localhost" | "[::1]") {
        format!("the request is for host {name:?}, which isn't local")
    } else if request.headers().contains_key(header::ORIGIN) {
        "the request comes from a web page".to_owned()
    } else {
        return Ok(());
    };
    Err(Failure::new(Code::Forbidden, refused).hint("Ask 127.0.0.1 or localhost, from within the pod."))
}

fn parse_name(text: &str) -> Result<ArchiveFileName, Failure> {
    text.parse()
        .map_err(|error: pgsidecar_core::ParseArchiveFileNameError| Failure::new(Code::InvalidName, error.to_string()))
}

fn archived(name: ArchiveFileName, stored: Stored) -> Answer {
    json(StatusCode::OK, &Archived { name, already_archived: stored == Stored::Already })
}

async fn archive_body(app: &Arc<App>, name: ArchiveFileName, request: Request<Incoming>) -> Result<Stored, Failure> {
    let length = request.headers().get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    let (sender, reader) = ChannelReader::new();
    let mut body = request.into_body();
    // Ends with the body, with the reader that refuses more, or with the connection.
    let feed = async move {
        loop {
            let idle = || {
                Failure::new(Code::InvalidRequest, format!("nothing came of the body of {name} for {BODY_PATIENCE:?}"))
                    .hint("Nothing was stored; the file has to be sent again.")
            };
            let frame = match tokio::time::timeout(BODY_PATIENCE, body.frame()).await {
                Ok(None) => return,
                Ok(Some(frame)) => frame,
                Err(_) => {
                    let _ = sender.send(Err(idle())).await;
                    return;
                }
            };
            let chunk = match frame {
                Ok(frame) => match frame.into_data() {
                    Ok(data) => Ok(data),
                    Err(_trailers) => continue,
                },
                Err(error) => Err(Failure::new(Code::InvalidRequest, format!("the body of {name} broke off: {error}"))
                    .hint("Nothing was stored; the file has to be sent again.")),
            };
            let broken = chunk.is_err();
            if sender.send(chunk).await.is_err() {
                // It was refused. Who is cut off while sending may never see the answer.
                let rest = async { while let Some(Ok(_)) = body.frame().await {} };
                let _ = tokio::time::timeout(REFUSED_PATIENCE, rest).await;
                return;
            }
            if broken {
                return;
            }
        }
    };
    let (stored, ()) = tokio::join!(app.archive_body(name, reader, length), feed);
    stored
}

async fn fetch(app: &Arc<App>, name: ArchiveFileName, query: Option<&str>) -> Result<Answer, Failure> {
    let wanted = query.map(parse_wanted).transpose()?.unwrap_or_default();
    let (spooled, spool) = app.fetch(name, wanted).await?;
    if let Some(file) = wanted.directory.and_then(|inode| spool.hand_over(&spooled, inode)) {
        let mut answer = bytes(StatusCode::OK, OCTETS, Bytes::new());
        let value = HeaderValue::from_str(&file).map_err(Failure::internal)?;
        answer.headers_mut().insert(FILE_HEADER, value);
        return Ok(answer);
    }
    let unreadable = |error| Failure::io("reading the spool", &error);
    let length = spooled.file.metadata().map_err(unreadable)?.len();
    let (sender, chunks) = mpsc::channel(1);
    // No thread is held while the client takes its time, and no file for longer than the client may take.
    tokio::spawn(async move {
        let file = Arc::new(spooled.file);
        let mut position = 0;
        while position < length {
            let reading = file.clone();
            let read = tokio::task::spawn_blocking(move || read_chunk(&reading, position)).await;
            let chunk = read.unwrap_or_else(|panic| Err(io::Error::other(panic)));
            position += chunk.as_ref().map_or(length, |chunk| chunk.len() as u64);
            match tokio::time::timeout(TAKING_PATIENCE, sender.send(chunk)).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return,
            }
        }
    });
    Ok(streamed(OCTETS, Some(length), chunks))
}

fn read_chunk(file: &std::fs::File, position: u64) -> io::Result<Bytes> {
    let mut chunk = vec![0; CHUNK];
    let read = file.read_at(&mut chunk, position)?;
    if read == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    chunk.truncate(read);
    Ok(Bytes::from(chunk))
}

/// What a request for a file says about how it's wanted.
fn parse_wanted(query: &str) -> Result<Wanted, Failure> {
    let mut wanted = Wanted::default();
    for pair in query.split('&') {
        let understood = match pair.split_once('=') {
            Some(("system-identifier", number)) => number.parse().map(|system| wanted.system = Some(system)).is_ok(),
            Some(("directory", inode)) => inode.parse().map(|inode| wanted.directory = Some(inode)).is_ok(),
            Some(("tail", "yes")) => {
                wanted.tail = true;
                true
            }
            Some(("standby", "yes")) => {
                wanted.standby = true;
                true
            }
            _ => false,
        };
        if !understood {
            return Err(Failure::new(
                Code::InvalidRequest,
                format!("{pair:?} is none of system-identifier=NUMBER, directory=INODE, tail=yes, standby=yes"),
            ));
        }
    }
    Ok(wanted)
}

/// Which server asks to have a file of pg_wal archived, as the helper tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asker {
    /// Of its `pg_control`.
    pub system: SystemIdentifier,
    /// Of the file in its pg_wal.
    pub inode: u64,
}

impl Asker {
    fn parse(query: &str) -> Result<Asker, Failure> {
        let parsed = || {
            let (system, inode) = query.strip_prefix("system-identifier=")?.split_once("&inode=")?;
            Some(Asker { system: system.parse().ok()?, inode: inode.parse().ok()? })
        };
        parsed().ok_or_else(|| {
            Failure::new(Code::InvalidRequest, format!("{query:?} is not system-identifier=NUMBER&inode=NUMBER"))
        })
    }
}
