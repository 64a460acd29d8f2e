//! What people are told of a decision.

use std::fmt;

use super::{Awaited, Blank, Refusal};
use crate::SystemIdentifier;

impl fmt::Display for Blank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Blank::Said => "PGSIDECAR_ON_EMPTY is initdb",
            Blank::Unknown => "the repository knows nothing of this cluster",
            Blank::NoBackups => {
                "the repository has WAL of this cluster but no backup, so that nothing could be restored"
            }
        })
    }
}

impl fmt::Display for Awaited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Awaited::Request => "the first server has not served the request yet",
            Awaited::Promotion => "what the first server restored has not begun its timeline in the repository yet",
            Awaited::Backup => "the repository has no backup yet from which a standby could be made",
        })
    }
}

fn list(systems: &[SystemIdentifier]) -> String {
    let texts: Vec<String> = systems.iter().map(ToString::to_string).collect();
    texts.join(", ")
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::CantTell => f.write_str("whether this database has backups can't be told"),
            Refusal::NotEmpty(name) => {
                write!(f, "it holds {name:?} and no PG_VERSION: it's neither a database nor empty")
            }
            Refusal::Remains => {
                f.write_str("it holds what an interrupted restore has left, and nothing is to be restored now")
            }
            Refusal::LostAndFound => f.write_str(
                "it holds lost+found: it's the root of a file system, and PostgreSQL wants a directory of its own",
            ),
            Refusal::Said => f.write_str("it's empty, and PGSIDECAR_ON_EMPTY is refuse"),
            Refusal::LostVolume => f.write_str(
                "it's empty, and the repository has backups of this cluster: a blank database must not take its place",
            ),
            Refusal::OnlyDumps => f.write_str(
                "it's empty, and the repository has dumps of this cluster and no backup: a blank database must not take its place",
            ),
            Refusal::ServedBefore(id) => {
                write!(f, "it's empty, and request {id} was served before: it isn't served again")
            }
            Refusal::RequestChanged(id, before) => {
                write!(f, "request {id} was begun before with another target: {before}")
            }
            Refusal::RequestOfAnother(id, who) => write!(f, "request {id} was begun by {who}, which has not ended it"),
            Refusal::NoBackups => f.write_str("it's to be restored, and the repository has no backup of this cluster"),
            Refusal::SeveralSystems(systems) => {
                write!(f, "under the cluster's name {} databases have backups: {}", systems.len(), list(systems))
            }
            Refusal::NoSuchSystem(named, systems) => write!(
                f,
                "the database with system identifier {named} has no backup under the cluster's name; there are: {}",
                list(systems)
            ),
            Refusal::Replica(ordinal) => write!(
                f,
                "it's empty, and this is server {ordinal} of a set: it must not come up as a database of its own"
            ),
            Refusal::ReplicaWaits(ordinal, awaited) => {
                write!(f, "server {ordinal} of the set is to be a standby, and {awaited}")
            }
        }
    }
}

impl Refusal {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Refusal::CantTell => {
                "Nothing was changed; it's tried again. PGSIDECAR_ON_EMPTY=initdb makes a new database without asking."
            }
            Refusal::NotEmpty(_) => {
                "Set PGDATA to the directory of the database, or to an empty one. Nothing was changed."
            }
            Refusal::Remains => {
                "PostgreSQL doesn't start on it, and nothing in it is of use: empty the directory, or set PGSIDECAR_ON_EMPTY=restore."
            }
            Refusal::LostAndFound => "Set PGDATA to a directory below the mount point, in all containers.",
            Refusal::Said => {
                "Is it the right volume? PGSIDECAR_ON_EMPTY=restore brings the database back from its backups, =initdb makes a new one."
            }
            Refusal::LostVolume => {
                "Is it the right volume? PGSIDECAR_ON_EMPTY=restore brings the database back as it was in the end, PGSIDECAR_RESTORE as it was \
                 at some time, and PGSIDECAR_ON_EMPTY=initdb makes a new one beside the old one's backups."
            }
            Refusal::OnlyDumps => {
                "Is it the right volume? PGSIDECAR_ON_EMPTY=initdb makes a new database; then pgsidecar dump restore brings the dumps back into it."
            }
            Refusal::ServedBefore(_) => {
                "Give the request another id to have it served once more, or set PGSIDECAR_ON_EMPTY to restore or initdb."
            }
            Refusal::RequestChanged(..) => "Give the request another id.",
            Refusal::RequestOfAnother(..) => {
                "Where that server runs no more, give the request another id. Two servers must not be made of one request."
            }
            Refusal::NoBackups => {
                "Check PGSIDECAR_REPOSITORY and PGSIDECAR_CLUSTER. PGSIDECAR_ON_EMPTY=initdb makes a new database."
            }
            Refusal::SeveralSystems(_) | Refusal::NoSuchSystem(..) => "Choose one with PGSIDECAR_SYSTEM_IDENTIFIER.",
            Refusal::Replica(_) => {
                "PGSIDECAR_ON_EMPTY=restore with PGSIDECAR_REPLICAS=standby makes a standby of it; PGSIDECAR_ON_EMPTY=initdb leaves it to the image, unless PGSIDECAR_REPLICAS is refuse."
            }
            Refusal::ReplicaWaits(_, Awaited::Backup) => {
                "Take one beside the first server: pgsidecar backup create. It's tried again."
            }
            Refusal::ReplicaWaits(..) => "It's tried again until then.",
        }
    }
}
