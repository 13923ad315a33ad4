//! The PostgreSQL pool: statements prepared once a connection, no round trip to
//! check one that was used a moment ago, and no long wait when the server is away.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::process;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use postgres::error::SqlState;
use postgres::{Client, NoTls};
use r2d2::{ManageConnection, PooledConnection};

use crate::env::{Env, Secret};
use crate::metrics;
use crate::semaphore::{FairSemaphore, SemaphorePermit};

/// How long a connection may have been idle and still be trusted unasked.
const VALIDATE_AFTER_IDLE: Duration = Duration::from_secs(1);

/// A TCP connect, and the question whether a connection lives, may take so long.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// A peer that acknowledges nothing for so long is given up.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(10);

/// The server is asked for a sign of life after so much silence, then again and again until
/// [`TCP_USER_TIMEOUT`] is over: an answer may get lost when the question had been received.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(5);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);

/// Beyond the server's own limit for a statement: then [`with_deadline`] gives up. Longer than
/// [`TCP_USER_TIMEOUT`], so that a peer that is cut off is found by TCP, which costs one connection
/// and not the process.
const DEADLINE_MARGIN: Duration = Duration::from_secs(12);

/// How often the deadlines are looked at.
const WATCHDOG_INTERVAL: Duration = Duration::from_millis(500);

/// Where a service's database is and how it is used.
#[derive(Clone, Debug)]
pub struct Config {
    /// Who asks, as `pg_stat_activity` shows it.
    pub application_name: String,
    /// Server address.
    pub address: SocketAddr,
    /// Database name.
    pub database: String,
    /// Login role.
    pub user: String,
    /// Its password.
    pub password: Secret,
    /// Most connections at once.
    pub pool_size: u32,
    /// How long to wait for a connection.
    pub pool_timeout: Duration,
    /// How long the server may work on one statement.
    pub statement_timeout: Duration,
}

impl Config {
    /// Reads `<PREFIX>_DB_HOST`, `_PORT`, `_NAME`, `_USER`, `_PASSWORD`, `_POOL_SIZE`,
    /// `_POOL_TIMEOUT_MS` and `_STATEMENT_TIMEOUT_MS`.
    pub fn from_env(env: &mut Env, prefix: &str) -> Config {
        let name = |suffix: &str| format!("{prefix}_DB_{suffix}");
        Config {
            application_name: prefix.to_lowercase(),
            address: env.host_port(&name("HOST"), &name("PORT")),
            database: env.required(&name("NAME")),
            user: env.required(&name("USER")),
            password: env.secret(&name("PASSWORD")),
            pool_size: env.number(&name("POOL_SIZE"), 8, 1..=1000),
            pool_timeout: env.millis(&name("POOL_TIMEOUT_MS"), 1000),
            statement_timeout: env.millis(&name("STATEMENT_TIMEOUT_MS"), 3000),
        }
    }

    /// A connection of its own, outside any pool.
    pub fn connect(&self) -> Result<Client, postgres::Error> {
        let statement_timeout = self.statement_timeout.as_millis();
        let (idle, interval) = (KEEPALIVE_IDLE.as_secs(), KEEPALIVE_INTERVAL.as_secs());
        let mut config = postgres::Config::new();
        config
            .host(&self.address.ip().to_string())
            .port(self.address.port())
            .dbname(&self.database)
            .user(&self.user)
            .password(self.password.expose())
            .application_name(&self.application_name)
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_user_timeout(TCP_USER_TIMEOUT)
            .keepalives_idle(KEEPALIVE_IDLE)
            .keepalives_interval(KEEPALIVE_INTERVAL)
            .keepalives_retries(3)
            // The server, too, shall notice soon that a client is cut off: until then its
            // transaction keeps its locks, and whoever comes in its place waits for them.
            .options(&format!(
                "-c statement_timeout={statement_timeout} \
                 -c idle_in_transaction_session_timeout={silence} \
                 -c tcp_keepalives_idle={idle} -c tcp_keepalives_interval={interval} \
                 -c tcp_keepalives_count=3 -c tcp_user_timeout={silence}",
                silence = TCP_USER_TIMEOUT.as_millis(),
            ));
        // A server that accepts and says nothing is not noticed by the connect timeout.
        with_deadline(DEADLINE_MARGIN, || config.connect(NoTls))
    }

