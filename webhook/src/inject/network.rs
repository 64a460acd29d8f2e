//! Whether our containers can listen, and reach the store.

use serde_json::Value;

use super::{
    Rejection,
    sidecar::{PREPARE, SIDECAR},
    view::{annotation, containers, init_containers, items, named, position, text},
};

/// Where the daemon listens: for PostgreSQL, and for probes and Prometheus.
const PORTS: [u64; 2] = [7433, HEALTH_PORT];
/// The port of `/metrics`.
pub(super) const HEALTH_PORT: u64 = 7434;

/// Checks that our ports are free.
///
/// # Errors
/// If they aren't.
pub(super) fn check_ports(pod: &Value) -> Result<(), Rejection> {
    if pod.get("spec").and_then(|spec| spec.get("hostNetwork")) == Some(&Value::Bool(true)) {
        return Err(Rejection::new(
            "the pod has the node's network (hostNetwork), where pgsidecar's ports are everybody's",
            "Take hostNetwork out of the pod template, or the label pgsidecar.dev/inject.",
        ));
    }
    for container in containers(pod).iter().chain(init_containers(pod)) {
        let name = text(container, "name").unwrap_or("");
        let ports = items(container, "ports").iter().filter_map(|port| port.get("containerPort")?.as_u64());
        if let Some(port) = ports.into_iter().find(|port| PORTS.contains(port) && ![SIDECAR, PREPARE].contains(&name)) {
            return Err(Rejection::new(
                format!("the container {name:?} has port {port}, which is pgsidecar's"),
                "Let it listen on another port.",
            ));
        }
    }
    Ok(())
}

/// The name of our port, which no other port of the pod has.
pub(super) fn port_name(pod: &Value) -> &'static str {
    let all = containers(pod).iter().chain(init_containers(pod));
    let taken = all
        .filter(|container| text(container, "name") != Some(SIDECAR))
        .flat_map(|container| items(container, "ports"))
        .any(|port| text(port, "name") == Some("pgsidecar"));
    if taken { "pgsidecar-7434" } else { "pgsidecar" }
}

/// A mesh whose proxy may run as a plain container. Its rules are there before `pgsidecar-prepare` runs, the proxy isn't.
struct Mesh {
    name: &'static str,
    init: [&'static str; 2],
    proxy: &'static str,
    /// The annotation with ports that don't go through the proxy.
    ports: &'static str,
    /// The one with address ranges, if the mesh has such.
    ranges: Option<&'static str>,
    native: &'static str,
}

const MESHES: [Mesh; 2] = [
    Mesh {
        name: "Istio",
        init: ["istio-init", "istio-validation"],
        proxy: "istio-proxy",
        ports: "traffic.sidecar.istio.io/excludeOutboundPorts",
        ranges: Some("traffic.sidecar.istio.io/excludeOutboundIPRanges"),
        native: "the annotation sidecar.istio.io/nativeSidecar: \"true\", from Istio 1.24 on",
    },
    Mesh {
        name: "Linkerd",
        init: ["linkerd-init", "linkerd-network-validator"],
        proxy: "linkerd-proxy",
        ports: "config.linkerd.io/skip-outbound-ports",
        ranges: Some("config.linkerd.io/skip-subnets"),
        native: "the annotation config.beta.linkerd.io/proxy-enable-native-sidecar: \"true\", before 2.19 with alpha for beta",
    },
];

/// Checks that `pgsidecar-prepare` can reach the store through a mesh. `container` is PostgreSQL's.
///
/// # Errors
/// If it can't.
pub(super) fn check_mesh(pod: &Value, container: &Value) -> Result<(), Rejection> {
    let store = store_port(container);
    for mesh in MESHES {
        let has_rules = mesh.init.iter().any(|name| named(init_containers(pod), name).is_some());
        let plain = position(containers(pod), mesh.proxy).is_some();
        if !(has_rules && plain) {
            continue;
        }
        let excluded = annotation(pod, mesh.ports).is_some_and(|ports| holds(ports, store));
        let ranges = mesh.ranges.and_then(|name| annotation(pod, name)).is_some_and(|ranges| !ranges.trim().is_empty());
        if !excluded && !ranges {
            return Err(Rejection::new(
                format!(
                    "{}'s proxy starts after the init containers, so pgsidecar-prepare couldn't reach the store",
                    mesh.name
                ),
                format!(
                    "Let the mesh use native sidecars ({}), or let the store's port pass it by: {}: \"{store}\".",
                    mesh.native, mesh.ports
                ),
            ));
        }
    }
    Ok(())
}

/// The store's port, as far as the pod tells it.
fn store_port(container: &Value) -> u16 {
    let endpoint = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"].into_iter().find_map(|name| {
        let entry = named(items(container, "env"), name)?;
        text(entry, "value")
    });
    let Some((scheme, rest)) = endpoint.and_then(|url| url.split_once("://")) else { return 443 };
    let host = rest.split('/').next().unwrap_or("");
    let port = host.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
    port.unwrap_or(if scheme == "http" { 80 } else { 443 })
}

/// Whether a list of ports and ranges of them holds this one.
fn holds(list: &str, port: u16) -> bool {
    list.split(',').map(str::trim).any(|part| match part.split_once('-') {
        Some((low, high)) => {
            low.parse().is_ok_and(|low: u16| low <= port) && high.parse().is_ok_and(|high: u16| port <= high)
        }
        None => part == "*" || part.parse() == Ok(port),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_store_s_port_is_looked_for_in_lists() {
        for (list, port, expected) in [
            ("443", 443, true),
            ("80, 443", 443, true),
            ("1-500", 443, true),
            ("4433", 443, false),
            ("", 443, false),
            ("9000", 9000, true),
        ] {
            assert_eq!(holds(list, port), expected, "{list:?}");
        }
        let port = |url: &str| store_port(&json!({"env": [{"name": "AWS_ENDPOINT_URL_S3", "value": url}]}));
        assert_eq!(port("http://minio.storage:9000/"), 9000);
        assert_eq!(port("https://s3.example.com"), 443);
        assert_eq!(port("http://s3.example.com/x:1"), 80);
        assert_eq!(store_port(&json!({})), 443);
    }
}
