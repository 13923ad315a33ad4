//! The wish to stop, shared by every thread of a process.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, Scope};
use std::time::Duration;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Raised once, by SIGINT (PM2), SIGTERM or the end of a thread that must not end.
#[derive(Clone, Default)]
pub struct Stop(Arc<Shared>);

#[derive(Default)]
struct Shared {
    requested: AtomicBool,
    lock: Mutex<()>,
    wake: Condvar,
}

impl Stop {
    /// One that the two signals raise.
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

    /// Asks every thread to end.
    pub fn request(&self) {
        self.0.requested.store(true, Ordering::SeqCst);
        let _lock = self.0.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.wake.notify_all();
    }

    /// Whether it is time to end.
    pub fn is_requested(&self) -> bool {
        self.0.requested.load(Ordering::SeqCst)
    }

    /// A pause that ends early, with `true`, when it is time to end.
    pub fn sleep(&self, pause: Duration) -> bool {
        let lock = self.0.lock.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = self.0.wake.wait_timeout_while(lock, pause, |()| !self.is_requested());
        self.is_requested()
    }

    /// Starts a named thread that the process cannot do without: when it ends,
    /// or panics, everything stops and whoever supervises the process starts it
    /// anew. A service that lost a thread does not limp on.
    pub fn spawn_critical<'scope, F>(
        &self,
        scope: &'scope Scope<'scope, '_>,
        name: &str,
        run: F,
    ) -> anyhow::Result<()>
    where
        F: FnOnce() + Send + 'scope,
    {
        struct Raise(Stop);
        impl Drop for Raise {
            fn drop(&mut self) {
                self.0.request();
            }
        }
        let raise = Raise(self.clone());
        thread::Builder::new().name(name.to_owned()).spawn_scoped(scope, move || {
            let _raise = raise;
            run();
        })?;
        Ok(())
    }
}
