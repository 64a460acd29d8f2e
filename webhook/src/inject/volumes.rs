//! Which volumes our containers see.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::{
    Rejection,
    environment::references,
    view::{items, named, text},
};

/// Where `pgsidecar-wal` is, in all three containers.
pub(super) const HELPER_PATH: &str = "/pgsidecar";
/// What only ours see.
pub(super) const SPOOL_PATH: &str = "/pgsidecar-spool";
/// The volume at [`HELPER_PATH`].
pub(super) const HELPER_VOLUME: &str = "pgsidecar-run";
/// The volume at [`SPOOL_PATH`].
pub(super) const SPOOL_VOLUME: &str = "pgsidecar-spool";

/// The service account's token is each container's own matter; Kubernetes mounts it where it's wanted. Of images whose
/// `/var/run` is a link to `/run`, both are the same.
const SERVICE_ACCOUNT_PATHS: [&str; 2] = ["/var/run/secrets/kubernetes.io", "/run/secrets/kubernetes.io"];

/// Where our image keeps what it runs, and the libraries of that. A mount there, above or below would hide it.
const PROGRAMS: [&str; 12] = [
    "/usr/local/bin",
    "/usr/local/lib",
    "/usr/bin",
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/libx32",
    "/bin",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
];

/// Checks that our own volumes and paths are free, or ours.
///
/// # Errors
/// If they aren't.
pub(super) fn check_names(pod: &Value, container: &Value) -> Result<(), Rejection> {
    let volumes = pod.get("spec").map_or(&[][..], |spec| items(spec, "volumes"));
    for name in [HELPER_VOLUME, SPOOL_VOLUME] {
        let other = named(volumes, name).is_some_and(|volume| {
            let memory = volume.get("emptyDir").and_then(|source| text(source, "medium")) == Some("Memory");
            !volume.get("emptyDir").is_some_and(Value::is_object) || memory != (name == HELPER_VOLUME)
        });
        if other {
            return Err(Rejection::new(
                format!("the pod has a volume {name:?} that isn't pgsidecar's"),
                "Give it another name: pgsidecar adds a volume of this one.",
            ));
        }
    }
    for mount in items(container, "volumeMounts") {
        let (name, path) = (text(mount, "name").unwrap_or(""), text(mount, "mountPath").unwrap_or(""));
        if is_helper_mount(mount) {
            continue;
        }
        if [HELPER_VOLUME, SPOOL_VOLUME].contains(&name) {
            return Err(Rejection::new(
                format!("PostgreSQL's container mounts pgsidecar's volume {name:?} at {path}, or a part of it"),
                "Take this mount out: pgsidecar adds the one that's needed.",
            ));
        }
        if [HELPER_PATH, SPOOL_PATH].into_iter().any(|ours| is_within(path, ours) || is_within(ours, path)) {
            return Err(Rejection::new(
                format!("PostgreSQL's container mounts the volume {name:?} at {path}"),
                format!("Mount it elsewhere: {HELPER_PATH} and {SPOOL_PATH} are pgsidecar's."),
            ));
        }
    }
    Ok(())
}

/// Our volumes, those that are missing.
pub(super) fn missing(pod: &Value) -> Vec<Value> {
    let there = pod.get("spec").map_or(&[][..], |spec| items(spec, "volumes"));
    let volumes = [
        // In memory: /var, where other emptyDirs are, may be mounted noexec.
        json!({"name": HELPER_VOLUME, "emptyDir": {"medium": "Memory", "sizeLimit": "32Mi"}}),
        json!({"name": SPOOL_VOLUME, "emptyDir": {}}),
    ];
    volumes.into_iter().filter(|volume| named(there, text(volume, "name").unwrap_or("")).is_none()).collect()
}

/// The helper's mount in PostgreSQL's container, if it's missing.
pub(super) fn missing_helper_mount(container: &Value) -> Option<Value> {
    let is_there = items(container, "volumeMounts").iter().any(is_helper_mount);
    (!is_there).then(|| json!({"name": HELPER_VOLUME, "mountPath": HELPER_PATH, "readOnly": true}))
}

