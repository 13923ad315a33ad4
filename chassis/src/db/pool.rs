//! A bounded pool of connections, each with the statements that its service has prepared.

use std::error::Error as StdError;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use postgres::Client;
use prometheus::{
    Histogram, IntCounter, IntGauge, histogram_opts, register_histogram, register_int_counter,
    register_int_gauge,
};
use r2d2::{ManageConnection, PooledConnection};

use super::error::{is_connection_lost, is_stale_statement};
use super::{CONNECT_TIMEOUT, Config, Error, renew_deadline};
use crate::semaphore::{FairSemaphore, SemaphorePermit};

/// A connection that was used within this time is not validated before it is used again.
const VALIDATE_AFTER_IDLE: Duration = Duration::from_secs(1);

/// How often a query is asked whose prepared statements no longer fit the tables: a migration may
/// change them again meanwhile.
const MAX_STALE_ATTEMPTS: u32 = 4;

crate::define_metrics! {
    fn register_metrics;
    POOL_CONNECTIONS: IntGauge = register_int_gauge!(
        "db_pool_connections", "Connections of the database pool.");
    POOL_IDLE: IntGauge = register_int_gauge!(
        "db_pool_idle", "Connections of the database pool that are not in use.");
    POOL_TIMEOUTS: IntCounter = register_int_counter!(
        "db_pool_timeouts_total", "Waits for a database connection that ended without one.");
    POOL_WAIT: Histogram = register_histogram!(histogram_opts!(
        "db_pool_wait_seconds", "Waits for a database connection.",
        vec![0.000_01, 0.000_1, 0.001, 0.01, 0.1, 1.0]));
}

/// A pooled connection with the statements that its service prepared on it.
pub struct Connection<S> {
    /// The connection.
    pub client: Client,
    /// The statements, prepared when the connection was made or when the tables had changed.
    pub statements: S,
    last_used: Instant,
    validated_generation: u64,
    prepared_generation: u64,
}

/// Prepares a service's statements on a connection.
pub type Prepare<S> = fn(&mut Client) -> Result<S, postgres::Error>;

/// How a query waits for its permit.
type Acquire = fn(&FairSemaphore, Duration) -> Option<SemaphorePermit>;

/// A bounded pool; clones share it.
pub struct Pool<S: Send + 'static> {
    inner: r2d2::Pool<Manager<S>>,
    /// One permit a connection, in the order in which they were asked for. r2d2 alone would give
    /// a free connection to any waiting thread, and some would wait very long.
    permits: FairSemaphore,
    /// Fewer permits than connections, for changes: changes that wait for a locked row leave
    /// connections for reads.
    write_permits: FairSemaphore,
    timeout: Duration,
    config: Config,
    generations: Arc<Generations>,
}

/// Counters that make connections be validated or prepared anew.
#[derive(Default)]
struct Generations {
    /// Counts lost connections: a connection that was validated before the last one is validated
    /// again, so that a restart of the server costs one error, not one for each connection.
    lost: AtomicU64,
    /// Counts stale statements: a connection that was prepared before is prepared again.
    stale: AtomicU64,
}

impl<S: Send + 'static> Clone for Pool<S> {
    fn clone(&self) -> Pool<S> {
        Pool {
            inner: self.inner.clone(),
            permits: self.permits.clone(),
            write_permits: self.write_permits.clone(),
            timeout: self.timeout,
            config: self.config.clone(),
            generations: Arc::clone(&self.generations),
        }
    }
}

