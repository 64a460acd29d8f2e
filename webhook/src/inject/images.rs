//! Images that are known by their names: whose they run as, where their data are, and what they start.
//!
//! Each entry was looked up in the image's Dockerfile. Registries and mirrors don't matter, as long as they keep the end
//! of the name; the last resort are always the annotations.

/// What is known of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Image {
    /// What PostgreSQL runs as: user and group. `None` where it differs from version to version, or the tag doesn't tell.
    pub(super) user: Option<(u32, u32)>,
    /// What runs if the pod says nothing else.
    pub(super) start: Start,
    /// `PGDATA`, where the tag tells it.
    pub(super) pgdata: Option<String>,
    /// The `VOLUME`s of its Dockerfile that data may lie in; where the version isn't known, those of all versions. The
    /// container runtime puts an empty volume over such a path, unless a mount of the pod has exactly this destination.
    pub(super) volumes: &'static [&'static str],
    /// PostgreSQL's major version, where the tag tells it.
    pub(super) major: Option<u32>,
    /// Whether it deletes `recovery.signal` whenever it starts, so that nothing can be restored for it.
    pub(super) deletes_recovery_signal: bool,
}

/// What an image starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// The official entrypoint, with these arguments (`CMD`).
    Entrypoint(&'static [&'static str]),
    /// A script of its own that splits flags at spaces.
    Splits,
    /// Patroni, which configures PostgreSQL itself.
    Patroni,
}

const DEBIAN: (u32, u32) = (999, 999);
const ALPINE: (u32, u32) = (70, 70);
const POSTGRES: Start = Start::Entrypoint(&["postgres"]);
/// The official image's `VOLUME`: the first from version 18 on, the second before.
pub(super) const VOLUMES: &[&str] = &["/var/lib/postgresql", "/var/lib/postgresql/data"];

/// What is known of an image by its name; `None` if nothing is.
pub(super) fn look_up(image: &str) -> Option<Image> {
    let reference = Reference::parse(image);
    let tag = reference.tag.unwrap_or("");
    // Without a tag a digest may be that of any variant.
    let told = reference.tag.is_some() || !reference.has_digest;
    let alpine = tag.split('-').any(|part| part.starts_with("alpine"));
    let distribution = told.then_some(if alpine { ALPINE } else { DEBIAN });
    let official = |major: Option<u32>, user: Option<(u32, u32)>, start: Start| Image {
        user,
        start,
        pgdata: major.map(default_pgdata),
        volumes: match major {
            Some(18..) => &VOLUMES[..1],
            Some(_) => &VOLUMES[1..],
            None => VOLUMES,
        },
        major,
        deletes_recovery_signal: false,
    };
    let (parent, name) = (reference.parent(), reference.name());
    Some(match (parent, name) {
        (_, "postgres") if reference.is_official() => official(leading_number(tag), distribution, POSTGRES),
        ("postgis" | "imresamu", "postgis") => official(leading_number(tag), distribution, POSTGRES),
        ("pgvector" | "ankane", "pgvector") | ("paradedb", "paradedb") | ("citusdata", "citus") => {
            official(number_after_pg(tag), distribution, POSTGRES)
        }
        ("apache", "age") => official(
            number_after_pg(tag),
            distribution,
            Start::Entrypoint(&["postgres", "-c", "shared_preload_libraries=age"]),
        ),
        ("timescale", "timescaledb") if !tag.contains("bitnami") => {
            official(number_after_pg(tag), Some(ALPINE), POSTGRES)
        }
        ("timescale", "timescaledb-ha") => Image {
            pgdata: Some("/home/postgres/pgdata/data".to_owned()),
            volumes: &[],
            ..official(number_after_pg(tag), Some((1000, 1000)), POSTGRES)
        },
        // Its user's number changed with the base image from 105 to others.
        ("supabase", "postgres") => Image {
            pgdata: Some("/var/lib/postgresql/data".to_owned()),
            volumes: &[],
            ..official(leading_number(tag), None, Start::Entrypoint(&["postgres", "-D", "/etc/postgresql"]))
        },
        ("bitnami" | "bitnamilegacy" | "bitnamisecure", "postgresql" | "postgresql-repmgr") => Image {
            pgdata: Some("/bitnami/postgresql/data".to_owned()),
            volumes: &["/bitnami/postgresql"],
            deletes_recovery_signal: true,
            ..official(leading_number(tag), Some((1001, 1001)), Start::Splits)
        },
        (_, name) if name == "spilo" || name.starts_with("spilo-") => Image {
            pgdata: Some("/home/postgres/pgdata/pgroot/data".to_owned()),
            volumes: &[],
            ..official(None, Some((101, 103)), Start::Patroni)
        },
        _ => return None,
    })
}

/// `PGDATA` of the official image.
pub(super) fn default_pgdata(major: u32) -> String {
    if major < 18 { "/var/lib/postgresql/data".to_owned() } else { format!("/var/lib/postgresql/{major}/docker") }
}

/// `[HOST[:PORT]/]PATH[:TAG][@DIGEST]`
struct Reference<'a> {
    host: Option<&'a str>,
    path: Vec<&'a str>,
    tag: Option<&'a str>,
    has_digest: bool,
}

impl<'a> Reference<'a> {
    fn parse(image: &'a str) -> Reference<'a> {
        let (rest, has_digest) = image.split_once('@').map_or((image, false), |(rest, _)| (rest, true));
        let (rest, tag) = match rest.rsplit_once(':') {
            Some((rest, tag)) if !tag.contains('/') => (rest, Some(tag)),
            _ => (rest, None),
        };
        let mut path: Vec<&str> = rest.split('/').collect();
        let is_host = |first: &str| first.contains(['.', ':']) || first == "localhost";
        let host = (path.len() > 1 && is_host(path[0])).then(|| path.remove(0));
        Reference { host, path, tag, has_digest }
    }

    fn name(&self) -> &'a str {
        self.path.last().copied().unwrap_or("")
    }

