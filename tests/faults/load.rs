//! Clients that post distinct things and write down what they were told, and the
//! comparison of that with the tables.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use chassis::testing::{eventually, test_var};
use serde_json::json;

use crate::Outcome;
use crate::platform::Platform;
use harness::agent;

/// How soon all must be well again once a fault is over, in seconds.
pub(crate) const RECOVERY: u64 = 60;

/// What has not come so long after the last that came is lost.
const STILL: Duration = Duration::from_secs(5);

/// How long after an error a client waits before its next request.
const PAUSE: Duration = Duration::from_millis(10);

/// How much later than its deadline an answer of the gateway's may come: the machine may be busy.
const GRACE: Duration = Duration::from_secs(3);

/// How the gateway says that an answer of inventory's was cut.
const BROKEN_OFF: &str = "inventory broke off its answer";

/// What clients post.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    Orders,
    Movies,
    /// Orders with an `Idempotency-Key` each, repeated until they are acknowledged.
    StubbornOrders,
    /// The same without the key: the control.
    StubbornOrdersWithoutKey,
    /// Movies that are posted again until they are there: what nobody may do on the way.
    StubbornMovies,
}

/// Clients at work; they stop when this is dropped.
pub(crate) struct Load {
    what: What,
    tag: String,
    shared: Arc<Shared>,
    clients: Vec<thread::JoinHandle<()>>,
}

struct Shared {
    ending: AtomicBool,
    /// How many things may still be sent.
    left: AtomicUsize,
    /// How long a request may take, whatever comes of it.
    patience: Duration,
    ledger: Mutex<Ledger>,
}

/// What each thing was told.
#[derive(Default)]
pub(crate) struct Ledger {
    /// 2xx: must be there exactly once.
    acknowledged: HashSet<String>,
    /// Refused, or without an answer: may be there once, or not.
    open: HashSet<String>,
    last: Option<Instant>,
    worst_pause: Duration,
    /// The same since somebody asked for it: [`Load::pause`].
    recent_pause: Duration,
    /// Answers that no client should ever see.
    wrong: Vec<String>,
}

impl Load {
    /// Starts `clients` that post without end.
    pub(crate) fn start(platform: &Platform, what: What, tag: &str, clients: usize) -> Load {
        Load::start_limited(platform, what, tag, clients, usize::MAX)
    }

    /// Starts `clients` that post `limit` things together.
    pub(crate) fn start_limited(
        platform: &Platform,
        what: What,
        tag: &str,
        clients: usize,
        limit: usize,
    ) -> Load {
        let shared = Arc::new(Shared {
            ending: AtomicBool::new(false),
            left: AtomicUsize::new(limit),
            patience: patience(platform, what),
            ledger: Mutex::new(Ledger::default()),
        });
        let url = platform.stack.url(match what {
            What::Movies | What::StubbornMovies => "/api/movies",
            _ => "/api/billing",
        });
        let clients = (0..clients).map(|client| {
            let (shared, url, name) = (Arc::clone(&shared), url.clone(), format!("{tag}/{client}"));
            thread::spawn(move || shared.post(what, &url, &name))
        });
        Load { what, tag: tag.to_owned(), clients: clients.collect(), shared }
    }

    /// How many things were acknowledged until now.
    pub(crate) fn acknowledged(&self) -> usize {
        self.shared.ledger().acknowledged.len()
    }

    /// The longest time, since this was asked last, in which nobody was told that anything is
    /// done; also one that lasts.
    pub(crate) fn pause(&self) -> Duration {
        let mut ledger = self.shared.ledger();
        let lasting = ledger.last.map(|last| last.elapsed()).unwrap_or_default();
        std::mem::take(&mut ledger.recent_pause).max(lasting)
    }

    /// Whether these clients post that kind of thing.
    pub(crate) fn is(&self, what: What) -> bool {
        (self.what == What::Movies) == (what == What::Movies)
    }

    /// How many requests were refused or had no answer until now.
    pub(crate) fn failed(&self) -> usize {
        self.shared.ledger().open.len()
    }

    /// Waits until the clients are told again that things are done.
    pub(crate) fn flows_again_after(&self, fault: &str) {
        let before = self.acknowledged();
        eventually(format!("requests succeed again after {fault}"), RECOVERY, || {
            (self.acknowledged() > before + 5 || self.is_over()).then_some(())
        });
    }

    /// Whether a limited load has sent all it had.
    pub(crate) fn is_over(&self) -> bool {
        self.clients.iter().all(thread::JoinHandle::is_finished)
    }

    /// Waits until a limited load has sent all it had.
    pub(crate) fn await_end(&self, seconds: u64) {
        eventually("all is sent", seconds, || self.is_over().then_some(()));
    }

    /// Ends the clients and holds what they were told against the tables, into `outcome`.
    ///
    /// Acknowledged means: there exactly once. Refused or unknown: at most once. And
    /// nothing is there that was never sent.
    pub(crate) fn settle(mut self, platform: &Platform, outcome: &mut Outcome) {
        self.end();
        let ledger = std::mem::take(&mut *self.shared.ledger());
        let look = || match self.what {
            What::Movies | What::StubbornMovies => platform.movies(&self.tag),
            _ => platform.orders(&self.tag),
        };
        let missing = |found: &HashMap<String, usize>| {
            ledger.acknowledged.iter().filter(|id| !found.contains_key(*id)).count()
        };
        // What is late is not lost: billing may still be at it. And a double would come
        // with the last redeliveries.
        if !matches!(self.what, What::Movies | What::StubbornMovies) {
            platform.await_empty_queue();
        }
        let mut found = look();
        let mut changed = Instant::now();
        while missing(&found) > 0 && changed.elapsed() < STILL {
            thread::park_timeout(Duration::from_millis(50));
            let now = look();
            if now.len() != found.len() {
                changed = Instant::now();
            }
            found = now;
        }
        outcome.acknowledged += ledger.acknowledged.len();
        outcome.found += found.len();
        outcome.lost += missing(&found);
        outcome.double += found.values().filter(|times| **times > 1).count();
        let known = |id: &String| ledger.acknowledged.contains(id) || ledger.open.contains(id);
        for stranger in found.keys().filter(|id| !known(id)).take(3) {
            outcome.wrong.push(format!("{stranger} is there and was never sent"));
        }
        outcome.wrong.extend(self.altered(platform).into_iter().take(3));
        outcome.worst_pause = outcome.worst_pause.max(ledger.worst_pause);
        outcome.wrong.extend(ledger.wrong);
    }

