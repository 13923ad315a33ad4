//! All SQL of the carts, one function a query.
//!
//! Each change locks the cart's row first, so changes of one cart come one after the other.

use chassis::db::{in_transaction, renew_deadline, undo};
use chassis::etag::Precondition;
use postgres::{Client, Error, Statement};

use super::cart::{MAX_LINES, StoredCart, StoredLine};
use crate::Db;
use crate::orders::store::versions;

/// The prepared statements of the carts.
pub struct Statements {
    select: Statement,
    touch: Statement,
}

impl Statements {
    /// Prepares them on a connection.
    pub fn prepare(client: &mut Client) -> Result<Statements, Error> {
        Ok(Statements { select: client.prepare(SELECT)?, touch: client.prepare(TOUCH)? })
    }
}

/// A change of one line.
#[derive(Clone, Copy, Debug)]
pub enum LineChange {
    /// So many more.
    Add(i32),
    /// Exactly so many.
    Set(i32),
    /// None any more.
    Remove,
}

/// The outcome of a change.
#[derive(Debug)]
pub enum Outcome {
    /// Done.
    Done,
    /// Not done: the cart has another version than the precondition allows.
    PreconditionFailed,
    /// Not done: the cart has [`MAX_LINES`] lines.
    TooManyLines,
    /// Not done: there would be more of the product than may be.
    TooMany,
    /// Not done: the cart has no such line.
    NoSuchLine,
}

const SELECT: &str = "
    select version, sku, quantity
    from carts left join cart_lines using (user_id)
    where user_id = $1
    order by position";

/// Locks the cart, which is made where there is none, and gives it a new version. Without a row the
/// precondition fails.
const TOUCH: &str = "
    insert into carts as cart (user_id, version)
    select $1, nextval('cart_versions')
    where $2::bigint[] is null or exists (select from carts where user_id = $1)
    on conflict (user_id) do update
    set version = excluded.version, updated_at = now()
    where ($2::bigint[] is null or cart.version = any($2)) and cart.version <> all($3::bigint[])
    returning version";

const ADD: &str = "
    insert into cart_lines as line (user_id, sku, quantity)
    select $1, $2, $3
    where exists (select from cart_lines where user_id = $1 and sku = $2)
    or (select count(*) from cart_lines where user_id = $1) < $5::bigint
    on conflict (user_id, sku) do update
    set quantity = line.quantity + excluded.quantity
    where line.quantity + excluded.quantity <= $4
    returning quantity";

const SET: &str = "
    insert into cart_lines as line (user_id, sku, quantity)
    select $1, $2, $3
    where exists (select from cart_lines where user_id = $1 and sku = $2)
    or (select count(*) from cart_lines where user_id = $1) < $4::bigint
    on conflict (user_id, sku) do update
    set quantity = excluded.quantity
    returning quantity";

/// A user's cart; an empty one where there is none.
pub fn select(db: &mut Db, user_id: i64) -> Result<StoredCart, Error> {
    let rows = db.client.query(&db.statements.carts.select, &[&user_id])?;
    let mut cart = StoredCart::default();
    for row in &rows {
        cart.version = row.try_get("version")?;
        if let Some(sku) = row.try_get("sku")? {
            cart.lines.push(StoredLine { sku, quantity: row.try_get("quantity")? });
        }
    }
    Ok(cart)
}

/// Changes one line of a cart.
pub fn change(
    db: &mut Db,
    user_id: i64,
    sku: &str,
    change: LineChange,
    max_quantity: i32,
    precondition: &Precondition,
) -> Result<Outcome, Error> {
    let precondition = precondition.of_instance(&db.statements.instance);
    let max_lines = MAX_LINES as i64;
    in_transaction(db, |db| {
        let (allowed, forbidden) = versions(&precondition);
        let touched =
            db.client.query_opt(&db.statements.carts.touch, &[&user_id, &allowed, &forbidden])?;
        if touched.is_none() {
            return Ok(Outcome::PreconditionFailed);
        }
        renew_deadline();
        let (client, most) = (&mut db.client, max_quantity);
        let row = match change {
            LineChange::Add(count) => {
                client.query_opt(ADD, &[&user_id, &sku, &count, &most, &max_lines])?
            }
            LineChange::Set(count) => {
                client.query_opt(SET, &[&user_id, &sku, &count, &max_lines])?
            }
            LineChange::Remove => {
                let delete = "delete from cart_lines where user_id = $1 and sku = $2
                    returning quantity";
                client.query_opt(delete, &[&user_id, &sku])?
            }
        };
        if row.is_some() {
            return Ok(Outcome::Done);
        }
        renew_deadline();
        let is_there = "select from cart_lines where user_id = $1 and sku = $2";
        let outcome = match (change, db.client.query_opt(is_there, &[&user_id, &sku])?) {
            (LineChange::Remove, _) => Outcome::NoSuchLine,
            (_, Some(_)) => Outcome::TooMany,
            (_, None) => Outcome::TooManyLines,
        };
        // A refused change leaves no new version.
        undo(db)?;
        Ok(outcome)
    })
}

/// Empties a cart.
pub fn empty(db: &mut Db, user_id: i64, precondition: &Precondition) -> Result<Outcome, Error> {
    let precondition = precondition.of_instance(&db.statements.instance);
    let (allowed, forbidden) = versions(&precondition);
    let delete = "delete from carts where user_id = $1
        and ($2::bigint[] is null or version = any($2)) and version <> all($3::bigint[])";
    let deleted = db.client.execute(delete, &[&user_id, &allowed, &forbidden])?;
    if deleted == 1 || precondition.is_empty() {
        return Ok(Outcome::Done);
    }
    renew_deadline();
    // An empty cart is emptied again, but not where a version was asked for.
    let is_there = db.client.query_opt("select from carts where user_id = $1", &[&user_id])?;
    let names_version = precondition.if_match.is_some();
    Ok(match is_there {
        None if !names_version => Outcome::Done,
        _ => Outcome::PreconditionFailed,
    })
}

/// Empties a cart if it still has this version; a part of the transaction that makes an order of it.
/// Whether it had.
pub fn take(db: &mut Db, user_id: i64, version: i64) -> Result<bool, Error> {
    renew_deadline();
    let delete = "delete from carts where user_id = $1 and version = $2";
    Ok(db.client.execute(delete, &[&user_id, &version])? == 1)
}