/// Whether this is all of the helper's volume, at its place.
fn is_helper_mount(mount: &Value) -> bool {
    let is_part = ["subPath", "subPathExpr"].iter().any(|name| text(mount, name).is_some_and(|part| !part.is_empty()));
    let path = text(mount, "mountPath").unwrap_or("");
    text(mount, "name") == Some(HELPER_VOLUME) && is_same(path, HELPER_PATH) && !is_part
}

/// Whether what is mounted at this path would hide what our containers run.
pub(super) fn hides_programs(path: &str) -> bool {
    PROGRAMS.into_iter().any(|programs| is_within(programs, path) || is_within(path, programs))
}

/// The values of an environment, or where they come from, by their names, of which the last counts.
fn values(env: &[Value]) -> BTreeMap<&str, (&str, Option<&Value>)> {
    let of = |entry| {
        let from = Value::pointer(entry, "/valueFrom").filter(|from| !from.is_null());
        // The API server fills in the version of a field's API.
        let field = Value::pointer(entry, "/valueFrom/fieldRef/fieldPath");
        Some((text(entry, "name")?, (text(entry, "value").unwrap_or(""), field.or(from))))
    };
    env.iter().filter_map(of).collect()
}

/// Checks that a `subPathExpr` means the same in our containers, whose environment is `ours`.
///
/// # Errors
/// If it doesn't.
pub(super) fn check_sub_paths(container: &Value, ours: &[Value]) -> Result<(), Rejection> {
    let (theirs, ours) = (values(items(container, "env")), values(ours));
    let mut seen = BTreeSet::new();
    for mount in items(container, "volumeMounts") {
        let mut names = references(text(mount, "subPathExpr"));
        while let Some(name) = names.pop() {
            if !seen.insert(name) {
                continue;
            }
            let value = theirs.get(name);
            if value != ours.get(name) {
                return Err(Rejection::new(
                    format!(
                        "the mount at {} has a subPathExpr with $({name}), which has another value in pgsidecar's containers, or none",
                        text(mount, "mountPath").unwrap_or("")
                    ),
                    "Use a variable of another name there: one that doesn't hold a secret and isn't pgsidecar's.",
                ));
            }
            names.extend(references(value.map(|(value, _)| *value)));
        }
    }
    Ok(())
}

/// The mounts of our containers, and those of PostgreSQL's that were left out because they would hide our programs.
pub(super) fn mounts(container: &Value) -> (Vec<Value>, Vec<String>) {
    let mut mounts = vec![
        json!({"name": HELPER_VOLUME, "mountPath": HELPER_PATH}),
        json!({"name": SPOOL_VOLUME, "mountPath": SPOOL_PATH}),
    ];
    let mut left_out = Vec::new();
    for mount in items(container, "volumeMounts") {
        let Some(path) = text(mount, "mountPath") else { continue };
        if is_same(path, HELPER_PATH) || SERVICE_ACCOUNT_PATHS.into_iter().any(|token| is_within(path, token)) {
            continue;
        }
        if hides_programs(path) {
            left_out.push(path.to_owned());
            continue;
        }
        let mut mount = mount.clone();
        if let Some(members) = mount.as_object_mut()
            && members.get("mountPropagation") == Some(&json!("Bidirectional"))
        {
            // It's for privileged containers alone.
            members.remove("mountPropagation");
        }
        mounts.push(mount);
    }
    (mounts, left_out)
}

/// Whether two paths mean the same place.
pub(super) fn is_same(path: &str, other: &str) -> bool {
    parts(path) == parts(other)
}

/// Whether `path` is `directory` or below it.
pub(super) fn is_within(path: &str, directory: &str) -> bool {
    parts(path).starts_with(&parts(directory))
}

