//! PostgreSQL's command line: what the pod says, and what has to be added.
//!
//! Flags outrank what a configuration file and `ALTER SYSTEM` say, so the line is where archiving is switched on. But
//! they have to reach `postgres`: where it can't be seen that they do, nothing is added and the pod is refused.

use serde_json::Value;

use super::{
    Rejection,
    images::{Image, Start},
    view::{expand, texts},
};

/// What is added: PostgreSQL's settings.
pub(super) const SETTINGS: [(&str, &str); 4] = [
    ("archive_mode", "on"),
    ("archive_command", "/pgsidecar/pgsidecar-wal archive %p"),
    ("archive_timeout", "5min"),
    ("restore_command", "/pgsidecar/pgsidecar-wal restore %f %p"),
];

/// The name under which [`settings`] gives `-D`, which isn't a setting: `data_directory` outranks it.
pub(super) const DIRECTORY: &str = "-D";
/// What `-h` and `-i` set.
pub(super) const LISTEN_ADDRESSES: &str = "listen_addresses";

/// What the line says of a database.
#[derive(Debug, PartialEq, Eq, Default)]
pub(super) struct Line {
    /// What has to be appended to `args`.
    pub(super) append: Vec<String>,
}

/// What has to be appended to the container's `args`.
///
/// # Errors
/// If flags that are appended don't reach PostgreSQL, or others are there that contradict.
pub(super) fn complete(container: &Value, image: Option<&Image>) -> Result<Line, Rejection> {
    let (command, args) = (texts(container, "command"), texts(container, "args"));
    let mut append: Vec<String> = Vec::new();
    let line = [command.as_slice(), &args].concat();
    let flags = match (command.is_empty(), args.is_empty(), image.map(|image| image.start)) {
        (_, _, Some(Start::Patroni)) => {
            return Err(never("Patroni configures PostgreSQL in this image, its command line isn't ours to change"));
        }
        (_, _, Some(Start::Splits)) => {
            return Err(never("this image's run.sh splits the flags of PostgreSQL at their spaces"));
        }
        (true, true, Some(Start::Entrypoint(default))) => {
            append.extend(default.iter().map(ToString::to_string));
            flags_of(default, true)
        }
        (true, true, None) => return Err(unreachable("the image isn't known, and it can't be told what it starts")),
        (has_entrypoint, _, _) => flags_of(&line, has_entrypoint),
    };
    let Some(flags) = flags else {
        // The rest of the line may hold a password.
        let program = line.first().and_then(|first| first.split([' ', '=']).next()).unwrap_or("");
        return Err(unreachable(&format!("the container's command ({:?}) isn't PostgreSQL's own", short(program))));
    };
    let flags: Vec<String> = flags.iter().map(ToString::to_string).collect();
    let given = settings(&flags).map_err(|odd| {
        let name = if odd.starts_with('-') { odd.split([' ', '=']).next().unwrap_or("") } else { "" };
        let name = if name.is_empty() { "a word that is no flag".to_owned() } else { format!("{:?}", short(name)) };
        unreachable(&format!("after {name} in the container's args PostgreSQL reads no flags, or is no server at all"))
    })?;
    for (name, value) in SETTINGS {
        if !check(&given, name, value)? {
            append.extend(["-c".to_owned(), format!("{name}={value}")]);
        }
    }
    check(&given, "archive_library", "")?;
    Ok(Line { append })
}

/// The settings that the line makes, as far as it can be read.
pub(super) fn given(container: &Value) -> Vec<(String, String)> {
    let line = [texts(container, "command"), texts(container, "args")].concat();
    let flags: Vec<String> = flags_of(&line, true).unwrap_or(&[]).iter().map(ToString::to_string).collect();
    settings(&flags).unwrap_or_default()
}

/// The value that a setting has in the end.
pub(super) fn last<'a>(given: &'a [(String, String)], name: &str) -> Option<&'a str> {
    given.iter().rev().find(|(given, _)| given == name).map(|(_, value)| value.as_str())
}

/// The port that the line names.
pub(super) fn port(container: &Value) -> Option<String> {
    let port = expand(container, last(&given(container), "port")?)?;
    port.parse::<u16>().ok().map(|port| port.to_string())
}

