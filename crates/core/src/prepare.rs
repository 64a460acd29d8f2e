//! What is to happen before PostgreSQL starts: what an empty data directory means.
//!
//! The official image asks only for `PG_VERSION`: where it's missing, it runs initdb. So a volume that was lost comes up
//! as a blank database, unless somebody decides otherwise before. [`decide`] is that decision: a pure function of what
//! was found and what was asked for. It never answers with a restore where a database is, and leaves an empty directory
//! to the image only where nothing speaks against it.

mod request;
#[cfg(test)]
mod tests;
mod words;

use std::str::FromStr;

use jiff::Timestamp;

use crate::{SystemIdentifier, TimelineId};

pub use request::{OneTimeRequest, RequestError, RequestId};

/// What is in the data directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Directory {
    /// It isn't there, or nothing is in it.
    Empty,
    /// Nothing but `lost+found`: it's the root of a file system.
    OnlyLostAndFound,
    /// `PG_VERSION` is there.
    Database,
    /// What a restore left that didn't end. There is nothing in it that can't be had again.
    Interrupted,
    /// Something else, of which this is a part, and no `PG_VERSION`.
    Other(String),
}

/// Which of a set's servers this is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// The first of a StatefulSet, or no part of one.
    Primary,
    /// A later one of a StatefulSet, by its ordinal.
    Replica(u32),
}

/// What an empty data directory means (`PGSIDECAR_ON_EMPTY`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OnEmpty {
    /// A new database: the image's business.
    Initdb,
    /// A mistake.
    Refuse,
    /// A lost volume: the database comes back from its backups.
    Restore,
}

/// What a later server of a set does with an empty data directory (`PGSIDECAR_REPLICAS`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Replicas {
    /// It comes up as a standby.
    #[default]
    Standby,
    /// It doesn't come up.
    Refuse,
}

/// The text is no [`OnEmpty`] or [`Replicas`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is none of {1}")]
pub struct UnknownWord(String, &'static str);

impl FromStr for OnEmpty {
    type Err = UnknownWord;

    fn from_str(text: &str) -> Result<OnEmpty, UnknownWord> {
        match text {
            "initdb" => Ok(OnEmpty::Initdb),
            "refuse" => Ok(OnEmpty::Refuse),
            "restore" => Ok(OnEmpty::Restore),
            other => Err(UnknownWord(other.chars().take(80).collect(), "initdb, refuse, restore")),
        }
    }
}

impl FromStr for Replicas {
    type Err = UnknownWord;

    fn from_str(text: &str) -> Result<Replicas, UnknownWord> {
        match text {
            "standby" => Ok(Replicas::Standby),
            "refuse" => Ok(Replicas::Refuse),
            other => Err(UnknownWord(other.chars().take(80).collect(), "standby, refuse")),
        }
    }
}

/// From where a request is served.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// From this cluster's own backups.
    Own,
    /// From another cluster's. `named`: the request has an id that somebody chose.
    Clone {
        /// See above.
        named: bool,
    },
}

/// What was asked for.
#[derive(Clone, PartialEq, Debug)]
pub struct Wishes {
    /// What an empty directory means; `None`: that depends on what the repository knows.
    pub on_empty: Option<OnEmpty>,
    /// What later servers do.
    pub replicas: Replicas,
    /// A restore or a clone, to be done once.
    pub once: Option<(OneTimeRequest, Source)>,
    /// Which database is meant, where the cluster has had several.
    pub system: Option<SystemIdentifier>,
}

/// One database under the cluster's name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KnownSystem {
    /// Which.
    pub system: SystemIdentifier,
    /// Whether there is a complete base backup.
    pub has_backups: bool,
    /// Whether there is a storage snapshot. It can't be restored from here, but says that there was a database.
    pub has_snapshots: bool,
    /// Whether there is a complete dump. It isn't restored from here either, but says the same.
    pub has_dumps: bool,
    /// The newest timeline that has WAL or a history.
    pub newest_timeline: Option<TimelineId>,
}

