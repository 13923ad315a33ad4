//! The table of routes.

use chassis::health;
use chassis::problem::Problem;
use chassis::router::{Params, Route, route};
use rouille::{Request, Response};
use serde_json::json;

use crate::{App, billing, docs, proxy};

/// The public API.
pub const ROUTES: &[Route<App>] = &[
    route("*", "/api/movies/*", inventory),
    route("*", "/api/v1/products/*", inventory),
    route("POST", "/api/billing", billing::place_order),
    route("*", "/api/v1/auth/*", customers),
    route("*", "/api/v1/users/*", customers),
    route("*", "/.well-known/*", customers),
    route("*", "/api/v1/carts/*", orders),
    route("*", "/api/v1/orders/*", orders),
    route("*", "/api/v1/webhooks/*", orders),
    route("*", "/v1/order", orders),
    route("*", "/orders/*", orders),
    route("GET", "/health", |_, _, _| Ok(health::liveness())),
    route("GET", "/health/ready", |app, _, _| Ok(health::readiness(&app.probes))),
    route("GET", "/openapi.yaml", |_, request, _| Ok(docs::openapi_yaml(request))),
    route("GET", "/openapi.json", |_, request, _| Ok(docs::openapi_json(request))),
    route("GET", "/docs", |_, request, _| Ok(docs::page(request))),
    route("GET", "/docs/{asset}", asset),
    route("GET", "/", root),
];

/// Everything of movies and products: inventory has the routes.
fn inventory(app: &App, request: &Request, _: &Params<'_>) -> Result<Response, Problem> {
    proxy::forward(&app.inventory, &app.trusted_proxies, request)
}

/// Everything of accounts and sessions: customers has the routes.
fn customers(app: &App, request: &Request, _: &Params<'_>) -> Result<Response, Problem> {
    proxy::forward(&app.customers, &app.trusted_proxies, request)
}

/// Everything of carts and orders: orders has the routes.
fn orders(app: &App, request: &Request, _: &Params<'_>) -> Result<Response, Problem> {
    proxy::forward(&app.orders, &app.trusted_proxies, request)
}

/// `GET /docs/{asset}`
fn asset(_: &App, request: &Request, params: &Params<'_>) -> Result<Response, Problem> {
    let found = params.first().and_then(|name| docs::asset(name, request));
    found.ok_or_else(|| Problem::not_found("there is nothing at this path"))
}

/// `GET /`: the documentation for a browser, links for a program.
fn root(_: &App, request: &Request, _: &Params<'_>) -> Result<Response, Problem> {
    let accepts = request.header("Accept").unwrap_or_default();
    let response = if accepts.contains("text/html") {
        Response::empty_204().with_status_code(302).with_unique_header("Location", "/docs")
    } else {
        Response::json(&json!({
            "name": "matinee",
            "version": env!("CARGO_PKG_VERSION"),
            "links": {
                "docs": "/docs",
                "openapi": "/openapi.json",
                "movies": "/api/movies",
                "products": "/api/v1/products",
                "billing": "/api/billing",
                "users": "/api/v1/users",
                "carts": "/api/v1/carts/me",
                "orders": "/api/v1/orders",
                "login": "/api/v1/auth/login",
                "health": "/health/ready",
            },
        }))
    };
    // The two forms depend on the request's Accept.
    Ok(response.with_unique_header("Vary", "Accept"))
}
