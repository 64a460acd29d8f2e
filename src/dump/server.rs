//! The server that is dumped or restored to, by way of psql: whatever libpq can (TLS, SCRAM, service files) works here as well.

use std::{os::unix::fs::MetadataExt, process::Command};

use pgsidecar_core::{
    SystemIdentifier,
    dump::{DatabaseName, DatabaseProperties},
};
use serde::{Deserialize, de::DeserializeOwned};

use super::{program, tools::Tools};
use crate::{
    failure::{Code, Failure},
    postgres::{self, Password},
    settings::{ConnectionSettings, PassFile},
    side::program::without_libpq,
};

/// Bits of a password file's mode with which libpq ignores it.
const OPEN_TO_OTHERS: u32 = 0o077;

/// How a server is reached with client programs. Nothing secret is ever on a command line.
#[derive(Clone, Debug)]
pub struct Server {
    tools: Tools,
    connection: ConnectionSettings,
    way: Way,
}

/// What else than the settings tells how a server is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Nothing: it's the server beside us, whatever libpq's variables say, which may be meant for others.
    Own,
    /// What libpq reads from the environment (`PGSSLMODE`, `PGSERVICE`, …).
    Libpq,
}

/// What has to be known of it.
#[derive(Clone, Debug, Deserialize)]
pub struct DumpedServer {
    /// `server_version_num`.
    pub version: u32,
    /// Whether the role may read the roles' passwords.
    pub sees_passwords: bool,
    /// Its databases.
    pub databases: Vec<FoundDatabase>,
}

/// A database that is there.
#[derive(Clone, Debug, Deserialize)]
pub struct FoundDatabase {
    /// Its name.
    pub name: String,
    /// Its OID.
    pub oid: u32,
    /// Whether it's a template.
    pub is_template: bool,
    /// Whether anybody may connect.
    pub allows_connections: bool,
    /// Whether it's what an interrupted DROP DATABASE has left.
    pub is_invalid: bool,
    /// Its size in bytes, if the role may ask.
    pub size: Option<u64>,
    /// What it's created with.
    #[serde(flatten)]
    pub properties: DatabaseProperties,
}

/// Databases with what is to be known of them. Columns that came with later versions are looked for by name.
const DATABASES: &str = "SELECT json_build_object(\
    'version', current_setting('server_version_num')::int, \
    'sees_passwords', has_table_privilege('pg_catalog.pg_authid', 'SELECT'), \
    'databases', coalesce((SELECT json_agg(json_build_object(\
        'name', datname, 'oid', d.oid::bigint, 'is_template', datistemplate, 'allows_connections', datallowconn, \
        'is_invalid', datconnlimit = -2, \
        'size', CASE WHEN datconnlimit <> -2 AND has_database_privilege(d.oid, 'CONNECT') THEN pg_database_size(d.oid) END, \
        'owner', pg_get_userbyid(datdba), 'encoding', pg_encoding_to_char(encoding), 'collate', datcollate, 'ctype', datctype, \
        'locale_provider', CASE coalesce(to_json(d)->>'datlocprovider', 'c') WHEN 'i' THEN 'icu' WHEN 'b' THEN 'builtin' ELSE 'libc' END, \
        'locale', coalesce(to_json(d)->>'datlocale', to_json(d)->>'daticulocale'), \
        'settings', coalesce((SELECT to_json(setconfig) FROM pg_db_role_setting WHERE setdatabase = d.oid AND setrole = 0), '[]')\
    ) ORDER BY datname) FROM pg_database d), '[]'))";

impl Server {
    /// The server that the settings name.
    pub fn new(tools: Tools, connection: &ConnectionSettings, way: Way) -> Server {
        Server { tools, connection: connection.clone(), way }
    }

    /// The tools.
    pub fn tools(&self) -> &Tools {
        &self.tools
    }

    /// The same server with other tools.
    #[must_use]
    pub fn with(&self, tools: Tools) -> Server {
        Server { tools, connection: self.connection.clone(), way: self.way }
    }

    /// Where it is, for people.
    pub fn description(&self) -> String {
        match std::env::var("PGSERVICE").ok().filter(|service| self.way == Way::Libpq && !service.is_empty()) {
            Some(service) => format!("service {service}"),
            None => format!("{}:{}", self.connection.host, self.connection.port),
        }
    }

    /// The database that is connected to where none is named.
    pub fn maintenance_database(&self) -> &str {
        &self.connection.database
    }

    /// A client program that connects to this server.
    ///
    /// # Errors
    /// If the password file can't be read.
    pub fn command(&self, name: &str) -> Result<Command, Failure> {
        let connection = &self.connection;
        let mut command = self.tools.command(name);
        if self.way == Way::Own {
            without_libpq(&mut command);
        }
        command
            .env("PGHOST", &connection.host)
            .env("PGPORT", connection.port.to_string())
            .env("PGUSER", &connection.user)
            .env("PGDATABASE", &connection.database)
            .env("PGAPPNAME", "pgsidecar")
            .env("LC_ALL", "C");
        // A dump has its database's own encoding: not all that can be in one can be converted. Globals and answers are UTF-8.
        match name {
            "pg_dump" => command.env_remove("PGCLIENTENCODING"),
            _ => command.env("PGCLIENTENCODING", "UTF8"),
        };
        if self.way == Way::Own || std::env::var_os("PGCONNECT_TIMEOUT").is_none() {
            command.env("PGCONNECT_TIMEOUT", "15");
        }
        if let PassFile::Named(path) = &connection.passfile {
            command.env("PGPASSFILE", path);
        }
        if let Some(password) = self.password()? {
            command.env("PGPASSWORD", password);
        }
        Ok(command)
    }

