//! Which path goes where.

use chassis::health;
use chassis::problem::Problem;
use chassis::router::{Params, Route, route};
use chassis::{request, response};
use rouille::{Request, Response};
use serde_json::json;

use crate::order::{self, Order};
use crate::{App, docs};

/// The public API.
pub const ROUTES: &[Route<App>] = &[
    route("*", "/api/movies/*", movies),
    route("POST", "/api/billing", place_order),
    route("GET", "/health", |_, _, _| Ok(health::liveness())),
    route("GET", "/health/ready", |app, _, _| Ok(health::readiness(&app.probes))),
    route("GET", "/openapi.yaml", |_, request, _| Ok(docs::openapi_yaml(request))),
    route("GET", "/openapi.json", |_, request, _| Ok(docs::openapi_json(request))),
    route("GET", "/docs", |_, request, _| Ok(docs::page(request))),
    route("GET", "/docs/{asset}", asset),
];

/// Anything under `/api/movies`: inventory knows which of it there is.
fn movies(app: &App, request: &Request, _: &Params<'_>) -> Result<Response, Problem> {
    app.inventory.forward(request)
}

/// `POST /api/billing`
fn place_order(app: &App, request: &Request, _: &Params<'_>) -> Result<Response, Problem> {
    let key = match request::single_header(request, "Idempotency-Key")? {
        Some(header) => Some(order::idempotency_key(header)?),
        None => None,
    };
    let text = request::json_text(request)?;
    if text.len() > order::MAX_BYTES {
        let limit = order::MAX_BYTES;
        return Err(Problem::new(413, format!("an order may have at most {limit} bytes")));
    }
    let order = Order::parse(&text)?;
    let id = order.message_id(key.as_deref());
    app.publisher.publish(&id, order.body)?;
    Ok(response::ok(&json!({ "message": "Message posted", "id": id })))
}

/// `GET /docs/{asset}`
fn asset(_: &App, request: &Request, params: &Params<'_>) -> Result<Response, Problem> {
    let found = params.first().and_then(|name| docs::asset(name, request));
    found.ok_or_else(|| Problem::not_found("there is nothing at this path"))
}
