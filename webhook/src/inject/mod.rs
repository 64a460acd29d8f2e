//! What is added to a pod.
//!
//! One pure function, [`inject`]. It works on JSON throughout: typed pods lose the fields that their types don't know.
//! It only ever adds (but for a grace period that is too short), and what it has added it recognizes: a second call, as
//! the API server makes it after other webhooks, adds what is still missing, which mostly is nothing.

mod annotations;
mod command;
mod container;
mod environment;
mod fitness;
mod images;
mod network;
mod patch;
mod pgdata;
mod reference;
mod resources;
mod server;
mod sidecar;
mod user;
mod view;
mod volumes;

use serde::Serialize;
use serde_json::{Map, Value, json};

use annotations::Wishes;
use patch::Patch;
use sidecar::{Common, PREPARE, SIDECAR};
use view::{containers, has_annotation, init_containers, position, text};

/// The label that asks for an injection, with the value `true`.
pub const LABEL: &str = "pgsidecar.dev/inject";
/// Our note on a pod that was injected: one line of JSON.
pub const STATUS: &str = "pgsidecar.dev/status";

/// The grace period that a pod gets at least, in seconds: PostgreSQL's end, and then its last WAL.
const GRACE_SECONDS: u64 = 180;
/// What the API asks of each warning's length, in characters.
const LONGEST_WARNING: usize = 120;
/// How long the first part of a rejection is at most, in characters.
const LONGEST_PROBLEM: usize = 16_000;
/// So many containers are named.
const MOST_WARNINGS_OF_ORDER: usize = 5;
/// What the cluster autoscaler may lose with a pod that it moves: without it, an emptyDir keeps a node alive.
const EVICTABLE_VOLUMES: &str = "cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes";
/// What `kubectl logs` and `kubectl exec` take if nothing is said.
const DEFAULT_CONTAINER: &str = "kubectl.kubernetes.io/default-container";
/// The versions of PostgreSQL that pgsidecar knows.
const VERSIONS: std::ops::RangeInclusive<u32> = 14..=18;

/// What the webhook was told; the pod's annotations outrank it where they can.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The sidecar's image.
    pub image: String,
    /// Whether the cluster's kubelets know native sidecars (on by default since Kubernetes 1.29): the mode `auto`.
    pub native_sidecars: bool,
    /// The Secret in the pod's namespace that holds the sidecar's settings, unless an annotation names another.
    pub config_secret: String,
}

/// How the sidecar runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// As an init container that is restarted, which ends after the main containers.
    Native,
    /// As a main container.
    Classic,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Mode::Native => "native",
            Mode::Classic => "classic",
        }
    }
}

/// One operation of the patch (RFC 6902). There are no others: nothing that the pod has is changed or removed.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub enum Operation {
    /// `add`
    Add {
        /// Where, as a JSON pointer (RFC 6901).
        path: String,
        /// What.
        value: Value,
    },
}

/// What a pod gets.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Injection {
    /// Applied in this order. Empty where the pod has it all already.
    pub patch: Vec<Operation>,
    /// For the person who created the pod (`AdmissionResponse.warnings`), each at most 120 characters as the API asks.
    pub warnings: Vec<String>,
    /// For the audit log (`AdmissionResponse.auditAnnotations`): keys without prefix. No secret values.
    pub audit: Vec<(&'static str, String)>,
}

/// Why a pod isn't admitted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("pgsidecar: {problem}. {remedy}")]
pub struct Rejection {
    /// What is wrong; lower-case, without a full stop.
    pub problem: String,
    /// What to do; a full sentence.
    pub remedy: String,
}

impl Rejection {
    fn new(problem: impl Into<String>, remedy: impl Into<String>) -> Rejection {
        let (mut problem, remedy) = (problem.into(), remedy.into());
        // It may quote what is in the pod, which may be a megabyte.
        if let Some((end, _)) = problem.char_indices().nth(LONGEST_PROBLEM) {
            problem.truncate(end);
            problem.push('…');
        }
        Rejection { problem, remedy }
    }
}

/// Whether the pod has the label [`LABEL`] with anything but `false` (or null). [`inject`] refuses what isn't `true`.
pub fn is_labelled(pod: &Value) -> bool {
    !matches!(label(pod), None | Some(Value::Null)) && label(pod) != Some(&json!("false"))
}

