//! The SQL that makes and reads orders, one function a query. What changes one is in [`super::change`].
//!
//! A parameter that is an array stands in a subquery, `(select $1::text[])`. Otherwise the planner sees how
//! many elements it has, and plans the statement anew for each execution, which costs more than executing
//! it.

use std::collections::HashMap;
use std::time::SystemTime;

use chassis::db::renew_deadline;
use chassis::etag::Precondition;
use chassis::response::timestamp;
use postgres::types::ToSql;
use postgres::{Client, Error, Row, Statement};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::order::{
    Cancellation, Customer, HistoryEntry, Line, Order, Payment, Shipment, Status,
    optional_timestamp,
};
use crate::outbox::messages::NewMessage;
use crate::stock::Command;
use crate::{Db, metrics};

/// The prepared statements of the orders.
pub struct Statements {
    insert: Statement,
    select: Statement,
    lines: Statement,
    history: Statement,
    record: Statement,
}

impl Statements {
    /// Prepares them on a connection.
    pub fn prepare(client: &mut Client) -> Result<Statements, Error> {
        Ok(Statements {
            insert: client.prepare(INSERT)?,
            select: client.prepare(SELECT)?,
            lines: client.prepare(LINES)?,
            history: client.prepare(HISTORY)?,
            record: client.prepare(RECORD)?,
        })
    }
}

/// Who made an event happen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Actor {
    /// The owner of the order.
    Customer(i64),
    /// An administrator.
    Administrator(i64),
    /// A payment or shipping provider, by a webhook.
    Provider,
    /// This service by itself.
    Service,
}

/// Something that happens to an order.
#[derive(Clone, Debug)]
pub struct Event {
    /// UUIDv7; a provider's event has one that follows from the provider's id.
    pub id: Uuid,
    /// The name in the history.
    pub kind: &'static str,
    /// Who.
    pub actor: Actor,
    /// Why.
    pub reason: Option<String>,
    /// When.
    pub at: SystemTime,
}

impl Actor {
    fn columns(self) -> (&'static str, Option<i64>) {
        match self {
            Actor::Customer(id) => ("customer", Some(id)),
            Actor::Administrator(id) => ("administrator", Some(id)),
            Actor::Provider => ("provider", None),
            Actor::Service => ("service", None),
        }
    }

    /// As it stands in the history.
    pub fn name(self) -> &'static str {
        self.columns().0
    }
}

/// The columns of an [`Order`] but its lines and its history.
#[macro_export]
macro_rules! order_columns {
    () => {
        "orders.id, user_id, store_id, status, version, customer_name, customer_email,
        shipping_address::text, billing_address::text, payment_method::text,
        items_total::text, shipping_cost::text, tax_amount::text, total_amount::text, currency,
        payment_kind, payment_reference, paid_amount::text, paid_at, refund_due, refunded_at,
        carrier, tracking_number, shipped_at, delivered_at, cancellation_reason, canceled_at,
        created_at, updated_at,
        not exists (
            select from outbox where order_id = orders.id and published_at is null
        ) as published"
    };
}

const INSERT: &str = "
    with made as (
        insert into orders (id, user_id, store_id, customer_name, customer_email,
            shipping_address, billing_address, payment_method,
            items_total, shipping_cost, tax_amount, total_amount, currency, created_at, updated_at)
        values ($1, $2, $3, $4, $5, $6::text::json, $7::text::json, $8::text::json,
            $9::text::numeric, $10::text::numeric, $11::text::numeric, $12::text::numeric, $13,
            $14, $14)
        on conflict (id) do nothing
        returning id
    ), lined as (
        insert into order_lines (order_id, position, sku, name, unit_price, quantity, line_total)
        select made.id, place - 1, sku, name, price::numeric, quantity, total::numeric
        from made
        cross join unnest((select $15::text[]), (select $16::text[]), (select $17::text[]),
            (select $18::int[]), (select $19::text[])) with ordinality as line (sku, name, price, quantity, total, place)
    )
    select count(*) from made";

const SELECT: &str = concat!(
    "select ",
    order_columns!(),
    "
    from orders
    where id = $1 and ($2::bigint is null or user_id = $2) and ($3 or deleted_at is null)"
);

