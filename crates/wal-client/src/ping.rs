//! `ping`: whether the daemon answers, for probes. It says nothing but by its exit code.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use crate::{
    EXIT_FAILED,
    http::{CONNECT_TIMEOUT, Client},
};

/// Asks for the status once; 0 if the daemon answers with success, otherwise 1.
pub fn ping(address: SocketAddr, timeout: Duration) -> u8 {
    let deadline = Instant::now() + timeout;
    let client = Client { address, deadline, silence: timeout, connect_timeout: CONNECT_TIMEOUT };
    match client.send("GET", "/v1/status") {
        Ok(response) if (200..300).contains(&response.status()) => 0,
        _ => EXIT_FAILED,
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{Answer, Server, closed_port, pgdata, run_in};

    #[test]
    fn a_ping_says_only_whether_the_daemon_answers() {
        let answers = [
            Answer::daemon("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"),
            Answer::bytes("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"),
            Answer::bytes("HTTP/1.1 200 OK\r\nPgsidecar-Protocol: 2\r\nContent-Length: 2\r\n\r\n{}"),
            Answer::error(503, "starting"),
            Answer::BlackHole,
        ];
        let server = Server::start(answers);
        let ping = |address: &str| {
            let run = run_in(&["ping", "--timeout", "1"], &[("PGSIDECAR_ADDRESS", address)], &pgdata());
            assert_eq!((run.stdout.as_str(), run.stderr.as_str()), ("", ""));
            run.code
        };
        let codes = [(); 5].map(|()| ping(&server.address.to_string()));
        assert_eq!(codes, [0, 1, 1, 1, 1]);
        assert_eq!(ping(&closed_port().to_string()), 1);
        assert!(server.requests()[0].starts_with("GET /v1/status HTTP/1.1\r\n"));
    }
}
