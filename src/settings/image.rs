//! What PostgreSQL's container is told by its environment, where that is copied into ours.
//!
//! The names and their meaning are those of the official image (`docker-entrypoint.sh` of docker-library/postgres): with
//! `POSTGRES_USER` and `POSTGRES_PASSWORD` it makes the superuser when the database is new. Of each there is a `_FILE`,
//! whose content counts without the newlines at its end (`$(< file)` in its shell); an empty variable counts as absent.

use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

use super::ConnectionSettings;

/// The superuser that the image makes where nothing is said.
const SUPERUSER: &str = "postgres";

/// Whether it's told already that the password's file can't be read.
static UNREADABLE: Told = Told::new();

/// What the image is told of its superuser.
#[derive(Clone, Debug, Default)]
pub struct ImageEnvironment {
    /// `POSTGRES_USER`, or the content of `POSTGRES_USER_FILE`.
    pub user: Option<String>,
    /// Where its password is, if it's told.
    pub password: Option<ImagePassword>,
}

/// Where the password of the image's superuser is. It's read for each connection, never kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImagePassword {
    /// In `POSTGRES_PASSWORD`.
    Variable,
    /// In this file, which `POSTGRES_PASSWORD_FILE` names.
    File(PathBuf),
}

impl ImageEnvironment {
    /// Reads the process's environment. A file that can't be read is none: PostgreSQL's container may have it alone.
    pub fn from_process() -> ImageEnvironment {
        let file = |name: &str| variable(name).map(PathBuf::from);
        let user =
            variable("POSTGRES_USER").or_else(|| file("POSTGRES_USER_FILE").and_then(|path| content(&path).ok()));
        let password = match variable("POSTGRES_PASSWORD") {
            Some(_) => Some(ImagePassword::Variable),
            None => file("POSTGRES_PASSWORD_FILE").map(ImagePassword::File),
        };
        ImageEnvironment { user: user.filter(|user| !user.is_empty()), password }
    }

    /// The role that is connected as where none is named.
    pub fn superuser(&self) -> &str {
        self.user.as_deref().unwrap_or(SUPERUSER)
    }

    /// Where the password for this role at this host is, if it's the image's superuser on the server beside us: to no
    /// other server may it be sent, and no other role has it.
    pub fn password_for(&self, user: &str, host: &str) -> Option<ImagePassword> {
        let beside_us =
            host.starts_with('/') || host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
        self.password.clone().filter(|_| beside_us && user == self.superuser())
    }
}

impl ImagePassword {
    /// The password as it's now. One that can't be read is none, and told once: most often the server asks for none from
    /// within its pod, and the file is in PostgreSQL's container alone, so that it would be told at each connection.
    pub fn read(&self) -> Option<String> {
        match self {
            ImagePassword::Variable => variable("POSTGRES_PASSWORD"),
            ImagePassword::File(path) => match content(path) {
                Ok(password) => {
                    UNREADABLE.over();
                    Some(password).filter(|password| !password.is_empty())
                }
                Err(error) => {
                    if UNREADABLE.is_new() {
                        tracing::warn!(
                            "the file that POSTGRES_PASSWORD_FILE names, {}, can't be read: {error}",
                            path.display()
                        );
                    }
                    None
                }
            },
        }
    }
}

impl ConnectionSettings {
    /// The password of the image's superuser, if this is a connection as that.
    pub fn image_password(&self) -> Option<String> {
        self.image_password.as_ref().and_then(ImagePassword::read)
    }
}

/// A trouble that is told when it begins, and not again before it's over.
struct Told(AtomicBool);

impl Told {
    const fn new() -> Told {
        Told(AtomicBool::new(false))
    }

    /// There is the trouble: whether it's to be told.
    fn is_new(&self) -> bool {
        !self.0.swap(true, Relaxed)
    }

    /// There's none, or no longer.
    fn over(&self) {
        self.0.store(false, Relaxed);
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn content(path: &Path) -> io::Result<String> {
    Ok(fs::read_to_string(path)?.trim_end_matches('\n').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_superuser_s_password_is_for_that_role_on_the_server_beside_us_alone() {
        let password = Some(ImagePassword::Variable);
        let shop = ImageEnvironment { user: Some("shop".into()), password: password.clone() };
        for host in ["127.0.0.1", "::1", "localhost", "/run/postgresql"] {
            assert_eq!(shop.password_for("shop", host), password, "{host}");
            assert_eq!(shop.password_for("postgres", host), None, "{host}");
        }
        for host in ["10.0.0.7", "db", "localhost.example.com", ""] {
            assert_eq!(shop.password_for("shop", host), None, "{host}");
        }
        let unnamed = ImageEnvironment { user: None, password: password.clone() };
        assert_eq!(unnamed.password_for("postgres", "localhost"), password);
        assert_eq!(ImageEnvironment::default().password_for("postgres", "localhost"), None);
    }

    #[test]
    fn of_a_password_file_the_newlines_at_its_end_go_and_nothing_else() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let password = ImagePassword::File(file.path().to_owned());
        for (content, read) in [
            ("secret", Some("secret")),
            ("secret\n", Some("secret")),
            (" se\ncret \n\n", Some(" se\ncret ")),
            ("secret\r\n", Some("secret\r")),
            ("\n", None),
        ] {
            fs::write(file.path(), content).unwrap();
            assert_eq!(password.read().as_deref(), read, "{content:?}");
        }
        assert_eq!(ImagePassword::File("/nonexistent".into()).read(), None);
    }

    #[test]
    fn a_trouble_is_told_once_until_it_s_over() {
        let trouble = Told::new();
        assert_eq!([trouble.is_new(), trouble.is_new(), trouble.is_new()], [true, false, false]);
        trouble.over();
        assert_eq!([trouble.is_new(), trouble.is_new()], [true, false]);
    }
}
