//! The environment of our containers.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::{
    Rejection,
    annotations::Wishes,
    command,
    view::{items, text},
    volumes::{HELPER_PATH, SPOOL_PATH},
};

/// What is taken over from PostgreSQL's container: how to connect, and settings of ours.
const COPIED: [&str; 2] = ["PG", "POSTGRES_"];

/// What would lead our connection elsewhere than to `PGHOST`, or ask of it what the loopback address hasn't got.
const ELSEWHERE: [&str; 9] = [
    "PGHOSTADDR",
    "PGSERVICE",
    "PGSERVICEFILE",
    "PGSYSCONFDIR",
    "PGOPTIONS",
    "PGREQUIREAUTH",
    "PGREQUIREPEER",
    "PGREQUIRESSL",
    "PGTARGETSESSIONATTRS",
];

/// What EKS gives to a container so that it has an identity (IRSA, Pod Identity). Other credentials, and endpoints, may
/// be for another purpose (`aws_s3`, WAL-G), and would outrank those of our Secret, or be mixed with them.
const IDENTITY: [&str; 4] =
    ["AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_SESSION_NAME", "AWS_STS_REGIONAL_ENDPOINTS"];
/// Begins those of Pod Identity.
const POD_IDENTITY: &str = "AWS_CONTAINER_";
/// What comes with such an identity, and is another's matter without one.
const REGION: [&str; 2] = ["AWS_REGION", "AWS_DEFAULT_REGION"];
/// Keys that don't change by themselves.
const STATIC_KEYS: [&str; 2] = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"];

/// Where the data are unless something says otherwise that can't be seen here.
pub(super) const DEFAULT_PGDATA: &str = "PGSIDECAR_DEFAULT_PGDATA";

/// How much of PostgreSQL's environment is copied, in bytes of JSON: the patch holds it twice.
const MAX_COPIED_BYTES: usize = 128 << 10;

/// An environment, and what is told about it.
pub(super) struct Environment {
    pub(super) env: Vec<Value>,
    pub(super) env_from: Vec<Value>,
    /// Variables that might be needed and aren't copied, because their values would stand in the patch.
    pub(super) secrets: Vec<String>,
    /// PostgreSQL's container has keys for AWS' services, which aren't copied.
    pub(super) has_static_keys: bool,
}

/// The environment of our containers beside this one.
///
/// # Errors
/// If it's too large.
pub(super) fn compose(
    container: &Value,
    pgdata: &str,
    wishes: &Wishes,
    config_secret: &str,
) -> Result<Environment, Rejection> {
    let field = |name: &str, path: &str| json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}});
    let plain = |name: &str, value: &str| json!({"name": name, "value": value});
    let mut env = vec![
        field("POD_NAME", "metadata.name"),
        field("POD_NAMESPACE", "metadata.namespace"),
        field("POD_UID", "metadata.uid"),
        plain(if may_come_from_elsewhere(container, wishes) { DEFAULT_PGDATA } else { "PGDATA" }, pgdata),
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
    if copied.iter().map(|entry| entry.to_string().len()).sum::<usize>() > MAX_COPIED_BYTES {
        return Err(Rejection::new(
            format!(
                "PostgreSQL's container has more than {} KiB of environment that pgsidecar needs",
                MAX_COPIED_BYTES >> 10
            ),
            "Take out what isn't for PostgreSQL, or put large values into a file.",
        ));
    }
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
    let has_static_keys = STATIC_KEYS.iter().any(|name| has(items(container, "env"), name));
    Ok(Environment { env, env_from, secrets, has_static_keys })
}

