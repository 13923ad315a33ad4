//! A circuit breaker: an upstream that keeps failing is not asked for a while, and then by one
//! request at a time until it answers.
//!
//! It counts failures in a row and not a share in a window. Any response in between shows that the
//! upstream works; one failed request opens nothing; many requests that time out together open it at
//! once. The breaker knows nothing of what it guards, and the time is an argument.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use prometheus::{IntCounter, IntGauge};

use super::metrics;

/// Extra delay before a request that is not idempotent may be the half-open trial. If the trial fails,
/// its client cannot know whether it took effect, so a safe request is preferred.
const UNSAFE_TRIAL_DELAY: Duration = Duration::from_millis(200);

/// When a breaker opens, and for how long.
#[derive(Clone, Debug)]
pub struct Config {
    /// Failures in a row that open it; 0 keeps it closed for ever.
    pub failure_threshold: u32,
    /// For how long it opens first; each failed trial doubles the time. Half of the time is random, so
    /// that several gateways do not try at the same moment.
    pub open_for: Duration,
    /// The longest time for which it opens.
    pub max_open_for: Duration,
    /// A trial without a result after this time no longer prevents the next one.
    pub half_open_timeout: Duration,
}

/// Guards one upstream.
pub struct Breaker {
    upstream: &'static str,
    config: Config,
    inner: Mutex<Inner>,
    state_gauge: IntGauge,
    rejected: IntCounter,
}

struct Inner {
    state: State,
    /// Counts the changes of state. A permit belongs to the state in which it was given: its result
    /// does not count after a change, for example a timeout from before the recovery.
    generation: u64,
}

#[derive(Clone, Copy)]
enum State {
    /// All requests are admitted; `failures` in a row have failed.
    Closed { failures: u32 },
    /// No request is admitted before `until`.
    Open { until: Instant, open_for: Duration },
    /// One request is admitted; the next one after `deadline`, if the first has no result by then.
    HalfOpen { deadline: Instant, open_for: Duration },
}

/// The permission to send one request. Dropped without a result it counts for nothing, and if it was
/// the trial, the next request may be the trial.
#[must_use]
pub struct Permit<'b> {
    breaker: &'b Breaker,
    generation: u64,
    reported: bool,
}

impl Breaker {
    /// A closed breaker; `upstream` names it in the log and in the metrics.
    pub fn new(upstream: &'static str, config: Config) -> Breaker {
        for state in ["closed", "half_open", "open"] {
            // So a scrape shows a zero and not a gap.
            metrics::BREAKER_TRANSITIONS.with_label_values(&[upstream, state]);
        }
        Breaker {
            upstream,
            config,
            inner: Mutex::new(Inner { state: State::Closed { failures: 0 }, generation: 0 }),
            state_gauge: metrics::BREAKER_STATE.with_label_values(&[upstream]),
            rejected: metrics::BREAKER_REJECTED.with_label_values(&[upstream]),
        }
    }