fn label(pod: &Value) -> Option<&Value> {
    pod.get("metadata")?.get("labels")?.get(LABEL)
}

/// Somebody who writes `True` or `yes` wants backups: passing that over would be noticed when they are needed.
fn check_label(label: &Value) -> Result<(), Rejection> {
    let problem = match label {
        Value::String(text) if text == "true" => return Ok(()),
        Value::String(text) => {
            format!("the label {LABEL} is {:?}, neither true nor false", text.chars().take(80).collect::<String>())
        }
        Value::Bool(value) => format!("the label {LABEL} is the boolean {value}, and labels are texts"),
        _ => format!("the label {LABEL} is not a text"),
    };
    Err(Rejection::new(problem, format!("Quote it: {LABEL}: \"true\". Or \"false\" if nothing is to be injected.")))
}

/// What has to be added to `pod`, which is or will be in `namespace`. Nothing, if it isn't labelled.
///
/// # Errors
/// If the label is neither `true` nor `false`, or the pod can't be backed up as it is, with what to change.
pub fn inject(pod: &Value, namespace: &str, settings: &Settings) -> Result<Injection, Rejection> {
    let Some(label) = label(pod).filter(|_| is_labelled(pod)) else { return Ok(Injection::default()) };
    check_label(label)?;
    view::check_shape(pod)?;
    let wishes = Wishes::read(pod)?;
    fitness::check(pod)?;
    let plan = Plan::make(pod, &wishes, settings)?;
    let mut warnings = Vec::new();
    let patch = plan.apply(pod, &mut warnings)?;
    for warning in &mut warnings {
        if warning.chars().count() > LONGEST_WARNING {
            *warning = warning.chars().take(LONGEST_WARNING - 1).chain(['…']).collect();
        }
    }
    let audit = vec![
        ("mode", plan.mode.name().to_owned()),
        ("container", plan.name.clone()),
        ("config-secret", format!("{namespace}/{}", plan.config_secret)),
        ("operations", patch.len().to_string()),
    ];
    Ok(Injection { patch, warnings, audit })
}

/// The pod's grace period, in seconds.
fn grace_of(pod: &Value) -> Option<u64> {
    pod.pointer("/spec/terminationGracePeriodSeconds").and_then(Value::as_u64)
}

/// All that was found out about a pod.
struct Plan<'a> {
    wishes: &'a Wishes,
    mode: Mode,
    /// Where PostgreSQL's container is.
    index: usize,
    name: String,
    pgdata: String,
    identity: user::Identity,
    arguments: Vec<String>,
    config_secret: &'a str,
    image: &'a str,
    /// The data are lost with the pod.
    ephemeral: bool,
    /// What was seen that may be wrong.
    warnings: Vec<String>,
}

