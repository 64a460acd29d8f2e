//! How fast a backup may read.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// The longest sleep at a time: who waits also has to notice that it's been cancelled.
const NAP: Duration = Duration::from_millis(100);

/// Lets so many bytes a second through, for all threads together.
#[derive(Debug, Default)]
pub struct Pace {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Bytes a second; `None` for no limit.
    rate: Option<u64>,
    /// When what has been taken so far would have been read at this rate.
    free_at: Option<Instant>,
}

impl Pace {
    /// Sets the limit, in bytes a second.
    pub fn limit(&self, rate: Option<u64>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        *state = State { rate, free_at: None };
    }

    /// Notes that so many bytes were read, and sleeps if that was too fast; but not for long if `cancelled`.
    pub fn took(&self, bytes: u64, cancelled: impl Fn() -> bool) {
        let now = Instant::now();
        let wait_until = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(rate) = state.rate else { return };
            // What wasn't used in the past isn't saved up.
            let free_at = state.free_at.unwrap_or(now).max(now);
            let next = free_at + Duration::from_secs_f64(bytes as f64 / rate as f64);
            state.free_at = Some(next);
            next
        };
        while !cancelled() {
            let left = wait_until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(NAP));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

    use super::*;

    #[test]
    fn threads_share_the_rate() {
        let pace = Pace::default();
        pace.limit(Some(1_000_000));
        let began = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| (0..10).for_each(|_| pace.took(10_000, || false)));
            }
        });
        let took = began.elapsed();
        assert!(took >= Duration::from_millis(290) && took < Duration::from_secs(3), "{took:?}");
    }

    #[test]
    fn without_a_limit_or_cancelled_nobody_waits() {
        let pace = Pace::default();
        let began = Instant::now();
        pace.took(u64::MAX, || false);
        pace.limit(Some(1));
        let cancelled = AtomicBool::new(true);
        pace.took(1_000, || cancelled.load(Relaxed));
        assert!(began.elapsed() < Duration::from_secs(5));
    }
}
