//! Clients that post distinct orders or movies, and the comparison of what was acknowledged
//! with what is in the tables.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use chassis::testing::eventually;
use chassis::testing::http::{Reply, agent, send};
use parking_lot::{Mutex, MutexGuard};
use ureq::Agent;

use crate::bodies::{expected_text, movie, order_of, values_of};

/// How soon requests must succeed again when a fault is over, in seconds.
pub const RECOVERY_S: u64 = 60;

/// How long a client waits after a request that failed.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_millis(10);

/// How many failures a ledger keeps as texts.
const KEPT_FAILURES: usize = 10;

/// The detail of the gateway's 502 for a response that inventory did not finish.
const BROKEN_OFF: &str = "inventory broke off its answer";

/// What clients post.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// Orders, each posted once.
    Orders,
    /// Movies, each posted once.
    Movies,
    /// Orders with an `Idempotency-Key` each, repeated until they are acknowledged.
    RetriedOrders,
    /// The same without the key, for a control: some are booked twice.
    RetriedOrdersWithoutKey,
    /// Movies repeated until they are acknowledged, for a control: a POST that may have been
    /// received must not be repeated.
    RetriedMovies,
}

impl Workload {
    /// Whether these are movies; else they are orders.
    pub fn is_movies(self) -> bool {
        matches!(self, Workload::Movies | Workload::RetriedMovies)
    }

    fn is_retried(self) -> bool {
        !matches!(self, Workload::Orders | Workload::Movies)
    }

    fn path(self) -> &'static str {
        if self.is_movies() { "/api/movies" } else { "/api/billing" }
    }
}

/// What clients are to do.
pub struct LoadConfig {
    /// What they post.
    pub workload: Workload,
    /// Where the gateway is, without a path.
    pub gateway: String,
    /// How the ids of everything they post begin: users of orders, titles of movies.
    pub tag: String,
    /// How many clients post at a time.
    pub clients: usize,
    /// How many things they post together.
    pub limit: usize,
    /// How long a request may take; a longer one goes to [`Ledger::unexpected`].
    pub max_latency: Duration,
}

/// Clients at work; they stop when this is dropped.
pub struct Load {
    workload: Workload,
    tag: String,
    shared: Arc<Shared>,
    clients: Vec<JoinHandle<()>>,
}

struct Shared {
    stopping: AtomicBool,
    /// How many things may still be posted.
    left: AtomicUsize,
    max_latency: Duration,
    ledger: Mutex<Ledger>,
}

/// What became of each thing that was posted.
#[derive(Default)]
pub struct Ledger {
    /// Those with a 2xx: they must be in the table exactly once.
    pub acknowledged: HashSet<String>,
    /// Those that were rejected or got no response: they may be there once, or not.
    pub unacknowledged: HashSet<String>,
    /// Requests that were answered with an error.
    pub rejected: usize,
    /// Requests that were accepted and got no response.
    pub unanswered: usize,
    /// The first failures, as texts.
    pub failures: Vec<String>,
    /// Responses that no client should ever see.
    pub unexpected: Vec<String>,
    /// The longest time between two acknowledgements.
    pub longest_pause: Duration,
    last_success: Option<Instant>,
    /// The same since [`Load::take_pause`].
    recent_pause: Duration,
}

/// A ledger compared with a table.
pub struct Comparison {
    /// Ids that are acknowledged and not in the table.
    pub lost: usize,
    /// Ids that are in the table more than once.
    pub duplicated: usize,
    /// Ids that are in the table and were never posted.
    pub unknown: Vec<String>,
}

impl Ledger {
    /// Compares it with the number of times that each id is in the table.
    pub fn compare(&self, found: &HashMap<String, usize>) -> Comparison {
        let posted =
            |id: &String| self.acknowledged.contains(id) || self.unacknowledged.contains(id);
        Comparison {
            lost: self.acknowledged.iter().filter(|id| !found.contains_key(*id)).count(),
            duplicated: found.values().filter(|times| **times > 1).count(),
            unknown: found.keys().filter(|id| !posted(id)).cloned().collect(),
        }
    }

    fn keep_failure(&mut self, text: impl FnOnce() -> String) {
        if self.failures.len() < KEPT_FAILURES {
            self.failures.push(text());
        }
    }
}

impl Load {
    /// Starts the clients.
    pub fn start(config: LoadConfig) -> Load {
        let LoadConfig { workload, gateway, tag, clients, limit, max_latency } = config;
        let shared = Arc::new(Shared {
            stopping: AtomicBool::new(false),
            left: AtomicUsize::new(limit),
            max_latency,
            ledger: Mutex::default(),
        });
        let url = format!("{gateway}{}", workload.path());
        let clients = (0..clients).map(|client| {
            let (shared, url, name) = (Arc::clone(&shared), url.clone(), format!("{tag}/{client}"));
            thread::spawn(move || shared.post_all(workload, &url, &name))
        });
        Load { workload, clients: clients.collect(), tag, shared }
    }

