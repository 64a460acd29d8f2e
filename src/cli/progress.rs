//! How far long work is, on stderr: a line that is replaced where a person watches, a line now and then otherwise, and
//! nothing with `--json`.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::output;
use crate::estimate::Estimate;

/// How often a line is written where nobody watches: enough for a log, too little to drown it.
const PLAIN_EVERY: Duration = Duration::from_secs(10);

/// Shows how far something is. Dropped, it leaves the terminal as it was.
pub struct Shown {
    to: To,
}

enum To {
    Nobody,
    Terminal(ProgressBar),
    Lines { last: Instant },
}

impl Shown {
    /// For a command that was or wasn't called with `--json`.
    pub fn new(json: bool) -> Shown {
        let to = match (json, output::watched()) {
            (true, _) => To::Nobody,
            (false, true) => To::Terminal(ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(4))),
            (false, false) => To::Lines { last: Instant::now() },
        };
        Shown { to }
    }

    /// Says what is being done, without a measure.
    pub fn doing(&mut self, what: &str) {
        self.show(what, None);
    }

    /// Says how many of about how many bytes (0: not known) are done, how fast it goes, and `more`.
    pub fn bytes(&mut self, done: u64, total: u64, estimate: Option<Estimate>, more: &str) {
        let (line, percent) = describe(done, total, estimate, more);
        self.show(&line, percent);
    }

    fn show(&mut self, line: &str, percent: Option<u64>) {
        match &mut self.to {
            To::Nobody => {}
            To::Lines { last } if last.elapsed() < PLAIN_EVERY => {}
            To::Lines { last } => {
                *last = Instant::now();
                eprintln!("{line}");
            }
            To::Terminal(bar) => {
                let template = if percent.is_some() { "[{bar:24}] {msg}" } else { "{msg}" };
                if let Ok(style) = ProgressStyle::with_template(template) {
                    bar.set_style(style.progress_chars("=> "));
                }
                bar.set_length(100);
                bar.set_position(percent.unwrap_or(0));
                bar.set_message(line.to_owned());
            }
        }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        if let To::Terminal(bar) = &self.to {
            bar.finish_and_clear();
        }
    }
}

fn describe(done: u64, total: u64, estimate: Option<Estimate>, more: &str) -> (String, Option<u64>) {
    // The total is an estimate as well: what goes beyond it isn't more than all.
    let percent =
        (total > 0).then(|| u64::try_from(u128::from(done) * 100 / u128::from(total)).unwrap_or(100).min(100));
    let mut line = match percent {
        Some(percent) => format!("{} of about {} ({percent} %)", output::size(done), output::size(total)),
        None => output::size(done),
    };
    if let Some(estimate) = estimate {
        line += &format!(", {}/s", output::size(estimate.bytes_per_second));
        if let Some(seconds) = estimate.seconds_left {
            line += &format!(", {} left", duration(seconds));
        }
    }
    if !more.is_empty() {
        line += &format!(", {more}");
    }
    (line, percent)
}

/// `45 s`, `3 min 20 s`, `2 h 5 min`
fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_how_much_how_fast_and_how_long() {
        let estimate = Some(Estimate { bytes_per_second: 50 << 20, seconds_left: Some(200) });
        assert_eq!(
            describe(1 << 30, 4 << 30, estimate, "120 files"),
            ("1024 MB of about 4096 MB (25 %), 50 MB/s, 3 min 20 s left, 120 files".to_owned(), Some(25))
        );
        assert_eq!(describe(5000, 0, None, ""), ("5000 B".to_owned(), None));
        assert_eq!(describe(20, 10, None, "").1, Some(100));
        assert_eq!((duration(59), duration(7500)), ("59 s".to_owned(), "2 h 5 min".to_owned()));
    }
}