    fn parent(&self) -> &'a str {
        self.path.len().checked_sub(2).map_or("", |index| self.path[index])
    }

    /// Whether this is `library/postgres`: `postgres` alone, at the top of any registry, or below `library`.
    fn is_official(&self) -> bool {
        // ghcr.io and quay.io have no images without an owner.
        let top = self.path.len() == 1 && !matches!(self.host, Some("ghcr.io" | "quay.io"));
        top || self.parent() == "library"
    }
}

/// `17` of `17.2-alpine3.20`.
fn leading_number(tag: &str) -> Option<u32> {
    let digits = tag.bytes().take_while(u8::is_ascii_digit).count();
    tag[..digits].parse().ok()
}

/// `17` of `2.17.2-pg17`, `pg17-trixie` and `release_PG17_1.6.0`.
fn number_after_pg(tag: &str) -> Option<u32> {
    let lower = tag.to_ascii_lowercase();
    lower.match_indices("pg").find_map(|(index, _)| leading_number(&lower[index + 2..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(image: &str) -> (Option<u32>, Option<u32>, Option<String>) {
        let found = look_up(image).unwrap_or_else(|| panic!("{image} isn't known"));
        (found.major, found.user.map(|(user, _)| user), found.pgdata)
    }

    #[test]
    fn the_official_image_is_known_by_any_registry_and_tag() {
        let old = || Some("/var/lib/postgresql/data".to_owned());
        let new = || Some("/var/lib/postgresql/18/docker".to_owned());
        for (image, major, user, pgdata) in [
            ("postgres:17", Some(17), Some(999), old()),
            ("postgres:17.2-alpine3.20", Some(17), Some(70), old()),
            ("postgres:18.1-bookworm", Some(18), Some(999), new()),
            ("docker.io/library/postgres:14-bullseye", Some(14), Some(999), old()),
            ("public.ecr.aws/docker/library/postgres:15-alpine", Some(15), Some(70), old()),
            ("localhost:5000/postgres:16", Some(16), Some(999), old()),
            ("registry.example.com/mirror/library/postgres:18-alpine@sha256:abc", Some(18), Some(70), new()),
            ("postgres:18beta1", Some(18), Some(999), new()),
            ("postgres", None, Some(999), None),
            ("postgres:latest", None, Some(999), None),
            ("postgres:alpine", None, Some(70), None),
            ("postgres:bookworm", None, Some(999), None),
            ("postgres@sha256:abc", None, None, None),
        ] {
            assert_eq!(known(image), (major, user, pgdata), "{image}");
        }
    }

    #[test]
    fn images_made_of_it_are_known_by_owner_and_name() {
        let data = || Some("/var/lib/postgresql/data".to_owned());
        for (image, major, user, pgdata) in [
            ("postgis/postgis:17-3.5", Some(17), Some(999), data()),
            ("ghcr.io/mirror/postgis/postgis:16-3.4-alpine", Some(16), Some(70), data()),
            ("timescale/timescaledb:2.17.2-pg17", Some(17), Some(70), data()),
            ("timescale/timescaledb:latest-pg16-oss", Some(16), Some(70), data()),
            (
                "timescale/timescaledb-ha:pg17.4-ts2.21.3-all",
                Some(17),
                Some(1000),
                Some("/home/postgres/pgdata/data".to_owned()),
            ),
            ("pgvector/pgvector:0.8.0-pg17", Some(17), Some(999), data()),
            ("pgvector/pgvector:pg17-trixie", Some(17), Some(999), data()),
            ("apache/age:release_PG16_1.5.0", Some(16), Some(999), data()),
            ("citusdata/citus:13.0", None, Some(999), None),
            ("supabase/postgres:15.8.1.085", Some(15), None, data()),
            (
                "docker.io/bitnami/postgresql:17.2.0-debian-12-r3",
                Some(17),
                Some(1001),
                Some("/bitnami/postgresql/data".to_owned()),
            ),
            ("ghcr.io/zalando/spilo-17:4.0-p2", None, Some(101), Some("/home/postgres/pgdata/pgroot/data".to_owned())),
        ] {
            assert_eq!(known(image), (major, user, pgdata), "{image}");
        }
    }

    #[test]
    fn volumes_are_those_of_the_version_or_of_all() {
        for (image, expected) in [
            ("postgres:17", &["/var/lib/postgresql/data"][..]),
            ("timescale/timescaledb:2.17.2-pg17", &["/var/lib/postgresql/data"]),
            ("postgis/postgis:18-3.6", &["/var/lib/postgresql"]),
            ("postgres:latest", &["/var/lib/postgresql", "/var/lib/postgresql/data"]),
            ("timescale/timescaledb-ha:pg17", &[]),
            ("bitnami/postgresql:17", &["/bitnami/postgresql"]),
        ] {
            assert_eq!(look_up(image).unwrap().volumes, expected, "{image}");
        }
    }

    #[test]
    fn others_are_not_known() {
        for image in [
            "",
            ":",
            "/",
            "@",
            "redis:7",
            "someone/postgres:17",
            "ghcr.io/postgres:17",
            "registry.example.com/team/postgres:17",
            "ghcr.io/cloudnative-pg/postgresql:17",
            "prometheuscommunity/postgres-exporter:v0.15.0",
            "timescale/timescaledb:2.1.0-pg12-bitnami",
        ] {
            assert_eq!(look_up(image), None, "{image}");
        }
    }
}
