//! The command line: `serve` and `inject`.

use std::{
    fs,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::{
    inject::Settings,
    logging,
    offline::{self, Format},
    server,
    settings::{RawInjection, RawServe, SettingErrors},
};

/// Wrong settings: the same code as the sidecar's.
const WRONG_SETTINGS: u8 = 78;

/// Adds pgsidecar to pods that carry the label pgsidecar.dev/inject: "true".
#[derive(Parser, Debug)]
#[command(name = "pgsidecar-webhook", version, about, disable_help_subcommand = true)]
#[command(after_help = "Settings can be given as flags or in the environment; an empty value counts as absent.\n\n\
    Exit codes:\n   \
    0  done\n   \
    1  failed, or refused\n   \
    2  wrong usage\n  \
    78  wrong settings")]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    log: RawLog,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Serve the mutating admission webhook
    Serve {
        #[command(flatten)]
        injection: RawInjection,
        #[command(flatten)]
        serve: RawServe,
    },
    /// Inject into manifests, without a cluster: for GitOps, for review, and for the day the webhook is down
    Inject {
        #[command(flatten)]
        injection: RawInjection,
        #[command(flatten)]
        offline: Offline,
    },
}

/// What is injected into, and how the result looks.
#[derive(Args, Debug)]
struct Offline {
    /// File with manifests in YAML or JSON; - is the standard input
    #[arg(short, long, value_name = "FILE")]
    filename: PathBuf,
    /// Namespace of objects that name none
    #[arg(short, long, value_name = "NAME", default_value = "default")]
    namespace: String,
    /// How the result looks
    #[arg(short, long, value_enum, value_name = "FORMAT", default_value_t = Output::Yaml)]
    output: Output,
}

/// How the result of the offline command looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// The manifests, injected
    Yaml,
    /// The same as JSON
    Json,
    /// The JSON patches alone
    Patch,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Logs")]
struct RawLog {
    /// error, warn, info, debug or trace [default: info]
    #[arg(long, global = true, env = "PGSIDECAR_LOG", value_name = "LEVEL", hide_env_values = true)]
    log: Option<String>,
    /// text or json [default: text]
    #[arg(long, global = true, env = "PGSIDECAR_LOG_FORMAT", value_name = "FORMAT", hide_env_values = true)]
    log_format: Option<String>,
}

/// The program.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let wrong = logging::start(cli.log.log.as_deref(), cli.log.log_format.as_deref());
    match cli.command {
        Command::Serve { injection, serve } => match serve.resolve(&injection, wrong) {
            Ok((serve, injection)) => server::run(&serve, injection),
            Err(errors) => wrong_settings(&errors),
        },
        Command::Inject { injection, offline } => match injection.resolve() {
            Ok(settings) => offline.run(&settings),
            Err(errors) => wrong_settings(&errors),
        },
    }
}

impl Offline {
    /// Results go to stdout, everything else to stderr.
    fn run(&self, settings: &Settings) -> ExitCode {
        let format = match self.output {
            Output::Yaml => Format::Yaml,
            Output::Json => Format::Json,
            Output::Patch => Format::Patch,
        };
        let input = match self.read() {
            Ok(input) => input,
            Err(error) => return failed(&format!("{}: {error}", self.filename.display())),
        };
        match offline::run(&input, format, &self.namespace, settings) {
            Ok(output) => {
                output.warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
                match io::stdout().write_all(output.text.as_bytes()) {
                    Ok(()) => ExitCode::SUCCESS,
                    Err(error) => failed(&error.to_string()),
                }
            }
            Err(error) => failed(&error.to_string()),
        }
    }

    fn read(&self) -> io::Result<String> {
        if self.filename.as_os_str() == "-" {
            io::read_to_string(io::stdin())
        } else {
            fs::read_to_string(&self.filename)
        }
    }
}

/// Several lines are several errors.
fn failed(problems: &str) -> ExitCode {
    problems.lines().for_each(|problem| eprintln!("error: {problem}"));
    ExitCode::FAILURE
}

fn wrong_settings(errors: &SettingErrors) -> ExitCode {
    eprintln!("error: {errors}\nhint: Each can be given as a flag or in the environment; --help lists them.");
    ExitCode::from(WRONG_SETTINGS)
}
