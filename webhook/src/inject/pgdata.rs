//! Where the data are.

use serde_json::{Value, json};

use super::{
    Rejection,
    annotations::{Wishes, absolute},
    environment::DEFAULT_PGDATA,
    images::{self, Image},
    view::{items, named, plain_variable, text},
    volumes::{hides_programs, is_same, is_within, parts},
};

/// `PGDATA`, as PostgreSQL's container sees it. `ours` is our own container, if the pod was injected already: another
/// webhook may have given the image another name since.
///
/// # Errors
/// If it can't be told, or two that say it contradict each other.
pub(super) fn find(
    container: &Value,
    ours: Option<&Value>,
    wishes: &Wishes,
    image: Option<&Image>,
) -> Result<String, Rejection> {
    let variable = variable(container);
    let pgdata = match (&wishes.pgdata, &variable) {
        (Some(said), Some(Ok(variable))) if !is_same(said, variable) => {
            return Err(Rejection::new(
                format!("the annotation pgsidecar.dev/pgdata is {said}, but the container's PGDATA is {variable}"),
                "Take the annotation out, or correct it.",
            ));
        }
        (Some(said), _) => Some(said.clone()),
        (None, Some(variable)) => Some(variable.clone()?),
        (None, None) => image.and_then(|image| image.pgdata.clone()),
    };
    // Ours take the default only where there's no PGDATA.
    let names = if variable.is_some() { &["PGDATA"][..] } else { &["PGDATA", DEFAULT_PGDATA] };
    let before = ours.and_then(|ours| names.iter().find_map(|name| plain_variable(ours, name)));
    match (pgdata, before) {
        (Some(pgdata), Some(before)) if !is_same(&pgdata, before) => Err(Rejection::new(
            format!("pgsidecar was injected when PGDATA was {before}, and now it's {pgdata}"),
            "Set PGDATA in the pod template, so that it's there from the beginning; a template that was injected already has to be made anew.",
        )),
        (Some(pgdata), _) => Ok(pgdata),
        (None, Some(before)) => Ok(before.to_owned()),
        (None, None) => {
            let name = text(container, "image").unwrap_or("");
            let problem = format!(
                "it can't be told where the data are: the image {:?} doesn't tell its version",
                name.chars().take(200).collect::<String>()
            );
            Err(Rejection::new(
                problem,
                "Set PGDATA in the container's env (or the annotation pgsidecar.dev/pgdata), or name a major version in the image's tag.",
            ))
        }
    }
}

/// `PGDATA` in the container's `env`, if it's there.
fn variable(container: &Value) -> Option<Result<String, Rejection>> {
    // Of several entries of one name Kubernetes takes the last.
    let entry = items(container, "env").iter().rev().find(|entry| text(entry, "name") == Some("PGDATA"))?;
    let value = text(entry, "value").unwrap_or("");
    Some(absolute(value).map_err(|problem| {
        let problem = if entry.get("valueFrom").is_some_and(|from| !from.is_null()) {
            "PGDATA comes from elsewhere (valueFrom), and can't be read here".to_owned()
        } else {
            format!("PGDATA: {problem}")
        };
        Rejection::new(problem, "Say where the data are in the annotation pgsidecar.dev/pgdata.")
    }))
}

