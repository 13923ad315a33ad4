//! Every variable that this service reads.

use std::net::SocketAddr;
use std::time::Duration;

use chassis::decimal::Cents;
use chassis::upstream::{self, breaker};
use chassis::{Env, Secret, auth, broker, db, logging, server};
use log::LevelFilter;

use crate::pricing::{MAX_TOTAL, Pricing, TaxRate};

/// The settings of this service; `.env` explains each.
#[derive(Clone)]
pub struct Config {
    /// Addresses and limits of the HTTP server.
    pub http: server::Config,
    /// The database.
    pub db: db::Config,
    /// Which access tokens are accepted.
    pub auth: auth::Config,
    /// The internal API of inventory.
    pub inventory: upstream::Config,
    /// The internal API of customers.
    pub customers: upstream::Config,
    /// The broker.
    pub broker: broker::Config,
    /// The queue of billing.
    pub queue: String,
    /// The exchange that other services read events from.
    pub exchange: String,
    /// The secrets of webhooks.
    pub webhook_secrets: Vec<Secret>,
    /// What an order costs.
    pub pricing: Pricing,
    /// The limits of carts and orders.
    pub limits: Limits,
    /// The lowest level that is logged.
    pub log_level: LevelFilter,
}

/// The limits of carts and orders.
#[derive(Clone)]
pub struct Limits {
    /// The most pieces of one product.
    pub max_quantity: i64,
    /// How long a request may take, upstreams included.
    pub request_timeout: Duration,
    /// How long stock is held for an order that is being made.
    pub hold: Duration,
    /// How long an order waits for its payment.
    pub payment_ttl: Duration,
    /// How long the answer to an idempotency key is kept.
    pub key_retention: Duration,
}

impl Config {
    /// Reads all variables; the error names everything that is missing or malformed.
    pub fn from_env(mut env: Env) -> anyhow::Result<Config> {
        let mut http = server::Config::from_env(&mut env, "ORDERS");
        http.limits = http.limits.with_proxy_headroom();
        let limits = limits(&mut env);
        let config = Config {
            http,
            db: db::Config::from_env(&mut env, "ORDERS"),
            auth: auth::Config::from_env(&mut env),
            inventory: upstream(&mut env, "INVENTORY", limits.request_timeout),
            customers: upstream(&mut env, "CUSTOMERS", limits.request_timeout),
            broker: broker::Config::from_env(&mut env, "ORDERS"),
            queue: env.required("RABBITMQ_QUEUE"),
            exchange: env.required("ORDERS_RABBITMQ_EXCHANGE"),
            webhook_secrets: env.secrets("ORDERS_WEBHOOK_SECRETS"),
            pricing: pricing(&mut env),
            limits,
            log_level: logging::level_from_env(&mut env),
        };
        env.finish(config)
    }
}

fn limits(env: &mut Env) -> Limits {
    let seconds = |number: u64| Duration::from_secs(number);
    Limits {
        max_quantity: env.number("STORE_MAX_QUANTITY", 99, 1..=1_000_000),
        request_timeout: env.millis("ORDERS_REQUEST_TIMEOUT_MS", 4500),
        hold: seconds(env.number("ORDERS_HOLD_SECONDS", 300, 10..=86_400)),
        payment_ttl: seconds(60 * env.number("ORDERS_PAYMENT_TTL_MINUTES", 1440, 1..=525_600)),
        key_retention: seconds(
            3600 * env.number("ORDERS_IDEMPOTENCY_RETENTION_HOURS", 48, 1..=8760),
        ),
    }
}

/// The internal API of another service, by the prefix of its address.
fn upstream(env: &mut Env, prefix: &str, request_timeout: Duration) -> upstream::Config {
    let address: SocketAddr =
        env.host_port(&format!("{prefix}_HOST"), &format!("{prefix}_INTERNAL_PORT"));
    upstream::Config {
        address,
        max_in_flight: env.number("ORDERS_UPSTREAM_MAX_IN_FLIGHT", 64, 1..=10_000),
        connect_timeout: env.millis("ORDERS_UPSTREAM_CONNECT_TIMEOUT_MS", 1000),
        response_timeout: request_timeout,
        read_timeout: request_timeout,
        breaker: breaker::Config {
            failure_threshold: 5,
            open_for: Duration::from_millis(500),
            max_open_for: Duration::from_secs(2),
            half_open_timeout: request_timeout,
        },
    }
}

fn pricing(env: &mut Env) -> Pricing {
    let name = "STORE_TAX_PERCENT";
    let percent = env.optional(name).unwrap_or_else(|| "0".to_owned());
    let tax = TaxRate::parse(&percent).unwrap_or_else(|| {
        env.error(&format!("{name} must be 0 to 100 with at most three decimals"));
        TaxRate::default()
    });
    Pricing {
        currency: env.currency("STORE_CURRENCY"),
        shipping_cost: amount(env, "STORE_SHIPPING_COST").unwrap_or_default(),
        free_from: amount(env, "STORE_SHIPPING_FREE_FROM"),
        tax,
    }
}

fn amount(env: &mut Env, name: &str) -> Option<Cents> {
    let text = env.optional(name)?;
    let amount = Cents::parse(&text).filter(|amount| *amount <= MAX_TOTAL);
    if amount.is_none() {
        env.error(&format!("{name} must be an amount from 0.00 to {MAX_TOTAL}"));
    }
    amount
}
