//! What every service needs before it knows what it is about: configuration,
//! logging, the HTTP server, problem documents, the database pool, the broker
//! connection, health, metrics and the stop signal.
//!
//! No business noun, table, route, queue name or upstream may appear in here.

pub mod broker;
pub mod db;
pub mod decimal;
pub mod env;
pub mod health;
pub mod http1;
pub mod logging;
pub mod metrics;
pub mod problem;
pub mod request;
pub mod response;
pub mod router;
pub mod semaphore;
pub mod server;
pub mod stop;
#[cfg(feature = "testing")]
pub mod testing;

pub use env::{Env, Secret};
pub use problem::Problem;
pub use stop::Stop;
