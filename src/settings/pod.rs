//! Who we are in Kubernetes, by the downward API.

/// What the environment tells of the pod, by the downward API.
#[derive(Clone, Debug, Default)]
pub struct PodEnvironment {
    /// `POD_NAMESPACE`
    pub namespace: Option<String>,
    /// `POD_NAME`
    pub name: Option<String>,
    /// The host's name, which is the pod's name in Kubernetes.
    pub host_name: String,
}

impl PodEnvironment {
    /// Reads the process's environment.
    pub fn from_process() -> PodEnvironment {
        let var = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        PodEnvironment {
            namespace: var("POD_NAMESPACE"),
            name: var("POD_NAME"),
            host_name: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        }
    }

    /// The pod's name, or the host's outside of Kubernetes: who does the work.
    pub fn instance(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.host_name)
    }

    /// `NAMESPACE/WORKLOAD` in Kubernetes, `main` elsewhere. Two databases never meet under one name: their system
    /// identifiers keep them apart.
    pub fn default_cluster(&self) -> String {
        match (&self.namespace, &self.name) {
            (Some(namespace), Some(name)) => format!("{namespace}/{}", workload_of(name)),
            _ => "main".to_owned(),
        }
    }
}

/// The workload's name in a pod's: without a StatefulSet's ordinal, or without a Deployment's two hashes.
fn workload_of(pod: &str) -> &str {
    // The alphabet of Kubernetes' random suffixes (rand.SafeEncodeString).
    let is_hash = |part: &str, lengths: std::ops::RangeInclusive<usize>| {
        lengths.contains(&part.len()) && part.bytes().all(|b| b"bcdfghjklmnpqrstvwxz2456789".contains(&b))
    };
    match pod.rsplit_once('-') {
        Some((workload, ordinal)) if !ordinal.is_empty() && ordinal.bytes().all(|b| b.is_ascii_digit()) => workload,
        Some((rest, hash)) if is_hash(hash, 5..=5) => match rest.rsplit_once('-') {
            Some((workload, template)) if is_hash(template, 6..=10) => workload,
            _ => pod,
        },
        _ => pod,
    }
}
