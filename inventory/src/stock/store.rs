//! All SQL of the stock. These are changes by hand, so nothing is prepared in advance.

use chassis::db::{in_transaction, renew_deadline};
use chassis::etag::Precondition;
use chassis::response::timestamp;
use postgres::error::SqlState;
use postgres::{Error, Row};
use serde::Serialize;

use crate::Db;

/// The most of one product that may be on hand; a constraint of the table says the same.
pub const MAX_ON_HAND: i32 = 1_000_000_000;

/// How many there are of one product. The order of the fields is that of the answers.
#[derive(Debug, Serialize)]
pub struct Stock {
    /// The product.
    pub sku: String,
    /// How many are there.
    pub on_hand: i32,
    /// How many of these are reserved for orders.
    pub reserved: i32,
    /// How many can be ordered.
    pub available: i32,
    /// RFC 3339 in UTC with milliseconds.
    pub updated_at: String,
}

/// One change by an administrator. The order of the fields is that of the answers.
#[derive(Debug, Serialize)]
pub struct Adjustment {
    /// Assigned by the database, in the order of the changes of one product.
    pub id: i64,
    /// The product.
    pub sku: String,
    /// What was added.
    pub change: i32,
    /// How many there were after it.
    pub on_hand: i32,
    /// Why.
    pub reason: String,
    /// By whom.
    pub user_id: i64,
    /// RFC 3339 in UTC with milliseconds.
    pub created_at: String,
}

/// What the changes have in common.
#[derive(Debug)]
pub struct Change<'a> {
    /// The product.
    pub sku: &'a str,
    /// By whom.
    pub user_id: i64,
    /// Why.
    pub reason: &'a str,
    /// The client's name for its request.
    pub key: Option<&'a str>,
}

/// Why the stock was not changed.
#[derive(Debug)]
pub enum Refusal {
    /// There is no such product.
    NotFound,
    /// The stock has another version.
    PreconditionFailed,
    /// More are reserved than there would be.
    BelowReserved(Stock),
    /// There would be more than the limit.
    TooMany,
    /// The key named another change.
    KeyUsed,
}

/// The result of a change.
pub type Outcome<T> = Result<T, Refusal>;

macro_rules! stock_columns {
    () => {
        "stock.sku, on_hand, reserved, stock.updated_at, stock.xmin::text as version"
    };
}

macro_rules! adjustment_columns {
    () => {
        "id, sku, change, on_hand, reason, user_id, created_at"
    };
}

const SELECT: &str = concat!(
    "select ",
    stock_columns!(),
    "
    from stock join products using (sku)
    where sku = $1 and retired_at is null"
);

const SELECT_FOR_UPDATE: &str = concat!(
    "select ",
    stock_columns!(),
    "
    from stock join products using (sku)
    where sku = $1 and retired_at is null
    for no key update of stock"
);

const SET: &str = concat!(
    "update stock set on_hand = $2, updated_at = now()
    where sku = $1
    returning ",
    stock_columns!()
);

const ADD: &str = concat!(
    "insert into stock_adjustments (sku, change, on_hand, reason, user_id, idempotency_key)
    values ($1, $2, $3, $4, $5, $6)
    returning ",
    adjustment_columns!()
);

const BY_KEY: &str = concat!(
    "select ",
    adjustment_columns!(),
    " from stock_adjustments where user_id = $1 and idempotency_key = $2"
);

const PAGE: &str = concat!(
    "select ",
    adjustment_columns!(),
    "
    from stock_adjustments
    where sku = $1 and id < $2
    order by id desc
    limit $3"
);

/// The stock of a product and its version.
pub fn select(db: &mut Db, sku: &str) -> Result<Option<(Stock, String)>, Error> {
    let row = db.client.query_opt(SELECT, &[&sku])?;
    row.as_ref().map(|row| versioned(db, row)).transpose()
}

/// Sets the stock if the precondition allows its version.
pub fn set(
    db: &mut Db,
    change: &Change,
    on_hand: i32,
    precondition: &Precondition,
) -> Result<Outcome<(Stock, String)>, Error> {
    in_transaction(db, |db| {
        let Some((stock, version)) = lock(db, change.sku)? else {
            return Ok(Err(Refusal::NotFound));
        };
        let excluded = precondition.if_none_match.contains(&version);
        let included = precondition.if_match.as_ref().is_none_or(|tags| tags.contains(&version));
        if excluded || !included {
            return Ok(Err(Refusal::PreconditionFailed));
        }
        if on_hand < stock.reserved {
            return Ok(Err(Refusal::BelowReserved(stock)));
        }
        add(db, change, on_hand - stock.on_hand, on_hand)?;
        Ok(Ok(write(db, change.sku, on_hand)?))
    })
}

