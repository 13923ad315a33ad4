//! Pauses between attempts, and one log line for each reason of failing.

use std::time::Duration;

use log::Level;

/// Growing pauses between attempts. Half of each is random, so that many clients of one server do
/// not come back at the same time.
#[derive(Default)]
pub struct Backoff {
    attempts: u32,
}

impl Backoff {
    /// The next pause: up to 100 ms at first, never more than 3 s.
    pub fn next_delay(&mut self) -> Duration {
        let full = (100u64 << self.attempts.min(5)).min(3000);
        self.attempts += 1;
        Duration::from_millis(full / 2 + fastrand::u64(0..=full / 2))
    }

    /// Begins with the shortest pause again, after a success.
    pub fn reset(&mut self) {
        self.attempts = 0;
    }
}

/// Logs why something fails that is tried again and again: one line for each reason, not one for
/// each attempt.
#[derive(Default)]
pub struct RetryLog {
    /// Pauses between the attempts.
    pub backoff: Backoff,
    last_reason: String,
}

impl RetryLog {
    /// Logs `what: reason` at `level`, or at `debug` where the last attempt failed for the same
    /// reason; returns the pause until the next attempt.
    pub fn failed(&mut self, level: Level, what: &str, reason: &str) -> Duration {
        let level = if self.last_reason == reason { Level::Debug } else { level };
        log::log!(level, "{what}: {reason}");
        reason.clone_into(&mut self.last_reason);
        self.backoff.next_delay()
    }

    /// Notes a success; whether there was a failure before.
    pub fn succeeded(&mut self) -> bool {
        self.backoff.reset();
        !std::mem::take(&mut self.last_reason).is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_three_seconds_and_start_small_after_a_success() {
        let mut backoff = Backoff::default();
        let pauses: Vec<u128> = (0..8).map(|_| backoff.next_delay().as_millis()).collect();
        assert!((50..=100).contains(&pauses[0]), "{pauses:?}");
        assert!((1500..=3000).contains(&pauses[7]), "{pauses:?}");
        backoff.reset();
        assert!(backoff.next_delay().as_millis() <= 100);
    }

    #[test]
    fn a_success_after_a_failure_is_noticed_once() {
        let mut retry = RetryLog::default();
        assert!(!retry.succeeded());
        retry.failed(Level::Debug, "test", "away");
        assert!(retry.succeeded());
        assert!(!retry.succeeded());
    }
}
