//! Every variable that this service reads.

use std::net::SocketAddr;

use chassis::{Env, auth, db, logging, server};
use log::LevelFilter;

/// The settings of this service; `.env` explains each.
pub struct Config {
    /// Addresses and limits of the HTTP server.
    pub http: server::Config,
    /// Where other services ask.
    pub internal_listen: SocketAddr,
    /// The database.
    pub db: db::Config,
    /// Which access tokens are accepted.
    pub auth: auth::Config,
    /// The internal API of customers, for keys and ended sessions.
    pub customers: SocketAddr,
    /// The currency of all prices, ISO 4217.
    pub currency: String,
    /// `Cache-Control` of products.
    pub products_cache_control: String,
    /// The lowest level that is logged.
    pub log_level: LevelFilter,
}

impl Config {
    /// Reads all variables; the error names everything that is missing or malformed.
    pub fn from_env(mut env: Env) -> anyhow::Result<Config> {
        let mut http = server::Config::from_env(&mut env, "INVENTORY");
        http.limits = http.limits.with_proxy_headroom();
        let config = Config {
            http,
            internal_listen: env.host_port("INVENTORY_HOST", "INVENTORY_INTERNAL_PORT"),
            db: db::Config::from_env(&mut env, "INVENTORY"),
            auth: auth::Config::from_env(&mut env),
            customers: env.host_port("CUSTOMERS_HOST", "CUSTOMERS_INTERNAL_PORT"),
            currency: env.currency("STORE_CURRENCY"),
            products_cache_control: cache_control(&mut env),
            log_level: logging::level_from_env(&mut env),
        };
        env.finish(config)
    }
}

fn cache_control(env: &mut Env) -> String {
    let name = "INVENTORY_PRODUCTS_CACHE_CONTROL";
    let value = env.optional(name).unwrap_or_else(|| "no-cache".to_owned());
    if !value.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        env.error(&format!("{name} must be a value of the header Cache-Control"));
    }
    value
}
