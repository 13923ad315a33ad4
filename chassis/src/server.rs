//! The HTTP server loop: a bounded pool of threads, one connection a thread.
//!
//! rouille's own server (tiny_http) has no deadline anywhere and can be ended by
//! one request or one failed `accept`; so the loop is ours, and rouille's Request
//! and Response are what handlers see.
//!
//! A connection is at any moment either *busy* with a request or *waiting* for
//! its client: idle, in the middle of a request, or for room to write. When the
//! house is full, a newcomer takes the place of the one that has waited longest.

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use rouille::{Request, Response};
use socket2::{Domain, SockFilter, SockRef, Socket, Type};
use uuid::Uuid;

use crate::env::Env;
use crate::http1::{self, BodyDecoder, BodyFraming, RequestHead};
use crate::metrics;
use crate::problem::{Problem, reason_phrase};
use crate::router::RoutedResponse;
use crate::stop::Stop;

/// Enough for the deepest handler, also unoptimised; only touched pages cost memory.
const STACK: usize = 512 << 10;

/// A thread without work ends after this.
const THREAD_IDLE: Duration = Duration::from_secs(10);

/// Threads over the cap, for connections on their way out.
const SLACK: usize = 16;

/// How long a client is not evicted that is in the middle of something: in a burst of connects
/// the threads need a moment to read what is already there. Nor, unless there is nobody else,
/// one that was just answered: it is about to ask again.
const UNTOUCHABLE: Duration = Duration::from_millis(20);

/// How long a newcomer waits for a place before it is told that there is none. A client
/// that is told so at once comes back at once, and then there is less done than refused.
const PATIENCE: Duration = Duration::from_millis(10);

/// How many connections are looked at to find one that can make room. Those that have
/// waited longest are the slow ones; if even they wait for us, there is more to do than
/// can be done, and the search among all would only keep everybody from doing it.
const ASKED_TO_LEAVE: usize = 8;

/// How often `accept` looks up to see whether it is time to stop, and whether there is a
/// place for somebody who waits for one.
const TICK: Duration = Duration::from_millis(100);
const QUICK_TICK: Duration = Duration::from_millis(2);

/// After a stop: how long connections that look idle may still send a request,
/// and by when the last answer must be out.
const STOP_QUIET: Duration = Duration::from_millis(150);
const STOP_GRACE: Duration = Duration::from_millis(4000);

/// What one read takes at most: more than most requests have, kept for each connection.
const READ: usize = 4 << 10;

/// A body that is small enough leaves in one write with its head.
const WRITE_BUFFER: usize = 16 << 10;

/// What is in memory of a larger one, for each client that takes it.
const PIECE: usize = 8 << 10;

/// Room for the size of a piece in hexadecimal and the end of that line.
const CHUNK_HEAD: usize = 6;

/// A client must take its answer at this rate at least, in bytes a second, after
/// the first write timeout; a reader slower than that holds a thread for nothing.
const MIN_WRITE_RATE: u64 = 16 << 10;

/// After a refusal the rest of the request is read and dropped for so long and so
/// far, because closing on unread data would reset the connection and lose the answer.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 16 << 20;

/// While `accept` fails: how often the log says so, and how many make room at a time.
const COMPLAIN: Duration = Duration::from_secs(10);
const EVICTED_AT_ONCE: usize = 8;

/// How many refused connections are kept for that long, and how many newcomers wait, at most.
const REFUSED: usize = 256;

/// Descriptors for everything but clients: the standard streams, the listeners, the
/// clients of the metrics, the broker's connection, probes, and some to spare.
const OWN_DESCRIPTORS: usize = 32;

/// After a stop: how long a client that has sent its SYN may take to send the ACK.
const HANDSHAKE: Duration = Duration::from_millis(10);

/// A socket filter that drops each TCP segment with the flag SYN, which is in byte 13 of the
/// header (RFC 9293 section 3.1): its client sends it again, to whoever listens by then.
static DEAF_TO_SYN: [SockFilter; 4] = {
    // Linux's <linux/bpf_common.h>.
    const LOAD_BYTE: u16 = 0x30;
    const JUMP_IF_SET: u16 = 0x45;
    const RETURN: u16 = 0x06;
    [
        SockFilter::new(LOAD_BYTE, 0, 0, 13),
        SockFilter::new(JUMP_IF_SET, 0, 1, 0x02),
        SockFilter::new(RETURN, 0, 0, 0),
        SockFilter::new(RETURN, 0, 0, u32::MAX),
    ]
};

/// Linux's flags for `send` and `recv`.
const MSG_PEEK: i32 = 0x02;
const MSG_DONTWAIT: i32 = 0x40;
const MSG_MORE: i32 = 0x8000;

/// What the kernel may hold of an answer, in bytes, for each client. Left to itself
/// it takes 4 MB, and then a reader that pauses keeps one write waiting past its
/// timeout: the kernel wakes a writer only when a third of the buffer is free.
const SEND_BUFFER: usize = 128 << 10;

/// Where a service listens, and the limits of its server loop.
#[derive(Clone, Debug)]
pub struct Config {
    /// The service's own door.
    pub listen: SocketAddr,
    /// The door for metrics.
    pub metrics_listen: SocketAddr,
    /// What the loop allows.
    pub limits: Limits,
}

/// What a server loop allows its clients.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Most connections, and threads.
    pub max_connections: usize,
    /// From the first byte of a head to its last; also for the first byte of a new connection.
    pub header_timeout: Duration,
    /// For the whole body.
    pub body_timeout: Duration,
    /// For one write of the answer.
    pub write_timeout: Duration,
    /// Between two requests.
    pub idle_timeout: Duration,
    /// Longest head of a request, its line and its header fields together, in bytes.
    pub max_head_bytes: usize,
    /// Most header fields of a request.
    pub max_header_fields: usize,
    /// Largest body of a request, in bytes.
    pub max_body_bytes: usize,
    /// Largest sum of all bodies that are in memory, in bytes.
    pub max_buffered_bytes: usize,
}

