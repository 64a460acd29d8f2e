//! pgBackRest: asynchronous, two processes, zstd at level 1.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use super::{Backup, Backups, Kind, PROCESSES, Tool};
use crate::{
    run::{Daemon, Place},
    support::{command, give_to_servers, run},
};

/// pgBackRest, which has no daemon: the commands start processes of their own.
pub struct PgBackRest {
    pub program: PathBuf,
}

impl PgBackRest {
    fn call(&self, place: &Place, arguments: &str) -> String {
        let configuration = place.directory.join("pgbackrest.conf");
        format!("{} --config={} --stanza=main {arguments}", self.program.display(), configuration.display())
    }

    fn command(&self, place: &Place, arguments: &str) -> Command {
        let mut shell = command("sh");
        shell.arg("-c").arg(format!("exec {}", self.call(place, arguments))).current_dir(&place.directory);
        shell
    }
}

impl Tool for PgBackRest {
    fn name(&self) -> &'static str {
        "pgbackrest"
    }

    fn process(&self) -> &'static str {
        "pgbackrest"
    }

    fn version(&self) -> String {
        run(command(&self.program).arg("version")).trim().to_owned()
    }

    fn environment(&self, _: &Place) -> Vec<(String, String)> {
        Vec::new()
    }

    fn create_repository(&self, place: &Place) {
        run(&mut self.command(place, "stanza-create"));
    }

    fn configure(&self, place: &Place) {
        for name in ["spool", "lock"] {
            fs::create_dir(place.directory.join(name)).unwrap();
            give_to_servers(&place.directory.join(name));
        }
        let (store, directory) = (place.store, place.directory.display());
        let text = format!(
            "[global]
repo1-type=s3
repo1-s3-bucket={}
repo1-s3-endpoint=localhost
repo1-storage-port={}
repo1-storage-ca-file={}
repo1-s3-uri-style=path
repo1-s3-region=us-east-1
repo1-s3-key={}
repo1-s3-key-secret={}
repo1-path=/{}
repo1-bundle=y
repo1-block=y
compress-type=zst
compress-level=1
process-max={PROCESSES}
archive-async=y
spool-path={directory}/spool
lock-path={directory}/lock
log-level-console=warn
log-level-file=off
[main]
pg1-path={}
pg1-socket-path={}
pg1-user=postgres
",
            store.bucket(),
            store.port(),
            store.certificates().display(),
            store.access_key(),
            store.secret_key(),
            place.repository,
            place.data.display(),
            place.socket.display(),
        );
        fs::write(place.directory.join("pgbackrest.conf"), text).unwrap();
    }

    fn start(&self, _: &Place) -> Option<Daemon> {
        None
    }

    fn archive_command(&self, place: &Place) -> String {
        self.call(place, "archive-push %p")
    }

    fn restore_command(&self, place: &Place) -> String {
        self.call(place, "archive-get %f \"%p\"")
    }

    fn backups(&self) -> Option<&dyn Backups> {
        Some(self)
    }
}

impl Backups for PgBackRest {
    fn directory(&self) -> &'static str {
        "backup"
    }

    fn create(&self, place: &Place, kind: Kind) -> Command {
        let kind = if kind == Kind::Full { "full" } else { "incr" };
        self.command(place, &format!("--type={kind} --start-fast backup"))
    }

    fn newest(&self, place: &Place) -> Backup {
        let told = run(&mut self.command(place, "--output=json info"));
        let stanzas: serde_json::Value = serde_json::from_str(&told).unwrap();
        let backup = stanzas[0]["backup"].as_array().unwrap().last().expect("there is a backup");
        let kind = if backup["type"] == "full" { Kind::Full } else { Kind::Incremental };
        Backup { id: backup["label"].as_str().unwrap().to_owned(), kind }
    }

    fn restore(&self, place: &Place, backup: &str, to: &Path) -> Command {
        let target = format!("--pg1-path={} --set={backup} --type=immediate --target-action=promote", to.display());
        self.command(place, &format!("{target} restore"))
    }
}
