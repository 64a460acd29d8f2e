//! What an answer of an S3 server, or the lack of one, means.

use std::error::Error;

use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_s3::{
    config::http::HttpResponse,
    error::{ProvideErrorMetadata, SdkError},
};

use super::{StoreError, StoreErrorKind};

/// The definite parts of a failed answer.
pub(super) struct Answer<'a> {
    pub(super) status: Option<u16>,
    pub(super) code: Option<&'a str>,
}

/// Status and S3 error code of a failure, as far as there was an answer.
pub(super) fn answer<E: ProvideErrorMetadata>(error: &SdkError<E, HttpResponse>) -> Answer<'_> {
    let status = error.raw_response().map(|response| response.status().as_u16());
    Answer { status, code: error.as_service_error().and_then(ProvideErrorMetadata::code) }
}

impl Answer<'_> {
    /// The condition `If-None-Match: *` did not hold: the key exists.
    pub(super) fn is_precondition_failed(&self) -> bool {
        self.status == Some(412) || self.code == Some("PreconditionFailed")
    }

    /// Two conditional writes met: neither is known to have won, try again.
    pub(super) fn is_conflict(&self) -> bool {
        self.status == Some(409) || self.code == Some("ConditionalRequestConflict")
    }

    /// The server doesn't have this operation, or this header.
    pub(super) fn is_not_implemented(&self) -> bool {
        matches!(self.status, Some(405 | 501)) || matches!(self.code, Some("NotImplemented" | "MethodNotAllowed"))
    }
}

