//! `pgsidecar restore-point create|list|record`

use clap::{Args, Subcommand};
use pgsidecar_core::{Lsn, TimelineId, recovery::RestorePointName, restore_point::RestorePointRecord};

use super::{OutputArgs, SystemArgs, open_repository, output};
use crate::{
    client::Client,
    failure::Failure,
    http::control::CreateRestorePoint,
    restore_point::{self, CreatedRestorePoint, Shipping},
    settings::Settings,
};

/// Named restore points.
#[derive(Subcommand, Debug)]
pub enum RestorePointCommand {
    /// Make a restore point now, and wait until it can be restored to
    Create(CreateArgs),
    /// List the restore points that are recorded
    List(ListArgs),
    /// Record one that is in the archived WAL already: made with pg_create_restore_point(), or left without its record
    Record(RecordArgs),
}

/// `restore-point create`
#[derive(Args, Debug)]
pub struct CreateArgs {
    /// Its name, up to 63 bytes. The same name can be used again: the newest is then meant by it
    #[arg(value_name = "NAME")]
    name: RestorePointName,
    /// Don't wait until its WAL is in the repository
    #[arg(long)]
    no_wait: bool,
    /// Don't end the WAL segment, and don't wait: it's archived once it's full
    #[arg(long)]
    no_switch: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// `restore-point list`
#[derive(Args, Debug)]
pub struct ListArgs {
    #[command(flatten)]
    system: SystemArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// `restore-point record`
#[derive(Args, Debug)]
pub struct RecordArgs {
    /// Its name
    #[arg(value_name = "NAME")]
    name: RestorePointName,
    /// What pg_create_restore_point() answered
    #[arg(long, value_name = "LSN")]
    lsn: Lsn,
    /// The timeline that it lies on [default: the newest]
    #[arg(long, value_name = "N")]
    timeline: Option<TimelineId>,
    #[command(flatten)]
    system: SystemArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs one of the commands.
///
/// # Errors
/// What went wrong.
pub async fn run(settings: &Settings, command: RestorePointCommand) -> Result<(), Failure> {
    match command {
        RestorePointCommand::Create(args) => {
            let shipping = match (args.no_switch, args.no_wait) {
                (true, _) => Shipping::Later,
                (false, true) => Shipping::Switch,
                (false, false) => Shipping::Wait,
            };
            let client = Client::new(&settings.process.control_socket);
            let request = CreateRestorePoint { name: args.name, shipping };
            let made: CreatedRestorePoint = client.post("/v1/restore-points", &request).await?;
            if args.output.json {
                return output::print_json(&made);
            }
            print_record(&made.record)?;
            if made.archived {
                return Ok(());
            }
            output::print_line("It can be restored to once its WAL is archived.")
        }
        RestorePointCommand::List(args) => {
            let repository = open_repository(settings.work()?, &args.system).await?;
            let points = repository.restore_points().await?;
            if args.output.json { output::print_json(&points) } else { print_list(&points) }
        }
        RestorePointCommand::Record(args) => {
            let repository = open_repository(settings.work()?, &args.system).await?;
            let newest = repository.timelines().await?.into_iter().max();
            let timeline = args.timeline.or(newest).unwrap_or(TimelineId::FIRST);
            let record = restore_point::record(&repository, args.name, args.lsn, timeline).await?;
            if args.output.json { output::print_json(&record) } else { print_record(&record) }
        }
    }
}

fn print_record(record: &RestorePointRecord) -> Result<(), Failure> {
    output::print_line(&format!("Restore point {}, at {} on timeline {}", record.name, record.lsn, record.timeline))
}

fn print_list(points: &[RestorePointRecord]) -> Result<(), Failure> {
    if points.is_empty() {
        eprintln!("no restore points are recorded");
        return Ok(());
    }
    let rows: Vec<[String; 4]> = points
        .iter()
        .map(|point| {
            [
                point.name.to_string(),
                point.created_at.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
                point.timeline.to_string(),
                point.lsn.to_string(),
            ]
        })
        .collect();
    output::print_table(["NAME", "MADE", "TIMELINE", "LSN"], &rows)
}
