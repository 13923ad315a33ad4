//! Every variable this service reads, once.

use std::time::Duration;

use chassis::env::Env;
use chassis::{broker, db, logging, server};
use log::LevelFilter;

/// What an operator can decide.
#[derive(Clone, Debug)]
pub struct Config {
    /// Health and metrics.
    pub http: server::Config,
    /// Where orders are booked.
    pub db: db::Config,
    /// Where they come from.
    pub broker: broker::Config,
    /// The queue; its dead letters are in the one of [`Config::dead_queue`].
    pub queue: String,
    /// Most messages booked in one transaction.
    pub batch_size: usize,
    /// How long a batch that has begun waits for more.
    pub batch_wait: Duration,
    /// How long a message id is remembered.
    pub message_id_retention_days: i32,
    /// What is logged.
    pub log_level: LevelFilter,
}

impl Config {
    /// Reads them all, or fails with every fault there is.
    pub fn from_env(mut env: Env) -> anyhow::Result<Config> {
        let config = Config {
            http: server::Config::from_env(&mut env, "BILLING"),
            db: db::Config::from_env(&mut env, "BILLING"),
            broker: broker::Config::from_env(&mut env, "BILLING"),
            queue: env.required("RABBITMQ_QUEUE"),
            // The broker takes a prefetch of some batches, a 16-bit number.
            batch_size: env.number("BILLING_BATCH_SIZE", 500, 1..=10_000),
            batch_wait: env.millis("BILLING_BATCH_WAIT_MS", 5),
            message_id_retention_days: env.number(
                "BILLING_MESSAGE_ID_RETENTION_DAYS",
                30,
                1..=36_500,
            ),
            log_level: logging::level_from_env(&mut env),
        };
        env.finish(config)
    }

    /// Where messages go that cannot become orders.
    pub fn dead_queue(&self) -> String {
        format!("{}.dead", self.queue)
    }
}
