//! The HTTP API of carts.

use chassis::auth::Principal;
use chassis::etag;
use chassis::fields::Errors;
use chassis::router::Params;
use chassis::{Problem, request as http};
use rouille::{Request, Response};

use super::cart::{Cart, MAX_LINES, entity_tag};
use super::store::{self, LineChange, Outcome};
use crate::App;
use crate::orders::input::{RawItem, parse_sku};
use crate::upstreams::Context;

/// `GET /api/v1/carts/{user}`
pub fn get(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let user_id = owner(&app.auth.principal(request)?, params)?;
    let if_match = etag::if_match(request)?;
    let (response, tag) = show(app, request, user_id)?;
    if if_match.is_some_and(|tags| !tags.contains(&tag)) {
        return Err(precondition_failed());
    }
    if etag::matches_if_none_match(request, &tag) {
        let not_modified = Response::empty_204().with_status_code(304);
        return Ok(not_modified.with_etag_keep(format!("\"{tag}\"")));
    }
    Ok(response)
}

/// `POST /api/v1/carts/{user}/items`: so many more of a product.
pub fn add(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let user_id = owner(&app.auth.principal(request)?, params)?;
    let text = http::json_text(request)?;
    let item: RawItem<'_> = http::json_object(&text)?;
    let mut errors = Errors::default();
    let sku = errors.required_text(item.sku, "sku", parse_sku);
    // Of one product without a quantity one is added.
    let quantity = match item.quantity {
        Some(_) => quantity(app, &item, &mut errors),
        None => 1,
    };
    errors.into_result()?;
    change(app, request, user_id, &sku, LineChange::Add(quantity))
}

/// `PUT /api/v1/carts/{user}/items/{sku}`: exactly so many of a product.
pub fn set(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let user_id = owner(&app.auth.principal(request)?, params)?;
    let sku = sku(params)?;
    let text = http::json_text(request)?;
    let item: RawItem<'_> = http::json_object(&text)?;
    let mut errors = Errors::default();
    let quantity = quantity(app, &item, &mut errors);
    errors.into_result()?;
    change(app, request, user_id, sku, LineChange::Set(quantity))
}

/// `DELETE /api/v1/carts/{user}/items/{sku}`
pub fn remove(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let user_id = owner(&app.auth.principal(request)?, params)?;
    let sku = sku(params)?;
    let precondition = etag::precondition(request)?;
    let outcome = app
        .db
        .write(|db| store::change(db, user_id, sku, LineChange::Remove, i32::MAX, &precondition))?;
    match outcome {
        Outcome::PreconditionFailed => Err(precondition_failed()),
        // Again is the same as once.
        _ => Ok(Response::empty_204()),
    }
}

/// `DELETE /api/v1/carts/{user}`: empties it.
pub fn empty(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let user_id = owner(&app.auth.principal(request)?, params)?;
    let precondition = etag::precondition(request)?;
    match app.db.write(|db| store::empty(db, user_id, &precondition))? {
        Outcome::Done => Ok(Response::empty_204()),
        _ => Err(precondition_failed()),
    }
}

/// The user whose cart it is: `me`, one's own id, or for an administrator any id.
pub fn owner(principal: &Principal, params: &Params) -> Result<i64, Problem> {
    let not_found = || Problem::not_found("there is no such cart");
    let user_id = match params.first() {
        Some(&"me") => principal.user_id,
        _ => chassis::router::positive_id(params).ok_or_else(not_found)?,
    };
    match user_id == principal.user_id || principal.is_admin {
        true => Ok(user_id),
        false => Err(not_found()),
    }
}

fn change(
    app: &App,
    request: &Request,
    user_id: i64,
    sku: &str,
    change: LineChange,
) -> Result<Response, Problem> {
    let precondition = etag::precondition(request)?;
    let context = Context::of(request, &app.limits)?;
    let offers = app.upstreams.offers(context, [sku].into_iter())?;
    if offers.get(sku).is_none_or(|offer| offer.retired) {
        return Err(Problem::invalid_field("sku", "is no product that can be ordered"));
    }
    let most = app.limits.max_quantity as i32;
    let outcome =
        app.db.write(|db| store::change(db, user_id, sku, change, most, &precondition))?;
    match outcome {
        Outcome::Done => Ok(show(app, request, user_id)?.0),
        Outcome::PreconditionFailed => Err(precondition_failed()),
        Outcome::TooMany => Err(Problem::invalid_field(
            "quantity",
            format!("would make more than {most} of this product"),
        )),
        Outcome::TooManyLines | Outcome::NoSuchLine => {
            Err(Problem::new(409, format!("the cart has {MAX_LINES} lines, and no more fit in it")))
        }
    }
}

/// The cart as it is now, and its entity tag.
fn show(app: &App, request: &Request, user_id: i64) -> Result<(Response, String), Problem> {
    let context = Context::of(request, &app.limits)?;
    let (stored, instance) =
        app.db.read(|db| Ok((store::select(db, user_id)?, db.statements.instance.clone())))?;
    let offers = app.upstreams.offers(context, stored.lines.iter().map(|line| &*line.sku))?;
    let cart = Cart::new(user_id, &stored, &offers, &app.pricing.currency);
    let body = serde_json::to_string(&cart).map_err(|err| Problem::internal().with_cause(err))?;
    let tag = entity_tag(&instance, stored.version, &body);
    let response = Response::from_data("application/json; charset=utf-8", body);
    Ok((response.with_etag_keep(format!("\"{tag}\"")), tag))
}

fn quantity(app: &App, item: &RawItem<'_>, errors: &mut Errors) -> i32 {
    let given = errors.integer(item.quantity, "quantity", 1..=app.limits.max_quantity);
    errors.require(given, "quantity") as i32
}

/// The sku in the path. A text that cannot be one names no product, so it is 404.
fn sku<'p>(params: &'p Params) -> Result<&'p str, Problem> {
    let sku = params.get(1).copied().filter(|sku| parse_sku((*sku).to_owned()).is_ok());
    sku.ok_or_else(|| Problem::not_found("there is no such product"))
}

fn precondition_failed() -> Problem {
    Problem::new(412, "the cart has changed since")
}