    /// What is there with other values than were sent.
    fn altered(&self, platform: &Platform) -> Vec<String> {
        let (database, query) = match self.what {
            What::Movies | What::StubbornMovies => (
                "INVENTORY_DB_NAME",
                "select title, description from movies where starts_with(title, $1)",
            ),
            _ => (
                "BILLING_DB_NAME",
                "select user_id, number_of_items || ' for ' || total_amount from orders
                 where starts_with(user_id, $1)",
            ),
        };
        let rows = platform.connect(database).query(query, &[&self.tag]).unwrap();
        let rows = rows.iter().map(|row| (row.get(0), row.get(1)));
        rows.filter(|(id, values): &(String, String)| *values != in_words(id))
            .map(|(id, values)| format!("{id} is there with {values}, not {}", in_words(&id)))
            .collect()
    }

    /// Lets the clients finish what they are at, and ends them.
    pub(crate) fn end(&mut self) {
        self.shared.ending.store(true, Ordering::SeqCst);
        for client in self.clients.drain(..) {
            let _ = client.join();
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Posts things one after the other, until the end or the limit.
    fn post(&self, what: What, url: &str, name: &str) {
        let agent = agent();
        let may_go_on = || !self.ending.load(Ordering::SeqCst);
        let one_more = |left: usize| left.checked_sub(1);
        for number in 0.. {
            let more = self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more).is_ok();
            if !more || !may_go_on() {
                return;
            }
            let id = format!("{name}-{number}");
            let stubborn = !matches!(what, What::Orders | What::Movies);
            while !self.post_one(&agent, what, url, &id) && may_go_on() {
                thread::park_timeout(PAUSE);
                if !stubborn {
                    break;
                }
            }
        }
    }

    /// Posts one thing and writes down the answer; whether it is done.
    fn post_one(&self, agent: &ureq::Agent, what: What, url: &str, id: &str) -> bool {
        let (success, body) = match what {
            What::Movies | What::StubbornMovies => {
                (201, json!({ "title": id, "description": in_words(id) }))
            }
            _ => {
                let (items, amount) = values_of(id);
                (200, json!({ "user_id": id, "number_of_items": items, "total_amount": amount }))
            }
        };
        let mut request = agent.post(url).content_type("application/json");
        if what == What::StubbornOrders {
            request = request.header("Idempotency-Key", format!("\"{id}\""));
        }
        let begun = Instant::now();
        let answer = request.send(body.to_string()).and_then(|mut answer| {
            Ok((answer.status().as_u16(), answer.body_mut().read_to_string()?))
        });
        let took = begun.elapsed();
        let mut ledger = self.ledger();
        if took > self.patience {
            ledger.wrong.push(format!("{id} took {took:.1?}"));
        }
        match answer {
            Ok((status, _)) if status == success => {
                let now = Instant::now();
                let pause = ledger.last.replace(now).map(|last| now - last).unwrap_or_default();
                ledger.worst_pause = ledger.worst_pause.max(pause);
                ledger.recent_pause = ledger.recent_pause.max(pause);
                ledger.open.remove(id);
                ledger.acknowledged.insert(id.to_owned());
                return true;
            }
            Ok((503 | 504, told)) if told.contains("\"detail\":") => (),
            // The begin of an answer came, and not its end.
            Ok((502, told)) if told.contains(BROKEN_OFF) => (),
            Ok((status, told)) => ledger.wrong.push(format!("{id} was told {status} {told}")),
            // The gateway itself was killed, or its connection cut.
            Err(_) => (),
        }
        ledger.open.insert(id.to_owned());
        false
    }
}

/// The gateway's own deadline for such a thing, and the grace.
fn patience(platform: &Platform, what: What) -> Duration {
    // The cable between the clients and the gateway may be pulled: `hosts`.
    if !platform.stack.url("").starts_with("http://127.") {
        return Duration::MAX;
    }
    let deadlines: &[&str] = match what {
        What::Movies | What::StubbornMovies => &["UPSTREAM_CONNECT", "UPSTREAM_RESPONSE"],
        _ => &["PUBLISH_CONFIRM"],
    };
    let milliseconds =
        deadlines.iter().map(|name| test_var(&format!("GATEWAY_{name}_TIMEOUT_MS")).parse::<u64>());
    GRACE + Duration::from_millis(milliseconds.map(Result::unwrap).sum())
}

/// Items and amount of the order with this id: of no other, so that a mix-up shows.
fn values_of(id: &str) -> (u64, String) {
    let mut hasher = DefaultHasher::new();
    id.hash(&mut hasher);
    let hash = hasher.finish();
    let cents = hash % 100_000_000;
    ((hash >> 32) % 100 + 1, format!("{}.{:02}", cents / 100, cents % 100))
}

/// The same as a text.
fn in_words(id: &str) -> String {
    let (items, amount) = values_of(id);
    format!("{items} for {amount}")
}
