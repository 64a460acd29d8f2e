//! Certificates from files: `tls.crt` and `tls.key`, as cert-manager writes them to a Secret and the kubelet mounts it.
//!
//! They are read every few seconds and taken when their content has changed: a mounted Secret changes by a swap of
//! symbolic links, which the kernel's file events tell badly. A pair that doesn't fit together isn't taken.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, pem, pem::PemObject},
    sign::CertifiedKey,
};

use super::{Certificates, Loaded, provider, x509::Validity};

/// Between two looks at the files.
pub const POLL: Duration = Duration::from_secs(5);
/// A swap can come between the reads of both files; it's over after this.
const SWAP: Duration = Duration::from_millis(200);
/// A chain has some kilobytes. More isn't read.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Why files can't be taken.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// One can't be read.
    #[error("{path}: {error}", path = .path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// What is in it isn't PEM of what belongs there.
    #[error("{name} isn't what its name says: {error}")]
    Malformed {
        /// Which.
        name: &'static str,
        /// Why.
        error: pem::Error,
    },
    /// There's no certificate in tls.crt, or one that can't be read.
    #[error("tls.crt holds no certificate")]
    NoCertificate,
    /// They don't fit together, or the key is of a kind that isn't known.
    #[error("tls.crt and tls.key don't fit together: {0}")]
    Mismatch(rustls::Error),
}

impl FilesError {
    /// What to do.
    fn hint(&self) -> &'static str {
        match self {
            FilesError::Unreadable { error, .. } if error.kind() == io::ErrorKind::NotFound => {
                "Is the Secret with the certificate there (cert-manager: kubectl describe certificate)? It's looked for every few seconds."
            }
            FilesError::Unreadable { .. } => "The user that the webhook runs as must be able to read it.",
            _ => {
                "tls.crt is the certificate and those that lead to its CA, tls.key the certificate's key, both in PEM."
            }
        }
    }
}

#[derive(PartialEq, Eq)]
struct Content {
    certificate: Vec<u8>,
    key: Vec<u8>,
}

/// Keeps the certificate what the files in `directory` say, for ever.
pub async fn keep(certificates: Arc<Certificates>, directory: PathBuf, poll: Duration) {
    let mut taken = None;
    loop {
        let mut outcome = take(&directory, taken.as_ref());
        if outcome.is_err() {
            tokio::time::sleep(SWAP.min(poll)).await;
            outcome = take(&directory, taken.as_ref());
        }
        match outcome {
            Ok(None) => certificates.succeeded(),
            Ok(Some((content, loaded))) => {
                let expires = loaded.validity.not_after;
                tracing::info!(directory = %directory.display(), %expires, "certificate: read from its files");
                certificates.install(loaded);
                certificates.succeeded();
                taken = Some(content);
            }
            Err(error) => certificates.failed(&error, error.hint()),
        }
        tokio::time::sleep(poll).await;
    }
}

/// What the files hold, if it isn't what was taken last.
fn take(directory: &Path, taken: Option<&Content>) -> Result<Option<(Content, Loaded)>, FilesError> {
    let content = Content { certificate: read(&directory.join("tls.crt"))?, key: read(&directory.join("tls.key"))? };
    if taken == Some(&content) {
        return Ok(None);
    }
    let loaded = load(&content.certificate, &content.key)?;
    Ok(Some((content, loaded)))
}

fn read(path: &Path) -> Result<Vec<u8>, FilesError> {
    let unreadable = |error| FilesError::Unreadable { path: path.to_owned(), error };
    let length = fs::metadata(path).map_err(unreadable)?.len();
    if length > MAX_FILE_BYTES {
        return Err(unreadable(io::Error::new(io::ErrorKind::FileTooLarge, "too large")));
    }
    fs::read(path).map_err(unreadable)
}

/// A certificate and its key from PEM.
///
/// # Errors
/// If it isn't such, or they don't belong together.
pub fn load(certificate: &[u8], key: &[u8]) -> Result<Loaded, FilesError> {
    let malformed = |name| move |error| FilesError::Malformed { name, error };
    let chain =
        CertificateDer::pem_slice_iter(certificate).collect::<Result<Vec<_>, _>>().map_err(malformed("tls.crt"))?;
    let key = PrivateKeyDer::from_pem_slice(key).map_err(malformed("tls.key"))?;
    let validity = chain.first().and_then(Validity::of).ok_or(FilesError::NoCertificate)?;
    let key = CertifiedKey::from_der(chain, key, &provider()).map_err(FilesError::Mismatch)?;
    Ok(Loaded { key: Arc::new(key), validity })
}
