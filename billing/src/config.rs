//! Every variable this service reads, once.

use std::time::Duration;

use chassis::env::Env;
use chassis::{broker, db, logging, server};
use log::LevelFilter;

/// The settings of this service; `.env` explains each.
#[derive(Clone, Debug)]
pub struct Config {
    /// Addresses of health and metrics.
    pub http: server::Config,
    /// The database.
    pub db: db::Config,
    /// The broker.
    pub broker: broker::Config,
    /// The queue; its dead letters are in [`Config::dead_letter_queue`].
    pub queue: String,
    /// The most messages that are booked in one transaction.
    pub batch_size: usize,
    /// The most memory for the bodies of prefetched messages, in MiB.
    pub prefetch_max_mb: usize,
    /// How long a batch that has begun waits for more.
    pub batch_wait: Duration,
    /// How long a message id is remembered.
    pub message_id_retention_days: i32,
    /// The lowest level that is logged.
    pub log_level: LevelFilter,
}

impl Config {
    /// Reads all variables; the error names everything that is missing or malformed.
    pub fn from_env(mut env: Env) -> anyhow::Result<Config> {
        let config = Config {
            http: server::Config::from_env(&mut env, "BILLING"),
            db: db::Config::from_env(&mut env, "BILLING"),
            broker: broker::Config::from_env(&mut env, "BILLING"),
            queue: env.required("RABBITMQ_QUEUE"),
            batch_size: env.number("BILLING_BATCH_SIZE", 500, 1..=10_000),
            prefetch_max_mb: env.number("BILLING_PREFETCH_MAX_MB", 128, 1..=4096),
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

    /// The queue of messages that cannot be booked.
    pub fn dead_letter_queue(&self) -> String {
        format!("{}.dead", self.queue)
    }
}
