//! The routes: health, and nothing else. Orders arrive by the queue.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};

use chassis::health::{self, Probe};
use chassis::router::{Route, RoutedResponse, dispatch, route};
use rouille::Request;

use crate::config::Config;
use crate::store;

/// What the routes need.
pub struct App {
    probes: Vec<Probe>,
}

const ROUTES: &[Route<App>] = &[
    route("GET", "/health", |_, _, _| Ok(health::liveness())),
    route("GET", "/health/ready", |app, _, _| Ok(health::readiness(&app.probes))),
];

impl App {
    /// `consuming` is true while the consumer hangs on the queue.
    pub fn new(config: &Config, consuming: Arc<AtomicBool>) -> anyhow::Result<App> {
        let (db, kept) = (config.db.clone(), Mutex::new(None));
        let database = Probe::new("postgresql", move || {
            let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            let mut client = match kept.take() {
                Some(client) => client,
                None => db.connect().map_err(|_| "no connection")?,
            };
            let writable = db.with_deadline(|| store::is_ready(&mut client));
            let writable = writable.map_err(|_| "the tables cannot be read")?;
            *kept = Some(client);
            if writable { Ok(()) } else { Err("the database is read-only".to_owned()) }
        })?;
        let queue = Probe::new("rabbitmq", move || match consuming.load(Ordering::SeqCst) {
            true => Ok(()),
            false => Err("not consuming".to_owned()),
        })?;
        Ok(App { probes: vec![database, queue] })
    }
}

/// Answers a request.
pub fn handle(app: &App, request: &Request) -> RoutedResponse {
    dispatch(ROUTES, app, request)
}
