//! A circuit breaker: who keeps failing is not asked for a while, then by one request
//! at a time until it answers.
//!
//! It counts failures in a row, not a share of a window: any answer in between shows
//! that the upstream works, one unlucky request opens nothing, and a crowd that runs
//! into its deadline together opens it at once. It knows nothing of what it guards, and
//! time is given to it.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use prometheus::{IntCounter, IntGauge};

use crate::metrics;

/// How long a request that changes something leaves the trial to one that may be
/// repeated: whoever fails the trial learns nothing of what became of his request.
const PREFERENCE: Duration = Duration::from_millis(200);

/// When it opens, and for how long.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Failures in a row that open it; 0 keeps it closed for ever.
    pub failures: u32,
    /// The first pause; each trial that fails doubles it. Half of every pause is left to
    /// chance, so that several gateways do not try together.
    pub pause: Duration,
    /// The longest pause.
    pub max_pause: Duration,
    /// A trial that has told nothing for this long no longer keeps others from theirs.
    pub trial: Duration,
}

/// Guards one upstream.
pub struct Breaker {
    upstream: &'static str,
    settings: Settings,
    state: Mutex<State>,
    shown: IntGauge,
    refused: IntCounter,
}

struct State {
    phase: Phase,
    /// Counts the changes of phase. A request belongs to the one it was let in by: what it
    /// tells after a change, such as a time-out of before the recovery, is old news.
    epoch: u64,
}

#[derive(Clone, Copy)]
enum Phase {
    /// All may ask; so many have failed since one was answered.
    Closed { failures: u32 },
    /// Nobody may ask before `until`.
    Open { until: Instant, pause: Duration },
    /// One asks; when it has told nothing until `deadline`, the next may.
    HalfOpen { deadline: Instant, pause: Duration },
}

/// Leave to ask once. Dropped without a verdict it counts for nothing; a trial's place
/// is then free for the next.
#[must_use]
pub struct Permit<'b> {
    breaker: &'b Breaker,
    epoch: u64,
    told: bool,
}

impl Breaker {
    /// Closed; `upstream` names it in the log and in the metrics.
    pub fn new(upstream: &'static str, settings: Settings) -> Breaker {
        for state in ["closed", "half_open", "open"] {
            // A scrape shows a zero and not a gap.
            metrics::BREAKER_TRANSITIONS.with_label_values(&[upstream, state]);
        }
        Breaker {
            upstream,
            settings,
            state: Mutex::new(State { phase: Phase::Closed { failures: 0 }, epoch: 0 }),
            shown: metrics::BREAKER_STATE.with_label_values(&[upstream]),
            refused: metrics::BREAKER_REFUSED.with_label_values(&[upstream]),
        }
    }

