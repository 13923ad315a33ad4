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
pub struct FairSemaphore {
    state: Arc<Mutex<State>>,
    in_use: Option<IntGauge>,
}

struct State {
    available: usize,
    waiters: WaitQueue,
    last_release: Instant,
}

/// Who waits.
#[derive(Default)]
struct WaitQueue {
    normal: VecDeque<Arc<Waiter>>,
    /// Those who give way.
    background: VecDeque<Arc<Waiter>>,
    /// How many were let past them since one of them had a place.
    overtaken: usize,
}

/// How many may go past those who give way, for each of them: these must not starve either.
const NORMAL_PER_BACKGROUND: usize = 3;

impl WaitQueue {
    fn push(&mut self, waiter: Arc<Waiter>, gives_way: bool) {
        if gives_way { &mut self.background } else { &mut self.normal }.push_back(waiter);
    }

    fn pop(&mut self) -> Option<Arc<Waiter>> {
        if self.overtaken < NORMAL_PER_BACKGROUND
            && let Some(waiter) = self.normal.pop_front()
        {
            self.overtaken += usize::from(!self.background.is_empty());
            return Some(waiter);
        }
        self.overtaken = 0;
        self.background.pop_front().or_else(|| self.normal.pop_front())
    }

    fn remove(&mut self, waiter: &Arc<Waiter>) {
        self.normal.retain(|other| !Arc::ptr_eq(other, waiter));
        self.background.retain(|other| !Arc::ptr_eq(other, waiter));
    }
}

struct Waiter {
    granted: AtomicBool,
    thread: Thread,
}

/// A place, until it is dropped.
pub struct SemaphorePermit(FairSemaphore);

impl FairSemaphore {
    /// `places` that may be in_use at once.
    pub fn new(places: usize) -> FairSemaphore {
        let last_release = Instant::now();
        let state = State { available: places, waiters: WaitQueue::default(), last_release };
        FairSemaphore { state: Arc::new(Mutex::new(state)), in_use: None }
    }

    /// The same, with a gauge that shows how many are in_use.
    pub fn with_gauge(mut self, in_use: IntGauge) -> FairSemaphore {
        self.in_use = Some(in_use);
        self
    }

    /// Takes a place, waiting for it at most `limit`.
    pub fn acquire(&self, limit: Duration) -> Option<SemaphorePermit> {
        self.acquire_with(limit, None, false)
    }

    /// The same for whoever takes many, one after the other: gives way to the others.
    pub fn acquire_background(&self, limit: Duration) -> Option<SemaphorePermit> {
        self.acquire_with(limit, None, true)
    }

    /// Takes a place, waiting at most `limit`, but not at all when all are in_use and
    /// none was left within the last `limit`: those inside are stuck, and to wait
    /// for them would make the caller so too.
    pub fn acquire_unless_stalled(&self, limit: Duration) -> Option<SemaphorePermit> {
        self.acquire_with(limit, Some(limit), false)
    }

    fn acquire_with(
        &self,
        limit: Duration,
        stuck: Option<Duration>,
        gives_way: bool,
    ) -> Option<SemaphorePermit> {
        let deadline = Instant::now() + limit;
        let waiter = {
            let mut state = self.lock();
            if state.available > 0 {
                state.available -= 1;
                return Some(self.permit());
            }
            if stuck.is_some_and(|stuck| state.last_release.elapsed() > stuck) {
                return None;
            }
            let waiter = Waiter { granted: AtomicBool::new(false), thread: thread::current() };
            let waiter = Arc::new(waiter);
            state.waiters.push(Arc::clone(&waiter), gives_way);
            waiter
        };
        loop {
            thread::park_timeout(deadline.saturating_duration_since(Instant::now()));
            if waiter.granted.load(Ordering::SeqCst) {
                return Some(self.permit());
            }
            if Instant::now() >= deadline {
                let mut state = self.lock();
                // Asked again under the lock: a place may have come at the last moment.
                if waiter.granted.load(Ordering::SeqCst) {
                    return Some(self.permit());
                }
                state.waiters.remove(&waiter);
                return None;
            }
        }
    }

    /// For whom a place was set aside.
    fn permit(&self) -> SemaphorePermit {
        self.in_use.iter().for_each(IntGauge::inc);
        SemaphorePermit(self.clone())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for SemaphorePermit {
    fn drop(&mut self) {
        self.0.in_use.iter().for_each(IntGauge::dec);
        let mut state = self.0.lock();
        state.last_release = Instant::now();
        match state.waiters.pop() {
            Some(next) => {
                next.granted.store(true, Ordering::SeqCst);
                next.thread.unpark();
            }
            None => state.available += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    /// One waiter after the other comes to a single place; in which order they have it.
    fn order_of(gives_way: &[bool]) -> Vec<usize> {
        let semaphore = FairSemaphore::new(1);
        let first = semaphore.acquire(LONG).unwrap();
        let order = Mutex::new(Vec::new());
        let waiting = || {
            let state = semaphore.lock();
            state.waiters.normal.len() + state.waiters.background.len()
        };
        thread::scope(|scope| {
            for (number, gives_way) in gives_way.iter().enumerate() {
                let (semaphore, order) = (&semaphore, &order);
                scope.spawn(move || {
                    let _permit = semaphore.acquire_with(LONG, None, *gives_way).unwrap();
                    order.lock().unwrap().push(number);
                });
                while waiting() <= number {
                    thread::yield_now();
                }
            }
            drop(first);
        });
        assert_eq!(semaphore.lock().available, 1);
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
        let semaphore = FairSemaphore::new(1);
        let held = semaphore.acquire(LONG).unwrap();
        assert!(semaphore.acquire(Duration::from_millis(20)).is_none());
        drop(held);
        assert!(semaphore.acquire(Duration::ZERO).is_some());
        assert_eq!(semaphore.lock().available, 1);
    }

    #[test]
    fn nobody_waits_behind_those_who_are_stuck() {
        let semaphore = FairSemaphore::new(1);
        let _held = semaphore.acquire(LONG).unwrap();
        let limit = Duration::from_millis(20);
        while semaphore.lock().last_release.elapsed() <= limit {
            thread::yield_now();
        }
        let begun = Instant::now();
        assert!(semaphore.acquire_unless_stalled(limit).is_none());
        assert!(begun.elapsed() < limit, "waited {:?}", begun.elapsed());
    }
}