    /// Runs `work`, a short piece of work at the server, under this database's deadline.
    pub fn with_deadline<T>(&self, work: impl FnOnce() -> T) -> T {
        with_deadline(self.statement_timeout + DEADLINE_MARGIN, work)
    }
}

/// Runs `call`; if it takes longer than `limit` the process ends, to be started anew.
///
/// The server ends what takes too long, and TCP finds a peer that is gone; what is left is one
/// whose kernel answers and that itself never does. `postgres` shows nobody its socket, so
/// nothing can cut it under the call, and the thread and its connection would be lost for ever.
fn with_deadline<T>(limit: Duration, call: impl FnOnce() -> T) -> T {
    static WATCH: Once = Once::new();
    WATCH.call_once(|| {
        let watch = || {
            loop {
                thread::sleep(WATCHDOG_INTERVAL);
                let now = Instant::now();
                if deadlines().iter().any(|(_, deadline)| *deadline < now) {
                    log::error!("the database does not answer: ending, to begin anew");
                    process::exit(1);
                }
            }
        };
        let watcher = thread::Builder::new().name("db-deadline".into()).stack_size(64 << 10);
        if let Err(err) = watcher.spawn(watch) {
            log::error!("nobody watches the deadlines of the database: {err}");
        }
    });
    /// Also when `call` panics.
    struct DeadlineGuard(u64);
    impl Drop for DeadlineGuard {
        fn drop(&mut self) {
            deadlines().retain(|(mark, _)| *mark != self.0);
        }
    }
    static NEXT_ID: AtomicU64 = AtomicU64::new(0);
    let mark = DeadlineGuard(NEXT_ID.fetch_add(1, Ordering::Relaxed));
    deadlines().push((mark.0, Instant::now() + limit));
    call()
}

/// Of the calls under way, a few at any time.
fn deadlines() -> MutexGuard<'static, Vec<(u64, Instant)>> {
    static DEADLINES: Mutex<Vec<(u64, Instant)>> = Mutex::new(Vec::new());
    DEADLINES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a question to the database has no answer.
#[derive(Debug)]
pub enum Error {
    /// The server is away, full, read-only or too slow: later may be better.
    Unavailable(Box<dyn StdError + Send + Sync>),
    /// The statement itself failed: a fault of ours, or data that a rule refuses.
    Failed(postgres::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Error::Unavailable(_) => "the database is not available",
            Error::Failed(_) => "the database refused a statement",
        })
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            Error::Unavailable(cause) => Some(&**cause),
            Error::Failed(cause) => Some(cause),
        }
    }
}

impl From<postgres::Error> for Error {
    fn from(err: postgres::Error) -> Error {
        if is_transient(&err) { Error::Unavailable(Box::new(err)) } else { Error::Failed(err) }
    }
}

/// Whether the connection, not the statement, is to blame.
fn is_connection_lost(err: &postgres::Error) -> bool {
    match err.code() {
        // 57P01 to 57P05: shut down by an administrator, a crash or a start-up.
        Some(state) => state.code().starts_with("57P") || state.code().starts_with("08"),
        // The rest comes from the client side: values of the wrong type are our own fault.
        None => err.is_closed() || err.source().is_some_and(|cause| cause.is::<io::Error>()),
    }
}

