//! What connections are doing: which of them idle, since when, and which has to make way for a new one.

use std::{
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

/// How long a connection may idle.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Until its first request.
    pub first: Duration,
    /// From an answer to the next request.
    pub between: Duration,
}

/// Whether a connection is in use.
pub struct Activity {
    limits: Limits,
    under_way: AtomicUsize,
    idle: Mutex<Idle>,
    evicted: Notify,
}

/// Since when a connection idles, if no request is under way, and until when it may.
#[derive(Clone, Copy)]
struct Idle {
    since: Instant,
    until: Instant,
    evicted: bool,
}

impl Activity {
    /// That of a connection that was just accepted.
    pub fn new(limits: Limits) -> Activity {
        let since = Instant::now();
        let idle = Idle { since, until: since + limits.first, evicted: false };
        Activity { limits, under_way: AtomicUsize::new(0), idle: Mutex::new(idle), evicted: Notify::new() }
    }

    /// Counts a request as under way until what is answered is dropped.
    pub fn request(self: &Arc<Activity>) -> UnderWay {
        self.under_way.fetch_add(1, Relaxed);
        UnderWay(self.clone())
    }

    fn idle(&self) -> Idle {
        *self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_busy(&self) -> bool {
        self.under_way.load(Relaxed) > 0
    }

    /// Returns when the connection has idled for too long.
    pub async fn idled(&self) {
        loop {
            let deadline = if self.is_busy() { Instant::now() + self.limits.between } else { self.idle().until };
            if deadline <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(deadline).await;
        }
    }

    /// Returns when the connection has to make way.
    pub async fn evicted(&self) {
        self.evicted.notified().await;
    }

    /// Returns when no request is under way; looks `every` so often, at first after that time.
    pub async fn quiet(&self, every: Duration) {
        tokio::time::sleep(every).await;
        while self.is_busy() {
            tokio::time::sleep(every).await;
        }
    }

    fn evict(&self) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).evicted = true;
        self.evicted.notify_one();
    }
}

/// A request that is under way, until this is dropped: also where its future is.
pub struct UnderWay(Arc<Activity>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Relaxed);
        let mut idle = self.0.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.since = Instant::now();
        idle.until = idle.since + self.0.limits.between;
    }
}

/// Those of the connections that are open.
#[derive(Default)]
pub struct Open(Vec<Weak<Activity>>);

impl Open {
    /// Adds a connection.
    pub fn add(&mut self, activity: &Arc<Activity>) {
        self.0.retain(|open| open.strong_count() > 0);
        self.0.push(Arc::downgrade(activity));
    }

    /// Tells those connections to close that have idled longest, so that `places` become free with those that have been
    /// told before. Fewer, if the others are in use.
    pub fn evict(&self, places: usize) {
        let open = self.0.iter().filter_map(Weak::upgrade);
        let (told, others): (Vec<_>, Vec<_>) = open.partition(|open| open.idle().evicted);
        let mut idle: Vec<_> = others.into_iter().filter(|open| !open.is_busy()).collect();
        idle.sort_by_key(|open| open.idle().since);
        idle.iter().take(places.saturating_sub(told.len())).for_each(|open| open.evict());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn those_that_have_idled_longest_make_way() {
        let limits = Limits { first: Duration::from_secs(1), between: Duration::from_secs(1) };
        let mut open = Open::default();
        let mut connections: Vec<_> = (0..5).map(|_| Arc::new(Activity::new(limits))).collect();
        connections.iter().for_each(|connection| open.add(connection));
        let _busy = connections[0].request();
        drop(connections[1].request());
        let told = |connections: &[Arc<Activity>]| {
            connections.iter().map(|connection| u8::from(connection.idle().evicted)).collect::<Vec<_>>()
        };
        open.evict(2);
        assert_eq!(told(&connections), [0, 0, 1, 1, 0]);
        open.evict(2);
        assert_eq!(told(&connections), [0, 0, 1, 1, 0]);
        connections.remove(2);
        open.evict(2);
        assert_eq!(told(&connections), [0, 0, 1, 1]);
        open.evict(9);
        assert_eq!(told(&connections), [0, 1, 1, 1]);
    }
}
