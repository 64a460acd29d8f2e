//! Settings, from the environment and from flags.
//!
//! [`RawSettings`] is what clap reads: texts. [`Settings::resolve`] turns them into types once, and gathers
//! *all* that is wrong. A command ends with exit code 78 then. The daemon comes up all the same (a database
//! must not fail to start because of a missing Secret) with what it needs to say what's wrong: the listeners,
//! which fall back to their defaults, and the list of errors.

mod image;
mod pod;
mod prepare;
mod raw;
mod schedules;

use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use pgsidecar_core::{
    retention::{Policy, Redundancy},
    schedule::{Schedule, Task},
    settings::{CloneSource, ClusterName, RepositoryUrl, parse_bytes, parse_duration},
};

pub use image::{ImageEnvironment, ImagePassword};
pub use pod::PodEnvironment;
pub use prepare::{PrepareSettings, RawPrepare, StartSettings};
pub use raw::RawSettings;
pub use schedules::RawSchedules;

use crate::{
    failure::{Code, Failure},
    wal::owner::Claimant,
};

const DEFAULT_WAL_LISTEN: &str = "127.0.0.1:7433";
const DEFAULT_HEALTH_LISTEN: &str = "0.0.0.0:7434";
const DEFAULT_CONTROL_SOCKET: &str = "/run/pgsidecar/control.sock";

/// Settings, checked.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What the process needs to answer at all.
    pub process: ProcessSettings,
    /// What has to be known before PostgreSQL starts, whatever else is wrong.
    pub start: StartSettings,
    /// What its work needs.
    pub work: Result<WorkSettings, SettingErrors>,
}

/// What the process needs to answer at all. A wrong value falls back to the default and is listed in the errors.
#[derive(Clone, Debug)]
pub struct ProcessSettings {
    /// Where PostgreSQL's commands reach the daemon.
    pub wal_listen: SocketAddr,
    /// Where probes and Prometheus reach it.
    pub health_listen: SocketAddr,
    /// Where the command-line tool reaches it.
    pub control_socket: PathBuf,
    /// How long everything may take after the first signal.
    pub drain_timeout: Duration,
    /// How long after the first signal PostgreSQL may take to begin to stop, too.
    pub server_stop_wait: Duration,
}

/// What the work needs.
#[derive(Clone, Debug)]
pub struct WorkSettings {
    /// Where the repository is.
    pub repository: RepositoryUrl,
    /// How S3 is reached, if it's there.
    pub s3: S3Settings,
    /// This database's name in the repository.
    pub cluster: ClusterName,
    /// The cluster that this one is or was cloned from.
    pub clone_from: Option<CloneSource>,
    /// Who does the work: pod or host.
    pub instance: String,
    /// Who archives: what stays the same when a pod is replaced.
    pub workload: Option<String>,
    /// PostgreSQL's data directory, where one was named.
    pub pgdata: Option<PathBuf>,
    /// Where another `archive_command` copies WAL to, if one does.
    pub archive_directory: Option<PathBuf>,
    /// How PostgreSQL is reached.
    pub connection: ConnectionSettings,
    /// zstd's level.
    pub compression_level: i32,
    /// Threads of a backup or a restore.
    pub parallelism: usize,
    /// Plain bytes of a part.
    pub part_size: u64,
    /// Bytes of the data directory that a backup reads in a second, at most.
    pub max_rate: Option<u64>,
    /// How many backups a restore may need at most: an incremental backup that would make the chain longer is a full one.
    pub longest_chain: usize,
    /// How long a snapshot stays open at most, unless its `begin` says otherwise.
    pub snapshot_timeout: Duration,
    /// How long a backup waits for its last WAL.
    pub backup_wal_timeout: Duration,
    /// What `prune` keeps.
    pub retention: Policy,
    /// Where WAL lies on its way to PostgreSQL, if not in pg_wal.
    pub spool: Option<PathBuf>,
    /// `pgsidecar-wal` as PostgreSQL sees it.
    pub helper: PathBuf,
    /// Where PostgreSQL's programs are, if somebody said so.
    pub pg_bindir: Option<PathBuf>,
    /// Where private servers get their directories.
    pub scratch: Option<PathBuf>,
    /// What is done by schedule, and when.
    pub schedules: BTreeMap<Task, Schedule>,
}