/// Checks that the data are on a volume that ours can write to. Returns whether they are lost with the pod.
///
/// # Errors
/// If they aren't.
pub(super) fn check(pod: &Value, container: &Value, pgdata: &str, image: Option<&Image>) -> Result<bool, Rejection> {
    let Some((path, mount)) = nearest(container, pgdata) else {
        let at =
            image.and_then(|image| image.major).filter(|&major| major >= 18 && pgdata == images::default_pgdata(major));
        let hint = if at.is_some() { " From PostgreSQL 18 on, the image wants it at /var/lib/postgresql." } else { "" };
        return Err(Rejection::new(
            format!(
                "PGDATA {pgdata} isn't on a volume of the pod, so the data are lost with the container and can't be seen from another"
            ),
            format!("Mount a volume at {pgdata} or above it, or correct the annotation pgsidecar.dev/pgdata.{hint}"),
        ));
    };
    // What stands there is an empty volume of the runtime's, seen by PostgreSQL alone.
    if let Some(hides) = hidden_by(image.map_or(&[], |image| image.volumes), pgdata, path) {
        return Err(Rejection::new(
            format!(
                "PGDATA {pgdata} isn't on the volume that is mounted at {path}: the image has a volume of its own at {hides} (VOLUME), which is lost with the container"
            ),
            format!("Mount the volume at {hides}."),
        ));
    }
    if hides_programs(path) {
        return Err(Rejection::new(
            format!(
                "PGDATA {pgdata} is on the volume that is mounted at {path}, which would hide pgsidecar's programs"
            ),
            "Mount the volume elsewhere, at /var/lib/postgresql for instance.",
        ));
    }
    let name = text(mount, "name").unwrap_or("");
    // In a template of a StatefulSet, claims aren't among the volumes.
    let volume = pod.get("spec").and_then(|spec| named(items(spec, "volumes"), name));
    let is = |kind: &str| volume.is_some_and(|volume| volume.get(kind).is_some_and(|source| !source.is_null()));
    let claim_read_only = volume.and_then(|volume| volume.get("persistentVolumeClaim")?.get("readOnly")?.as_bool());
    let fixed = ["configMap", "secret", "projected", "downwardAPI", "image"].into_iter().any(is);
    if fixed || mount.get("readOnly") == Some(&json!(true)) || claim_read_only == Some(true) {
        return Err(Rejection::new(
            format!("PGDATA {pgdata} is on the volume {name:?}, mounted at {path}, which is read-only"),
            "Mount a volume there that can be written to.",
        ));
    }
    Ok(is("emptyDir") || is("ephemeral"))
}

/// What to warn of where the image isn't known: most are made of the official one, with its `VOLUME`.
pub(super) fn may_be_hidden(container: &Value, pgdata: &str, image: Option<&Image>) -> Option<String> {
    let (path, _) = nearest(container, pgdata).filter(|_| image.is_none())?;
    let hides = hidden_by(images::VOLUMES, pgdata, path)?;
    Some(format!("if the image has VOLUME {hides}, the data are lost with the container: mount the volume there"))
}

/// The mount that the data are on.
fn nearest<'a>(container: &'a Value, pgdata: &str) -> Option<(&'a str, &'a Value)> {
    let mounts = items(container, "volumeMounts").iter().filter_map(|mount| Some((text(mount, "mountPath")?, mount)));
    mounts.filter(|(path, _)| is_within(pgdata, path)).max_by_key(|(path, _)| parts(path).len())
}

