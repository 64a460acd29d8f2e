//! A drill: a restore that is tried out, from the plan to the last page, and what came of each step.

use std::{fs, process::Command, time::Instant};

use jiff::Timestamp;
use pgsidecar_core::{
    DrillId, DrillRecord,
    drill::{DRILL_FORMAT, DrillOutcome, DrillStep},
    plan::RestoreRequest,
    recovery::RecoveryTarget,
};

use super::{
    Observer, Recovered, Side, SideOptions,
    bindir::Binaries,
    program::{self, ended_badly},
};
use crate::{
    failure::{Code, Failure},
    pgdata::DataDirectory,
    repository::Repository,
};

/// `pg_amcheck`'s exit code for corruption that it found (pg_amcheck.c).
const CORRUPTION: i32 = 2;
/// How many damaged relations are named.
const NAMED: usize = 10;

/// What is tried.
#[derive(Clone, Debug)]
pub struct DrillRequest {
    /// What is restored.
    pub restore: RestoreRequest,
    /// Whether pg_amcheck looks at all tables and indexes.
    pub amcheck: bool,
    /// Whether it looks for every row in every index as well.
    pub heapallindexed: bool,
    /// Queries that must succeed, and be true if they answer with booleans.
    pub queries: Vec<String>,
    /// The database in which they run.
    pub query_database: String,
}

/// How it went.
#[derive(Debug)]
pub struct Drilled {
    /// The record, not stored yet.
    pub record: DrillRecord,
    /// What decides the exit code: the first step that has failed, or else the first that could not be tried.
    pub failure: Option<Failure>,
    /// Where everything was left, if it was to be kept.
    pub kept: Option<std::path::PathBuf>,
}

/// The steps so far.
struct Steps<'a> {
    observer: &'a dyn Observer,
    done: Vec<DrillStep>,
    failures: Vec<(DrillOutcome, Failure)>,
}

impl Steps<'_> {
    /// Notes how a step went.
    fn note<T>(&mut self, step: &str, began: Instant, came: Result<(T, String), Failure>) -> Option<T> {
        let seconds = (began.elapsed().as_secs_f64() * 1000.0).round() / 1000.0;
        let (value, outcome, message, hint) = match came {
            Ok((value, message)) => (Some(value), DrillOutcome::Passed, message, String::new()),
            Err(failure) => {
                let outcome = outcome_of(failure.code);
                self.failures.push((outcome, failure.clone()));
                (None, outcome, failure.message, failure.hint)
            }
        };
        self.observer.say(&format!("{outcome:<9}  {step:<9}  {seconds:>8.1} s  {message}"));
        if !hint.is_empty() {
            self.observer.say(&format!("HINT: {hint}"));
        }
        self.done.push(DrillStep { step: step.to_owned(), outcome, seconds, message, hint });
        value
    }
}

/// Whether a failure says something about the backup, or only that it could not be tried out here and now.
fn outcome_of(code: Code) -> DrillOutcome {
    match code {
        Code::TargetUnreachable | Code::Damaged | Code::PostgresUnavailable => DrillOutcome::Failed,
        _ => DrillOutcome::NotTried,
    }
}

/// Tries a restore out.
///
/// # Cancellation
/// Dropped, it ends its server and removes what it has restored.
pub async fn drill(
    repository: &Repository,
    request: &DrillRequest,
    options: SideOptions,
    observer: &dyn Observer,
) -> Drilled {
    let started_at = Timestamp::now();
    let mut record = DrillRecord {
        format: DRILL_FORMAT,
        id: DrillId::new(started_at),
        system_identifier: repository.layout().system(),
        instance: options.work.instance.clone(),
        started_at,
        ended_at: started_at,
        outcome: DrillOutcome::NotTried,
        target: request.restore.target.to_string(),
        backup: None,
        chain: Vec::new(),
        server_version: None,
        timeline: None,
        reached: None,
        steps: Vec::new(),
    };
    let mut steps = Steps { observer, done: Vec::new(), failures: Vec::new() };
    let kept = try_out(repository, request, options, &mut record, &mut steps).await.flatten();
    let Steps { done, mut failures, .. } = steps;
    record.ended_at = Timestamp::now();
    record.outcome = DrillRecord::outcome_of(&done);
    record.steps = done;
    failures.sort_by_key(|(outcome, _)| *outcome != DrillOutcome::Failed);
    Drilled { record, failure: failures.into_iter().next().map(|(_, failure)| failure), kept }
}