/// Adds to the stock, or takes from it; returns the adjustment, and whether it had been made before
/// under the same key.
pub fn adjust(
    db: &mut Db,
    change: &Change,
    amount: i32,
) -> Result<Outcome<(Adjustment, bool)>, Error> {
    let adjusted = in_transaction(db, |db| {
        // The lock makes adjustments of one product wait for each other: a repetition sees the first one.
        let Some((stock, _)) = lock(db, change.sku)? else {
            return Ok(Err(Refusal::NotFound));
        };
        if let Some(done) = repeated(db, change, amount)? {
            return Ok(done);
        }
        let Some(on_hand) = stock.on_hand.checked_add(amount).filter(|sum| *sum <= MAX_ON_HAND)
        else {
            return Ok(Err(Refusal::TooMany));
        };
        if on_hand < stock.reserved {
            return Ok(Err(Refusal::BelowReserved(stock)));
        }
        let adjustment = add(db, change, amount, on_hand)?;
        write(db, change.sku, on_hand)?;
        Ok(Ok((adjustment, false)))
    });
    match adjusted {
        // At the same time the key was used for another product.
        Err(err) if err.code() == Some(&SqlState::UNIQUE_VIOLATION) => Ok(Err(Refusal::KeyUsed)),
        adjusted => adjusted,
    }
}

/// The adjustments of a product with lower ids than this one, the newest first; `None` where there is
/// no such product.
pub fn adjustments(
    db: &mut Db,
    sku: &str,
    before: i64,
    rows: i64,
) -> Result<Option<Vec<Adjustment>>, Error> {
    if db.client.query_opt(SELECT, &[&sku])?.is_none() {
        return Ok(None);
    }
    renew_deadline();
    let rows = db.client.query(PAGE, &[&sku, &before, &rows])?;
    rows.iter().map(adjustment).collect::<Result<_, _>>().map(Some)
}

/// The adjustment that was made under the key of this one, if there is one.
fn repeated(
    db: &mut Db,
    change: &Change,
    amount: i32,
) -> Result<Option<Outcome<(Adjustment, bool)>>, Error> {
    let Some(key) = change.key else { return Ok(None) };
    renew_deadline();
    let row = db.client.query_opt(BY_KEY, &[&change.user_id, &key])?;
    let Some(row) = row else { return Ok(None) };
    let done = adjustment(&row)?;
    let is_same = (&*done.sku, done.change, &*done.reason) == (change.sku, amount, change.reason);
    Ok(Some(if is_same { Ok((done, true)) } else { Err(Refusal::KeyUsed) }))
}

fn lock(db: &mut Db, sku: &str) -> Result<Option<(Stock, String)>, Error> {
    renew_deadline();
    let row = db.client.query_opt(SELECT_FOR_UPDATE, &[&sku])?;
    row.as_ref().map(|row| versioned(db, row)).transpose()
}

fn write(db: &mut Db, sku: &str, on_hand: i32) -> Result<(Stock, String), Error> {
    renew_deadline();
    let row = db.client.query_one(SET, &[&sku, &on_hand])?;
    versioned(db, &row)
}

fn add(db: &mut Db, change: &Change, amount: i32, on_hand: i32) -> Result<Adjustment, Error> {
    let Change { sku, user_id, reason, key } = change;
    renew_deadline();
    adjustment(&db.client.query_one(ADD, &[sku, &amount, &on_hand, reason, user_id, key])?)
}

fn versioned(db: &Db, row: &Row) -> Result<(Stock, String), Error> {
    let (on_hand, reserved): (i32, i32) = (row.try_get("on_hand")?, row.try_get("reserved")?);
    let stock = Stock {
        sku: row.try_get("sku")?,
        on_hand,
        reserved,
        available: on_hand - reserved,
        updated_at: timestamp(row.try_get("updated_at")?),
    };
    let version = format!("{}-{}", db.statements.instance, row.try_get::<_, &str>("version")?);
    Ok((stock, version))
}

fn adjustment(row: &Row) -> Result<Adjustment, Error> {
    Ok(Adjustment {
        id: row.try_get("id")?,
        sku: row.try_get("sku")?,
        change: row.try_get("change")?,
        on_hand: row.try_get("on_hand")?,
        reason: row.try_get("reason")?,
        user_id: row.try_get("user_id")?,
        created_at: timestamp(row.try_get("created_at")?),
    })
}
