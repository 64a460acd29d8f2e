//! barman-cloud: a Python program for each segment, zstd at level 1.

use std::path::{Path, PathBuf};

use super::{Tool, aws};
use crate::{
    run::{Daemon, Place},
    support::{command, run, told},
};

/// Barman's commands for clouds.
pub struct Barman {
    bin: PathBuf,
}

impl Barman {
    /// It, or why it doesn't run.
    pub fn find(root: &Path) -> Result<Barman, String> {
        let bin = root.join("usr/bin");
        let output = command(bin.join("python3")).arg(bin.join("barman-cloud-wal-archive")).arg("--version").output();
        match output {
            Ok(output) if output.status.success() => Ok(Barman { bin }),
            Ok(output) => Err(told(&output)),
            Err(error) => Err(error.to_string()),
        }
    }

    fn call(&self, place: &Place, program: &str, options: &str, arguments: &str) -> String {
        let bin = self.bin.display();
        let (endpoint, bucket, repository) = (place.store.endpoint(), place.store.bucket(), &place.repository);
        format!(
            "{bin}/python3 {bin}/{program} --cloud-provider aws-s3 --endpoint-url {endpoint} --addressing-style path {options} s3://{bucket}/{repository} main {arguments}"
        )
    }
}

impl Tool for Barman {
    fn name(&self) -> &'static str {
        "barman-cloud"
    }

    fn process(&self) -> &'static str {
        "python3"
    }

    fn version(&self) -> String {
        let program = self.bin.join("barman-cloud-wal-archive");
        run(command(self.bin.join("python3")).arg(program).arg("--version")).trim().to_owned()
    }

    fn environment(&self, place: &Place) -> Vec<(String, String)> {
        let mut variables = aws(place);
        variables.push(("AWS_CA_BUNDLE".to_owned(), place.store.certificates().display().to_string()));
        variables
    }

    fn create_repository(&self, _: &Place) {}

    fn configure(&self, _: &Place) {}

    fn start(&self, _: &Place) -> Option<Daemon> {
        None
    }

    fn archive_command(&self, place: &Place) -> String {
        self.call(place, "barman-cloud-wal-archive", "--zstd --compression-level 1", "%p")
    }

    fn restore_command(&self, place: &Place) -> String {
        let spool = place.directory.join("spool");
        let options = format!("--parallel 8 --spool-dir {}", spool.display());
        self.call(place, "barman-cloud-wal-restore", &options, "%f %p")
    }
}
