//! Deadlines for calls of amiquip, which has none.

use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// How often the deadline is checked.
const DEADLINE_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// Closes a connection's socket when a call exceeds its deadline.
pub struct SocketDeadline {
    shared: Arc<Shared>,
}

struct Shared {
    socket: TcpStream,
    started: Instant,
    /// Milliseconds after `started`; [`NO_DEADLINE`] while no call is in progress, [`CLOSED`] at
    /// the end.
    deadline_ms: AtomicU64,
}

const NO_DEADLINE: u64 = u64::MAX;
const CLOSED: u64 = u64::MAX - 1;

impl SocketDeadline {
    pub(super) fn new(socket: TcpStream) -> anyhow::Result<SocketDeadline> {
        let shared = Arc::new(Shared {
            socket,
            started: Instant::now(),
            deadline_ms: AtomicU64::new(NO_DEADLINE),
        });
        let watched = Arc::clone(&shared);
        thread::Builder::new().name("broker-deadline".into()).stack_size(64 << 10).spawn(
            move || {
                loop {
                    thread::sleep(DEADLINE_CHECK_INTERVAL);
                    match watched.deadline_ms.load(Ordering::SeqCst) {
                        NO_DEADLINE => continue,
                        CLOSED => return,
                        deadline if watched.now_ms() < deadline => continue,
                        _ => {
                            log::warn!(
                                "the broker did not answer in time: the connection is closed"
                            );
                            let _ = watched.socket.shutdown(Shutdown::Both);
                            return;
                        }
                    }
                }
            },
        )?;
        Ok(SocketDeadline { shared })
    }

    /// Runs `call`. If it takes longer than `limit`, the socket is closed, and the call fails.
    pub fn with_deadline<T>(&self, limit: Duration, call: impl FnOnce() -> T) -> T {
        let deadline = self.shared.now_ms() + limit.as_millis() as u64;
        self.shared.deadline_ms.store(deadline, Ordering::SeqCst);
        let result = call();
        self.shared.deadline_ms.store(NO_DEADLINE, Ordering::SeqCst);
        result
    }
}

impl Drop for SocketDeadline {
    fn drop(&mut self) {
        self.shared.deadline_ms.store(CLOSED, Ordering::SeqCst);
        // Calls that are still inside the connection return at once.
        let _ = self.shared.socket.shutdown(Shutdown::Both);
    }
}

impl Shared {
    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }
}
