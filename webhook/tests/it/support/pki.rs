//! Certificates for the tests, made as another tool makes them.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

/// A CA.
pub struct Ca(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key, in PEM.
#[derive(Clone)]
pub struct Pair {
    pub certificate: String,
    pub key: String,
}

impl Ca {
    pub fn new() -> Ca {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Ca(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// A leaf for this name.
    pub fn leaf(&self, name: &str) -> Pair {
        self.leaf_until(name, 2099)
    }

    /// One that is valid from the beginning of a year on.
    pub fn leaf_from(&self, name: &str, year: i32) -> Pair {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.not_before = rcgen::date_time_ymd(year, 1, 1);
        params.not_after = rcgen::date_time_ymd(year + 1, 1, 1);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        Pair { certificate: certificate.pem(), key: key.serialize_pem() }
    }

    /// One that expires at the beginning of a year.
    pub fn leaf_until(&self, name: &str, year: i32) -> Pair {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.not_after = rcgen::date_time_ymd(year, 1, 1);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        Pair { certificate: certificate.pem(), key: key.serialize_pem() }
    }
}

/// A directory as the kubelet makes it of a Secret: files are links through `..data`, which is swapped at once.
pub struct Mount {
    directory: tempfile::TempDir,
    versions: u32,
}

impl Mount {
    pub fn new() -> Mount {
        let directory = tempfile::tempdir().unwrap();
        for name in ["tls.crt", "tls.key"] {
            symlink(Path::new("..data").join(name), directory.path().join(name)).unwrap();
        }
        Mount { directory, versions: 0 }
    }

    pub fn path(&self) -> PathBuf {
        self.directory.path().to_owned()
    }

    /// The Secret has another content: the kubelet's `AtomicWriter`.
    pub fn swap(&mut self, pair: &Pair) {
        self.versions += 1;
        let version = format!("..version-{}", self.versions);
        let directory = self.directory.path();
        fs::create_dir(directory.join(&version)).unwrap();
        fs::write(directory.join(&version).join("tls.crt"), &pair.certificate).unwrap();
        fs::write(directory.join(&version).join("tls.key"), &pair.key).unwrap();
        symlink(&version, directory.join("..data_tmp")).unwrap();
        fs::rename(directory.join("..data_tmp"), directory.join("..data")).unwrap();
        if self.versions > 1 {
            let _ = fs::remove_dir_all(directory.join(format!("..version-{}", self.versions - 1)));
        }
    }
}
