//! Whether a server's settings make it archive through pgsidecar, and what to set where they don't.
//!
//! Source: PostgreSQL's `src/backend/postmaster/pgarch.c`. `archive_library` came with 15 and outranks `archive_command`
//! there; since 16 both together are an error, which the archiver logs at each start, and nothing is archived. What stands
//! on the server's command line (`-c`) outranks `postgresql.conf` and `ALTER SYSTEM` without a word.

use std::fmt;

/// What `archive_command` shows while `archive_mode` is off (`show_archive_command`).
const DISABLED: &str = "(disabled)";
/// The helper that `archive_command` calls.
const HELPER: &str = "pgsidecar-wal";
/// The route that curl is given instead.
const ROUTE: &str = "/v1/wal/";

/// What a server says of its archiving.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ArchivingSettings {
    /// The major version, e.g. 17.
    pub major: u32,
    /// `wal_level`
    pub wal_level: String,
    /// `archive_mode`
    pub archive_mode: String,
    /// `archive_command`
    pub archive_command: String,
    /// `archive_library`; empty before 15.
    pub archive_library: String,
    /// What the command line outranks, where that can be told.
    pub shadowed: Vec<ShadowedSetting>,
}

/// A setting in a configuration file that another value on the server's command line outranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShadowedSetting {
    /// Its name.
    pub name: String,
    /// The value in the file.
    pub value: String,
    /// The file, as PostgreSQL names it.
    pub file: String,
    /// The line in it.
    pub line: i32,
}

/// Who else may archive rightfully.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OtherWays {
    /// What archives fills a directory that pgsidecar ships.
    pub by_directory: bool,
    /// PostgreSQL's commands have asked: whatever `archive_command` is called, it calls pgsidecar.
    pub has_asked: bool,
}

/// Why nothing is archived, or not through pgsidecar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ArchivingFault {
    /// `wal_level` is `minimal`.
    WalLevelMinimal,
    /// `archive_mode` is `off`.
    ModeOff,
    /// There is an `archive_library`, so that `archive_command` isn't used.
    Library(String),
    /// There are `archive_library` and `archive_command`: an error since 16.
    Both(String),
    /// There is no `archive_command`.
    NoCommand,
    /// `archive_command` calls curl so that it ends with 0 on an error.
    CurlWithoutFail(String),
    /// `archive_command` calls something else.
    Foreign(String),
}

impl fmt::Display for ArchivingFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ArchivingFault::WalLevelMinimal => f.write_str("wal_level is minimal"),
            ArchivingFault::ModeOff => f.write_str("archive_mode is off: PostgreSQL archives nothing"),
            ArchivingFault::Library(library) => {
                write!(f, "archive_library is {library:?}: archive_command is not used")
            }
            ArchivingFault::Both(library) => {
                write!(
                    f,
                    "archive_library is {library:?} and archive_command is set as well: PostgreSQL refuses both together and archives nothing"
                )
            }
            ArchivingFault::NoCommand => f.write_str("archive_command is empty"),
            ArchivingFault::CurlWithoutFail(command) => write!(f, "archive_command doesn't notice errors: {command}"),
            ArchivingFault::Foreign(command) => {
                write!(f, "archive_command is {command}, which doesn't call pgsidecar as far as can be told")
            }
        }
    }
}

impl ArchivingFault {
    /// What to do; `helper` is `pgsidecar-wal` as PostgreSQL finds it.
    pub fn hint(&self, helper: &str) -> String {
        let place = "in postgresql.conf or by ALTER SYSTEM, or with -c among the arguments of PostgreSQL's container";
        let command = format!("archive_command = '{helper} archive %p'");
        match self {
            ArchivingFault::WalLevelMinimal => format!("Set wal_level = replica {place}, and restart PostgreSQL."),
            ArchivingFault::ModeOff => {
                format!("Set archive_mode = on and {command} {place}, and restart PostgreSQL.")
            }
            ArchivingFault::Library(_) => format!("Reset archive_library, and set {command} {place}."),
            ArchivingFault::Both(_) => {
                "Reset archive_library, wherever it is set ('SELECT * FROM pg_file_settings' tells), and reload."
                    .to_owned()
            }
            ArchivingFault::NoCommand => format!("Set {command} {place}, and reload."),
            ArchivingFault::CurlWithoutFail(_) => {
                format!("Use curl -fsS --max-time 60 -T %p …, or {helper} archive %p.")
            }
            ArchivingFault::Foreign(_) => format!(
                "Set {command} {place}, and reload. If it calls pgsidecar by a script of its own, this goes away with the next segment that is archived."
            ),
        }
    }
}

impl ArchivingSettings {
    /// Why nothing is archived, or not through pgsidecar; the worst only.
    pub fn fault(&self, others: OtherWays) -> Option<ArchivingFault> {
        let command = &self.archive_command;
        let no_command = command.is_empty() || command == DISABLED;
        Some(match () {
            () if self.wal_level == "minimal" => ArchivingFault::WalLevelMinimal,
            () if self.archive_mode == "off" => ArchivingFault::ModeOff,
            () if !self.archive_library.is_empty() && !no_command && self.major >= 16 => {
                ArchivingFault::Both(self.archive_library.clone())
            }
            () if !self.archive_library.is_empty() => {
                return (!others.by_directory).then(|| ArchivingFault::Library(self.archive_library.clone()));
            }
            () if no_command => ArchivingFault::NoCommand,
            // Without -f curl ends with 0 on an error, and PostgreSQL takes the segment as archived.
            () if command.contains("curl") && !has_fail_flag(command) => {
                ArchivingFault::CurlWithoutFail(command.clone())
            }
            () if calls_pgsidecar(command) || others.by_directory || others.has_asked => return None,
            () => ArchivingFault::Foreign(command.clone()),
        })
    }