/// How S3 is reached. Credentials come from the SDK's chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct S3Settings {
    /// An endpoint other than AWS's.
    pub endpoint: Option<String>,
    /// The bucket's region.
    pub region: Option<String>,
    /// Whether the bucket stands in the path; `None` leaves it to the endpoint.
    pub path_style: Option<bool>,
}

/// How PostgreSQL is reached. Passwords are read for each connection, never kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionSettings {
    /// Host name, address or directory of the socket.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Role.
    pub user: String,
    /// Database.
    pub database: String,
    /// File with passwords.
    pub passfile: PassFile,
    /// Where else a password is: that of the image's superuser, if this is that role on the server beside us.
    pub image_password: Option<ImagePassword>,
}

/// Where passwords are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PassFile {
    /// Somebody named this file: it must be readable.
    Named(PathBuf),
    /// `~/.pgpass`, if there is one that can be read.
    Home(PathBuf),
}

/// Everything that is wrong with the settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SettingErrors(pub Vec<SettingError>);

/// One setting that can't be used, with the reason.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name}: {problem}")]
pub struct SettingError {
    /// The environment variable.
    pub name: &'static str,
    /// What is wrong with it.
    pub problem: String,
}

impl fmt::Display for SettingErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<String> = self.0.iter().map(SettingError::to_string).collect();
        f.write_str(&lines.join("; "))
    }
}

impl From<SettingErrors> for Failure {
    fn from(errors: SettingErrors) -> Failure {
        let plural = if errors.0.len() == 1 { "setting is" } else { "settings are" };
        Failure::new(Code::Misconfigured, format!("{} {plural} wrong: {errors}", errors.0.len()))
            .hint("Each can be given as a flag or in the environment; 'pgsidecar --help' lists them.")
    }
}

/// Gathers errors while values are resolved.
struct Resolver(Vec<SettingError>);

impl Resolver {
    fn error(&mut self, name: &'static str, problem: impl fmt::Display) {
        self.0.push(SettingError { name, problem: problem.to_string() });
    }

    /// The value that `parse` makes of the text, or `default` if there is none or it's wrong.
    fn value<T, E: fmt::Display>(
        &mut self,
        name: &'static str,
        text: Option<&String>,
        default: T,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> T {
        match text.map(String::as_str).filter(|text| !text.is_empty()).map(parse) {
            None => default,
            Some(Ok(value)) => value,
            Some(Err(problem)) => {
                self.error(name, problem);
                default
            }
        }
    }
}

/// A number of bytes a second, as `--max-rate` takes it.
///
/// # Errors
/// What is wrong with it.
pub fn parse_rate(text: &str) -> Result<u64, String> {
    match parse_bytes(text) {
        Ok(bytes) if bytes >= 32 << 10 => Ok(bytes),
        Ok(_) => Err(format!("{text:?} is less than 32kB a second")),
        Err(problem) => Err(problem.to_string()),
    }
}

/// The longest time that a snapshot may stay open. PostgreSQL keeps no WAL for it, but its caller is to notice.
const LONGEST_SNAPSHOT: Duration = Duration::from_secs(3600);

/// A snapshot's time limit, as `--timeout` takes it.
///
/// # Errors
/// What is wrong with it.
pub fn parse_snapshot_timeout(text: &str) -> Result<Duration, String> {
    let timeout = parse_duration(text).map_err(|problem| problem.to_string())?;
    check_snapshot_timeout(timeout).map(|()| timeout)
}

/// Checks a snapshot's time limit.
///
/// # Errors
/// If it isn't between a second and an hour.
pub fn check_snapshot_timeout(timeout: Duration) -> Result<(), String> {
    let fits = (Duration::from_secs(1)..=LONGEST_SNAPSHOT).contains(&timeout);
    fits.then_some(()).ok_or_else(|| format!("{timeout:?} is not between 1s and 1h"))
}

/// A number within bounds, these included.
fn number_between<T>(low: T, high: T) -> impl FnOnce(&str) -> Result<T, String>
where
    T: std::str::FromStr + PartialOrd + fmt::Display,
{
    move |text| match text.parse::<T>() {
        Ok(number) if (&low..=&high).contains(&&number) => Ok(number),
        _ => Err(format!("{text:?} is not a number from {low} to {high}")),
    }
}

fn absolute(text: &str) -> Result<PathBuf, String> {
    let path = Path::new(text);
    path.is_absolute().then(|| path.to_owned()).ok_or_else(|| format!("{text:?} is not an absolute path"))
}

impl Settings {
    /// Checks the settings and gathers all errors.
    pub fn resolve(raw: &RawSettings, pod: &PodEnvironment) -> Settings {
        let mut resolver = Resolver(Vec::new());
        let process = resolve_process(&mut resolver, raw);
        let work = resolve_work(&mut resolver, raw, pod);
        let work = match work {
            Some(work) if resolver.0.is_empty() => Ok(work),
            _ => Err(SettingErrors(resolver.0)),
        };
        Settings { process, start: StartSettings::resolve(raw, pod), work }
    }