impl Config {
    /// Reads `<PREFIX>_HOST`, `_PORT`, `_METRICS_LISTEN`, `_HTTP_MAX_CONNECTIONS` and the
    /// `HTTP_…` limits that all services share.
    pub fn from_env(env: &mut Env, prefix: &str) -> Config {
        let name = |suffix: &str| format!("{prefix}_{suffix}");
        let listen = env.host_port(&name("HOST"), &name("PORT"));
        let metrics_listen = env.address(&name("METRICS_LISTEN"));
        // The kernel would not mind: both would get some of the connections.
        if listen.port() != 0 && listen.port() == metrics_listen.port() {
            let (port, metrics) = (name("PORT"), name("METRICS_LISTEN"));
            env.error(&format!("{metrics} must have another port than {port}"));
        }
        Config {
            listen,
            metrics_listen,
            limits: Limits {
                max_connections: env.number(&name("HTTP_MAX_CONNECTIONS"), 256, 1..=10_000),
                header_timeout: env.millis("HTTP_HEADER_TIMEOUT_MS", 5000),
                body_timeout: env.millis("HTTP_BODY_TIMEOUT_MS", 10_000),
                write_timeout: env.millis("HTTP_WRITE_TIMEOUT_MS", 10_000),
                idle_timeout: env.millis("HTTP_IDLE_TIMEOUT_MS", 60_000),
                max_head_bytes: 16 << 10,
                max_header_fields: 100,
                max_body_bytes: env.number("HTTP_MAX_BODY_BYTES", 256 << 10, 1..=1 << 30),
                max_buffered_bytes: env.number(
                    "HTTP_MAX_BUFFERED_BODY_BYTES",
                    16 << 20,
                    1..=1 << 40,
                ),
            },
        }
    }
}

impl Config {
    /// Lowers the number of connections to what the process may have open (`ulimit -n`),
    /// where each takes `each` descriptors and `others` are kept for connections to
    /// other servers: a client that comes in and finds no descriptor left for the
    /// database or the service behind is served worse than one that waits outside.
    pub fn clamp_to_fd_limit(&mut self, each: usize, others: usize) {
        let Some(allowed) = descriptors() else { return };
        let threads = self.limits.max_connections.min(places(allowed, each, others));
        if threads < self.limits.max_connections {
            log::warn!(
                "{threads} connections at once instead of {}: the process may have {allowed} \
                 descriptors open (ulimit -n)",
                self.limits.max_connections,
            );
            self.limits.max_connections = threads;
        }
    }
}

/// How many connections fit in so many descriptors, at least one: beside those that are
/// in there are as many that were refused and some on their way out.
fn places(allowed: usize, each: usize, others: usize) -> usize {
    (allowed.saturating_sub(OWN_DESCRIPTORS + others + SLACK) / (each + 1)).max(1)
}

/// The soft limit of this process; `None` where there is none.
fn descriptors() -> Option<usize> {
    let limits = std::fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

impl Limits {
    /// The same for a service behind a proxy that holds to these limits and then
    /// adds header fields of its own.
    pub fn with_proxy_headroom(mut self) -> Limits {
        self.max_head_bytes += 2 << 10;
        self.max_header_fields += 10;
        self
    }
}

/// Listens at both addresses of `config` and serves until `stop`.
pub fn run<H>(config: &Config, stop: &Stop, handler: H) -> anyhow::Result<()>
where
    H: Fn(&Request) -> RoutedResponse + Send + Sync + 'static,
{
    metrics::register_server();
    let listener = bind(config.listen)?;
    let metrics_listener = bind(config.metrics_listen)?;
    let (limits, metrics_stop) =
        (Limits { max_connections: 8, ..config.limits.clone() }, stop.clone());
    thread::Builder::new().name("metrics".into()).spawn(move || {
        let served =
            Server::new(limits, &metrics_stop, false, metrics::scrape).serve(metrics_listener);
        served.unwrap_or_else(|err| log::error!("metrics are not served: {err:#}"));
    })?;
    log::info!("listening on {}, metrics on {}", config.listen, config.metrics_listen);
    serve(listener, config.limits.clone(), stop, handler)
}

/// A listener that a second process may share (SO_REUSEPORT), so that two can
/// take turns without refusing anyone.
pub fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let bind = || {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.bind(&address.into())?;
        socket.listen(1024)?;
        io::Result::Ok(TcpListener::from(socket))
    };
    bind().with_context(|| format!("cannot listen on {address}"))
}

/// Serves until `stop`; then the requests that have begun are finished.
pub fn serve<H>(
    listener: TcpListener,
    limits: Limits,
    stop: &Stop,
    handler: H,
) -> anyhow::Result<()>
where
    H: Fn(&Request) -> RoutedResponse + Send + Sync + 'static,
{
    Server::new(limits, stop, true, handler).serve(listener)
}

/// What all threads of one loop share.
struct Server<H> {
    limits: Limits,
    stop: Stop,
    /// Whether requests are counted and logged: those of the public door are.
    observed: bool,
    handler: H,
    started: Instant,
    house: Mutex<House>,
    /// Rung for a thread when a connection waits for one, and for the stop when one has left.
    bell: Condvar,
    bodies: AtomicUsize,
}

/// Who is in.
#[derive(Default)]
struct House {
    connections: HashMap<u64, Arc<Connection>>,
    next_key: u64,
    /// Connections that no thread has taken yet.
    arrivals: VecDeque<(u64, Arc<Connection>)>,
    threads: usize,
    idle_threads: usize,
}

