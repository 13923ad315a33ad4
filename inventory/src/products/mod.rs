//! Products: their rules, their SQL and their HTTP API.

pub mod list;
pub mod product;
pub mod routes;
pub mod store;
