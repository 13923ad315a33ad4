//! Cancels orders that are not paid in time, forgets old idempotency keys and published messages, and
//! measures what waits. In small steps; two instances do it beside each other.

use std::time::{Duration, Instant, SystemTime};

use chassis::Stop;
use chassis::backoff::RetryLog;
use chassis::db::{in_transaction, renew_deadline};
use chassis::etag::Precondition;
use log::Level;
use postgres::Error;
use uuid::Uuid;

use super::change::{self, Change, Outcome};
use super::idempotency;
use super::store::Actor;
use crate::outbox::store as outbox;
use crate::stock::store as stock;
use crate::{App, Db, metrics};

/// The pause between two looks, and between two steps while there is more.
const INTERVAL: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(10);

/// The most rows of one step.
const ROWS: i64 = 50;

/// How often old rows are deleted.
const DELETE_INTERVAL: Duration = Duration::from_secs(30);

/// The most rows that are deleted at once.
const DELETE_ROWS: i64 = 5000;

/// The reason of a cancellation for lack of payment.
const REASON: &str = "payment expired";

/// Runs until `stop`.
pub fn run(app: &App, stop: &Stop) {
    let mut log = RetryLog::default();
    let mut deleted_at = Instant::now() - DELETE_INTERVAL;
    while !stop.is_requested() {
        let pause = match step(app, &mut deleted_at) {
            Ok(more) => {
                log.succeeded();
                if more { PAUSE } else { INTERVAL }
            }
            Err(err) => log.failed(Level::Warn, "orders do not expire", &err.to_string()),
        };
        stop.sleep(pause);
    }
}

/// Whether there may be more to do.
fn step(app: &App, deleted_at: &mut Instant) -> Result<bool, chassis::db::Error> {
    let canceled = app.db.write(|db| expire(db, app.limits.payment_ttl))?;
    if canceled > 0 {
        app.wake();
    }
    measure(app)?;
    let mut more = canceled == ROWS;
    if deleted_at.elapsed() >= DELETE_INTERVAL {
        let retention = app.limits.key_retention;
        let keys = app.db.write(|db| idempotency::delete_old(db, retention, DELETE_ROWS))?;
        let messages = app.db.write(|db| outbox::delete_published(db, DELETE_ROWS))?;
        let commands = app.db.write(|db| stock::delete_done(db, DELETE_ROWS))?;
        match [keys, messages, commands].contains(&(DELETE_ROWS as u64)) {
            true => more = true,
            false => *deleted_at = Instant::now(),
        }
    }
    Ok(more)
}

/// Cancels some orders that were not paid in time; returns how many.
pub fn expire(db: &mut Db, payment_ttl: Duration) -> Result<i64, Error> {
    in_transaction(db, |db| {
        let due = "
            select id
            from orders
            where status = 'pending' and id < $1
            order by id
            limit $2
            for update skip locked";
        let rows = db.client.query(due, &[&first_id_after(payment_ttl), &ROWS])?;
        for row in &rows {
            renew_deadline();
            let request = change::Request {
                order_id: row.try_get("id")?,
                owner: None,
                precondition: Precondition::default(),
                actor: Actor::Service,
                event_id: Uuid::now_v7(),
                change: Change::Cancel(Some(REASON.to_owned()), false),
            };
            match change::apply(db, &request)? {
                Outcome::Done(_) => (),
                other => log::warn!("order {} does not expire: {other:?}", request.order_id),
            }
        }
        Ok(rows.len() as i64)
    })
}

/// The least UUIDv7 of the time so long ago.
fn first_id_after(age: Duration) -> Uuid {
    let time = SystemTime::now() - age;
    let since_epoch = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    uuid::Builder::from_unix_timestamp_millis(since_epoch.as_millis() as u64, &[0; 10]).into_uuid()
}

/// Sets the gauges.
fn measure(app: &App) -> Result<(), chassis::db::Error> {
    let (messages, oldest) = app.db.read(outbox::pending)?;
    metrics::OUTBOX_PENDING.set(messages);
    metrics::OUTBOX_OLDEST.set(oldest);
    let (commands, oldest) = app.db.read(stock::pending)?;
    metrics::STOCK_PENDING.set(commands);
    metrics::STOCK_OLDEST.set(oldest);
    Ok(())
}