/// What PostgreSQL has to be told where its command line isn't touched.
pub(super) fn configuration() -> String {
    let lines =
        SETTINGS.map(
            |(name, value)| {
                if value.contains(' ') { format!("{name} = '{value}'") } else { format!("{name} = {value}") }
            },
        );
    lines.join("; ")
}

/// The flags of a line that ends up as PostgreSQL's; `None` if it doesn't, or it can't be told.
fn flags_of<'a, 'b>(line: &'a [&'b str], has_entrypoint: bool) -> Option<&'a [&'b str]> {
    let program = |text: &str| text.rsplit('/').next().unwrap_or("").to_owned();
    let (rest, has_entrypoint) = match line.split_first() {
        Some((first, rest)) if program(first) == "docker-entrypoint.sh" => (rest, true),
        _ => (line, has_entrypoint),
    };
    match rest.split_first() {
        Some((first, flags)) if program(first) == "postgres" => Some(flags),
        // The entrypoint puts `postgres` in front of flags.
        Some((first, _)) if has_entrypoint && first.starts_with('-') => Some(rest),
        _ => None,
    }
}

/// Whether the setting is there as we want it.
fn check(given: &[(String, String)], name: &str, wanted: &str) -> Result<bool, Rejection> {
    let ours = |value: &str| match name {
        // How often is the user's matter.
        "archive_timeout" => true,
        "archive_mode" => ["on", "true", "yes", "1"].contains(&value.to_ascii_lowercase().as_str()),
        _ => value == wanted,
    };
    let values: Vec<&String> = given.iter().filter(|(given, _)| given == name).map(|(_, value)| value).collect();
    match values.iter().find(|value| !ours(value)) {
        // Without its value, which may hold a password.
        Some(_) => Err(Rejection::new(
            format!("PostgreSQL is started with another {name} already"),
            format!(
                "Take {name} out of the container's args: pgsidecar sets it. Or say pgsidecar.dev/postgres-args: skip; then no flags are added, and archiving is yours to set up (docs/injection.md)."
            ),
        )),
        None => Ok(!values.is_empty()),
    }
}

/// Flags don't reach PostgreSQL as the container is.
fn unreachable(problem: &str) -> Rejection {
    let remedy = format!(
        "Start PostgreSQL with args: [postgres] and without a command of your own; or say pgsidecar.dev/postgres-args: skip and set in postgresql.conf: {}.",
        configuration()
    );
    Rejection::new(problem, remedy)
}

/// Flags never reach PostgreSQL in this image.
fn never(problem: &str) -> Rejection {
    let remedy =
        format!("Say pgsidecar.dev/postgres-args: skip and set in PostgreSQL's configuration: {}.", configuration());
    Rejection::new(problem, remedy)
}

pub(super) fn short(text: &str) -> String {
    text.chars().take(80).collect()
}

