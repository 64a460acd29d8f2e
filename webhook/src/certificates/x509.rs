//! What has to be known of certificates beyond what rustls tells: from when to when they are valid (RFC 5280, 4.1).

use jiff::Timestamp;
use rustls::pki_types::CertificateDer;
use yasna::{ASN1Result, Tag, models::GeneralizedTime, models::UTCTime, tags};

/// From when to when a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// The first second.
    pub not_before: Timestamp,
    /// The last second.
    pub not_after: Timestamp,
}

impl Validity {
    /// Reads it from a certificate. `None` if that isn't one.
    pub fn of(certificate: &CertificateDer<'_>) -> Option<Validity> {
        let fields = tbs_fields(certificate).ok()?;
        // Version (tagged, may be absent), serial number, signature, issuer, validity.
        let versioned = fields.first()?.0 == Tag::context(0);
        let (_, validity) = fields.get(if versioned { 4 } else { 3 })?;
        let mut times = yasna::parse_der(validity, |reader| {
            reader.collect_sequence_of(|reader| {
                let value = reader.read_tagged_der()?;
                Ok((value.tag(), value.value().to_vec()))
            })
        })
        .ok()?
        .into_iter();
        let (not_before, not_after) = (time(times.next()?)?, time(times.next()?)?);
        Some(Validity { not_before, not_after })
    }

    /// Whether it is valid then.
    pub fn holds_at(&self, at: Timestamp) -> bool {
        self.not_before <= at && at <= self.not_after
    }
}

/// The fields of the signed part, each with its tag and all of its bytes.
fn tbs_fields(certificate: &[u8]) -> ASN1Result<Vec<(Tag, Vec<u8>)>> {
    let parts = yasna::parse_der(certificate, |reader| reader.collect_sequence_of(|reader| reader.read_der()))?;
    let tbs = parts.first().map(Vec::as_slice).unwrap_or_default();
    yasna::parse_der(tbs, |reader| {
        reader.collect_sequence_of(|reader| Ok((reader.lookahead_tag()?, reader.read_der()?)))
    })
}

fn time((tag, value): (Tag, Vec<u8>)) -> Option<Timestamp> {
    let seconds = match tag {
        tags::TAG_UTCTIME => UTCTime::parse(&value)?.datetime().unix_timestamp(),
        tags::TAG_GENERALIZEDTIME => GeneralizedTime::parse(&value)?.datetime().unix_timestamp(),
        _ => return None,
    };
    Timestamp::from_second(seconds).ok()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    use super::*;

    fn certificate(not_before: u64, not_after: u64) -> CertificateDer<'static> {
        let mut params = CertificateParams::new(vec!["a.example".to_owned()]).unwrap();
        params.not_before = date_time_ymd(1970, 1, 1) + Duration::from_secs(not_before);
        params.not_after = date_time_ymd(1970, 1, 1) + Duration::from_secs(not_after);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    #[test]
    fn both_formats_of_time_are_read() {
        // RFC 5280: UTCTime through 2049, GeneralizedTime from 2050 on.
        let validity = Validity::of(&certificate(1_700_000_000, 2_600_000_000)).unwrap();
        assert_eq!(validity.not_before.as_second(), 1_700_000_000);
        assert_eq!(validity.not_after.as_second(), 2_600_000_000);
        assert!(validity.holds_at(validity.not_after) && validity.holds_at(validity.not_before));
        let second = jiff::SignedDuration::from_secs(1);
        assert!(!validity.holds_at(validity.not_after + second) && !validity.holds_at(validity.not_before - second));
    }

    #[test]
    fn what_is_no_certificate_has_no_validity() {
        let whole = certificate(0, 1);
        for length in 0..whole.len() {
            assert_eq!(Validity::of(&CertificateDer::from(&whole[..length])), None);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(at in 0..400_usize, value in any::<u8>(), bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut damaged = certificate(0, 1).to_vec();
            let at = at % damaged.len();
            damaged[at] = value;
            let _ = Validity::of(&CertificateDer::from(damaged));
            let _ = Validity::of(&CertificateDer::from(bytes));
        }
    }
}
