//! Our two containers, and what one that is there already lacks.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{
    Mode,
    environment::{DEFAULT_PGDATA, Environment},
    patch::Patch,
    user::{Identity, security_context},
    view::{items, text},
    volumes::parts,
};

/// The daemon.
pub(super) const SIDECAR: &str = "pgsidecar";
/// What runs before PostgreSQL.
pub(super) const PREPARE: &str = "pgsidecar-prepare";

/// What both of our containers have in common.
pub(super) struct Common<'a> {
    pub(super) image: &'a str,
    pub(super) identity: Identity,
    pub(super) environment: &'a Environment,
    pub(super) mounts: &'a [Value],
    pub(super) resources: Option<&'a Value>,
}

impl Common<'_> {
    fn container(&self, name: &str, command: &str) -> Value {
        let mut container = json!({
            "name": name,
            "image": self.image,
            "args": [command],
            "env": self.environment.env,
            "envFrom": self.environment.env_from,
            "securityContext": security_context(self.identity),
            // So that `kubectl describe` shows why it ended.
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "volumeMounts": self.mounts,
        });
        if let Some(resources) = self.resources {
            container["resources"] = resources.clone();
        }
        container
    }

    /// `pgsidecar-prepare`: a plain init container. A restore takes as long as it takes.
    pub(super) fn prepare(&self) -> Value {
        self.container(PREPARE, "prepare")
    }

    /// `pgsidecar`. No probes: a restart helps nothing, and readiness would count for the pod's, so that an outage of the
    /// store would make the database unready. The hook holds PostgreSQL back until the daemon answers, but not for ever.
    pub(super) fn sidecar(&self, mode: Mode, port_name: &str, port: u64) -> Value {
        let mut sidecar = self.container(SIDECAR, "run");
        let wait = json!(["pgsidecar", "await", "--timeout=30s", "--lenient"]);
        sidecar["lifecycle"] = json!({"postStart": {"exec": {"command": wait}}});
        sidecar["ports"] = json!([{"name": port_name, "containerPort": port, "protocol": "TCP"}]);
        if mode == Mode::Native {
            sidecar["restartPolicy"] = json!("Always");
        }
        sidecar
    }
}

/// Adds to our container at `path` what it lacks, because another webhook has given it to PostgreSQL's since.
pub(super) fn reconcile(patch: &mut Patch, path: &[&str], wanted: &Value) {
    let Some(there) = patch.pod().pointer(&format!("/{}", path.join("/"))).cloned() else { return };
    let names = |container: &Value| -> BTreeSet<String> {
        items(container, "env").iter().filter_map(|entry| text(entry, "name")).map(str::to_owned).collect()
    };
    let has = names(&there);
    // Where PGDATA is set its default says nothing.
    let is_there = |name: &str| has.contains(name) || (name == DEFAULT_PGDATA && has.contains("PGDATA"));
    let env = items(wanted, "env").iter().filter(|entry| !is_there(text(entry, "name").unwrap_or("")));
    patch.append(&[path, &["env"]].concat(), env.cloned().collect());

    let place = |mount: &Value| parts(text(mount, "mountPath").unwrap_or("")).join("/");
    let taken: BTreeSet<String> = items(&there, "volumeMounts").iter().map(place).collect();
    let mounts = items(wanted, "volumeMounts").iter().filter(|mount| !taken.contains(&place(mount)));
    patch.append(&[path, &["volumeMounts"]].concat(), mounts.cloned().collect());

    // Before the last one, which are our settings and outrank the others.
    let sources = items(&there, "envFrom");
    let known: BTreeSet<String> = sources.iter().map(Value::to_string).collect();
    let missing: Vec<Value> =
        items(wanted, "envFrom").iter().filter(|source| !known.contains(&source.to_string())).cloned().collect();
    match sources.len().checked_sub(1) {
        Some(last) => {
            for (index, source) in missing.into_iter().enumerate() {
                patch.insert(&[path, &["envFrom"]].concat(), last + index, source);
            }
        }
        None => patch.append(&[path, &["envFrom"]].concat(), missing),
    }
}
