//! Forgets old message ids in the background, in small pieces.

use std::time::Duration;

use chassis::Stop;

use crate::config::Config;
use crate::store::Store;

/// Between two rounds.
const PAUSE: Duration = Duration::from_secs(3600);

/// So few in one statement that nobody has to wait for it.
const CHUNK: i64 = 1000;

/// Deletes at start and then every hour, until `stop`.
pub fn run(config: &Config, stop: &Stop) {
    loop {
        match round(config, stop) {
            Ok(0) => (),
            Ok(forgotten) => log::info!("{forgotten} old message ids forgotten"),
            Err(err) => log::warn!("old message ids stay for another hour: {err}"),
        }
        if stop.sleep(PAUSE) {
            return;
        }
    }
}

/// One round on a connection of its own; returns how many ids went.
pub fn round(config: &Config, stop: &Stop) -> Result<u64, postgres::Error> {
    let mut store = Store::open(&config.db)?;
    let days = config.message_id_retention_days;
    config.db.with_deadline(|| store.forget_crashes(days))?;
    let mut forgotten = 0;
    while !stop.is_requested() {
        let some = config.db.with_deadline(|| store.forget_message_ids(days, CHUNK))?;
        forgotten += some;
        if some == 0 {
            break;
        }
    }
    Ok(forgotten)
}