/// Whether the same statement may well succeed later. By SQLSTATE class, see
/// PostgreSQL's appendix "Error Codes": 53 resources, 57 operator, 58 system,
/// 40 rollback by a conflict, 55 object in use; 25006 is a read-only server.
pub fn is_transient(err: &postgres::Error) -> bool {
    is_connection_lost(err)
        || err.code().is_some_and(|state| {
            *state == SqlState::READ_ONLY_SQL_TRANSACTION
                || ["53", "57", "58", "40", "55"].contains(&&state.code()[..2])
        })
}

/// A pooled connection with the statements that its service prepared on it.
pub struct Connection<S> {
    /// The connection.
    pub client: Client,
    /// What was prepared when it was made.
    pub statements: S,
    last_used: Instant,
    validated_generation: u64,
}

/// Prepares a service's statements on a new connection.
pub type Prepare<S> = fn(&mut Client) -> Result<S, postgres::Error>;

/// How a question waits for its connection.
type Acquire = fn(&FairSemaphore, Duration) -> Option<SemaphorePermit>;

/// A bounded pool; clones share it.
pub struct Pool<S: Send + 'static> {
    inner: r2d2::Pool<Manager<S>>,
    /// r2d2 wakes whoever comes first; this keeps the order.
    permits: FairSemaphore,
    timeout: Duration,
    /// See [`with_deadline`].
    limit: Duration,
    generation: Arc<AtomicU64>,
}

impl<S: Send + 'static> Clone for Pool<S> {
    fn clone(&self) -> Pool<S> {
        Pool {
            inner: self.inner.clone(),
            permits: self.permits.clone(),
            timeout: self.timeout,
            limit: self.limit,
            generation: Arc::clone(&self.generation),
        }
    }
}

impl<S: Send + 'static> Pool<S> {
    /// A pool that connects when it is first used: a service starts without its database.
    pub fn new(config: Config, prepare: Prepare<S>) -> Pool<S> {
        metrics::register_pool();
        let generation = Arc::new(AtomicU64::new(0));
        let (size, timeout) = (config.pool_size, config.pool_timeout);
        let limit = config.statement_timeout + DEADLINE_MARGIN;
        let disconnected = Arc::new(AtomicBool::new(false));
        let manager = Manager {
            config,
            prepare,
            generation: Arc::clone(&generation),
            disconnected: Arc::clone(&disconnected),
        };
        let inner = r2d2::Pool::builder()
            .max_size(size)
            .min_idle(Some(1))
            .connection_timeout(timeout)
            .error_handler(Box::new(ConnectErrorLog(disconnected)))
            .build_unchecked(manager);
        Pool { inner, permits: FairSemaphore::new(size as usize), timeout, limit, generation }
    }

    /// Asks a question that changes nothing. When the connection permits out to be
    /// dead the question is asked once more on another one.
    pub fn read<T>(
        &self,
        ask: impl Fn(&mut Connection<S>) -> Result<T, postgres::Error>,
    ) -> Result<T, Error> {
        self.ask(FairSemaphore::acquire, ask)
    }

    /// The same for one of many questions of one request: it lets those of others past.
    pub fn read_background<T>(
        &self,
        ask: impl Fn(&mut Connection<S>) -> Result<T, postgres::Error>,
    ) -> Result<T, Error> {
        self.ask(FairSemaphore::acquire_background, ask)
    }

    fn ask<T>(
        &self,
        take: Acquire,
        ask: impl Fn(&mut Connection<S>) -> Result<T, postgres::Error>,
    ) -> Result<T, Error> {
        let (_permit, mut conn) = self.get(take)?;
        match with_deadline(self.limit, || ask(&mut conn)) {
            Err(err) if is_connection_lost(&err) => {
                self.generation.fetch_add(1, Ordering::SeqCst);
                drop(conn);
                let mut conn = self.connection(Instant::now() + self.timeout)?;
                Ok(with_deadline(self.limit, || ask(&mut conn))?)
            }
            other => Ok(other?),
        }
    }

    /// Makes a change, never twice: when the connection breaks meanwhile, nobody
    /// knows whether the change was made, and the caller is told so.
    pub fn write<T>(
        &self,
        change: impl FnOnce(&mut Connection<S>) -> Result<T, postgres::Error>,
    ) -> Result<T, Error> {
        let (_permit, mut conn) = self.get(FairSemaphore::acquire)?;
        with_deadline(self.limit, || change(&mut conn)).map_err(|err| {
            if is_connection_lost(&err) {
                self.generation.fetch_add(1, Ordering::SeqCst);
            }
            err.into()
        })
    }

    /// A connection, and the right to it: the connection is given back first.
    fn get(&self, take: Acquire) -> Result<(SemaphorePermit, PooledConnection<Manager<S>>), Error> {
        let deadline = Instant::now() + self.timeout;
        let waited = metrics::POOL_WAIT.start_timer();
        let permit = take(&self.permits, self.timeout);
        let got = permit.ok_or_else(|| {
            metrics::POOL_TIMEOUTS.inc();
            Error::Unavailable("all connections to the database are in use".into())
        });
        let got = got.and_then(|permit| Ok((permit, self.connection(deadline)?)));
        waited.observe_duration();
        let state = self.inner.state();
        metrics::POOL_CONNECTIONS.set(i64::from(state.connections));
        metrics::POOL_IDLE.set(i64::from(state.idle_connections));
        got
    }

    fn connection(&self, deadline: Instant) -> Result<PooledConnection<Manager<S>>, Error> {
        let left = deadline.saturating_duration_since(Instant::now());
        // r2d2 wants a time above zero, also for a connection that is there.
        self.inner.get_timeout(left.max(Duration::from_millis(1))).map_err(|err| {
            metrics::POOL_TIMEOUTS.inc();
            Error::Unavailable(Box::new(err))
        })
    }
}

