//! Where a test's backups go: a local directory, or the S3 server that the run is about.

use std::path::PathBuf;

use super::Scratch;
use crate::server::Server;

/// A repository of one test.
pub enum Repository {
    Directory(PathBuf),
    S3(Server),
}

impl Repository {
    /// A local directory.
    pub fn directory(scratch: &Scratch) -> Repository {
        Repository::Directory(scratch.path().join("repository"))
    }

    /// The S3 server of this run.
    pub fn s3() -> Repository {
        Repository::S3(Server::start())
    }

    /// The settings that lead to it.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        match self {
            Repository::Directory(path) => vec![("PGSIDECAR_REPOSITORY", format!("file://{}", path.display()))],
            Repository::S3(server) => vec![
                ("PGSIDECAR_REPOSITORY", format!("s3://{}/it", server.bucket())),
                ("AWS_ENDPOINT_URL_S3", server.endpoint()),
                ("AWS_REGION", "us-east-1".to_owned()),
                ("AWS_ACCESS_KEY_ID", server.access_key().to_owned()),
                ("AWS_SECRET_ACCESS_KEY", server.secret_key().to_owned()),
            ],
        }
    }
}
