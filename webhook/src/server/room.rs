//! Memory for bodies, and turns at computing answers.
//!
//! Room is taken as bytes arrive, not as they are announced: whoever announces megabytes and sends nothing holds
//! nothing up. A body that is larger than most are, and any for which there's no room left, goes on in the one place
//! for such bodies, which has room for the largest. So there's always one that can be read to its end, and those that
//! wait for more while they hold some can't block one another for ever.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A larger body is refused. The API server takes objects of 3 MiB, and JSON may be longer than what it stores.
pub const MAX_BODY_BYTES: usize = 8 << 20;
/// For all bodies but the one in the place for large ones, which has [`MAX_BODY_BYTES`] more.
const SHARED_KIB: usize = 4 << 10;
/// What a body may take of that. A pod has some kilobytes.
const MOST_SHARED_KIB: usize = 256;
/// Answers that are computed at a time. One takes milliseconds, and the memory of what it holds in all its forms.
const COMPUTED_AT_A_TIME: usize = 1;

/// The bytes that bodies may take, and the turns at computing answers.
pub struct Room {
    shared: Arc<Semaphore>,
    large: Arc<Semaphore>,
    turns: Arc<Semaphore>,
}

impl Default for Room {
    fn default() -> Room {
        Room {
            shared: Arc::new(Semaphore::new(SHARED_KIB)),
            large: Arc::new(Semaphore::new(1)),
            turns: Arc::new(Semaphore::new(COMPUTED_AT_A_TIME)),
        }
    }
}

impl Room {
    /// None, for a body of which nothing has come.
    pub fn hold(self: &Arc<Room>) -> Held {
        Held { room: self.clone(), shared: None, large: None }
    }

    /// Waits for a turn at computing an answer. It ends when what is answered is dropped.
    pub async fn turn(&self) -> Option<OwnedSemaphorePermit> {
        self.turns.clone().acquire_owned().await.ok()
    }
}

/// The room that a body has, until this is dropped.
pub struct Held {
    room: Arc<Room>,
    shared: Option<OwnedSemaphorePermit>,
    large: Option<OwnedSemaphorePermit>,
}

impl Held {
    /// Waits until it may have this many bytes in all.
    pub async fn grow(&mut self, bytes: usize) {
        if self.large.is_some() {
            return;
        }
        let held = self.shared.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let wanted = bytes.div_ceil(1024);
        let Ok(more) = u32::try_from(wanted.saturating_sub(held)) else { return };
        if more == 0 {
            return;
        }
        let (shared, large) = (self.room.shared.clone(), self.room.large.clone());
        if wanted > MOST_SHARED_KIB {
            self.large = large.acquire_owned().await.ok();
            return;
        }
        tokio::select! {
            biased;
            more = shared.acquire_many_owned(more) => match (&mut self.shared, more) {
                (Some(held), Ok(more)) => held.merge(more),
                (held, more) => *held = more.ok(),
            },
            place = large.acquire_owned() => self.large = place.ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    async fn waits(held: &mut Held, bytes: usize) -> bool {
        tokio::time::timeout(Duration::from_millis(20), held.grow(bytes)).await.is_err()
    }

    #[tokio::test]
    async fn one_body_can_always_be_read_to_its_end() {
        let room = Arc::new(Room::default());
        let mut bodies: Vec<Held> = (0..SHARED_KIB / MOST_SHARED_KIB).map(|_| room.hold()).collect();
        for body in &mut bodies {
            assert!(!waits(body, MOST_SHARED_KIB << 10).await);
        }
        // Nothing is left, so a small one takes the place, and all others wait, those with some room included.
        let (mut small, mut other) = (room.hold(), room.hold());
        assert!(!waits(&mut small, 1).await);
        assert!(waits(&mut other, 1).await && waits(&mut bodies[0], MAX_BODY_BYTES).await);
        assert!(!waits(&mut small, MAX_BODY_BYTES).await);
        drop(small);
        assert!(!waits(&mut bodies[0], MAX_BODY_BYTES).await);
        assert!(waits(&mut other, 1).await);
        bodies.pop();
        assert!(!waits(&mut other, MOST_SHARED_KIB << 10).await);
    }

    #[tokio::test]
    async fn large_bodies_leave_room_for_small_ones_and_give_back_what_they_had() {
        let room = Arc::new(Room::default());
        let mut large: Vec<Held> = (0..8).map(|_| room.hold()).collect();
        assert!(!waits(&mut large[0], MAX_BODY_BYTES).await);
        for body in &mut large[1..] {
            assert!(!waits(body, 100 << 10).await && waits(body, MAX_BODY_BYTES).await);
        }
        let mut small = room.hold();
        assert!(!waits(&mut small, 10).await && !waits(&mut small, 1025).await);
        assert_eq!(room.shared.available_permits(), SHARED_KIB - 7 * 100 - 2);
        drop((large, small));
        assert_eq!((room.shared.available_permits(), room.large.available_permits()), (SHARED_KIB, 1));
    }
}
