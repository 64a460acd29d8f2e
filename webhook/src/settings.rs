//! The settings: texts from flags and environment, checked once, all that is wrong told together.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use clap::Args;
use pgsidecar_core::settings::parse_duration;

use crate::inject;

const LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 8443);
const HEALTH_LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 8080);
const TLS_DIRECTORY: &str = "/tls";
const NAME: &str = "pgsidecar-webhook";
const TLS_SECRET: &str = "pgsidecar-webhook-ca";
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
const CONFIG_SECRET: &str = "pgsidecar";

/// What is injected, as texts. The offline command has these as well.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Injection")]
pub struct RawInjection {
    /// The sidecar's image; required
    #[arg(long, env = "PGSIDECAR_WEBHOOK_IMAGE", value_name = "IMAGE", hide_env_values = true)]
    pub image: Option<String>,
    /// Whether kubelets know native sidecars, as they do by default since Kubernetes 1.29 [default: true]
    #[arg(long, env = "PGSIDECAR_WEBHOOK_NATIVE_SIDECARS", value_name = "BOOLEAN", hide_env_values = true)]
    pub native_sidecars: Option<String>,
    /// Secret in the pod's namespace with the sidecar's settings [default: pgsidecar]
    #[arg(long, env = "PGSIDECAR_WEBHOOK_CONFIG_SECRET", value_name = "NAME", hide_env_values = true)]
    pub config_secret: Option<String>,
}

/// How the webhook is served, as texts.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Server")]
pub struct RawServe {
    /// Where the API server reaches it, by TLS [default: 0.0.0.0:8443]
    #[arg(long, env = "PGSIDECAR_WEBHOOK_LISTEN", value_name = "ADDRESS", hide_env_values = true)]
    pub listen: Option<String>,
    /// Where probes and Prometheus reach it: /healthz, /readyz, /metrics [default: 0.0.0.0:8080]
    #[arg(long, env = "PGSIDECAR_WEBHOOK_HEALTH_LISTEN", value_name = "ADDRESS", hide_env_values = true)]
    pub health_listen: Option<String>,
    /// How long stopping may take; the first half at most is for endpoints to notice [default: 10s]
    #[arg(long, env = "PGSIDECAR_WEBHOOK_DRAIN_TIMEOUT", value_name = "DURATION", hide_env_values = true)]
    pub drain_timeout: Option<String>,
    /// Where certificates come from: files or self-managed [default: files]
    #[arg(long, env = "PGSIDECAR_WEBHOOK_CERTIFICATES", value_name = "FROM", hide_env_values = true)]
    pub certificates: Option<String>,
    /// files: directory with tls.crt and tls.key, read again when they change [default: /tls]
    #[arg(long, env = "PGSIDECAR_WEBHOOK_TLS_DIRECTORY", value_name = "DIR", hide_env_values = true)]
    pub tls_directory: Option<String>,
    /// self-managed: Secret that holds the CA, in our namespace [default: pgsidecar-webhook-ca]
    #[arg(long, env = "PGSIDECAR_WEBHOOK_TLS_SECRET", value_name = "NAME", hide_env_values = true)]
    pub tls_secret: Option<String>,
    /// self-managed: MutatingWebhookConfiguration whose caBundle is kept [default: pgsidecar-webhook]
    #[arg(long, env = "PGSIDECAR_WEBHOOK_CONFIGURATION", value_name = "NAME", hide_env_values = true)]
    pub configuration: Option<String>,
    /// self-managed: Service that the API server calls, for the name in the certificate [default: pgsidecar-webhook]
    #[arg(long, env = "PGSIDECAR_WEBHOOK_SERVICE", value_name = "NAME", hide_env_values = true)]
    pub service: Option<String>,
    /// self-managed: our own namespace, from the downward API; required there
    #[arg(long, env = "POD_NAMESPACE", value_name = "NAME", hide_env_values = true)]
    pub namespace: Option<String>,
}

/// How the webhook is served, checked.
#[derive(Clone, Debug)]
pub struct Serve {
    /// Where the API server reaches it.
    pub listen: SocketAddr,
    /// Where probes and Prometheus reach it.
    pub health_listen: SocketAddr,
    /// How long stopping may take.
    pub drain_timeout: Duration,
    /// Where certificates come from.
    pub certificates: Certificates,
}

/// Where certificates come from.
#[derive(Clone, Debug)]
pub enum Certificates {
    /// From `tls.crt` and `tls.key` in this directory.
    Files(PathBuf),
    /// From a CA of our own.
    SelfManaged(SelfManaged),
}