/// The parts of a path that mean something.
pub(super) fn parts(path: &str) -> Vec<&str> {
    path.split('/').filter(|part| !part.is_empty() && *part != ".").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_compared_by_their_parts() {
        assert!(is_within("/var/lib/postgresql/data", "/var/lib/postgresql/"));
        assert!(is_within("/data", "/"));
        assert!(!is_within("/var/lib/postgresql-data", "/var/lib/postgresql"));
        assert!(is_same("//a/./b/", "/a/b"));
    }

    #[test]
    fn what_would_hide_our_programs_is_left_out() {
        let left_out = |path: &str| {
            let (mounts, left_out) = mounts(&json!({"volumeMounts": [{"name": "x", "mountPath": path}]}));
            assert_eq!(mounts.len() + left_out.len(), 3, "{path}");
            !left_out.is_empty()
        };
        for path in
            ["/", "/usr", "/usr/lib/x86_64-linux-gnu", "/lib64/", "/usr/lib/postgresql/17/lib", "/usr/local/bin"]
        {
            assert!(left_out(path), "{path}");
        }
        for path in ["/usr/share/postgresql", "/library", "/usr/local/share", "/etc/ssl", "/var/run/postgresql"] {
            assert!(!left_out(path), "{path}");
        }
    }

    #[test]
    fn the_service_account_s_token_is_not_copied() {
        for path in [
            "/var/run/secrets/kubernetes.io",
            "/var/run/secrets/kubernetes.io/serviceaccount",
            "/run/secrets/kubernetes.io/serviceaccount/",
        ] {
            let mount = json!({"volumeMounts": [{"name": "token", "mountPath": path}]});
            assert_eq!(mounts(&mount).0.len(), 2, "{path}");
        }
        let mount = json!({"volumeMounts": [{"name": "db", "mountPath": "/var/run/secrets/db"}]});
        assert_eq!(mounts(&mount).0.len(), 3);
    }

    #[test]
    fn our_volumes_are_mounted_whole_and_at_their_place() {
        let pod = json!({"spec": {"volumes": missing(&json!({}))}});
        let check = |mount: Value| check_names(&pod, &json!({"volumeMounts": [mount]})).is_ok();
        assert!(check(json!({"name": "pgsidecar-run", "mountPath": "/pgsidecar/", "readOnly": true})));
        assert!(!check(json!({"name": "pgsidecar-run", "mountPath": "/tools"})));
        assert!(!check(json!({"name": "pgsidecar-run", "mountPath": "/pgsidecar", "subPath": "x"})));
        assert!(!check(json!({"name": "pgsidecar-run", "mountPath": "/pgsidecar", "subPathExpr": "$(X)"})));
        assert!(!check(json!({"name": "pgsidecar-spool", "mountPath": "/spool"})));
        assert!(!check(json!({"name": "other", "mountPath": "/pgsidecar"})));
    }

    #[test]
    fn sub_paths_mean_the_same_in_our_containers() {
        let field = |api: Value| json!({"name": "POD_NAME", "valueFrom": {"fieldRef": {"apiVersion": api, "fieldPath": "metadata.name"}}});
        let env = json!([
            field(json!("v1")),
            {"name": "PGHOST", "value": "elsewhere"},
            {"name": "INDIRECT", "value": "$(PGHOST)"},
            {"name": "SHARD", "value": "7"},
            {"name": "API_TOKEN", "value": "hunter2"},
        ]);
        let ours = [
            field(Value::Null),
            json!({"name": "PGHOST", "value": "127.0.0.1"}),
            json!({"name": "INDIRECT", "value": "$(PGHOST)"}),
            json!({"name": "SHARD", "value": "7"}),
            json!({"name": "TMPDIR", "value": "/x"}),
        ];
        let check = |expression: &str| {
            let mounts = json!([{"name": "data", "mountPath": "/data", "subPathExpr": expression}]);
            check_sub_paths(&json!({"env": env, "volumeMounts": mounts}), &ours)
        };
        for expression in ["$(POD_NAME)/$(SHARD)", "$$(PGHOST)", "plain", "$(FROM_A_CONFIG_MAP)"] {
            assert_eq!(check(expression), Ok(()), "{expression}");
        }
        for expression in ["$(PGHOST)", "x/$(INDIRECT)", "$(API_TOKEN)", "$(TMPDIR)"] {
            let refused = check(expression).unwrap_err().to_string();
            assert!(refused.contains("subPathExpr") && !refused.contains("hunter2"), "{refused}");
        }
    }
}
