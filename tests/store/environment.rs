//! What the AWS tools' environment variables do. Each case runs in a process of its own, started by its test: a
//! process's environment is shared by all the tests in it.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use bytes::Bytes;
use pgsidecar::store::{ByteRange, Creation, S3Config, S3Store, Store, StoreErrorKind};

use crate::{
    scripted::{Reply, Scripted, probe},
    support::key,
};

const CASE: &str = "PGSIDECAR_STORE_TEST";

/// Runs the test `case` of this file in a new process with only this environment.
fn run(case: &str, environment: &[(&str, &str)]) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("environment::{case}"), "--nocapture"])
        .env_clear()
        .env(CASE, case)
        .env("AWS_EC2_METADATA_DISABLED", "true")
        .env("HOME", "/nonexistent")
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

/// Whether this is the process that was started for this case.
fn is_case(case: &str) -> bool {
    std::env::var(CASE).is_ok_and(|this| this == case)
}

async fn create(config: S3Config) -> Result<Creation, pgsidecar::store::StoreError> {
    let config = S3Config { bucket: "backups".to_owned(), ..config };
    S3Store::new(config).await.create(&key("a"), Bytes::from_static(b"x"), None).await
}

fn recorder() -> (Scripted, String) {
    let server = Scripted::start(|request, _| probe(request).unwrap_or_else(Reply::stored));
    let endpoint = format!("http://127.0.0.1:{}", server.port);
    (server, endpoint)
}

#[tokio::test]
async fn case_create() {
    if is_case("case_create") {
        create(S3Config::default()).await.unwrap();
    }
}