const LINES: &str = "
    select order_id, sku, name, unit_price::text, quantity, line_total::text
    from order_lines
    where order_id = any((select $1::uuid[])::uuid[])
    order by order_id, position";

const HISTORY: &str = "
    select type, status, actor, reason, occurred_at
    from order_events
    where order_id = $1
    order by version";

// The ids of the messages are given in their order.
const RECORD: &str = "
    with event as (
        insert into order_events
            (id, order_id, version, type, status, actor, actor_id, reason, occurred_at)
        values ($1, $2, $3, $4, $5, $6, $7, $8, $9)
    ), messages as (
        insert into outbox (order_id, message_id, target, routing_key, body)
        select $2, message_id, target, routing_key, body
        from unnest((select $10::text[]), (select $11::text[]), (select $12::text[]),
            (select $13::text[])) with ordinality as message (message_id, target, routing_key, body, place)
        order by place
    )
    insert into stock_commands (order_id, command)
    select $2, $14::text
    where $14 is not null";

/// Adds an order; whether there was none with this id. A part of a transaction.
pub fn insert(db: &mut Db, order: &Order, created_at: SystemTime) -> Result<bool, Error> {
    let text = |json: &Option<Box<RawValue>>| json.as_ref().map(|json| json.get().to_owned());
    let (shipping, billing) = (text(&order.shipping_address), text(&order.billing_address));
    let payment_method = text(&order.payment_method);
    let lines = || order.lines.iter();
    let skus: Vec<&str> = lines().map(|line| line.sku.as_str()).collect();
    let names: Vec<&str> = lines().map(|line| line.name.as_str()).collect();
    let prices: Vec<&str> = lines().map(|line| line.unit_price.as_str()).collect();
    let quantities: Vec<i32> = lines().map(|line| line.quantity).collect();
    let totals: Vec<&str> = lines().map(|line| line.line_total.as_str()).collect();
    let parameters: [&(dyn ToSql + Sync); 19] = [
        &order.id,
        &order.user_id,
        &order.store_id,
        &order.customer.name,
        &order.customer.email,
        &shipping,
        &billing,
        &payment_method,
        &order.items_total,
        &order.shipping_cost,
        &order.tax_amount,
        &order.total_amount,
        &order.currency,
        &created_at,
        &skus,
        &names,
        &prices,
        &quantities,
        &totals,
    ];
    renew_deadline();
    let row = db.client.query_one(&db.statements.orders.insert, &parameters)?;
    Ok(row.try_get::<_, i64>(0)? == 1)
}

/// Writes what follows from a change: the event, the messages and the stock command. A part of the
/// transaction of the change.
pub fn record(
    db: &mut Db,
    order: &Order,
    event: &Event,
    messages: &[NewMessage],
    command: Option<Command>,
) -> Result<(), Error> {
    let (actor, actor_id) = event.actor.columns();
    let ids: Vec<&str> = messages.iter().map(|message| message.message_id.as_str()).collect();
    let targets: Vec<&str> = messages.iter().map(|message| message.target.as_str()).collect();
    let keys: Vec<&str> = messages.iter().map(|message| message.routing_key.as_str()).collect();
    let bodies: Vec<&str> = messages.iter().map(|message| message.body.as_str()).collect();
    let command = command.map(Command::as_str);
    let status = order.status.as_str();
    let parameters: [&(dyn ToSql + Sync); 14] = [
        &event.id,
        &order.id,
        &order.version,
        &event.kind,
        &status,
        &actor,
        &actor_id,
        &event.reason,
        &event.at,
        &ids,
        &targets,
        &keys,
        &bodies,
        &command,
    ];
    renew_deadline();
    db.client.execute(&db.statements.orders.record, &parameters)?;
    metrics::ORDER_EVENTS.with_label_values(&[event.kind]).inc();
    Ok(())
}

/// An order with its lines; with `owner` only one of this user, and one that was deleted only with
/// `deleted`.
pub fn select(
    db: &mut Db,
    id: Uuid,
    owner: Option<i64>,
    deleted: bool,
) -> Result<Option<Order>, Error> {
    let found = db.client.query_opt(&db.statements.orders.select, &[&id, &owner, &deleted])?;
    let Some(mut order) = found.as_ref().map(order_of_row).transpose()? else { return Ok(None) };
    add_lines(db, std::slice::from_mut(&mut order))?;
    Ok(Some(order))
}

