//! What the pod's annotations ask for. They are read once, and all that is wrong with them is told together.

use std::{fmt::Display, str::FromStr};

use pgsidecar_core::{
    ClusterName,
    prepare::{OnEmpty, OneTimeRequest, Replicas},
    retention::{DumpCounts, RecoveryWindow, Redundancy},
    schedule::{CronExpression, parse_time_zone},
    settings::{CloneSource, RepositoryUrl},
};
use serde_json::Value;

use super::{Mode, Rejection, reference, resources};

/// What all of them begin with.
const PREFIX: &str = "pgsidecar.dev/";

/// The longest grace period: a day.
const LONGEST_GRACE_SECONDS: u64 = 86_400;

/// The longest value of an annotation of ours, in bytes.
const LONGEST_VALUE: usize = 8 << 10;
/// So many problems are told at once.
const MOST_PROBLEMS: usize = 50;

/// What was asked for, checked.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Wishes {
    pub(super) container: Option<String>,
    pub(super) pgdata: Option<String>,
    pub(super) user: Option<u32>,
    pub(super) group: Option<u32>,
    /// `fs-group: skip`
    pub(super) skips_fs_group: bool,
    /// `None` for `auto`
    pub(super) mode: Option<Mode>,
    pub(super) config_secret: Option<String>,
    /// `postgres-args: skip`
    pub(super) skips_arguments: bool,
    pub(super) image: Option<String>,
    /// A `ResourceRequirements`.
    pub(super) resources: Option<Value>,
    pub(super) grace_seconds: Option<u64>,
    /// Settings of the sidecar, by their names in its environment.
    pub(super) settings: Vec<(&'static str, String)>,
}

/// The annotations that are settings of the sidecar, with the variable and the sidecar's own parser.
const SETTINGS: [(&str, &str, Check); 16] = [
    ("repository", "PGSIDECAR_REPOSITORY", parses::<RepositoryUrl>),
    ("cluster", "PGSIDECAR_CLUSTER", parses::<ClusterName>),
    ("on-empty", "PGSIDECAR_ON_EMPTY", parses::<OnEmpty>),
    ("restore", "PGSIDECAR_RESTORE", parses::<OneTimeRequest>),
    ("clone-from", "PGSIDECAR_CLONE_FROM", parses::<CloneSource>),
    ("replicas", "PGSIDECAR_REPLICAS", parses::<Replicas>),
    ("schedule", "PGSIDECAR_SCHEDULE_FULL", parses::<CronExpression>),
    ("differential-schedule", "PGSIDECAR_SCHEDULE_DIFFERENTIAL", parses::<CronExpression>),
    ("incremental-schedule", "PGSIDECAR_SCHEDULE_INCREMENTAL", parses::<CronExpression>),
    ("dump-schedule", "PGSIDECAR_SCHEDULE_DUMP", parses::<CronExpression>),
    ("verify-schedule", "PGSIDECAR_SCHEDULE_VERIFY", parses::<CronExpression>),
    ("prune-schedule", "PGSIDECAR_SCHEDULE_PRUNE", parses::<CronExpression>),
    ("time-zone", "PGSIDECAR_SCHEDULE_TIME_ZONE", is_time_zone),
    ("retention", "PGSIDECAR_RETENTION_WINDOW", parses::<RecoveryWindow>),
    ("retention-redundancy", "PGSIDECAR_RETENTION_REDUNDANCY", parses::<Redundancy>),
    ("retention-dumps", "PGSIDECAR_RETENTION_DUMPS", parses::<DumpCounts>),
];

/// The annotations that say what is injected.
const OTHERS: [&str; 12] = [
    "container",
    "pgdata",
    "run-as-user",
    "run-as-group",
    "fs-group",
    "mode",
    "config-secret",
    "postgres-args",
    "image",
    "resources",
    "grace-seconds",
    "status",
];

type Check = fn(&str) -> Result<(), String>;

fn parses<T: FromStr<Err: Display>>(text: &str) -> Result<(), String> {
    text.parse::<T>().map(drop).map_err(|problem| problem.to_string())
}

fn is_time_zone(text: &str) -> Result<(), String> {
    parse_time_zone(text).map(drop).map_err(|problem| problem.to_string())
}

