//! `pgsidecar await`: for the hook after the sidecar's start that PostgreSQL's start waits for.

use std::time::Duration;

use clap::Args;
use pgsidecar_core::settings::parse_duration;
use tokio::time::Instant;

use crate::{
    client::Client,
    failure::{Code, Failure},
    settings::{ProcessSettings, Settings},
};

/// Between two tries, at first and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// How long one try may take: a daemon that hangs now may be another one a moment later.
const TRY_LIMIT: Duration = Duration::from_secs(2);

/// Nobody waits longer.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// `await`
#[derive(Args, Debug)]
pub struct AwaitArgs {
    /// How long it's waited for
    #[arg(long, value_name = "TIME", value_parser = timeout, default_value = "30s")]
    timeout: Duration,
    /// End with 0 even if it doesn't answer in time, and warn: for hooks that must not keep PostgreSQL from starting
    #[arg(long)]
    lenient: bool,
}

fn timeout(text: &str) -> Result<Duration, String> {
    let timeout = parse_duration(text).map_err(|problem| problem.to_string())?;
    (timeout <= LONGEST).then_some(timeout).ok_or_else(|| format!("{text:?} is more than a day"))
}

/// Waits until the daemon answers on both listeners, whatever its settings and its store are like.
///
/// # Errors
/// [`Code::Timeout`] if it doesn't, unless it may.
pub async fn run(settings: &Settings, args: &AwaitArgs) -> Result<(), Failure> {
    match until_it_answers(&settings.process, args.timeout).await {
        Err(failure) if args.lenient => {
            tracing::warn!(hint = failure.hint, "{failure}; what waits for it goes on");
            Ok(())
        }
        ended => ended,
    }
}

async fn until_it_answers(process: &ProcessSettings, patience: Duration) -> Result<(), Failure> {
    let end = Instant::now() + patience;
    let mut pause = PAUSES.0;
    loop {
        // At least one try, also where there is no time to wait.
        let limit = TRY_LIMIT.min(end.saturating_duration_since(Instant::now())).max(PAUSES.0);
        let why = match tokio::time::timeout(limit, answers(process)).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(failure)) => failure.message,
            Err(_) => format!("it takes connections and doesn't answer within {limit:?}"),
        };
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Failure::new(Code::Timeout, format!("the daemon hasn't come up within {patience:?}: {why}"))
                .hint("Its log says why. Until it answers, PostgreSQL's archive calls fail and its WAL stays where it is."));
        }
        tokio::time::sleep(pause.min(left)).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

async fn answers(process: &ProcessSettings) -> Result<(), Failure> {
    Client::at(process.wal_listen).ping().await?;
    Client::new(&process.control_socket).ping().await
}
