//! PostgreSQL's client programs: pg_dump of the server's major version, or a newer one.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use crate::failure::{Code, Failure};

/// Where distributions put each major version's programs.
const USUAL: [(&str, &str); 2] = [("/usr/lib/postgresql", "bin"), ("/usr", "bin")];

/// A directory with pg_dump, pg_dumpall, pg_restore and psql, all of one major version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tools {
    directory: PathBuf,
    major: u32,
    version: String,
}

impl Tools {
    /// Those that fit a server of this major version: of the same one where there are such, else of the nearest newer one.
    /// Not of the newest: archives can be read by pg_restore of the same or a newer major version than pg_dump's, and
    /// whoever restores by hand has that of the server.
    ///
    /// # Errors
    /// [`Code::Misconfigured`] with what was found instead.
    pub fn find(named: Option<&Path>, at_least: u32) -> Result<Tools, Failure> {
        let mut found = candidates(named);
        found.sort_by_key(|tools| tools.major);
        if let Some(tools) = found.iter().find(|tools| tools.major >= at_least) {
            return Ok(tools.clone());
        }
        let there: Vec<String> =
            found.iter().map(|tools| format!("{} in {}", tools.version, tools.directory.display())).collect();
        let place = if named.is_some() { "PG_BINDIR" } else { "PATH and the usual places" };
        let there = match there.as_slice() {
            [] => format!("there is no pg_dump in {place}"),
            there => format!("the newest pg_dump in {place} is older: {}", there.join(", ")),
        };
        Err(Failure::new(Code::Misconfigured, format!("PostgreSQL {at_least} needs pg_dump {at_least} or newer, and {there}"))
            .hint(format!("Install postgresql-client-{at_least} or a newer one; PG_BINDIR or --pg-bindir names the directory. An older pg_dump refuses a newer server.")))
    }

    /// The newest that are there: for SQL, before it's known what the server is.
    ///
    /// # Errors
    /// [`Code::Misconfigured`] if there are none.
    pub fn any(named: Option<&Path>) -> Result<Tools, Failure> {
        let mut found = candidates(named);
        found.sort_by_key(|tools| tools.major);
        found.pop().ok_or_else(|| {
            let place = if named.is_some() { "PG_BINDIR" } else { "PATH and the usual places" };
            Failure::new(Code::Misconfigured, format!("there is no pg_dump in {place}")).hint(
                "Install postgresql-client of the server's major version; PG_BINDIR or --pg-bindir names the directory.",
            )
        })
    }

    /// One of the programs.
    pub fn command(&self, name: &str) -> Command {
        Command::new(self.directory.join(name))
    }

    /// Their major version.
    pub fn major(&self) -> u32 {
        self.major
    }

    /// Their version in full.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Whether pg_dump can compress with zstd: since 16, and where it was built so. It's asked: it looks at its options
    /// before it connects.
    pub fn has_zstd(&self) -> bool {
        if self.major < 16 {
            return false;
        }
        let mut asked = self.command("pg_dump");
        asked.args(["--format=custom", "--compress=zstd:1", "--dbname=host=/nonexistent"]).env("LC_ALL", "C");
        asked.output().is_ok_and(|output| !String::from_utf8_lossy(&output.stderr).contains("support compression"))
    }
}

fn candidates(named: Option<&Path>) -> Vec<Tools> {
    if let Some(named) = named {
        return look_into(named.to_owned()).into_iter().collect();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut directories: Vec<PathBuf> = std::env::split_paths(&path).collect();
    for (parent, bin) in USUAL {
        let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
        let of_a_version = entries.map(|entry| entry.path()).filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let number = name.strip_prefix("pgsql-").unwrap_or(if parent == "/usr" { "" } else { &name });
            !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit())
        });
        directories.extend(of_a_version.map(|path| path.join(bin)));
    }
    let mut found: Vec<Tools> = Vec::new();
    for directory in directories {
        if !found.iter().any(|tools| tools.directory == directory) {
            found.extend(look_into(directory));
        }
    }
    found
}

/// The tools in a directory, if all of them are there and tell their version.
fn look_into(directory: PathBuf) -> Option<Tools> {
    let all = ["pg_dump", "pg_dumpall", "pg_restore", "psql"].iter().all(|name| directory.join(name).exists());
    if !all {
        return None;
    }
    let output = Command::new(directory.join("pg_dump")).arg("--version").output().ok()?;
    let (major, version) = parse_version(&String::from_utf8_lossy(&output.stdout))?;
    Some(Tools { directory, major, version })
}

/// `pg_dump (PostgreSQL) 17.5 (Debian 17.5-1)`: 17 and `17.5`.
fn parse_version(text: &str) -> Option<(u32, String)> {
    let version = text.split_once(") ")?.1.split_whitespace().next()?;
    let digits: String = version.chars().take_while(char::is_ascii_digit).collect();
    Some((digits.parse().ok()?, version.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read_from_what_pg_dump_says() {
        let parsed = parse_version("pg_dump (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)\n");
        assert_eq!(parsed, Some((15, "15.14".to_owned())));
        assert_eq!(parse_version("pg_dump (PostgreSQL) 18beta1\n"), Some((18, "18beta1".to_owned())));
        assert_eq!(parse_version("nothing\n"), None);
    }

    #[test]
    fn where_there_is_none_it_says_what_to_install() {
        let failure = Tools::find(Some(Path::new("/nonexistent")), 17).unwrap_err();
        assert_eq!(failure.code, Code::Misconfigured);
        assert!(failure.message.contains("no pg_dump in PG_BINDIR") && failure.hint.contains("client-17"), "{failure}");
    }
}