impl Wishes {
    /// Reads the annotations of a pod.
    ///
    /// # Errors
    /// All that is wrong with them.
    pub(super) fn read(pod: &Value) -> Result<Wishes, Rejection> {
        let mut wishes = Wishes::default();
        let mut problems = Vec::new();
        let annotations = pod.get("metadata").and_then(|metadata| metadata.get("annotations"));
        for (key, value) in annotations.and_then(Value::as_object).into_iter().flatten() {
            let Some(name) = key.strip_prefix(PREFIX) else { continue };
            if problems.len() >= MOST_PROBLEMS {
                problems.push("and so on".to_owned());
                break;
            }
            let key = short(key);
            let Some(value) = value.as_str() else {
                problems.push(format!("{key}: its value is not a text"));
                continue;
            };
            if value.len() > LONGEST_VALUE {
                problems.push(format!("{key}: its value is longer than {} KiB", LONGEST_VALUE >> 10));
                continue;
            }
            if let Err(problem) = wishes.take(name, value) {
                problems.push(format!("{key}: {problem}"));
            }
        }
        if let Some(problem) = wishes.clones_itself() {
            problems.push(format!("{PREFIX}clone-from: {problem}"));
        }
        if problems.is_empty() {
            return Ok(wishes);
        }
        Err(Rejection::new(
            problems.join("; "),
            "Correct the annotations of the pod template; docs/injection.md lists them.",
        ))
    }

    /// The value of a setting of the sidecar.
    pub(super) fn setting(&self, variable: &str) -> Option<&str> {
        self.settings.iter().find(|(name, _)| *name == variable).map(|(_, value)| value.as_str())
    }

    /// Which annotations ask for something to be restored before PostgreSQL starts.
    pub(super) fn restores(&self) -> Option<&'static str> {
        if self.setting("PGSIDECAR_RESTORE").is_some() {
            return Some("pgsidecar.dev/restore");
        }
        if self.setting("PGSIDECAR_CLONE_FROM").is_some() {
            return Some("pgsidecar.dev/clone-from");
        }
        let heals = self.setting("PGSIDECAR_ON_EMPTY").and_then(|text| text.parse().ok()) == Some(OnEmpty::Restore);
        heals.then_some("pgsidecar.dev/on-empty: restore")
    }

    fn take(&mut self, name: &str, value: &str) -> Result<(), String> {
        if let Some((_, variable, check)) = SETTINGS.into_iter().find(|(annotation, _, _)| *annotation == name) {
            check(value)?;
            self.settings.push((variable, value.to_owned()));
            return Ok(());
        }
        match name {
            "container" => self.container = Some(dns_name(value, 63)?),
            "pgdata" => self.pgdata = Some(absolute(value)?),
            "run-as-user" => self.user = Some(id(value)?),
            "run-as-group" => self.group = Some(id(value)?),
            "fs-group" => self.skips_fs_group = one_of(value, [("add", false), ("skip", true)])?,
            "mode" => {
                let modes = [("auto", None), ("native", Some(Mode::Native)), ("classic", Some(Mode::Classic))];
                self.mode = one_of(value, modes)?;
            }
            "config-secret" => self.config_secret = Some(dns_name(value, 253)?),
            "postgres-args" => self.skips_arguments = one_of(value, [("auto", false), ("skip", true)])?,
            "image" => self.image = Some(image(value)?),
            "resources" => self.resources = Some(resources::parse(value)?),
            "grace-seconds" => self.grace_seconds = Some(number(value, 1, LONGEST_GRACE_SECONDS)?),
            "status" => {}
            "inject" => return Err("it is a label of the pod, not an annotation".to_owned()),
            unknown => return Err(unknown_name(unknown)),
        }
        Ok(())
    }

    fn clones_itself(&self) -> Option<String> {
        let source: CloneSource = self.setting("PGSIDECAR_CLONE_FROM")?.parse().ok()?;
        let repository: RepositoryUrl = self.setting("PGSIDECAR_REPOSITORY")?.parse().ok()?;
        let cluster: ClusterName = self.setting("PGSIDECAR_CLUSTER")?.parse().ok()?;
        let same = source.repository.is_same_place(&source.cluster, &repository, &cluster);
        same.then(|| format!("{source} is this database's own place; a clone needs another cluster or repository"))
    }
}

