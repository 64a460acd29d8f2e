//! The environment of our containers.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::{
    annotations::Wishes,
    command,
    view::{items, text},
    volumes::{HELPER_PATH, SPOOL_PATH},
};

/// What is taken over from PostgreSQL's container: connection, credentials, region.
const COPIED: [&str; 3] = ["PG", "POSTGRES_", "AWS_"];

/// An environment, and what is told about it.
pub(super) struct Environment {
    pub(super) env: Vec<Value>,
    pub(super) env_from: Vec<Value>,
    /// Variables that might be needed and aren't copied, because their values would stand in the patch.
    pub(super) secrets: Vec<String>,
}

/// The environment of our containers beside this one.
pub(super) fn compose(container: &Value, pgdata: &str, wishes: &Wishes, config_secret: &str) -> Environment {
    let field = |name: &str, path: &str| json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}});
    let plain = |name: &str, value: &str| json!({"name": name, "value": value});
    let mut env = vec![
        field("POD_NAME", "metadata.name"),
        field("POD_NAMESPACE", "metadata.namespace"),
        field("POD_UID", "metadata.uid"),
        plain("PGDATA", pgdata),
        plain("PGHOST", "127.0.0.1"),
        plain("PGSIDECAR_PUBLISH_HELPER", HELPER_PATH),
        plain("PGSIDECAR_HELPER", &format!("{HELPER_PATH}/pgsidecar-wal")),
        plain("PGSIDECAR_SPOOL", SPOOL_PATH),
        plain("TMPDIR", SPOOL_PATH),
        plain("PGSIDECAR_CONTROL_SOCKET", &format!("{SPOOL_PATH}/control.sock")),
        plain("PGSIDECAR_LOG_FORMAT", "json"),
    ];
    env.extend(wishes.settings.iter().map(|(name, value)| plain(name, &literal(value))));
    if let Some(port) = command::port(container) {
        env.push(plain("PGPORT", &port));
    }
    let (copied, secrets) = copied(container, &env);
    env.extend(copied);
    // The image's superuser, under libpq's name.
    if !has(&env, "PGUSER")
        && let Some(user) = env.iter().find(|entry| text(entry, "name") == Some("POSTGRES_USER")).cloned()
    {
        let mut user = user;
        user["name"] = json!("PGUSER");
        env.push(user);
    }
    let mut env_from = items(container, "envFrom").to_vec();
    let settings = json!({"secretRef": {"name": config_secret, "optional": true}});
    env_from.retain(|source| source.get("secretRef").and_then(|secret| text(secret, "name")) != Some(config_secret));
    env_from.push(settings);
    Environment { env, env_from, secrets }
}

/// The entries of PostgreSQL's container that ours get, with those that they refer to; and the names of those that they
/// don't get because they have a secret in them.
fn copied(container: &Value, ours: &[Value]) -> (Vec<Value>, Vec<String>) {
    let entries: Vec<(&str, &Value)> =
        items(container, "env").iter().filter_map(|entry| Some((text(entry, "name")?, entry))).collect();
    let mut values: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (name, entry) in &entries {
        values.entry(name).or_default().extend(text(entry, "value"));
    }
    let mut found: Vec<&str> =
        values.keys().copied().filter(|name| COPIED.iter().any(|start| name.starts_with(start))).collect();
    found.extend(items(container, "volumeMounts").iter().flat_map(|mount| references(text(mount, "subPathExpr"))));
    let mut wanted: BTreeSet<&str> = BTreeSet::new();
    // Each once: a pod may have many thousand variables, and the webhook has to answer others too.
    while let Some(name) = found.pop() {
        if let Some(values) = values.get(name).filter(|_| wanted.insert(name)) {
            found.extend(values.iter().flat_map(|value| references(Some(value))));
        }
    }
    let mut hidden: BTreeSet<&str> = BTreeSet::new();
    for (name, entry) in &entries {
        let value = text(entry, "value").unwrap_or("");
        if is_secret(name, value) || references(Some(value)).iter().any(|name| hidden.contains(name)) {
            hidden.insert(name);
        }
    }
    let needed = |name: &str| name.starts_with("PG") || name.starts_with("AWS_");
    let secrets = entries.iter().map(|(name, _)| *name);
    let secrets: BTreeSet<&str> =
        secrets.filter(|name| wanted.contains(name) && hidden.contains(name) && needed(name)).collect();
    let copied = entries
        .iter()
        .filter(|(name, _)| wanted.contains(name) && !hidden.contains(name) && !has(ours, name))
        .map(|(_, entry)| (*entry).clone());
    (copied.collect(), secrets.into_iter().map(str::to_owned).collect())
}

fn has(env: &[Value], name: &str) -> bool {
    env.iter().any(|entry| text(entry, "name") == Some(name))
}

/// Kubernetes expands `$(NAME)` in values; this one stays as it is.
fn literal(value: &str) -> String {
    value.replace("$(", "$$(")
}

