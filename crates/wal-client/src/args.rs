//! The command line and the environment, resolved into a [`Command`] or refused with a message.

use std::{
    ffi::{OsStr, OsString},
    fmt,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

/// Where the daemon listens unless it was told otherwise.
const DEFAULT_ADDRESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 7433);
/// The longest deadline, in seconds.
const MAX_TIMEOUT_SECONDS: u64 = 86_400;

const HELP: &str = "\
pgsidecar-wal hands WAL files to the pgsidecar daemon beside this PostgreSQL server, and back.

Usage:
  pgsidecar-wal archive %p                                    as archive_command
  pgsidecar-wal restore [OPTIONS] %f %p                       as restore_command
  pgsidecar-wal ping                                          succeeds if the daemon answers

Options:
  --address IP:PORT         the daemon's address [PGSIDECAR_ADDRESS] [default: 127.0.0.1:7433]
  --timeout SECONDS         when to give up [archive, restore: PGSIDECAR_WAL_TIMEOUT]
                            [default: archive 60, restore 300, ping 3]
  --system-identifier N     restore from this database system instead of the server's own
  --tail                    restore to the latest point: where the archive ends, ask for what the stopped
                            server had of its last segment; without effect on a standby
  -h, --help                print this
  -V, --version             print the version

Exit codes:
  archive   0 the file is durable in the repository, 1 it isn't (yet): PostgreSQL asks again
  restore   0 found, 1 not in the archive, 200 can't tell; where standby.signal exists 1 instead of 200
  ping      0 the daemon answers, 1 it doesn't
  2         no command was recognised
";

/// Which command was called, even if the rest of the line makes no sense.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Archive,
    Restore,
    Ping,
}

impl Kind {
    fn from_word(word: &OsStr) -> Option<Kind> {
        match word.to_str()? {
            "archive" => Some(Kind::Archive),
            "restore" => Some(Kind::Restore),
            "ping" => Some(Kind::Ping),
            _ => None,
        }
    }

    /// PostgreSQL waits while the command runs, but asks again after a failed `archive`; a failed `restore`
    /// ends the server.
    fn default_timeout(self) -> Duration {
        Duration::from_secs(match self {
            Kind::Archive => 60,
            Kind::Restore => 300,
            Kind::Ping => 3,
        })
    }
}

/// The first argument that is the name of a command.
pub fn kind_of(args: &[OsString]) -> Option<Kind> {
    args.iter().find_map(|arg| Kind::from_word(arg))
}

/// The name of a file in the archive. Its characters mean nothing special in a URL; whether it is a
/// segment, a history or none of these is the daemon's to judge.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FileName(String);

impl FileName {
    /// The last component of what PostgreSQL passed as `%p` or `%f`.
    pub fn of(path: &OsStr) -> Result<FileName, String> {
        let plausible = |name: &&str| {
            name.len() <= 64
                && !name.starts_with('.')
                && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F' | b'a'..=b'z' | b'.'))
        };
        Path::new(path)
            .file_name()
            .and_then(OsStr::to_str)
            .filter(plausible)
            .map(|name| FileName(name.to_owned()))
            .ok_or_else(|| format!("{} is not the name of a WAL file", quoted(path)))
    }
}

impl FileName {
    /// Whether it's as long as a segment's name and no other file's.
    pub fn is_segment(&self) -> bool {
        self.0.len() == 24
    }

    /// Whether it's called as a timeline's history is.
    pub fn is_history(&self) -> bool {
        self.0.len() == "00000002.history".len() && self.0.ends_with(".history")
    }
}

impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What to do, where and for how long.
#[derive(PartialEq, Eq, Debug)]
pub struct Command {
    pub action: Action,
    pub address: SocketAddr,
    pub timeout: Duration,
}

/// One of the commands, with its operands.
#[derive(PartialEq, Eq, Debug)]
pub enum Action {
    Archive { file: FileName },
    Restore(RestoreRequest),
    Ping,
}

/// What PostgreSQL wants to have restored.
#[derive(PartialEq, Eq, Debug)]
pub struct RestoreRequest {
    /// `%f`
    pub file: FileName,
    /// `%p`, relative to the data directory (`pg_rewind` passes an absolute path).
    pub to: PathBuf,
    /// Whose archive it is; none for that of the daemon's own server.
    pub system_identifier: Option<u64>,
    /// Whether the end of a stopped server's WAL will do.
    pub tail: bool,
}

/// What the command line asks for.
#[derive(PartialEq, Eq, Debug)]
pub enum Parsed {
    Run(Command),
    Print(String),
}

/// The command line as it was typed.
#[derive(Default)]
struct RawArgs {
    address: Option<OsString>,
    timeout: Option<OsString>,
    system_identifier: Option<OsString>,
    tail: bool,
    help: bool,
    version: bool,
    operands: Vec<OsString>,
}