impl<S: Send + 'static> Pool<S> {
    /// A pool that connects when it is first used: a service starts without its database.
    pub fn new(config: Config, prepare: Prepare<S>) -> Pool<S> {
        register_metrics();
        let generations = Arc::new(Generations::default());
        let (size, timeout) = (config.pool_size, config.pool_timeout);
        let disconnected = Arc::new(AtomicBool::new(false));
        let manager = Manager {
            config: config.clone(),
            prepare,
            generations: Arc::clone(&generations),
            disconnected: Arc::clone(&disconnected),
        };
        let inner = r2d2::Pool::builder()
            .max_size(size)
            .min_idle(Some(1))
            .connection_timeout(timeout)
            .error_handler(Box::new(ConnectErrorLog(disconnected)))
            .build_unchecked(manager);
        let reserved_for_reads = (size / 4).max(1);
        let writes = size.saturating_sub(reserved_for_reads).max(1);
        let permits = FairSemaphore::new(size as usize);
        let write_permits = FairSemaphore::new(writes as usize);
        Pool { inner, permits, write_permits, timeout, config, generations }
    }

    /// Runs a query that changes nothing. When the connection turns out to be dead, it runs once
    /// more on another one.
    pub fn read<T>(
        &self,
        query: impl Fn(&mut Connection<S>) -> Result<T, postgres::Error>,
    ) -> Result<T, Error> {
        self.query(FairSemaphore::acquire, query)
    }

    /// The same for one of many queries of one request: queries of other requests overtake it.
    pub fn read_background<T>(
        &self,
        query: impl Fn(&mut Connection<S>) -> Result<T, postgres::Error>,
    ) -> Result<T, Error> {
        self.query(FairSemaphore::acquire_background, query)
    }

    fn query<T>(
        &self,
        acquire: Acquire,
        query: impl Fn(&mut Connection<S>) -> Result<T, postgres::Error>,
    ) -> Result<T, Error> {
        let deadline = Instant::now() + self.timeout;
        let waited = POOL_WAIT.start_timer();
        let permit = self.acquire(&self.permits, acquire, deadline);
        waited.observe_duration();
        let _permit = permit?;
        match self.run(deadline, &query) {
            Err(Attempt::Query(err)) if is_connection_lost(&err) => {
                let retried = self.run(Instant::now() + self.timeout, &query);
                retried.map_err(Error::from)
            }
            other => other.map_err(Error::from),
        }
    }

    /// Makes a change, at most once: when the connection breaks meanwhile, it is unknown whether
    /// the change was made, and the error says so. `change` is called again where the server has not
    /// executed a statement because its tables have changed: a change of several statements must be
    /// a transaction, or safe to repeat.
    pub fn write<T>(
        &self,
        change: impl Fn(&mut Connection<S>) -> Result<T, postgres::Error>,
    ) -> Result<T, Error> {
        let deadline = Instant::now() + self.timeout;
        let waited = POOL_WAIT.start_timer();
        let permits =
            self.acquire(&self.write_permits, FairSemaphore::acquire, deadline).and_then(|write| {
                Ok((write, self.acquire(&self.permits, FairSemaphore::acquire, deadline)?))
            });
        waited.observe_duration();
        let _permits = permits?;
        self.run(deadline, &change).map_err(Error::from)
    }

    fn acquire(
        &self,
        semaphore: &FairSemaphore,
        acquire: Acquire,
        deadline: Instant,
    ) -> Result<SemaphorePermit, Error> {
        let permit = acquire(semaphore, deadline.saturating_duration_since(Instant::now()));
        permit.ok_or_else(|| {
            POOL_TIMEOUTS.inc();
            Error::Unavailable("all connections to the database are in use".into())
        })
    }

    /// Runs a query on a connection of the pool, again with newly prepared statements as long as
    /// they do not fit the tables.
    fn run<T>(
        &self,
        deadline: Instant,
        query: &impl Fn(&mut Connection<S>) -> Result<T, postgres::Error>,
    ) -> Result<T, Attempt> {
        let mut attempts = 1;
        loop {
            let mut connection = self.checkout(deadline).map_err(Attempt::Checkout)?;
            match self.config.with_deadline(|| query(&mut connection)) {
                Ok(done) => return Ok(done),
                Err(err) if is_stale_statement(&err) && attempts < MAX_STALE_ATTEMPTS => {
                    log::warn!("the tables have changed: statements are prepared again ({err})");
                    self.generations.stale.fetch_add(1, Ordering::SeqCst);
                    attempts += 1;
                }
                Err(err) => {
                    if is_connection_lost(&err) {
                        self.generations.lost.fetch_add(1, Ordering::SeqCst);
                    }
                    return Err(Attempt::Query(err));
                }
            }
        }
    }

    fn checkout(&self, deadline: Instant) -> Result<PooledConnection<Manager<S>>, Error> {
        let left = deadline.saturating_duration_since(Instant::now());
        // r2d2 wants a time above zero, also for a connection that is idle.
        let connection = self.inner.get_timeout(left.max(Duration::from_millis(1)));
        let state = self.inner.state();
        POOL_CONNECTIONS.set(i64::from(state.connections));
        POOL_IDLE.set(i64::from(state.idle_connections));
        connection.map_err(|err| {
            POOL_TIMEOUTS.inc();
            Error::Unavailable(Box::new(err))
        })
    }
}

