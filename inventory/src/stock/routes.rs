//! The HTTP API of the stock, for administrators.

use chassis::etag;
use chassis::fields::{Errors, Given};
use chassis::query::{self, Query};
use chassis::router::Params;
use chassis::{Problem, request as http, response};
use rouille::{Request, Response};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::store::{self, Change, MAX_ON_HAND, Outcome, Refusal, Stock};
use crate::App;
use crate::products::routes::{not_found, precondition_failed, sku};

/// The longest reason, in characters.
const MAX_REASON_CHARS: usize = 200;

/// The reason of a stock that is set without one.
const DEFAULT_REASON: &str = "set";

#[derive(Deserialize)]
struct RawChange<'b> {
    #[serde(borrow, default, deserialize_with = "http::deserialize_present")]
    on_hand: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "http::deserialize_present")]
    change: Option<&'b RawValue>,
    #[serde(borrow, default, deserialize_with = "http::deserialize_present")]
    reason: Option<&'b RawValue>,
}

/// `GET /api/v1/products/{sku}/stock`
pub fn get(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    app.auth.principal(request)?.require_admin()?;
    let sku = sku(params)?;
    let if_match = etag::if_match(request)?;
    let (stock, version) = app.db.read(|db| store::select(db, sku))?.ok_or_else(not_found)?;
    if if_match.is_some_and(|tags| !tags.contains(&version)) {
        return Err(precondition_failed());
    }
    if etag::matches_if_none_match(request, &version) {
        return Ok(with_etag(Response::empty_204().with_status_code(304), &version));
    }
    Ok(with_etag(response::ok(&stock), &version))
}

/// `PUT /api/v1/products/{sku}/stock`
pub fn set(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let principal = app.auth.principal(request)?;
    principal.require_admin()?;
    let sku = sku(params)?;
    let text = http::json_text(request)?;
    let body: RawChange<'_> = http::json_object(&text)?;
    let mut errors = Errors::default();
    let on_hand = errors.integer(body.on_hand, "on_hand", 0..=MAX_ON_HAND.into());
    let on_hand = errors.require(on_hand, "on_hand");
    let reason = errors.short_text(body.reason, "reason", MAX_REASON_CHARS).value();
    errors.into_result()?;
    let precondition = etag::precondition(request)?;
    let change = Change {
        sku,
        user_id: principal.user_id,
        reason: reason.as_deref().unwrap_or(DEFAULT_REASON),
        key: None,
    };
    let outcome = app.db.write(|db| store::set(db, &change, on_hand as i32, &precondition))?;
    let (stock, version) = into_result(outcome)?;
    Ok(with_etag(response::ok(&stock), &version))
}

/// `POST /api/v1/products/{sku}/stock/adjustments`
pub fn adjust(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let principal = app.auth.principal(request)?;
    principal.require_admin()?;
    let sku = sku(params)?;
    let key = http::idempotency_key(request)?;
    let text = http::json_text(request)?;
    let body: RawChange<'_> = http::json_object(&text)?;
    let mut errors = Errors::default();
    let most = i64::from(MAX_ON_HAND);
    let amount = match errors.integer(body.change, "change", -most..=most) {
        Given::Value(0) => {
            errors.add("change", "must not be 0");
            0
        }
        given => errors.require(given, "change"),
    };
    let reason = errors.short_text(body.reason, "reason", MAX_REASON_CHARS);
    let reason = errors.require(reason, "reason");
    errors.into_result()?;
    let change = Change { sku, user_id: principal.user_id, reason: &reason, key: key.as_deref() };
    let outcome = app.db.write(|db| store::adjust(db, &change, amount as i32))?;
    let (adjustment, is_replay) = into_result(outcome)?;
    let response = response::ok(&adjustment).with_status_code(201);
    Ok(match is_replay {
        true => response.with_unique_header("Idempotency-Replayed", "true"),
        false => response,
    })
}

/// `GET /api/v1/products/{sku}/stock/adjustments`: the newest first.
pub fn adjustments(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    app.auth.principal(request)?.require_admin()?;
    let sku = sku(params)?;
    let mut query = Query::parse(request.raw_query_string(), &["limit", "after"])?;
    let limit = query.limit();
    let after = query.number("after", i64::MAX, 1..=i64::MAX);
    query.finish()?;
    let found = app.db.read(|db| store::adjustments(db, sku, after, limit + 1))?;
    let adjustments = found.ok_or_else(not_found)?;
    Ok(query::page(adjustments, limit, |last| {
        format!("/api/v1/products/{sku}/stock/adjustments?limit={limit}&after={}", last.id)
    }))
}

fn into_result<T>(outcome: Outcome<T>) -> Result<T, Problem> {
    outcome.map_err(|refusal| match refusal {
        Refusal::NotFound => not_found(),
        Refusal::PreconditionFailed => precondition_failed(),
        Refusal::BelowReserved(Stock { sku, on_hand, reserved, .. }) => Problem::new(
            409,
            format!(
                "of {sku} {on_hand} are on hand and {reserved} reserved for orders: at least those \
                 must stay on hand"
            ),
        )
        .with_member("on_hand", on_hand)
        .with_member("reserved", reserved),
        Refusal::TooMany => {
            Problem::invalid_field("change", format!("would make more than {MAX_ON_HAND}"))
        }
        Refusal::KeyUsed => Problem::invalid_field(
            "Idempotency-Key",
            "was used before for another adjustment; use a new key",
        ),
    })
}

/// What only administrators see is kept by no cache: the server sends `no-store`.
fn with_etag(response: Response, version: &str) -> Response {
    response.with_etag_keep(format!("\"{version}\""))
}
