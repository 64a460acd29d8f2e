//! One SQL session with PostgreSQL, and the calls that a base backup makes in it.
//!
//! The session is opened for a purpose and closed after it. `pg_backup_start` and `pg_backup_stop` must run in
//! one session: when it ends early, for whatever reason, PostgreSQL aborts the backup by itself and holds no WAL
//! for it. No pooler may stand between.

use std::{fs, os::unix::fs::MetadataExt, path::Path, time::Duration};

use jiff::Timestamp;
use pgsidecar_core::{
    Lsn, SegmentName, SystemIdentifier, TimelineId,
    archiving::{ArchivingSettings, ShadowedSetting},
};
use tokio_postgres::{Client, NoTls, Row, config::SslMode};

use crate::{
    failure::{Code, Failure},
    settings::{ConnectionSettings, PassFile},
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// No statement of ours but the start of a backup (which waits for a checkpoint) takes long.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(30);
/// A spread checkpoint takes up to `checkpoint_timeout` (a day at most).
const CHECKPOINT_TIMEOUT: Duration = Duration::from_secs(24 * 3600);
/// The first release that a backup is taken of.
const OLDEST_VERSION: u32 = 140_000;

/// A connected session. Dropped, it disconnects.
pub struct Session {
    client: Client,
    connection: tokio::task::JoinHandle<()>,
    server: ServerFacts,
}

/// What a server says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerFacts {
    /// `server_version_num`
    pub version: u32,
    /// `pg_control_system()`
    pub system_identifier: SystemIdentifier,
    /// `pg_is_in_recovery()`
    pub in_recovery: bool,
    /// `data_directory`; empty where the role may not see it.
    pub data_directory: String,
    /// `wal_level`
    pub wal_level: String,
    /// `archive_mode`
    pub archive_mode: String,
    /// `archive_command`; empty where the role may not see it.
    pub archive_command: String,
    /// `archive_library` (15 and later).
    pub archive_library: String,
    /// `full_page_writes`
    pub full_page_writes: bool,
    /// `summarize_wal` (17 and later).
    pub summarize_wal: bool,
}

impl ServerFacts {
    /// The major version, e.g. 17.
    pub fn major(&self) -> u32 {
        self.version / 10_000
    }
}

/// What `pg_backup_start` answered.
#[derive(Clone, Copy, Debug)]
pub struct BackupStart {
    /// Where replay has to begin.
    pub lsn: Lsn,
    /// The server's clock.
    pub at: Timestamp,
}

/// What `pg_backup_stop` answered.
#[derive(Clone, Debug)]
pub struct BackupStop {
    /// Where the backup is consistent.
    pub lsn: Lsn,
    /// The server's clock.
    pub at: Timestamp,
    /// The next transaction id to be given out, with its epoch.
    pub next_xid: u64,
    /// Content of `backup_label`.
    pub label_file: String,
    /// Content of `tablespace_map`; empty without tablespaces.
    pub tablespace_map: String,
}

