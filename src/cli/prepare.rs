//! `pgsidecar prepare`

use std::path::PathBuf;

use clap::Args;

use super::restore::show_progress;
use crate::{
    failure::Failure,
    prepare,
    settings::{RawPrepare, Settings},
};

/// `prepare`
#[derive(Args, Debug)]
pub struct PrepareArgs {
    #[command(flatten)]
    prepare: RawPrepare,
    /// Put pgsidecar-wal into this directory, where PostgreSQL's container finds it
    #[arg(long, env = "PGSIDECAR_PUBLISH_HELPER", value_name = "DIR", hide_env_values = true)]
    publish_helper: Option<String>,
}

/// Runs the command.
///
/// # Errors
/// Why PostgreSQL mustn't start.
pub async fn run(settings: &Settings, args: &PrepareArgs) -> Result<(), Failure> {
    let publish_helper = args.publish_helper.as_ref().filter(|text| !text.is_empty()).map(PathBuf::from);
    let show = |progress| show_progress(progress, false);
    prepare::run(settings, &args.prepare, publish_helper.as_deref(), &show).await
}