/// The settings among PostgreSQL's flags, by their canonical names, in their order: `-c name=value`, `-cname=value`,
/// `--name=value`, with dashes for underscores and in any case, as `PostmasterMain` reads them with `getopt`.
///
/// # Errors
/// The text behind which no flag is read, or with which it's no server (`postgres --single`, `-C`, `--version`).
fn settings(flags: &[String]) -> Result<Vec<(String, String)>, &str> {
    // PostmasterMain's options that take a value (postmaster.c), of all versions.
    const WITH_VALUE: &str = "BCcDdfhkNprStvW-";
    let mut settings = Vec::new();
    let mut flags = flags.iter();
    while let Some(flag) = flags.next() {
        let letters = flag.strip_prefix('-').filter(|letters| !["", "-"].contains(letters)).ok_or(flag.as_str())?;
        let taken = letters.char_indices().find(|(_, letter)| WITH_VALUE.contains(*letter));
        let before = &letters[..taken.map_or(letters.len(), |(index, _)| index)];
        let is_another_program = match taken {
            Some((_, 'C')) => true,
            // As a setting it would have a value.
            Some((0, '-')) => !letters.contains('='),
            _ => before.contains(['V', '?']),
        };
        if is_another_program {
            return Err(flag.as_str());
        }
        if before.contains('i') {
            settings.push((LISTEN_ADDRESSES.to_owned(), "*".to_owned()));
        }
        let Some((index, letter)) = taken else { continue };
        let attached = &letters[index + letter.len_utf8()..];
        let value = if attached.is_empty() { flags.next().map_or("", String::as_str) } else { attached };
        match letter {
            'c' | '-' => {
                let (name, value) = value.split_once('=').unwrap_or((value, ""));
                settings.push((name.trim().replace('-', "_").to_ascii_lowercase(), value.to_owned()));
            }
            'D' => settings.push((DIRECTORY.to_owned(), value.to_owned())),
            'h' => settings.push((LISTEN_ADDRESSES.to_owned(), value.to_owned())),
            'p' => settings.push(("port".to_owned(), value.to_owned())),
            _ => {}
        }
    }
    Ok(settings)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::inject::images::look_up;

    const OURS: [&str; 8] = [
        "-c",
        "archive_mode=on",
        "-c",
        "archive_command=/pgsidecar/pgsidecar-wal archive %p",
        "-c",
        "archive_timeout=5min",
        "-c",
        "restore_command=/pgsidecar/pgsidecar-wal restore %f %p",
    ];

    fn appended(image: &str, container: Value) -> Result<Vec<String>, String> {
        let image = look_up(image);
        complete(&container, image.as_ref()).map(|line| line.append).map_err(|rejection| rejection.to_string())
    }

    fn with(first: &[&str]) -> Vec<String> {
        first.iter().chain(&OURS).map(ToString::to_string).collect()
    }

    #[test]
    fn flags_are_appended_where_they_reach_postgres() {
        let known = "postgres:17";
        assert_eq!(appended(known, json!({})), Ok(with(&["postgres"])));
        assert_eq!(appended(known, json!({"args": [], "command": []})), Ok(with(&["postgres"])));
        assert_eq!(
            appended("apache/age:release_PG16_1.5.0", json!({})),
            Ok(with(&["postgres", "-c", "shared_preload_libraries=age"]))
        );
        for image in [known, "registry.example.com/team/database:1"] {
            for container in [
                json!({"args": ["postgres"]}),
                json!({"args": ["postgres", "-c", "max_connections=200"]}),
                json!({"args": ["-c", "max_connections=200"]}),
                json!({"args": ["docker-entrypoint.sh", "postgres"]}),
                json!({"args": ["/usr/local/bin/docker-entrypoint.sh", "-N", "200"]}),
                json!({"command": ["postgres"]}),
                json!({"command": ["/usr/lib/postgresql/17/bin/postgres", "-D", "/data"]}),
                json!({"command": ["docker-entrypoint.sh"], "args": ["postgres"]}),
                json!({"command": ["docker-entrypoint.sh", "-c", "port=1"]}),
            ] {
                assert_eq!(appended(image, container.clone()), Ok(with(&[])), "{image} {container}");
            }
        }
    }

    #[test]
    fn where_they_do_not_it_is_refused() {
        let known = "postgres:17";
        for (image, container) in [
            ("registry.example.com/team/database:1", json!({})),
            (known, json!({"command": ["sh", "-c", "exec docker-entrypoint.sh postgres"]})),
            (known, json!({"command": ["/bin/bash"], "args": ["-c", "postgres"]})),
            (known, json!({"command": ["docker-entrypoint.sh"]})),
            (known, json!({"command": ["-c", "x=1"]})),
            (known, json!({"args": ["pg_ctl", "start"]})),
            (known, json!({"args": ["postgres", "--"]})),
            (known, json!({"args": ["postgres", "-N", "5", "more"]})),
            (known, json!({"args": ["sh", "-c", "postgres"]})),
            (known, json!({"args": ["postgres", "--single"]})),
            (known, json!({"args": ["--describe-config"]})),
            (known, json!({"args": ["postgres", "-V"]})),
            (known, json!({"args": ["postgres", "-C", "port"]})),
        ] {
            let refused = appended(image, container.clone()).unwrap_err();
            assert!(refused.contains("args: [postgres]") && refused.contains("postgres-args: skip"), "{refused}");
        }
        for (image, container) in [
            ("bitnami/postgresql:17", json!({})),
            ("bitnami/postgresql:17", json!({"args": ["postgres"]})),
            ("ghcr.io/zalando/spilo-17:4.0-p2", json!({})),
        ] {
            let refused = appended(image, container.clone()).unwrap_err();
            assert!(!refused.contains("args: [postgres]") && refused.contains("postgres-args: skip"), "{refused}");
        }
    }

    #[test]
    fn what_is_there_already_is_not_added_again() {
        let all: Vec<String> = with(&["postgres"]);
        assert_eq!(appended("postgres:17", json!({"args": all})), Ok(vec![]));
        let args = json!(["-c", "archive_timeout=60", "--Archive-Mode=ON"]);
        let expected: Vec<String> = [&OURS[2..4], &OURS[6..]].concat().iter().map(ToString::to_string).collect();
        assert_eq!(appended("postgres:17", json!({"args": args})), Ok(expected));
    }

    #[test]
    fn contradictions_are_found_in_every_spelling() {
        for flags in [
            vec!["-c", "archive_command=cp %p /archive/%f"],
            vec!["-carchive_command=cp %p /archive/%f"],
            vec!["--archive_command=cp %p /archive/%f"],
            vec!["--archive-command=cp %p /archive/%f"],
            vec!["--ARCHIVE-command=cp %p /archive/%f"],
            vec!["-c", "Archive-Command=cp %p /archive/%f"],
            vec!["-ic", "archive_command=cp %p /archive/%f"],
            vec!["-N", "100", "-c", "archive_mode=always"],
            vec!["-c", "archive_mode=off"],
            vec!["-c", "archive_library=basic_archive"],
            vec!["-c", "restore_command=cp /archive/%f %p"],
            vec!["-c", "archive_mode=on", "-c", "archive_mode=off"],
        ] {
            let args: Vec<&str> = [vec!["postgres"], flags.clone()].concat();
            let refused = appended("postgres:17", json!({"args": args})).unwrap_err();
            assert!(refused.contains("already") && refused.contains("postgres-args: skip"), "{flags:?}: {refused}");
        }
        for flags in [
            // The value of another flag, and other settings.
            vec!["-D", "--archive_command=x"],
            vec!["-c", "archive_cleanup_command=x"],
            vec!["-c", "archive_library="],
        ] {
            let args: Vec<&str> = [vec!["postgres"], flags.clone()].concat();
            assert_eq!(appended("postgres:17", json!({"args": args})), Ok(with(&[])), "{flags:?}");
        }
    }

    #[test]
    fn what_is_refused_is_told_without_its_values() {
        for container in [
            json!({"command": ["sh", "-c", "PGPASSWORD=hunter2 exec postgres"]}),
            json!({"command": ["PGPASSWORD=hunter2 sh"]}),
            json!({"args": ["postgres", "-c", "archive_command=PGPASSWORD=hunter2 archive %p"]}),
            json!({"args": ["postgres", "PGPASSWORD=hunter2"]}),
            json!({"args": ["postgres", "-C", "hunter2"]}),
            json!({"args": ["postgres", "--password hunter2"]}),
        ] {
            let refused = appended("postgres:17", container.clone()).unwrap_err();
            assert!(!refused.contains("hunter2"), "{refused}");
        }
    }

    #[test]
    fn the_port_is_read_from_the_line() {
        for (args, expected) in [
            (json!(["postgres", "-p", "5433"]), Some("5433")),
            (json!(["-p5433"]), Some("5433")),
            (json!(["postgres", "--port=1", "-c", "port=5433"]), Some("5433")),
            (json!(["postgres", "-p", "$(PORT)"]), None),
            (json!(["postgres", "-p", "$(KNOWN)"]), Some("6432")),
            (json!(["postgres"]), None),
        ] {
            let container = json!({"args": args, "env": [{"name": "KNOWN", "value": "6432"}]});
            assert_eq!(port(&container).as_deref(), expected, "{args}");
        }
    }
}
