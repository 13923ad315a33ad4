//! Deletes what has expired, in the background and in small steps, and frees memory that is not used.

use std::time::Duration;

use chassis::Stop;
use chassis::backoff::RetryLog;
use log::Level;

use super::store;
use crate::App;

/// The pause between two looks, and between two steps while there is more.
const INTERVAL: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(100);

/// The most rows of one step.
const ROWS: i64 = 500;

/// Runs until `stop`.
pub fn run(app: &App, stop: &Stop) {
    let mut log = RetryLog::default();
    while !stop.is_requested() {
        app.passwords.free_unused_memory();
        let pause = match app.db.write(|db| store::delete_expired(db, ROWS)) {
            Ok(deleted) => {
                log.succeeded();
                if deleted > 0 {
                    log::debug!("{deleted} expired rows were deleted");
                }
                if deleted >= ROWS as u64 { PAUSE } else { INTERVAL }
            }
            Err(err) => {
                log.failed(Level::Warn, "expired sessions are not deleted", &err.to_string())
            }
        };
        stop.sleep(pause);
    }
}
