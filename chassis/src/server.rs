//! The HTTP server loop: a bounded pool of threads, one connection a thread.
//!
//! rouille's own server (tiny_http) has no deadline anywhere and can be ended by
//! one request or one failed `accept`; so the loop is ours, and rouille's Request
//! and Response are what handlers see.
//!
//! A connection is at any moment either *busy* with a request or *waiting* for its client:
//! idle, in the middle of a request, or until its client reads on. When the connection limit
//! is reached, accepting a new connection evicts the one that has been waiting longest.

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

use anyhow::{Context, bail};
use prometheus::{
    Encoder, HistogramVec, IntCounter, IntCounterVec, IntGauge, TextEncoder, histogram_opts,
    register_histogram_vec, register_int_counter, register_int_counter_vec, register_int_gauge,
};
use rouille::{Request, Response};
use socket2::{Domain, SockFilter, SockRef, Socket, Type};
use uuid::Uuid;

use crate::env::Env;
use crate::http1::{self, BodyDecoder, BodyFraming, HeadLimits, RequestHead};
use crate::problem::{Problem, reason_phrase};
use crate::request::header_bytes;
use crate::router::RoutedResponse;
use crate::stop::Stop;

/// Stack of a worker, in bytes. The deepest handler fits in, also in a debug build. Only the pages
/// that are touched cost memory.
const WORKER_STACK_SIZE: usize = 512 << 10;

/// A worker that has had no connection for this long ends.
const WORKER_IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// Workers beyond the connection limit, for connections that are being closed.
const SPARE_WORKERS: usize = 16;

/// A connection must have waited this long before it may be evicted: in a burst of connects the
/// workers need a moment to read input that has already arrived. This holds for idle connections
/// too, whose next request may be on its way, except in a forced eviction.
const MIN_WAIT_BEFORE_EVICTION: Duration = Duration::from_millis(20);

/// How long a new connection may wait in the accept queue before it gets 503. An immediate 503
/// makes clients connect again immediately, and under overload the server then spends more CPU
/// on rejecting than on serving.
const ADMISSION_TIMEOUT: Duration = Duration::from_millis(10);

/// How many candidates for eviction are examined at most, the longest-waiting first. If even
/// these have unread input, the server is short of CPU, and a scan of every connection under the
/// lock would make that worse.
const EVICTION_CANDIDATES: usize = 8;

/// How long one `accept` waits. Then the loop checks whether a stop was requested and whether a
/// connection of the accept queue can be admitted; the second value applies while one is queued.
const ACCEPT_POLL: Duration = Duration::from_millis(100);
const ACCEPT_POLL_WHILE_QUEUED: Duration = Duration::from_millis(2);

/// After a stop: how long a connection that looks idle may still send a request, and how long
/// the last responses may take.
const SHUTDOWN_IDLE_GRACE: Duration = Duration::from_millis(150);
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(4000);

/// The most bytes that one read takes: larger than most requests. Each connection has such a buffer.
const READ_BUFFER_SIZE: usize = 4 << 10;

/// A body up to this size is sent in one write with its head; bytes.
const WRITE_BUFFER_SIZE: usize = 16 << 10;

/// How much of a larger body is in memory at a time, for each client; bytes.
const CHUNK_SIZE: usize = 8 << 10;

/// Room for the size of a chunk in hexadecimal and the end of that line.
const CHUNK_HEADER_SIZE: usize = 6;

/// After the first write timeout a client must read its response at least at this rate: a slower
/// client occupies a worker for too long.
const MIN_WRITE_BYTES_PER_SEC: u64 = 16 << 10;

/// After a request was rejected, the rest of its input is read and discarded for this long and up
/// to this many bytes: closing a socket with unread input resets the connection, and the client
/// would lose the response.
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);
const LINGER_MAX_BYTES: usize = 16 << 20;

/// While `accept` fails: the shortest time between two log lines, and how many connections are
/// evicted for each failure.
const ACCEPT_ERROR_LOG_INTERVAL: Duration = Duration::from_secs(10);
const EVICTIONS_PER_ACCEPT_ERROR: usize = 8;

/// The most connections in the accept queue: those that wait to be admitted and those that got a
/// 503 and are about to be closed, together.
const ACCEPT_QUEUE_CAPACITY: usize = 256;

/// File descriptors for everything but clients: the standard streams, the listeners, the clients
/// of the metrics, the broker connection, probes, and some to spare.
const RESERVED_FDS: usize = 32;

/// Connections to the internal listener: some dozens from each instance of each service.
const MAX_INTERNAL_CONNECTIONS: usize = 192;

/// After a stop: how long a client that has sent its SYN may take to send the ACK.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_millis(10);

