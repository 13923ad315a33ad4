//! The HTTP API of products.

use chassis::etag;
use chassis::query::pairs;
use chassis::router::Params;
use chassis::{Problem, request as http, response};
use rouille::{Request, Response};
use serde::Serialize;

use super::list::{self, ListQuery};
use super::product::{NewProduct, ProductUpdate, is_sku};
use super::store::{self, Offer, Versioned, WriteOutcome};
use crate::App;

/// Most products of one internal request.
const MAX_OFFERS: usize = 100;

#[derive(Serialize)]
struct Offers<'a> {
    currency: &'a str,
    items: Vec<Offer>,
}

/// `GET /api/v1/products`
pub fn list(app: &App, request: &Request, _: &Params) -> Result<Response, Problem> {
    let response = list::list_response(app, &ListQuery::parse(request.raw_query_string())?)?;
    Ok(cacheable(app, response))
}

/// `POST /api/v1/products`
pub fn create(app: &App, request: &Request, _: &Params) -> Result<Response, Problem> {
    app.auth.principal(request)?.require_admin()?;
    let new = NewProduct::from_json(&http::json_text(request)?, &app.currency)?;
    let created = app.db.write(|db| store::insert(db, &new, &app.currency))?.ok_or_else(|| {
        Problem::new(409, format!("there is or was a product with the sku {}", new.sku))
    })?;
    let location = format!("/api/v1/products/{}", created.product.sku);
    Ok(with_etag(app, response::created(location, &created.product), &created))
}

/// `GET /api/v1/products/{sku}`
pub fn get(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    let sku = sku(params)?;
    let if_match = etag::if_match(request)?;
    let found = app.db.read(|db| store::select(db, sku, &app.currency))?.ok_or_else(not_found)?;
    if if_match.is_some_and(|tags| !tags.contains(&found.version)) {
        return Err(precondition_failed());
    }
    if etag::matches_if_none_match(request, &found.version) {
        return Ok(with_etag(app, Response::empty_204().with_status_code(304), &found));
    }
    Ok(with_etag(app, response::ok(&found.product), &found))
}

/// `PATCH /api/v1/products/{sku}`
pub fn update(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    app.auth.principal(request)?.require_admin()?;
    let sku = sku(params)?;
    let update = ProductUpdate::from_json(&http::json_text(request)?, sku, &app.currency)?;
    let precondition = etag::precondition(request)?;
    let outcome =
        app.db.write(|db| store::update(db, sku, &update, &precondition, &app.currency))?;
    let updated = into_result(outcome)?;
    Ok(with_etag(app, response::ok(&updated.product), &updated))
}

/// `DELETE /api/v1/products/{sku}`
pub fn retire(app: &App, request: &Request, params: &Params) -> Result<Response, Problem> {
    app.auth.principal(request)?.require_admin()?;
    let sku = sku(params)?;
    let precondition = etag::precondition(request)?;
    into_result(app.db.write(|db| store::retire(db, sku, &precondition))?)?;
    Ok(Response::empty_204())
}

/// `GET /internal/products?sku=…&sku=…`: those that exist, retired ones too, in the order of the
/// request.
pub fn internal_list(app: &App, request: &Request, _: &Params) -> Result<Response, Problem> {
    let pairs = pairs(request.raw_query_string())?;
    let mut skus: Vec<String> =
        pairs.filter(|(name, _)| name == "sku").map(|(_, sku)| sku.into_owned()).collect();
    if !(1..=MAX_OFFERS).contains(&skus.len()) {
        return Err(Problem::invalid_field("sku", "must be given 1 to 100 times"));
    }
    skus.retain(|sku| is_sku(sku));
    let items = app.db.read(|db| store::offers(db, &skus))?;
    Ok(response::ok(&Offers { currency: &app.currency, items }))
}

/// The sku in the path. A text that cannot be one names no product, so it is 404.
pub fn sku<'p>(params: &'p Params) -> Result<&'p str, Problem> {
    params.first().copied().filter(|sku| is_sku(sku)).ok_or_else(not_found)
}

/// There is no such product, or it was retired.
pub fn not_found() -> Problem {
    Problem::not_found("there is no such product")
}

/// The version that the client knows is not the current one.
pub fn precondition_failed() -> Problem {
    Problem::new(412, "the product has changed since")
}

fn into_result<T>(outcome: WriteOutcome<T>) -> Result<T, Problem> {
    match outcome {
        WriteOutcome::Done(result) => Ok(result),
        WriteOutcome::PreconditionFailed => Err(precondition_failed()),
        WriteOutcome::NotFound => Err(not_found()),
    }
}

fn with_etag(app: &App, response: Response, versioned: &Versioned) -> Response {
    cacheable(app, response).with_etag_keep(format!("\"{}\"", versioned.version))
}

fn cacheable(app: &App, response: Response) -> Response {
    response.with_unique_header("Cache-Control", app.products_cache_control.clone())
}