/// How far a request has come, by what the repository says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RequestState {
    /// Nobody has begun it, or there is none.
    Unclaimed,
    /// This server has begun it.
    Ours {
        /// Of which database it was to be served, where that was noted.
        system: Option<SystemIdentifier>,
        /// The newest timeline that this had then.
        newest_timeline: Option<TimelineId>,
    },
    /// This server has begun one of that id, which was another: its words.
    OursOtherwise(String),
    /// Another server has begun it.
    Others(String),
    /// It was served.
    Served {
        /// By whom.
        by: String,
        /// When.
        at: Timestamp,
        /// The newest timeline that there was before.
        newest_timeline: Option<TimelineId>,
    },
}

/// What the repository says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Repository {
    /// It can't be asked.
    CantTell,
    /// What it knows.
    Knows {
        /// The databases under the cluster's name.
        systems: Vec<KnownSystem>,
        /// The state of the request in [`Wishes::once`].
        request: RequestState,
    },
}

/// What is to happen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Decision {
    /// There is a database.
    KeepDatabase,
    /// The image may run initdb.
    LeaveToImage(Blank),
    /// The request is to be served from this database's backups.
    ServeRequest(SystemIdentifier),
    /// The request is to be served from the source's backups.
    Clone,
    /// The database is to be had back as it was in the end.
    Heal(SystemIdentifier),
    /// A standby is to be made, on this timeline's way.
    Standby(SystemIdentifier, Option<TimelineId>),
    /// PostgreSQL mustn't start.
    Refuse(Refusal),
}

/// Why a new database may be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Blank {
    /// Somebody said so.
    Said,
    /// The repository knows nothing of this cluster.
    Unknown,
    /// It knows the cluster, but has no backup of it: nothing could be restored.
    NoBackups,
}

/// Why PostgreSQL mustn't start.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// Whether there are backups can't be told.
    CantTell,
    /// Something is in the directory.
    NotEmpty(String),
    /// What an interrupted restore left is in it, and nothing is to be restored.
    Remains,
    /// The data directory is the root of a file system.
    LostAndFound,
    /// `on-empty` is `refuse`.
    Said,
    /// The database has backups: this is a lost volume, or the wrong one.
    LostVolume,
    /// There is nothing but dumps of it, which are restored into a database.
    OnlyDumps,
    /// A request was served before, and nothing says what to do now.
    ServedBefore(RequestId),
    /// A request of this id was begun with other words.
    RequestChanged(RequestId, String),
    /// Another server has begun the request.
    RequestOfAnother(RequestId, String),
    /// Backups are wanted, and there are none.
    NoBackups,
    /// Several databases have backups under the cluster's name.
    SeveralSystems(Vec<SystemIdentifier>),
    /// The one that was named has none.
    NoSuchSystem(SystemIdentifier, Vec<SystemIdentifier>),
    /// A later server isn't to come up by itself.
    Replica(u32),
    /// A later server has to wait until there is something to follow.
    ReplicaWaits(u32, Awaited),
}

/// For what a later server waits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Awaited {
    /// The first server has to serve the request.
    Request,
    /// What it has restored has to be promoted, and its timeline be archived.
    Promotion,
    /// A backup.
    Backup,
}

impl RequestState {
    /// Whether what this server was to restore has begun its timeline in the repository: it was served, and that could
    /// not be noted.
    pub fn is_outlived(&self, systems: &[KnownSystem]) -> bool {
        let RequestState::Ours { system: Some(system), newest_timeline: Some(before) } = self else { return false };
        systems.iter().any(|known| known.system == *system && known.newest_timeline > Some(*before))
    }
}