    /// Leave to ask now, or how long to wait for it. `safe` requests change nothing
    /// (RFC 9110 section 9.2.1): a trial is rather one of them.
    pub fn admit(&self, now: Instant, safe: bool) -> Result<Permit<'_>, Duration> {
        let mut state = self.lock();
        let pause = match self.wait(&state, now, safe) {
            Err(wait) => {
                self.refused.inc();
                return Err(wait);
            }
            Ok(pause) => pause,
        };
        if let Some(pause) = pause {
            let deadline = now + self.settings.trial;
            self.enter(&mut state, Phase::HalfOpen { deadline, pause });
        }
        Ok(Permit { breaker: self, epoch: state.epoch, told: false })
    }

    /// How long to wait when [`admit`](Self::admit) would refuse now; claims no trial.
    /// For those who first wait for something else.
    pub fn check(&self, now: Instant, safe: bool) -> Result<(), Duration> {
        let refusal = self.wait(&self.lock(), now, safe).err();
        refusal.map_or(Ok(()), |wait| {
            self.refused.inc();
            Err(wait)
        })
    }

    /// `Ok` when one may ask; with the last pause when that makes it the trial.
    fn wait(&self, state: &State, now: Instant, safe: bool) -> Result<Option<Duration>, Duration> {
        let (from, pause) = match state.phase {
            Phase::Closed { .. } => return Ok(None),
            Phase::Open { until, pause } if safe => (until, pause),
            Phase::Open { until, pause } => (until + PREFERENCE, pause),
            Phase::HalfOpen { deadline, pause } => (deadline, pause),
        };
        match from.saturating_duration_since(now) {
            Duration::ZERO => Ok(Some(pause)),
            // A trial tells long before its deadline, as a rule.
            wait => Err(wait.min(pause + PREFERENCE)),
        }
    }

    /// One answer, from whoever still counts.
    fn tell(&self, epoch: u64, failed: bool, now: Instant) {
        let mut state = self.lock();
        if state.epoch != epoch {
            return;
        }
        match (state.phase, failed) {
            (Phase::Closed { failures }, true) => {
                let failures = failures.saturating_add(1);
                state.phase = Phase::Closed { failures };
                let limit = self.settings.failures;
                if limit > 0 && failures >= limit {
                    self.open(&mut state, now, self.settings.pause);
                }
            }
            (Phase::Closed { .. }, false) => state.phase = Phase::Closed { failures: 0 },
            (Phase::HalfOpen { pause, .. }, true) => self.open(&mut state, now, pause * 2),
            (Phase::HalfOpen { .. }, false) => {
                self.enter(&mut state, Phase::Closed { failures: 0 });
            }
            // Nobody is let in while it is open.
            (Phase::Open { .. }, _) => (),
        }
    }

    /// The trial was none: the next may be it, at once.
    fn withdraw(&self, epoch: u64) {
        let mut state = self.lock();
        if let (true, Phase::HalfOpen { deadline, pause }) = (state.epoch == epoch, state.phase) {
            // In the past: the trial began when the pause was over.
            let until = deadline - self.settings.trial;
            self.enter(&mut state, Phase::Open { until, pause });
        }
    }

    fn open(&self, state: &mut State, now: Instant, pause: Duration) {
        let pause = pause.min(self.settings.max_pause);
        let half = pause / 2;
        let until = now + half + half.mul_f64(fastrand::f64());
        self.enter(state, Phase::Open { until, pause });
        log::warn!("{} fails: it is not asked for {} ms", self.upstream, (until - now).as_millis());
    }

    fn enter(&self, state: &mut State, phase: Phase) {
        let (number, name) = match phase {
            Phase::Closed { .. } => (0, "closed"),
            Phase::HalfOpen { .. } => (1, "half_open"),
            Phase::Open { .. } => (2, "open"),
        };
        *state = State { phase, epoch: state.epoch + 1 };
        self.shown.set(number);
        metrics::BREAKER_TRANSITIONS.with_label_values(&[self.upstream, name]).inc();
        match phase {
            Phase::Closed { .. } => log::info!("{} answers again", self.upstream),
            Phase::HalfOpen { .. } => log::debug!("{} is tried by one request", self.upstream),
            // Said by `open`, which knows for how long.
            Phase::Open { .. } => (),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Permit<'_> {
    /// The upstream answered.
    pub fn succeeded(mut self, now: Instant) {
        self.told = true;
        self.breaker.tell(self.epoch, false, now);
    }

    /// The upstream did not answer, or nothing that could be used.
    pub fn failed(mut self, now: Instant) {
        self.told = true;
        self.breaker.tell(self.epoch, true, now);
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        if !self.told {
            self.breaker.withdraw(self.epoch);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAUSE: Duration = Duration::from_millis(400);
    const MAX_PAUSE: Duration = Duration::from_millis(1000);
    const TRIAL: Duration = Duration::from_secs(6);
    const INSTANT: Duration = Duration::from_nanos(1);

    fn breaker(failures: u32) -> Breaker {
        let settings = Settings { failures, pause: PAUSE, max_pause: MAX_PAUSE, trial: TRIAL };
        Breaker::new("test", settings)
    }

    /// Lets `count` in and then has all of them fail.
    fn fail(breaker: &Breaker, count: usize, now: Instant) {
        let permits: Vec<Permit<'_>> =
            (0..count).map(|_| breaker.admit(now, true).ok().unwrap()).collect();
        permits.into_iter().for_each(|permit| permit.failed(now));
    }

    fn may_ask(breaker: &Breaker, now: Instant) -> bool {
        breaker.check(now, true).is_ok()
    }

    /// The time at which the next trial is due, given that it is open.
    fn due(breaker: &Breaker, now: Instant) -> Instant {
        now + breaker.check(now, true).unwrap_err()
    }

    #[test]
    fn only_failures_in_a_row_open_it_and_any_answer_between_begins_the_count_anew() {
        let (breaker, now) = (breaker(3), Instant::now());
        for _ in 0..10 {
            fail(&breaker, 2, now);
            breaker.admit(now, true).ok().unwrap().succeeded(now);
        }
        assert!(may_ask(&breaker, now));
        fail(&breaker, 3, now);
        assert!(!may_ask(&breaker, now));
    }

    #[test]
    fn what_says_nothing_of_the_upstream_counts_for_nothing() {
        let (breaker, now) = (breaker(2), Instant::now());
        fail(&breaker, 1, now);
        drop(breaker.admit(now, true));
        fail(&breaker, 1, now);
        assert!(!may_ask(&breaker, now), "the one without a verdict was taken for an answer");
    }

    #[test]
    fn a_crowd_that_times_out_at_once_opens_it_once() {
        let (breaker, now) = (breaker(5), Instant::now());
        fail(&breaker, 192, now);
        let wait = breaker.check(now, true).unwrap_err();
        assert!(wait >= PAUSE / 2 && wait <= PAUSE, "{wait:?}: not the first pause");
        assert_eq!(breaker.lock().epoch, 1);
    }

    #[test]
    fn with_no_number_of_failures_it_never_opens() {
        let (breaker, now) = (breaker(0), Instant::now());
        fail(&breaker, 1000, now);
        assert!(may_ask(&breaker, now));
    }

    #[test]
    fn who_was_not_refused_at_first_is_refused_when_it_has_opened_meanwhile() {
        let (breaker, now) = (breaker(1), Instant::now());
        assert!(breaker.check(now, true).is_ok());
        fail(&breaker, 1, now);
        assert!(breaker.admit(now, true).is_err());
    }

    #[test]
    fn after_the_pause_exactly_one_may_try_and_its_answer_lets_all_in() {
        let (breaker, now) = (breaker(1), Instant::now());
        fail(&breaker, 1, now);
        let due = due(&breaker, now);
        assert!(breaker.admit(due - INSTANT, true).is_err());
        let trial = breaker.admit(due, true).ok().unwrap();
        for _ in 0..3 {
            let wait = breaker.admit(due, true).err().unwrap();
            assert!(wait <= PAUSE + PREFERENCE, "{wait:?}: as if it took all its time");
        }
        trial.succeeded(due);
        let permits: Vec<_> = (0..3).map(|_| breaker.admit(due, false)).collect();
        assert!(permits.iter().all(Result::is_ok));
    }

    #[test]
    fn each_trial_that_fails_makes_the_pause_longer_up_to_its_limit() {
        let (breaker, mut now) = (breaker(1), Instant::now());
        fail(&breaker, 1, now);
        for full in [PAUSE, PAUSE * 2, MAX_PAUSE, MAX_PAUSE] {
            let wait = breaker.check(now, true).unwrap_err();
            assert!(wait >= full / 2 && wait <= full, "{wait:?} of {full:?}");
            now += wait;
            breaker.admit(now, true).ok().unwrap().failed(now);
        }
        now = due(&breaker, now);
        breaker.admit(now, true).ok().unwrap().succeeded(now);
        fail(&breaker, 1, now);
        assert!(breaker.check(now, true).unwrap_err() <= PAUSE, "it did not begin anew");
    }

    #[test]
    fn a_request_that_changes_something_leaves_the_trial_to_others_for_a_moment() {
        let (breaker, now) = (breaker(1), Instant::now());
        fail(&breaker, 1, now);
        let due = due(&breaker, now);
        assert_eq!(breaker.check(due, false), Err(PREFERENCE));
        assert!(breaker.admit(due + PREFERENCE, false).is_ok(), "nobody else came");
    }

    #[test]
    fn a_trial_that_is_given_up_or_forgotten_leaves_its_place_to_the_next() {
        let (breaker, now) = (breaker(1), Instant::now());
        fail(&breaker, 1, now);
        let due = due(&breaker, now);
        drop(breaker.admit(due, true));
        let forgotten = breaker.admit(due, true).ok().unwrap();
        assert!(!may_ask(&breaker, due + TRIAL - INSTANT));
        let next = breaker.admit(due + TRIAL, true).ok().unwrap();
        forgotten.failed(due + TRIAL);
        next.succeeded(due + TRIAL);
        assert!(may_ask(&breaker, due + TRIAL), "the forgotten one had a say");
    }

    #[test]
    fn what_comes_late_from_before_a_change_is_not_heard() {
        let (breaker, now) = (breaker(2), Instant::now());
        let (slow, lucky) = (breaker.admit(now, true).unwrap(), breaker.admit(now, true).unwrap());
        fail(&breaker, 2, now);
        lucky.succeeded(now);
        assert!(!may_ask(&breaker, now), "an old answer closed it");
        let due = due(&breaker, now);
        breaker.admit(due, true).ok().unwrap().succeeded(due);
        fail(&breaker, 1, due);
        slow.failed(due);
        assert!(may_ask(&breaker, due), "an old failure opened it again");
    }
}