/// What managing certificates needs to know.
#[derive(Clone, Debug)]
pub struct SelfManaged {
    /// Our namespace.
    pub namespace: String,
    /// The Secret in it that holds the CA.
    pub secret: String,
    /// The MutatingWebhookConfiguration.
    pub configuration: String,
    /// The Service that the API server calls.
    pub service: String,
}

/// One setting that can't be used, with the reason.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name}: {problem}")]
pub struct SettingError {
    /// The environment variable.
    pub name: &'static str,
    /// What is wrong with it.
    pub problem: String,
}

/// All that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct SettingErrors(pub Vec<SettingError>);

impl fmt::Display for SettingErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.0.len() == 1 { "setting is" } else { "settings are" };
        write!(f, "{} {plural} wrong:", self.0.len())?;
        self.0.iter().try_for_each(|error| write!(f, "\n  {error}"))
    }
}

/// Gathers what is wrong while values are taken.
#[derive(Default)]
struct Checked(Vec<SettingError>);

impl Checked {
    fn wrong(&mut self, name: &'static str, problem: impl Into<String>) {
        self.0.push(SettingError { name, problem: problem.into() });
    }

    /// The value, or the default if it is absent, empty or wrong.
    fn take<T>(
        &mut self,
        name: &'static str,
        text: Option<&String>,
        default: T,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> T {
        match text.map(String::as_str).filter(|text| !text.is_empty()).map(parse) {
            None => default,
            Some(Ok(value)) => value,
            Some(Err(problem)) => {
                self.wrong(name, problem);
                default
            }
        }
    }

    fn required(&mut self, name: &'static str, text: Option<&String>) -> String {
        let text = text.cloned().unwrap_or_default();
        if text.is_empty() {
            self.wrong(name, "is required");
        }
        text
    }
}

impl RawInjection {
    /// Checks them.
    ///
    /// # Errors
    /// All that is wrong.
    pub fn resolve(&self) -> Result<inject::Settings, SettingErrors> {
        let mut checked = Checked::default();
        let settings = self.take(&mut checked);
        if checked.0.is_empty() { Ok(settings) } else { Err(SettingErrors(checked.0)) }
    }

    fn take(&self, checked: &mut Checked) -> inject::Settings {
        inject::Settings {
            image: checked.required("PGSIDECAR_WEBHOOK_IMAGE", self.image.as_ref()),
            native_sidecars: checked.take(
                "PGSIDECAR_WEBHOOK_NATIVE_SIDECARS",
                self.native_sidecars.as_ref(),
                true,
                boolean,
            ),
            config_secret: checked.take(
                "PGSIDECAR_WEBHOOK_CONFIG_SECRET",
                self.config_secret.as_ref(),
                CONFIG_SECRET.to_owned(),
                object_name,
            ),
        }
    }
}

impl RawServe {
    /// Checks them together with what is injected and how it's logged.
    ///
    /// # Errors
    /// All that is wrong.
    pub fn resolve(
        &self,
        injection: &RawInjection,
        log: Vec<SettingError>,
    ) -> Result<(Serve, inject::Settings), SettingErrors> {
        let mut checked = Checked(log);
        let injection = injection.take(&mut checked);
        let drain_timeout =
            checked.take("PGSIDECAR_WEBHOOK_DRAIN_TIMEOUT", self.drain_timeout.as_ref(), DRAIN_TIMEOUT, |text| {
                parse_duration(text).map_err(|error| error.to_string())
            });
        let serve = Serve {
            listen: address(&mut checked, "PGSIDECAR_WEBHOOK_LISTEN", self.listen.as_ref(), LISTEN),
            health_listen: address(
                &mut checked,
                "PGSIDECAR_WEBHOOK_HEALTH_LISTEN",
                self.health_listen.as_ref(),
                HEALTH_LISTEN,
            ),
            drain_timeout,
            certificates: self.certificates(&mut checked),
        };
        if checked.0.is_empty() { Ok((serve, injection)) } else { Err(SettingErrors(checked.0)) }
    }