/// A socket filter that drops each TCP segment with the flag SYN, which is in byte 13 of the
/// header (RFC 9293 section 3.1). The client sends it again, and another process that listens on
/// this port by then gets it.
static DROP_SYN_FILTER: [SockFilter; 4] = {
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

/// How much of a response the kernel may buffer for each client, in bytes. Its default grows to
/// 4 MB. Then a client that pauses keeps one write waiting past its timeout, because the kernel
/// wakes a writer only when a third of the buffer is free.
const SEND_BUFFER_SIZE: usize = 128 << 10;

crate::define_metrics! {
    fn register_metrics;
    REQUESTS: IntCounterVec = register_int_counter_vec!(
        "http_requests_total", "Requests answered.", &["route", "method", "status_class"]);
    REQUEST_SECONDS: HistogramVec = register_histogram_vec!(histogram_opts!(
        "http_request_duration_seconds", "From the request's first byte to the answer's last.",
        vec![0.000_25, 0.001, 0.004, 0.016, 0.064, 0.25, 1.0, 4.0, 16.0]), &["route"]);
    CONNECTIONS: IntGauge = register_int_gauge!(
        "http_connections_open", "Client connections.");
    EVICTED: IntCounter = register_int_counter!(
        "http_connections_evicted_total", "Waiting connections closed at the connection limit, each for a new one.");
    REJECTED: IntCounter = register_int_counter!(
        "http_connections_rejected_total", "Connections answered 503 at the connection limit.");
    ACCEPT_ERRORS: IntCounter = register_int_counter!(
        "http_accept_errors_total", "Failed accepts, such as too many open files.");
}

/// Where a service listens, and the limits of its server loop.
#[derive(Clone, Debug)]
pub struct Config {
    /// Address of the service's API.
    pub listen: SocketAddr,
    /// Address of the metrics.
    pub metrics_listen: SocketAddr,
    /// Limits for clients.
    pub limits: Limits,
}

/// The limits and deadlines of a server.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Most connections at once; each has a thread of its own.
    pub max_connections: usize,
    /// From the first byte of a head to its last; also for the first byte of a new connection.
    pub header_timeout: Duration,
    /// For the whole body.
    pub body_timeout: Duration,
    /// For one write of the response.
    pub write_timeout: Duration,
    /// Between two requests.
    pub idle_timeout: Duration,
    /// For the head and the body of one request.
    pub head: HeadLimits,
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
        // With SO_REUSEPORT the kernel would accept one port for both and give each some connections.
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
                head: HeadLimits {
                    max_head_bytes: 16 << 10,
                    max_header_fields: 100,
                    max_body_bytes: env.number("HTTP_MAX_BODY_BYTES", 256 << 10, 1..=1 << 30),
                },
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
    /// Lowers the connection limit to what the limit on open files (`ulimit -n`) allows, where
    /// each connection takes `fds_per_connection` descriptors and `reserved` are kept for
    /// connections to other servers. A client that is admitted and finds no descriptor left for
    /// the database or the upstream is served worse than one that waits to be admitted.
    pub fn clamp_to_fd_limit(&mut self, fds_per_connection: usize, reserved: usize) {
        let Some(allowed) = fd_limit() else { return };
        let threads = self.limits.max_connections.min(connections_for_fds(
            allowed,
            fds_per_connection,
            reserved,
        ));
        if threads < self.limits.max_connections {
            log::warn!(
                "{threads} connections at once instead of {}: the process may have {allowed} \
                 file descriptors open (ulimit -n)",
                self.limits.max_connections,
            );
            self.limits.max_connections = threads;
        }
    }
}

/// How many connections `allowed` descriptors are enough for, at least one. Room is left for as
/// many connections that were rejected, and for some that are being closed.
fn connections_for_fds(allowed: usize, each: usize, others: usize) -> usize {
    (allowed.saturating_sub(RESERVED_FDS + others + SPARE_WORKERS) / (each + 1)).max(1)
}

