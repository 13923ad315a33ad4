//! A FIFO semaphore with two priorities: background waiters (one of many queries of a long list)
//! are overtaken by up to three normal waiters each.
//!
//! A pool that wakes any waiting thread lets late ones overtake: with 200 threads at 8
//! connections some waited over a second where the mean was 25 ms.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use prometheus::IntGauge;

/// The permits; clones share them.
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

/// The waiters, in the order in which they came.
#[derive(Default)]
struct WaitQueue {
    normal: VecDeque<Arc<Waiter>>,
    background: VecDeque<Arc<Waiter>>,
    /// How many normal waiters got a permit since the last background one did.
    overtaken: usize,
}

/// How many normal waiters may overtake each background waiter, so that those do not starve.
const NORMAL_PER_BACKGROUND: usize = 3;

impl WaitQueue {
    fn push(&mut self, waiter: Arc<Waiter>, is_background: bool) {
        if is_background { &mut self.background } else { &mut self.normal }.push_back(waiter);
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

/// A permit, returned when it is dropped.
pub struct SemaphorePermit(FairSemaphore);

impl FairSemaphore {
    /// A semaphore with this many permits.
    pub fn new(permits: usize) -> FairSemaphore {
        let last_release = Instant::now();
        let state = State { available: permits, waiters: WaitQueue::default(), last_release };
        FairSemaphore { state: Arc::new(Mutex::new(state)), in_use: None }
    }

    /// The same, with a gauge of the permits in use.
    pub fn with_gauge(mut self, in_use: IntGauge) -> FairSemaphore {
        self.in_use = Some(in_use);
        self
    }

    /// Waits at most `timeout` for a permit.
    pub fn acquire(&self, timeout: Duration) -> Option<SemaphorePermit> {
        self.acquire_with(timeout, None, false)
    }

    /// The same as a background waiter.
    pub fn acquire_background(&self, timeout: Duration) -> Option<SemaphorePermit> {
        self.acquire_with(timeout, None, true)
    }

    /// Waits at most `timeout` for a permit, but fails immediately if no permit was released within
    /// the last `timeout`: the holders hang, and waiting behind them would tie up the caller's
    /// thread as well.
    pub fn acquire_unless_stalled(&self, timeout: Duration) -> Option<SemaphorePermit> {
        self.acquire_with(timeout, Some(timeout), false)
    }

    fn acquire_with(
        &self,
        timeout: Duration,
        stall_timeout: Option<Duration>,
        is_background: bool,
    ) -> Option<SemaphorePermit> {
        let deadline = Instant::now() + timeout;
        let waiter = {
            let mut state = self.state.lock();
            if state.available > 0 {
                state.available -= 1;
                return Some(self.permit());
            }
            if stall_timeout.is_some_and(|stall| state.last_release.elapsed() > stall) {
                return None;
            }
            let waiter = Waiter { granted: AtomicBool::new(false), thread: thread::current() };
            let waiter = Arc::new(waiter);
            state.waiters.push(Arc::clone(&waiter), is_background);
            waiter
        };
        loop {
            thread::park_timeout(deadline.saturating_duration_since(Instant::now()));
            if waiter.granted.load(Ordering::SeqCst) {
                return Some(self.permit());
            }
            if Instant::now() >= deadline {
                let mut state = self.state.lock();
                // Checked again under the lock: the permit may have come at the last moment.
                if waiter.granted.load(Ordering::SeqCst) {
                    return Some(self.permit());
                }
                state.waiters.remove(&waiter);
                return None;
            }
        }
    }

    /// The permit that was taken from the state for this thread.
    fn permit(&self) -> SemaphorePermit {
        self.in_use.iter().for_each(IntGauge::inc);
        SemaphorePermit(self.clone())
    }
}

impl Drop for SemaphorePermit {
    fn drop(&mut self) {
        self.0.in_use.iter().for_each(IntGauge::dec);
        let mut state = self.0.state.lock();
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

    /// Waiters come one after the other for a single permit; the order in which they get it.
    fn order_of(is_background: &[bool]) -> Vec<usize> {
        let semaphore = FairSemaphore::new(1);
        let first = semaphore.acquire(LONG).unwrap();
        let order = Mutex::new(Vec::new());
        let waiting = || {
            let state = semaphore.state.lock();
            state.waiters.normal.len() + state.waiters.background.len()
        };
        thread::scope(|scope| {
            for (number, is_background) in is_background.iter().enumerate() {
                let (semaphore, order) = (&semaphore, &order);
                scope.spawn(move || {
                    let _permit = semaphore.acquire_with(LONG, None, *is_background).unwrap();
                    order.lock().push(number);
                });
                while waiting() <= number {
                    thread::yield_now();
                }
            }
            drop(first);
        });
        assert_eq!(semaphore.state.lock().available, 1);
        order.into_inner()
    }

    #[test]
    fn permits_are_given_in_the_order_in_which_they_were_asked_for() {
        assert_eq!(order_of(&[false; 5]), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn a_background_waiter_is_overtaken_three_times_and_then_served() {
        let is_background = [true, true, false, false, false, false, false, false];
        assert_eq!(order_of(&is_background), [2, 3, 4, 0, 5, 6, 7, 1]);
    }

    #[test]
    fn a_wait_ends_at_its_timeout_and_takes_no_permit_later() {
        let semaphore = FairSemaphore::new(1);
        let held = semaphore.acquire(LONG).unwrap();
        assert!(semaphore.acquire(Duration::from_millis(20)).is_none());
        drop(held);
        assert!(semaphore.acquire(Duration::ZERO).is_some());
        assert_eq!(semaphore.state.lock().available, 1);
    }

    #[test]
    fn acquire_fails_at_once_when_no_permit_was_released_lately() {
        let semaphore = FairSemaphore::new(1);
        let _held = semaphore.acquire(LONG).unwrap();
        let stall = Duration::from_millis(20);
        while semaphore.state.lock().last_release.elapsed() <= stall {
            thread::yield_now();
        }
        let started = Instant::now();
        assert!(semaphore.acquire_with(LONG, Some(stall), false).is_none());
        assert!(started.elapsed() < LONG, "it waited for the timeout");
        assert!(semaphore.acquire_unless_stalled(stall).is_none());
    }
}