#[test]
fn endpoint_region_and_keys_come_from_the_environment() {
    let (server, endpoint) = recorder();
    let environment = [
        ("AWS_ENDPOINT_URL_S3", endpoint.as_str()),
        ("AWS_REGION", "eu-north-7"),
        ("AWS_ACCESS_KEY_ID", "akid"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_SESSION_TOKEN", "token"),
    ];
    run("case_create", &environment);
    let request = server.requests().pop().unwrap();
    let authorization = request.header("authorization").unwrap();
    assert!(authorization.contains("Credential=akid/") && authorization.contains("/eu-north-7/s3/"), "{authorization}");
    assert_eq!(request.header("x-amz-security-token"), Some("token"));
    assert!(request.target.starts_with("/backups/a"), "path style with an endpoint: {}", request.target);
    assert!(request.header("x-amz-checksum-crc32").is_some());
}

#[test]
fn checksums_that_a_server_does_not_take_can_be_switched_off() {
    let (server, endpoint) = recorder();
    let environment = [
        ("AWS_ENDPOINT_URL", endpoint.as_str()),
        ("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required"),
        ("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required"),
        ("AWS_ACCESS_KEY_ID", "akid"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
    ];
    run("case_create", &environment);
    for request in server.requests() {
        assert!(!request.headers.iter().any(|(name, _)| name.contains("checksum")), "{request:?}");
        assert!(request.header("authorization").unwrap().contains("/us-east-1/s3/"));
        assert_eq!(request.header("transfer-encoding"), None);
    }
}

#[tokio::test]
async fn case_no_credentials() {
    if is_case("case_no_credentials") {
        let error = create(S3Config { endpoint: Some("http://127.0.0.1:9".to_owned()), ..S3Config::default() }).await;
        let error = error.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Credentials, "{error}");
        assert!(error.hint().is_some());
    }
}

#[test]
fn no_credentials_at_all_are_said_to_be_missing() {
    run("case_no_credentials", &[]);
}

fn write_keys(file: &Path, access_key: &str) {
    let text = format!("[default]\naws_access_key_id = {access_key}\naws_secret_access_key = secret\n");
    std::fs::write(file, text).unwrap();
}

#[tokio::test]
async fn case_rotation() {
    if is_case("case_rotation") {
        let file = PathBuf::from(std::env::var_os("AWS_SHARED_CREDENTIALS_FILE").unwrap());
        let config = S3Config {
            bucket: "backups".to_owned(),
            credentials_kept: std::time::Duration::ZERO,
            ..S3Config::default()
        };
        let store = S3Store::new(config).await;
        store.create(&key("a"), Bytes::new(), None).await.unwrap();
        write_keys(&file, "new-key");
        store.create(&key("b"), Bytes::new(), None).await.unwrap();
    }
}

#[test]
fn rotated_keys_in_a_file_are_noticed_without_a_restart() {
    let (server, endpoint) = recorder();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("credentials");
    write_keys(&file, "old-key");
    let environment =
        [("AWS_ENDPOINT_URL_S3", endpoint.as_str()), ("AWS_SHARED_CREDENTIALS_FILE", file.to_str().unwrap())];
    run("case_rotation", &environment);
    let requests = server.requests();
    let by = |name: &str| {
        let request = requests.iter().find(|request| request.target.contains(&format!("/backups/{name}?"))).unwrap();
        request.header("authorization").unwrap().to_owned()
    };
    assert!(by("a").contains("old-key"), "{}", by("a"));
    assert!(by("b").contains("new-key"), "{}", by("b"));
}

/// The answer of STS: keys that expire in so many seconds.
fn assumed(access_key: &str, seconds: i64) -> Reply {
    let until = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(seconds);
    let credentials = format!(
        "<AccessKeyId>{access_key}</AccessKeyId><SecretAccessKey>secret</SecretAccessKey>\
         <SessionToken>session-of-{access_key}</SessionToken><Expiration>{until:.0}</Expiration>"
    );
    let user = "<AssumedRoleId>id:session</AssumedRoleId><Arn>arn:aws:sts::1:assumed-role/backups/session</Arn>";
    let body = format!(
        "<AssumeRoleWithWebIdentityResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\">\
         <AssumeRoleWithWebIdentityResult><Credentials>{credentials}</Credentials>\
         <AssumedRoleUser>{user}</AssumedRoleUser></AssumeRoleWithWebIdentityResult>\
         <ResponseMetadata><RequestId>1</RequestId></ResponseMetadata></AssumeRoleWithWebIdentityResponse>"
    );
    Reply::http(200, body).with("content-type", "text/xml")
}

/// STS and S3 under one address. STS takes two tokens, and makes keys of them that expire soon.
fn sts_and_store() -> (Scripted, String) {
    let server = Scripted::start(|request, _| {
        let body = String::from_utf8_lossy(&request.body);
        match (probe(request), body.contains("Action=AssumeRoleWithWebIdentity")) {
            (Some(answer), _) => answer,
            (None, false) => Reply::stored(),
            (None, true) if body.contains("WebIdentityToken=first-token") => assumed("first-key", 2),
            (None, true) if body.contains("WebIdentityToken=second-token") => assumed("second-key", 3600),
            (None, true) => Reply::http(
                400,
                "<ErrorResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><Error><Type>Sender</Type>\
                 <Code>ExpiredTokenException</Code><Message>Token expired</Message></Error></ErrorResponse>",
            ),
        }
    });
    let endpoint = format!("http://127.0.0.1:{}", server.port);
    (server, endpoint)
}

#[tokio::test]
async fn case_web_identity() {
    if is_case("case_web_identity") {
        let token = PathBuf::from(std::env::var_os("AWS_WEB_IDENTITY_TOKEN_FILE").unwrap());
        let config = S3Config { bucket: "backups".to_owned(), ..S3Config::default() };
        let store = S3Store::new(config).await;
        store.create(&key("a"), Bytes::new(), None).await.unwrap();
        // What the kubelet does at four fifths of a token's life, here too late.
        std::fs::write(&token, "expired-token").unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(2500)).await;
        let error = store.create(&key("b"), Bytes::new(), None).await.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Credentials, "{error}");
        assert!(error.to_string().contains("Token expired"), "{error}");
        std::fs::write(&token, "second-token").unwrap();
        store.create(&key("c"), Bytes::new(), None).await.unwrap();
        store.create(&key("d"), Bytes::new(), None).await.unwrap();
    }
}

