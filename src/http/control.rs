//! What the command-line tool asks the daemon for, on a Unix socket.
//!
//! ```text
//! POST /v1/backups               {"label": …, "fast": …, "type": …, "max_rate": …}: starts a base backup; 202 with the job
//! POST /v1/backups/plan          the same: what kind of backup it would be, and why
//! GET  /v1/backups               the backups in the repository
//! GET  /v1/backups/{id}          one of them
//! POST /v1/dumps                 a DumpRequest: starts a dump; 202 with the job
//! GET  /v1/dumps                 the dumps in the repository
//! GET  /v1/dumps/{id}            one of them
//! POST /v1/restores              a RestoreOrder: restores beside the database that is there, to take its place; 202 with the job
//! GET  /v1/restores              what is prepared to take its place, and what is kept of earlier databases
//! POST /v1/restores/undo         prepares that what was there before the last restore comes back
//! DELETE /v1/restores/pending    takes back what is prepared
//! DELETE /v1/restores/kept       removes what is kept
//! GET  /v1/jobs/{id}             a job
//! GET  /v1/jobs/{id}/events      the job twice a second until it has ended, a JSON object a line
//! POST /v1/prune                 {"dry_run": …}: removes what the retention doesn't keep; 202 with the job
//! POST /v1/backups/{id}/pin      {"reason": …}: keeps the backup
//! DELETE /v1/backups/{id}/pin    keeps it no longer than the others
//! POST /v1/snapshots             {"label": …, "fast": …, "timeout_seconds": …}: begins a storage snapshot
//! POST /v1/snapshots/{id}/end    ends it; the record, once it's complete
//! DELETE /v1/snapshots/{id}      gives it up
//! GET  /v1/snapshots             the one that is open, and those in the repository
//! POST /v1/restore-points        {"name": …, "shipping": …}: makes a restore point; its record
//! GET  /v1/restore-points        those in the repository
//! GET  /v1/schedule              what is done by schedule: when next, and how it went
//! GET  /healthz                  whether the daemon is there
//! GET  /v1/status
//! ```

use std::{io, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::{Method, Request, StatusCode, body::Incoming};
use pgsidecar_core::{chain::BackupType, recovery::RestorePointName};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::sync::mpsc;

use super::{Answer, alive, json, no_such_route, streamed};
use crate::{
    backup::BackupRequest,
    daemon::App,
    failure::{Code, Failure},
    jobs::JobId,
    restore_point::{RestorePointRequest, Shipping},
};

const MAX_REQUEST_BYTES: usize = 64 * 1024;
const EVENT_INTERVAL: Duration = Duration::from_millis(500);

/// The body of `POST /v1/backups`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CreateBackup {
    /// For `backup_label`.
    pub label: Option<String>,
    /// Whether to take the checkpoint at once instead of spreading it.
    pub fast: bool,
    /// What kind of backup.
    #[serde(rename = "type")]
    pub wanted: BackupType,
    /// Bytes of the data directory that are read in a second, at most.
    pub max_rate: Option<u64>,
}

/// The body of `POST /v1/snapshots`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BeginSnapshot {
    /// For `backup_label`.
    pub label: Option<String>,
    /// Whether to take the checkpoint at once instead of spreading it.
    pub fast: bool,
    /// How long it may stay open; the setting's where it's left out.
    pub timeout_seconds: Option<u64>,
}

/// The body of `POST /v1/restore-points`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateRestorePoint {
    /// Its name.
    pub name: RestorePointName,
    /// What is to happen with its WAL.
    #[serde(default)]
    pub shipping: Shipping,
}

/// The body of `POST /v1/prune`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PruneRequest {
    /// Whether nothing is removed.
    pub dry_run: bool,
}

/// The body of `POST /v1/backups/{id}/pin`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PinBackup {
    /// Why, for people.
    pub reason: String,
}

