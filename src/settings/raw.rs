//! The settings as texts: what clap reads from flags and environment, and what `--help` says of them.

use clap::Args;

/// The settings as they are written. Each can be given by a flag or by the environment; the flag wins.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Settings")]
pub struct RawSettings {
    /// Where backups and WAL are kept: s3://BUCKET/PREFIX or file:///DIRECTORY
    #[arg(long, global = true, env = "PGSIDECAR_REPOSITORY", value_name = "URL", hide_env_values = true)]
    pub repository: Option<String>,
    /// Name of this database in the repository [default: NAMESPACE/WORKLOAD in Kubernetes, else main]
    #[arg(long, global = true, env = "PGSIDECAR_CLUSTER", value_name = "NAME", hide_env_values = true)]
    pub cluster: Option<String>,
    /// Who archives this database: another workload's timelines are refused [default: NAMESPACE/WORKLOAD in Kubernetes,
    /// else HOST:PGDATA]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_WORKLOAD",
        value_name = "NAME",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub workload: Option<String>,
    /// The cluster that this database is cloned from, when its data directory is empty: s3://BUCKET/PREFIX?cluster=NAME or
    /// file:///DIRECTORY?cluster=NAME
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_CLONE_FROM",
        value_name = "URL",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub clone_from: Option<String>,
    /// PostgreSQL's data directory, on the volume shared with it
    #[arg(long, global = true, env = "PGDATA", value_name = "DIR", hide_env_values = true)]
    pub pgdata: Option<String>,
    /// The same where PGDATA isn't set: what the image says of itself, and the pod may say otherwise
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_DEFAULT_PGDATA",
        value_name = "DIR",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub default_pgdata: Option<String>,
    /// Directory that another archive_command, such as cp, copies WAL to: its files are shipped, and removed once durable
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_ARCHIVE_DIRECTORY",
        value_name = "DIR",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub archive_directory: Option<String>,
    /// PostgreSQL's host, or the directory of its socket [default: 127.0.0.1]
    #[arg(long, global = true, env = "PGHOST", value_name = "HOST", hide_env_values = true, hide_short_help = true)]
    pub pghost: Option<String>,
    /// PostgreSQL's port [default: 5432]
    #[arg(long, global = true, env = "PGPORT", value_name = "PORT", hide_env_values = true, hide_short_help = true)]
    pub pgport: Option<String>,
    /// Role for backups; 'pgsidecar check --explain' prints the rights it needs [default: POSTGRES_USER, else postgres]
    #[arg(long, global = true, env = "PGUSER", value_name = "ROLE", hide_env_values = true, hide_short_help = true)]
    pub pguser: Option<String>,
    /// Database to connect to [default: postgres]
    #[arg(
        long,
        global = true,
        env = "PGDATABASE",
        value_name = "NAME",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub pgdatabase: Option<String>,
    /// File with passwords, read anew for each connection; PGPASSWORD is honoured too [default: ~/.pgpass]
    #[arg(
        long,
        global = true,
        env = "PGPASSFILE",
        value_name = "FILE",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub pgpassfile: Option<String>,
    /// Endpoint of an S3-compatible store [default: AWS]
    #[arg(
        long,
        global = true,
        env = "AWS_ENDPOINT_URL_S3",
        value_name = "URL",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub s3_endpoint: Option<String>,
    /// Region of the bucket [default: that of the AWS profile, else us-east-1]
    #[arg(
        long,
        global = true,
        env = "AWS_REGION",
        value_name = "REGION",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub s3_region: Option<String>,
    /// Put the bucket into the path instead of the host name: true or false [default: true with an endpoint]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_S3_PATH_STYLE",
        value_name = "BOOL",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub s3_path_style: Option<String>,
    /// zstd level for WAL and backups, 1 to 19 [default: 1]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_COMPRESSION_LEVEL",
        value_name = "LEVEL",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub compression_level: Option<String>,
    /// Threads that read and compress a base backup, or unpack a restore, 1 to 16 [default: 2]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_PARALLELISM",
        value_name = "N",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub parallelism: Option<String>,
    /// Bytes of the data directory that a base backup reads in a second, at most, from 32kB on [default: no limit]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_BACKUP_MAX_RATE",
        value_name = "SIZE",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub backup_max_rate: Option<String>,
    /// How many backups a restore may need: an incremental one that would make its chain longer is a full one, 1 to 100 [default: 7]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_LONGEST_CHAIN",
        value_name = "N",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub longest_chain: Option<String>,
    /// A part of a base backup ends with the file that brings it to this size, uncompressed, 1MB to 64GB [default: 1GB]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_PART_SIZE",
        value_name = "SIZE",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub part_size: Option<String>,
    /// How long a backup waits for its last WAL to be archived [default: 5min]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_BACKUP_WAL_TIMEOUT",
        value_name = "TIME",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub backup_wal_timeout: Option<String>,
    /// Every moment of this time can be restored; backups and WAL that it doesn't need go when 'pgsidecar prune' runs, like 14d [default: all stay]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_RETENTION_WINDOW",
        value_name = "TIME",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub retention_window: Option<String>,
    /// How many full backups that can be restored stay at least, with the WAL from there on, 1 to 1000 [default: 1]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_RETENTION_REDUNDANCY",
        value_name = "N",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub retention_redundancy: Option<String>,
    /// Which dumps stay: the last ones, and the newest of so many days, weeks, months and years, like last=3,daily=7,weekly=4,monthly=12,yearly=1 [default: all stay]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_RETENTION_DUMPS",
        value_name = "COUNTS",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub retention_dumps: Option<String>,
    /// How long a storage snapshot may take from begin to end, 1s to 1h [default: 10min]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_SNAPSHOT_TIMEOUT",
        value_name = "TIME",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub snapshot_timeout: Option<String>,
    /// Directory for WAL on its way to PostgreSQL, on a disk volume [default: pg_wal itself]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_SPOOL",
        value_name = "DIR",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub spool: Option<String>,
    /// PostgreSQL's programs, of the backup's major version, for drill and extract [default: where they usually are]
    #[arg(long, global = true, env = "PG_BINDIR", value_name = "DIR", hide_env_values = true, hide_short_help = true)]
    pub pg_bindir: Option<String>,
    /// Where drill and extract restore to, each time into a new directory of its own that is removed again
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_SCRATCH",
        value_name = "DIR",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub scratch: Option<String>,
    /// Where archive_command and restore_command reach the daemon: a loopback address [default: 127.0.0.1:7433]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_WAL_LISTEN",
        value_name = "ADDRESS",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub wal_listen: Option<String>,
    /// Where the kubelet's probes and Prometheus reach the daemon [default: 0.0.0.0:7434]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_HEALTH_LISTEN",
        value_name = "ADDRESS",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub health_listen: Option<String>,
    /// Unix socket where these commands reach the daemon [default: /run/pgsidecar/control.sock]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_CONTROL_SOCKET",
        value_name = "PATH",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub control_socket: Option<String>,
    /// Path of pgsidecar-wal for the restore_command of restored servers [default: pgsidecar-wal beside pgsidecar]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_HELPER",
        value_name = "PATH",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub helper: Option<String>,
    /// How long everything may take after SIGTERM [default: 60s]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_DRAIN_TIMEOUT",
        value_name = "TIME",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub drain_timeout: Option<String>,
    /// How long PostgreSQL may take after that to begin to stop as well [default: 10s]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_SERVER_STOP_WAIT",
        value_name = "TIME",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub server_stop_wait: Option<String>,
    #[command(flatten)]
    /// When work is done by itself.
    pub schedules: super::RawSchedules,
    /// error, warn, info, debug or trace [default: info for the daemon, warn for commands]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_LOG",
        value_name = "LEVEL",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub log: Option<String>,
    /// text or json [default: text]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_LOG_FORMAT",
        value_name = "FORMAT",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub log_format: Option<String>,
}

impl RawSettings {
    /// The data directory as it's written: `PGDATA`, or what it is where nobody has set that. An empty text counts as
    /// none; one that can't be used is never passed over, because another directory would be another database's.
    pub(super) fn data_directory(&self) -> Option<&String> {
        [&self.pgdata, &self.default_pgdata].into_iter().flatten().find(|text| !text.is_empty())
    }
}