/// Whether `PGDATA` is only what the image has by default, and a ConfigMap or Secret that can't be seen here may hold
/// another. Our `env` would outrank that.
fn may_come_from_elsewhere(container: &Value, wishes: &Wishes) -> bool {
    wishes.pgdata.is_none() && !has(items(container, "env"), "PGDATA") && !items(container, "envFrom").is_empty()
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
    let has_identity =
        values.keys().any(|name| name.starts_with(POD_IDENTITY) || *name == "AWS_WEB_IDENTITY_TOKEN_FILE");
    // What isn't for ours, not even where something else refers to it.
    let is_foreign = |name: &str| match name {
        _ if REGION.contains(&name) => !has_identity,
        _ if name.starts_with("AWS_") => !IDENTITY.contains(&name) && !name.starts_with(POD_IDENTITY),
        _ => ELSEWHERE.contains(&name) || name.starts_with("PGSSL") || name.starts_with("PGGSS"),
    };
    let is_ours = |name: &str| COPIED.iter().any(|start| name.starts_with(start)) || name.starts_with("AWS_");
    let mut found: Vec<&str> = values.keys().copied().filter(|name| is_ours(name) && !is_foreign(name)).collect();
    found.extend(items(container, "volumeMounts").iter().flat_map(|mount| references(text(mount, "subPathExpr"))));
    let mut wanted: BTreeSet<&str> = BTreeSet::new();
    // Each once: a pod may have many thousand variables, and the webhook has to answer others too.
    while let Some(name) = found.pop() {
        if let Some(values) = values.get(name).filter(|_| wanted.insert(name)) {
            found.extend(values.iter().flat_map(|value| references(Some(value))));
        }
    }
    let (mut hidden, mut foreign) = (BTreeSet::new(), BTreeSet::new());
    for (name, entry) in &entries {
        let value = text(entry, "value").unwrap_or("");
        let refers_to = |names: &BTreeSet<&str>| references(Some(value)).iter().any(|name| names.contains(name));
        if is_foreign(name) || refers_to(&foreign) {
            foreign.insert(*name);
        }
        if is_secret(name, value) || refers_to(&hidden) {
            hidden.insert(*name);
        }
    }
    let needed = |name: &str| name.starts_with("PG") || name.starts_with("AWS_");
    let is_told =
        |name: &&str| wanted.contains(name) && hidden.contains(name) && !foreign.contains(name) && needed(name);
    let secrets: BTreeSet<&str> = entries.iter().map(|(name, _)| *name).filter(is_told).collect();
    let ours: BTreeSet<&str> = ours.iter().filter_map(|entry| text(entry, "name")).collect();
    let copied = entries
        .iter()
        .filter(|(name, _)| {
            wanted.contains(name) && !hidden.contains(name) && !foreign.contains(name) && !ours.contains(name)
        })
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
        } else if let Some(inner) = rest.strip_prefix('(') {
            // Without an end here there's none further on either.
            let Some((name, behind)) = inner.split_once(')') else { break };
            names.push(name);
            rest = behind;
        }
    }
    names
}

