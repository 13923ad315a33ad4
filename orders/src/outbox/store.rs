//! All SQL of the outbox, one function a query.

use std::time::SystemTime;

use postgres::{Client, Error, Row};
use uuid::Uuid;

use crate::Db;

/// A message that is not published yet.
#[derive(Debug)]
pub struct PendingMessage {
    /// The order of the messages.
    pub id: i64,
    /// The order that it is of.
    pub order_id: Uuid,
    /// By which a receiver recognises a repetition.
    pub message_id: String,
    /// Whether it goes to the queue of billing, and not to the exchange.
    pub is_for_queue: bool,
    /// At the exchange.
    pub routing_key: String,
    /// JSON.
    pub body: String,
    /// When it was written.
    pub created_at: SystemTime,
}

/// The oldest messages that are not published.
pub fn next(client: &mut Client, after: i64, rows: i64) -> Result<Vec<PendingMessage>, Error> {
    let select = "
        select id, order_id, message_id, target = 'queue' as is_for_queue, routing_key, body,
            created_at
        from outbox
        where published_at is null and id > $1
        order by id
        limit $2";
    let message = |row: &Row| {
        Ok(PendingMessage {
            id: row.try_get("id")?,
            order_id: row.try_get("order_id")?,
            message_id: row.try_get("message_id")?,
            is_for_queue: row.try_get("is_for_queue")?,
            routing_key: row.try_get("routing_key")?,
            body: row.try_get("body")?,
            created_at: row.try_get("created_at")?,
        })
    };
    client.query(select, &[&after, &rows])?.iter().map(message).collect()
}

/// Notes that these messages are published.
pub fn mark_published(client: &mut Client, ids: &[i64]) -> Result<(), Error> {
    let update = "update outbox set published_at = now() where id = any($1)";
    client.execute(update, &[&ids]).map(drop)
}

/// Has the messages of an order published once more; returns how many there are.
pub fn publish_again(client: &mut Client, order_id: Uuid) -> Result<u64, Error> {
    client.execute("update outbox set published_at = null where order_id = $1", &[&order_id])
}

/// How many messages wait, and the age of the oldest in seconds.
pub fn pending(db: &mut Db) -> Result<(i64, f64), Error> {
    let select = "
        select count(*), coalesce(extract(epoch from now() - min(created_at)), 0)::float8
        from outbox
        where published_at is null";
    let row = db.client.query_one(select, &[])?;
    Ok((row.try_get(0)?, row.try_get(1)?))
}

/// Deletes, of so many oldest messages, those that were published a week ago; returns how many there
/// were.
pub fn delete_published(db: &mut Db, rows: i64) -> Result<u64, Error> {
    let delete = "
        delete from outbox
        where id in (select id from outbox order by id limit $1)
        and published_at < now() - interval '7 days'";
    db.client.execute(delete, &[&rows])
}
