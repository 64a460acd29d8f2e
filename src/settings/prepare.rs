//! What `pgsidecar prepare` is told. It has to know some of it even where everything else is wrong: a database that is
//! there must not be kept from starting by a setting.

use std::path::PathBuf;

use clap::Args;
use pgsidecar_core::{
    ClusterName, SystemIdentifier,
    prepare::{OnEmpty, OneTimeRequest, Place, Replicas, Source, Wishes},
    settings::{CloneSource, RepositoryUrl},
};

use super::{PodEnvironment, RawSettings, Resolver, SettingErrors, absolute};

/// The settings of `prepare` as they are written.
#[derive(Args, Clone, Debug, Default)]
pub struct RawPrepare {
    /// What an empty data directory means: initdb (the image makes a new database), refuse or restore [default: refuse
    /// if the repository has backups of this cluster, else initdb]
    #[arg(long, env = "PGSIDECAR_ON_EMPTY", value_name = "WHAT", hide_env_values = true)]
    pub on_empty: Option<String>,
    /// Restore once, if the data directory is empty: "id=ID [latest|target-time='TIME'|target-lsn=LSN|target-xid=XID|
    /// target-name=NAME|target-immediate] [exclusive] [timeline=N] [backup=ID]"
    #[arg(long, env = "PGSIDECAR_RESTORE", value_name = "REQUEST", hide_env_values = true)]
    pub restore: Option<String>,
    /// What later pods of a StatefulSet do with an empty data directory, where the first one restores: standby or refuse
    /// [default: standby]
    #[arg(long, env = "PGSIDECAR_REPLICAS", value_name = "WHAT", hide_env_values = true)]
    pub replicas: Option<String>,
    /// How such a standby reaches its primary, to stream from it as well
    #[arg(long, env = "PGSIDECAR_PRIMARY_CONNINFO", value_name = "CONNINFO", hide_env_values = true)]
    pub primary_conninfo: Option<String>,
    /// Which database is restored, where several have had backups under the cluster name [default: the only one]
    #[arg(long, env = "PGSIDECAR_SYSTEM_IDENTIFIER", value_name = "N", hide_env_values = true)]
    pub system_identifier: Option<String>,
}

/// What has to be known before PostgreSQL starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartSettings {
    /// The data directory, where a usable one was named.
    pub pgdata: Option<PathBuf>,
    /// Whether a repository was named, usable or not.
    pub names_repository: bool,
    /// Whether a cluster was named that this one is cloned from, usable or not.
    pub names_clone: bool,
    /// Whether this is a pod of Kubernetes.
    pub in_kubernetes: bool,
    /// Which of a set's servers this is.
    pub place: Place,
    /// Who serves a request: what stays the same when the pod is replaced, and differs from one server of a set to the
    /// next.
    pub server: String,
}

/// What `prepare` is to do, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct PrepareSettings {
    /// What was asked for.
    pub wishes: Wishes,
    /// A standby's way to its primary.
    pub primary_conninfo: Option<String>,
}

impl StartSettings {
    pub(super) fn resolve(raw: &RawSettings, pod: &PodEnvironment) -> StartSettings {
        let set = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        let pgdata = raw.data_directory().and_then(|text| absolute(text).ok());
        let workload = set(&raw.workload).or_else(|| pod.workload(pgdata.as_deref()));
        let server = match (pod.place(), &pod.namespace, &pod.name) {
            (Place::Replica(_), Some(namespace), Some(name)) => format!("{namespace}/{name}"),
            _ => workload.unwrap_or_else(|| pod.instance().to_owned()),
        };
        let names_repository = set(&raw.repository).is_some();
        StartSettings {
            pgdata,
            names_repository,
            names_clone: set(&raw.clone_from).is_some(),
            in_kubernetes: pod.in_kubernetes,
            place: pod.place(),
            server,
        }
    }
}

impl RawPrepare {
    /// What an empty directory means, if that was said and is understood.
    pub fn on_empty(&self) -> Option<OnEmpty> {
        self.on_empty.as_deref().and_then(|text| text.parse().ok())
    }

    /// Whether an empty directory isn't simply to become a new database: somebody said so, understandably or not.
    pub fn asks(&self, start: &StartSettings) -> bool {
        let policy = set(&self.on_empty) && self.on_empty() != Some(OnEmpty::Initdb);
        self.asks_once(start) || policy || self.refuses(start.place)
    }

    /// Whether a new database may be made without a look at anything else: that was said, and nothing is to be restored
    /// here before.
    pub fn says_initdb(&self, start: &StartSettings) -> bool {
        let before = start.place == Place::Primary && self.asks_once(start);
        self.on_empty() == Some(OnEmpty::Initdb) && !before && !self.refuses(start.place)
    }

    /// Whether this server is a later one, and these aren't to come up.
    fn refuses(&self, place: Place) -> bool {
        let refuse = self.replicas.as_deref().is_some_and(|text| text.parse() == Ok(Replicas::Refuse));
        refuse && place != Place::Primary
    }

