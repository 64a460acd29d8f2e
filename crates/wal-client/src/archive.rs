//! `archive_command`: asks the daemon to make one file durable.
//!
//! The daemon reads the file itself from the shared `pg_wal`. Success is said for 200 and 204 alone, if it is the
//! daemon who says it. PostgreSQL repeats a failed command by itself, so there is no long waiting here: a daemon
//! that isn't there is given a moment to restart, and one that says no is believed. That moment is short on
//! purpose: the temporary server of the official image archives too, perhaps before there is a daemon, and is
//! stopped within 60 s, in which PostgreSQL tries up to six times. It listens on no address, and where that is so, all
//! of it is over within [`LIMIT_WITHOUT_ADDRESS`]; the daemon's upload goes on.

use std::{
    fs::{self, File},
    io::Read,
    net::SocketAddr,
    os::unix::fs::MetadataExt,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use crate::{
    EXIT_FAILED, World,
    args::FileName,
    http::{CONNECT_TIMEOUT, Client, HttpError, Response},
    problem::Problem,
};

/// How long a daemon that can't be reached is tried.
const ABSENCE_LIMIT: Duration = Duration::from_secs(2);
const RECONNECT_EVERY: Duration = Duration::from_millis(250);
/// How long a server is kept waiting that listens on no address.
const LIMIT_WITHOUT_ADDRESS: Duration = Duration::from_secs(5);

/// Archives the file and returns the exit code: 0 when it is durable, otherwise 1.
pub fn archive(file: &FileName, address: SocketAddr, timeout: Duration, world: &mut World<'_>) -> u8 {
    let target = format!("/v1/wal/{file}/archive{}", asker(file, world.cwd));
    let timeout = if listens_on_no_address(world.cwd) { timeout.min(LIMIT_WITHOUT_ADDRESS) } else { timeout };
    let problem = match send(&target, address, timeout) {
        Ok(response) if matches!(response.status(), 200 | 204) => return 0,
        Ok(response) => Problem::from_response(response, address),
        Err(error) => Problem::from_http(&error, address),
    };
    problem.report(&format!("archive {file}"), "", world);
    EXIT_FAILED
}

/// Whether `listen_addresses` is empty: the sixth line of `postmaster.pid` (`src/include/utils/pidfile.h`).
fn listens_on_no_address(data: &Path) -> bool {
    let pid_file = fs::read_to_string(data.join("postmaster.pid")).unwrap_or_default();
    pid_file.lines().nth(5).is_some_and(|address| address.trim().is_empty())
}

/// Who asks, as a query: the daemon reads the file from the data directory that it knows, and must not acknowledge that
/// file to the server of another one. The system identifier is the first field of `pg_control`; a copy of the same
/// database has other inodes. Empty where neither can be read: the daemon then goes by the name.
fn asker(file: &FileName, data: &Path) -> String {
    let mut identifier = [0; 8];
    let read = File::open(data.join("global/pg_control")).and_then(|mut control| control.read_exact(&mut identifier));
    let inode = fs::metadata(data.join("pg_wal").join(file.to_string())).map(|meta| meta.ino());
    match (read, inode) {
        (Ok(()), Ok(inode)) => format!("?system-identifier={}&inode={inode}", u64::from_le_bytes(identifier)),
        _ => String::new(),
    }
}

fn send(target: &str, address: SocketAddr, timeout: Duration) -> Result<Response, HttpError> {
    let started = Instant::now();
    loop {
        let connect_timeout = CONNECT_TIMEOUT.min(ABSENCE_LIMIT.saturating_sub(started.elapsed()));
        // The upload may take all the time that there is, and nothing is heard of it.
        let client = Client { address, deadline: started + timeout, silence: timeout, connect_timeout };
        match client.send("POST", target) {
            // Asking twice is harmless: the same content again is a success.
            Err(HttpError::Unreachable(_) | HttpError::Broken(_))
                if started.elapsed() + RECONNECT_EVERY < ABSENCE_LIMIT.min(timeout) =>
            {
                thread::sleep(RECONNECT_EVERY);
            }
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Answer, Run, Server, closed_port, pgdata, run_in};

    const PATH: &str = "pg_wal/000000010000000000000042";

    fn archive_at(address: SocketAddr, timeout: &str) -> Run {
        run_in(&["archive", "--timeout", timeout, PATH], &[("PGSIDECAR_ADDRESS", &address.to_string())], &pgdata())
    }

    fn archive_with(answer: &str) -> Run {
        archive_at(Server::start([Answer::daemon(answer)]).address, "1")
    }

    #[test]
    fn the_temporary_server_of_an_image_is_not_kept_waiting() {
        for (listen, least, most) in [("", 5, 7), ("*", 8, 12)] {
            let data = pgdata();
            let pid_file = format!("71\n/data\n1763714000\n5432\n/tmp\n{listen}\n  12 34\nready   \n");
            fs::write(data.path().join("postmaster.pid"), pid_file).unwrap();
            let started = Instant::now();
            let address = Server::start([Answer::BlackHole]).address.to_string();
            let run = run_in(&["archive", "--timeout", "8", PATH], &[("PGSIDECAR_ADDRESS", &address)], &data);
            assert_eq!(run.code, 1);
            let took = started.elapsed();
            assert!((Duration::from_secs(least)..Duration::from_secs(most)).contains(&took), "{listen:?} {took:?}");
        }
    }

    #[test]
    fn only_200_and_204_acknowledge() {
        let server = Server::start([Answer::daemon("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")]);
        let run = archive_at(server.address, "5");
        assert_eq!((run.code, run.stderr.as_str()), (0, ""));
        assert!(server.requests()[0].starts_with("POST /v1/wal/000000010000000000000042/archive HTTP/1.1\r\n"));

        assert_eq!(archive_with("HTTP/1.1 204 No Content\r\n\r\n").code, 0);
        for status in ["201 Created", "202 Accepted", "206 Partial Content", "304 Not Modified", "404 Not Found"] {
            assert_eq!(archive_with(&format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n")).code, 1, "{status}");
        }
        assert_eq!(archive_with("HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n").code, 1);
        assert_eq!(archive_with("garbage\r\n").code, 1);
        assert_eq!(archive_with("HTTP/1.1 200 O").code, 1);
    }

    #[test]
    fn a_foreign_server_acknowledges_nothing() {
        for answer in ["HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "HTTP/1.1 204 No Content\r\n\r\n"] {
            // A second attempt would succeed.
            let server = Server::start([Answer::bytes(answer), Answer::daemon(answer)]);
            let run = archive_at(server.address, "5");
            assert_eq!((run.code, server.requests().len()), (1, 1), "{answer}");
            assert!(run.stderr.contains("isn't pgsidecar: it sent no Pgsidecar-Protocol\n"), "{}", run.stderr);
            assert!(
                run.stderr.ends_with("hint: does something other than pgsidecar listen there?\n"),
                "{}",
                run.stderr
            );
        }
    }

    #[test]
    fn a_daemon_of_another_protocol_acknowledges_nothing() {
        let other = Answer::bytes("HTTP/1.1 204 No Content\r\nPgsidecar-Protocol: 2\r\n\r\n");
        let server = Server::start([other, Answer::daemon("HTTP/1.1 204 No Content\r\n\r\n")]);
        let run = archive_at(server.address, "5");
        assert_eq!((run.code, server.requests().len()), (1, 1));
        assert!(run.stderr.contains("don't match in version: it speaks protocol 2, "), "{}", run.stderr);
        assert!(run.stderr.contains("hint: the daemon republishes the helper at its start"), "{}", run.stderr);
    }

    #[test]
    fn the_reason_of_a_refusal_is_told() {
        let body = r#"{"error":{"code":"content_conflict","message":"other content is there","hint":"see \"docs\""}}"#;
        let run = archive_with(&format!("HTTP/1.1 409 Conflict\r\nContent-Length: {}\r\n\r\n{body}", body.len()));
        let expected = [
            "pgsidecar-wal: archive 000000010000000000000042: other content is there (HTTP 409, content_conflict)",
            "pgsidecar-wal: hint: see \"docs\"",
        ];
        assert_eq!((run.code, run.stderr.lines().collect()), (1, Vec::from(expected)));
    }

    #[test]
    fn a_503_is_believed_at_once() {
        let started = Instant::now();
        let server = Server::start([
            Answer::error(503, "repository_unreachable"),
            Answer::daemon("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
        ]);
        assert_eq!(archive_at(server.address, "5").code, 1);
        assert_eq!(server.requests().len(), 1);
        assert!(started.elapsed() < Duration::from_secs(1));
    }

    #[test]
    fn an_absent_daemon_is_given_a_moment_and_no_more() {
        let started = Instant::now();
        let run = archive_at(closed_port(), "60");
        assert_eq!(run.code, 1);
        assert!(run.stderr.contains("no connection to pgsidecar at 127."), "{}", run.stderr);
        let took = started.elapsed();
        assert!((Duration::from_secs(1)..Duration::from_secs(3)).contains(&took), "{took:?}");
    }

    #[test]
    fn a_daemon_that_restarts_is_found() {
        let server = Server::start([Answer::bytes(""), Answer::daemon("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")]);
        assert_eq!(archive_at(server.address, "5").code, 0);

        let address = closed_port();
        let later = thread::spawn(move || {
            thread::sleep(Duration::from_millis(600));
            Server::start_at(address, [Answer::daemon("HTTP/1.1 204 No Content\r\n\r\n")])
        });
        assert_eq!(archive_at(address, "5").code, 0);
        drop(later.join());
    }

    #[test]
    fn a_daemon_that_never_answers_is_left_at_the_deadline() {
        let server = Server::start([Answer::BlackHole]);
        let started = Instant::now();
        let run = archive_at(server.address, "1");
        assert_eq!(run.code, 1);
        assert!(run.stderr.contains("didn't answer in time"), "{}", run.stderr);
        assert!(started.elapsed() < Duration::from_secs(2));
    }

    #[test]
    fn a_slow_daemon_is_waited_for() {
        let answer =
            Answer::drip("HTTP/1.1 204 No Content\r\nPgsidecar-Protocol: 1\r\n\r\n", Duration::from_millis(20));
        assert_eq!(archive_at(Server::start([answer]).address, "5").code, 0);
    }
}