/// The failure of a whole operation.
pub(super) fn store_error<E>(operation: &'static str, object: &str, error: SdkError<E, HttpResponse>) -> StoreError
where
    E: ProvideErrorMetadata + Error + Send + Sync + 'static,
{
    let Answer { status, code } = answer(&error);
    let (kind, detail) = match (&error, status) {
        (SdkError::TimeoutError(_), _) => (StoreErrorKind::Unreachable, "no answer within the time allowed".to_owned()),
        (SdkError::ServiceError(_), Some(status)) => {
            let message = error.as_service_error().and_then(ProvideErrorMetadata::message);
            (kind_of(status, code), what_it_answered(status, code, message))
        }
        (SdkError::ResponseError(_), Some(status)) => {
            let kind = if status >= 500 { StoreErrorKind::Unavailable } else { StoreErrorKind::Unexpected };
            (kind, format!("its answer, with status {status}, can't be read: {}", causes(&error)))
        }
        _ if has_cause::<_, CredentialsError>(&error) => (StoreErrorKind::Credentials, causes(&error)),
        (SdkError::DispatchFailure(failure), _) if failure.is_user() => (StoreErrorKind::Unexpected, causes(&error)),
        (SdkError::DispatchFailure(_), _) => (StoreErrorKind::Unreachable, causes(&error)),
        _ => (StoreErrorKind::Unexpected, causes(&error)),
    };
    let untrusted = kind == StoreErrorKind::Unreachable && detail.contains("invalid peer certificate");
    let mapped = StoreError::new(kind, operation, object, detail);
    match hint(kind, operation, code) {
        _ if untrusted => mapped.with_hint(
            "The server's certificate can't be trusted. If it was issued by an authority of your own, set SSL_CERT_FILE to that \
             authority's certificate, in PEM format; the endpoint must have the name that the certificate is for.",
        ),
        Some(hint) => mapped.with_hint(hint),
        None => mapped,
    }
}

/// The failure of one key of a `DeleteObjects`, which as a whole succeeded.
pub(super) fn one_of_many(operation: &'static str, object: &str, code: &str, message: Option<&str>) -> StoreError {
    let kind = kind_of(200, Some(code));
    let mapped = StoreError::new(kind, operation, object, what_it_answered(200, Some(code), message));
    match hint(kind, operation, Some(code)) {
        Some(hint) => mapped.with_hint(hint),
        None => mapped,
    }
}

/// The failure of a body that is being read.
pub(super) fn body_error(object: &str, error: impl Error + 'static) -> StoreError {
    let detail = causes(&error);
    let kind = match detail.contains("checksum mismatch") {
        true => StoreErrorKind::Corrupt,
        false => StoreErrorKind::Unavailable,
    };
    StoreError::new(kind, "read", object, format!("the body broke off: {detail}"))
}

fn what_it_answered(status: u16, code: Option<&str>, message: Option<&str>) -> String {
    match (code, message) {
        (Some(code), Some(message)) => format!("it answered {status} {code}: {message}"),
        (Some(code), None) => format!("it answered {status} {code}"),
        (None, _) => format!("it answered {status} without an S3 error code"),
    }
}

fn kind_of(status: u16, code: Option<&str>) -> StoreErrorKind {
    match code.unwrap_or_default() {
        "NoSuchBucket" | "PermanentRedirect" | "TemporaryRedirect" | "IllegalLocationConstraintException" => {
            StoreErrorKind::NoBucket
        }
        "InvalidAccessKeyId"
        | "SignatureDoesNotMatch"
        | "ExpiredToken"
        | "InvalidToken"
        | "TokenRefreshRequired"
        | "RequestTimeTooSkewed"
        | "AuthorizationHeaderMalformed"
        | "NotSignedUp" => StoreErrorKind::Credentials,
        "AccessDenied" | "AllAccessDisabled" | "AccountProblem" => StoreErrorKind::Denied,
        "SlowDown"
        | "SlowDownRead"
        | "SlowDownWrite"
        | "Throttling"
        | "ThrottlingException"
        | "TooManyRequests"
        | "RequestLimitExceeded"
        | "BandwidthLimitExceeded" => StoreErrorKind::Throttled,
        "XMinioStorageFull" | "XMinioAdminBucketQuotaExceeded" | "QuotaExceeded" | "InsufficientStorage" => {
            StoreErrorKind::Full
        }
        "BadDigest" | "InvalidDigest" | "XAmzContentChecksumMismatch" | "XAmzContentSHA256Mismatch" => {
            StoreErrorKind::Corrupt
        }
        "InternalError"
        | "ServiceUnavailable"
        | "RequestTimeout"
        | "OperationAborted"
        | "ConditionalRequestConflict" => StoreErrorKind::Unavailable,
        _ => match status {
            301 | 307 => StoreErrorKind::NoBucket,
            401 => StoreErrorKind::Credentials,
            403 => StoreErrorKind::Denied,
            429 => StoreErrorKind::Throttled,
            507 => StoreErrorKind::Full,
            408 | 409 | 499 | 500 | 502..=504 | 506.. => StoreErrorKind::Unavailable,
            _ => StoreErrorKind::Unexpected,
        },
    }
}

fn hint(kind: StoreErrorKind, operation: &str, code: Option<&str>) -> Option<&'static str> {
    Some(match (kind, operation, code) {
        (_, _, Some("RequestTimeTooSkewed")) => "The clocks differ by more than 15 minutes: check this host's time.",
        (_, _, Some("ExpiredToken" | "TokenRefreshRequired")) => {
            "The session token has expired and nothing renewed it: check what provides it."
        }
        (_, _, Some("AuthorizationHeaderMalformed" | "PermanentRedirect" | "IllegalLocationConstraintException")) => {
            "The bucket is in another region: set AWS_REGION to it."
        }
        (StoreErrorKind::Denied, "read" | "look at" | "list", _) => {
            "Grant s3:GetObject on the objects and s3:ListBucket on the bucket: without s3:ListBucket, S3 answers 403 \
             for a key that isn't there, and 'not there' can't be told from 'forbidden'."
        }
        (StoreErrorKind::Denied, "delete", _) => {
            "Grant s3:DeleteObject; where it's granted, a retention rule or object lock of the bucket forbids it."
        }
        (StoreErrorKind::Denied, ..) => {
            "Grant s3:PutObject and s3:AbortMultipartUpload on the objects, and check the bucket's policy and its key's."
        }
        (StoreErrorKind::Unexpected, _, None) => {
            "Check that the endpoint is an S3 server's: this looks like the answer of a proxy or a web server."
        }
        _ => return None,
    })
}

/// The causes of an error in one line, each said once.
fn causes(error: &(dyn Error + 'static)) -> String {
    let mut said: Vec<String> = Vec::new();
    let mut cause = Some(error);
    while let Some(error) = cause {
        let text = error.to_string();
        if !said.iter().any(|earlier| earlier.contains(&text)) {
            said.push(text);
        }
        cause = error.source();
    }
    said.join(": ")
}

fn has_cause<E: Error + 'static, C: Error + 'static>(error: &E) -> bool {
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if error.is::<C>() {
            return true;
        }
        cause = error.source();
    }
    false
}