/// The soft limit of this process; `None` where there is none.
fn fd_limit() -> Option<usize> {
    let limits = std::fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

impl Limits {
    /// Limits for a service behind a proxy that has these limits itself and then adds header
    /// fields of its own.
    pub fn with_proxy_headroom(mut self) -> Limits {
        self.head.max_head_bytes += 2 << 10;
        self.head.max_header_fields += 10;
        self
    }
}

/// Listens at both addresses of `config` and serves until `stop`.
pub fn run<H>(config: &Config, stop: &Stop, handler: H) -> anyhow::Result<()>
where
    H: Fn(&Request) -> RoutedResponse + Send + Sync + 'static,
{
    register_metrics();
    let listener = bind(config.listen)?;
    let metrics_listener = bind(config.metrics_listen)?;
    let (limits, metrics_stop) =
        (Limits { max_connections: 8, ..config.limits.clone() }, stop.clone());
    thread::Builder::new().name("metrics".into()).spawn(move || {
        let served = Server::new(limits, &metrics_stop, false, scrape).serve(metrics_listener);
        served.unwrap_or_else(|err| log::error!("metrics are not served: {err:#}"));
    })?;
    log::info!("listening on {}, metrics on {}", config.listen, config.metrics_listen);
    serve(listener, config.limits.clone(), stop, handler)
}

/// The same with a third listener, for other services only: it has routes that clients must not
/// reach. It stops with the first one, and when it fails the process stops.
pub fn run_with_internal<H, I>(
    config: &Config,
    internal_listen: SocketAddr,
    stop: &Stop,
    handler: H,
    internal_handler: I,
) -> anyhow::Result<()>
where
    H: Fn(&Request) -> RoutedResponse + Send + Sync + 'static,
    I: Fn(&Request) -> RoutedResponse + Send + Sync + 'static,
{
    let listener = bind(internal_listen)?;
    let max_connections = MAX_INTERNAL_CONNECTIONS.min(config.limits.max_connections);
    let limits = Limits { max_connections, ..config.limits.clone() };
    let internal_stop = stop.clone();
    let internal = thread::Builder::new().name("internal".into()).spawn(move || {
        let served = serve(listener, limits, &internal_stop, internal_handler);
        internal_stop.request();
        served
    })?;
    log::info!("listening on {internal_listen} for other services");
    let served = run(config, stop, handler);
    stop.request();
    match internal.join() {
        Ok(internal) => served.and(internal),
        Err(_) => bail!("the internal listener has panicked"),
    }
}

/// A listener on a port that a second process may share (SO_REUSEPORT): one process can replace
/// the other without refusing a connection.
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

/// Answers a scrape with all metrics in the Prometheus text format, at any path.
fn scrape(_request: &Request) -> RoutedResponse {
    let encoder = TextEncoder::new();
    let mut text = Vec::new();
    let encoded = encoder.encode(&prometheus::gather(), &mut text);
    let result = encoded
        .map(|()| Response::from_data(encoder.format_type().to_owned(), text))
        .map_err(|err| Problem::internal().with_cause(err));
    RoutedResponse { route: "/metrics", result }
}

/// Serves until `stop`; then finishes the requests that have begun.
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

/// What all threads of one server share.
struct Server<H> {
    limits: Limits,
    stop: Stop,
    /// Whether requests are counted and logged: those of the API are, scrapes are not.
    instrumented: bool,
    handler: H,
    started: Instant,
    table: Mutex<ConnectionTable>,
    /// Notified when a connection is pending, and while stopping when the last one is closed.
    wakeup: Condvar,
    buffered_bytes: AtomicUsize,
}

/// The admitted connections and the workers.
#[derive(Default)]
struct ConnectionTable {
    connections: HashMap<u64, Arc<Connection>>,
    next_id: u64,
    /// Connections that no worker has taken yet.
    pending: VecDeque<(u64, Arc<Connection>)>,
    threads: usize,
    idle_threads: usize,
}

impl<H> Server<H>
where
    H: Fn(&Request) -> RoutedResponse + Send + Sync + 'static,
{
    fn new(limits: Limits, stop: &Stop, instrumented: bool, handler: H) -> Arc<Server<H>> {
        Arc::new(Server {
            limits,
            stop: stop.clone(),
            instrumented,
            handler,
            started: Instant::now(),
            table: Mutex::new(ConnectionTable::default()),
            wakeup: Condvar::new(),
            buffered_bytes: AtomicUsize::new(0),
        })
    }

    fn serve(self: &Arc<Self>, listener: TcpListener) -> anyhow::Result<()> {
        let capacity = ACCEPT_QUEUE_CAPACITY.min(self.limits.max_connections);
        let mut queue = AcceptQueue { capacity, ..AcceptQueue::default() };
        let mut tick = Duration::ZERO;
        let mut last_logged: Option<Instant> = None;
        while !self.stop.is_requested() {
            let wanted =
                if queue.queued.is_empty() { ACCEPT_POLL } else { ACCEPT_POLL_WHILE_QUEUED };
            if tick != wanted {
                // Linux lets SO_RCVTIMEO bound an accept too.
                SockRef::from(&listener).set_read_timeout(Some(wanted))?;
                tick = wanted;
            }
            match listener.accept() {
                Ok((stream, peer)) => queue.enqueue(self.new_connection(stream, peer)),
                Err(err) if is_timeout(&err) => queue.reap(),
                Err(err) if err.kind() == ErrorKind::ConnectionAborted => (),
                Err(err) => {
                    // Usually the process is out of descriptors: closing connections frees some.
                    ACCEPT_ERRORS.inc();
                    if last_logged.is_none_or(|before| before.elapsed() > ACCEPT_ERROR_LOG_INTERVAL)
                    {
                        last_logged = Some(Instant::now());
                        log::error!("accept failed, trying again: {err}");
                    }
                    queue.lingering.clear();
                    for _ in 0..EVICTIONS_PER_ACCEPT_ERROR {
                        self.evict_longest_waiting(&mut self.lock(), Duration::ZERO);
                    }
                    self.stop.sleep(Duration::from_millis(50));
                }
            }
            self.admit_queued(&mut queue);
        }
        // Closing a listener resets connections that the kernel has completed and the process has
        // not accepted. So new SYNs are dropped first (clients send them again, to the other
        // process on this port), then connections are accepted until the handshakes are done.
        let listener_socket = SockRef::from(&listener);
        listener_socket.attach_filter(&DROP_SYN_FILTER)?;
        listener_socket.set_read_timeout(Some(HANDSHAKE_TIMEOUT))?;
        while let Ok((stream, peer)) = listener.accept() {
            queue.enqueue(self.new_connection(stream, peer));
            self.admit_queued(&mut queue);
        }
        drop(listener);
        while let Some((_, connection)) = queue.queued.pop_front() {
            if let Err(connection) = self.admit(connection, Some(Duration::ZERO), &mut queue) {
                queue.reject(connection);
            }
        }
        self.drain()
    }

    /// Admits queued connections in their order, and rejects those that have waited too long.
    fn admit_queued(self: &Arc<Self>, queue: &mut AcceptQueue) {
        while let Some((since, connection)) = queue.queued.pop_front() {
            // Under a flood of connects, searching for a connection to evict would cost more CPU
            // than everything else, and evicted clients connect again. So searches are limited
            // in time, and so are forced evictions of connections that were just answered.
            let elapsed_or_max =
                |then: Option<Instant>| then.map_or(Duration::MAX, |then| then.elapsed());
            let timed_out = since.elapsed() >= ADMISSION_TIMEOUT;
            let force_evict =
                timed_out && elapsed_or_max(queue.last_forced_eviction) >= ADMISSION_TIMEOUT;
            let may_evict = force_evict
                || elapsed_or_max(queue.last_failed_eviction) >= ACCEPT_POLL_WHILE_QUEUED;
            let min_idle = if force_evict { Duration::ZERO } else { MIN_WAIT_BEFORE_EVICTION };
            let Err(connection) = self.admit(connection, may_evict.then_some(min_idle), queue)
            else {
                if force_evict {
                    queue.last_forced_eviction = Some(Instant::now());
                }
                continue;
            };
            if may_evict {
                queue.last_failed_eviction = Some(Instant::now());
            }
            if !timed_out {
                return queue.queued.push_front((since, connection));
            }
            queue.reject(connection);
        }
    }

    /// Waits for the last responses.
    fn drain(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + SHUTDOWN_TIMEOUT;
        self.wait_until_empty(Instant::now() + SHUTDOWN_IDLE_GRACE);
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
        self.wakeup.notify_all();
        let _ = self
            .wakeup
            .wait_timeout_while(self.lock(), left, |table| !table.connections.is_empty());
    }

    fn new_connection(&self, stream: TcpStream, peer: SocketAddr) -> Arc<Connection> {
        let state = AtomicU64::new(STATE_BUSY);
        Arc::new(Connection { stream, peer, epoch: self.started, state })
    }

    /// Admits a connection and makes sure that a worker takes it; gives it back at the connection
    /// limit. With `min_idle` another connection may be evicted for it, see
    /// [`Server::evict_longest_waiting`].
    fn admit(
        self: &Arc<Self>,
        connection: Arc<Connection>,
        min_idle: Option<Duration>,
        queue: &mut AcceptQueue,
    ) -> Result<(), Arc<Connection>> {
        let mut table = self.lock();
        let mut evicted = None;
        if table.connections.len() >= self.limits.max_connections {
            evicted =
                min_idle.and_then(|min_idle| self.evict_longest_waiting(&mut table, min_idle));
            if evicted.is_none() {
                return Err(connection);
            }
        }
        let _ = connection.stream.set_nodelay(true);
        let _ = SockRef::from(&connection.stream).set_send_buffer_size(SEND_BUFFER_SIZE);
        connection.begin_wait(WaitState::New, Instant::now());
        let key = table.next_id;
        table.next_id += 1;
        table.connections.insert(key, Arc::clone(&connection));
        table.pending.push_back((key, connection));
        // `idle_threads` still counts workers that were notified and have not woken yet, and
        // `pending` still has their connections: so no connection waits for a worker that
        // another connection has claimed.
        if table.idle_threads < table.pending.len()
            && table.threads < self.limits.max_connections + SPARE_WORKERS
        {
            let server = Arc::clone(self);
            let worker = thread::Builder::new().name("http".into()).stack_size(WORKER_STACK_SIZE);
            match worker.spawn(move || server.worker_loop()) {
                Ok(_) => table.threads += 1,
                Err(err) if table.threads == 0 => {
                    log::error!("cannot start a worker thread: {err}");
                    if let Some((key, connection)) = table.pending.pop_back() {
                        table.connections.remove(&key);
                        connection.close();
                    }
                }
                // Another worker takes the connection as soon as it is free.
                Err(err) => log::warn!("cannot start another worker thread: {err}"),
            }
        }
        self.update_connection_gauge(&table);
        drop(table);
        self.wakeup.notify_one();
        evicted.into_iter().for_each(|evicted| queue.send_503(evicted));
        Ok(())
    }

    /// Evicts the connection that has waited longest, idle ones first if they have been idle for
    /// `min_idle`; never one whose input has arrived and waits for us to read it.
    fn evict_longest_waiting(
        &self,
        table: &mut ConnectionTable,
        min_idle: Duration,
    ) -> Option<Arc<Connection>> {
        let now = Instant::now();
        let waiting = table.connections.iter().filter_map(|(key, connection)| {
            let (wait_state, since) = connection.wait_state()?;
            let untouchable =
                if wait_state == WaitState::Idle { min_idle } else { MIN_WAIT_BEFORE_EVICTION };
            let waited = now.saturating_duration_since(since);
            (waited >= untouchable).then_some((
                wait_state != WaitState::Idle,
                since,
                *key,
                wait_state,
            ))
        });
        let mut waiting: Vec<(bool, Instant, u64, WaitState)> = waiting.collect();
        waiting.sort_unstable();
        for (_, _, key, wait_state) in waiting.into_iter().take(EVICTION_CANDIDATES) {
            let evicted = |connection: &Arc<Connection>| {
                // A client that is not reading its response can be evicted even if it has
                // pipelined input.
                (wait_state == WaitState::Writing || !connection.has_buffered_input())
                    && connection.evict()
            };
            if table.connections.get(&key).is_some_and(evicted) {
                EVICTED.inc();
                return table.connections.remove(&key);
            }
        }
        None
    }

    /// Serves one connection after the other.
    fn worker_loop(&self) {
        loop {
            let mut table = self.lock();
            table.idle_threads += 1;
            let empty = |table: &mut ConnectionTable| table.pending.is_empty();
            let waited = self.wakeup.wait_timeout_while(table, WORKER_IDLE_TIMEOUT, empty);
            table = waited.unwrap_or_else(PoisonError::into_inner).0;
            table.idle_threads -= 1;
            let Some((key, connection)) = table.pending.pop_front() else {
                table.threads -= 1;
                return;
            };
            drop(table);
            // A panic of the handler is caught in `answer`. This one keeps the table right.
            let _ = catch_unwind(AssertUnwindSafe(|| Session::new(self, &connection).serve()));
            let mut table = self.lock();
            table.connections.remove(&key);
            self.update_connection_gauge(&table);
            let last = table.connections.is_empty();
            drop(table);
            if last && self.stop.is_requested() {
                self.wakeup.notify_all();
            }
        }
    }

    fn update_connection_gauge(&self, table: &ConnectionTable) {
        if self.instrumented {
            CONNECTIONS.set(table.connections.len() as i64);
        }
    }

    fn lock(&self) -> MutexGuard<'_, ConnectionTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a connection is waiting for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum WaitState {
    /// For its first request, of which nothing has come.
    New = 1,
    /// For its next request, of which nothing has come.
    Idle,
    /// For the rest of a request.
    Reading,
    /// For room to write.
    Writing,
}

impl WaitState {
    const ALL: [WaitState; 4] =
        [WaitState::New, WaitState::Idle, WaitState::Reading, WaitState::Writing];
}

/// A client's socket and, for evictions, what it is waiting for.
struct Connection {
    stream: TcpStream,
    peer: SocketAddr,
    epoch: Instant,
    /// [`STATE_BUSY`], [`STATE_EVICTED`], or the microseconds between `epoch` and the begin of the
    /// wait, times eight, plus the [`WaitState`].
    state: AtomicU64,
}

const STATE_BUSY: u64 = 0;
const STATE_EVICTED: u64 = u64::MAX;

impl Connection {
    /// Marks the begin of a wait. A connection that was evicted stays evicted.
    fn begin_wait(&self, wait_state: WaitState, since: Instant) {
        let micros = since.saturating_duration_since(self.epoch).as_micros() as u64;
        let state = micros << 3 | wait_state as u64;
        let _ = self.state.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |old| {
            (old != STATE_EVICTED).then_some(state)
        });
    }

    /// Marks the end of a wait; an error when the connection was evicted meanwhile.
    fn end_wait(&self) -> io::Result<()> {
        match self.state.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |old| {
            (old != STATE_EVICTED).then_some(STATE_BUSY)
        }) {
            Ok(_) => Ok(()),
            Err(_) => Err(ErrorKind::ConnectionAborted.into()),
        }
    }

    fn wait_state(&self) -> Option<(WaitState, Instant)> {
        let state = self.state.load(Ordering::SeqCst);
        if state == STATE_BUSY || state == STATE_EVICTED {
            return None;
        }
        let wait_state =
            WaitState::ALL.into_iter().find(|wait_state| *wait_state as u64 == state & 7)?;
        Some((wait_state, self.epoch + Duration::from_micros(state >> 3)))
    }

    /// Ends the connection, unless its worker has just become busy with it. Where it was being
    /// read, a response can still be sent; where it was being written, the client does not read.
    fn evict(&self) -> bool {
        let waits = |old| (old != STATE_BUSY && old != STATE_EVICTED).then_some(STATE_EVICTED);
        let evicted = self.state.fetch_update(Ordering::SeqCst, Ordering::SeqCst, waits);
        let Ok(old) = evicted else { return false };
        let writing = old & 7 == WaitState::Writing as u64;
        let _ = self.stream.shutdown(if writing { Shutdown::Both } else { Shutdown::Read });
        true
    }

    /// Whether input has arrived that the worker has not read yet.
    fn has_buffered_input(&self) -> bool {
        let mut byte = [MaybeUninit::uninit()];
        let peeked =
            SockRef::from(&self.stream).recv_with_flags(&mut byte, MSG_PEEK | MSG_DONTWAIT);
        peeked.is_ok_and(|bytes| bytes > 0)
    }

    /// Discards the input that has arrived; whether the client has closed its side.
    fn discard_input(&self) -> bool {
        let mut piece = [MaybeUninit::uninit(); READ_BUFFER_SIZE];
        matches!(SockRef::from(&self.stream).recv_with_flags(&mut piece, MSG_DONTWAIT), Ok(0))
    }

    fn close_if_idle(&self) {
        if self.wait_state().is_some_and(|(wait_state, _)| wait_state <= WaitState::Idle) {
            // The worker's read ends with end of file. A request that arrived before is still
            // read and answered.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
    }

    fn close(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// Connections that are not admitted, the oldest first: those that wait for it, and those that
/// got a 503. The latter are kept for a moment, because closing a socket with unread input would
/// take the response from the client.
#[derive(Default)]
struct AcceptQueue {
    queued: VecDeque<(Instant, Arc<Connection>)>,
    lingering: VecDeque<(Instant, Arc<Connection>)>,
    /// For both together.
    capacity: usize,
    /// When the last search for a connection to evict found none.
    last_failed_eviction: Option<Instant>,
    /// When the last connection was evicted that had been idle only for a moment.
    last_forced_eviction: Option<Instant>,
}

impl AcceptQueue {
    /// Queues a new connection, or rejects it where the queue is full.
    fn enqueue(&mut self, connection: Arc<Connection>) {
        if self.queued.len() == self.capacity {
            // The others have waited longer and are next.
            self.reject(connection);
        } else {
            self.queued.push_back((Instant::now(), connection));
            self.trim();
        }
    }

    fn reject(&mut self, connection: Arc<Connection>) {
        REJECTED.inc();
        self.send_503(connection);
    }

    /// Sends 503 and keeps the connection for a moment. An evicted connection that looks idle gets
    /// it too: its next request may be on the way, and without a response its client could not
    /// know whether the request was processed.
    fn send_503(&mut self, connection: Arc<Connection>) {
        let id = Uuid::now_v7();
        let detail = "the server has reached its connection limit";
        let body = format!(
            "{{\"type\":\"about:blank\",\"title\":\"Service Unavailable\",\"status\":503,\
             \"detail\":\"{detail}\",\"error\":\"{detail}\",\"request_id\":\"{id}\"}}"
        );
        let answer = format!(
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json\r\n\
             Content-Length: {}\r\nRetry-After: 1\r\nX-Request-Id: {id}\r\n\
             Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n\
             Connection: close\r\n\r\n{body}",
            body.len()
        );
        // Response and FIN leave in one segment: half the work for both sides.
        let stream = SockRef::from(&connection.stream);
        let _ = stream.send_with_flags(answer.as_bytes(), MSG_DONTWAIT | MSG_MORE);
        let _ = stream.shutdown(Shutdown::Write);
        self.lingering.push_back((Instant::now(), connection));
        self.trim();
        self.reap();
    }

    /// Closes the oldest rejected connections while the queue is over its capacity.
    fn trim(&mut self) {
        while self.queued.len() + self.lingering.len() > self.capacity {
            let Some((_, connection)) = self.lingering.pop_front() else { return };
            connection.discard_input();
        }
    }

    /// Closes rejected connections from the front that their clients have closed or whose time is
    /// over. It stops at the first other one: under a flood, looking at all of them would cost
    /// each rejection a system call for every other.
    fn reap(&mut self) {
        while let Some((since, connection)) = self.lingering.front() {
            if !connection.discard_input() && since.elapsed() < LINGER_TIMEOUT {
                return;
            }
            self.lingering.pop_front();
        }
    }
}

/// Serves one connection's requests, one after the other.
struct Session<'s, H> {
    server: &'s Server<H>,
    connection: &'s Connection,
    /// Input that was read and not parsed yet: requests may be pipelined.
    input: Vec<u8>,
    /// The target of each read. Growing `input` for it instead would zero the memory each time.
    read_buffer: Box<[u8; READ_BUFFER_SIZE]>,
    read_timeout: Duration,
    /// The client's address as the log shows it.
    peer_label: String,
}

/// A request that was read completely.
struct ReceivedRequest<'s> {
    head: RequestHead,
    body: Vec<u8>,
    started_at: Instant,
    /// The memory that the body takes of `max_buffered_bytes`, until the request is answered.
    reservation: BodyReservation<'s>,
}