    /// A permit, or how long to wait for one. `safe` requests change nothing (RFC 9110 section 9.2.1):
    /// they are preferred as the trial.
    pub fn admit(&self, now: Instant, safe: bool) -> Result<Permit<'_>, Duration> {
        let mut inner = self.inner.lock();
        let open_for = self.time_until_allowed(&inner, now, safe).inspect_err(|_| {
            self.rejected.inc();
        })?;
        if let Some(open_for) = open_for {
            let deadline = now + self.config.half_open_timeout;
            self.transition_to(&mut inner, State::HalfOpen { deadline, open_for });
        }
        Ok(Permit { breaker: self, generation: inner.generation, reported: false })
    }

    /// How long to wait where [`admit`](Self::admit) would refuse now; starts no trial. For requests
    /// that have to wait for something else first.
    pub fn check(&self, now: Instant, safe: bool) -> Result<(), Duration> {
        let allowed = self.time_until_allowed(&self.inner.lock(), now, safe);
        allowed.map(drop).inspect_err(|_| self.rejected.inc())
    }

    /// `Ok` when a request may be sent; with the last `open_for` when it would be the trial.
    fn time_until_allowed(
        &self,
        inner: &Inner,
        now: Instant,
        safe: bool,
    ) -> Result<Option<Duration>, Duration> {
        let (from, open_for) = match inner.state {
            State::Closed { .. } => return Ok(None),
            State::Open { until, open_for } if safe => (until, open_for),
            State::Open { until, open_for } => (until + UNSAFE_TRIAL_DELAY, open_for),
            State::HalfOpen { deadline, open_for } => (deadline, open_for),
        };
        match from.saturating_duration_since(now) {
            Duration::ZERO => Ok(Some(open_for)),
            // A trial usually has its result long before its deadline.
            wait => Err(wait.min(open_for + UNSAFE_TRIAL_DELAY)),
        }
    }

    /// Records the result of a permit, unless the state has changed since it was given.
    fn record(&self, generation: u64, failed: bool, now: Instant) {
        let mut inner = self.inner.lock();
        if inner.generation != generation {
            return;
        }
        match (inner.state, failed) {
            (State::Closed { failures }, true) => {
                let failures = failures.saturating_add(1);
                inner.state = State::Closed { failures };
                let threshold = self.config.failure_threshold;
                if threshold > 0 && failures >= threshold {
                    self.open(&mut inner, now, self.config.open_for);
                }
            }
            (State::Closed { .. }, false) => inner.state = State::Closed { failures: 0 },
            (State::HalfOpen { open_for, .. }, true) => self.open(&mut inner, now, open_for * 2),
            (State::HalfOpen { .. }, false) => {
                self.transition_to(&mut inner, State::Closed { failures: 0 });
            }
            // No permit is given while it is open.
            (State::Open { .. }, _) => (),
        }
    }

    /// The trial has no result: the next request may be the trial, at once.
    fn cancel_trial(&self, generation: u64) {
        let mut inner = self.inner.lock();
        if let (true, State::HalfOpen { deadline, open_for }) =
            (inner.generation == generation, inner.state)
        {
            // In the past: the trial began when the breaker allowed it.
            let until = deadline - self.config.half_open_timeout;
            self.transition_to(&mut inner, State::Open { until, open_for });
        }
    }

    fn open(&self, inner: &mut Inner, now: Instant, open_for: Duration) {
        let open_for = open_for.min(self.config.max_open_for);
        let half = open_for / 2;
        let until = now + half + half.mul_f64(fastrand::f64());
        self.transition_to(inner, State::Open { until, open_for });
        let pause = (until - now).as_millis();
        log::warn!("{} fails: no requests are sent to it for {pause} ms", self.upstream);
    }

    fn transition_to(&self, inner: &mut Inner, state: State) {
        let (number, name) = match state {
            State::Closed { .. } => (0, "closed"),
            State::HalfOpen { .. } => (1, "half_open"),
            State::Open { .. } => (2, "open"),
        };
        *inner = Inner { state, generation: inner.generation + 1 };
        self.state_gauge.set(number);
        metrics::BREAKER_TRANSITIONS.with_label_values(&[self.upstream, name]).inc();
        match state {
            State::Closed { .. } => log::info!("{} answers again", self.upstream),
            State::HalfOpen { .. } => log::debug!("{} is tried by one request", self.upstream),
            // Logged by `open`, which knows for how long.
            State::Open { .. } => (),
        }
    }
}

