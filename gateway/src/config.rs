//! Every variable that the gateway reads.

use std::net::SocketAddr;
use std::time::Duration;

use chassis::env::Env;
use chassis::{broker, server};

use crate::breaker;
use crate::limit::Rate;
use crate::proxies::Proxies;

/// The gateway's settings; `.env` explains each.
#[derive(Clone, Debug)]
pub struct Config {
    /// Its own door.
    pub http: server::Config,
    /// Whose word on where a request comes from is taken.
    pub proxies: Proxies,
    /// How often an address may ask; without it as often as it likes.
    pub rate_limit: Option<Rate>,
    /// How it asks inventory.
    pub forward: Forward,
    /// How it publishes.
    pub publish: Publish,
}

/// How the gateway asks inventory.
#[derive(Clone, Debug)]
pub struct Forward {
    /// Where inventory listens.
    pub inventory: SocketAddr,
    /// Requests that may wait for inventory at once.
    pub max_in_flight: usize,
    /// For the TCP connect.
    pub connect_timeout: Duration,
    /// From the request's begin to the head of the answer.
    pub timeout: Duration,
    /// For each further piece of the answer.
    pub body_timeout: Duration,
    /// When it is not asked for a while.
    pub breaker: breaker::Settings,
}

/// How the gateway publishes.
#[derive(Clone, Debug)]
pub struct Publish {
    /// Where the broker is.
    pub broker: broker::Config,
    /// The queue for orders.
    pub queue: String,
    /// Orders that may wait for their confirm at once.
    pub max_in_flight: usize,
    /// For the confirm.
    pub timeout: Duration,
}

impl Config {
    /// Reads them all.
    pub fn from_env(env: &mut Env) -> Config {
        let connect_timeout = env.millis("GATEWAY_UPSTREAM_CONNECT_TIMEOUT_MS", 1000);
        let timeout = env.millis("GATEWAY_UPSTREAM_RESPONSE_TIMEOUT_MS", 5000);
        Config {
            http: server::Config::from_env(env, "GATEWAY"),
            proxies: proxies(env),
            rate_limit: rate_limit(env),
            forward: Forward {
                inventory: env.host_port("INVENTORY_HOST", "INVENTORY_PORT"),
                max_in_flight: env.number("GATEWAY_UPSTREAM_MAX_IN_FLIGHT", 192, 1..=10_000),
                connect_timeout,
                timeout,
                body_timeout: env.millis("GATEWAY_UPSTREAM_READ_TIMEOUT_MS", 10_000),
                breaker: breaker::Settings {
                    failures: env.number("GATEWAY_BREAKER_FAILURE_THRESHOLD", 5, 0..=10_000),
                    pause: env.millis("GATEWAY_BREAKER_OPEN_MS", 500),
                    max_pause: env.millis("GATEWAY_BREAKER_MAX_OPEN_MS", 2000),
                    // By then a request for something small has failed.
                    trial: connect_timeout + timeout,
                },
            },
            publish: Publish {
                broker: broker::Config::from_env(env, "GATEWAY"),
                queue: env.required("RABBITMQ_QUEUE"),
                max_in_flight: env.number("GATEWAY_PUBLISH_MAX_IN_FLIGHT", 192, 1..=10_000),
                timeout: env.millis("GATEWAY_PUBLISH_CONFIRM_TIMEOUT_MS", 3000),
            },
        }
    }

    /// Lowers what does not fit in the descriptors that the process may have. Each
    /// client may need a connection to inventory, and whoever waits for inventory or the
    /// broker must still leave some places for everything else.
    pub fn fit_descriptors(&mut self) {
        let wanted = self.http.limits.max_connections;
        self.http.clamp_to_fd_limit(2, 0);
        let threads = self.http.limits.max_connections;
        if threads < wanted {
            let most = (threads * 3 / 4).max(1);
            self.forward.max_in_flight = self.forward.max_in_flight.min(most);
            self.publish.max_in_flight = self.publish.max_in_flight.min(most);
        }
    }
}

fn proxies(env: &mut Env) -> Proxies {
    let name = "GATEWAY_TRUSTED_PROXIES";
    let list = env.optional(name).unwrap_or_default();
    Proxies::parse(&list).unwrap_or_else(|_| {
        env.error(&format!(
            "{name} must be addresses or networks such as 10.0.0.0/8, separated by commas"
        ));
        Proxies::default()
    })
}

fn rate_limit(env: &mut Env) -> Option<Rate> {
    let name = "GATEWAY_RATE_LIMIT";
    let text = env.optional(name).filter(|text| text != "0")?;
    let rate = Rate::parse(&text);
    if rate.is_none() {
        env.error(&format!(
            "{name} must be REQUESTS/SECONDS, at most 1000000 and 86400, or 0 for no limit"
        ));
    }
    rate
}
