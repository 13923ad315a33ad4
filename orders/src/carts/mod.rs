//! Carts: one a user, made by the first change.

pub mod cart;
pub mod routes;
pub mod store;
