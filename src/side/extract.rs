//! One database, or some of its tables, as they were at a moment.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    process::Stdio,
};

use super::{Observer, Recovered, program, program::ended_badly};
use crate::failure::{Code, Failure};

/// How many names are told that are like one that isn't there.
const NEAR_NAMES: usize = 5;
/// How many names are looked at for that.
const MOST_NAMES: i64 = 20_000;

/// The format of what is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ExtractFormat {
    /// For pg_restore: compressed, any part of it can be restored
    Custom,
    /// SQL, for psql
    Plain,
}

/// Where it's written to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExtractOutput {
    /// Standard output.
    Stdout,
    /// A file that doesn't exist.
    File(PathBuf),
}

impl ExtractOutput {
    /// Whether it can be written to, as far as that can be told before there is anything to write.
    ///
    /// # Errors
    /// [`Code::InvalidRequest`] if it exists, or its directory doesn't.
    pub fn check(&self) -> Result<(), Failure> {
        let ExtractOutput::File(path) = self else { return Ok(()) };
        if path.symlink_metadata().is_ok() {
            return Err(Failure::new(Code::InvalidRequest, format!("{} exists already", path.display()))
                .hint("Name a file that doesn't."));
        }
        // Made and gone again: hours later is too late to find out.
        let directory = directory_of(path);
        tempfile::tempfile_in(&directory)
            .map(|_| ())
            .map_err(|error| Failure::io(format!("writing to {}", directory.display()), &error))
    }
}

/// What is wanted.
#[derive(Clone, Debug)]
pub struct ExtractRequest {
    /// The database.
    pub database: String,
    /// Its tables, as in SQL; none means all of it.
    pub tables: Vec<String>,
    /// The format.
    pub format: ExtractFormat,
    /// Where to.
    pub output: ExtractOutput,
}

/// Dumps what is wanted from a private server with pg_dump. A file appears when it's whole and durable. Answers with its
/// size; 0 for stdout.
///
/// # Errors
/// [`Code::NotFound`] if there was no such database or table then; what pg_dump says.
pub async fn extract(server: &Recovered, request: &ExtractRequest, observer: &dyn Observer) -> Result<u64, Failure> {
    let patterns = patterns(server, request).await?;
    let mut command = server.client("pg_dump")?;
    command.arg(match request.format {
        ExtractFormat::Custom => "--format=custom",
        ExtractFormat::Plain => "--format=plain",
    });
    command.args(patterns.iter().map(|pattern| format!("--table={pattern}")));
    command.arg("--dbname").arg(connection_string(&request.database));
    observer.doing("pg_dump is running");
    let log = server.directory().join("pg_dump.log");
    let dump = async |command: &mut std::process::Command| {
        let ended = program::run(command, &log).await?;
        match ended.status.success() {
            true => Ok(()),
            false => Err(ended_badly("pg_dump", &ended)),
        }
    };
    let ExtractOutput::File(path) = &request.output else {
        dump(command.stdout(Stdio::inherit())).await?;
        return Ok(0);
    };
    let failed = |error: io::Error| Failure::io(format!("writing {}", path.display()), &error);
    let directory = directory_of(path);
    let file = tempfile::Builder::new().prefix(".pgsidecar-extract.").tempfile_in(&directory).map_err(failed)?;
    dump(command.stdout(file.as_file().try_clone().map_err(failed)?)).await?;
    let written = file.as_file().metadata().map_err(failed)?.len();
    file.as_file().sync_all().map_err(failed)?;
    file.persist_noclobber(path).map_err(|error| failed(error.error))?;
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed)?;
    Ok(written)
}

fn directory_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// pg_dump takes a name that looks like a connection string for one.
fn connection_string(database: &str) -> String {
    format!("dbname='{}'", database.replace('\\', "\\\\").replace('\'', "\\'"))
}

/// The tables as pg_dump's patterns that mean them and nothing else.
async fn patterns(server: &Recovered, request: &ExtractRequest) -> Result<Vec<String>, Failure> {
    let session = server.connect(&request.database).await?;
    let mut patterns = Vec::new();
    for table in &request.tables {
        // What belongs to a table in SQL belongs to it here: pg_dump would leave a table's partitions and children out.
        let sql = "WITH RECURSIVE tables (oid) AS (\
                 SELECT c.oid FROM pg_class c WHERE c.oid = to_regclass($1) AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S') \
                 UNION SELECT i.inhrelid FROM pg_inherits i JOIN tables t ON t.oid = i.inhparent JOIN pg_class c ON c.oid = i.inhrelid \
                     WHERE c.relkind IN ('r', 'p', 'f')) \
             SELECT format('\"%s\".\"%s\"', replace(n.nspname, '\"', '\"\"'), replace(c.relname, '\"', '\"\"')) \
             FROM tables t JOIN pg_class c ON c.oid = t.oid JOIN pg_namespace n ON n.oid = c.relnamespace";
        let found =
            session.texts(sql, &[table]).await.map_err(|failure| Failure { code: Code::InvalidRequest, ..failure })?;
        match found.is_empty() {
            false => patterns.extend(found),
            true => {
                let sql = "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                     WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' \
                     ORDER BY 1 LIMIT $1";
                let there = session.texts(sql, &[&MOST_NAMES]).await?;
                return Err(no_such_table(table, &request.database, there));
            }
        }
    }
    Ok(patterns)
}

fn no_such_table(table: &str, database: &str, mut there: Vec<String>) -> Failure {
    let failure =
        Failure::new(Code::NotFound, format!("there was no table {table:?} in database {database:?} at that moment"));
    if there.is_empty() {
        return failure.hint("There were no tables at all then. Was it created later, or in another database?");
    }
    let bare = |name: &str| name.rsplit('.').next().unwrap_or(name).to_lowercase();
    let wanted = (table.to_lowercase(), bare(table));
    there.sort_by_key(|name| distance(&name.to_lowercase(), &wanted.0).min(distance(&bare(name), &wanted.1)));
    there.truncate(NEAR_NAMES);
    failure.hint(format!(
        "Names like it, with their schemas: {}. Choose another moment, or one of these.",
        there.join(", ")
    ))
}

/// How many characters have to be changed, added or taken to make one text of the other (Levenshtein).
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (i, a) in one.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in other.iter().enumerate() {
            let changed = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_names_are_told() {
        assert_eq!((distance("", "abc"), distance("orders", "order"), distance("kitten", "sitting")), (3, 1, 3));
        let there = ["public.customers", "sales.orders", "public.order_lines", "a.b", "c.d", "e.f"].map(str::to_owned);
        let failure = no_such_table("public.ordres", "shop", there.to_vec());
        assert!(failure.hint.starts_with("Names like it, with their schemas: sales.orders,"), "{}", failure.hint);
        assert!(no_such_table("x", "shop", Vec::new()).hint.contains("no tables at all"));
    }

    #[test]
    fn a_database_s_name_is_never_a_connection_string() {
        assert_eq!(connection_string("it's host=x"), "dbname='it\\'s host=x'");
    }
}