    fn certificates(&self, checked: &mut Checked) -> Certificates {
        let directory = self.tls_directory.clone().filter(|text| !text.is_empty());
        let files = Certificates::Files(directory.unwrap_or_else(|| TLS_DIRECTORY.to_owned()).into());
        let self_managed =
            checked.take("PGSIDECAR_WEBHOOK_CERTIFICATES", self.certificates.as_ref(), false, |text| match text {
                "files" => Ok(false),
                "self-managed" => Ok(true),
                _ => Err(format!("{text:?} is neither files nor self-managed")),
            });
        if !self_managed {
            return files;
        }
        let mut name = |name, text: &Option<String>, default: &str| {
            checked.take(name, text.as_ref(), default.to_owned(), object_name)
        };
        let secret = name("PGSIDECAR_WEBHOOK_TLS_SECRET", &self.tls_secret, TLS_SECRET);
        let configuration = name("PGSIDECAR_WEBHOOK_CONFIGURATION", &self.configuration, NAME);
        let service = name("PGSIDECAR_WEBHOOK_SERVICE", &self.service, NAME);
        let namespace = name("POD_NAMESPACE", &self.namespace, "");
        if namespace.is_empty() {
            checked.required("POD_NAMESPACE", None);
        }
        Certificates::SelfManaged(SelfManaged { namespace, secret, configuration, service })
    }
}

fn address(checked: &mut Checked, name: &'static str, text: Option<&String>, default: SocketAddr) -> SocketAddr {
    checked.take(name, text, default, |text| {
        text.parse().map_err(|_| format!("{text:?} is not an address with a port, such as {default}"))
    })
}

fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "true" | "on" | "1" => Ok(true),
        "false" | "off" | "0" => Ok(false),
        _ => Err(format!("{text:?} is neither true nor false")),
    }
}

/// The name of a Kubernetes object: a DNS subdomain (RFC 1123). It becomes a part of paths.
fn object_name(text: &str) -> Result<String, String> {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('-')
            && !part.ends_with('-')
            && part.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))
    };
    if text.len() <= 253 && text.split('.').all(part) {
        Ok(text.to_owned())
    } else {
        Err(format!("{text:?} is no name of an object: lower-case letters, digits, '-' and '.'"))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn text(text: &str) -> Option<String> {
        Some(text.to_owned())
    }

    #[test]
    fn an_image_is_all_that_must_be_said() {
        let injection = RawInjection { image: text("pgsidecar:1"), ..RawInjection::default() };
        let (serve, settings) = RawServe::default().resolve(&injection, Vec::new()).unwrap();
        assert_eq!((settings.image.as_str(), settings.native_sidecars), ("pgsidecar:1", true));
        assert_eq!(settings.config_secret, "pgsidecar");
        assert_eq!(serve.listen.to_string(), "0.0.0.0:8443");
        assert_eq!(serve.health_listen.to_string(), "0.0.0.0:8080");
        assert!(matches!(serve.certificates, Certificates::Files(path) if path.as_path() == Path::new("/tls")));
    }

    #[test]
    fn all_that_is_wrong_is_told_together() {
        let raw = RawServe {
            listen: text("8443"),
            drain_timeout: text("20"),
            certificates: text("self-managed"),
            tls_secret: text("../other"),
            namespace: text(""),
            ..RawServe::default()
        };
        let injection = RawInjection { native_sidecars: text("yes"), ..RawInjection::default() };
        let log = SettingError { name: "PGSIDECAR_LOG", problem: "wrong".to_owned() };
        let errors = raw.resolve(&injection, vec![log]).unwrap_err();
        insta::assert_snapshot!(errors, @r#"
        7 settings are wrong:
          PGSIDECAR_LOG: wrong
          PGSIDECAR_WEBHOOK_IMAGE: is required
          PGSIDECAR_WEBHOOK_NATIVE_SIDECARS: "yes" is neither true nor false
          PGSIDECAR_WEBHOOK_DRAIN_TIMEOUT: "20" is not a time span with a unit: 500ms, 30s, 5min, 2h or 1d
          PGSIDECAR_WEBHOOK_LISTEN: "8443" is not an address with a port, such as 0.0.0.0:8443
          PGSIDECAR_WEBHOOK_TLS_SECRET: "../other" is no name of an object: lower-case letters, digits, '-' and '.'
          POD_NAMESPACE: is required
        "#);
    }

    #[test]
    fn an_empty_value_is_an_absent_one() {
        let raw = RawServe { listen: text(""), certificates: text(""), ..RawServe::default() };
        let injection = RawInjection { image: text("pgsidecar:1"), native_sidecars: text(""), config_secret: text("") };
        let (serve, settings) = raw.resolve(&injection, Vec::new()).unwrap();
        assert_eq!(serve.listen.to_string(), "0.0.0.0:8443");
        assert!(settings.native_sidecars);
    }
}