/// Whether a value that stands in the pod itself is a secret. Patches are audited, so they hold none.
fn is_secret(name: &str, value: &str) -> bool {
    const PARTS: [&str; 6] = ["PASS", "PWD", "SECRET", "TOKEN", "CREDENTIAL", "_KEY_"];
    const OF_ANOTHER_KIND: [&str; 7] = ["_FILE", "PASSFILE", "_ID", "_URI", "_ARN", "_PATH", "_METHOD"];
    if value.is_empty() {
        return false;
    }
    let (name, lower) = (name.to_ascii_uppercase(), value.to_ascii_lowercase());
    let names_one = PARTS.iter().any(|part| name.contains(part)) || name.ends_with("_KEY");
    let of_another_kind = OF_ANOTHER_KIND.iter().any(|end| name.ends_with(end));
    let has_one = lower.contains("password=") || (value.contains("://") && value.contains('@'));
    (names_one && !of_another_kind && references(Some(value)).is_empty()) || has_one
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(env: &[Value]) -> Vec<&str> {
        env.iter().filter_map(|entry| text(entry, "name")).collect()
    }

    fn of(container: Value) -> Environment {
        compose(&container, "/data", &Wishes::default(), "pgsidecar").unwrap()
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
            {"name": "POSTGRES_DB", "value": "shop $$(UNRELATED)"},
        ], "volumeMounts": [{"subPathExpr": "shards/$(SHARD)"}]}));
        let copied = &environment.env[11..];
        assert_eq!(names(copied), ["DB_USER", "SHARD", "POSTGRES_USER", "PGPASSWORD", "POSTGRES_DB", "PGUSER"]);
        assert_eq!(copied[3]["valueFrom"], from);
        assert_eq!(copied[5], json!({"name": "PGUSER", "value": "$(DB_USER)"}));
        assert!(environment.secrets.is_empty());
    }

    #[test]
    fn secrets_that_stand_in_the_pod_are_not_copied() {
        let environment = of(json!({"env": [
            {"name": "POSTGRES_PASSWORD", "value": "hunter2"},
            {"name": "PGPASSWORD", "value": "$(POSTGRES_PASSWORD)"},
            {"name": "AWS_CONTAINER_AUTHORIZATION_TOKEN", "value": "hunter2"},
            {"name": "AWS_WEB_IDENTITY_TOKEN_FILE", "value": "/var/run/token"},
            {"name": "POSTGRES_PASSWORD_FILE", "value": "/run/secrets/password"},
            {"name": "PGPASSFILE", "value": "/run/secrets/pgpass"},
            {"name": "PG_DSN", "value": "postgres://app:hunter2@db"},
            {"name": "POSTGRES_INITDB_ARGS", "value": ""},
            {"name": "PGSIDECAR_ENCRYPTION_KEY", "value": "hunter2"},
            {"name": "PG_ENCRYPTION_KEY_ID", "value": "7"},
            {"name": "PG_PASSPHRASE", "value": "hunter2"},
            {"name": "PG_PWD", "value": "hunter2"},
            {"name": "PG_pass", "value": "hunter2"},
            {"name": "POSTGRES_PASS", "value": "hunter2"},
            {"name": "PG_CONNECTION", "value": "host=db PASSWORD=hunter2"},
        ]}));
        let copied = &environment.env[11..];
        let expected = ["AWS_WEB_IDENTITY_TOKEN_FILE", "POSTGRES_PASSWORD_FILE", "PGPASSFILE", "POSTGRES_INITDB_ARGS"];
        assert_eq!(names(copied)[..4], expected);
        assert_eq!(names(copied)[4..], ["PG_ENCRYPTION_KEY_ID"]);
        let told = ["AWS_CONTAINER_AUTHORIZATION_TOKEN", "PGPASSWORD", "PGSIDECAR_ENCRYPTION_KEY", "PG_CONNECTION"];
        assert_eq!(environment.secrets[..4], told);
        assert_eq!(environment.secrets[4..], ["PG_DSN", "PG_PASSPHRASE", "PG_PWD", "PG_pass"]);
    }

    #[test]
    fn of_aws_only_an_identity_is_copied_and_a_region_with_it() {
        let plain = |name: &str| json!({"name": name, "value": "x"});
        let others = ["AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION"];
        let mut env: Vec<Value> = others.map(plain).into();
        let key = json!({"secretKeyRef": {"name": "wal-g", "key": "secret"}});
        env.push(json!({"name": "AWS_SECRET_ACCESS_KEY", "valueFrom": key}));
        // Nor by a reference.
        env.push(json!({"name": "PG_PLACE", "value": "$(AWS_REGION)"}));
        let environment = of(json!({"env": env}));
        assert!(environment.has_static_keys && environment.secrets.is_empty());
        assert_eq!(names(&environment.env[11..]), [] as [&str; 0]);
        for identity in ["AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_FULL_URI"] {
            let env = [&env[..], &[plain("AWS_ROLE_ARN"), plain(identity)]].concat();
            let environment = of(json!({"env": env}));
            let expected = ["AWS_REGION", "AWS_DEFAULT_REGION", "PG_PLACE", "AWS_ROLE_ARN", identity];
            assert_eq!(names(&environment.env[11..]), expected);
        }
    }

    #[test]
    fn what_would_lead_the_connection_elsewhere_is_not_copied() {
        let env = ["PGHOSTADDR", "PGSERVICE", "PGSERVICEFILE", "PGOPTIONS", "PGREQUIREAUTH", "PGSSLMODE", "PGDATABASE"];
        let environment = of(json!({"env": env.map(|name| json!({"name": name, "value": "x"}))}));
        assert_eq!(names(&environment.env[11..]), ["PGDATABASE"]);
    }

    #[test]
    fn a_data_directory_that_may_come_from_a_config_map_is_only_a_default() {
        let from = json!([{"configMapRef": {"name": "db"}}]);
        let said = json!([{"name": "PGDATA", "value": "/data"}]);
        let of = |container: Value, wishes: &Wishes| {
            let environment = compose(&container, "/data", wishes, "pgsidecar").unwrap();
            ["PGDATA", DEFAULT_PGDATA].map(|name| {
                let entry = environment.env.iter().find(|entry| text(entry, "name") == Some(name));
                entry.and_then(|entry| text(entry, "value")) == Some("/data")
            })
        };
        let annotated = Wishes { pgdata: Some("/data".into()), ..Wishes::default() };
        assert_eq!(of(json!({"envFrom": from}), &Wishes::default()), [false, true]);
        assert_eq!(of(json!({"envFrom": from}), &annotated), [true, false]);
        assert_eq!(of(json!({"envFrom": from, "env": said}), &Wishes::default()), [true, false]);
        assert_eq!(of(json!({"envFrom": []}), &Wishes::default()), [true, false]);
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
    fn neither_long_chains_nor_what_has_no_end_take_a_long_time() {
        let link = |index: usize| json!({"name": format!("X{index}"), "value": format!("$(X{})", index + 1)});
        let mut env: Vec<Value> = (0..900).map(link).collect();
        env.push(json!({"name": "PGUSER", "value": "$(X0)"}));
        assert_eq!(of(json!({"env": env})).env.len(), 11 + 901);

        let begun = std::time::Instant::now();
        let value = "$(".repeat(500_000);
        assert_eq!(references(Some(&value)), [] as [&str; 0]);
        let rejection =
            compose(&json!({"env": [{"name": "PGUSER", "value": value}]}), "/data", &Wishes::default(), "s");
        assert!(rejection.is_err_and(|rejection| rejection.problem.contains("128 KiB")));
        assert!(begun.elapsed().as_secs() < 5, "{:?}", begun.elapsed());
    }
}
