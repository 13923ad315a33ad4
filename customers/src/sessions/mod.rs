//! Sessions: login, refresh, logout, and the list of sessions that have ended.

pub mod feed;
pub mod routes;
pub mod store;
pub mod sweep;
pub mod tokens;
