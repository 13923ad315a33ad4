//! The table of routes.

use chassis::health;
use chassis::router::{Route, route};

use crate::App;
use crate::movies::routes as movies;

/// Every route of this service.
pub const ROUTES: &[Route<App>] = &[
    route("GET", "/api/movies", movies::list),
    route("POST", "/api/movies", movies::create),
    route("DELETE", "/api/movies", movies::delete_all),
    route("GET", "/api/movies/{id}", movies::get),
    route("PUT", "/api/movies/{id}", movies::update),
    route("DELETE", "/api/movies/{id}", movies::delete),
    route("GET", "/health", |_, _, _| Ok(health::liveness())),
    route("GET", "/health/ready", |app, _, _| Ok(health::readiness(&app.probes))),
];
