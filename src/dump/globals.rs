//! Restoring roles from a dump's globals. What is there stays as it is.

use std::collections::BTreeSet;

use pgsidecar_core::{
    DumpRecord,
    layout::DumpObject,
    sql::{Statement, Token, statements},
};
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
    let there: BTreeSet<String> = server.json(None, "SELECT coalesce(json_agg(rolname), '[]') FROM pg_roles").await?;
    let (statements, told) = choose(&sql, &there)?;
    let mut psql = server.psql(None)?;
    let mut script = tempfile::NamedTempFile::new().map_err(|error| Failure::io("writing a script", &error))?;
    // Passwords (as hashes) are in it: of a mode that nobody else can read, and not on the command line.
    std::io::Write::write_all(&mut script, statements.as_bytes())
        .map_err(|error| Failure::io("writing a script", &error))?;
    // What psql says goes to logs: it shall not quote them.
    psql.args(["-v", "VERBOSITY=terse", "--single-transaction", "--file"]).arg(script.path());
    program::output(psql).await.map_err(|failure| {
        Failure { code: Code::PostgresUnavailable, ..failure }
            .context("restoring the globals")
            .hint("All of it was one transaction, which was rolled back.")
    })?;
    Ok(told)
}

/// What is done about a statement.
enum Choice {
    /// It's run.
    Run,
    /// It's run, and makes this role.
    Create,
    /// It isn't: it's about a role that is there.
    Keep,
    /// It isn't, and that is told.
    Skip,
}

/// The statements that are run, of what pg_dumpall wrote.
///
/// # Errors
/// If there is one of another kind than pg_dumpall writes: whatever it is, it isn't run.
fn choose(sql: &str, there: &BTreeSet<String>) -> Result<(String, RestoredGlobals), Failure> {
    let mut told = RestoredGlobals { created: Vec::new(), kept: Vec::new(), skipped: Vec::new() };
    // The boundaries of the statements were found by this rule.
    let mut run = "SET standard_conforming_strings = on;\n".to_owned();
    for statement in statements(sql) {
        let choice = match statement.is_sound() {
            true => decide(&statement.tokens, there),
            false => None,
        };
        let name = || match statement.tokens.get(2) {
            Some(Token::Word(text) | Token::Quoted(text)) => (*text).to_owned(),
            _ => String::new(),
        };
        match choice.ok_or_else(|| unknown(&statement))? {
            Choice::Run => run.push_str(statement.text),
            Choice::Create => {
                told.created.push(name());
                run.push_str(statement.text);
            }
            Choice::Keep if statement.tokens[0].is("CREATE") => told.kept.push(name()),
            Choice::Keep => {}
            Choice::Skip => told.skipped.push(without_comments(statement.text).to_owned()),
        }
    }
    run.push('\n');
    Ok((run, told))
}

