//! Deletes old message ids in the background.

use std::time::Duration;

use chassis::Stop;

use crate::config::Config;
use crate::store::Store;

/// How often it runs.
const PURGE_INTERVAL: Duration = Duration::from_secs(3600);

/// How many ids one statement deletes: so few that no other statement waits for it.
const PURGE_BATCH: i64 = 1000;

/// Deletes at the start and then every hour, until `stop`.
pub fn run(config: &Config, stop: &Stop) {
    loop {
        match purge_once(config, stop) {
            Ok(0) => (),
            Ok(deleted) => log::info!("{deleted} old message ids deleted"),
            Err(err) => log::warn!("old message ids are not deleted for another hour: {err}"),
        }
        if stop.sleep(PURGE_INTERVAL) {
            return;
        }
    }
}

/// Deletes once, on a connection of its own; returns how many message ids.
pub fn purge_once(config: &Config, stop: &Stop) -> Result<u64, postgres::Error> {
    let mut store = Store::open(&config.db)?;
    let days = config.message_id_retention_days;
    config.db.with_deadline(|| store.purge_recovery_tables(days))?;
    let mut deleted = 0;
    while !stop.is_requested() {
        let batch = config.db.with_deadline(|| store.purge_message_ids(days, PURGE_BATCH))?;
        deleted += batch;
        if batch == 0 {
            break;
        }
    }
    Ok(deleted)
}