fn unknown_name(name: &str) -> String {
    let known = OTHERS.into_iter().chain(SETTINGS.map(|(name, _, _)| name));
    let plain = |name: &str| name.replace(['-', '_'], "").to_ascii_lowercase();
    match known.into_iter().find(|known| plain(known) == plain(name)) {
        Some(meant) => format!("there is no such annotation ({PREFIX}{meant} is meant)"),
        None => "there is no such annotation".to_owned(),
    }
}

fn short(text: &str) -> String {
    text.chars().take(80).collect()
}

fn one_of<T, const N: usize>(value: &str, words: [(&str, T); N]) -> Result<T, String> {
    let names = words.each_ref().map(|(word, _)| *word).join(", ");
    let found = words.into_iter().find(|(word, _)| *word == value);
    found.map(|(_, meaning)| meaning).ok_or_else(|| format!("{:?} is none of {names}", short(value)))
}

fn number(value: &str, low: u64, high: u64) -> Result<u64, String> {
    let number = value.parse().ok().filter(|number| (low..=high).contains(number));
    number.ok_or_else(|| format!("{:?} is not a number from {low} to {high}", short(value)))
}

fn id(value: &str) -> Result<u32, String> {
    // Kubernetes' bounds, without root: nothing of ours runs as root.
    let number = number(value, 1, 0x7fff_ffff)?;
    u32::try_from(number).map_err(|problem| problem.to_string())
}

fn dns_name(value: &str, longest: usize) -> Result<String, String> {
    let label = |label: &str| {
        let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        !label.is_empty() && label.bytes().all(inner) && !label.starts_with('-') && !label.ends_with('-')
    };
    let labels = if longest > 63 { value.split('.').all(label) } else { label(value) };
    let fits = value.len() <= longest && labels;
    fits.then(|| value.to_owned()).ok_or_else(|| format!("{:?} is not a name in Kubernetes", short(value)))
}

fn image(value: &str) -> Result<String, String> {
    reference::is_image(value).then(|| value.to_owned()).ok_or_else(|| format!("{:?} is not an image", short(value)))
}