/// The steps. `None`: one failed without which the others can't be.
async fn try_out(
    repository: &Repository,
    request: &DrillRequest,
    options: SideOptions,
    record: &mut DrillRecord,
    steps: &mut Steps<'_>,
) -> Option<Option<std::path::PathBuf>> {
    let observer = steps.observer;
    let began = Instant::now();
    let planned = super::plan(repository, request.restore.clone()).await;
    let told = planned.map(|plan| {
        let message = format!("backup {}, WAL through {}", plan.restore.backup.id, plan.restore.wal_through);
        (plan, message)
    });
    let plan = steps.note("plan", began, told)?;
    let backup = plan.restore.backup.clone();
    record.backup = Some(backup.id);
    record.chain = plan.restore.chain.iter().map(|link| link.id).collect();
    record.server_version = Some(backup.server_version);
    record.timeline = Some(plan.restore.timeline);
    if let Some(missing) = plan.restore.gap.filter(|_| plan.restore.target == RecoveryTarget::Latest) {
        // The rest is tried out all the same.
        let reachable = plan.restore.reachable;
        let lost =
            format!("{missing} is missing although later WAL is there: nothing behind {reachable} can be restored");
        let lost = Failure::new(Code::Damaged, lost).hint("'pgsidecar wal verify' tells what is missing. Take a backup: restores to later moments then don't need it.");
        steps.note::<()>("wal", Instant::now(), Err(lost));
    }

    let began = Instant::now();
    let restored = async {
        let side = Side::new(plan, options, "drill", observer)?;
        // Found missing now, not after hours.
        if request.amcheck {
            side.binaries().program("pg_amcheck")?;
        }
        side.restore(repository, observer).await?;
        let message = format!("{} files, {} bytes", backup.files, backup.restored_size());
        Ok((side, message))
    };
    let side = steps.note("restore", began, restored.await)?;

    let began = Instant::now();
    let recovered = side.recover(observer).await.map(|server| {
        let message = match server.reached {
            Some(reached) => format!("ended at {reached}"),
            None => "ended".to_owned(),
        };
        (server, message)
    });
    let server = steps.note("recovery", began, recovered)?;
    record.reached = server.reached;

    if request.amcheck {
        let began = Instant::now();
        observer.doing("pg_amcheck is looking at all tables and indexes");
        let checked = amcheck(&server, request.heapallindexed).await;
        steps.note("amcheck", began, checked.map(|message| ((), message)));
    }
    for query in &request.queries {
        let began = Instant::now();
        observer.doing("a query is running");
        let checked = async { server.connect(&request.query_database).await?.check(query).await };
        let told = |what: &str| format!("{what}: {}", query.split_whitespace().collect::<Vec<_>>().join(" "));
        let checked = checked.await.map(|answer| ((), told(&answer)));
        steps.note("query", began, checked.map_err(|failure| Failure { message: told(&failure.message), ..failure }));
    }
    let Recovered { session, server, side, .. } = server;
    drop(session);
    if backup.data_checksums {
        let began = Instant::now();
        observer.doing("stopping the server, to look at all checksums");
        let checked = async {
            server.stop().await?;
            checksums(&side).await
        };
        steps.note("checksums", began, checked.await.map(|message| ((), message)));
    } else {
        drop(server);
    }
    Some(side.leave())
}

