//! The HTTP API of orders.

use chassis::auth::Principal;
use chassis::db::in_transaction;
use chassis::etag;
use chassis::fields::{Errors, address};
use chassis::router::Params;
use chassis::{Problem, request as http};
use rouille::{Request, Response};
use serde::Deserialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::change::{self, Change, Outcome};
use super::input::refuse_card_numbers;
use super::order::{Order, Status};
use super::store::{self, Actor};
use crate::App;
use crate::pricing::MAX_TOTAL;

#[derive(Default, Deserialize)]
struct RawChange<'b> {
    #[serde(borrow, default, deserialize_with = "http::deserialize_present")]
    amount: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "http::deserialize_present")]
    reference: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "http::deserialize_present")]
    method: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "http::deserialize_present")]
    carrier: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "http::deserialize_present")]
    #[serde(alias = "trackingNumber")]
    tracking_number: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "http::deserialize_present")]
    reason: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "http::deserialize_present")]
    status: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "http::deserialize_present")]
    #[serde(alias = "shippingAddress")]
    shipping_address: Option<&'b RawValue>,
}

/// `GET /api/v1/orders/{id}`
pub fn get(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let principal = app.auth.principal(request)?;
    let id = order_id(params)?;
    let if_match = etag::if_match(request)?;
    let owner = visible_to(&principal);
    let found = app.db.read(|db| {
        let Some(mut order) = store::select(db, id, owner, false)? else { return Ok(None) };
        store::add_history(db, &mut order)?;
        let tag = order.entity_tag(&db.statements.instance);
        Ok(Some((order, tag)))
    })?;
    let (order, tag) = found.ok_or_else(not_found)?;
    if if_match.is_some_and(|tags| !tags.contains(&tag)) {
        return Err(precondition_failed());
    }
    let response = if etag::matches_if_none_match(request, &tag) {
        Response::empty_204().with_status_code(304)
    } else {
        chassis::response::ok(&order)
    };
    Ok(response.with_etag_keep(format!("\"{tag}\"")))
}

/// `PUT /api/v1/orders/{id}/payment`
pub fn pay(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let principal = administrator(app, request)?;
    let body = |body: &RawChange<'_>, errors: &mut Errors| {
        let amount = errors.amount(body.amount, "amount", MAX_TOTAL);
        let amount = errors.require(amount, "amount").to_string();
        let reference = errors.short_text(body.reference, "reference", 200);
        let reference = errors.require(reference, "reference");
        let method = errors.short_text(body.method, "method", 100).value();
        Change::Pay { amount, reference, method }
    };
    change_by_body(app, request, params, &principal, body)
}

/// `PUT /api/v1/orders/{id}/shipping`: the address, in `shipping_address` or as the whole body.
pub fn set_shipping(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let principal = app.auth.principal(request)?;
    let text = http::json_text(request)?;
    let body: RawChange<'_> = http::json_object(&text)?;
    let mut errors = Errors::default();
    refuse_card_numbers(&text, &mut errors);
    let whole = RawValue::from_string(text.trim().to_owned());
    let whole =
        whole.map_err(|err| Problem::bad_request(format!("the body is not JSON: {err}")))?;
    let raw = body.shipping_address.unwrap_or(&whole);
    let address = address(Some(raw), "shipping_address", &mut errors);
    if address.is_none() && raw.get() == "null" {
        errors.add("shipping_address", "must not be null");
    }
    errors.into_result()?;
    let change = Change::SetShippingAddress(address.unwrap_or_default());
    apply(app, request, params, &principal, change)
}

/// `PUT /api/v1/orders/{id}/shipment/tracking`
pub fn ship(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let principal = administrator(app, request)?;
    change_by_body(app, request, params, &principal, |body, errors| {
        let carrier = errors.short_text(body.carrier, "carrier", 100);
        let carrier = errors.require(carrier, "carrier");
        let number = errors.short_text(body.tracking_number, "tracking_number", 100);
        let tracking_number = errors.require(number, "tracking_number");
        Change::Ship { carrier, tracking_number }
    })
}

/// `POST /api/v1/orders/{id}/delivery`
pub fn deliver(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let principal = administrator(app, request)?;
    apply(app, request, params, &principal, Change::Deliver)
}

/// `POST /api/v1/orders/{id}/cancellation`
pub fn cancel(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let principal = app.auth.principal(request)?;
    change_by_body(app, request, params, &principal, |body, errors| {
        let reason = errors.short_text(body.reason, "reason", 200).value();
        Change::Cancel(reason, principal.is_admin)
    })
}

/// `PUT /api/v1/orders/{id}/refund`
pub fn refund(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let principal = administrator(app, request)?;
    change_by_body(app, request, params, &principal, |body, errors| Change::Refund {
        reference: errors.short_text(body.reference, "reference", 200).value(),
    })
}

/// `PUT /api/v1/orders/{id}/status`: only what needs no further data.
pub fn set_status(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let principal = administrator(app, request)?;
    let id = order_id(params)?;
    let text = http::json_text(request)?;
    let body: RawChange<'_> = http::json_object(&text)?;
    let mut errors = Errors::default();
    let status = errors.required_text(body.status, "status", |name| {
        Status::parse(&name)
            .map(Some)
            .ok_or("must be pending, processing, shipped, delivered or canceled")
    });
    errors.into_result()?;
    let change = match status {
        Some(Status::Delivered) => Change::Deliver,
        Some(Status::Canceled) => Change::Cancel(None, true),
        other => {
            let (found, instance) = app.db.read(|db| {
                Ok((store::select(db, id, None, false)?, db.statements.instance.clone()))
            })?;
            let order = found.ok_or_else(not_found)?;
            let tag = order.entity_tag(&instance);
            let instead = match other {
                Some(Status::Processing) => "it follows from a payment: PUT …/payment",
                Some(Status::Shipped) => "it follows from a shipment: PUT …/shipment/tracking",
                _ => "no order becomes pending again",
            };
            return Err(refused(&order, tag, instead.to_owned()));
        }
    };
    apply(app, request, params, &principal, change)
}