impl<H> Server<H>
where
    H: Fn(&Request) -> RoutedResponse + Send + Sync + 'static,
{
    fn new(limits: Limits, stop: &Stop, observed: bool, handler: H) -> Arc<Server<H>> {
        Arc::new(Server {
            limits,
            stop: stop.clone(),
            observed,
            handler,
            started: Instant::now(),
            house: Mutex::new(House::default()),
            bell: Condvar::new(),
            bodies: AtomicUsize::new(0),
        })
    }

    fn serve(self: &Arc<Self>, listener: TcpListener) -> anyhow::Result<()> {
        let most = REFUSED.min(self.limits.max_connections);
        let mut lobby = Lobby { most, ..Lobby::default() };
        let mut tick = Duration::ZERO;
        let mut complained: Option<Instant> = None;
        while !self.stop.is_requested() {
            let wanted = if lobby.waiting.is_empty() { TICK } else { QUICK_TICK };
            if tick != wanted {
                // Linux lets SO_RCVTIMEO bound an accept too.
                SockRef::from(&listener).set_read_timeout(Some(wanted))?;
                tick = wanted;
            }
            match listener.accept() {
                Ok((stream, peer)) => lobby.receive(self.meet(stream, peer)),
                Err(err) if is_pause(&err) => lobby.sweep(),
                Err(err) if err.kind() == ErrorKind::ConnectionAborted => (),
                Err(err) => {
                    // Out of descriptors, as a rule: some clients less free some.
                    metrics::ACCEPT_ERRORS.inc();
                    if complained.is_none_or(|before| before.elapsed() > COMPLAIN) {
                        complained = Some(Instant::now());
                        log::error!("accept fails, trying on: {err}");
                    }
                    lobby.refused.clear();
                    for _ in 0..EVICTED_AT_ONCE {
                        self.evict(&mut self.lock(), Duration::ZERO);
                    }
                    self.stop.sleep(Duration::from_millis(50));
                }
            }
            self.admit_those_who_wait(&mut lobby);
        }
        // Whoever is connected already, if only in the kernel's queue, is still served. The
        // end of the listener resets whom the kernel has let in since the last look at that
        // queue: so nobody new is let in, and whoever was half-way is waited for.
        let door = SockRef::from(&listener);
        door.attach_filter(&DEAF_TO_SYN)?;
        door.set_read_timeout(Some(HANDSHAKE))?;
        while let Ok((stream, peer)) = listener.accept() {
            lobby.receive(self.meet(stream, peer));
            self.admit_those_who_wait(&mut lobby);
        }
        drop(listener);
        while let Some((_, newcomer)) = lobby.waiting.pop_front() {
            if let Err(newcomer) = self.admit(newcomer, Some(Duration::ZERO), &mut lobby) {
                lobby.refuse(newcomer);
            }
        }
        self.drain()
    }

    /// In their order; whoever has waited too long is refused.
    fn admit_those_who_wait(self: &Arc<Self>, lobby: &mut Lobby) {
        while let Some((since, newcomer)) = lobby.waiting.pop_front() {
            // In a flood the search for somebody to evict would cost more than all the rest,
            // and each who is evicted comes back.
            let ago = |then: Option<Instant>| then.map_or(Duration::MAX, |then| then.elapsed());
            let overdue = since.elapsed() >= PATIENCE;
            let presses = overdue && ago(lobby.pressed) >= PATIENCE;
            let searches = presses || ago(lobby.searched) >= QUICK_TICK;
            let idle_for = if presses { Duration::ZERO } else { UNTOUCHABLE };
            let Err(newcomer) = self.admit(newcomer, searches.then_some(idle_for), lobby) else {
                if presses {
                    lobby.pressed = Some(Instant::now());
                }
                continue;
            };
            if searches {
                lobby.searched = Some(Instant::now());
            }
            if !overdue {
                return lobby.waiting.push_front((since, newcomer));
            }
            lobby.refuse(newcomer);
        }
    }

    /// Waits for the last answers.
    fn drain(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + STOP_GRACE;
        self.wait_until_empty(Instant::now() + STOP_QUIET);
        for connection in self.lock().connections.values() {
            connection.close_if_idle();
        }
        self.wait_until_empty(deadline);
        let unfinished = self.lock().connections.len();
        anyhow::ensure!(unfinished == 0, "stopped with {unfinished} connections unfinished");
        Ok(())
    }

    fn wait_until_empty(&self, deadline: Instant) {
        let left = deadline.saturating_duration_since(Instant::now());
        self.bell.notify_all();
        let _ =
            self.bell.wait_timeout_while(self.lock(), left, |house| !house.connections.is_empty());
    }

    fn meet(&self, stream: TcpStream, peer: SocketAddr) -> Arc<Connection> {
        let state = AtomicU64::new(BUSY);
        Arc::new(Connection { stream, peer, epoch: self.started, state })
    }

    /// Gives a new connection a place and a thread; gives it back if there is none. The place
    /// may be that of somebody else, see [`Server::evict`], unless `idle_for` is none.
    fn admit(
        self: &Arc<Self>,
        connection: Arc<Connection>,
        idle_for: Option<Duration>,
        lobby: &mut Lobby,
    ) -> Result<(), Arc<Connection>> {
        let mut house = self.lock();
        let mut evicted = None;
        if house.connections.len() >= self.limits.max_connections {
            evicted = idle_for.and_then(|idle_for| self.evict(&mut house, idle_for));
            if evicted.is_none() {
                return Err(connection);
            }
        }
        let _ = connection.stream.set_nodelay(true);
        let _ = SockRef::from(&connection.stream).set_send_buffer_size(SEND_BUFFER);
        connection.wait_for(Phase::New, Instant::now());
        let key = house.next_key;
        house.next_key += 1;
        house.connections.insert(key, Arc::clone(&connection));
        house.arrivals.push_back((key, connection));
        // `idle_threads` counts those that have been rung for but have not come
        // yet, and so does `arrivals`: no connection waits behind a thread that
        // another one has claimed.
        if house.idle_threads < house.arrivals.len()
            && house.threads < self.limits.max_connections + SLACK
        {
            let server = Arc::clone(self);
            let worker = thread::Builder::new().name("http".into()).stack_size(STACK);
            match worker.spawn(move || server.work()) {
                Ok(_) => house.threads += 1,
                Err(err) if house.threads == 0 => {
                    log::error!("no thread for a connection: {err}");
                    if let Some((key, connection)) = house.arrivals.pop_back() {
                        house.connections.remove(&key);
                        connection.close();
                    }
                }
                // Another thread takes it as soon as it is free.
                Err(err) => log::warn!("one thread less than wanted: {err}"),
            }
        }
        self.count(&house);
        drop(house);
        self.bell.notify_one();
        evicted.into_iter().for_each(|evicted| lobby.send_away(evicted));
        Ok(())
    }

    /// Takes the place of the connection that has waited longest, idle ones first if they are
    /// idle for so long, but of none that waits for us: with something to read in its socket.
    fn evict(&self, house: &mut House, idle_for: Duration) -> Option<Arc<Connection>> {
        let now = Instant::now();
        let waiting = house.connections.iter().filter_map(|(key, connection)| {
            let (phase, since) = connection.waiting()?;
            let untouchable = if phase == Phase::Idle { idle_for } else { UNTOUCHABLE };
            let waited = now.saturating_duration_since(since);
            (waited >= untouchable).then_some((phase != Phase::Idle, since, *key, phase))
        });
        let mut waiting: Vec<(bool, Instant, u64, Phase)> = waiting.collect();
        waiting.sort_unstable();
        for (_, _, key, phase) in waiting.into_iter().take(ASKED_TO_LEAVE) {
            let evicted = |connection: &Arc<Connection>| {
                // Who does not take the answer may have sent whatever.
                (phase == Phase::Writing || !connection.has_unread()) && connection.evict()
            };
            if house.connections.get(&key).is_some_and(evicted) {
                metrics::EVICTED.inc();
                return house.connections.remove(&key);
            }
        }
        None
    }

    /// The life of a thread: one connection after the other.
    fn work(&self) {
        loop {
            let mut house = self.lock();
            house.idle_threads += 1;
            let empty = |house: &mut House| house.arrivals.is_empty();
            let waited = self.bell.wait_timeout_while(house, THREAD_IDLE, empty);
            house = waited.unwrap_or_else(PoisonError::into_inner).0;
            house.idle_threads -= 1;
            let Some((key, connection)) = house.arrivals.pop_front() else {
                house.threads -= 1;
                return;
            };
            drop(house);
            // A panic of the handler is caught closer by; this one keeps the books.
            let _ = catch_unwind(AssertUnwindSafe(|| Session::new(self, &connection).serve()));
            let mut house = self.lock();
            house.connections.remove(&key);
            self.count(&house);
            let last = house.connections.is_empty();
            drop(house);
            if last && self.stop.is_requested() {
                self.bell.notify_all();
            }
        }
    }

    fn count(&self, house: &House) {
        if self.observed {
            metrics::CONNECTIONS.set(house.connections.len() as i64);
        }
    }

    fn lock(&self) -> MutexGuard<'_, House> {
        self.house.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a connection waits for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    /// For its first request, of which nothing has come.
    New = 1,
    /// For its next request, of which nothing has come.
    Idle,
    /// For the rest of a request.
    Reading,
    /// For room to write.
    Writing,
}