/// Makes connections for r2d2 and judges them.
pub struct Manager<S> {
    config: Config,
    prepare: Prepare<S>,
    /// Counts disconnections: every connection validated_generation before the last one is
    /// asked again, so that a restart of the server costs one error, not one a
    /// connection.
    generation: Arc<AtomicU64>,
    disconnected: Arc<AtomicBool>,
}

impl<S: Send + 'static> ManageConnection for Manager<S> {
    type Connection = Connection<S>;
    type Error = postgres::Error;

    fn connect(&self) -> Result<Connection<S>, postgres::Error> {
        let validated_generation = self.generation.load(Ordering::SeqCst);
        let mut client = self.config.connect()?;
        let statements = self.config.with_deadline(|| (self.prepare)(&mut client))?;
        if self.disconnected.swap(false, Ordering::SeqCst) {
            log::info!("connected to the database again");
        }
        Ok(Connection { client, statements, last_used: Instant::now(), validated_generation })
    }

    fn is_valid(&self, conn: &mut Connection<S>) -> Result<(), postgres::Error> {
        let generation = self.generation.load(Ordering::SeqCst);
        if conn.validated_generation != generation || conn.last_used.elapsed() > VALIDATE_AFTER_IDLE
        {
            conn.client.is_valid(CONNECT_TIMEOUT)?;
            conn.validated_generation = generation;
        }
        Ok(())
    }

    fn has_broken(&self, conn: &mut Connection<S>) -> bool {
        conn.last_used = Instant::now();
        conn.client.is_closed()
    }
}

/// r2d2 tries on in the background; the log gets one line a change of state.
#[derive(Debug)]
struct ConnectErrorLog(Arc<AtomicBool>);

impl r2d2::HandleError<postgres::Error> for ConnectErrorLog {
    fn handle_error(&self, err: postgres::Error) {
        if !self.0.swap(true, Ordering::SeqCst) {
            let cause = err.source().map(|cause| format!(": {cause}")).unwrap_or_default();
            log::error!("no connection to the database, trying until there is: {err}{cause}");
        }
    }
}