fn web_identity(endpoint_variables: &[&str]) {
    let (server, endpoint) = sts_and_store();
    let directory = tempfile::tempdir().unwrap();
    let token = directory.path().join("token");
    std::fs::write(&token, "first-token").unwrap();
    let mut environment: Vec<_> = endpoint_variables.iter().map(|name| (*name, endpoint.as_str())).collect();
    environment.push(("AWS_WEB_IDENTITY_TOKEN_FILE", token.to_str().unwrap()));
    environment.push(("AWS_ROLE_ARN", "arn:aws:iam::1:role/backups"));
    run("case_web_identity", &environment);
    let requests = server.requests();
    let by = |name: &str| {
        let request = requests.iter().find(|request| request.target.contains(&format!("/backups/{name}?")))?;
        assert!(request.header("x-amz-security-token").unwrap().starts_with("session-of-"), "{request:?}");
        Some(request.header("authorization").unwrap().to_owned())
    };
    assert!(by("a").unwrap().contains("first-key"), "{:?}", by("a"));
    assert_eq!(by("b"), None);
    assert!(by("c").unwrap().contains("second-key"), "{:?}", by("c"));
    assert!(by("d").unwrap().contains("second-key"), "{:?}", by("d"));
    let asked_for = |token: &str| {
        let token = format!("WebIdentityToken={token}");
        requests.iter().filter(|request| String::from_utf8_lossy(&request.body).contains(&token)).count()
    };
    assert_eq!(asked_for("second-token"), 1, "what is still good isn't asked for again");
}

#[test]
fn a_web_identity_whose_token_is_replaced_works_on_without_a_restart() {
    web_identity(&["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL_STS"]);
}

#[test]
fn a_web_identity_is_asked_for_at_the_endpoint_of_all_services() {
    web_identity(&["AWS_ENDPOINT_URL"]);
}

/// A web server with TLS, and a certificate for 127.0.0.1 of an authority that nobody knows.
struct Web {
    server: Child,
    endpoint: String,
    directory: tempfile::TempDir,
}

impl Web {
    fn start() -> Web {
        let directory = tempfile::tempdir().unwrap();
        let openssl = |arguments: &[&str]| {
            let mut openssl = Command::new("openssl");
            openssl.args(arguments).current_dir(directory.path());
            openssl
        };
        let certify = |arguments: &[&str]| {
            let key = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
            let output = openssl(&[&key, arguments].concat()).output().expect("openssl is installed");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        };
        certify(&["-subj", "/CN=nobody", "-keyout", "ca.key", "-out", "ca.pem"]);
        certify(
            &["-subj", "/CN=store", "-CA", "ca.pem", "-CAkey", "ca.key", "-keyout", "key.pem", "-out", "cert.pem"]
                .into_iter()
                .chain(["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"])
                .collect::<Vec<_>>(),
        );
        let mut server =
            openssl(&["s_server", "-www", "-accept", "127.0.0.1:0", "-cert", "cert.pem", "-key", "key.pem"])
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
        let lines = BufReader::new(server.stdout.take().unwrap()).lines().map(Result::unwrap);
        let address = lines.filter_map(|line| Some(line.strip_prefix("ACCEPT ")?.to_owned())).next();
        let endpoint = format!("https://{}", address.expect("it says where it listens"));
        Web { server, endpoint, directory }
    }

    fn authority(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }
}

impl Drop for Web {
    fn drop(&mut self) {
        self.server.kill().unwrap();
        self.server.wait().unwrap();
    }
}

async fn get_error() -> pgsidecar::store::StoreError {
    let config = S3Config { bucket: "backups".to_owned(), ..S3Config::default() };
    S3Store::new(config).await.get(&key("a"), ByteRange::All).await.unwrap_err()
}

#[tokio::test]
async fn case_trusted() {
    if is_case("case_trusted") {
        // It has answered: not like S3, but it could be talked to.
        let error = get_error().await;
        assert_eq!(error.kind(), StoreErrorKind::Unexpected, "{error}");
    }
}

#[tokio::test]
async fn case_untrusted() {
    if is_case("case_untrusted") {
        let error = get_error().await;
        assert_eq!(error.kind(), StoreErrorKind::Unreachable, "{error}");
        assert!(error.hint().unwrap().contains("SSL_CERT_FILE"), "{error}: {:?}", error.hint());
    }
}

#[test]
fn an_authority_of_ones_own_is_trusted_by_a_file_and_by_nothing_else() {
    let web = Web::start();
    let authority = web.authority();
    let environment = [
        ("AWS_ENDPOINT_URL_S3", web.endpoint.as_str()),
        ("AWS_ACCESS_KEY_ID", "akid"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("SSL_CERT_FILE", authority.to_str().unwrap()),
    ];
    run("case_trusted", &environment);
    run("case_untrusted", &environment[..3]);
}