    /// Whether a restore or a clone was asked for.
    fn asks_once(&self, start: &StartSettings) -> bool {
        set(&self.restore) || start.names_clone
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// All that is wrong with them.
    pub fn resolve(&self, clone_from: Option<&CloneSource>) -> Result<PrepareSettings, SettingErrors> {
        let mut resolver = Resolver(Vec::new());
        let request: Option<OneTimeRequest> =
            resolver.value("PGSIDECAR_RESTORE", self.restore.as_ref(), None, |text| text.parse().map(Some));
        let once = match clone_from {
            None => request.map(|request| (request, Source::Own)),
            Some(source) => {
                let named = request.is_some();
                let request = request.unwrap_or_else(|| OneTimeRequest::clone_of(source));
                Some((request, Source::Clone { named }))
            }
        };
        let system = self.system_identifier.as_ref();
        let wishes = Wishes {
            on_empty: resolver.value("PGSIDECAR_ON_EMPTY", self.on_empty.as_ref(), None, |text| text.parse().map(Some)),
            replicas: resolver
                .value("PGSIDECAR_REPLICAS", self.replicas.as_ref(), Replicas::Standby, |text| text.parse()),
            once,
            system: resolver
                .value("PGSIDECAR_SYSTEM_IDENTIFIER", system, None, |text| text.parse::<SystemIdentifier>().map(Some)),
        };
        let primary_conninfo =
            resolver.value("PGSIDECAR_PRIMARY_CONNINFO", self.primary_conninfo.as_ref(), None, |text| {
                let line = !text.contains(|c: char| c.is_control());
                line.then(|| Some(text.to_owned())).ok_or("it has a line break or another control character in it")
            });
        if resolver.0.is_empty() {
            Ok(PrepareSettings { wishes, primary_conninfo })
        } else {
            Err(SettingErrors(resolver.0))
        }
    }
}

fn set(text: &Option<String>) -> bool {
    text.as_deref().is_some_and(|text| !text.is_empty())
}

/// Whether a clone's source is the clone's own place: by its names, or because the directories are the same.
pub(super) fn is_same_place(source: &CloneSource, repository: &RepositoryUrl, cluster: &ClusterName) -> bool {
    let real = |url: &RepositoryUrl| match url {
        RepositoryUrl::Directory(path) => {
            RepositoryUrl::Directory(std::fs::canonicalize(path).unwrap_or_else(|_| path.clone()))
        }
        s3 => s3.clone(),
    };
    real(&source.repository).is_same_place(&source.cluster, &real(repository), cluster)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(restore: &str, on_empty: &str) -> RawPrepare {
        RawPrepare { restore: Some(restore.into()), on_empty: Some(on_empty.into()), ..RawPrepare::default() }
    }

    #[test]
    fn all_that_is_wrong_is_told_at_once() {
        let wrong = RawPrepare {
            replicas: Some("many".into()),
            system_identifier: Some("x".into()),
            primary_conninfo: Some("host=a\nport=1".into()),
            ..raw("latest", "maybe")
        };
        let SettingErrors(errors) = wrong.resolve(None).unwrap_err();
        let names: Vec<&str> = errors.iter().map(|error| error.name).collect();
        assert_eq!(
            names,
            [
                "PGSIDECAR_RESTORE",
                "PGSIDECAR_ON_EMPTY",
                "PGSIDECAR_REPLICAS",
                "PGSIDECAR_SYSTEM_IDENTIFIER",
                "PGSIDECAR_PRIMARY_CONNINFO"
            ]
        );
        assert!(wrong.asks(&start(Place::Primary, false)), "what isn't understood may have meant something");
    }

    fn start(place: Place, names_clone: bool) -> StartSettings {
        StartSettings {
            pgdata: None,
            names_repository: false,
            names_clone,
            in_kubernetes: false,
            place,
            server: "shop/db".into(),
        }
    }

    #[test]
    fn what_is_asked_for_counts_whether_it_can_be_done_or_not() {
        let (first, later) = (Place::Primary, Place::Replica(1));
        // What was said, a clone named, the place: whether it asks, and whether initdb may run.
        for (restore, on_empty, clone, place, asks, initdb) in [
            ("", "", false, first, false, false),
            ("", "initdb", false, first, false, true),
            ("", "refuse", false, first, true, false),
            ("", "maybe", false, first, true, false),
            ("id=../a", "", false, first, true, false),
            ("", "", true, first, true, false),
            ("", "initdb", true, first, true, false),
            ("id=a", "initdb", false, first, true, false),
            // The clone is the first server's.
            ("", "initdb", true, later, true, true),
            ("", "", false, later, false, false),
        ] {
            let (mut raw, start) = (raw(restore, on_empty), start(place, clone));
            let case = format!("{restore:?} {on_empty:?} {start:?}");
            assert_eq!((raw.asks(&start), raw.says_initdb(&start)), (asks, initdb), "{case}");
            // Later servers aren't to come up: that's nothing to the first.
            raw.replicas = Some("refuse".into());
            let (asks, initdb) = if place == first { (asks, initdb) } else { (true, false) };
            assert_eq!((raw.asks(&start), raw.says_initdb(&start)), (asks, initdb), "{case}, refused");
        }
    }

    #[test]
    fn a_clone_is_a_request_with_or_without_a_name() {
        let source: CloneSource = "s3://backups?cluster=shop/orders".parse().unwrap();
        let once = |restore: &str| raw(restore, "").resolve(Some(&source)).unwrap().wishes.once.unwrap();
        let (request, from) = once("");
        assert_eq!((request, from), (OneTimeRequest::clone_of(&source), Source::Clone { named: false }));
        let (request, from) = once("id=a target-xid=7");
        assert_eq!((request.id.as_str(), from), ("a", Source::Clone { named: true }));
        assert_eq!(raw("", "").resolve(None).unwrap().wishes.once, None);
    }
}