/// Why no request could be read.
enum ReadError {
    /// The client has closed the connection, or it may be closed without a response.
    Closed,
    /// The request is rejected. Where the next one would begin is unknown.
    Rejected(Problem),
}

impl From<Problem> for ReadError {
    fn from(problem: Problem) -> ReadError {
        ReadError::Rejected(problem)
    }
}

/// What sending a response needs to know of its request.
struct ResponseContext {
    method: String,
    path: String,
    request_id: String,
    is_http10: bool,
    keep_alive: bool,
    started_at: Instant,
}

impl<'s, H> Session<'s, H>
where
    H: Fn(&Request) -> RoutedResponse,
{
    fn new(server: &'s Server<H>, connection: &'s Connection) -> Session<'s, H> {
        Session {
            server,
            connection,
            input: Vec::new(),
            read_buffer: Box::new([0; READ_BUFFER_SIZE]),
            read_timeout: Duration::ZERO,
            peer_label: connection.peer.to_string(),
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
                Err(ReadError::Closed) => return,
                Err(ReadError::Rejected(problem)) => return self.reject(problem),
            }
            first = false;
        }
    }

    /// Reads one request; `first` of its connection.
    fn next_request(&mut self, first: bool) -> Result<ReceivedRequest<'s>, ReadError> {
        let limits = &self.server.limits;
        if self.input.is_empty() {
            let wait_state = if first { WaitState::New } else { WaitState::Idle };
            self.connection.begin_wait(wait_state, Instant::now());
            // ResponseContext after the wait is marked, so that a stop sees the mark or is seen.
            let timeout = match (first, self.server.stop.is_requested()) {
                // A new connection is expected to send a request.
                (true, _) => limits.header_timeout,
                (false, false) => limits.idle_timeout,
                // The client may not know yet that the connection is about to be closed.
                (false, true) => SHUTDOWN_IDLE_GRACE,
            };
            if !matches!(self.read_once(timeout), Ok(read) if read > 0) {
                return Err(ReadError::Closed);
            }
        }
        let started_at = Instant::now();
        let deadline = started_at + limits.header_timeout;
        let mut scan_offset = 0;
        let head = loop {
            match http1::parse_next_head(&mut self.input, &mut scan_offset, &limits.head)? {
                Some(head) => break head,
                None => {
                    self.read_until_deadline(deadline, started_at, "the head of the request")?
                }
            }
        };
        let mut reservation = BodyReservation { budget: &self.server.buffered_bytes, taken: 0 };
        let body = self.read_body(&head, &mut reservation)?;
        Ok(ReceivedRequest { head, body, started_at, reservation })
    }

    fn read_body(
        &mut self,
        head: &RequestHead,
        reservation: &mut BodyReservation<'_>,
    ) -> Result<Vec<u8>, ReadError> {
        if head.framing == BodyFraming::None {
            return Ok(Vec::new());
        }
        let started_at = Instant::now();
        let deadline = started_at + self.server.limits.body_timeout;
        if head.expects_continue && self.input.is_empty() {
            let go = b"HTTP/1.1 100 Continue\r\n\r\n";
            (&self.connection.stream).write_all(go).map_err(|_| ReadError::Closed)?;
        }
        let mut body = Vec::new();
        let mut reader = BodyDecoder::new(head.framing, self.server.limits.head.max_body_bytes);
        loop {
            reservation.reserve(self.input.len(), self.server.limits.max_buffered_bytes)?;
            let taken = reader.feed(&self.input, &mut body)?;
            self.input.drain(..taken);
            if reader.is_done() {
                return Ok(body);
            }
            self.read_until_deadline(deadline, started_at, "the body of the request")?;
        }
    }

    /// Reads once, by a deadline for `what`, which began at `since`.
    fn read_until_deadline(
        &mut self,
        deadline: Instant,
        since: Instant,
        what: &str,
    ) -> Result<(), ReadError> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.connection.begin_wait(WaitState::Reading, since);
        let read =
            if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { self.read_once(left) };
        match read {
            Ok(0) => Err(Problem::bad_request(format!("{what} ends too early")).into()),
            Ok(_) => Ok(()),
            Err(err) if is_timeout(&err) => {
                Err(Problem::new(408, format!("{what} did not arrive in time")).into())
            }
            Err(_) => Err(ReadError::Closed),
        }
    }

    /// Reads once into the input, at the end of a wait that the caller has marked.
    fn read_once(&mut self, timeout: Duration) -> io::Result<usize> {
        if self.read_timeout != timeout {
            self.connection.stream.set_read_timeout(Some(timeout))?;
            self.read_timeout = timeout;
        }
        let read = loop {
            match (&self.connection.stream).read(&mut self.read_buffer[..]) {
                Err(err) if err.kind() == ErrorKind::Interrupted => (),
                read => break read,
            }
        };
        self.input.extend_from_slice(&self.read_buffer[..*read.as_ref().unwrap_or(&0)]);
        self.connection.end_wait()?;
        read
    }

    /// Calls the handler and sends its response; whether the connection stays open.
    fn answer(&mut self, incoming: ReceivedRequest<'_>) -> bool {
        let ReceivedRequest { head, body, started_at, reservation } = incoming;
        let mut headers = head.headers;
        let request_id = ensure_request_id(&mut headers);
        let wants_more = head.keep_alive;
        let context = ResponseContext {
            path: head.target.split('?').next().unwrap_or_default().to_owned(),
            keep_alive: wants_more && !self.server.stop.is_requested(),
            method: head.method,
            request_id,
            is_http10: head.is_http10,
            started_at,
        };
        let request = Request::fake_http_from(
            self.connection.peer,
            &context.method,
            head.target,
            headers,
            body,
        );
        let answer = catch_unwind(AssertUnwindSafe(|| (self.server.handler)(&request)));
        let answer = answer
            .unwrap_or_else(|_| RoutedResponse { route: "", result: Err(Problem::internal()) });
        let RoutedResponse { route, result } = answer;
        drop((request, reservation));
        let response = result.unwrap_or_else(|problem| {
            if problem.status() >= 500 {
                let ResponseContext { method, path, request_id, .. } = &context;
                log::error!("{method} {}: {problem} id={request_id}", escape_for_log(path));
            }
            problem.into_response(&context.request_id)
        });
        // After a stop that came meanwhile, the response says `Connection: close`.
        let keep_alive = context.keep_alive && !self.server.stop.is_requested();
        let context = ResponseContext { keep_alive, ..context };
        let sent = self.send(&context, route, response);
        // A client that asked for `Connection: close` has sent nothing more.
        if matches!(sent, Ok(false)) && wants_more {
            self.linger_close();
        }
        matches!(sent, Ok(true))
    }

    /// Sends the response to a request that could not be read, and closes the connection.
    fn reject(&mut self, problem: Problem) {
        let request_id = Uuid::now_v7().to_string();
        let response = problem.into_response(&request_id);
        let context = ResponseContext {
            method: "-".into(),
            path: "-".into(),
            request_id,
            is_http10: false,
            keep_alive: false,
            started_at: Instant::now(),
        };
        if self.send(&context, "", response).is_ok() {
            self.linger_close();
        }
    }

    /// Writes a response, counts it and logs it; whether the connection stays open.
    fn send(&self, context: &ResponseContext, route: &str, response: Response) -> io::Result<bool> {
        let status = response.status_code;
        let mut writer =
            ResponseWriter { session: self, body_bytes: 0, time_blocked: Duration::ZERO };
        let written = catch_unwind(AssertUnwindSafe(|| writer.write(context, response)));
        let written =
            written.unwrap_or_else(|_| Err(io::Error::other("the body's reader panicked")));
        if self.server.instrumented {
            let elapsed = context.started_at.elapsed();
            let method = match context.method.as_str() {
                known
                @ ("GET" | "HEAD" | "POST" | "PUT" | "DELETE" | "PATCH" | "OPTIONS" | "-") => known,
                _ => "other",
            };
            let class =
                ["1xx", "2xx", "3xx", "4xx", "5xx"][usize::from(status / 100).clamp(1, 5) - 1];
            REQUESTS.with_label_values(&[route, method, class]).inc();
            REQUEST_SECONDS.with_label_values(&[route]).observe(elapsed.as_secs_f64());
            log::info!(
                "{} {} {status} {:.1}ms {}B id={} peer={}{}",
                context.method,
                escape_for_log(&context.path),
                elapsed.as_secs_f64() * 1e3,
                writer.body_bytes,
                context.request_id,
                self.peer_label,
                written.as_ref().err().map(|err| format!(" cut short: {err}")).unwrap_or_default(),
            );
        }
        written
    }

    /// Closes our side, and discards what the client still sends.
    fn linger_close(&mut self) {
        let started_at = Instant::now();
        let _ = self.connection.stream.shutdown(Shutdown::Write);
        let mut dropped = 0;
        while dropped < LINGER_MAX_BYTES {
            let left = LINGER_TIMEOUT.saturating_sub(started_at.elapsed());
            self.input.clear();
            // The response is complete: this connection is the first candidate for eviction.
            self.connection.begin_wait(WaitState::Idle, started_at);
            match self.read_once(left.max(Duration::from_millis(1))) {
                Ok(read) if read > 0 && !left.is_zero() => dropped += read,
                _ => return,
            }
        }
    }
}