/// Answers one request.
///
/// # Errors
/// What the answer tells.
pub async fn handle(app: Arc<App>, request: Request<Incoming>) -> Result<Answer, Failure> {
    let path = request.uri().path().to_owned();
    let segments: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    let not_found = |what: &str| Failure::new(Code::NotFound, format!("there is no {what}"));
    match (request.method(), segments.as_slice()) {
        (&Method::POST, ["v1", "backups"]) => {
            let CreateBackup { label, fast, wanted, max_rate } = read(request).await?;
            let label = label.unwrap_or_else(|| "pgsidecar".to_owned());
            let request = BackupRequest { label, fast, wanted, max_rate };
            let job = app.start_backup(request)?;
            Ok(json(StatusCode::ACCEPTED, &job.snapshot()))
        }
        (&Method::POST, ["v1", "backups", "plan"]) => {
            let CreateBackup { wanted, .. } = read(request).await?;
            Ok(json(StatusCode::OK, &app.plan_backup(wanted).await?))
        }
        (&Method::GET, ["v1", "backups"]) => Ok(json(StatusCode::OK, &app.repository()?.backups().await?)),
        (&Method::GET, ["v1", "backups", id]) => {
            let backup = match id.parse() {
                Ok(id) => app.repository()?.backup(id).await?,
                Err(_) => None,
            };
            Ok(json(StatusCode::OK, &backup.ok_or_else(|| not_found(&format!("backup {id}")))?))
        }
        (&Method::POST, ["v1", "prune"]) => {
            let PruneRequest { dry_run } = read(request).await?;
            Ok(json(StatusCode::ACCEPTED, &app.start_prune(dry_run)?.snapshot()))
        }
        (&Method::POST, ["v1", "backups", id, "pin"]) => {
            let id = id.parse().map_err(|_| not_found(&format!("backup {id}")))?;
            let PinBackup { reason } = read(request).await?;
            Ok(json(StatusCode::OK, &app.pin(id, &reason).await?))
        }
        (&Method::DELETE, ["v1", "backups", id, "pin"]) => {
            let id = id.parse().map_err(|_| not_found(&format!("backup {id}")))?;
            app.unpin(id).await?;
            Ok(json(StatusCode::OK, &serde_json::json!({ "backup": id })))
        }
        (&Method::POST, ["v1", "dumps"]) => {
            Ok(json(StatusCode::ACCEPTED, &app.start_dump(read(request).await?)?.snapshot()))
        }
        (&Method::GET, ["v1", "dumps"]) => Ok(json(StatusCode::OK, &app.repository()?.dumps().await?)),
        (&Method::GET, ["v1", "dumps", id]) => {
            let dump = match id.parse() {
                Ok(id) => app.repository()?.dump(id).await?,
                Err(_) => None,
            };
            Ok(json(StatusCode::OK, &dump.ok_or_else(|| not_found(&format!("dump {id}")))?))
        }
        (&Method::POST, ["v1", "snapshots"]) => {
            let BeginSnapshot { label, fast, timeout_seconds } = read(request).await?;
            let begun = app.begin_snapshot(label, fast, timeout_seconds.map(Duration::from_secs)).await?;
            Ok(json(StatusCode::CREATED, &begun))
        }
        (&Method::GET, ["v1", "snapshots"]) => Ok(json(StatusCode::OK, &app.snapshots().await?)),
        (&Method::POST, ["v1", "snapshots", id, "end"]) => {
            let id = id.parse().map_err(|_| not_found(&format!("snapshot {id}")))?;
            Ok(json(StatusCode::OK, &app.end_snapshot(id).await?))
        }
        (&Method::DELETE, ["v1", "snapshots", id]) => {
            let id = id.parse().map_err(|_| not_found(&format!("snapshot {id}")))?;
            Ok(json(StatusCode::OK, &app.abort_snapshot(id)?))
        }
        (&Method::POST, ["v1", "restores"]) => {
            let job = app.start_restore(read(request).await?)?;
            Ok(json(StatusCode::ACCEPTED, &job.snapshot()))
        }
        (&Method::GET, ["v1", "restores"]) => Ok(json(StatusCode::OK, &app.restores().await?)),
        (&Method::POST, ["v1", "restores", "undo"]) => Ok(json(StatusCode::OK, &app.undo_restore().await?)),
        (&Method::DELETE, ["v1", "restores", "pending"]) => Ok(json(StatusCode::OK, &app.cancel_restore().await?)),
        (&Method::DELETE, ["v1", "restores", "kept"]) => Ok(json(StatusCode::OK, &app.clean_restores().await?)),
        (&Method::POST, ["v1", "restore-points"]) => {
            let asked: Option<CreateRestorePoint> = read(request).await?;
            let CreateRestorePoint { name, shipping } = asked
                .ok_or_else(|| Failure::new(Code::InvalidRequest, "a restore point needs a name: {\"name\": …}"))?;
            let made = app.create_restore_point(RestorePointRequest { name, shipping }).await?;
            Ok(json(StatusCode::CREATED, &made))
        }
        (&Method::GET, ["v1", "restore-points"]) => Ok(json(StatusCode::OK, &app.restore_points().await?)),
        (&Method::GET, ["v1", "schedule"]) => Ok(json(StatusCode::OK, &app.schedule()?)),
        (&Method::GET, ["v1", "jobs", id, rest @ ..]) => {
            let job = id
                .parse()
                .ok()
                .and_then(|id: JobId| app.jobs().get(id))
                .ok_or_else(|| not_found(&format!("job {id}")))?;
            match rest {
                [] => Ok(json(StatusCode::OK, &job.snapshot())),
                ["events"] => {
                    let (sender, lines) = mpsc::channel::<io::Result<Bytes>>(2);
                    tokio::spawn(async move {
                        loop {
                            let snapshot = job.snapshot();
                            let mut line = serde_json::to_vec(&snapshot).unwrap_or_default();
                            line.push(b'\n');
                            if sender.send(Ok(Bytes::from(line))).await.is_err() || snapshot.outcome.is_some() {
                                return;
                            }
                            job.ended(EVENT_INTERVAL).await;
                        }
                    });
                    Ok(streamed("application/x-ndjson", None, lines))
                }
                _ => Err(no_such_route(&request)),
            }
        }
        (&Method::GET, ["healthz"]) => Ok(alive()),
        (&Method::GET, ["v1", "status"]) => Ok(json(StatusCode::OK, &app.status().await)),
        _ => Err(no_such_route(&request)),
    }
}

async fn read<T: DeserializeOwned + Default>(request: Request<Incoming>) -> Result<T, Failure> {
    let body = Limited::new(request.into_body(), MAX_REQUEST_BYTES).collect().await;
    let bytes = body
        .map_err(|error| Failure::new(Code::InvalidRequest, format!("the request can't be read: {error}")))?
        .to_bytes();
    if bytes.is_empty() {
        return Ok(T::default());
    }
    serde_json::from_slice(&bytes)
        .map_err(|error| Failure::new(Code::InvalidRequest, format!("the request makes no sense: {error}")))
}