impl RawArgs {
    fn read(args: &[OsString]) -> Result<RawArgs, String> {
        let mut raw = RawArgs::default();
        let mut rest = args.iter();
        while let Some(arg) = rest.next() {
            let text = arg.to_str().unwrap_or_default();
            if !text.starts_with('-') {
                raw.operands.push(arg.clone());
                continue;
            }
            let (name, mut value) = match text.split_once('=') {
                Some((name, value)) => (name, Some(OsString::from(value))),
                None => (text, None),
            };
            let slot = match name {
                "--address" => &mut raw.address,
                "--timeout" => &mut raw.timeout,
                "--system-identifier" => &mut raw.system_identifier,
                "--tail" if value.is_none() => {
                    raw.tail = true;
                    continue;
                }
                "-h" | "--help" if value.is_none() => {
                    raw.help = true;
                    continue;
                }
                "-V" | "--version" if value.is_none() => {
                    raw.version = true;
                    continue;
                }
                _ => return Err(format!("unknown option {}; see pgsidecar-wal --help", quoted(arg))),
            };
            value = value.or_else(|| rest.next().cloned());
            *slot = Some(value.ok_or_else(|| format!("{name} needs a value"))?);
        }
        Ok(raw)
    }
}

/// Resolves arguments (without the program's name) and environment. An option outranks its variable, and an
/// empty variable counts as absent. The error is a message for the user.
pub fn parse(args: &[OsString], env: &dyn Fn(&str) -> Option<OsString>) -> Result<Parsed, String> {
    let raw = RawArgs::read(args)?;
    // Not with files: `archive --help %p` as an archive_command must not acknowledge every segment.
    if (raw.help || raw.version) && raw.operands.len() <= 1 {
        let version = || format!("pgsidecar-wal {}\n", env!("CARGO_PKG_VERSION"));
        return Ok(Parsed::Print(if raw.help { HELP.to_owned() } else { version() }));
    }

    let (word, files) = raw.operands.split_first().ok_or("no command was given; see pgsidecar-wal --help")?;
    let kind =
        Kind::from_word(word).ok_or_else(|| format!("{} is not a command; see pgsidecar-wal --help", quoted(word)))?;
    if raw.system_identifier.is_some() && kind != Kind::Restore {
        return Err("--system-identifier is an option of restore".to_owned());
    }
    if raw.tail && kind != Kind::Restore {
        return Err("--tail is an option of restore".to_owned());
    }
    let action = match (kind, files) {
        (Kind::Archive, [path]) if !raw.help && !raw.version => Action::Archive { file: FileName::of(path)? },
        (Kind::Restore, [name, path]) if !raw.help && !raw.version => Action::Restore(RestoreRequest {
            file: FileName::of(name)?,
            to: PathBuf::from(path),
            system_identifier: raw.system_identifier.as_deref().map(parse_system_identifier).transpose()?,
            tail: raw.tail,
        }),
        (Kind::Ping, []) => Action::Ping,
        (Kind::Archive, _) => return Err("the usage is: pgsidecar-wal archive %p".to_owned()),
        (Kind::Restore, _) => return Err("the usage is: pgsidecar-wal restore %f %p".to_owned()),
        (Kind::Ping, _) => return Err("ping takes no arguments".to_owned()),
    };

    let variable = |name: &str| env(name).filter(|value| !value.is_empty());
    let address = match raw.address.or_else(|| variable("PGSIDECAR_ADDRESS")) {
        Some(text) => parse_address(&text)?,
        None => DEFAULT_ADDRESS,
    };
    // A probe must not begin to wait for minutes because PostgreSQL's commands do.
    let from_env = || if kind == Kind::Ping { None } else { variable("PGSIDECAR_WAL_TIMEOUT") };
    let timeout = match raw.timeout.or_else(from_env) {
        Some(text) => parse_timeout(&text)?,
        None => kind.default_timeout(),
    };
    Ok(Parsed::Run(Command { action, address, timeout }))
}

/// No names but `localhost`: a static binary has no name resolution, and a look-up can hang.
fn parse_address(text: &OsStr) -> Result<SocketAddr, String> {
    let literal = text.to_str().map(|text| match text.strip_prefix("localhost:") {
        Some(port) => format!("{}:{port}", Ipv4Addr::LOCALHOST),
        None => text.to_owned(),
    });
    literal
        .and_then(|literal| literal.parse().ok())
        .filter(|address: &SocketAddr| address.port() != 0)
        .ok_or_else(|| format!("{} is not an address: expected IP:PORT or localhost:PORT", quoted(text)))
}

fn parse_timeout(text: &OsStr) -> Result<Duration, String> {
    decimal(text)
        .filter(|seconds| (1..=MAX_TIMEOUT_SECONDS).contains(seconds))
        .map(Duration::from_secs)
        .ok_or_else(|| format!("{} is not a timeout: expected 1 to {MAX_TIMEOUT_SECONDS} seconds", quoted(text)))
}

fn parse_system_identifier(text: &OsStr) -> Result<u64, String> {
    decimal(text).ok_or_else(|| format!("{} is not a system identifier (a decimal number)", quoted(text)))
}

/// Digits alone: `u64::from_str` would take a sign as well.
fn decimal(text: &OsStr) -> Option<u64> {
    text.to_str().filter(|text| text.bytes().all(|b| b.is_ascii_digit()))?.parse().ok()
}

