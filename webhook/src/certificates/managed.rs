//! Certificates from a CA of our own: the steps of [`rotation`](super::rotation), carried out.
//!
//! Each pass reads the webhook configuration, then the Secret, and takes one step. The order matters: a bundle is
//! written only onto the configuration that was read *before* the Secret (its resourceVersion is a condition), so it's
//! never older than the one that it replaces. Nothing is kept from pass to pass but the leaf, and none is signed by
//! what was read in an earlier one: a replica that can't reach the API server doesn't sign with a CA that the others
//! have removed meanwhile.

use std::{sync::Arc, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    Certificates,
    api::{Api, ApiError},
    authority::{self, AuthorityError},
    rotation::{self, Authority, Leaf, Periods, Step},
    x509::Validity,
};
use crate::settings::SelfManaged;
use rustls::pki_types::{CertificateDer, pem::PemObject};

/// Our entry in the webhook configuration: the only one that is touched.
pub const WEBHOOK: &str = "inject.pgsidecar.dev";
/// Between two passes where all is well. Somebody may have applied a manifest with an empty `caBundle`.
pub const POLL: Duration = Duration::from_secs(30);
/// Between two passes where one failed, at first; then twice as long, up to [`POLL`].
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// Steps, and conflicts with another replica, in a row.
const MAX_STEPS: usize = 16;
/// In the Secret: what is read back.
const AUTHORITIES: &str = "authorities.json";
/// In the Secret, for people and their tools: the bundle.
const BUNDLE: &str = "ca.crt";
/// That many are never needed: each lasts months and its predecessor goes after days.
const MAX_AUTHORITIES: usize = 8;

/// Why a pass has failed.
#[derive(Debug, thiserror::Error)]
pub enum ManagedError {
    /// A request to the API has.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// A certificate can't be made.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The Secret holds something else.
    #[error("the Secret {0} holds in {AUTHORITIES} what isn't ours: {1}")]
    Secret(String, String),
    /// The webhook configuration isn't what it should be.
    #[error("the MutatingWebhookConfiguration {0} has no webhook {WEBHOOK} with a clientConfig")]
    Configuration(String),
    /// What is served isn't trusted, and nothing that could be signed now would be.
    #[error("the caBundle doesn't have the CA of the certificate that is served, and no other CA can sign now")]
    Untrusted,
    /// It never settled.
    #[error("{MAX_STEPS} steps didn't lead to an end: somebody else keeps changing the Secret or the caBundle")]
    Unsettled,
}

/// What it takes to have certificates of our own.
pub struct Manager {
    /// The API server.
    pub api: Api,
    /// The objects' names.
    pub names: SelfManaged,
    /// How long things last.
    pub periods: Periods,
    /// Where leaves are installed.
    pub certificates: Arc<Certificates>,
}

/// A CA as it stands in the Secret.
#[derive(Serialize, Deserialize)]
struct Stored {
    certificate: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    published: Option<Timestamp>,
}

impl Manager {
    /// Keeps leaf, CA and `caBundle` what they have to be, for ever.
    pub async fn keep(self, poll: Duration) {
        let mut leaf = None;
        let mut retry = FIRST_RETRY.min(poll);
        loop {
            match self.settle(&mut leaf).await {
                Ok(()) => {
                    self.certificates.succeeded();
                    retry = FIRST_RETRY.min(poll);
                    tokio::time::sleep(poll).await;
                }
                Err(error) => {
                    self.certificates.failed(&error, &self.hint(&error));
                    tokio::time::sleep(retry).await;
                    retry = (retry * 2).min(poll);
                }
            }
        }
    }

    /// Takes steps until there is none to take.
    async fn settle(&self, leaf: &mut Option<Leaf>) -> Result<(), ManagedError> {
        for _ in 0..MAX_STEPS {
            match self.pass(leaf).await {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(ManagedError::Api(error)) if error.is_conflict() => {
                    tracing::debug!("certificate: another replica was faster");
                }
                Err(error) => return Err(error),
            }
        }
        Err(ManagedError::Unsettled)
    }

