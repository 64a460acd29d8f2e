//! What PostgreSQL runs as, and so what ours run as: its files belong to it, and it reads theirs.

use serde_json::{Value, json};

use super::{Rejection, annotations::Wishes, images::Image};

/// User and group, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) user: u64,
    pub(super) group: u64,
}

/// What PostgreSQL runs as in this container. `ours` is our own, if the pod was injected already: another webhook may
/// have given the image another name since.
///
/// # Errors
/// If it can't be told.
pub(super) fn find(
    pod: &Value,
    container: &Value,
    ours: Option<&Value>,
    wishes: &Wishes,
    image: Option<&Image>,
) -> Result<Identity, Rejection> {
    let said = |name: &str| {
        let of = |value: &Value| value.get("securityContext")?.get(name)?.as_u64();
        of(container).or_else(|| pod.get("spec").and_then(of))
    };
    let before = |name: &str| ours?.get("securityContext")?.get(name)?.as_u64();
    let of_image = image.and_then(|image| image.user);
    // As root the entrypoint steps down to the image's own user.
    let user = wishes.user.map(u64::from).or_else(|| said("runAsUser").filter(|&user| user != 0));
    let user = user.or(of_image.map(|(user, _)| u64::from(user)));
    // Nothing of ours is root.
    let user = user.or_else(|| before("runAsUser").filter(|&user| user != 0)).ok_or_else(|| {
        let name = container.get("image").and_then(Value::as_str).unwrap_or("");
        Rejection::new(
            format!("it can't be told which user PostgreSQL runs as in the image {:?}", name.chars().take(200).collect::<String>()),
            "Say it in the annotation pgsidecar.dev/run-as-user, with the number that 'id -u postgres' prints in the container.",
        )
    })?;
    let steps_down = said("runAsUser") == Some(0);
    let said_group = said("runAsGroup").filter(|&group| group != 0 || !steps_down);
    let of_image = of_image.filter(|(of_image, _)| u64::from(*of_image) == user).map(|(_, group)| u64::from(group));
    // A user of the pod's own making has a group that the image doesn't know.
    let group = wishes.group.map(u64::from).or(said_group).or(of_image);
    let of_ours = before("runAsGroup").filter(|_| before("runAsUser") == Some(user));
    let group = group.or(of_ours).or_else(|| fs_group(pod)).unwrap_or(user);
    Ok(Identity { user, group })
}

/// The group that volumes belong to, if the pod says so.
pub(super) fn fs_group(pod: &Value) -> Option<u64> {
    pod.get("spec")?.get("securityContext")?.get("fsGroup")?.as_u64()
}

/// Whether the pod says which group volumes belong to, in whatever way.
pub(super) fn has_fs_group(pod: &Value) -> bool {
    pod.pointer("/spec/securityContext/fsGroup").is_some_and(|group| !group.is_null())
}

/// The security context of our containers: that of the "restricted" Pod Security Standard, and a read-only root.
pub(super) fn security_context(identity: Identity) -> Value {
    json!({
        "allowPrivilegeEscalation": false,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": true,
        "runAsGroup": identity.group,
        "runAsNonRoot": true,
        "runAsUser": identity.user,
        "seccompProfile": {"type": "RuntimeDefault"},
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inject::images::look_up;

    #[test]
    fn the_nearest_word_counts_and_root_steps_down() {
        let of = |image: &str, pod: Value, container: Value, wishes: Wishes| {
            let pod = json!({"spec": {"securityContext": pod}});
            let container = json!({"securityContext": container});
            let found = find(&pod, &container, None, &wishes, look_up(image).as_ref());
            found.map(|found| (found.user, found.group)).map_err(|rejection| rejection.problem)
        };
        let none = || json!({});
        let wishes = Wishes::default;
        assert_eq!(of("postgres:17", none(), none(), wishes()), Ok((999, 999)));
        assert_eq!(of("postgres:17-alpine", none(), none(), wishes()), Ok((70, 70)));
        assert_eq!(of("postgres:17", json!({"runAsUser": 1}), none(), wishes()), Ok((1, 1)));
        assert_eq!(of("postgres:17", json!({"runAsUser": 1, "fsGroup": 2}), none(), wishes()), Ok((1, 2)));
        assert_eq!(of("postgres:17", json!({"runAsUser": 999, "fsGroup": 2}), none(), wishes()), Ok((999, 999)));
        assert_eq!(
            of("postgres:17", json!({"runAsUser": 1}), json!({"runAsUser": 3, "runAsGroup": 0}), wishes()),
            Ok((3, 0))
        );
        assert_eq!(
            of("postgres:17", json!({"runAsUser": 1}), json!({"runAsUser": 0, "runAsGroup": 0}), wishes()),
            Ok((999, 999))
        );
        let wishes = Wishes { user: Some(5), group: Some(6), ..Wishes::default() };
        assert_eq!(of("postgres:17", json!({"runAsUser": 1}), none(), wishes.clone()), Ok((5, 6)));
        assert_eq!(of("someone/postgres:17", none(), none(), wishes), Ok((5, 6)));
        assert!(of("someone/postgres:17", none(), none(), Wishes::default()).is_err());
        let ours = json!({"securityContext": {"runAsUser": 7, "runAsGroup": 8}});
        let found = find(&none(), &none(), Some(&ours), &Wishes::default(), None);
        assert_eq!(found, Ok(Identity { user: 7, group: 8 }));
        assert!(of("supabase/postgres:17.4.1.032", none(), json!({"runAsUser": 0}), Wishes::default()).is_err());
    }
}
