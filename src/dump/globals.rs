//! Restoring roles from a dump's globals. What is there stays as it is.

use std::collections::BTreeSet;

use pgsidecar_core::{DumpRecord, layout::DumpObject};
use serde::Serialize;

use super::{program, server::Server};
use crate::{
    failure::{Code, Failure},
    repository::{Repository, damaged},
};

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RestoredGlobals {
    /// Roles that were made.
    pub created: Vec<String>,
    /// Roles that were there, and are as they were.
    pub kept: Vec<String>,
    /// Statements that weren't run.
    pub skipped: Vec<String>,
}

/// Makes the roles that aren't there, in one transaction, and grants them what they had. Tablespaces are left to whoever
/// knows the directories.
///
/// # Errors
/// [`Code::Damaged`] if the globals aren't what was stored; what psql says. Nothing was changed then.
pub async fn restore(
    server: &Server,
    repository: &Repository,
    record: &DumpRecord,
) -> Result<RestoredGlobals, Failure> {
    let key = repository.layout().dump(record.id, DumpObject::Globals);
    // Roles, not data: it's small.
    let read = repository.read_plain(&key, Vec::new()).await?;
    let (sql, _) = read.ok_or_else(|| damaged(key.as_str(), "it isn't there"))?;
    let sql = String::from_utf8(sql).map_err(|error| damaged(key.as_str(), &error.to_string()))?;
    let roles = "SELECT coalesce(json_agg(quote_ident(rolname)), '[]') FROM pg_roles";
    let there: BTreeSet<String> = server.json(None, roles).await?;
    let (statements, told) = choose(&sql, &there);
    let mut psql = server.psql(None)?;
    let mut script = tempfile::NamedTempFile::new().map_err(|error| Failure::io("writing a script", &error))?;
    // Passwords (as hashes) are in it: of a mode that nobody else can read, and not on the command line.
    std::io::Write::write_all(&mut script, statements.as_bytes())
        .map_err(|error| Failure::io("writing a script", &error))?;
    psql.arg("--single-transaction").arg("--file").arg(script.path());
    program::output(psql).await.map_err(|failure| {
        Failure { code: Code::PostgresUnavailable, ..failure }
            .context("restoring the globals")
            .hint("All of it was one transaction, which was rolled back.")
    })?;
    Ok(told)
}

/// The statements that are run, of what pg_dumpall wrote: one a line.
fn choose(sql: &str, there: &BTreeSet<String>) -> (String, RestoredGlobals) {
    let mut told = RestoredGlobals { created: Vec::new(), kept: Vec::new(), skipped: Vec::new() };
    let mut statements = String::new();
    for line in sql.lines() {
        if let Some(role) = line.strip_prefix("CREATE ROLE ").and_then(|rest| rest.strip_suffix(';')) {
            if there.contains(role) {
                told.kept.push(role.to_owned());
                continue;
            }
            told.created.push(role.to_owned());
        }
        let is_kept = |role: &String| {
            line.strip_prefix("ALTER ROLE ")
                .and_then(|rest| rest.strip_prefix(role.as_str()))
                .is_some_and(|rest| rest.starts_with(' '))
        };
        if told.kept.iter().any(is_kept) {
            continue;
        }
        let is_left_out = [
            "CREATE TABLESPACE ",
            "ALTER TABLESPACE ",
            "GRANT ALL ON TABLESPACE ",
            "GRANT CREATE ON TABLESPACE ",
            "REVOKE ALL ON TABLESPACE ",
        ]
        .iter()
        .any(|beginning| line.starts_with(beginning));
        // A grant between roles that were both there is theirs. Of PostgreSQL 16 on, it also says by whom.
        let is_theirs = line.strip_prefix("GRANT ").and_then(|rest| rest.split_once(" TO ")).is_some_and(|(_, to)| {
            told.kept.iter().any(|role| to.strip_prefix(role.as_str()).is_some_and(|rest| rest.starts_with([' ', ';'])))
        });
        if is_left_out || is_theirs {
            told.skipped.push(line.to_owned());
            continue;
        }
        statements.push_str(line);
        statements.push('\n');
    }
    (statements, told)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_stays_as_it_is() {
        let sql = "--\n-- Roles\n--\n\nCREATE ROLE postgres;\nALTER ROLE postgres WITH SUPERUSER PASSWORD 'x';\n\
            CREATE ROLE \"Shop's\";\nALTER ROLE \"Shop's\" WITH NOSUPERUSER LOGIN;\nCREATE ROLE postgres2;\n\
            ALTER ROLE postgres2 WITH LOGIN;\nGRANT \"Shop's\" TO postgres2;\nGRANT postgres2 TO postgres;\n\
            CREATE TABLESPACE fast OWNER postgres LOCATION '/fast';\n";
        let (statements, told) = choose(sql, &BTreeSet::from(["postgres".to_owned()]));
        assert_eq!(told.created, ["\"Shop's\"", "postgres2"]);
        assert_eq!(told.kept, ["postgres"]);
        assert_eq!(told.skipped.len(), 2);
        let run: Vec<&str> = statements.lines().filter(|line| !line.is_empty() && !line.starts_with("--")).collect();
        assert_eq!(
            run,
            [
                "CREATE ROLE \"Shop's\";",
                "ALTER ROLE \"Shop's\" WITH NOSUPERUSER LOGIN;",
                "CREATE ROLE postgres2;",
                "ALTER ROLE postgres2 WITH LOGIN;",
                "GRANT \"Shop's\" TO postgres2;"
            ]
        );
    }
}