    /// Takes one step, and signs a leaf if it's time. Answers whether there's nothing left to do.
    async fn pass(&self, leaf: &mut Option<Leaf>) -> Result<bool, ManagedError> {
        let configuration = match self.api.get(&self.configuration_path()).await {
            Err(error) if !error.is_not_found() => return Err(error.into()),
            found => found,
        };
        let trusted = configuration.as_ref().ok().map(|configuration| self.seen(configuration)).transpose()?;
        let secret = self.api.get(&self.secret_path()).await?;
        let mut authorities = self.authorities(&secret)?;
        let now = self.certificates.now();
        self.sign(leaf, &authorities, trusted.as_deref(), now)?;
        // Where there is no configuration, a CA is made and removed all the same; what comes after that has to wait.
        let seen = trusted.unwrap_or_default();
        match rotation::next(&authorities, &seen, now, &self.periods) {
            Step::Rest if leaf.as_ref().is_some_and(|leaf| !leaf.is_trusted(&seen)) => {
                return Err(ManagedError::Untrusted);
            }
            Step::Rest => return Ok(true),
            Step::Publish(bundle) => self.publish(&configuration?, &bundle).await?,
            Step::Make => {
                if authorities.is_empty() {
                    let read = |bundle: &str| authority::adopt(bundle, now);
                    authorities = rotation::adopted(&seen, leaf.as_ref(), now, MAX_AUTHORITIES / 2, read);
                }
                let made = authority::make(now, &self.periods)?;
                let expires = made.validity.not_after;
                authorities.push(made);
                self.write(secret, &authorities).await?;
                tracing::info!(%expires, "certificate: a new CA is made; it signs once it has been published for a while");
            }
            Step::Remove(oldest) => {
                authorities.drain(..oldest);
                self.write(secret, &authorities).await?;
                tracing::info!("certificate: the old CA is removed");
            }
            Step::Note => {
                authorities.iter_mut().for_each(|authority| authority.note_published(now, &self.periods));
                self.write(secret, &authorities).await?;
            }
        }
        Ok(false)
    }

    /// Serves a new leaf if it's time for one and somebody may sign it.
    fn sign(
        &self,
        leaf: &mut Option<Leaf>,
        authorities: &[Authority],
        seen: Option<&str>,
        now: Timestamp,
    ) -> Result<(), ManagedError> {
        let served = leaf.as_ref().is_some_and(|leaf| leaf.serves(authorities, seen.unwrap_or_default(), now));
        let Some(signer) = rotation::signer(authorities, seen, served, now, &self.periods) else { return Ok(()) };
        self.certificates.metrics().authority_expiry.set(signer.validity.not_after.as_second());
        if leaf.as_ref().is_some_and(|leaf| !leaf.is_due(signer, now)) {
            return Ok(());
        }
        let loaded = authority::sign(signer, &self.dns_names(), now, &self.periods)?;
        let validity = loaded.validity;
        self.certificates.install(loaded);
        tracing::info!(expires = %validity.not_after, "certificate: a new one is served");
        *leaf = Some(Leaf { authority: signer.certificate.clone(), validity });
        Ok(())
    }

    /// The names by which the API server calls us: the first is the one that it checks.
    fn dns_names(&self) -> Vec<String> {
        let service = format!("{}.{}.svc", self.names.service, self.names.namespace);
        vec![service.clone(), format!("{service}.cluster.local")]
    }

    fn secret_path(&self) -> String {
        format!("/api/v1/namespaces/{}/secrets/{}", self.names.namespace, self.names.secret)
    }

    fn configuration_path(&self) -> String {
        let resource = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations";
        format!("{resource}/{}", self.names.configuration)
    }

    /// Our entry's `caBundle`, as text; empty where there is none, or what isn't text.
    fn seen(&self, configuration: &Value) -> Result<String, ManagedError> {
        let entries = configuration.get("webhooks").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let ours = entries.iter().find(|entry| entry.get("name").and_then(Value::as_str) == Some(WEBHOOK));
        let client = ours
            .and_then(|entry| entry.get("clientConfig"))
            .ok_or_else(|| ManagedError::Configuration(self.names.configuration.clone()))?;
        let encoded = client.get("caBundle").and_then(Value::as_str).unwrap_or_default();
        Ok(STANDARD.decode(encoded).ok().and_then(|bundle| String::from_utf8(bundle).ok()).unwrap_or_default())
    }

    async fn publish(&self, read: &Value, bundle: &str) -> Result<(), ManagedError> {
        let patch = json!({
            "metadata": { "resourceVersion": resource_version(read) },
            "webhooks": [{ "name": WEBHOOK, "clientConfig": { "caBundle": STANDARD.encode(bundle) } }],
        });
        self.api.patch(&self.configuration_path(), &patch).await?;
        tracing::info!(configuration = self.names.configuration, "certificate: the caBundle is set");
        Ok(())
    }

