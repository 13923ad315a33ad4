//! The table of routes.

use chassis::health;
use chassis::router::{Route, route};

use crate::App;
use crate::carts::routes as carts;
use crate::orders::{create, list, routes as orders};
use crate::webhooks::routes as webhooks;

/// The public API, behind the gateway. The paths below `/orders` and `/v1` are older names of the same.
pub const ROUTES: &[Route<App>] = &[
    route("GET", "/api/v1/carts/{user}", carts::get),
    route("DELETE", "/api/v1/carts/{user}", carts::empty),
    route("POST", "/api/v1/carts/{user}/items", carts::add),
    route("PUT", "/api/v1/carts/{user}/items/{sku}", carts::set),
    route("DELETE", "/api/v1/carts/{user}/items/{sku}", carts::remove),
    route("POST", "/api/v1/carts/{user}/checkout", create::checkout),
    route("GET", "/api/v1/orders", list::list),
    route("POST", "/api/v1/orders", create::create),
    route("GET", "/api/v1/orders/{id}", orders::get),
    route("DELETE", "/api/v1/orders/{id}", orders::delete),
    route("PUT", "/api/v1/orders/{id}/payment", orders::pay),
    route("PUT", "/api/v1/orders/{id}/shipping", orders::set_shipping),
    route("PUT", "/api/v1/orders/{id}/shipment/tracking", orders::ship),
    route("POST", "/api/v1/orders/{id}/delivery", orders::deliver),
    route("POST", "/api/v1/orders/{id}/cancellation", orders::cancel),
    route("PUT", "/api/v1/orders/{id}/refund", orders::refund),
    route("PUT", "/api/v1/orders/{id}/status", orders::set_status),
    route("POST", "/api/v1/webhooks/payments", webhooks::payments),
    route("POST", "/api/v1/webhooks/shipments", webhooks::shipments),
    route("POST", "/v1/order", create::create),
    route("GET", "/orders", list::list),
    route("POST", "/orders", create::create),
    route("GET", "/orders/{id}", orders::get),
    route("DELETE", "/orders/{id}", orders::delete),
    route("PUT", "/orders/{id}/payment", orders::pay),
    route("PUT", "/orders/{id}/shipping", orders::set_shipping),
    route("PUT", "/orders/{id}/shipment/tracking", orders::ship),
    route("POST", "/orders/{id}/delivery", orders::deliver),
    route("POST", "/orders/{id}/cancellation", orders::cancel),
    route("PUT", "/orders/{id}/refund", orders::refund),
    route("PUT", "/orders/{id}/status", orders::set_status),
    route("GET", "/health", |_, _, _| Ok(health::liveness())),
    route("GET", "/health/ready", |app, _, _| Ok(health::readiness(&app.probes))),
];