impl Place {
    /// By the pod's name: a StatefulSet's pods are called `NAME-0`, `NAME-1`, and so on.
    pub fn of_pod(pod: &str) -> Place {
        // A Deployment's pods end with random characters, which can all be digits: `NAME-7c5ddbdf54-24567`.
        let random = |text: &str| text.bytes().all(|b| b"bcdfghjklmnpqrstvwxz2456789".contains(&b));
        let deployment = |rest: &str, suffix: &str| {
            let template = rest.rsplit('-').next().unwrap_or_default();
            suffix.len() == 5 && random(suffix) && (6..=10).contains(&template.len()) && random(template)
        };
        match pod.rsplit_once('-') {
            Some((rest, suffix)) if suffix.bytes().all(|b| b.is_ascii_digit()) && !deployment(rest, suffix) => {
                suffix.parse().ok().filter(|ordinal| *ordinal > 0).map_or(Place::Primary, Place::Replica)
            }
            _ => Place::Primary,
        }
    }
}

/// What can be decided without the repository. `None`: it has to be asked.
pub fn at_first_sight(directory: &Directory, place: Place, wishes: &Wishes) -> Option<Decision> {
    let asked = wishes.once.is_some();
    // A later server of a set that initdb was chosen for is the image's as well: the request is for the first.
    let image = wishes.on_empty == Some(OnEmpty::Initdb) && (!asked || place != Place::Primary);
    match (directory, place) {
        (Directory::Database, _) => Some(Decision::KeepDatabase),
        // The image refuses it, too, by itself.
        (Directory::Other(_), _) if image => Some(Decision::LeaveToImage(Blank::Said)),
        (Directory::Other(name), _) => Some(Decision::Refuse(Refusal::NotEmpty(name.clone()))),
        // It's no default, so that somebody said it, and of later servers alone: it goes before all that is said of empty
        // directories in general, and before what the repository knows.
        (_, Place::Replica(ordinal)) if wishes.replicas == Replicas::Refuse => {
            Some(Decision::Refuse(Refusal::Replica(ordinal)))
        }
        _ if image => Some(blank(directory, Blank::Said)),
        _ if wishes.on_empty == Some(OnEmpty::Refuse) && !asked => Some(Decision::Refuse(Refusal::Said)),
        _ => None,
    }
}

/// Decides what is to happen before PostgreSQL starts.
pub fn decide(directory: &Directory, place: Place, wishes: &Wishes, repository: &Repository) -> Decision {
    if let Some(decision) = at_first_sight(directory, place, wishes) {
        return decision;
    }
    let Repository::Knows { systems, request } = repository else { return Decision::Refuse(Refusal::CantTell) };
    let decision = match place {
        Place::Primary => primary(wishes, systems, request),
        Place::Replica(ordinal) => replica(ordinal, wishes, systems, request),
    };
    match decision {
        Err(refusal) => Decision::Refuse(refusal),
        Ok(Decision::LeaveToImage(why)) => blank(directory, why),
        // PostgreSQL would start, but neither initdb nor a later pg_basebackup takes such a directory.
        Ok(_) if *directory == Directory::OnlyLostAndFound => Decision::Refuse(Refusal::LostAndFound),
        Ok(decision) => decision,
    }
}

/// initdb refuses what isn't empty: better to say why here.
fn blank(directory: &Directory, why: Blank) -> Decision {
    match directory {
        Directory::Interrupted => Decision::Refuse(Refusal::Remains),
        _ => Decision::LeaveToImage(why),
    }
}