/// The variables that a value refers to, as `$(NAME)`.
pub(super) fn references(value: Option<&str>) -> Vec<&str> {
    let mut names = Vec::new();
    let mut rest = value.unwrap_or("");
    while let Some(index) = rest.find('$') {
        rest = &rest[index + 1..];
        if let Some(escaped) = rest.strip_prefix('$') {
            rest = escaped;
        } else if let Some((name, behind)) = rest.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            names.push(name);
            rest = behind;
        }
    }
    names
}

/// Whether a value that stands in the pod itself is a secret. Patches are audited, so they hold none.
fn is_secret(name: &str, value: &str) -> bool {
    let refers = !references(Some(value)).is_empty();
    let names_one = ["PASSWORD", "SECRET", "TOKEN", "CREDENTIAL", "PRIVATE_KEY"].iter().any(|part| name.contains(part));
    let of_another_kind = ["_FILE", "_ID", "_URI", "_ARN", "_PATH", "_METHOD"].iter().any(|end| name.ends_with(end));
    let has_one = value.contains("password=") || (value.contains("://") && value.contains('@'));
    !value.is_empty() && ((names_one && !of_another_kind && !refers) || has_one)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(env: &[Value]) -> Vec<&str> {
        env.iter().filter_map(|entry| text(entry, "name")).collect()
    }

    fn of(container: Value) -> Environment {
        compose(&container, "/data", &Wishes::default(), "pgsidecar")
    }

    #[test]
    fn what_begins_so_is_copied_with_what_it_refers_to() {
        let from = json!({"secretKeyRef": {"name": "db", "key": "password"}});
        let environment = of(json!({"env": [
            {"name": "DB_USER", "value": "app"},
            {"name": "UNRELATED", "value": "x"},
            {"name": "SHARD", "value": "7"},
            {"name": "POSTGRES_USER", "value": "$(DB_USER)"},
            {"name": "PGPASSWORD", "valueFrom": from},
            {"name": "PGDATA", "value": "/elsewhere"},
            {"name": "AWS_REGION", "value": "eu-central-1 $$(UNRELATED)"},
        ], "volumeMounts": [{"subPathExpr": "shards/$(SHARD)"}]}));
        let copied = &environment.env[11..];
        assert_eq!(names(copied), ["DB_USER", "SHARD", "POSTGRES_USER", "PGPASSWORD", "AWS_REGION", "PGUSER"]);
        assert_eq!(copied[3]["valueFrom"], from);
        assert_eq!(copied[5], json!({"name": "PGUSER", "value": "$(DB_USER)"}));
        assert!(environment.secrets.is_empty());
    }

    #[test]
    fn secrets_that_stand_in_the_pod_are_not_copied() {
        let environment = of(json!({"env": [
            {"name": "POSTGRES_PASSWORD", "value": "hunter2"},
            {"name": "PGPASSWORD", "value": "$(POSTGRES_PASSWORD)"},
            {"name": "AWS_SECRET_ACCESS_KEY", "value": "hunter2"},
            {"name": "AWS_ACCESS_KEY_ID", "value": "AKIA"},
            {"name": "AWS_WEB_IDENTITY_TOKEN_FILE", "value": "/var/run/token"},
            {"name": "POSTGRES_PASSWORD_FILE", "value": "/run/secrets/password"},
            {"name": "PG_DSN", "value": "postgres://app:hunter2@db"},
            {"name": "POSTGRES_INITDB_ARGS", "value": ""},
        ]}));
        let copied = &environment.env[11..];
        assert_eq!(
            names(copied),
            ["AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "POSTGRES_PASSWORD_FILE", "POSTGRES_INITDB_ARGS"]
        );
        assert_eq!(environment.secrets, ["AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "PG_DSN"]);
    }

    #[test]
    fn the_settings_of_the_secret_come_last() {
        let source = |name: &str| json!({"secretRef": {"name": name}});
        let environment = of(json!({"envFrom": [source("pgsidecar"), source("db"), {"configMapRef": {"name": "db"}}]}));
        let expected = json!([source("db"), {"configMapRef": {"name": "db"}}, {"secretRef": {"name": "pgsidecar", "optional": true}}]);
        assert_eq!(json!(environment.env_from), expected);
    }

    #[test]
    fn references_are_read_as_kubernetes_reads_them() {
        assert_eq!(references(Some("a$(B)c$$(D)$(E)$(F")), ["B", "E"]);
        assert_eq!(literal("a $(B)"), "a $$(B)");
    }

    #[test]
    fn a_long_chain_of_references_takes_no_long_time() {
        let link = |index: usize| json!({"name": format!("X{index}"), "value": format!("$(X{})", index + 1)});
        let mut env: Vec<Value> = (0..5_000).map(link).collect();
        env.push(json!({"name": "PGUSER", "value": "$(X0)"}));
        let begun = std::time::Instant::now();
        assert_eq!(of(json!({"env": env})).env.len(), 11 + 5_001);
        assert!(begun.elapsed().as_secs() < 10, "{:?}", begun.elapsed());
    }
}
