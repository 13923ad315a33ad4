//! All SQL of the reservations.
//!
//! Locks are taken in one order: reservations by order id, then stock by sku. So no two transactions
//! wait for each other.
//!
//! A parameter that is an array stands in a subquery, `(select $1::text[])`. Otherwise the planner sees how
//! many elements it has, and plans the statement anew for each execution, which costs more than executing
//! it.

use std::collections::{BTreeMap, HashMap};
use std::time::SystemTime;

use chassis::db::{in_transaction, in_transaction_with, renew_deadline};
use chassis::response::timestamp;
use postgres::types::ToSql;
use postgres::{Client, Error, Row, Statement};
use uuid::Uuid;

use super::reservation::{Hold, HoldLine, Line, Reservation, Shortage, State};
use crate::Db;

/// The prepared statements of the reservations.
pub struct Statements {
    claim: Statement,
    lock_stock: Statement,
    take: Statement,
    select: Statement,
    confirm: Statement,
    commit: Statement,
    release: Statement,
    expire: Statement,
    delete_ended: Statement,
}

impl Statements {
    /// Prepares them on a connection.
    pub fn prepare(client: &mut Client) -> Result<Statements, Error> {
        Ok(Statements {
            claim: client.prepare(CLAIM)?,
            lock_stock: client.prepare(LOCK_STOCK)?,
            take: client.prepare(TAKE)?,
            select: client.prepare(SELECT)?,
            confirm: client.prepare(CONFIRM)?,
            commit: client.prepare(COMMIT)?,
            release: client.prepare(RELEASE)?,
            expire: client.prepare(EXPIRE)?,
            delete_ended: client.prepare(DELETE_ENDED)?,
        })
    }
}

/// Why a call changed nothing.
#[derive(Clone, Debug, PartialEq)]
pub enum Refusal {
    /// There is no reservation for this order.
    NotFound,
    /// These lines, by their place, name no product that can be ordered.
    Unknown(Vec<(usize, String)>),
    /// There is not enough for these lines.
    Short(Vec<Shortage>),
    /// The reservation, which is in this state, has other lines.
    OtherLines(State),
    /// A reservation in this state does not allow the call.
    State(State),
}

/// The result of a call.
pub type Outcome<T> = Result<T, Refusal>;

// In the order of the ids: another instance that inserts the same ones waits and does not lock
// against this one.
const CLAIM: &str = "
    insert into reservations (order_id, state, expires_at)
    select order_id, 'held', now() + make_interval(secs => seconds)
    from unnest((select $1::uuid[]), (select $2::float8[])) as claims (order_id, seconds)
    order by order_id
    on conflict (order_id) do nothing
    returning order_id, expires_at";

const LOCK_KNOWN: &str = "
    select order_id, state
    from reservations
    where order_id = any($1)
    order by order_id
    for update";

const HOLD_AGAIN: &str = "
    update reservations
    set state = 'held', expires_at = now() + make_interval(secs => $2), updated_at = now()
    where order_id = $1
    returning expires_at";

const DELETE_CLAIMS: &str = "delete from reservations where order_id = any($1)";

// The rows are sorted first and locked in that order, and then have their newest values.
const LOCK_STOCK: &str = "
    select sku, on_hand - reserved as available, name, price::text,
        retired_at is not null as retired
    from stock join products using (sku)
    where sku = any((select $1::text[])::text[])
    order by sku
    for no key update of stock";

// The rows of the stock are locked, and their numbers were checked: a constraint of the table
// makes sure of it.
const TAKE: &str = "
    with taken as (
        update stock
        set reserved = reserved + wanted.quantity, updated_at = now()
        from unnest((select $1::text[]), (select $2::int[])) as wanted (sku, quantity)
        where stock.sku = wanted.sku
    )
    insert into reservation_lines (order_id, position, sku, quantity, name, unit_price)
    select order_id, position, sku, quantity, name, price::numeric
    from unnest((select $3::uuid[]), (select $4::int[]), (select $5::text[]), (select $6::int[]),
            (select $7::text[]), (select $8::text[]))
        as lines (order_id, position, sku, quantity, name, price)
    on conflict (order_id, sku) do update
    set name = excluded.name, unit_price = excluded.unit_price";

