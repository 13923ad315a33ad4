//! Answers for the movie catalogue: what a movie may be, where it is kept, and
//! how it is asked for over HTTP.

use anyhow::Result;
use chassis::db::{self, Pool};
use chassis::health::Probe;

pub mod config;
pub mod routes;

pub mod list;
pub mod movie;

mod etag;
pub mod store;

use store::Statements;

/// What every request needs.
pub struct App {
    /// The catalogue's database.
    pub db: Pool<Statements>,
    /// What must work before this service can.
    pub probes: Vec<Probe>,
}

impl App {
    /// Connects when it is first asked something: the service starts without its database.
    pub fn new(db: db::Config) -> Result<App> {
        let db = Pool::new(db, Statements::prepare);
        let asked = db.clone();
        let ping = move || asked.read(store::ping).map_err(|err| err.to_string());
        Ok(App { db, probes: vec![Probe::new("postgresql", ping)?] })
    }
}
