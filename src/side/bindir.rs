//! PostgreSQL's own programs, of the major version that a backup needs.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use crate::failure::{Code, Failure};

/// A directory with the server and its tools, all of one major version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binaries {
    directory: PathBuf,
}

impl Binaries {
    /// Those of this major version: in the directory that somebody named, or where they usually are.
    ///
    /// # Errors
    /// [`Code::Misconfigured`] with what was found instead.
    pub fn find(named: Option<&Path>, major: u32) -> Result<Binaries, Failure> {
        let wanted = |directory: &Path| version_in(directory) == Ok(major);
        if let Some(named) = named {
            return match version_in(named) {
                Ok(found) if found == major => Ok(Binaries { directory: named.to_owned() }),
                Ok(found) => Err(missing(
                    major,
                    &format!("PG_BINDIR: {} has PostgreSQL {found}, and the backup is of {major}", named.display()),
                )),
                Err(why) => Err(missing(major, &format!("PG_BINDIR: {why}"))),
            };
        }
        let candidates = usual(major);
        if let Some(directory) = candidates.iter().find(|directory| wanted(directory)) {
            return Ok(Binaries { directory: directory.clone() });
        }
        let mut found: Vec<String> = candidates
            .iter()
            .filter_map(|directory| Some(format!("{} in {}", version_in(directory).ok()?, directory.display())))
            .collect();
        found.dedup();
        let found =
            if found.is_empty() { "none was found".to_owned() } else { format!("found was {}", found.join(", ")) };
        Err(missing(major, &format!("the backup needs the programs of PostgreSQL {major}, and {found}")))
    }

    /// One of the programs.
    ///
    /// # Errors
    /// [`Code::Misconfigured`] if it isn't there.
    pub fn program(&self, name: &str) -> Result<PathBuf, Failure> {
        let path = self.directory.join(name);
        if path.exists() {
            return Ok(path);
        }
        Err(Failure::new(Code::Misconfigured, format!("there is no {name} in {}", self.directory.display())).hint(
            "Install what it belongs to (postgresql-client or postgresql-contrib, as the distribution has it), or name another directory with PG_BINDIR.",
        ))
    }

    /// Where they are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }
}

fn missing(major: u32, what: &str) -> Failure {
    Failure::new(Code::Misconfigured, what).hint(format!(
        "Run it where the database's own PostgreSQL {major} is installed, with its extensions: in Kubernetes a Job on the database's image. PG_BINDIR or --pg-bindir names the directory (pg_config --bindir)."
    ))
}

fn usual(major: u32) -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path).find(|directory| directory.join("postgres").exists());
    let pg_config = Command::new("pg_config").arg("--bindir").output().ok().filter(|output| output.status.success());
    let pg_config = pg_config.and_then(|output| String::from_utf8(output.stdout).ok());
    let usual = [format!("/usr/lib/postgresql/{major}/bin"), format!("/usr/pgsql-{major}/bin")];
    in_path.into_iter().chain(pg_config.map(|text| text.trim().into())).chain(usual.map(PathBuf::from)).collect()
}

/// The major version of the server in a directory, or what is wrong.
fn version_in(directory: &Path) -> Result<u32, String> {
    let server = directory.join("postgres");
    let output = Command::new(&server)
        .arg("--version")
        .output()
        .map_err(|error| format!("{} can't be run: {error}", server.display()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    parse_version(&text).ok_or_else(|| format!("{} doesn't tell its version: {text:?}", server.display()))
}

/// `postgres (PostgreSQL) 17.5 (Debian 17.5-1)`: 17.
fn parse_version(text: &str) -> Option<u32> {
    let (_, version) = text.split_once(") ")?;
    let digits: String = version.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_major_version_is_read_from_what_the_server_says() {
        assert_eq!(parse_version("postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)\n"), Some(15));
        assert_eq!(parse_version("postgres (PostgreSQL) 18beta1\n"), Some(18));
        assert_eq!(parse_version("postgres (EnterpriseDB) 16.2.0\n"), Some(16));
        assert_eq!(parse_version("psql\n"), None);
    }

    #[test]
    fn a_directory_without_a_server_is_refused_with_what_to_do() {
        let failure = Binaries::find(Some(Path::new("/nonexistent")), 17).unwrap_err();
        assert_eq!(failure.code, Code::Misconfigured);
        assert!(failure.message.contains("/nonexistent/postgres") && failure.hint.contains("17"), "{failure}");
    }
}