/// Which of an image's volumes stands between the data and what is mounted at `path`.
fn hidden_by(volumes: &[&'static str], pgdata: &str, path: &str) -> Option<&'static str> {
    let between = |volume: &&&str| is_within(pgdata, volume) && is_within(volume, path) && !is_same(volume, path);
    volumes.iter().rev().find(between).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_are_on_the_volume_that_is_mounted_nearest() {
        let pod = json!({"spec": {"volumes": [
            {"name": "config", "configMap": {"name": "x"}},
            {"name": "scratch", "emptyDir": {}},
            {"name": "claim", "persistentVolumeClaim": {"claimName": "x"}},
            {"name": "fixed", "persistentVolumeClaim": {"claimName": "x", "readOnly": true}},
        ]}});
        let of = |mounts: Value| {
            check(&pod, &json!({"volumeMounts": mounts}), "/var/lib/pg/data", None)
                .map_err(|rejection| rejection.problem.chars().take(60).collect::<String>())
        };
        let mount = |name: &str, path: &str| json!({"name": name, "mountPath": path});
        assert_eq!(of(json!([mount("scratch", "/"), mount("claim", "/var/lib/pg/")])), Ok(false));
        assert_eq!(of(json!([mount("claim", "/var"), mount("scratch", "/var/lib/pg/data")])), Ok(true));
        assert_eq!(of(json!([mount("template", "/var/lib/pg")])), Ok(false));
        assert!(of(json!([mount("claim", "/var/lib/p"), mount("claim", "/var/lib/pg/data/base")])).is_err());
        assert!(of(json!([mount("config", "/var/lib/pg")])).unwrap_err().contains("is on the volume"));
        assert!(of(json!([mount("fixed", "/var/lib/pg")])).unwrap_err().contains("is on the volume"));
        let read_only = json!([{"name": "claim", "mountPath": "/var/lib/pg", "readOnly": true}]);
        assert!(of(read_only).unwrap_err().contains("is on the volume"));
    }

    #[test]
    fn of_several_entries_the_last_counts_as_for_kubernetes() {
        let env = json!([{"name": "PGDATA", "value": "/first"}, {"name": "PGDATA", "value": "/last"}]);
        assert_eq!(find(&json!({"env": env}), None, &Wishes::default(), None), Ok("/last".to_owned()));
    }

    #[test]
    fn those_that_say_where_the_data_are_do_not_contradict_each_other() {
        let with = |path: &str| json!({"env": [{"name": "PGDATA", "value": path}]});
        let from = json!({"env": [{"name": "PGDATA", "valueFrom": {"fieldRef": {"fieldPath": "x"}}}]});
        let none = json!({});
        let image = images::look_up("postgres:17");
        let of = |container: &Value, ours: Option<&Value>, said: Option<&str>| {
            let wishes = Wishes { pgdata: said.map(str::to_owned), ..Wishes::default() };
            find(container, ours, &wishes, image.as_ref()).ok()
        };
        assert_eq!(of(&with("/a"), None, Some("/a/")).as_deref(), Some("/a/"));
        assert_eq!(of(&with("/a"), None, Some("/b")), None);
        assert_eq!(of(&from, None, Some("/b")).as_deref(), Some("/b"));
        assert_eq!(of(&none, None, Some("/b")).as_deref(), Some("/b"));
        // Once more, after another webhook.
        assert_eq!(of(&with("/a"), Some(&with("/a")), None).as_deref(), Some("/a"));
        assert_eq!(of(&with("/a"), Some(&with("/b")), None), None);
        assert_eq!(of(&none, Some(&with("/b")), None), None);
        assert_eq!(find(&none, Some(&with("/b")), &Wishes::default(), None), Ok("/b".to_owned()));
        let default = json!({"env": [{"name": "PGSIDECAR_DEFAULT_PGDATA", "value": "/b"}]});
        assert_eq!(find(&none, Some(&default), &Wishes::default(), None), Ok("/b".to_owned()));
    }

    #[test]
    fn they_are_not_where_our_programs_would_be_hidden() {
        let pgdata = "/usr/lib/pg/data";
        let mount = json!({"volumeMounts": [{"name": "claim", "mountPath": "/usr/lib/pg"}]});
        let refused = check(&json!({}), &mount, pgdata, None).unwrap_err();
        assert!(refused.problem.contains("would hide"), "{refused}");
    }

    #[test]
    fn an_unknown_image_may_have_a_volume_as_well() {
        let warned = |path: &str, pgdata: &str, image: &str| {
            let container = json!({"volumeMounts": [{"name": "data", "mountPath": path}]});
            let warning = may_be_hidden(&container, pgdata, images::look_up(image).as_ref());
            assert!(warning.as_ref().is_none_or(|warning| warning.len() <= 120), "{warning:?}");
            warning.is_some()
        };
        let (unknown, data) = ("someone/postgres:1", "/var/lib/postgresql/data");
        assert!(warned("/var/lib/postgresql", data, unknown));
        assert!(warned("/var/lib", "/var/lib/postgresql/18/docker", unknown));
        assert!(!warned(data, "/var/lib/postgresql/data/pgdata", unknown));
        assert!(!warned("/srv", "/srv/pg", unknown));
        assert!(!warned("/var/lib/postgresql", "/var/lib/postgresql/18/docker", unknown));
        assert!(!warned("/var/lib/postgresql", data, "timescale/timescaledb-ha:pg17"));
    }
}