impl Phase {
    const ALL: [Phase; 4] = [Phase::New, Phase::Idle, Phase::Reading, Phase::Writing];
}

/// A client's socket and, for whoever looks for a place, what it waits for.
struct Connection {
    stream: TcpStream,
    peer: SocketAddr,
    epoch: Instant,
    /// [`BUSY`], [`EVICTED`], or the microseconds between `epoch` and the begin of
    /// the wait, times eight, plus the [`Phase`].
    state: AtomicU64,
}

const BUSY: u64 = 0;
const EVICTED: u64 = u64::MAX;

impl Connection {
    /// Marks the begin of a wait; once evicted, a connection stays so.
    fn wait_for(&self, phase: Phase, since: Instant) {
        let micros = since.saturating_duration_since(self.epoch).as_micros() as u64;
        let state = micros << 3 | phase as u64;
        let _ = self.state.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |old| {
            (old != EVICTED).then_some(state)
        });
    }

    /// Marks the end of a wait; an error when the connection was evicted meanwhile.
    fn resume(&self) -> io::Result<()> {
        match self.state.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |old| {
            (old != EVICTED).then_some(BUSY)
        }) {
            Ok(_) => Ok(()),
            Err(_) => Err(ErrorKind::ConnectionAborted.into()),
        }
    }

    fn waiting(&self) -> Option<(Phase, Instant)> {
        let state = self.state.load(Ordering::SeqCst);
        if state == BUSY || state == EVICTED {
            return None;
        }
        let phase = Phase::ALL.into_iter().find(|phase| *phase as u64 == state & 7)?;
        Some((phase, self.epoch + Duration::from_micros(state >> 3)))
    }

    /// Takes it from its thread, unless it has just become busy. A reader's client can still
    /// be told why; a writer's does not listen.
    fn evict(&self) -> bool {
        let waits = |old| (old != BUSY && old != EVICTED).then_some(EVICTED);
        let evicted = self.state.fetch_update(Ordering::SeqCst, Ordering::SeqCst, waits);
        let Ok(old) = evicted else { return false };
        let writing = old & 7 == Phase::Writing as u64;
        let _ = self.stream.shutdown(if writing { Shutdown::Both } else { Shutdown::Read });
        true
    }

    /// Whether bytes have come that its thread has not read yet.
    fn has_unread(&self) -> bool {
        let mut byte = [MaybeUninit::uninit()];
        let peeked =
            SockRef::from(&self.stream).recv_with_flags(&mut byte, MSG_PEEK | MSG_DONTWAIT);
        peeked.is_ok_and(|bytes| bytes > 0)
    }

    /// Drops what has come; whether its client has ended it.
    fn drop_unread(&self) -> bool {
        let mut piece = [MaybeUninit::uninit(); READ];
        matches!(SockRef::from(&self.stream).recv_with_flags(&mut piece, MSG_DONTWAIT), Ok(0))
    }

    fn close_if_idle(&self) {
        if self.waiting().is_some_and(|(phase, _)| phase <= Phase::Idle) {
            // Its thread wakes with an end of file; a request that made it through
            // before that is still read and answered.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
    }

    fn close(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// Connections that have no place: those that wait for one, and those that were told 503,
/// kept for a moment so that closing them with their request unread does not take the
/// answer away. The oldest first.
#[derive(Default)]
struct Lobby {
    waiting: VecDeque<(Instant, Arc<Connection>)>,
    refused: VecDeque<(Instant, Arc<Connection>)>,
    /// Of both together.
    most: usize,
    /// When nobody was found who could be evicted.
    searched: Option<Instant>,
    /// When one was evicted who had been idle for a moment only.
    pressed: Option<Instant>,
}

impl Lobby {
    /// Gives a newcomer a chair.
    fn receive(&mut self, newcomer: Arc<Connection>) {
        if self.waiting.len() == self.most {
            // It has waited for a shorter time than the others, but they are next.
            self.refuse(newcomer);
        } else {
            self.waiting.push_back((Instant::now(), newcomer));
            self.make_room();
        }
    }

    fn refuse(&mut self, newcomer: Arc<Connection>) {
        metrics::REFUSED.inc();
        self.send_away(newcomer);
    }

    /// Says 503. Also to an evicted one that seems to be idle: its next request may be on
    /// the way, and without an answer nobody could tell whether it was done.
    fn send_away(&mut self, connection: Arc<Connection>) {
        let id = Uuid::now_v7();
        let told = "the server has no place left";
        let body = format!(
            "{{\"type\":\"about:blank\",\"title\":\"Service Unavailable\",\"status\":503,\
             \"detail\":\"{told}\",\"error\":\"{told}\",\"request_id\":\"{id}\"}}"
        );
        let answer = format!(
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json\r\n\
             Content-Length: {}\r\nRetry-After: 1\r\nX-Request-Id: {id}\r\n\
             Connection: close\r\n\r\n{body}",
            body.len()
        );
        // The answer and the end leave in one segment: half the work, for the client too.
        let stream = SockRef::from(&connection.stream);
        let _ = stream.send_with_flags(answer.as_bytes(), MSG_DONTWAIT | MSG_MORE);
        let _ = stream.shutdown(Shutdown::Write);
        self.refused.push_back((Instant::now(), connection));
        self.make_room();
        self.sweep();
    }

    /// Forgets of those that were refused as many as are too many.
    fn make_room(&mut self) {
        while self.waiting.len() + self.refused.len() > self.most {
            let Some((_, connection)) = self.refused.pop_front() else { return };
            connection.drop_unread();
        }
    }

    /// Drops those at the front that have ended or had their time. Not all are looked
    /// at: in a flood of clients that would cost each refusal a call for every other.
    fn sweep(&mut self) {
        while let Some((since, connection)) = self.refused.front() {
            if !connection.drop_unread() && since.elapsed() < LINGER {
                return;
            }
            self.refused.pop_front();
        }
    }
}

/// One connection's requests, one after the other.
struct Session<'s, H> {
    server: &'s Server<H>,
    connection: &'s Connection,
    /// Bytes read and not yet used: requests may come pipelined.
    buffer: Vec<u8>,
    /// Where each read puts what comes; a buffer that grew for it would be zeroed each time.
    landing: Box<[u8; READ]>,
    read_timeout: Duration,
    /// The client's address as the log has it.
    peer: String,
}

/// A request that was read in full.
struct Incoming<'s> {
    head: RequestHead,
    body: Vec<u8>,
    begun: Instant,
    /// What the body takes of the memory for bodies, until it is answered.
    share: Share<'s>,
}

