//! All SQL of the stock commands, one function a query.

use std::time::Duration;

use postgres::{Client, Error, Row};
use uuid::Uuid;

use super::Command;
use crate::Db;

/// A command that inventory has not answered yet.
#[derive(Debug)]
pub struct PendingCommand {
    /// The order of the commands.
    pub id: i64,
    /// The order.
    pub order_id: Uuid,
    /// What inventory must do.
    pub command: Command,
    /// How often it was sent.
    pub attempts: i32,
    /// Whether it may be sent now.
    pub is_due: bool,
}

/// Adds a command; a part of a transaction.
pub fn insert(client: &mut Client, order_id: Uuid, command: Command) -> Result<(), Error> {
    let insert = "insert into stock_commands (order_id, command) values ($1, $2)";
    client.execute(insert, &[&order_id, &command.as_str()]).map(drop)
}

/// The oldest commands, in their order: also those that are not due yet, because later ones of the same
/// order must wait for them.
pub fn next(client: &mut Client, rows: i64) -> Result<Vec<PendingCommand>, Error> {
    let select = "
        select id, order_id, command, attempts, next_at <= now() as is_due
        from stock_commands
        where done_at is null
        order by id
        limit $1";
    let command = |row: &Row| {
        Ok(PendingCommand {
            id: row.try_get("id")?,
            order_id: row.try_get("order_id")?,
            // A constraint of the table allows no other text.
            command: Command::parse(row.try_get("command")?).unwrap_or(Command::Release),
            attempts: row.try_get("attempts")?,
            is_due: row.try_get("is_due")?,
        })
    };
    client.query(select, &[&rows])?.iter().map(command).collect()
}

/// Notes that commands are done, each with what inventory has refused.
pub fn mark_done(client: &mut Client, done: &[(i64, Option<String>)]) -> Result<(), Error> {
    let ids: Vec<i64> = done.iter().map(|(id, _)| *id).collect();
    let errors: Vec<Option<&str>> = done.iter().map(|(_, error)| error.as_deref()).collect();
    let update = "
        update stock_commands
        set done_at = now(), attempts = attempts + 1, error = done.error
        from unnest($1::bigint[], $2::text[]) as done (id, error)
        where stock_commands.id = done.id";
    client.execute(update, &[&ids, &errors]).map(drop)
}

/// Notes that a command has failed and is sent again after a pause.
pub fn postpone(client: &mut Client, id: i64, pause: Duration, error: &str) -> Result<(), Error> {
    let update = "
        update stock_commands
        set attempts = attempts + 1, next_at = now() + $2 * interval '1 second', error = $3
        where id = $1";
    client.execute(update, &[&id, &pause.as_secs_f64(), &error]).map(drop)
}

/// How many commands wait, and the age of the oldest in seconds.
pub fn pending(db: &mut Db) -> Result<(i64, f64), Error> {
    let select = "
        select count(*), coalesce(extract(epoch from now() - min(created_at)), 0)::float8
        from stock_commands
        where done_at is null";
    let row = db.client.query_one(select, &[])?;
    Ok((row.try_get(0)?, row.try_get(1)?))
}

/// Deletes, of so many oldest commands, those that were done a week ago, unless inventory refused them;
/// returns how many there were.
pub fn delete_done(db: &mut Db, rows: i64) -> Result<u64, Error> {
    let delete = "
        delete from stock_commands
        where id in (select id from stock_commands order by id limit $1)
        and done_at < now() - interval '7 days' and error is null";
    db.client.execute(delete, &[&rows])
}
