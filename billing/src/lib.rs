//! Books the orders that arrive in a queue, each once.

use std::sync::Arc;

use chassis::health::Probe;

pub mod config;
pub mod routes;

pub mod order;
pub mod store;

pub mod consumer;
pub mod dead_letters;
pub mod retention;

pub mod metrics;

use config::Config;

/// What the routes need.
pub struct App {
    /// The dependencies that readiness checks.
    pub probes: Vec<Probe>,
}

impl App {
    /// `status` is that of the consumer.
    pub fn new(config: &Config, status: Arc<consumer::Status>) -> anyhow::Result<App> {
        let database = Probe::new("postgresql", config.db.probe(store::check_readiness))?;
        let queue = Probe::new("rabbitmq", move || status.check())?;
        Ok(App { probes: vec![database, queue] })
    }
}
