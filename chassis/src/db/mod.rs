//! PostgreSQL: how a service connects, its pool, and what a failure means.

use std::net::SocketAddr;
use std::time::Duration;

use parking_lot::Mutex;
use postgres::{Client, NoTls};

use crate::env::{Env, Secret};

mod error;
mod instance;
mod pool;
mod reconnecting;
mod watchdog;

pub use error::{Error, is_connection_lost, is_stale_statement, is_transient};
pub use instance::instance_id;
pub use pool::{
    Connection, Manager, Pool, Prepare, in_transaction, in_transaction_with, like_pattern, undo,
};
pub use reconnecting::{Open, ReconnectingStore, error_summary};
pub use watchdog::{EXIT_TIMEOUT, before_exit, renew_deadline};

use error::readiness_reason;

/// How long a TCP connect, and validating a connection, may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// A peer that acknowledges nothing for this long is considered dead.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(10);

/// TCP keepalive: the first probe after this much silence, then one each interval until
/// [`TCP_USER_TIMEOUT`] is over. A query may have been received and its answer lost.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(5);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);

/// How much longer than `statement_timeout` a statement may take before the watchdog ends the
/// process. Longer than [`TCP_USER_TIMEOUT`], so that a dead peer is found by TCP first: that costs
/// one connection and not the process.
const DEADLINE_MARGIN: Duration = Duration::from_secs(12);

/// Where a service's database is and how it is used.
#[derive(Clone, Debug)]
pub struct Config {
    /// The service's name, as `pg_stat_activity` shows it.
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
    /// How long a query waits for a connection.
    pub pool_timeout: Duration,
    /// How long the server may work on one statement (`statement_timeout`).
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

    /// Opens a connection outside the pool.
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
            // The server must find a dead client soon as well: until then the client's transaction
            // keeps its locks, and other clients wait for them.
            .options(&format!(
                "-c statement_timeout={statement_timeout} \
                 -c idle_in_transaction_session_timeout={silence} \
                 -c tcp_keepalives_idle={idle} -c tcp_keepalives_interval={interval} \
                 -c tcp_keepalives_count=3 -c tcp_user_timeout={silence}",
                silence = TCP_USER_TIMEOUT.as_millis(),
            ));
        // The connect timeout does not cover a server that accepts and never answers.
        watchdog::with_deadline(DEADLINE_MARGIN, || config.connect(NoTls))
    }

    /// Runs `call`, which makes one statement, under this database's deadline: the statement timeout
    /// and 12 s. If it takes longer, the process ends. Between the statements of a transaction
    /// [`renew_deadline`] starts the deadline anew.
    pub fn with_deadline<T>(&self, call: impl FnOnce() -> T) -> T {
        watchdog::with_deadline(self.statement_timeout + DEADLINE_MARGIN, call)
    }

    /// A readiness check on a connection of its own, so that a pool that is busy does not count as
    /// a database that is away. `check` fails with a reason that may be shown. Where the connection
    /// was lost since the last check, `check` runs once more on a new one.
    pub fn probe(
        &self,
        check: impl Fn(&mut Client) -> Result<Result<(), String>, postgres::Error> + Send + 'static,
    ) -> impl Fn() -> Result<(), String> + Send + 'static {
        let (config, kept) = (self.clone(), Mutex::new(None));
        move || {
            let mut kept = kept.lock();
            let mut checked = None;
            if let Some(mut client) = kept.take() {
                match config.with_deadline(|| check(&mut client)) {
                    Err(err) if is_connection_lost(&err) || is_stale_statement(&err) => (),
                    result => checked = Some((client, result)),
                }
            }
            let (client, result) = match checked {
                Some(checked) => checked,
                None => {
                    let connected = config.connect();
                    let mut client = connected.map_err(|err| readiness_reason(&err))?;
                    let result = config.with_deadline(|| check(&mut client));
                    (client, result)
                }
            };
            let result = result.map_err(|err| readiness_reason(&err))?;
            *kept = Some(client);
            result
        }
    }
}