    fn wrong_secret(&self, problem: impl ToString) -> ManagedError {
        ManagedError::Secret(self.names.secret.clone(), problem.to_string())
    }

    fn authorities(&self, secret: &Value) -> Result<Vec<Authority>, ManagedError> {
        let encoded = secret.get("data").and_then(|data| data.get(AUTHORITIES)).and_then(Value::as_str);
        let Some(encoded) = encoded.filter(|text| !text.is_empty()) else { return Ok(Vec::new()) };
        let text = STANDARD.decode(encoded).map_err(|error| self.wrong_secret(error))?;
        let stored: Vec<Stored> = serde_json::from_slice(&text).map_err(|error| self.wrong_secret(error))?;
        if stored.len() > MAX_AUTHORITIES {
            return Err(self.wrong_secret(format!("{} CAs", stored.len())));
        }
        let authority = |stored: Stored| {
            let certificate = CertificateDer::from_pem_slice(stored.certificate.as_bytes()).ok();
            let validity = certificate.as_ref().and_then(Validity::of);
            let validity = validity.ok_or_else(|| self.wrong_secret("a certificate that isn't one"))?;
            let Stored { certificate, key, published } = stored;
            Ok(Authority { certificate, key, validity, published })
        };
        stored.into_iter().map(authority).collect()
    }

    /// Writes the CAs to the Secret as it was read, all else as it was.
    async fn write(&self, mut secret: Value, authorities: &[Authority]) -> Result<(), ManagedError> {
        let stored: Vec<Stored> = authorities
            .iter()
            .cloned()
            .map(|Authority { certificate, key, published, .. }| Stored { certificate, key, published })
            .collect();
        let text = serde_json::to_vec_pretty(&stored).map_err(ApiError::Malformed)?;
        let not_an_object = || self.wrong_secret("it isn't an object");
        let fields = secret.as_object_mut().ok_or_else(not_an_object)?;
        let data = fields.entry("data").or_insert(Value::Null);
        if !data.is_object() {
            *data = json!({});
        }
        data[AUTHORITIES] = STANDARD.encode(text).into();
        data[BUNDLE] = STANDARD.encode(rotation::bundle(authorities)).into();
        self.api.put(&self.secret_path(), &secret).await?;
        Ok(())
    }

    fn hint(&self, error: &ManagedError) -> String {
        let SelfManaged { namespace, secret, .. } = &self.names;
        match error {
            ManagedError::Api(error) => self.hint_of_api(error),
            ManagedError::Secret(..) | ManagedError::Authority(_) => format!(
                "Empty it, and a new CA is made: kubectl -n {namespace} patch secret {secret} --type json \
                 -p '[{{\"op\":\"remove\",\"path\":\"/data\"}}]'"
            ),
            ManagedError::Configuration(_) => "Apply the manifests: they have it.".to_owned(),
            ManagedError::Untrusted => {
                "It passes once the newest CA is valid by this node's clock: is that right?".to_owned()
            }
            ManagedError::Unsettled => {
                "Does another tool write the caBundle, such as cert-manager's ca-injector? Only one can.".to_owned()
            }
        }
    }

    fn hint_of_api(&self, error: &ApiError) -> String {
        let SelfManaged { namespace, secret, configuration, .. } = &self.names;
        let about_secret = matches!(error, ApiError::Refused { what, .. } if what.ends_with(&self.secret_path()));
        match error {
            ApiError::NoCluster(_) | ApiError::Account { .. } => {
                "Certificates of its own need a pod with a service account's token; those from files don't.".to_owned()
            }
            error if error.is_not_found() && about_secret => {
                format!("Make it, empty: kubectl -n {namespace} create secret generic {secret}")
            }
            error if error.is_not_found() => {
                format!("Apply the manifests: there is no MutatingWebhookConfiguration {configuration}.")
            }
            error if error.is_forbidden() && about_secret => {
                format!("The service account needs get and update of the Secret {secret} in {namespace}.")
            }
            error if error.is_forbidden() => {
                format!("The service account needs get and patch of the MutatingWebhookConfiguration {configuration}.")
            }
            _ => "It's tried again. The pod needs egress to the API server.".to_owned(),
        }
    }
}

fn resource_version(object: &Value) -> &Value {
    object.get("metadata").and_then(|metadata| metadata.get("resourceVersion")).unwrap_or(&Value::Null)
}
