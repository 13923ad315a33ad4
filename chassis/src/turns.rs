//! A bounded number of places, given in the order in which they were asked for; but who
//! has much to do and comes often gives way to the others.
//!
//! A pool that wakes whoever comes first lets late-comers overtake: with 200
//! threads at 8 connections some waited over a second where the mean was 25 ms.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use prometheus::IntGauge;

/// The places; clones share them.
#[derive(Clone)]
pub struct Turns {
    state: Arc<Mutex<State>>,
    taken: Option<IntGauge>,
}

struct State {
    free: usize,
    waiting: Queues,
    last_leave: Instant,
}

/// Who waits.
#[derive(Default)]
struct Queues {
    first: VecDeque<Arc<Waiter>>,
    /// Those who give way.
    then: VecDeque<Arc<Waiter>>,
    /// How many were let past them since one of them had a place.
    past: usize,
}

/// How many may go past those who give way, for each of them: these must not starve either.
const PAST: usize = 3;

impl Queues {
    fn push(&mut self, waiter: Arc<Waiter>, gives_way: bool) {
        if gives_way { &mut self.then } else { &mut self.first }.push_back(waiter);
    }

    fn pop(&mut self) -> Option<Arc<Waiter>> {
        if self.past < PAST
            && let Some(waiter) = self.first.pop_front()
        {
            self.past += usize::from(!self.then.is_empty());
            return Some(waiter);
        }
        self.past = 0;
        self.then.pop_front().or_else(|| self.first.pop_front())
    }

    fn remove(&mut self, waiter: &Arc<Waiter>) {
        self.first.retain(|other| !Arc::ptr_eq(other, waiter));
        self.then.retain(|other| !Arc::ptr_eq(other, waiter));
    }
}

struct Waiter {
    granted: AtomicBool,
    thread: Thread,
}

/// A place, until it is dropped.
pub struct Turn(Turns);

impl Turns {
    /// `places` that may be taken at once.
    pub fn new(places: usize) -> Turns {
        let last_leave = Instant::now();
        let state = State { free: places, waiting: Queues::default(), last_leave };
        Turns { state: Arc::new(Mutex::new(state)), taken: None }
    }

    /// The same, with a gauge that shows how many are taken.
    pub fn shown_by(mut self, taken: IntGauge) -> Turns {
        self.taken = Some(taken);
        self
    }

    /// Takes a place, waiting for it at most `limit`.
    pub fn take(&self, limit: Duration) -> Option<Turn> {
        self.wait(limit, None, false)
    }

    /// The same for whoever takes many, one after the other: gives way to the others.
    pub fn take_giving_way(&self, limit: Duration) -> Option<Turn> {
        self.wait(limit, None, true)
    }

    /// Takes a place, waiting at most `limit`, but not at all when all are taken and
    /// none was left within the last `limit`: those inside are stuck, and to wait
    /// for them would make the caller so too.
    pub fn take_if_moving(&self, limit: Duration) -> Option<Turn> {
        self.wait(limit, Some(limit), false)
    }

    fn wait(&self, limit: Duration, stuck: Option<Duration>, gives_way: bool) -> Option<Turn> {
        let deadline = Instant::now() + limit;
        let waiter = {
            let mut state = self.lock();
            if state.free > 0 {
                state.free -= 1;
                return Some(self.turn());
            }
            if stuck.is_some_and(|stuck| state.last_leave.elapsed() > stuck) {
                return None;
            }
            let waiter = Waiter { granted: AtomicBool::new(false), thread: thread::current() };
            let waiter = Arc::new(waiter);
            state.waiting.push(Arc::clone(&waiter), gives_way);
            waiter
        };
        loop {
            thread::park_timeout(deadline.saturating_duration_since(Instant::now()));
            if waiter.granted.load(Ordering::SeqCst) {
                return Some(self.turn());
            }
            if Instant::now() >= deadline {
                let mut state = self.lock();
                // Asked again under the lock: a place may have come at the last moment.
                if waiter.granted.load(Ordering::SeqCst) {
                    return Some(self.turn());
                }
                state.waiting.remove(&waiter);
                return None;
            }
        }
    }

    /// For whom a place was set aside.
    fn turn(&self) -> Turn {
        self.taken.iter().for_each(IntGauge::inc);
        Turn(self.clone())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.taken.iter().for_each(IntGauge::dec);
        let mut state = self.0.lock();
        state.last_leave = Instant::now();
        match state.waiting.pop() {
            Some(next) => {
                next.granted.store(true, Ordering::SeqCst);
                next.thread.unpark();
            }
            None => state.free += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    /// One waiter after the other comes to a single place; in which order they have it.
    fn order_of(gives_way: &[bool]) -> Vec<usize> {
        let turns = Turns::new(1);
        let first = turns.take(LONG).unwrap();
        let order = Mutex::new(Vec::new());
        let waiting = || {
            let state = turns.lock();
            state.waiting.first.len() + state.waiting.then.len()
        };
        thread::scope(|scope| {
            for (number, gives_way) in gives_way.iter().enumerate() {
                let (turns, order) = (&turns, &order);
                scope.spawn(move || {
                    let _turn = turns.wait(LONG, None, *gives_way).unwrap();
                    order.lock().unwrap().push(number);
                });
                while waiting() <= number {
                    thread::yield_now();
                }
            }
            drop(first);
        });
        assert_eq!(turns.lock().free, 1);
        order.into_inner().unwrap()
    }

    #[test]
    fn places_are_given_in_the_order_in_which_they_were_asked_for() {
        assert_eq!(order_of(&[false; 5]), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn who_gives_way_lets_three_past_and_then_has_a_place() {
        let gives_way = [true, true, false, false, false, false, false, false];
        assert_eq!(order_of(&gives_way), [2, 3, 4, 0, 5, 6, 7, 1]);
    }

    #[test]
    fn a_wait_ends_at_its_limit_and_leaves_no_claim_behind() {
        let turns = Turns::new(1);
        let held = turns.take(LONG).unwrap();
        assert!(turns.take(Duration::from_millis(20)).is_none());
        drop(held);
        assert!(turns.take(Duration::ZERO).is_some());
        assert_eq!(turns.lock().free, 1);
    }

    #[test]
    fn nobody_waits_behind_those_who_are_stuck() {
        let turns = Turns::new(1);
        let _held = turns.take(LONG).unwrap();
        let limit = Duration::from_millis(20);
        while turns.lock().last_leave.elapsed() <= limit {
            thread::yield_now();
        }
        let begun = Instant::now();
        assert!(turns.take_if_moving(limit).is_none());
        assert!(begun.elapsed() < limit, "waited {:?}", begun.elapsed());
    }
}
