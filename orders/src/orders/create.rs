//! Making an order: one straight line from the request to the row.
//!
//! Whatever step fails or is the last one before a crash, nothing is left half done: the stock that is
//! held for an order that was never made expires, and a repetition under the same key goes on with the
//! same order.

use std::time::Duration;

use chassis::db::{in_transaction, undo};
use chassis::router::Params;
use chassis::{Problem, request as http};
use log::{info, warn};
use postgres::Error;
use rouille::{Request, Response};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::idempotency::{self, Answer, Claim, Key};
use super::input::{InputLine, OrderInput};
use super::order::{
    Cancellation, Customer, HistoryEntry, Line, Order, Payment, Shipment, Status, now,
};
use super::store::{self, Actor, Event};
use crate::carts::cart::{MAX_LINES, StoredLine};
use crate::carts::{routes as cart_routes, store as carts};
use crate::outbox::messages;
use crate::stock::Command;
use crate::upstreams::{Context, HeldLine, HoldOutcome};
use crate::{App, metrics};

/// How much longer than the request an attempt keeps its key: after that it is given up.
const ATTEMPT_MARGIN: Duration = Duration::from_secs(10);

/// What is to be made.
struct Plan {
    actor: Actor,
    user_id: i64,
    key: Option<Key>,
    input: OrderInput,
    /// The version of the cart that becomes an order.
    cart_version: Option<i64>,
}

/// What the transaction that makes an order has found.
enum Written {
    Done,
    /// There is an order with this id: another attempt has made it.
    AlreadyThere,
    /// The key belongs to another attempt, which has another order.
    KeyLost,
    CartChanged,
}

/// `POST /api/v1/orders`
pub fn create(app: &App, request: &Request, _: &Params) -> Result<Response, Problem> {
    let principal = app.auth.principal(request)?;
    let context = Context::of(request, &app.limits)?;
    let header = http::idempotency_key(request)?;
    let text = http::json_text(request)?;
    let input = OrderInput::parse(&text, app.limits.max_quantity)?;
    let user_id = input.owner(&principal)?;
    let key = key(principal.user_id, header.or(input.idempotency_key.clone()), "order", &text);
    let actor = actor(principal.user_id, user_id);
    place(app, context, Plan { actor, user_id, key, input, cart_version: None })
}

/// `POST /api/v1/carts/{user}/checkout`: an order of exactly what is in the cart, which is emptied.
pub fn checkout(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let principal = app.auth.principal(request)?;
    let context = Context::of(request, &app.limits)?;
    let user_id = cart_routes::owner(&principal, params)?;
    let header = http::idempotency_key(request)?;
    let text = http::json_text(request)?;
    let mut input = OrderInput::parse_checkout(&text)?;
    let action = format!("checkout {user_id}");
    let key = key(principal.user_id, header.or(input.idempotency_key.clone()), &action, &text);
    // A repetition of a checkout finds an empty cart, but gets its answer by the key.
    let cart = app.db.read(|db| carts::select(db, user_id))?;
    let lines = cart.lines.into_iter().enumerate();
    let line = |(place, StoredLine { sku, quantity })| InputLine { sku, quantity, place };
    input.lines = lines.map(line).collect();
    let actor = actor(principal.user_id, user_id);
    place(app, context, Plan { actor, user_id, key, input, cart_version: Some(cart.version) })
}

fn key(user_id: i64, key: Option<String>, action: &str, text: &str) -> Option<Key> {
    key.map(|key| Key { user_id, key, digest: idempotency::digest(action, text) })
}

fn actor(asking: i64, owner: i64) -> Actor {
    if asking == owner { Actor::Customer(asking) } else { Actor::Administrator(asking) }
}

fn place(app: &App, context: Context, plan: Plan) -> Result<Response, Problem> {
    let order_id = match &plan.key {
        None => Uuid::now_v7(),
        Some(key) => {
            let attempt = app.limits.request_timeout + ATTEMPT_MARGIN;
            match app.db.write(|db| idempotency::claim(db, key, Uuid::now_v7(), attempt))? {
                Claim::Claimed(order_id) => order_id,
                Claim::Answered(answer) => return Ok(replay(answer)),
                Claim::Running => {
                    return Err(Problem::new(
                        409,
                        "the first request with this key is still running",
                    )
                    .with_header("Retry-After", "1"));
                }
                Claim::OtherRequest => {
                    return Err(Problem::invalid_field(
                        "Idempotency-Key",
                        "was used before for another request; use a new key",
                    ));
                }
            }
        }
    };
    let mut holds_stock = false;
    make(app, context, &plan, order_id, &mut holds_stock).inspect_err(|problem| {
        let cleaned = match problem.status() {
            // The same request may succeed later, and goes on with the same order.
            500.. => match &plan.key {
                Some(key) => app.db.write(|db| idempotency::unlock(db, key, order_id)),
                None => Ok(()),
            },
            _ => {
                app.db.write(|db| idempotency::forget(db, plan.key.as_ref(), order_id, holds_stock))
            }
        };
        // Then the key is free when the attempt's time is over, and the stock when the hold expires.
        if let Err(err) = cleaned {
            warn!("order {order_id}: its key and stock are given up later: {err}");
        }
        if holds_stock {
            app.stock.wake();
        }
    })
}

