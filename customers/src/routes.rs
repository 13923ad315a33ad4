//! The two tables of routes.

use chassis::health;
use chassis::router::{Route, route};

use crate::sessions::routes as sessions;
use crate::users::routes as users;
use crate::{App, internal};

/// The public API, behind the gateway.
pub const ROUTES: &[Route<App>] = &[
    route("POST", "/api/v1/auth/login", sessions::login),
    route("POST", "/api/v1/auth/refresh", sessions::refresh),
    route("POST", "/api/v1/auth/logout", sessions::logout),
    route("GET", "/api/v1/auth/session", sessions::current),
    route("GET", "/api/v1/auth/sessions", sessions::list),
    route("DELETE", "/api/v1/auth/sessions", sessions::end_all),
    route("DELETE", "/api/v1/auth/sessions/{id}", sessions::end_one),
    route("POST", "/api/v1/users", users::register),
    route("GET", "/api/v1/users", users::list),
    route("GET", "/api/v1/users/exists", users::exists),
    route("GET", "/api/v1/users/{id}", users::get),
    route("PATCH", "/api/v1/users/{id}", users::update),
    route("DELETE", "/api/v1/users/{id}", users::delete),
    route("PUT", "/api/v1/users/{id}/password", users::set_password),
    route("GET", "/.well-known/jwks.json", internal::jwks),
    route("GET", "/health", |_, _, _| Ok(health::liveness())),
    route("GET", "/health/ready", |app, _, _| Ok(health::readiness(&app.probes))),
];

/// The internal API, for other services.
pub const INTERNAL_ROUTES: &[Route<App>] = &[
    route("GET", "/internal/users/{id}", internal::user),
    route("GET", "/internal/revocations", internal::revocations),
    route("GET", "/.well-known/jwks.json", internal::jwks),
    route("GET", "/health", |_, _, _| Ok(health::liveness())),
    route("GET", "/health/ready", |app, _, _| Ok(health::readiness(&app.probes))),
];
