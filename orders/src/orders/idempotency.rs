//! Idempotency keys: a request that is repeated under the same key makes one order, and gets the first
//! answer (IETF draft-ietf-httpapi-idempotency-key-header).
//!
//! The key is claimed before anything is done, together with the id of the order. An attempt that
//! failed or was killed is repeated with the same id, so what it has done already is not done again.

use std::time::Duration;

use chassis::db::{in_transaction, renew_deadline};
use postgres::{Client, Error, Statement};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::Db;
use crate::stock::Command;
use crate::stock::store as stock;

/// The prepared statements of the keys.
pub struct Statements {
    claim: Statement,
    select: Statement,
    answer: Statement,
}

impl Statements {
    /// Prepares them on a connection.
    pub fn prepare(client: &mut Client) -> Result<Statements, Error> {
        Ok(Statements {
            claim: client.prepare(CLAIM)?,
            select: client.prepare(SELECT)?,
            answer: client.prepare(ANSWER)?,
        })
    }
}

/// The key of a request.
#[derive(Clone, Debug)]
pub struct Key {
    /// Who asks.
    pub user_id: i64,
    /// The client's name for the request.
    pub key: String,
    /// SHA-256 of what the request wants.
    pub digest: Vec<u8>,
}

/// The answer that is kept with a key.
#[derive(Debug)]
pub struct Answer {
    /// The order.
    pub order_id: Uuid,
    /// The text of its entity tag.
    pub etag: String,
    /// Its JSON.
    pub body: String,
}

/// What a request may do.
#[derive(Debug)]
pub enum Claim {
    /// Make this order.
    Claimed(Uuid),
    /// Send this answer again.
    Answered(Answer),
    /// Nothing now: the first attempt is still running.
    Running,
    /// Nothing: the key belongs to another request.
    OtherRequest,
}

// A claim need not be on the disk: where PostgreSQL has lost it in a crash, the attempt that has made it
// finds that, and a repetition begins with another order. The other one's stock expires.
//
// A key whose attempt has failed or was given up is claimed again: by the same request with the same
// order, by another one with another.
const CLAIM: &str = "
    insert into idempotency_keys as known (user_id, key, digest, order_id, locked_until)
    select $1, $2, $3, $4, clock_timestamp() + $5::float8 * interval '1 second'
    from (select set_config('synchronous_commit', 'off', true)) as setting
    on conflict (user_id, key) do update
    set digest = excluded.digest,
        order_id = case
            when known.digest = excluded.digest then known.order_id
            else excluded.order_id
        end,
        locked_until = excluded.locked_until
    where known.answer is null and known.locked_until <= clock_timestamp()
    returning order_id";

const SELECT: &str = "
    select digest, order_id, etag, answer
    from idempotency_keys
    where user_id = $1 and key = $2";

const ANSWER: &str = "
    update idempotency_keys
    set etag = $4, answer = $5
    where user_id = $1 and key = $2 and order_id = $3 and answer is null";

/// The digest of a request: of what it does and its body, whatever the white space in that.
pub fn digest(action: &str, body: &str) -> Vec<u8> {
    let value: Result<serde_json::Value, _> = serde_json::from_str(body);
    let body = value.map_or_else(|_| body.to_owned(), |value| value.to_string());
    Sha256::digest(format!("{action}\n{body}")).to_vec()
}

/// Claims a key for a new order, for as long as an attempt may take.
pub fn claim(db: &mut Db, key: &Key, new_id: Uuid, attempt: Duration) -> Result<Claim, Error> {
    let Key { user_id, key: text, digest } = key;
    let statements = &db.statements.keys;
    let seconds = attempt.as_secs_f64();
    let claimed =
        db.client.query_opt(&statements.claim, &[user_id, text, digest, &new_id, &seconds])?;
    if let Some(row) = claimed {
        return Ok(Claim::Claimed(row.try_get("order_id")?));
    }
    renew_deadline();
    // It was deleted in between: the request may be sent again.
    let Some(row) = db.client.query_opt(&statements.select, &[user_id, text])? else {
        return Ok(Claim::Running);
    };
    if row.try_get::<_, &[u8]>("digest")? != digest.as_slice() {
        return Ok(Claim::OtherRequest);
    }
    let (etag, body): (Option<String>, Option<String>) =
        (row.try_get("etag")?, row.try_get("answer")?);
    Ok(match (etag, body) {
        (Some(etag), Some(body)) => {
            Claim::Answered(Answer { order_id: row.try_get("order_id")?, etag, body })
        }
        _ => Claim::Running,
    })
}

/// Keeps the answer with its key; whether the key still belongs to this order. A part of the
/// transaction that makes the order.
pub fn answer(db: &mut Db, key: &Key, answer: &Answer) -> Result<bool, Error> {
    renew_deadline();
    let Answer { order_id, etag, body } = answer;
    let kept = db
        .client
        .execute(&db.statements.keys.answer, &[&key.user_id, &key.key, order_id, etag, body])?;
    Ok(kept == 1)
}

/// After a failure: the next attempt may begin at once.
pub fn unlock(db: &mut Db, key: &Key, order_id: Uuid) -> Result<(), Error> {
    let unlock = "update idempotency_keys set locked_until = clock_timestamp()
        where user_id = $1 and key = $2 and order_id = $3 and answer is null";
    db.client.execute(unlock, &[&key.user_id, &key.key, &order_id]).map(drop)
}

/// After a refusal: forgets the key, and gives back the stock that is held for the order, unless
/// another attempt has made it.
pub fn forget(
    db: &mut Db,
    key: Option<&Key>,
    order_id: Uuid,
    holds_stock: bool,
) -> Result<(), Error> {
    in_transaction(db, |db| {
        if let Some(key) = key {
            let delete = "delete from idempotency_keys
                where user_id = $1 and key = $2 and order_id = $3 and answer is null";
            if db.client.execute(delete, &[&key.user_id, &key.key, &order_id])? == 0 {
                return Ok(());
            }
            renew_deadline();
        }
        match holds_stock {
            true => stock::insert(&mut db.client, order_id, Command::Release),
            false => Ok(()),
        }
    })
}

/// Deletes up to so many keys that are older than this; returns how many there were.
pub fn delete_old(db: &mut Db, age: Duration, rows: i64) -> Result<u64, Error> {
    let delete = "
        delete from idempotency_keys
        where (user_id, key) in (
            select user_id, key
            from idempotency_keys
            where created_at < now() - $1::float8 * interval '1 second'
            limit $2
            for update skip locked
        )";
    db.client.execute(delete, &[&age.as_secs_f64(), &rows])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn white_space_between_tokens_makes_no_other_request() {
        assert_eq!(digest("order", r#"{ "a" : 1 }"#), digest("order", r#"{"a":1}"#));
        assert_ne!(digest("order", r#"{"a":1}"#), digest("order", r#"{"a":2}"#));
        assert_ne!(digest("order", "{}"), digest("checkout", "{}"));
    }
}
