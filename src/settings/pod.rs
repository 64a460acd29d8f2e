//! Who we are in Kubernetes, by the downward API.

use std::path::Path;

use pgsidecar_core::prepare::Place;

use super::ImageEnvironment;

/// What the environment tells of the pod, by the downward API.
#[derive(Clone, Debug, Default)]
pub struct PodEnvironment {
    /// `POD_NAMESPACE`
    pub namespace: Option<String>,
    /// `POD_NAME`
    pub name: Option<String>,
    /// The host's name, which is the pod's name in Kubernetes.
    pub host_name: String,
    /// Whether `KUBERNETES_SERVICE_HOST` is there, as in every pod.
    pub in_kubernetes: bool,
    /// What PostgreSQL's container is told, where that is copied into ours.
    pub image: ImageEnvironment,
}

impl PodEnvironment {
    /// Reads the process's environment.
    pub fn from_process() -> PodEnvironment {
        let var = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        PodEnvironment {
            namespace: var("POD_NAMESPACE"),
            name: var("POD_NAME"),
            host_name: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            in_kubernetes: var("KUBERNETES_SERVICE_HOST").is_some(),
            image: ImageEnvironment::from_process(),
        }
    }

    /// The pod's name, or the host's outside of Kubernetes: who does the work.
    pub fn instance(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.host_name)
    }

    /// What stays the same when a pod is replaced: `NAMESPACE/WORKLOAD` in Kubernetes, `HOST:PGDATA` elsewhere. `None`
    /// where the host's name is a container's id, which doesn't stay.
    pub fn workload(&self, pgdata: Option<&Path>) -> Option<String> {
        let is_container_id = self.host_name.len() == 12 && self.host_name.bytes().all(|b| b.is_ascii_hexdigit());
        match (&self.namespace, &self.name) {
            (Some(namespace), Some(name)) => Some(format!("{namespace}/{}", workload_of(name))),
            _ if self.in_kubernetes => Some(workload_of(&self.host_name).to_owned()),
            _ if is_container_id => None,
            _ => pgdata.map(|pgdata| format!("{}:{}", self.host_name, pgdata.display())),
        }
    }

    /// Which of a set's servers this is.
    pub fn place(&self) -> Place {
        let pod = self.name.as_deref().or(self.in_kubernetes.then_some(self.host_name.as_str()));
        pod.map_or(Place::Primary, Place::of_pod)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_stays_the_same_when_its_pod_is_replaced() {
        let pod = |namespace: Option<&str>, name: Option<&str>, host: &str, in_kubernetes| PodEnvironment {
            namespace: namespace.map(str::to_owned),
            name: name.map(str::to_owned),
            host_name: host.to_owned(),
            in_kubernetes,
            image: ImageEnvironment::default(),
        };
        let at = |pod: PodEnvironment| pod.workload(Some(Path::new("/data")));
        for name in ["orders-7c5ddbdf54-x2x4z", "orders-0", "orders-1"] {
            assert_eq!(at(pod(Some("shop"), Some(name), name, true)).as_deref(), Some("shop/orders"));
            assert_eq!(at(pod(None, None, name, true)).as_deref(), Some("orders"));
        }
        assert_eq!(at(pod(None, None, "db-1", false)).as_deref(), Some("db-1:/data"));
        assert_eq!(at(pod(None, None, "3f2a9c01d4e5", false)), None);
        assert_eq!(pod(None, None, "db-1", false).workload(None), None);
    }
}
