//! Why a file couldn't be handed over, in the words of PostgreSQL's log.

use std::net::SocketAddr;

use crate::{
    World,
    http::{HttpError, PROTOCOL, Response},
    json::ErrorBody,
};

/// Longer texts of the daemon are cut.
const MAX_TEXT_CHARS: usize = 500;

/// A failure, told in one or two lines.
#[derive(PartialEq, Eq, Debug)]
pub struct Problem {
    /// It may go away by itself: the daemon restarts, or the store is away.
    pub transient: bool,
    message: String,
    hint: Option<String>,
}

impl Problem {
    /// Something that won't go away by waiting.
    pub fn lasting(message: String) -> Problem {
        Problem { transient: false, message, hint: None }
    }

    /// Something that may be gone in a second.
    pub fn transient(message: String) -> Problem {
        Problem { transient: true, message, hint: None }
    }

    /// A request that got no usable answer.
    pub fn from_http(error: &HttpError, address: SocketAddr) -> Problem {
        let hint = match error {
            HttpError::Unreachable(_) => Some("is the pgsidecar container up, and is this its PGSIDECAR_ADDRESS?"),
            HttpError::NotHttp(_) | HttpError::Foreign(_) => Some("does something other than pgsidecar listen there?"),
            HttpError::OtherProtocol(_) => Some(
                "the daemon republishes the helper at its start: restart it, and let PostgreSQL call the helper that \
                 it has published",
            ),
            HttpError::Broken(_) | HttpError::TimedOut => None,
        };
        let message = match error {
            HttpError::Unreachable(error) => format!("no connection to pgsidecar at {address}: {error}"),
            HttpError::Broken(error) => format!("the connection to pgsidecar at {address} broke: {error}"),
            HttpError::TimedOut => format!("pgsidecar at {address} didn't answer in time"),
            HttpError::NotHttp(what) => format!("the answer from {address} makes no sense: {what}"),
            HttpError::Foreign(status) => {
                format!("what answered at {address} (HTTP {status}) isn't pgsidecar: it sent no Pgsidecar-Protocol")
            }
            HttpError::OtherProtocol(theirs) => format!(
                "pgsidecar at {address} and this helper don't match in version: it speaks protocol {}, the helper \
                 (pgsidecar-wal {}) speaks {PROTOCOL}",
                printable(theirs),
                env!("CARGO_PKG_VERSION")
            ),
        };
        Problem { transient: error.is_transient(), message, hint: hint.map(str::to_owned) }
    }

    /// An answer of the daemon that wasn't hoped for. `body` is what it says of itself.
    pub fn from_answer(status: u16, body: ErrorBody, address: SocketAddr) -> Problem {
        let message = match (body.message, &body.code) {
            (Some(message), Some(code)) => format!("{} (HTTP {status}, {})", printable(&message), printable(code)),
            (Some(message), None) => format!("{} (HTTP {status})", printable(&message)),
            (None, Some(code)) => format!("{address} answered HTTP {status}, {}", printable(code)),
            (None, None) => format!("{address} answered HTTP {status}"),
        };
        let hint = body.hint.as_deref().map(printable);
        Problem { transient: status == 429 || status >= 500, message, hint }
    }

    /// The same for an answer whose body is still to be read.
    pub fn from_response(response: Response, address: SocketAddr) -> Problem {
        let status = response.status();
        Problem::from_answer(status, ErrorBody::parse(&response.error_body().bytes), address)
    }

    /// Tells it: what was tried (`archive 0000…42`), what went wrong, and what is going to happen (`then`).
    pub fn report(&self, what: &str, then: &str, world: &mut World<'_>) {
        world.report(&format!("{what}: {}{then}", self.message));
        if let Some(hint) = &self.hint {
            world.report(&format!("hint: {hint}"));
        }
    }
}

/// Text from elsewhere on one line of a log: no control characters, no endless lines.
fn printable(text: &str) -> String {
    text.chars().take(MAX_TEXT_CHARS).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_the_daemon_stay_on_one_line() {
        let text = |text: &str| Some(text.to_owned());
        let body = ErrorBody { code: text("x"), message: text("a\nb\u{1b}[31m"), hint: text(&"h".repeat(9_999)) };
        let problem = Problem::from_answer(503, body, "127.0.0.1:7433".parse().unwrap());
        assert_eq!(problem.message, "a b [31m (HTTP 503, x)");
        assert_eq!(problem.hint.unwrap().len(), MAX_TEXT_CHARS);

        let error = HttpError::OtherProtocol(format!("\u{1b}{}", "9".repeat(9_999)));
        let message = Problem::from_http(&error, "127.0.0.1:7433".parse().unwrap()).message;
        assert!(message.len() < 2 * MAX_TEXT_CHARS && !message.contains(char::is_control), "{message}");
    }
}