/// `DELETE /api/v1/orders/{id}`
pub fn delete(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let principal = app.auth.principal(request)?;
    match outcome(app, request, params, &principal, Change::Delete)? {
        // Again is the same as once.
        (Outcome::Done(_) | Outcome::Unchanged(_) | Outcome::Deleted, _) => {
            Ok(Response::empty_204())
        }
        (other, instance) => {
            into_result(other, &Change::Delete, &instance).map(|_| Response::empty_204())
        }
    }
}

/// The id in the path. A text that is no UUID names no order, so it is 404.
pub fn order_id(params: &Params) -> Result<Uuid, Problem> {
    params.first().and_then(|id| id.parse().ok()).ok_or_else(not_found)
}

/// The order, or why it was not changed.
pub fn into_result(outcome: Outcome, change: &Change, instance: &str) -> Result<Order, Problem> {
    let tag = |order: &Order| order.entity_tag(instance);
    match outcome {
        Outcome::Done(order) | Outcome::Unchanged(order) => Ok(order),
        Outcome::NotFound | Outcome::Deleted => Err(not_found()),
        Outcome::PreconditionFailed => Err(precondition_failed()),
        Outcome::WrongAmount(order) => {
            let detail = format!("the order's total is {} {}", order.total_amount, order.currency);
            let total = order.total_amount.clone();
            Err(refused(&order, tag(&order), detail).with_member("total_amount", total))
        }
        Outcome::Refused(order) => {
            let needs = match change {
                Change::Pay { .. } | Change::FailPayment { .. } => {
                    "only one that is pending is paid"
                }
                Change::SetShippingAddress(_) => {
                    "the address is changed until the order is shipped"
                }
                Change::Ship { .. } => "only one that is processing is shipped",
                Change::Deliver => "only one that is shipped is delivered",
                Change::Cancel(_, true) => "only one that is pending or processing is canceled",
                Change::Cancel(_, false) => "its customer can cancel it only while it is pending",
                Change::Refund { .. } => "only a canceled one that was paid is refunded",
                Change::Delete => "one that is processing or shipped is not deleted",
            };
            let detail = format!("the order is {}; {needs}", order.status.as_str());
            Err(refused(&order, tag(&order), detail))
        }
    }
}

fn administrator(app: &App, request: &Request) -> Result<Principal, Problem> {
    let principal = app.auth.principal(request)?;
    principal.require_admin()?;
    Ok(principal)
}

/// Whose orders a user sees: only the own ones, or for an administrator all.
fn visible_to(principal: &Principal) -> Option<i64> {
    (!principal.is_admin).then_some(principal.user_id)
}

/// Makes a change whose data are in the body, which may be empty where nothing is required.
fn change_by_body(
    app: &App,
    request: &Request,
    params: &Params,
    principal: &Principal,
    parse: impl FnOnce(&RawChange<'_>, &mut Errors) -> Change,
) -> Result<Response, Problem> {
    let text = http::json_text(request)?;
    let text = if text.trim_ascii().is_empty() { "{}" } else { &text };
    let body: RawChange<'_> = http::json_object(text)?;
    let mut errors = Errors::default();
    refuse_card_numbers(text, &mut errors);
    let change = parse(&body, &mut errors);
    errors.into_result()?;
    apply(app, request, params, principal, change)
}

fn apply(
    app: &App,
    request: &Request,
    params: &Params,
    principal: &Principal,
    change: Change,
) -> Result<Response, Problem> {
    let (outcome, instance) = outcome(app, request, params, principal, change.clone())?;
    let order = into_result(outcome, &change, &instance)?;
    let tag = order.entity_tag(&instance);
    Ok(chassis::response::ok(&order).with_etag_keep(format!("\"{tag}\"")))
}

fn outcome(
    app: &App,
    request: &Request,
    params: &Params,
    principal: &Principal,
    change: Change,
) -> Result<(Outcome, String), Problem> {
    let change = change::Request {
        order_id: order_id(params)?,
        owner: visible_to(principal),
        precondition: etag::precondition(request)?,
        actor: match principal.is_admin {
            true => Actor::Administrator(principal.user_id),
            false => Actor::Customer(principal.user_id),
        },
        event_id: Uuid::now_v7(),
        change,
    };
    let (outcome, instance) = app.db.write(|db| {
        let outcome = in_transaction(db, |db| change::apply(db, &change))?;
        Ok((outcome, db.statements.instance.clone()))
    })?;
    if matches!(outcome, Outcome::Done(_)) {
        app.wake();
    }
    Ok((outcome, instance))
}

fn not_found() -> Problem {
    Problem::not_found("there is no such order")
}

fn precondition_failed() -> Problem {
    Problem::new(412, "the order has changed since")
}

/// 409 with the current state.
fn refused(order: &Order, tag: String, detail: String) -> Problem {
    Problem::new(409, detail)
        .with_member("state", order.status)
        .with_header("ETag", format!("\"{tag}\""))
}