/// Why there is no request.
enum NoRequest {
    /// The client has left, or may leave: nothing to say.
    Closed,
    /// The request is refused; nothing after it can be trusted.
    Refused(Problem),
}

impl From<Problem> for NoRequest {
    fn from(problem: Problem) -> NoRequest {
        NoRequest::Refused(problem)
    }
}

/// What a response needs to know of its request.
struct Asked {
    method: String,
    path: String,
    request_id: String,
    http10: bool,
    keep_alive: bool,
    begun: Instant,
}

impl<'s, H> Session<'s, H>
where
    H: Fn(&Request) -> RoutedResponse,
{
    fn new(server: &'s Server<H>, connection: &'s Connection) -> Session<'s, H> {
        Session {
            server,
            connection,
            buffer: Vec::new(),
            landing: Box::new([0; READ]),
            read_timeout: Duration::ZERO,
            peer: connection.peer.to_string(),
        }
    }

    fn serve(&mut self) {
        let timeout = Some(self.server.limits.write_timeout);
        if self.connection.stream.set_write_timeout(timeout).is_err() {
            return;
        }
        let mut first = true;
        loop {
            match self.next_request(first) {
                Ok(incoming) => {
                    if !self.answer(incoming) {
                        return;
                    }
                }
                Err(NoRequest::Closed) => return,
                Err(NoRequest::Refused(problem)) => return self.refuse(problem),
            }
            first = false;
        }
    }

    /// Reads one request; `first` of its connection.
    fn next_request(&mut self, first: bool) -> Result<Incoming<'s>, NoRequest> {
        let limits = &self.server.limits;
        if self.buffer.is_empty() {
            let phase = if first { Phase::New } else { Phase::Idle };
            self.connection.wait_for(phase, Instant::now());
            // Asked after the wait is marked, so that a stop sees the mark or is seen.
            let timeout = match (first, self.server.stop.is_requested()) {
                // A new connection is there to ask something.
                (true, _) => limits.header_timeout,
                (false, false) => limits.idle_timeout,
                // Its client may not know yet that the last answer was the last one.
                (false, true) => STOP_QUIET,
            };
            if !matches!(self.fill(timeout), Ok(read) if read > 0) {
                return Err(NoRequest::Closed);
            }
        }
        let begun = Instant::now();
        let deadline = begun + limits.header_timeout;
        let mut scanned = 0;
        let head = loop {
            match http1::parse_next_head(&mut self.buffer, &mut scanned, limits)? {
                Some(head) => break head,
                None => self.fill_by(deadline, begun, "the head of the request")?,
            }
        };
        let mut share = Share { budget: &self.server.bodies, taken: 0 };
        let body = self.read_body(&head, &mut share)?;
        Ok(Incoming { head, body, begun, share })
    }

    fn read_body(
        &mut self,
        head: &RequestHead,
        share: &mut Share<'_>,
    ) -> Result<Vec<u8>, NoRequest> {
        if head.framing == BodyFraming::None {
            return Ok(Vec::new());
        }
        let begun = Instant::now();
        let deadline = begun + self.server.limits.body_timeout;
        if head.expects_continue && self.buffer.is_empty() {
            let go = b"HTTP/1.1 100 Continue\r\n\r\n";
            (&self.connection.stream).write_all(go).map_err(|_| NoRequest::Closed)?;
        }
        let mut body = Vec::new();
        let mut reader = BodyDecoder::new(head.framing, self.server.limits.max_body_bytes);
        loop {
            share.take(self.buffer.len(), self.server.limits.max_buffered_bytes)?;
            let taken = reader.feed(&self.buffer, &mut body)?;
            self.buffer.drain(..taken);
            if reader.is_done() {
                return Ok(body);
            }
            self.fill_by(deadline, begun, "the body of the request")?;
        }
    }

    /// Reads what is there, by a deadline for `what`, which began at `since`.
    fn fill_by(&mut self, deadline: Instant, since: Instant, what: &str) -> Result<(), NoRequest> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.connection.wait_for(Phase::Reading, since);
        let read = if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { self.fill(left) };
        match read {
            Ok(0) => Err(Problem::bad_request(format!("{what} ends too early")).into()),
            Ok(_) => Ok(()),
            Err(err) if is_pause(&err) => {
                Err(Problem::new(408, format!("{what} did not arrive in time")).into())
            }
            Err(_) => Err(NoRequest::Closed),
        }
    }

    /// One read into the buffer, at the end of a wait that the caller has begun.
    fn fill(&mut self, timeout: Duration) -> io::Result<usize> {
        if self.read_timeout != timeout {
            self.connection.stream.set_read_timeout(Some(timeout))?;
            self.read_timeout = timeout;
        }
        let read = loop {
            match (&self.connection.stream).read(&mut self.landing[..]) {
                Err(err) if err.kind() == ErrorKind::Interrupted => (),
                read => break read,
            }
        };
        self.buffer.extend_from_slice(&self.landing[..*read.as_ref().unwrap_or(&0)]);
        self.connection.resume()?;
        read
    }

    /// Lets the handler answer; whether the connection may go on.
    fn answer(&mut self, incoming: Incoming<'_>) -> bool {
        let Incoming { head, body, begun, share } = incoming;
        let mut headers = head.headers;
        let request_id = settle_request_id(&mut headers);
        let wants_more = head.keep_alive;
        let asked = Asked {
            path: head.target.split('?').next().unwrap_or_default().to_owned(),
            keep_alive: wants_more && !self.server.stop.is_requested(),
            method: head.method,
            request_id,
            http10: head.is_http10,
            begun,
        };
        let request = Request::fake_http_from(
            self.connection.peer,
            &asked.method,
            head.target,
            headers,
            body,
        );
        let answer = catch_unwind(AssertUnwindSafe(|| (self.server.handler)(&request)));
        let answer = answer
            .unwrap_or_else(|_| RoutedResponse { route: "", result: Err(Problem::internal()) });
        let RoutedResponse { route, result } = answer;
        drop((request, share));
        let response = result.unwrap_or_else(|problem| {
            if problem.status() >= 500 {
                let Asked { method, path, request_id, .. } = &asked;
                log::error!("{method} {}: {problem} id={request_id}", loggable(path));
            }
            problem.into_response(&asked.request_id)
        });
        // A stop that came meanwhile: the client learns with this answer that it is the last.
        let keep_alive = asked.keep_alive && !self.server.stop.is_requested();
        let asked = Asked { keep_alive, ..asked };
        let sent = self.send(&asked, route, response);
        // A client that did not want to go on has sent nothing more.
        if matches!(sent, Ok(false)) && wants_more {
            self.linger();
        }
        matches!(sent, Ok(true))
    }

    /// Answers a request that could not be read, and ends the connection.
    fn refuse(&mut self, problem: Problem) {
        let request_id = Uuid::now_v7().to_string();
        let response = problem.into_response(&request_id);
        let asked = Asked {
            method: "-".into(),
            path: "-".into(),
            request_id,
            http10: false,
            keep_alive: false,
            begun: Instant::now(),
        };
        if self.send(&asked, "", response).is_ok() {
            self.linger();
        }
    }

    /// Writes an answer, counts it and logs it; whether the connection may go on.
    fn send(&self, asked: &Asked, route: &str, response: Response) -> io::Result<bool> {
        let status = response.status_code;
        let mut writer = Writer { session: self, sent: 0, blocked: Duration::ZERO };
        let written = catch_unwind(AssertUnwindSafe(|| writer.write(asked, response)));
        let written =
            written.unwrap_or_else(|_| Err(io::Error::other("the body's reader panicked")));
        if self.server.observed {
            let elapsed = asked.begun.elapsed();
            let method = match asked.method.as_str() {
                known
                @ ("GET" | "HEAD" | "POST" | "PUT" | "DELETE" | "PATCH" | "OPTIONS" | "-") => known,
                _ => "other",
            };
            let class =
                ["1xx", "2xx", "3xx", "4xx", "5xx"][usize::from(status / 100).clamp(1, 5) - 1];
            metrics::REQUESTS.with_label_values(&[route, method, class]).inc();
            metrics::REQUEST_SECONDS.with_label_values(&[route]).observe(elapsed.as_secs_f64());
            log::info!(
                "{} {} {status} {:.1}ms {}B id={} peer={}{}",
                asked.method,
                loggable(&asked.path),
                elapsed.as_secs_f64() * 1e3,
                writer.sent,
                asked.request_id,
                self.peer,
                written.as_ref().err().map(|err| format!(" cut short: {err}")).unwrap_or_default(),
            );
        }
        written
    }

    /// Says that nothing more will come, and drops what the client still sends.
    fn linger(&mut self) {
        let begun = Instant::now();
        let _ = self.connection.stream.shutdown(Shutdown::Write);
        let mut dropped = 0;
        while dropped < LINGER_BYTES {
            let left = LINGER.saturating_sub(begun.elapsed());
            self.buffer.clear();
            // All is said: nobody is easier to do without.
            self.connection.wait_for(Phase::Idle, begun);
            match self.fill(left.max(Duration::from_millis(1))) {
                Ok(read) if read > 0 && !left.is_zero() => dropped += read,
                _ => return,
            }
        }
    }
}