/// What `pg_create_restore_point` answered.
#[derive(Clone, Copy, Debug)]
pub struct MadeRestorePoint {
    /// Where its record ends.
    pub lsn: Lsn,
    /// The timeline that it lies on.
    pub timeline: TimelineId,
    /// The server's clock.
    pub at: Timestamp,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Session {
    /// Connects and asks the server what it is.
    ///
    /// # Errors
    /// [`Code::PostgresUnavailable`] with what to do: start it, correct the address, give the role its rights.
    pub async fn connect(settings: &ConnectionSettings) -> Result<Session, Failure> {
        let mut config = tokio_postgres::Config::new();
        config
            .port(settings.port)
            .user(&settings.user)
            .dbname(&settings.database)
            .application_name("pgsidecar")
            .connect_timeout(CONNECT_TIMEOUT)
            .ssl_mode(SslMode::Disable)
            // The server's or role's own limits would end a backup; a changed search_path could run others' functions.
            .options("-c statement_timeout=0 -c lock_timeout=0 -c idle_session_timeout=0 -c search_path=pg_catalog -c datestyle=ISO");
        if settings.host.starts_with('/') {
            config.host_path(&settings.host);
        } else {
            config.host(&settings.host);
        }
        if let Some(password) = password(settings)? {
            config.password(password.into_text());
        }
        let place = format!("PostgreSQL at {}:{}", settings.host, settings.port);
        let connecting = tokio::time::timeout(CONNECT_TIMEOUT, config.connect(NoTls));
        let (client, connection) = match connecting.await {
            Ok(Ok(connected)) => connected,
            Ok(Err(error)) => return Err(unavailable(&place, &error)),
            Err(_) => {
                return Err(Failure::new(
                    Code::PostgresUnavailable,
                    format!("{place} did not answer within {CONNECT_TIMEOUT:?}"),
                )
                .hint("Check that the server is up and that PGHOST and PGPORT are right."));
            }
        };
        let connection = tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "the session with PostgreSQL ended");
            }
        });
        let mut session = Session {
            client,
            connection,
            server: ServerFacts {
                version: 0,
                system_identifier: SystemIdentifier::new(0),
                in_recovery: false,
                data_directory: String::new(),
                wal_level: String::new(),
                archive_mode: String::new(),
                archive_command: String::new(),
                archive_library: String::new(),
                full_page_writes: true,
                summarize_wal: false,
            },
        };
        session.server = session.facts().await?;
        if session.server.version < OLDEST_VERSION {
            return Err(Failure::new(Code::PostgresUnavailable, format!("{place} is older than PostgreSQL 14"))
                .hint("pgsidecar backs up PostgreSQL 14 and later."));
        }
        Ok(session)
    }

    /// What the server said when the session began.
    pub fn server(&self) -> &ServerFacts {
        &self.server
    }

    /// Returns when the session has ended, e.g. because the server stopped.
    pub async fn closed(&self) {
        while !self.client.is_closed() {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    async fn facts(&self) -> Result<ServerFacts, Failure> {
        // coalesce: settings that the role may not see come as NULL with missing_ok.
        let row = self
            .row(
                "SELECT current_setting('server_version_num')::int4, \
                 (SELECT system_identifier FROM pg_control_system()), pg_is_in_recovery(), \
                 coalesce((SELECT setting FROM pg_settings WHERE name = 'data_directory'), ''), \
                 current_setting('wal_level'), current_setting('archive_mode'), \
                 coalesce((SELECT setting FROM pg_settings WHERE name = 'archive_command'), ''), \
                 coalesce(current_setting('archive_library', true), ''), current_setting('full_page_writes') = 'on', \
                 coalesce(current_setting('summarize_wal', true), 'off') = 'on'",
                &[],
                STATEMENT_TIMEOUT,
            )
            .await?;
        let system_identifier: i64 = get(&row, 1)?;
        Ok(ServerFacts {
            version: u32::try_from(get::<i32>(&row, 0)?).unwrap_or(0),
            system_identifier: SystemIdentifier::new(system_identifier.cast_unsigned()),
            in_recovery: get(&row, 2)?,
            data_directory: get(&row, 3)?,
            wal_level: get(&row, 4)?,
            archive_mode: get(&row, 5)?,
            archive_command: get(&row, 6)?,
            archive_library: get(&row, 7)?,
            full_page_writes: get(&row, 8)?,
            summarize_wal: get(&row, 9)?,
        })
    }

    async fn row(
        &self,
        sql: &str,
        parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)],
        timeout: Duration,
    ) -> Result<Row, Failure> {
        match tokio::time::timeout(timeout, self.client.query_one(sql, parameters)).await {
            Ok(Ok(row)) => Ok(row),
            Ok(Err(error)) => Err(unavailable("PostgreSQL", &error)),
            Err(_) => {
                Err(Failure::new(Code::PostgresUnavailable, format!("PostgreSQL did not answer within {timeout:?}"))
                    .hint("Look for locks and load in pg_stat_activity (application_name pgsidecar)."))
            }
        }
    }

    /// Starts a base backup in this session. With `fast` the checkpoint is immediate; otherwise it is spread, which
    /// is gentler and can take minutes.
    ///
    /// # Errors
    /// What PostgreSQL says.
    pub async fn backup_start(&self, label: &str, fast: bool) -> Result<BackupStart, Failure> {
        // Before 15 the function had another name and was exclusive by default.
        let sql = match self.server.version {
            ..150_000 => "SELECT pg_start_backup($1, $2, false)::text, extract(epoch FROM clock_timestamp())::float8",
            _ => "SELECT pg_backup_start($1, $2)::text, extract(epoch FROM clock_timestamp())::float8",
        };
        // While it waits for the checkpoint, PostgreSQL doesn't notice by itself that we have died: the session, and what
        // it holds, would stay for minutes. Where the server's platform can't look, it stays as it is.
        if let Err(failure) =
            self.row("SELECT set_config('client_connection_check_interval', '2s', false)", &[], STATEMENT_TIMEOUT).await
        {
            tracing::debug!(%failure, "PostgreSQL doesn't look whether its clients are there");
        }
        let row = self
            .row(sql, &[&label, &fast], CHECKPOINT_TIMEOUT)
            .await
            .map_err(|failure| failure.context("starting the backup"))?;
        Ok(BackupStart { lsn: lsn(&row, 0)?, at: timestamp(get(&row, 1)?) })
    }

    /// Ends the base backup. Does not wait for its WAL to be archived: that is looked up in the repository, where an
    /// outage doesn't hang the session.
    ///
    /// # Errors
    /// What PostgreSQL says, e.g. that the standby was promoted meanwhile.
    pub async fn backup_stop(&self) -> Result<BackupStop, Failure> {
        let function = match self.server.version {
            ..150_000 => "pg_stop_backup(false, false)",
            _ => "pg_backup_stop(false)",
        };
        let sql = format!("SELECT lsn::text, labelfile, coalesce(spcmapfile, '') FROM {function}");
        let row =
            self.row(&sql, &[], STATEMENT_TIMEOUT).await.map_err(|failure| failure.context("ending the backup"))?;
        // A statement of its own: the snapshot and the clock must not be from before the stop.
        let after = self
            .row(
                "SELECT extract(epoch FROM clock_timestamp())::float8, pg_snapshot_xmax(pg_current_snapshot())::text",
                &[],
                STATEMENT_TIMEOUT,
            )
            .await?;
        let next_xid: String = get(&after, 1)?;
        Ok(BackupStop {
            lsn: lsn(&row, 0)?,
            label_file: get(&row, 1)?,
            tablespace_map: get(&row, 2)?,
            at: timestamp(get(&after, 0)?),
            next_xid: next_xid.parse().map_err(|_| Failure::internal(format!("xid8 {next_xid:?}")))?,
        })
    }

    /// The sizes of all tablespaces together, in bytes: about what a full backup will read. `None` where the role
    /// may not ask.
    pub async fn total_size(&self) -> Option<u64> {
        let sql = "SELECT coalesce(sum(pg_tablespace_size(oid)), 0)::int8 FROM pg_tablespace";
        let row = self.row(sql, &[], STATEMENT_TIMEOUT).await.ok()?;
        get::<i64>(&row, 0).ok().and_then(|bytes| u64::try_from(bytes).ok())
    }

    /// The name of a database; of the one that is connected to for 0, by which shared relations go.
    ///
    /// # Errors
    /// What PostgreSQL says.
    pub async fn database_name(&self, oid: u32) -> Result<String, Failure> {
        let sql = "SELECT (CASE WHEN $1::oid = 0 THEN current_database() ELSE (SELECT datname FROM pg_database WHERE oid = $1::oid) END)::text";
        let row = self.row(sql, &[&oid], STATEMENT_TIMEOUT).await?;
        get(&row, 0)
    }

    /// The relation of the connected database whose files have this number, as `database.schema.name`.
    ///
    /// # Errors
    /// What PostgreSQL says.
    pub async fn relation_name(&self, tablespace: u32, number: u32) -> Result<Option<String>, Failure> {
        let sql = "SELECT (SELECT format('%I.%I.%I', current_database(), n.nspname, c.relname) \
                   FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                   WHERE c.oid = pg_filenode_relation($1, $2))";
        let row = self.row(sql, &[&tablespace, &number], STATEMENT_TIMEOUT).await?;
        get(&row, 0)
    }

    /// How far a standby has replayed; `None` on a primary.
    ///
    /// # Errors
    /// What PostgreSQL says.
    pub async fn replayed(&self) -> Result<Option<Lsn>, Failure> {
        let sql = "SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()::text END";
        let row = self.row(sql, &[], STATEMENT_TIMEOUT).await?;
        get::<Option<String>>(&row, 0)?.map(|text| text.parse().map_err(Failure::internal)).transpose()
    }

    /// What the server says of its archiving. What its command line outranks is told to those alone who may read the
    /// configuration files (superusers, and whoever was granted it).
    pub async fn archiving(&self) -> ArchivingSettings {
        let sql = "SELECT s.name, f.setting, f.sourcefile, f.sourceline FROM pg_settings s, LATERAL (\
                       SELECT setting, sourcefile, sourceline FROM pg_file_settings WHERE name = s.name \
                       ORDER BY seqno DESC LIMIT 1) f \
                   WHERE s.name IN ('archive_command', 'restore_command') AND s.source = 'command line' \
                   AND s.setting <> '(disabled)' AND f.setting <> '' AND f.setting <> s.setting";
        // Asked first: what is refused stands in the server's log each time.
        let may = "SELECT has_table_privilege('pg_file_settings', 'SELECT') \
                   AND has_function_privilege('pg_show_all_file_settings()', 'EXECUTE') \
                   AND EXISTS (SELECT FROM pg_settings WHERE name IN ('archive_command', 'restore_command') AND source = 'command line')";
        let worth_it = async { get::<bool>(&self.row(may, &[], STATEMENT_TIMEOUT).await?, 0) };
        let rows = match worth_it.await {
            Ok(true) => {
                let asked = tokio::time::timeout(STATEMENT_TIMEOUT, self.client.query(sql, &[])).await;
                asked.ok().and_then(Result::ok).unwrap_or_default()
            }
            _ => Vec::new(),
        };
        let shadowed = |row: &Row| {
            Ok::<_, Failure>(ShadowedSetting {
                name: get(row, 0)?,
                value: get(row, 1)?,
                file: get(row, 2)?,
                line: get(row, 3)?,
            })
        };
        let server = &self.server;
        ArchivingSettings {
            major: server.major(),
            wal_level: server.wal_level.clone(),
            archive_mode: server.archive_mode.clone(),
            archive_command: server.archive_command.clone(),
            archive_library: server.archive_library.clone(),
            shadowed: rows.iter().filter_map(|row| shadowed(row).ok()).collect(),
        }
    }

    /// Up to where the WAL is summarized, in files that are durable (17 and later). [`Lsn::INVALID`] if the server hasn't
    /// looked yet since it started.
    ///
    /// # Errors
    /// What PostgreSQL says.
    pub async fn summarized(&self) -> Result<Lsn, Failure> {
        let sql = "SELECT summarized_lsn::text FROM pg_get_wal_summarizer_state()";
        lsn(&self.row(sql, &[], STATEMENT_TIMEOUT).await?, 0)
    }

    /// Makes PostgreSQL begin a new WAL segment; answers with the name of the one that it left.
    ///
    /// # Errors
    /// What PostgreSQL says.
    pub async fn switch_wal(&self) -> Result<String, Failure> {
        // A restore point is a record: without one, a switch at the very beginning of a segment does nothing.
        let row = self
            .row(
                "SELECT pg_walfile_name(pg_create_restore_point('pgsidecar check')), pg_switch_wal()::text",
                &[],
                STATEMENT_TIMEOUT,
            )
            .await?;
        get(&row, 0)
    }

    /// Makes a restore point.
    ///
    /// # Errors
    /// What PostgreSQL says, e.g. that it's in recovery.
    pub async fn create_restore_point(&self, name: &str) -> Result<MadeRestorePoint, Failure> {
        let sql = "SELECT lsn::text, pg_walfile_name(lsn), extract(epoch FROM clock_timestamp())::float8 \
                   FROM pg_create_restore_point($1) AS lsn";
        let made = self.row(sql, &[&name], STATEMENT_TIMEOUT).await;
        let row = made.map_err(|failure| failure.context("making the restore point"))?;
        // The record's own timeline; what pg_control says can be older for a while after a promotion.
        let segment: String = get(&row, 1)?;
        let segment: SegmentName = segment.parse().map_err(Failure::internal)?;
        Ok(MadeRestorePoint { lsn: lsn(&row, 0)?, timeline: segment.timeline(), at: timestamp(get(&row, 2)?) })
    }

    /// Makes PostgreSQL begin a new WAL segment, if anything is in the current one.
    ///
    /// # Errors
    /// What PostgreSQL says.
    pub async fn leave_segment(&self) -> Result<(), Failure> {
        self.row("SELECT pg_switch_wal()::text", &[], STATEMENT_TIMEOUT).await.map(|_| ())
    }

    /// Whether the role may call a function, by its signature.
    ///
    /// # Errors
    /// What PostgreSQL says.
    pub async fn may_execute(&self, signature: &str) -> Result<bool, Failure> {
        let row = self.row("SELECT has_function_privilege($1, 'EXECUTE')", &[&signature], STATEMENT_TIMEOUT).await?;
        get(&row, 0)
    }
}