/// What is done about a statement of pg_dumpall's; `None` if it isn't one of those.
fn decide(tokens: &[Token<'_>], there: &BTreeSet<String>) -> Option<Choice> {
    let begins = |words: &str| {
        let mut at = 0;
        words.split(' ').all(|word| {
            at += 1;
            tokens.get(at - 1).is_some_and(|token| token.is(word))
        })
    };
    let role = |at: usize| tokens.get(at).filter(|token| !RESERVED.iter().any(|word| token.is(word)))?.name();
    let of_role = |at: usize, otherwise: Choice| {
        role(at).map(|role| if there.contains(&role) { Choice::Keep } else { otherwise })
    };
    let word = |at: usize, words: &[&str]| tokens.get(at).is_some_and(|token| words.iter().any(|word| token.is(word)));
    // The parts of a grant or a label: what it's on, and to whom.
    let place = |words: &[&str]| tokens.iter().position(|token| words.iter().any(|word| token.is(word)));
    match tokens.first() {
        None => Some(Choice::Run),
        Some(Token::Command(text)) => {
            let mut parts = text.split_whitespace();
            let is_known = matches!(parts.next(), Some("\\restrict" | "\\unrestrict"));
            let is_key = |key: &str| key.bytes().all(|b| b.is_ascii_alphanumeric());
            (is_known && parts.next().is_some_and(is_key) && parts.next().is_none()).then_some(Choice::Run)
        }
        _ if begins("CREATE ROLE") => of_role(2, Choice::Create).filter(|_| tokens.len() == 4),
        _ if begins("ALTER ROLE") && word(3, &["WITH", "SET", "IN"]) => of_role(2, Choice::Run),
        _ if begins("COMMENT ON ROLE") => of_role(3, Choice::Run),
        _ if begins("SECURITY LABEL") => match place(&["ON"])? {
            on if word(on + 1, &["ROLE"]) => of_role(on + 2, Choice::Run),
            on if word(on + 1, &["TABLESPACE"]) => Some(Choice::Skip),
            _ => None,
        },
        _ if begins("CREATE TABLESPACE") || begins("ALTER TABLESPACE") || begins("COMMENT ON TABLESPACE") => {
            Some(Choice::Skip)
        }
        _ if begins("GRANT") || begins("REVOKE") => {
            // Of roles: GRANT one TO other. Of PostgreSQL 16 on, it also says by whom.
            let to = match place(&["ON"]) {
                None if begins("GRANT") && word(2, &["TO"]) => 3,
                None => return None,
                Some(on) if word(on + 1, &["TABLESPACE"]) => return Some(Choice::Skip),
                Some(on) if word(on + 1, &["PARAMETER"]) => place(&["TO", "FROM"])? + 1,
                Some(_) => return None,
            };
            // What the server's roles, and all of them together, may is theirs.
            if word(to, &["PUBLIC"]) {
                return Some(Choice::Skip);
            }
            role(to).map(|role| if there.contains(&role) { Choice::Skip } else { Choice::Run })
        }
        // Ours stands at the beginning.
        _ if begins("SET standard_conforming_strings") => Some(Choice::Keep),
        // Others could hide a backslash or a quote in a character.
        _ if begins("SET client_encoding") => {
            matches!(tokens.get(3), Some(Token::Text("'UTF8'"))).then_some(Choice::Run)
        }
        _ if begins("SET default_transaction_read_only") || begins("SET escape_string_warning") => Some(Choice::Run),
        // Around what somebody else has granted.
        _ if begins("SET SESSION AUTHORIZATION") && tokens.len() == 5 => Some(Choice::Run),
        _ if begins("RESET SESSION AUTHORIZATION") && tokens.len() == 4 => Some(Choice::Run),
        _ => None,
    }
}

/// What isn't a role's name where one is expected, unless it's quoted.
const RESERVED: [&str; 5] = ["ALL", "CURRENT_ROLE", "CURRENT_USER", "SESSION_USER", "NONE"];

/// A statement from its first word on.
fn without_comments(text: &str) -> &str {
    let mut text = text.trim();
    while text.starts_with("--") {
        text = text.split_once('\n').map_or("", |(_, rest)| rest.trim_start());
    }
    text
}

/// A statement that isn't run. No more of it is told than its beginning: passwords may follow.
fn unknown(statement: &Statement<'_>) -> Failure {
    let words = statement.tokens.iter().take(2).map_while(|token| match token {
        Token::Word(word) => Some(*word),
        _ => None,
    });
    let words: Vec<&str> = words.collect();
    Failure::new(
        Code::Damaged,
        format!("the globals have a statement that pg_dumpall doesn't write: it begins with {:?}", words.join(" ")),
    )
    .hint("Nothing was changed. Look at globals.sql.zst of the dump, and run by hand what is right.")
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
        let (statements, told) = choose(sql, &BTreeSet::from(["postgres".to_owned()])).unwrap();
        assert_eq!(told.created, ["\"Shop's\"", "postgres2"]);
        assert_eq!(told.kept, ["postgres"]);
        assert_eq!(told.skipped.len(), 2);
        let run: Vec<&str> = statements.lines().filter(|line| !line.is_empty() && !line.starts_with("--")).collect();
        assert_eq!(
            run,
            [
                "SET standard_conforming_strings = on;",
                "CREATE ROLE \"Shop's\";",
                "ALTER ROLE \"Shop's\" WITH NOSUPERUSER LOGIN;",
                "CREATE ROLE postgres2;",
                "ALTER ROLE postgres2 WITH LOGIN;",
                "GRANT \"Shop's\" TO postgres2;"
            ]
        );
    }

    /// What is run of this where only "me" is there, without the line that is ours.
    fn run(sql: &str) -> Result<String, Failure> {
        let (run, _) = choose(sql, &BTreeSet::from(["me".to_owned()]))?;
        Ok(run.split_once('\n').unwrap().1.trim().to_owned())
    }

    #[test]
    fn a_value_of_a_role_that_is_there_can_t_be_a_statement() {
        for attack in [
            "ALTER ROLE me SET search_path TO '\"x\nCREATE ROLE evil SUPERUSER LOGIN;\n--\"';\n",
            "ALTER ROLE me SET x TO E'\\'\nCREATE ROLE evil;\n';\n",
            "COMMENT ON ROLE me IS 'x\nCREATE ROLE evil;\n';\n",
            "GRANT \"x\nCREATE ROLE evil;\" TO me WITH ADMIN OPTION;\n",
            "SECURITY LABEL FOR a ON ROLE \"me\" IS 'x\nCREATE ROLE evil;\n';\n",
            "GRANT SET ON PARAMETER a.b TO me;\nGRANT ALL ON PARAMETER x TO PUBLIC;\n",
        ] {
            assert_eq!(run(attack).unwrap(), "", "{attack}");
        }
        let new = "ALTER ROLE new SET search_path TO '\"x\nCREATE ROLE evil;\n--\"', 'b';";
        assert_eq!(run(new).unwrap(), new);
    }

    #[test]
    fn what_pg_dumpall_writes_is_known_and_nothing_else() {
        let known = "\\restrict aB1\nSET default_transaction_read_only = off;\nSET client_encoding = 'UTF8';\n\
            GRANT a TO b WITH ADMIN OPTION, INHERIT FALSE GRANTED BY me;\nGRANT SET,ALTER SYSTEM ON PARAMETER work_mem TO b;\n\
            SET SESSION AUTHORIZATION a;\nRESET SESSION AUTHORIZATION;\nCOMMENT ON ROLE b IS 'x';\n\
            ALTER ROLE b IN DATABASE d SET x TO 'y';\n\\unrestrict aB1";
        assert_eq!(run(known).unwrap(), known);
        for unknown in [
            "CREATE ROLE evil SUPERUSER;",
            "ALTER ROLE ALL SET x TO 'y';",
            "DROP ROLE b;",
            "SET role = 'b';",
            "\\! sh\n",
            "SET client_encoding = 'SJIS';",
            "DO $$ BEGIN END $$;",
            "GRANT SELECT ON TABLE t TO b;",
            "CREATE ROLE a",
            "\\restrict a \\! sh\n",
            "ALTER ROLE me RENAME TO x;",
        ] {
            let failure = run(&format!("CREATE ROLE a;\n{unknown}")).unwrap_err();
            assert!(failure.hint.contains("Nothing was changed"), "{unknown}");
        }
    }
}
