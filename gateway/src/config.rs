//! Every variable that the gateway reads.

use std::net::SocketAddr;
use std::time::Duration;

use chassis::env::Env;
use chassis::{broker, server};

/// The gateway's settings; `.env` explains each.
#[derive(Clone, Debug)]
pub struct Config {
    /// Its own door.
    pub http: server::Config,
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
        Config {
            http: server::Config::from_env(env, "GATEWAY"),
            forward: Forward {
                inventory: env.host_port("INVENTORY_HOST", "INVENTORY_PORT"),
                max_in_flight: env.number("GATEWAY_FORWARD_MAX_IN_FLIGHT", 192, 1..=10_000),
                connect_timeout: env.millis("GATEWAY_FORWARD_CONNECT_TIMEOUT_MS", 1000),
                timeout: env.millis("GATEWAY_FORWARD_TIMEOUT_MS", 5000),
                body_timeout: env.millis("GATEWAY_FORWARD_BODY_TIMEOUT_MS", 10_000),
            },
            publish: Publish {
                broker: broker::Config::from_env(env, "GATEWAY"),
                queue: env.text("RABBITMQ_QUEUE"),
                max_in_flight: env.number("GATEWAY_PUBLISH_MAX_IN_FLIGHT", 192, 1..=10_000),
                timeout: env.millis("GATEWAY_PUBLISH_TIMEOUT_MS", 3000),
            },
        }
    }
}
