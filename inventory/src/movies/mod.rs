//! Movies: their rules, their SQL and their HTTP API.

pub mod list;
pub mod movie;
pub mod routes;
pub mod store;