    /// What somebody has set and the command line outranks. What calls pgsidecar itself misses nothing.
    pub fn shadowed(&self) -> impl Iterator<Item = &ShadowedSetting> {
        self.shadowed.iter().filter(|setting| !calls_pgsidecar(&setting.value))
    }
}

impl fmt::Display for ShadowedSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ShadowedSetting { name, value, file, line } = self;
        write!(f, "{name} is {value:?} in {file} (line {line}), which the server's command line outranks (-c {name}=…)")
    }
}

impl ShadowedSetting {
    /// What to do.
    pub fn hint(&self) -> String {
        format!(
            "It has no effect. Remove it there; or, if it's the one that is wanted, take {} off the server's arguments (where they are injected: the annotation pgsidecar.dev/postgres-args: skip).",
            self.name
        )
    }
}

/// Whether a command calls pgsidecar, as far as that can be seen.
fn calls_pgsidecar(command: &str) -> bool {
    command.contains(HELPER) || command.contains(ROUTE)
}

/// Whether curl is told to end with an error on an HTTP error. What stands before it (`test -f %p &&`) isn't curl's.
fn has_fail_flag(command: &str) -> bool {
    let mut words = command.split_whitespace().skip_while(|word| !word.ends_with("curl"));
    words.any(|word| {
        word.starts_with("--fail") || (word.starts_with('-') && !word.starts_with("--") && word.contains('f'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(major: u32, mode: &str, command: &str, library: &str) -> ArchivingSettings {
        ArchivingSettings {
            major,
            wal_level: "replica".into(),
            archive_mode: mode.into(),
            archive_command: command.into(),
            archive_library: library.into(),
            shadowed: Vec::new(),
        }
    }

    const OURS: &str = "/pgsidecar/pgsidecar-wal archive %p";
    const NONE: OtherWays = OtherWays { by_directory: false, has_asked: false };

    #[test]
    fn the_worst_of_what_keeps_a_server_from_archiving_is_told() {
        let fault = |major, mode, command, library| server(major, mode, command, library).fault(NONE);
        assert_eq!(fault(17, "on", OURS, ""), None);
        assert_eq!(fault(17, "always", "curl -fsS -T %p http://127.0.0.1:7433/v1/wal/%f", ""), None);
        assert_eq!(fault(17, "off", "(disabled)", ""), Some(ArchivingFault::ModeOff));
        assert_eq!(fault(17, "on", "", ""), Some(ArchivingFault::NoCommand));
        assert_eq!(fault(15, "on", OURS, "basic_archive"), Some(ArchivingFault::Library("basic_archive".into())));
        assert_eq!(fault(16, "on", OURS, "basic_archive"), Some(ArchivingFault::Both("basic_archive".into())));
        assert_eq!(fault(17, "on", "", "basic_archive"), Some(ArchivingFault::Library("basic_archive".into())));
        let silent = "test -f %p && curl -sS -T %p http://127.0.0.1:7433/v1/wal/%f";
        assert_eq!(fault(17, "on", silent, ""), Some(ArchivingFault::CurlWithoutFail(silent.into())));
        let minimal = ArchivingSettings { wal_level: "minimal".into(), ..server(17, "off", "(disabled)", "") };
        assert_eq!(minimal.fault(NONE), Some(ArchivingFault::WalLevelMinimal));
    }

    #[test]
    fn another_command_is_a_fault_unless_there_is_another_way() {
        let foreign = server(17, "on", "pgbackrest archive-push %p", "");
        assert_eq!(foreign.fault(NONE), Some(ArchivingFault::Foreign("pgbackrest archive-push %p".into())));
        assert_eq!(foreign.fault(OtherWays { by_directory: true, ..NONE }), None);
        assert_eq!(foreign.fault(OtherWays { has_asked: true, ..NONE }), None);
        let library = server(17, "on", "", "basic_archive");
        assert_eq!(library.fault(OtherWays { by_directory: true, ..NONE }), None);
        assert!(server(17, "off", "(disabled)", "").fault(OtherWays { by_directory: true, has_asked: true }).is_some());
    }

    #[test]
    fn what_the_command_line_outranks_is_told_unless_it_is_ours_as_well() {
        let shadowed = |value: &str| ShadowedSetting {
            name: "archive_command".into(),
            value: value.into(),
            file: "/data/postgresql.conf".into(),
            line: 7,
        };
        let both = vec![shadowed("cp %p /archive/%f"), shadowed("/usr/local/bin/pgsidecar-wal archive %p")];
        let settings = ArchivingSettings { shadowed: both, ..server(17, "on", OURS, "") };
        let told: Vec<String> = settings.shadowed().map(ToString::to_string).collect();
        assert_eq!(
            told,
            [
                "archive_command is \"cp %p /archive/%f\" in /data/postgresql.conf (line 7), which the server's command line outranks (-c archive_command=…)"
            ]
        );
    }
}
