//! Whether the server that the command line starts is one that can be backed up.

use serde_json::Value;

use super::{
    Rejection,
    command::{DIRECTORY, LISTEN_ADDRESSES, given, last, port, short},
    images::{Image, Start},
    view::expand,
    volumes::{is_same, is_within},
};

/// Checks that the server of this line can archive, and answers where ours connect to it. Returns what to warn of.
///
/// # Errors
/// If it doesn't.
pub(super) fn check(container: &Value, pgdata: &str) -> Result<Vec<String>, Rejection> {
    let given = given(container);
    if last(&given, "wal_level").is_some_and(|level| level.trim().eq_ignore_ascii_case("minimal")) {
        return Err(Rejection::new(
            "PostgreSQL is started with wal_level = minimal, which leaves nothing to archive: with archive_mode it doesn't start",
            "Take wal_level out of the container's args, or set replica.",
        ));
    }
    let addresses = last(&given, LISTEN_ADDRESSES).and_then(|addresses| expand(container, addresses));
    if addresses.is_some_and(|addresses| !answers_locally(&addresses)) {
        return Err(Rejection::new(
            "PostgreSQL is started with listen_addresses that 127.0.0.1 isn't among, where pgsidecar connects to it",
            "Add localhost to them: containers of a pod share it, others can't reach it.",
        ));
    }
    let mut warnings = Vec::new();
    if last(&given, "port").is_some() && port(container).is_none() {
        warnings.push("PostgreSQL's port can't be read from its args: set PGPORT in pgsidecar's Secret".to_owned());
    }
    let elsewhere = last(&given, "config_file").and_then(|file| expand(container, file));
    if elsewhere.is_some_and(|file| !is_within(&file, pgdata)) && last(&given, "data_directory").is_none() {
        warnings.push("config_file isn't in PGDATA: a data_directory in it has to be PGDATA as well".to_owned());
    }
    Ok(warnings)
}

/// Checks that the server of this line has its data in `pgdata`. `is_said` if an annotation says where they are.
///
/// # Errors
/// If it doesn't, or it can't be told.
pub(super) fn check_directory(
    container: &Value,
    image: Option<&Image>,
    pgdata: &str,
    is_said: bool,
) -> Result<(), Rejection> {
    let given = given(container);
    // data_directory outranks -D, which is then where postgresql.conf is.
    let Some((name, value)) =
        ["data_directory", DIRECTORY].into_iter().find_map(|name| Some((name, last(&given, name)?)))
    else {
        return Ok(());
    };
    let default = match image.map(|image| image.start) {
        Some(Start::Entrypoint(["postgres", "-D", directory])) => Some(*directory),
        _ => None,
    };
    let fits = match expand(container, value) {
        Some(directory) => {
            is_same(&directory, pgdata)
                || name == DIRECTORY && default.is_some_and(|default| is_same(&directory, default))
        }
        None => is_said,
    };
    let shown = if name == DIRECTORY { "-D" } else { name };
    if fits {
        return Ok(());
    }
    Err(Rejection::new(
        format!("PostgreSQL is started with {shown} {:?}, but PGDATA is {pgdata}", short(value)),
        "Set PGDATA in the container's env to the same directory (or the annotation pgsidecar.dev/pgdata, if there's none in env). If -D is where postgresql.conf is, add -c data_directory=… to the args.",
    ))
}

/// Whether a server with these `listen_addresses` answers at 127.0.0.1.
fn answers_locally(addresses: &str) -> bool {
    let names = ["*", "0.0.0.0", "localhost", "127.0.0.1"];
    addresses.split(',').any(|address| names.contains(&address.trim().trim_matches('"').to_ascii_lowercase().as_str()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::inject::images::look_up;

    fn checked(image: &str, args: Value, is_said: bool) -> Result<Vec<String>, String> {
        let container = json!({"args": args, "env": [{"name": "PGDATA", "value": "/data/pg"}]});
        let image = look_up(image);
        let checked = check_directory(&container, image.as_ref(), "/data/pg", is_said);
        checked.and_then(|()| check(&container, "/data/pg")).map_err(|rejection| rejection.problem)
    }

    #[test]
    fn the_server_has_its_data_in_pgdata() {
        for (args, is_said) in [
            (json!([]), false),
            (json!(["postgres", "-D", "/data//pg/"]), false),
            (json!(["postgres", "-D$(PGDATA)"]), false),
            (json!(["postgres", "-D", "/etc/pg", "-c", "data_directory=/data/pg"]), false),
            (json!(["--data-directory=/elsewhere", "-c", "data_directory=/data/pg"]), false),
            (json!(["postgres", "-D", "$(UNKNOWN)"]), true),
            // Whatever it starts, its flags aren't PostgreSQL's.
            (json!(["sh", "-D", "/elsewhere"]), false),
        ] {
            assert_eq!(checked("postgres:17", args.clone(), is_said), Ok(vec![]), "{args}");
        }
        for args in [
            json!(["postgres", "-D", "/elsewhere"]),
            json!(["postgres", "-D", "/data/pg", "--data_directory=/elsewhere"]),
            json!(["-c", "Data_Directory=/data/pg/sub"]),
            json!(["postgres", "-D", "$(UNKNOWN)"]),
            json!(["postgres", "-D", "/etc/postgresql"]),
        ] {
            let refused = checked("postgres:17", args.clone(), false).unwrap_err();
            assert!(refused.contains("but PGDATA is /data/pg"), "{args}: {refused}");
        }
        assert!(checked("postgres:17", json!(["-D", "/elsewhere"]), true).is_err());
        let args = json!(["postgres", "-D", "/etc/postgresql"]);
        assert_eq!(checked("supabase/postgres:15.1", args, false), Ok(vec![]));
    }

    #[test]
    fn the_server_can_archive_and_answers_at_127_0_0_1() {
        for flags in [
            vec!["-c", "wal_level=Minimal"],
            vec!["--wal-level=minimal"],
            vec!["-c", "listen_addresses="],
            vec!["-c", "listen_addresses=10.0.0.1,::1"],
            vec!["-h", ""],
            vec!["-i", "-h10.0.0.1"],
        ] {
            assert!(checked("postgres:17", json!(flags), false).is_err(), "{flags:?}");
        }
        for flags in [
            vec!["-c", "wal_level=minimal", "-c", "wal_level=logical"],
            vec!["-h", "10.0.0.1", "-i"],
            vec!["-c", "listen_addresses=10.0.0.1, LOCALHOST"],
            vec!["--listen_addresses=*"],
            vec!["-h", "$(ADDRESS)"],
        ] {
            assert_eq!(checked("postgres:17", json!(flags), false), Ok(vec![]), "{flags:?}");
        }
    }

    #[test]
    fn what_can_not_be_seen_is_warned_of() {
        for (args, expected) in [
            (json!(["-c", "config_file=/etc/pg/postgresql.conf"]), Some("config_file")),
            (json!(["-c", "config_file=/etc/postgresql.conf", "-c", "data_directory=/data/pg"]), None),
            (json!(["-c", "config_file=$(PGDATA)/other.conf"]), None),
            (json!(["-p", "$(PORT)"]), Some("PGPORT")),
            (json!(["-p", "5433"]), None),
        ] {
            let warnings = checked("postgres:17", args.clone(), false).unwrap();
            assert_eq!(warnings.len(), usize::from(expected.is_some()), "{args}: {warnings:?}");
            assert!(expected.is_none_or(|expected| warnings[0].contains(expected)), "{args}: {warnings:?}");
            assert!(warnings.iter().all(|warning| warning.len() <= 120), "{warnings:?}");
        }
    }
}