/// An absolute path of which each part means itself.
pub(super) fn absolute(value: &str) -> Result<String, String> {
    let literal = !value.contains("$(") && !value.chars().any(char::is_control);
    let plain = value.starts_with('/') && !value.split('/').any(|part| part == "..");
    let fits = literal && plain && value.len() <= 1024;
    fits.then(|| value.to_owned()).ok_or_else(|| format!("{:?} is not an absolute path", short(value)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(annotations: Value) -> Result<Wishes, String> {
        Wishes::read(&json!({"metadata": {"annotations": annotations}})).map_err(|rejection| rejection.problem)
    }

    #[test]
    fn all_of_them_are_understood() {
        let wishes = read(json!({
            "example.com/other": "x",
            "pgsidecar.dev/clone-from": "s3://backups?cluster=shop/db",
            "pgsidecar.dev/cluster": "shop/copy",
            "pgsidecar.dev/config-secret": "backup.settings",
            "pgsidecar.dev/container": "main",
            "pgsidecar.dev/differential-schedule": "0 2 * * 1-6",
            "pgsidecar.dev/dump-schedule": "0 3 * * *",
            "pgsidecar.dev/fs-group": "skip",
            "pgsidecar.dev/grace-seconds": "600",
            "pgsidecar.dev/image": format!("registry.example.com:5000/pgsidecar:1@sha256:{}", "0".repeat(64)),
            "pgsidecar.dev/incremental-schedule": "0 * * * *",
            "pgsidecar.dev/mode": "classic",
            "pgsidecar.dev/on-empty": "restore",
            "pgsidecar.dev/pgdata": "/data/pg",
            "pgsidecar.dev/postgres-args": "skip",
            "pgsidecar.dev/prune-schedule": "0 4 * * *",
            "pgsidecar.dev/replicas": "refuse",
            "pgsidecar.dev/repository": "s3://backups",
            "pgsidecar.dev/resources": "{\"limits\": {\"memory\": \"1Gi\"}}",
            "pgsidecar.dev/restore": "id=a latest",
            "pgsidecar.dev/retention": "14d",
            "pgsidecar.dev/retention-dumps": "daily=7",
            "pgsidecar.dev/retention-redundancy": "2",
            "pgsidecar.dev/run-as-group": "27",
            "pgsidecar.dev/run-as-user": "26",
            "pgsidecar.dev/schedule": "0 2 * * 0",
            "pgsidecar.dev/status": "ours",
            "pgsidecar.dev/time-zone": "Europe/Berlin",
            "pgsidecar.dev/verify-schedule": "0 5 * * 0",
        }))
        .unwrap();
        assert_eq!((wishes.user, wishes.group, wishes.grace_seconds), (Some(26), Some(27), Some(600)));
        assert!(wishes.skips_fs_group && wishes.skips_arguments && wishes.mode == Some(Mode::Classic));
        assert_eq!(wishes.settings.len(), SETTINGS.len());
        assert_eq!(wishes.setting("PGSIDECAR_SCHEDULE_FULL"), Some("0 2 * * 0"));
        assert_eq!(wishes.restores(), Some("pgsidecar.dev/restore"));
    }

    #[test]
    fn all_that_is_wrong_is_told_at_once() {
        let mut wrong = json!({
            "pgsidecar.dev/": "x",
            "pgsidecar.dev/onEmpty": "restore",
            "pgsidecar.dev/inject": "true",
            "pgsidecar.dev/whatever": "x",
            "pgsidecar.dev/run-as-user": "0",
            "pgsidecar.dev/run-as-group": "-1",
            "pgsidecar.dev/mode": "new",
            "pgsidecar.dev/pgdata": "/data/../etc",
            "pgsidecar.dev/container": "a.b",
            "pgsidecar.dev/config-secret": "Ä",
            "pgsidecar.dev/image": "a b",
            "pgsidecar.dev/grace-seconds": "10m",
            "pgsidecar.dev/resources": "{}x",
            "pgsidecar.dev/fs-group": "",
            "pgsidecar.dev/postgres-args": true,
        });
        for (name, _, _) in SETTINGS {
            wrong[format!("{PREFIX}{name}")] = json!("nonsense!");
        }
        let problems = read(wrong).unwrap_err();
        insta::assert_snapshot!(problems.replace("; pgsidecar.dev", "\npgsidecar.dev"));
    }

    #[test]
    fn very_many_or_very_long_ones_are_told_in_short() {
        let many: serde_json::Map<String, Value> =
            (0..10_000).map(|index| (format!("{PREFIX}x{index}{}", "x".repeat(200)), json!("x"))).collect();
        let problems = read(Value::Object(many)).unwrap_err();
        assert!(problems.len() < 10_000 && problems.ends_with("; and so on"), "{problems}");
        let problems = read(json!({"pgsidecar.dev/schedule": "0 ".repeat(500_000)})).unwrap_err();
        assert_eq!(problems, "pgsidecar.dev/schedule: its value is longer than 8 KiB");
    }

    #[test]
    fn every_annotation_is_in_the_documentation_and_no_other() {
        let text = include_str!("../../../docs/injection.md");
        let (_, table) = text.split_once("\n## Annotations\n").unwrap();
        let (table, _) = table.split_once("\n## ").unwrap();
        let rows = table.lines().filter(|line| line.starts_with("| `"));
        let mut documented: Vec<(&str, Option<&str>)> = Vec::new();
        for row in rows {
            let cells: Vec<&str> = row.split('|').map(str::trim).collect();
            let variable = cells[3].trim_matches('`').starts_with("PGSIDECAR_").then(|| cells[3].trim_matches('`'));
            documented.extend(cells[1].split(", ").map(|name| (name.trim_matches('`'), variable)));
        }
        let others = OTHERS.into_iter().filter(|name| *name != "status").map(|name| (name, None));
        let mut known: Vec<(&str, Option<&str>)> =
            SETTINGS.iter().map(|(name, variable, _)| (*name, Some(*variable))).chain(others).collect();
        documented.sort_unstable();
        known.sort_unstable();
        assert_eq!(documented, known);
    }

    #[test]
    fn a_clone_has_another_place_than_its_source() {
        let problem = read(json!({
            "pgsidecar.dev/repository": "s3://backups",
            "pgsidecar.dev/cluster": "shop/db",
            "pgsidecar.dev/clone-from": "s3://backups?cluster=shop/db",
        }));
        assert!(problem.unwrap_err().contains("own place"));
    }
}
