//! `pgsidecar extract`

use std::{io::IsTerminal, path::PathBuf, process::ExitCode, time::Instant};

use clap::Args;

use super::{
    open_repository, output,
    restore::TargetArgs,
    side::{Narrator, SideArgs, unless_signalled},
};
use crate::{
    failure::{Code, Failure},
    settings::Settings,
    side::{
        self, Observer, Side,
        extract::{ExtractFormat, ExtractOutput, ExtractRequest, extract},
    },
};

/// `extract`
#[derive(Args, Debug)]
pub struct ExtractArgs {
    /// The database
    #[arg(long, value_name = "NAME")]
    database: String,
    /// Only this table, named as in SQL; can be given several times [default: the whole database]
    #[arg(long, value_name = "SCHEMA.TABLE")]
    table: Vec<String>,
    /// The file to write, which must not exist; - for stdout
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// What to write
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "custom")]
    format: ExtractFormat,
    #[command(flatten)]
    side: SideArgs,
    // Last: whatever follows would stand under its heading in --help.
    #[command(flatten)]
    target: TargetArgs,
}

/// Extracts.
///
/// # Errors
/// What went wrong. No file has been made then.
pub async fn run(settings: &Settings, args: ExtractArgs) -> Result<ExitCode, Failure> {
    let work = settings.work()?;
    let target = args.target.request()?;
    let to = match args.output.to_str() {
        Some("-") => ExtractOutput::Stdout,
        _ => ExtractOutput::File(args.output.clone()),
    };
    to.check()?;
    if to == ExtractOutput::Stdout && args.format == ExtractFormat::Custom && std::io::stdout().is_terminal() {
        return Err(Failure::new(Code::InvalidRequest, "the custom format isn't for a terminal")
            .hint("Name a file with --output, or choose --format plain."));
    }
    let narrator = Narrator::new(false);
    let request =
        ExtractRequest { database: args.database.clone(), tables: args.table.clone(), format: args.format, output: to };
    let options = args.side.options(work, !args.target.target_exclusive)?;
    let extracting = async {
        let repository = open_repository(work, &args.side.system).await?;
        let plan = side::plan(&repository, target).await?;
        let restore = &plan.restore;
        narrator.say(&format!(
            "Restoring backup {} ({}) to a private server, which recovers to {} on timeline {}.",
            restore.backup.id,
            output::size(restore.backup.restored_size()),
            restore.target,
            restore.timeline
        ));
        let began = Instant::now();
        let side = Side::new(plan, options, "extract", &narrator)?;
        side.binaries().program("pg_dump")?;
        side.restore(&repository, &narrator).await?;
        narrator.say(&format!(
            "Restored after {:.1} s. The server is started, and replays WAL.",
            began.elapsed().as_secs_f64()
        ));
        let server = side.recover(&narrator).await?;
        let reached = server.reached.map(|lsn| format!(" at {lsn}")).unwrap_or_default();
        narrator.say(&format!("Recovery ended{reached} after {:.1} s. pg_dump begins.", began.elapsed().as_secs_f64()));
        let written = extract(&server, &request, &narrator).await?;
        let kept = server.discard();
        Ok((written, kept))
    };
    let (written, kept) = unless_signalled(Box::pin(extracting)).await?;
    if let ExtractOutput::File(path) = &request.output {
        narrator.say(&format!("Written: {}, {}", path.display(), output::size(written)));
        let (path, tables) = (path.display(), !request.tables.is_empty());
        narrator.say(&match (request.format, tables) {
            (ExtractFormat::Custom, false) => {
                format!("Load it into a new database: createdb NAME && pg_restore --dbname=NAME {path}")
            }
            (ExtractFormat::Custom, true) => format!(
                "Load it: pg_restore --dbname=NAME {path}; where the table exists, into another database first, or with --data-only"
            ),
            (ExtractFormat::Plain, _) => format!("Load it: psql --set ON_ERROR_STOP=1 --dbname=NAME --file={path}"),
        });
    }
    if let Some(kept) = kept {
        narrator.say(&format!("What was restored is left in {}: remove it when you're done.", kept.display()));
    }
    Ok(ExitCode::SUCCESS)
}