impl Permit<'_> {
    /// The upstream answered.
    pub fn succeeded(mut self, now: Instant) {
        self.reported = true;
        self.breaker.record(self.generation, false, now);
    }

    /// The upstream did not answer, or not with a valid response.
    pub fn failed(mut self, now: Instant) {
        self.reported = true;
        self.breaker.record(self.generation, true, now);
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        if !self.reported {
            self.breaker.cancel_trial(self.generation);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN_FOR: Duration = Duration::from_millis(400);
    const MAX_OPEN_FOR: Duration = Duration::from_millis(1000);
    const HALF_OPEN_TIMEOUT: Duration = Duration::from_secs(6);
    const INSTANT: Duration = Duration::from_nanos(1);

    fn breaker(failure_threshold: u32) -> Breaker {
        let config = Config {
            failure_threshold,
            open_for: OPEN_FOR,
            max_open_for: MAX_OPEN_FOR,
            half_open_timeout: HALF_OPEN_TIMEOUT,
        };
        Breaker::new("test", config)
    }

    /// Admits `count` requests, which then all fail.
    fn fail(breaker: &Breaker, count: usize, now: Instant) {
        let permits: Vec<Permit<'_>> =
            (0..count).map(|_| breaker.admit(now, true).ok().unwrap()).collect();
        permits.into_iter().for_each(|permit| permit.failed(now));
    }

    fn is_allowed(breaker: &Breaker, now: Instant) -> bool {
        breaker.check(now, true).is_ok()
    }

    /// The time at which the next trial is due, given that it is open.
    fn due(breaker: &Breaker, now: Instant) -> Instant {
        now + breaker.check(now, true).unwrap_err()
    }

    #[test]
    fn only_failures_in_a_row_open_it() {
        let (breaker, now) = (breaker(3), Instant::now());
        for _ in 0..10 {
            fail(&breaker, 2, now);
            breaker.admit(now, true).ok().unwrap().succeeded(now);
        }
        assert!(is_allowed(&breaker, now));
        fail(&breaker, 3, now);
        assert!(!is_allowed(&breaker, now));
    }

    #[test]
    fn a_permit_dropped_without_a_result_leaves_the_failure_count_unchanged() {
        let (breaker, now) = (breaker(2), Instant::now());
        fail(&breaker, 1, now);
        drop(breaker.admit(now, true));
        fail(&breaker, 1, now);
        assert!(!is_allowed(&breaker, now), "the dropped permit counted as a success");
    }

    #[test]
    fn many_failures_at_once_open_it_once() {
        let (breaker, now) = (breaker(5), Instant::now());
        fail(&breaker, 192, now);
        let wait = breaker.check(now, true).unwrap_err();
        assert!(wait >= OPEN_FOR / 2 && wait <= OPEN_FOR, "{wait:?}: not the first time");
        assert_eq!(breaker.inner.lock().generation, 1);
    }

    #[test]
    fn a_failure_threshold_of_zero_disables_the_breaker() {
        let (breaker, now) = (breaker(0), Instant::now());
        fail(&breaker, 1000, now);
        assert!(is_allowed(&breaker, now));
    }

    #[test]
    fn admit_fails_if_the_breaker_opened_after_check() {
        let (breaker, now) = (breaker(1), Instant::now());
        assert!(breaker.check(now, true).is_ok());
        fail(&breaker, 1, now);
        assert!(breaker.admit(now, true).is_err());
    }

    #[test]
    fn after_the_pause_one_trial_is_admitted_and_its_success_closes_the_breaker() {
        let (breaker, now) = (breaker(1), Instant::now());
        fail(&breaker, 1, now);
        let due = due(&breaker, now);
        assert!(breaker.admit(due - INSTANT, true).is_err());
        let trial = breaker.admit(due, true).ok().unwrap();
        for _ in 0..3 {
            let wait = breaker.admit(due, true).err().unwrap();
            assert!(
                wait <= OPEN_FOR + UNSAFE_TRIAL_DELAY,
                "{wait:?}: it waits for the trial's deadline"
            );
        }
        trial.succeeded(due);
        let permits: Vec<_> = (0..3).map(|_| breaker.admit(due, false)).collect();
        assert!(permits.iter().all(Result::is_ok));
    }

    #[test]
    fn each_failed_trial_doubles_the_pause_up_to_its_limit() {
        let (breaker, mut now) = (breaker(1), Instant::now());
        fail(&breaker, 1, now);
        for full in [OPEN_FOR, OPEN_FOR * 2, MAX_OPEN_FOR, MAX_OPEN_FOR] {
            let wait = breaker.check(now, true).unwrap_err();
            assert!(wait >= full / 2 && wait <= full, "{wait:?} of {full:?}");
            now += wait;
            breaker.admit(now, true).ok().unwrap().failed(now);
        }
        now = due(&breaker, now);
        breaker.admit(now, true).ok().unwrap().succeeded(now);
        fail(&breaker, 1, now);
        assert!(
            breaker.check(now, true).unwrap_err() <= OPEN_FOR,
            "the pause did not start small again"
        );
    }

    #[test]
    fn an_unsafe_request_may_be_the_trial_only_after_a_delay() {
        let (breaker, now) = (breaker(1), Instant::now());
        fail(&breaker, 1, now);
        let due = due(&breaker, now);
        assert_eq!(breaker.check(due, false), Err(UNSAFE_TRIAL_DELAY));
        assert!(breaker.admit(due + UNSAFE_TRIAL_DELAY, false).is_ok(), "no other request came");
    }

    #[test]
    fn a_trial_without_a_result_is_followed_by_the_next_one() {
        let (breaker, now) = (breaker(1), Instant::now());
        fail(&breaker, 1, now);
        let due = due(&breaker, now);
        drop(breaker.admit(due, true));
        let forgotten = breaker.admit(due, true).ok().unwrap();
        assert!(!is_allowed(&breaker, due + HALF_OPEN_TIMEOUT - INSTANT));
        let next = breaker.admit(due + HALF_OPEN_TIMEOUT, true).ok().unwrap();
        forgotten.failed(due + HALF_OPEN_TIMEOUT);
        next.succeeded(due + HALF_OPEN_TIMEOUT);
        assert!(
            is_allowed(&breaker, due + HALF_OPEN_TIMEOUT),
            "the result of the timed-out trial counted"
        );
    }

    #[test]
    fn results_from_before_a_state_change_are_ignored() {
        let (breaker, now) = (breaker(2), Instant::now());
        let (slow, lucky) = (breaker.admit(now, true).unwrap(), breaker.admit(now, true).unwrap());
        fail(&breaker, 2, now);
        lucky.succeeded(now);
        assert!(!is_allowed(&breaker, now), "an old success closed it");
        let due = due(&breaker, now);
        breaker.admit(due, true).ok().unwrap().succeeded(due);
        fail(&breaker, 1, due);
        slow.failed(due);
        assert!(is_allowed(&breaker, due), "an old failure opened it again");
    }
}
