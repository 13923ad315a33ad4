//! Every variable that the gateway reads.

use std::time::Duration;

use chassis::env::Env;
use chassis::upstream::{self, breaker};
use chassis::{broker, logging, server};
use log::LevelFilter;

use crate::cors::Origins;
use crate::rate_limit::Quota;
use crate::trusted_proxies::TrustedProxies;

/// The gateway's settings; `.env` explains each.
#[derive(Clone, Debug)]
pub struct Config {
    /// Addresses and limits of the HTTP server.
    pub http: server::Config,
    /// The proxies whose headers are trusted.
    pub trusted_proxies: TrustedProxies,
    /// The origins whose pages may use the API.
    pub cors: Origins,
    /// How many requests an address may make; without it any number.
    pub rate_limit: Option<Quota>,
    /// How many logins and the like an address may try; without it any number.
    pub login_rate_limit: Option<Quota>,
    /// How inventory is called.
    pub inventory: upstream::Config,
    /// How customers is called.
    pub customers: upstream::Config,
    /// How orders is called.
    pub orders: upstream::Config,
    /// How orders are published.
    pub publisher: Publisher,
    /// The lowest level that is logged.
    pub log_level: LevelFilter,
}

/// How orders are published.
#[derive(Clone, Debug)]
pub struct Publisher {
    /// The broker.
    pub broker: broker::Config,
    /// The queue for orders.
    pub queue: String,
    /// The most orders that may be unconfirmed at once.
    pub max_in_flight: usize,
    /// How long an order waits for its confirm.
    pub confirm_timeout: Duration,
}

impl Config {
    /// Reads all variables; the error names everything that is missing or malformed.
    pub fn from_env(mut env: Env) -> anyhow::Result<Config> {
        let config = Config {
            http: server::Config::from_env(&mut env, "GATEWAY"),
            trusted_proxies: trusted_proxies(&mut env),
            cors: cors(&mut env),
            rate_limit: rate_limit(&mut env, "GATEWAY_RATE_LIMIT"),
            login_rate_limit: rate_limit(&mut env, "GATEWAY_LOGIN_RATE_LIMIT"),
            inventory: upstream(&mut env, "INVENTORY", ("GATEWAY_UPSTREAM_MAX_IN_FLIGHT", 144)),
            customers: upstream(&mut env, "CUSTOMERS", ("GATEWAY_CUSTOMERS_MAX_IN_FLIGHT", 32)),
            orders: upstream(&mut env, "ORDERS", ("GATEWAY_ORDERS_MAX_IN_FLIGHT", 56)),
            publisher: Publisher {
                broker: broker::Config::from_env(&mut env, "GATEWAY"),
                queue: env.required("RABBITMQ_QUEUE"),
                max_in_flight: env.number("GATEWAY_PUBLISH_MAX_IN_FLIGHT", 192, 1..=10_000),
                confirm_timeout: env.millis("GATEWAY_PUBLISH_CONFIRM_TIMEOUT_MS", 3000),
            },
            log_level: logging::level_from_env(&mut env),
        };
        env.finish(config)
    }

    /// Lowers what does not fit in the descriptors that the process may have. Each client may need a
    /// connection to an upstream, and requests that wait for an upstream or the broker must leave
    /// some connections for all others.
    pub fn clamp_to_fd_limit(&mut self) {
        let wanted = self.http.limits.max_connections;
        self.http.clamp_to_fd_limit(2, 0);
        let connections = self.http.limits.max_connections;
        if connections < wanted {
            let most = (connections * 3 / 4).max(1);
            self.inventory.max_in_flight = self.inventory.max_in_flight.min(most);
            self.customers.max_in_flight = self.customers.max_in_flight.min((most / 4).max(1));
            self.orders.max_in_flight = self.orders.max_in_flight.min((most / 4).max(1));
            self.publisher.max_in_flight = self.publisher.max_in_flight.min(most);
        }
    }
}

/// An upstream by the prefix of its address; `most` is the setting of the most requests that may
/// wait for it, and the default. Together these leave connections for requests to other places.
fn upstream(env: &mut Env, prefix: &str, most: (&str, usize)) -> upstream::Config {
    let connect_timeout = env.millis("GATEWAY_UPSTREAM_CONNECT_TIMEOUT_MS", 1000);
    let response_timeout = env.millis("GATEWAY_UPSTREAM_RESPONSE_TIMEOUT_MS", 5000);
    upstream::Config {
        address: env.host_port(&format!("{prefix}_HOST"), &format!("{prefix}_PORT")),
        max_in_flight: env.number(most.0, most.1, 1..=10_000),
        connect_timeout,
        response_timeout,
        read_timeout: env.millis("GATEWAY_UPSTREAM_READ_TIMEOUT_MS", 10_000),
        breaker: breaker::Config {
            failure_threshold: env.number("GATEWAY_BREAKER_FAILURE_THRESHOLD", 5, 0..=10_000),
            open_for: env.millis("GATEWAY_BREAKER_OPEN_MS", 500),
            max_open_for: env.millis("GATEWAY_BREAKER_MAX_OPEN_MS", 2000),
            // By then a request for something small has failed.
            half_open_timeout: connect_timeout + response_timeout,
        },
    }
}

fn cors(env: &mut Env) -> Origins {
    let name = "GATEWAY_CORS_ORIGINS";
    let list = env.optional(name).unwrap_or_default();
    Origins::parse(&list).unwrap_or_else(|_| {
        env.error(&format!(
            "{name} must be *, or origins such as https://shop.example, separated by commas"
        ));
        Origins::default()
    })
}

fn trusted_proxies(env: &mut Env) -> TrustedProxies {
    let name = "GATEWAY_TRUSTED_PROXIES";
    let list = env.optional(name).unwrap_or_default();
    TrustedProxies::parse(&list).unwrap_or_else(|_| {
        env.error(&format!(
            "{name} must be addresses or networks such as 10.0.0.0/8, separated by commas"
        ));
        TrustedProxies::default()
    })
}

fn rate_limit(env: &mut Env, name: &str) -> Option<Quota> {
    let text = env.optional(name).filter(|text| text != "0")?;
    let rate = Quota::parse(&text);
    if rate.is_none() {
        env.error(&format!(
            "{name} must be REQUESTS/SECONDS, at most 1000000 and 86400, or 0 for no limit"
        ));
    }
    rate
}
