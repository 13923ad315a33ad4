//! The catalogue: movies and products, their rules, their SQL and their HTTP API; and the stock of
//! the products, which orders reserve.

use anyhow::Result;
use chassis::Stop;
use chassis::auth::{Authenticator, HttpSource};
use chassis::db::{Connection, Pool, instance_id};
use chassis::health::Probe;
use postgres::{Client, Error};

pub mod config;
pub mod routes;

pub mod movies;
pub mod products;
pub mod reservations;
pub mod stock;

use config::Config;
use reservations::combine::HoldQueue;

/// A pooled connection to the catalogue's database.
pub type Db = Connection<Statements>;

/// The statements that each connection prepares once: then a query is one round trip, and its plan
/// is ready.
pub struct Statements {
    /// Names the database in entity tags.
    pub instance: String,
    /// Those of movies.
    pub movies: movies::store::Statements,
    /// Those of products.
    pub products: products::store::Statements,
    /// Those of reservations.
    pub reservations: reservations::store::Statements,
}

impl Statements {
    /// For [`chassis::db::Pool::new`].
    pub fn prepare(client: &mut Client) -> Result<Statements, Error> {
        Ok(Statements {
            instance: instance_id(client)?,
            movies: movies::store::Statements::prepare(client)?,
            products: products::store::Statements::prepare(client)?,
            reservations: reservations::store::Statements::prepare(client)?,
        })
    }
}

/// What every request needs.
pub struct App {
    /// The catalogue's database.
    pub db: Pool<Statements>,
    /// Verifies access tokens.
    pub auth: Authenticator,
    /// The holds that wait for the database.
    pub holds: HoldQueue,
    /// The currency of all prices, ISO 4217.
    pub currency: String,
    /// How caches may keep products.
    pub products_cache_control: String,
    /// The dependencies that readiness checks.
    pub probes: Vec<Probe>,
}

impl App {
    /// Connects when the first query comes: the service starts without its database.
    pub fn new(config: Config, stop: &Stop) -> Result<App> {
        let database = Probe::new("postgresql", config.db.probe(check_readiness))?;
        let db = Pool::new(config.db, Statements::prepare);
        let auth = Authenticator::new(config.auth, HttpSource::new(config.customers), stop)?;
        let revocations = Probe::new("revocations", auth.probe())?;
        Ok(App {
            db,
            auth,
            holds: HoldQueue::default(),
            currency: config.currency,
            products_cache_control: config.products_cache_control,
            probes: vec![database, revocations],
        })
    }
}

/// The readiness check. A server that is read-only serves most requests, so it passes.
fn check_readiness(client: &mut Client) -> Result<Result<(), String>, Error> {
    client.batch_execute("select from movies limit 0; select from reservations limit 0").map(Ok)
}
