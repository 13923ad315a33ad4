//! The public API: forwards movies and products to inventory, accounts to customers, and carts and
//! orders to orders, publishes `/api/billing` to the queue, and serves the contract. It has no data of
//! its own.

use chassis::health::Probe;
use chassis::router::{self, RoutedResponse};
use chassis::upstream::Upstream;
use rouille::Request;

pub mod config;
pub mod routes;

pub mod billing;
pub mod docs;
pub mod proxy;

pub mod cors;
pub mod rate_limit;
pub mod trusted_proxies;

pub mod metrics;

use billing::idempotency::IdempotencyMemory;
use billing::publisher::{Publisher, Worker};
use config::Config;
use cors::Origins;
use rate_limit::RateLimiter;
use trusted_proxies::TrustedProxies;

/// What the routes need.
pub struct App {
    /// Has the movies and products.
    pub inventory: Upstream,
    /// Has the accounts and sessions.
    pub customers: Upstream,
    /// Has the carts and orders.
    pub orders: Upstream,
    /// Publishes orders.
    pub publisher: Publisher,
    /// Which body came with which idempotency key.
    pub idempotency: IdempotencyMemory,
    /// The proxies whose headers are trusted.
    pub trusted_proxies: TrustedProxies,
    /// The origins whose pages may use the API.
    pub cors: Origins,
    /// Limits requests by client address, where that is configured.
    pub rate_limiter: Option<RateLimiter>,
    /// The dependencies that readiness checks.
    pub probes: Vec<Probe>,
}

impl App {
    /// The application, and the worker that publishes for it.
    pub fn new(config: &Config) -> anyhow::Result<(App, Worker)> {
        let inventory = Upstream::new("inventory", config.inventory.clone());
        let customers = Upstream::new("customers", config.customers.clone());
        let orders = Upstream::new("orders", config.orders.clone());
        let (publisher, worker) = Publisher::new(&config.publisher);
        let probes = vec![
            Probe::new("inventory", inventory.probe())?,
            Probe::new("customers", customers.probe())?,
            Probe::new("orders", orders.probe())?,
            Probe::new("rabbitmq", publisher.probe())?,
        ];
        let proxies = config.trusted_proxies.clone();
        let rate_limiter =
            RateLimiter::new(config.rate_limit, config.login_rate_limit, proxies.clone());
        let app = App {
            inventory,
            customers,
            orders,
            publisher,
            idempotency: IdempotencyMemory::default(),
            trusted_proxies: proxies,
            cors: config.cors.clone(),
            rate_limiter,
            probes,
        };
        Ok((app, worker))
    }

    /// Answers a request.
    pub fn handle(&self, request: &Request) -> RoutedResponse {
        let dispatch = || router::dispatch(routes::ROUTES, self, request);
        self.cors.handle(request, || match &self.rate_limiter {
            Some(limiter) => limiter.limit(request, dispatch),
            None => dispatch(),
        })
    }
}