    /// Adds an error that was found elsewhere.
    pub fn add_error(&mut self, error: SettingError) {
        match &mut self.work {
            Ok(_) => self.work = Err(SettingErrors(vec![error])),
            Err(errors) => errors.0.push(error),
        }
    }

    /// The settings for work.
    ///
    /// # Errors
    /// All that is wrong with the settings.
    pub fn work(&self) -> Result<&WorkSettings, Failure> {
        self.work.as_ref().map_err(|errors| errors.clone().into())
    }
}

impl WorkSettings {
    /// Who claims timelines, if anybody does.
    pub fn claimant(&self) -> Option<Claimant> {
        let workload = self.workload.clone()?;
        Some(Claimant { workload, instance: self.instance.clone() })
    }

    /// The data directory.
    ///
    /// # Errors
    /// If none was named.
    pub fn pgdata(&self) -> Result<&Path, Failure> {
        self.pgdata.as_deref().ok_or_else(|| {
            Failure::new(Code::Misconfigured, "PGDATA: PostgreSQL's data directory is needed here, and not set")
                .hint("Set PGDATA or --pgdata to the directory, as mounted in this container.")
        })
    }
}

fn resolve_process(resolver: &mut Resolver, raw: &RawSettings) -> ProcessSettings {
    let address =
        |text: &str| text.parse::<SocketAddr>().map_err(|_| format!("{text:?} is not an address like 127.0.0.1:7433"));
    let loopback = |text: &str| {
        let address = address(text)?;
        // The API for WAL has no authentication: who reaches it can read and add WAL.
        address.ip().is_loopback().then_some(address).ok_or_else(|| format!("{text:?} is not a loopback address"))
    };
    let fixed = |text: &str| address(text).unwrap_or_else(|_| SocketAddr::from(([127, 0, 0, 1], 7433)));
    ProcessSettings {
        wal_listen: resolver.value(
            "PGSIDECAR_WAL_LISTEN",
            raw.wal_listen.as_ref(),
            fixed(DEFAULT_WAL_LISTEN),
            loopback,
        ),
        health_listen: resolver.value(
            "PGSIDECAR_HEALTH_LISTEN",
            raw.health_listen.as_ref(),
            fixed(DEFAULT_HEALTH_LISTEN),
            address,
        ),
        control_socket: resolver.value(
            "PGSIDECAR_CONTROL_SOCKET",
            raw.control_socket.as_ref(),
            PathBuf::from(DEFAULT_CONTROL_SOCKET),
            absolute,
        ),
        drain_timeout: resolver.value(
            "PGSIDECAR_DRAIN_TIMEOUT",
            raw.drain_timeout.as_ref(),
            Duration::from_secs(60),
            parse_duration,
        ),
        server_stop_wait: resolver.value(
            "PGSIDECAR_SERVER_STOP_WAIT",
            raw.server_stop_wait.as_ref(),
            Duration::from_secs(10),
            parse_duration,
        ),
    }
}

fn resolve_work(resolver: &mut Resolver, raw: &RawSettings, pod: &PodEnvironment) -> Option<WorkSettings> {
    let repository =
        resolver.value("PGSIDECAR_REPOSITORY", raw.repository.as_ref(), None, |text| text.parse().map(Some));
    if raw.repository.as_deref().unwrap_or_default().is_empty() {
        resolver.error(
            "PGSIDECAR_REPOSITORY",
            "not set; it says where backups are kept: s3://BUCKET/PREFIX or file:///DIRECTORY",
        );
    }
    let cluster = match raw.cluster.as_deref().filter(|text| !text.is_empty()) {
        Some(text) => text.parse(),
        None => pod.default_cluster().parse(),
    };
    let cluster: Option<ClusterName> = match cluster {
        Ok(cluster) => Some(cluster),
        Err(problem) => {
            resolver.error("PGSIDECAR_CLUSTER", problem);
            None
        }
    };
    let clone_from: Option<CloneSource> =
        resolver.value("PGSIDECAR_CLONE_FROM", raw.clone_from.as_ref(), None, |text| text.parse().map(Some));
    if let (Some(source), Some(repository), Some(cluster)) = (&clone_from, &repository, &cluster)
        && prepare::is_same_place(source, repository, cluster)
    {
        let problem = format!(
            "{source} is this database's own place in its own repository; a clone needs another PGSIDECAR_CLUSTER or PGSIDECAR_REPOSITORY"
        );
        resolver.error("PGSIDECAR_CLONE_FROM", problem);
    }
    let boolean = |text: &str| match text {
        "true" | "1" | "on" => Ok(Some(true)),
        "false" | "0" | "off" => Ok(Some(false)),
        _ => Err(format!("{text:?} is neither true nor false")),
    };
    let endpoint = |text: &str| {
        let http = text.starts_with("http://") || text.starts_with("https://");
        http.then(|| Some(text.to_owned()))
            .ok_or_else(|| format!("{text:?} is not a URL that begins with http:// or https://"))
    };
    let text = |value: &Option<String>, default: &str| {
        value.clone().filter(|text| !text.is_empty()).unwrap_or_else(|| default.to_owned())
    };
    let mut directory =
        |name, text: &Option<String>| resolver.value(name, text.as_ref(), None, |text| absolute(text).map(Some));
    let (named, default) =
        (directory("PGDATA", &raw.pgdata), directory("PGSIDECAR_DEFAULT_PGDATA", &raw.default_pgdata));
    let pgdata = named.or(default);
    let schedules = raw.schedules.resolve(resolver, cluster.as_ref());
    let (host, user) = (text(&raw.pghost, "127.0.0.1"), text(&raw.pguser, pod.image.superuser()));
    let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    Some(WorkSettings {
        s3: S3Settings {
            endpoint: resolver.value("AWS_ENDPOINT_URL_S3", raw.s3_endpoint.as_ref(), None, endpoint),
            region: raw.s3_region.clone().filter(|text| !text.is_empty()),
            path_style: resolver.value("PGSIDECAR_S3_PATH_STYLE", raw.s3_path_style.as_ref(), None, boolean),
        },
        clone_from,
        instance: pod.instance().to_owned(),
        workload: resolver.value(
            "PGSIDECAR_WORKLOAD",
            raw.workload.as_ref(),
            pod.workload(pgdata.as_deref()),
            |text| {
                let printable = text.len() <= 253 && text.bytes().all(|b| b.is_ascii_graphic());
                printable
                    .then(|| Some(text.to_owned()))
                    .ok_or_else(|| format!("{text:?} is not a name of up to 253 letters"))
            },
        ),
        pgdata,
        archive_directory: resolver.value(
            "PGSIDECAR_ARCHIVE_DIRECTORY",
            raw.archive_directory.as_ref(),
            None,
            |text| absolute(text).map(Some),
        ),
        connection: ConnectionSettings {
            image_password: pod.image.password_for(&user, &host),
            host,
            port: resolver.value("PGPORT", raw.pgport.as_ref(), 5432, number_between(1, u16::MAX)),
            user,
            database: text(&raw.pgdatabase, "postgres"),
            passfile: match raw.pgpassfile.as_deref().filter(|path| !path.is_empty()) {
                Some(path) => PassFile::Named(PathBuf::from(path)),
                None => PassFile::Home(home.join(".pgpass")),
            },
        },
        compression_level: resolver.value(
            "PGSIDECAR_COMPRESSION_LEVEL",
            raw.compression_level.as_ref(),
            1,
            number_between(1, 19),
        ),
        parallelism: resolver.value("PGSIDECAR_PARALLELISM", raw.parallelism.as_ref(), 2, number_between(1, 16)),
        max_rate: resolver
            .value("PGSIDECAR_BACKUP_MAX_RATE", raw.backup_max_rate.as_ref(), None, |text| parse_rate(text).map(Some)),
        longest_chain: resolver.value("PGSIDECAR_LONGEST_CHAIN", raw.longest_chain.as_ref(), 7, number_between(1, 100)),
        part_size: resolver.value("PGSIDECAR_PART_SIZE", raw.part_size.as_ref(), 1 << 30, |text| {
            match parse_bytes(text) {
                Ok(bytes) if (1 << 20..=64 << 30).contains(&bytes) => Ok(bytes),
                Ok(_) => Err(format!("{text:?} is not between 1MB and 64GB")),
                Err(problem) => Err(problem.to_string()),
            }
        }),
        backup_wal_timeout: resolver.value(
            "PGSIDECAR_BACKUP_WAL_TIMEOUT",
            raw.backup_wal_timeout.as_ref(),
            Duration::from_secs(300),
            parse_duration,
        ),
        snapshot_timeout: resolver.value(
            "PGSIDECAR_SNAPSHOT_TIMEOUT",
            raw.snapshot_timeout.as_ref(),
            Duration::from_secs(600),
            parse_snapshot_timeout,
        ),
        retention: Policy {
            window: resolver.value("PGSIDECAR_RETENTION_WINDOW", raw.retention_window.as_ref(), None, |text| {
                text.parse().map(Some)
            }),
            redundancy: resolver.value(
                "PGSIDECAR_RETENTION_REDUNDANCY",
                raw.retention_redundancy.as_ref(),
                Redundancy::default(),
                str::parse,
            ),
            dumps: resolver
                .value("PGSIDECAR_RETENTION_DUMPS", raw.retention_dumps.as_ref(), None, |text| text.parse().map(Some)),
        },
        spool: resolver.value("PGSIDECAR_SPOOL", raw.spool.as_ref(), None, |text| absolute(text).map(Some)),
        helper: resolver.value("PGSIDECAR_HELPER", raw.helper.as_ref(), default_helper(), absolute),
        pg_bindir: resolver.value("PG_BINDIR", raw.pg_bindir.as_ref(), None, |text| absolute(text).map(Some)),
        scratch: resolver.value("PGSIDECAR_SCRATCH", raw.scratch.as_ref(), None, |text| absolute(text).map(Some)),
        schedules,
        repository: repository?,
        cluster: cluster?,
    })
}

/// `pgsidecar-wal` beside the running executable.
fn default_helper() -> PathBuf {
    let beside = std::env::current_exe().ok().and_then(|exe| exe.parent().map(|dir| dir.join("pgsidecar-wal")));
    beside.unwrap_or_else(|| PathBuf::from("/usr/local/bin/pgsidecar-wal"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(namespace: &str, name: &str) -> PodEnvironment {
        PodEnvironment { namespace: Some(namespace.into()), name: Some(name.into()), ..PodEnvironment::default() }
    }

    fn raw() -> RawSettings {
        RawSettings { repository: Some("s3://backups/pg".into()), ..RawSettings::default() }
    }

    #[test]
    fn a_repository_is_all_that_must_be_set() {
        let settings = Settings::resolve(&raw(), &PodEnvironment::default());
        assert_eq!(settings.work.unwrap().cluster.as_str(), "main");
        assert_eq!(settings.process.wal_listen.to_string(), DEFAULT_WAL_LISTEN);
        assert_eq!(settings.process.health_listen.to_string(), DEFAULT_HEALTH_LISTEN);
    }

    #[test]
    fn in_kubernetes_the_workload_names_the_cluster() {
        for (name, workload) in [
            ("orders-db-0", "orders-db"),
            ("orders-db-12", "orders-db"),
            ("orders-7c5ddbdf54-x2x4z", "orders"),
            ("standalone", "standalone"),
            ("my-database", "my-database"),
        ] {
            let settings = Settings::resolve(&raw(), &pod("shop", name));
            assert_eq!(settings.work.unwrap().cluster.as_str(), format!("shop/{workload}"));
        }
    }

    #[test]
    fn all_errors_are_told_together_and_the_listeners_stay() {
        let raw = RawSettings {
            repository: Some("ftp://x".into()),
            cluster: Some("../x".into()),
            pgport: Some("0".into()),
            pgdata: Some("relative".into()),
            wal_listen: Some("0.0.0.0:80".into()),
            health_listen: Some("0.0.0.0:9000".into()),
            compression_level: Some("99".into()),
            ..RawSettings::default()
        };
        let settings = Settings::resolve(&raw, &PodEnvironment::default());
        assert_eq!(settings.process.wal_listen.to_string(), DEFAULT_WAL_LISTEN);
        assert_eq!(settings.process.health_listen.to_string(), "0.0.0.0:9000");
        let failure = settings.work().unwrap_err();
        assert_eq!(failure.code.exit_code(), 78);
        insta::assert_snapshot!(failure.message.replace("; ", "\n"), @r#"
        6 settings are wrong: PGSIDECAR_WAL_LISTEN: "0.0.0.0:80" is not a loopback address
        PGSIDECAR_REPOSITORY: "ftp://x" is not a repository: s3://BUCKET/PREFIX or file:///absolute/directory
        PGSIDECAR_CLUSTER: "../x" is not a cluster name: up to four parts of letters, digits, '.', '_' or '-', joined by '/', like shop/orders-db
        PGDATA: "relative" is not an absolute path
        PGPORT: "0" is not a number from 1 to 65535
        PGSIDECAR_COMPRESSION_LEVEL: "99" is not a number from 1 to 19
        "#);
    }

    #[test]
    fn a_default_data_directory_counts_where_pgdata_says_nothing() {
        let text = |text: &str| Some(text.to_owned()).filter(|text| text != "-");
        // PGDATA, its default: what both the work and prepare take.
        for (pgdata, default, taken) in [
            ("-", "-", None),
            ("-", "/image", Some("/image")),
            // As `env` gives a ConfigMap's key that is there and says nothing.
            ("", "/image", Some("/image")),
            ("/said", "/image", Some("/said")),
            ("/said", "", Some("/said")),
            ("/said", "-", Some("/said")),
        ] {
            let raw = RawSettings { pgdata: text(pgdata), default_pgdata: text(default), ..raw() };
            let settings = Settings::resolve(&raw, &PodEnvironment::default());
            let taken = taken.map(PathBuf::from);
            assert_eq!(settings.start.pgdata, taken, "{pgdata:?} {default:?}");
            assert_eq!(settings.work.unwrap().pgdata, taken, "{pgdata:?} {default:?}");
        }
        // What can't be used is told, and isn't taken for nothing: the other one may be another database's.
        for (pgdata, default, taken, wrong) in
            [("said", "/image", None, "PGDATA"), ("/said", "image", Some("/said"), "PGSIDECAR_DEFAULT_PGDATA")]
        {
            let raw = RawSettings { pgdata: text(pgdata), default_pgdata: text(default), ..raw() };
            let settings = Settings::resolve(&raw, &PodEnvironment::default());
            assert_eq!(settings.start.pgdata, taken.map(PathBuf::from));
            let names: Vec<&str> = settings.work.unwrap_err().0.iter().map(|error| error.name).collect();
            assert_eq!(names, [wrong]);
        }
    }

    #[test]
    fn without_a_repository_the_error_says_what_to_set() {
        let settings = Settings::resolve(&RawSettings::default(), &PodEnvironment::default());
        insta::assert_snapshot!(settings.work().unwrap_err().message, @"1 setting is wrong: PGSIDECAR_REPOSITORY: not set; it says where backups are kept: s3://BUCKET/PREFIX or file:///DIRECTORY");
    }
}
