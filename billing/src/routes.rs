//! The table of routes: only health. Orders arrive by the queue.

use chassis::health;
use chassis::router::{Route, route};

use crate::App;

/// Every route of this service.
pub const ROUTES: &[Route<App>] = &[
    route("GET", "/health", |_, _, _| Ok(health::liveness())),
    route("GET", "/health/ready", |app, _, _| Ok(health::readiness(&app.probes))),
];