const SELECT: &str = "
    select order_id, state, expires_at, sku, name, unit_price::text, quantity
    from reservations join reservation_lines using (order_id)
    where order_id = any($1)
    order by order_id, position";

const CONFIRM: &str = "
    update reservations
    set state = 'confirmed', expires_at = null, updated_at = now()
    where order_id = $1 and state = 'held'";

const CONFIRM_EXPIRED: &str = "
    update reservations
    set state = 'confirmed', updated_at = now()
    where order_id = $1 and state = 'expired'";

/// Changes the state of the reservation $1, and then its stock, which is locked in the order of sku.
macro_rules! end {
    ($state:literal, $from:literal, $stock:literal) => {
        concat!(
            "
    with ended as (
        update reservations
        set state = '",
            $state,
            "', expires_at = null, updated_at = now()
        where order_id = $1 and state in (",
            $from,
            ")
        returning order_id
    ), locked as (
        select sku, quantity
        from ended join reservation_lines using (order_id) join stock using (sku)
        order by sku
        for no key update of stock
    )
    update stock
    set ",
            $stock,
            ", updated_at = now()
    from locked
    where stock.sku = locked.sku"
        )
    };
}

const COMMIT: &str = end!(
    "committed",
    "'confirmed'",
    "on_hand = on_hand - quantity, reserved = reserved - quantity"
);
const RELEASE: &str = end!("released", "'held', 'confirmed'", "reserved = reserved - quantity");

const RELEASE_EXPIRED: &str = "
    update reservations
    set state = 'released', updated_at = now()
    where order_id = $1 and state = 'expired'";

const EXPIRE: &str = "
    with due as (
        select order_id
        from reservations
        where state = 'held' and expires_at <= now()
        order by expires_at
        limit $1
        for update skip locked
    ), expired as (
        update reservations
        set state = 'expired', expires_at = null, updated_at = now()
        where order_id in (select order_id from due)
        returning order_id
    ), freed as (
        select sku, sum(quantity)::int as quantity
        from expired join reservation_lines using (order_id)
        group by sku
    ), locked as (
        select stock.sku
        from stock
        where sku in (select sku from freed)
        order by sku
        for no key update
    ), given_back as (
        update stock
        set reserved = reserved - freed.quantity, updated_at = now()
        from freed join locked using (sku)
        where stock.sku = freed.sku
    )
    select count(*) from expired";

const DELETE_ENDED: &str = "
    with old as (
        select order_id
        from reservations
        where state in ('released', 'expired') and updated_at < now() - interval '7 days'
        limit $1
        for update skip locked
    ), deleted as (
        delete from reservations
        where order_id in (select order_id from old)
        returning order_id
    )
    select count(*) from deleted";

/// For holds that are sent together: what is locked for long fails with `lock_not_available`.
pub const SHORT_LOCK_TIMEOUT: &str = "set local lock_timeout = '100ms'";

/// Holds stock for orders, each of them for itself: all its lines or none, first come, first served.
/// The order ids are all different. Holding again what is held or confirmed changes nothing.
/// `settings` are those of the transaction.
pub fn hold(
    db: &mut Db,
    holds: &[&Hold],
    settings: &str,
) -> Result<Vec<Outcome<Reservation>>, Error> {
    in_transaction_with(db, settings, |db| {
        let claimed = claim(db, holds)?;
        let known = known(db, holds, &claimed)?;
        let needs_stock = |hold: &&&Hold| match known.get(&hold.order_id) {
            Some(known) => known.state == State::Expired && has_lines(known, hold),
            None => claimed.contains_key(&hold.order_id),
        };
        let asking: Vec<&Hold> = holds.iter().filter(needs_stock).copied().collect();
        let mut stock = lock_stock(db, asking.iter().flat_map(|hold| &hold.lines))?;
        let mut outcomes: HashMap<Uuid, Outcome<Vec<Line>>> = HashMap::new();
        for hold in &asking {
            outcomes.insert(hold.order_id, stock.take(&hold.lines, true));
        }
        let taken = asking.iter().filter_map(|hold| {
            let lines = outcomes.get(&hold.order_id)?.as_ref().ok()?;
            Some((hold.order_id, lines.as_slice()))
        });
        write_taken(db, &stock, &taken.collect::<Vec<_>>())?;
        let is_refused = |id: &&Uuid| outcomes.get(id).is_some_and(Result::is_err);
        let refused: Vec<Uuid> = claimed.keys().filter(is_refused).copied().collect();
        if !refused.is_empty() {
            renew_deadline();
            db.client.execute(DELETE_CLAIMS, &[&refused])?;
        }
        holds
            .iter()
            .map(|hold| {
                let lines = match outcomes.remove(&hold.order_id) {
                    Some(Ok(lines)) => lines,
                    Some(Err(refusal)) => return Ok(Err(refusal)),
                    None => return Ok(repeated(hold, known.get(&hold.order_id))),
                };
                let expires_at = match claimed.get(&hold.order_id) {
                    Some(expires_at) => *expires_at,
                    None => hold_again(db, hold)?,
                };
                Ok(Ok(Reservation {
                    order_id: hold.order_id,
                    state: State::Held,
                    expires_at: Some(timestamp(expires_at)),
                    lines,
                }))
            })
            .collect()
    })
}

/// The reservation of an order.
pub fn select(db: &mut Db, order_id: Uuid) -> Result<Option<Reservation>, Error> {
    Ok(select_all(db, &[order_id])?.remove(&order_id))
}

/// Makes a reservation last until it is committed or released. One that has expired is held again
/// where there is still enough.
pub fn confirm(db: &mut Db, order_id: Uuid) -> Result<Outcome<()>, Error> {
    if db.client.execute(&db.statements.reservations.confirm, &[&order_id])? == 1 {
        return Ok(Ok(()));
    }
    in_transaction(db, |db| {
        let state = lock_states(db, &[order_id])?.remove(&order_id);
        match state {
            None => return Ok(Err(Refusal::NotFound)),
            Some(State::Confirmed) => return Ok(Ok(())),
            Some(State::Expired) => (),
            Some(state) => return Ok(Err(Refusal::State(state))),
        }
        let Some(reservation) = select(db, order_id)? else { return Ok(Err(Refusal::NotFound)) };
        let line = |line: &Line| HoldLine { sku: line.sku.clone(), quantity: line.quantity };
        let lines: Vec<HoldLine> = reservation.lines.iter().map(line).collect();
        let mut stock = lock_stock(db, lines.iter())?;
        // The order was made while the product was sold, so one that was retired since will do; and
        // its lines keep their prices.
        if let Err(refusal) = stock.take(&lines, false) {
            return Ok(Err(refusal));
        }
        write_taken(db, &stock, &[(order_id, &reservation.lines)])?;
        renew_deadline();
        db.client.execute(CONFIRM_EXPIRED, &[&order_id])?;
        Ok(Ok(()))
    })
}

/// Takes what is reserved out of the stock.
pub fn commit(db: &mut Db, order_id: Uuid) -> Result<Outcome<()>, Error> {
    if db.client.execute(&db.statements.reservations.commit, &[&order_id])? > 0 {
        return Ok(Ok(()));
    }
    Ok(match state(db, order_id)? {
        None => Err(Refusal::NotFound),
        Some(State::Committed) => Ok(()),
        Some(state) => Err(Refusal::State(state)),
    })
}

/// Gives back what is reserved.
pub fn release(db: &mut Db, order_id: Uuid) -> Result<Outcome<()>, Error> {
    if db.client.execute(&db.statements.reservations.release, &[&order_id])? > 0 {
        return Ok(Ok(()));
    }
    renew_deadline();
    db.client.execute(RELEASE_EXPIRED, &[&order_id])?;
    Ok(match state(db, order_id)? {
        None => Err(Refusal::NotFound),
        Some(State::Released) => Ok(()),
        Some(state) => Err(Refusal::State(state)),
    })
}

/// Gives back the stock of up to so many holds that have expired; returns how many there were.
pub fn expire(db: &mut Db, rows: i64) -> Result<i64, Error> {
    renew_deadline();
    db.client.query_one(&db.statements.reservations.expire, &[&rows])?.try_get(0)
}

/// Deletes up to so many reservations that ended a week ago; returns how many there were.
pub fn delete_ended(db: &mut Db, rows: i64) -> Result<i64, Error> {
    renew_deadline();
    db.client.query_one(&db.statements.reservations.delete_ended, &[&rows])?.try_get(0)
}

/// Inserts a reservation for each order that has none; returns when these expire.
fn claim(db: &mut Db, holds: &[&Hold]) -> Result<HashMap<Uuid, SystemTime>, Error> {
    let ids: Vec<Uuid> = holds.iter().map(|hold| hold.order_id).collect();
    let seconds: Vec<f64> = holds.iter().map(|hold| hold.duration.as_secs_f64()).collect();
    renew_deadline();
    let rows = db.client.query(&db.statements.reservations.claim, &[&ids, &seconds])?;
    rows.iter().map(|row| Ok((row.try_get("order_id")?, row.try_get("expires_at")?))).collect()
}

/// The reservations that were there before, locked.
fn known(
    db: &mut Db,
    holds: &[&Hold],
    claimed: &HashMap<Uuid, SystemTime>,
) -> Result<HashMap<Uuid, Reservation>, Error> {
    let ids = holds.iter().map(|hold| hold.order_id);
    let ids: Vec<Uuid> = ids.filter(|id| !claimed.contains_key(id)).collect();
    if ids.is_empty() {
        return Ok(HashMap::new());
    }
    lock_states(db, &ids)?;
    select_all(db, &ids)
}

fn lock_states(db: &mut Db, ids: &[Uuid]) -> Result<HashMap<Uuid, State>, Error> {
    renew_deadline();
    let rows = db.client.query(LOCK_KNOWN, &[&ids])?;
    rows.iter().map(|row| Ok((row.try_get("order_id")?, parse_state(row)?))).collect()
}

fn state(db: &mut Db, order_id: Uuid) -> Result<Option<State>, Error> {
    renew_deadline();
    let select = "select state from reservations where order_id = $1";
    db.client.query_opt(select, &[&order_id])?.as_ref().map(parse_state).transpose()
}

fn select_all(db: &mut Db, ids: &[Uuid]) -> Result<HashMap<Uuid, Reservation>, Error> {
    renew_deadline();
    let rows = db.client.query(&db.statements.reservations.select, &[&ids])?;
    let mut all: HashMap<Uuid, Reservation> = HashMap::new();
    for row in &rows {
        let order_id: Uuid = row.try_get("order_id")?;
        let line = Line {
            sku: row.try_get("sku")?,
            name: row.try_get("name")?,
            unit_price: row.try_get("unit_price")?,
            quantity: row.try_get("quantity")?,
        };
        let expires_at: Option<SystemTime> = row.try_get("expires_at")?;
        let (state, expires_at) = (parse_state(row)?, expires_at.map(timestamp));
        let new = Reservation { order_id, state, expires_at, lines: Vec::new() };
        all.entry(order_id).or_insert(new).lines.push(line);
    }
    Ok(all)
}

fn hold_again(db: &mut Db, hold: &Hold) -> Result<SystemTime, Error> {
    renew_deadline();
    let parameters: [&(dyn ToSql + Sync); 2] = [&hold.order_id, &hold.duration.as_secs_f64()];
    db.client.query_one(HOLD_AGAIN, &parameters)?.try_get("expires_at")
}

/// The stock of some products, locked, and what was taken of it.
#[derive(Default)]
struct LockedStock {
    products: BTreeMap<String, LockedProduct>,
}

struct LockedProduct {
    available: i32,
    taken: i32,
    name: String,
    price: String,
    retired: bool,
}

impl LockedStock {
    /// Takes all these lines or none.
    fn take(&mut self, lines: &[HoldLine], only_sold: bool) -> Outcome<Vec<Line>> {
        let (mut unknown, mut short) = (Vec::new(), Vec::new());
        for (number, line) in lines.iter().enumerate() {
            let found = self.products.get(&line.sku);
            match found.filter(|product| !(only_sold && product.retired)) {
                None => unknown.push((number, line.sku.clone())),
                Some(product) if product.available < line.quantity => short.push(Shortage {
                    sku: line.sku.clone(),
                    quantity: line.quantity,
                    available: product.available,
                }),
                Some(_) => (),
            }
        }
        if !unknown.is_empty() {
            return Err(Refusal::Unknown(unknown));
        }
        if !short.is_empty() {
            return Err(Refusal::Short(short));
        }
        let mut taken = Vec::with_capacity(lines.len());
        for HoldLine { sku, quantity } in lines {
            let Some(product) = self.products.get_mut(sku) else { continue };
            product.available -= quantity;
            product.taken += quantity;
            taken.push(Line {
                sku: sku.clone(),
                name: product.name.clone(),
                unit_price: product.price.clone(),
                quantity: *quantity,
            });
        }
        Ok(taken)
    }
}

fn lock_stock<'h>(
    db: &mut Db,
    lines: impl Iterator<Item = &'h HoldLine>,
) -> Result<LockedStock, Error> {
    let mut skus: Vec<&str> = lines.map(|line| line.sku.as_str()).collect();
    if skus.is_empty() {
        return Ok(LockedStock::default());
    }
    skus.sort_unstable();
    skus.dedup();
    renew_deadline();
    let rows = db.client.query(&db.statements.reservations.lock_stock, &[&skus])?;
    let product = |row: &Row| {
        let product = LockedProduct {
            available: row.try_get("available")?,
            taken: 0,
            name: row.try_get("name")?,
            price: row.try_get("price")?,
            retired: row.try_get("retired")?,
        };
        Ok((row.try_get("sku")?, product))
    };
    Ok(LockedStock { products: rows.iter().map(product).collect::<Result<_, Error>>()? })
}

