//! What every service needs before it knows its subject: configuration, logging, the HTTP
//! server, problem documents, entity tags, the database pool, the broker connection, health,
//! metrics and the stop signal.
//!
//! No business noun, table, route, queue name or upstream may appear here.

#[cfg(feature = "auth")]
pub mod auth;
pub mod backoff;
pub mod broker;
pub mod db;
pub mod decimal;
pub mod env;
pub mod etag;
pub mod fields;
pub mod health;
pub mod http1;
pub mod logging;
pub mod metrics;
pub mod problem;
pub mod query;
pub mod request;
pub mod response;
pub mod router;
pub mod semaphore;
pub mod server;
pub mod stop;
#[cfg(feature = "testing")]
pub mod testing;
#[cfg(feature = "upstream")]
pub mod upstream;

pub use env::{Env, Secret};
pub use problem::Problem;
pub use stop::Stop;