fn get<'a, T: tokio_postgres::types::FromSql<'a>>(row: &'a Row, column: usize) -> Result<T, Failure> {
    row.try_get(column)
        .map_err(|error| Failure::internal(format!("column {column} of an answer of PostgreSQL: {error}")))
}

fn lsn(row: &Row, column: usize) -> Result<Lsn, Failure> {
    let text: String = get(row, column)?;
    text.parse().map_err(Failure::internal)
}

/// A time from seconds since 1970, as `extract(epoch …)` gives them; exact to the microsecond until 2255.
fn timestamp(epoch: f64) -> Timestamp {
    #[expect(clippy::cast_possible_truncation, reason = "microseconds since 1970 fit, and saturate if they don't")]
    let microseconds = (epoch * 1e6).round() as i64;
    Timestamp::from_microsecond(microseconds).unwrap_or_default()
}

/// What PostgreSQL refused, in its own words.
fn unavailable(place: &str, error: &tokio_postgres::Error) -> Failure {
    use tokio_postgres::error::SqlState;
    let Some(db) = error.as_db_error() else {
        let mut message = error.to_string();
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            message = format!("{message}: {cause}");
            source = cause.source();
        }
        return Failure::new(Code::PostgresUnavailable, format!("{place} can't be reached: {message}"))
            .hint("Check that the server is up and that PGHOST and PGPORT are right.");
    };
    let failure = Failure::new(Code::PostgresUnavailable, format!("{place}: {}", db.message()));
    match db.code() {
        code if *code == SqlState::INSUFFICIENT_PRIVILEGE => {
            failure.hint("'pgsidecar check --explain' prints the GRANTs that the role needs.")
        }
        code if *code == SqlState::INVALID_PASSWORD || *code == SqlState::INVALID_AUTHORIZATION_SPECIFICATION => {
            failure.hint("Check PGUSER, and its password: in PGPASSWORD, PGPASSFILE or, for the superuser of PostgreSQL's image, POSTGRES_PASSWORD. The image sets that only in a new database.")
        }
        code if *code == SqlState::CANNOT_CONNECT_NOW => failure.hint("The server is starting or stopping; try again."),
        _ => match db.hint() {
            Some(hint) => failure.hint(hint),
            None => failure,
        },
    }
}