/// Writes what was taken of the stock, and the lines for which it was.
fn write_taken(db: &mut Db, stock: &LockedStock, orders: &[(Uuid, &[Line])]) -> Result<(), Error> {
    let taken = stock.products.iter().filter(|(_, product)| product.taken > 0);
    let (skus, sums): (Vec<&str>, Vec<i32>) =
        taken.map(|(sku, product)| (sku.as_str(), product.taken)).unzip();
    if skus.is_empty() {
        return Ok(());
    }
    let (mut ids, mut places, mut line_skus) = (Vec::new(), Vec::new(), Vec::new());
    let (mut quantities, mut names, mut prices) = (Vec::new(), Vec::new(), Vec::new());
    for (order_id, lines) in orders {
        for (place, line) in (0i32..).zip(*lines) {
            ids.push(*order_id);
            places.push(place);
            line_skus.push(line.sku.as_str());
            quantities.push(line.quantity);
            names.push(line.name.as_str());
            prices.push(line.unit_price.as_str());
        }
    }
    let parameters: [&(dyn ToSql + Sync); 8] =
        [&skus, &sums, &ids, &places, &line_skus, &quantities, &names, &prices];
    renew_deadline();
    db.client.execute(&db.statements.reservations.take, &parameters)?;
    Ok(())
}

/// The answer to a hold of an order that has a reservation already.
fn repeated(hold: &Hold, known: Option<&Reservation>) -> Outcome<Reservation> {
    // It ended long ago and was deleted a moment ago.
    let Some(known) = known else { return Err(Refusal::State(State::Expired)) };
    if !has_lines(known, hold) {
        return Err(Refusal::OtherLines(known.state));
    }
    match known.state {
        State::Held | State::Confirmed => Ok(known.clone()),
        state => Err(Refusal::State(state)),
    }
}

fn has_lines(known: &Reservation, hold: &Hold) -> bool {
    let mut old: Vec<(&str, i32)> =
        known.lines.iter().map(|line| (line.sku.as_str(), line.quantity)).collect();
    let mut new: Vec<(&str, i32)> =
        hold.lines.iter().map(|line| (line.sku.as_str(), line.quantity)).collect();
    old.sort_unstable();
    new.sort_unstable();
    old == new
}

fn parse_state(row: &Row) -> Result<State, Error> {
    let text: &str = row.try_get("state")?;
    // A constraint of the table allows no other text.
    Ok(State::parse(text).unwrap_or(State::Released))
}
