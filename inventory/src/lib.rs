//! The catalogue: movies, their rules, their SQL and their HTTP API.

use anyhow::Result;
use chassis::db::{self, Pool};
use chassis::health::Probe;

pub mod config;
pub mod routes;

pub mod movies;

use movies::store::{self, Statements};

/// What every request needs.
pub struct App {
    /// The catalogue's database.
    pub db: Pool<Statements>,
    /// The dependencies that readiness checks.
    pub probes: Vec<Probe>,
}

impl App {
    /// Connects when the first query comes: the service starts without its database.
    pub fn new(db: db::Config) -> Result<App> {
        let database = Probe::new("postgresql", db.probe(store::check_readiness))?;
        let db = Pool::new(db, Statements::prepare);
        Ok(App { db, probes: vec![database] })
    }
}