fn primary(wishes: &Wishes, systems: &[KnownSystem], request: &RequestState) -> Result<Decision, Refusal> {
    if let Some((once, source)) = &wishes.once {
        match request {
            RequestState::Unclaimed | RequestState::Ours { .. } if is_past(*source, systems) => {}
            RequestState::Ours { .. } if request.is_outlived(systems) => {}
            RequestState::Unclaimed | RequestState::Ours { .. } => {
                return match source {
                    Source::Clone { .. } => Ok(Decision::Clone),
                    Source::Own => {
                        choose(systems, wishes.system)?.map(Decision::ServeRequest).ok_or(Refusal::NoBackups)
                    }
                };
            }
            RequestState::OursOtherwise(what) => return Err(Refusal::RequestChanged(once.id.clone(), what.clone())),
            RequestState::Others(who) => return Err(Refusal::RequestOfAnother(once.id.clone(), who.clone())),
            RequestState::Served { .. } => {}
        }
    }
    match wishes.on_empty {
        Some(OnEmpty::Initdb) => Ok(Decision::LeaveToImage(Blank::Said)),
        Some(OnEmpty::Refuse) => Err(Refusal::Said),
        Some(OnEmpty::Restore) => match choose(systems, wishes.system)? {
            Some(system) => Ok(Decision::Heal(system)),
            // The first start of a database that is to heal itself later.
            None if systems.is_empty() && wishes.once.is_none() => Ok(Decision::LeaveToImage(Blank::Unknown)),
            None if has_only_dumps(systems) => Err(Refusal::OnlyDumps),
            None => Err(Refusal::NoBackups),
        },
        None if has_only_dumps(systems) => Err(Refusal::OnlyDumps),
        None if has_data(systems) => Err(Refusal::LostVolume),
        // Who asked for a restore doesn't want a blank database in the end.
        None => match &wishes.once {
            Some((once, _)) => Err(Refusal::ServedBefore(once.id.clone())),
            None if systems.is_empty() => Ok(Decision::LeaveToImage(Blank::Unknown)),
            None => Ok(Decision::LeaveToImage(Blank::NoBackups)),
        },
    }
}

fn replica(
    ordinal: u32,
    wishes: &Wishes,
    systems: &[KnownSystem],
    request: &RequestState,
) -> Result<Decision, Refusal> {
    let known = !systems.is_empty();
    // Nothing speaks of a database to follow: what two servers mean is their image's business.
    if wishes.once.is_none() && wishes.on_empty.is_none() && !known {
        return Ok(Decision::LeaveToImage(Blank::Unknown));
    }
    let wanted = wishes.once.is_some() || wishes.on_empty == Some(OnEmpty::Restore);
    if !wanted {
        return Err(Refusal::Replica(ordinal));
    }
    let wait = |awaited| Refusal::ReplicaWaits(ordinal, awaited);
    let system = choose(systems, wishes.system)?;
    let newest = |system: SystemIdentifier| {
        systems.iter().find(|known| known.system == system).and_then(|known| known.newest_timeline)
    };
    if let Some((_, source)) = &wishes.once {
        match request {
            RequestState::Served { newest_timeline, .. } => {
                // Before that, the newest timeline is the one that the request has left.
                let system = system.ok_or(wait(Awaited::Backup))?;
                if newest(system) <= *newest_timeline {
                    return Err(wait(Awaited::Promotion));
                }
            }
            RequestState::Unclaimed if is_past(*source, systems) => {}
            _ => return Err(wait(Awaited::Request)),
        }
    }
    let system = system.ok_or(wait(Awaited::Backup))?;
    Ok(Decision::Standby(system, newest(system)))
}

/// Whether a clone that nobody has given an id lies behind this cluster: it has backups of its own, and what was lost is
/// to be had back from these.
fn is_past(source: Source, systems: &[KnownSystem]) -> bool {
    source == Source::Clone { named: false } && has_data(systems)
}

fn has_data(systems: &[KnownSystem]) -> bool {
    systems.iter().any(|known| known.has_backups || known.has_snapshots || known.has_dumps)
}

fn has_only_dumps(systems: &[KnownSystem]) -> bool {
    has_data(systems) && !systems.iter().any(|known| known.has_backups || known.has_snapshots)
}

/// The database to be restored: the one that was named, or the only one that has backups. `None` if none has.
///
/// # Errors
/// If it can't be told which one is meant.
pub fn choose(systems: &[KnownSystem], named: Option<SystemIdentifier>) -> Result<Option<SystemIdentifier>, Refusal> {
    let backed_up: Vec<SystemIdentifier> =
        systems.iter().filter(|known| known.has_backups).map(|known| known.system).collect();
    match (named, backed_up.as_slice()) {
        (_, []) => Ok(None),
        (Some(named), all) if all.contains(&named) => Ok(Some(named)),
        (Some(named), _) => Err(Refusal::NoSuchSystem(named, backed_up)),
        (None, [one]) => Ok(Some(*one)),
        (None, _) => Err(Refusal::SeveralSystems(backed_up)),
    }
}