/// Adds what happened to an order.
pub fn add_history(db: &mut Db, order: &mut Order) -> Result<(), Error> {
    renew_deadline();
    let rows = db.client.query(&db.statements.orders.history, &[&order.id])?;
    let entry = |row: &Row| {
        Ok(HistoryEntry {
            kind: row.try_get("type")?,
            status: row.try_get("status")?,
            by: row.try_get("actor")?,
            reason: row.try_get("reason")?,
            at: timestamp(row.try_get("occurred_at")?),
        })
    };
    order.history = Some(rows.iter().map(entry).collect::<Result<_, Error>>()?);
    Ok(())
}

/// Adds the lines of orders.
pub fn add_lines(db: &mut Db, orders: &mut [Order]) -> Result<(), Error> {
    if orders.is_empty() {
        return Ok(());
    }
    renew_deadline();
    let ids: Vec<Uuid> = orders.iter().map(|order| order.id).collect();
    let rows = db.client.query(&db.statements.orders.lines, &[&ids])?;
    let mut lines: HashMap<Uuid, Vec<Line>> = HashMap::new();
    for row in &rows {
        lines.entry(row.try_get("order_id")?).or_default().push(Line {
            sku: row.try_get("sku")?,
            name: row.try_get("name")?,
            unit_price: row.try_get("unit_price")?,
            quantity: row.try_get("quantity")?,
            line_total: row.try_get("line_total")?,
        });
    }
    for order in orders {
        order.lines = lines.remove(&order.id).unwrap_or_default();
    }
    Ok(())
}

/// An order without its lines.
pub fn order_of_row(row: &Row) -> Result<Order, Error> {
    let json = |name: &str| -> Result<Option<Box<RawValue>>, Error> {
        let text: Option<String> = row.try_get(name)?;
        // The column's type allows nothing but JSON.
        Ok(text.and_then(|text| RawValue::from_string(text).ok()))
    };
    let time = |name: &str| -> Result<Option<String>, Error> {
        Ok(optional_timestamp(row.try_get(name)?))
    };
    Ok(Order {
        id: row.try_get("id")?,
        user_id: row.try_get("user_id")?,
        store_id: row.try_get("store_id")?,
        // A constraint of the table allows no other text.
        status: Status::parse(row.try_get("status")?).unwrap_or(Status::Canceled),
        customer: Customer {
            name: row.try_get("customer_name")?,
            email: row.try_get("customer_email")?,
        },
        lines: Vec::new(),
        items_total: row.try_get("items_total")?,
        shipping_cost: row.try_get("shipping_cost")?,
        tax_amount: row.try_get("tax_amount")?,
        total_amount: row.try_get("total_amount")?,
        currency: row.try_get("currency")?,
        shipping_address: json("shipping_address")?,
        billing_address: json("billing_address")?,
        payment_method: json("payment_method")?,
        payment: Payment {
            method: row.try_get("payment_kind")?,
            reference: row.try_get("payment_reference")?,
            amount: row.try_get("paid_amount")?,
            paid_at: time("paid_at")?,
            refund_due: row.try_get("refund_due")?,
            refunded_at: time("refunded_at")?,
        },
        shipment: Shipment {
            carrier: row.try_get("carrier")?,
            tracking_number: row.try_get("tracking_number")?,
            shipped_at: time("shipped_at")?,
            delivered_at: time("delivered_at")?,
        },
        cancellation: Cancellation {
            reason: row.try_get("cancellation_reason")?,
            canceled_at: time("canceled_at")?,
        },
        history: None,
        published: Some(row.try_get("published")?),
        created_at: timestamp(row.try_get("created_at")?),
        updated_at: timestamp(row.try_get("updated_at")?),
        version: row.try_get("version")?,
    })
}

/// The versions that a precondition of this database allows (none: any) and those that it forbids. Of
/// a tag only the part before the dot is compared: the rest is not the row's.
pub fn versions(of_instance: &Precondition) -> (Option<Vec<i64>>, Vec<i64>) {
    let version = |tag: &String| tag.split_once('.')?.0.parse().ok();
    let versions = |tags: &Vec<String>| tags.iter().filter_map(version).collect();
    (of_instance.if_match.as_ref().map(versions), versions(&of_instance.if_none_match))
}
