//! Every variable that this service reads.

use chassis::{Env, db, logging, server};
use log::LevelFilter;

/// What the environment says.
pub struct Config {
    /// Where it listens, and the limits of the server.
    pub http: server::Config,
    /// Where the movies are.
    pub db: db::Config,
    /// How much is logged.
    pub log_level: LevelFilter,
}

impl Config {
    /// Reads it all, or names everything that is missing or malformed.
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
