//! How fast work goes and how long it will still take, by what has been done of it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Too early to say anything.
const WARM_UP: Duration = Duration::from_secs(1);

/// How fast it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Estimate {
    /// Bytes a second, on average since the work began.
    pub bytes_per_second: u64,
    /// Seconds until all is done at this rate; `None` while it isn't known how much there is, and when all is done.
    pub seconds_left: Option<u64>,
}

impl Estimate {
    /// The estimate when `done` of `total` bytes (0: not known) took this long. `None` if it's too early to say.
    pub fn new(done: u64, total: u64, elapsed: Duration) -> Option<Estimate> {
        if elapsed < WARM_UP || done == 0 {
            return None;
        }
        let rate = (u128::from(done) * 1000 / elapsed.as_millis().max(1)).max(1);
        let left = u128::from(total.saturating_sub(done)).div_ceil(rate);
        Some(Estimate {
            bytes_per_second: u64::try_from(rate).unwrap_or(u64::MAX),
            seconds_left: (total > done).then(|| u64::try_from(left).unwrap_or(u64::MAX)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_and_time_left_follow_from_what_was_done() {
        let after = Duration::from_secs;
        let estimate = Estimate::new(300, 1000, after(3)).unwrap();
        assert_eq!(estimate, Estimate { bytes_per_second: 100, seconds_left: Some(7) });
        assert_eq!(Estimate::new(300, 0, after(3)).unwrap().seconds_left, None);
        assert_eq!(Estimate::new(1000, 1000, after(3)).unwrap().seconds_left, None);
        assert_eq!(Estimate::new(300, 1000, Duration::from_millis(10)), None);
        assert_eq!(Estimate::new(0, 1000, after(3)), None);
        // Slower than a byte a second, and more than there could be.
        assert_eq!(Estimate::new(1, u64::MAX, after(10)).unwrap().seconds_left, Some(u64::MAX - 1));
    }
}
