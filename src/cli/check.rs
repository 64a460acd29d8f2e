//! `pgsidecar check`: tries, live, what backups and restores will need.

use std::{
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use clap::Args;
use jiff::Timestamp;
use pgsidecar_core::{
    ArchiveFileName, ControlFile, Layout, ObjectKey,
    archiving::{ArchivingFault, OtherWays},
};
use serde::Serialize;
use serde_json::Value;

use super::{OutputArgs, output};
use crate::{
    client::Client,
    daemon::open_store,
    dump::tools::Tools,
    failure::{Code, Failure},
    histories,
    pgdata::{DataDirectory, foreign_owner},
    postgres::Session,
    repository::Repository,
    settings::{Settings, WorkSettings},
    store::{ByteRange, ConditionalCreation, ListRequest, Store},
    wal::directory::ArchiveDirectory,
};

/// How long a switched segment may take to arrive.
const WAL_ARRIVAL: Duration = Duration::from_secs(60);
/// Clocks may differ by this much; S3 refuses requests at 15 minutes.
const CLOCK_TOLERANCE_SECONDS: i64 = 60;

/// `check`
#[derive(Args, Debug)]
pub struct CheckArgs {
    /// Print the smallest rights that are needed, for PostgreSQL and for S3, and try nothing
    #[arg(long)]
    explain: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    Ok,
    Warning,
    Failed,
}

#[derive(Serialize)]
struct Finding {
    check: &'static str,
    state: State,
    message: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    hint: String,
}

/// What has been found, printed as it comes.
struct Report {
    findings: Vec<Finding>,
    json: bool,
}

impl Report {
    fn add(&mut self, check: &'static str, state: State, message: impl Into<String>, hint: impl Into<String>) {
        let finding = Finding { check, state, message: message.into(), hint: hint.into() };
        if !self.json {
            let mark = match state {
                State::Ok => "ok     ",
                State::Warning => "WARNING",
                State::Failed => "FAILED ",
            };
            let _ = output::print_line(&format!("{mark}  {:<16} {}", finding.check, finding.message));
            if !finding.hint.is_empty() {
                let _ = output::print_line(&format!("                           HINT: {}", finding.hint));
            }
        }
        self.findings.push(finding);
    }

    fn ok(&mut self, check: &'static str, message: impl Into<String>) {
        self.add(check, State::Ok, message, "");
    }

    fn failed(&mut self, check: &'static str, failure: Failure) {
        self.add(check, State::Failed, failure.message, failure.hint);
    }

    /// Notes how a step went; `None` if it failed.
    fn step<T>(&mut self, check: &'static str, result: Result<T, Failure>, ok: impl FnOnce(&T) -> String) -> Option<T> {
        match result {
            Ok(value) => {
                self.ok(check, ok(&value));
                Some(value)
            }
            Err(failure) => {
                self.failed(check, failure);
                None
            }
        }
    }
}

/// Runs all checks.
///
/// # Errors
/// If the settings are wrong.
pub async fn run(settings: &Settings, args: &CheckArgs) -> Result<ExitCode, Failure> {
    if args.explain {
        output::print_line(EXPLANATION)?;
        return Ok(ExitCode::SUCCESS);
    }
    let work = settings.work()?;
    let mut report = Report { findings: Vec::new(), json: args.output.json };
    let store = open_store(work).await;
    let store_works = check_store(&mut report, &store, work).await;
    let data = check_data_directory(&mut report, work);
    if let (Some(path), Some((pgdata, _))) = (&work.archive_directory, &data) {
        let usable = ArchiveDirectory::new(path.clone()).check(pgdata);
        report.step("archive dir", usable, |()| format!("files can be taken from {} and removed", path.display()));
    }
    if let (true, Some((pgdata, control))) = (store_works, &data) {
        let layout = Layout::new(work.cluster.clone(), control.system_identifier);
        let repository = Repository::new(store.clone(), layout, work.compression_level);
        let not_taken = histories::check_not_taken(&repository, pgdata, control.timeline).await;
        report.step("timeline", not_taken, |()| "no other server has begun the one that this server is on".to_owned());
    }
    let session = check_postgres(&mut report, work, data.as_ref()).await;
    if let Some(session) = &session {
        check_tools(&mut report, work, session.server().version / 10_000).await;
    }
    let daemon = check_daemon(&mut report, settings).await;
    match (session, data, store_works && daemon) {
        (Some(session), Some((_, control)), true) if !session.server().in_recovery => {
            let layout = Layout::new(work.cluster.clone(), control.system_identifier);
            let repository = Repository::new(store, layout, work.compression_level);
            let arrived = check_arrival(&session, &repository).await;
            report.step("wal arrival", arrived, |(name, took)| format!("{name} arrived {took:.1?} after the switch"));
        }
        (Some(session), _, _) if session.server().in_recovery => {
            report.add(
                "wal arrival",
                State::Warning,
                "not tried: the server is in recovery",
                "Run the check beside the primary.",
            );
        }
        _ => report.add("wal arrival", State::Failed, "not tried, because of the above", ""),
    }
    if args.output.json {
        output::print_json(&report.findings)?;
    }
    let failed = report.findings.iter().any(|finding| finding.state == State::Failed);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

async fn check_store(report: &mut Report, store: &Arc<dyn Store>, work: &WorkSettings) -> bool {
    let conditional = store.conditional_creation().await.map_err(Failure::from);
    let description = store.description();
    let Some(conditional) = report.step("store", conditional, |_| format!("{description} takes objects")) else {
        return false;
    };
    match conditional {
        ConditionalCreation::Honoured => report.ok("overwriting", "the store refuses to overwrite"),
        ConditionalCreation::LookFirst { reason } => report.add(
            "overwriting",
            State::Warning,
            format!("the store doesn't refuse to overwrite by itself: {reason}"),
            "pgsidecar looks before each write. Two servers that archive under one name at the same instant could pass each other.",
        ),
    }
    let name = format!("{}/check-{}.probe", work.cluster, Timestamp::now().as_nanosecond());
    let Ok(key) = name.parse::<ObjectKey>() else { return true };
    // A missing key must be told from everything else, or PostgreSQL could never be told that its archive ends.
    let missing = async {
        match store.get(&key, ByteRange::All).await? {
            None => Ok(()),
            Some(_) => Err(Failure::new(Code::Internal, "an object is there that nobody has written")),
        }
    };
    let mut works = report.step("missing objects", missing.await, |()| "are told from errors".to_owned()).is_some();
    let listed = store.list(&ListRequest::under(format!("{}/", work.cluster))).await.map(|_| ()).map_err(Failure::from);
    works &= report.step("listing", listed, |()| "works".to_owned()).is_some();
    let written = async {
        store.create(&key, Bytes::from_static(b"check\n"), None).await?;
        let info = store.head(&key).await?;
        Ok(info.map(|info| info.modified.as_second() - Timestamp::now().as_second()))
    };
    match written.await.map_err(|error: crate::store::StoreError| Failure::from(error)) {
        Err(failure) => {
            report.failed("writing", failure);
            works = false;
        }
        Ok(skew) => {
            match skew {
                Some(skew) if skew.abs() > CLOCK_TOLERANCE_SECONDS => report.add(
                    "clock",
                    State::Warning,
                    format!("the store's clock differs from this one's by {skew} s"),
                    "Restores to a time are planned with the store's times. Synchronize the clocks.",
                ),
                _ => report.ok("clock", "agrees with the store's"),
            }
            match store.delete(std::slice::from_ref(&key)).await {
                Ok(refused) if refused.is_empty() => report.ok("deleting", "works"),
                Ok(_) | Err(_) => report.add(
                    "deleting",
                    State::Warning,
                    format!("is refused; {key} is left behind"),
                    "Remains of interrupted backups stay, and retention needs another identity. That can be what you want.",
                ),
            }
        }
    }
    works
}

fn check_data_directory(report: &mut Report, work: &WorkSettings) -> Option<(DataDirectory, ControlFile)> {
    let opened = work
        .pgdata()
        .and_then(DataDirectory::open)
        .and_then(|pgdata| pgdata.control().map(|control| (pgdata, control)));
    let opened = report.step("data directory", opened, |(pgdata, control)| {
        format!(
            "{} of system {}, WAL segments of {}",
            pgdata.path().display(),
            control.system_identifier,
            control.wal_segment_size
        )
    });
    // Where it could be read in spite of that.
    if let Some(foreign) = opened.as_ref().and_then(|(pgdata, _)| foreign_owner(pgdata.path())) {
        report.add("data directory", State::Warning, foreign.message, foreign.hint);
    }
    opened
}

async fn check_postgres(
    report: &mut Report,
    work: &WorkSettings,
    data: Option<&(DataDirectory, ControlFile)>,
) -> Option<Session> {
    let connected = Session::connect(&work.connection).await;
    let session = report.step("postgresql", connected, |session| {
        format!("version {}, as {}", session.server().major(), work.connection.user)
    })?;
    let server = session.server().clone();
    if let Some((pgdata, control)) = data {
        if control.system_identifier == server.system_identifier {
            report.ok("same database", "the server that answers is that of the data directory");
        } else {
            report.add(
                "same database",
                State::Failed,
                format!(
                    "the server that answers has system identifier {}, the data directory {} has {}",
                    server.system_identifier,
                    pgdata.path().display(),
                    control.system_identifier
                ),
                "Correct PGHOST and PGPORT, or PGDATA.",
            );
        }
    }
    let functions: &[&str] = if server.major() < 15 {
        &[
            "pg_start_backup(text,boolean,boolean)",
            "pg_stop_backup(boolean,boolean)",
            "pg_switch_wal()",
            "pg_create_restore_point(text)",
        ]
    } else {
        &[
            "pg_backup_start(text,boolean)",
            "pg_backup_stop(boolean)",
            "pg_switch_wal()",
            "pg_create_restore_point(text)",
        ]
    };
    for function in functions {
        match session.may_execute(function).await {
            Ok(true) => {}
            Ok(false) => report.add(
                "rights",
                State::Failed,
                format!("{} may not call {function}", work.connection.user),
                "'pgsidecar check --explain' prints the GRANTs.",
            ),
            Err(failure) => report.failed("rights", failure),
        }
    }
    if !report.findings.iter().any(|finding| finding.check == "rights") {
        report.ok("rights", "all functions that are needed may be called");
    }
    check_archiving(report, work, &session).await;
    Some(session)
}

/// Whether dumps could be taken. Who takes none needs no client tools: a warning.
async fn check_tools(report: &mut Report, work: &WorkSettings, major: u32) {
    let named = work.pg_bindir.clone();
    let found = tokio::task::spawn_blocking(move || Tools::find(named.as_deref(), major)).await;
    match found.unwrap_or_else(|panic| Err(panic.into())) {
        Ok(tools) => report.ok("dumps", format!("pg_dump {} can dump PostgreSQL {major}", tools.version())),
        Err(failure) => report.add("dumps", State::Warning, failure.message, failure.hint),
    }
}

async fn check_archiving(report: &mut Report, work: &WorkSettings, session: &Session) {
    let check = "archiving";
    let archiving = session.archiving().await;
    let others = OtherWays { by_directory: work.archive_directory.is_some(), has_asked: false };
    match archiving.fault(others) {
        None => report.ok(check, format!("archive_command is {}", archiving.archive_command)),
        Some(fault) => {
            // It may be a script that calls pgsidecar: whether WAL arrives is looked at below.
            let state = if matches!(fault, ArchivingFault::Foreign(_)) { State::Warning } else { State::Failed };
            report.add(check, state, fault.to_string(), fault.hint(&work.helper.display().to_string()));
        }
    }
    for shadowed in archiving.shadowed() {
        report.add(check, State::Warning, shadowed.to_string(), shadowed.hint());
    }
}

async fn check_daemon(report: &mut Report, settings: &Settings) -> bool {
    let status: Result<Value, Failure> = Client::new(&settings.process.control_socket).get("/v1/status").await;
    let Some(status) = report.step("daemon", status, |_| "answers".to_owned()) else { return false };
    for problem in status["problems"].as_array().into_iter().flatten() {
        report.add(
            "daemon",
            State::Failed,
            problem["message"].as_str().unwrap_or_default(),
            problem["hint"].as_str().unwrap_or_default(),
        );
    }
    true
}

/// Switches WAL and waits until the segment that was left is in the repository.
async fn check_arrival(session: &Session, repository: &Repository) -> Result<(String, Duration), Failure> {
    let name = session.switch_wal().await?;
    let segment: ArchiveFileName = name.parse().map_err(Failure::internal)?;
    let key = repository.layout().wal(&segment);
    let began = Instant::now();
    while began.elapsed() < WAL_ARRIVAL {
        if repository.store().head(&key).await?.is_some() {
            return Ok((name, began.elapsed()));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Err(Failure::new(Code::Timeout, format!("{name} has not arrived within {WAL_ARRIVAL:?} after pg_switch_wal()"))
        .hint("Look at PostgreSQL's log and at pg_stat_archiver; 'pgsidecar status' shows the backlog and the last failure."))
}

const EXPLANATION: &str = "\
-- PostgreSQL: the role that PGUSER names (any database; the functions exist in each)
CREATE ROLE pgsidecar LOGIN PASSWORD '…';
GRANT pg_monitor TO pgsidecar;                                                -- settings and sizes
-- PostgreSQL 15 and later:
GRANT EXECUTE ON FUNCTION pg_backup_start(text, boolean), pg_backup_stop(boolean) TO pgsidecar;
-- PostgreSQL 14 instead:
-- GRANT EXECUTE ON FUNCTION pg_start_backup(text, boolean, boolean), pg_stop_backup(boolean, boolean) TO pgsidecar;
GRANT EXECUTE ON FUNCTION pg_switch_wal(), pg_create_restore_point(text) TO pgsidecar;   -- for 'check' and 'restore-point'
-- For dumps; with pg_read_all_data come the hashes of the roles' passwords:
GRANT pg_read_all_data TO pgsidecar;
-- GRANT CONNECT ON DATABASE … TO pgsidecar;                                  -- each that not everybody may connect to
-- ALTER ROLE pgsidecar BYPASSRLS;                                            -- where tables have row level security
-- GRANT SELECT ON LARGE OBJECT … TO pgsidecar;                               -- each, if there are such
-- Optional, in the database that PGDATABASE names: 'check' and 'status' tell what the server's command line outranks
GRANT SELECT ON pg_file_settings TO pgsidecar;
GRANT EXECUTE ON FUNCTION pg_show_all_file_settings() TO pgsidecar;

-- S3: the policy of the identity that the sidecar uses
{
  \"Version\": \"2012-10-17\",
  \"Statement\": [
    { \"Effect\": \"Allow\",                                                      -- without it a missing key answers 403
      \"Action\": [\"s3:ListBucket\", \"s3:ListBucketMultipartUploads\"],
      \"Resource\": \"arn:aws:s3:::BUCKET\" },
    { \"Effect\": \"Allow\",
      \"Action\": [\"s3:GetObject\", \"s3:PutObject\", \"s3:AbortMultipartUpload\"],
      \"Resource\": \"arn:aws:s3:::BUCKET/PREFIX/*\" },
    { \"Effect\": \"Allow\",                                                      -- optional: remains of interrupted backups; 'prune'
      \"Action\": [\"s3:DeleteObject\"],
      \"Resource\": \"arn:aws:s3:::BUCKET/PREFIX/*\" }
  ]
}";