/// A request's part of the memory for bodies; given back when it is dropped.
struct Share<'b> {
    budget: &'b AtomicUsize,
    taken: usize,
}

impl Share<'_> {
    fn take(&mut self, bytes: usize, limit: usize) -> Result<(), Problem> {
        self.taken += bytes;
        if self.budget.fetch_add(bytes, Ordering::SeqCst) + bytes > limit {
            return Err(Problem::unavailable("too many large bodies at once"));
        }
        Ok(())
    }
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        self.budget.fetch_sub(self.taken, Ordering::SeqCst);
    }
}

/// The client's request id if it is sane, else a new one; the request carries it from now on.
fn settle_request_id(headers: &mut Vec<(String, String)>) -> String {
    let sane = |id: &str| {
        (1..=128).contains(&id.len())
            && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.:/+=".contains(&byte))
    };
    let is_id = |name: &str| name.eq_ignore_ascii_case("X-Request-Id");
    let sent = headers.iter().find(|(name, value)| is_id(name) && sane(value));
    let id = sent.map_or_else(|| Uuid::now_v7().to_string(), |(_, value)| value.clone());
    headers.retain(|(name, _)| !is_id(name));
    headers.push(("X-Request-Id".to_owned(), id.clone()));
    id
}

/// Puts a response on the wire.
struct Writer<'w, 's, H> {
    session: &'w Session<'s, H>,
    /// Bytes of the body.
    sent: u64,
    /// Time spent waiting for the client.
    blocked: Duration,
}

