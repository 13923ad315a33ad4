//! The two tables of routes.

use chassis::health;
use chassis::router::{Route, route};

use crate::App;
use crate::movies::routes as movies;
use crate::products::routes as products;
use crate::reservations::routes as reservations;
use crate::stock::routes as stock;

/// The public API, behind the gateway.
pub const ROUTES: &[Route<App>] = &[
    route("GET", "/api/movies", movies::list),
    route("POST", "/api/movies", movies::create),
    route("DELETE", "/api/movies", movies::delete_all),
    route("GET", "/api/movies/{id}", movies::get),
    route("PUT", "/api/movies/{id}", movies::update),
    route("DELETE", "/api/movies/{id}", movies::delete),
    route("GET", "/api/v1/products", products::list),
    route("POST", "/api/v1/products", products::create),
    route("GET", "/api/v1/products/{sku}", products::get),
    route("PATCH", "/api/v1/products/{sku}", products::update),
    route("DELETE", "/api/v1/products/{sku}", products::retire),
    route("GET", "/api/v1/products/{sku}/stock", stock::get),
    route("PUT", "/api/v1/products/{sku}/stock", stock::set),
    route("GET", "/api/v1/products/{sku}/stock/adjustments", stock::adjustments),
    route("POST", "/api/v1/products/{sku}/stock/adjustments", stock::adjust),
    route("GET", "/health", |_, _, _| Ok(health::liveness())),
    route("GET", "/health/ready", |app, _, _| Ok(health::readiness(&app.probes))),
];

/// The internal API, for other services.
pub const INTERNAL_ROUTES: &[Route<App>] = &[
    route("GET", "/internal/products", products::internal_list),
    route("GET", "/internal/reservations/{order_id}", reservations::get),
    route("PUT", "/internal/reservations/{order_id}", reservations::hold),
    route("DELETE", "/internal/reservations/{order_id}", reservations::release),
    route("POST", "/internal/reservations/{order_id}/confirm", reservations::confirm),
    route("POST", "/internal/reservations/{order_id}/commit", reservations::commit),
    route("GET", "/health", |_, _, _| Ok(health::liveness())),
    route("GET", "/health/ready", |app, _, _| Ok(health::readiness(&app.probes))),
];
