//! Customers: accounts, logins and tokens.

use std::net::IpAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use chassis::auth::Authenticator;
use chassis::db::{self, Connection, Pool};
use chassis::health::Probe;
use chassis::{Env, Stop};
use postgres::{Client, Error};
use rouille::Request;

pub mod config;
pub mod internal;
pub mod passwords;
pub mod routes;
pub mod sessions;
pub mod throttle;
pub mod users;

use config::Config;
use passwords::Passwords;
use sessions::feed::DatabaseSource;
use sessions::store::Lifetimes;
use sessions::tokens::Issuer;
use throttle::Throttle;

/// A pooled connection to the customers' database.
pub type Db = Connection<Statements>;

/// The statements that each connection prepares once.
pub struct Statements {
    /// Names the database in entity tags and in the list of revocations.
    pub instance: String,
    /// Those of accounts.
    pub users: users::store::Statements,
    /// Those of sessions.
    pub sessions: sessions::store::Statements,
}

impl Statements {
    /// For [`chassis::db::Pool::new`].
    pub fn prepare(client: &mut Client) -> Result<Statements, Error> {
        Ok(Statements {
            instance: db::instance_id(client)?,
            users: users::store::Statements::prepare(client)?,
            sessions: sessions::store::Statements::prepare(client)?,
        })
    }
}

/// What every request needs.
pub struct App {
    /// The customers' database.
    pub db: Pool<Statements>,
    /// Verifies access tokens.
    pub auth: Authenticator,
    /// Makes access tokens.
    pub issuer: Issuer,
    /// How long sessions last.
    pub lifetimes: Lifetimes,
    /// Hashes passwords.
    pub passwords: Passwords,
    /// Counts failed logins.
    pub throttle: Throttle,
    /// The dependencies that readiness checks.
    pub probes: Vec<Probe>,
}

impl App {
    /// Connects when the first query comes: the service starts without its database.
    pub fn new(config: Config, stop: &Stop) -> Result<App> {
        let database = Probe::new("postgresql", config.db.probe(users::store::check_readiness))?;
        let db = Pool::new(config.db, Statements::prepare);
        let source = DatabaseSource { db: db.clone(), keys: config.keys.public() };
        let issuer = Issuer {
            keys: config.keys,
            issuer: config.auth.issuer.clone(),
            audience: config.auth.audience.clone(),
            lifetime_s: config.lifetimes.access.as_secs() as i64,
        };
        let auth = Authenticator::new(config.auth, source, stop)?;
        let revocations = Probe::new("revocations", auth.probe())?;
        Ok(App {
            db,
            auth,
            issuer,
            lifetimes: config.lifetimes,
            passwords: Passwords::new(&config.passwords),
            throttle: Throttle::new(),
            probes: vec![database, revocations],
        })
    }
}

/// The address of a request's client, as the gateway names it.
pub fn client_address(request: &Request) -> IpAddr {
    let named = request.header("X-Real-IP").and_then(|text| text.parse().ok());
    named.unwrap_or_else(|| request.remote_addr().ip())
}

/// The time of this machine's clock, in Unix seconds.
pub fn unix_now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}

/// The settings of the commands: the database, how passwords are hashed, how long tokens last.
pub fn command_config(mut env: Env) -> Result<(db::Config, passwords::Config, Lifetimes)> {
    let config = (
        db::Config::from_env(&mut env, "CUSTOMERS"),
        passwords::Config::from_env(&mut env),
        Lifetimes::from_env(&mut env),
    );
    env.finish(config)
}
