//! Orders: how one is made, what may happen to it, and which messages follow.

pub mod change;
pub mod create;
pub mod idempotency;
pub mod input;
pub mod list;
pub mod order;
pub mod routes;
pub mod store;
pub mod sweep;
