//! `pgsidecar snapshot begin|end|abort|list`

use std::time::Duration;

use clap::{Args, Subcommand};
use pgsidecar_core::{SnapshotId, SnapshotRecord};

use super::{OutputArgs, SystemArgs, open_repository, output};
use crate::{
    client::Client,
    failure::{Code, Failure},
    http::control::BeginSnapshot,
    settings::{Settings, parse_snapshot_timeout},
    snapshot::{OpenSnapshot, SnapshotList},
};

/// Snapshots by the storage.
#[derive(Subcommand, Debug)]
pub enum SnapshotCommand {
    /// Put PostgreSQL into backup mode; when this returns, the storage may snapshot the volumes
    Begin(BeginArgs),
    /// End backup mode and record the snapshot; only when this succeeds may it be used
    End(EndArgs),
    /// Give up a snapshot that is open
    Abort(AbortArgs),
    /// List the complete snapshots, and the one that is open
    List(ListArgs),
}

/// `snapshot begin`
#[derive(Args, Debug)]
pub struct BeginArgs {
    /// Take the checkpoint at once instead of spreading it: the snapshot begins sooner, PostgreSQL writes more for a moment
    #[arg(long)]
    fast: bool,
    /// A label that PostgreSQL keeps with it, and that 'snapshot end --label' goes by
    #[arg(long, value_name = "TEXT")]
    label: Option<String>,
    /// Give it up if it isn't ended within this time, 1s to 1h [default: that of PGSIDECAR_SNAPSHOT_TIMEOUT]
    #[arg(long, value_name = "TIME", value_parser = parse_timeout)]
    timeout: Option<Duration>,
    #[command(flatten)]
    output: OutputArgs,
}

/// `snapshot end`
#[derive(Args, Debug)]
pub struct EndArgs {
    /// The snapshot's id
    #[arg(value_name = "ID", required_unless_present = "label", conflicts_with = "label")]
    id: Option<SnapshotId>,
    /// End the open snapshot if it has this label, for hooks that can't know the id
    #[arg(long, value_name = "TEXT")]
    label: Option<String>,
    #[command(flatten)]
    output: OutputArgs,
}

/// `snapshot abort`
#[derive(Args, Debug)]
pub struct AbortArgs {
    /// The snapshot's id
    #[arg(value_name = "ID")]
    id: SnapshotId,
    #[command(flatten)]
    output: OutputArgs,
}

/// `snapshot list`
#[derive(Args, Debug)]
pub struct ListArgs {
    #[command(flatten)]
    system: SystemArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Whole seconds, as the API takes them.
fn parse_timeout(text: &str) -> Result<Duration, String> {
    let timeout = parse_snapshot_timeout(text)?;
    if timeout.subsec_nanos() == 0 { Ok(timeout) } else { Err(format!("{text:?} is not a number of whole seconds")) }
}

/// Runs one of the commands.
///
/// # Errors
/// What went wrong.
pub async fn run(settings: &Settings, command: SnapshotCommand) -> Result<(), Failure> {
    let client = Client::new(&settings.process.control_socket);
    match command {
        SnapshotCommand::Begin(args) => {
            let timeout_seconds = args.timeout.map(|timeout| timeout.as_secs());
            let request = BeginSnapshot { label: args.label, fast: args.fast, timeout_seconds };
            let open: OpenSnapshot = client.post("/v1/snapshots", &request).await?;
            if args.output.json { output::print_json(&open) } else { print_open(&open) }
        }
        SnapshotCommand::End(args) => {
            let id = match (args.id, &args.label) {
                (Some(id), _) => id,
                (None, label) => labelled(&client, label.as_deref().unwrap_or_default()).await?,
            };
            let record: SnapshotRecord = client.post(&format!("/v1/snapshots/{id}/end"), &()).await?;
            if args.output.json { output::print_json(&record) } else { print_record(&record) }
        }
        SnapshotCommand::Abort(args) => {
            let open: OpenSnapshot = client.delete(&format!("/v1/snapshots/{}", args.id)).await?;
            if args.output.json {
                return output::print_json(&open);
            }
            output::print_line(&format!(
                "Snapshot {} is given up. Delete what the storage has snapshotted: it must not be used.",
                open.id
            ))
        }
        SnapshotCommand::List(args) => {
            let list = list(settings, &client, &args.system).await?;
            if args.output.json { output::print_json(&list) } else { print_list(&list) }
        }
    }
}

/// The open snapshot that has this label.
async fn labelled(client: &Client<'_>, label: &str) -> Result<SnapshotId, Failure> {
    let list: SnapshotList = client.get("/v1/snapshots").await?;
    let open = list.open.filter(|open| open.label == label).map(|open| open.id);
    open.ok_or_else(|| {
        Failure::new(Code::NotFound, format!("no snapshot with the label {label:?} is open: what was snapshotted must not be used"))
            .hint("It wasn't begun, was ended already, its time limit ran out, or pgsidecar was restarted; the daemon's log tells. Begin again.")
    })
}

/// As the daemon tells it; the repository alone where there is none, as before a restore.
async fn list(settings: &Settings, client: &Client<'_>, system: &SystemArgs) -> Result<SnapshotList, Failure> {
    if system.system_identifier.is_none()
        && let Ok(list) = client.get("/v1/snapshots").await
    {
        return Ok(list);
    }
    let repository = open_repository(settings.work()?, system).await?;
    Ok(SnapshotList { open: None, complete: repository.snapshots().await? })
}

fn print_lines<const N: usize>(lines: [(&str, String); N]) -> Result<(), Failure> {
    lines.iter().try_for_each(|(name, value)| output::print_line(&format!("{name:<10} {value}")))
}

fn print_open(open: &OpenSnapshot) -> Result<(), Failure> {
    print_lines([
        ("Snapshot", open.id.to_string()),
        ("Open until", open.expires_at.strftime("%Y-%m-%d %H:%M:%SZ").to_string()),
        ("WAL", format!("from {}", open.start_lsn)),
    ])?;
    output::print_line(&format!("Take the storage's snapshot now, then run: pgsidecar snapshot end {}", open.id))
}

fn print_record(record: &SnapshotRecord) -> Result<(), Failure> {
    print_lines([
        ("Snapshot", record.id.to_string()),
        ("Complete", record.stopped_at.strftime("%Y-%m-%d %H:%M:%SZ").to_string()),
        ("WAL", format!("{} to {} on timeline {}", record.start_lsn, record.stop_lsn, record.timeline)),
        (
            "Server",
            format!("PostgreSQL {}{}", record.major_version(), if record.from_standby { ", a standby" } else { "" }),
        ),
    ])?;
    record.tablespaces.iter().try_for_each(|tablespace| {
        output::print_line(&format!("Tablespace {} at {}", tablespace.oid, tablespace.location))
    })
}

fn print_list(list: &SnapshotList) -> Result<(), Failure> {
    if let Some(open) = &list.open {
        eprintln!("{} ({}) is open, until {} at the latest", open.id, open.label, open.expires_at);
    }
    if list.complete.is_empty() {
        eprintln!("no complete snapshots");
        return Ok(());
    }
    let rows: Vec<[String; 5]> = list
        .complete
        .iter()
        .map(|record| {
            [
                record.id.to_string(),
                record.stopped_at.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
                record.timeline.to_string(),
                record.stop_lsn.to_string(),
                record.label.clone(),
            ]
        })
        .collect();
    output::print_table(["SNAPSHOT", "COMPLETE", "TIMELINE", "LSN", "LABEL"], &rows)
}