/// The steps after the key was claimed. Sets `holds_stock` as soon as stock is held for the order.
fn make(
    app: &App,
    context: Context,
    plan: &Plan,
    order_id: Uuid,
    holds_stock: &mut bool,
) -> Result<Response, Problem> {
    let input = &plan.input;
    if input.lines.is_empty() {
        return Err(Problem::new(409, "the cart is empty"));
    }
    if input.lines.len() > MAX_LINES {
        return Err(Problem::invalid_field("items", "must be at most 100"));
    }
    let customer = app.upstreams.customer(context, plan.user_id)?;
    let customer = customer.ok_or_else(|| {
        Problem::invalid_field("user_id", "must be a customer who has an account")
    })?;
    if !customer.is_active() {
        return Err(Problem::invalid_field("user_id", "must be an account that may order"));
    }

    let wanted: Vec<(&str, i32)> =
        input.lines.iter().map(|line| (line.sku.as_str(), line.quantity)).collect();
    let lines = match app.upstreams.hold(context, order_id, &wanted, app.limits.hold.as_secs())? {
        HoldOutcome::Held(lines) => lines,
        HoldOutcome::Short(problem) => return Err(problem),
        HoldOutcome::Unknown(places) => return Err(unknown_products(plan, &places)),
    };
    *holds_stock = true;
    let priced = lines.iter().map(|line| (line.unit_price, line.quantity));
    let totals = app
        .pricing
        .totals(priced)
        .ok_or_else(|| Problem::invalid_field("items", "cost more than can be ordered at once"))?;
    input.expected.check(&totals, &lines)?;

    let created_at = now();
    let json = |given: &Option<String>, account: Option<Box<RawValue>>| {
        let given = given.as_ref().and_then(|json| RawValue::from_string(json.clone()).ok());
        given.or(account)
    };
    let event = Event {
        id: Uuid::now_v7(),
        kind: "created",
        actor: plan.actor,
        reason: None,
        at: created_at,
    };
    let created = chassis::response::timestamp(created_at);
    let order = Order {
        id: order_id,
        user_id: plan.user_id,
        store_id: input.store_id.clone(),
        status: Status::Pending,
        customer: Customer { name: customer.name, email: customer.email },
        lines: lines.into_iter().map(line).collect(),
        items_total: totals.items_total.to_string(),
        shipping_cost: totals.shipping_cost.to_string(),
        tax_amount: totals.tax_amount.to_string(),
        total_amount: totals.total_amount.to_string(),
        currency: app.pricing.currency.clone(),
        shipping_address: json(&input.shipping_address, customer.shipping_address),
        billing_address: json(&input.billing_address, customer.billing_address),
        payment_method: json(&input.payment_method, customer.payment_method),
        payment: Payment::default(),
        shipment: Shipment::default(),
        cancellation: Cancellation::default(),
        history: Some(vec![HistoryEntry {
            kind: event.kind.to_owned(),
            status: Status::Pending.as_str().to_owned(),
            by: event.actor.name().to_owned(),
            reason: None,
            at: created.clone(),
        }]),
        published: Some(false),
        created_at: created.clone(),
        updated_at: created,
        version: 1,
    };
    let messages = messages::of_event(&order, &event);
    let body = serde_json::to_string(&order).map_err(|err| Problem::internal().with_cause(err))?;

    let write = |db: &mut crate::Db| -> Result<(Written, Answer), Error> {
        let etag = order.entity_tag(&db.statements.instance);
        let answer = Answer { order_id, etag, body: body.clone() };
        in_transaction(db, |db| {
            let written = if !store::insert(db, &order, created_at)? {
                Written::AlreadyThere
            } else if let Some(key) = &plan.key
                && !idempotency::answer(db, key, &answer)?
            {
                Written::KeyLost
            } else if let Some(version) = plan.cart_version
                && !carts::take(db, plan.user_id, version)?
            {
                Written::CartChanged
            } else {
                store::record(db, &order, &event, &messages, Some(Command::Confirm))?;
                return Ok((Written::Done, answer));
            };
            undo(db)?;
            Ok((written, answer))
        })
    };
    let (written, answer) = app.db.write(write)?;
    match written {
        Written::Done => {
            app.wake();
            info!("order {order_id}: created, {} {}", order.total_amount, order.currency);
            Ok(response(answer))
        }
        Written::CartChanged => Err(Problem::new(409, "the cart has changed meanwhile")),
        // The key's own order has the answer; the next repetition gets it.
        Written::AlreadyThere | Written::KeyLost => Err(Problem::unavailable(
            "another request with this key has made the order; send it again",
        )),
    }
}

/// 422 with the places of the request; of a cart 409 with the skus.
fn unknown_products(plan: &Plan, places: &[usize]) -> Problem {
    let lines: Vec<&InputLine> =
        places.iter().filter_map(|place| plan.input.lines.get(*place)).collect();
    if plan.cart_version.is_some() {
        let skus: Vec<&str> = lines.iter().map(|line| line.sku.as_str()).collect();
        let detail = format!("the cart has what cannot be ordered any more: {}", skus.join(", "));
        return Problem::new(409, detail).with_member("lines", skus);
    }
    let error = |line: &&InputLine| {
        (format!("items[{}].sku", line.place), "is no product that can be ordered".to_owned())
    };
    Problem::unprocessable(lines.iter().map(error).collect())
}

fn line(held: HeldLine) -> Line {
    let HeldLine { sku, name, unit_price, quantity } = held;
    // The sum of all lines fits, so each does.
    let total = chassis::decimal::Cents(unit_price.0 * i64::from(quantity));
    let (unit_price, line_total) = (unit_price.to_string(), total.to_string());
    Line { sku, name, unit_price, quantity, line_total }
}

fn replay(answer: Answer) -> Response {
    metrics::REPLAYS.inc();
    response(answer).with_unique_header("Idempotency-Replayed", "true")
}

fn response(answer: Answer) -> Response {
    Response::from_data("application/json; charset=utf-8", answer.body)
        .with_status_code(201)
        .with_unique_header("Location", format!("/api/v1/orders/{}", answer.order_id))
        .with_etag_keep(format!("\"{}\"", answer.etag))
}