/// A password, and where it was found.
pub(crate) enum Password {
    /// In a file that libpq would look into as well.
    InFile(String),
    /// Elsewhere: in a variable, or in what PostgreSQL's image was told.
    Elsewhere(String),
}

impl Password {
    fn into_text(self) -> String {
        match self {
            Password::InFile(password) | Password::Elsewhere(password) => password,
        }
    }
}

/// `PGPASSWORD`, or else what the password file says, or else what PostgreSQL's image was told; read anew for each
/// connection, because Secrets rotate.
pub(crate) fn password(settings: &ConnectionSettings) -> Result<Option<Password>, Failure> {
    if let Some(password) = std::env::var("PGPASSWORD").ok().filter(|password| !password.is_empty()) {
        return Ok(Some(Password::Elsewhere(password)));
    }
    let in_image = || settings.image_password().map(Password::Elsewhere);
    match password_in_file(settings) {
        Ok(Some(password)) => Ok(Some(Password::InFile(password))),
        Ok(None) => Ok(in_image()),
        // The variable may have been copied from PostgreSQL's container, and what it names be there alone.
        Err(failure) => match in_image() {
            Some(password) => {
                tracing::warn!(hint = failure.hint, "{failure}; the password that PostgreSQL's image was told is used");
                Ok(Some(password))
            }
            None => Err(failure),
        },
    }
}

