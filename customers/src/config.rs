//! Every variable that this service reads.

use std::net::SocketAddr;

use chassis::auth::SigningKeys;
use chassis::{Env, auth, db, logging, server};
use log::LevelFilter;

use crate::passwords;
use crate::sessions::store::Lifetimes;

/// The settings of this service; `.env` explains each.
pub struct Config {
    /// Addresses and limits of the HTTP server.
    pub http: server::Config,
    /// Where other services ask.
    pub internal_listen: SocketAddr,
    /// The database.
    pub db: db::Config,
    /// The keys that sign access tokens.
    pub keys: SigningKeys,
    /// Which access tokens are made and accepted.
    pub auth: auth::Config,
    /// How long sessions and tokens last.
    pub lifetimes: Lifetimes,
    /// How passwords are hashed.
    pub passwords: passwords::Config,
    /// The lowest level that is logged.
    pub log_level: LevelFilter,
}

impl Config {
    /// Reads all variables; the error names everything that is missing or malformed.
    pub fn from_env(mut env: Env) -> anyhow::Result<Config> {
        let mut http = server::Config::from_env(&mut env, "CUSTOMERS");
        http.limits = http.limits.with_proxy_headroom();
        let config = Config {
            http,
            internal_listen: env.host_port("CUSTOMERS_HOST", "CUSTOMERS_INTERNAL_PORT"),
            db: db::Config::from_env(&mut env, "CUSTOMERS"),
            keys: SigningKeys::from_env(&mut env, "CUSTOMERS_SIGNING_KEYS"),
            auth: auth::Config::from_env(&mut env),
            lifetimes: Lifetimes::from_env(&mut env),
            passwords: passwords::Config::from_env(&mut env),
            log_level: logging::level_from_env(&mut env),
        };
        env.finish(config)
    }
}