impl<'a> Plan<'a> {
    fn make(pod: &Value, wishes: &'a Wishes, settings: &'a Settings) -> Result<Plan<'a>, Rejection> {
        let index = container::find(pod, wishes.container.as_deref())?;
        let container = &containers(pod)[index];
        let ours = container::ours(pod);
        let image = text(container, "image").and_then(images::look_up);
        let image = image.as_ref();
        if let Some(major) = image.and_then(|image| image.major).filter(|major| !VERSIONS.contains(major)) {
            return Err(Rejection::new(
                format!("PostgreSQL {major} isn't supported, only {} to {}", VERSIONS.start(), VERSIONS.end()),
                "Upgrade one of the two, or take the label pgsidecar.dev/inject out of the pod template.",
            ));
        }
        volumes::check_names(pod, container)?;
        let pgdata = pgdata::find(container, ours, wishes, image)?;
        let ephemeral = pgdata::check(pod, container, &pgdata, image)?;
        let identity = user::find(pod, container, ours, wishes, image)?;
        if let Some(asked) = wishes.restores().filter(|_| image.is_some_and(|image| image.deletes_recovery_signal)) {
            return Err(Rejection::new(
                format!(
                    "{asked}: this image deletes recovery.signal whenever it starts, so nothing can be restored for it"
                ),
                "Take the annotation out, or use the official image.",
            ));
        }
        let arguments = if wishes.skips_arguments { Vec::new() } else { command::complete(container, image)?.append };
        // Once more, and under a name of the image that doesn't tell what -D is in it: it was checked the first time.
        if ours.is_none() || image.is_some() {
            server::check_directory(container, image, &pgdata, wishes.pgdata.is_some())?;
        }
        let mut warnings = server::check(container, &pgdata)?;
        warnings.extend(pgdata::may_be_hidden(container, &pgdata, image));
        network::check_mesh(pod, container)?;
        // A pod that was injected stays as it is, whatever the settings say by now.
        let was = container::Status::read(pod).map(|status| status.mode);
        let auto = if settings.native_sidecars { Mode::Native } else { Mode::Classic };
        let mode = was.or(wishes.mode).unwrap_or(auto);
        if mode == Mode::Classic {
            fitness::check_restart_policy(pod)?;
        }
        Ok(Plan {
            wishes,
            mode,
            index,
            name: text(container, "name").unwrap_or("").to_owned(),
            pgdata,
            identity,
            arguments,
            config_secret: wishes.config_secret.as_deref().unwrap_or(&settings.config_secret),
            image: wishes.image.as_deref().unwrap_or(&settings.image),
            ephemeral,
            warnings,
        })
    }

    fn apply(&self, pod: &Value, warnings: &mut Vec<String>) -> Result<Vec<Operation>, Rejection> {
        let container = &containers(pod)[self.index];
        // First, as it may be too large, and the patch copies the pod.
        let environment =
            environment::compose(container, &self.pgdata, self.wishes, self.config_secret, self.grace(pod))?;
        volumes::check_sub_paths(container, &environment.env)?;
        let mut patch = Patch::new(pod);
        if self.ephemeral {
            warnings
                .push(format!("the data are lost with the pod: PGDATA isn't on a persistent volume ({})", self.pgdata));
        }
        if self.wishes.skips_arguments {
            warnings.push(
                "postgresql.conf has to set archive_mode, archive_command and restore_command: docs/injection.md"
                    .into(),
            );
        }
        warnings.extend(self.warnings.iter().cloned());
        patch.append(&["spec", "volumes"], volumes::missing(pod));
        self.add_fs_group(&mut patch, warnings);
        self.add_grace(&mut patch);
        self.add_to_postgres(&mut patch, container);

        for name in &environment.secrets {
            warnings
                .push(format!("{name} has its value in the pod itself and isn't copied to pgsidecar: use a Secret"));
        }
        if environment.has_static_keys {
            warnings.push(format!(
                "AWS keys of PostgreSQL's container aren't copied: pgsidecar's are those of the Secret {}",
                self.config_secret
            ));
        }
        self.warn_of_order(pod, container, warnings);
        let (mounts, left_out) = volumes::mounts(container);
        for path in left_out {
            warnings
                .push(format!("a mount isn't copied to pgsidecar's containers, where it would hide programs: {path}"));
        }
        let chosen = resources::choose(pod, self.wishes.resources.as_ref());
        if chosen.loses_guaranteed {
            warnings.push(
                "pgsidecar.dev/resources: the pod isn't Guaranteed any more, as limits and requests differ".into(),
            );
        }
        let common = Common {
            image: self.image,
            identity: self.identity,
            environment: &environment,
            mounts: &mounts,
            resources: chosen.requirements.as_ref(),
        };
        self.add_containers(&mut patch, &common);
        self.annotate(&mut patch);
        Ok(patch.into_operations())
    }

    /// What comes at the wrong time.
    fn warn_of_order(&self, pod: &Value, container: &Value, warnings: &mut Vec<String>) {
        let has = |probe: &str| container.get(probe).is_some_and(|probe| !probe.is_null());
        if self.wishes.restores().is_some() && has("livenessProbe") && !has("startupProbe") {
            warnings.push(
                "livenessProbe without startupProbe: it may kill PostgreSQL while it replays WAL; add a startupProbe"
                    .into(),
            );
        }
        let init = init_containers(pod);
        let behind = position(init, PREPARE).map_or(&[][..], |prepare| &init[prepare + 1..]);
        let behind = behind.iter().filter_map(|container| text(container, "name")).filter(|name| *name != SIDECAR);
        for name in behind.take(MOST_WARNINGS_OF_ORDER) {
            warnings
                .push(format!("it starts after pgsidecar-prepare, which gets nothing from it: init container {name}"));
        }
    }

    /// Our containers aren't root, and a volume that belongs to root takes nothing from others.
    fn add_fs_group(&self, patch: &mut Patch, warnings: &mut Vec<String>) {
        if self.wishes.skips_fs_group || user::has_fs_group(patch.pod()) {
            return;
        }
        let group = if self.identity.group == 0 { self.identity.user } else { self.identity.group };
        let mut members = Map::from_iter([("fsGroup".to_owned(), json!(group))]);
        if patch.pod().pointer("/spec/securityContext/fsGroupChangePolicy").is_none_or(Value::is_null) {
            members.insert("fsGroupChangePolicy".into(), json!("OnRootMismatch"));
        }
        patch.set(&["spec", "securityContext"], members);
        warnings.push(format!(
            "fsGroup {group} was added, so that pgsidecar can write to the volumes; see docs/injection.md"
        ));
    }

    /// The one value that is raised: the API server has filled in 30 seconds before we see the pod.
    fn add_grace(&self, patch: &mut Patch) {
        let grace = self.grace(patch.pod());
        if grace_of(patch.pod()) != Some(grace) {
            patch.set(&["spec"], Map::from_iter([("terminationGracePeriodSeconds".to_owned(), json!(grace))]));
        }
    }

    /// The grace period that the pod will have, in seconds.
    fn grace(&self, pod: &Value) -> u64 {
        self.wishes.grace_seconds.unwrap_or(GRACE_SECONDS).max(grace_of(pod).unwrap_or(0))
    }

    fn add_to_postgres(&self, patch: &mut Patch, container: &Value) {
        let index = self.index.to_string();
        let path = ["spec", "containers", &index];
        let arguments = self.arguments.iter().map(|argument| json!(argument)).collect();
        patch.append(&[&path[..], &["args"]].concat(), arguments);
        let mount = volumes::missing_helper_mount(container);
        patch.append(&[&path[..], &["volumeMounts"]].concat(), mount.into_iter().collect());
    }

    fn add_containers(&self, patch: &mut Patch, common: &Common<'_>) {
        let sidecar = common.sidecar(self.mode, network::port_name(patch.pod()), network::HEALTH_PORT);
        let mut wanted = vec![("initContainers", common.prepare())];
        match self.mode {
            Mode::Native => wanted.push(("initContainers", sidecar)),
            Mode::Classic => wanted.push(("containers", sidecar)),
        }
        let mut init = Vec::new();
        for (list, container) in wanted {
            let name = text(&container, "name").unwrap_or("");
            let there = if list == "containers" { containers(patch.pod()) } else { init_containers(patch.pod()) };
            match position(there, name) {
                Some(index) => sidecar::reconcile(patch, &["spec", list, &index.to_string()], &container),
                None if list == "initContainers" => init.push(container),
                // The kubelet starts them in their order, each after the other's hook.
                None => patch.insert(&["spec", list], 0, container),
            }
        }
        patch.append(&["spec", "initContainers"], init);
    }

    fn annotate(&self, patch: &mut Patch) {
        let mut annotations = Map::new();
        if self.mode == Mode::Classic && !has_annotation(patch.pod(), DEFAULT_CONTAINER) {
            annotations.insert(DEFAULT_CONTAINER.into(), json!(self.name));
        }
        if !has_annotation(patch.pod(), EVICTABLE_VOLUMES) {
            let ours = format!("{},{}", volumes::SPOOL_VOLUME, volumes::HELPER_VOLUME);
            annotations.insert(EVICTABLE_VOLUMES.into(), json!(ours));
        }
        if !has_annotation(patch.pod(), STATUS) {
            // Written by hand: the order of the members is promised.
            let status = format!(
                r#"{{"mode":"{}","container":{},"image":{},"version":"{}"}}"#,
                self.mode.name(),
                json!(self.name),
                json!(self.image),
                env!("CARGO_PKG_VERSION")
            );
            annotations.insert(STATUS.into(), json!(status));
        }
        patch.set(&["metadata", "annotations"], annotations);
    }
}
