//! The internal API, for other services only.

use chassis::query::Query;
use chassis::router::{Params, positive_id};
use chassis::{Problem, response};
use rouille::{Request, Response};
use serde::Serialize;
use serde_json::value::RawValue;

use crate::App;
use crate::sessions::store as sessions;
use crate::users::store::{self as users, Contact};

/// A user as an order needs it.
#[derive(Serialize)]
struct ContactAnswer {
    id: i64,
    name: Option<String>,
    email: String,
    shipping_address: Option<Box<RawValue>>,
    billing_address: Option<Box<RawValue>>,
    payment_method: Option<Box<RawValue>>,
    state: &'static str,
}

/// `GET /internal/users/{id}`
pub fn user(app: &App, _: &Request, params: &Params) -> Result<Response, Problem> {
    let not_found = || Problem::not_found("there is no such user");
    let id = positive_id(params).ok_or_else(not_found)?;
    let Contact { user, disabled } =
        app.db.read(|db| users::contact(db, id))?.ok_or_else(not_found)?;
    let names: Vec<&str> =
        [&user.first_name, &user.last_name].into_iter().flatten().map(String::as_str).collect();
    let name = if names.is_empty() { user.username } else { Some(names.join(" ")) };
    Ok(response::ok(&ContactAnswer {
        id: user.id,
        name,
        email: user.email,
        shipping_address: user.shipping_address,
        billing_address: user.billing_address,
        payment_method: user.payment_method,
        state: if disabled { "disabled" } else { "active" },
    }))
}

/// `GET /internal/revocations?after=N&epoch=E`
pub fn revocations(app: &App, request: &Request, _: &Params) -> Result<Response, Problem> {
    let mut query = Query::parse(request.raw_query_string(), &["after", "epoch"])?;
    let after = query.number("after", 0, 0..=i64::MAX);
    let epoch = query.value("epoch").unwrap_or_default();
    query.finish()?;
    let page = app.db.read(|db| sessions::revocations(db, &epoch, after))?;
    Ok(response::ok(&page))
}

/// `GET /.well-known/jwks.json`
pub fn jwks(app: &App, _: &Request, _: &Params) -> Result<Response, Problem> {
    let keys = app.issuer.keys.public().to_jwks();
    Ok(response::ok(&keys).with_unique_header("Cache-Control", "public, max-age=300"))
}