/// Has pg_amcheck look at every table and index of every database.
async fn amcheck(server: &Recovered, heapallindexed: bool) -> Result<String, Failure> {
    let output = server.directory().join("pg_amcheck.out");
    let file = fs::File::create(&output).map_err(|error| Failure::io("running pg_amcheck", &error))?;
    let mut command = server.client("pg_amcheck")?;
    command.args(["--all", "--install-missing"]);
    command.args(heapallindexed.then_some("--heapallindexed")).stdout(file);
    let ended = program::run(&mut command, &server.directory().join("pg_amcheck.log")).await?;
    let said = program::tail(&output).map_err(|error| Failure::io("reading what pg_amcheck said", &error))?;
    match ended.status.code() {
        Some(0) => Ok("no damage in any table or index".to_owned()),
        Some(CORRUPTION) => Err(Failure::new(Code::Damaged, format!("pg_amcheck found damage in {}", named(&said)))
            .hint("Compare with the live database ('pg_amcheck' there): what is damaged there as well was backed up so. An index can be rebuilt (REINDEX); a table's rows can be had from an older backup ('pgsidecar extract').")),
        _ if ended.stderr.contains("could not open extension control file") || ended.stderr.contains("extension \"amcheck\" is not available") => {
            Err(Failure::new(Code::Misconfigured, "the extension amcheck isn't installed here")
                .hint("Install PostgreSQL's contrib package (postgresql-contrib), or leave this out with --no-amcheck."))
        }
        _ => Err(ended_badly("pg_amcheck", &ended)),
    }
}

/// The relations that `pg_amcheck` names, `heap table "db.public.orders", block 3, offset 5:` or
/// `btree index "db.public.orders_pkey":`, each once, with what it says of the first.
fn named(said: &str) -> String {
    let mut relations: Vec<&str> = Vec::new();
    let mut first = None;
    let mut lines = said.lines();
    while let Some(line) = lines.next() {
        let is_named = line.starts_with("heap table \"") || line.starts_with("btree index \"");
        let Some(name) = line.split('"').nth(1).filter(|_| is_named) else { continue };
        if !relations.contains(&name) {
            relations.push(name);
        }
        first = first.or_else(|| Some(lines.next()?.trim()));
    }
    let more = relations.len().saturating_sub(NAMED);
    relations.truncate(NAMED);
    let mut text =
        if relations.is_empty() { "a relation that it doesn't name".to_owned() } else { relations.join(", ") };
    if more > 0 {
        text += &format!(" and {more} more");
    }
    match first {
        Some(first) => format!("{text} ({first})"),
        None => text,
    }
}

/// Has pg_checksums read every page of the stopped server.
async fn checksums(side: &Side) -> Result<String, Failure> {
    let data = side.run.data();
    if !DataDirectory::open(&data)?.control()?.data_checksums {
        return Ok("the database has none any more".to_owned());
    }
    let binaries: &Binaries = side.binaries();
    let mut command = Command::new(binaries.program("pg_checksums")?);
    program::without_libpq(&mut command).env("LC_ALL", "C.UTF-8").arg("--check").arg("-D").arg(&data);
    let output = side.directory().join("pg_checksums.out");
    let file = fs::File::create(&output).map_err(|error| Failure::io("running pg_checksums", &error))?;
    command.stdout(file);
    let ended = program::run(&mut command, &side.directory().join("pg_checksums.log")).await?;
    if ended.status.success() {
        return Ok("every page's is right".to_owned());
    }
    let wrong: Vec<&str> =
        ended.stderr.lines().filter(|line| line.contains("checksum verification failed")).take(NAMED).collect();
    if wrong.is_empty() {
        return Err(ended_badly("pg_checksums", &ended));
    }
    Err(Failure::new(Code::Damaged, format!("pg_checksums found damaged pages: {}", wrong.join("; "))).hint(
        "'pgsidecar backup show' tells whether they were damaged when the backup was taken, and names the relations.",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_relations_are_named_once() {
        let said = "btree index \"postgres.public.t_pkey\":\n    ERROR:  item order invariant violated for index \"t_pkey\"\n    DETAIL:  x\n\
             heap table \"postgres.public.t\", block 0, offset 3:\n    line pointer points past the end\n\
             heap table \"postgres.public.t\", block 0, offset 4:\n    line pointer points past the end\n";
        assert_eq!(
            named(said),
            "postgres.public.t_pkey, postgres.public.t (ERROR:  item order invariant violated for index \"t_pkey\")"
        );
    }

    #[test]
    fn only_what_speaks_of_the_backup_is_a_failure() {
        assert_eq!(outcome_of(Code::Damaged), DrillOutcome::Failed);
        assert_eq!(outcome_of(Code::TargetUnreachable), DrillOutcome::Failed);
        assert_eq!(outcome_of(Code::Misconfigured), DrillOutcome::NotTried);
        assert_eq!(outcome_of(Code::StoreUnavailable), DrillOutcome::NotTried);
    }
}