/// A request's part of `max_buffered_bytes`; released when it is dropped.
struct BodyReservation<'b> {
    budget: &'b AtomicUsize,
    taken: usize,
}

impl BodyReservation<'_> {
    fn reserve(&mut self, bytes: usize, limit: usize) -> Result<(), Problem> {
        self.taken += bytes;
        if self.budget.fetch_add(bytes, Ordering::SeqCst) + bytes > limit {
            return Err(Problem::unavailable("too many large buffered_bytes at once"));
        }
        Ok(())
    }
}

impl Drop for BodyReservation<'_> {
    fn drop(&mut self) {
        self.budget.fetch_sub(self.taken, Ordering::SeqCst);
    }
}

/// The client's request id if it is valid, else a new one; the request has it from now on.
fn ensure_request_id(headers: &mut Vec<(String, String)>) -> String {
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

/// Writes a response to the socket.
struct ResponseWriter<'w, 's, H> {
    session: &'w Session<'s, H>,
    /// Bytes of the body that were sent.
    body_bytes: u64,
    /// Time spent waiting for the client.
    time_blocked: Duration,
}

impl<H> ResponseWriter<'_, '_, H> {
    fn write(&mut self, context: &ResponseContext, response: Response) -> io::Result<bool> {
        let Response { status_code: status, headers, data, .. } = response;
        let (mut body, size) = data.into_reader_and_size();
        let has_no_body = status < 200 || status == 204 || status == 304;
        let head_only = has_no_body || context.method == "HEAD";

        // The begin of the body, enough to see whether it is complete.
        let mut start = vec![0; size.unwrap_or(WRITE_BUFFER_SIZE).min(WRITE_BUFFER_SIZE)];
        let filled = if has_no_body { 0 } else { read_full(&mut body, &mut start)? };
        start.truncate(filled);
        let complete = size.is_none() && filled < WRITE_BUFFER_SIZE;
        let length = if complete { Some(filled) } else { size };

        let mut out = Vec::with_capacity((1 << 10) + start.len());
        write!(out, "HTTP/1.1 {status} {}\r\n", reason_phrase(status))?;
        let mut declared_length = None;
        for (name, value) in &headers {
            if name.eq_ignore_ascii_case("Content-Length") {
                declared_length = Some(value);
            } else if is_valid_header(name, value) {
                push_header(&mut out, name, value);
            } else {
                log::warn!("a malformed response header {name:?} was left out");
            }
        }
        let has = |wanted: &str| headers.iter().any(|(name, _)| name.eq_ignore_ascii_case(wanted));
        if !has("Date") {
            push_header(&mut out, "Date", &httpdate::fmt_http_date(SystemTime::now()));
        }
        // What a handler does not set itself: no cache keeps the response, and no browser guesses
        // another type (RFC 9111 section 5.2.2.5, WHATWG Fetch "X-Content-Type-Options").
        for (name, value) in [("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff")]
        {
            if !has(name) {
                push_header(&mut out, name, value);
            }
        }
        if !has("X-Request-Id") {
            push_header(&mut out, "X-Request-Id", &context.request_id);
        }
        match (length, declared_length) {
            _ if has_no_body => (),
            // The length that a GET would have had, where the handler knows it.
            (_, Some(declared_length)) if head_only => {
                write!(out, "Content-Length: {declared_length}\r\n")?
            }
            // An empty body says nothing of the length of a GET: then no length is sent (RFC 9110
            // section 9.3.2).
            (None | Some(0), _) if head_only => (),
            (Some(length), _) => write!(out, "Content-Length: {length}\r\n")?,
            (None, _) if context.is_http10 => (),
            (None, _) => out.extend_from_slice(b"Transfer-Encoding: chunked\r\n"),
        }
        // An HTTP/1.0 client recognises the end of such a body only by the end of the connection.
        let ends_by_closing = context.is_http10 && length.is_none() && !head_only;
        let keep_alive = context.keep_alive && !ends_by_closing;
        if !keep_alive {
            out.extend_from_slice(b"Connection: close\r\n");
        } else if context.is_http10 {
            out.extend_from_slice(b"Connection: keep-alive\r\n");
        }
        out.extend_from_slice(b"\r\n");

        if head_only {
            self.write_all(&out, 0)?;
            return Ok(keep_alive);
        }
        let chunked = length.is_none() && !context.is_http10;
        push_chunk(&mut out, &start, chunked);
        drop(start);
        self.write_all(&out, filled)?;
        drop(out);
        let mut left = length.map(|length| length - filled);
        // One buffer, with room for the chunk header: a slow client occupies it for long.
        let mut buffer = Vec::new();
        while left != Some(0) {
            buffer.resize(CHUNK_HEADER_SIZE + CHUNK_SIZE + 2, 0);
            let most = left.unwrap_or(CHUNK_SIZE).min(CHUNK_SIZE);
            let read = read_some(&mut body, &mut buffer[CHUNK_HEADER_SIZE..][..most])?;
            if read == 0 {
                break;
            }
            let mut piece = CHUNK_HEADER_SIZE..CHUNK_HEADER_SIZE + read;
            if chunked {
                let size = format!("{read:x}\r\n");
                buffer[piece.end..][..2].copy_from_slice(b"\r\n");
                piece = CHUNK_HEADER_SIZE - size.len()..piece.end + 2;
                buffer[piece.start..CHUNK_HEADER_SIZE].copy_from_slice(size.as_bytes());
            }
            self.write_all(&buffer[piece], read)?;
            left = left.map(|left| left - read);
        }
        if left.is_some_and(|left| left > 0) {
            return Err(io::Error::new(ErrorKind::UnexpectedEof, "the body is too short"));
        }
        if chunked {
            self.write_all(b"0\r\n\r\n", 0)?;
        }
        Ok(keep_alive)
    }

    /// Writes all of `bytes`, of which `body` belong to the body, unless the
    /// client takes too long.
    fn write_all(&mut self, mut bytes: &[u8], body: usize) -> io::Result<()> {
        let Session { connection, server, .. } = self.session;
        let started_at = Instant::now();
        connection.begin_wait(
            WaitState::Writing,
            started_at.checked_sub(self.time_blocked).unwrap_or(started_at),
        );
        while !bytes.is_empty() {
            match (&connection.stream).write(bytes) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => bytes = &bytes[written..],
                Err(err) if err.kind() == ErrorKind::Interrupted => (),
                Err(err) if is_timeout(&err) => return Err(ErrorKind::TimedOut.into()),
                Err(err) => return Err(err),
            }
            let extra_time =
                Duration::from_millis(self.body_bytes * 1000 / MIN_WRITE_BYTES_PER_SEC);
            if self.time_blocked + started_at.elapsed() > server.limits.write_timeout + extra_time {
                return Err(ErrorKind::TimedOut.into());
            }
        }
        self.time_blocked += started_at.elapsed();
        self.body_bytes += body as u64;
        connection.end_wait()
    }
}

