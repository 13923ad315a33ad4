//! Carts and orders: what a customer wants to buy, and what became of it.
//!
//! A request writes an order and everything that must follow from it in one transaction: the messages
//! of the [`outbox`] and the [`stock`] commands. Threads of this service finish those, whatever
//! happens to the process that wrote them.

use std::sync::Arc;

use anyhow::Result;
use chassis::auth::{Authenticator, HttpSource};
use chassis::db::{Connection, Pool, instance_id};
use chassis::health::Probe;
use chassis::{Secret, Stop};
use postgres::{Client, Error};

pub mod config;
pub mod routes;

pub mod carts;
pub mod orders;
pub mod webhooks;

pub mod outbox;
pub mod stock;

pub mod metrics;
pub mod pricing;
pub mod upstreams;

pub mod exclusive;
pub mod waker;

use config::Config;
use pricing::Pricing;
use upstreams::Upstreams;
use waker::Waker;

/// A pooled connection to the database of the store.
pub type Db = Connection<Statements>;

/// The statements that each connection prepares once: then a query is one round trip, and its plan
/// is ready.
pub struct Statements {
    /// Names the database in entity tags.
    pub instance: String,
    /// Those of carts.
    pub carts: carts::store::Statements,
    /// Those of orders.
    pub orders: orders::store::Statements,
    /// Those of idempotency keys.
    pub keys: orders::idempotency::Statements,
}

impl Statements {
    /// For [`chassis::db::Pool::new`].
    pub fn prepare(client: &mut Client) -> Result<Statements, Error> {
        Ok(Statements {
            instance: instance_id(client)?,
            carts: carts::store::Statements::prepare(client)?,
            orders: orders::store::Statements::prepare(client)?,
            keys: orders::idempotency::Statements::prepare(client)?,
        })
    }
}

/// What every request needs.
pub struct App {
    /// The database of the store.
    pub db: Pool<Statements>,
    /// Verifies access tokens.
    pub auth: Authenticator,
    /// The services that orders need.
    pub upstreams: Arc<Upstreams>,
    /// What an order costs.
    pub pricing: Pricing,
    /// The limits of carts and orders.
    pub limits: config::Limits,
    /// The secrets of webhooks; without one there are no webhooks.
    pub webhook_secrets: Vec<Secret>,
    /// Wakes the relay after a message was written.
    pub outbox: Waker,
    /// Wakes the sender after a stock command was written.
    pub stock: Waker,
    /// The dependencies that readiness checks.
    pub probes: Vec<Probe>,
}

impl App {
    /// Connects when the first query comes: the service starts without its database.
    pub fn new(config: &Config, stop: &Stop) -> Result<App> {
        metrics::register();
        let upstreams = Arc::new(Upstreams::new(&config.inventory, &config.customers));
        let source = HttpSource::new(config.customers.address);
        let auth = Authenticator::new(config.auth.clone(), source, stop)?;
        // Without the broker orders are made all the same, so it is not among them.
        let probes = vec![
            Probe::new("postgresql", config.db.probe(check_readiness))?,
            Probe::new("inventory", upstreams.inventory_probe())?,
            Probe::new("customers", upstreams.customers_probe())?,
            Probe::new("revocations", auth.probe())?,
        ];
        Ok(App {
            db: Pool::new(config.db.clone(), Statements::prepare),
            auth,
            upstreams,
            pricing: config.pricing.clone(),
            limits: config.limits.clone(),
            webhook_secrets: config.webhook_secrets.clone(),
            outbox: Waker::default(),
            stock: Waker::default(),
            probes,
        })
    }

    /// After a change: has what it wrote published and sent.
    pub fn wake(&self) {
        self.outbox.wake();
        self.stock.wake();
    }
}

/// The readiness check; a database that can only be read makes no order.
fn check_readiness(client: &mut Client) -> Result<Result<(), String>, Error> {
    let query = "select pg_is_in_recovery() or current_setting('transaction_read_only')::boolean
        from (select from orders, outbox, carts limit 0) as migrated
        right join (select) as one on true";
    let row = client.query_one(query, &[])?;
    Ok(match row.try_get(0)? {
        true => Err("the database is read-only".to_owned()),
        false => Ok(()),
    })
}
