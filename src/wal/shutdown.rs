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

use tokio::{
    net::{TcpStream, UnixStream},
    time::Instant,
};

use pgsidecar_core::ArchiveFileName;

use super::{Origin, Origins, archive::Archiver, source::WalSource, tail};
use crate::{
    failure::Code,
    pgdata::{Listening, ServerState, archiving_order},
};

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
            Ok(ServerState::Stopping(listening) | ServerState::Running(listening))
                if asked.elapsed() >= patience && is_refused(&listening).await =>
            {
                // It listens until all its processes have ended, also while it stops.
                tracing::info!("PostgreSQL was killed: its postmaster.pid is there, but nobody listens");
                return ship_rest(archiver, &origin, sources).await;
            }
            Ok(ServerState::Running(_)) if asked.elapsed() >= patience => {
                tracing::info!("PostgreSQL runs on; its WAL waits for the next start of pgsidecar");
                return;
            }
            Ok(ServerState::Stopping(_) | ServerState::Running(_)) => {}
            Err(_) if asked.elapsed() >= patience => return,
            Err(_) => {}
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Whether nobody listens, definitely: a socket that can't be reached from here, or isn't there, tells nothing.
async fn is_refused(listening: &Listening) -> bool {
    let refused = |error: std::io::Error| error.kind() == std::io::ErrorKind::ConnectionRefused;
    let connecting = async {
        match (listening.port, &listening.socket) {
            (Some(port), _) => TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.is_err_and(refused),
            (None, Some(socket)) => UnixStream::connect(socket).await.is_err_and(refused),
            (None, None) => false,
        }
    };
    tokio::time::timeout(Duration::from_secs(1), connecting).await.unwrap_or(false)
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

/// Ships what waits in a source, in order; answers how many files that were.
async fn ship_all(archiver: &Arc<Archiver>, origin: &Origin, source: &Arc<dyn WalSource>) -> usize {
    let (mut shipped, mut last) = (0, None);
    loop {
        let (looking, from) = ((source.clone(), archiver.clone(), origin.clone()), last);
        let looked = tokio::task::spawn_blocking(move || {
            let (source, archiver, origin) = looking;
            let behind =
                |name: &ArchiveFileName| from.is_none_or(|from| archiving_order(&from) < archiving_order(name));
            source.look(&archiver, &origin, BATCH, &behind)
        });
        // Told by the status for as long as it lasted.
        let Ok(Ok(found)) = looked.await else { return shipped };
        if found.ready.is_empty() && !found.more_to_come {
            return shipped;
        }
        if found.ready.is_empty() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
        for name in found.ready {
            // Any other failure is told by the archiver: it stays on the volume, and what is behind it is shipped.
            let outcome = loop {
                match source.archive(archiver, origin, name).await {
                    Err(failure) if failure.code == Code::StoreUnavailable => tokio::time::sleep(RETRY_EVERY).await,
                    outcome => break outcome,
                }
            };
            shipped += usize::from(outcome.is_ok());
            // What isn't whole yet may come to be: it isn't left behind while more is to come.
            last = if found.more_to_come { last } else { Some(name) };
        }
    }
}