fn password_in_file(settings: &ConnectionSettings) -> Result<Option<String>, Failure> {
    let (path, named) = match &settings.passfile {
        PassFile::Named(path) => (path, true),
        PassFile::Home(path) => (path, false),
    };
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        Err(_) if !named => return Ok(None),
        Err(error) => return Err(Failure::io(format!("reading the password file {}", path.display()), &error)),
    };
    if meta.mode() & 0o077 != 0 && meta.is_file() && !is_secret_mount(path) {
        // libpq ignores such a file; saying nothing would end in a confusing authentication failure.
        return Err(Failure::new(
            Code::Misconfigured,
            format!("the password file {} can be read by others", path.display()),
        )
        .hint("Make its mode 0600, as libpq demands as well."));
    }
    let text = fs::read_to_string(path)
        .map_err(|error| Failure::io(format!("reading the password file {}", path.display()), &error))?;
    Ok(password_from(&text, settings))
}

/// A volume of a Secret belongs to root and is opened to the pod's group by `fsGroup`: its mode can't be 0600.
fn is_secret_mount(path: &Path) -> bool {
    path.parent().is_some_and(|dir| dir.join("..data").exists())
}

/// The first line of a password file (libpq's `.pgpass`) that fits.
fn password_from(text: &str, settings: &ConnectionSettings) -> Option<String> {
    let host = if settings.host.starts_with('/') { "localhost" } else { &settings.host };
    let port = settings.port.to_string();
    let wanted = [host, &port, &settings.database, &settings.user];
    text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let fields = passfile_fields(line);
        let [values @ .., password] = fields.as_slice() else { return None };
        let fits = |(value, wanted): (&String, &&str)| {
            value == "*" || value == wanted || (*wanted == host && *value == settings.host)
        };
        (values.len() == 4 && values.iter().zip(&wanted).all(fits)).then(|| password.clone())
    })
}

