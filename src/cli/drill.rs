//! `pgsidecar drill run|list`

use std::{process::ExitCode, time::Duration};

use clap::{Args, Subcommand};
use pgsidecar_core::{DrillRecord, drill::DrillOutcome, settings::parse_duration};
use serde::Serialize;

use super::{
    OutputArgs, SystemArgs, open_repository, output,
    restore::TargetArgs,
    side::{Narrator, SideArgs, unless_signalled},
};
use crate::{
    failure::{Code, Failure},
    settings::Settings,
    side::drill::{DrillRequest, drill},
};

/// Drills.
#[derive(Subcommand, Debug)]
pub enum DrillCommand {
    /// Restore to a private server, let it recover, and check what it holds; ends with 65 if that fails
    Run(RunArgs),
    /// List the drills that were recorded
    List(ListArgs),
}

/// `drill run`
#[derive(Args, Debug)]
pub struct RunArgs {
    /// A query that must succeed and, if it answers with booleans, be true; can be given several times
    #[arg(long, value_name = "SQL")]
    query: Vec<String>,
    /// The database in which the queries run [default: PGDATABASE]
    #[arg(long, value_name = "NAME")]
    query_database: Option<String>,
    /// Don't look for damage in tables and indexes with pg_amcheck
    #[arg(long)]
    no_amcheck: bool,
    /// Look for every row in every index, too; takes long
    #[arg(long, conflicts_with = "no_amcheck")]
    heapallindexed: bool,
    /// Leave no record in the repository
    #[arg(long)]
    no_record: bool,
    #[command(flatten)]
    side: SideArgs,
    #[command(flatten)]
    output: OutputArgs,
    // Last: whatever follows would stand under its heading in --help.
    #[command(flatten)]
    target: TargetArgs,
}

/// `drill list`
#[derive(Args, Debug)]
pub struct ListArgs {
    /// How far back
    #[arg(long, value_name = "TIME", default_value = "90d", value_parser = parse_duration)]
    within: Duration,
    #[command(flatten)]
    system: SystemArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs one of the commands.
///
/// # Errors
/// What kept it from being tried. How the drill went is a result: the exit code tells it.
pub async fn run(settings: &Settings, command: DrillCommand) -> Result<ExitCode, Failure> {
    match command {
        DrillCommand::Run(args) => run_drill(settings, args).await,
        DrillCommand::List(args) => list(settings, &args).await.map(|()| ExitCode::SUCCESS),
    }
}

/// What `drill run --json` prints.
#[derive(Serialize)]
struct Told<'a> {
    #[serde(flatten)]
    record: &'a DrillRecord,
    recorded: bool,
}

async fn run_drill(settings: &Settings, args: RunArgs) -> Result<ExitCode, Failure> {
    let work = settings.work()?;
    let request = DrillRequest {
        restore: args.target.request()?,
        amcheck: !args.no_amcheck,
        heapallindexed: args.heapallindexed,
        queries: args.query.clone(),
        query_database: args.query_database.clone().unwrap_or_else(|| work.connection.database.clone()),
    };
    let options = args.side.options(work, !args.target.target_exclusive)?;
    let repository = open_repository(work, &args.side.system).await?;
    let narrator = Narrator::new(args.output.json);
    let drilling = async { Ok(drill(&repository, &request, options, &narrator).await) };
    let mut drilled = unless_signalled(Box::pin(drilling)).await?;
    let record = &mut drilled.record;
    let stored = if args.no_record { None } else { Some(repository.store_drill(record).await) };
    if args.output.json {
        output::print_json(&Told { record, recorded: matches!(stored, Some(Ok(()))) })?;
    } else {
        print_record(record)?;
    }
    if let Some(kept) = &drilled.kept {
        eprintln!("What was restored is left in {}: remove it when you're done.", kept.display());
    }
    if let Some(Err(failure)) = &stored {
        output::print_failure(&failure.clone().context("the drill's record could not be stored"));
    }
    let code = match (record.outcome, &drilled.failure, stored) {
        (DrillOutcome::Failed, ..) => Code::Damaged.exit_code(),
        (DrillOutcome::NotTried, Some(failure), _) => failure.code.exit_code(),
        (_, _, Some(Err(failure))) => failure.code.exit_code(),
        (DrillOutcome::NotTried, None, _) => Code::Internal.exit_code(),
        (DrillOutcome::Passed, ..) => 0,
    };
    Ok(ExitCode::from(code))
}

fn print_record(record: &DrillRecord) -> Result<(), Failure> {
    let took = record.ended_at.duration_since(record.started_at).as_secs();
    output::print_line(&format!("Drill      {}", record.id))?;
    if let Some(backup) = record.backup {
        output::print_line(&format!("Backup     {backup}"))?;
    }
    if record.chain.len() > 1 {
        let links: Vec<String> = record.chain.iter().map(ToString::to_string).collect();
        output::print_line(&format!("Chain      {}", links.join(", then ")))?;
    }
    output::print_line(&format!("Target     {}", record.target))?;
    if let (Some(reached), Some(timeline)) = (record.reached, record.timeline) {
        output::print_line(&format!("Recovered  to {reached} of timeline {timeline}"))?;
    }
    let outcome = match record.outcome {
        DrillOutcome::Passed => "passed",
        DrillOutcome::Failed => "FAILED",
        DrillOutcome::NotTried => "NOT TRIED, which says nothing of the backup",
    };
    output::print_line(&format!("Outcome    {outcome}, after {took} s"))
}

async fn list(settings: &Settings, args: &ListArgs) -> Result<(), Failure> {
    let repository = open_repository(settings.work()?, &args.system).await?;
    let mut records = Vec::new();
    for id in repository.drill_ids(args.within).await? {
        match repository.drill(id).await {
            Ok(record) => records.extend(record),
            Err(failure) if failure.code == Code::Damaged => output::print_failure(&failure),
            Err(failure) => return Err(failure),
        }
    }
    if args.output.json {
        return output::print_json(&records);
    }
    if records.is_empty() {
        eprintln!("no drills yet; 'pgsidecar drill run' tries a restore out");
        return Ok(());
    }
    let rows: Vec<[String; 6]> = records
        .iter()
        .map(|record| {
            let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
            let wrong = record.steps.iter().find(|step| step.outcome == record.outcome);
            let wrong = wrong.filter(|_| record.outcome != DrillOutcome::Passed);
            [
                record.id.to_string(),
                record.outcome.to_string(),
                or_none(record.backup.map(|backup| backup.to_string())),
                or_none(record.reached.map(|reached| reached.to_string())),
                format!("{} s", record.ended_at.duration_since(record.started_at).as_secs()),
                or_none(wrong.map(|step| format!("{}: {}", step.step, step.message))),
            ]
        })
        .collect();
    output::print_table(["DRILL", "OUTCOME", "BACKUP", "REACHED", "TOOK", "WHY"], &rows)
}
