//! The thread that keeps the public keys and the list of ended sessions up to date.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use log::Level;
use parking_lot::{Condvar, Mutex, RwLock};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Config;
use super::authenticator::unix_now;
use super::keys::PublicKeys;
use crate::backoff::RetryLog;
use crate::stop::Stop;

/// The shortest time between two fetches of the keys that unknown key ids cause.
const KEYS_REFETCH_INTERVAL: Duration = Duration::from_secs(10);

/// The keys are fetched again after this time: a key that was taken away is out of use by then.
const KEYS_MAX_AGE: Duration = Duration::from_secs(60);

/// How long a request waits for keys that are being fetched.
const KEYS_WAIT: Duration = Duration::from_secs(1);

/// Where keys and ended sessions come from: another service, or one's own database.
pub trait Source: Send + 'static {
    /// The keys that verify tokens now.
    fn keys(&self) -> anyhow::Result<PublicKeys>;

    /// Sessions that have ended, in the order of their numbers, from the one behind `after`. Where
    /// `epoch` is not that of the source, from the first.
    fn revocations(&self, epoch: &str, after: i64) -> anyhow::Result<RevocationPage>;
}

/// A part of the list of ended sessions.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct RevocationPage {
    /// Names the list. With another list, such as one that was restored from a backup, the numbers
    /// begin again.
    pub epoch: String,
    /// Ended sessions, in the order of their numbers.
    pub revocations: Vec<Revocation>,
    /// The number to ask with next.
    pub next: i64,
    /// Whether there are more already.
    pub more: bool,
}

/// A session that has ended.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Revocation {
    /// Its place in the list.
    pub number: i64,
    /// The session.
    pub session_id: Uuid,
    /// When the last of its access tokens has expired, in Unix seconds.
    pub until: i64,
}

/// What the thread keeps up to date and requests read.
pub(super) struct Feed {
    keys: RwLock<(u64, Arc<PublicKeys>)>,
    /// The number of the set of keys, for requests that need no key.
    generation: AtomicU64,
    /// The ended sessions, each until its last access token has expired.
    ended: RwLock<HashMap<Uuid, i64>>,
    started: Instant,
    /// When the last successful look at the source began, in milliseconds since `started`, plus 1;
    /// 0 before the first one.
    fresh_at: AtomicU64,
    fetch: Mutex<KeysFetch>,
    changed: Condvar,
}

#[derive(Default)]
struct KeysFetch {
    wanted: bool,
    last_wanted_at: Option<Instant>,
}

impl Feed {
    pub(super) fn new() -> Feed {
        Feed {
            keys: RwLock::default(),
            generation: AtomicU64::new(0),
            ended: RwLock::default(),
            started: Instant::now(),
            fresh_at: AtomicU64::new(0),
            fetch: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// The number of the set of keys.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// The keys, and the number of their set.
    pub(super) fn keys(&self) -> (u64, Arc<PublicKeys>) {
        self.keys.read().clone()
    }

    pub(super) fn has_ended(&self, session_id: Uuid) -> bool {
        self.ended.read().contains_key(&session_id)
    }

    pub(super) fn end(&self, revoked: &[Revocation]) {
        self.ended.write().extend(revoked.iter().map(|it| (it.session_id, it.until)));
    }

    /// How long ago the source was last heard of; `None` where it never was.
    pub(super) fn age(&self) -> Option<Duration> {
        let fresh_at = self.fresh_at.load(Ordering::SeqCst).checked_sub(1)?;
        Some(self.started.elapsed().saturating_sub(Duration::from_millis(fresh_at)))
    }

    /// Has the keys fetched again, because a token names one that is not among them, and waits until
    /// that is done. At most every 10 s: else anyone could cause a fetch with each request.
    pub(super) fn refetch_keys(&self) {
        let mut fetch = self.fetch.lock();
        if !fetch.wanted {
            if fetch.last_wanted_at.is_some_and(|at| at.elapsed() < KEYS_REFETCH_INTERVAL) {
                return;
            }
            fetch.wanted = true;
            fetch.last_wanted_at = Some(Instant::now());
            self.changed.notify_all();
        }
        self.changed.wait_while_for(&mut fetch, |fetch| fetch.wanted, KEYS_WAIT);
    }

    /// Starts the thread; it ends with `stop`, and a panic in it stops the process.
    pub(super) fn follow(
        self: &Arc<Self>,
        config: &Config,
        source: impl Source,
        stop: &Stop,
    ) -> anyhow::Result<()> {
        let follower = Follower {
            feed: Arc::clone(self),
            source,
            epoch: String::new(),
            after: 0,
            keys_fetched_at: None,
            poll_interval: config.poll_interval,
        };
        let stop = stop.clone();
        thread::Builder::new().name("auth-feed".into()).spawn(move || {
            let _guard = StopOnPanic(stop.clone());
            follower.run(&stop);
        })?;
        Ok(())
    }
}

struct Follower<S> {
    feed: Arc<Feed>,
    source: S,
    epoch: String,
    after: i64,
    keys_fetched_at: Option<Instant>,
    poll_interval: Duration,
}

impl<S: Source> Follower<S> {
    fn run(mut self, stop: &Stop) {
        let mut log = RetryLog::default();
        while !stop.is_requested() {
            let pause = match self.poll() {
                Ok(()) => {
                    if log.succeeded() {
                        log::info!("ended sessions are known again");
                    }
                    self.poll_interval
                }
                Err(err) => {
                    let reason = format!("{err:#}");
                    log.failed(Level::Error, "ended sessions are not known", &reason)
                        .min(self.poll_interval)
                }
            };
            self.wait(pause);
        }
    }

    /// Looks at the source once.
    fn poll(&mut self) -> anyhow::Result<()> {
        let began = self.feed.started.elapsed().as_millis() as u64;
        let is_current = self.keys_fetched_at.is_some_and(|at| at.elapsed() < KEYS_MAX_AGE);
        if !is_current || self.feed.fetch.lock().wanted {
            let fetched = self.source.keys().map(|keys| self.set_keys(keys));
            // Also after a failure: a request that waits is refused and may come again.
            self.feed.fetch.lock().wanted = false;
            self.feed.changed.notify_all();
            fetched?;
            self.keys_fetched_at = Some(Instant::now());
        }
        loop {
            let page = self.source.revocations(&self.epoch, self.after)?;
            self.feed.end(&page.revocations);
            self.epoch = page.epoch;
            self.after = page.next;
            if !page.more {
                break;
            }
        }
        let now = unix_now();
        self.feed.ended.write().retain(|_, until| *until > now);
        self.feed.fresh_at.store(began + 1, Ordering::SeqCst);
        Ok(())
    }

    /// A new set gets a new number: tokens that a former set has verified are verified again.
    fn set_keys(&self, keys: PublicKeys) {
        let mut current = self.feed.keys.write();
        if *current.1 != keys || current.0 == 0 {
            *current = (current.0 + 1, Arc::new(keys));
            self.feed.generation.store(current.0, Ordering::SeqCst);
        }
    }

    fn wait(&self, pause: Duration) {
        let mut fetch = self.feed.fetch.lock();
        self.feed.changed.wait_while_for(&mut fetch, |fetch| !fetch.wanted, pause);
    }
}

/// Requests a stop when its thread panics: without this thread no token would be accepted any more.
struct StopOnPanic(Stop);

impl Drop for StopOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.request();
        }
    }
}