/// Appends a header field. `write!` would take five times as long.
fn push_header(out: &mut Vec<u8>, name: &str, value: &str) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b": ");
    if value.is_ascii() {
        out.extend_from_slice(value.as_bytes());
    } else {
        out.extend_from_slice(&header_bytes(value));
    }
    out.extend_from_slice(b"\r\n");
}

/// Appends a part of a body, as a chunk where the body is chunked.
fn push_chunk(out: &mut Vec<u8>, piece: &[u8], chunked: bool) {
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

/// Whether a header field cannot break the message head that it is in.
fn is_valid_header(name: &str, value: &str) -> bool {
    !name.is_empty()
        && name.bytes().all(http1::is_token_byte)
        && !value.bytes().any(|byte| byte.is_ascii_control() && byte != b'\t')
}

/// A path without what a terminal or a log reader might interpret: some letters beyond ASCII are
/// control characters or line ends.
fn escape_for_log(path: &str) -> Cow<'_, str> {
    if path.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Cow::Borrowed(path);
    }
    let escaped = |letter: char| match letter.is_ascii_graphic() {
        true => letter.to_string(),
        false => letter.escape_unicode().to_string(),
    };
    Cow::Owned(path.chars().map(escaped).collect())
}

/// Whether a socket call ended because its timeout has passed.
fn is_timeout(err: &io::Error) -> bool {
    matches!(err.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_connections_are_let_in_as_there_are_descriptors_for() {
        assert!(
            connections_for_fds(1024, 2, 0) > 256,
            "the usual limit is enough for the usual setting"
        );
        assert_eq!(connections_for_fds(64, 2, 0), 5);
        assert_eq!(connections_for_fds(64, 1, 8), 4);
        assert_eq!(connections_for_fds(16, 2, 0), 1);
    }

    #[test]
    fn the_limit_of_this_process_is_known() {
        assert!(fd_limit().is_none_or(|allowed| allowed > 16));
    }
}
