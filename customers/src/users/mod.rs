//! Accounts: registration, one's own account, the administrators' list.

pub mod command;
pub mod fields;
pub mod list;
pub mod routes;
pub mod store;
pub mod user;
