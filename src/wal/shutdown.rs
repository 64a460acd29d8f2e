//! The last WAL of a server that stops.
//!
//! A pod tells its containers to stop at the same time. PostgreSQL ends its sessions, switches to a new segment so that
//! everything committed is in complete ones, and writes its shutdown checkpoint behind that. So the daemon
//!
//! 1. goes on archiving while PostgreSQL stops (its archiver asks, and look-ahead runs),
//! 2. ships what is still `.ready` once it's gone, and what lies in the archive directory,
//! 3. keeps the tail: after an orderly stop it holds the shutdown checkpoint, after a crash committed transactions.
//!
//! Where PostgreSQL doesn't stop, only the sidecar is being restarted, and its WAL stays where it is.

use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use tokio::{net::TcpStream, time::Instant};

use super::{Origin, Origins, archive::Archiver, source::WalSource, tail};
use crate::{failure::Code, pgdata::ServerState};

const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Between two tries to reach the store. The drain timeout ends them.
const RETRY_EVERY: Duration = Duration::from_secs(1);
/// Names that are taken from a source at a time.
const BATCH: usize = 1_000;

/// Waits for PostgreSQL's end, `patience` for its beginning, and ships what it leaves. Has no end of its own while the
/// server is stopping or the store can't be reached: the caller has.
pub async fn finish(
    archiver: &Arc<Archiver>,
    origins: &dyn Origins,
    sources: &[Arc<dyn WalSource>],
    patience: Duration,
) {
    let asked = Instant::now();
    loop {
        let origin = match origins.origin().await {
            Ok(origin) => origin,
            // The data directory is gone, or the settings are wrong: nothing to ship.
            Err(failure) if failure.code != Code::StoreUnavailable => return,
            Err(_) => {
                tokio::time::sleep(RETRY_EVERY).await;
                continue;
            }
        };
        match origin.pgdata.server() {
            Ok(ServerState::Gone) => return ship_rest(archiver, &origin, sources).await,
            Ok(ServerState::Stopping) => {}
            Ok(ServerState::Running(port)) if asked.elapsed() >= patience => {
                if is_refused(port).await {
                    tracing::info!("PostgreSQL was killed: its postmaster.pid is there, but nobody listens");
                    return ship_rest(archiver, &origin, sources).await;
                }
                tracing::info!("PostgreSQL runs on; its WAL waits for the next start of pgsidecar");
                return;
            }
            Ok(ServerState::Running(_)) => {}
            Err(_) if asked.elapsed() >= patience => return,
            Err(_) => {}
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Whether nobody listens at this port, definitely.
async fn is_refused(port: Option<u16>) -> bool {
    let Some(port) = port else { return false };
    let connected = tokio::time::timeout(Duration::from_secs(1), TcpStream::connect((Ipv4Addr::LOCALHOST, port))).await;
    matches!(connected, Ok(Err(error)) if error.kind() == std::io::ErrorKind::ConnectionRefused)
}

/// Ships what waits, then the tail. PostgreSQL is gone, so that there will be no more.
async fn ship_rest(archiver: &Arc<Archiver>, origin: &Origin, sources: &[Arc<dyn WalSource>]) {
    let mut shipped = 0;
    for source in sources {
        shipped += ship_all(archiver, origin, source).await;
    }
    if shipped > 0 {
        tracing::info!(files = shipped, "shipped what PostgreSQL had left to be archived");
    }
    loop {
        match tail::keep(origin).await {
            Ok(()) => return,
            Err(failure) if failure.code == Code::StoreUnavailable => tokio::time::sleep(RETRY_EVERY).await,
            Err(failure) => {
                tracing::warn!(hint = failure.hint, "the end of the WAL could not be kept: {failure}");
                return;
            }
        }
    }
}

/// Ships what waits in a source; answers how many files that were.
async fn ship_all(archiver: &Arc<Archiver>, origin: &Origin, source: &Arc<dyn WalSource>) -> usize {
    let mut shipped = 0;
    'look: loop {
        let looked = {
            let (source, origin) = (source.clone(), origin.clone());
            tokio::task::spawn_blocking(move || source.look(&origin, BATCH)).await
        };
        // Told by the status for as long as it lasted.
        let Ok(Ok(found)) = looked else { return shipped };
        // Nobody renames the marks any more: what is archived stays `.ready` until PostgreSQL asks at its next start.
        let rest: Vec<_> = found.ready.into_iter().filter(|name| source.is_waiting(archiver, origin, *name)).collect();
        for name in &rest {
            match source.archive(archiver, origin, *name).await {
                Ok(_) => shipped += 1,
                Err(failure) if failure.code == Code::StoreUnavailable => {
                    tokio::time::sleep(RETRY_EVERY).await;
                    continue 'look;
                }
                // Told by the archiver. It stays on the volume, and what is behind it is shipped.
                Err(_) => {}
            }
        }
        if rest.len() < BATCH && !found.more_to_come {
            return shipped;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
