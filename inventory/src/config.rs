//! Every variable that this service reads.

use chassis::{Env, db, logging, server};
use log::LevelFilter;

/// The settings of this service; `.env` explains each.
pub struct Config {
    /// Addresses and limits of the HTTP server.
    pub http: server::Config,
    /// The database.
    pub db: db::Config,
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
            db: db::Config::from_env(&mut env, "INVENTORY"),
            log_level: logging::level_from_env(&mut env),
        };
        env.finish(config)
    }
}
