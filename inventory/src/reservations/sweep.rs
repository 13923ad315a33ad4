//! Gives back the stock of holds that were not confirmed in time, in small steps, and deletes old
//! reservations that reserve nothing. Two instances do it beside each other.

use std::time::Duration;

use chassis::Stop;
use chassis::backoff::RetryLog;
use chassis::db::Pool;
use log::Level;

use super::store;
use crate::Statements;

/// The pause between two looks, and between two steps while there is more.
const INTERVAL: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(10);

/// The most reservations of one step: their stock is locked meanwhile.
const ROWS: i64 = 100;

/// Runs until `stop`.
pub fn run(db: &Pool<Statements>, stop: &Stop) {
    let mut log = RetryLog::default();
    while !stop.is_requested() {
        let swept = db.write(|db| {
            let expired = store::expire(db, ROWS)?;
            Ok((expired, store::delete_ended(db, ROWS)?))
        });
        let pause = match swept {
            Ok((expired, deleted)) => {
                log.succeeded();
                if expired > 0 {
                    log::info!("{expired} reservations have expired");
                }
                if expired == ROWS || deleted == ROWS { PAUSE } else { INTERVAL }
            }
            Err(err) => log.failed(Level::Warn, "reservations do not expire", &err.to_string()),
        };
        stop.sleep(pause);
    }
}
