//! Ends the process when a call to the database takes far too long.
//!
//! `statement_timeout` bounds a slow statement, and TCP_USER_TIMEOUT finds a dead peer. What
//! remains is a server process that hangs while its kernel still acknowledges. The `postgres`
//! crate does not expose its socket, so nothing can cut it: without the watchdog the thread and
//! its connection would be lost for ever. Ended, the process is started again by PM2.

use std::cell::Cell;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{process, thread};

use parking_lot::Mutex;

/// How often the deadlines are checked.
const WATCHDOG_INTERVAL: Duration = Duration::from_millis(500);

/// The deadlines of the calls in progress, a few at any time.
static DEADLINES: Mutex<Vec<(u64, Instant)>> = Mutex::new(Vec::new());

/// Called before the process ends, see [`before_exit`].
static BEFORE_EXIT: Mutex<Option<Box<dyn Fn() + Send>>> = Mutex::new(None);

thread_local! {
    /// The innermost deadline of this thread: its id and its length.
    static CURRENT: Cell<Option<(u64, Duration)>> = const { Cell::new(None) };
}

/// Runs `call`. If it takes longer than `limit`, the process ends with exit code 1.
pub(super) fn with_deadline<T>(limit: Duration, call: impl FnOnce() -> T) -> T {
    static WATCHDOG: Once = Once::new();
    WATCHDOG.call_once(|| {
        let watchdog = thread::Builder::new().name("db-watchdog".into()).stack_size(64 << 10);
        if let Err(err) = watchdog.spawn(watch) {
            log::error!("cannot start the watchdog of the database: {err}");
        }
    });
    static NEXT_ID: AtomicU64 = AtomicU64::new(0);
    let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
    let _guard = DeadlineGuard { id, outer: CURRENT.replace(Some((id, limit))) };
    DEADLINES.lock().push((id, Instant::now() + limit));
    call()
}

/// Starts the deadline of this thread's call anew. For a call that makes several statements, each
/// of which may take the whole time: called between them.
pub fn renew_deadline() {
    if let Some((id, limit)) = CURRENT.get() {
        let deadline = Instant::now() + limit;
        DEADLINES.lock().iter_mut().filter(|(known, _)| *known == id).for_each(|entry| {
            entry.1 = deadline;
        });
    }
}

/// Sets what is called before the watchdog ends the process; `None` removes it. It may take up to
/// [`EXIT_TIMEOUT`].
pub fn before_exit(hook: Option<Box<dyn Fn() + Send>>) {
    *BEFORE_EXIT.lock() = hook;
}

/// How long the function of [`before_exit`] may take.
pub const EXIT_TIMEOUT: Duration = Duration::from_secs(3);

/// Removes the deadline, also when the call panics.
struct DeadlineGuard {
    id: u64,
    outer: Option<(u64, Duration)>,
}

impl Drop for DeadlineGuard {
    fn drop(&mut self) {
        DEADLINES.lock().retain(|(id, _)| *id != self.id);
        CURRENT.set(self.outer);
    }
}

fn watch() {
    loop {
        thread::sleep(WATCHDOG_INTERVAL);
        let now = Instant::now();
        if DEADLINES.lock().iter().any(|(_, deadline)| *deadline < now) {
            log::error!("the database does not answer: this process ends, to be started again");
            let hook = BEFORE_EXIT.lock().take();
            if let Some(hook) = hook {
                // On a thread of its own: it may hang as well.
                let called = thread::Builder::new().name("before-exit".into()).spawn(hook);
                let deadline = Instant::now() + EXIT_TIMEOUT;
                while called.as_ref().is_ok_and(|called| !called.is_finished())
                    && Instant::now() < deadline
                {
                    thread::sleep(Duration::from_millis(20));
                }
            }
            // The log is written by another thread; `exit` would not wait for it.
            log::logger().flush();
            process::exit(1);
        }
    }
}
