//! A request to stop, shared by all threads of a process.

use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Scope};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Requested once: by SIGINT (PM2), by SIGTERM, or when a critical thread ends.
#[derive(Clone, Default)]
pub struct Stop(Arc<Shared>);

#[derive(Default)]
struct Shared {
    requested: AtomicBool,
    lock: Mutex<()>,
    wake: Condvar,
}

impl Stop {
    /// A stop that SIGINT and SIGTERM request.
    pub fn on_signals() -> anyhow::Result<Stop> {
        let stop = Stop::default();
        let mut signals = Signals::new([SIGINT, SIGTERM])?;
        let stop_requester = stop.clone();
        thread::Builder::new().name("signals".into()).spawn(move || {
            for signal in signals.forever() {
                log::info!("stopping: signal {signal}");
                stop_requester.request();
            }
        })?;
        Ok(stop)
    }

    /// Requests that every thread ends.
    pub fn request(&self) {
        self.0.requested.store(true, Ordering::SeqCst);
        let _lock = self.0.lock.lock();
        self.0.wake.notify_all();
    }

    /// Whether a stop was requested.
    pub fn is_requested(&self) -> bool {
        self.0.requested.load(Ordering::SeqCst)
    }

    /// Sleeps, but at most until a stop is requested; returns whether one is.
    pub fn sleep(&self, pause: Duration) -> bool {
        let mut lock = self.0.lock.lock();
        self.0.wake.wait_while_for(&mut lock, |()| !self.is_requested(), pause);
        self.is_requested()
    }

    /// Ends the process at the latest so long after a stop was requested, for threads that may wait for
    /// a server longer than that; `why` is the line in the log.
    pub fn force_exit_after(&self, timeout: Duration, why: &'static str) -> anyhow::Result<()> {
        let stop = self.clone();
        thread::Builder::new().name("shutdown".into()).spawn(move || {
            while !stop.sleep(Duration::from_secs(3600)) {}
            thread::sleep(timeout);
            log::warn!("{why}");
            log::logger().flush();
            process::exit(1);
        })?;
        Ok(())
    }

    /// Starts a named thread that the process cannot work without. When it ends or panics, the
    /// whole process stops, and PM2 starts it again: a service never runs on without one of its
    /// threads.
    pub fn spawn_critical<'scope, F>(
        &self,
        scope: &'scope Scope<'scope, '_>,
        name: &str,
        run: F,
    ) -> anyhow::Result<()>
    where
        F: FnOnce() + Send + 'scope,
    {
        struct RequestOnDrop(Stop);
        impl Drop for RequestOnDrop {
            fn drop(&mut self) {
                self.0.request();
            }
        }
        let guard = RequestOnDrop(self.clone());
        thread::Builder::new().name(name.to_owned()).spawn_scoped(scope, move || {
            let _guard = guard;
            run();
        })?;
        Ok(())
    }
}
