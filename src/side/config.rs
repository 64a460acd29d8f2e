//! What a private server is told: everything. Nothing of the database's own configuration is read. It may lie elsewhere
//! (Debian), include files that aren't here, archive, listen, or load libraries whose workers begin to work.

use std::path::Path;

use pgsidecar_core::ControlFile;

use super::scratch::SOCKET;
use crate::failure::{Code, Failure};

/// One setting of the user's: `NAME=VALUE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerSetting {
    name: String,
    value: String,
}

impl std::str::FromStr for ServerSetting {
    type Err = String;

    fn from_str(text: &str) -> Result<ServerSetting, String> {
        let letter = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._".contains(c);
        match text.split_once('=') {
            Some((name, _)) if ELSEWHERE.contains(&name) => {
                Err(format!("{name} can't be set: a private server reads no other configuration and no other data"))
            }
            Some((name, value))
                if name.starts_with(|c: char| c.is_ascii_lowercase())
                    && name.chars().all(letter)
                    && !value.contains(char::is_control) =>
            {
                Ok(ServerSetting { name: name.to_owned(), value: value.to_owned() })
            }
            _ => Err(format!("{text:?} is not NAME=VALUE with the name of a setting of PostgreSQL in lower case")),
        }
    }
}

/// What would make it read other files than its own: directives of `postgresql.conf` that are no settings (guc-file.l takes
/// them with a `=` as well), and where its data are. The file's `data_directory` outranks `-D` (SelectConfigFiles, guc.c).
const ELSEWHERE: [&str; 5] = ["include", "include_dir", "include_if_exists", "config_file", "data_directory"];
/// Prepared transactions that there is room for at least: the server may have got more since the backup.
const PREPARED_TRANSACTIONS: u32 = 200;
/// pg_dump locks every table of a database: there are as many locks as this times connections and prepared transactions.
const LOCKS: u32 = 256;

/// The settings that nobody can change, for the command line, which outranks every file.
///
/// No setting of a hot standby is among them: it takes no connections before recovery has ended. So it needs none of the
/// sizes that the primary had, doesn't stop where the primary raised one of them, and may have no background workers at
/// all: neither an extension's nor logical replication's, whatever is preloaded.
pub fn guards(run: &Path, major: u32) -> Vec<(&'static str, String)> {
    let own = |name: &str| run.join(name).display().to_string();
    let mut guards = vec![
        ("archive_mode", "off".to_owned()),
        ("archive_command", String::new()),
        ("archive_cleanup_command", String::new()),
        ("recovery_end_command", String::new()),
        ("primary_conninfo", String::new()),
        ("primary_slot_name", String::new()),
        ("hot_standby", "off".to_owned()),
        ("max_worker_processes", "0".to_owned()),
        ("max_logical_replication_workers", "0".to_owned()),
        ("max_wal_senders", "0".to_owned()),
        ("autovacuum", "off".to_owned()),
        ("listen_addresses", String::new()),
        ("port", SOCKET.trim_start_matches(".s.PGSQL.").to_owned()),
        ("unix_socket_directories", run.display().to_string()),
        ("unix_socket_permissions", "0700".to_owned()),
        ("hba_file", own("pg_hba.conf")),
        ("ident_file", own("pg_ident.conf")),
        ("external_pid_file", String::new()),
        ("ssl", "off".to_owned()),
        ("logging_collector", "off".to_owned()),
        ("log_destination", "stderr".to_owned()),
        // What is read of the log has to be English.
        ("lc_messages", "C".to_owned()),
        ("log_line_prefix", String::new()),
        ("log_min_messages", "warning".to_owned()),
        ("cluster_name", "pgsidecar".to_owned()),
    ];
    if major >= 15 {
        guards.push(("archive_library", String::new()));
    }
    if major >= 17 {
        // A trigger at login could reach out.
        guards.push(("event_triggers", "off".to_owned()));
        guards.push(("summarize_wal", "off".to_owned()));
    }
    guards
}

/// Its `postgresql.conf`. The user's settings come last, and before none of [`guards`].
pub fn postgresql_conf(control: &ControlFile, major: u32, settings: &[ServerSetting]) -> String {
    let mut lines = vec![
        ("shared_preload_libraries", String::new()),
        ("shared_buffers", "64MB".to_owned()),
        ("huge_pages", "off".to_owned()),
        ("max_connections", "30".to_owned()),
        ("max_prepared_transactions", control.max_prepared_transactions.max(PREPARED_TRANSACTIONS).to_string()),
        ("max_locks_per_transaction", control.max_locks_per_transaction.max(LOCKS).to_string()),
        // All of it is thrown away.
        ("fsync", "off".to_owned()),
        ("synchronous_commit", "off".to_owned()),
        ("full_page_writes", "off".to_owned()),
        ("jit", "off".to_owned()),
        ("log_timezone", "UTC".to_owned()),
        ("timezone", "UTC".to_owned()),
    ];
    if major >= 18 {
        lines.push(("io_method", "sync".to_owned()));
    }
    let given = settings.iter().map(|setting| (setting.name.as_str(), setting.value.clone()));
    lines.into_iter().chain(given).map(|(name, value)| format!("{name} = {}\n", quoted(&value))).collect()
}

/// A value as `postgresql.conf` takes it (GUC_scanstr, guc-file.l).
fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "''"))
}

/// Its `pg_hba.conf`: the directory of the socket belongs to nobody else.
pub const PG_HBA_CONF: &str = "local all all trust\n";

/// Its `restore_command`: this program itself, asking the repository. `program` must have nothing that is special to a
/// shell.
///
/// # Errors
/// [`Code::Misconfigured`] if it has.
pub fn restore_command(program: &Path, arguments: &str) -> Result<String, Failure> {
    let program = program.display().to_string();
    if program.contains(['"', '\\', '$', '`', '%', '\n', '\'']) {
        return Err(Failure::new(
            Code::Misconfigured,
            format!("this program lies at {program:?}, which has characters that are special to a shell"),
        )
        .hint("Install it elsewhere."));
    }
    Ok(format!("\"{program}\" wal get {arguments} %f \"%p\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTROL: &[u8] = include_bytes!("../../crates/core/tests/fixtures/pg_control-15");

    #[test]
    fn a_user_s_setting_is_quoted_and_has_a_name() {
        let setting: ServerSetting = "search_path=it's, \"x\\y\"".parse().unwrap();
        let conf = postgresql_conf(&ControlFile::parse(CONTROL).unwrap(), 15, &[setting]);
        assert!(conf.ends_with("search_path = 'it''s, \"x\\\\y\"'\n"), "{conf}");
        for text in [
            "work_mem",
            "=1",
            "work mem=1",
            "include 'x'=1",
            "a=b\nc=d",
            "Work_mem=1",
            "include=x",
            "include_dir=/etc",
            "data_directory=/live",
        ] {
            assert!(text.parse::<ServerSetting>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn what_keeps_it_private_is_on_the_command_line() {
        let guards = guards(Path::new("/scratch/run"), 17);
        for (name, value) in [
            ("archive_mode", "off"),
            ("listen_addresses", ""),
            ("unix_socket_directories", "/scratch/run"),
            ("max_worker_processes", "0"),
            ("port", "5432"),
            ("event_triggers", "off"),
        ] {
            assert!(guards.contains(&(name, value.to_owned())), "{name}");
        }
    }
}
