//! SQL in a private server.

use std::path::Path;

use tokio_postgres::{Client, NoTls};

use crate::failure::{Code, Failure};

/// What outranks the settings of roles and databases, for every session: libraries that aren't here would refuse it, limits
/// of the live server would end it.
pub(super) const SESSION_OPTIONS: &str = "-c session_preload_libraries= -c local_preload_libraries= -c statement_timeout=0 -c lock_timeout=0 \
    -c idle_in_transaction_session_timeout=0 -c idle_session_timeout=0";

/// A session. Dropped, it ends.
pub struct SideSession {
    client: Client,
    connection: tokio::task::JoinHandle<()>,
}

impl Drop for SideSession {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl SideSession {
    /// Connects through the socket in this directory.
    ///
    /// # Errors
    /// PostgreSQL's.
    pub async fn connect(run: &Path, database: &str, user: &str) -> Result<SideSession, tokio_postgres::Error> {
        let mut config = tokio_postgres::Config::new();
        config.host_path(run).port(5432).user(user).dbname(database).application_name("pgsidecar");
        config.options(SESSION_OPTIONS);
        let (client, connection) = config.connect(NoTls).await?;
        let connection = tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "the session with the private server ended");
            }
        });
        Ok(SideSession { client, connection })
    }

    /// The only column of an answer, as text.
    ///
    /// # Errors
    /// PostgreSQL's.
    pub async fn texts(
        &self,
        sql: &str,
        parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)],
    ) -> Result<Vec<String>, Failure> {
        let rows = self.client.query(sql, parameters).await.map_err(|error| refused(&error))?;
        rows.iter().map(|row| row.try_get(0).map_err(Failure::internal)).collect()
    }

    /// Runs a query of the user's, one statement. Answers with what came of it, for people; a query that answers with
    /// booleans alone must answer with `true` alone.
    ///
    /// # Errors
    /// [`Code::Damaged`] if it fails or isn't true.
    pub async fn check(&self, sql: &str) -> Result<String, Failure> {
        use tokio_postgres::types::Type;
        let failed = |error: tokio_postgres::Error| Failure { code: Code::Damaged, ..refused(&error) };
        let statement = self.client.prepare(sql).await.map_err(failed)?;
        let is_check = matches!(statement.columns(), [column] if *column.type_() == Type::BOOL);
        let rows = self.client.query(&statement, &[]).await.map_err(failed)?;
        if !is_check {
            return Ok(format!("{} row{}", rows.len(), if rows.len() == 1 { "" } else { "s" }));
        }
        let answers: Vec<Option<bool>> =
            rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>().map_err(failed)?;
        let not_true = |what: &str| Err(Failure::new(Code::Damaged, format!("the answer is {what}, not true")));
        match answers.as_slice() {
            [] => not_true("empty"),
            answers if answers.iter().all(|answer| *answer == Some(true)) => Ok("true".to_owned()),
            answers if answers.contains(&Some(false)) => not_true("false"),
            _ => not_true("null"),
        }
    }
}

/// What the private server refused, in its own words.
pub(super) fn refused(error: &tokio_postgres::Error) -> Failure {
    let message = match error.as_db_error() {
        Some(db) => db.message().to_owned(),
        None => {
            let mut message = error.to_string();
            let mut source = std::error::Error::source(error);
            while let Some(cause) = source {
                message = format!("{message}: {cause}");
                source = cause.source();
            }
            message
        }
    };
    Failure::new(Code::PostgresUnavailable, format!("the restored server: {message}"))
}
