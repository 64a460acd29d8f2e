//! Our own CA and the leaves that it signs: ECDSA P-256, made and signed here.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};
use rustls::{
    RootCertStore,
    client::{WebPkiServerVerifier, danger::ServerCertVerifier},
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime, pem::PemObject},
    sign::CertifiedKey,
};

use super::{
    Loaded, provider,
    rotation::{Authority, Periods},
    x509::Validity,
};

/// Why a certificate can't be made.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// Making or signing it failed.
    #[error("a certificate can't be made: {0}")]
    Make(#[from] rcgen::Error),
    /// The CA's certificate isn't one.
    #[error("what is there of a CA isn't a certificate")]
    NoCertificate,
    /// The CA's key isn't there.
    #[error("the CA has no key")]
    NoKey,
    /// The key doesn't fit the certificate, or it isn't a CA that was made here.
    #[error("the CA signs nothing that could be trusted: {0}")]
    Untrusted(rustls::Error),
}

/// The parameters of a CA's certificate. They follow from when it is valid: so does its name, which all that it signs
/// has to repeat.
fn parameters(validity: Validity) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    valid_from_to(&mut params, validity);
    params.distinguished_name.push(DnType::CommonName, format!("pgsidecar-webhook {}", validity.not_before));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

/// What is before 1970 is 1970.
fn valid_from_to(params: &mut CertificateParams, validity: Validity) {
    let seconds = |at: Timestamp| Duration::from_secs(u64::try_from(at.as_second()).unwrap_or(0));
    params.not_before = date_time_ymd(1970, 1, 1) + seconds(validity.not_before);
    params.not_after = date_time_ymd(1970, 1, 1) + seconds(validity.not_after);
}

/// Makes a CA.
///
/// # Errors
/// If it can't be made.
pub fn make(now: Timestamp, periods: &Periods) -> Result<Authority, AuthorityError> {
    let validity = whole_seconds(now - periods.backdate, now + periods.authority);
    let key = KeyPair::generate()?;
    let certificate = parameters(validity).self_signed(&key)?;
    Ok(Authority { certificate: certificate.pem(), key: Some(key.serialize_pem()), validity, published: None })
}

/// Signs a leaf for these names. It has been verified as a client would who trusts that CA alone.
///
/// # Errors
/// If it can't be made, or wouldn't be trusted.
pub fn sign(
    authority: &Authority,
    names: &[String],
    now: Timestamp,
    periods: &Periods,
) -> Result<Loaded, AuthorityError> {
    let authority_key = KeyPair::from_pem(authority.key.as_deref().ok_or(AuthorityError::NoKey)?)?;
    let issuer = Issuer::new(parameters(authority.validity), authority_key);
    let validity = whole_seconds(now - periods.backdate, (now + periods.leaf).min(authority.validity.not_after));
    let mut params = CertificateParams::new(names)?;
    valid_from_to(&mut params, validity);
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    if let Some(name) = names.first() {
        params.distinguished_name = DistinguishedName::new();
        // The name is in the alternative names; a common name may have 64 characters at most.
        params.distinguished_name.push(DnType::CommonName, name.chars().take(64).collect::<String>());
    }
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, &issuer)?.der().clone();
    verify(&authority.certificate, &certificate, names, now).map_err(AuthorityError::Untrusted)?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let key = CertifiedKey::from_der(vec![certificate], key, &provider()).map_err(AuthorityError::Untrusted)?;
    Ok(Loaded { key: Arc::new(key), validity })
}

fn verify(authority: &str, leaf: &CertificateDer<'_>, names: &[String], now: Timestamp) -> Result<(), rustls::Error> {
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(authority.as_bytes()) {
        roots.add(root.map_err(|error| rustls::Error::General(error.to_string()))?)?;
    }
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
        .build()
        .map_err(|error| rustls::Error::General(error.to_string()))?;
    let seconds = u64::try_from(now.as_second()).unwrap_or(0);
    for name in names {
        let name = ServerName::try_from(name.as_str()).map_err(|error| rustls::Error::General(error.to_string()))?;
        verifier.verify_server_cert(leaf, &[], &name, &[], UnixTime::since_unix_epoch(Duration::from_secs(seconds)))?;
    }
    Ok(())
}

/// A certificate tells no fractions.
fn whole_seconds(not_before: Timestamp, not_after: Timestamp) -> Validity {
    let whole = |at: Timestamp| Timestamp::from_second(at.as_second()).unwrap_or(at);
    Validity { not_before: whole(not_before), not_after: whole(not_after) }
}

/// The CAs of a bundle that are valid, without keys: what was trusted before we knew of it.
pub fn adopt(bundle: &str, now: Timestamp) -> Vec<Authority> {
    CertificateDer::pem_slice_iter(bundle.as_bytes())
        .flatten()
        .filter_map(|certificate| {
            let validity = Validity::of(&certificate).filter(|validity| now <= validity.not_after)?;
            Some(Authority { certificate: pem(&certificate), key: None, validity, published: Some(now) })
        })
        .collect()
}

fn pem(certificate: &CertificateDer<'_>) -> String {
    use base64::{Engine, engine::general_purpose::STANDARD};
    let text = STANDARD.encode(certificate);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.push_str(&String::from_utf8_lossy(line));
        pem.push('\n');
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}