/// Fields are separated by `:`; a backslash takes the next character literally. The fifth is the password.
fn passfile_fields(line: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut characters = line.chars();
    while let Some(c) = characters.next() {
        let literal = match c {
            ':' if fields.len() < 5 => {
                fields.push(String::new());
                continue;
            }
            '\\' => characters.next().unwrap_or('\\'),
            c => c,
        };
        if let Some(field) = fields.last_mut() {
            field.push(literal);
        }
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(host: &str) -> ConnectionSettings {
        ConnectionSettings {
            host: host.into(),
            port: 5432,
            user: "backup".into(),
            database: "postgres".into(),
            passfile: PassFile::Home("/nonexistent".into()),
            image_password: None,
        }
    }

    #[test]
    fn the_first_fitting_line_of_a_password_file_counts() {
        let file = "# localhost:5432:*:backup:comment\n\
                    other:5432:*:backup:no\n\
                    localhost:*:*:back\\up:a\\:b:c\\\\d\n\
                    *:*:*:*:last\n";
        assert_eq!(password_from(file, &settings("localhost")).as_deref(), Some("a:b:c\\d"));
        assert_eq!(password_from(file, &settings("/run/postgresql")).as_deref(), Some("a:b:c\\d"));
        assert_eq!(password_from(file, &settings("db")).as_deref(), Some("last"));
        assert_eq!(password_from("localhost:5432:postgres:backup", &settings("localhost")), None);
    }
}
