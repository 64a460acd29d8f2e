//! `pgsidecar wal list|verify|get|take-over`

use std::{
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use clap::{Args, Subcommand};
use pgsidecar_core::{ArchiveFileName, Lsn, MAX_GAPS, SegmentName, TimelineId, settings::parse_duration};
use serde::Serialize;

use super::{OutputArgs, SystemArgs, open_repository, output, progress::Shown};
use crate::{
    failure::{Code, Failure},
    pgdata::DataDirectory,
    settings::{Settings, WorkSettings},
    wal::{
        get::{self, GetRequest, Private},
        owner::{self, TimelineOwner},
        survey::{Survey, survey},
        verify::{Verification, VerifyOptions, VerifyProgress, verify},
    },
};

/// Archived WAL.
#[derive(Subcommand, Debug)]
pub enum WalCommand {
    /// List what is archived of each timeline, with its gaps
    List(ListArgs),
    /// Check that all WAL is there that restores could need; ends with 65 if some is missing or damaged
    Verify(VerifyArgs),
    /// Fetch one WAL file without a daemon, as restore_command: ends with 0 if it's there, with 1 if the store has said
    /// that it isn't, and with 200 if it can't be told. Not for a standby: there, use pgsidecar-wal
    Get(GetArgs),
    /// Make this workload the one that archives a timeline, in place of another whose server must not run any more
    TakeOver(TakeOverArgs),
}

/// `wal list`
#[derive(Args, Debug)]
pub struct ListArgs {
    /// Only this timeline, by its number: 10 for 0000000A…
    #[arg(long, value_name = "N")]
    timeline: Option<TimelineId>,
    #[command(flatten)]
    system: SystemArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// `wal verify`
#[derive(Args, Debug)]
pub struct VerifyArgs {
    /// Read every segment too, and check its content, its size and its header
    #[arg(long)]
    deep: bool,
    /// Only what restores to this timeline could need; by its number: 10 for 0000000A…
    #[arg(long, value_name = "N")]
    timeline: Option<TimelineId>,
    #[command(flatten)]
    system: SystemArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// `wal get`
#[derive(Args, Debug)]
pub struct GetArgs {
    /// The file's name, restore_command's %f
    #[arg(value_name = "NAME")]
    name: ArchiveFileName,
    /// Where to put it, restore_command's %p
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Where the whole segment doesn't exist, take what a stopped server had of it
    #[arg(long)]
    tail: bool,
    /// Say of every segment behind this one that it isn't there
    #[arg(long, value_name = "SEGMENT")]
    through: Option<SegmentName>,
    /// For a private copy, whose replay begins at this LSN: refuse a segment that creates a tablespace where something lies
    #[arg(long, value_name = "LSN", requires = "notes")]
    private_from: Option<Lsn>,
    /// With --private-from: a file to note what the last segment ended with
    #[arg(long, value_name = "FILE", requires = "private_from")]
    notes: Option<PathBuf>,
    /// How long to wait for a store that can't be reached
    #[arg(long, value_name = "TIME", default_value = "5min", value_parser = parse_duration)]
    timeout: Duration,
    #[command(flatten)]
    system: SystemArgs,
}

/// `wal take-over`
#[derive(Args, Debug)]
pub struct TakeOverArgs {
    /// Which timeline, by its number [default: that of PGDATA]
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
/// What went wrong. Missing and damaged WAL is a result, not an error: the exit code tells it.
pub async fn run(settings: &Settings, command: WalCommand) -> Result<ExitCode, Failure> {
    if let WalCommand::Get(args) = command {
        return Ok(get_file(settings, args).await);
    }
    let work = settings.work()?;
    match command {
        WalCommand::Get(_) => Ok(ExitCode::from(CANNOT_TELL)),
        WalCommand::List(args) => {
            let repository = open_repository(work, &args.system).await?;
            let survey = survey(&repository, args.timeline).await?;
            if args.output.json {
                output::print_json(&survey)?
            } else {
                print_survey(&survey)?
            }
            Ok(ExitCode::SUCCESS)
        }
        WalCommand::TakeOver(args) => take_over(work, &args).await.map(|()| ExitCode::SUCCESS),
        WalCommand::Verify(args) => {
            let repository = open_repository(work, &args.system).await?;
            let readers = if args.deep { work.parallelism } else { 0 };
            let progress = Arc::new(VerifyProgress::default());
            let shown = show_progress(progress.clone(), args.deep, args.output.json);
            let options = VerifyOptions { timeline: args.timeline, readers };
            let verified = verify(&repository, options, &progress).await;
            shown.abort();
            let _ = shown.await;
            let verified = verified?;
            if args.output.json {
                output::print_json(&verified)?
            } else {
                print_verification(&verified)?
            }
            Ok(if verified.ok { ExitCode::SUCCESS } else { ExitCode::from(Code::Damaged.exit_code()) })
        }
    }
}

/// The exit code of `wal get` where it can't be told whether there is such a file. PostgreSQL stops then, rather than take
/// it for the end of the archive.
pub const CANNOT_TELL: u8 = 200;

impl WalCommand {
    /// Whether PostgreSQL reads the exit code.
    pub fn is_restore_command(&self) -> bool {
        matches!(self, WalCommand::Get(_))
    }
}

/// Whether a command line that can't be understood is meant to be `wal get`.
pub fn looks_like_get(arguments: impl Iterator<Item = std::ffi::OsString>) -> bool {
    let arguments: Vec<_> = arguments.collect();
    arguments.windows(2).any(|pair| pair[0] == "wal" && pair[1] == "get")
}

async fn get_file(settings: &Settings, args: GetArgs) -> ExitCode {
    let got = match settings.work() {
        Err(failure) => Err(failure),
        Ok(work) => {
            let work = work.clone();
            // A task of its own: a panic would end the process with a code that means "not there".
            let task = tokio::spawn(async move {
                let request = GetRequest {
                    name: args.name,
                    to: args.file,
                    tail: args.tail,
                    through: args.through,
                    archive_directory: work.archive_directory.clone(),
                    patience: args.timeout,
                    private: args.private_from.zip(args.notes).map(|(from, notes)| Private { from, notes }),
                };
                get::get(&open_repository(&work, &args.system).await?, &request).await
            });
            task.await.unwrap_or_else(|panic| Err(panic.into()))
        }
    };
    match got {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output::print_failure(&failure);
            ExitCode::from(if failure.code == Code::NotInArchive { 1 } else { CANNOT_TELL })
        }
    }
}

/// What `wal take-over` has done.
#[derive(Serialize)]
struct TakenOver {
    timeline: TimelineId,
    workload: String,
    before: Option<TimelineOwner>,
}

async fn take_over(work: &WorkSettings, args: &TakeOverArgs) -> Result<(), Failure> {
    let us = work.claimant().ok_or_else(|| {
        Failure::new(Code::Misconfigured, "PGSIDECAR_WORKLOAD: needed here, and neither set nor known")
            .hint("Set it to a name that stays when this container is replaced.")
    })?;
    let repository = open_repository(work, &args.system).await?;
    let timeline = match args.timeline {
        Some(timeline) => timeline,
        None => DataDirectory::open(work.pgdata()?)?.control()?.timeline,
    };
    let before = owner::take_over(&repository, timeline, &us).await?;
    let taken = TakenOver { timeline, workload: us.workload, before };
    if args.output.json {
        return output::print_json(&taken);
    }
    let before = match &taken.before {
        Some(owner) if owner.workload == taken.workload => {
            return output::print_line(&format!(
                "Timeline {timeline} is archived by {} already, since {}.",
                owner.workload, owner.claimed_at
            ));
        }
        Some(owner) => format!("before: {}, since {}", owner.workload, owner.claimed_at),
        None => "it had no owner".to_owned(),
    };
    output::print_line(&format!("Timeline {timeline} is archived by {} now ({before}).", taken.workload))
}

fn show_progress(progress: Arc<VerifyProgress>, deep: bool, json: bool) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        let mut shown = Shown::new(json);
        loop {
            let (listed, read) = (progress.listed.load(Relaxed), progress.read.load(Relaxed));
            shown.doing(&match deep {
                true => format!("{read} segments read of {listed} listed"),
                false => format!("{listed} segments listed"),
            });
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    })
}

/// `1 segment`, `2 segments`
fn count(number: u64, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

fn print_foreign(objects: u64) -> Result<(), Failure> {
    match objects {
        0 => Ok(()),
        1 => output::print_line("1 object among them is not pgsidecar's."),
        several => output::print_line(&format!("{several} objects among them are not pgsidecar's.")),
    }
}

fn print_survey(survey: &Survey) -> Result<(), Failure> {
    if survey.timelines.is_empty() {
        eprintln!("no WAL yet; PostgreSQL archives it with 'pgsidecar-wal archive %p'");
        return Ok(());
    }
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let time = |time: Option<jiff::Timestamp>| or_none(time.map(|at| at.strftime("%Y-%m-%d %H:%M:%SZ").to_string()));
    let rows: Vec<[String; 9]> = survey
        .timelines
        .iter()
        .map(|timeline| {
            let origin = timeline.parent.zip(timeline.switch_point);
            [
                timeline.timeline.to_string(),
                or_none(origin.map(|(parent, switch_point)| format!("{parent} at {switch_point}"))),
                or_none(timeline.first.map(|name| name.to_string())),
                or_none(timeline.last.map(|name| name.to_string())),
                timeline.segments.to_string(),
                output::size(timeline.stored_bytes),
                timeline.gaps.to_string(),
                time(timeline.oldest_stored_at),
                time(timeline.newest_stored_at),
            ]
        })
        .collect();
    let headings = ["TIMELINE", "AFTER", "FIRST", "LAST", "SEGMENTS", "STORED", "GAPS", "OLDEST", "NEWEST"];
    output::print_table(headings, &rows)?;
    for timeline in survey.timelines.iter().filter(|timeline| timeline.gaps > 0) {
        output::print_line(&format!("Timeline {} has:", timeline.timeline))?;
        timeline.ranges.iter().try_for_each(|range| output::print_line(&format!("  {range}")))?;
        if timeline.gaps > MAX_GAPS as u64 {
            output::print_line(&format!("  and more: {} gaps in all", timeline.gaps))?;
        }
    }
    print_foreign(survey.foreign_objects)
}

fn print_verification(verified: &Verification) -> Result<(), Failure> {
    if verified.backups == 0 {
        output::print_line("There is no backup to restore from, so no WAL is needed yet.")?;
    }
    for timeline in &verified.timelines {
        let there = match timeline.last {
            Some(last) => format!("{} to {last}", timeline.from),
            None => format!("nothing from {} on", timeline.from),
        };
        output::print_line(&format!(
            "Timeline {}: {there}, {}, {}",
            timeline.timeline,
            count(timeline.segments, "segment"),
            output::size(timeline.stored_bytes)
        ))?;
    }
    for timeline in &verified.timelines {
        for gap in &timeline.missing {
            let are = if gap.segments() == 1 { "is" } else { "are" };
            output::print_line(&format!("MISSING  timeline {}: {gap} {are} missing", timeline.timeline))?;
        }
        if timeline.gaps > MAX_GAPS as u64 {
            let all = count(timeline.missing_segments, "segment");
            output::print_line(&format!(
                "MISSING  timeline {}: {} gaps in all, {all}",
                timeline.timeline, timeline.gaps
            ))?;
        }
    }
    for history in &verified.missing_histories {
        let line = format!("MISSING  {history}: restores can't follow timeline {} without it", history.timeline());
        output::print_line(&line)?;
    }
    for limit in &verified.limited_backups {
        let timelines: Vec<String> = limit.timelines.iter().map(ToString::to_string).collect();
        let to = format!("timeline{} {}", if timelines.len() == 1 { "" } else { "s" }, timelines.join(", "));
        let how = if limit.damaged { "damaged" } else { "missing" };
        output::print_line(&match limit.restorable {
            true => format!(
                "LIMITED  backup {} can be restored to {to} only up to {}: {} is {how}",
                limit.backup, limit.reachable, limit.lacks
            ),
            false => format!(
                "LOST     backup {} can't be restored to {to}: {}, which it needs, is {how}",
                limit.backup, limit.lacks
            ),
        })?;
    }
    for damage in verified.damaged_histories.iter().chain(&verified.damaged) {
        output::print_line(&format!("DAMAGED  {}", damage.message))?;
    }
    let named = verified.damaged.len() as u64;
    if verified.damaged_segments > named {
        output::print_line(&format!("DAMAGED  and {} more", count(verified.damaged_segments - named, "segment")))?;
    }
    print_foreign(verified.foreign_objects)?;
    let read = match verified.read_segments {
        Some(read) => format!("{} read", count(read, "segment")),
        None => "whether the segments are whole was not looked at (--deep does)".to_owned(),
    };
    if verified.ok {
        return output::print_line(&format!("Nothing is missing; {read}."));
    }
    let missing = verified.timelines.iter().map(|timeline| timeline.missing_segments).sum();
    let missing = count(missing, "segment");
    output::print_line(&format!("{missing} missing, {} damaged; {read}.", verified.damaged_segments))?;
    output::print_line(
        "HINT: Take a backup: restores to later moments then don't need what is missing. Where the store keeps older \
         versions, or another copy, what is missing or damaged may be had back from there.",
    )
}