/// For messages: escaped, and cut to a readable length.
fn quoted(text: &OsStr) -> String {
    format!("{:?}", text.to_string_lossy().chars().take(80).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEGMENT: &str = "000000010000000000000042";

    fn parse_with(line: &str, env: &[(&str, &str)]) -> Result<Command, String> {
        let args: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        let env = |name: &str| env.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value));
        match parse(&args, &env)? {
            Parsed::Run(command) => Ok(command),
            Parsed::Print(text) => Err(text),
        }
    }

    fn archive_of_segment(address: &str, seconds: u64) -> Result<Command, String> {
        let file = FileName(SEGMENT.to_owned());
        let (address, timeout) = (address.parse().unwrap(), Duration::from_secs(seconds));
        Ok(Command { action: Action::Archive { file }, address, timeout })
    }

    #[test]
    fn options_stand_before_or_after_the_command() {
        let expected = archive_of_segment("127.0.0.1:7500", 5);
        for line in [
            "--address 127.0.0.1:7500 --timeout=5 archive pg_wal/000000010000000000000042",
            "archive pg_wal/000000010000000000000042 --timeout 5 --address=localhost:7500",
            "--timeout 9 archive --timeout 5 --address 127.0.0.1:7500 000000010000000000000042",
        ] {
            assert_eq!(parse_with(line, &[]), expected, "{line}");
        }
    }

    #[test]
    fn options_outrank_the_environment_and_empty_variables_are_absent() {
        let line = "archive pg_wal/000000010000000000000042";
        assert_eq!(parse_with(line, &[]), archive_of_segment("127.0.0.1:7433", 60));
        let env = [("PGSIDECAR_ADDRESS", "[::1]:7500"), ("PGSIDECAR_WAL_TIMEOUT", "9")];
        assert_eq!(parse_with(line, &env), archive_of_segment("[::1]:7500", 9));
        assert_eq!(parse_with(&format!("{line} --timeout 8"), &env), archive_of_segment("[::1]:7500", 8));
        let env = [("PGSIDECAR_ADDRESS", ""), ("PGSIDECAR_WAL_TIMEOUT", "")];
        assert_eq!(parse_with(line, &env), archive_of_segment("127.0.0.1:7433", 60));
    }

    #[test]
    fn a_probe_does_not_wait_as_long_as_postgresql_does() {
        let ping = parse_with("ping", &[("PGSIDECAR_WAL_TIMEOUT", "300")]).unwrap();
        assert_eq!((ping.action, ping.timeout), (Action::Ping, Duration::from_secs(3)));
    }

    #[test]
    fn restore_takes_a_name_a_path_and_a_system_identifier() {
        let line = "restore --system-identifier 7575002186531184001 00000002.history pg_wal/RECOVERYHISTORY";
        let expected = RestoreRequest {
            file: FileName("00000002.history".to_owned()),
            to: PathBuf::from("pg_wal/RECOVERYHISTORY"),
            system_identifier: Some(7_575_002_186_531_184_001),
            tail: false,
        };
        let command = parse_with(line, &[]).unwrap();
        assert_eq!((command.action, command.timeout), (Action::Restore(expected), Duration::from_secs(300)));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for line in [
            "",
            "--",
            "archive",
            "archive a b",
            "archive --timeout",
            "archive --timeout 0 0",
            "archive --timeout -1 0",
            "archive --timeout +1 0",
            "archive --timeout 86401 0",
            "archive --address 127.0.0.1 0",
            "archive --address 127.0.0.1:0 0",
            "archive --address localhost 0",
            "archive --address db.example.com:7433 0",
            "archive --address http://127.0.0.1:7433 0",
            "archive --system-identifier 1 0",
            "archive --help=yes 0",
            "restore 0",
            "restore --system-identifier x 0 p",
            "restore pg_wal/RECOVERYXLOG 000000010000000000000042",
            "ping 0",
            "push 0",
        ] {
            assert!(parse_with(line, &[]).is_err(), "{line}");
        }
    }

    #[test]
    fn file_names_are_plain_and_short() {
        for name in ["000000010000000000000042.partial", "00000002.history", "000000010000000000000042.00000028.backup"]
        {
            assert_eq!(FileName::of(OsStr::new(&format!("/data/pg_wal/{name}"))).unwrap().to_string(), name);
        }
        let long = "0".repeat(65);
        for name in
            ["", ".", "..", "/", ".x", "0/..", "0 0", "0%2F", "0?a", "0#a", "0\r\nX: y", "ä", "G", "pg_wal", &long]
        {
            assert!(FileName::of(OsStr::new(name)).is_err(), "{name:?}");
        }
        assert_eq!(FileName::of(OsStr::new("a\"\n")), Err("\"a\\\"\\n\" is not the name of a WAL file".to_owned()));
    }

    #[test]
    fn the_command_is_known_even_if_the_rest_is_not() {
        let kind = |line: &str| kind_of(&line.split(' ').map(OsString::from).collect::<Vec<_>>());
        assert_eq!(kind("--nonsense restore x"), Some(Kind::Restore));
        assert_eq!(kind("--timeout archive restore"), Some(Kind::Archive));
        assert_eq!(kind("push x"), None);
    }
}