    /// The password that libpq wouldn't find by itself.
    fn password(&self) -> Result<Option<String>, Failure> {
        // With these it goes to another server than the settings say, or as another role.
        let elsewhere = self.way == Way::Libpq && ["PGSERVICE", "PGHOSTADDR"].map(is_set).contains(&true);
        // libpq ignores the file of a Secret's volume, which its group can read; we take the password out.
        let is_open = match &self.connection.passfile {
            PassFile::Named(path) => std::fs::metadata(path).is_ok_and(|meta| meta.mode() & OPEN_TO_OTHERS != 0),
            PassFile::Home(_) => false,
        };
        match postgres::password(&self.connection) {
            Ok(Some(Password::InFile(password))) => Ok(Some(password).filter(|_| is_open)),
            Ok(Some(Password::Elsewhere(password))) => {
                Ok(Some(password).filter(|_| !elsewhere || is_set("PGPASSWORD")))
            }
            Ok(None) => Ok(None),
            Err(failure) if is_open => Err(failure),
            // libpq connects without it where none is asked for.
            Err(_) => Ok(None),
        }
    }

    /// The same, connected to this database.
    ///
    /// # Errors
    /// As [`Server::command`].
    pub fn command_in(&self, name: &str, database: &DatabaseName) -> Result<Command, Failure> {
        let mut command = self.command(name)?;
        command.arg(format!("--dbname={}", database.conninfo()));
        Ok(command)
    }

    /// psql without anybody's habits, which stops at the first error.
    ///
    /// # Errors
    /// As [`Server::command`].
    pub fn psql(&self, database: Option<&DatabaseName>) -> Result<Command, Failure> {
        let mut command = match database {
            Some(database) => self.command_in("psql", database)?,
            None => self.command("psql")?,
        };
        command.args(["-X", "-q", "-A", "-t", "-w", "-v", "ON_ERROR_STOP=1"]);
        Ok(command)
    }

    /// The answer to a query that gives one JSON document.
    ///
    /// # Errors
    /// What psql says.
    pub async fn json<T: DeserializeOwned>(&self, database: Option<&DatabaseName>, sql: &str) -> Result<T, Failure> {
        let text = self.run(database, sql).await?;
        serde_json::from_str(&text)
            .map_err(|error| Failure::internal(format!("an answer of PostgreSQL: {error}: {text:?}")))
    }

    /// Runs SQL, which nobody sees on a command line.
    ///
    /// # Errors
    /// What psql says, without the statement.
    pub async fn run(&self, database: Option<&DatabaseName>, sql: &str) -> Result<String, Failure> {
        let mut psql = self.psql(database)?;
        psql.args(["-v", "VERBOSITY=terse"]);
        program::output_for(psql, format!("{sql};\n")).await.map_err(|failure| {
            failure.hint(
                "Check PGHOST, PGPORT and PGUSER, the password in PGPASSFILE or PGPASSWORD, and the role's rights.",
            )
        })
    }

    /// What is to be dumped.
    ///
    /// # Errors
    /// What psql says.
    pub async fn look(&self) -> Result<DumpedServer, Failure> {
        self.json(None, DATABASES).await
    }

    /// Its major version.
    ///
    /// # Errors
    /// What psql says.
    pub async fn major(&self) -> Result<u32, Failure> {
        let version: u32 = self.json(None, "SELECT current_setting('server_version_num')::int").await?;
        Ok(version / 10_000)
    }

    /// Its system identifier, which everybody may ask for.
    ///
    /// # Errors
    /// What psql says.
    pub async fn system_identifier(&self) -> Result<SystemIdentifier, Failure> {
        let text = self.run(None, "SELECT system_identifier FROM pg_control_system()").await.map_err(|failure| {
            failure.hint(
                "Where the server doesn't tell it, give the dumps a number of their own with --system-identifier.",
            )
        })?;
        // PostgreSQL shows it as a signed number.
        let number: i64 = text.trim().parse().map_err(|_| Failure::internal(format!("system identifier {text:?}")))?;
        Ok(SystemIdentifier::new(number.cast_unsigned()))
    }

    /// Whether a database of this OID is there.
    ///
    /// # Errors
    /// What psql says.
    pub async fn has_database(&self, oid: u32) -> Result<bool, Failure> {
        self.json(None, &format!("SELECT to_json(EXISTS (SELECT FROM pg_database WHERE oid = {oid}))")).await
    }

    /// Whether a database of this name is there.
    ///
    /// # Errors
    /// What psql says.
    pub async fn has_database_named(&self, name: &DatabaseName) -> Result<bool, Failure> {
        let sql =
            format!("SELECT to_json(EXISTS (SELECT FROM pg_database WHERE datname = {}))", literal(name.as_str()));
        self.json(None, &sql).await
    }
}

fn is_set(name: &str) -> bool {
    std::env::var_os(name).is_some_and(|value| !value.is_empty())
}

/// A text as SQL, whatever `standard_conforming_strings` is.
pub fn literal(text: &str) -> String {
    let quoted = text.replace('\'', "''");
    if quoted.contains('\\') { format!(" E'{}'", quoted.replace('\\', "\\\\")) } else { format!("'{quoted}'") }
}

/// Whether a failure is PostgreSQL's, so that it can be about the database and not the way to it.
pub fn is_of_postgres(failure: &Failure) -> bool {
    failure.code == Code::PostgresUnavailable
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_stay_texts() {
        assert_eq!(literal("it's"), "'it''s'");
        assert_eq!(literal("a\\'b"), " E'a\\\\''b'");
    }
}
