//! Wakes a thread that waits for work.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// Wakes one waiting thread; clones share it. A wake that comes while no thread waits is not lost.
#[derive(Clone, Default)]
pub struct Waker(Arc<Shared>);

#[derive(Default)]
struct Shared {
    woken: Mutex<bool>,
    changed: Condvar,
}

impl Waker {
    /// Says that there is work.
    pub fn wake(&self) {
        let mut woken = self.0.woken.lock();
        if !*woken {
            *woken = true;
            self.0.changed.notify_one();
        }
    }

    /// Waits until there is work, but at most so long.
    pub fn wait(&self, most: Duration) {
        let mut woken = self.0.woken.lock();
        if !*woken {
            self.0.changed.wait_for(&mut woken, most);
        }
        *woken = false;
    }
}