/// Why one attempt at a query failed.
enum Attempt {
    Checkout(Error),
    Query(postgres::Error),
}

impl From<Attempt> for Error {
    fn from(attempt: Attempt) -> Error {
        match attempt {
            Attempt::Checkout(err) => err,
            Attempt::Query(err) => err.into(),
        }
    }
}

/// Runs several statements in one transaction, which is rolled back where one fails.
pub fn in_transaction<S, T>(
    db: &mut Connection<S>,
    work: impl FnOnce(&mut Connection<S>) -> Result<T, postgres::Error>,
) -> Result<T, postgres::Error> {
    in_transaction_with(db, "", work)
}

/// The same with settings of this transaction, such as `set local lock_timeout = '100ms'`.
pub fn in_transaction_with<S, T>(
    db: &mut Connection<S>,
    settings: &str,
    work: impl FnOnce(&mut Connection<S>) -> Result<T, postgres::Error>,
) -> Result<T, postgres::Error> {
    db.client.batch_execute(&format!("begin; {settings}"))?;
    renew_deadline();
    let result = work(db);
    renew_deadline();
    match result {
        // After a statement that the schema has refused this rolls back, too.
        Ok(done) => db.client.batch_execute("commit").map(|()| done),
        Err(err) => {
            // Where this fails the connection is lost, and the transaction with it.
            let _ = db.client.batch_execute("rollback");
            Err(err)
        }
    }
}

/// Undoes what the transaction of [`in_transaction`] has done so far, for an outcome that is no error and
/// must leave nothing behind: only what follows is committed.
pub fn undo<S>(db: &mut Connection<S>) -> Result<(), postgres::Error> {
    renew_deadline();
    db.client.batch_execute("rollback; begin")
}

/// The pattern of `like` for a text that contains `part`, whose characters are all ordinary.
pub fn like_pattern(part: &str) -> String {
    let mut pattern = String::with_capacity(part.len() + 2);
    pattern.push('%');
    for char in part.chars() {
        if matches!(char, '%' | '_' | '\\') {
            pattern.push('\\');
        }
        pattern.push(char);
    }
    pattern.push('%');
    pattern
}

/// Makes connections for r2d2 and validates them.
pub struct Manager<S> {
    config: Config,
    prepare: Prepare<S>,
    generations: Arc<Generations>,
    disconnected: Arc<AtomicBool>,
}

impl<S: Send + 'static> ManageConnection for Manager<S> {
    type Connection = Connection<S>;
    type Error = postgres::Error;

    fn connect(&self) -> Result<Connection<S>, postgres::Error> {
        let validated_generation = self.generations.lost.load(Ordering::SeqCst);
        let prepared_generation = self.generations.stale.load(Ordering::SeqCst);
        let mut client = self.config.connect()?;
        let statements = self.config.with_deadline(|| (self.prepare)(&mut client))?;
        if self.disconnected.swap(false, Ordering::SeqCst) {
            log::info!("connected to the database again");
        }
        let last_used = Instant::now();
        Ok(Connection { client, statements, last_used, validated_generation, prepared_generation })
    }

    fn is_valid(&self, connection: &mut Connection<S>) -> Result<(), postgres::Error> {
        let lost = self.generations.lost.load(Ordering::SeqCst);
        if connection.validated_generation != lost
            || connection.last_used.elapsed() > VALIDATE_AFTER_IDLE
        {
            connection.client.is_valid(CONNECT_TIMEOUT)?;
            connection.validated_generation = lost;
        }
        let stale = self.generations.stale.load(Ordering::SeqCst);
        if connection.prepared_generation != stale {
            connection.statements =
                self.config.with_deadline(|| (self.prepare)(&mut connection.client))?;
            connection.prepared_generation = stale;
        }
        Ok(())
    }

    fn has_broken(&self, connection: &mut Connection<S>) -> bool {
        connection.last_used = Instant::now();
        connection.client.is_closed()
    }
}

/// r2d2 tries to connect again and again in the background. The log gets one line for each change
/// between connected and disconnected.
#[derive(Debug)]
struct ConnectErrorLog(Arc<AtomicBool>);

impl r2d2::HandleError<postgres::Error> for ConnectErrorLog {
    fn handle_error(&self, err: postgres::Error) {
        if !self.0.swap(true, Ordering::SeqCst) {
            let cause = err.source().map(|cause| format!(": {cause}")).unwrap_or_default();
            log::error!("no connection to the database, trying until there is one: {err}{cause}");
        }
    }
}