impl<H> Writer<'_, '_, H> {
    fn write(&mut self, asked: &Asked, response: Response) -> io::Result<bool> {
        let Response { status_code: status, headers, data, .. } = response;
        let (mut body, size) = data.into_reader_and_size();
        let bodiless = status < 200 || status == 204 || status == 304;
        let head_only = bodiless || asked.method == "HEAD";

        // The begin of the body, enough to see whether that is all of it.
        let mut start = vec![0; size.unwrap_or(WRITE_BUFFER).min(WRITE_BUFFER)];
        let filled = if bodiless { 0 } else { read_full(&mut body, &mut start)? };
        start.truncate(filled);
        let whole = size.is_none() && filled < WRITE_BUFFER;
        let length = if whole { Some(filled) } else { size };

        let mut out = Vec::with_capacity((1 << 10) + start.len());
        write!(out, "HTTP/1.1 {status} {}\r\n", reason_phrase(status))?;
        let mut announced = None;
        for (name, value) in &headers {
            if name.eq_ignore_ascii_case("Content-Length") {
                announced = Some(value);
            } else if is_sound(name, value) {
                put_header(&mut out, name, value);
            } else {
                log::warn!("a malformed response header {name:?} was left out");
            }
        }
        let has = |wanted: &str| headers.iter().any(|(name, _)| name.eq_ignore_ascii_case(wanted));
        if !has("Date") {
            put_header(&mut out, "Date", &httpdate::fmt_http_date(SystemTime::now()));
        }
        if !has("X-Request-Id") {
            put_header(&mut out, "X-Request-Id", &asked.request_id);
        }
        match (length, announced) {
            _ if bodiless => (),
            // What a GET would have brought, told by whoever would have answered it.
            (_, Some(announced)) if head_only => write!(out, "Content-Length: {announced}\r\n")?,
            (Some(length), _) => write!(out, "Content-Length: {length}\r\n")?,
            (None, _) if asked.http10 => (),
            (None, _) => out.extend_from_slice(b"Transfer-Encoding: chunked\r\n"),
        }
        // Only the end of the connection tells an HTTP/1.0 client the end of such a body.
        let ends_by_closing = asked.http10 && length.is_none() && !head_only;
        let keep_alive = asked.keep_alive && !ends_by_closing;
        if !keep_alive {
            out.extend_from_slice(b"Connection: close\r\n");
        } else if asked.http10 {
            out.extend_from_slice(b"Connection: keep-alive\r\n");
        }
        out.extend_from_slice(b"\r\n");

        if head_only {
            self.put(&out, 0)?;
            return Ok(keep_alive);
        }
        let chunked = length.is_none() && !asked.http10;
        append(&mut out, &start, chunked);
        drop(start);
        self.put(&out, filled)?;
        drop(out);
        let mut left = length.map(|length| length - filled);
        // One buffer, with room for what makes a chunk: a slow reader keeps it for long.
        let mut buffer = Vec::new();
        while left != Some(0) {
            buffer.resize(CHUNK_HEAD + PIECE + 2, 0);
            let most = left.unwrap_or(PIECE).min(PIECE);
            let read = read_some(&mut body, &mut buffer[CHUNK_HEAD..][..most])?;
            if read == 0 {
                break;
            }
            let mut piece = CHUNK_HEAD..CHUNK_HEAD + read;
            if chunked {
                let size = format!("{read:x}\r\n");
                buffer[piece.end..][..2].copy_from_slice(b"\r\n");
                piece = CHUNK_HEAD - size.len()..piece.end + 2;
                buffer[piece.start..CHUNK_HEAD].copy_from_slice(size.as_bytes());
            }
            self.put(&buffer[piece], read)?;
            left = left.map(|left| left - read);
        }
        if left.is_some_and(|left| left > 0) {
            return Err(io::Error::new(ErrorKind::UnexpectedEof, "the body is too short"));
        }
        if chunked {
            self.put(b"0\r\n\r\n", 0)?;
        }
        Ok(keep_alive)
    }