    /// What they post.
    pub fn workload(&self) -> Workload {
        self.workload
    }

    /// How the ids of everything they post begin.
    pub fn tag(&self) -> &str {
        &self.tag
    }

    /// What became of everything so far.
    pub fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.shared.ledger.lock()
    }

    /// How many things were acknowledged so far.
    pub fn acknowledged(&self) -> usize {
        self.ledger().acknowledged.len()
    }

    /// How many things are not acknowledged, though posted.
    pub fn failed(&self) -> usize {
        self.ledger().unacknowledged.len()
    }

    /// The longest time without an acknowledgement since the last call, also one that lasts.
    pub fn take_pause(&self) -> Duration {
        let mut ledger = self.ledger();
        let lasting = ledger.last_success.map(|last| last.elapsed()).unwrap_or_default();
        std::mem::take(&mut ledger.recent_pause).max(lasting)
    }

    /// Waits until six more things are acknowledged, [`RECOVERY_S`] seconds at most.
    pub fn wait_for_progress_after(&self, fault: &str) {
        let before = self.acknowledged();
        eventually(format!("requests succeed again after {fault}"), RECOVERY_S, || {
            (self.acknowledged() > before + 5 || self.is_finished()).then_some(())
        });
    }

    /// Whether everything up to the limit was posted.
    pub fn is_finished(&self) -> bool {
        self.clients.iter().all(JoinHandle::is_finished)
    }

    /// Waits until everything up to the limit was posted.
    pub fn wait_until_finished(&self, seconds: u64) {
        eventually("everything is posted", seconds, || self.is_finished().then_some(()));
    }

    /// Stops the clients when they have their responses.
    pub fn stop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        for client in self.clients.drain(..) {
            let _ = client.join();
        }
    }

    /// Stops the clients; what became of everything they posted.
    pub fn finish(mut self) -> Ledger {
        self.stop();
        std::mem::take(&mut *self.ledger())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    /// Posts one thing after the other, until the limit or [`Load::stop`].
    fn post_all(&self, workload: Workload, url: &str, name: &str) {
        let agent = agent();
        let stopping = || self.stopping.load(Ordering::SeqCst);
        let one_less = |left: usize| left.checked_sub(1);
        for number in 0.. {
            let left = self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less);
            if left.is_err() || stopping() {
                return;
            }
            let id = format!("{name}-{number}");
            while !self.post(&agent, workload, url, &id) && !stopping() {
                thread::park_timeout(PAUSE_AFTER_FAILURE);
                if !workload.is_retried() {
                    break;
                }
            }
        }
    }

    /// Posts one thing and writes down what became of it; whether it is acknowledged.
    fn post(&self, agent: &Agent, workload: Workload, url: &str, id: &str) -> bool {
        let (success, body) = match workload.is_movies() {
            true => (201, movie(id, &expected_text(id))),
            false => {
                let (items, amount) = values_of(id);
                (200, order_of(id, &items.to_string(), &format!("\"{amount}\"")))
            }
        };
        let key = format!("\"{id}\"");
        let mut headers = vec![("Content-Type", "application/json")];
        if workload == Workload::RetriedOrders {
            headers.push(("Idempotency-Key", &key));
        }
        let started_at = Instant::now();
        let response = send(agent, "POST", url, &headers, &body);
        let latency = started_at.elapsed();
        let mut ledger = self.ledger.lock();
        if latency > self.max_latency {
            ledger.unexpected.push(format!("{id} took {latency:.1?}"));
        }
        match response {
            Ok(Reply { status, .. }) if status == success => {
                let now = Instant::now();
                let last = ledger.last_success.replace(now);
                let pause = last.map(|last| now - last).unwrap_or_default();
                ledger.longest_pause = ledger.longest_pause.max(pause);
                ledger.recent_pause = ledger.recent_pause.max(pause);
                ledger.unacknowledged.remove(id);
                ledger.acknowledged.insert(id.to_owned());
                return true;
            }
            Ok(Reply { status, body, .. }) => {
                let expected = match status {
                    503 | 504 => body.contains("\"detail\":"),
                    // Inventory's response began and did not end.
                    502 => body.contains(BROKEN_OFF),
                    _ => false,
                };
                if !expected {
                    ledger.unexpected.push(format!("{id}: {status} {body}"));
                }
                ledger.rejected += 1;
                ledger.keep_failure(|| format!("{id}: {status} {body}"));
            }
            // No process listens on the port: the request was not accepted.
            Err(err) if err.to_string().contains("refused") => (),
            Err(err) => {
                ledger.unanswered += 1;
                ledger.keep_failure(|| format!("{id}: {err}"));
            }
        }
        ledger.unacknowledged.insert(id.to_owned());
        false
    }
}
