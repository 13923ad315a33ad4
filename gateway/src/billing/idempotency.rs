//! Remembers for some minutes which body came with which idempotency key.
//!
//! The gateway has no data of its own, so it cannot know every key that was ever used. Within this
//! memory another body under the same key is refused at once; after it billing finds the conflict, and
//! the message becomes a dead letter.

use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// The table has `SETS * WAYS` entries of 24 bytes, 0.8 MB. In a full set the oldest entry is replaced.
const SETS: usize = 4096;
const WAYS: usize = 8;

/// How long a body is remembered.
const RETENTION: Duration = Duration::from_secs(600);

#[derive(Clone, Copy)]
struct Entry {
    id: u64,
    body: u64,
    /// Milliseconds since the start, plus one; 0 for an unused entry.
    seen_at: u64,
}

/// A table of fixed size with a keyed hash: no client can choose keys that fill one set.
pub struct IdempotencyMemory {
    sets: Vec<Mutex<[Entry; WAYS]>>,
    hasher: RandomState,
    started: Instant,
}

impl Default for IdempotencyMemory {
    fn default() -> IdempotencyMemory {
        let unused = Entry { id: 0, body: 0, seen_at: 0 };
        let sets = (0..SETS).map(|_| Mutex::new([unused; WAYS])).collect();
        IdempotencyMemory { sets, hasher: RandomState::new(), started: Instant::now() }
    }
}

impl IdempotencyMemory {
    /// Remembers the body of a message id that was made from a key. Whether it is the same body as
    /// before, or the first one that is remembered. The first body stays the one to compare with,
    /// also when its order could not be published: then the client repeats the same request.
    pub fn is_same_body(&self, message_id: &str, body: &str) -> bool {
        self.check(message_id, body, self.started.elapsed())
    }

    fn check(&self, message_id: &str, body: &str, now: Duration) -> bool {
        let id = self.hasher.hash_one(message_id);
        let body = self.hasher.hash_one(body);
        let now = now.as_millis() as u64 + 1;
        let oldest_valid = now.saturating_sub(RETENTION.as_millis() as u64);
        let mut set = self.sets[id as usize % SETS].lock();
        let known = set.iter_mut().find(|entry| entry.id == id && entry.seen_at > oldest_valid);
        if let Some(entry) = known {
            let is_same = entry.body == body;
            if is_same {
                entry.seen_at = now;
            }
            return is_same;
        }
        let oldest = set.iter_mut().min_by_key(|entry| entry.seen_at);
        if let Some(entry) = oldest {
            *entry = Entry { id, body, seen_at: now };
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn another_body_under_the_same_id_is_noticed_as_long_as_the_first_is_remembered() {
        let memory = IdempotencyMemory::default();
        assert!(memory.check("id", "first", SECOND));
        assert!(memory.check("id", "first", SECOND * 2));
        assert!(!memory.check("id", "other", SECOND * 3));
        assert!(memory.check("other id", "other", SECOND * 3));
        assert!(memory.check("id", "first", SECOND * 4), "the first body is still the one");
        assert!(!memory.check("id", "other", SECOND * 4 + RETENTION - SECOND));
        assert!(memory.check("id", "other", SECOND * 4 + RETENTION * 2));
    }

    #[test]
    fn any_number_of_keys_takes_no_more_memory_and_refuses_no_new_key() {
        let memory = IdempotencyMemory::default();
        for number in 0..100_000 {
            assert!(memory.check(&format!("id {number}"), "body", SECOND), "{number}");
        }
    }
}
