//! pgBackRest: asynchronous, two processes, zstd at level 1.

use std::{fs, path::PathBuf};

use super::Tool;
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
        run(command("sh").arg("-c").arg(self.call(place, "stanza-create")).current_dir(&place.directory));
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
process-max=2
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
}