    /// Writes all of `bytes`, of which `body` belong to the body, unless the
    /// client takes too long.
    fn put(&mut self, mut bytes: &[u8], body: usize) -> io::Result<()> {
        let Session { connection, server, .. } = self.session;
        let begun = Instant::now();
        connection.wait_for(Phase::Writing, begun.checked_sub(self.blocked).unwrap_or(begun));
        while !bytes.is_empty() {
            match (&connection.stream).write(bytes) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => bytes = &bytes[written..],
                Err(err) if err.kind() == ErrorKind::Interrupted => (),
                Err(err) if is_pause(&err) => return Err(ErrorKind::TimedOut.into()),
                Err(err) => return Err(err),
            }
            let earned = Duration::from_millis(self.sent * 1000 / MIN_WRITE_RATE);
            if self.blocked + begun.elapsed() > server.limits.write_timeout + earned {
                return Err(ErrorKind::TimedOut.into());
            }
        }
        self.blocked += begun.elapsed();
        self.sent += body as u64;
        connection.resume()
    }
}

/// Adds a header field; `write!` would take five times as long.
fn put_header(out: &mut Vec<u8>, name: &str, value: &str) {
    for piece in [name, ": ", value, "\r\n"] {
        out.extend_from_slice(piece.as_bytes());
    }
}

/// Adds a piece of a body, as a chunk where the body is chunked.
fn append(out: &mut Vec<u8>, piece: &[u8], chunked: bool) {
    if !chunked {
        out.extend_from_slice(piece);
    } else if !piece.is_empty() {
        out.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
        out.extend_from_slice(piece);
        out.extend_from_slice(b"\r\n");
    }
}

/// Reads until `buffer` is full or the reader at its end.
fn read_full(reader: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match read_some(reader, &mut buffer[filled..])? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(filled)
}

fn read_some(reader: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match reader.read(buffer) {
            Err(err) if err.kind() == ErrorKind::Interrupted => (),
            read => return read,
        }
    }
}

/// Whether a header cannot break the head it stands in.
fn is_sound(name: &str, value: &str) -> bool {
    !name.is_empty()
        && name.bytes().all(http1::is_token)
        && !value.bytes().any(|byte| byte.is_ascii_control() && byte != b'\t')
}

/// A path without what a terminal or a log reader might take for its own: some
/// letters beyond ASCII are controls or line ends.
fn loggable(path: &str) -> Cow<'_, str> {
    if path.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Cow::Borrowed(path);
    }
    let escaped = |letter: char| match letter.is_ascii_graphic() {
        true => letter.to_string(),
        false => letter.escape_unicode().to_string(),
    };
    Cow::Owned(path.chars().map(escaped).collect())
}

/// How a socket says that its timeout has passed.
fn is_pause(err: &io::Error) -> bool {
    matches!(err.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_connections_are_let_in_as_there_are_descriptors_for() {
        assert!(places(1024, 2, 0) > 256, "the usual limit is enough for the usual setting");
        assert_eq!(places(64, 2, 0), 5);
        assert_eq!(places(64, 1, 8), 4);
        assert_eq!(places(16, 2, 0), 1);
    }

    #[test]
    fn the_limit_of_this_process_is_known() {
        assert!(descriptors().is_none_or(|allowed| allowed > 16));
    }
}
