//! How the S3 client is set up: who we are, where the store is, and how long anything may take.
//!
//! The settings that the AWS tools share work by the environment and the profile files, read by the SDK:
//! `AWS_ENDPOINT_URL_S3`, `AWS_REGION`, `AWS_REQUEST_CHECKSUM_CALCULATION`, `AWS_RESPONSE_CHECKSUM_VALIDATION`,
//! `AWS_PROFILE` and so on. Credentials come from the SDK's chain: environment, profile, web identity (IRSA), the
//! container endpoint (ECS, EKS Pod Identity), the instance's metadata. Single sign-on and `credential_process` aren't
//! compiled in: a container has no use for them.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use aws_config::{
    BehaviorVersion, Region, SdkConfig, default_provider::credentials::DefaultCredentialsChain,
    environment::EnvironmentVariableRegionProvider, meta::region::RegionProviderChain,
    profile::ProfileFileRegionProvider, provider_config::ProviderConfig,
};
use aws_credential_types::{credential_fn::provide_credentials_fn, provider};
use aws_sdk_s3::{
    Client,
    config::{Builder, Credentials, ProvideCredentials, SharedHttpClient, retry::RetryConfig, timeout::TimeoutConfig},
};
use aws_smithy_http_client::tls::{self, rustls_provider::CryptoMode};

/// Where an S3 repository is and how to talk to it. `S3Config { bucket, ..S3Config::default() }` is enough on AWS.
#[derive(Clone)]
pub struct S3Config {
    /// The bucket's name.
    pub bucket: String,
    /// What all keys of the repository begin with; slashes at either end don't matter. May be empty.
    pub prefix: String,
    /// The server's URL, when it isn't AWS. `None`: what the environment or the profile says.
    pub endpoint: Option<String>,
    /// `None`: what the environment or the profile says, else `us-east-1`, which most other servers don't care about.
    pub region: Option<String>,
    /// Bucket in the path instead of the host name. `None`: yes where an endpoint is configured.
    pub path_style: Option<bool>,
    /// An access key and its secret, instead of the SDK's chain.
    pub credentials: Option<StaticCredentials>,
    /// When credentials without an expiry are looked up again, so that a rotated file is noticed. The SDK adds nothing
    /// to what expires by itself. Less than 10 s means at every request.
    pub credentials_kept: Duration,
    /// How long a connection may take to be made.
    pub connect_timeout: Duration,
    /// How long the store may take to answer a request, on top of the time that its body takes.
    pub answer_timeout: Duration,
    /// The slowest line that is waited for: a request with a body has one second more for each of these bytes.
    pub slowest_bytes_per_second: u64,
    /// How often a request is tried before its failure is reported.
    pub attempts: u32,
    /// The pause before the second try; it doubles from there, with jitter.
    pub first_backoff: Duration,
}

/// An access key and its secret. Its `Debug` doesn't show the secret.
#[derive(Clone)]
pub struct StaticCredentials {
    access_key: String,
    secret_key: String,
}

impl Default for S3Config {
    fn default() -> S3Config {
        S3Config {
            bucket: String::new(),
            prefix: String::new(),
            endpoint: None,
            region: None,
            path_style: None,
            credentials: None,
            credentials_kept: Duration::from_secs(60),
            connect_timeout: Duration::from_secs(5),
            answer_timeout: Duration::from_secs(30),
            slowest_bytes_per_second: 128 * 1024,
            attempts: 3,
            first_backoff: Duration::from_millis(500),
        }
    }
}

impl S3Config {
    /// With this access key instead of what the SDK's chain finds.
    pub fn with_credentials(mut self, access_key: impl Into<String>, secret_key: impl Into<String>) -> S3Config {
        let (access_key, secret_key) = (access_key.into(), secret_key.into());
        self.credentials = Some(StaticCredentials { access_key, secret_key });
        self
    }

    /// The time that one try of a request with a body of this size may take.
    pub(super) fn attempt_timeout(&self, body: usize) -> Duration {
        self.answer_timeout + Duration::from_secs(body as u64 / self.slowest_bytes_per_second.max(1))
    }

    /// A client, and the endpoint if one is configured. Reads the environment and files; no network access.
    pub(super) async fn client(&self) -> (Client, Option<String>) {
        let http_client =
            aws_smithy_http_client::Builder::new().tls_provider(tls::Provider::Rustls(CryptoMode::Ring)).build_https();
        let region = RegionProviderChain::first_try(self.region.clone().map(Region::new))
            .or_else(EnvironmentVariableRegionProvider::new())
            .or_else(ProfileFileRegionProvider::new())
            // Not the instance's metadata: where there is none, asking costs seconds at each start.
            .or_else(Region::new("us-east-1"))
            .region()
            .await;
        let kept = self.credentials_kept;
        let mut loader = aws_config::defaults(BehaviorVersion::v2026_01_12())
            .http_client(http_client.clone())
            .region(region.clone())
            .retry_config(
                RetryConfig::standard().with_max_attempts(self.attempts).with_initial_backoff(self.first_backoff),
            )
            .timeout_config(
                TimeoutConfig::builder()
                    .connect_timeout(self.connect_timeout)
                    .operation_attempt_timeout(self.answer_timeout)
                    .build(),
            );
        loader = match &self.credentials {
            Some(StaticCredentials { access_key, secret_key }) => {
                loader.credentials_provider(Credentials::new(access_key, secret_key, None, None, "settings"))
            }
            None => loader.credentials_provider(provide_credentials_fn(move || {
                let (http_client, region) = (http_client.clone(), region.clone());
                async move {
                    let mut found = chain_credentials(http_client, region).await?;
                    // The SDK's cache keeps what doesn't expire for no less than 15 minutes.
                    found.expiry_mut().get_or_insert(SystemTime::now() + kept);
                    Ok(found)
                }
            })),
        };
        if let Some(endpoint) = &self.endpoint {
            loader = loader.endpoint_url(endpoint);
        }
        let shared = loader.load().await;
        let endpoint = self.endpoint.clone().or_else(|| endpoint_of_environment(&shared));
        let config = Builder::from(&shared).force_path_style(self.path_style.unwrap_or(endpoint.is_some())).build();
        (Client::from_conf(config), endpoint)
    }
}

/// One walk along the SDK's chain. A new chain each time: the SDK's own keeps the profile files as it first read them,
/// and rotated keys would be noticed only by a restart.
async fn chain_credentials(http_client: SharedHttpClient, region: Option<Region>) -> provider::Result {
    let config = ProviderConfig::without_region().with_http_client(http_client).with_region(region);
    DefaultCredentialsChain::builder().configure(config).build().await.provide_credentials().await
}

/// What the SDK will take for the endpoint, in its order.
fn endpoint_of_environment(shared: &SdkConfig) -> Option<String> {
    let set = |name| std::env::var(name).ok().filter(|value: &String| !value.is_empty());
    set("AWS_ENDPOINT_URL_S3").or_else(|| shared.endpoint_url().map(str::to_owned))
}

impl fmt::Debug for S3Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let S3Config { bucket, prefix, endpoint, region, path_style, .. } = self;
        write!(f, "S3Config({bucket:?}, {prefix:?}, {endpoint:?}, {region:?}, path style {path_style:?})")
    }
}
